//! A cgroup of a process's own, from its beginning until it is removed; and where there can be none.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};

use farcall::host::local::Stdio;
use farcall::persist::{Name, SharedMemory};
use farcall::{Error, Local};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::common::{TestHome, alive, until};
use crate::tree::{Tree, Version};

const PROGRAM: &str = env!("CARGO_BIN_EXE_farcall");

fn farcall(home: &TestHome, arguments: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(arguments).env("FARCALL_DIR", home.path());
    command
}

#[track_caller]
fn succeed(home: &TestHome, arguments: &[&str]) -> Value {
    let output = farcall(home, arguments).arg("--json").output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Runs a command that has to fail with 1. Returns what it says.
#[track_caller]
fn fail(command: &mut Command) -> String {
    let Output { status, stderr, .. } = command.output().unwrap();
    let stderr = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(1), "{stderr}");
    stderr
}

/// Starts a process of that name with a cgroup of its own: its pid and its cgroups.
#[track_caller]
fn start(home: &TestHome, name: &str) -> (i32, Vec<PathBuf>) {
    let started = succeed(home, &["start", name, "--cgroup"]);
    let cgroups: Vec<PathBuf> = serde_json::from_value(started["cgroups"].clone()).unwrap();
    let pid = started["pid"].as_i64().unwrap() as i32;
    assert!(!cgroups.is_empty());
    for cgroup in &cgroups {
        assert!(cgroup.ends_with(format!("farcall-{name}-{pid}")), "{cgroup:?}");
        assert_eq!(processes(cgroup), [pid], "{cgroup:?}");
    }
    (pid, cgroups)
}

fn processes(cgroup: &Path) -> Vec<i32> {
    let text = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap();
    text.lines().map(|pid| pid.parse().unwrap()).collect()
}

fn end(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    until("it is gone", || !alive(pid));
}

#[track_caller]
fn are_gone(cgroups: &[PathBuf]) {
    let left: Vec<&PathBuf> = cgroups.iter().filter(|cgroup| cgroup.exists()).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// The cgroups at the top of all trees that begin so.
fn beginning_with(name: &str) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let mut found = Vec::new();
    for line in mounts.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        if fields[2].starts_with("cgroup") {
            let entries = fs::read_dir(fields[1]).unwrap().flatten();
            let named =
                |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with(name);
            found.extend(entries.map(|entry| entry.path()).filter(named));
        }
    }
    found
}

#[test]
fn stop_removes_it() {
    let _tree = Tree::of(Version::Two);
    let home = TestHome::new();
    for options in [&["stop", "stopped"][..], &["stop", "stopped", "--kill"]] {
        let (_, cgroups) = start(&home, "stopped");
        succeed(&home, options);
        are_gone(&cgroups);
    }
    let (pid, cgroups) = start(&home, "stopped");
    end(pid);
    assert_eq!(succeed(&home, &["stop", "stopped"])["stopped"], false);
    are_gone(&cgroups);
}

#[test]
fn start_and_ls_tell_it() {
    let _tree = Tree::of(Version::Two);
    let home = TestHome::new();
    let output = farcall(&home, &["start", "told", "--cgroup"]).output().unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    let row = &succeed(&home, &["ls"])[0];
    let cgroups = row["cgroups"].as_array().unwrap();
    assert!(!cgroups.is_empty());
    for cgroup in cgroups {
        assert!(printed.contains(cgroup.as_str().unwrap()), "{printed}");
    }
    // A controller that comes and goes keeps it in mind.
    assert!(farcall(&home, &["call", "told", "getpid"]).output().unwrap().status.success());
    assert_eq!(succeed(&home, &["ls"])[0]["cgroups"], json!(cgroups));
    succeed(&home, &["stop", "told"]);
}

#[test]
fn ls_removes_those_of_the_dead() {
    let _tree = Tree::of(Version::Two);
    let home = TestHome::new();
    let (pid, cgroups) = start(&home, "dead");
    succeed(&home, &["ls"]);
    assert!(cgroups.iter().all(|cgroup| cgroup.exists()));
    end(pid);
    assert_eq!(succeed(&home, &["ls"])[0]["state"], "gone");
    are_gone(&cgroups);
    succeed(&home, &["ls"]);
    succeed(&home, &["stop", "dead"]);
}

