//! Persistent processes: they outlive their controller, wait inert, and are reconnected to.

use crate::common;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use common::{
    Role, TestHome, alive, attach, fds, hear, role, root, spawn_persistent, tell, until,
    until_async,
};
use farcall::calls::{Sysno, WaitStatus};
use farcall::link::Polling;
use farcall::persist::{Attach, Home, Name, Place, SharedMemory, flight};
use farcall::proto::Call;
use farcall::{Child, Error, Outcome, Process};
use nix::fcntl::OFlag;
use nix::sched::CloneFlags;
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;

fn name(name: &str) -> Name {
    name.parse().unwrap()
}

#[tokio::test]
async fn a_persistent_process_from_the_start_is_listed_by_its_programs_name() {
    let test = TestHome::new();
    let root = root().await;
    let one = spawn_persistent(&test.home, &root).await;
    let line = std::fs::read(format!("/proc/{}/cmdline", one.pid().unwrap())).unwrap();
    assert_eq!(line, b"farcall\0");
    // The next child is made without it again.
    let isolated = root.child().spawn().await.unwrap();
    let line = std::fs::read(format!("/proc/{}/cmdline", isolated.pid().unwrap())).unwrap();
    assert_eq!(line, b"");
    one.kill(Signal::SIGKILL).unwrap();
}

fn in_call(pid: i32, call: Sysno) -> bool {
    common::blocked_in(pid) == Some(call as usize)
}

/// The models by which a process becomes persistent.
const MODELS: [&str; 4] = ["start", "isolated", "files", "memory"];

async fn by_model(home: &Home, root: &Process, model: &str) -> Child {
    let (child, memory) = match model {
        "start" => return spawn_persistent(home, root).await,
        "isolated" => (root.child(), SharedMemory::Refuse),
        "files" => (root.child().share_files().share_fs(), SharedMemory::Refuse),
        "memory" => (root.child().share_memory().share_files(), SharedMemory::Keep),
        other => panic!("{other}"),
    };
    let child = child.spawn().await.unwrap();
    // Used first, then made persistent.
    child.getpid().await.unwrap();
    let reserved = home.reserve(&name("one")).unwrap();
    child.make_persistent(reserved, memory).await.unwrap();
    child
}

#[test]
fn a_persistent_process_of_every_model_survives_the_sigkill_of_its_controller() {
    const TEST: &str = "a_persistent_process_of_every_model_survives_the_sigkill_of_its_controller";
    let runtime = tokio::runtime::Runtime::new().unwrap();
    if let Some(argument) = role() {
        let (model, path) = argument.split_once(' ').unwrap();
        let home = Home::at(path);
        runtime.block_on(async {
            let root = root().await;
            let process = by_model(&home, &root, model).await;
            let file =
                process.openat(None, "/etc/passwd", OFlag::O_RDONLY, Mode::empty()).await.unwrap();
            process.read(&file, 5).await.unwrap();
            let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            let memory = process.mmap(4096, protection, MapFlags::MAP_PRIVATE, None).await.unwrap();
            process.write_memory(memory.address(), *b"kept").await.unwrap();
            let child = process.child().spawn().await.unwrap();
            child.execve("/bin/sh", ["sh", "-c", "exit 42"], [""; 0]).await.unwrap();
            child.ended().await;
            tell(format!(
                "{} {} {} {} {}",
                process.pid().unwrap(),
                file.number(),
                memory.address(),
                child.pid_in_parent(),
                root.pid().unwrap()
            ));
            process.nanosleep(Duration::from_millis(300)).await.unwrap();
            std::future::pending::<()>().await;
        });
    }
    for model in MODELS {
        let test = TestHome::new();
        let mut controller = Role::start(TEST, format!("{model} {}", test.path().display()));
        let told = controller.told();
        let told: Vec<i64> = told.split(' ').map(|word| word.parse().unwrap()).collect();
        let [pid, file, address, child, root] = told[..] else { panic!("{told:?}") };
        let pid = pid as i32;
        until("it is in the middle of a call", || in_call(pid, Sysno::nanosleep));
        controller.kill();
        until("the root server dies", || !alive(root as i32));
        until("it has finished its call", || in_call(pid, Sysno::ppoll));
        // A session of its own, and nobody's death ends it.
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        assert_eq!(fields[3], pid.to_string(), "{model}: the session");
        runtime.block_on(async {
            let process = attach(test.home.place(&name("one"))).await.unwrap();
            assert_eq!(process.pid(), Some(pid));
            let file = process.adopt_fd(file as i32).unwrap();
            let rest = process.read(&file, 10).await.unwrap();
            assert_eq!(rest, std::fs::read("/etc/passwd").unwrap()[5..15], "{model}");
            assert_eq!(process.read_memory(address as u64, 4).await.unwrap(), b"kept");
            let status = process.wait_for_child(child as i32).await.unwrap();
            assert_eq!(status, WaitStatus::Exited(42), "{model}: the zombie kept its status");
            // It makes children as before, and they die with it only.
            let child = process.child().spawn().await.unwrap();
            let child_pid = child.pid().unwrap();
            process.exit(0).await.unwrap();
            until_async(&format!("{model}: its child dies with it"), || !alive(child_pid)).await;
        });
        until("it is gone", || !alive(pid));
    }
}

