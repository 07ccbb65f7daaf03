//! The judge by a table, and by every order in which things can happen on two hosts.

use super::*;
use proptest::prelude::*;

const HERE: [Here; 3] = [Here::Alive, Here::StandsStill, Here::Gone];
const THERE: [There; 5] = [There::Unknown, There::Nothing, There::Whole, There::Lost, There::Taken];

fn all() -> impl Iterator<Item = Evidence> {
    [false, true].into_iter().flat_map(|handed_over| {
        HERE.into_iter()
            .flat_map(move |here| THERE.into_iter().map(move |there| Evidence { handed_over, here, there }))
    })
}

#[test]
fn the_judge_decides_by_this_table() {
    use Here::{Alive, Gone, StandsStill};
    use There::{Lost, Nothing, Taken, Unknown, Whole};
    use Verdict::{Aborted, Committed};
    let asks = Verdict::Wait(Missing::TargetsAnswer);
    let lost = Verdict::Wait(Missing::TargetLostIt);
    let both = Verdict::Wait(Missing::BothClaimIt);
    for (here, there, before, after) in [
        (Alive, Unknown, Aborted, Aborted),
        (Alive, Nothing, Aborted, Aborted),
        (Alive, Whole, Aborted, Aborted),
        (Alive, Lost, Aborted, Aborted),
        (Alive, Taken, both, both),
        (StandsStill, Unknown, asks, asks),
        (StandsStill, Nothing, Aborted, lost),
        (StandsStill, Whole, Committed, Committed),
        (StandsStill, Lost, Aborted, lost),
        (StandsStill, Taken, Committed, Committed),
        (Gone, Unknown, asks, Committed),
        (Gone, Nothing, Aborted, Committed),
        (Gone, Whole, Committed, Committed),
        (Gone, Lost, Aborted, Committed),
        (Gone, Taken, Committed, Committed),
    ] {
        for (handed_over, expected) in [(false, before), (true, after)] {
            let evidence = Evidence { handed_over, here, there };
            assert_eq!(judge(evidence), expected, "{evidence:?}");
        }
    }
    assert_eq!(all().count(), 30);
}

#[test]
fn what_runs_here_is_never_given_away() {
    for evidence in all().filter(|e| e.here == Here::Alive) {
        assert_ne!(judge(evidence), Verdict::Committed, "{evidence:?}");
    }
}

#[test]
fn what_was_handed_over_is_taken_back_only_if_it_is_seen_running_here() {
    for evidence in all().filter(|e| e.handed_over && e.here != Here::Alive) {
        assert_ne!(judge(evidence), Verdict::Aborted, "{evidence:?}");
    }
}

#[test]
fn the_word_to_the_target_is_what_was_decided_and_no_guess() {
    let id = MigrationId::random();
    let ended = |committed, side| Ended {
        id,
        vm: VmId::random(),
        side,
        committed,
        peer: String::new(),
        at: Timestamp(0),
    };
    let source = |committed| ended(committed, Side::Source);
    assert_eq!(word(id, Some(&source(true)), None, false), Word::Committed);
    assert_eq!(word(id, Some(&source(true)), None, true), Word::Committed, "whatever goes on since");
    assert_eq!(word(id, Some(&source(false)), None, true), Word::Aborted);
    assert_eq!(word(id, None, None, true), Word::Pending, "its job is open");
    assert_eq!(word(id, None, None, false), Word::Unknown, "never a guess");
    let own = ended(true, Side::Target);
    assert_eq!(word(id, Some(&own), None, false), Word::Unknown, "a row of the other side says nothing");
}

/// Both hosts, as small as they can be and still run a VM twice.
#[derive(Debug, Clone)]
struct Hosts {
    // The source's disk.
    handed_over: bool,
    decided: Option<bool>,
    // The source's world.
    here: Here,
    /// The source's toolstack was told to destroy the domain.
    told: bool,
    sending: bool,
    // The target's disk.
    arrival: bool,
    taken: Option<bool>,
    // The target's world.
    copy: Copy,
    source_up: bool,
    target_up: bool,
    link_up: bool,
    memory_died: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Copy {
    None,
    Paused,
    Running,
}

/// What may happen next, in any order, as often as it likes.
#[derive(Debug, Clone, Copy)]
enum Event {
    StandStill,
    Arrive,
    WriteArrival,
    HandOver,
    TellToolstack,
    Destroy,
    SourceJudges,
    TargetAsks,
    SourceDies,
    TargetDies,
    SourceBack,
    TargetBack,
    SourceHostDies,
    TargetHostDies,
    LinkDown,
    LinkUp,
}

impl Hosts {
    fn new() -> Self {
        Self {
            handed_over: false,
            decided: None,
            here: Here::Alive,
            told: false,
            sending: true,
            arrival: false,
            taken: None,
            copy: Copy::None,
            source_up: true,
            target_up: true,
            link_up: true,
            memory_died: false,
        }
    }

    fn flowing(&self) -> bool {
        self.sending && self.source_up && self.target_up && self.link_up
    }

    /// The toolstack of a sender that is gone: before it was told it lets the domain go on.
    fn sender_gone(&mut self) {
        if self.sending && self.here == Here::StandsStill && !self.told {
            self.here = Here::Alive;
        }
        self.sending = false;
    }

