//! Exit statuses are never lost: those of a persistent process's children, of its children's orphans,
//! and of children that others have made and handed over.

use crate::common;

use std::collections::BTreeMap;
use std::future::Future;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use common::{
    Role, TELLS_PIDFDS, TestHome, alive, attach, deny, hear, is_same_child, limit_descriptors,
    linux, persistent, role, root, tell, until, until_async,
};
use farcall::calls::{Sysno, WaitStatus};
use farcall::persist::{Place, Resource, Sameness, SharedMemory};
use farcall::process::{Child, ChildState};
use farcall::proto::Call;
use farcall::{Error, Fd, Local, Mapping, Process};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType};
use nix::sys::stat::Mode;

/// The children of a process that have names, by these.
async fn named(process: &Process) -> BTreeMap<String, i32> {
    let mut named = BTreeMap::new();
    for found in process.names().await.unwrap() {
        let Resource::Child(pid) = found.what else { panic!("{found:?}") };
        assert!(is_same_child(&found.state), "{found:?}");
        named.insert(found.name, pid);
    }
    named
}

/// Asserts what a pidfd tells of a process whose status would be that: before Linux 6.15 that it is not told.
async fn assert_told(process: &Process, pidfd: &Fd, status: Option<WaitStatus>) {
    let told = process.exit_status(pidfd).await;
    if linux() >= (6, 15) {
        assert_eq!(told.unwrap(), status);
    } else {
        let untold = matches!(told, Err(Error::ExitStatusUntold { .. }));
        assert!(untold || status.is_none() && matches!(told, Ok(None)), "{told:?}");
    }
}

async fn sh(child: &Child, script: &str) {
    child.execve("/bin/sh", ["sh", "-c", script], [""; 0]).await.unwrap();
}

/// A pidfd of a child, in its parent.
async fn pidfd(parent: &Process, pid: i32) -> Fd {
    let number = parent.syscall(Sysno::pidfd_open, [pid as u64, 0, 0, 0, 0, 0]).await.unwrap();
    parent.adopt_fd(number as i32).unwrap()
}

