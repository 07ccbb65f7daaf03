//! The world against its invariants, and the process behind its socket.

use super::*;
use crate::model::{MiB, SafePath, Timestamp, VmId, VmName};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

const T: Duration = Duration::from_secs(5);

fn vm(n: u8) -> VmId {
    VmId::from_bytes([n + 1; 16])
}

fn spec(n: u8, memory: u64) -> Spec {
    Spec {
        vm: vm(n),
        name: VmName::parse(&format!("vm{n}")).unwrap(),
        memory: MiB(memory),
        max_memory: MiB(memory * 2),
        vcpus: 1,
        max_vcpus: 4,
        weight: 256,
        cap: 0,
        display: Some(Display::FirstFree),
        disks: vec![],
        vifs: vec![],
        rest: serde_json::Value::Null,
    }
}

fn world(memory: u64) -> World {
    World::new(Options { memory: MiB(memory), ..Options::default() }, Timestamp(0))
}

fn create(world: &mut World, n: u8, memory: u64, at: u64) -> Result<u32> {
    let request = Request::Create { spec: Box::new(spec(n, memory)), paused: false };
    match world.apply(request, Timestamp(at)).0? {
        Answer::DomId(domid) => Ok(domid),
        other => panic!("{other:?}"),
    }
}

fn state(world: &World, domid: u32, at: u64) -> Option<State> {
    world.list(Timestamp(at)).into_iter().find(|d| d.domid == domid).map(|d| d.state)
}

#[test]
fn a_guest_shuts_down_only_after_it_has_booted_and_in_its_own_time() {
    let mut world = world(4096);
    let guest = Behaviour { boot_ms: 1000, shutdown_ms: 200, ..Behaviour::default() };
    world.apply(Request::SetBehaviour { vm: None, behaviour: guest }, Timestamp(0)).0.unwrap();
    let domid = create(&mut world, 0, 64, 0).unwrap();
    world.apply(Request::Shutdown { domid }, Timestamp(10)).0.unwrap();
    assert_eq!(world.next_event_at(), Some(Timestamp(1200)));
    assert!(world.advance(Timestamp(1199)).is_empty());
    assert_eq!(world.advance(Timestamp(1200)), [Observation::At(domid)]);
    assert_eq!(state(&world, domid, 1200), Some(State::Ended(Reason::Poweroff)));
}

#[test]
fn a_paused_guests_time_stands_still() {
    let mut world = world(4096);
    let guest = Behaviour::crashing_after(100);
    world.apply(Request::SetBehaviour { vm: Some(vm(0)), behaviour: guest }, Timestamp(0)).0.unwrap();
    let domid = create(&mut world, 0, 64, 0).unwrap();
    world.apply(Request::Pause { domid }, Timestamp(40)).0.unwrap();
    assert_eq!(world.next_event_at(), None);
    let used = world.list(Timestamp(5000))[1].cpu_time_ns;
    assert_eq!(used, world.list(Timestamp(40))[1].cpu_time_ns);
    world.apply(Request::Unpause { domid }, Timestamp(5000)).0.unwrap();
    assert_eq!(world.next_event_at(), Some(Timestamp(5060)));
    assert!(world.list(Timestamp(5050))[1].cpu_time_ns > used);
    world.advance(Timestamp(5060));
    assert_eq!(state(&world, domid, 5060), Some(State::Ended(Reason::Crash)));
}

#[test]
fn a_deaf_guest_ignores_shutdown_reboot_and_the_power_button_but_not_its_destruction() {
    let mut world = world(4096);
    world.apply(Request::SetBehaviour { vm: None, behaviour: Behaviour::deaf() }, Timestamp(0)).0.unwrap();
    let domid = create(&mut world, 0, 64, 0).unwrap();
    let power = Request::Trigger { domid, trigger: Trigger::Power };
    for request in [Request::Shutdown { domid }, Request::Reboot { domid }, power] {
        world.apply(request, Timestamp(1)).0.unwrap();
    }
    assert_eq!(world.next_event_at(), None);
    world.apply(Request::Destroy { domid }, Timestamp(2)).0.unwrap();
    assert_eq!(state(&world, domid, 2), None);
}

