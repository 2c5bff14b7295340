//! `farcall image`: the server as an executable file.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use farcall::image::{IMAGE, entries};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::command::output::{Stdout, print, print_json};
use crate::command::{Done, Failure};

/// Shows the server image, and writes it as an executable.
///
/// The executable serves requests on standard input and writes results to standard output; with a
/// path as its argument, or a socket passed as LISTEN_FDS, it is a persistent process. It needs
/// nothing: no libc, no other file.
#[derive(Args)]
pub struct Image {
    /// Write the executable here: in the place of a file, as a whole or not at all; a device or a pipe is
    /// only written to, and '-' is standard output, which gets nothing else then
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

/// Writes an executable. A file that is there is replaced when the new one is complete: so it may be
/// running, and stays as it is where that fails. What is no file is only written to.
fn write_executable(path: &Path, bytes: &[u8]) -> io::Result<()> {
    match fs::metadata(path) {
        Ok(there) if !there.is_file() => {
            return File::options().write(true).open(path)?.write_all(bytes);
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // A link stays, and what it leads to is replaced.
    let path = match fs::canonicalize(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => path.to_owned(),
        path => path?,
    };
    let directory =
        path.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
    let temporary = directory.join(format!(".farcall-image-{}", std::process::id()));
    let write = || {
        // Left by a process of the same pid; what others put there is not written to.
        let _ = fs::remove_file(&temporary);
        let mut file = File::options().write(true).create_new(true).mode(0o700).open(&temporary)?;
        file.write_all(bytes)?;
        file.set_permissions(Permissions::from_mode(0o755))?;
        // What can't be written is told by some file systems only then.
        file.sync_all()?;
        fs::rename(&temporary, &path)
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

impl Image {
    pub fn run(self) -> Done {
        if let Some(path) = &self.output {
            if path == Path::new("-") {
                if self.json {
                    let why = "--json and --output -: both are standard output";
                    return Err(Failure::usage(why));
                }
                let mut stdout = Stdout::new();
                stdout.write_all(IMAGE)?;
                stdout.finish()?;
                return Ok(ExitCode::SUCCESS);
            }
            write_executable(path, IMAGE)
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