/// Waits until a child that nobody reaps has ended.
async fn until_ended(process: &Process, pid: i32) -> WaitStatus {
    loop {
        match process.child_state(pid).await.unwrap().status() {
            Some(status) => return status,
            None => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    }
}

#[tokio::test]
async fn a_controller_that_is_killed_at_once_after_a_start_leaves_the_status_to_the_next() {
    const TEST: &str =
        "a_controller_that_is_killed_at_once_after_a_start_leaves_the_status_to_the_next";
    if let Some(socket) = role() {
        let process = attach(Place::at(PathBuf::from(socket))).await.unwrap();
        let worker = process.child().named("worker").spawn().await.unwrap();
        sh(&worker, "sleep 0.2; exit 42").await;
        tell(worker.pid_in_parent());
        hear();
        return;
    }
    let home = TestHome::new();
    let root = root().await;
    let (process, place) = persistent(&home, &root).await;
    process.prepare_for_reconnect().await.unwrap();
    let mut controller = Role::start(TEST, place.socket());
    let pid: i32 = controller.told().parse().unwrap();
    controller.kill();
    let next = attach(place).await.unwrap();
    assert_eq!(named(&next).await, BTreeMap::from([("worker".into(), pid)]));
    assert_eq!(next.wait_for_child(pid).await.unwrap(), WaitStatus::Exited(42));
    next.release("worker").await.unwrap();
    next.exit(0).await.unwrap();
}

#[tokio::test]
async fn no_child_lacks_its_name_at_whatever_instant_its_controller_is_killed() {
    const TEST: &str = "no_child_lacks_its_name_at_whatever_instant_its_controller_is_killed";
    if let Some(socket) = role() {
        let process = attach(Place::at(PathBuf::from(socket))).await.unwrap();
        tell("attached");
        for i in 0.. {
            let child = process.child().named(format!("{i}")).spawn().await.unwrap();
            child.exit(i % 100).await.unwrap();
            if i == 10 {
                tell("ten");
            }
        }
    }
    let home = TestHome::new();
    let root = root().await;
    let (process, place) = persistent(&home, &root).await;
    process.prepare_for_reconnect().await.unwrap();
    let mut made = 0;
    for round in 0..=20 {
        let mut controller = Role::start(TEST, place.socket());
        assert_eq!(controller.told(), "attached");
        // After some time, whatever it has done by then; at last, when it has made some.
        if round == 20 {
            assert_eq!(controller.told(), "ten");
        }
        std::thread::sleep(Duration::from_micros(700 * round));
        controller.kill();
        let next = attach(place.clone()).await.unwrap();
        let names = named(&next).await;
        let children = next.children().await.unwrap();
        assert!(children.complete);
        let mut pids: Vec<i32> = names.values().copied().collect();
        pids.sort_unstable();
        let listed: Vec<i32> = children.known.iter().map(|child| child.pid).collect();
        assert_eq!(listed, pids);
        made += pids.len();
        for (name, pid) in names {
            // The last ones may not have been told to exit: their streams' ends have ended them.
            let status = next.wait_for_child(pid).await.unwrap();
            let expected = name.parse::<i32>().unwrap() % 100;
            let ended = [WaitStatus::Exited(expected), WaitStatus::Exited(0)].contains(&status);
            assert!(ended, "{name}: {status}");
            next.forget(&name).await.unwrap();
        }
        assert_eq!(next.children().await.unwrap().known, []);
        next.prepare_for_reconnect().await.unwrap();
    }
    assert!(made >= 10);
    attach(place).await.unwrap().exit(0).await.unwrap();
}

#[tokio::test]
async fn a_name_that_can_not_be_makes_no_child() {
    let home = TestHome::new();
    let root = root().await;
    let (process, _) = persistent(&home, &root).await;
    process.keep_bytes("taken", b"").await.unwrap();
    for name in ["", "taken", &"x".repeat(49)] {
        let refused = process.child().named(name).spawn().await;
        assert!(matches!(refused, Err(Error::Name { .. })), "{refused:?}");
    }
    assert_eq!(process.children().await.unwrap().known, []);
    // A clone that fails names nothing.
    deny(&process, Sysno::clone, None, Errno::EAGAIN).await;
    let refused = process.child().named("child").spawn().await;
    assert_eq!(refused.map(drop).unwrap_err().errno(), Some(Errno::EAGAIN));
    let names = process.names().await.unwrap();
    assert_eq!(names.iter().map(|named| &named.name).collect::<Vec<_>>(), ["taken"]);
    // One that ends with its controller keeps no names.
    let refused = root.child().named("child").spawn().await;
    assert!(matches!(refused, Err(Error::Misuse { .. })), "{refused:?}");
    process.exit(0).await.unwrap();
}

#[tokio::test]
async fn a_child_that_shares_its_parents_memory_and_descriptors_has_its_name_too() {
    let home = TestHome::new();
    let root = root().await;
    let (process, _) = persistent(&home, &root).await;
    let child = process.child().share_memory().share_files().named("shares").spawn().await.unwrap();
    let pid = child.pid_in_parent();
    assert_eq!(named(&process).await, BTreeMap::from([("shares".into(), pid)]));
    child.exit(5).await.unwrap();
    drop(child);
    assert_eq!(process.wait_for_child(pid).await.unwrap(), WaitStatus::Exited(5));
    process.exit(0).await.unwrap();
}

#[tokio::test]
async fn an_orphan_comes_to_the_subreaper_and_its_status_with_it() {
    let home = TestHome::new();
    let root = root().await;
    let (process, place) = persistent(&home, &root).await;
    process.set_child_subreaper(true).await.unwrap();
    let child = process.child().spawn().await.unwrap();
    let pid = child.pid_in_parent();
    // The one in the background loses its parent at once.
    sh(&child, "(sleep 0.2; exit 7) & exit 3").await;
    child.ended().await;
    drop(child);
    let both = process.children().await.unwrap();
    assert!(both.complete);
    let ended = ChildState::Ended(WaitStatus::Exited(3));
    assert!(both.known.iter().any(|child| (child.pid, child.state) == (pid, ended)), "{both:?}");
    let [orphan] = both.known.iter().filter(|child| child.pid != pid).collect::<Vec<_>>()[..]
    else {
        panic!("{both:?}")
    };
    let orphan = orphan.pid;
    process.prepare_for_reconnect().await.unwrap();
    until("the orphan has ended", || !alive(orphan));

    let next = attach(place).await.unwrap();
    let status = WaitStatus::Exited(7);
    // It is told as often as it is asked for, until it is reaped.
    for _ in 0..2 {
        assert_eq!(next.child_state(orphan).await.unwrap().status(), Some(status));
    }
    assert_eq!(next.wait_for_child(orphan).await.unwrap(), status);
    assert_eq!(next.reap_any().await.unwrap(), Some((pid, WaitStatus::Exited(3))));
    assert_eq!(next.reap_any().await.unwrap(), None);
    assert_eq!(next.children().await.unwrap().known, []);
    // Without it orphans go elsewhere.
    next.set_child_subreaper(false).await.unwrap();
    let child = next.child().spawn().await.unwrap();
    sh(&child, "sleep 0.1 & exit 0").await;
    child.ended().await;
    assert_eq!(next.children().await.unwrap().known.len(), 1);
    next.exit(0).await.unwrap();
}

#[tokio::test]
async fn a_child_of_a_short_lived_process_is_handed_over_by_its_pidfd() {
    let home = TestHome::new();
    let root = root().await;
    let (process, place) = persistent(&home, &root).await;
    let helper = root.child().spawn().await.unwrap();
    let mut child = helper.child().spawn().await.unwrap();
    let theirs = pidfd(&helper, child.pid_in_parent()).await;
    let ours = process.keep_fd_of("child", &helper, &theirs).await.unwrap();
    assert_told(&process, &ours, None).await;
    child.exit(42).await.unwrap();
    child.ended().await;
    // It has ended, and its parent has not reaped it.
    assert_told(&process, &ours, None).await;
    assert_eq!(child.wait().await.unwrap(), WaitStatus::Exited(42));
    assert_told(&process, &ours, Some(WaitStatus::Exited(42))).await;
    helper.exit(0).await.unwrap();
    drop((ours, theirs, child, helper));
    process.prepare_for_reconnect().await.unwrap();

    let next = attach(place).await.unwrap();
    let found = next.name("child").await.unwrap();
    assert!(is_same_child(&found.state));
    let Resource::Fd(fd) = found.what else { panic!("{found:?}") };
    for _ in 0..2 {
        assert_told(&next, &fd, Some(WaitStatus::Exited(42))).await;
    }
    // One that a signal has ended, and what is no pidfd.
    let killed = next.child().spawn().await.unwrap();
    let pid = killed.pid_in_parent();
    let killed_fd = pidfd(&next, pid).await;
    killed.kill(Signal::SIGKILL).unwrap();
    let status = WaitStatus::Signaled { signal: 9, core_dumped: false };
    assert_eq!(next.wait_for_child(pid).await.unwrap(), status);
    assert_told(&next, &killed_fd, Some(status)).await;
    let file = next.openat(None, "/", OFlag::O_RDONLY, Mode::empty()).await.unwrap();
    assert_eq!(next.exit_status(&file).await.unwrap_err().errno(), Some(Errno::EBADF));
    next.exit(0).await.unwrap();
}

#[tokio::test]
async fn what_any_process_has_made_goes_to_one_that_is_persistent_at_once() {
    let home = TestHome::new();
    let root = root().await;
    let worker = root.child().spawn().await.unwrap();
    let path = home.file("log");
    let flags = OFlag::O_CREAT | OFlag::O_RDWR;
    let log = worker.openat(None, &path, flags, Mode::S_IRWXU).await.unwrap();
    worker.write(&log, b"of the worker".to_vec()).await.unwrap();
    let (family, kind) = (AddressFamily::Unix, SockType::Stream);
    let socket = root.socket(family, kind, SockFlag::empty(), 0).await.unwrap();
    let mut job = worker.child().spawn().await.unwrap();
    let job_fd = pidfd(&worker, job.pid_in_parent()).await;
    let reserved = home.home.reserve(&"heir".parse().unwrap()).unwrap();
    let place = Place::at(reserved.place().socket().to_owned());
    let foreign = root.child().inherit("log", &root, &log);
    assert!(matches!(foreign, Err(Error::ForeignFd { .. })), "{foreign:?}");
    let builder = root.child().inherit("log", &worker, &log).unwrap();
    let builder = builder.inherit("socket", &root, &socket).unwrap();
    let builder = builder.inherit("job", &worker, &job_fd).unwrap();
    assert!(matches!(builder.clone().spawn().await, Err(Error::Misuse { .. })));
    // What it is to inherit is kept open.
    drop(log);
    let heir = builder.spawn_persistent(reserved, SharedMemory::Refuse).await.unwrap();
    assert_eq!(heir.unclaimed().await.unwrap(), []);
    heir.prepare_for_reconnect().await.unwrap();
    job.exit(9).await.unwrap();
    job.wait().await.unwrap();
    drop((job, job_fd, socket));
    worker.exit(0).await.unwrap();

    let next = attach(place).await.unwrap();
    let mut found = BTreeMap::new();
    for named in next.names().await.unwrap() {
        let same = if named.name == "job" {
            is_same_child(&named.state)
        } else {
            named.state == Sameness::Same
        };
        assert!(same, "{named:?}");
        let Resource::Fd(fd) = named.what else { panic!("{named:?}") };
        found.insert(named.name, fd);
    }
    assert_eq!(found.keys().collect::<Vec<_>>(), ["job", "log", "socket"]);
    assert_told(&next, &found["job"], Some(WaitStatus::Exited(9))).await;
    // The same open file, with its offset.
    next.write(&found["log"], b", and of the heir".to_vec()).await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"of the worker, and of the heir");
    assert_eq!(next.unclaimed().await.unwrap(), []);
    next.exit(0).await.unwrap();
}

