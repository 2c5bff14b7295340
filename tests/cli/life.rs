//! `farcall start`, `ls` and `stop`: a persistent process from its beginning to its end.

use std::fs::{self, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use farcall::persist::{Incarnation, State};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::command::{
    Running, fail, farcall, json as parsed, keys, run, start, succeed, succeed_json,
};
use crate::common::{Role, TestHome, alive, fds, role, tell, until};

/// Names that are none.
const NO_NAMES: [&str; 8] = ["", ".hidden", "-dash", "a/b", "../a", "a b", "ä", "a\n"];

fn end(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    until("it is gone", || !alive(pid));
}

/// The row of `ls --json` with that name.
#[track_caller]
fn row(test: &TestHome, name: &str) -> Value {
    let rows = succeed_json(test, &["ls", "--json"]);
    let row = rows.as_array().unwrap().iter().find(|row| row["name"] == name);
    row.unwrap_or_else(|| panic!("{name} is not in {rows}")).clone()
}

#[test]
fn start_returns_once_the_socket_accepts() {
    let test = TestHome::new();
    let started = succeed_json(&test, &["start", "one", "--json"]);
    assert_eq!(keys(&started), ["cgroups", "name", "pid", "socket"]);
    assert_eq!(started["cgroups"], json!([]));
    let socket = test.path().join("one.sock");
    UnixStream::connect(&socket).expect("it listens");
    assert_eq!(started["name"], "one");
    assert_eq!(started["socket"], socket.to_str().unwrap());
    assert!(alive(started["pid"].as_i64().unwrap() as i32));
    let printed = succeed(&test, &["start", "two"]);
    let pid = row(&test, "two")["pid"].clone();
    let socket = test.path().join("two.sock");
    assert_eq!(printed, format!("two: pid {pid}, {}\n", socket.display()));
}

#[test]
fn a_started_process_holds_nothing_of_what_started_it() {
    let test = TestHome::new();
    let mut command = farcall(&test, &["start", "one", "--json"]);
    let mut running = Running::start(command.stdin(Stdio::piped()));
    let mut stdin = running.stdin();
    let pipes = running.pipes.clone();
    assert_eq!(pipes.len(), 3);
    // Standard output and error reach their end: `finish` waits for that.
    let ran = running.finish();
    assert_eq!(ran.status.code(), Some(0), "{ran:?}");
    let pid = parsed(&ran.stdout)["pid"].as_i64().unwrap() as i32;
    assert!(alive(pid));
    let held = fds(pid);
    assert!(!held.values().any(|file| pipes.contains(file)), "{held:?}");
    for number in 0..=2 {
        assert_eq!(held[&number], Path::new("/dev/null"), "{held:?}");
    }
    let error = stdin.write_all(b"x").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BrokenPipe, "nobody reads standard input");
    // Nor does it hold the terminal: it has a session of its own.
    assert_eq!(nix::unistd::getsid(Some(Pid::from_raw(pid))).unwrap().as_raw(), pid);
}

#[test]
fn start_works_without_any_standard_stream() {
    let test = TestHome::new();
    let mut shell = Command::new("/bin/sh");
    let farcall = env!("CARGO_BIN_EXE_farcall");
    shell.args(["-c", "exec \"$0\" start one <&- >&- 2>&-", farcall]);
    let ran = Running::start(shell.env("FARCALL_DIR", test.path())).finish();
    assert_eq!(ran.status.code(), Some(0));
    assert_eq!(row(&test, "one")["state"], "detached");
}

#[test]
fn a_name_in_use_is_not_taken_and_one_of_the_dead_is() {
    let test = TestHome::new();
    let pid = start(&test, "one");
    let error = fail(&test, 1, &["start", "one"]);
    assert!(error.contains(&format!("(pid {pid})")), "{error}");
    assert!(alive(pid));
    end(pid);
    assert_ne!(start(&test, "one"), pid);
}

#[test]
fn what_is_no_name_exits_with_2() {
    let test = TestHome::new();
    let long = "n".repeat(65);
    for name in NO_NAMES.into_iter().chain([long.as_str()]) {
        fail(&test, 2, &["start", "--", name]);
        fail(&test, 2, &["stop", "--", name]);
        fail(&test, 2, &["call", "--", name, "getpid"]);
    }
    assert!(!test.path().exists(), "nothing was made");
    // The longest and the shortest are fine.
    for name in ["n", &long[1..], "A.b-c_9"] {
        start(&test, name);
    }
}