#[test]
fn vnc_ports_count_from_5900_and_are_given_again_when_free() {
    let mut world = world(4096);
    let first = create(&mut world, 0, 64, 0).unwrap();
    create(&mut world, 1, 64, 0).unwrap();
    let ports =
        |world: &World| world.list(Timestamp(0)).iter().filter_map(|d| d.vnc_port).collect::<Vec<_>>();
    assert_eq!(ports(&world), [5900, 5901]);
    world.apply(Request::Destroy { domid: first }, Timestamp(0)).0.unwrap();
    create(&mut world, 2, 64, 0).unwrap();
    assert_eq!(ports(&world), [5901, 5900]);
}

#[test]
fn domids_wrap_below_xens_reserved_ones_and_skip_those_in_use() {
    let mut world = world(4096);
    let kept = create(&mut world, 0, 64, 0).unwrap();
    let mut last = kept;
    for at in 0..0x7FF0 {
        let domid = create(&mut world, 1, 64, at).unwrap();
        assert!(domid != kept && (1..0x7FF0).contains(&domid));
        assert!(domid > last || domid == kept + 1, "they rise until they wrap");
        last = domid;
        world.apply(Request::Destroy { domid }, Timestamp(at)).0.unwrap();
    }
}

#[test]
fn a_power_off_ends_all_domains_and_the_machine_still_answers() {
    let mut world = world(4096);
    create(&mut world, 0, 64, 0).unwrap();
    world.apply(Request::HostReboot, Timestamp(0)).0.unwrap();
    world.apply(Request::HostPowerOff, Timestamp(1)).0.unwrap();
    assert_eq!(world.advance(Timestamp(1000)).last(), Some(&Observation::Everything));
    assert_eq!(world.list(Timestamp(1000)).len(), 1);
    let (answer, _) = world.apply(Request::Host, Timestamp(1000));
    assert!(matches!(answer, Ok(Answer::Host(host)) if !host.powered_on));
    assert!(create(&mut world, 0, 64, 1001).is_err());
}

#[test]
fn the_audit_tells_a_vm_that_ran_twice() {
    let mut audit = Audit::default();
    audit.note_running(vm(0), 1);
    assert!(audit.doubled().is_empty());
    audit.note_running(vm(0), 2);
    audit.note_running(vm(0), 1);
    assert_eq!(audit.doubled(), [vm(0)]);
}

#[derive(Debug, Clone)]
enum Act {
    Create(u8, u64, bool),
    On(u8, u8),
    Memory(u8, u64),
    Import,
    Wait(u64),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => (0..6_u8, 1..1500_u64, any::<bool>()).prop_map(|(n, memory, paused)| Act::Create(n, memory, paused)),
        6 => (0..20_u8, 0..13_u8).prop_map(|(domid, what)| Act::On(domid, what)),
        1 => (0..20_u8, 0..2000_u64).prop_map(|(domid, memory)| Act::Memory(domid, memory)),
        1 => Just(Act::Import),
        2 => (0..400_u64).prop_map(Act::Wait),
    ]
}

fn request_on(domid: u32, what: u8) -> Request {
    match what {
        0 => Request::Destroy { domid },
        1 => Request::Shutdown { domid },
        2 => Request::Reboot { domid },
        3 => Request::Pause { domid },
        4 => Request::Unpause { domid },
        5 => Request::Export { domid },
        6 => Request::EndExport { domid, gone: true },
        7 => Request::EndExport { domid, gone: false },
        8 => Request::Sysrq { domid, letter: 'c' },
        9 => Request::SetVcpus { domid, online: 3 },
        10 => Request::EndImport { domid, paused: false },
        11 => Request::EndImport { domid, paused: true },
        _ => Request::Trigger { domid, trigger: Trigger::Reset },
    }
}

fn check_invariants(world: &World, now: Timestamp, seen: &mut BTreeMap<u32, VmId>) {
    let domains = world.list(now);
    let given: u64 = domains.iter().map(|d| d.memory.0 / 1024).sum();
    assert_eq!(given + world.free_memory().0, 4096, "memory is neither made nor lost");
    let mut alive = BTreeSet::new();
    let mut domids = BTreeSet::new();
    let mut ports = BTreeSet::new();
    for domain in &domains {
        assert!(domids.insert(domain.domid), "a domid names one domain");
        assert!(domain.vnc_port.is_none_or(|port| ports.insert(port)), "a port serves one domain");
        let Some(vm) = domain.vm else { continue };
        if !world.domains[&domain.domid].is_migrating() {
            assert!(alive.insert(vm), "a VM has one domain that is neither on its way out nor in");
        }
        assert_eq!(*seen.entry(domain.domid).or_insert(vm), vm, "a domid is not used again");
    }
}

