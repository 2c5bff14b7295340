//! A process that is frozen with its cgroup: what is said of it, and that it goes on.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::common::{TestHome, until};
use crate::tree::{Tree, Version};

fn farcall(home: &TestHome, arguments: &[&str]) -> (bool, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_farcall"));
    let output = command.args(arguments).env("FARCALL_DIR", home.path()).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}

/// Thaws a cgroup when the test is over: what is in it is killed then.
struct Frozen {
    file: PathBuf,
    thawed: &'static str,
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = fs::write(&self.file, self.thawed);
    }
}

#[test]
fn a_frozen_process_is_said_to_be_and_thawing_helps() {
    for (tree, file, words, shows, frozen) in [
        (Tree::of(Version::Two), "cgroup.freeze", ["1", "0"], "cgroup.events", "frozen 1"),
        (Tree::with_freezer(), "freezer.state", ["FROZEN", "THAWED"], "freezer.state", "FROZEN"),
    ] {
        let home = TestHome::new();
        let (started, text) = farcall(&home, &["start", "one"]);
        assert!(started, "{text}");
        let pid = home.home.place(&"one".parse().unwrap()).state().unwrap().process.pid;
        let group = tree.group();
        group.put(pid);
        let frozen_now = Frozen { file: group.path().join(file), thawed: words[1] };
        fs::write(&frozen_now.file, words[0]).unwrap();
        until("it is frozen", || {
            let text = fs::read_to_string(group.path().join(shows)).unwrap();
            text.lines().any(|line| line == frozen)
        });
        let (_, listed) = farcall(&home, &["ls"]);
        assert!(listed.contains("frozen"), "{listed}");
        let (answered, message) = farcall(&home, &["log", "one", "--timeout", "1"]);
        assert!(!answered, "{message}");
        let told = format!("is frozen with its cgroup {}", group.path().display());
        assert!(message.contains(&told), "{message}");
        // The advice, as a shell does it.
        let advice = message.split('`').nth(1).unwrap();
        assert!(Command::new("sh").args(["-c", advice]).status().unwrap().success(), "{advice}");
        let (answered, message) = farcall(&home, &["log", "one"]);
        assert!(answered, "{message}");
    }
}