#[tokio::test]
async fn who_can_be_reached_has_all_that_it_inherits_whenever_the_controller_is_killed() {
    const TEST: &str =
        "who_can_be_reached_has_all_that_it_inherits_whenever_the_controller_is_killed";
    if let Some(socket) = role() {
        let root = root().await;
        let file = root.openat(None, "/", OFlag::O_RDONLY, Mode::empty()).await.unwrap();
        let reserved = Place::at(PathBuf::from(socket)).reserve().unwrap();
        let mut builder = root.child();
        for name in ["one", "two", "three"] {
            builder = builder.inherit(name, &root, &file).unwrap();
        }
        tell("begins");
        let _child = builder.spawn_persistent(reserved, SharedMemory::Refuse).await.unwrap();
        tell("persistent");
        hear();
        return;
    }
    let home = TestHome::new();
    let socket = home.home.reserve(&"heir".parse().unwrap()).unwrap().place().socket().to_owned();
    let mut reached = 0;
    for round in 0..=20 {
        let mut controller = Role::start(TEST, &socket);
        assert_eq!(controller.told(), "begins");
        // After some time, whatever it has done by then; at last, when it is done.
        if round == 20 {
            assert_eq!(controller.told(), "persistent");
        }
        std::thread::sleep(Duration::from_micros(500 * round));
        controller.kill();
        let place = Place::at(socket.clone());
        // It may be reached and still end with its parent.
        if let Ok(next) = attach(place.clone()).await
            && let Ok(names) = next.names().await
        {
            reached += 1;
            let names: Vec<&str> = names.iter().map(|named| named.name.as_str()).collect();
            assert_eq!(names, ["one", "three", "two"], "round {round}");
            let _ = next.exit(0).await;
        }
        if let Some(state) = place.state() {
            until_async("it is gone", || !state.process.is_alive()).await;
        }
        place.remove().unwrap();
    }
    assert!(reached > 0);
}

