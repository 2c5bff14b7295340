//! What is said of a process that does not answer, or that another namespace's numbers describe.

use std::fs;
use std::os::unix::net::UnixStream;
use std::process::Command;

use farcall::calls::Sysno;
use farcall::persist::{Home, Name, attach};
use farcall::proto::Call;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{ForkResult, Pid, fork};
use serde_json::{Value, json};

use crate::cli::command::{Running, fail, farcall, start, succeed, succeed_json};
use crate::common::{
    Role, TestHome, alive, blocked_in, deny, persistent, role, root, state, tell, until,
};

/// A command line of `farcall` in new namespaces.
fn elsewhere(test: &TestHome, namespaces: &[&str], arguments: &[&str]) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--fork", "--kill-child"]).args(namespaces).arg(env!("CARGO_BIN_EXE_farcall"));
    command.args(arguments).env("FARCALL_DIR", test.path());
    command
}

/// Namespaces in which the pids of this one are no pids, and their own /proc.
const PIDS: [&str; 2] = ["--pid", "--mount-proc"];
/// Pids as here, in front of a /proc of this namespace: the numbers of the two differ.
const PIDS_ALONE: [&str; 1] = ["--pid"];
/// A namespace in which the machine has been up for ten days longer.
const TIME: [&str; 3] = ["--time", "--boottime", "864000"];

#[track_caller]
fn row(rows: &Value) -> &Value {
    assert_eq!(rows.as_array().map(Vec::len), Some(1), "{rows}");
    &rows[0]
}

#[track_caller]
fn listed(test: &TestHome) -> Value {
    row(&succeed_json(test, &["ls", "--json"])).clone()
}

#[track_caller]
fn listed_from(test: &TestHome, namespaces: &[&str]) -> Value {
    let output = elsewhere(test, namespaces, &["ls", "--json"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    row(&serde_json::from_slice(&output.stdout).unwrap()).clone()
}

#[test]
fn a_process_of_other_namespaces_lives_for_those_whose_numbers_differ() {
    let test = TestHome::new();
    let pid = start(&test, "one");
    let record = || test.home.place(&"one".parse().unwrap()).state().unwrap();
    let process = record().process;
    for namespaces in [&PIDS[..], &PIDS_ALONE, &TIME] {
        let seen = listed_from(&test, namespaces);
        assert_eq!(seen["state"], "detached", "{namespaces:?}: {seen}");
        let expected = if namespaces == TIME { json!(pid) } else { Value::Null };
        assert_eq!(seen["pid"], expected, "{namespaces:?}");
        if namespaces == TIME {
            assert!(seen["uptime_s"].as_u64().unwrap() < 86_400, "{seen}");
        }
        // Who attaches there writes NAME.json, and it says the same for those outside.
        let output = elsewhere(&test, namespaces, &["call", "one", "getpid"]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), pid.to_string(), "{output:?}");
        assert_eq!(record().process, process, "{namespaces:?}");
        let seen = listed(&test);
        assert_eq!((&seen["state"], &seen["pid"]), (&json!("detached"), &json!(pid)));
        // Nobody there takes its name.
        let output = elsewhere(&test, namespaces, &["start", "one"]).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{namespaces:?}: {output:?}");
    }
    // Where it is gone that is seen by its socket.
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    until("it is gone", || !alive(pid));
    for namespaces in [&PIDS[..], &PIDS_ALONE, &TIME] {
        assert_eq!(listed_from(&test, namespaces)["state"], "gone", "{namespaces:?}");
    }
}

#[test]
fn a_record_that_does_not_say_whose_numbers_it_has_is_believed_where_they_fit() {
    let test = TestHome::new();
    let pid = start(&test, "one");
    let path = test.path().join("one.json");
    let mut record: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    record.as_object_mut().unwrap().remove("pid_ns").unwrap();
    fs::write(&path, record.to_string()).unwrap();
    let seen = listed(&test);
    assert_eq!((&seen["state"], &seen["pid"]), (&json!("detached"), &json!(pid)));
    // Elsewhere no process has that number, or another one: the process lives all the same.
    let seen = listed_from(&test, &PIDS);
    assert_eq!((&seen["state"], &seen["pid"]), (&json!("detached"), &Value::Null));
    assert_eq!(succeed(&test, &["stop", "one"]), "one: stopped\n");
}

#[test]
fn a_holder_in_another_pid_namespace_is_one() {
    let test = TestHome::new();
    let pid = start(&test, "one");
    let mut command = elsewhere(&test, &PIDS, &["call", "one", "pause"]);
    let holder = Running::start(&mut command);
    until("it is blocked", || blocked_in(pid) == Some(libc::SYS_pause as usize));
    let seen = listed(&test);
    assert_eq!(seen["state"], "attached", "{seen}");
    assert_eq!(seen["holder"]["pid"], Value::Null, "its number says nothing here: {seen}");
    assert_eq!(seen["blocked"], "pause(2)");
    drop(holder);
}

#[test]
fn a_stopped_process_is_said_to_be_stopped_and_what_helps() {
    let test = TestHome::new();
    let pid = start(&test, "one");
    kill(Pid::from_raw(pid), Signal::SIGSTOP).unwrap();
    until("it is stopped", || state(pid) == Some('T'));
    assert_eq!(listed(&test)["blocked"], "stopped");
    let message = fail(&test, 1, &["log", "one", "--timeout", "1"]);
    assert!(message.contains("is stopped by a signal"), "{message}");
    assert!(message.contains(&format!("`kill -CONT {pid}`")), "{message}");
    assert!(!message.contains("blocked in a call"), "{message}");
    kill(Pid::from_raw(pid), Signal::SIGCONT).unwrap();
    succeed(&test, &["log", "one"]);
    // It may be at the end of that command's connection yet.
    until("it waits again", || listed(&test)["blocked"] == Value::Null);
}

#[test]
fn a_traced_process_is_said_to_be_and_by_whom() {
    let test = TestHome::new();
    let pid = start(&test, "one");
    let trace = |request: libc::c_uint| {
        // SAFETY: these requests take no memory.
        let done = unsafe { libc::ptrace(request, pid, 0, 0) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    };
    trace(libc::PTRACE_SEIZE);
    trace(libc::PTRACE_INTERRUPT);
    until("it is stopped by its tracer", || state(pid) == Some('t'));
    assert_eq!(listed(&test)["blocked"], "traced");
    let message = fail(&test, 1, &["log", "one", "--timeout", "1"]);
    // The tracer is a thread of this process.
    // SAFETY: the call has no arguments.
    let tracer = unsafe { libc::gettid() };
    assert!(message.contains(&format!("stopped by its tracer, pid {tracer}")), "{message}");
    trace(libc::PTRACE_DETACH);
    succeed(&test, &["log", "one"]);
}

#[test]
fn who_has_inherited_a_connection_is_named() {
    const TEST: &str = "who_has_inherited_a_connection_is_named";
    if let Some(path) = role() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let name: Name = "one".parse().unwrap();
            let _process = attach(Home::at(path).place(&name)).await.unwrap();
            // SAFETY: the child only waits.
            match unsafe { fork() }.unwrap() {
                ForkResult::Child => loop {
                    // SAFETY: the call has no arguments.
                    unsafe { libc::pause() };
                },
                ForkResult::Parent { child } => tell(child),
            }
            std::future::pending::<()>().await;
        });
    }
    /// Killed when the test is over.
    struct Heir(i32);
    impl Drop for Heir {
        fn drop(&mut self) {
            let _ = kill(Pid::from_raw(self.0), Signal::SIGKILL);
        }
    }
    let test = TestHome::new();
    let pid = start(&test, "one");
    let mut holder = Role::start(TEST, test.path());
    let heir = Heir(holder.told().parse().unwrap());
    let seen = listed(&test);
    assert_eq!(
        (&seen["state"], &seen["holder"]["pid"]),
        (&json!("attached"), &json!(holder.pid()))
    );
    holder.kill();
    let seen = listed(&test);
    assert_eq!((&seen["state"], &seen["holder"]["pid"]), (&json!("attached"), &json!(heir.0)));
    let message = fail(&test, 1, &["call", "one", "getpid"]);
    let told = format!(
        "held by pid {}, which has inherited the connection of pid {}",
        heir.0,
        holder.pid()
    );
    assert!(message.contains(&told), "{message}");
    // What is said to help does.
    drop(heir);
    assert_eq!(succeed(&test, &["call", "one", "getpid"]).trim(), pid.to_string());
}