#[test]
fn the_next_of_the_same_name_removes_that_of_the_dead() {
    let _tree = Tree::of(Version::Two);
    let home = TestHome::new();
    let (pid, cgroups) = start(&home, "again");
    end(pid);
    let (_, next) = start(&home, "again");
    are_gone(&cgroups);
    succeed(&home, &["stop", "again"]);
    are_gone(&next);
}

/// Killed and reaped with the test.
struct Other(Child);

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn one_that_others_are_in_is_not_removed_and_they_are_named() {
    let _tree = Tree::of(Version::Two);
    let home = TestHome::new();
    let (pid, cgroups) = start(&home, "shared");
    let other = Other(Command::new("/bin/sleep").arg("3600").spawn().unwrap());
    let other_pid = other.0.id().to_string();
    for cgroup in &cgroups {
        fs::write(cgroup.join("cgroup.procs"), &other_pid).unwrap();
    }
    let error = fail(&mut farcall(&home, &["stop", "shared"]));
    assert!(error.contains("the process has ended"), "{error}");
    assert!(error.contains(&format!("(pid {other_pid})")), "{error}");
    assert!(!alive(pid));
    assert_eq!(succeed(&home, &["ls"])[0]["state"], "gone");
    let error = fail(&mut farcall(&home, &["start", "shared"]));
    assert!(error.contains(&format!("(pid {other_pid})")), "{error}");
    assert_eq!(processes(&cgroups[0]), [other.0.id() as i32]);
    drop(other);
    assert_eq!(succeed(&home, &["stop", "shared"])["stopped"], false);
    are_gone(&cgroups);
}

#[test]
fn it_has_the_name_that_is_asked_for_unless_that_is_taken() {
    let tree = Tree::of(Version::Two);
    let home = TestHome::new();
    let taken = tree.group();
    let name = taken.path().file_name().unwrap().to_str().unwrap();
    let error = fail(&mut farcall(&home, &["start", "named", &format!("--cgroup={name}")]));
    assert!(error.contains(taken.path().to_str().unwrap()), "{error}");
    assert!(error.contains("exists already"), "{error}");
    // It was made in other trees, and there is nothing of it.
    assert_eq!(beginning_with(name), [taken.path()]);
    assert_eq!(home.home.names().unwrap(), [], "the name is given up");

    let free = format!("{name}-free");
    let started = succeed(&home, &["start", "named", &format!("--cgroup={free}")]);
    let cgroups: Vec<PathBuf> = serde_json::from_value(started["cgroups"].clone()).unwrap();
    assert!(cgroups.iter().all(|cgroup| cgroup.ends_with(&free) && cgroup.exists()), "{cgroups:?}");
    succeed(&home, &["stop", "named"]);
    are_gone(&cgroups);
}

#[test]
fn a_user_who_may_not_make_one_is_told_what_to_do() {
    let _tree = Tree::of(Version::Two);
    assert!(nix::unistd::geteuid().is_root(), "this test acts as another user: run it as root");
    let home = TestHome::new();
    let directory = home.path().parent().unwrap();
    chown(directory, Some(65_531), Some(65_531)).unwrap();
    // The program may lie where that user does not come.
    let program = File::open(PROGRAM).unwrap();
    let number = program.as_raw_fd();
    let mut command = Command::new(format!("/proc/self/fd/{number}"));
    command.args(["start", "user", "--cgroup"]).env("FARCALL_DIR", home.path());
    command.uid(65_531).gid(65_531).current_dir("/").env("TMPDIR", directory);
    let keep = move || {
        // SAFETY: the descriptor stays open until exec.
        let program = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
        fcntl(program, FcntlArg::F_SETFD(FdFlag::empty()))?;
        Ok(())
    };
    // SAFETY: fcntl(2) may be called between fork and exec.
    unsafe { command.pre_exec(keep) };
    let error = fail(&mut command);
    assert!(error.contains("no cgroup may be made there"), "{error}");
    assert!(error.contains("systemd-run --user --scope"), "{error}");
    assert_eq!(home.home.names().unwrap(), [], "the name is given up");
    assert!(beginning_with("farcall-user-").is_empty());
}

/// Runs `farcall start` where a script has changed the mounted cgroup trees, `$trees`.
fn where_trees(home: &TestHome, script: &str) -> String {
    let trees = r#"trees=$(while read -r _ point kind _; do
            case $kind in cgroup*) echo "$point" ;; esac
        done </proc/mounts)"#;
    let script = format!("{trees}; for tree in $trees; do {script} || exit 77; done; exec \"$@\"");
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script, "sh", PROGRAM, "start", "none", "--cgroup"]);
    let error = fail(command.env("FARCALL_DIR", home.path()));
    assert_eq!(home.home.names().unwrap(), [], "the name is given up");
    error
}

