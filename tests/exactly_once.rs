//! Calls that were in flight when a link was lost: each is executed once, and gets its result.

use crate::common;

use std::fs::{self, File};
use std::future::Future;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use common::{TestHome, blocked_in, cut, cut_stream, fds, persistent, until, until_async};
use farcall::calls::{Sysno, WaitStatus};
use farcall::link::Polling;
use farcall::persist::{Attach, Place, attach};
use farcall::proto::Call;
use farcall::{Error, Fd, Local, Outcome, Process};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::Pid;
use tokio::task::JoinSet;

/// Lets the link be lost at many instants while counted records are appended to a file, and bytes go
/// into memory and come back.
async fn appends_through_losses(in_a_ring: bool) {
    let home = TestHome::new();
    let directory = tempfile::TempDir::new().unwrap();
    let path = directory.path().join("records");
    let root = Local::new().polling(None).start().await.unwrap();
    let (child, _) = persistent(&home, &root).await;
    let flags = OFlag::O_CREAT | OFlag::O_WRONLY | OFlag::O_APPEND;
    let file = child.openat(None, &path, flags, Mode::from_bits_truncate(0o600)).await.unwrap();
    let file = Arc::new(file);
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let memory = child.mmap(8192, protection, MapFlags::MAP_PRIVATE, None).await.unwrap();
    let memory = memory.address();
    let mut count = 0u64;
    for round in 0..150u64 {
        if in_a_ring {
            child.enter_ring(Polling::Adaptive).await.unwrap();
        }
        let calls: Vec<_> = (0..100)
            .map(|_| {
                count += 1;
                let (number, process) = (count, child.process().clone());
                let file = file.clone();
                tokio::spawn(async move {
                    assert_eq!(process.write(&file, &number.to_le_bytes()).await.unwrap(), 8);
                    let at = memory + number % 100 * 64;
                    process.write_memory(at, number.to_le_bytes()).await.unwrap();
                    let read = process.read_memory(at, 8).await.unwrap();
                    assert_eq!(read, number.to_le_bytes());
                })
            })
            .collect();
        let end = Instant::now() + Duration::from_micros(round * 13 % 1500);
        while Instant::now() < end {
            tokio::task::yield_now().await;
        }
        cut(&child);
        child.reconnect().await.unwrap();
        for call in calls {
            call.await.unwrap();
        }
    }
    let written = fs::read(&path).unwrap();
    let (numbers, []) = written.as_chunks() else { panic!("a torn record") };
    let mut numbers: Vec<u64> = numbers.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
    numbers.sort_unstable();
    assert!(numbers.iter().copied().eq(1..=count), "{} of {count} records", numbers.len());
    child.exit(0).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_call_is_executed_once_though_streams_are_lost() {
    appends_through_losses(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_call_is_executed_once_though_rings_are_lost() {
    appends_through_losses(true).await;
}

/// A file of its own, and its inode.
fn file() -> (File, u64) {
    let file = tempfile::tempfile().unwrap();
    let inode = file.metadata().unwrap().ino();
    (file, inode)
}

fn inode_of(process: &Process, fd: &Fd) -> u64 {
    let path = format!("/proc/{}/fd/{}", process.pid().unwrap(), fd.number());
    fs::metadata(path).unwrap().ino()
}

/// Polls once.
fn begin<F: Future>(future: &mut Pin<Box<F>>) -> bool {
    future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending()
}

#[tokio::test]
async fn descriptors_wait_for_the_next_connection_of_the_same_controller() {
    let home = TestHome::new();
    let root = Local::new().start().await.unwrap();
    let (process, _) = persistent(&home, &root).await;
    let place = Place::at(process.place().unwrap().socket().to_owned());
    for another_comes in [false, true] {
        let (there, inode) = file();
        let kept = process.send_fds(&[there.as_fd()]).await.unwrap().pop().unwrap();
        process.prepare_for_reconnect().await.unwrap();
        let (file, other) = file();
        let files = [file.as_fd()];
        let mut send = Box::pin(process.send_fds(&files));
        let mut fetch = Box::pin(process.fetch_fd(&kept));
        let mut spawn = Box::pin(process.child().spawn());
        assert!(begin(&mut send) && begin(&mut fetch) && begin(&mut spawn));
        if another_comes {
            attach(place.clone()).await.unwrap().prepare_for_reconnect().await.unwrap();
        }
        process.reconnect().await.unwrap();
        let (sent, fetched, spawned) = (send.await, fetch.await, spawn.await);
        if another_comes {
            // What they are about is not what it was.
            let all = [sent.err(), fetched.err(), spawned.err()];
            for lost in all {
                assert!(matches!(lost, Some(Error::Superseded { .. })), "{lost:?}");
                assert_eq!(lost.as_ref().and_then(Error::outcome), Some(Outcome::NotExecuted));
            }
            assert_eq!(process.children().await.unwrap().known, []);
        } else {
            assert_eq!(inode_of(&process, &sent.unwrap()[0]), other);
            assert_eq!(File::from(fetched.unwrap()).metadata().unwrap().ino(), inode);
            let mut child = spawned.unwrap();
            child.exit(3).await.unwrap();
            assert_eq!(child.wait().await.unwrap(), WaitStatus::Exited(3));
        }
        // Messages and calls are in step.
        let sent = process.send_fds(&[there.as_fd()]).await.unwrap();
        assert_eq!(inode_of(&process, &sent[0]), inode);
    }
    process.exit(0).await.unwrap();
}

#[tokio::test]
async fn who_loses_the_process_is_told_what_has_become_of_its_descriptors() {
    let home = TestHome::new();
    let root = Local::new().start().await.unwrap();
    let (process, _) = persistent(&home, &root).await;
    let place = Place::at(process.place().unwrap().socket().to_owned());
    let (there, _) = file();
    let kept = process.send_fds(&[there.as_fd()]).await.unwrap().pop().unwrap();
    // Blocked, and then busy for longer than it takes to look who else is there.
    let connection = process.connection();
    let blocked = connection.call("pause", Call::syscall(Sysno::pause, [0; 6]));
    let busy = connection.submit(vec![Call::syscall(Sysno::getpid, [0; 6]); 500], Ok);
    let pid = process.pid().unwrap();
    until_async("it is blocked", || blocked_in(pid) == Some(Sysno::pause as usize)).await;
    let files = [there.as_fd()];
    let mut send = Box::pin(process.send_fds(&files));
    let mut fetch = Box::pin(process.fetch_fd(&kept));
    assert!(begin(&mut send) && begin(&mut fetch));
    let next = Attach::default().take_over().to(place).await.unwrap();
    for lost in [send.await.err(), fetch.await.err()] {
        let outcome = lost.as_ref().and_then(Error::outcome);
        assert!(matches!(lost, Some(Error::Superseded { .. })), "{lost:?}");
        assert_eq!(outcome, Some(Outcome::NotExecuted));
    }
    assert_eq!(blocked.await.unwrap_err().errno(), Some(Errno::EINTR));
    drop(busy);
    next.exit(0).await.unwrap();
}

/// Lets the link be lost at many instants while descriptors are passed both ways, some of them with names,
/// and children are made, which takes both ways.
async fn passes_through_losses(in_a_ring: bool) {
    let home = TestHome::new();
    let root = Local::new().polling(None).start().await.unwrap();
    let (process, _) = persistent(&home, &root).await;
    for round in 0..150u64 {
        if in_a_ring {
            process.enter_ring(Polling::Adaptive).await.unwrap();
        }
        let mut tasks = JoinSet::new();
        for i in 0..20 {
            let process = process.process().clone();
            tasks.spawn(async move {
                let (file, inode) = file();
                let name = format!("{i}");
                match i % 4 {
                    0 => {
                        let mut child = process.child().named(&name).spawn().await.unwrap();
                        child.exit(i).await.unwrap();
                        let status = child.wait().await.unwrap();
                        assert_eq!(status, WaitStatus::Exited(i));
                        process.forget(&name).await.unwrap();
                    }
                    1 => {
                        let kept = process.keep_sent(&[(&name, file.as_fd())]).await.unwrap();
                        assert_eq!(inode_of(&process, &kept[0]), inode);
                        drop(kept);
                        process.release(&name).await.unwrap();
                    }
                    _ => {
                        let fds = [file.as_fd(), file.as_fd()];
                        let sent = process.send_fds(&fds).await.unwrap();
                        assert_eq!(inode_of(&process, &sent[1]), inode);
                        let back = File::from(process.fetch_fd(&sent[0]).await.unwrap());
                        assert_eq!(back.metadata().unwrap().ino(), inode);
                    }
                }
            });
        }
        let end = Instant::now() + Duration::from_micros(round * 37 % 5000);
        while Instant::now() < end {
            tokio::task::yield_now().await;
        }
        cut_stream(&process);
        process.reconnect().await.unwrap();
        while let Some(ended) = tasks.join_next().await {
            ended.unwrap();
        }
    }
    assert_eq!(process.children().await.unwrap().known, []);
    assert!(process.names().await.unwrap().is_empty());
    // Nothing is left of any.
    until_async("what nobody knows is closed", || {
        fds(process.pid().unwrap()).values().all(|path| !path.to_string_lossy().contains("deleted"))
    })
    .await;
    process.exit(0).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn descriptors_are_passed_once_though_streams_are_lost() {
    passes_through_losses(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn descriptors_are_passed_once_though_rings_are_lost() {
    passes_through_losses(true).await;
}

/// As many calls may be under way.
const UNDER_WAY: usize = 128;

#[tokio::test]
async fn a_child_is_made_once_wherever_in_the_calls_for_that_the_stream_is_lost() {
    let home = TestHome::new();
    let root = Local::new().polling(None).start().await.unwrap();
    let (process, _) = persistent(&home, &root).await;
    let pid = process.pid().unwrap();
    // A stack stays for those to come: to make one is one batch then.
    let mut first = process.child().spawn().await.unwrap();
    first.exit(0).await.unwrap();
    first.wait().await.unwrap();
    drop(first);
    process.getpid().await.unwrap();
    let before = fds(pid).len();
    for executed in 0..16 {
        // So many of the calls for the child go out while the server is blocked. The rest waits for
        // replies, which nobody reads.
        let connection = process.connection();
        let blocked = connection.call("pause", Call::syscall(Sysno::pause, [0; 6]));
        let others = vec![Call::syscall(Sysno::getpid, [0; 6]); UNDER_WAY - 1 - executed];
        let others = connection.submit(others, Ok);
        let mut spawn = Box::pin(process.child().spawn());
        assert!(begin(&mut spawn));
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        until("it is blocked", || blocked_in(pid) == Some(Sysno::pause as usize));
        kill(Pid::from_raw(pid), Signal::SIGPIPE).unwrap();
        until("all is executed", || blocked_in(pid) == Some(Sysno::ppoll as usize));
        cut_stream(&process);
        process.reconnect().await.unwrap();
        assert_eq!(blocked.await.unwrap_err().errno(), Some(Errno::EINTR));
        assert_eq!(others.await.unwrap().len(), UNDER_WAY - 1 - executed);
        let mut child = spawn.await.unwrap();
        let children = process.children().await.unwrap();
        assert_eq!(children.known.len(), 1, "{executed} were executed");
        child.exit(3).await.unwrap();
        assert_eq!(child.wait().await.unwrap(), WaitStatus::Exited(3));
        until_async("nothing is left", || fds(pid).len() == before).await;
    }
    process.exit(0).await.unwrap();
}
