//! `farcall upgrade`: another server image for a process that goes on.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use farcall::image::{IMAGE, table_of};
use farcall::persist::{Attach, Home, Name};
use serde_json::{Value, json};

use crate::image::sha256;
use crate::output::{print, print_json, warn};
use crate::{Done, Failure};

/// Lets a persistent process go on as the server image of this farcall, or as another one.
///
/// The process is not started anew: its pid, descriptors, memory, children, names and log stay as
/// they are. If the image can't be used, the one that it runs goes on. `farcall image --output FILE`,
/// of that farcall, writes an image.
#[derive(Args)]
pub struct Upgrade {
    /// Take the process over if another controller holds it; what it is blocked in is interrupted
    #[arg(long)]
    take_over: bool,
    /// The process
    name: Name,
    /// The image, instead of this farcall's own
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// Wait so many seconds for a process that is busy with a call
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    timeout: u64,
    /// Print {"name", "pid", "upgraded", "from", "to"} instead of text; from and to are {"version",
    /// "size", "sha256"}, and upgraded is false if it ran that image already
    #[arg(long)]
    json: bool,
}

/// What is said of an image.
struct Described {
    version: u32,
    size: usize,
    sha256: String,
}

impl Described {
    fn of(image: &[u8]) -> farcall::Result<Self> {
        let version = table_of(image)?.version;
        Ok(Self { version, size: image.len(), sha256: sha256(image) })
    }

    fn text(&self) -> String {
        format!("version {}, {} bytes, sha256 {}", self.version, self.size, self.sha256)
    }

    fn json(&self) -> Value {
        json!({ "version": self.version, "size": self.size, "sha256": self.sha256 })
    }
}

impl Upgrade {
    pub async fn run(self) -> Done {
        let image = match &self.image {
            Some(path) => fs::read(path).map_err(|error| self.cannot_use(error))?,
            None => IMAGE.to_vec(),
        };
        let to = Described::of(&image).map_err(|error| self.cannot_use(error))?;
        let mut attach = Attach::default().timeout(Duration::from_secs(self.timeout));
        if self.take_over {
            attach = attach.take_over();
        }
        let process = attach.to(Home::find()?.place(&self.name)).await?;
        let from = Described::of(&process.read_image().await?)?;
        let upgraded = from.sha256 != to.sha256;
        if upgraded {
            process.upgrade_to(&image).await?;
        }
        let pid = process.pid();
        process.prepare_for_reconnect().await?;
        warn(&process);
        let name = self.name.to_string();
        if self.json {
            let (from, to) = (from.json(), to.json());
            let upgraded = json!({
                "name": name, "pid": pid, "upgraded": upgraded, "from": from, "to": to,
            });
            print_json(&upgraded)?;
        } else if upgraded {
            print(&format!("{name}: upgraded\n  from  {}\n  to    {}\n", from.text(), to.text()))?;
        } else {
            print(&format!("{name}: runs that image already\n        {}\n", to.text()))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    /// The image's fault, which is named.
    fn cannot_use(&self, error: impl std::fmt::Display) -> Failure {
        let path =
            self.image.as_ref().map_or("the image".into(), |path| path.display().to_string());
        Failure::new(format!("{path}: {error}"))
    }
}
