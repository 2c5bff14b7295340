//! Replies that do not come: of a process whose main thread has exited, and of a ring that its server does
//! not see any more.

use std::fs;
use std::future::Future;

use farcall::abi::entry::{
    ENTRY_TABLE_OFFSET, ENTRY_TABLE_SIZE, EntryTable, SAME, TrampolineFrame,
};
use farcall::abi::wire::Operation;
use farcall::calls::Sysno;
use farcall::link::Polling;
use farcall::persist::{Attach, Place, SharedMemory};
use farcall::proto::Call;
use farcall::{Error, Outcome, Process};
use nix::fcntl::OFlag;
use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::{LIMIT, TestHome, alive, root, state, until_async};

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future)
        .await
        .unwrap_or_else(|_| panic!("{what}: still not over after {LIMIT:?}"))
}

/// Makes a second thread in the process, which waits for ever, and lets the first one exit.
async fn main_thread_exits(process: &Process) -> Result<u64, Error> {
    const STACK: usize = 64 * 1024;
    let image = Call::operation(Operation::Image, [0; 6]);
    let image = process.connection().call("IMAGE", image).await?;
    let table = process.read_memory(image + ENTRY_TABLE_OFFSET as u64, ENTRY_TABLE_SIZE).await?;
    let table = EntryTable::from_bytes(table.first_chunk().unwrap()).unwrap();
    let (reads, writes) = process.pipe2(OFlag::O_CLOEXEC).await?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let stack = process.mmap(STACK, protection, MapFlags::MAP_PRIVATE, None).await?;
    let frame = TrampolineFrame {
        args: [reads.number() as u64, SAME as u32 as u64, 0, 0, 0, 0],
        function: image + u64::from(table.serve),
    };
    let bytes = frame.to_stack(image + u64::from(table.trampoline));
    let sp = stack.address() + (STACK - bytes.len()) as u64;
    process.write_memory(sp, bytes.to_vec()).await?;
    let flags = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_SYSVSEM
        | libc::CLONE_THREAD;
    process.syscall(Sysno::clone, [flags as u64, sp, 0, 0, 0, 0]).await?;
    // The thread has them as long as it lives.
    let _ = (reads.into_raw(), writes.into_raw(), stack.into_raw());
    process.syscall(Sysno::exit, [0; 6]).await
}

fn has_exited<T: std::fmt::Debug>(result: Result<T, Error>, expected: Outcome) {
    match result {
        Err(Error::LeaderExited { outcome, .. }) => assert_eq!(outcome, expected),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_process_whose_main_thread_has_exited_is_told_as_that() {
    let root = root().await;
    for ring in [false, true] {
        let mut child = root.child().spawn().await.unwrap();
        if ring {
            child.enter_ring(Polling::Adaptive).await.unwrap();
        }
        let exited = within("exit", main_thread_exits(&child)).await;
        has_exited(exited, Outcome::PossiblyExecuted);
        has_exited(within("the next call", child.getpid()).await, Outcome::NotExecuted);
        child.kill(Signal::SIGKILL).unwrap();
        within("its end", child.wait()).await.unwrap();
        within("its parent's call", root.getpid()).await.unwrap();
    }
}

#[tokio::test]
async fn an_attach_says_that_the_main_thread_has_exited() {
    let (test, root) = (TestHome::new(), root().await);
    let reserved = test.home.reserve(&"leaderless".parse().unwrap()).unwrap();
    let child = root.child().spawn_persistent(reserved, SharedMemory::Refuse).await.unwrap();
    let (pid, place) = (child.pid().unwrap(), child.place().unwrap());
    child.prepare_for_reconnect().await.unwrap();
    // Also of a process that was made by another one.
    let attached = Attach::default().to(Place::clone(&place)).await.unwrap();
    let exited = within("exit", main_thread_exits(&attached)).await;
    has_exited(exited, Outcome::PossiblyExecuted);
    assert_eq!(state(pid), Some('Z'));
    let attach = Attach::default().timeout(std::time::Duration::from_secs(1));
    let error = within("attach", attach.take_over().to(Place::clone(&place))).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("main thread") && text.contains(&format!("kill -KILL {pid}")), "{text}");
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    until_async("it is gone", || !alive(pid)).await;
}

/// Where the ring's memory lies in the process.
fn ring_of(process: &Process) -> (u64, u64) {
    let maps = fs::read_to_string(format!("/proc/{}/maps", process.pid().unwrap())).unwrap();
    let line = maps.lines().find(|line| line.contains("memfd:farcall-ring")).unwrap();
    let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
    let address = |text| u64::from_str_radix(text, 16).unwrap();
    (address(start), address(end) - address(start))
}

/// Calls the process often until it has got a ring.
async fn gets_a_ring(process: &Process) {
    let calls = async {
        while !process.connection().has_ring() {
            process.getpid().await.unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    };
    within("a new ring", calls).await;
}

/// Maps something else over the ring.
async fn maps_over(process: &Process) -> (u64, Result<u64, Error>) {
    let (address, len) = ring_of(process);
    let protection = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED) as u64;
    let args = [address, len, protection, flags, u64::MAX, 0];
    (address, within("mmap", process.syscall(Sysno::mmap, args)).await)
}

#[tokio::test]
async fn a_ring_that_something_else_was_mapped_over_is_left_and_made_anew() {
    let root = root().await;
    let child = root.child().spawn().await.unwrap();
    child.enter_ring(Polling::Adaptive).await.unwrap();
    let (address, mapped) = maps_over(&child).await;
    assert!(matches!(mapped, Err(Error::Lost(Outcome::PossiblyExecuted))), "{mapped:?}");
    gets_a_ring(&child).await;
    assert_ne!(ring_of(&child).0, address);
    // What was mapped there stays.
    child.write_memory(address, b"theirs".to_vec()).await.unwrap();
    assert_eq!(child.read_memory(address, 6).await.unwrap(), b"theirs");
}

#[tokio::test]
async fn of_a_persistent_process_the_log_tells_what_became_of_the_calls_in_such_a_ring() {
    let (test, root) = (TestHome::new(), root().await);
    let reserved = test.home.reserve(&"over".parse().unwrap()).unwrap();
    let child = root.child().spawn_persistent(reserved, SharedMemory::Refuse).await.unwrap();
    child.enter_ring(Polling::Adaptive).await.unwrap();
    let (address, mapped) = maps_over(&child).await;
    assert_eq!(mapped.unwrap(), address);
    assert_eq!(within("the next call", child.getpid()).await.unwrap(), child.pid().unwrap());
    gets_a_ring(&child).await;
    child.exit(0).await.unwrap();
}

#[tokio::test]
async fn a_ring_that_was_overwritten_does_not_keep_calls_waiting() {
    let root = root().await;
    // All is zero; who waits and who is to be interrupted is set.
    for word in [0u64, 1, u64::MAX >> 16] {
        let child = root.child().spawn().await.unwrap();
        child.enter_ring(Polling::Adaptive).await.unwrap();
        child.getpid().await.unwrap();
        let (address, _) = ring_of(&child);
        let bytes = word.to_le_bytes().repeat(4096 / 8);
        let _ = within("overwriting it", child.write_memory(address, bytes)).await;
        let first = within("a call", child.getpid()).await;
        let lost = matches!(first, Err(Error::Lost(Outcome::PossiblyExecuted)));
        assert!(lost || first.as_ref().ok() == child.pid().as_ref(), "{word:#x}: {first:?}");
        for _ in 0..10 {
            assert_eq!(within("calls", child.getpid()).await.unwrap(), child.pid_in_parent());
        }
    }
}
