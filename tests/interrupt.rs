//! Interrupting calls, and deadlines.

use std::time::{Duration, Instant};

use farcall::call::{Call, Polling};
use farcall::sys::Sysno;
use farcall::{Child, Error, Local, Process};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::common;

async fn child() -> (Process, Child) {
    let root = Local::new().start().await.unwrap();
    let child = root.child().spawn().await.unwrap();
    child.enter_ring(Polling::Adaptive).await.unwrap();
    (root, child)
}

/// Sleeps until it is interrupted.
fn sleep() -> Call {
    Call::syscall(Sysno::ppoll, [0; 6])
}

fn is_eintr<T: std::fmt::Debug>(result: &farcall::Result<T>) -> bool {
    matches!(result, Err(Error::Call { errno: Errno::EINTR, .. }))
}

#[tokio::test]
async fn a_blocked_call_returns_eintr_and_the_next_ones_go_on() {
    let (_root, child) = child().await;
    let connection = child.connection();
    for _ in 0..100 {
        let blocked = connection.call("ppoll", sleep());
        let behind = connection.call("getpid", Call::syscall(Sysno::getpid, [0; 6]));
        let interrupter = blocked.interrupter().unwrap();
        let (blocked, interrupted, behind) = tokio::join!(blocked, interrupter.interrupt(), behind);
        assert!(is_eintr(&blocked), "{blocked:?}");
        interrupted.unwrap();
        assert_eq!(behind.unwrap(), child.pid().unwrap() as u64);
    }
}

#[tokio::test]
async fn a_call_whose_turn_it_is_not_yet_is_not_executed() {
    let (_root, child) = child().await;
    let connection = child.connection();
    let pid = child.pid().unwrap();
    let first = connection.call("pause", Call::syscall(Sysno::pause, [0; 6]));
    // If it were executed, the process would be gone.
    let second = connection.call("exit_group", Call::syscall(Sysno::exit_group, [0; 6]));
    let interrupter = second.interrupter().unwrap();
    let interrupting = tokio::spawn(async move { interrupter.interrupt().await });
    let in_pause = || {
        let syscall = std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap();
        syscall.starts_with(&format!("{} ", Sysno::pause.id()))
    };
    common::until_async("the first call is executed", in_pause).await;
    // On this one thread, the second call is meant when all tasks have had their turns.
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    // A signal with a handler ends the first one.
    nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGPIPE).unwrap();
    let (first, second, interrupted) = tokio::join!(first, second, interrupting);
    assert!(is_eintr(&first), "{first:?}");
    assert!(is_eintr(&second), "{second:?}");
    interrupted.unwrap().unwrap();
    child.getpid().await.unwrap();
}

#[tokio::test]
async fn a_call_that_is_complete_stays_what_it_is() {
    let (_root, child) = child().await;
    let call = child.connection().call("getpid", Call::syscall(Sysno::getpid, [0; 6]));
    let interrupter = call.interrupter().unwrap();
    assert_eq!(call.await.unwrap(), child.pid().unwrap() as u64);
    interrupter.interrupt().await.unwrap();
    child.getpid().await.unwrap();
}

#[tokio::test]
async fn a_deadline_interrupts_and_what_is_faster_has_its_result() {
    let (_root, child) = child().await;
    let limit = Duration::from_millis(20);
    let begin = Instant::now();
    let timed_out = child.syscall_within(limit, Sysno::ppoll, [0; 6]).await;
    assert!(matches!(timed_out, Err(Error::TimedOut { call: "ppoll" })), "{timed_out:?}");
    assert!(begin.elapsed() >= limit);
    let fast = child.syscall_within(Duration::from_secs(60), Sysno::getpid, [0; 6]).await;
    assert_eq!(fast.unwrap(), child.pid().unwrap() as u64);
}