#[tokio::test]
async fn sharing_memory_and_being_persistent_needs_a_word() {
    let test = TestHome::new();
    let root = root().await;
    let child = root.child().share_memory().spawn().await.unwrap();
    let reserved = test.home.reserve(&name("one")).unwrap();
    let refused = child.make_persistent(reserved, SharedMemory::Refuse).await;
    assert!(matches!(refused, Err(Error::SharesMemory)));
    // Nothing is left of the attempt, and the child serves on.
    assert!(test.home.names().unwrap().is_empty());
    child.getpid().await.unwrap();
}

#[test]
fn children_of_a_persistent_process_outlive_the_controller_and_die_with_the_process() {
    const TEST: &str =
        "children_of_a_persistent_process_outlive_the_controller_and_die_with_the_process";
    let runtime = tokio::runtime::Runtime::new().unwrap();
    if let Some(path) = role() {
        runtime.block_on(async {
            let root = root().await;
            let process = spawn_persistent(&Home::at(path), &root).await;
            let program = process.child().spawn().await.unwrap();
            program.execve("/bin/sleep", ["sleep", "3600"], [""; 0]).await.unwrap();
            let server = process.child().share_memory().share_files().spawn().await.unwrap();
            tell(format!(
                "{} {} {}",
                process.pid().unwrap(),
                program.pid().unwrap(),
                server.pid().unwrap()
            ));
            let _ = server.nanosleep(Duration::from_secs(3600)).await;
        });
    }
    let test = TestHome::new();
    let mut controller = Role::start(TEST, test.path());
    let told = controller.told();
    let pids: Vec<i32> = told.split(' ').map(|pid| pid.parse().unwrap()).collect();
    until("the child is blocked", || in_call(pids[2], Sysno::nanosleep));
    controller.kill();
    until("the process is detached", || in_call(pids[0], Sysno::ppoll));
    assert!(alive(pids[1]) && alive(pids[2]));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pids[0]), Signal::SIGKILL).unwrap();
    for pid in pids {
        until("it dies with the process", || !alive(pid));
    }
}

#[tokio::test]
async fn calls_made_while_disconnected_wait_and_go_out_in_order() {
    let test = TestHome::new();
    let root = root().await;
    let process = spawn_persistent(&test.home, &root).await;
    // In flight when the shutdown begins: it finishes first.
    let sleeping = process.connection().call("nanosleep-less", getpid());
    process.prepare_for_reconnect().await.unwrap();
    sleeping.await.unwrap();
    assert!(!process.connection().is_connected());
    let (reading, writing) = {
        let pipe = process.pipe2(OFlag::empty());
        tokio::pin!(pipe);
        let early = tokio::select! {
            biased;
            _ = &mut pipe => true,
            () = tokio::time::sleep(Duration::from_millis(20)) => false,
        };
        assert!(!early, "nothing is executed while it is detached");
        process.reconnect().await.unwrap();
        pipe.await.unwrap()
    };
    process.prepare_for_reconnect().await.unwrap();
    let writes: Vec<_> = (0..50u8)
        .map(|i| {
            let (process, fd) =
                (process.process().clone(), process.adopt_fd(writing.number()).unwrap());
            let mut write = Box::pin(async move { process.write(&fd, [i]).await.unwrap() });
            // Polled once, in this order: that is the order of the queue.
            let waker = std::task::Waker::noop();
            let mut context = std::task::Context::from_waker(waker);
            assert!(write.as_mut().poll(&mut context).is_pending());
            write
        })
        .collect();
    process.reconnect().await.unwrap();
    for write in writes {
        write.await;
    }
    let order = process.read(&reading, 100).await.unwrap();
    assert_eq!(order, (0..50).collect::<Vec<u8>>());
}

