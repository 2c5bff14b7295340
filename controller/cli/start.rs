//! `farcall start`: a persistent process, from the start.

use std::process::ExitCode;

use clap::Args;
use farcall::Local;
use farcall::host::local::Stdio;
use farcall::persist::{Home, Name, SharedMemory};
use serde_json::json;

use crate::command::Done;
use crate::command::output::{print, print_json, warn};

/// Starts a persistent process; returns once controllers can attach to it.
///
/// The process has memory, descriptors and a session of its own and holds nothing of this terminal.
#[derive(Args)]
pub struct Start {
    /// Its name: letters, digits, '-', '_' and '.'
    name: Name,
    /// Move it to a cgroup of its own, so that a service manager that ends all in the cgroup of the
    /// command does not end it; called farcall-NAME-PID if no name is given
    #[arg(long, value_name = "CGROUP", num_args = 0..=1, require_equals = true)]
    cgroup: Option<Option<Name>>,
    /// Print {"name", "pid", "socket", "cgroups"} instead of text
    #[arg(long)]
    json: bool,
}

impl Start {
    pub async fn run(self) -> Done {
        let mut reserved = Home::find()?.reserve(&self.name)?;
        if let Some(cgroup) = self.cgroup {
            reserved = reserved.in_own_cgroup(cgroup);
        }
        let place = reserved.place().clone();
        let root = Local::new().stdio(Stdio::Null).start().await?;
        let child = root.child().spawn_persistent(reserved, SharedMemory::Refuse).await?;
        let pid = child.pid();
        child.prepare_for_reconnect().await?;
        warn(&child);
        let (name, socket) = (self.name.to_string(), place.socket());
        let cgroups = place.state().map(|state| state.cgroups).unwrap_or_default();
        if self.json {
            print_json(&json!({ "name": name, "pid": pid, "socket": socket, "cgroups": cgroups }))?;
        } else {
            let pid = pid.map_or("?".into(), |pid| pid.to_string());
            let cgroups: String =
                cgroups.iter().map(|cgroup| format!(", {}", cgroup.display())).collect();
            print(&format!("{name}: pid {pid}, {}{cgroups}\n", socket.display()))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
