//! Large transfers between processes of one machine.

use farcall::link::Polling;
use farcall::{Error, Local, Process};
use nix::sys::mman::{MapFlags, ProtFlags};

const PAGE: u64 = 4096;

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect()
}

/// A process with a ring, and memory in it.
async fn with_memory(size: usize) -> (Process, farcall::Mapping) {
    let process = Local::new().start().await.unwrap();
    process.enter_ring(Polling::Adaptive).await.unwrap();
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let memory = process.mmap(size, protection, MapFlags::MAP_PRIVATE, None).await.unwrap();
    (process, memory)
}

/// How many bytes the process has read and written by read(2), write(2) and their like.
fn transferred(process: &Process) -> u64 {
    let io = std::fs::read_to_string(format!("/proc/{}/io", process.pid().unwrap())).unwrap();
    let count = |key: &str| {
        let line = io.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        line.trim().parse::<u64>().unwrap()
    };
    count("rchar:") + count("wchar:")
}

#[tokio::test]
async fn large_transfers_arrive_whole_wherever_they_begin_and_end() {
    let (process, memory) = with_memory(16 << 20).await;
    for (start, len) in [(0, 8 << 20), (1, 300_000), (4095, 1 << 20), (100, (5 << 20) + 77)] {
        let bytes = pattern(len);
        let address = memory.address() + start;
        process.write_memory(address, bytes.clone()).await.unwrap();
        assert!(process.read_memory(address, len).await.unwrap() == bytes, "{len} at {start}");
    }
}

#[tokio::test]
async fn they_are_copied_once() {
    const LEN: usize = 8 << 20;
    let (process, memory) = with_memory(LEN).await;
    process.write_memory(memory.address(), pattern(LEN)).await.unwrap();
    process.read_memory(memory.address(), LEN).await.unwrap();
    let before = transferred(&process);
    // The process reads them from where they are here: once.
    process.write_memory(memory.address(), pattern(LEN)).await.unwrap();
    let written = transferred(&process) - before;
    assert!((LEN as u64..LEN as u64 + 4 * PAGE).contains(&written), "{written}");
    // And it lends what is read here.
    let before = transferred(&process);
    process.read_memory(memory.address(), LEN).await.unwrap();
    let lent = transferred(&process) - before;
    assert!(lent < 4 * PAGE, "{lent}");
}

#[tokio::test]
async fn memory_that_ends_is_a_fault_and_the_next_transfer_is_whole() {
    let (process, memory) = with_memory(4 << 20).await;
    let address = memory.address();
    let size = 4 << 20;
    let end = address + size as u64;
    process.syscall(farcall::calls::Sysno::munmap, [end - PAGE, PAGE, 0, 0, 0, 0]).await.unwrap();
    for _ in 0..3 {
        let written = process.write_memory(address, pattern(size)).await;
        assert!(matches!(written, Err(Error::Fault { .. })), "{written:?}");
        let read = process.read_memory(address, size).await;
        assert!(matches!(read, Err(Error::Fault { .. })), "{:?}", read.map(|bytes| bytes.len()));
        let bytes = pattern(1 << 20);
        process.write_memory(address, bytes.clone()).await.unwrap();
        assert!(process.read_memory(address, 1 << 20).await.unwrap() == bytes);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_at_once_and_such_as_nobody_waits_for_do_not_mix() {
    const LEN: usize = 3 << 20;
    let (process, memory) = with_memory(8 * LEN).await;
    for round in 0..10u8 {
        let tasks: Vec<_> = (0..8u8)
            .map(|i| {
                let process = process.clone();
                let address = memory.address() + u64::from(i) * LEN as u64;
                tokio::spawn(async move {
                    let bytes = vec![round.wrapping_mul(16) + i; LEN];
                    process.write_memory(address, bytes.clone()).await.unwrap();
                    assert!(process.read_memory(address, LEN).await.unwrap() == bytes);
                })
            })
            .collect();
        // These are dropped at any time, and write where nobody looks.
        for task in 0..4 {
            let process = process.clone();
            let address = memory.address() + task * LEN as u64;
            let read = tokio::spawn(async move { process.read_memory(address, LEN).await });
            tokio::task::yield_now().await;
            read.abort();
        }
        for task in tasks {
            task.await.unwrap();
        }
    }
}
