//! Processes below this one: what loses its parent becomes a child of this one, so that it can be
//! seen whatever it is.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Seek};
use std::path::Path;
use std::process::Command;

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, wait, waitpid};

/// From now on, every process below this one whose parent ends becomes this one's child.
pub fn adopt_orphans() -> Result<(), String> {
    nix::sys::prctl::set_child_subreaper(true).map_err(|error| format!("prctl(2): {error}"))
}

/// A command, and what it is called.
pub struct Run {
    pub name: String,
    pub command: Command,
}

/// Commands that run one after another, beside those of other lanes.
pub struct Lane {
    runs: VecDeque<Run>,
    /// Where the output of the one that runs goes, if it is shown when that has ended.
    output: Option<File>,
    is_shown: bool,
    running: Option<(u32, String)>,
}

impl Lane {
    /// Output is shown as it comes.
    pub fn shown(runs: Vec<Run>) -> Self {
        Self { runs: runs.into(), output: None, is_shown: true, running: None }
    }

    /// What a command prints is shown when it has ended: others print meanwhile.
    pub fn told_later(runs: Vec<Run>) -> Self {
        Self { is_shown: false, ..Self::shown(runs) }
    }

    /// Sets a variable for all commands.
    pub fn env(&mut self, name: &str, value: &Path) {
        for run in &mut self.runs {
            run.command.env(name, value);
        }
    }

    /// Starts the next command, if there is one.
    fn start(&mut self) -> Result<(), String> {
        let Some(Run { name, mut command }) = self.runs.pop_front() else { return Ok(()) };
        if self.is_shown {
            println!("xtask: {name}");
        } else {
            println!(
                "xtask: {name}\nxtask: (beside the others; its output follows when it has ended)"
            );
            let file = output_file().map_err(|error| format!("a file for its output: {error}"))?;
            let copy = || file.try_clone().map_err(|error| format!("dup(2): {error}"));
            command.stdout(copy()?).stderr(copy()?);
            self.output = Some(file);
        }
        self.running = Some((spawn(&mut command)?, name));
        Ok(())
    }

    /// The command that runs has ended: shows what it has printed. Returns its name.
    fn end(&mut self) -> String {
        let (_, name) = self.running.take().expect("it has run");
        if let Some(mut file) = self.output.take() {
            println!("xtask: the output of {name}:");
            let copied = file.rewind().and_then(|()| io::copy(&mut file, &mut io::stdout().lock()));
            if let Err(error) = copied {
                eprintln!("xtask: its output is lost: {error}");
            }
        }
        name
    }
}

/// A file without a name.
fn output_file() -> io::Result<File> {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    Ok(memfd_create(c"output", MFdFlags::MFD_CLOEXEC)?.into())
}

/// Runs all of these. Returns which commands failed.
pub fn run(mut lanes: Vec<Lane>) -> Result<Vec<String>, String> {
    let mut problems = Vec::new();
    for lane in &mut lanes {
        lane.start()?;
    }
    while lanes.iter().any(|lane| lane.running.is_some()) {
        let (pid, succeeded) = ended()?;
        let is_its = |lane: &&mut Lane| lane.running.as_ref().is_some_and(|(own, _)| *own == pid);
        let Some(lane) = lanes.iter_mut().find(is_its) else { continue };
        let name = lane.end();
        if !succeeded {
            problems.push(format!("{name} failed"));
        }
        lane.start()?;
    }
    Ok(problems)
}

/// Runs a command and says whether it succeeded.
pub fn succeeds(command: &mut Command) -> Result<bool, String> {
    let own = spawn(command)?;
    loop {
        let (pid, succeeded) = ended()?;
        if pid == own {
            return Ok(succeeded);
        }
    }
}

/// Starts a command: its pid. `ended` reaps it, among the others.
fn spawn(command: &mut Command) -> Result<u32, String> {
    let program = command.get_program().to_owned();
    let child = command.spawn().map_err(|error| format!("{}: {error}", program.display()))?;
    Ok(child.id())
}

/// Waits until a process below this one ends: its pid, and whether it exited with 0. Orphans that end
/// are reaped at once, as they would be by process 1.
fn ended() -> Result<(u32, bool), String> {
    loop {
        match wait() {
            Ok(status) => {
                if let Some(pid) = status.pid() {
                    let succeeded = matches!(status, WaitStatus::Exited(_, 0));
                    return Ok((pid.as_raw().cast_unsigned(), succeeded));
                }
            }
            Err(Errno::EINTR) => {}
            Err(error) => return Err(format!("wait(2): {error}")),
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
