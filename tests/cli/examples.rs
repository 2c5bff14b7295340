//! The documents' examples for a shell: each is run, and does what is printed below it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use farcall::persist::{Name, attach};
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use super::command::start;
use crate::common::TestHome;

/// The documents that have such examples.
const DOCUMENTS: [&str; 4] =
    ["README.md", "docs/persistent.md", "docs/calls.md", "docs/systemd.md"];

/// What is not run here, by a word of the example, and why.
const NOT_RUN: [(&str, &str); 3] = [
    ("cargo run", "it builds, and what it shows is compared by the test of the demo"),
    ("farcall torture", "it takes a minute: the tests of torture run it"),
    ("systemd-run", "there is no systemd where tests run"),
];

/// The fenced blocks of a text, each with what its first line calls it.
fn blocks(text: &str) -> Vec<(&str, &str)> {
    let fenced = text.split("```").skip(1).step_by(2);
    fenced.map(|block| block.split_once('\n').unwrap_or((block, ""))).collect()
}

/// Whether a line is a command, and which.
fn command(line: &str) -> Option<&str> {
    line.strip_prefix("$ ").or_else(|| line.strip_prefix("# "))
}

#[test]
fn what_the_documents_show_of_the_shell_is_what_happens() {
    let mut left_out = Vec::new();
    let mut run = 0;
    for document in DOCUMENTS {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(document);
        for (kind, block) in blocks(&fs::read_to_string(path).unwrap()) {
            let has_commands = block.lines().any(|line| command(line).is_some());
            if kind != "sh" && !(kind == "text" && has_commands) {
                continue;
            }
            if let Some((word, _)) = NOT_RUN.iter().find(|(word, _)| block.contains(word)) {
                left_out.push(*word);
                continue;
            }
            run += 1;
            if let Err(why) = try_example(block, kind == "sh") {
                panic!("{document}: {why}\nin\n{block}");
            }
        }
    }
    assert!(run >= 5, "{run} examples were run");
    assert_eq!(left_out, NOT_RUN.map(|(word, _)| word), "what is left out");
}

/// Runs an example in a home of its own: a script, whose last line's output the text tells, or commands
/// with what they print.
fn try_example(block: &str, is_script: bool) -> Result<(), String> {
    let test = TestHome::new();
    let programs = test.file("programs");
    fs::create_dir(&programs).unwrap();
    symlink(env!("CARGO_BIN_EXE_farcall"), programs.join("farcall")).unwrap();
    let shell = |script: &str| {
        let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
        let mut bash = Command::new("bash");
        bash.args(["-c", script]).env("PATH", path).env("FARCALL_DIR", test.path());
        let output = bash.current_dir(programs.parent().unwrap()).output().unwrap();
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        (output.status.success(), text)
    };
    if is_script {
        // Whoever runs the tests is root, and waits for a socket where a person takes a breath.
        let wait = "until [ -S root/run/c.sock ]; do sleep 0.01; done";
        let script = block.replace("&\n", &format!("&\n{wait}\n"));
        let end = "FARCALL_DIR=$PWD/root/run farcall stop c > stopped && wait";
        let (done, text) = shell(&format!("sudo() {{ env \"$@\"; }}\n{script}{end}"));
        return if done && text.lines().last() == Some("1") { Ok(()) } else { Err(text) };
    }
    let mut alike = Alike::new(&test);
    if block.contains("farcall names") {
        prepare(&test, &mut alike);
    } else if !block.contains("farcall start web") {
        start(&test, "web");
    }
    let mut lines = block.lines().peekable();
    while let Some(line) = lines.next() {
        let command = command(line).ok_or_else(|| format!("{line:?} is no command"))?;
        let mut expected = Vec::new();
        while let Some(line) = lines.next_if(|line| self::command(line).is_none()) {
            expected.push(line);
        }
        let (done, text) = shell(command);
        if !done {
            return Err(format!("{command}: {text}"));
        }
        let printed: Vec<&str> = text.lines().collect();
        let is_alike = if command.starts_with("farcall log") {
            // The calls of an attach are what they are at the time.
            printed.len() == expected.len() && printed.iter().all(|line| is_of_a_log(line))
        } else if command.contains("--cgroup") {
            // Where cgroups are depends on the machine.
            let begin = |lines: &[&str]| lines[0].split(", /sys").next().unwrap().to_owned();
            alike.is(&begin(&expected), &begin(&printed))
        } else {
            printed.len() == expected.len()
                && expected.iter().zip(&printed).all(|(one, other)| alike.is(one, other))
        };
        if !is_alike {
            return Err(format!("{command} prints\n{text}"));
        }
    }
    Ok(())
}

