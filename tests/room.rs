//! Calls of many tasks share a connection: what is under way stays bounded, and all of it completes.

use crate::common;

use std::fs;
use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Waker};

use common::{TestHome, alone, blocked_in, until_async};
use farcall::calls::{Sysno, Task};
use farcall::error::Error;
use farcall::persist::SharedMemory;
use farcall::proto::Call;
use farcall::{Child, Local, Mapping, Process};
use nix::fcntl::OFlag;
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use tokio::task::JoinSet;

const SIZE: usize = 64 * 1024;
/// Less than all that is sent in a test: room for the tasks, and for what is under way. The allocator
/// keeps that for each of up to five threads, as much as once was under way in buffers of that thread.
const BOUND: usize = 96 << 20;

/// Bytes that exist from when they are queued: [`SIZE`] times the same.
struct Filled(u64);

impl From<Filled> for Vec<u8> {
    fn from(Filled(number): Filled) -> Self {
        number.to_le_bytes().repeat(SIZE / 8)
    }
}

async fn map(task: &Task) -> Mapping {
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    task.mmap(SIZE, protection, MapFlags::MAP_PRIVATE, None).await.unwrap()
}

/// Forgets how much memory this process has ever had, and says how much it has now.
fn memory_now() -> usize {
    fs::write("/proc/self/clear_refs", "5").unwrap();
    most_memory()
}

/// The most memory that this process has had since then.
fn most_memory() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

/// Starts tasks that each send [`SIZE`] bytes to `address`. They note their number when that is
/// done.
fn send(
    process: &Process,
    address: u64,
    count: u64,
    done: &Arc<Mutex<Vec<u64>>>,
) -> JoinSet<Result<(), Error>> {
    let mut tasks = JoinSet::new();
    for number in 0..count {
        let (process, done) = (process.clone(), done.clone());
        tasks.spawn(async move {
            process.write_memory(address, Filled(number)).await?;
            done.lock().unwrap().push(number);
            Ok(())
        });
    }
    tasks
}

async fn ten_thousand_tasks_send() -> Vec<u64> {
    const COUNT: u64 = 10_000;
    let process = Local::new().start().await.unwrap();
    let memory = map(&process).await;
    let before = memory_now();
    let done = Arc::default();
    let tasks = send(&process, memory.address(), COUNT, &done);
    for result in tasks.join_all().await {
        result.unwrap();
    }
    let grown = most_memory() - before;
    assert!(grown < BOUND, "{grown} bytes");
    let done = std::mem::take(&mut *done.lock().unwrap());
    assert_eq!(done.len() as u64, COUNT);
    done
}

