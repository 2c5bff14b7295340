//! `farcall call`.

use std::fs;

use farcall::calls::Sysno;
use farcall::persist::{Home, Name, attach};
use serde_json::{Value, json};

use super::command::{
    Running, fail, farcall, json as parsed, keys, run, start, succeed, succeed_json,
};
use crate::common::{Role, TestHome, blocked_in, fds, role, tell, until};

/// What a call prints, as a number.
#[track_caller]
fn number(test: &TestHome, arguments: &[&str]) -> i64 {
    let printed = succeed(test, &[&["call"], arguments].concat());
    printed.trim_end().parse().unwrap_or_else(|error| panic!("{error}: {printed:?}"))
}

#[test]
fn a_call_is_made_in_the_process_by_name_or_number() {
    let test = TestHome::new();
    let pid = i64::from(start(&test, "one"));
    assert_eq!(number(&test, &["one", "getpid"]), pid);
    assert_eq!(number(&test, &["one", &Sysno::getpid.id().to_string()]), pid);
}

#[test]
fn numbers_are_written_as_in_c() {
    let test = TestHome::new();
    start(&test, "one");
    // Each call tells what the one before has set.
    number(&test, &["one", "umask", "0x12"]);
    for (next, last) in [("0o027", 0x12), ("0033", 0o27), ("0b101", 0o33), ("9", 0b101), ("0", 9)] {
        assert_eq!(number(&test, &["one", "umask", next]), last, "before {next}");
    }
    // A negative one is no option.
    assert!(fail_call(&test, &["one", "close", "-1"]).starts_with("EBADF"));
}

/// A call that has to fail: what it prints.
#[track_caller]
fn fail_call(test: &TestHome, arguments: &[&str]) -> String {
    let ran = run(test, &[&["call"], arguments].concat());
    assert_eq!(ran.status.code(), Some(1), "{ran:?}");
    assert_eq!(ran.stderr, "");
    ran.stdout
}

#[test]
fn what_would_take_a_descriptor_from_the_server_is_refused() {
    let test = TestHome::new();
    let pid = start(&test, "one");
    let refused = |arguments: &[&str]| {
        let error = fail(&test, 1, &[&["call", "one"], arguments].concat());
        assert!(error.contains("the server itself runs on"), "{arguments:?}: {error}");
    };
    // The listener or one of its duplicates: it has nothing else but the standard streams.
    let own = *fds(pid).keys().find(|number| **number > 2).unwrap();
    let high = (0x1_0000_0000 + i64::from(own)).to_string();
    let own = own.to_string();
    for close in [&["close", &own][..], &["close", &high], &["dup2", "0", &own]] {
        refused(close);
    }
    refused(&["dup3", "0", &own, "O_CLOEXEC"]);
    refused(&["close_range", "3", "4294967295", "0"]);
    refused(&["close_range", "0", "0xffffffff", "0"]);
    refused(&["close_range", &own, &own]);
    // CLOSE_RANGE_UNSHARE is 2, and CLOSE_RANGE_CLOEXEC, which closes nothing, 4.
    refused(&["close_range", "3", "4294967295", "2"]);
    assert_eq!(number(&test, &["one", "close_range", "3", "4294967295", "4"]), 0);
    assert_eq!(number(&test, &["one", "close_range", "100", "4294967295", "0"]), 0);
    assert_eq!(number(&test, &["one", "dup2", "0", "100"]), 100);
    assert_eq!(number(&test, &["one", "getpid"]), i64::from(pid));
}

