//! `farcall names`.

use farcall::Process;
use farcall::calls::Sysno;
use farcall::persist::{Home, Kind, Name, Sameness, attach, names_of};
use nix::fcntl::OFlag;
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::stat::Mode;
use serde_json::{Value, json};

use super::command::{Running, fail, farcall, keys, run, start, succeed, succeed_json};
use crate::common::{
    LIMIT, Role, TELLS_PIDFDS, TestHome, blocked_in, hear, linux, role, tell, until,
};

/// Does something as a controller of the process of that name, and lets go of it.
fn control(test: &TestHome, name: &str, what: impl AsyncFnOnce(&Process)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let name: Name = name.parse().unwrap();
        let process = attach(test.home.place(&name)).await.unwrap();
        what(&process).await;
        process.prepare_for_reconnect().await.unwrap();
    });
}

/// A file with a name, memory, bytes and a child that has ended; a descriptor without a name. Tells
/// that one's number.
fn keep(test: &TestHome, name: &str) -> i32 {
    let file = test.file("log");
    let mut unnamed = None;
    control(test, name, async |process| {
        let mut chain = process.chain();
        chain.keep("log");
        chain.openat(None, &file, OFlag::O_CREAT | OFlag::O_RDWR, Mode::S_IRWXU);
        chain.run().await.unwrap();
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let memory = process.mmap(8192, protection, MapFlags::MAP_PRIVATE, None).await.unwrap();
        process.keep_mapping("memory", memory).await.unwrap();
        process.keep_bytes("bytes", &[0; 300]).await.unwrap();
        let child = process.child().named("worker").spawn().await.unwrap();
        child.exit(42).await.unwrap();
        child.ended().await;
        let fd = process.openat(None, "/dev/null", OFlag::O_RDONLY, Mode::empty()).await.unwrap();
        unnamed = Some(fd.into_raw());
    });
    unnamed.unwrap()
}

fn named<'j>(listed: &'j Value, name: &str) -> &'j Value {
    listed["names"].as_array().unwrap().iter().find(|row| row["name"] == name).unwrap()
}

#[test]
fn what_has_a_name_is_shown_and_whether_it_is_still_that() {
    let test = TestHome::new();
    start(&test, "one");
    keep(&test, "one");
    let listed = succeed_json(&test, &["names", "one", "--json"]);
    assert_eq!(keys(&listed), ["holder", "names", "unclaimed"]);
    assert_eq!(listed["holder"], Value::Null);
    assert_eq!(listed["unclaimed"], Value::Null);
    let rows = listed["names"].as_array().unwrap();
    let all: Vec<&str> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(all, ["bytes", "log", "memory", "worker"]);
    for row in rows {
        let expected =
            ["address", "kind", "name", "now", "number", "pid", "reason", "size", "state"];
        assert_eq!(keys(row), expected);
    }
    let log = named(&listed, "log");
    let number = log["number"].as_i64().unwrap();
    let path = test.file("log");
    assert_eq!(
        *log,
        json!({
            "name": "log", "kind": "fd", "number": number, "pid": null, "address": null,
            "size": null, "now": path, "state": "same", "reason": null,
        })
    );
    let worker = named(&listed, "worker");
    let same = if linux() >= TELLS_PIDFDS { "same" } else { "unverified" };
    assert_eq!((&worker["kind"], &worker["state"]), (&json!("child"), &json!(same)));
    assert_eq!(worker["now"], "exited with status 42");
    let memory = named(&listed, "memory");
    assert_eq!((&memory["kind"], &memory["state"]), (&json!("memory"), &json!("unverified")));
    assert_eq!(memory["size"], 8192);
    assert!(memory["address"].is_u64() && memory["reason"].is_string(), "{memory}");
    let bytes = named(&listed, "bytes");
    assert_eq!((&bytes["kind"], &bytes["size"]), (&json!("bytes"), &json!(300)));

    let text = succeed(&test, &["names", "one"]);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 5, "{text}");
    assert!(lines[0].starts_with("NAME"), "{text}");
    let line = lines[2].split_whitespace().collect::<Vec<_>>();
    assert_eq!(line, ["log", "fd", &number.to_string(), path.to_str().unwrap(), "same"]);
    assert!(lines[3].contains("unverified: "), "{text}");

    // Something else has its number.
    let dup = ["call", "one", "dup2", "0", &number.to_string()];
    succeed(&test, &dup);
    let listed = succeed_json(&test, &["names", "one", "--json"]);
    let log = named(&listed, "log");
    assert_eq!((&log["state"], &log["number"]), (&json!("changed"), &json!(number)));
    assert_eq!(log["now"], "/dev/null");
    assert!(log["reason"].as_str().unwrap().contains("file"), "{log}");
    let error = fail(&test, 1, &["names", "one", "--release", "log"]);
    assert!(error.contains("forget"), "{error}");
    assert_eq!(succeed(&test, &["names", "one", "--forget", "log"]), "log: forgotten\n");
}

