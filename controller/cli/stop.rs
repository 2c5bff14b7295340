//! `farcall stop`: ends a persistent process.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use farcall::Error;
use farcall::persist::{Files, Home, Incarnation, Name, Place, State};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::cli::reach::Reach;
use crate::command::output::{print, print_json, warn};
use crate::command::process::until_gone;
use crate::command::{Done, Failure};

/// Ends a persistent process and removes its socket, and its cgroup if it was started with one.
///
/// The process exits by itself, with status 0; with --kill it is killed, whoever holds it.
#[derive(Args)]
pub struct Stop {
    /// Its name
    name: Name,
    #[command(flatten)]
    reach: Reach,
    /// Send SIGKILL instead of attaching: for a process that can't be taken over either
    #[arg(long, conflicts_with_all = ["take_over", "wait", "timeout"])]
    kill: bool,
    /// Print {"name", "pid", "stopped"} instead of text; "stopped" is false if it was gone already
    #[arg(long)]
    json: bool,
}

/// How long an ending process is waited for.
const LIMIT: Duration = Duration::from_secs(10);

/// How long others in its cgroup are waited for.
const LIMIT_OF_CHILDREN: Duration = Duration::from_secs(2);

impl Stop {
    pub async fn run(self) -> Done {
        let place = Home::find()?.place(&self.name);
        // What others put there meanwhile is not removed.
        let files = place.files()?;
        let state = files.state().cloned();
        // One whose files were removed is ended as well.
        let unlinked = if files.has_socket() { None } else { place.served_unlinked() };
        let unlinked = unlinked.and_then(Incarnation::of);
        if files.is_empty() && unlinked.is_none() {
            let path = place.socket().display();
            return Err(Failure::new(format!(
                "there is no persistent process {} ({path} does not exist)",
                self.name
            )));
        }
        if state.as_ref().is_some_and(State::is_reserved) {
            return Err(Failure::new(format!("{} is just being started: try again", self.name)));
        }
        let process = unlinked.or(state.map(|state| state.process).filter(Incarnation::is_alive));
        let mut pid = process.as_ref().map(|process| process.pid);
        let stopped = if self.kill {
            let killed = kill(&place, process.is_some()).await?;
            pid = killed.or(pid);
            killed.is_some()
        } else {
            self.exit(&place, &files, process.is_some()).await?
        };
        if let Some(process) = &process {
            until_gone(process, LIMIT).await?;
        }
        // Whoever passed the socket on may still listen on it, to start the process again.
        if !place.is_listening() {
            remove(&files).await?;
        }
        if self.json {
            let name = self.name.to_string();
            print_json(&json!({ "name": name, "pid": pid, "stopped": stopped }))?;
        } else if stopped {
            print(&format!("{}: stopped\n", self.name))?;
        } else {
            print(&format!("{}: was gone already; its socket is removed now\n", self.name))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Lets the process exit. False: it was gone.
    async fn exit(&self, place: &Place, files: &Files, alive: bool) -> Result<bool, Failure> {
        let process = match self.reach.attach(place).await {
            Ok(process) => process,
            // Only a socket that refuses connections belongs to nobody.
            Err(Error::Attach { .. }) if !alive && files.is_left_behind() => return Ok(false),
            Err(error) => return Err(self.reach.explain(&self.name, place, error)),
        };
        warn(&process);
        process.exit(0).await?;
        Ok(true)
    }
}

/// Kills the process, and waits until it has ended. Returns its pid; none: it was gone.
async fn kill(place: &Place, alive: bool) -> Result<Option<i32>, Failure> {
    let target = match place.target() {
        Err(_) if !alive && place.accepts() == Some(false) => return Ok(None),
        target => target?,
    };
    target.signal(Signal::SIGKILL)?;
    let end = Instant::now() + LIMIT;
    while !target.has_ended() {
        if Instant::now() > end {
            return Err(Failure::new(format!("pid {} does not end", target.pid())));
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(Some(target.pid()))
}

/// Removes what the process had. Its children, which die with it, may do so a moment later.
async fn remove(files: &Files) -> Result<(), Failure> {
    let end = Instant::now() + LIMIT_OF_CHILDREN;
    loop {
        match files.remove() {
            Err(Error::Cgroup { .. }) if Instant::now() < end => {}
            Err(error @ Error::Cgroup { .. }) => {
                return Err(Failure::new(format!(
                    "the process has ended, but its cgroup can't be removed: {error}"
                )));
            }
            Err(error) => {
                return Err(Failure::new(format!(
                    "the process has ended, but not all that it had is removed: {error}"
                )));
            }
            Ok(()) => return Ok(()),
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