#[test]
fn where_there_is_no_tree_the_error_says_so() {
    let home = TestHome::new();
    let error = where_trees(&home, r#"umount -l "$tree""#);
    assert!(error.contains("there is no cgroup tree"), "{error}");
}

#[test]
fn where_all_trees_are_read_only_the_error_says_so() {
    let _tree = Tree::of(Version::Two);
    let home = TestHome::new();
    let error = where_trees(&home, r#"mount -o remount,bind,ro "$tree""#);
    assert!(error.contains("is mounted read-only"), "{error}");
    assert!(beginning_with("farcall-none-").is_empty());
}

#[tokio::test]
async fn a_process_that_does_not_become_persistent_goes_back() {
    let _tree = Tree::of(Version::Two);
    let home = TestHome::new();
    let root = Local::new().stdio(Stdio::Null).start().await.unwrap();
    let child = root.child().spawn().await.unwrap();
    let pid = child.pid().unwrap();
    let cgroup = || fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let before = cgroup();
    // No descriptor for the listening socket: the last thing that can fail.
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit is read in the call.
    let limited =
        unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, &raw const none, std::ptr::null_mut()) };
    assert_eq!(limited, 0);
    let name: Name = "back".parse().unwrap();
    let reserved = home.home.reserve(&name).unwrap().in_own_cgroup(None);
    child.make_persistent(reserved, SharedMemory::Refuse).await.unwrap_err();
    assert_eq!(cgroup(), before);
    assert!(beginning_with("farcall-back-").is_empty());
    assert_eq!(home.home.names().unwrap(), []);
    child.getpid().await.unwrap();
}

#[tokio::test]
async fn a_process_gets_it_when_it_becomes_persistent() {
    let _tree = Tree::of(Version::Two);
    let home = TestHome::new();
    let root = Local::new().stdio(Stdio::Null).start().await.unwrap();
    let child = root.child().spawn().await.unwrap();
    let pid = child.pid().unwrap();
    let name: Name = "later".parse().unwrap();
    let place = home.home.place(&name);
    let reserved = home.home.reserve(&name).unwrap().in_own_cgroup(None);
    child.make_persistent(reserved, SharedMemory::Refuse).await.unwrap();
    let cgroups = place.state().unwrap().cgroups;
    assert!(!cgroups.is_empty());
    for cgroup in &cgroups {
        assert_eq!(processes(cgroup), [pid]);
    }
    // As long as it lives nothing is removed.
    assert!(matches!(place.remove(), Err(Error::Cgroup { .. })));
    assert!(place.socket().exists());
    child.prepare_for_reconnect().await.unwrap();
    child.reconnect().await.unwrap();
    assert_eq!(place.state().unwrap().cgroups, cgroups);
    child.exit(0).await.unwrap();
    until("it is gone", || !alive(pid));
    place.remove().unwrap();
    are_gone(&cgroups);
}

#[test]
fn a_place_that_names_other_directories_removes_none_of_them() {
    let home = TestHome::new();
    let pid = succeed(&home, &["start", "forged"])["pid"].as_i64().unwrap() as i32;
    let directory = home.file("precious");
    fs::create_dir(&directory).unwrap();
    let file = home.path().join("forged.json");
    let mut state: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    state["cgroups"] = json!([directory]);
    fs::write(&file, state.to_string()).unwrap();
    fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
    end(pid);
    succeed(&home, &["ls"]);
    succeed(&home, &["stop", "forged"]);
    assert!(directory.exists());
}

#[test]
fn a_place_of_one_user_removes_no_cgroup_of_another_user() {
    let _tree = Tree::of(Version::Two);
    let home = TestHome::new();
    let (pid, cgroups) = start(&home, "theirs");
    end(pid);
    // As a user would write it down, for root to look at.
    let file = home.path().join("theirs.json");
    chown(&file, Some(65_531), None).unwrap();
    succeed(&home, &["ls"]);
    assert!(cgroups.iter().all(|cgroup| cgroup.exists()));
    chown(&file, Some(0), None).unwrap();
    succeed(&home, &["stop", "theirs"]);
    are_gone(&cgroups);
}
