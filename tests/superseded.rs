//! What the calls of a controller are told whose process another one has taken over.

use crate::common;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{
    Role, TestHome, blocked_in, hear, role, root_without_rings, spawn_persistent, tell, until,
};
use farcall::calls::Sysno;
use farcall::link::Polling;
use farcall::persist::{Attach, Home, Place, attach};
use farcall::process::Child;
use farcall::proto::Call;
use farcall::{Error, Fd, Outcome, Process};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::Pid;
use tokio::task::JoinSet;

/// More than are under way at once on a stream or in a ring: the others wait in the queue.
const TASKS: usize = 300;

/// A persistent process that needs its root no more.
async fn start(home: &Home) -> Child {
    spawn_persistent(home, &root_without_rings().await).await
}

async fn open(process: &Process, path: &Path) -> Fd {
    let flags = OFlag::O_CREAT | OFlag::O_WRONLY | OFlag::O_APPEND;
    process.openat(None, path, flags, Mode::S_IRUSR).await.unwrap()
}

/// Appends numbers in many tasks until each has an error. Returns what each call was told.
async fn append_until_refused(process: &Process, file: &Arc<Fd>) -> Vec<String> {
    let told = Arc::new(Mutex::new((0_u64, Vec::new())));
    let mut tasks = JoinSet::new();
    for _ in 0..TASKS {
        let (process, file, told) = (process.clone(), file.clone(), told.clone());
        tasks.spawn(async move {
            loop {
                let number = {
                    let mut told = told.lock().unwrap();
                    told.0 += 1;
                    told.0
                };
                let result = process.write(&file, &number.to_le_bytes()).await;
                let ended = result.is_err();
                told.lock().unwrap().1.push(format!("{number} {}", word(&result)));
                if ended {
                    break;
                }
            }
        });
    }
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
    let told = told.lock().unwrap();
    told.1.clone()
}

/// In one word what a call was told.
fn word<T: std::fmt::Debug>(result: &Result<T, Error>) -> String {
    match result {
        Ok(_) => "returned".into(),
        Err(Error::Superseded { pid, since, outcome }) => {
            assert!(since.is_some_and(|since| since > 1_700_000_000), "{result:?}");
            format!("{outcome:?}:{}", pid.unwrap())
        }
        other => format!("{other:?}").replace(' ', ""),
    }
}

/// The controller that loses the process.
async fn old_controller(home: PathBuf, way: &str) {
    let process = start(&Home::at(&home)).await;
    let file = Arc::new(open(&process, &home.join("appended")).await);
    if way == "ring" {
        process.enter_ring(Polling::Adaptive).await.unwrap();
    }
    tell(process.pid().unwrap());
    // Nobody reconnects meanwhile: they are told by themselves.
    let told = append_until_refused(&process, &file).await;
    fs::write(home.join("told"), told.join("\n")).unwrap();
    tell("over");
    // What is called from here on is refused at once.
    tell(word(&process.getpid().await));
    let written = process.write(&file, b"too late").await;
    tell(word(&written));
    let again = process.reconnect().await;
    tell(matches!(again, Err(Error::Held { .. })));
    // And still is, although that has asked who is there.
    tell(word(&process.getpid().await));
    tokio::task::spawn_blocking(hear).await.unwrap();
    process.reconnect().await.unwrap();
    // The other one may have closed what it does not know.
    let stale = process.write(&file, &[0; 8]).await;
    assert!(matches!(stale, Err(Error::Stale { .. })), "{stale:?}");
    let file = open(&process, &home.join("appended")).await;
    assert_eq!(process.write(&file, &[0; 8]).await.unwrap(), 8);
    tell(process.getpid().await.unwrap());
    tokio::task::spawn_blocking(hear).await.unwrap();
    process.exit(0).await.unwrap();
}

fn numbers(path: &Path) -> Vec<u64> {
    let bytes = fs::read(path).unwrap_or_default();
    let (numbers, []) = bytes.as_chunks() else { panic!("half a number") };
    numbers.iter().map(|number| u64::from_le_bytes(*number)).collect()
}

async fn take_over(place: &Place) -> Process {
    Attach::default().take_over().to(place.clone()).await.unwrap()
}

fn each_call_is_told_the_truth(test: &str, way: &str, stopped: bool) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    if let Some(argument) = role() {
        let (way, home) = argument.split_once(' ').unwrap();
        runtime.block_on(old_controller(home.into(), way));
        std::process::exit(0);
    }
    let home = TestHome::new();
    let mut old = Role::start(test, format!("{way} {}", home.path().display()));
    let pid = old.told();
    let appended = home.path().join("appended");
    until("it appends", || numbers(&appended).len() > 1000);
    let signal = |signal| kill(Pid::from_raw(old.pid()), signal).unwrap();
    if stopped {
        signal(Signal::SIGSTOP);
    }
    let process = runtime.block_on(take_over(&home.home.place(&"one".parse().unwrap())));
    let written = numbers(&appended);
    if stopped {
        signal(Signal::SIGCONT);
    }
    assert_eq!(old.told(), "over");
    let ours = std::process::id();
    let refused = format!("NotExecuted:{ours}");
    assert_eq!([old.told(), old.told()], [refused.clone(), refused.clone()]);
    assert_eq!(old.told(), "true", "a reconnect tells who holds it");
    assert_eq!(old.told(), refused);

    // Nothing has been written since, and each call knows whether it was.
    assert_eq!(numbers(&appended), written);
    let set: BTreeSet<u64> = written.iter().copied().collect();
    assert_eq!(set.len(), written.len(), "none is there twice");
    let told = fs::read_to_string(home.path().join("told")).unwrap();
    let mut refused_calls = 0;
    for line in told.lines() {
        let (number, word) = line.split_once(' ').unwrap();
        let executed = set.contains(&number.parse().unwrap());
        let is_true = match word {
            "returned" => executed,
            _ if word == refused => !executed,
            // Its result was in the log, so it has that.
            other => panic!("{number}: {other}"),
        };
        assert!(is_true, "{line}: executed is {executed}");
        refused_calls += usize::from(word == refused);
    }
    assert!(refused_calls > TASKS / 2, "{refused_calls}");

    // When the other one has left, it can have its process back.
    runtime.block_on(process.prepare_for_reconnect()).unwrap();
    old.say("reconnect");
    assert_eq!(old.told(), pid);
    assert_eq!(numbers(&appended).len(), written.len() + 1);
    old.say("exit");
    assert!(old.ended().success());
}