/// Memory of a process.
async fn page(process: &Process) -> Mapping {
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    process.mmap(4096, protection, MapFlags::MAP_PRIVATE, None).await.unwrap()
}

#[tokio::test]
async fn a_kernel_that_tells_no_status_by_a_pidfd_is_an_error_that_says_what_is_left() {
    let root = root().await;
    let helper = root.child().spawn().await.unwrap();
    let mut child = helper.child().spawn().await.unwrap();
    let fd = pidfd(&helper, child.pid_in_parent()).await;
    let fd = helper.fetch_fd(&fd).await.unwrap();
    child.exit(42).await.unwrap();
    child.ended().await;
    for errno in [Errno::ENOTTY, Errno::EINVAL] {
        let other = root.child().spawn().await.unwrap();
        let theirs = other.send_fds(&[fd.as_fd()]).await.unwrap().remove(0);
        assert_told(&other, &theirs, None).await;
        deny(&other, Sysno::ioctl, Some(libc::PIDFD_GET_INFO), errno).await;
        let error = other.exit_status(&theirs).await.unwrap_err();
        assert!(matches!(error, Error::ExitStatusUntold { errno: Some(e) } if e == errno));
        let text = error.to_string();
        for word in ["6.15", "PIDFD_INFO_EXIT", "wait_for_child"] {
            assert!(text.contains(word), "{text}");
        }
        // Nothing else is the matter with it. Some kernels, 6.12 for one, look for the process first.
        let error = other.syscall(Sysno::ioctl, [theirs.number() as u64, 0, 0, 0, 0, 0]).await;
        let errno = error.unwrap_err().errno();
        assert!(matches!(errno, Some(Errno::ENOTTY | Errno::ESRCH)), "{errno:?}");
    }
    // What remains.
    assert_eq!(child.wait().await.unwrap(), WaitStatus::Exited(42));
}

