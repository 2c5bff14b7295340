//! A controller under torture, a process of its own.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use farcall::host::local::Stdio;
use farcall::link::Polling;
use farcall::persist::{Attach, Home, Place, SharedMemory};
use farcall::{Error, Local, Process};

use super::NAME;
use super::recover::recover;
use super::words::{Word, say};
use super::workload::{Op, Workload, wait_for_a_line};
use crate::command::{Done, Failure};

/// Attaches, recovers, and works until it is killed.
#[derive(Args)]
pub struct TortureController {
    /// Where the socket is
    home: PathBuf,
    #[arg(long)]
    seed: u64,
    /// A number that no other one has
    #[arg(long)]
    id: u64,
    /// Start the process
    #[arg(long)]
    start: bool,
    /// Take it over
    #[arg(long)]
    take_over: bool,
    /// Wait for a line before the work begins, in a ring
    #[arg(long)]
    wait: bool,
    /// Do these first
    #[arg(long, value_enum, value_delimiter = ',')]
    first: Vec<Op>,
    /// Leave the link as it is: another controller may take the process over
    #[arg(long)]
    gentle: bool,
    /// What to upgrade the process to
    #[arg(long)]
    image: Option<PathBuf>,
    /// Do nothing but recover, and hold still until a line comes
    #[arg(long)]
    check: bool,
}

impl TortureController {
    pub async fn run(self) -> Done {
        let home = Home::at(&self.home);
        let place = home.place(&NAME.parse().map_err(Failure::new)?);
        let process = match self.process(&home, &place).await {
            Ok(process) => process,
            Err(error) => {
                say(&Word::Wrong(format!("attaching: {error}")));
                return Ok(ExitCode::FAILURE);
            }
        };
        say(&Word::Process(process.pid().unwrap_or_default()));
        let Err(error) = self.work(&process, &place).await else { return Ok(ExitCode::SUCCESS) };
        say(&what_has_happened(&process, error).await);
        Ok(ExitCode::FAILURE)
    }

    async fn process(&self, home: &Home, place: &Place) -> Result<Process, Error> {
        if self.start {
            let name = NAME.parse().map_err(|_| Error::Gone)?;
            let root = Local::new().stdio(Stdio::Null).start().await?;
            let reserved = home.reserve(&name)?;
            let child = root.child().spawn_persistent(reserved, SharedMemory::Refuse).await?;
            return Ok(child.process().clone());
        }
        let attach = if self.take_over { Attach::default().take_over() } else { Attach::default() };
        attach.to(place.clone()).await
    }

    async fn work(&self, process: &Process, place: &Place) -> Result<(), Error> {
        let recovered = recover(process, place).await?;
        if self.check {
            // Behind what is closed in the background.
            process.getpid().await?;
            say(&Word::Own(process.server_descriptors().into_iter().collect()));
            wait_for_a_line();
            return process.prepare_for_reconnect().await;
        }
        let (of, seed) = ((self.id, self.gentle), self.seed);
        let read = |path| {
            std::fs::read(path).map_err(|source| Error::Io { context: "reading the image", source })
        };
        let image = self.image.as_ref().map(read).transpose()?;
        let mut workload = Workload::new(process, place, recovered, of, seed, image).await?;
        if self.wait {
            process.enter_ring(Polling::Adaptive).await?;
            say(&Word::Ready);
            wait_for_a_line();
        }
        workload.run(&self.first).await
    }
}

/// A call has failed: because another controller has the process now, or though none has.
async fn what_has_happened(process: &Process, error: Error) -> Word {
    if matches!(error, Error::Superseded { .. } | Error::Held { .. }) {
        return Word::Over(error.to_string());
    }
    if let Err(held @ Error::Held { .. }) = process.reconnect().await {
        return Word::Over(format!("{error}; {held}"));
    }
    match error {
        Error::Lost(_) => Word::Lost(error.to_string()),
        _ => Word::Wrong(error.to_string()),
    }
}
