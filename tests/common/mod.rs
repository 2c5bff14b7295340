//! What several tests need: roles for other processes, a home of their own, and looks into /proc.
#![allow(dead_code, unused_imports, reason = "each test file uses its own part of it")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use farcall::Process;
use farcall::calls::Sysno;
use farcall::persist::{Home, Incarnation, Sameness};
use nix::errno::Errno;
use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{Shutdown, getsockopt, shutdown, sockopt};
use nix::unistd::Pid;

mod faults;
mod random;
mod setup;

pub use faults::{with_fault, with_mutant};
pub use random::Random;
pub use setup::{
    attach, limit_descriptors, persistent, root, root_without_rings, roots, spawn_persistent,
};

/// How long a test waits for an event before it fails loudly: longer than anything takes on a machine that
/// is emulated on a busy one. No claim is about time.
pub const LIMIT: Duration = Duration::from_secs(120);

/// Waits for something to become true.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < end, "{what}: still not so after {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The same where calls have to go on meanwhile.
pub async fn until_async(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < end, "{what}: still not so after {LIMIT:?}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// A directory for sockets that is gone, with all processes in it, when the test is over.
pub struct TestHome {
    directory: tempfile::TempDir,
    pub home: Home,
}

impl TestHome {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::at(directory.path().join("home"));
        Self { directory, home }
    }

    /// The same, for the process of another role.
    pub fn path(&self) -> &Path {
        self.home.path()
    }

    /// A file beside the sockets' directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

impl Drop for TestHome {
    fn drop(&mut self) {
        for name in self.home.names().unwrap_or_default() {
            // One whose socket a test has removed.
            if let Some(pid) = self.home.place(&name).served_unlinked() {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            let Some(state) = self.home.place(&name).state() else { continue };
            if state.process.is_alive() {
                let _ = kill(Pid::from_raw(state.process.pid), Signal::SIGKILL);
            }
            let end = Instant::now() + LIMIT;
            while !state.cgroups.is_empty() && state.process.is_alive() && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(1));
            }
            let _ = self.home.place(&name).remove_cgroups();
        }
    }
}

/// The variable that says which role a process of a test's plays.
const ROLE: &str = "FARCALL_TEST_ROLE";

/// The argument of the role that this process plays, if it is one that a test has started.
pub fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

/// Tells the test that has started this process something.
pub fn tell(word: impl std::fmt::Display) {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "\n>>> {word}").unwrap();
    stdout.flush().unwrap();
}

/// Waits for the test that has started this process to say something.
pub fn hear() -> String {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    line.trim_end().into()
}

/// Another process that runs the test of that name, in the role with that argument. It is killed
/// when it is dropped.
pub struct Role {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Role {
    pub fn start(test: &str, argument: impl AsRef<std::ffi::OsStr>) -> Self {
        Self::run(&mut Self::command(test, argument))
    }

    /// The command of `start`, to be changed.
    pub fn command(test: &str, argument: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let arguments = ["--exact", &whole_name(test), "--include-ignored", "--nocapture"];
        command.args(arguments).env(ROLE, argument);
        default_signals(&mut command);
        command
    }

    pub fn run(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, input, output }
    }

    /// The next thing that it tells.
    pub fn told(&mut self) -> String {
        loop {
            let mut line = String::new();
            let n = self.output.read_line(&mut line).unwrap();
            assert!(n > 0, "the other process ended: {:?}", self.child.wait());
            if let Some(word) = line.strip_prefix(">>> ") {
                return word.trim_end().into();
            }
        }
    }