#[test]
fn constants_strings_and_buffers_are_arguments() {
    let test = TestHome::new();
    start(&test, "one");
    let file = test.file("42");
    fs::write(&file, "hello world").unwrap();
    let path = file.to_str().unwrap();
    let fd = number(&test, &["one", "openat", "AT_FDCWD", path, "O_RDWR|O_CLOEXEC"]).to_string();
    // FD_CLOEXEC is 1.
    assert_eq!(number(&test, &["one", "fcntl", &fd, "F_GETFD"]), 1);

    let read = succeed(&test, &["call", "one", "read", &fd, "@16", "16"]);
    assert_eq!(read, "11\nargument 2: \"hello world\"\n");
    // As many bytes as the call has filled, not as the buffer has.
    let read = succeed(&test, &["call", "one", "pread64", &fd, "@0x100", "5", "6"]);
    assert_eq!(read, "5\nargument 2: \"world\"\n");

    // In quotes a number, and bytes that can't be typed.
    let directory = file.parent().unwrap().to_str().unwrap();
    let at = number(&test, &["one", "openat", "AT_FDCWD", directory, "O_PATH"]).to_string();
    let same = number(&test, &["one", "openat", &at, "\"42\"", "O_WRONLY | O_TRUNC"]).to_string();
    let written = number(&test, &["one", "write", &same, r#""a\n\"\\\x00\xff""#, "6"]);
    assert_eq!(written, 6);
    assert_eq!(fs::read(&file).unwrap(), b"a\n\"\\\0\xff");
}

#[test]
fn a_buffer_that_no_count_tells_of_is_printed_as_a_whole() {
    let test = TestHome::new();
    start(&test, "one");
    let printed = succeed(&test, &["call", "one", "uname", "@390"]);
    assert!(printed.starts_with("0\nargument 1: \"Linux\\x00"), "{printed}");
    assert!(printed.ends_with(" zero bytes\n"), "{printed}");
    let printed = succeed_json(&test, &["call", "--json", "one", "pipe2", "@8", "O_CLOEXEC"]);
    let hex = printed["buffers"][0]["hex"].as_str().unwrap();
    assert_eq!(hex.len(), 16, "{printed}");
    assert_ne!(hex, "0000000000000000");
}

#[test]
fn json_may_be_asked_for_anywhere() {
    let test = TestHome::new();
    let pid = start(&test, "one");
    for arguments in [
        ["call", "--json", "one", "getpid"],
        ["call", "one", "--json", "getpid"],
        ["call", "one", "getpid", "--json"],
    ] {
        let printed = succeed_json(&test, &arguments);
        assert_eq!(
            printed,
            json!({ "call": "getpid", "result": pid, "errno": null, "error": null, "buffers": [] }),
            "{arguments:?}"
        );
    }
    fs::write(test.file("file"), b"text\xff").unwrap();
    let path = test.file("file");
    let fd = number(&test, &["one", "openat", "AT_FDCWD", path.to_str().unwrap(), "O_RDONLY"]);
    for (size, text) in [("4", json!("text")), ("5", Value::Null)] {
        let fd = fd.to_string();
        let printed = succeed_json(
            &test,
            &["call", "one", "pread64", &fd, &format!("@{size}"), size, "0", "--json"],
        );
        let buffer = &printed["buffers"][0];
        assert_eq!(keys(buffer), ["argument", "hex", "text"]);
        assert_eq!(buffer["argument"], 2);
        assert_eq!(buffer["text"], text);
        assert_eq!(buffer["hex"], &"74657874ff"[..2 * size.parse::<usize>().unwrap()]);
    }
}

#[test]
fn a_call_that_fails_names_its_errno_and_exits_with_1() {
    let test = TestHome::new();
    start(&test, "one");
    let missing = ["one", "openat", "AT_FDCWD", "/nonexistent/file", "O_RDONLY"];
    assert_eq!(fail_call(&test, &missing), "ENOENT (No such file or directory)\n");
    let ran = run(&test, &[&["call", "--json"], &missing[..]].concat());
    assert_eq!(ran.status.code(), Some(1));
    assert_eq!(
        parsed(&ran.stdout),
        json!({
            "call": "openat",
            "result": -2,
            "errno": "ENOENT",
            "error": "No such file or directory",
            "buffers": [],
        })
    );
    // The process serves on.
    number(&test, &["one", "getpid"]);
}

#[test]
fn a_command_line_that_is_wrong_exits_with_2_and_calls_nothing() {
    let test = TestHome::new();
    start(&test, "one");
    number(&test, &["one", "umask", "7"]);
    for arguments in [
        &["call"][..],
        &["call", "one"],
        &["call", "one", "no_such_call"],
        &["call", "one", "999999"],
        &["call", "one", "umask", "O_RDOLNY"],
        &["call", "one", "umask", "O_RDONLY|O_RDOLNY"],
        &["call", "one", "umask", "12monkeys"],
        &["call", "one", "umask", "@"],
        &["call", "one", "umask", "@-1"],
        &["call", "one", "umask", "\"never ends"],
        &["call", "one", "umask", r#""\q""#],
        &["call", "one", "umask", "1", "2", "3", "4", "5", "6", "7"],
        &["no-such-command"],
        &["ls", "--no-such-option"],
        &[],
    ] {
        fail(&test, 2, arguments);
    }
    assert_eq!(number(&test, &["one", "umask", "0"]), 7);
}

#[test]
fn a_process_that_is_not_there_is_an_error_that_says_so() {
    let test = TestHome::new();
    let error = fail(&test, 1, &["call", "none", "getpid"]);
    assert!(error.contains("none.sock"), "{error}");
    assert!(error.contains("there is no such persistent process"), "{error}");
}

#[test]
fn a_call_that_ends_the_process_says_that_it_did_not_return() {
    let test = TestHome::new();
    let pid = start(&test, "one");
    let error = fail(&test, 1, &["call", "one", "exit_group", "3"]);
    assert!(error.contains("exit_group did not return"), "{error}");
    until("it is gone", || !crate::common::alive(pid));
}

#[test]
fn a_call_into_a_process_that_another_controller_holds_names_that_one() {
    const TEST: &str =
        "cli::call::a_call_into_a_process_that_another_controller_holds_names_that_one";
    if let Some(path) = role() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let name: Name = "one".parse().unwrap();
            let _process = attach(Home::at(path).place(&name)).await.unwrap();
            tell("attached");
            std::future::pending::<()>().await;
        });
    }
    let test = TestHome::new();
    let pid = start(&test, "one");
    let mut holder = Role::start(TEST, test.path());
    assert_eq!(holder.told(), "attached");
    for arguments in
        [&["call", "one", "getpid"][..], &["call", "--json", "one", "getpid"], &["stop", "one"]]
    {
        let error = fail(&test, 1, arguments);
        assert!(error.contains(&format!("held by pid {}", holder.pid())), "{error}");
    }
    assert_eq!(succeed_json(&test, &["ls", "--json"])[0]["state"], "attached");
    // With the holder's death it can be called again.
    holder.kill();
    assert_eq!(number(&test, &["one", "getpid"]), i64::from(pid));
}