/// A process "web" as the text describes it, with names.
fn prepare(test: &TestHome, alike: &mut Alike) {
    start(test, "web");
    let log = test.file("log");
    alike.paths.push(("/var/log/web".into(), log.to_str().unwrap().into()));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let name: Name = "web".parse().unwrap();
        let process = attach(test.home.place(&name)).await.unwrap();
        let mut chain = process.chain();
        chain.keep("log");
        chain.openat(None, &log, OFlag::O_CREAT | OFlag::O_RDWR, Mode::S_IRWXU);
        chain.run().await.unwrap();
        let unnamed = process.openat(None, "/etc/hostname", OFlag::O_RDONLY, Mode::empty()).await;
        let _ = unnamed.unwrap().into_raw();
        process.keep_bytes("settings", b"workers = 4").await.unwrap();
        let child = process.child().named("worker").spawn().await.unwrap();
        child.exit(42).await.unwrap();
        child.ended().await;
        process.prepare_for_reconnect().await.unwrap();
    });
}

fn is_of_a_log(line: &str) -> bool {
    let is_call = || {
        let (number, call) = line.trim_start().split_once("  ")?;
        let (call, result) = call.split_once(") = ")?;
        Some(number.parse::<u64>().is_ok() && call.contains('(') && !result.is_empty())
    };
    line.starts_with("-- another c")
        || line.ends_with("; nobody is attached")
        || is_call() == Some(true)
}

/// Compares what is shown with what is printed. Numbers of three digits or more (pids) may be others, but
/// each the same everywhere; so may addresses, sizes in KiB, and times in seconds.
struct Alike {
    paths: Vec<(String, String)>,
    numbers: BTreeMap<String, String>,
}

impl Alike {
    fn new(test: &TestHome) -> Self {
        let home = test.path().to_str().unwrap().to_owned();
        Self { paths: vec![("/run/farcall".into(), home)], numbers: BTreeMap::new() }
    }

    fn is(&mut self, shown: &str, printed: &str) -> bool {
        let replaced =
            self.paths.iter().fold(shown.to_owned(), |text, (from, to)| text.replace(from, to));
        let (shown, printed): (Vec<&str>, Vec<&str>) =
            (replaced.split_whitespace().collect(), printed.split_whitespace().collect());
        shown.len() == printed.len()
            && shown.iter().zip(&printed).enumerate().all(|(at, (one, other))| {
                let is_size = shown.get(at + 1) == Some(&"KiB");
                self.is_word(one, other, is_size)
            })
    }

    fn is_word(&mut self, shown: &str, printed: &str, is_size: bool) -> bool {
        let is_address = |word: &str| word.starts_with("0x");
        if shown == printed || is_address(shown) && is_address(printed) {
            return true;
        }
        let is_time = |word: &str| {
            word.strip_suffix('s')
                .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
        };
        let (ours, theirs) = (numbers(shown), numbers(printed));
        let words = |word: &str| word.replace(|c: char| c.is_ascii_digit(), "");
        if words(shown) != words(printed) || ours.len() != theirs.len() {
            return false;
        }
        ours.into_iter().zip(theirs).all(|(one, other)| {
            let varies = is_size || is_time(shown);
            let stands_for = |numbers: &mut BTreeMap<String, String>| {
                one.len() >= 3 && *numbers.entry(one.clone()).or_insert(other.clone()) == other
            };
            one == other || varies || stands_for(&mut self.numbers)
        })
    }
}

fn numbers(word: &str) -> Vec<String> {
    let numbers = word.split(|c: char| !c.is_ascii_digit());
    numbers.filter(|number| !number.is_empty()).map(str::to_owned).collect()
}

#[test]
fn what_is_not_the_same_is_noticed() {
    let test = TestHome::new();
    let mut alike = Alike::new(&test);
    assert!(alike.is(
        "web: pid 7989, /run/farcall/x",
        &format!("web:  pid 12, {}/x", test.path().display())
    ));
    for (shown, printed, expected) in [
        ("7989", "12", true),
        ("7989", "13", false),
        ("5", "3", false),
        ("web 7989 detached 0s 24 KiB", "web 12 detached 7s 36 KiB", true),
        ("web 7989 detached", "web 12 attached", false),
        ("0x7f00", "0x5500", true),
        ("a b", "a", false),
    ] {
        assert_eq!(alike.is(shown, printed), expected, "{shown} {printed}");
    }
}
