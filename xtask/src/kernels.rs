//! `cargo xtask kernels`: the release binary and tests in guests, under Debian's kernels.
//!
//! Nothing of this system is touched: packages are looked up and downloaded by an apt of its own
//! (lists, cache and sources under `target/kernels`), and a guest has nothing but its initramfs.

mod debian;
mod files;
mod guest;
mod initramfs;

use std::env;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};

use crate::tools::{self, Tool};
use debian::{Apt, Kernel};
use guest::{Step, Told};

/// Versions, each of which has a package of Debian's at the time of writing.
const SERIES: [&str; 6] = ["5.10", "6.1", "6.12", "6.16", "7.0", "7.3"];

/// What runs in a guest if nothing else is asked for: functions of xtask/guest/steps.
const STEPS: [&str; 7] = ["demo", "commands", "torture", "tests", "scope1", "scope2", "scope3"];

/// How long a step may take, and the boot: guests are emulated.
const LIMIT: Duration = Duration::from_secs(1200);

const TOOLS: [Tool; 10] = [
    ("apt-get", "apt"),
    ("bash", "bash"),
    ("busybox", "busybox-static"),
    ("cpio", "cpio"),
    ("dpkg", "dpkg"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("setpriv", "util-linux"),
    ("strace", "strace"),
    ("strip", "binutils"),
    ("unshare", "util-linux"),
];

/// What is asked for.
pub struct Options {
    series: Vec<String>,
    processors: Vec<u32>,
    steps: Vec<String>,
    /// Words for the test programs that are steps of their own.
    tests: String,
    limit: Duration,
    is_json: bool,
}

impl Options {
    /// The error says which word makes no sense.
    pub fn parse(words: &[&str]) -> Result<Self, String> {
        let all = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let mut options = Self {
            series: Vec::new(),
            processors: vec![1, 2],
            steps: all(&STEPS),
            tests: String::new(),
            limit: LIMIT,
            is_json: false,
        };
        let mut words = words.iter();
        while let Some(&word) = words.next() {
            let mut value = || words.next().copied().ok_or_else(|| format!("{word} needs a value"));
            let wrong = |value: &str| format!("{word} {value}: that makes no sense");
            match word {
                "--json" => options.is_json = true,
                "--limit" => {
                    let value = value()?;
                    let seconds = value.parse().map_err(|_| wrong(value))?;
                    options.limit = Duration::from_secs(seconds);
                }
                "--processors" => {
                    let value = value()?;
                    let number = value.parse().ok().filter(|number| *number > 0);
                    options.processors = vec![number.ok_or_else(|| wrong(value))?];
                }
                "--steps" => options.steps = all(&value()?.split(',').collect::<Vec<_>>()),
                "--tests" => options.tests = value()?.replace('"', ""),
                _ if word.starts_with('-') => return Err(format!("there is no option {word}")),
                _ => options.series.push(word.into()),
            }
        }
        if options.series.is_empty() {
            options.series = all(&SERIES);
        }
        Ok(options)
    }
}

/// Boots guests, with one and with two processors. The error says what is wrong.
pub fn run(options: &Options) -> Result<(), String> {
    tools::provide(&TOOLS)?;
    // As cargo, which runs in the root, understands it.
    let target = env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    let target = root().join(target);
    let folder = target.join("kernels");
    files::make(&folder)?;
    let (kernels, initramfs) = prepare(&folder, &target, &options.series)?;
    let mut all = Vec::new();
    for kernel in &kernels {
        for processors in &options.processors {
            let told = guest::boot(kernel, &initramfs, *processors, options, &folder)?;
            all.push(told);
        }
    }
    print!("{}", if options.is_json { json(&all) } else { table(&all, &options.steps) });
    let problems: Vec<String> =
        all.iter().filter(|told| !told.is_good()).map(Told::problem).collect();
    if problems.is_empty() { Ok(()) } else { Err(problems.join("\nxtask: ")) }
}

/// Kernels and an initramfs, made by one of those that do so at the same time.
fn prepare(
    folder: &Path,
    target: &Path,
    series: &[String],
) -> Result<(Vec<Kernel>, PathBuf), String> {
    let lock = File::create(folder.join("lock")).map_err(|error| format!("a lock: {error}"))?;
    let lock = Flock::lock(lock, FlockArg::LockExclusive);
    let _lock = lock.map_err(|(_, error)| format!("flock(2): {error}"))?;
    let apt = Apt::new(folder)?;
    let kernels = series.iter().map(|series| apt.kernel(series)).collect::<Result<Vec<_>, _>>()?;
    Ok((kernels, initramfs::build(folder, target)?))
}

/// A row for each guest, a column for each step.
fn table(all: &[Told], steps: &[String]) -> String {
    let mut rows = vec![vec!["kernel".to_owned(), "processors".to_owned()]];
    rows[0].extend(steps.iter().cloned());
    for told in all {
        let cell = |name: &String| match told.steps.iter().find(|step| step.name == *name) {
            Some(Step { status: 0, time, .. }) => format!("ok {} s", time.as_secs()),
            Some(Step { status, .. }) => format!("FAILED {status}"),
            None => "no end".into(),
        };
        let begin = [told.kernel.clone(), told.processors.to_string()];
        rows.push(begin.into_iter().chain(steps.iter().map(cell)).collect());
    }
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

/// The same for programs: one array.
fn json(all: &[Told]) -> String {
    let guest = |told: &Told| {
        let steps = told.steps.iter().map(|Step { name, status, time }| {
            let seconds = time.as_secs_f64();
            format!(r#"{{"name":{},"status":{status},"seconds":{seconds:.1}}}"#, quoted(name))
        });
        format!(
            r#"{{"kernel":{},"processors":{},"steps":[{}],"failure":{}}}"#,
            quoted(&told.kernel),
            told.processors,
            steps.collect::<Vec<_>>().join(","),
            told.failure.as_deref().map_or("null".into(), quoted)
        )
    };
    let guests: Vec<String> = all.iter().map(guest).collect();
    format!("[{}]\n", guests.join(",\n"))
}

/// A string of JSON. What would have to be escaped is in no name.
fn quoted(text: &str) -> String {
    let plain: String =
        text.chars().filter(|letter| !letter.is_control() && !"\"\\".contains(*letter)).collect();
    format!("\"{plain}\"")
}

/// The workspace.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask/ lies in the root")
}