fn getpid() -> farcall::proto::Call {
    farcall::proto::Call::syscall(Sysno::getpid, [0; 6])
}

#[tokio::test]
async fn calls_in_flight_at_a_disconnect_have_their_results() {
    let test = TestHome::new();
    let root = root().await;
    let process = spawn_persistent(&test.home, &root).await;
    let pid = process.pid().unwrap();
    let (reading, writing) = process.pipe2(OFlag::empty()).await.unwrap();
    let writing = process.fetch_fd(&writing).await.unwrap();
    let page =
        process.mmap(4096, ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE, None).await.unwrap();
    let args = [reading.number() as u64, page.address(), 1, 0, 0, 0];
    let read = farcall::proto::Call::syscall(Sysno::read, args);
    let blocked = process.connection().call("read", read);
    let behind: Vec<_> = (0..300).map(|_| process.connection().call("getpid", getpid())).collect();
    until_async("it reads", || in_call(pid, Sysno::read)).await;
    // The same controller reconnects over the hanging connection: answered after the call.
    let mut reconnect = Box::pin(process.reconnect());
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    assert!(reconnect.as_mut().poll(&mut context).is_pending());
    nix::unistd::write(&writing, b"x").unwrap();
    reconnect.await.unwrap();
    assert_eq!(blocked.await.unwrap(), 1);
    // Those that the server had executed, and those that it was sent again.
    for call in behind {
        assert_eq!(call.await.unwrap(), pid as u64);
    }
    process.getpid().await.unwrap();
}

#[tokio::test]
async fn a_call_in_a_process_that_dies_says_that_it_may_have_been_executed() {
    let test = TestHome::new();
    let root = root().await;
    let process = spawn_persistent(&test.home, &root).await;
    let pid = process.pid().unwrap();
    let sleeping = tokio::spawn({
        let process = process.process().clone();
        async move { process.nanosleep(Duration::from_secs(3600)).await }
    });
    until_async("it sleeps", || in_call(pid, Sysno::nanosleep)).await;
    process.kill(Signal::SIGKILL).unwrap();
    let lost = sleeping.await.unwrap();
    assert!(matches!(lost, Err(Error::Lost(Outcome::PossiblyExecuted))), "{lost:?}");
    process.ended().await;
    assert!(matches!(process.getpid().await, Err(Error::Gone)));
}

#[tokio::test]
async fn a_process_is_reconnected_through_another_one() {
    let test = TestHome::new();
    let root = root().await;
    let process = spawn_persistent(&test.home, &root).await;
    // It has the directory at another place, in a mount namespace of its own.
    let through = root.child().flags(CloneFlags::CLONE_NEWNS).spawn().await.unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    bind_mount(&through, test.path(), elsewhere.path()).await;
    let place = Place::at(elsewhere.path().join("one.sock"));
    assert!(!place.socket().exists(), "only `through` sees it");
    for _ in 0..3 {
        process.prepare_for_reconnect().await.unwrap();
        process.reconnect_through(&through, &place).await.unwrap();
        assert_eq!(process.getpid().await.unwrap() as i32, process.pid().unwrap());
    }
    // Descriptors pass over the new data socket.
    use std::os::fd::AsFd;
    let file = tempfile::tempfile().unwrap();
    process.send_fds(&[file.as_fd()]).await.unwrap();
}