    fn there(&self) -> There {
        if !(self.target_up && self.link_up) {
            return There::Unknown;
        }
        match (self.taken, self.arrival, self.copy) {
            (Some(true), ..) => There::Taken,
            (_, true, Copy::Paused) => There::Whole,
            (_, true, _) => There::Lost,
            _ => There::Nothing,
        }
    }

    fn judge(&mut self) {
        if !self.source_up || self.decided.is_some() {
            return;
        }
        let evidence = Evidence { handed_over: self.handed_over, here: self.here, there: self.there() };
        match judge(evidence) {
            Verdict::Committed => {
                self.here = Here::Gone;
                self.decided = Some(true);
            }
            Verdict::Aborted => self.decided = Some(false),
            Verdict::Wait(_) => {}
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::StandStill if self.flowing() && self.here == Here::Alive => self.here = Here::StandsStill,
            Event::Arrive if self.flowing() && self.here == Here::StandsStill && self.copy == Copy::None => {
                self.copy = Copy::Paused;
            }
            // T1, also if the source is not heard any more.
            Event::WriteArrival if self.target_up && self.copy == Copy::Paused && self.taken.is_none() => {
                self.arrival = true;
            }
            // S1: after READY, which comes after T1.
            Event::HandOver if self.flowing() && self.arrival && self.here == Here::StandsStill => {
                self.handed_over = true;
            }
            Event::TellToolstack if self.sending && self.source_up && self.handed_over => self.told = true,
            Event::Destroy if self.told && self.sending && self.here == Here::StandsStill => {
                self.here = Here::Gone;
                self.sending = false;
            }
            // The step is over before anybody judges: its sender is gone.
            Event::SourceJudges if self.source_up => {
                if self.sending && !self.told {
                    self.sender_gone();
                }
                self.judge();
            }
            Event::TargetAsks if self.target_up && self.source_up && self.link_up && self.arrival => {
                match self.decided {
                    Some(true) => {
                        self.arrival = false;
                        self.taken = Some(true);
                        if self.copy == Copy::Paused {
                            self.copy = Copy::Running;
                        }
                    }
                    Some(false) => {
                        self.arrival = false;
                        self.taken = Some(false);
                        self.copy = Copy::None;
                    }
                    None => {}
                }
            }
            Event::SourceDies => {
                self.source_up = false;
                self.sender_gone();
            }
            Event::TargetDies => {
                self.target_up = false;
                self.sender_gone();
                if !self.arrival && self.taken.is_none() && self.copy == Copy::Paused {
                    // Whole and not written down: cleared away when the agent is back.
                    self.copy = Copy::None;
                }
            }
            Event::SourceHostDies => {
                self.memory_died |= self.here != Here::Gone;
                self.here = Here::Gone;
                (self.source_up, self.sending) = (false, false);
            }
            Event::TargetHostDies => {
                self.memory_died |= self.copy != Copy::None;
                self.copy = Copy::None;
                self.target_up = false;
                self.sender_gone();
            }
            Event::SourceBack => self.source_up = true,
            Event::TargetBack => self.target_up = true,
            Event::LinkDown => {
                self.link_up = false;
                self.sender_gone();
            }
            Event::LinkUp => self.link_up = true,
            _ => {}
        }
    }

    fn running(&self) -> usize {
        usize::from(self.here == Here::Alive) + usize::from(self.copy == Copy::Running)
    }
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    use Event::*;
    let one = prop::sample::select(vec![
        StandStill,
        Arrive,
        WriteArrival,
        HandOver,
        TellToolstack,
        Destroy,
        SourceJudges,
        TargetAsks,
        SourceDies,
        TargetDies,
        SourceBack,
        TargetBack,
        SourceHostDies,
        TargetHostDies,
        LinkDown,
        LinkUp,
    ]);
    // The usual order, with anything between: else few runs would come far.
    let usual =
        [StandStill, Arrive, WriteArrival, HandOver, TellToolstack, Destroy, SourceJudges, TargetAsks];
    prop::collection::vec((prop::collection::vec(one, 0..3), 0..10_u8), 8).prop_map(move |between| {
        let mut all = Vec::new();
        for ((some, skip), next) in between.into_iter().zip(usual) {
            all.extend(some);
            if skip > 0 {
                all.push(next);
            }
        }
        all
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_dies_whenever_two_never_run_and_once_all_are_back_one_does(events in events()) {
        let mut hosts = Hosts::new();
        for event in events {
            hosts.happen(event);
            prop_assert!(hosts.running() <= 1, "{event:?}: {hosts:?}");
        }
        for event in [Event::SourceBack, Event::TargetBack, Event::LinkUp] {
            hosts.happen(event);
        }
        // What a live toolstack was told, it does; then both agents look, as they do again and again.
        for _ in 0..3 {
            if !hosts.sending && !hosts.arrival && hosts.taken.is_none() {
                // A receiver whose stream broke before T1 takes its half back.
                hosts.copy = Copy::None;
            }
            for event in [Event::Destroy, Event::SourceJudges, Event::TargetAsks] {
                hosts.happen(event);
                prop_assert!(hosts.running() <= 1, "{event:?}: {hosts:?}");
            }
        }
        prop_assert!(hosts.running() == 1 || hosts.memory_died, "it runs nowhere: {hosts:?}");
        prop_assert!(hosts.copy != Copy::Paused, "debris: {hosts:?}");
    }
}
