//! `farcall call` with files and with much data.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;

use nix::fcntl::OFlag;
use nix::libc;
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use serde_json::json;

use super::command::{fail, farcall, run, start, succeed, succeed_json};
use crate::common::TestHome;

const MEGABYTE: u64 = 1 << 20;
/// More than what shows progress.
const MUCH: u64 = 80 * MEGABYTE;
/// What a command may have in memory meanwhile.
const BOUND: u64 = 24 * MEGABYTE;

/// Opens a file in the process "one": its descriptor.
fn open(test: &TestHome, path: &Path, flags: &str) -> String {
    let path = path.to_str().unwrap();
    succeed(test, &["call", "one", "openat", "AT_FDCWD", path, flags, "0600"]).trim_end().into()
}

/// A file of that size, with a mark at its beginning, at its end and around each megabyte.
fn marked(path: &Path, size: u64) {
    let mut file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    for at in (0..size).step_by(MEGABYTE as usize) {
        file.seek(SeekFrom::Start(at.saturating_sub(4))).unwrap();
        write!(file, "{at:8}").unwrap();
    }
    file.seek(SeekFrom::Start(size - 3)).unwrap();
    file.write_all(b"end").unwrap();
}

#[track_caller]
fn assert_same(one: &Path, other: &Path) {
    assert!(fs::read(one).unwrap() == fs::read(other).unwrap(), "{one:?} and {other:?} differ");
}

#[test]
fn buffers_are_filled_from_files_and_go_to_files() {
    let test = TestHome::new();
    start(&test, "one");
    let (from, there, to) = (test.file("from"), test.file("there"), test.file("to"));
    fs::write(&from, b"some\0bytes\xff\n").unwrap();
    let fd = open(&test, &there, "O_RDWR|O_CREAT");
    let input = format!("@@{}", from.display());
    assert_eq!(succeed(&test, &["call", "one", "write", &fd, &input, "@len"]), "12\n");
    assert_same(&from, &there);
    // The length of a string is that of its text.
    assert_eq!(succeed(&test, &["call", "one", "pwrite64", &fd, "\"SOME\"", "@len", "0"]), "4\n");

    fs::write(&to, "what was here before, and was longer").unwrap();
    let path = to.to_str().unwrap();
    let call = ["call", "--output", path, "one", "pread64", &fd, "@100", "@len", "0"];
    assert_eq!(succeed(&test, &call), format!("12\nargument 2: 12 bytes in {path}\n"));
    assert_eq!(fs::read(&to).unwrap(), b"SOME\0bytes\xff\n");
    let call = ["call", "one", "pread64", &fd, "@4", "@len", "0", "--json", "--output", path];
    assert_eq!(
        succeed_json(&test, &call)["buffers"],
        json!([{ "argument": 2, "bytes": 4, "file": path }])
    );
    assert_eq!(fs::read(&to).unwrap(), b"SOME");

    // A call that fails leaves it as it was.
    let call = ["call", "one", "read", "999", "@100", "100", "--output", path];
    assert_eq!(run(&test, &call).status.code(), Some(1));
    assert_eq!(fs::read(&to).unwrap(), b"SOME");
}

#[test]
fn what_can_not_be_read_or_makes_no_sense_is_refused_and_nothing_is_called() {
    let test = TestHome::new();
    start(&test, "one");
    succeed(&test, &["call", "one", "umask", "7"]);
    let fifo = test.file("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for (code, arguments) in [
        (1, &["umask", "@@/nonexistent/file"][..]),
        (1, &["umask", "@@/"]),
        (1, &["umask", "@@/dev/null"]),
        (1, &["umask", &format!("@@{}", fifo.display())]),
        // Its size is not the 0 that it tells.
        (1, &["umask", "@@/proc/self/status"]),
        (1, &["umask", "@8", "--output", "/nonexistent/file"]),
        (2, &["umask", "@len"]),
        (2, &["umask", "1", "@len"]),
        (2, &["umask", "0", "--output", "file"]),
        (2, &["umask", "@8", "--output"]),
    ] {
        fail(&test, code, &[&["call", "one"], arguments].concat());
    }
    assert_eq!(succeed(&test, &["call", "one", "umask", "0"]), "7\n");
}

