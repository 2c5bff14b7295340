//! What tests leave behind: processes, and files and cgroups where farcall or tests put theirs.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{env, fs, thread};

use crate::reap;

/// What there was before the tests, and a folder for their temporary files.
pub struct Before {
    files: BTreeSet<PathBuf>,
    cgroups: BTreeSet<PathBuf>,
    temporary: PathBuf,
}

impl Before {
    /// To be asked before the tests run.
    pub fn look() -> Result<Self, String> {
        reap::adopt_orphans()?;
        // A short name: sockets in there have at most 107 bytes of path.
        let temporary = env::temp_dir().join(format!("farcall-{}", std::process::id()));
        let failed = |error| format!("{}: {error}", temporary.display());
        fs::create_dir(&temporary).map_err(failed)?;
        // As /tmp: some tests run as another user.
        fs::set_permissions(&temporary, fs::Permissions::from_mode(0o1777)).map_err(failed)?;
        Ok(Self { files: sockets(), cgroups: cgroups(), temporary })
    }

    /// The folder that is to be the tests' TMPDIR.
    pub fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// What is there now and was not before.
    pub fn residue(&self) -> Vec<String> {
        let mut residue = settled_children();
        let files = sockets().into_iter().filter(|file| !self.files.contains(file));
        let files = files.chain(below(&self.temporary));
        residue.extend(files.map(|file| format!("file {}", file.display())));
        let cgroups = cgroups().into_iter().filter(|cgroup| !self.cgroups.contains(cgroup));
        residue.extend(cgroups.map(|cgroup| format!("cgroup {}", cgroup.display())));
        residue
    }
}

impl Drop for Before {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.temporary) {
            eprintln!("xtask: {}: {error}", self.temporary.display());
        }
    }
}

/// Children that stay. One that was killed by its parent's death may take a moment to go.
fn settled_children() -> Vec<String> {
    for _ in 0..100 {
        if reap::children().is_empty() {
            break;
        }
        thread::sleep(Duration::from_millis(50));
    }
    reap::children()
}

/// What lies where farcall keeps the sockets of persistent processes.
fn sockets() -> BTreeSet<PathBuf> {
    let runtime = env::var_os("XDG_RUNTIME_DIR").map(|path| Path::new(&path).join("farcall"));
    let own = env::var_os("FARCALL_DIR").map(PathBuf::from);
    let homes = [Some("/run/farcall".into()), runtime, own];
    homes.into_iter().flatten().flat_map(|home: PathBuf| below(&home)).collect()
}

/// The cgroups that are called as farcall's and those of tests are, in the trees that are mounted where they usually are.
fn cgroups() -> BTreeSet<PathBuf> {
    let named = |path: &PathBuf| {
        path.is_dir()
            && path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"farcall-"))
    };
    below(Path::new("/sys/fs/cgroup")).into_iter().filter(named).collect()
}

/// All files below a folder, which need not exist.
fn below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        files.push(entry.path());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files.extend(below(&entry.path()));
        }
    }
    files
}
