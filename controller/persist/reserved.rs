//! A place that is about to get a process: its socket is bound, and nobody listens on it yet.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::Flock;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, bind, listen, socket};
use nix::unistd::geteuid;

use super::cgroup::{OwnCgroups, Plan};
use super::directory::{Directory, Pinned};
use super::files::LOCK_LIMIT;
use super::home::Name;
use super::incarnation::Incarnation;
use super::place::Place;
use super::record::{NONE_YET, State, now};
use crate::descriptor::off_standard_streams;
use crate::error::{Error, Result};

/// A place with a socket on which nobody listens yet. It is removed again unless a process becomes
/// persistent there.
#[derive(Debug)]
pub struct Reserved {
    place: Place,
    listener: Option<OwnedFd>,
    /// Whether the process is to get a cgroup of its own.
    cgroup: Option<CgroupName>,
    /// The file.
    socket: Pinned,
    /// What is removed if no process becomes persistent there.
    left: Left,
}

/// What a reservation that comes to nothing takes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    Everything,
    /// The rest belongs to a process that lives.
    SocketAlone,
}

/// What a cgroup is to be called; otherwise its name tells whose it is.
#[derive(Clone, Debug)]
struct CgroupName(Option<Name>);

impl Reserved {
    /// The place.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// The process gets a cgroup of its own when it becomes persistent, so that it outlives the
    /// clean-up of the cgroup that it was in, as service managers and batch systems do it. The limits
    /// of that one hold for it no more. Children that it has already stay where they are.
    ///
    /// Of cgroup version 2 it gets one in any case; of version 1 in each hierarchy in which it is
    /// below the top, except where that is about resources only and this user may not move it. They
    /// are made as far up as this user may, and called `farcall-NAME-PID` unless there is a name.
    ///
    /// They stand in NAME.json as [`State::cgroups`], and are removed by [`Place::remove`]: by
    /// `farcall stop`, and by the next process of the same name. Root may make one, unless all trees are read-only. Others may
    /// where a service manager has left them a tree (`systemd-run --user --scope`).
    #[must_use]
    pub fn in_own_cgroup(mut self, name: Option<Name>) -> Self {
        self.cgroup = Some(CgroupName(name));
        self
    }

    /// Moves the process into a cgroup of its own, if that was asked for.
    pub(crate) fn enter_cgroup(&self, pid: Option<i32>) -> Result<Option<OwnCgroups>> {
        let Some(CgroupName(name)) = &self.cgroup else { return Ok(None) };
        let process = pid.and_then(Incarnation::of).ok_or_else(|| {
            let reason = "its pid is not known here: it can't be moved to a cgroup".into();
            Error::Cgroup { path: self.place.socket().to_owned(), reason }
        })?;
        let name = match name {
            Some(name) => name.to_string(),
            None => self.place.cgroup_name(process.pid),
        };
        let plan = Plan::new(process.pid, &name)?;
        self.place.write_cgroups(process.clone(), plan.cgroups())?;
        let made = match plan.make() {
            Ok(made) => made,
            Err(error) => {
                // There may be others' of that name, which are not to be removed.
                self.place.write_cgroups(process, Vec::new())?;
                return Err(error);
            }
        };
        made.enter()?;
        Ok(Some(made))
    }

    /// Listens, so that the kernel knows who called listen(2): this user is the one who may attach.
    pub(crate) fn listen(&self) -> Result<&OwnedFd> {
        let fd = self.listener.as_ref().ok_or(Error::Gone)?;
        listen(fd, Backlog::new(16).map_err(Error::local("listen"))?)
            .map_err(Error::local("listen"))?;
        Ok(fd)
    }

    /// The socket's file, as it was made here.
    pub(crate) fn socket_file(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The process listens: the place stays.
    pub(crate) fn keep(mut self) -> Place {
        self.listener = None;
        self.place.clone()
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if self.listener.is_some() {
            // What can't be removed is recognised as stale by the next one.
            let _ = self.place.remove_own(&self.socket, self.left);
        }
    }
}

impl Place {
    /// Binds the socket; see [`Home::reserve`](super::Home::reserve).
    ///
    /// # Errors
    ///
    /// [`Error::Home`] if a live process listens there, or the directory can't be written or is another
    /// user's.
    pub fn reserve(self) -> Result<Reserved> {
        let directory = self.directory().map_err(|error| self.error(&error))?;
        if directory.owner() != geteuid() {
            let owner = directory.owner();
            return Err(self.refuse(format!("the directory belongs to uid {owner}, not to you")));
        }
        let lock = directory.lock(LOCK_LIMIT).map_err(|error| self.error(&error))?;
        self.replace_stale(&directory, &lock)?;
        let reserved = self.bind(&directory, Left::Everything)?;
        // As long as this process lives, nobody takes the place for one that was left behind.
        let holder = Incarnation::of(std::process::id() as i32);
        let (process, cgroups) = (NONE_YET, Vec::new());
        let state = State { process, holder, since: now(), cgroups, connection: None };
        let written = reserved.place.write_state(&directory, &state);
        // Giving the place up takes it as well.
        drop(lock);
        written.map(|()| reserved)
    }