#[test]
fn what_has_no_name_is_listed_and_closed_if_that_is_asked_for() {
    let test = TestHome::new();
    start(&test, "one");
    let unnamed = keep(&test, "one");
    let fd = json!({ "number": unnamed, "now": "/dev/null" });
    let listed = succeed_json(&test, &["names", "one", "--unclaimed", "--json"]);
    assert_eq!(listed["unclaimed"], json!([fd]));
    let text = succeed(&test, &["names", "one", "--unclaimed"]);
    let line = text.lines().last().unwrap().split_whitespace().collect::<Vec<_>>();
    assert_eq!(line, ["-", "fd", &unnamed.to_string(), "/dev/null", "unclaimed"]);
    let done = succeed_json(&test, &["names", "one", "--close-unclaimed", "--json"]);
    assert_eq!(done, json!({ "released": [], "forgotten": [], "closed": [fd] }));
    let listed = succeed_json(&test, &["names", "one", "--unclaimed", "--json"]);
    assert_eq!(listed["unclaimed"], json!([]));
    let text = succeed(&test, &["names", "one", "--close-unclaimed"]);
    assert!(text.contains("nothing was closed"), "{text}");
    // What has a name is still there.
    assert_eq!(named(&listed, "log")["state"], "same");
}

#[test]
fn names_are_released_and_forgotten() {
    let test = TestHome::new();
    start(&test, "one");
    keep(&test, "one");
    let log = named(&succeed_json(&test, &["names", "one", "--json"]), "log")["number"].to_string();
    // Nothing is done if one of them is not there.
    let error = fail(&test, 1, &["names", "one", "--release", "log", "--release", "none"]);
    assert!(error.contains("\"none\"") && error.contains("nothing of that name"), "{error}");
    let release = ["names", "one", "--release", "memory", "--forget", "log", "--release", "bytes"];
    let text = succeed(&test, &release);
    assert_eq!(text, "memory: released\nbytes: released\nlog: forgotten\n");
    let done = succeed_json(&test, &["names", "one", "--forget", "worker", "--json"]);
    assert_eq!(done, json!({ "released": [], "forgotten": ["worker"], "closed": [] }));
    // It stays open when it is forgotten.
    assert_eq!(succeed(&test, &["call", "one", "fcntl", &log, "F_GETFD"]), "1\n");
    let listed = succeed_json(&test, &["names", "one", "--json"]);
    assert_eq!(listed, json!({ "names": [], "unclaimed": null, "holder": null }));
    let ran = super::command::run(&test, &["names", "one"]);
    assert_eq!((ran.status.code(), ran.stdout.as_str()), (Some(0), ""));
    assert!(ran.stderr.contains("nothing has a name"), "{ran:?}");
}

#[test]
fn a_name_with_what_a_terminal_obeys_is_one_line_of_text() {
    let test = TestHome::new();
    start(&test, "one");
    control(&test, "one", async |process| {
        process.keep_bytes("a\u{1b}[31m\nb \u{e4}", b"").await.unwrap();
    });
    let text = succeed(&test, &["names", "one"]);
    assert_eq!(text.lines().count(), 2, "{text:?}");
    assert!(text.contains("a\\u{1b}[31m\\nb \u{e4}  bytes"), "{text:?}");
}

