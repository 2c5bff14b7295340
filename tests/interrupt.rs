//! Interrupting calls, and deadlines.

use std::future::Future;
use std::time::{Duration, Instant};

use farcall::calls::Sysno;
use farcall::link::Polling;
use farcall::proto::Call;
use farcall::{Child, Error, Local, Outcome, Process, blocking};
use nix::errno::Errno;
use nix::sys::eventfd::EfdFlags;
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::common::{self, Random};

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

/// It had begun, and was interrupted at its deadline.
fn was_interrupted<T>(result: &farcall::Result<T>) -> bool {
    matches!(result, Err(Error::TimedOut { begun: true, .. }))
}

/// Its turn did not come before its deadline, and it is not executed.
fn has_not_begun<T>(result: &farcall::Result<T>) -> bool {
    matches!(result, Err(Error::TimedOut { begun: false, .. }))
}

/// A call blocks, and is interrupted.
async fn is_interrupted(process: &Process) {
    let blocked = process.connection().call("ppoll", sleep());
    let interrupter = blocked.interrupter().unwrap();
    let blocked = tokio::spawn(blocked);
    blocks_in(process, Sysno::ppoll).await;
    soon(interrupter.interrupt()).await.unwrap();
    let result = soon(blocked).await.unwrap();
    assert!(is_eintr(&result), "{result:?}");
}

async fn blocks_in(process: &Process, call: Sysno) {
    let pid = process.pid().unwrap();
    common::until_async("the call blocks", || common::blocked_in(pid) == Some(call.id() as usize))
        .await;
}

/// What the future comes to. One that never resolves is a test that fails.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(common::LIMIT, future).await.expect("it resolves")
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
    let limit = Duration::from_millis(200);
    let begin = Instant::now();
    let timed_out = child.syscall_within(limit, Sysno::ppoll, [0; 6]).await;
    // On a machine that is busy for so long it may not have begun.
    assert!(was_interrupted(&timed_out) || has_not_begun(&timed_out), "{timed_out:?}");
    assert!(begin.elapsed() >= limit);
    let fast = child.syscall_within(Duration::from_secs(60), Sysno::getpid, [0; 6]).await;
    assert_eq!(fast.unwrap(), child.pid().unwrap() as u64);
}

#[tokio::test]
async fn a_deadline_behind_a_blocked_call_is_kept_and_its_call_is_never_executed() {
    let (_root, child) = child().await;
    let flags = EfdFlags::EFD_NONBLOCK.bits() as u64;
    let counter = child.syscall(Sysno::eventfd2, [0, flags, 0, 0, 0, 0]).await.unwrap();
    let memory = child.mmap_pages().await;
    child.write_memory(memory.address(), 1u64.to_le_bytes()).await.unwrap();
    let add = [counter, memory.address(), 8, 0, 0, 0];
    // No deadline: it never ends by itself.
    let blocked = child.connection().call("ppoll", sleep());
    let interrupter = blocked.interrupter().unwrap();
    let blocked = tokio::spawn(blocked);
    // More than there is room for in the ring: some are handed over, and some wait for that. Some never
    // wait once they have begun, and some do.
    let deadlines = (1..=100).map(|number: u64| {
        let child = child.process().clone();
        tokio::spawn(async move {
            let limit = Duration::from_millis(number % 10);
            let (call, args) = if number.is_multiple_of(2) {
                (Sysno::write, add)
            } else {
                (Sysno::close, [add[0], 0, 0, 0, 0, 0])
            };
            child.syscall_within(limit, call, args).await
        })
    });
    for late in deadlines.collect::<Vec<_>>() {
        let late = soon(late).await.unwrap();
        assert!(has_not_begun(&late), "{late:?}");
        assert_eq!(late.unwrap_err().outcome(), Some(Outcome::NotExecuted));
    }
    assert!(!blocked.is_finished());
    soon(interrupter.interrupt()).await.unwrap();
    assert!(is_eintr(&soon(blocked).await.unwrap()));
    // Nobody has added to it, and nobody has closed it.
    let read = child.syscall(Sysno::read, [add[0], add[1], 8, 0, 0, 0]).await;
    assert_eq!(read.unwrap_err().errno(), Some(Errno::EAGAIN));
}

#[tokio::test]
async fn of_two_calls_with_deadlines_each_is_kept_whichever_is_the_shorter() {
    let (_root, child) = child().await;
    let [short, long] = [20, 80].map(Duration::from_millis);
    for [first, second] in [[long, short], [short, long], [short, short]] {
        let within = |limit| child.syscall_within(limit, Sysno::ppoll, [0; 6]);
        let both = async { tokio::join!(within(first), within(second)) };
        let (one, other) = soon(both).await;
        assert!(was_interrupted(&one) || has_not_begun(&one), "{one:?}");
        // Its turn comes when the first one is over, if that is before its own end.
        assert!(was_interrupted(&other) || has_not_begun(&other), "{other:?}");
        child.getpid().await.unwrap();
    }
}

