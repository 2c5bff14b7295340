//! `farcall image` and `farcall demo`, and what holds for all commands.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};

use farcall::abi::wire::{REQUEST_SIZE, RESULT_SIZE, Request};
use farcall::calls::Sysno;
use farcall::image::{IMAGE, entries};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::Value;

use super::command::{Running, fail, farcall, json, keys, start, succeed, succeed_json};
use crate::common::{LIMIT, TestHome, alive, until};

/// Killed when the test is over.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until there is something to read.
fn readable(pipe: &impl AsFd) {
    let limit = PollTimeout::try_from(LIMIT).unwrap();
    let ready = poll(&mut [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)], limit);
    assert_eq!(ready, Ok(1), "still no answer after {LIMIT:?}");
}

#[test]
fn the_image_is_an_executable_that_serves_on_its_standard_streams() {
    let test = TestHome::new();
    let file = test.file("server");
    let printed = succeed(&test, &["image", "-o", file.to_str().unwrap()]);
    assert!(printed.contains(file.to_str().unwrap()), "{printed}");
    assert_eq!(fs::read(&file).unwrap(), IMAGE);
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o755);

    let mut command = Command::new(&file);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut server = Server(command.spawn().unwrap());
    let mut stdin = server.0.stdin.take().unwrap();
    let request: [u8; REQUEST_SIZE] = Request::syscall(Sysno::getpid as u32, [0; 6]).to_bytes();
    stdin.write_all(&request).unwrap();
    let mut result = [0; RESULT_SIZE];
    let mut stdout = server.0.stdout.take().unwrap();
    readable(&stdout);
    stdout.read_exact(&mut result).unwrap();
    assert_eq!(i64::from_le_bytes(result), i64::from(server.0.id()));
    // At the end of input it ends.
    drop(stdin);
    until("it ends", || server.0.try_wait().unwrap().is_some());
    assert_eq!(server.0.wait().unwrap().code(), Some(0));
}

#[test]
fn the_image_is_described_in_documented_keys() {
    let test = TestHome::new();
    let image = succeed_json(&test, &["image", "--json"]);
    assert_eq!(keys(&image), ["entries", "file", "sha256", "size", "version"]);
    assert_eq!(image["size"], IMAGE.len());
    assert_eq!(image["version"], entries().version);
    assert_eq!(image["file"], Value::Null);
    let named = &image["entries"];
    assert_eq!(keys(named), ["raw_syscall", "resume", "serve", "serve_persistent", "trampoline"]);
    assert_eq!(named["serve"], entries().serve);
    assert_eq!(named["raw_syscall"], entries().raw_syscall);

    // The sum is that of the file, as sha256sum has it.
    let file = test.file("server");
    let file = file.to_str().unwrap();
    let written = succeed_json(&test, &["image", "--json", "--output", file]);
    assert_eq!(written["file"], file);
    let sum = Command::new("sha256sum").arg(file).output().unwrap();
    let sum = String::from_utf8(sum.stdout).unwrap();
    assert_eq!(written["sha256"].as_str(), sum.split_whitespace().next());
    assert!(succeed(&test, &["image"]).contains(written["sha256"].as_str().unwrap()));
}

#[test]
fn an_image_that_cannot_be_written_is_an_error() {
    let test = TestHome::new();
    let file = test.file("missing").join("server");
    let error = fail(&test, 1, &["image", "-o", file.to_str().unwrap()]);
    assert!(error.contains(file.to_str().unwrap()), "{error}");
}

/// Runs the demo in a temporary directory that has to be empty afterwards.
fn demo(test: &TestHome, arguments: &[&str]) -> String {
    let temporary = test.file("temporary");
    fs::create_dir(&temporary).unwrap();
    let mut command = farcall(test, arguments);
    let ran = Running::start(command.env("TMPDIR", &temporary)).finish();
    assert_eq!(ran.status.code(), Some(0), "{ran:?}");
    assert_eq!(ran.stderr, "");
    assert_eq!(fs::read_dir(&temporary).unwrap().count(), 0, "files are left behind");
    ran.stdout
}

/// All that follows the word "pid" in what the demo says of its steps.
fn pids(text: &str) -> Vec<i32> {
    let pids = text.split("pid ").skip(1);
    let digits = pids.map(|rest| rest.split(|c: char| !c.is_ascii_digit()).next().unwrap());
    digits.filter_map(|digits| digits.parse().ok()).collect()
}

/// What README shows of the demo.
fn shown_demo() -> String {
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let mut blocks = readme.split("```text\n").filter_map(|rest| rest.split("```").next());
    blocks.find(|block| block.contains(" ms  ")).unwrap().to_owned()
}

