//! `farcall start`: a persistent process, from the start.

use std::process::ExitCode;

use clap::Args;
use farcall::Local;
use farcall::host::local::Stdio;
use farcall::persist::{Home, Name, SharedMemory};
use serde_json::json;

use crate::Done;
use crate::output::{print, print_json};

/// Starts a persistent process; returns once controllers can attach to it.
///
/// The process has memory, descriptors and a session of its own and holds nothing of this terminal.
#[derive(Args)]
pub struct Start {
    /// Its name: letters, digits, '-', '_' and '.'
    name: Name,
    /// Print {"name", "pid", "socket"} instead of text
    #[arg(long)]
    json: bool,
}

impl Start {
    pub async fn run(self) -> Done {
        let reserved = Home::find()?.reserve(&self.name)?;
        let socket = reserved.place().socket().to_owned();
        let root = Local::new().stdio(Stdio::Null).start().await?;
        let child = root.child().spawn_persistent(reserved, SharedMemory::Refuse).await?;
        let pid = child.pid();
        child.prepare_for_reconnect().await?;
        if self.json {
            print_json(&json!({ "name": self.name.to_string(), "pid": pid, "socket": socket }))?;
        } else {
            let pid = pid.map_or("?".into(), |pid| pid.to_string());
            print(&format!("{}: pid {pid}, {}\n", self.name, socket.display()))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
