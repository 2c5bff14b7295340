//! What a server takes: stack, and memory of its own.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use common::{Role, TestHome, alive, blocked_in, fds, role, tell, until};
use farcall::Local;
use farcall::abi::entry::STACK_SIZE;
use farcall::calls::Sysno;
use farcall::host::local::Stdio;
use farcall::persist::{Home, SharedMemory, attach};

/// The most private memory of a fresh persistent process.
const MAX_PRIVATE: u64 = 64 * 1024;

/// The lowest address above a guard page: where the stack of the one child that shares the memory
/// of process `pid` begins.
fn stack_of_the_child_in(pid: i32) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let guards: Vec<u64> = maps
        .lines()
        .filter(|line| line.contains(" ---p "))
        .map(|line| {
            let end = line.split(['-', ' ']).nth(1).unwrap();
            u64::from_str_radix(end, 16).unwrap()
        })
        .collect();
    assert_eq!(guards.len(), 1, "{maps}");
    guards[0]
}

#[tokio::test]
async fn a_server_lives_on_under_4_kib_of_stack() {
    const STACK: usize = 16 * 1024;
    let test = TestHome::new();
    let root = Local::new().stdio(Stdio::Null).start().await.unwrap();
    let child = root.child().share_memory().spawn().await.unwrap();
    // Every path that a stream leads through, faults and padding among them.
    assert!(child.read_memory(8, 100_000).await.is_err());
    assert!(child.write_memory(8, vec![1; 100_000]).await.is_err());
    let place = test.home.place(&"one".parse().unwrap());
    let reserved = test.home.reserve(&"one".parse().unwrap()).unwrap();
    child.make_persistent(reserved, SharedMemory::Keep).await.unwrap();
    // And those of the handshake: refused, replaced by the same controller, and by another one.
    assert!(attach(place.clone()).await.is_err(), "this process holds it");
    child.reconnect().await.unwrap();
    child.prepare_for_reconnect().await.unwrap();
    let next = attach(place).await.unwrap();
    next.getpid().await.unwrap();

    // The stack was zeros when the child began, and what is deepest on it is a return address.
    let pid = root.pid().unwrap();
    let bottom = stack_of_the_child_in(pid);
    let mut stack = vec![0; STACK];
    File::open(format!("/proc/{pid}/mem")).unwrap().read_exact_at(&mut stack, bottom).unwrap();
    let untouched = stack.iter().take_while(|byte| **byte == 0).count();
    let used = STACK - untouched;
    println!("a server used {used} bytes of stack");
    assert!(used > 500, "{used} bytes can't be all of it");
    assert!(used < STACK_SIZE, "{used} bytes");
    next.exit(0).await.unwrap();
}

#[test]
fn a_fresh_persistent_process_has_under_64_kib_of_its_own() {
    const TEST: &str = "a_fresh_persistent_process_has_under_64_kib_of_its_own";
    let one = "one".parse().unwrap();
    if let Some(path) = role() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let root = Local::new().stdio(Stdio::Null).start().await.unwrap();
            let reserved = Home::at(path).reserve(&one).unwrap();
            let process = root.child().spawn_persistent(reserved, SharedMemory::Refuse).await;
            tell(format!("{} {}", process.unwrap().pid().unwrap(), root.pid().unwrap()));
            std::future::pending::<()>().await;
        });
    }
    let test = TestHome::new();
    let mut controller = Role::start(TEST, test.path());
    let told = controller.told();
    let pids: Vec<i32> = told.split(' ').map(|pid| pid.parse().unwrap()).collect();
    // As long as the root server lives, pages that it has in common with the process count as
    // shared.
    controller.kill();
    until("the root server dies", || !alive(pids[1]));
    let pid = pids[0];
    until("the process is detached", || blocked_in(pid) == Some(Sysno::ppoll as usize));
    let memory = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let kilobytes: u64 = memory
        .lines()
        .filter(|line| line.starts_with("Private_"))
        .map(|line| line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap())
        .sum();
    println!("a fresh persistent process has {kilobytes} KiB of its own");
    assert!(kilobytes > 0 && kilobytes * 1024 < MAX_PRIVATE, "{memory}");
    // The standard streams, the listener, its file and three spares.
    assert_eq!(fds(pid).len(), 8);
}
