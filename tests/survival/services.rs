//! What docs/systemd.md says, with this test in the service manager's place: a process that is started
//! on demand, and descriptors that the manager keeps for a controller.

use std::fs::{self, File};
use std::io::{IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use farcall::image::IMAGE;
use farcall::persist::{Home, SharedMemory, attach};
use farcall::{Local, Process};
use nix::cmsg_space;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::sys::stat::Mode;
use sd_notify::NotifyState;

use crate::common::{LIMIT, Role, TestHome, hear, role, tell};
use crate::controller::one;

/// Makes `fds` descriptors 3, 4 and so on of a command, as a service manager passes them.
fn listen_fds(command: &mut Command, fds: &[OwnedFd], names: &str) {
    command.env("LISTEN_FDS", fds.len().to_string()).env("LISTEN_FDNAMES", names);
    // Out of the way of the numbers that they are to have.
    let copy = |fd| fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(100)).unwrap();
    // SAFETY: they were just made.
    let fds: Vec<OwnedFd> =
        fds.iter().map(|fd| unsafe { OwnedFd::from_raw_fd(copy(fd)) }).collect();
    let pass = move || {
        for (fd, number) in fds.iter().zip(3..) {
            // SAFETY: what has the number there goes with exec in any case.
            Errno::result(unsafe { libc::dup2(fd.as_raw_fd(), number) })?;
        }
        Ok(())
    };
    // SAFETY: dup2(2) may be called between fork and exec.
    unsafe { command.pre_exec(pass) };
}

/// The same for a program that wants LISTEN_PID to be its own pid, which only it knows.
fn with_listen_pid(command: &Command) -> Command {
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", "LISTEN_PID=$$ exec \"$@\"", "sh"]);
    shell.arg(command.get_program()).args(command.get_args());
    shell.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    shell
}

/// Killed and reaped with the test.
struct Service(Child);

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_process_is_started_on_demand_and_again_after_its_death() {
    let home = TestHome::new();
    fs::create_dir_all(home.path()).unwrap();
    let image = home.file("image");
    let written = Command::new(env!("CARGO_BIN_EXE_farcall"))
        .args(["image", "-o"])
        .arg(&image)
        .output()
        .unwrap();
    assert!(written.status.success(), "{written:?}");
    assert_eq!(fs::read(&image).unwrap(), IMAGE);
    // The socket unit.
    let listener = UnixListener::bind(home.path().join("one.sock")).unwrap();
    for _ in 0..2 {
        // Somebody calls, and nobody is there.
        let mut call = Command::new(env!("CARGO_BIN_EXE_farcall"));
        call.args(["call", "one", "getpid"]).env("FARCALL_DIR", home.path());
        let call = call.stdout(Stdio::piped()).spawn().unwrap();
        let limit = PollTimeout::try_from(LIMIT).unwrap();
        let comes = poll(&mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)], limit);
        assert_eq!(comes, Ok(1), "nobody comes");
        // The service unit.
        let mut command = with_listen_pid(&Command::new(&image));
        listen_fds(&mut command, &[listener.try_clone().unwrap().into()], "connection");
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let service = Service(command.spawn().unwrap());
        let output = call.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let pid = String::from_utf8(output.stdout).unwrap();
        assert_eq!(pid.trim(), service.0.id().to_string());
    }
}

/// The service manager's end of `NOTIFY_SOCKET`.
struct Manager(UnixDatagram);

impl Manager {
    fn at(path: &Path) -> Self {
        let socket = UnixDatagram::bind(path).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        Self(socket)
    }

    /// The next message, and the descriptors that came with it.
    fn receives(&self) -> (String, Vec<OwnedFd>) {
        let mut bytes = [0; 4096];
        let mut space = cmsg_space!([RawFd; 8]);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message =
            recvmsg::<()>(self.0.as_raw_fd(), &mut parts, Some(&mut space), flags).unwrap();
        let mut fds = Vec::new();
        for part in message.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(numbers) = part {
                // SAFETY: they came with this message.
                fds.extend(numbers.iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }));
            }
        }
        let len = message.bytes;
        (String::from_utf8(bytes[..len].to_vec()).unwrap(), fds)
    }
}

/// The controller of a service, as docs/systemd.md has it.
async fn service(home: &Home) {
    let mut kept = sd_notify::listen_fds_with_names().unwrap();
    let Some((number, name)) = kept.next() else { return first(home).await };
    assert_eq!(name, "web");
    // SAFETY: the manager has passed it, and nobody else takes it.
    let kept = unsafe { OwnedFd::from_raw_fd(number) };
    // It is the process itself: its pid can't be another's by now.
    let lives = poll(&mut [PollFd::new(kept.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO);
    assert_eq!(lives, Ok(0), "it has not ended");
    let process = attach(home.place(&one())).await.unwrap();
    let identity = |fd| {
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
        info.lines().find(|line| line.starts_with("Pid:")).unwrap().to_owned()
    };
    assert_eq!(identity(kept.as_raw_fd()), identity(process.pidfd().as_raw_fd()));
    tell(read_kept(&process).await);
}

async fn first(home: &Home) {
    let root = Local::new().stdio(farcall::host::local::Stdio::Null).start().await.unwrap();
    let reserved = home.reserve(&one()).unwrap();
    let process = root.child().spawn_persistent(reserved, SharedMemory::Refuse).await.unwrap();
    let file = process.openat(None, hear(), OFlag::O_RDONLY, Mode::empty()).await.unwrap();
    assert_eq!(process.read(&file, 6).await.unwrap(), b"hello ");
    tell(file.into_raw());
    let state = [NotifyState::FdStore, NotifyState::FdName("web")];
    sd_notify::notify_with_fds(&state, &[process.pidfd()]).unwrap();
    sd_notify::notify(&[NotifyState::Ready]).unwrap();
    std::future::pending::<()>().await;
}

/// What the descriptor that the process has kept reads next.
async fn read_kept(process: &Process) -> String {
    let file = process.adopt_fd(hear().parse().unwrap()).unwrap();
    String::from_utf8(process.read(&file, 100).await.unwrap()).unwrap()
}

#[test]
fn the_manager_keeps_descriptors_for_the_next_controller_and_the_process_its_own() {
    let test =
        "services::the_manager_keeps_descriptors_for_the_next_controller_and_the_process_its_own";
    if let Some(path) = role() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(service(&Home::at(path)));
        return;
    }
    let home = TestHome::new();
    let file = home.file("file");
    File::create(&file).unwrap().write_all(b"hello world").unwrap();
    let manager = Manager::at(&home.file("notify"));
    let mut command = Role::command(test, home.path());
    command.env("NOTIFY_SOCKET", home.file("notify"));
    let mut controller = Role::run(&mut command);
    controller.say(file.to_str().unwrap());
    let number = controller.told();
    let (message, kept) = manager.receives();
    assert_eq!(message, "FDSTORE=1\nFDNAME=web\n");
    assert_eq!(kept.len(), 1);
    assert_eq!(manager.receives().0, "READY=1\n");
    controller.kill();

    // The restart of the service.
    let mut command = with_listen_pid(&Role::command(test, home.path()));
    listen_fds(&mut command, &kept, "web");
    let mut controller = Role::run(&mut command);
    controller.say(&number);
    assert_eq!(controller.told(), "world");
}
