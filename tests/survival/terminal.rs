//! The terminal that the controller was started on: its end, its keys, and the job control of the
//! shell on it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use nix::fcntl::OFlag;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};

use crate::common::{LIMIT, TestHome, alive, default_signals, state, until};
use crate::controller::{Controller, Model, one, play, survives};

/// A terminal, from the side of the one who sits at it.
struct Terminal {
    person: File,
    shell: File,
    seen: String,
}

impl Terminal {
    fn new() -> Self {
        // Nobody but who is to have it gets a copy, or it would never hang up.
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let person = posix_openpt(flags).unwrap();
        grantpt(&person).unwrap();
        unlockpt(&person).unwrap();
        let mut open = File::options();
        open.read(true).write(true).custom_flags(libc::O_NOCTTY);
        let shell = open.open(ptsname_r(&person).unwrap()).unwrap();
        // SAFETY: nobody else has the number.
        let person = unsafe {
            std::os::fd::FromRawFd::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(person))
        };
        Self { person, shell, seen: String::new() }
    }

    /// Makes it the terminal of a command that leads a session of its own, and its standard error.
    fn give_to(&self, command: &mut Command) {
        let terminal = self.shell.as_raw_fd();
        let take = move || {
            nix::unistd::setsid()?;
            // SAFETY: this ioctl takes a number, and the descriptor is open until exec.
            match unsafe { libc::ioctl(terminal, libc::TIOCSCTTY, 0) } {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        };
        command.stderr(self.shell.try_clone().unwrap());
        // A shell leaves ignored what is ignored when it begins.
        default_signals(command);
        // SAFETY: setsid(2) and ioctl(2) may be called between fork and exec.
        unsafe { command.pre_exec(take) };
    }

    fn types(&mut self, keys: &[u8]) {
        self.person.write_all(keys).unwrap();
    }

    /// Waits until it has shown that.
    #[track_caller]
    fn shows(&mut self, text: &str) {
        while !self.seen.contains(text) {
            let limit = PollTimeout::try_from(LIMIT).unwrap();
            let ready = poll(&mut [PollFd::new(self.person.as_fd(), PollFlags::POLLIN)], limit);
            assert_eq!(ready, Ok(1), "it does not show {text:?}: {:?}", self.seen);
            let mut bytes = [0; 4096];
            let n = self.person.read(&mut bytes).unwrap();
            self.seen += &String::from_utf8_lossy(&bytes[..n]);
        }
    }

    /// As when its window is closed, or the line is dropped.
    fn hang_up(self) {}
}

/// A controller that a shell with job control runs in the foreground of a terminal. The shell goes on
/// when the controller stops or ends.
fn in_foreground(test: &str, model: Model, home: &TestHome) -> (Controller, Terminal) {
    let terminal = Terminal::new();
    let controller = Controller::command(test, model, home);
    let mut shell = Command::new("/bin/sh");
    shell.args(["-m", "-c", "\"$@\"; while :; do sleep 3600; done", "sh"]);
    shell.arg(controller.get_program()).args(controller.get_args());
    shell.envs(controller.get_envs().filter_map(|(name, value)| Some((name, value?))));
    // A core dump would be left there.
    shell.current_dir(home.path().parent().unwrap());
    terminal.give_to(&mut shell);
    (Controller::start(&mut shell), terminal)
}

#[test]
fn the_end_of_its_controllers_session_when_the_terminal_hangs_up() {
    play();
    for model in Model::EACH {
        let test = "terminal::the_end_of_its_controllers_session_when_the_terminal_hangs_up";
        let home = TestHome::new();
        let (mut controller, terminal) = in_foreground(test, model, &home);
        terminal.hang_up();
        controller.died();
        controller.role.ended();
        survives(&home, controller.process);
    }
}

#[test]
fn the_end_of_the_shell_that_leads_the_session() {
    play();
    for model in Model::EACH {
        let test = "terminal::the_end_of_the_shell_that_leads_the_session";
        let home = TestHome::new();
        let (mut controller, _terminal) = in_foreground(test, model, &home);
        controller.role.kill();
        controller.died();
        survives(&home, controller.process);
    }
}

#[test]
fn ctrl_c_and_ctrl_backslash() {
    play();
    for key in [b"\x03", b"\x1c"] {
        for model in Model::EACH {
            let home = TestHome::new();
            let (controller, mut terminal) =
                in_foreground("terminal::ctrl_c_and_ctrl_backslash", model, &home);
            terminal.types(key);
            controller.died();
            survives(&home, controller.process);
        }
    }
}

#[test]
fn ctrl_z_which_stops_its_controller() {
    play();
    for model in Model::EACH {
        let home = TestHome::new();
        let (controller, mut terminal) =
            in_foreground("terminal::ctrl_z_which_stops_its_controller", model, &home);
        terminal.types(b"\x1a");
        until("the controller is stopped", || state(controller.pid) == Some('T'));
        until("so is its ordinary child", || state(controller.child) == Some('T'));
        survives(&home, controller.process);
    }
}

#[test]
fn writing_to_a_terminal_that_stops_who_writes_in_the_background() {
    play();
    let test = "terminal::writing_to_a_terminal_that_stops_who_writes_in_the_background";
    let home = TestHome::new();
    // It has the terminal as its standard error still.
    let (mut controller, mut terminal) = in_foreground(test, Model::Later, &home);
    let mut settings = tcgetattr(&terminal.shell).unwrap();
    settings.local_flags |= LocalFlags::TOSTOP;
    tcsetattr(&terminal.shell, SetArg::TCSANOW, &settings).unwrap();
    controller.role.say("write");
    assert_eq!(controller.role.told(), "6");
    terminal.shows("hello");
    controller.role.say("child writes");
    until("an ordinary child is stopped", || state(controller.child) == Some('T'));
    survives(&home, controller.process);
}

#[test]
fn the_hang_up_of_the_terminal_at_which_a_person_has_started_it() {
    let home = TestHome::new();
    let mut terminal = Terminal::new();
    let mut shell = Command::new("/bin/sh");
    shell.arg("-i").env("FARCALL_DIR", home.path()).env("PS1", "ready ").env_remove("ENV");
    shell.env("FARCALL", env!("CARGO_BIN_EXE_farcall"));
    let ends = [(); 2].map(|()| Stdio::from(terminal.shell.try_clone().unwrap()));
    let [stdin, stdout] = ends;
    terminal.give_to(shell.stdin(stdin).stdout(stdout));
    let mut shell = shell.spawn().unwrap();
    terminal.shows("ready ");
    terminal.types(b"\"$FARCALL\" start one\n");
    terminal.shows(&format!("{}: pid ", one()));
    let process = home.home.place(&one()).state().unwrap().process.pid;
    terminal.hang_up();
    shell.wait().unwrap();
    assert!(alive(process));
    survives(&home, process);
}