#[test]
fn a_long_buffer_is_printed_as_if_it_were_a_short_one() {
    let test = TestHome::new();
    start(&test, "one");
    let file = test.file("text");
    // Characters and zeros across the border of a megabyte, and zeros at the end.
    let mut text = "x".repeat(MEGABYTE as usize - 1);
    text.push_str("\u{20ac}\"\\\n");
    text.push_str(&"\0".repeat(MEGABYTE as usize));
    text.push_str("end");
    fs::write(&file, &text).unwrap();
    let fd = open(&test, &file, "O_RDONLY");
    let size = format!("{}", 3 * MEGABYTE);
    let call = ["call", "one", "pread64", &fd, &format!("@{size}"), "@len", "0", "--json"];
    let printed = succeed_json(&test, &call);
    assert_eq!(printed["result"], text.len());
    let buffer = &printed["buffers"][0];
    assert!(buffer["text"] == text.as_str());
    let hex: String = text.bytes().map(|byte| format!("{byte:02x}")).collect();
    assert!(buffer["hex"] == hex);
    let printed = succeed(&test, &call[..call.len() - 1]);
    let escaped = text.as_bytes().escape_ascii();
    assert!(printed == format!("{}\nargument 2: \"{escaped}\"\n", text.len()));
    // No count tells how much of it was filled: all of it is printed.
    let printed = succeed(&test, &["call", "one", "getpid", &format!("@{size}")]);
    assert!(printed.ends_with(&format!("argument 1: \"\" and {size} zero bytes\n")), "{printed}");
}

/// Runs a command that has to succeed with [`BOUND`] bytes of memory of its own.
#[track_caller]
fn succeed_in_bound(test: &TestHome, arguments: &[&str]) {
    let mut command = farcall(test, arguments);
    let limit = || {
        let limit = libc::rlimit { rlim_cur: BOUND, rlim_max: BOUND };
        // SAFETY: `limit` is a valid rlimit, and setrlimit(2) keeps nothing of it.
        match unsafe { libc::setrlimit(libc::RLIMIT_DATA, &raw const limit) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // SAFETY: after fork(2) it makes one system call, and takes no lock or memory.
    unsafe { command.pre_exec(limit) };
    let status = command.stdout(Stdio::null()).status().unwrap();
    assert!(status.success(), "{arguments:?}: {status}");
}

#[test]
fn much_data_goes_through_a_command_of_little_memory() {
    let test = TestHome::new();
    start(&test, "one");
    let (from, there, to) = (test.file("from"), test.file("there"), test.file("to"));
    marked(&from, MUCH);
    let fd = open(&test, &there, "O_RDWR|O_CREAT");
    let input = format!("@@{}", from.display());
    succeed_in_bound(&test, &["call", "one", "write", &fd, &input, "@len"]);
    let (buffer, path) = (format!("@{MUCH}"), to.to_str().unwrap());
    let call = ["call", "one", "pread64", &fd, &buffer, "@len", "0", "--output", path];
    succeed_in_bound(&test, &call);
    assert_same(&from, &to);
    let printed = &call[..call.len() - 2];
    succeed_in_bound(&test, printed);
    // As JSON it takes long in a build without optimisation: a part will do.
    let buffer = format!("@{}", BOUND + MEGABYTE);
    let printed = ["call", "--json", "one", "pread64", &fd, &buffer, "@len", "0"];
    succeed_in_bound(&test, &printed);
}

/// A terminal: what its user sees of it, and what a program has of it.
fn terminal() -> (File, OwnedFd) {
    let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname_r(&master).unwrap();
    let theirs = File::options().read(true).write(true).open(name).unwrap();
    let ours = nix::unistd::dup(master.as_fd()).unwrap();
    (ours.into(), theirs.into())
}

/// Runs a command with standard error on a terminal: what is shown there.
fn shown(test: &TestHome, arguments: &[&str]) -> String {
    let (mut ours, theirs) = terminal();
    let mut command = farcall(test, arguments);
    let mut child = command.stdout(Stdio::null()).stderr(theirs).spawn().unwrap();
    drop(command);
    let mut shown = Vec::new();
    // EIO when no program has the terminal any more.
    let _ = ours.read_to_end(&mut shown);
    assert!(child.wait().unwrap().success());
    String::from_utf8(shown).unwrap()
}

#[test]
fn a_long_transfer_shows_its_progress_on_a_terminal_and_nowhere_else() {
    let test = TestHome::new();
    start(&test, "one");
    let (from, to) = (test.file("from"), test.file("to"));
    marked(&from, MUCH);
    let fd = open(&test, &from, "O_RDWR");
    let (input, output) = (format!("@@{}", from.display()), format!("@{MUCH}"));
    let send = ["call", "one", "pwrite64", &fd, &input, "@len", "0"];
    assert!(shown(&test, &send).contains("of 80.00 MiB sent"));
    let receive =
        ["call", "one", "pread64", &fd, &output, "@len", "0", "--output", to.to_str().unwrap()];
    assert!(shown(&test, &receive).contains("of 80.00 MiB received"));
    assert_eq!(run(&test, &receive).stderr, "");
    // A short one is not worth it.
    assert_eq!(shown(&test, &["call", "one", "pread64", &fd, "@1000", "1000", "0"]), "");
}
