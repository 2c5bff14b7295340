//! `farcall image`: the server as an executable file.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use farcall::image::{IMAGE, entries};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::output::{print, print_json};
use crate::{Done, Failure};

/// Shows the server image, and writes it as an executable.
///
/// The executable serves requests on standard input and writes results to standard output; with a
/// path as its argument, or a socket passed as LISTEN_FDS, it is a persistent process. It needs
/// nothing: no libc, no other file.
#[derive(Args)]
pub struct Image {
    /// Write the executable here
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Print {"size", "version", "sha256", "entries", "file"} instead of text
    #[arg(long)]
    json: bool,
}

/// The hash by which an image is known, in hexadecimal digits.
pub fn sha256(image: &[u8]) -> String {
    Sha256::digest(image).iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Image {
    pub fn run(self) -> Done {
        if let Some(path) = &self.output {
            fs::write(path, IMAGE)
                .and_then(|()| fs::set_permissions(path, Permissions::from_mode(0o755)))
                .map_err(|error| Failure::new(format!("{}: {error}", path.display())))?;
        }
        let table = entries();
        let entries = [
            ("serve", table.serve),
            ("serve_persistent", table.serve_persistent),
            ("trampoline", table.trampoline),
            ("raw_syscall", table.raw_syscall),
            ("resume", table.resume),
        ];
        let hash = sha256(IMAGE);
        if self.json {
            let entries: serde_json::Map<_, _> =
                entries.iter().map(|(name, offset)| ((*name).into(), json!(offset))).collect();
            print_json(&json!({
                "size": IMAGE.len(),
                "version": table.version,
                "sha256": hash,
                "entries": entries,
                "file": self.output,
            }))?;
            return Ok(ExitCode::SUCCESS);
        }
        let mut text = format!(
            "size      {} bytes\nversion   {}\nsha256    {hash}\nentries\n",
            IMAGE.len(),
            table.version
        );
        for (name, offset) in entries {
            text.push_str(&format!("  {name:<16}  {offset:#06x}\n"));
        }
        if let Some(path) = &self.output {
            text.push_str(&format!("written   {}\n", path.display()));
        }
        print(&text)?;
        Ok(ExitCode::SUCCESS)
    }
}
