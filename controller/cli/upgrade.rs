//! `farcall upgrade`: another server image for a process that goes on.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use farcall::image::{IMAGE, table_of};
use farcall::persist::{Home, Name};
use serde_json::{Value, json};

use crate::cli::image::sha256;
use crate::cli::reach::Reach;
use crate::command::output::{print, print_json, warn};
use crate::command::{Done, Failure};

/// Lets a persistent process go on as the server image of this farcall, or as another one.
///
/// The process is not started anew: its pid, descriptors, memory, children, names and log stay as
/// they are. If the image can't be used, the one that it runs goes on. `farcall image --output FILE`,
/// of that farcall, writes an image.
#[derive(Args)]
pub struct Upgrade {
    #[command(flatten)]
    reach: Reach,
    /// The process
    name: Name,
    /// The image, instead of this farcall's own; with '-' from standard input
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
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

/// What is in a file, or comes from standard input.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    if path != Path::new("-") {
        return fs::read(path);
    }
    let mut bytes = Vec::new();
    io::stdin().take(MOST).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// More bytes than an image can have.
const MOST: u64 = 1 << 20;

impl Upgrade {
    pub async fn run(self) -> Done {
        let image = match &self.image {
            Some(path) => read(path).map_err(|error| self.cannot_use(error))?,
            None => IMAGE.to_vec(),
        };
        let to = Described::of(&image).map_err(|error| self.cannot_use(error))?;
        let place = Home::find()?.place(&self.name);
        let attached = self.reach.attach(&place).await;
        let process = attached.map_err(|error| self.reach.explain(&self.name, &place, error))?;
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
