//! Taking a persistent process over from a controller that works, hangs, is stopped or wakes up later.

use crate::common;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use common::{
    Role, TestHome, alive, blocked_in, hear, role, state, tell, until, until_async, with_fault,
};
use farcall::calls::Sysno;
use farcall::host::local::Stdio;
use farcall::link::Polling;
use farcall::persist::{Attach, Home, Place, SharedMemory};
use farcall::proto::Call;
use farcall::{Error, Local, Process};
use nix::fcntl::OFlag;
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::Pid;

/// More bytes than a socket holds.
const MUCH: usize = 8 << 20;

/// The controller that loses the process: starts it, and does then what it is told until its calls
/// fail.
async fn holder(home: &str) {
    let home = PathBuf::from(home);
    let root = Local::new().stdio(Stdio::Null).start().await.unwrap();
    let reserved = Home::at(&home).reserve(&"one".parse().unwrap()).unwrap();
    let process = root.child().spawn_persistent(reserved, SharedMemory::Refuse).await.unwrap();
    let flags = OFlag::O_CREAT | OFlag::O_WRONLY | OFlag::O_APPEND;
    let log = home.join("appended");
    let file = process.openat(None, &log, flags, Mode::S_IRUSR).await.unwrap();
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let memory = process.mmap(MUCH, protection, MapFlags::MAP_PRIVATE, None).await.unwrap();
    process.enter_ring(Polling::Adaptive).await.unwrap();
    tell(process.pid().unwrap());
    let word = tokio::task::spawn_blocking(hear).await.unwrap();
    let work = async {
        match word.as_str() {
            "append" => while process.write(&file, "x").await.is_ok() {},
            "keep full" => loop {
                // A batch is always there when the one before it ends.
                let calls = || vec![Call::syscall(Sysno::getpid, [0; 6]); 32];
                let [one, other] = [(); 2].map(|()| process.connection().submit(calls(), Ok));
                if one.await.and(other.await).is_err() {
                    break;
                }
            },
            "block" => drop(process.nanosleep(Duration::from_secs(3600)).await),
            "copy in" => loop {
                // On the stream, which is where bytes can be stopped at.
                let call = Call::copy_in(memory.address(), vec![1; MUCH]);
                if process.connection().submit(vec![call], Ok).await.is_err() {
                    break;
                }
            },
            "copy out" => loop {
                let call = Call::copy_out(memory.address(), MUCH);
                if process.connection().submit(vec![call], Ok).await.is_err() {
                    break;
                }
            },
            "idle" => {}
            other => panic!("{other}"),
        }
    };
    // A call that is made after the end of the link waits for the next one.
    let over = until_async("the link ends", || !process.connection().is_connected());
    tokio::select! {
        () = over => {}
        () = async { work.await; std::future::pending().await } => {}
    }
    tell("lost");
    let again = process.reconnect().await;
    tell(match again {
        Err(Error::Held { pid, .. }) => format!("held by {}", pid.unwrap_or(0)),
        other => format!("{other:?}"),
    });
    // It holds what it has until it is killed.
    tokio::task::spawn_blocking(hear).await.unwrap();
}

/// A controller that takes the process over, and is stopped where it is about to interrupt that.
async fn late(place: Place) {
    let taken = Attach::default().take_over().to(place).await;
    tell(if taken.is_ok() { "taken" } else { "not taken" });
}

fn run(test: &str, word: &str, during: impl AsyncFnOnce(&Role, Place, i32)) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    if let Some(home) = role() {
        match home.strip_prefix("late:") {
            Some(home) => runtime.block_on(late(Home::at(home).place(&"one".parse().unwrap()))),
            None => runtime.block_on(holder(&home)),
        }
        std::process::exit(0);
    }
    let home = TestHome::new();
    let mut old = Role::start(test, home.path());
    let pid: i32 = old.told().parse().unwrap();
    old.say(word);
    let place = home.home.place(&"one".parse().unwrap());
    runtime.block_on(during(&old, place, pid));
    assert_eq!(old.told(), "lost");
    assert_eq!(old.told(), format!("held by {}", std::process::id()));
    assert!(alive(pid));
    // Of this process's hold nothing is left: it is dropped only now.
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    until("it is gone", || !alive(pid));
    drop(old);
}

async fn take_over(place: Place) -> Process {
    let held = Attach::default().to(place.clone()).await;
    assert!(matches!(held, Err(Error::Held { .. })), "{held:?}");
    Attach::default().take_over().to(place).await.unwrap()
}

/// Keeps the hold until the old controller has been heard.
fn keep(process: Process) {
    std::mem::forget(process);
}

#[test]
fn from_one_that_works_and_whose_ring_is_full() {
    run("from_one_that_works_and_whose_ring_is_full", "keep full", async |_, place, pid| {
        let process = take_over(place.clone()).await;
        assert_eq!(process.getpid().await.unwrap(), pid);
        assert_eq!(place.state().unwrap().holder.unwrap().pid, std::process::id() as i32);
        process.enter_ring(Polling::Adaptive).await.unwrap();
        assert_eq!(process.getpid().await.unwrap(), pid);
        keep(process);
    });
}

