//! Runs the built binary, as a script would.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::stat::Mode;
use serde_json::Value;

use crate::common::{TestHome, alive, fds};

/// How long a command may take before the test fails. No claim is about time.
const LIMIT: Duration = Duration::from_secs(90);

/// A command line of `farcall` in a home of the test's own.
pub fn farcall(test: &TestHome, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_farcall"));
    command.args(arguments).env("FARCALL_DIR", test.path()).stdin(Stdio::null());
    command
}

/// The same as a user without any rights, and with that umask.
pub fn farcall_as(uid: u32, umask: u32, test: &TestHome, arguments: &[&str]) -> Command {
    assert!(nix::unistd::geteuid().is_root(), "this test acts as another user: run it as root");
    // The program may lie where that user does not come.
    let program = File::open(env!("CARGO_BIN_EXE_farcall")).unwrap();
    let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
    command.args(arguments).env("FARCALL_DIR", test.path()).stdin(Stdio::null());
    command.uid(uid).gid(uid).current_dir("/").env("TMPDIR", "/tmp");
    // The descriptor goes with the command.
    let prepare = move || {
        fcntl(&program, FcntlArg::F_SETFD(FdFlag::empty()))?;
        nix::sys::stat::umask(Mode::from_bits_truncate(umask));
        Ok(())
    };
    // SAFETY: fcntl(2) and umask(2) may be called between fork and exec.
    unsafe { command.pre_exec(prepare) };
    command
}

/// What a command has done.
#[derive(Debug)]
pub struct Ran {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a command line of `farcall`.
#[track_caller]
pub fn run(test: &TestHome, arguments: &[&str]) -> Ran {
    Running::start(&mut farcall(test, arguments)).finish()
}

/// The same where it has to succeed. Returns what it has printed.
#[track_caller]
pub fn succeed(test: &TestHome, arguments: &[&str]) -> String {
    let ran = run(test, arguments);
    assert_eq!(ran.status.code(), Some(0), "{arguments:?}: {ran:?}");
    assert_eq!(ran.stderr, "", "{arguments:?}");
    ran.stdout
}

/// The same with JSON.
#[track_caller]
pub fn succeed_json(test: &TestHome, arguments: &[&str]) -> Value {
    json(&succeed(test, arguments))
}

/// Runs a command that has to fail with that code. Returns what it says on standard error.
#[track_caller]
pub fn fail(test: &TestHome, code: i32, arguments: &[&str]) -> String {
    let ran = run(test, arguments);
    assert_eq!(ran.status.code(), Some(code), "{arguments:?}: {ran:?}");
    assert_eq!(ran.stdout, "", "{arguments:?}");
    assert!(!ran.stderr.contains("panicked"), "{arguments:?}: {}", ran.stderr);
    assert_ne!(ran.stderr, "", "{arguments:?}: it does not say why");
    ran.stderr
}

/// Standard output that is one line with one value.
#[track_caller]
pub fn json(stdout: &str) -> Value {
    assert_eq!(stdout.matches('\n').count(), 1, "one line: {stdout}");
    serde_json::from_str(stdout).unwrap_or_else(|error| panic!("{error}: {stdout}"))
}

/// The keys of an object, in order of the alphabet.
pub fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

/// A persistent process of that name: its pid.
#[track_caller]
pub fn start(test: &TestHome, name: &str) -> i32 {
    let started = succeed_json(test, &["start", name, "--json"]);
    let pid = started["pid"].as_i64().unwrap() as i32;
    assert!(alive(pid), "{started}");
    pid
}

/// A command that runs, with pipes for its output. It is killed when it is dropped.
pub struct Running {
    child: Child,
    stdout: mpsc::Receiver<String>,
    stderr: mpsc::Receiver<String>,
    /// What its pipes are called in /proc.
    pub pipes: Vec<PathBuf>,
}

impl Running {
    pub fn start(command: &mut Command) -> Self {
        Self::start_into(Stdio::piped(), command)
    }

    /// The same with another standard output, of which nothing is known then.
    pub fn start_into(stdout: Stdio, command: &mut Command) -> Self {
        let mut child = command.stdout(stdout).stderr(Stdio::piped()).spawn().unwrap();
        let ours = fds(std::process::id() as i32);
        let name = |fd: RawFd| ours[&fd].clone();
        let numbers = [
            child.stdin.as_ref().map(AsRawFd::as_raw_fd),
            child.stdout.as_ref().map(AsRawFd::as_raw_fd),
            child.stderr.as_ref().map(AsRawFd::as_raw_fd),
        ];
        let pipes = numbers.into_iter().flatten().map(name).collect();
        let (stdout, stderr) = (read(child.stdout.take()), read(child.stderr.take()));
        Self { child, stdout, stderr, pipes }
    }

    /// Its standard input, if that is a pipe.
    pub fn stdin(&mut self) -> ChildStdin {
        self.child.stdin.take().unwrap()
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Waits until it has ended, and until nobody holds its pipes.
    #[track_caller]
    pub fn finish(mut self) -> Ran {
        let end = Instant::now() + LIMIT;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < end, "it still runs after {LIMIT:?}");
            thread::sleep(Duration::from_millis(1));
        };
        let [stdout, stderr] =
            [("output", &self.stdout), ("error", &self.stderr)].map(|(name, pipe)| {
                match pipe.recv_timeout(LIMIT) {
                    Ok(text) => text,
                    Err(_) => panic!("somebody still holds standard {name} after {LIMIT:?}"),
                }
            });
        Ran { status, stdout, stderr }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads until nobody can write any more; from no pipe, nothing.
fn read(from: Option<impl Read + Send + 'static>) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut text = String::new();
        if let Some(mut from) = from {
            from.read_to_string(&mut text).unwrap();
        }
        let _ = sender.send(text);
    });
    receiver
}
