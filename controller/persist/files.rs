//! The files of a place, and their removal: under the lock that all take who make or remove some, and only
//! of those that were looked at.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::Flock;

use super::directory::{Directory, Pinned};
use super::place::Place;
use super::record::State;
use super::reserved::Left;
use crate::error::{Error, Result};

/// How long others may keep the directory locked while this process wants to make or remove files.
pub(super) const LOCK_LIMIT: Duration = Duration::from_secs(10);

/// The files of a place as they were at one look: see [`Place::files`].
#[derive(Debug)]
pub struct Files {
    place: Place,
    pub(super) socket: Option<Pinned>,
    pub(super) state: Option<State>,
}

impl Files {
    /// Whether there were none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.socket.is_none() && self.state.is_none()
    }

    /// Whether there was something in the socket's place.
    #[must_use]
    pub fn has_socket(&self) -> bool {
        self.socket.is_some()
    }

    /// What NAME.json said.
    #[must_use]
    pub fn state(&self) -> Option<&State> {
        self.state.as_ref()
    }

    /// Whether there is a socket on which nobody listens.
    #[must_use]
    pub fn is_left_behind(&self) -> bool {
        let socket = self.socket.as_ref().filter(|socket| socket.is_socket());
        socket.is_some_and(|socket| self.place.probe(socket) == Err(Errno::ECONNREFUSED))
    }

    /// Removes the socket, what lies beside it, and the cgroups that were made for the process, which
    /// is gone. Where another process has taken the place meanwhile, all stays.
    ///
    /// # Errors
    ///
    /// [`Error::Cgroup`] if somebody is in its cgroup still, and then all stays;
    /// [`Error::Home`] if a file is there and can't be removed.
    pub fn remove(&self) -> Result<()> {
        let place = &self.place;
        let directory = match place.directory() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            directory => directory.map_err(|error| place.error(&error))?,
        };
        let lock = directory.lock(LOCK_LIMIT).map_err(|error| place.error(&error))?;
        self.remove_under(&directory, &lock)
    }

    pub(super) fn remove_under(&self, directory: &Directory, _lock: &Flock<OwnedFd>) -> Result<()> {
        let now = self.place.files_in(directory)?;
        let same = match (&self.socket, &now.socket) {
            (Some(then), Some(now)) => then.is_same(now),
            (_, None) => now.state.is_none() || self.is_of(&now),
            (None, Some(_)) => false,
        };
        if !same {
            return Ok(());
        }
        if let Some(record) = self.place.record(directory) {
            record.remove_cgroups()?;
        }
        let (socket, state) = self.place.file_names();
        for (name, path) in
            [(socket, self.place.socket().to_owned()), (state, self.place.state_path())]
        {
            directory
                .remove(&name)
                .map_err(|error| Error::Home { path, reason: error.to_string() })?;
        }
        Ok(())
    }

    /// Whether both are about the same process.
    fn is_of(&self, other: &Self) -> bool {
        let process = |files: &Self| files.state.as_ref().map(|state| state.process.clone());
        process(self) == process(other)
    }
}

impl Place {
    /// The files that lie at this place now: what is removed of them later is none that others have
    /// put there meanwhile.
    ///
    /// # Errors
    ///
    /// [`Error::Home`] if the directory can't be looked into.
    pub fn files(&self) -> Result<Files> {
        let found = match self.directory() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            directory => Some(directory.map_err(|error| self.error(&error))?),
        };
        let place = self.clone();
        let Some(directory) = found else { return Ok(Files { place, socket: None, state: None }) };
        self.files_in(&directory)
    }

    pub(super) fn files_in(&self, directory: &Directory) -> Result<Files> {
        let socket = match directory.pin(&self.file_names().0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            socket => Some(socket.map_err(|error| self.error(&error))?),
        };
        let state = self.record(directory).map(|record| record.state);
        Ok(Files { place: self.clone(), socket, state })
    }

    /// Removes the socket, what lies beside it, and the cgroups that were made for the process: it
    /// is gone.
    ///
    /// # Errors
    ///
    /// [`Error::Cgroup`] if somebody is in its cgroup still, and then all stays;
    /// [`Error::Home`] if a file is there and can't be removed.
    pub fn remove(&self) -> Result<()> {
        self.files()?.remove()
    }

    /// Removes all at this place, if this is still its socket.
    pub(super) fn remove_own(&self, socket: &Pinned, left: Left) -> Result<()> {
        let directory = self.directory().map_err(|error| self.error(&error))?;
        let lock = directory.lock(LOCK_LIMIT).map_err(|error| self.error(&error))?;
        let files = self.files_in(&directory)?;
        if !files.socket.as_ref().is_some_and(|now| now.is_same(socket)) {
            return Ok(());
        }
        match left {
            Left::Everything => files.remove_under(&directory, &lock),
            Left::SocketAlone => {
                directory.remove(&self.file_names().0).map_err(|error| self.error(&error))
            }
        }
    }
}
