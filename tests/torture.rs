//! `farcall torture` finds nothing, comes to every point at which a controller can die, and finds what is
//! wrong when something is.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::common::with_mutant;
use crate::image::workshop::Server;
use crate::judge;

/// What must be zero.
const FAILURES: [&str; 5] =
    ["lost", "duplicated", "leaked_fds", "unaccounted_children", "mismatched"];

/// What a run has told.
struct Told {
    code: Option<i32>,
    last: Value,
    /// How often a controller has died at which point.
    points: BTreeMap<String, u64>,
    stderr: String,
}

impl Told {
    fn number(&self, key: &str) -> u64 {
        self.last[key].as_u64().unwrap_or_else(|| panic!("{key} is no number: {}", self.last))
    }
}

/// Tortures in a directory for temporary files of its own, and sees that nothing is left there.
fn torture(arguments: &[&str], change: impl FnOnce(&mut Command, &Path)) -> Told {
    let directory = tempfile::tempdir().unwrap();
    let temporary = directory.path().join("temporary");
    fs::create_dir(&temporary).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_farcall"));
    command.arg("torture").args(arguments).arg("--json").env("TMPDIR", &temporary);
    change(&mut command, directory.path());
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert_eq!(fs::read_dir(&temporary).unwrap().count(), 0, "something is left");
    let stdout = String::from_utf8(output.stdout).unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<Value> =
        stdout.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let (last, points) = lines.split_last().unwrap_or_else(|| panic!("no lines: {stderr}"));
    let points = points
        .iter()
        .map(|line| (line["point"].as_str().unwrap().into(), line["died"].as_u64().unwrap()))
        .collect();
    Told { code: output.status.code(), last: last.clone(), points, stderr }
}

/// Kills that many controllers, and nothing must have come of it.
pub fn nothing_is_lost_or_doubled(kills: u64, seed: u64) {
    let told = torture(&["--kills", &kills.to_string(), "--seed", &seed.to_string()], |_, _| {});
    println!("{}", told.last);
    let mut keys: Vec<&str> = told.last.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    let mut expected = [&FAILURES[..], &["seed", "kills", "calls"]].concat();
    expected.sort_unstable();
    assert_eq!(keys, expected);
    for key in FAILURES {
        assert_eq!(told.number(key), 0, "{key}: {}\n{}", told.last, told.stderr);
    }
    assert_eq!((told.code, told.number("seed")), (Some(0), seed));
    assert!(told.number("kills") >= kills && told.number("calls") > kills, "{}", told.last);
    // Without the feature there are none, and controllers die at random instants alone.
    assert_eq!(told.points.is_empty(), !cfg!(feature = "faults"));
    let missed: Vec<&String> =
        told.points.iter().filter(|(_, died)| **died == 0).map(|(point, _)| point).collect();
    assert!(missed.is_empty(), "no controller has died at {missed:?}");
}

#[test]
fn nothing_is_lost_or_doubled_wherever_a_controller_dies() {
    nothing_is_lost_or_doubled(80, 1);
}

/// Something that is wrong is found: if not by one run, which is short, by one of some.
#[track_caller]
fn is_found(kills: &str, expected: &[&str], change: impl Fn(&mut Command, &Path)) {
    let mut all = Vec::new();
    for seed in 1..=10 {
        let told = torture(&["--kills", kills, "--seed", &seed.to_string()], &change);
        if expected.iter().any(|key| told.number(key) > 0) {
            assert_eq!(told.code, Some(1), "{}", told.last);
            return;
        }
        all.push(told.last);
    }
    panic!("nothing of {expected:?} in {all:?}");
}

#[test]
#[cfg_attr(not(feature = "faults"), ignore = "needs --features faults")]
fn a_reconnect_that_does_not_look_into_the_log_is_found() {
    is_found("20", &["lost"], |command, _| {
        with_mutant(command, "no-log");
    });
}

#[test]
#[cfg_attr(not(feature = "faults"), ignore = "needs --features faults")]
fn a_reconnect_that_sends_again_after_another_controller_is_found() {
    is_found("20", &["duplicated", "mismatched"], |command, _| {
        with_mutant(command, "send-again");
    });
}

#[test]
#[cfg_attr(not(feature = "faults"), ignore = "needs --features faults")]
fn a_take_over_without_new_memory_is_found() {
    is_found("10", &["duplicated"], |command, directory| {
        let memory = directory.join("memory");
        with_mutant(command, &format!("same-memory={}", memory.display()));
    });
}

pub const ENTERS_LATE: Server = Server::that_replaces(
    "enters-late",
    &[
        ["stream.rs", "        self.prepared.enter(&self.state.log, result);\n", ""],
        [
            "serve.rs",
            "        let word = self.state.request.word;\n        if word >> Word::bits(version) != 0 {\n            return EINVAL;",
            "        self.prepared.enter(&self.state.log, earlier(&self.state.log, 1));\n        let word = self.state.request.word;\n        if word >> Word::bits(version) != 0 {\n            return EINVAL;",
        ],
        ["registry.rs", "self.call == log.calls", "self.call + 1 == log.calls"],
    ],
);

#[test]
fn a_server_that_enters_a_name_after_its_call_counts_is_found() {
    let image = judge::judge(ENTERS_LATE.linked()).expect("it is accepted");
    is_found("20", &["leaked_fds", "mismatched"], |command, directory| {
        let file = directory.join("image");
        fs::write(&file, &image).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o700)).unwrap();
        command.arg("--image").arg(file);
    });
}
