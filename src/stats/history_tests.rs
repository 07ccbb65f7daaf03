//! The history over days and restarts, against a plain list of all values.

use super::*;
use crate::model::VmId;
use crate::stats::query::{QueryError, Question};
use crate::stats::{Figure, MetricId};
use crate::xen::DomId;
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::time::Instant;

/// A full day since 1970, so that hours and days begin together.
const BEGIN_S: u64 = 20_000 * 86_400;

fn vm() -> VmId {
    VmId::parse("0004fb00-0006-0000-aaaa-bbbbccccdddd").unwrap()
}

struct World {
    folder: tempfile::TempDir,
    history: History,
    origin: Instant,
    now_s: u64,
    domid: u32,
    cpu_s: f64,
}

fn figure(name: &str, instance: Option<&str>, value: f64) -> Figure {
    Figure { metric: MetricId::parse(name).unwrap(), instance: instance.map(Arc::from), value }
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let history = History::open(&folder.path().join("stats")).unwrap();
        Self { folder, history, origin: Instant::now(), now_s: BEGIN_S, domid: 3, cpu_s: 0.0 }
    }

    /// Another agent, with what is on disk.
    fn restart(&mut self) {
        self.history = History::open(&self.folder.path().join("stats")).unwrap();
    }

    /// A sweep every ten seconds until so many seconds after the begin; in hour h the VM uses (h mod 10) tenths of
    /// a CPU and has h MiB.
    fn until(&mut self, end_s: u64) {
        while self.now_s < BEGIN_S + end_s {
            let hour = (self.now_s - BEGIN_S) / 3600;
            self.cpu_s += (hour % 10) as f64;
            self.now_s += 10;
            let figures = vec![figure("cpu_time", None, self.cpu_s), figure("memory", None, hour as f64)];
            let object = ObjectFigures {
                object: Object::Vm(vm()),
                name: "web".into(),
                domid: Some(DomId(self.domid)),
                figures,
            };
            // A sweep is of the ten seconds before it.
            let sweep = Sweep {
                at: Timestamp((self.now_s - 1) * 1000),
                instant: self.origin + Duration::from_secs(self.now_s - BEGIN_S),
                took: Duration::ZERO,
                objects: vec![object],
                problems: Vec::new(),
            };
            assert_eq!(self.history.record(&Arc::new(sweep)), 0);
        }
    }

    fn ask(&self, series: &str, from_s: u64, to_s: u64, step_s: u64) -> (u64, Vec<Option<f32>>) {
        let question = Question {
            object: Object::Vm(vm()),
            series: SeriesKey::parse(series).unwrap(),
            from_s: BEGIN_S + from_s,
            to_s: BEGIN_S + to_s,
            step_s,
        };
        let answer = self.history.query(&question, Timestamp(self.now_s * 1000)).unwrap();
        (answer.resolution_s, answer.values)
    }
}

#[test]
fn each_time_is_answered_at_its_own_fineness_up_to_the_last_sweep() {
    let mut world = World::new();
    world.until(3 * 86_400 + 5 * 3600 + 30);
    let end = 3 * 86_400 + 5 * 3600 + 30;
    let (resolution, values) = world.ask("cpu_time", end - 300, end - 10, 0);
    assert_eq!((resolution, values.len()), (10, 30));
    // Day 3, hour 4 is the 76th hour: 0.6; hour 5 the 77th: 0.7.
    assert_eq!(values[..27], [Some(0.6); 27]);
    assert_eq!(values[27..], [Some(0.7); 3]);
    let (resolution, values) = world.ask("cpu_time", end - 3630, end - 30, 0);
    assert_eq!((resolution, values.len()), (60, 61));
    assert!(values[..60].iter().all(|value| *value == Some(0.6)), "{values:?}");
    assert_eq!(values[60], Some(0.7), "the minute that is not over");
    let (resolution, values) = world.ask("memory", end - 24 * 3600 - 30, end - 30, 0);
    assert_eq!((resolution, values.len()), (3600, 25));
    let expected: Vec<_> = (53..=77).map(|hour| Some(hour as f32)).collect();
    assert_eq!(values, expected);
    let (resolution, values) = world.ask("memory", 0, end, 86_400);
    assert_eq!(resolution, 3600);
    let day = |from: u32, to: u32| Some((from..=to).sum::<u32>() as f32 / (to - from + 1) as f32);
    assert_eq!(values, [day(0, 23), day(24, 47), day(48, 71), day(72, 77)]);
    // Further back than hours reach.
    world.until(20 * 86_400);
    let (resolution, values) = world.ask("memory", 0, 3 * 86_400 - 1, 0);
    assert_eq!((resolution, values), (86_400, vec![day(0, 23), day(24, 47), day(48, 71)]));
}