async fn bind_mount(process: &Process, from: &Path, to: &Path) {
    let bytes = |path: &Path| {
        let mut bytes = path.as_os_str().as_encoded_bytes().to_vec();
        bytes.push(0);
        bytes
    };
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let memory = process.mmap(8192, protection, MapFlags::MAP_PRIVATE, None).await.unwrap();
    let (a, b, root) = (memory.address(), memory.address() + 2048, memory.address() + 4096);
    process.write_memory(a, bytes(from)).await.unwrap();
    process.write_memory(b, bytes(to)).await.unwrap();
    process.write_memory(root, *b"/\0").await.unwrap();
    let private = nix::libc::MS_REC | nix::libc::MS_PRIVATE;
    process.syscall(Sysno::mount, [0, root, 0, private, 0, 0]).await.unwrap();
    process.syscall(Sysno::mount, [a, b, 0, nix::libc::MS_BIND, 0, 0]).await.unwrap();
}

#[tokio::test]
async fn after_a_reconnect_what_no_handle_knows_is_closed_and_after_an_attach_nothing_is() {
    let test = TestHome::new();
    let root = root().await;
    let process = spawn_persistent(&test.home, &root).await;
    let pid = process.pid().unwrap();
    let kept = process.openat(None, "/etc/passwd", OFlag::O_RDONLY, Mode::empty()).await.unwrap();
    let unknown = || process.syscall(Sysno::dup, [kept.number() as u64, 0, 0, 0, 0, 0]);
    let first = unknown().await.unwrap() as i32;
    assert!(fds(pid).contains_key(&first));
    let count = fds(pid).len();
    process.prepare_for_reconnect().await.unwrap();
    process.reconnect().await.unwrap();
    assert!(!fds(pid).contains_key(&first));
    assert_eq!(fds(pid).len(), count - 1, "as many as before, without the unknown one");
    process.read(&kept, 1).await.unwrap();

    let second = unknown().await.unwrap() as i32;
    process.prepare_for_reconnect().await.unwrap();
    until_async("it is detached", || in_call(pid, Sysno::ppoll)).await;
    // Numbers of the server's own may change, those of the user's may not.
    let users = || {
        let sockets = |what: &Path| what.to_str().is_some_and(|what| what.starts_with("socket:"));
        let all = fds(pid);
        (all.len(), all.into_iter().filter(|(_, what)| !sockets(what)).collect::<Vec<_>>())
    };
    let before = users();
    let other = attach(test.home.place(&name("one"))).await.unwrap();
    let after = fds(pid);
    assert!(after.contains_key(&second) && after.contains_key(&kept.number()));
    other.prepare_for_reconnect().await.unwrap();
    until_async("all is as before", || users() == before).await;
}

#[tokio::test]
async fn nothing_is_swept_while_a_call_is_in_flight_in_any_server_of_the_table() {
    let test = TestHome::new();
    let root = root().await;
    let process = spawn_persistent(&test.home, &root).await;
    let pid = process.pid().unwrap();
    let sibling = process.child().share_files().spawn().await.unwrap();
    let (reading, writing) = sibling.pipe2(OFlag::empty()).await.unwrap();
    let reader = tokio::spawn({
        let sibling = sibling.process().clone();
        async move { sibling.read(&reading, 10).await }
    });
    let sibling_pid = sibling.pid().unwrap();
    until_async("the sibling reads", || in_call(sibling_pid, Sysno::read)).await;
    let unknown = process.syscall(Sysno::dup, [0; 6]).await.unwrap() as i32;
    process.prepare_for_reconnect().await.unwrap();
    process.reconnect().await.unwrap();
    process.getpid().await.unwrap();
    assert!(fds(pid).contains_key(&unknown), "not yet");
    process.write(&writing, *b"now").await.unwrap();
    assert_eq!(reader.await.unwrap().unwrap(), b"now");
    until_async("it is closed now", || !fds(pid).contains_key(&unknown)).await;
    sibling.getpid().await.unwrap();
    process.getpid().await.unwrap();
}

#[test]
fn a_process_that_is_held_names_its_holder() {
    const TEST: &str = "a_process_that_is_held_names_its_holder";
    let runtime = tokio::runtime::Runtime::new().unwrap();
    if let Some(path) = role() {
        runtime.block_on(async {
            let root = root().await;
            let process = spawn_persistent(&Home::at(path), &root).await;
            tell(process.pid().unwrap());
            let process = process.process().clone();
            let call = tokio::task::spawn_blocking(hear);
            call.await.unwrap();
            let _ = process.nanosleep(Duration::from_secs(3600)).await;
        });
    }
    let test = TestHome::new();
    let mut holder = Role::start(TEST, test.path());
    let pid: i32 = holder.told().parse().unwrap();
    let place = test.home.place(&name("one"));
    let try_to = || runtime.block_on(Attach::default().to(place.clone()));
    for busy in [false, true] {
        if busy {
            // The server can't answer: NAME.json does.
            holder.say("block");
            until("it is blocked", || in_call(pid, Sysno::nanosleep));
        }
        match try_to() {
            Err(Error::Held { pid: Some(named), since: Some(since) }) => {
                assert_eq!(named, holder.pid());
                assert!(since > 1_700_000_000);
            }
            other => panic!("busy {busy}: {other:?}"),
        }
        assert!(alive(pid));
    }
}

