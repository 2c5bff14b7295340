//! The image as a file that can be executed or mapped: a sealed memfd, or an unlinked file where
//! the system forbids executing memfds.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::statvfs::{FsFlags, statvfs};

use super::IMAGE;
use crate::descriptor::off_standard_streams;

/// memfd_create(2)'s MFD_NOEXEC_SEAL: never executable by execve, but mappable (Linux 6.3).
const MFD_NOEXEC_SEAL: u32 = 0x8;
/// memfd_create(2)'s MFD_EXEC: executable even where `vm.memfd_noexec` is 1 (Linux 6.3).
const MFD_EXEC: u32 = 0x10;

/// What carries the image to `execve`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Carrier {
    /// A sealed memfd, or where that is forbidden an unlinked file.
    #[default]
    Automatic,
    /// A sealed memfd.
    Memfd,
    /// An unlinked file in the directory for temporary files.
    UnlinkedFile,
}

/// The image as a file that `execve` takes by `/proc/self/fd/N`.
///
/// # Errors
///
/// Where neither a memfd nor a file in the directory for temporary files (`TMPDIR`) can be made.
pub fn executable(carrier: Carrier) -> io::Result<OwnedFd> {
    let file = match carrier {
        Carrier::Memfd => sealed(MFD_EXEC),
        Carrier::UnlinkedFile => unlinked(&std::env::temp_dir()),
        Carrier::Automatic => sealed(MFD_EXEC).or_else(|memfd| {
            unlinked(&std::env::temp_dir()).map_err(|file| neither(&memfd, &file))
        }),
    };
    // The standard streams of the process that executes it are put in the place of its own.
    off_standard_streams(file?)
}

/// The error where both carriers have failed so: what was tried, what forbids it as far as the system tells,
/// and what to do.
pub(crate) fn neither(memfd: &io::Error, file: &io::Error) -> io::Error {
    let directory = std::env::temp_dir();
    let sysctl = std::fs::read_to_string("/proc/sys/vm/memfd_noexec").unwrap_or_default();
    let forbids = match sysctl.trim_end() {
        "" | "0" | "1" => String::new(),
        value => format!("; vm.memfd_noexec is {value}"),
    };
    let noexec =
        statvfs(&directory).is_ok_and(|mounted| mounted.flags().contains(FsFlags::ST_NOEXEC));
    let mounted = if noexec { "; it is mounted noexec" } else { "" };
    let advice = "set TMPDIR to a directory in which files may be made and executed, or lower \
                  vm.memfd_noexec";
    let directory = directory.display();
    io::Error::new(
        file.kind(),
        format!(
            "neither a memfd ({memfd}{forbids}) nor an unlinked file in {directory} \
             ({file}{mounted}): {advice}"
        ),
    )
}

/// The image as a sealed file that can be mapped readable and executable, but not executed.
///
/// # Errors
///
/// Those of memfd_create(2).
pub fn mappable() -> io::Result<OwnedFd> {
    sealed(MFD_NOEXEC_SEAL)
}

fn sealed(kind: u32) -> io::Result<OwnedFd> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let fd = match memfd_create(c"farcall", flags | MFdFlags::from_bits_retain(kind)) {
        // Before Linux 6.3 the flag is unknown, and every memfd can be executed.
        Err(Errno::EINVAL) => memfd_create(c"farcall", flags),
        other => other,
    }?;
    let mut file = File::from(fd);
    file.write_all(IMAGE)?;
    let seals = SealFlag::F_SEAL_SHRINK
        | SealFlag::F_SEAL_GROW
        | SealFlag::F_SEAL_WRITE
        | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file.into())
}

fn unlinked(directory: &Path) -> io::Result<OwnedFd> {
    let mut file = OpenOptions::new()
        .write(true)
        .mode(0o700)
        .custom_flags(nix::libc::O_TMPFILE)
        .open(directory)?;
    file.write_all(IMAGE)?;
    // As long as it is open for writing, execve answers ETXTBSY.
    Ok(File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?.into())
}