#[test]
fn each_call_on_a_stream_is_told_the_truth() {
    each_call_is_told_the_truth("each_call_on_a_stream_is_told_the_truth", "stream", false);
}

#[test]
fn each_call_in_a_ring_is_told_the_truth() {
    each_call_is_told_the_truth("each_call_in_a_ring_is_told_the_truth", "ring", false);
}

#[test]
fn each_call_on_a_stream_is_told_the_truth_by_a_controller_that_wakes_up() {
    const TEST: &str = "each_call_on_a_stream_is_told_the_truth_by_a_controller_that_wakes_up";
    each_call_is_told_the_truth(TEST, "stream", true);
}

#[test]
fn each_call_in_a_ring_is_told_the_truth_by_a_controller_that_wakes_up() {
    const TEST: &str = "each_call_in_a_ring_is_told_the_truth_by_a_controller_that_wakes_up";
    each_call_is_told_the_truth(TEST, "ring", true);
}

/// Two controllers in one process: they differ in their tokens.
#[tokio::test]
async fn what_was_executed_in_part_says_so_and_what_was_interrupted_has_its_result() {
    let home = TestHome::new();
    let old = start(&home.home).await;
    let pid = old.pid().unwrap();
    let file = open(&old, &home.path().join("file")).await;
    let seek = |by: u64| {
        let args = [file.number() as u64, by, nix::libc::SEEK_CUR as u64, 0, 0, 0];
        Call::syscall(Sysno::lseek, args)
    };
    let connection = old.connection();
    let first = vec![Call::syscall(Sysno::getpid, [0; 6]), Call::syscall(Sysno::pause, [0; 6])];
    let blocked = connection.submit(first, Ok);
    // More than the server executes before it looks who else is there.
    let begun = connection.submit(vec![seek(1); 500], Ok);
    let queued = connection.submit(vec![seek(1)], Ok);
    until("it is blocked", || blocked_in(pid) == Some(Sysno::pause as usize));
    let new = take_over(&home.home.place(&"one".parse().unwrap())).await;
    let executed = new.connection().submit(vec![seek(0)], Ok).await.unwrap()[0].result;

    let replies = blocked.await.unwrap();
    assert_eq!(replies[0].value(), Ok(pid as u64));
    assert_eq!(replies[1].value(), Err(Errno::EINTR));
    let [begun, queued] = [begun.await, queued.await].map(|result| match result {
        Err(Error::Superseded { outcome, .. }) => outcome,
        other => panic!("{other:?}"),
    });
    assert!(executed < 500, "{executed}");
    let expected = if executed == 0 { Outcome::NotExecuted } else { Outcome::Executed };
    assert_eq!(begun, expected, "{executed} of 500 calls were executed");
    assert_eq!(queued, Outcome::NotExecuted);
    new.exit(0).await.unwrap();
}

#[tokio::test]
async fn what_waits_after_a_detach_is_told_when_it_is_clear_that_it_can_not_be_sent() {
    let home = TestHome::new();
    let old = start(&home.home).await;
    let pid = old.pid().unwrap();
    let place = home.home.place(&"one".parse().unwrap());
    for _ in 0..20 {
        old.prepare_for_reconnect().await.unwrap();
        let waiting = tokio::spawn({
            let old = old.process().clone();
            async move { old.getpid().await }
        });
        let new = attach(place.clone()).await.unwrap();
        assert!(matches!(old.reconnect().await, Err(Error::Held { .. })));
        new.nanosleep(Duration::from_millis(1)).await.unwrap();
        new.prepare_for_reconnect().await.unwrap();
        assert!(!waiting.is_finished(), "it waits for the next connection");
        old.reconnect().await.unwrap();
        let told = waiting.await.unwrap();
        let expected = Error::Superseded { pid: None, since: None, outcome: Outcome::NotExecuted };
        assert_eq!(told.unwrap_err().to_string(), expected.to_string());
        assert_eq!(old.getpid().await.unwrap(), pid);
    }
    old.exit(0).await.unwrap();
}

/// The other controller has come and gone before this one hears of anything.
#[tokio::test]
async fn that_is_so_though_the_other_one_is_gone_again() {
    let home = TestHome::new();
    let child = start(&home.home).await;
    let path = home.file("appended");
    let file = open(&child, &path).await;
    let place = home.home.place(&"one".parse().unwrap());
    // This thread is the runtime's only one.
    let other = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let other = Attach::default().take_over().to(place).await.unwrap();
            other.prepare_for_reconnect().await.unwrap();
        });
    });
    other.join().unwrap();
    let written = child.write(&file, "never").await;
    assert!(
        matches!(
            written,
            Err(Error::Superseded { pid: None, since: None, outcome: Outcome::NotExecuted })
        ),
        "{written:?}"
    );
    // Nobody has it now.
    child.reconnect().await.unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"");
    assert!(file.is_stale());
    let file = open(&child, &path).await;
    child.write(&file, "once").await.unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"once");
    child.exit(0).await.unwrap();
}