#[tokio::test]
async fn a_deadline_is_kept_while_the_stream_is_blocked() {
    let (_root, child) = child().await;
    let memory = child.mmap_pages().await;
    // What brings bytes for memory that is not shared takes the stream.
    let calls = vec![Call::copy_in(memory.address(), vec![1; 8]), sleep()];
    let blocked = child.connection().submit(calls, |replies| Ok(replies[1].result));
    let limit = Duration::from_millis(20);
    let late = soon(child.syscall_within(limit, Sysno::getpid, [0; 6])).await;
    assert!(has_not_begun(&late), "{late:?}");
    blocks_in(&child, Sysno::ppoll).await;
    // A signal that has a handler.
    nix::sys::signal::kill(Pid::from_raw(child.pid().unwrap()), Signal::SIGPIPE).unwrap();
    assert_eq!(soon(blocked).await.unwrap(), -(Errno::EINTR as i64));
    child.getpid().await.unwrap();
}

#[tokio::test]
async fn a_batch_whose_last_call_is_to_be_interrupted_keeps_no_earlier_call_from_it() {
    let (_root, child) = child().await;
    let connection = child.connection();
    let getpid = || Call::syscall(Sysno::getpid, [0; 6]);
    let results = |replies: Vec<farcall::proto::Reply>| {
        Ok(replies.iter().map(|reply| reply.result).collect::<Vec<_>>())
    };
    let blocked = connection.call("ppoll", sleep());
    let batches = [vec![getpid(), sleep()], vec![sleep(), getpid()], vec![getpid(), getpid()]];
    let batches = batches.map(|calls| connection.submit(calls, results));
    let interrupters: Vec<_> =
        batches.iter().map(|batch| batch.interrupter().unwrap()).rev().collect();
    let interrupting: Vec<_> = interrupters
        .into_iter()
        .map(|interrupter| tokio::spawn(async move { interrupter.interrupt().await }))
        .collect();
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    // It is before all of them.
    soon(blocked.interrupter().unwrap().interrupt()).await.unwrap();
    assert!(is_eintr(&soon(blocked).await));
    let pid = i64::from(child.pid().unwrap());
    let eintr = -(Errno::EINTR as i64);
    let [first, second, third] = batches;
    assert_eq!(soon(first).await.unwrap(), [pid, eintr]);
    // Nobody interrupts the first call of the second batch but this.
    blocks_in(&child, Sysno::ppoll).await;
    nix::sys::signal::kill(Pid::from_raw(child.pid().unwrap()), Signal::SIGPIPE).unwrap();
    // Calls that never wait may have been faster.
    let fast = |result| [eintr, pid].contains(&result);
    let [second, third] = [soon(second).await.unwrap(), soon(third).await.unwrap()];
    assert!(second[0] == eintr && fast(second[1]), "{second:?}");
    assert!(third[0] == pid && fast(third[1]), "{third:?}");
    for interrupting in interrupting {
        soon(interrupting).await.unwrap().unwrap();
    }
    child.getpid().await.unwrap();
}

/// Calls that only an interruption ends and some that never wait, each with many who interrupt it, in
/// any order, and others who call without a deadline: all of them come to an end, and those results are
/// theirs.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_interrupt_many_calls_and_each_comes_to_its_end() {
    const ROUNDS: usize = 50;
    const CALLS: usize = 20;
    const INTERRUPTERS: usize = 5;
    let (_root, child) = child().await;
    let connection = child.connection();
    let pid = child.pid().unwrap() as u64;
    for round in 0..ROUNDS {
        let mut calls = Vec::new();
        let mut interrupters = Vec::new();
        let mut others = Vec::new();
        for number in 0..CALLS {
            let blocks = (round + number) % 3 > 0;
            let call = if blocks { sleep() } else { Call::syscall(Sysno::getpid, [0; 6]) };
            let call = connection.call("call", call);
            let interrupter = call.interrupter();
            others.push(connection.call("getpid", Call::syscall(Sysno::getpid, [0; 6])));
            // Those that had to take the stream can't be interrupted, and are quick.
            match interrupter {
                Some(interrupter) => {
                    interrupters.extend(std::iter::repeat_n(interrupter, INTERRUPTERS));
                }
                None => assert!(!blocks, "the ring has room"),
            }
            calls.push((blocks, tokio::spawn(call)));
        }
        let places = interrupters.len();
        let interrupting = (0..places).map(|place| {
            // Another order each round.
            let interrupter = interrupters[(place * 37 + round * 11) % places].clone();
            tokio::spawn(async move { interrupter.interrupt().await })
        });
        let mut interrupting: Vec<_> = interrupting.collect();
        interrupting.extend(
            interrupters
                .into_iter()
                .rev()
                .map(|interrupter| tokio::spawn(async move { interrupter.interrupt().await })),
        );
        for (blocks, call) in calls {
            let result = soon(call).await.unwrap();
            let whole = result.as_ref().is_ok_and(|result| *result == pid);
            assert!(is_eintr(&result) || !blocks && whole, "{result:?}");
        }
        for other in others {
            assert_eq!(soon(other).await.unwrap(), pid);
        }
        for interrupting in interrupting {
            soon(interrupting).await.unwrap().unwrap();
        }
    }
}