    fn bind(self, directory: &Directory, left: Left) -> Result<Reserved> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        // Non-blocking: the server must not wait in accept for a client that has gone again.
        let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)
            .map_err(Error::local("socket"))?;
        let fd = off_standard_streams(fd).map_err(Error::io("dup"))?;
        let name = self.file_names().0;
        let address = directory
            .address(self.socket(), &name)
            .map_err(|_| self.refuse("the file name is too long for a socket".into()))?;
        bind(fd.as_raw_fd(), &address).map_err(|errno| self.error(&errno.into()))?;
        let socket = directory.pin(&name).map_err(|error| self.error(&error))?;
        // Nobody can connect before listen(2): so nobody gets in before the mode is right.
        if let Err(error) = directory.set_mode(&name, &socket, 0o600) {
            let _ = directory.remove(&name);
            return Err(self.error(&error));
        }
        Ok(Reserved { place: self, listener: Some(fd), cgroup: None, socket, left })
    }

    /// Binds a socket in the place of one that was removed, with the directory if that is gone as well.
    pub(super) fn bind_anew(&self) -> Result<Reserved> {
        let directory =
            Directory::open_or_make(self.parent()).map_err(|error| self.error(&error))?;
        if directory.owner() != geteuid() {
            let owner = directory.owner();
            return Err(
                self.refuse(format!("the directory is uid {owner}'s: that user restores it"))
            );
        }
        let _lock = directory.lock(LOCK_LIMIT).map_err(|error| self.error(&error))?;
        let files = self.files_in(&directory)?;
        if files.is_left_behind() {
            // Of another process of that name, which is dead.
            directory.remove(&self.file_names().0).map_err(|error| self.error(&error))?;
        } else if files.has_socket() {
            return Err(self.refuse("there is a socket already".into()));
        }
        self.clone().bind(&directory, Left::SocketAlone)
    }

    /// Removes what a dead process left, or says that it is not dead.
    fn replace_stale(&self, directory: &Directory, lock: &Flock<OwnedFd>) -> Result<()> {
        let files = self.files_in(directory)?;
        let Some(socket) = &files.socket else {
            return match self.served_unlinked() {
                Some(pid) => Err(self.refuse(format!(
                    "a live process (pid {pid}) has that name, and its socket was removed: `farcall \
                     restore` makes it anew, `farcall stop` ends the process"
                ))),
                None => files.remove_under(directory, lock),
            };
        };
        let being_made = files
            .state
            .as_ref()
            .is_some_and(|state| !state.process.is_gone() && state.is_being_made());
        if !socket.is_socket() {
            return Err(self.refuse("in the way, and no socket".into()));
        }
        match self.probe(socket) {
            Err(Errno::ECONNREFUSED) if !being_made => files.remove_under(directory, lock),
            // Full, or connected: somebody listens.
            Ok(()) | Err(Errno::EAGAIN | Errno::ECONNREFUSED) => {
                if let Some(State { process: NONE_YET, holder: Some(holder), .. }) = &files.state {
                    let reason = format!("pid {} has reserved it: choose another name", holder.pid);
                    return Err(self.refuse(reason));
                }
                let pid = files.state.map(|state| format!(" (pid {})", state.process.pid));
                Err(self.refuse(format!(
                    "a live process{} listens there: choose another name, or `farcall stop` it",
                    pid.unwrap_or_default()
                )))
            }
            Err(errno) => {
                Err(self.refuse(format!("in the way, and can't be connected to: {errno}")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;

    #[test]
    fn a_socket_is_bound_in_the_directory_that_was_looked_at() {
        assert!(geteuid().is_root(), "this test acts as two users: run it as root");
        const USER: u32 = 65_530;
        let users = tempfile::tempdir().unwrap();
        let [own, aside, others] = ["own", "aside", "others"].map(|name| users.path().join(name));
        for path in [&own, &others] {
            fs::create_dir(path).unwrap();
            fs::set_permissions(path, Permissions::from_mode(0o700)).unwrap();
        }
        // Whose directory this one lies in may put another one in its place.
        chown(users.path(), Some(USER), Some(USER)).unwrap();
        let place = Place::at(own.join("one.sock"));
        let directory = place.directory().unwrap();
        fs::rename(&own, &aside).unwrap();
        symlink(&others, &own).unwrap();
        let bound = place.clone().bind(&directory, Left::SocketAlone);
        assert_eq!(fs::read_dir(&others).unwrap().count(), 0);
        assert!(bound.is_ok() && aside.join("one.sock").exists());
        // Nothing of a directory that is another one now is removed when it is given up.
        drop(bound);

        chown(&aside, Some(USER), Some(USER)).unwrap();
        let refused = Place::at(aside.join("two.sock")).reserve();
        assert!(refused.is_err_and(|error| error.to_string().contains("belongs to uid 65530")));
    }
}
