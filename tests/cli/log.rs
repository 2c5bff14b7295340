//! `farcall log`: the last calls of a process, whoever made them.

use farcall::persist::Place;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::command::{Running, fail, farcall, keys, run, start, succeed, succeed_json};
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
    assert_eq!(keys(&log), ["calls", "controllers", "holder", "name", "records"]);
    assert!(log["holder"].is_null());
    let records = log["records"].as_array().unwrap();
    assert_eq!(records.len(), 3);
    let calls = log["calls"].as_u64().unwrap();
    for (back, record) in records.iter().rev().enumerate() {
        assert_eq!(
            keys(record),
            ["args", "call", "controller", "errno", "number", "own", "result"]
        );
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
    let caller = format!("blocked in a call of its controller, pid {}: pause(2)", running.pid());
    assert!(message.contains(&caller), "{message}");
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    assert!(!running.finish().status.success());
}

#[test]
fn log_tells_which_controller_has_made_which_call() {
    let test = TestHome::new();
    start(&test, "one");
    for call in ["getppid", "getuid"] {
        succeed(&test, &["call", "one", call]);
    }
    let log = succeed_json(&test, &["log", "one", "--json"]);
    let records = log["records"].as_array().unwrap();
    let of = |call: &str| {
        let mut made = records.iter().filter(|record| record["call"] == call);
        made.next_back().unwrap()["controller"].as_u64().unwrap()
    };
    assert_eq!(of("getuid"), log["controllers"].as_u64().unwrap());
    assert_eq!(of("getppid"), of("getuid") - 1);
    let text = succeed(&test, &["log", "one"]);
    let lines: Vec<&str> = text.lines().collect();
    let place = |what: &str| lines.iter().rposition(|line| line.contains(what)).unwrap();
    let (first, second) = (place("getppid()"), place("getuid()"));
    let between = lines[first..second].iter().filter(|line| line.starts_with("--"));
    assert_eq!(between.collect::<Vec<_>>(), [&"-- another controller --"], "{text}");
}

#[test]
fn log_of_a_process_that_keeps_none_says_so() {
    let test = TestHome::new();
    std::fs::create_dir(test.path()).unwrap();
    let (file, socket) = (test.file("server"), test.path().join("one.sock"));
    succeed(&test, &["image", "-o", file.to_str().unwrap()]);
    let mut server = std::process::Command::new(&file).arg(&socket).spawn().unwrap();
    until("it listens", || Place::at(&socket).is_listening());
    let message = fail(&test, 1, &["log", "one"]);
    assert!(message.contains("keeps no log yet"), "{message}");
    succeed(&test, &["call", "one", "getpid"]);
    let text = succeed(&test, &["log", "one"]);
    assert!(text.contains("getpid()"), "{text}");
    succeed(&test, &["stop", "one"]);
    assert!(server.wait().unwrap().success());
}

#[test]
fn log_of_nothing_is_an_error() {
    let test = TestHome::new();
    let message = fail(&test, 1, &["log", "none"]);
    assert!(message.contains("no such persistent process"), "{message}");
    fail(&test, 2, &["log", "a/b"]);
}

#[test]
fn log_shows_names_and_leaves_out_the_servers_own_operations_unless_asked() {
    let test = TestHome::new();
    start(&test, "one");
    succeed(&test, &["call", "one", "openat", "AT_FDCWD", "/", "O_RDONLY|O_CLOEXEC"]);
    succeed(&test, &["call", "one", "fcntl", "0", "F_GETFD"]);
    let text = succeed(&test, &["log", "one"]);
    assert!(text.contains("  openat(AT_FDCWD, 0x"), "{text}");
    assert!(text.contains(", O_RDONLY|O_CLOEXEC) = "), "{text}");
    assert!(text.contains("  fcntl(0, F_GETFD) = "), "{text}");
    assert!(!text.contains("COPY_IN"), "{text}");
    let all = succeed(&test, &["log", "one", "--all"]);
    assert!(all.contains("  COPY_IN(0x"), "{all}");
}
