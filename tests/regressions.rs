//! What went wrong once, a test for each.

use crate::common;

use std::future::Future;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::task::{Context, Waker};
use std::time::Duration;

use common::{
    LIMIT, Role, TestHome, alive, fds, limit_descriptors, role, root, spawn_persistent, tell,
    until_async,
};
use farcall::Error;
use farcall::calls::Sysno;
use farcall::link::Polling;
use farcall::persist::{Home, Name, SharedMemory, attach};
use nix::fcntl::OFlag;
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::Pid;

fn name(name: &str) -> Name {
    name.parse().unwrap()
}

/// Lets a future begin: what it asks for first is on its way. Says whether it is still under way.
fn begin<F: Future + ?Sized>(future: &mut Pin<Box<F>>) -> bool {
    future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending()
}

async fn in_time<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.unwrap_or_else(|_| panic!("{what}: not in time"))
}

fn children(pid: i32) -> Vec<i32> {
    let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    list.unwrap_or_default().split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

fn maps(pid: i32) -> usize {
    std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().lines().count()
}

#[tokio::test]
async fn a_spawn_that_is_given_up_leaves_nothing_in_the_parent() {
    let root = root().await;
    let pid = root.pid().unwrap();
    drop(root.child().spawn().await.unwrap());
    until_async("the first child is reaped", || children(pid).is_empty()).await;
    // What it gets when it is called often, it has.
    root.enter_ring(Polling::Adaptive).await.unwrap();
    let (fds_before, maps_before) = (fds(pid).len(), maps(pid));
    // Four stacks are kept for children to come, of two mappings each: three more than now.
    let kept = 3 * 2;
    for share in [false, true] {
        // Given up at another point each time: after that many of the test's own calls.
        for calls in 0..12 {
            let builder = root.child();
            let builder = if share { builder.share_memory().share_files() } else { builder };
            let mut spawn = Box::pin(builder.spawn());
            for _ in 0..calls {
                if !begin(&mut spawn) {
                    break;
                }
                root.getpid().await.unwrap();
            }
            drop(spawn);
            until_async("descriptors, mappings and zombies are gone", || {
                let stacks = maps(pid).wrapping_sub(maps_before);
                fds(pid).len() == fds_before && stacks <= kept && children(pid).is_empty()
            })
            .await;
        }
    }
}

#[tokio::test]
async fn a_child_is_tied_to_its_parent_when_spawn_returns() {
    let root = root().await;
    for _ in 0..30 {
        let parent = root.child().spawn().await.unwrap();
        let pid = parent.pid().unwrap();
        let one_cpu = nix::sched::sched_getaffinity(Pid::from_raw(0)).unwrap();
        let first = (0..1024).find(|cpu| one_cpu.is_set(*cpu).unwrap()).unwrap();
        let mut set = nix::sched::CpuSet::new();
        set.set(first).unwrap();
        // On one processor the parent goes on before its child begins.
        nix::sched::sched_setaffinity(Pid::from_raw(pid), &set).unwrap();
        let killer = std::thread::spawn(move || {
            loop {
                if let [child] = children(pid)[..] {
                    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
                    return child;
                }
            }
        });
        let child = in_time("spawn", parent.child().spawn()).await;
        let pid = killer.join().unwrap();
        until_async("the child dies with its parent", || !alive(pid)).await;
        drop(child);
    }
}

#[test]
fn a_child_that_can_not_be_watched_is_ended_and_reaped() {
    const TEST: &str = "a_child_that_can_not_be_watched_is_ended_and_reaped";
    // In a process of its own: the limit is a process's.
    let Some(_) = role() else {
        assert_eq!(Role::start(TEST, "alone").told(), "done");
        return;
    };
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
        let root = root().await;
        let pid = root.pid().unwrap();
        drop(root.child().spawn().await.unwrap());
        until_async("the first child is reaped", || children(pid).is_empty()).await;
        root.getpid().await.unwrap();
        let before = (fds(pid).len(), maps(pid));
        for share in [false, true] {
            let builder = root.child();
            let builder = if share { builder.share_memory().share_files() } else { builder };
            kill(Pid::from_raw(pid), Signal::SIGSTOP).unwrap();
            let spawn = tokio::spawn(builder.spawn());
            tokio::task::yield_now().await;
            tokio::task::yield_now().await;
            let limit = limit_descriptors(0, 3);
            kill(Pid::from_raw(pid), Signal::SIGCONT).unwrap();
            let failed = spawn.await.unwrap();
            limit_descriptors(0, limit);
            let Err(Error::Io { source, .. }) = failed else { panic!("{share}: {failed:?}") };
            assert_eq!(source.raw_os_error(), Some(nix::libc::EMFILE));
            until_async("descriptors, mappings and zombies are gone", || {
                (fds(pid).len(), maps(pid)) == before && children(pid).is_empty()
            })
            .await;
        }
        tell("done");
    });
}

