//! Files and commands, with errors that say which.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What a command prints, if it succeeds.
pub fn output(command: &mut Command) -> Result<String, String> {
    let output = command.stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{}: {error}", command.get_program().display()))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)))
}

/// The file below a folder whose name begins so.
pub fn find(folder: &Path, name: &str) -> Result<Option<PathBuf>, String> {
    for path in entries(folder)? {
        let begins = path.file_name().is_some_and(|own| own.to_string_lossy().starts_with(name));
        if begins && path.is_file() {
            return Ok(Some(path));
        }
        if path.is_dir() && !path.is_symlink() {
            let found = find(&path, name)?;
            if found.is_some() {
                return Ok(found);
            }
        }
    }
    Ok(None)
}

pub fn entries(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let failed = |error| format!("{}: {error}", folder.display());
    let entries = fs::read_dir(folder).map_err(failed)?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

pub fn make(folder: &Path) -> Result<(), String> {
    fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))
}

/// Copies a file, with its mode, and makes the folder for it.
pub fn copy(from: &Path, to: &Path) -> Result<(), String> {
    make(to.parent().ok_or("a file is in no folder")?)?;
    fs::copy(from, to).map_err(|error| format!("{}: {error}", from.display()))?;
    Ok(())
}

pub fn write(file: &Path, bytes: &[u8]) -> Result<(), String> {
    fs::write(file, bytes).map_err(|error| format!("{}: {error}", file.display()))
}