#[test]
fn a_process_that_is_blocked_can_be_ended_by_force() {
    let test = TestHome::new();
    let pid = start(&test, "one");
    let call = Running::start(&mut farcall(&test, &["call", "one", "pause"]));
    until("it is in the call", || blocked_in(pid) == Some(Sysno::pause as usize));
    let error = fail(&test, 1, &["stop", "one"]);
    assert!(error.contains(&call.pid().to_string()), "{error}");
    assert!(error.contains("farcall stop --kill one"), "{error}");
    assert_eq!(succeed(&test, &["stop", "--kill", "one"]), "one: stopped\n");
    let ran = call.finish();
    assert_eq!(ran.status.code(), Some(1), "{ran:?}");
    assert!(ran.stderr.contains("pause did not return"), "{ran:?}");
}

#[test]
fn what_is_no_name_and_no_number_is_told_as_what_it_is() {
    let test = TestHome::new();
    start(&test, "one");
    for (call, told) in [
        ("openta", "did you mean openat"),
        ("raed", "did you mean read"),
        ("recv", "recvfrom"),
        ("xyzzy", "xyzzy is no system call of this architecture\n"),
        ("999999", "999999 is too large"),
        ("99999999999999999999999", "is too large"),
        ("12monkeys", "neither the number of a system call nor the name"),
    ] {
        let message = fail(&test, 2, &["call", "one", call]);
        assert!(message.contains(told), "{call}: {message}");
    }
    for (argument, told) in [
        ("O_RDOLNY", "did you mean O_RDONLY?"),
        ("O_RDWR|O_CLOEXCE", "did you mean O_CLOEXEC?"),
        ("18446744073709551616", "18446744073709551616 is too large"),
        ("-9223372036854775809", "is too large"),
        ("0x10000000000000000", "is too large"),
        ("O_RDONLY|18446744073709551616", "18446744073709551616 is too large"),
        ("@2147483648", "up to 2^30"),
    ] {
        let message = fail(&test, 2, &["call", "one", "umask", argument]);
        assert!(message.contains(told), "{argument}: {message}");
    }
}

#[test]
fn an_argument_has_the_names_of_its_place_and_a_wrong_one_is_answered_with_the_usage() {
    let test = TestHome::new();
    start(&test, "one");
    // A name that is none of the general constants.
    assert_eq!(
        fail_call(&test, &["one", "fcntl", "77", "F_SETOWN_EX"]),
        "EBADF (Bad file number)\n"
    );
    let message = fail(&test, 2, &["call", "one", "openat", "AT_FDCWD", "/", "O_RDOLNY"]);
    assert!(message.contains("did you mean O_RDONLY?"), "{message}");
    assert!(message.contains("usage: openat(dirfd, pathname, flags[, mode])"), "{message}");
    assert!(message.contains("flags: O_RDONLY O_WRONLY"), "{message}");
}