#[test]
fn what_does_not_fit_into_the_socket_follows_though_no_descriptor_is_free() {
    const TEST: &str = "what_does_not_fit_into_the_socket_follows_though_no_descriptor_is_free";
    // In a process of its own: the limit is a process's.
    let Some(_) = role() else {
        assert_eq!(Role::start(TEST, "alone").told(), "done");
        return;
    };
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
        let root = root().await;
        let bytes = vec![7; 8 << 20];
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let memory = root.mmap(bytes.len(), protection, MapFlags::MAP_PRIVATE, None).await.unwrap();
        let limit = limit_descriptors(0, 3);
        let written = root.write_memory(memory.address(), bytes).await;
        limit_descriptors(0, limit);
        written.unwrap();
        tell("done");
    });
}

#[tokio::test]
async fn a_reserved_name_is_nobody_elses() {
    let test = TestHome::new();
    let reserved = test.home.reserve(&name("one")).unwrap();
    let error = test.home.reserve(&name("one")).unwrap_err().to_string();
    assert!(error.contains("reserved"), "{error}");
    let root = root().await;
    let process = root.child().spawn_persistent(reserved, SharedMemory::Refuse).await.unwrap();
    process.prepare_for_reconnect().await.unwrap();
    attach(test.home.place(&name("one"))).await.unwrap().exit(0).await.unwrap();
}

#[test]
fn a_name_whose_reserver_was_killed_is_free_again() {
    const TEST: &str = "a_name_whose_reserver_was_killed_is_free_again";
    if let Some(path) = role() {
        let _reserved = Home::at(path).reserve(&name("one")).unwrap();
        tell("reserved");
        common::hear();
        return;
    }
    let test = TestHome::new();
    let mut other = Role::start(TEST, test.path());
    assert_eq!(other.told(), "reserved");
    assert!(test.home.reserve(&name("one")).is_err());
    other.kill();
    test.home.reserve(&name("one")).unwrap();
}

