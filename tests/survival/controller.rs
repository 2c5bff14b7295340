//! A controller in another process, whose end a test brings about.

use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use farcall::host::local::Stdio;
use farcall::persist::{Attach, Home, Name, SharedMemory};
use farcall::{Child, Local, Process};
use nix::sys::signal::{SigHandler, Signal, signal};

use crate::common::{Role, TestHome, alive, hear, role, tell, until};

/// The name of the persistent process.
pub fn one() -> Name {
    "one".parse().unwrap()
}

/// How a process becomes persistent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Model {
    /// From the start: it holds nothing of its controller.
    Start,
    /// Later: it has its controller's standard streams still.
    Later,
    /// Later, and it shares its parent's memory.
    Memory,
    /// From the start, in a cgroup of its own.
    Cgroup,
}

use Model::{Cgroup, Later, Memory, Start};

impl Model {
    /// Those that differ in what they hold of their controller.
    pub const EACH: [Self; 2] = [Start, Later];

    pub async fn make(self, home: &Home, root: &Process) -> Child {
        let reserved = home.reserve(&one()).unwrap();
        let (child, memory) = match self {
            Start => {
                return root
                    .child()
                    .spawn_persistent(reserved, SharedMemory::Refuse)
                    .await
                    .unwrap();
            }
            Cgroup => {
                let reserved = reserved.in_own_cgroup(None);
                return root
                    .child()
                    .spawn_persistent(reserved, SharedMemory::Refuse)
                    .await
                    .unwrap();
            }
            Later => (root.child(), SharedMemory::Refuse),
            Memory => (root.child().share_memory(), SharedMemory::Keep),
        };
        let child = child.spawn().await.unwrap();
        child.make_persistent(reserved, memory).await.unwrap();
        child
    }
}

/// If this process is a controller: makes a persistent process and an ordinary child, and does what
/// the test says, until it ends.
pub fn play() {
    let Some(argument) = role() else { return };
    let (model, path) = argument.split_once(' ').unwrap();
    let model = [Start, Later, Memory, Cgroup].into_iter().find(|m| format!("{m:?}") == model);
    assert_eq!(hear(), "begin");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let root = Local::new().stdio(Stdio::Inherit).start().await.unwrap();
        let process = model.unwrap().make(&Home::at(path), &root).await;
        let child = root.child().spawn().await.unwrap();
        let pids = [std::process::id() as i32, process.pid().unwrap(), child.pid().unwrap()];
        tell(pids.map(|pid| pid.to_string()).join(" "));
        loop {
            match hear().as_str() {
                "abort" => std::process::abort(),
                "segv" => crash(),
                "eat" => eat(),
                "sleep" => {
                    let program = process.child().spawn().await.unwrap();
                    program.execve("/bin/sleep", ["sleep", "3600"], [""; 0]).await.unwrap();
                    tell(program.pid().unwrap());
                    std::mem::forget(program);
                }
                "write" => tell(process_writes(&process).await),
                "child writes" => {
                    child.syscall(farcall::calls::Sysno::setpgid, [0; 6]).await.unwrap();
                    // Stopped in it.
                    let _ = process_writes(&child).await;
                }
                other => panic!("{other}"),
            }
        }
    });
}

/// Writes to standard error, which is the terminal in tests that have one.
async fn process_writes(process: &Process) -> usize {
    let terminal = process.adopt_fd(2).unwrap();
    let written = process.write(&terminal, *b"hello\n").await.unwrap();
    let _ = terminal.into_raw();
    written
}

/// Ends as an access to no memory does.
fn crash() -> ! {
    // SAFETY: the default action is no handler of this process's.
    unsafe { signal(Signal::SIGSEGV, SigHandler::SigDfl) }.unwrap();
    nix::sys::signal::raise(Signal::SIGSEGV).unwrap();
    unreachable!("the default action is a core dump")
}

/// Takes memory until it is killed for it.
fn eat() -> ! {
    let mut eaten = Vec::new();
    loop {
        eaten.push(std::hint::black_box(vec![1u8; 1 << 20]));
    }
}

/// A controller, the persistent process and the ordinary child that it has made.
pub struct Controller {
    pub role: Role,
    /// Its own pid, which is not that of the command where a shell runs it.
    pub pid: i32,
    pub process: i32,
    pub child: i32,
}

impl Controller {
    /// The command that [`play`]s the controller in the test of that name.
    pub fn command(test: &str, model: Model, home: &TestHome) -> Command {
        let argument = format!("{model:?} {}", home.path().display());
        Role::command(test, argument)
    }

    pub fn start(command: &mut Command) -> Self {
        Self::start_when(command, |_| {})
    }

    /// The same, where something has to be done to it before it makes processes.
    pub fn start_when(command: &mut Command, ready: impl FnOnce(i32)) -> Self {
        let mut role = Role::run(command);
        ready(role.pid());
        role.say("begin");
        let pids: Vec<i32> = role.told().split(' ').map(|pid| pid.parse().unwrap()).collect();
        let [pid, process, child] = pids[..] else { panic!("{pids:?}") };
        Self { role, pid, process, child }
    }

    /// Waits until the controller has died of that signal, and its ordinary child with it. Returns
    /// whether it has dumped core.
    #[track_caller]
    pub fn died_of(&mut self, signal: Signal) -> bool {
        let status = self.role.ended();
        assert_eq!(status.signal(), Some(signal as i32), "{status}");
        self.died();
        status.core_dumped()
    }

    /// Waits until the controller has died, and its ordinary child with it.
    #[track_caller]
    pub fn died(&self) {
        until("the controller dies", || !alive(self.pid));
        until("its ordinary child dies with it", || !alive(self.child));
    }
}

/// The process works as before, and its next controller can let it end.
#[track_caller]
pub fn survives(home: &TestHome, process: i32) {
    assert!(alive(process), "it did not survive");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        // One that is stopped holds it still.
        let next = Attach::default().take_over().to(home.home.place(&one())).await.unwrap();
        assert_eq!(next.pid(), Some(process));
        assert_eq!(next.getpid().await.unwrap(), process);
        next.exit(0).await.unwrap();
    });
    until("it ends", || !alive(process));
}
