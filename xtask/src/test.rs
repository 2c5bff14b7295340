//! `cargo xtask test`.

use std::env;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::reap::{self, Lane, Run};
use crate::residue::Before;
use crate::tools::{self, Tool};

/// Tests that need fault points are ignored without this.
const FAULTS: &str = "--features=farcall/faults";

/// Tests of every target but those of this package, then those in the documentation, which
/// `--all-targets` leaves out, then this package's, which look for what tests anywhere leave behind.
const MAIN: [&[&str]; 4] = [
    &["test", "--workspace", "--exclude", "xtask", FAULTS, "--all-targets", "--no-fail-fast"],
    &["test", "--workspace", FAULTS, "--doc"],
    &["test", "--package", "xtask", "--bins", "--test", "command_line"],
    &["test", "--package", "xtask", "--test", "kernels"],
];

/// Beside them: the models, which are a workspace of their own, and the builds of checkouts and
/// packages. These compute all the time, and the tests above wait for much of theirs.
const BESIDE: [&[&str]; 2] = [
    &["test", "--manifest-path", "models/Cargo.toml", "--target-dir", "target/loom"],
    &["test", "--package", "xtask", "--test", "package"],
];

/// Tests that are run when they are asked for: ignored ones, in one module of the suite.
pub struct Group {
    /// The option, and the module.
    pub name: &'static str,
    pub about: &'static str,
    tools: &'static [Tool],
}

pub const GROUPS: [Group; 2] = [
    Group {
        name: "places",
        about: "container runtimes and their security profiles",
        tools: &[("crun", "crun"), ("podman", "podman"), ("runc", "runc"), ("runsc", "runsc")],
    },
    Group {
        name: "long",
        about: "torture of 2,000 kills with three seeds, and long races",
        tools: &[],
    },
];

/// Runs all tests that are in no group. The error says what is wrong.
pub fn run() -> Result<(), String> {
    let lanes =
        vec![Lane::shown(MAIN.map(cargo).into()), Lane::told_later(BESIDE.map(cargo).into())];
    let result = finish(tools::TOOLS, lanes, "all tests pass");
    for Group { name, about, .. } in &GROUPS {
        println!("xtask: not among them: `cargo xtask test --{name}` ({about})");
    }
    result
}

/// Runs the tests of some groups, and no others.
pub fn run_groups(groups: &[&Group]) -> Result<(), String> {
    let runs = groups.iter().map(|group| {
        let module = format!("{}::", group.name);
        let suite = ["test", "--package", "farcall", FAULTS, "--test", "suite", "--"];
        cargo(&[&suite[..], &["--ignored", "--show-output", &module]].concat())
    });
    let names: Vec<&str> = groups.iter().map(|group| group.name).collect();
    let tools: Vec<Tool> = groups.iter().flat_map(|group| group.tools).copied().collect();
    let success = format!("the tests of {} pass", names.join(", "));
    finish(&tools, vec![Lane::shown(runs.collect())], &success)
}

fn finish(tools: &[Tool], mut lanes: Vec<Lane>, success: &str) -> Result<(), String> {
    tools::provide(tools)?;
    let before = Before::look()?;
    for lane in &mut lanes {
        lane.env("TMPDIR", before.temporary());
    }
    let mut problems = reap::run(lanes)?;
    let residue = before.residue();
    problems.extend(residue.iter().map(|what| format!("left behind: {what}")));
    if !problems.is_empty() {
        return Err(problems.join("\nxtask: "));
    }
    println!("xtask: {success}, and they left nothing behind");
    Ok(())
}

fn cargo(arguments: &[&str]) -> Run {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask/ lies in the root");
    cargo.args(arguments).current_dir(root).stdin(Stdio::null());
    Run { name: format!("cargo {}", arguments.join(" ")), command: cargo }
}