#[test]
fn from_one_that_is_idle() {
    run("from_one_that_is_idle", "idle", async |_, place, pid| {
        let process = take_over(place).await;
        assert_eq!(process.getpid().await.unwrap(), pid);
        keep(process);
    });
}

#[test]
fn from_one_whose_call_blocks_the_process() {
    run("from_one_whose_call_blocks_the_process", "block", async |_, place, pid| {
        until("it is blocked", || blocked_in(pid) == Some(Sysno::nanosleep as usize));
        let process = take_over(place).await;
        assert_eq!(process.getpid().await.unwrap(), pid);
        keep(process);
    });
}

#[test]
#[cfg_attr(not(feature = "faults"), ignore = "needs --features faults")]
fn who_takes_over_and_is_late_interrupts_no_call_of_the_next_one() {
    const TEST: &str = "who_takes_over_and_is_late_interrupts_no_call_of_the_next_one";
    run(TEST, "block", async |old, place, pid| {
        until("it is blocked", || blocked_in(pid) == Some(Sysno::nanosleep as usize));
        let home = place.socket().parent().unwrap().display().to_string();
        let mut command = Role::command(TEST, format!("late:{home}"));
        let mut late = Role::run(with_fault(&mut command, "takeover.interrupting:1:stop"));
        until("it is about to interrupt", || state(late.pid()) == Some('T'));
        assert_eq!(blocked_in(pid), Some(Sysno::nanosleep as usize));
        let process = take_over_any(place).await;
        // The one that is late had its turn before.
        assert!(alive(old.pid()));
        let sleep = tokio::spawn({
            let process = process.clone();
            async move { process.nanosleep(Duration::from_secs(2)).await }
        });
        until_async("it sleeps", || blocked_in(pid) == Some(Sysno::nanosleep as usize)).await;
        kill(Pid::from_raw(late.pid()), Signal::SIGCONT).unwrap();
        let told = tokio::task::spawn_blocking(move || late.told());
        // It has gone on by now, and says how it fared: it holds nothing any more.
        told.await.unwrap();
        sleep.await.unwrap().expect("nobody interrupts it");
        keep(process);
    });
}

/// The same, whoever holds it.
async fn take_over_any(place: Place) -> Process {
    Attach::default().take_over().to(place).await.unwrap()
}

#[test]
fn from_one_that_is_stopped_and_whose_later_calls_reach_nothing() {
    const TEST: &str = "from_one_that_is_stopped_and_whose_later_calls_reach_nothing";
    run(TEST, "append", async |old, place, pid| {
        let log = place.socket().with_file_name("appended");
        let appended = || fs::metadata(&log).map_or(0, |file| file.len());
        until("it appends", || appended() > 1000);
        let holder = Pid::from_raw(old.pid());
        kill(holder, Signal::SIGSTOP).unwrap();
        let process = take_over(place).await;
        let now = appended();
        process.enter_ring(Polling::Adaptive).await.unwrap();
        assert_eq!(process.getpid().await.unwrap(), pid);
        kill(holder, Signal::SIGCONT).unwrap();
        // Its next call goes into its ring, and fails.
        for _ in 0..1000 {
            process.getpid().await.unwrap();
        }
        assert_eq!(appended(), now);
        keep(process);
    });
}

/// The process can't go on with what the old controller has begun, and gives it up.
fn from_one_that_stops_within_bytes(test: &str, word: &str, call: Sysno) {
    run(test, word, async |old, place, pid| {
        let holder = Pid::from_raw(old.pid());
        until("it stops in the middle of bytes", || {
            kill(holder, Signal::SIGSTOP).unwrap();
            until("it is stopped", || state(old.pid()) == Some('T'));
            until("the process waits", || state(pid) == Some('S'));
            let within = blocked_in(pid) == Some(call as usize);
            if !within {
                kill(holder, Signal::SIGCONT).unwrap();
            }
            within
        });
        let process = take_over(place).await;
        assert_eq!(process.getpid().await.unwrap(), pid);
        kill(holder, Signal::SIGCONT).unwrap();
        keep(process);
    });
}

#[test]
fn from_one_that_is_stopped_and_has_sent_a_part_of_its_bytes() {
    const TEST: &str = "from_one_that_is_stopped_and_has_sent_a_part_of_its_bytes";
    from_one_that_stops_within_bytes(TEST, "copy in", Sysno::read);
}

#[test]
fn from_one_that_is_stopped_and_reads_no_results() {
    const TEST: &str = "from_one_that_is_stopped_and_reads_no_results";
    from_one_that_stops_within_bytes(TEST, "copy out", Sysno::write);
}

#[test]
fn two_that_take_turns_never_hold_it_both() {
    const TEST: &str = "two_that_take_turns_never_hold_it_both";
    run(TEST, "idle", async |_, place, pid| {
        let mut last = take_over(place.clone()).await;
        for _ in 0..50 {
            let next = Attach::default().take_over().to(place.clone()).await.unwrap();
            assert_eq!(next.getpid().await.unwrap(), pid);
            until_async("the other one has lost it", || !last.connection().is_connected()).await;
            last = next;
        }
        keep(last);
    });
}
