//! Commands while something takes long: Ctrl-C, waiting, and what is said meanwhile.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use farcall::persist::{Home, Name, attach};
use nix::libc;
use nix::sys::signal::{SigHandler, Signal, kill, signal};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};

use super::command::{Running, fail, farcall, start, succeed, succeed_json};
use crate::common::{Role, TestHome, alive, blocked_in, fds, hear, role, tell, until};

/// A command that hears Ctrl-C, or ignores it, whatever the shell of the tests has said.
fn called(test: &TestHome, disposition: SigHandler, arguments: &[&str]) -> Running {
    Running::start(&mut command(test, disposition, arguments))
}

fn command(test: &TestHome, disposition: SigHandler, arguments: &[&str]) -> Command {
    let mut command = farcall(test, arguments);
    let prepare = move || {
        for one in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            // SAFETY: there is no handler that could do harm.
            unsafe { signal(one, disposition) }?;
        }
        Ok(())
    };
    // SAFETY: what is done between fork and exec allocates nothing.
    unsafe { command.pre_exec(prepare) };
    command
}

fn until_in(pid: i32, call: i64) {
    until("it is in the call", || blocked_in(pid) == Some(call as usize));
}

fn send(running: &Running, signal: Signal) {
    kill(Pid::from_raw(running.pid()), signal).unwrap();
}

#[test]
fn ctrl_c_interrupts_the_call_in_the_process() {
    let test = TestHome::new();
    let pid = start(&test, "one");
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let call = called(&test, SigHandler::SigDfl, &["call", "one", "pause"]);
        until_in(pid, libc::SYS_pause);
        send(&call, signal);
        let ran = call.finish();
        assert_eq!(ran.status.code(), Some(1), "{signal}: {ran:?}");
        assert_eq!(ran.stdout, "EINTR (Interrupted system call)\n", "{signal}");
        assert_eq!(ran.stderr, "", "{signal}");
        // It is free at once, and what the interruption took is given back.
        assert_eq!(succeed(&test, &["call", "one", "getpid"]).trim(), pid.to_string());
    }
}

/// A FIFO that has nothing to read, and its descriptor in the process `one`.
fn empty_fifo(test: &TestHome) -> (PathBuf, String) {
    let fifo = test.file("fifo");
    mkfifo(&fifo, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    let path = fifo.to_str().unwrap();
    let fd = succeed(test, &["call", "one", "openat", "AT_FDCWD", path, "O_RDWR"]);
    (fifo, fd)
}

#[test]
fn a_command_that_ignores_ctrl_c_has_its_result() {
    let test = TestHome::new();
    let pid = start(&test, "one");
    let (fifo, fd) = empty_fifo(&test);
    let call = called(&test, SigHandler::SigIgn, &["call", "one", "read", fd.trim(), "@9", "9"]);
    until_in(pid, libc::SYS_read);
    // A handler could be there and hear nothing yet when the bytes come.
    let status = fs::read_to_string(format!("/proc/{}/status", call.pid())).unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    let ignored = u64::from_str_radix(ignored.trim(), 16).unwrap();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        assert_ne!(ignored & 1 << (signal as i32 - 1), 0, "{signal}");
        send(&call, signal);
    }
    File::options().write(true).open(&fifo).unwrap().write_all(b"something").unwrap();
    let ran = call.finish();
    assert_eq!(ran.stdout, "9\nargument 2: \"something\"\n", "{ran:?}");
}

#[test]
fn a_call_that_can_not_be_interrupted_is_left_by_the_second_ctrl_c() {
    let test = TestHome::new();
    let pid = start(&test, "one");
    // Room for a connection and not for what interrupts.
    let open = fds(pid);
    let third_free = (0..).filter(|number| !open.contains_key(number)).nth(2).unwrap();
    let limit: Vec<u8> = [third_free as u64 + 1; 2].map(u64::to_le_bytes).concat();
    let limit = limit.iter().map(|byte| format!("\\x{byte:02x}")).collect::<String>();
    let limit = format!("\"{limit}\"");
    succeed(&test, &["call", "one", "prlimit64", "0", "RLIMIT_NOFILE", &limit, "0"]);
    let told = test.file("told");
    let mut call = command(&test, SigHandler::SigDfl, &["call", "one", "pause"]);
    let mut call = call.stderr(File::create(&told).unwrap()).spawn().unwrap();
    until_in(pid, libc::SYS_pause);
    // Two that come together are one: the second comes when the first is answered.
    for expected in ["it can't be interrupted", "one is still in pause"] {
        kill(Pid::from_raw(call.id() as i32), Signal::SIGINT).unwrap();
        until(expected, || fs::read_to_string(&told).unwrap().contains(expected));
        let both = fs::read_to_string(&told).unwrap();
        assert_eq!(both.contains("still in pause"), expected.contains("still"), "{both}");
    }
    assert_eq!(call.wait().unwrap().code(), Some(1));
    let told = fs::read_to_string(&told).unwrap();
    assert!(told.contains("`farcall call --take-over one getpid`"), "{told}");
    assert_eq!(blocked_in(pid), Some(libc::SYS_pause as usize));
    assert_eq!(succeed(&test, &["call", "--take-over", "one", "getpid"]).trim(), pid.to_string());
}