#[tokio::test]
async fn a_socket_of_a_dead_process_is_replaced_and_a_live_one_is_an_error() {
    let test = TestHome::new();
    let root = root().await;
    let process = spawn_persistent(&test.home, &root).await;
    let error = test.home.reserve(&name("one")).unwrap_err().to_string();
    assert!(error.contains(&process.pid().unwrap().to_string()), "{error}");
    process.kill(Signal::SIGKILL).unwrap();
    process.ended().await;
    assert!(test.home.place(&name("one")).socket().exists());
    let second = spawn_persistent(&test.home, &root).await;
    assert_ne!(second.pid(), process.pid());
    second.getpid().await.unwrap();
    let gone = attach(Place::at(test.file("nothing.sock"))).await;
    assert!(matches!(gone, Err(Error::Attach { .. })), "{gone:?}");
}

#[test]
fn a_reserved_name_that_is_not_used_is_given_back() {
    let test = TestHome::new();
    let reserved = test.home.reserve(&name("one")).unwrap();
    let place = reserved.place().clone();
    assert!(place.socket().exists());
    drop(reserved);
    assert!(!place.socket().exists());
    assert_eq!(std::fs::read_dir(test.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn the_directory_is_the_users_alone_and_the_path_may_be_long() {
    let test = TestHome::new();
    let root = root().await;
    let long = test.path().join("d".repeat(120)).join("e".repeat(120));
    let home = Home::at(&long);
    let process = spawn_persistent(&home, &root).await;
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&long), 0o700);
    let place = home.place(&name("one"));
    assert_eq!(mode(place.socket()), 0o600);
    assert_eq!(mode(&long.join("one.json")), 0o600);
    process.prepare_for_reconnect().await.unwrap();
    process.reconnect().await.unwrap();
    process.prepare_for_reconnect().await.unwrap();
    let other = attach(place).await.unwrap();
    assert_eq!(other.pid(), process.pid());
    other.exit(0).await.unwrap();

    let open = test.file("open");
    std::fs::create_dir(&open).unwrap();
    std::fs::set_permissions(&open, PermissionsExt::from_mode(0o755)).unwrap();
    let error = Home::at(&open).reserve(&name("one")).unwrap_err().to_string();
    assert!(error.contains("choose a directory of your own"), "{error}");
    for bad in ["", ".hidden", "-x", "a/b", "a b", &"x".repeat(65)] {
        assert!(bad.parse::<Name>().is_err(), "{bad:?}");
    }
}

#[tokio::test]
async fn controllers_come_and_go_and_leave_no_trace_in_the_process() {
    let test = TestHome::new();
    let root = root().await;
    let process = spawn_persistent(&test.home, &root).await;
    process.prepare_for_reconnect().await.unwrap();
    let pid = process.pid().unwrap();
    let maps = || std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().lines().count();
    let mut traces = Vec::new();
    for round in 0..20 {
        let next = attach(test.home.place(&name("one"))).await.unwrap();
        assert_eq!(next.getpid().await.unwrap(), pid);
        if round % 2 == 0 {
            next.prepare_for_reconnect().await.unwrap();
        }
        drop(next);
        until_async("it is detached", || in_call(pid, Sysno::ppoll) && fds(pid).len() == 8).await;
        traces.push((fds(pid).len(), maps()));
    }
    assert!(traces[1..].iter().all(|trace| *trace == traces[1]), "{traces:?}");
}

/// The descriptors of a process that were opened with O_PATH, and what they are of.
fn paths(pid: i32) -> Vec<(i32, std::path::PathBuf)> {
    let is_path = |fd: &i32| {
        let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
        i32::from_str_radix(flags.trim(), 8).unwrap() & nix::libc::O_PATH != 0
    };
    let numbers = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let numbers =
        numbers.map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap());
    let link = |fd| (fd, std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap());
    numbers.filter(is_path).map(link).collect()
}