    pub fn say(&mut self, word: &str) {
        writeln!(self.input, "{word}").unwrap();
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Waits until it has ended by itself.
    pub fn ended(&mut self) -> ExitStatus {
        let mut status = None;
        until("the other process ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Gives a command the default action of every signal, whatever is ignored here: a shell's background
/// jobs ignore SIGINT and SIGQUIT, and what nohup(1) runs ignores SIGHUP.
pub fn default_signals(command: &mut Command) {
    let default = || {
        for signal in 1..=nix::libc::SIGRTMAX() {
            // SAFETY: the default action is no handler of this process's. SIGKILL and SIGSTOP have no
            // other one, and libc keeps two signals for itself: these fail.
            unsafe { nix::libc::signal(signal, nix::libc::SIG_DFL) };
        }
        Ok(())
    };
    // SAFETY: signal(2) may be called between fork and exec.
    unsafe { command.pre_exec(default) };
}

/// A test's name with the modules that it is in, from a name that stands for no other test of this
/// program.
fn whole_name(test: &str) -> String {
    static NAMES: LazyLock<String> = LazyLock::new(|| {
        let mut list = Command::new(std::env::current_exe().unwrap());
        let output = list.args(["--list", "--format", "terse"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    });
    let is_it =
        |name: &&str| name.strip_suffix(test).is_some_and(|n| n.is_empty() || n.ends_with("::"));
    let names = NAMES.lines().filter_map(|line| line.strip_suffix(": test"));
    match names.filter(is_it).collect::<Vec<_>>()[..] {
        [name] => name.to_owned(),
        ref names => panic!("not one test is called {test}: {names:?}"),
    }
}

/// Has a test's body run in a process that runs nothing else, which is for what belongs to a process
/// as a whole: limits, umask, signals, how much memory it takes. True in that process; where it is
/// false it has been run.
pub fn alone(test: &str) -> bool {
    if role().is_some() {
        return true;
    }
    let mut role = Role::start(test, "alone");
    let mut output = String::new();
    role.output.read_to_string(&mut output).unwrap();
    print!("{output}");
    assert!(role.child.wait().unwrap().success(), "{test}, in a process of its own, has failed");
    false
}

/// The process that has this pid now; a zombie is none.
pub fn alive(pid: i32) -> bool {
    Incarnation::of(pid).is_some()
}

/// The descriptors of a process and what they are.
pub fn fds(pid: i32) -> BTreeMap<i32, PathBuf> {
    fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let number = entry.file_name().to_str()?.parse().ok()?;
            Some((number, fs::read_link(entry.path()).ok()?))
        })
        .collect()
}

/// The state letter of a process: S, R, Z, T.
pub fn state(pid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

/// The number of the call that a process is blocked in.
pub fn blocked_in(pid: i32) -> Option<usize> {
    let text = fs::read_to_string(format!("/proc/{pid}/syscall")).ok()?;
    text.split_whitespace().next()?.parse().ok()
}

/// Lets a call fail in a process, and in all that it makes from here on, as it does on another kernel or
/// in a container: always, or if its second argument is that.
pub async fn deny(process: &Process, call: Sysno, second: Option<u64>, errno: Errno) {
    let program = denial(call, second, errno);
    let len = program.len() as u64;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let memory = process.mmap(4096, protection, MapFlags::MAP_PRIVATE, None).await.unwrap();
    let at = memory.address();
    let mut bytes = len.to_le_bytes().to_vec();
    bytes.extend((at + 16).to_le_bytes());
    for libc::sock_filter { code, jt, jf, k } in program {
        bytes.extend(code.to_le_bytes());
        bytes.extend([jt, jf]);
        bytes.extend(k.to_le_bytes());
    }
    process.write_memory(at, bytes).await.unwrap();
    let option = libc::PR_SET_NO_NEW_PRIVS as u64;
    process.syscall(Sysno::prctl, [option, 1, 0, 0, 0, 0]).await.unwrap();
    let mode = u64::from(libc::SECCOMP_SET_MODE_FILTER);
    process.syscall(Sysno::seccomp, [mode, 0, at, 0, 0, 0]).await.unwrap();
}

/// The same for this thread and those that it starts, for good.
pub fn deny_here(call: Sysno, errno: Errno) {
    let mut program = denial(call, None, errno);
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    let mode = libc::SECCOMP_SET_MODE_FILTER;
    // SAFETY: the kernel reads the program, which has as many instructions as it says.
    let set = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::syscall(libc::SYS_seccomp, mode, 0, &raw const program) == 0
    };
    assert!(set, "{}", std::io::Error::last_os_error());
}

/// A filter that lets a call fail.
fn denial(call: Sysno, second: Option<u64>, errno: Errno) -> Vec<libc::sock_filter> {
    let action = libc::SECCOMP_RET_ERRNO | errno as u32;
    let load = |at| (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, at);
    let unless = |value, skip| (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, skip, value);
    let answer = |action| (libc::BPF_RET | libc::BPF_K, 0, 0, action);
    let mut program = vec![load(0)];
    if let Some(second) = second {
        program.extend([unless(call as u32, 3), load(24), unless(second as u32, 1)]);
    } else {
        program.push(unless(call as u32, 1));
    }
    program.extend([answer(action), answer(libc::SECCOMP_RET_ALLOW)]);
    let instruction = |(code, jt, jf, k)| libc::sock_filter { code: code as u16, jt, jf, k };
    program.into_iter().map(instruction).collect()
}

/// The version of the kernel, without what comes behind its first two numbers.
pub fn linux() -> (u32, u32) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}

/// From which kernel on the children of one pid, and pidfds, can be told apart.
pub const TELLS_PIDFDS: (u32, u32) = (6, 9);

/// Whether that is said of a child, or of a pidfd, that is the same as before.
pub fn is_same_child(state: &Sameness) -> bool {
    match state {
        Sameness::Same => linux() >= TELLS_PIDFDS,
        Sameness::Unverified(_) => linux() < TELLS_PIDFDS,
        Sameness::Changed(_) => false,
    }
}

/// Ends a connection, by duplicates of the server's sockets.
pub fn cut(process: &Process) {
    shut_down(process, usize::MAX);
}

/// Ends the stream of a connection alone: the data socket ends when the server hangs up.
pub fn cut_stream(process: &Process) {
    // Of the two, which come together, it has the lower number.
    shut_down(process, 1);
}

fn shut_down(process: &Process, mut sockets: usize) {
    for number in process.server_descriptors() {
        // SAFETY: the calls have no pointers.
        unsafe {
            let pidfd = process.pidfd().as_raw_fd();
            let fd = libc::syscall(libc::SYS_pidfd_getfd, pidfd, number, 0) as i32;
            if fd < 0 {
                continue;
            }
            let fd = OwnedFd::from_raw_fd(fd);
            if sockets > 0 && getsockopt(&fd, sockopt::AcceptConn) == Ok(false) {
                sockets -= 1;
                let _ = shutdown(fd.as_raw_fd(), Shutdown::Both);
            }
        }
    }
}