#[test]
fn who_holds_a_process_is_waited_for() {
    const TEST: &str = "who_holds_a_process_is_waited_for";
    if let Some(path) = role() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let name: Name = "one".parse().unwrap();
            let process = attach(Home::at(path).place(&name)).await.unwrap();
            tell("attached");
            hear();
            process.prepare_for_reconnect().await.unwrap();
        });
        return;
    }
    let test = TestHome::new();
    let pid = start(&test, "one");
    for arguments in [
        &["call", "--wait", "one", "getpid"][..],
        &["call", "one", "getpid", "--wait"],
        &["names", "--wait", "one"],
        &["stop", "one", "--wait"],
    ] {
        let mut holder = Role::start(TEST, test.path());
        assert_eq!(holder.told(), "attached");
        // Not for ever, if that is said.
        let bounded = [arguments, &["--timeout", "0.2"]].concat();
        let ran = called(&test, SigHandler::SigDfl, &bounded).finish();
        let told = format!("one: held by pid {}", holder.pid());
        assert_eq!(ran.status.code(), Some(1), "{bounded:?}: {ran:?}");
        assert!(ran.stderr.contains(&told), "{ran:?}");
        let waiting = called(&test, SigHandler::SigDfl, arguments);
        holder.say("go");
        let ran = waiting.finish();
        assert_eq!(ran.status.code(), Some(0), "{arguments:?}: {ran:?}");
    }
    assert!(!alive(pid), "the last one was stop");
}

#[test]
fn who_gives_up_sooner_is_said_by_the_timeout() {
    let test = TestHome::new();
    let pid = start(&test, "one");
    let call = Running::start(&mut farcall(&test, &["call", "one", "pause"]));
    until_in(pid, libc::SYS_pause);
    drop(call);
    // All of these give up while one that was begun before them still waits.
    let patient = ["call", "--timeout", "600", "one", "getpid"];
    let patient = Running::start(&mut farcall(&test, &patient));
    for arguments in [
        &["call", "one", "getpid", "--timeout", "0.1"][..],
        &["call", "--timeout=0.1", "one", "getpid"],
        &["names", "one", "--timeout", "0.1"],
        &["stop", "one", "--timeout", "0.1"],
        &["log", "one", "--timeout", "0.1"],
    ] {
        fail(&test, 1, arguments);
    }
    assert!(alive(patient.pid()), "it gives up before the others, or with them");
    succeed(&test, &["stop", "--take-over", "one"]);
    patient.finish();
}

#[test]
fn what_a_controller_that_is_gone_has_left_is_told_waited_for_and_interrupted() {
    let test = TestHome::new();
    let pid = start(&test, "one");
    let (fifo, fd) = empty_fifo(&test);
    let leave = || {
        let call =
            Running::start(&mut farcall(&test, &["call", "one", "read", fd.trim(), "@9", "9"]));
        until_in(pid, libc::SYS_read);
        drop(call);
    };
    leave();
    for arguments in [
        &["call", "one", "getpid", "--timeout", "0.2"][..],
        &["stop", "one", "--timeout", "0.2"],
        &["names", "one", "--timeout", "0.2"],
        &["upgrade", "one", "--timeout", "0.2"],
    ] {
        let message = fail(&test, 1, arguments);
        assert!(message.contains("farcall: one: "), "{message}");
        assert!(message.contains("read(2)"), "{message}");
        for help in ["--take-over interrupts", "--wait waits", "`farcall stop --kill one`"] {
            assert!(message.contains(help), "{arguments:?}: {message}");
        }
    }
    // The end of the call is the end of the wait.
    let waiting = Running::start(&mut farcall(&test, &["call", "--wait", "one", "getpid"]));
    fs::write(&fifo, "something").unwrap();
    assert_eq!(waiting.finish().stdout.trim(), pid.to_string());
    leave();
    assert_eq!(succeed(&test, &["call", "one", "getpid", "--take-over"]).trim(), pid.to_string());
}

#[test]
fn numbers_of_seconds_are_judged() {
    let test = TestHome::new();
    start(&test, "one");
    for arguments in [
        &["call", "one", "getpid", "--timeout", "soon"][..],
        &["call", "one", "getpid", "--timeout"],
        &["call", "--timeout=-1", "one", "getpid"],
        &["call", "--wait", "--take-over", "one", "getpid"],
        &["call", "one", "getpid", "--wait", "--take-over"],
        &["stop", "one", "--kill", "--wait"],
        &["log", "one", "--timeout", "nan"],
    ] {
        fail(&test, 2, arguments);
    }
    for arguments in [
        &["call", "one", "getpid", "--timeout", "1e30"][..],
        &["names", "one", "--timeout", "99999999999999999999999"],
        &["log", "one", "--timeout", "1e18"],
    ] {
        let message = fail(&test, 2, arguments);
        assert!(message.contains("too large"), "{arguments:?}: {message}");
    }
    for arguments in [
        &["call", "one", "getpid", "--timeout", "1000000000"][..],
        &["log", "one", "--timeout", "1000000000"],
    ] {
        succeed(&test, arguments);
    }
    let log = succeed_json(&test, &["log", "one", "--json", "-n", "0"]);
    assert_eq!(log["records"].as_array().map(Vec::len), Some(0));
    let text = succeed(&test, &["log", "one", "-n", "0"]);
    assert!(text.ends_with("calls so far; nobody is attached\n"), "{text}");
}