#[tokio::test]
async fn a_process_keeps_the_file_of_its_socket_and_is_reached_by_that_when_it_is_removed() {
    let test = TestHome::new();
    let root = root().await;
    let process = spawn_persistent(&test.home, &root).await;
    let pid = process.pid().unwrap();
    let place = test.home.place(&name("one"));
    let kept = paths(pid);
    let [(number, file)] = &kept[..] else { panic!("{kept:?}") };
    assert_eq!(file, place.socket());
    process.prepare_for_reconnect().await.unwrap();
    // The next controller knows that it is the server's own.
    let next = attach(place.clone()).await.unwrap();
    assert!(next.unclaimed().await.unwrap().is_empty());
    next.close_unclaimed().await.unwrap();
    next.upgrade().await.unwrap();
    next.prepare_for_reconnect().await.unwrap();
    drop(next);
    let next = attach(place.clone()).await.unwrap();
    assert!(next.unclaimed().await.unwrap().is_empty());
    next.prepare_for_reconnect().await.unwrap();
    drop(next);
    std::fs::remove_file(place.socket()).unwrap();
    std::os::unix::net::UnixStream::connect(format!("/proc/{pid}/fd/{number}")).unwrap();
    process.kill(Signal::SIGKILL).unwrap();
}

#[tokio::test]
async fn an_attach_for_which_no_number_is_free_says_so() {
    let test = TestHome::new();
    let root = root().await;
    let process = spawn_persistent(&test.home, &root).await;
    let pid = process.pid().unwrap();
    process.prepare_for_reconnect().await.unwrap();
    let place = test.home.place(&name("one"));
    let limit = |soft, hard| {
        let limits = nix::libc::rlimit { rlim_cur: soft, rlim_max: hard };
        let nofile = nix::libc::RLIMIT_NOFILE;
        // SAFETY: the kernel reads `limits`.
        let set =
            unsafe { nix::libc::prlimit(pid, nofile, &raw const limits, std::ptr::null_mut()) };
        assert_eq!(set, 0);
    };
    // The soft one is raised where that helps.
    limit(0, 64);
    let next = attach(place.clone()).await.unwrap();
    next.prepare_for_reconnect().await.unwrap();
    drop(next);
    limit(3, 3);
    let error = Attach::default().timeout(Duration::from_secs(1)).to(place).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("RLIMIT_NOFILE, 3,") && text.contains(&format!("-PIPE {pid}")), "{text}");
    process.kill(Signal::SIGKILL).unwrap();
}

#[tokio::test]
async fn an_attach_needs_no_memory_that_the_process_may_not_have() {
    let test = TestHome::new();
    let root = root().await;
    for (limit, room) in [
        (nix::libc::RLIMIT_AS, None),
        (nix::libc::RLIMIT_DATA, None),
        (nix::libc::RLIMIT_AS, Some(0)),
        (nix::libc::RLIMIT_DATA, Some(0)),
    ] {
        let process = spawn_persistent(&test.home, &root).await;
        let pid = process.pid().unwrap();
        process.keep_bytes("settings", b"workers = 4").await.unwrap();
        process.prepare_for_reconnect().await.unwrap();
        // What it has, or less.
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let field = if limit == nix::libc::RLIMIT_AS { "VmSize:" } else { "VmData:" };
        let kilobytes = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        let present: u64 = kilobytes.split_whitespace().next().unwrap().parse().unwrap();
        let mut limits = nix::libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: the kernel fills and reads `limits`.
        unsafe {
            assert_eq!(nix::libc::prlimit(pid, limit, std::ptr::null(), &raw mut limits), 0);
            limits.rlim_cur = room.unwrap_or(present * 1024);
            assert_eq!(nix::libc::prlimit(pid, limit, &raw const limits, std::ptr::null_mut()), 0);
        }
        for _ in 0..3 {
            let next = attach(test.home.place(&name("one"))).await.unwrap();
            // Longer than it takes to be given a ring, for which there is no memory.
            for _ in 0..300 {
                assert_eq!(next.getpid().await.unwrap(), pid);
            }
            assert_eq!(next.names().await.unwrap().len(), 1);
            next.prepare_for_reconnect().await.unwrap();
        }
        process.kill(Signal::SIGKILL).unwrap();
        until_async("it has ended", || !alive(pid)).await;
        test.home.place(&name("one")).remove().unwrap();
    }
}

