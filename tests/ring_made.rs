//! Making a ring: it waits for calls that take long, and nobody waits for it.

use crate::common;

use std::fs::File;
use std::future::Future;
use std::os::fd::AsFd;
use std::pin::pin;
use std::sync::mpsc;
use std::task::{Context, Waker};

use common::{LIMIT, TestHome, blocked_in, fds, limit_descriptors, until_async};
use farcall::calls::Sysno;
use farcall::link::{Polling, Receipt};
use farcall::persist::SharedMemory;
use farcall::proto::Call;
use farcall::{Child, Error, Local, Process};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// More calls than it takes until a process gets its ring by itself.
const OFTEN: usize = 200;

/// A child that shares its parent's descriptors, in a call that does not end by itself.
async fn blocked_child(root: &Process) -> (Child, Receipt<u64>) {
    let child = root.child().share_files().spawn().await.unwrap();
    let blocked = child.connection().call("pause", Call::syscall(Sysno::pause, [0; 6]));
    let pid = child.pid().unwrap();
    until_async("it is blocked", || blocked_in(pid) == Some(Sysno::pause as usize)).await;
    (child, blocked)
}

/// Ends the call: a signal with a handler.
async fn end(child: &Child, blocked: Receipt<u64>) {
    kill(Pid::from_raw(child.pid().unwrap()), Signal::SIGPIPE).unwrap();
    let ended = blocked.await;
    assert!(matches!(ended, Err(Error::Call { errno: Errno::EINTR, .. })), "{ended:?}");
}

fn getpid(process: &Process) -> Receipt<u64> {
    process.connection().call("getpid", Call::syscall(Sysno::getpid, [0; 6]))
}

/// All tasks that are ready, and what they set going, have had their turn.
async fn turns() {
    for _ in 0..3 {
        tokio::spawn(async {}).await.unwrap();
    }
}

#[tokio::test]
async fn a_process_that_is_called_often_gets_its_ring_when_nothing_is_under_way() {
    let root = Local::new().start().await.unwrap();
    let (child, blocked) = blocked_child(&root).await;
    let calls: Vec<_> = (0..OFTEN).map(|_| getpid(&child)).collect();
    turns().await;
    // Making others takes the same turns as making the ring does.
    let sibling = root.child().share_files().spawn().await.unwrap();
    sibling.getpid().await.unwrap();
    assert!(!child.connection().has_ring());
    end(&child, blocked).await;
    for call in calls {
        assert_eq!(call.await.unwrap(), child.pid().unwrap() as u64);
    }
    getpid(&child).await.unwrap();
    // Its data socket comes first.
    let called = || {
        drop(getpid(&child));
        child.connection().has_ring()
    };
    until_async("it has its ring", called).await;
    getpid(&child).await.unwrap();
}

#[tokio::test]
async fn descriptors_that_are_passed_often_do_not_wait_for_the_ring_that_this_makes() {
    let root = Local::new().start().await.unwrap();
    let one = std::fs::File::open("/dev/null").unwrap();
    for _ in 0..OFTEN {
        let sent = root.send_fds(&[one.as_fd()]).await.unwrap();
        drop(root.fetch_fd(&sent[0]).await.unwrap());
    }
    root.getpid().await.unwrap();
    until_async("it has its ring", || root.connection().has_ring()).await;
}

#[tokio::test]
async fn so_does_one_whose_calls_are_made_one_by_one() {
    let root = Local::new().start().await.unwrap();
    for _ in 0..OFTEN {
        root.getpid().await.unwrap();
    }
    assert!(root.connection().has_ring());
}

#[test]
fn and_one_whose_calls_are_made_on_a_thread() {
    let root = farcall::blocking::wait(Local::new().start()).unwrap();
    for _ in 0..OFTEN {
        root.syscall_blocking(Sysno::getpid, [0; 6]).unwrap();
    }
    common::until("it has a ring", || root.connection().has_ring());
    root.syscall_blocking(Sysno::getpid, [0; 6]).unwrap();
}

/// Drives a new process on a thread of its own, which must come to an end.
fn driven<F: Future<Output = ()>>(drive: impl FnOnce(Process) -> F + Send + 'static) {
    let (ended, end) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let root = Local::new().start().await.unwrap();
            drive(root).await;
        });
        ended.send(()).unwrap();
    });
    match end.recv_timeout(LIMIT) {
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("it waits for itself"),
        _ => thread.join().unwrap(),
    }
}

#[test]
fn the_call_that_is_one_too_many_may_be_one_that_passes_descriptors() {
    driven(async |root| {
        let null = File::open("/dev/null").unwrap();
        let fd = root.send_fds(&[null.as_fd()]).await.unwrap().pop().unwrap();
        for _ in 0..OFTEN {
            root.fetch_fd(&fd).await.unwrap();
        }
        // It has its ring with the next one that passes none.
        root.getpid().await.unwrap();
        turns().await;
        assert!(root.connection().has_ring());
        // Messages and the calls that take them have stayed in step.
        assert_eq!(root.send_fds(&[null.as_fd()]).await.unwrap().len(), 1);
    });
    driven(async |root| {
        let null = File::open("/dev/null").unwrap();
        let mut passed = Vec::new();
        for _ in 0..OFTEN {
            passed.extend(root.send_fds(&[null.as_fd()]).await.unwrap());
        }
        assert_eq!(passed.len(), OFTEN);
    });
    // A stack may have to be mapped in between, so there are several calls for some of them.
    driven(async |root| {
        for _ in 0..OFTEN {
            let child = root.child().spawn().await.unwrap();
            child.exit(0).await.unwrap();
            child.ended().await;
            drop(child);
        }
    });
}

