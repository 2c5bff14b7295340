//! Whether a process has the very socket that listens at a place.
//!
//! The kernel tells of each listening socket to which file it is bound (sock_diag(7)), in the network
//! namespace of who asks. A socket of another one is known by the name of its file alone.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use nix::libc;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};
use nix::sys::stat::FileStat;

/// TCP_LISTEN, which is the state of all listening sockets.
const LISTENING: u32 = 10;
/// Of struct unix_diag_req and its answers: linux/unix_diag.h.
const SHOW_NAME: u32 = 1;
const SHOW_VFS: u32 = 2;
const UNIX_DIAG_NAME: u16 = 0;
const UNIX_DIAG_VFS: u16 = 1;
const SOCK_DIAG_BY_FAMILY: u16 = 20;

/// A listening unix(7) socket.
#[derive(Debug, Default, PartialEq, Eq)]
struct Listener {
    /// Its own inode, which /proc/PID/fd shows.
    inode: u32,
    /// Inode and device of its file, as the kernel's inside counts them.
    file: Option<(u32, u32)>,
    /// The address that it was bound to.
    path: Vec<u8>,
}

/// Whether the process with that pid has a socket open that listens and is bound to that file, which is
/// called so.
pub(super) fn has_listener(pid: i32, file: &FileStat, name: &OsStr) -> bool {
    let inodes = match dump() {
        Ok(listeners) if is_in_this_network(pid) => {
            let bound = listeners.into_iter().filter(|one| one.is_bound_to(file, name));
            bound.map(|one| one.inode).collect()
        }
        _ => of_namespace(pid, name),
    };
    has_sockets(pid, &inodes)
}

/// Whether the process with that pid has a socket open that listens and whose file was called so, whatever
/// has become of the file.
pub(super) fn listens_as(pid: i32, name: &OsStr) -> bool {
    has_sockets(pid, &of_namespace(pid, name))
}

/// Whether a process is in the network namespace of this one.
fn is_in_this_network(pid: i32) -> bool {
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
    let own = namespace("self");
    own.is_some() && own == namespace(&pid.to_string())
}

/// Whether somebody in this network namespace listens at exactly this path, as the kernel tells it.
pub(super) fn listens_at(path: &Path) -> bool {
    paths_listened_at().iter().any(|listened| listened == path.as_os_str().as_encoded_bytes())
}

/// The paths, as they were given to bind(2), at which somebody in this network namespace listens.
pub(super) fn paths_listened_at() -> Vec<Vec<u8>> {
    let sockets = fs::read("/proc/net/unix").unwrap_or_default();
    let path = |line: &[u8]| {
        // Number, references, protocol, flags (__SO_ACCEPTCON), type, state, inode, path.
        let flags = line.split(|byte| *byte == b' ').filter(|field| !field.is_empty()).nth(3)?;
        let at = line.iter().position(|byte| *byte == b'/')?;
        (flags == b"00010000").then(|| line[at..].to_vec())
    };
    sockets.split(|byte| *byte == b'\n').filter_map(path).collect()
}

/// Whether a process has one of these sockets open.
fn has_sockets(pid: i32, inodes: &[u32]) -> bool {
    let links: Vec<PathBuf> =
        inodes.iter().map(|inode| PathBuf::from(format!("socket:[{inode}]"))).collect();
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    fds.into_iter().any(|fd| fs::read_link(fd.path()).is_ok_and(|link| links.contains(&link)))
}

impl Listener {
    fn is_bound_to(&self, stat: &FileStat, name: &OsStr) -> bool {
        // The kernel's inside has devices of 12 and 20 bits, and tells the low half of an inode.
        let device = (libc::major(stat.st_dev) << 20) | libc::minor(stat.st_dev);
        self.file.is_some_and(|(inode, dev)| {
            // Of some file systems (btrfs, overlayfs) stat(2) tells another device.
            inode == stat.st_ino as u32 && (dev == device || ends_with_name(&self.path, name))
        })
    }
}

fn ends_with_name(path: &[u8], name: &OsStr) -> bool {
    path.rsplit(|byte| *byte == b'/').next() == Some(name.as_encoded_bytes())
}

/// The inodes of the listening sockets with a file of that name, in the network namespace of a process.
fn of_namespace(pid: i32, name: &OsStr) -> Vec<u32> {
    let sockets = fs::read(Path::new("/proc").join(pid.to_string()).join("net/unix"));
    let of_line = |line: &[u8]| {
        // Number, references, protocol, flags (__SO_ACCEPTCON), type, state, inode, path.
        let line = std::str::from_utf8(line).ok()?;
        let mut fields = line.split_ascii_whitespace().skip(3);
        let listens = fields.next()? == "00010000";
        let inode = fields.nth(2)?.parse().ok()?;
        let path = line.split_once('/')?.1;
        (listens && ends_with_name(path.as_bytes(), name)).then_some(inode)
    };
    let sockets = sockets.unwrap_or_default();
    sockets.split(|byte| *byte == b'\n').filter_map(of_line).collect()
}