#[tokio::test]
async fn nothing_is_reaped_that_nobody_has_asked_for() {
    let home = TestHome::new();
    let root = root().await;
    let (process, place) = persistent(&home, &root).await;
    let mut pids = BTreeMap::new();
    for status in 1..=70 {
        let child = process.child().spawn().await.unwrap();
        pids.insert(child.pid_in_parent(), status);
        child.exit(status).await.unwrap();
        child.ended().await;
    }
    let listed = |children: farcall::process::Children| {
        assert!(children.complete);
        let status = |state| match state {
            ChildState::Ended(WaitStatus::Exited(status)) => status,
            other => panic!("{other:?}"),
        };
        let all = children.known.iter().map(|child| (child.pid, status(child.state)));
        all.collect::<BTreeMap<_, _>>()
    };
    assert_eq!(listed(process.children().await.unwrap()), pids);
    assert_eq!(listed(process.children().await.unwrap()), pids);
    process.prepare_for_reconnect().await.unwrap();
    process.reconnect().await.unwrap();
    process.prepare_for_reconnect().await.unwrap();
    let next = attach(place).await.unwrap();
    next.close_unclaimed().await.unwrap();
    assert_eq!(listed(next.children().await.unwrap()), pids);
    // Each is told once.
    while let Some((pid, status)) = next.reap_any().await.unwrap() {
        assert_eq!(pids.remove(&pid).map(WaitStatus::Exited), Some(status));
    }
    assert!(pids.is_empty());
    next.exit(0).await.unwrap();
}