/// The steps that are told, without how long they took and what was checked.
fn steps(text: &str) -> Vec<&str> {
    let step = |line| str::split_once(line, " ms  ")?.1.split("  ").next();
    text.lines().filter_map(step).collect()
}

#[test]
fn the_demo_succeeds_and_leaves_nothing_behind() {
    let test = TestHome::new();
    fs::create_dir(test.path()).unwrap();
    fs::set_permissions(test.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let printed = demo(&test, &["demo"]);
    assert!(printed.lines().count() > 10, "{printed}");
    assert_eq!(steps(&printed), steps(&shown_demo()), "what README shows of it");
    let pids = pids(&printed);
    // The process and its child at least.
    assert!(pids.len() >= 2, "{printed}");
    for pid in pids {
        assert!(!alive(pid), "pid {pid} is left behind: {printed}");
    }
    assert_eq!(fs::read_dir(test.path()).unwrap().count(), 0);
}

#[test]
fn the_demo_as_json_is_one_array_and_nothing_else() {
    let test = TestHome::new();
    let steps = json(&demo(&test, &["demo", "--json"]));
    let steps = steps.as_array().unwrap();
    assert!(steps.len() > 10, "{steps:?}");
    for step in steps {
        assert_eq!(keys(step), ["checked", "ms", "step"]);
        assert!(step["step"].is_string() && step["checked"].is_string(), "{step}");
        assert!(step["ms"].as_f64().is_some_and(|ms| ms >= 0.0), "{step}");
        for pid in pids(step["checked"].as_str().unwrap()) {
            assert!(!alive(pid), "pid {pid} is left behind: {step}");
        }
    }
    // The directory, which was not there before, is not there now.
    assert!(!test.path().exists());
}

#[test]
fn an_output_that_nobody_reads_is_no_panic() {
    let test = TestHome::new();
    start(&test, "one");
    for arguments in [
        &["ls"][..],
        &["ls", "--json"],
        &["call", "one", "getpid"],
        &["call", "one", "uname", "@390", "--json"],
        &["names", "one", "--json"],
        &["upgrade", "one"],
        &["upgrade", "one", "--json"],
        &["image"],
        &["image", "--json"],
        &["start", "two"],
        &["stop", "two"],
        &["--help"],
        &["--version"],
        &["call", "--help"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let command = &mut farcall(&test, arguments);
        let ran = Running::start_into(writer.into(), command).finish();
        assert_eq!(ran.status.code(), Some(0), "{arguments:?}: {ran:?}");
        assert_eq!(ran.stderr, "", "{arguments:?}");
    }
    assert_eq!(fs::read_dir(test.path()).unwrap().count(), 2, "\"two\" was started and stopped");
}

#[test]
fn every_command_has_a_help_text_and_the_hidden_ones_are_not_listed() {
    let test = TestHome::new();
    let help = succeed(&test, &["--help"]);
    let all = [
        "demo", "start", "ls", "call", "log", "names", "stop", "restore", "upgrade", "image",
        "torture", "bench",
    ];
    for command in all {
        assert!(help.contains(&format!("\n  {command}")), "{command}: {help}");
        let own = succeed(&test, &[command, "--help"]);
        assert!(own.contains("--json"), "{command}: {own}");
    }
    assert!(!help.contains("demo-") && !help.contains("bench-"), "{help}");
    assert!(help.contains("FARCALL_DIR"), "{help}");
    assert_eq!(
        succeed(&test, &["--version"]),
        concat!("farcall ", env!("CARGO_PKG_VERSION"), "\n")
    );
}

#[test]
fn bench_prints_one_array_and_draws_what_has_a_baseline() {
    let test = TestHome::new();
    let picture = test.file("bench.svg");
    let arguments = ["bench", "--json", "--only", "calls", "--svg", picture.to_str().unwrap()];
    let ran = super::command::run(&test, &arguments);
    assert_eq!(ran.status.code(), Some(0), "{ran:?}");
    assert_eq!(ran.stderr, "", "progress is for terminals");
    let rows = json(&ran.stdout);
    let rows = rows.as_array().unwrap();
    let svg = fs::read_to_string(&picture).unwrap();
    assert!(svg.starts_with("<svg"), "{svg}");
    assert!(!rows.is_empty());
    for row in rows {
        assert_eq!(keys(row), ["baseline", "baseline_value", "name", "ratio", "unit", "value"]);
        let number = |key: &str| row[key].as_f64().unwrap();
        let ratio = number("value") / number("baseline_value");
        assert!((number("ratio") / ratio - 1.0).abs() < 1e-9, "{row}");
        assert!(svg.contains(row["name"].as_str().unwrap()), "{row}");
    }
}