#[test]
fn what_a_dead_controller_left_a_process_in_is_named() {
    let test = TestHome::new();
    let pid = start(&test, "one");
    let call = Running::start(&mut farcall(&test, &["call", "one", "pause"]));
    until("it is blocked", || blocked_in(pid) == Some(libc::SYS_pause as usize));
    let controller = call.pid();
    let seen = listed(&test);
    assert_eq!((&seen["state"], &seen["blocked"]), (&json!("attached"), &json!("pause(2)")));
    drop(call);
    let seen = listed(&test);
    assert_eq!((&seen["state"], &seen["blocked"]), (&json!("detached"), &json!("pause(2)")));
    let message = fail(&test, 1, &["log", "one", "--timeout", "1"]);
    let told = format!("of its last controller, pid {controller}, which is gone: pause(2)");
    assert!(message.contains(&told), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn how_a_server_waits_that_may_not_poll_is_not_said_to_be_a_call_that_it_is_blocked_in() {
    let (test, root) = (TestHome::new(), root().await);
    let (child, place) = persistent(&test, &root).await;
    let pid = child.pid().unwrap();
    let pipe = child.pipe2(OFlag::O_CLOEXEC).await.unwrap();
    for call in [Sysno::ppoll, Sysno::pselect6, Sysno::epoll_wait, Sysno::epoll_pwait] {
        deny(&child, call, None, Errno::EPERM).await;
    }
    let waits = |number: libc::c_long, state: &str, blocked: Value| {
        until("it waits", || blocked_in(pid) == Some(number as usize));
        let seen = listed(&test);
        assert_eq!((&seen["state"], &seen["blocked"]), (&json!(state), &blocked), "{number}");
    };
    waits(libc::SYS_read, "attached", Value::Null);
    child.prepare_for_reconnect().await.unwrap();
    waits(libc::SYS_accept4, "detached", Value::Null);
    let client = UnixStream::connect(place.socket()).unwrap();
    waits(libc::SYS_recvmsg, "detached", Value::Null);
    drop(client);
    waits(libc::SYS_accept4, "detached", Value::Null);
    child.reconnect().await.unwrap();
    // A call of its controller is one, whichever it is.
    let memory =
        child.mmap(4096, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE, None);
    let memory = memory.await.unwrap().address();
    let fd = pipe.0.number() as u64;
    let read = Call::syscall(Sysno::read, [fd, memory, 1, 0, 0, 0]);
    let read = child.connection().call("read", read);
    let read = tokio::spawn(read);
    until("it is in the call", || blocked_with(pid, fd));
    waits(libc::SYS_read, "attached", json!("read(2)"));
    child.kill(Signal::SIGKILL).unwrap();
    read.await.unwrap().unwrap_err();
}

/// Whether a process is in a call with that first argument.
fn blocked_with(pid: i32, first: u64) -> bool {
    let call = std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
    call.split(' ').nth(1) == Some(&format!("{first:#x}"))
}