#[tokio::test]
async fn root_leaves_a_users_state_to_the_user() {
    let test = TestHome::new();
    let root = root().await;
    let process = spawn_persistent(&test.home, &root).await;
    process.prepare_for_reconnect().await.unwrap();
    let place = test.home.place(&name("one"));
    let (user, group) = (Some(65_533), Some(65_532));
    std::os::unix::fs::chown(place.socket(), user, group).unwrap();
    let other = attach(place.clone()).await.unwrap();
    let state = std::fs::metadata(place.socket().with_extension("json")).unwrap();
    use std::os::unix::fs::MetadataExt;
    assert_eq!((state.uid(), state.gid()), (65_533, 65_532));
    assert_eq!(state.permissions().mode() & 0o777, 0o600);
    other.exit(0).await.unwrap();
}

/// Its process writes a byte at each offset of a file, one after the other.
fn the_last_calls_of_a_killed_controller_are_on_record(test: &str, in_a_ring: bool) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    if let Some(path) = role() {
        runtime.block_on(async {
            let root = root().await;
            let process = spawn_persistent(&Home::at(&path), &root).await;
            let path = Path::new(&path).join("bytes");
            let flags = OFlag::O_CREAT | OFlag::O_WRONLY;
            let file = process.openat(None, &path, flags, Mode::S_IRUSR).await.unwrap();
            if in_a_ring {
                process.enter_ring(Polling::Adaptive).await.unwrap();
            }
            let byte = process.mmap(1, ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE, None);
            let byte = byte.await.unwrap().into_raw();
            tell(process.pid().unwrap());
            for offset in 0.. {
                let args = [file.number() as u64, byte, 1, offset, 0, 0];
                let call = Call::syscall(Sysno::pwrite64, args);
                drop(process.connection().call("pwrite64", call));
                if offset % 10 == 0 {
                    process.connection().ready().await;
                    process.getppid().await.unwrap();
                }
            }
        });
    }
    let test_home = TestHome::new();
    let mut controller = Role::start(test, test_home.path());
    let pid: i32 = controller.told().parse().unwrap();
    let bytes = test_home.path().join("bytes");
    let written = || std::fs::metadata(&bytes).map_or(0, |file| file.len());
    until("it writes", || written() > 1000);
    controller.kill();
    let place = test_home.home.place(&name("one"));
    runtime.block_on(async {
        // Who only asks is told the same as who attaches.
        until("it has seen the end of its controller", || in_call(pid, Sysno::ppoll));
        let asked = flight(&place, common::LIMIT).await.unwrap();
        assert_eq!(asked.holder, None);
        let process = attach(place).await.unwrap();
        let log = process.log_before().unwrap();
        assert!(log.calls().eq(asked.log.calls()));
        let writes = log.calls().filter(|(_, call)| call.request.word == Sysno::pwrite64 as u64);
        let writes: Vec<_> = writes.collect();
        assert!(writes.len() > 100, "{}", writes.len());
        let offset = |at: usize| writes[at].1.request.args[3];
        for (at, (number, write)) in writes.iter().enumerate() {
            assert_eq!(write.result, 1);
            assert_eq!(write.request.args[2..5], [1, offset(0) + at as u64, 0]);
            assert_eq!(log.controller_of(*number), Some(1));
        }
        assert_eq!(offset(writes.len() - 1) + 1, written());
        process.exit(0).await.unwrap();
    });
}

#[test]
fn the_last_calls_of_a_controller_that_was_killed_are_on_record() {
    const TEST: &str = "the_last_calls_of_a_controller_that_was_killed_are_on_record";
    the_last_calls_of_a_killed_controller_are_on_record(TEST, false);
}

#[test]
fn so_are_those_in_the_ring_of_a_controller_that_was_killed() {
    const TEST: &str = "so_are_those_in_the_ring_of_a_controller_that_was_killed";
    the_last_calls_of_a_killed_controller_are_on_record(TEST, true);
}
