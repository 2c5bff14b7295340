//! Processes that are stopped (SIGSTOP) at any point: what waits for them ends by itself or can be given
//! up, and what was given up leaves process and connection usable.

use crate::common;

use std::fs::File;
use std::future::Future;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use common::{LIMIT, Role, TestHome, hear, persistent, role, root, state, tell, until, with_fault};
use farcall::link::Polling;
use farcall::persist::{Attach, Home, Place};
use farcall::{Error, Process};
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType};
use nix::unistd::Pid;

/// A process that is stopped until this is dropped.
struct Stopped(i32);

impl Stopped {
    fn new(pid: i32) -> Self {
        kill(Pid::from_raw(pid), Signal::SIGSTOP).unwrap();
        until("it is stopped", || state(pid) == Some('T'));
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0), Signal::SIGCONT);
    }
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future)
        .await
        .unwrap_or_else(|_| panic!("{what}: still not over after {LIMIT:?}"))
}

/// A controller that is stopped when it has its answer, by the fault in its environment, and does then
/// what it was told.
async fn answered(how: &str, home: &str) {
    let place = Home::at(PathBuf::from(home)).place(&"one".parse().unwrap());
    let attach = Attach::default().timeout(Duration::from_secs(2));
    let error = match how {
        "attach" => attach.to(place).await.map(drop),
        "take over" => attach.take_over().to(place).await.map(drop),
        "reconnect" => {
            let process = attach.to(place).await.unwrap();
            process.prepare_for_reconnect().await.unwrap();
            tell("detached");
            let error = process.reconnect().await;
            tell(error.unwrap_err());
            hear();
            // The process is as it was.
            process.reconnect().await.unwrap();
            process.getpid().await.unwrap();
            return tell("again");
        }
        other => panic!("{other}"),
    };
    tell(error.unwrap_err());
}

/// The process is stopped between its answer and the first call of its new controller. Returns what that
/// one is told.
fn stopped_when_answered(test: &str, home: &TestHome, pid: i32, how: &str) -> (Role, Stopped) {
    let (argument, point) = match how {
        "reconnect" => (how, "reconnect.answered:1:stop"),
        _ => (how, "handshake.answered:1:stop"),
    };
    let argument = format!("{argument} {}", home.path().display());
    let argument = argument.replace("take over", "take-over");
    let mut role = Role::run(with_fault(&mut Role::command(test, argument), point));
    if how == "reconnect" {
        assert_eq!(role.told(), "detached");
    }
    until("it has its answer", || state(role.pid()) == Some('T'));
    let stopped = Stopped::new(pid);
    kill(Pid::from_raw(role.pid()), Signal::SIGCONT).unwrap();
    let told = role.told();
    assert!(told.contains("stopped by a signal"), "{how}: {told}");
    (role, stopped)
}

async fn played() -> bool {
    let Some(argument) = role() else { return false };
    let (how, home) = argument.split_once(' ').unwrap();
    answered(&how.replace("take-over", "take over"), home).await;
    true
}

