//! Calls that were in flight when a link was lost: each is executed once, and gets its result.

mod common;

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{TestHome, cut, cut_stream, fds, until_async};
use farcall::call::Polling;
use farcall::persist::SharedMemory;
use farcall::process::Child;
use farcall::sys::WaitStatus;
use farcall::{Fd, Local, Process};
use nix::fcntl::OFlag;
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::stat::Mode;
use tokio::task::JoinSet;

async fn persistent(home: &TestHome, root: &Process) -> Child {
    let place = home.home.reserve(&"counts".parse().unwrap()).unwrap();
    root.child().spawn_persistent(place, SharedMemory::Refuse).await.unwrap()
}

/// Lets the link be lost at many instants while counted records are appended to a file, and bytes go
/// into memory and come back.
async fn appends_through_losses(in_a_ring: bool) {
    let home = TestHome::new();
    let directory = tempfile::TempDir::new().unwrap();
    let path = directory.path().join("records");
    let root = Local::new().polling(None).start().await.unwrap();
    let child = persistent(&home, &root).await;
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

/// Lets the link be lost at many instants while descriptors are passed both ways, some of them with names,
/// and children are made, which takes both ways.
async fn passes_through_losses(in_a_ring: bool) {
    let home = TestHome::new();
    let root = Local::new().polling(None).start().await.unwrap();
    let process = persistent(&home, &root).await;
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