#[test]
fn who_holds_the_process_is_told_and_can_be_taken_over_from() {
    const TEST: &str = "cli::names::who_holds_the_process_is_told_and_can_be_taken_over_from";
    if let Some(home) = role() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let name: Name = "one".parse().unwrap();
            let _process = attach(Home::at(home).place(&name)).await.unwrap();
            tell("attached");
            hear();
        });
        return;
    }
    let test = TestHome::new();
    start(&test, "one");
    keep(&test, "one");
    let before = succeed_json(&test, &["names", "one", "--json"]);
    let table = succeed(&test, &["names", "one"]);
    let mut holder = Role::start(TEST, test.path());
    assert_eq!(holder.told(), "attached");
    // It is only asked, and its holder goes on. All is known of it that was known before.
    let seen = succeed_json(&test, &["names", "one", "--json"]);
    assert_eq!(seen["holder"]["pid"], holder.pid());
    assert_eq!(seen["names"], before["names"]);
    let ran = run(&test, &["names", "one"]);
    assert!(ran.stderr.contains(&format!("one: held by pid {}", holder.pid())), "{ran:?}");
    assert_eq!(ran.stdout, table);
    for arguments in
        [&["names", "one", "--unclaimed"][..], &["names", "one", "--json", "--release", "log"]]
    {
        let error = fail(&test, 1, arguments);
        assert!(error.contains(&format!("held by pid {}", holder.pid())), "{error}");
    }
    let listed = succeed_json(&test, &["names", "one", "--take-over", "--json"]);
    assert_eq!(listed["names"].as_array().unwrap().len(), 4);
}

#[test]
fn what_can_not_be_is_an_error() {
    let test = TestHome::new();
    let error = fail(&test, 1, &["names", "none"]);
    assert!(error.contains("none.sock"), "{error}");
    start(&test, "one");
    for arguments in [
        &["names"][..],
        &["names", "one", "--unclaimed", "--close-unclaimed"],
        &["names", "one", "--unclaimed", "--release", "log"],
        &["names", "one", "--timeout", "soon"],
        &["names", "one", "--timeout", "-1"],
        &["names", "one", "--release"],
    ] {
        fail(&test, 2, arguments);
    }
}

#[test]
fn a_process_that_is_busy_is_waited_for_as_long_as_is_said() {
    let test = TestHome::new();
    let pid = start(&test, "one");
    let call = Running::start(&mut farcall(&test, &["call", "one", "pause"]));
    until("it is in the call", || blocked_in(pid) == Some(Sysno::pause as usize));
    // Its controller is gone, and it is still in the call.
    drop(call);
    let error = fail(&test, 1, &["names", "one", "--timeout", "0.05"]);
    assert!(error.contains("one.sock"), "{error}");
    let listed = succeed_json(&test, &["names", "one", "--take-over", "--json"]);
    assert_eq!(listed["names"], json!([]));
}

#[test]
fn names_of_any_size_are_read_while_a_controller_is_attached() {
    let test = TestHome::new();
    let pid = start(&test, "one");
    let names: Vec<String> = (0..10).map(|n| format!("bytes {n}")).collect();
    let size = |n: usize| 60_000 + n;
    control(&test, "one", async |process| {
        for (n, name) in names.iter().enumerate() {
            process.keep_bytes(name, &vec![n as u8; size(n)]).await.unwrap();
        }
        let fd = process.openat(None, "/dev/null", OFlag::O_RDONLY, Mode::empty()).await.unwrap();
        process.keep_fd("null", &fd).await.unwrap();
        let place = test.home.place(&"one".parse().unwrap());
        let seen = names_of(&place, LIMIT).await.unwrap();
        assert_eq!(seen.holder.unwrap().0, Some(std::process::id() as i32));
        let told: Vec<&str> = seen.names.iter().map(|name| name.name.as_str()).collect();
        assert_eq!(told[..10], names.iter().map(String::as_str).collect::<Vec<_>>());
        for (n, name) in seen.names[..10].iter().enumerate() {
            assert_eq!((name.size, &name.kind), (Some(size(n) as u64), &Kind::Bytes));
        }
        let null = &seen.names[10];
        assert_eq!((null.name.as_str(), null.state.clone()), ("null", Sameness::Same));
        // Something else has its number: that is seen in the process's /proc.
        let number = null.value as i32;
        let stolen = process.openat(None, "/", OFlag::O_PATH, Mode::empty()).await.unwrap();
        let args = [stolen.number() as u64, number as u64, 0, 0, 0, 0];
        process.syscall(Sysno::dup3, args).await.unwrap();
        let null = names_of(&place, LIMIT).await.unwrap().names.swap_remove(10);
        assert!(matches!(null.state, Sameness::Changed(_)), "{null:?}");
        assert_eq!(null.now.as_deref(), Some("/"));
        assert_eq!(process.getpid().await.unwrap(), pid);
        process.forget("null").await.unwrap();
        let _ = (fd.into_raw(), stolen.into_raw());
    });
}
