//! A detached process is inert, and it ends when nobody can reach it any more.

use std::process::{Command, Stdio};
use std::time::Duration;

use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::client::{Attached, TOKEN, attach};
use crate::server::{Persistent, Running, isolate};
use crate::stream::{read_up_to, request, until};

/// The system calls that strace sees a process make in about a second, a line each.
fn calls_in_a_second(pid: i32) -> Vec<String> {
    let mut command = Command::new("strace");
    isolate(&mut command, None);
    command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
    let output = tempfile::NamedTempFile::new().unwrap();
    command.args(["-p", &pid.to_string(), "-o"]).arg(output.path()).stderr(Stdio::null());
    let mut strace = Running::start(&mut command, "strace runs: install the package strace");
    let lines = || -> Vec<String> {
        let text = std::fs::read_to_string(output.path()).unwrap();
        text.lines().map(String::from).collect()
    };
    until("strace sees the call in which the process is", || {
        assert_eq!(strace.0.try_wait().unwrap(), None, "strace has ended: may it trace {pid}?");
        (!lines().is_empty()).then_some(())
    });
    // There is no event for "nothing happens".
    std::thread::sleep(Duration::from_secs(1));
    kill(Pid::from_raw(strace.0.id() as i32), Signal::SIGINT).unwrap();
    strace.0.wait().unwrap();
    lines()
}

#[test]
fn a_detached_process_executes_one_ppoll_without_a_timeout_and_nothing_else() {
    let mut process = Persistent::new();
    let before = process.fds_when_detached();
    drop(attach(&process.path, &TOKEN));
    process.is_detached_again(&before, "a connection");
    let calls = calls_in_a_second(process.server.pid());
    let [call] = &calls[..] else { panic!("not one call: {calls:#?}") };
    assert!(call.starts_with("ppoll(["), "{call}");
    assert!(call.contains("], 4, NULL, NULL, 0"), "not without a timeout and a mask: {call}");
    attach(&process.path, &TOKEN);
}

#[test]
fn requests_that_a_controller_leaves_behind_are_not_executed() {
    let mut process = Persistent::new();
    let before = process.fds_when_detached();
    let Attached { stream, data, answer } = attach(&process.path, &TOKEN);
    // The first keeps the server busy until the data socket ends, the second would end it.
    let memory = stream.memory(4096);
    stream.send(&request(libc::SYS_read as u64, &[answer.fds()[1] as u64, memory, 1]));
    stream.send(&request(libc::SYS_exit_group as u64, &[9]));
    drop(stream);
    drop(data);
    process.is_detached_again(&before, "a connection");
    attach(&process.path, &TOKEN);
}

#[test]
fn a_process_that_closes_its_listener_ends_with_its_connection() {
    let mut process = Persistent::new();
    let Attached { stream, answer, .. } = attach(&process.path, &TOKEN);
    assert_eq!(stream.call(libc::SYS_close, &[answer.listen() as u64]), 0);
    stream.is_in_step();
    drop(stream);
    process.server.exits_with(0);
}

#[test]
fn a_process_that_closes_its_own_stream_is_detached() {
    let mut process = Persistent::new();
    let before = process.fds_when_detached();
    let Attached { stream, answer, data } = attach(&process.path, &TOKEN);
    stream.send(&request(libc::SYS_close as u64, &[answer.fds()[0] as u64]));
    stream.ends();
    assert_eq!(read_up_to(data, 1), b"");
    process.is_detached_again(&before, "closing its own stream");
    attach(&process.path, &TOKEN);
}

#[test]
fn signals_that_are_handled_do_not_disturb_the_wait() {
    let process = Persistent::new();
    process.fds_when_detached();
    for _ in 0..200 {
        kill(Pid::from_raw(process.server.pid()), Signal::SIGPIPE).unwrap();
    }
    attach(&process.path, &TOKEN);
}