#[test]
fn what_an_earlier_life_saw_in_the_last_minutes_is_answered_by_the_minutes_that_it_wrote() {
    let mut world = World::new();
    world.until(3600 + 300);
    world.history.flush();
    world.restart();
    // Before anything was seen in this life, and after.
    let (resolution, values) = world.ask("memory", 3600, 3600 + 290, 0);
    assert_eq!((resolution, values), (60, vec![Some(1.0); 30]));
    world.now_s += 60;
    world.until(3600 + 480);
    let (resolution, values) = world.ask("memory", 3600, 3600 + 470, 0);
    assert_eq!(resolution, 60, "the coarsest that went in");
    assert_eq!(values[..30], [Some(1.0); 30]);
    assert_eq!(values[30..36], [None; 6], "nobody looked");
    assert_eq!(values[36..], [Some(1.0); 12]);
    let (resolution, values) = world.ask("memory", 3600 + 360, 3600 + 470, 0);
    assert_eq!((resolution, values), (10, vec![Some(1.0); 12]));
    let (_, values) = world.ask("memory", 3600, 3600 + 179, 120);
    assert_eq!(values, [Some(1.0), Some(1.0)]);
}

#[test]
fn an_agent_that_starts_again_goes_on_and_a_time_without_one_is_empty() {
    let mut world = World::new();
    world.until(2 * 3600 + 1800);
    world.history.flush();
    world.restart();
    // Ten minutes nobody looked.
    world.now_s += 600;
    world.until(4 * 3600);
    let (_, values) = world.ask("memory", 2 * 3600, 4 * 3600 - 10, 60);
    assert_eq!(values.len(), 120);
    assert!(values[..30].iter().all(Option::is_some), "{values:?}");
    assert!(values[30..40].iter().all(Option::is_none), "{values:?}");
    assert!(values[40..].iter().all(Option::is_some), "{values:?}");
    let (_, hours) = world.ask("memory", 0, 4 * 3600 - 1, 3600);
    assert_eq!(hours, [Some(0.0), Some(1.0), Some(2.0), Some(3.0)]);
    // Killed, not stopped: the last minutes in memory go, what was written stays.
    world.until(4 * 3600 + 1830);
    world.restart();
    world.now_s += 3 * 3600;
    world.until(8 * 3600);
    let (_, hours) = world.ask("memory", 0, 8 * 3600 - 1, 3600);
    assert_eq!(hours[..5], [Some(0.0), Some(1.0), Some(2.0), Some(3.0), Some(4.0)]);
    assert_eq!(hours[5..7], [None, None]);
}

#[test]
fn a_vm_that_is_off_for_days_keeps_the_hour_and_the_day_it_went_off_in() {
    let mut world = World::new();
    world.until(26 * 3600 + 1200);
    // Off; the host is still measured.
    for minute in 0..3 * 24 * 60 {
        let at_s = world.now_s + minute * 60;
        let sweep = Sweep {
            at: Timestamp(at_s * 1000),
            instant: world.origin + Duration::from_secs(at_s - BEGIN_S),
            took: Duration::ZERO,
            objects: Vec::new(),
            problems: Vec::new(),
        };
        world.history.record(&Arc::new(sweep));
    }
    world.now_s += 3 * 86_400;
    let (_, hours) = world.ask("memory", 24 * 3600, 28 * 3600 - 1, 3600);
    assert_eq!(hours, [Some(24.0), Some(25.0), Some(26.0), None]);
    // The same after it ran again, in another agent, until its minutes are written over.
    world.restart();
    world.until(26 * 3600 + 1200 + 3 * 86_400 + 3 * 3600);
    let (_, hours) = world.ask("memory", 24 * 3600, 28 * 3600 - 1, 3600);
    assert_eq!(hours, [Some(24.0), Some(25.0), Some(26.0), None]);
    let (_, days) = world.ask("memory", 0, 3 * 86_400 - 1, 86_400);
    assert_eq!(days, [Some(11.5), Some(25.0), None]);
}