#[tokio::test]
async fn ten_thousand_tasks_send_64_kib_each_in_order_and_in_bounded_memory() {
    if !alone("ten_thousand_tasks_send_64_kib_each_in_order_and_in_bounded_memory") {
        return;
    }
    let done = ten_thousand_tasks_send().await;
    assert!(done.is_sorted());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn so_do_tasks_on_many_threads() {
    if !alone("so_do_tasks_on_many_threads") {
        return;
    }
    ten_thousand_tasks_send().await;
}

#[tokio::test]
async fn buffers_of_calls_are_bounded_as_well() {
    if !alone("buffers_of_calls_are_bounded_as_well") {
        return;
    }
    const COUNT: usize = 10_000;
    let process = Local::new().start().await.unwrap();
    let null = process.openat(None, "/dev/null", OFlag::O_RDWR, Mode::empty()).await.unwrap();
    let null = Arc::new(null);
    let before = memory_now();
    let mut tasks = JoinSet::new();
    for number in 0..COUNT {
        let (process, null) = (process.clone(), null.clone());
        tasks.spawn(async move { process.write(&null, Filled(number as u64)).await.unwrap() });
    }
    assert_eq!(tasks.join_all().await, vec![SIZE; COUNT]);
    let grown = most_memory() - before;
    assert!(grown < BOUND, "{grown} bytes");
}

/// A persistent process that nobody is attached to, and memory in it.
async fn detached(test: &TestHome) -> (Child, Mapping) {
    let root = Local::new().start().await.unwrap();
    let reserved = test.home.reserve(&"one".parse().unwrap()).unwrap();
    let process = root.child().spawn_persistent(reserved, SharedMemory::Refuse).await.unwrap();
    let memory = map(&process).await;
    process.prepare_for_reconnect().await.unwrap();
    (process, memory)
}

#[tokio::test]
async fn calls_made_while_disconnected_wait_for_room_and_go_out_in_order() {
    if !alone("calls_made_while_disconnected_wait_for_room_and_go_out_in_order") {
        return;
    }
    const COUNT: u64 = 2_000;
    let test = TestHome::new();
    let (process, memory) = detached(&test).await;
    let before = memory_now();
    let done = Arc::default();
    let tasks = send(&process, memory.address(), COUNT, &done);
    let is_full = || pin!(process.connection().ready()).poll(&mut no_context()).is_pending();
    until_async("there is no room", is_full).await;
    assert!(done.lock().unwrap().is_empty());
    process.reconnect().await.unwrap();
    for result in tasks.join_all().await {
        result.unwrap();
    }
    let grown = most_memory() - before;
    assert!(grown < BOUND, "{grown} bytes");
    let done = std::mem::take(&mut *done.lock().unwrap());
    assert!(done.into_iter().eq(0..COUNT));
}

#[tokio::test]
async fn what_many_calls_set_going_by_themselves_keeps_nobody_from_reconnecting() {
    let test = TestHome::new();
    let (process, memory) = detached(&test).await;
    let done = Arc::default();
    let tasks = send(&process, memory.address(), 300, &done);
    // All of them have had a turn when that is done, and so has what they have set going.
    for _ in 0..2 {
        tokio::spawn(async {}).await.unwrap();
    }
    assert!(pin!(process.connection().ready()).poll(&mut no_context()).is_pending());
    process.reconnect().await.unwrap();
    for result in tasks.join_all().await {
        result.unwrap();
    }
}

fn no_context() -> Context<'static> {
    Context::from_waker(Waker::noop())
}

#[tokio::test]
async fn a_call_that_waits_and_is_not_polled_delays_no_other() {
    let test = TestHome::new();
    let (process, memory) = detached(&test).await;
    let address = memory.address();
    // Submitting does not wait; the largest batch of all goes out as well.
    let large = process.connection().call("COPY_IN", Call::copy_in(0, vec![0; 20 << 20]));
    let mut waits = pin!(process.write_memory(address, Filled(1)));
    assert!(waits.as_mut().poll(&mut no_context()).is_pending());
    process.reconnect().await.unwrap();
    assert!(large.await.is_err(), "there is nothing at address 0");
    process.write_memory(address, Filled(2)).await.unwrap();
    assert_eq!(process.read_memory(address, 8).await.unwrap(), 2u64.to_le_bytes());
    waits.await.unwrap();
    assert_eq!(process.read_memory(address, 8).await.unwrap(), 1u64.to_le_bytes());
}

#[tokio::test]
async fn those_who_wait_are_told_that_the_process_is_gone() {
    let process = Local::new().start().await.unwrap();
    let child = process.child().spawn().await.unwrap();
    let memory = map(&child).await;
    let blocks = child.connection().call("pause", Call::syscall(Sysno::pause, [0; 6]));
    let done = Arc::<Mutex<Vec<u64>>>::default();
    let mut tasks = JoinSet::new();
    for number in 0..1_000 {
        let (child, done) = (Process::clone(&child), Arc::clone(&done));
        let address = memory.address();
        tasks.spawn(async move {
            let sent = child.write_memory(address, Filled(number)).await;
            done.lock().unwrap().push(number);
            sent
        });
    }
    let pid = child.pid().unwrap();
    until_async("it is blocked", || blocked_in(pid) == Some(Sysno::pause as usize)).await;
    assert!(done.lock().unwrap().is_empty());
    child.kill(Signal::SIGKILL).unwrap();
    for result in tasks.join_all().await {
        assert!(matches!(result, Err(Error::Lost(_) | Error::Gone)), "{result:?}");
    }
    assert!(blocks.await.is_err());
}