#[test]
fn a_directory_that_cannot_be_used_is_an_error_that_names_it() {
    let test = TestHome::new();
    let file = test.file("file");
    fs::write(&file, "in the way").unwrap();
    let open = test.file("open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, Permissions::from_mode(0o755)).unwrap();
    for (directory, reason) in [
        (file.clone(), "Not a directory"),
        (file.join("below"), "Not a directory"),
        // Nobody can make a directory there, root included.
        ("/proc/farcall".into(), "No such file or directory"),
        (open.clone(), "choose a directory of your own"),
    ] {
        let mut command = farcall(&test, &["start", "one"]);
        let ran = Running::start(command.env("FARCALL_DIR", &directory)).finish();
        assert_eq!(ran.status.code(), Some(1), "{ran:?}");
        assert_eq!(ran.stdout, "");
        assert!(ran.stderr.contains(directory.to_str().unwrap()), "{ran:?}");
        assert!(ran.stderr.contains(reason), "{reason}: {ran:?}");
    }
    assert_eq!(fs::read(&file).unwrap(), b"in the way");
    assert_eq!(fs::read_dir(&open).unwrap().count(), 0);
}

#[test]
fn ls_shows_what_there_is_in_documented_keys() {
    let test = TestHome::new();
    let pid = start(&test, "one");
    start(&test, "two");
    let rows = succeed_json(&test, &["ls", "--json"]);
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 2);
    for row in rows {
        assert_eq!(
            keys(row),
            [
                "blocked",
                "cgroups",
                "children",
                "fds",
                "holder",
                "name",
                "pid",
                "private_bytes",
                "rss_bytes",
                "state",
                "uptime_s"
            ]
        );
    }
    let row = &rows[0];
    assert_eq!((&row["name"], &row["pid"]), (&json!("one"), &json!(pid)));
    assert_eq!(row["state"], "detached");
    assert_eq!(row["children"], 0);
    assert_eq!(row["fds"], fds(pid).len());
    assert!(row["uptime_s"].is_u64(), "{row}");
    let (rss, private) = (row["rss_bytes"].as_u64().unwrap(), row["private_bytes"].as_u64());
    let private = private.unwrap();
    assert!(0 < private && private < 64 * 1024, "a fresh process has {private} bytes of its own");
    assert!(private <= rss, "{row}");
    // The table has the same.
    let table = succeed(&test, &["ls"]);
    let lines: Vec<Vec<&str>> =
        table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines.len(), 3, "{table}");
    assert_eq!(lines[0][..3], ["NAME", "PID", "STATE"]);
    assert_eq!(lines[1][..3], ["one", pid.to_string().as_str(), "detached"]);
}

#[test]
fn ls_of_nothing_is_an_empty_list() {
    let test = TestHome::new();
    assert_eq!(succeed_json(&test, &["ls", "--json"]), json!([]));
    let ran = run(&test, &["ls"]);
    assert_eq!((ran.status.code(), ran.stdout.as_str()), (Some(0), ""));
    assert!(ran.stderr.contains("no persistent processes"), "{ran:?}");
}

#[test]
fn ls_tells_attached_from_detached_from_gone() {
    const TEST: &str = "cli::life::ls_tells_attached_from_detached_from_gone";
    if let Some(path) = role() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let name = "one".parse().unwrap();
            let place = farcall::persist::Home::at(path).place(&name);
            let _process = farcall::persist::attach(place).await.unwrap();
            tell("attached");
            std::future::pending::<()>().await;
        });
    }
    let test = TestHome::new();
    let pid = start(&test, "one");
    assert_eq!(row(&test, "one")["state"], "detached");
    let mut holder = Role::start(TEST, test.path());
    assert_eq!(holder.told(), "attached");
    let held = row(&test, "one");
    assert_eq!(
        (&held["state"], &held["holder"]["pid"]),
        (&json!("attached"), &json!(holder.pid()))
    );
    holder.kill();
    assert_eq!(row(&test, "one")["state"], "detached");
    end(pid);
    let gone = row(&test, "one");
    assert_eq!(
        gone,
        json!({
            "name": "one",
            "pid": pid,
            "state": "gone",
            "holder": null,
            "blocked": null,
            "uptime_s": null,
            "fds": null,
            "children": null,
            "rss_bytes": null,
            "private_bytes": null,
            "cgroups": [],
        })
    );
    assert!(succeed(&test, &["ls"]).contains("gone"));
}

#[test]
fn ls_connects_to_nobody() {
    // A place like any, but the socket is the test's own, which sees who comes.
    let test = TestHome::new();
    let mut process = Command::new("/bin/sleep").arg("3600").spawn().unwrap();
    fs::create_dir(test.path()).unwrap();
    let listener = UnixListener::bind(test.path().join("one.sock")).unwrap();
    listener.set_nonblocking(true).unwrap();
    let incarnation = Incarnation::of(process.id() as i32).unwrap();
    let state = State {
        process: incarnation,
        holder: None,
        since: 0,
        cgroups: Vec::new(),
        connection: None,
    };
    fs::write(test.path().join("one.json"), serde_json::to_vec(&state).unwrap()).unwrap();
    assert_eq!(row(&test, "one")["state"], "detached");
    assert!(succeed(&test, &["ls"]).contains("one"));
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    // It would have been seen, also after it had gone again.
    drop(UnixStream::connect(test.path().join("one.sock")).unwrap());
    listener.accept().unwrap();
    process.kill().unwrap();
    process.wait().unwrap();
}

