//! Processes below this one: what loses its parent becomes a child of this one, so that it can be
//! seen whatever it is.

use std::fs;
use std::process::Command;

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, wait, waitpid};
use nix::unistd::Pid;

/// From now on, every process below this one whose parent ends becomes this one's child.
pub fn adopt_orphans() -> Result<(), String> {
    nix::sys::prctl::set_child_subreaper(true).map_err(|error| format!("prctl(2): {error}"))
}

/// Runs a command and says whether it succeeded. Orphans that end meanwhile are reaped at once, as
/// they would be by process 1.
pub fn succeeds(command: &mut Command) -> Result<bool, String> {
    let program = command.get_program().to_owned();
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", program.display());
    // Reaped below, among the others.
    let child = command.spawn().map_err(|error| failed(&error))?;
    loop {
        match wait() {
            Ok(status) if status.pid().map(Pid::as_raw) == Some(child.id().cast_signed()) => {
                return Ok(matches!(status, WaitStatus::Exited(_, 0)));
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(failed(&error)),
        }
    }
}

/// Reaps what has ended, and describes the children that live.
pub fn children() -> Vec<String> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => break,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return Vec::new(),
        }
    }
    let Ok(processes) = fs::read_dir("/proc") else {
        return vec!["an unknown process: /proc can't be read".into()];
    };
    let parent = format!("PPid:\t{}", std::process::id());
    processes
        .flatten()
        .filter(|process| {
            let status = fs::read_to_string(process.path().join("status")).unwrap_or_default();
            status.lines().any(|line| line == parent)
        })
        .map(|process| {
            let exe = fs::read_link(process.path().join("exe")).unwrap_or_default();
            let comm = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            let pid = process.file_name();
            format!("process {}, {} ({})", pid.display(), comm.trim_end(), exe.display())
        })
        .collect()
}