#[test]
fn threads_without_a_runtime_have_deadlines_too() {
    let root = blocking::wait(Local::new().start()).unwrap();
    let worker = root.clone();
    let child = blocking::wait(async move {
        let child = worker.child().spawn().await?;
        child.enter_ring(Polling::Adaptive).await?;
        Ok(child)
    })
    .unwrap();
    std::thread::scope(|threads| {
        for thread in 0..8 {
            let process = child.process().clone();
            threads.spawn(move || {
                for time in 0..20 {
                    let process = process.clone();
                    let limit = Duration::from_millis((thread + time) % 5);
                    let late = blocking::wait(async move {
                        Ok(process.syscall_within(limit, Sysno::ppoll, [0; 6]).await)
                    });
                    let late = late.unwrap();
                    assert!(was_interrupted(&late) || has_not_begun(&late), "{late:?}");
                }
            });
        }
    });
    assert_eq!(child.syscall_blocking(Sysno::getpid, [0; 6]).unwrap(), child.pid().unwrap() as u64);
}

#[tokio::test]
async fn a_deadline_is_kept_where_no_signal_can_be_queued() {
    let (_root, child) = child().await;
    let memory = child.mmap_pages().await;
    // No signal may be pending, as where the user has used up the limit.
    child.write_memory(memory.address(), [0; 16]).await.unwrap();
    let limit = nix::libc::RLIMIT_SIGPENDING as u64;
    child.syscall(Sysno::prlimit64, [0, limit, memory.address(), 0, 0, 0]).await.unwrap();
    for _ in 0..10 {
        is_interrupted(&child).await;
    }
}

#[tokio::test]
async fn a_process_that_has_another_users_rights_by_now_is_interrupted_all_the_same() {
    assert!(nix::unistd::geteuid().is_root(), "only root has other users' ids to give");
    let (_root, child) = child().await;
    let pid = child.pid().unwrap();
    // Not the root of all: that one may signal everybody.
    let [one, other] = [1000, 1001].map(nix::unistd::Uid::from_raw);
    child.setresuid(Some(one), Some(one), Some(one)).await.unwrap();
    child.unshare(nix::sched::CloneFlags::CLONE_NEWUSER).await.unwrap();
    std::fs::write(format!("/proc/{pid}/uid_map"), "1000 1000 2").unwrap();
    // The ring from before belongs to root.
    let child = child.child().spawn().await.unwrap();
    child.enter_ring(Polling::Adaptive).await.unwrap();
    child.setresuid(Some(other), Some(other), Some(other)).await.unwrap();
    is_interrupted(&child).await;
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
    // SIG_BLOCK of SIGIO.
    child
        .write_memory(memory.address(), (1u64 << (Signal::SIGIO as u64 - 1)).to_le_bytes())
        .await
        .unwrap();
    child.syscall(Sysno::rt_sigprocmask, [0, memory.address(), 0, 8, 0, 0]).await.unwrap();
    // Longer than the signal is waited for.
    child.write_memory(memory.address(), timespec(5, 0)).await.unwrap();
    let nanosleep = [memory.address(), 0, 0, 0, 0, 0];
    let call = child.connection().call("nanosleep", Call::syscall(Sysno::nanosleep, nanosleep));
    let interrupter = call.interrupter().unwrap();
    let call = tokio::spawn(call);
    blocks_in(&child, Sysno::nanosleep).await;
    let error = soon(interrupter.interrupt()).await;
    assert!(matches!(error, Err(Error::Signal)), "{error:?}");
    assert_eq!(soon(call).await.unwrap().unwrap(), 0);
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
    let mut random = Random::new(1);
    let (mut before_its_turn, mut while_it_ran) = (0, 0);
    for time in 0..TIMES {
        let before = connection.call("nanosleep", short());
        let victim = connection.call("ppoll", sleep());
        let behind = connection.call("nanosleep", short());
        let interrupter = victim.interrupter().unwrap();
        let instant = random.below(400);
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