#[tokio::test]
async fn who_asks_for_a_ring_waits_for_the_call_and_nobody_for_the_ring() {
    let root = Local::new().polling(None).start().await.unwrap();
    let (child, blocked) = blocked_child(&root).await;
    let mut context = Context::from_waker(Waker::noop());
    {
        let mut given_up = pin!(child.enter_ring(Polling::Never));
        assert!(given_up.as_mut().poll(&mut context).is_pending());
    }
    let two = [(); 2].map(|()| {
        let process = child.process().clone();
        tokio::spawn(async move { process.enter_ring(Polling::Adaptive).await })
    });
    turns().await;
    let after = getpid(&child);
    let sibling = root.child().share_files().spawn().await.unwrap();
    sibling.enter_ring(Polling::Adaptive).await.unwrap();
    root.enter_ring(Polling::Adaptive).await.unwrap();
    assert!(!child.connection().has_ring());
    end(&child, blocked).await;
    for one in two {
        one.await.unwrap().unwrap();
    }
    assert!(child.connection().has_ring());
    assert_eq!(after.await.unwrap(), child.pid().unwrap() as u64);
}

#[tokio::test]
async fn a_child_of_a_process_that_waits_for_its_ring_is_made() {
    let root = Local::new().polling(None).start().await.unwrap();
    let (child, blocked) = blocked_child(&root).await;
    let mut grandchild = pin!(child.child().spawn());
    assert!(grandchild.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    turns().await;
    let mut entering = pin!(child.enter_ring(Polling::Adaptive));
    assert!(entering.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    end(&child, blocked).await;
    let (grandchild, entered) = tokio::join!(grandchild, entering);
    grandchild.unwrap().getpid().await.unwrap();
    entered.unwrap();
    assert!(child.connection().has_ring());
}

#[tokio::test]
async fn a_process_that_waits_for_its_ring_can_be_detached() {
    let home = TestHome::new();
    let root = Local::new().polling(None).start().await.unwrap();
    let place = home.home.reserve(&"waits".parse().unwrap()).unwrap();
    let child = root.child().spawn_persistent(place, SharedMemory::Refuse).await.unwrap();
    let blocked = child.connection().call("pause", Call::syscall(Sysno::pause, [0; 6]));
    let pid = child.pid().unwrap();
    until_async("it is blocked", || blocked_in(pid) == Some(Sysno::pause as usize)).await;
    let process = child.process().clone();
    let entering = tokio::spawn(async move { process.enter_ring(Polling::Adaptive).await });
    turns().await;
    let mut detaching = pin!(child.prepare_for_reconnect());
    assert!(detaching.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    end(&child, blocked).await;
    detaching.await.unwrap();
    let entered = entering.await.unwrap();
    assert!(matches!(entered, Ok(()) | Err(Error::Lost(_))), "{entered:?}");
    child.reconnect().await.unwrap();
    child.enter_ring(Polling::Adaptive).await.unwrap();
    assert!(child.connection().has_ring());
    assert_eq!(child.getpid().await.unwrap(), pid);
}

#[tokio::test]
async fn where_there_is_no_room_for_its_descriptors_nothing_is_left_of_it() {
    let root = Local::new().polling(None).start().await.unwrap();
    let pid = root.pid().unwrap();
    root.getpid().await.unwrap();
    let before = fds(pid);
    let used = *before.keys().max().unwrap() as u64 + 1;
    let rings = || {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        maps.matches("memfd:farcall-ring").count()
    };
    for free in 0..4 {
        limit_descriptors(pid, used + free);
        let entered = root.enter_ring(Polling::Adaptive).await;
        assert!(matches!(entered, Err(Error::Call { errno: Errno::EMFILE, .. })), "{entered:?}");
        until_async("its descriptors are those from before", || fds(pid) == before).await;
        assert_eq!(rings(), 0);
    }
    limit_descriptors(pid, used + 4);
    root.enter_ring(Polling::Adaptive).await.unwrap();
    assert_eq!(rings(), 1);
    root.getpid().await.unwrap();
}

#[tokio::test]
async fn descriptors_that_wait_for_the_ring_are_not_taken_for_its_own() {
    let root = Local::new().start().await.unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    let (child, blocked) = blocked_child(&root).await;
    end(&child, blocked).await;
    // It has a data socket.
    child.send_fds(&[null.as_fd()]).await.unwrap();
    let pause = child.connection().call("pause", Call::syscall(Sysno::pause, [0; 6]));
    let pid = child.pid().unwrap();
    until_async("it is blocked", || blocked_in(pid) == Some(Sysno::pause as usize)).await;
    let mut context = Context::from_waker(Waker::noop());
    let mut entering = pin!(child.enter_ring(Polling::Never));
    assert!(entering.as_mut().poll(&mut context).is_pending());
    // They are in the socket, and who takes them waits for the end of the pause.
    let fds = [null.as_fd()];
    let mut passing = pin!(child.send_fds(&fds));
    assert!(passing.as_mut().poll(&mut context).is_pending());
    end(&child, pause).await;
    let (entered, passed) = tokio::join!(entering, passing);
    entered.unwrap();
    assert!(child.connection().has_ring());
    let fd = child.fetch_fd(&passed.unwrap()[0]).await.unwrap();
    assert_eq!(
        nix::sys::stat::fstat(&fd).unwrap().st_rdev,
        nix::sys::stat::fstat(&null).unwrap().st_rdev
    );
}
