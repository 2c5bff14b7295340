//! File systems that a program serves (FUSE): every look into one waits for that program, which may be
//! another user's and never answer, and not even SIGKILL ends such a wait.
//!
//! So it is found out in which mount a descriptor with O_PATH is before anything is asked of the file
//! system; fstat(2), fstatfs(2) and a lookup in it are such questions. /proc/self/fdinfo and
//! /proc/self/mountinfo answer by themselves.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::sys::statfs::{FUSE_SUPER_MAGIC, fstatfs};

use super::rights::in_time;

/// Refuses to look into what is served by a program of another user's. `seen` is the mount in which
/// the way has been so far, and what it is in now. Where there is no /proc, nothing is known of mounts.
pub(super) fn enter(
    fd: &impl AsFd,
    seen: &mut Option<u64>,
    is_trusted: impl Fn(u32) -> bool,
) -> io::Result<()> {
    let Some(mount) = mount_of(fd)? else { return Ok(()) };
    if *seen == Some(mount) {
        return Ok(());
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let server = match mounts.lines().find_map(|line| server_in(line, mount)) {
        Some(Kind::Kernel) => None,
        Some(Kind::Program(uid)) if uid.is_some_and(&is_trusted) => None,
        Some(Kind::Program(uid)) => Some(uid),
        // It is in another mount namespace, or outside of this root directory.
        None => {
            let number = fd.as_fd();
            // SAFETY: it makes one system call.
            let asked = unsafe {
                in_time(Some(number), || match fstatfs(number)?.filesystem_type() {
                    FUSE_SUPER_MAGIC => Err(nix::errno::Errno::EMEDIUMTYPE),
                    _ => Ok(()),
                })
            };
            asked.is_err().then_some(None)
        }
    };
    if let Some(uid) = server {
        let whose = uid.map_or("another user".to_owned(), |uid| format!("uid {uid}"));
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!(
                "it lies in a file system (FUSE) that a program of {whose} serves, which could keep \
                 others waiting for ever"
            ),
        ));
    }
    *seen = Some(mount);
    Ok(())
}

/// The number of the mount in which a descriptor is open.
fn mount_of(fd: &impl AsFd) -> io::Result<Option<u64>> {
    let info = match fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd())) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        info => info?,
    };
    let line = info.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    Ok(line.and_then(|id| id.trim().parse().ok()))
}

/// What answers what is asked of a file system.
#[derive(Debug, PartialEq, Eq)]
enum Kind {
    Kernel,
    /// A program, of the user who has mounted it.
    Program(Option<u32>),
}

/// What a line of mountinfo says, if it is about that mount.
fn server_in(line: &str, mount: u64) -> Option<Kind> {
    let mut fields = line.split(' ');
    if fields.next()?.parse() != Ok(mount) {
        return None;
    }
    // Any number of optional fields, then a separator, type, source, options of the file system.
    let mut fields = fields.skip_while(|field| *field != "-").skip(1);
    let kind = fields.next()?;
    if !["fuse", "fuseblk"].contains(&kind)
        && !kind.starts_with("fuse.")
        && !kind.starts_with("fuseblk.")
    {
        return Some(Kind::Kernel);
    }
    let mut options = fields.nth(1).unwrap_or_default().split(',');
    let uid = options.find_map(|option| option.strip_prefix("user_id=")?.parse().ok());
    Some(Kind::Program(uid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_program_serves_a_mount_is_read() {
        let line = "43 28 0:33 / /home/a\\040b rw,nosuid shared:7 master:2 - fuse.sshfs a:/ \
                    rw,user_id=1000,group_id=5,allow_other";
        assert_eq!(server_in(line, 43), Some(Kind::Program(Some(1000))));
        assert_eq!(server_in(line, 4), None);
        let local = "43 28 8:1 / / rw - ext4 /dev/sda1 rw,user_id=1000";
        assert_eq!(server_in(local, 43), Some(Kind::Kernel));
        let block = "43 28 8:1 / / rw - fuseblk /dev/sda1 rw,user_id=0";
        assert_eq!(server_in(block, 43), Some(Kind::Program(Some(0))));
        assert_eq!(server_in("43 28 8:1 / / rw - fuse x rw", 43), Some(Kind::Program(None)));
        assert_eq!(server_in("43 28 0:3 / / rw - fusectl x rw", 43), Some(Kind::Kernel));
        assert_eq!(server_in("", 43), None);
    }

    #[test]
    fn a_mount_is_known_by_a_descriptor_with_o_path() {
        let proc =
            nix::fcntl::open("/proc", nix::fcntl::OFlag::O_PATH, nix::sys::stat::Mode::empty())
                .unwrap();
        let mut seen = None;
        enter(&proc, &mut seen, |_| false).unwrap();
        assert!(seen.is_some());
    }
}