#[tokio::test]
async fn a_status_whose_reaping_is_given_up_is_told_to_the_next_that_asks() {
    let home = TestHome::new();
    // Without a ring, in which a call may be complete when it has been polled once.
    let root = Local::new().polling(None).start().await.unwrap();
    let (process, _) = persistent(&home, &root).await;
    let mut pids = Vec::new();
    for status in 0..4 {
        let child = process.child().spawn().await.unwrap();
        pids.push(child.pid_in_parent());
        child.exit(status).await.unwrap();
        child.ended().await;
    }
    // Given up while the call that reaps is under way.
    let give_up = async |left| {
        let mut context = Context::from_waker(Waker::noop());
        let mut reaping = Box::pin(process.reap_any());
        // It looks first, and then reaps.
        for _ in 0..2 {
            assert!(matches!(reaping.as_mut().poll(&mut context), Poll::Pending));
            // Calls are made in order: that one has been made then.
            process.getpid().await.unwrap();
        }
        drop(reaping);
        assert_eq!(process.children().await.unwrap().known.len(), left);
    };
    give_up(3).await;
    assert_eq!(process.wait_for_child(pids[0]).await.unwrap(), WaitStatus::Exited(0));
    give_up(2).await;
    let mut told = Vec::new();
    while let Some(reaped) = process.reap_any().await.unwrap() {
        told.push(reaped);
    }
    told.sort_unstable_by_key(|(pid, _)| *pid);
    let expected = [1, 2, 3].map(|i| (pids[i], WaitStatus::Exited(i as i32)));
    assert_eq!(told, expected);
    process.exit(0).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn children_are_listed_with_and_without_a_proc_that_knows_them() {
    let home = TestHome::new();
    let root = root().await;
    // In a pid namespace of its own, with a /proc of another one.
    let reserved = home.home.reserve(&"inner".parse().unwrap()).unwrap();
    let inner = root.child().flags(CloneFlags::CLONE_NEWPID);
    let inner = inner.spawn_persistent(reserved, SharedMemory::Refuse).await.unwrap();
    let child = inner.child().spawn().await.unwrap();
    assert_ne!(child.pid(), Some(child.pid_in_parent()));
    let children = inner.children().await.unwrap();
    assert!(children.complete);
    assert_eq!(children.known.len(), 1);
    assert_eq!((children.known[0].pid, children.known[0].state), (2, ChildState::Lives));
    child.exit(1).await.unwrap();
    drop(child);
    until_ended(&inner, 2).await;
    inner.exit(0).await.unwrap();

    // Without any /proc.
    let (process, _) = persistent(&home, &root).await;
    let empty = home.file("empty");
    std::fs::create_dir(&empty).unwrap();
    let mut path = empty.to_str().unwrap().as_bytes().to_vec();
    path.push(0);
    let memory = page(&process).await;
    process.write_memory(memory.address(), path).await.unwrap();
    process.syscall(Sysno::chroot, [memory.address(), 0, 0, 0, 0, 0]).await.unwrap();
    let lives = process.child().named("lives").spawn().await.unwrap();
    let unnamed = process.child().spawn().await.unwrap();
    let ended = process.child().spawn().await.unwrap();
    ended.exit(0).await.unwrap();
    ended.ended().await;
    let status = ChildState::NeverExecuted;
    let expected = [
        (lives.pid_in_parent(), ChildState::Lives),
        (unnamed.pid_in_parent(), ChildState::Lives),
        (ended.pid_in_parent(), status),
    ];
    let listed = |children: &farcall::process::Children| {
        children.known.iter().map(|child| (child.pid, child.state)).collect::<Vec<_>>()
    };
    let children = process.children().await.unwrap();
    assert!(children.complete);
    assert_eq!(listed(&children), expected);
    // Nor here: of this thread alone.
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(Some("none"), "/proc", Some("tmpfs"), MsFlags::empty(), none).unwrap();
    let children = process.children().await.unwrap();
    assert!(!children.complete);
    // Whether it has executed a program nobody tells.
    let ended = ChildState::Ended(WaitStatus::Exited(0));
    assert_eq!(listed(&children), [expected[0], (expected[2].0, ended)]);
    process.exit(0).await.unwrap();
}

#[tokio::test]
async fn another_child_of_the_same_pid_is_not_taken_for_the_one_that_had_the_name() {
    let home = TestHome::new();
    let root = root().await;
    // In a pid namespace of its own, in which nobody else takes pids.
    let reserved = home.home.reserve(&"init".parse().unwrap()).unwrap();
    let init = root.child().flags(CloneFlags::CLONE_NEWPID);
    let init = init.spawn_persistent(reserved, SharedMemory::Refuse).await.unwrap();
    let place = Place::at(init.place().unwrap().socket().to_owned());
    let first = init.child().named("by its start").spawn().await.unwrap();
    let pid = first.pid_in_parent();
    init.keep_child("later", &first).await.unwrap();
    let both = ["by its start", "later"].map(|name| (name.to_owned(), pid));
    assert_eq!(named(&init).await, BTreeMap::from(both));
    first.exit(0).await.unwrap();
    // As an earlier controller may have done that has crashed then.
    init.wait_for_child(pid).await.unwrap();
    let gone = init.names().await.unwrap();
    assert!(gone.iter().all(|found| matches!(found.state, Sameness::Changed(_))), "{gone:?}");

    let (path, flags) = ("/proc/sys/kernel/ns_last_pid", OFlag::O_WRONLY);
    let last = init.openat(None, path, flags, Mode::empty()).await.unwrap();
    init.write(&last, (pid - 1).to_string().into_bytes()).await.unwrap();
    let second = init.child().named("the second").spawn().await.unwrap();
    assert_eq!(second.pid_in_parent(), pid);
    drop(last);
    init.prepare_for_reconnect().await.unwrap();
    let next = attach(place).await.unwrap();
    for found in next.names().await.unwrap() {
        if found.name == "the second" {
            assert!(is_same_child(&found.state), "{found:?}");
            continue;
        }
        if linux() < TELLS_PIDFDS {
            // Nobody can tell, and it is said so.
            assert!(matches!(found.state, Sameness::Unverified(_)), "{found:?}");
            continue;
        }
        let Sameness::Changed(what) = &found.state else { panic!("{found:?}") };
        assert!(what.contains("another child"), "{what}");
        assert!(matches!(found.what, Resource::Nothing { .. }), "{found:?}");
    }
    next.exit(0).await.unwrap();
}

#[tokio::test]
async fn a_handle_to_a_child_that_was_reaped_reaches_no_other_child_of_that_pid() {
    let root = root().await;
    // In a pid namespace of its own, in which nobody else takes pids.
    let init = root.child().flags(CloneFlags::CLONE_NEWPID).spawn().await.unwrap();
    let first = init.child().spawn().await.unwrap();
    let pid = first.pid_in_parent();
    let handle = init.adopt_child(pid).await.unwrap();
    assert_eq!(handle.state().await.unwrap(), ChildState::Lives);
    first.exit(0).await.unwrap();
    init.wait_for_child(pid).await.unwrap();

    let (path, flags) = ("/proc/sys/kernel/ns_last_pid", OFlag::O_WRONLY);
    let last = init.openat(None, path, flags, Mode::empty()).await.unwrap();
    init.write(&last, (pid - 1).to_string().into_bytes()).await.unwrap();
    let second = init.child().spawn().await.unwrap();
    assert_eq!(second.pid_in_parent(), pid);
    let errno = |error: Error| error.errno();
    assert_eq!(errno(handle.state().await.unwrap_err()), Some(Errno::ECHILD));
    assert_eq!(errno(handle.kill(Signal::SIGKILL).await.unwrap_err()), Some(Errno::ESRCH));
    assert_eq!(errno(handle.wait().await.unwrap_err()), Some(Errno::ECHILD));
    assert_eq!(init.child_state(pid).await.unwrap(), ChildState::Lives);
    second.getpid().await.unwrap();
}

#[tokio::test]
async fn children_are_listed_also_where_a_descriptor_has_the_number_of_their_parent() {
    let root = root().await;
    let flags = CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS;
    let init = root.child().flags(flags).spawn().await.unwrap();
    let memory = page(&init).await;
    let (proc, slash) = (memory.address(), memory.address() + 8);
    let path = memory.address() + 16;
    init.write_memory(proc, *b"proc\0\0\0\0/\0\0\0\0\0\0\0/proc\0").await.unwrap();
    let private = (MsFlags::MS_REC | MsFlags::MS_PRIVATE).bits();
    init.syscall(Sysno::mount, [0, slash, 0, private, 0, 0]).await.unwrap();
    init.syscall(Sysno::mount, [proc, path, proc, 0, 0, 0]).await.unwrap();
    let parent = init.child().spawn().await.unwrap();
    assert_eq!(parent.pid_in_parent(), 2);
    // The next that is opened.
    parent.syscall(Sysno::close, [2, 0, 0, 0, 0, 0]).await.unwrap();
    let child = parent.child().spawn().await.unwrap();
    let children = parent.children().await.unwrap();
    assert!(children.complete);
    let pids: Vec<i32> = children.known.iter().map(|child| child.pid).collect();
    assert_eq!(pids, [child.pid_in_parent()]);
}

#[tokio::test]
async fn what_does_not_fit_into_a_table_leaves_no_name() {
    let home = TestHome::new();
    let root = root().await;
    let (process, _) = persistent(&home, &root).await;
    let file = root.openat(None, "/", OFlag::O_RDONLY, Mode::empty()).await.unwrap();
    let limit = |soft| limit_descriptors(process.pid().unwrap(), soft);
    limit(32);
    let mut full = Vec::new();
    while let Ok(fd) = process.openat(None, "/", OFlag::O_RDONLY, Mode::empty()).await {
        full.push(fd);
    }
    let error = process.keep_fd_of("file", &root, &file).await.unwrap_err();
    assert_eq!(error.errno(), Some(Errno::EMFILE));
    assert!(process.names().await.unwrap().is_empty());
    drop(full);
    let kept = process.keep_fd_of("file", &root, &file).await.unwrap();
    assert_eq!(process.name("file").await.unwrap().state, Sameness::Same);
    let again = process.keep_fd_of("file", &root, &file).await;
    assert!(matches!(again, Err(Error::Name { .. })), "{again:?}");
    drop(kept);
    process.release("file").await.unwrap();
    assert_eq!(process.unclaimed().await.unwrap(), []);
    process.exit(0).await.unwrap();
}

/// A child that stops while its parent traces it, before it does anything else.
async fn traced(parent: &Process) -> Child {
    let child = parent.child().spawn().await.unwrap();
    child.syscall(Sysno::ptrace, [0; 6]).await.unwrap();
    let pid = child.getpid().await.unwrap() as u64;
    let stop = libc::SIGSTOP as u64;
    let call = Call::syscall(Sysno::kill, [pid, stop, 0, 0, 0, 0]);
    drop(child.connection().call("kill", call));
    until("it has stopped", || {
        let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        status.rsplit_once(')').unwrap().1.trim_start().starts_with('t')
    });
    child
}

/// What waitid(2) tells of one child when stops are asked for, without taking it: its code.
async fn peek(parent: &Process, pid: i32) -> i32 {
    let memory = page(parent).await;
    let options = libc::WEXITED | libc::WSTOPPED | libc::WNOHANG | libc::WNOWAIT;
    let args = [u64::from(libc::P_PID), pid as u64, memory.address(), options as u64, 0, 0];
    parent.syscall(Sysno::waitid, args).await.unwrap();
    let code = parent.read_memory(memory.address() + 8, 4).await.unwrap();
    i32::from_le_bytes(code.try_into().unwrap())
}

#[tokio::test]
async fn stops_of_traced_children_are_left_and_the_ends_behind_them_are_found() {
    let home = TestHome::new();
    let root = root().await;
    let (process, _) = persistent(&home, &root).await;
    let stopped = traced(&process).await;
    let pid = stopped.pid_in_parent();
    let mut statuses = BTreeMap::new();
    for status in 1..=5 {
        let child = process.child().spawn().await.unwrap();
        statuses.insert(child.pid_in_parent(), WaitStatus::Exited(status));
        child.exit(status).await.unwrap();
        child.ended().await;
    }
    assert_eq!(process.waitid_pid(pid).await.unwrap(), None);
    let pidfd = pidfd(&process, pid).await;
    assert_eq!(process.waitid_pidfd(&pidfd).await.unwrap(), None);
    for _ in 0..5 {
        let (pid, status) = process.reap_any().await.unwrap().unwrap();
        assert_eq!(statuses.remove(&pid), Some(status));
    }
    assert_eq!(process.reap_any().await.unwrap(), None);
    assert_eq!(process.child_state(pid).await.unwrap(), ChildState::Lives);
    assert_eq!(peek(&process, pid).await, libc::CLD_TRAPPED);
    stopped.kill(Signal::SIGKILL).unwrap();
    stopped.ended().await;
    let killed = WaitStatus::Signaled { signal: libc::SIGKILL, core_dumped: false };
    assert_eq!(process.reap_any().await.unwrap(), Some((pid, killed)));
}

#[tokio::test]
async fn a_child_that_never_executed_a_program_is_told_from_one_that_exited() {
    let home = TestHome::new();
    let root = root().await;
    let (process, place) = persistent(&home, &root).await;
    let served = process.child().named("served").spawn().await.unwrap();
    let ran = process.child().named("ran").spawn().await.unwrap();
    sh(&ran, "exit 0").await;
    let pids = [&served, &ran].map(Child::pid_in_parent);
    process.prepare_for_reconnect().await.unwrap();
    drop((served, ran, process));

    let next = attach(place).await.unwrap();
    for pid in pids {
        assert_eq!(until_ended(&next, pid).await, WaitStatus::Exited(0));
    }
    let zero = WaitStatus::Exited(0);
    let expected = [(pids[0], ChildState::NeverExecuted), (pids[1], ChildState::Ended(zero))];
    for (pid, state) in expected {
        assert_eq!(next.child_state(pid).await.unwrap(), state);
    }
    let children = next.children().await.unwrap().known;
    assert_eq!(children.iter().map(|child| (child.pid, child.state)).collect::<Vec<_>>(), expected);
    next.exit(0).await.unwrap();
}

#[tokio::test]
async fn a_named_child_of_an_earlier_controller_is_signalled_asked_and_waited_for() {
    let home = TestHome::new();
    let root = root().await;
    let (process, place) = persistent(&home, &root).await;
    for name in ["job", "other"] {
        let child = process.child().named(name).spawn().await.unwrap();
        sh(&child, "exec sleep 1000").await;
    }
    process.prepare_for_reconnect().await.unwrap();
    drop(process);

    let next = attach(place).await.unwrap();
    let job = next.adopt_named_child("job").await.unwrap();
    assert_eq!(job.state().await.unwrap(), ChildState::Lives);
    job.kill(Signal::SIGTERM).await.unwrap();
    let ended = WaitStatus::Signaled { signal: libc::SIGTERM, core_dumped: false };
    job.ended().await;
    assert_eq!(job.state().await.unwrap(), ChildState::Ended(ended));
    assert_eq!(job.wait().await.unwrap(), ended);
    // Reaped: whoever asks is told that, by the handle and by the name.
    let errno = |error: Error| error.errno();
    assert_eq!(errno(job.state().await.unwrap_err()), Some(Errno::ECHILD));
    assert_eq!(errno(job.kill(Signal::SIGTERM).await.unwrap_err()), Some(Errno::ESRCH));
    assert_eq!(errno(job.wait().await.unwrap_err()), Some(Errno::ECHILD));
    for (name, reason) in [("job", "reaped"), ("nobody", "no")] {
        let error = next.adopt_named_child(name).await.unwrap_err();
        assert!(matches!(error, Error::Name { .. }), "{error:?}");
        assert!(error.to_string().contains(reason), "{error}");
    }
    let file = next.openat(None, "/", OFlag::O_PATH, Mode::empty()).await.unwrap();
    next.keep_fd("file", &file).await.unwrap();
    let error = next.adopt_named_child("file").await.unwrap_err();
    assert!(error.to_string().contains("not a child"), "{error}");
    assert_eq!(errno(next.adopt_child(1 << 30).await.unwrap_err()), Some(Errno::ECHILD));
    assert_eq!(
        errno(next.adopt_child(std::process::id() as i32).await.unwrap_err()),
        Some(Errno::ECHILD)
    );
    let other = next.adopt_named_child("other").await.unwrap();
    other.kill(Signal::SIGKILL).await.unwrap();
    other.wait().await.unwrap();
    next.exit(0).await.unwrap();
}