#[test]
fn stop_ends_the_process_and_removes_its_files() {
    let test = TestHome::new();
    let pid = start(&test, "one");
    assert_eq!(succeed(&test, &["stop", "one"]), "one: stopped\n");
    assert!(!alive(pid));
    let pid = start(&test, "one");
    let stopped = succeed_json(&test, &["stop", "one", "--json"]);
    assert_eq!(stopped, json!({ "name": "one", "pid": pid, "stopped": true }));
    assert!(!alive(pid));
    let pid = start(&test, "one");
    let stopped = succeed_json(&test, &["stop", "one", "--kill", "--json"]);
    assert_eq!(stopped, json!({ "name": "one", "pid": pid, "stopped": true }));
    assert!(!alive(pid));
    assert_eq!(fs::read_dir(test.path()).unwrap().count(), 0);
}

#[test]
fn stop_of_a_dead_process_removes_what_it_left() {
    let test = TestHome::new();
    for (arguments, printed) in [
        (&["stop", "one"][..], "one: was gone already; its socket is removed now\n"),
        (&["stop", "one", "--kill"], "one: was gone already; its socket is removed now\n"),
        (&["stop", "one", "--json"], "{\"name\":\"one\",\"pid\":null,\"stopped\":false}\n"),
    ] {
        end(start(&test, "one"));
        assert!(test.path().join("one.sock").exists());
        assert_eq!(succeed(&test, arguments), printed, "{arguments:?}");
        assert_eq!(fs::read_dir(test.path()).unwrap().count(), 0, "{arguments:?}");
    }
}

#[test]
fn stop_of_a_name_that_nobody_has_exits_with_1() {
    let test = TestHome::new();
    start(&test, "one");
    for arguments in [&["stop", "two"][..], &["stop", "--kill", "two"], &["stop", "--json", "two"]]
    {
        let error = fail(&test, 1, arguments);
        assert!(error.contains("there is no persistent process two"), "{error}");
    }
    assert_eq!(row(&test, "one")["state"], "detached");
}

/// Lets the kernel of a pid namespace execute no memfd (Linux 6.3).
const MEMFD_NOEXEC: &str = "/proc/sys/vm/memfd_noexec";

/// Runs a script in a pid namespace in which memfds can't be executed; `$0` is farcall.
fn where_memfds_are_forbidden(test: &TestHome, script: &str) -> std::process::Output {
    let script = format!("echo 2 > {MEMFD_NOEXEC} || exit 77; {script}");
    let program = env!("CARGO_BIN_EXE_farcall");
    let output = std::process::Command::new("unshare")
        .args(["--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", &script, program])
        .env("FARCALL_DIR", test.path())
        .output()
        .unwrap();
    assert_ne!(output.status.code(), Some(77), "this test needs namespaces");
    output
}

#[test]
fn where_memfds_may_not_be_executed_an_unlinked_file_is() {
    let test = TestHome::new();
    if !Path::new(MEMFD_NOEXEC).exists() {
        // Nothing forbids them, and they are what is executed.
        let pid = start(&test, "one");
        let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
        assert!(exe.to_str().unwrap().starts_with("/memfd:"), "{exe:?}");
        return;
    }
    let script = r#"pid=$("$0" start one --json | sed 's/.*"pid":\([0-9]*\).*/\1/') &&
        readlink "/proc/$pid/exe" && "$0" call one getuid && "$0" stop one"#;
    let output = where_memfds_are_forbidden(&test, script);
    let (stdout, stderr) =
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success(), "{stdout}{stderr}");
    let place = std::env::temp_dir();
    let place = place.to_str().unwrap();
    let file = stdout.lines().any(|line| line.starts_with(place) && line.ends_with(" (deleted)"));
    assert!(file && !stdout.contains("memfd:"), "{stdout}");

    // Where there is no place for that either, the error names both, and what forbids them.
    let noexec = r#"mount -t tmpfs -o noexec none /mnt && TMPDIR=/mnt "$0" start one"#;
    for (script, words) in [
        (r#"TMPDIR=/proc "$0" start one"#, &["/proc ("][..]),
        (noexec, &["/mnt (", "mounted noexec"]),
    ] {
        let output = where_memfds_are_forbidden(&test, script);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        let words = words.iter().chain(&["a memfd (", "vm.memfd_noexec is 2", "TMPDIR"]);
        words.for_each(|word| assert!(stderr.contains(word), "{word}: {stderr}"));
    }
}