#[test]
fn a_day_that_was_made_of_a_part_is_made_anew_of_all_the_hours_that_are_left_however_late() {
    let mut world = World::new();
    world.until(26 * 3600 + 1200);
    // Gone for some minutes: its day is made of what there is.
    for minute in 1..=3 {
        let at_s = world.now_s + minute * 60;
        let sweep = Sweep {
            at: Timestamp(at_s * 1000),
            instant: world.origin + Duration::from_secs(at_s - BEGIN_S),
            took: Duration::ZERO,
            objects: Vec::new(),
            problems: Vec::new(),
        };
        world.history.record(&Arc::new(sweep));
    }
    world.now_s += 200;
    world.until(40 * 3600);
    world.restart();
    // Killed, and nobody there for eight days.
    world.now_s += 8 * 86_400;
    world.until(40 * 3600 + 8 * 86_400 + 7200);
    let (_, days) = world.ask("memory", 86_400, 2 * 86_400 - 1, 86_400);
    assert_eq!(days, [Some(31.5)], "of hours 24 to 39");
}

#[test]
fn hours_that_ended_while_no_agent_was_there_are_made_of_the_minutes_it_left() {
    let mut world = World::new();
    world.until(5 * 3600 + 2400);
    world.restart();
    world.now_s += 30 * 3600;
    world.until(40 * 3600);
    let (_, hours) = world.ask("memory", 3 * 3600, 7 * 3600 - 1, 3600);
    assert_eq!(hours, [Some(3.0), Some(4.0), Some(5.0), None]);
    let (_, days) = world.ask("memory", 0, 86_400 - 1, 86_400);
    assert_eq!(days, [Some(2.5)]);
}

#[test]
fn a_clock_that_jumps_breaks_nothing() {
    let mut world = World::new();
    world.until(2 * 3600);
    let ends = world.now_s;
    let jump = |world: &World, at_ms: u64, after_s: u64| {
        let sweep = Sweep {
            at: Timestamp(at_ms),
            instant: world.origin + Duration::from_secs(ends - BEGIN_S + after_s),
            took: Duration::ZERO,
            objects: vec![ObjectFigures {
                object: Object::Vm(vm()),
                name: "web".into(),
                domid: Some(DomId(3)),
                figures: vec![figure("memory", None, 1.0)],
            }],
            problems: Vec::new(),
        };
        assert_eq!(world.history.record(&Arc::new(sweep)), 0);
    };
    for (n, at_ms) in [ends * 1000 - 3_600_000, 0, u64::MAX, 1, ends * 1000].into_iter().enumerate() {
        jump(&world, at_ms, n as u64 * 10);
    }
    let (_, values) = world.ask("memory", 3600, 2 * 3600 - 1, 60);
    assert!(values.iter().flatten().count() > 50, "{values:?}");
    for (from_s, to_s, step_s) in [(0, u64::MAX, 0), (u64::MAX, u64::MAX, 1), (0, u64::MAX, u64::MAX)] {
        let series = SeriesKey::parse("memory").unwrap();
        let question = Question { object: Object::Vm(vm()), series, from_s, to_s, step_s };
        let _ = world.history.query(&question, Timestamp(u64::MAX));
    }
}

#[test]
fn a_clock_that_was_ahead_for_minutes_spoils_no_mean_of_the_days_after_it() {
    let mut world = World::new();
    world.until(2 * 3600);
    // The last of them into the place of the hour that has just ended, which is free again only a week later.
    for ahead_s in [86_400, 10 * 86_400 + 5 * 3600, 100 * 86_400, 14 * 86_400 - 3600] {
        let now_s = world.now_s;
        world.now_s += ahead_s;
        world.until(world.now_s - BEGIN_S + 180);
        world.now_s = now_s;
        world.until(now_s - BEGIN_S + 60);
    }
    world.until(4 * 86_400);
    let hours = |world: &World| world.ask("memory", 0, 4 * 86_400 - 1, 3600).1;
    assert_eq!(hours(&world)[24..], (24..96).map(|hour| Some(hour as f32)).collect::<Vec<_>>());
    // Further back than hours reach.
    world.until(20 * 86_400);
    let (resolution, days) = world.ask("memory", 0, 4 * 86_400 - 1, 86_400);
    assert_eq!(resolution, 86_400);
    assert_eq!(days[1..], [Some(35.5), Some(59.5), Some(83.5)]);
    assert!(days[0].is_some_and(|mean| (11.0..=12.0).contains(&mean)), "{days:?}");
}

#[test]
fn a_domain_that_began_anew_counts_from_there_and_never_backwards() {
    let mut world = World::new();
    world.until(3600 + 120);
    world.domid = 4;
    world.cpu_s = 0.0;
    world.until(3600 + 240);
    let (_, values) = world.ask("cpu_time", 3600 + 60, 3600 + 230, 0);
    let known: BTreeMap<bool, usize> = values.iter().fold(BTreeMap::new(), |mut map, value| {
        *map.entry(value.is_some()).or_default() += 1;
        map
    });
    assert_eq!(known, BTreeMap::from([(false, 1), (true, 17)]));
    assert!(values.iter().flatten().all(|value| (*value - 0.1).abs() < 1e-6), "{values:?}");
}

