//! Signals to the controller's process group and to its session.

use std::fs;
use std::os::unix::process::CommandExt;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::common::{TestHome, alive, until};
use crate::controller::{Controller, Model, play, survives};

/// A controller that leads a session, and so a group.
fn leader(test: &str, model: Model, home: &TestHome) -> Controller {
    let mut command = Controller::command(test, model, home);
    // SAFETY: setsid(2) may be called between fork and exec.
    unsafe { command.pre_exec(|| Ok(nix::unistd::setsid().map(drop)?)) };
    Controller::start(&mut command)
}

#[test]
fn sighup_to_the_group_of_its_controller() {
    play();
    for model in Model::EACH {
        let home = TestHome::new();
        let mut controller = leader("groups::sighup_to_the_group_of_its_controller", model, &home);
        killpg(Pid::from_raw(controller.role.pid()), Signal::SIGHUP).unwrap();
        controller.died_of(Signal::SIGHUP);
        survives(&home, controller.process);
    }
}

/// Field 6 of /proc/PID/stat, as this pid namespace sees it.
fn session(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(3)?.parse().ok()
}

#[test]
fn sigkill_to_all_in_the_session_of_its_controller() {
    play();
    for model in Model::EACH {
        let home = TestHome::new();
        let mut controller =
            leader("groups::sigkill_to_all_in_the_session_of_its_controller", model, &home);
        let leader = controller.role.pid();
        assert_eq!(session(controller.child), Some(leader), "an ordinary one is in the session");
        for entry in fs::read_dir("/proc").unwrap() {
            let Ok(pid) = entry.unwrap().file_name().to_string_lossy().parse() else { continue };
            if session(pid) == Some(leader) {
                // It may have ended meanwhile, with its parent.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        controller.died_of(Signal::SIGKILL);
        survives(&home, controller.process);
    }
}

#[test]
fn each_signal_to_all_in_the_group_that_ends_or_stops() {
    play();
    for signal in [
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGTERM,
        Signal::SIGALRM,
        Signal::SIGUSR1,
        Signal::SIGSTOP,
    ] {
        let home = TestHome::new();
        let controller = leader(
            "groups::each_signal_to_all_in_the_group_that_ends_or_stops",
            Model::Later,
            &home,
        );
        let child = controller.child;
        killpg(Pid::from_raw(controller.role.pid()), signal).unwrap();
        until("an ordinary child ends or stops", || {
            !alive(child) || crate::common::state(child) == Some('T')
        });
        survives(&home, controller.process);
    }
}
