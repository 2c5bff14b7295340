//! `farcall log`: the last calls of a process, whoever made them.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::command::{Running, fail, farcall, keys, run, start, succeed, succeed_json};
use crate::common::{TestHome, blocked_in, until};

#[test]
fn log_shows_the_calls_of_controllers_that_are_gone() {
    let test = TestHome::new();
    let pid = start(&test, "one");
    succeed(&test, &["call", "one", "getpid"]);
    assert!(!run(&test, &["call", "one", "close", "77"]).status.success());
    let text = succeed(&test, &["log", "one"]);
    let lines: Vec<&str> = text.lines().collect();
    let place = |what: &str| lines.iter().position(|line| line.contains(what)).unwrap();
    assert!(place(&format!("getpid() = {pid}")) < place("close(77) = EBADF"), "{text}");
    assert!(lines.last().unwrap().ends_with("nobody is attached"), "{text}");

    let log = succeed_json(&test, &["log", "one", "--json", "-n", "3"]);
    assert_eq!(keys(&log), ["calls", "holder", "name", "records"]);
    assert!(log["holder"].is_null());
    let records = log["records"].as_array().unwrap();
    assert_eq!(records.len(), 3);
    let calls = log["calls"].as_u64().unwrap();
    for (back, record) in records.iter().rev().enumerate() {
        assert_eq!(keys(record), ["args", "call", "errno", "number", "own", "result"]);
        assert_eq!(record["number"], calls - 1 - back as u64);
    }
    // Asking is no call, and attaches nobody.
    assert_eq!(succeed_json(&test, &["log", "one", "--json", "-n", "3"]), log);
}

#[test]
fn log_tells_who_is_attached_and_that_a_blocked_process_can_not_answer() {
    let test = TestHome::new();
    let pid = start(&test, "one");
    // The call lasts until the process is ended: its controller stays attached.
    let mut command = farcall(&test, &["call", "one", "pause"]);
    let running = Running::start(&mut command);
    until("it is blocked", || blocked_in(pid) == Some(nix::libc::SYS_pause as usize));
    let message = fail(&test, 1, &["log", "one", "--timeout", "1"]);
    assert!(message.contains("blocked in a call"), "{message}");
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    assert!(!running.finish().status.success());
}

#[test]
fn log_of_nothing_is_an_error() {
    let test = TestHome::new();
    let message = fail(&test, 1, &["log", "none"]);
    assert!(message.contains("no such persistent process"), "{message}");
    fail(&test, 2, &["log", "a/b"]);
}