#[tokio::test(flavor = "multi_thread")]
#[cfg_attr(not(feature = "faults"), ignore = "needs --features faults")]
async fn an_attach_ends_though_the_process_is_stopped_once_it_has_answered() {
    const TEST: &str = "an_attach_ends_though_the_process_is_stopped_once_it_has_answered";
    if played().await {
        return;
    }
    let (home, root) = (TestHome::new(), root().await);
    let (child, place) = persistent(&home, &root).await;
    let pid = child.pid().unwrap();
    child.prepare_for_reconnect().await.unwrap();
    for how in ["attach", "take over"] {
        let (_role, stopped) = stopped_when_answered(TEST, &home, pid, how);
        drop(stopped);
        // It is held by nobody.
        let attached = Attach::default().to(Place::clone(&place)).await.unwrap();
        assert_eq!(within("a call", attached.getpid()).await.unwrap(), pid);
        attached.prepare_for_reconnect().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
#[cfg_attr(not(feature = "faults"), ignore = "needs --features faults")]
async fn so_does_a_reconnect_and_the_next_one_goes_on() {
    const TEST: &str = "so_does_a_reconnect_and_the_next_one_goes_on";
    if played().await {
        return;
    }
    let (home, root) = (TestHome::new(), root().await);
    let (child, _) = persistent(&home, &root).await;
    let pid = child.pid().unwrap();
    child.prepare_for_reconnect().await.unwrap();
    let (mut role, stopped) = stopped_when_answered(TEST, &home, pid, "reconnect");
    drop(stopped);
    role.say("go on");
    assert_eq!(role.told(), "again");
}

/// Everything of a process that waits for it.
const WAITS: &[&str] = &[
    "getpid",
    "write_memory",
    "much",
    "read much",
    "read_memory",
    "fetch_fd",
    "send_fds",
    "names",
    "keep_bytes",
    "release",
    "log",
    "spawn",
    "upgrade",
    "restore_socket",
    "chain",
    "unshare",
    "ring",
    "children",
    "reap_any",
    "read_image",
    "detach",
];

async fn wait(process: &Process, what: &str) -> Result<(), Error> {
    const MUCH: usize = 4 << 20;
    let file = || File::open("/dev/null").unwrap();
    match what {
        "getpid" => process.getpid().await.map(drop),
        "write_memory" | "read_memory" | "much" | "read much" => {
            let flags = MapFlags::MAP_PRIVATE;
            let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            let memory = process.mmap(MUCH, protection, flags, None).await?;
            let len = if what.ends_with("much") { MUCH } else { 100 };
            if what.starts_with("read") {
                process.read_memory(memory.address(), len).await.map(drop)
            } else {
                process.write_memory(memory.address(), vec![1; len]).await
            }
        }
        "fetch_fd" => {
            let fds = process.send_fds(&[file().as_fd()]).await?;
            process.fetch_fd(&fds[0]).await.map(drop)
        }
        "send_fds" => process.send_fds(&[file().as_fd()]).await.map(drop),
        "names" => process.names().await.map(drop),
        "keep_bytes" => process.keep_bytes("kept", b"bytes").await,
        "release" => {
            process.keep_bytes("other", b"bytes").await.and(process.release("other").await)
        }
        "log" => farcall::persist::flight(&process.place().unwrap(), LIMIT).await.map(drop),
        "spawn" => {
            let mut child = process.child().spawn().await?;
            child.kill(Signal::SIGKILL)?;
            child.wait().await.map(drop)
        }
        "upgrade" => process.upgrade().await,
        "restore_socket" => {
            let _ = std::fs::remove_file(process.place().unwrap().socket());
            process.restore_socket().await
        }
        "unshare" => process.unshare(nix::sched::CloneFlags::CLONE_FS).await,
        "ring" => process.enter_ring(Polling::Adaptive).await,
        "children" => process.children().await.map(drop),
        "reap_any" => process.reap_any().await.map(drop),
        "read_image" => process.read_image().await.map(drop),
        "chain" => {
            let mut chain = process.chain();
            chain.socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty());
            chain.run().await.map(drop)
        }
        "detach" => {
            process.prepare_for_reconnect().await?;
            process.reconnect().await
        }
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn what_is_given_up_while_the_process_is_stopped_leaves_it_usable() {
    for ring in [false, true] {
        let (home, root) = (TestHome::new(), root().await);
        let (child, _) = persistent(&home, &root).await;
        let pid = child.pid().unwrap();
        if ring {
            child.enter_ring(Polling::Adaptive).await.unwrap();
        }
        for what in WAITS {
            let stopped = Stopped::new(pid);
            // Whatever it has begun by then: no claim is about when.
            let limit = Duration::from_millis(20);
            let given_up = tokio::time::timeout(limit, wait(&child, what)).await;
            // What there is under names is known already, and a ring may be there.
            let may_be_known = ["names", "ring"].contains(what);
            assert!(given_up.is_err() || may_be_known, "{what}: {given_up:?}");
            drop(stopped);
            if *what == "detach" {
                within("a reconnect", child.reconnect()).await.unwrap();
            }
            assert_eq!(within(what, child.getpid()).await.unwrap(), pid, "{what}");
            within(what, wait(&child, what))
                .await
                .unwrap_or_else(|error| panic!("{what}: {error}"));
        }
        child.exit(0).await.unwrap();
    }
}

#[tokio::test]
async fn a_detach_that_is_given_up_ends_the_connection_when_the_process_goes_on() {
    let (home, root) = (TestHome::new(), root().await);
    let (child, place) = persistent(&home, &root).await;
    let stopped = Stopped::new(child.pid().unwrap());
    let limit = Duration::from_millis(20);
    assert!(tokio::time::timeout(limit, child.prepare_for_reconnect()).await.is_err());
    // Calls wait for the next reconnect.
    let waits = child
        .connection()
        .call("getpid", farcall::proto::Call::syscall(farcall::calls::Sysno::getpid, [0; 6]));
    drop(stopped);
    common::until_async("the link is over", || !child.connection().is_connected()).await;
    let other = Attach::default().to(place).await.unwrap();
    other.prepare_for_reconnect().await.unwrap();
    within("a reconnect", child.reconnect()).await.unwrap();
    assert!(matches!(within("the call", waits).await, Err(Error::Superseded { .. })));
}
