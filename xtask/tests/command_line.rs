//! `cargo xtask`, with a cargo and an apt-get that only pretend.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

const TOOLS: [&str; 6] = ["git", "gzip", "readelf", "strace", "tar", "unshare"];

/// A folder that is all of PATH.
struct Programs(TempDir);

impl Programs {
    fn new(cargo: &str) -> Self {
        let programs = Self(tempfile::tempdir().unwrap());
        programs.put("cargo", cargo);
        programs
    }

    fn put(&self, name: &str, script: &str) {
        let file = self.0.path().join(name);
        fs::write(&file, format!("#!/bin/sh\ncd {:?} || exit 9\n{script}\n", self.0.path()))
            .unwrap();
        fs::set_permissions(file, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn with_tools(self) -> Self {
        TOOLS.iter().for_each(|tool| self.put(tool, ""));
        self
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.0.path().join(name)).unwrap_or_default()
    }

    fn xtask(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_xtask"))
            .args(arguments)
            .env("PATH", self.0.path())
            .env("CARGO", self.0.path().join("cargo"))
            .env_remove("XDG_RUNTIME_DIR")
            .env("FARCALL_DIR", self.0.path().join("sockets"))
            .output()
            .unwrap()
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn help_is_printed_when_it_is_asked_for() {
    for arguments in
        [&["--help"][..], &["-h"], &["help"], &["test", "--help"], &["kernels", "--help"]]
    {
        let output = Programs::new("exit 7").xtask(arguments);
        assert_eq!(output.status.code(), Some(0));
        assert!(text(&output.stdout).contains("Usage: cargo xtask COMMAND"));
    }
}

#[test]
fn a_command_line_without_sense_ends_with_2() {
    for arguments in [&[][..], &["tets"], &["test", "all"], &["test", "--all"], &["--frobnicate"]] {
        let output = Programs::new("exit 7").xtask(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert_eq!(text(&output.stdout), "", "{arguments:?}");
        assert!(text(&output.stderr).contains("help"), "{arguments:?}");
    }
}

/// The arguments of each cargo that a plain `cargo xtask test` runs.
const RUNS: usize = 6;

#[test]
fn all_targets_the_documentation_and_the_models_are_tested() {
    let programs = Programs::new("echo \"$@\" >> runs").with_tools();
    let output = programs.xtask(&["test"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let runs = programs.read("runs");
    assert!(
        runs.contains("test --workspace --exclude xtask --features=farcall/faults --all-targets"),
        "{runs}"
    );
    assert!(runs.contains("test --workspace --features=farcall/faults --doc"), "{runs}");
    assert!(runs.contains("test --manifest-path models/Cargo.toml"), "{runs}");
    // Those of this package, one by one: each file is one.
    for entry in fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests")).unwrap() {
        let file = entry.unwrap().file_name().into_string().unwrap();
        let Some(name) = file.strip_suffix(".rs") else { continue };
        let its = format!("--test {name}");
        let is_its = |run: &&str| run.starts_with("test --package xtask") && run.ends_with(&its);
        assert_eq!(runs.lines().filter(is_its).count(), 1, "{name}: {runs}");
    }
    assert_eq!(runs.lines().count(), RUNS);
    assert!(text(&output.stdout).contains("they left nothing behind\n"), "{output:?}");
}

#[test]
fn a_group_is_run_when_it_is_asked_for_and_its_absence_is_told() {
    let programs = Programs::new("echo \"$@\" >> runs").with_tools();
    let told = text(&programs.xtask(&["test"]).stdout);
    let last: Vec<&str> = told.lines().rev().take(2).collect();
    for (group, line) in ["long", "places"].into_iter().zip(last) {
        assert!(line.contains(&format!("`cargo xtask test --{group}`")), "{told}");
    }
    assert!(!programs.read("runs").contains("--ignored"));
    for (groups, expected) in [
        (&["--long"][..], &["long"][..]),
        (&["--places"], &["places"]),
        (&["--places", "--long"], &["places", "long"]),
    ] {
        let programs = Programs::new("echo \"$@\" >> runs").with_tools();
        ["crun", "podman", "runc", "runsc"].iter().for_each(|tool| programs.put(tool, ""));
        let output = programs.xtask(&[&["test"], groups].concat());
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let expected: String = expected
            .iter()
            .map(|group| {
                let suite = "test --package farcall --features=farcall/faults --test suite --";
                format!("{suite} --ignored --show-output {group}::\n")
            })
            .collect();
        assert_eq!(programs.read("runs"), expected);
    }
    let programs = Programs::new("exit 1").with_tools();
    assert_eq!(programs.xtask(&["test", "--long"]).status.code(), Some(1));
}

#[test]
fn a_run_that_fails_is_a_failure_and_the_others_are_made() {
    for failing in ["--all-targets", "--doc", "models/Cargo.toml", "package xtask --test package"] {
        let script = format!("echo \"$@\" >> runs; case \"$*\" in *'{failing}'*) exit 3;; esac");
        let programs = Programs::new(&script).with_tools();
        let output = programs.xtask(&["test"]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(text(&output.stderr).contains(failing), "{output:?}");
        assert_eq!(programs.read("runs").lines().count(), RUNS);
    }
}

#[test]
fn what_runs_beside_the_others_is_printed_as_a_whole_when_it_has_ended() {
    // The models say something, and the others go on only when they have said it; what has ended
    // is told between what the others print.
    let script = "case \"$*\" in
        *models*) echo first; echo second >&2; : > told;;
        *--all-targets*) until [ -e told ]; do :; done; echo third;;
    esac";
    let output = Programs::new(script).with_tools().xtask(&["test"]);
    assert!(output.status.success(), "{output:?}");
    let told = text(&output.stdout);
    assert!(
        told.contains("models/Cargo.toml --target-dir target/loom:\nfirst\nsecond\n"),
        "{told}"
    );
    assert!(told.contains("third\n"), "{told}");
}

#[test]
fn what_is_missing_is_named_where_it_can_not_be_installed() {
    let programs = Programs::new("echo \"$@\" >> runs").with_tools();
    fs::remove_file(programs.0.path().join("readelf")).unwrap();
    let output = programs.xtask(&["test"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let error = text(&output.stderr);
    assert!(error.contains("readelf"), "{error}");
    assert!(error.ends_with("apt-get install --no-install-recommends binutils\n"), "{error}");
    assert_eq!(programs.read("runs"), "", "nothing is tested without them");
}

#[test]
fn root_gets_what_is_missing_from_apt_and_nothing_else() {
    let programs = Programs::new("").with_tools();
    programs.put("apt-get", "echo \"$@\" >> apt; echo '#!/bin/sh' > strace; /bin/chmod 755 strace");
    assert!(programs.xtask(&["test"]).status.success());
    assert_eq!(programs.read("apt"), "", "there is nothing to install");

    fs::remove_file(programs.0.path().join("strace")).unwrap();
    let output = programs.xtask(&["test"]);
    if nix::unistd::geteuid().is_root() {
        assert!(output.status.success(), "{output:?}");
        assert_eq!(programs.read("apt"), "update\ninstall -y --no-install-recommends strace\n");
    } else {
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert_eq!(programs.read("apt"), "");
    }
}

#[test]
fn an_apt_that_fails_is_a_failure() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let programs = Programs::new("");
    programs.put("apt-get", "exit 100");
    let output = programs.xtask(&["test"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("apt-get update failed"), "{output:?}");
}

#[test]
fn a_process_that_was_left_behind_is_a_failure() {
    let script = "case \"$*\" in *--doc*) /bin/sleep 1000 >&- 2>&- & echo $! > orphan;; esac";
    let programs = Programs::new(script).with_tools();
    let output = programs.xtask(&["test"]);
    let orphan: i32 = programs.read("orphan").trim().parse().unwrap();
    kill(Pid::from_raw(orphan), Signal::SIGKILL).unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let error = text(&output.stderr);
    assert!(error.contains(&format!("left behind: process {orphan}, sleep")), "{error}");
}

#[test]
fn a_file_that_was_left_behind_is_a_failure() {
    for place in ["\"$TMPDIR\"", "sockets"] {
        let script = format!("/bin/mkdir -p {place} && : > {place}/forgotten");
        let output = Programs::new(&script).with_tools().xtask(&["test"]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let error = text(&output.stderr);
        assert!(error.contains("left behind: file"), "{error}");
        assert!(error.contains("forgotten"), "{error}");
    }
}
