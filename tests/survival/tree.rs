//! Cgroups as a service manager has them: one a service, in which all is killed in the end.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::sleep;
use std::time::Duration;

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::common::until;

/// A hierarchy of cgroups. One that tests have mounted is unmounted when none uses it any more: a path in
/// it may stand in the NAME.json of any test that makes cgroups, so each of those has a tree.
pub struct Tree {
    top: PathBuf,
    _mounted: Option<Arc<Mounted>>,
}

struct Mounted(TempDir);

impl Drop for Mounted {
    fn drop(&mut self) {
        // Others that read mounts at this moment hold it for as long.
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    One,
    Two,
}

pub const VERSIONS: [Version; 2] = [Version::One, Version::Two];

/// The mounted trees of a type, with the options of each.
fn trees(kind: &str) -> Vec<(PathBuf, String)> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    fields
        .filter(|fields| fields[2] == kind)
        .map(|fields| (fields[1].into(), fields[3].into()))
        .collect()
}

fn has(options: &str, what: &str) -> bool {
    options.split(',').any(|option| option.starts_with(what))
}

impl Tree {
    /// A tree in which cgroups can be made. Where none is mounted so, one is.
    pub fn of(version: Version) -> Self {
        match version {
            // By those with a name service managers know their services.
            Version::One => Self::mounted("cgroup", "name=", "none,name=farcall-test"),
            Version::Two => Self::mounted("cgroup2", "rw", "rw"),
        }
    }

    /// One that limits memory.
    pub fn with_memory() -> Self {
        let two = Self::of(Version::Two);
        let controllers = fs::read_to_string(two.top.join("cgroup.controllers")).unwrap();
        if !controllers.split_whitespace().any(|controller| controller == "memory") {
            return Self::mounted("cgroup", "memory", "memory");
        }
        fs::write(two.top.join("cgroup.subtree_control"), "+memory").unwrap_or_else(|error| {
            panic!("this test needs cgroups that limit memory: {}: {error}", two.top.display())
        });
        two
    }

    /// One of version 1 that freezes.
    pub fn with_freezer() -> Self {
        Self::mounted("cgroup", "freezer", "freezer")
    }

    /// A tree of a type and with an option, which is mounted with `options` if there is none.
    fn mounted(kind: &str, option: &str, options: &'static str) -> Self {
        static OURS: Mutex<BTreeMap<&str, Weak<Mounted>>> = Mutex::new(BTreeMap::new());
        let mut ours = OURS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mounted) = ours.get(options).and_then(Weak::upgrade) {
            return Self { top: mounted.0.path().into(), _mounted: Some(mounted) };
        }
        let mut there = trees(kind).into_iter().filter(|(_, options)| has(options, option));
        if let Some((top, _)) = there.find(|(top, _)| Self::at(top.clone()).is_writable()) {
            return Self::at(top);
        }
        let directory = tempfile::tempdir().unwrap();
        let output = Command::new("mount")
            .args(["-t", kind, "-o", options, "none"])
            .arg(directory.path())
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "this test needs a tree of cgroups that can be written (type {kind}, option {option}), \
             or the right to mount one: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let mounted = Arc::new(Mounted(directory));
        ours.insert(options, Arc::downgrade(&mounted));
        let tree = Self { top: mounted.0.path().into(), _mounted: Some(mounted) };
        assert!(tree.is_writable(), "cgroups can't be made in a tree that was just mounted");
        tree
    }

    fn at(top: PathBuf) -> Self {
        Self { top, _mounted: None }
    }

    fn is_writable(&self) -> bool {
        let path = self.fresh();
        fs::create_dir(&path).is_ok() && fs::remove_dir(path).is_ok()
    }

    fn fresh(&self) -> PathBuf {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        self.top.join(format!("farcall-test-{}-{count}", std::process::id()))
    }

    /// A cgroup of a service's.
    pub fn group(&self) -> Group {
        let path = self.fresh();
        fs::create_dir(&path).unwrap();
        Group { path }
    }
}

/// A cgroup. It is gone, with all that is in it, when this is dropped.
pub struct Group {
    path: PathBuf,
}

impl Group {
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn put(&self, pid: i32) {
        fs::write(self.path.join("cgroup.procs"), pid.to_string()).unwrap();
    }

    /// All in it and below it.
    pub fn processes(&self) -> Vec<i32> {
        let mut all = Vec::new();
        let mut directories = vec![self.path.clone()];
        while let Some(directory) = directories.pop() {
            let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            all.extend(text.lines().map(|pid| pid.parse::<i32>().unwrap()));
            let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
            let below = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            directories.extend(below.map(|entry| entry.path()));
        }
        all
    }

    /// The clean-up at the end of a service: all are killed, until there are none.
    pub fn clean_up(&self) {
        // Version 2 does so at once.
        if fs::write(self.path.join("cgroup.kill"), "1").is_err() {
            self.kill_each();
        }
        until("all in the cgroup are gone", || self.processes().is_empty());
    }

    /// The same in the way that works in both versions.
    pub fn kill_each(&self) {
        until("all in the cgroup are killed", || {
            let processes = self.processes();
            for pid in &processes {
                // 0 is one of another pid namespace: it would be this process's group.
                assert!(
                    *pid > 0,
                    "a process of another pid namespace is in a cgroup of this test's"
                );
                let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
            }
            processes.is_empty()
        });
    }

    pub fn limit_memory(&self, bytes: u64) {
        let write = |file, value: &str| fs::write(self.path.join(file), value);
        match write("memory.max", &bytes.to_string()) {
            // There is none where there is no swap space.
            Ok(()) => drop(write("memory.swap.max", "0")),
            Err(_) => {
                write("memory.limit_in_bytes", &bytes.to_string()).unwrap();
                drop(write("memory.memsw.limit_in_bytes", &bytes.to_string()));
            }
        }
    }

    /// Whether somebody in it was killed for the memory that was taken.
    pub fn out_of_memory(&self) -> bool {
        let text = ["memory.events", "memory.oom_control"]
            .map(|file| fs::read_to_string(self.path.join(file)).unwrap_or_default());
        let kills =
            text.iter().flat_map(|text| text.lines()).find_map(|l| l.strip_prefix("oom_kill "));
        kills.expect("the kernel counts it").parse::<u32>().unwrap() > 0
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for _ in 0..1000 {
            for pid in self.processes() {
                if pid > 0 {
                    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                }
            }
            match fs::remove_dir(&self.path) {
                Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {}
                _ => return,
            }
            sleep(Duration::from_millis(2));
        }
    }
}
