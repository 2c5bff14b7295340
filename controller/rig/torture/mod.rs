//! `farcall torture`: controllers die at any instant, and the process loses nothing and doubles nothing.

mod controller;
mod deadlines;
mod doing;
mod guest;
mod random;
mod recover;
mod running;
mod starve;
mod supervisor;
mod truth;
mod words;
mod workload;

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::{env, fs};

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use crate::command::output::{print, print_json};
use crate::command::{Done, Failure};

pub use controller::TortureController;
use supervisor::Supervisor;

/// The name of the process, in a home of its own.
const NAME: &str = "tortured";

/// Kills controllers with SIGKILL at any instant, and checks that the process bears it.
///
/// Each controller attaches, learns from the process alone what there is, and goes on: it appends
/// numbered records to a file, opens files, sockets and pipes with names, maps memory, keeps bytes,
/// starts children, gives all of that up again, makes rings, loses its link and attaches again, with or
/// without another controller in between, has no descriptors free, and upgrades the process. It is killed while it does so, or while it attaches; or another controller takes the process over, from one
/// that works, is stopped, or hears nothing. What they say over a pipe of their own is compared with what
/// there is. What is not as it must be is told on standard error.
///
/// Exits with 0 only if nothing was lost or done twice, and everything is accounted for.
#[derive(Args)]
pub struct Torture {
    /// How many controllers are killed
    #[arg(long, default_value_t = 200)]
    kills: u64,
    /// What all decisions are made from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print, as the last line, {"seed", "kills", "calls", "lost", "duplicated", "leaked_fds",
    /// "unaccounted_children", "mismatched"}. Lines before it say how often a controller has died at
    /// which point, in builds that have such points.
    #[arg(long)]
    json: bool,
    /// Torture this server instead of the one that is built in
    #[arg(long, hide = true)]
    image: Option<PathBuf>,
}

/// Nothing of it is left, whatever happens.
struct CleanUp(PathBuf);

impl Drop for CleanUp {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Torture {
    pub async fn run(self) -> Done {
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = stop.clone();
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::spawn(async move {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
            stopping.store(true, Ordering::Relaxed);
        });
        let done = tokio::task::spawn_blocking(move || self.torture(&stop)).await;
        done.map_err(|error| Failure::new(error.to_string()))?
    }

    fn torture(self, stop: &AtomicBool) -> Done {
        let directory = env::temp_dir().join(format!("farcall-torture-{}", std::process::id()));
        DirBuilder::new()
            .mode(0o700)
            .create(&directory)
            .map_err(|error| Failure::temporary(&directory, &error))?;
        let clean_up = CleanUp(directory);
        let target = ProgressDrawTarget::stderr();
        let bar = ProgressBar::with_draw_target(Some(self.kills), target);
        let template = "{bar:30} {pos} of {len} killed, {elapsed}, {eta} to go";
        bar.set_style(ProgressStyle::with_template(template)?);
        let mut supervisor = Supervisor::new(&clean_up.0, self.seed, self.image, stop, &bar);
        supervisor.run(self.kills)?;
        bar.finish_and_clear();
        let Supervisor { kills, tally, points, .. } = supervisor;
        drop(clean_up);
        if self.json {
            for (point, died) in points {
                print_json(&json!({ "point": point, "died": died }))?;
            }
            print_json(&json!({
                "seed": self.seed,
                "kills": kills,
                "calls": tally.calls,
                "lost": tally.lost,
                "duplicated": tally.duplicated,
                "leaked_fds": tally.leaked_fds,
                "unaccounted_children": tally.unaccounted_children,
                "mismatched": tally.mismatched,
            }))?;
        } else {
            print(&format!(
                "seed {}: {kills} controllers killed in the midst of {} calls\n\
                 lost {}, duplicated {}, leaked descriptors {}, unaccounted children {}, \
                 mismatched {}\n",
                self.seed,
                tally.calls,
                tally.lost,
                tally.duplicated,
                tally.leaked_fds,
                tally.unaccounted_children,
                tally.mismatched,
            ))?;
        }
        let good = tally.failures() == 0 && kills >= self.kills;
        Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
