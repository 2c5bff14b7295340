//! `farcall restore`: a new socket for a persistent process whose socket was removed.

use std::process::ExitCode;

use clap::Args;
use farcall::persist::{Attach, Home, Name, Warning};
use serde_json::json;

use crate::command::output::{harmless, print, print_json, warn};
use crate::command::{Done, Failure};

/// Makes the socket of a persistent process anew whose file was removed.
///
/// A cleaner of temporary directories may remove the socket, or the whole directory. The process lives on,
/// and is found through /proc: by `farcall ls`, which calls it unlinked, and by all other commands. Whoever
/// else wants to reach it needs the file.
#[derive(Args)]
pub struct Restore {
    /// Its name
    name: Name,
    /// Take the process over if another controller holds it; what it is blocked in is interrupted
    #[arg(long)]
    take_over: bool,
    /// Print {"name", "pid", "socket"} instead of text
    #[arg(long)]
    json: bool,
}

impl Restore {
    pub async fn run(self) -> Done {
        let place = Home::find()?.place(&self.name);
        if place.files()?.has_socket() {
            let path = place.socket().display();
            return Err(Failure::new(format!("{path} is there: nothing is to be restored")));
        }
        let attach = if self.take_over { Attach::default().take_over() } else { Attach::default() };
        let process = attach.to(place.clone()).await?;
        // That is why this is done.
        let others = process.take_warnings().into_iter();
        for warning in others.filter(|one| !matches!(one, Warning::SocketRemoved { .. })) {
            eprintln!("farcall: warning: {}", harmless(&warning.to_string()));
        }
        process.restore_socket().await?;
        let pid = process.pid();
        process.prepare_for_reconnect().await?;
        warn(&process);
        let (name, socket) = (self.name.to_string(), place.socket());
        if self.json {
            print_json(&json!({ "name": name, "pid": pid, "socket": socket }))?;
        } else {
            let pid = pid.map_or("?".into(), |pid| pid.to_string());
            print(&format!("{name}: pid {pid}, {}\n", socket.display()))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