/// All listening unix(7) sockets of this network namespace.
fn dump() -> io::Result<Vec<Listener>> {
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    )?;
    send(netlink.as_raw_fd(), &request(), MsgFlags::empty())?;
    let mut listeners = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let n = recv(netlink.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        if n == 0 || !messages(&buffer[..n], &mut listeners)? {
            return Ok(listeners);
        }
    }
}

/// struct nlmsghdr and struct unix_diag_req: a dump of what listens.
fn request() -> Vec<u8> {
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
    let mut bytes = Vec::with_capacity(40);
    bytes.extend(40u32.to_ne_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    // Sequence and port.
    bytes.extend([0; 8]);
    bytes.extend([libc::AF_UNIX as u8, 0, 0, 0]);
    bytes.extend((1u32 << LISTENING).to_ne_bytes());
    bytes.extend(0u32.to_ne_bytes());
    bytes.extend((SHOW_NAME | SHOW_VFS).to_ne_bytes());
    // The cookie: of any.
    bytes.extend([0xff; 8]);
    bytes
}

/// Takes the messages of one datagram. False: the last one was among them.
fn messages(mut bytes: &[u8], listeners: &mut Vec<Listener>) -> io::Result<bool> {
    const HEADER: usize = 16;
    while bytes.len() >= HEADER {
        let len = u32_at(bytes, 0) as usize;
        if len < HEADER || len > bytes.len() {
            break;
        }
        match i32::from(u16_at(bytes, 4)) {
            libc::NLMSG_DONE => return Ok(false),
            libc::NLMSG_ERROR => return Err(io::ErrorKind::Unsupported.into()),
            _ => listeners.extend(listener(&bytes[HEADER..len])),
        }
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(true)
}

/// struct unix_diag_msg, with its attributes behind it.
fn listener(message: &[u8]) -> Option<Listener> {
    const MESSAGE: usize = 16;
    let mut attributes = message.get(MESSAGE..)?;
    let mut listener = Listener { inode: u32_at(message, 4), ..Listener::default() };
    while attributes.len() >= 4 {
        let len = u16_at(attributes, 0) as usize;
        let value = attributes.get(4..len)?;
        match u16_at(attributes, 2) {
            UNIX_DIAG_NAME => listener.path = value.to_vec(),
            UNIX_DIAG_VFS if value.len() >= 8 => {
                listener.file = Some((u32_at(value, 0), u32_at(value, 4)));
            }
            _ => {}
        }
        attributes = attributes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(listener)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_process_has_the_listener_of_a_file_and_of_no_other() {
        let directory = tempfile::tempdir().unwrap();
        let pid = std::process::id() as i32;
        let name = format!("one-{pid}.sock");
        let name = OsStr::new(&name);
        let path = directory.path().join(name);
        let listener = UnixListener::bind(&path).unwrap();
        let stat = |path: &Path| nix::sys::stat::stat(path).unwrap();
        assert!(has_listener(pid, &stat(&path), name));
        assert!(!has_listener(1, &stat(&path), name), "another process");
        // A file of the same name, and none that is bound to.
        let other = directory.path().join("below");
        fs::create_dir(&other).unwrap();
        let other = other.join(name);
        let second = UnixListener::bind(&other).unwrap();
        let of_other = stat(&other);
        let bound = |listeners: &[Listener]| {
            listeners.iter().filter(|one| one.is_bound_to(&of_other, name)).count()
        };
        assert_eq!(bound(&dump().unwrap()), 1);
        drop(second);
        assert_eq!(bound(&dump().unwrap()), 0);
        assert_eq!(of_namespace(pid, name).len(), 1);
        drop(listener);
        assert!(!has_listener(pid, &stat(&path), name));
    }

    #[test]
    fn messages_that_end_early_are_no_listeners() {
        let mut listeners = Vec::new();
        for len in 0..40 {
            let mut bytes = vec![0xff; len];
            if let Some(first) = bytes.first_chunk_mut() {
                *first = (len as u32).to_ne_bytes();
            }
            let _ = messages(&bytes, &mut listeners);
        }
        for len in 0..24 {
            let _ = listener(&vec![0xff; len]);
            let _ = listener(&vec![0; len]);
        }
    }
}