#[test]
fn a_question_that_cannot_be_answered_says_what_can() {
    let mut world = World::new();
    world.until(60);
    let ask = |object, series: &str, from_s, to_s, step_s| {
        let series = SeriesKey::parse(series).unwrap();
        let question = Question { object, series, from_s, to_s, step_s };
        world.history.query(&question, Timestamp(world.now_s * 1000)).unwrap_err()
    };
    let own = Object::Vm(vm());
    assert!(matches!(ask(Object::Dom0, "memory", 0, 1, 0), QueryError::NoObject(_)));
    let none = ask(own, "vcpus", BEGIN_S, BEGIN_S + 1, 0);
    assert!(none.to_string().contains("it has: memory, cpu_time"), "{none}");
    assert!(matches!(ask(own, "memory", BEGIN_S + 1, BEGIN_S, 0), QueryError::Backward));
    let far = ask(own, "memory", BEGIN_S, BEGIN_S, 400 * 86_400);
    assert!(far.to_string().contains("allowed: up to 31622400"), "{far}");
}

#[test]
fn a_file_that_is_damaged_or_cannot_be_written_costs_only_itself() {
    let mut world = World::new();
    world.until(7200);
    let path = world.folder.path().join("stats").join(format!("vm-{}.ring", vm()));
    std::fs::write(&path, b"garbage").unwrap();
    world.restart();
    world.until(2 * 7200);
    assert!(world.ask("memory", 7200, 2 * 7200 - 60, 60).1.iter().flatten().count() > 100);
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    let figures = vec![figure("memory", None, 1.0)];
    let sweep = |at_s: u64| Sweep {
        at: Timestamp(at_s * 1000),
        instant: world.origin + Duration::from_secs(at_s - BEGIN_S),
        took: Duration::ZERO,
        objects: vec![ObjectFigures {
            object: Object::Vm(vm()),
            name: "web".into(),
            domid: Some(DomId(3)),
            figures: figures.clone(),
        }],
        problems: Vec::new(),
    };
    assert_eq!(world.history.record(&Arc::new(sweep(world.now_s + 60))), 1);
}

#[test]
fn of_too_many_series_those_of_the_object_itself_are_kept() {
    let world = World::new();
    let mut figures: Vec<Figure> =
        (0..2 * MAX_SERIES).map(|n| figure("vif_rx_bytes", Some(&n.to_string()), n as f64)).collect();
    figures.push(figure("memory", None, 5.0));
    for n in 0..3 {
        let sweep = Sweep {
            at: Timestamp((BEGIN_S + n * 10) * 1000),
            instant: world.origin + Duration::from_secs(n * 10),
            took: Duration::ZERO,
            objects: vec![ObjectFigures {
                object: Object::Vm(vm()),
                name: "web".into(),
                domid: Some(DomId(3)),
                figures: figures.clone(),
            }],
            problems: Vec::new(),
        };
        assert_eq!(world.history.record(&Arc::new(sweep)), 0);
    }
    let series = world.history.series(Object::Vm(vm())).unwrap();
    assert_eq!(series.len(), MAX_SERIES);
    assert!(series.contains(&SeriesKey::parse("memory").unwrap()));
}

#[test]
fn columns_that_hold_nothing_any_more_give_way_at_the_next_start() {
    let mut world = World::new();
    let path = world.folder.path().join("stats").join(format!("vm-{}.ring", vm()));
    let dead: Vec<SeriesKey> =
        (0..MAX_SERIES).map(|n| SeriesKey::parse(&format!("vif_rx_bytes:{n}")).unwrap()).collect();
    crate::stats::ring::Ring::create(&path, dead, None).unwrap();
    world.until(240);
    let series = world.history.series(Object::Vm(vm())).unwrap();
    assert_eq!(series.len(), 2, "{series:?}");
}

#[test]
fn files_of_vms_that_are_no_more_go_after_a_week() {
    let mut world = World::new();
    world.until(120);
    world.history.flush();
    assert_eq!(world.history.objects().len(), 1);
    assert_eq!(world.history.prune(|_| false), 0, "too young");
    let path = world.folder.path().join("stats").join(format!("vm-{}.ring", vm()));
    let old = std::time::SystemTime::now() - KEEP_UNKNOWN - Duration::from_secs(60);
    std::fs::File::options().write(true).open(&path).unwrap().set_modified(old).unwrap();
    assert_eq!(world.history.prune(|_| true), 0, "known");
    assert_eq!(world.history.prune(|_| false), 1);
    assert!(!path.exists());
}