#[tokio::test]
async fn without_a_ring_it_is_said_that_a_call_can_not_be_interrupted() {
    let root = Local::new().polling(None).start().await.unwrap();
    let limit = Duration::from_secs(60);
    let refused = root.syscall_within(limit, Sysno::getpid, [0; 6]).await;
    assert!(matches!(refused, Err(Error::NotInterruptible)), "{refused:?}");
    let stream = root.connection().call("getpid", Call::syscall(Sysno::getpid, [0; 6]));
    assert!(stream.interrupter().is_none());
    stream.await.unwrap();
}

#[tokio::test]
async fn a_process_that_blocks_the_signal_is_an_error_and_goes_on() {
    let (_root, child) = child().await;
    let memory = child.mmap_pages().await;
    // SIG_BLOCK of signal 64.
    child.write_memory(memory.address(), (1u64 << 63).to_le_bytes()).await.unwrap();
    child.syscall(Sysno::rt_sigprocmask, [0, memory.address(), 0, 8, 0, 0]).await.unwrap();
    let limit = Duration::from_millis(1);
    // Three seconds: longer than the signal is waited for.
    child.write_memory(memory.address(), timespec(3, 0)).await.unwrap();
    let nanosleep = [memory.address(), 0, 0, 0, 0, 0];
    let error = child.syscall_within(limit, Sysno::nanosleep, nanosleep).await;
    assert!(matches!(error, Err(Error::Signal)), "{error:?}");
    // What comes behind it is executed.
    child.getpid().await.unwrap();
    child.write_memory(memory.address(), timespec(0, 1)).await.unwrap();
    child.syscall(Sysno::nanosleep, nanosleep).await.unwrap();
}

fn timespec(seconds: u64, nanoseconds: u64) -> Vec<u8> {
    [seconds.to_le_bytes(), nanoseconds.to_le_bytes()].concat()
}

trait Pages {
    async fn mmap_pages(&self) -> farcall::Mapping;
}

impl Pages for Process {
    async fn mmap_pages(&self) -> farcall::Mapping {
        use nix::sys::mman::{MapFlags, ProtFlags};
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        self.mmap(4096, protection, MapFlags::MAP_PRIVATE, None).await.unwrap()
    }
}

/// A hundred thousand times: a call that ends only when it is interrupted, one before it and one
/// behind it that a signal would end too early, and an interrupt at a random instant. A wake-up that
/// is lost is a test that does not end; a wrong victim is an EINTR where there must be none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_hundred_thousand_interrupts_none_is_lost_and_none_meets_another_call() {
    const TIMES: u32 = 100_000;
    let (_root, child) = child().await;
    let memory = child.mmap_pages().await;
    child.write_memory(memory.address(), timespec(0, 1)).await.unwrap();
    // A nanosecond is one, and not fifty microseconds more.
    let slack = nix::libc::PR_SET_TIMERSLACK as u64;
    child.syscall(Sysno::prctl, [slack, 1, 0, 0, 0, 0]).await.unwrap();
    let connection = child.connection();
    let short = || Call::syscall(Sysno::nanosleep, [memory.address(), 0, 0, 0, 0, 0]);
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let (mut before_its_turn, mut while_it_ran) = (0, 0);
    for time in 0..TIMES {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let before = connection.call("nanosleep", short());
        let victim = connection.call("ppoll", sleep());
        let behind = connection.call("nanosleep", short());
        let interrupter = victim.interrupter().unwrap();
        let instant = random % 400;
        let interrupting = tokio::spawn(async move {
            for _ in 0..instant {
                std::hint::spin_loop();
            }
            interrupter.interrupt().await
        });
        let all = async { tokio::join!(before, victim, behind, interrupting) };
        let (before, victim, behind, interrupted) =
            tokio::time::timeout(common::LIMIT, all).await.expect("a wake-up was lost");
        assert!(before.is_ok(), "{time}: {before:?}");
        assert!(behind.is_ok(), "{time}: {behind:?}");
        assert!(is_eintr(&victim), "{time}: {victim:?}");
        interrupted.unwrap().unwrap();
        if instant < 100 { before_its_turn += 1 } else { while_it_ran += 1 }
    }
    assert!(before_its_turn > 0 && while_it_ran > 0);
}