proptest! {
    #[test]
    fn whatever_is_asked_memory_domids_and_identities_stay_right(acts in prop::collection::vec(act(), 1..120)) {
        let mut world = world(4096);
        let mut now = Timestamp(0);
        let mut seen = BTreeMap::new();
        // What was exported last, sent to this same world whenever the dice say so.
        let mut travelling: Option<Box<Image>> = None;
        for act in acts {
            let request = match act {
                Act::Create(n, memory, paused) => Request::Create { spec: Box::new(spec(n, memory)), paused },
                Act::On(domid, what) => request_on(u32::from(domid), what),
                Act::Memory(domid, mib) => Request::SetMemory { domid: u32::from(domid), target: MiB(mib) },
                Act::Import => match &travelling {
                    Some(image) => Request::Import { image: image.clone() },
                    None => continue,
                },
                Act::Wait(ms) => {
                    now.0 += ms;
                    Request::List
                }
            };
            if let (Ok(Answer::Image(image)), _) = world.apply(request, now) {
                travelling = Some(image);
            }
            prop_assert!(world.audit().doubled().is_empty(), "no VM ever runs twice");
            check_invariants(&world, now, &mut seen);
            prop_assert!(world.next_event_at().is_none_or(|at| at > now), "what is due has happened");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_rule_can_fail_delay_hang_time_out_and_lose_an_answer() {
    let handle = Handle::in_process(Options::default());
    let create = |n| Request::Create { spec: Box::new(spec(n, 64)), paused: false };
    let add = |fate| handle.add_rule(Rule::next(Kind::Create, fate));
    let known = || async {
        let Answer::Domains(domains) = handle.call(Request::List, T).await.unwrap() else { panic!() };
        domains.len() - 1
    };

    add(Fate::Fail(WorldError::Failed("no".to_owned()))).await.unwrap();
    assert_eq!(handle.call(create(0), T).await, Err(WorldError::Failed("no".to_owned())));
    add(Fate::Hang).await.unwrap();
    assert_eq!(handle.call(create(0), T).await, Err(WorldError::Timeout));
    assert_eq!(known().await, 0, "nothing was done so far");

    add(Fate::DoThenTimeout).await.unwrap();
    assert_eq!(handle.call(create(0), T).await, Err(WorldError::Timeout));
    add(Fate::DoThenLose).await.unwrap();
    assert!(matches!(handle.call(create(1), T).await, Err(WorldError::Unreachable(_))));
    assert_eq!(known().await, 2, "they were done in secret");

    add(Fate::DelayMs(3000)).await.unwrap();
    let before = tokio::time::Instant::now();
    handle.call(create(2), T).await.unwrap();
    assert_eq!(before.elapsed(), Duration::from_secs(3));
    add(Fate::DelayMs(20_000)).await.unwrap();
    assert_eq!(handle.call(create(3), T).await, Err(WorldError::Timeout));
    assert_eq!(known().await, 3);
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!(known().await, 4, "what was begun is finished although the caller gave up");
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_ends_by_itself_is_observed_when_it_does() {
    let handle = Handle::in_process(Options::default());
    handle.set_behaviour(Some(vm(0)), Behaviour::ending_after(60_000, Reason::Reboot)).await.unwrap();
    let create = Request::Create { spec: Box::new(spec(0, 64)), paused: false };
    handle.call(create, T).await.unwrap();
    let mut observed = handle.observe::<Observation>();
    let before = tokio::time::Instant::now();
    assert_eq!(observed.recv().await, Some(Observation::At(1)));
    assert_eq!(before.elapsed(), Duration::from_secs(60));
    assert_eq!(handle.audit().await.unwrap().count(vm(0), "end reboot"), 1);
}

/// A world behind a socket, served by a task.
struct Served {
    dir: tempfile::TempDir,
    task: tokio::task::JoinHandle<std::result::Result<(), process::ProcessError>>,
}

impl Served {
    async fn start(idle_end: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("world");
        let path = socket.clone();
        let task =
            tokio::spawn(async move { process::serve_until_idle(&path, Options::default(), idle_end).await });
        while !socket.exists() {
            tokio::task::yield_now().await;
        }
        Self { dir, task }
    }

    fn socket(&self) -> std::path::PathBuf {
        self.dir.path().join("world")
    }
}

#[tokio::test]
async fn the_worlds_socket_is_its_owners_alone_and_goes_with_the_world() {
    use std::os::unix::fs::PermissionsExt;
    let served = Served::start(process::IDLE_END).await;
    let mode = std::fs::metadata(served.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let pid = std::fs::read_to_string(served.dir.path().join("world.pid")).unwrap();
    assert_eq!(pid.trim(), std::process::id().to_string());
    let second = process::serve(&served.socket(), Options::default()).await;
    assert!(matches!(second, Err(process::ProcessError::AlreadyRunning(_))));
    Handle::remote(&served.socket()).end_world().await.unwrap();
    served.task.await.unwrap().unwrap();
    assert!(std::fs::read_dir(served.dir.path()).unwrap().next().is_none(), "nothing stays behind");
}

#[tokio::test]
async fn a_world_without_clients_ends_and_one_with_a_client_does_not() {
    let served = Served::start(Duration::from_secs(1)).await;
    let handle = Handle::remote(&served.socket());
    handle.call(Request::Info, T).await.unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    handle.call(Request::Info, T).await.unwrap();
    drop(handle);
    served.task.await.unwrap().unwrap();
}

#[tokio::test]
async fn after_a_lost_connection_the_client_connects_again_and_says_to_look_at_everything() {
    let served = Served::start(process::IDLE_END).await;
    let handle = Handle::remote(&served.socket());
    let mut observed = handle.observe::<Observation>();
    handle.add_rule(Rule::next(Kind::Create, Fate::DoThenLose)).await.unwrap();
    assert_eq!(observed.recv().await, Some(Observation::Everything), "of the first connection");
    let create = Request::Create { spec: Box::new(spec(0, 64)), paused: false };
    assert!(matches!(handle.call(create, T).await, Err(WorldError::Unreachable(_))));
    while observed.recv().await.unwrap() != Observation::Everything {}
    let Answer::Domains(domains) = handle.call(Request::List, T).await.unwrap() else { panic!() };
    assert_eq!(domains.len(), 2);
    handle.end_world().await.unwrap();
}

#[tokio::test]
async fn a_world_that_is_away_is_unreachable_at_once_and_not_after_the_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let handle = Handle::remote(&dir.path().join("nobody"));
    let answer = handle.call(Request::Info, Duration::from_secs(60)).await;
    assert!(matches!(answer, Err(WorldError::Unreachable(_))));
}

#[tokio::test]
async fn a_client_that_talks_nonsense_is_dropped_and_the_others_are_served() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let served = Served::start(process::IDLE_END).await;
    let handle = Handle::remote(&served.socket());
    for nonsense in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"\0\0\0\x02{}", b"\xff\xff\xff\xff"] {
        let mut stream = tokio::net::UnixStream::connect(served.socket()).await.unwrap();
        stream.write_all(nonsense).await.unwrap();
        // Ends, well or with a reset, because the world hangs up.
        let _ = stream.read_to_end(&mut Vec::new()).await;
    }
    handle.call(Request::Info, T).await.unwrap();
    handle.end_world().await.unwrap();
}

#[tokio::test]
async fn a_thousand_domains_are_listed_over_the_socket_while_a_call_hangs() {
    let served = Served::start(process::IDLE_END).await;
    let handle = Handle::remote(&served.socket());
    handle.add_rule(Rule::next(Kind::Info, Fate::Hang)).await.unwrap();
    let hanging = tokio::spawn({
        let handle = handle.clone();
        async move { handle.call(Request::Info, Duration::from_millis(300)).await }
    });
    for n in 0..1000_u16 {
        let mut spec = spec(0, 16);
        let [a, b] = n.to_be_bytes();
        spec.vm = VmId::from_bytes([1, a, b, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]);
        spec.name = VmName::parse(&format!("vm{n}")).unwrap();
        handle.call(Request::Create { spec: Box::new(spec), paused: false }, T).await.unwrap();
    }
    let Answer::Domains(domains) = handle.call(Request::List, T).await.unwrap() else { panic!() };
    assert_eq!(domains.len(), 1001);
    assert_eq!(hanging.await.unwrap(), Err(WorldError::Timeout));
    handle.end_world().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_file_that_holds_no_saved_domain_is_refused_and_its_text_not_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, "{\"format\":\"secret\"}").unwrap();
    let handle = Handle::in_process(Options::default());
    let file = SafePath::parse(path.to_str().unwrap()).unwrap();
    let restore = Request::Restore { spec: Box::new(spec(0, 64)), file, paused: false };
    let Err(WorldError::Failed(why)) = handle.call(restore, T).await else { panic!() };
    assert!(!why.contains("secret"));
}