#[tokio::test]
async fn what_others_put_beside_a_socket_is_neither_written_to_nor_waited_for() {
    let test = TestHome::new();
    let root = root().await;
    let process = spawn_persistent(&test.home, &root).await;
    let precious = test.file("precious");
    std::fs::write(&precious, "precious").unwrap();
    let own = std::process::id();
    for name in [format!(".one.json.{own}"), ".one.json".into(), "one.json".into()] {
        let link = test.path().join(name);
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(&precious, &link).unwrap();
    }
    for count in 0..50 {
        let link = test.path().join(format!(".one.json.{own}.{count}"));
        std::os::unix::fs::symlink(&precious, link).unwrap();
    }
    process.prepare_for_reconnect().await.unwrap();
    process.reconnect().await.unwrap();
    assert_eq!(std::fs::read(&precious).unwrap(), b"precious");

    let state = test.path().join("one.json");
    std::fs::remove_file(&state).unwrap();
    nix::unistd::mkfifo(&state, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(test.home.place(&name("one")).state().is_none());
    process.exit(0).await.unwrap();
}

#[tokio::test]
async fn a_close_that_waited_does_not_close_what_was_opened_meanwhile() {
    let test = TestHome::new();
    let root = root().await;
    let process = spawn_persistent(&test.home, &root).await;
    let open = || process.openat(None, "/etc/passwd", OFlag::O_RDONLY, Mode::empty());
    let mut old = Vec::new();
    for _ in 0..10 {
        old.push(open().await.unwrap());
    }
    process.prepare_for_reconnect().await.unwrap();
    // All of them wait, in this order; the sweep comes before them.
    let mut new: Vec<_> = (0..10).map(|_| Box::pin(open())).collect();
    assert!(new.iter_mut().all(begin));
    drop(old);
    process.reconnect().await.unwrap();
    for new in new {
        let new = in_time("open", new).await.unwrap();
        let start = process.read(&new, 4).await.unwrap();
        assert_eq!(start, std::fs::read("/etc/passwd").unwrap()[..4]);
    }
}

#[tokio::test]
async fn descriptors_that_were_to_be_passed_over_an_old_connection_do_not_mix_up_the_new_one() {
    let test = TestHome::new();
    let root = root().await;
    let process = spawn_persistent(&test.home, &root).await;
    let (reading, writing) = process.pipe2(OFlag::empty()).await.unwrap();
    let pipe = process.fetch_fd(&writing).await.unwrap();
    let file = tempfile::tempfile().unwrap();
    let files = [file.as_fd()];
    // Busy: what is asked for from here on waits until the connection has been ended.
    let mut read = Box::pin(process.read(&reading, 1));
    assert!(begin(&mut read));
    let mut ending = Box::pin(process.prepare_for_reconnect());
    assert!(begin(&mut ending));
    let mut send = Box::pin(process.send_fds(&files));
    let mut fetch = Box::pin(process.fetch_fd(&writing));
    assert!(begin(&mut send) && begin(&mut fetch));
    nix::unistd::write(&pipe, b"x").unwrap();
    in_time("the end", ending).await.unwrap();
    in_time("reconnect", process.reconnect()).await.unwrap();
    in_time("read", read).await.unwrap();
    let inode = |fd: &dyn AsFd| nix::sys::stat::fstat(fd.as_fd()).unwrap().st_ino;
    // They go over the new one.
    let there = in_time("send", send).await.unwrap();
    assert_eq!(inode(&in_time("fetch", fetch).await.unwrap()), inode(&pipe));
    let back = in_time("fetch", process.fetch_fd(&there[0])).await.unwrap();
    assert_eq!(inode(&back), inode(&file));
}

#[tokio::test]
async fn a_connection_goes_on_when_its_end_is_given_up() {
    let test = TestHome::new();
    let root = root().await;
    let process = spawn_persistent(&test.home, &root).await;
    let sleeping = tokio::spawn({
        let process = process.process().clone();
        async move { process.nanosleep(Duration::from_millis(50)).await }
    });
    tokio::task::yield_now().await;
    let mut ending = Box::pin(process.prepare_for_reconnect());
    assert!(begin(&mut ending));
    drop(ending);
    in_time("a call", process.getpid()).await.unwrap();
    sleeping.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_reconnect_that_is_given_up_leaves_a_connection_that_goes_on() {
    let test = TestHome::new();
    let root = root().await;
    let process = spawn_persistent(&test.home, &root).await;
    for calls in 0..20 {
        process.prepare_for_reconnect().await.unwrap();
        let mut reconnect = Box::pin(process.reconnect());
        for _ in 0..calls {
            if !begin(&mut reconnect) {
                break;
            }
            tokio::task::yield_now().await;
        }
        drop(reconnect);
        if !process.connection().is_connected() {
            process.reconnect().await.unwrap();
        }
        in_time("a call", process.getpid()).await.unwrap();
    }
}

#[tokio::test]
async fn a_status_is_not_lost_with_a_wait_that_is_given_up() {
    let root = root().await;
    let mut child = root.child().spawn().await.unwrap();
    child.exit(7).await.unwrap();
    child.ended().await;
    {
        let mut wait = Box::pin(child.wait());
        begin(&mut wait);
    }
    let status = farcall::calls::WaitStatus::Exited(7);
    assert_eq!(in_time("wait", child.wait()).await.unwrap(), status);
}

#[tokio::test]
async fn more_memory_than_the_stream_takes_is_an_error_of_that_call_only() {
    let root = root().await;
    assert!(root.read_memory(4096, 3 << 30).await.is_err());
    root.getpid().await.unwrap();
}

#[tokio::test]
async fn calls_in_an_attached_process_fail_when_it_has_ended() {
    let test = TestHome::new();
    let root = root().await;
    let made = spawn_persistent(&test.home, &root).await;
    made.prepare_for_reconnect().await.unwrap();
    let process = attach(test.home.place(&name("one"))).await.unwrap();
    process.exit(0).await.unwrap();
    let after = in_time("a call", process.getpid()).await;
    assert!(matches!(after, Err(Error::Gone | Error::Lost(_))), "{after:?}");
}

#[tokio::test]
async fn an_attach_to_what_ends_after_its_answer_ends_too() {
    use farcall::abi::handshake::{Answer, HANDSHAKE_MAGIC, HANDSHAKE_VERSION};
    let test = TestHome::new();
    let path = test.file("fake.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let server = std::thread::spawn(move || {
        use std::io::Write;
        // The descriptors that come are dropped with the message, unread.
        let (mut client, _) = listener.accept().unwrap();
        let answer = Answer {
            magic: HANDSHAKE_MAGIC,
            version: HANDSHAKE_VERSION,
            pid: 1,
            fds: [10, 11, -1],
            listen: 12,
            ..Answer::default()
        };
        client.write_all(&answer.to_bytes()).unwrap();
    });
    let failed = in_time("attach", attach(farcall::persist::Place::at(path))).await;
    assert!(failed.is_err());
    server.join().unwrap();
}

#[tokio::test]
async fn a_process_whose_maker_gave_up_waiting_can_be_reached() {
    let test = TestHome::new();
    let root = root().await;
    for calls in 0..12 {
        let child = root.child().spawn().await.unwrap();
        let reserved = test.home.reserve(&name("one")).unwrap();
        let place = reserved.place().clone();
        let mut make = Box::pin(child.make_persistent(reserved, SharedMemory::Refuse));
        for _ in 0..calls {
            if !begin(&mut make) {
                break;
            }
            root.getpid().await.unwrap();
        }
        let begun = calls > 0;
        drop(make);
        let pid = child.pid().unwrap();
        if begun {
            until_async("it is made all the same", || child.is_persistent()).await;
            assert!(place.socket().exists());
            until_async("it knows where", || child.place().is_some()).await;
            child.prepare_for_reconnect().await.unwrap();
            drop(child);
            attach(place).await.unwrap().exit(0).await.unwrap();
        } else {
            drop(child);
        }
        until_async("it is gone", || !alive(pid)).await;
    }
}

#[tokio::test]
async fn a_full_table_of_descriptors_does_not_make_a_process_unreachable() {
    let test = TestHome::new();
    let root = root().await;
    let process = spawn_persistent(&test.home, &root).await;
    let pid = process.pid().unwrap();
    limit_descriptors(pid, 40);
    let null = process.openat(None, "/dev/null", OFlag::O_RDONLY, Mode::empty()).await.unwrap();
    let mut last = null.into_raw();
    while let Ok(number) = process.syscall(Sysno::dup, [last as u64, 0, 0, 0, 0, 0]).await {
        last = number as i32;
    }
    process.prepare_for_reconnect().await.unwrap();
    let other = in_time("attach", attach(test.home.place(&name("one")))).await.unwrap();
    assert_eq!(other.pid(), Some(pid));
    // And it can be helped.
    other.adopt_fd(last).unwrap().close().await.unwrap();
    other.openat(None, "/dev/null", OFlag::O_RDONLY, Mode::empty()).await.unwrap();
    other.exit(0).await.unwrap();
}

#[tokio::test]
async fn what_was_dropped_before_the_end_of_a_connection_is_closed() {
    let test = TestHome::new();
    let root = root().await;
    let process = spawn_persistent(&test.home, &root).await;
    let pid = process.pid().unwrap();
    let fd = process.openat(None, "/etc/passwd", OFlag::O_RDONLY, Mode::empty()).await.unwrap();
    let number = fd.number();
    drop(fd);
    process.prepare_for_reconnect().await.unwrap();
    assert!(!fds(pid).contains_key(&number));
    process.reconnect().await.unwrap();
    process.exit(0).await.unwrap();
}
