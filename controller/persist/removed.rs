//! Processes whose socket's file was removed, by a cleaner of temporary directories for instance: how they
//! are found and reached, and how the socket is made anew.
//!
//! A listening socket can't be connected to without a file. So a server has a descriptor with O_PATH of
//! the file of its socket, and /proc/PID/fd leads to that also when no directory does. Such a descriptor is
//! shown there as the path with " (deleted)" behind it.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;
use nix::unistd::geteuid;

use super::directory::{Author, Directory, Pinned};
use super::home::{Home, Name};
use super::listener::{has_listener, listens_as, listens_at, paths_listened_at};
use super::make::serve;
use super::place::Place;
use super::record::Record;
use super::target::{Standing, user_of};
use super::warning::Warning;
use crate::error::{Error, Result};
use crate::link::to_the_end;
use crate::process::Process;

impl Place {
    /// The process that serves at this place though the file of its socket is gone: its pid. What stands in
    /// NAME.json may be gone as well.
    #[must_use]
    pub fn served_unlinked(&self) -> Option<i32> {
        self.unlinked().map(|(pid, _)| pid)
    }

    /// The same, and what to connect to.
    pub(super) fn unlinked(&self) -> Option<(i32, Standing)> {
        let directory = match self.directory() {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return None,
            directory => directory.ok(),
        };
        if let Some(directory) = &directory
            && self.socket_file(directory).is_ok()
        {
            return None;
        }
        let standing = |(pid, file, author)| {
            let closed = author == Author::Trusted;
            let file = Pinned::on_word_of(file, author);
            (pid, Standing { file, author: Some(author), closed })
        };
        let record = directory.and_then(|directory| self.record(&directory));
        if let Some(Record { state, author, .. }) = record
            && state.process.is_alive()
            && author.may_speak_for(state.process.pid)
            && let Some(file) = self.unlinked_in(state.process.pid)
        {
            return Some(standing((state.process.pid, file, author)));
        }
        // Without a record all processes would have to be looked at: only where one listens.
        if !listens_at(self.socket()) && !listens_at(&whole(self.socket())) {
            return None;
        }
        let found = own_processes().into_iter().find_map(|pid| Some((pid, self.unlinked_in(pid)?)));
        found.map(|(pid, file)| standing((pid, file, Author::Trusted)))
    }

    /// Why the process that NAME.json names can't be reached, where that is for want of the file of its
    /// socket.
    pub(super) fn why_lost(&self) -> Option<String> {
        let Record { state, author, .. } = self.record(&self.directory().ok()?)?;
        let pid = state.process.pid;
        let is_meant = state.process.is_alive() && author.may_speak_for(pid);
        (is_meant && listens_as(pid, &self.file_names().0)).then(|| {
            format!(
                "the process (pid {pid}) lives, but the file of its socket was removed, and it has no \
                 descriptor of that file by which it could be reached: its table of descriptors was full \
                 (RLIMIT_NOFILE) when the socket was made, or its server is older. `farcall stop --kill` \
                 ends it"
            )
        })
    }

    /// The file of a socket that a process listens on, and that was removed from this place.
    fn unlinked_in(&self, pid: i32) -> Option<Pinned> {
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        // By its descriptor it stays that process's: what ends has none.
        let fds =
            open(format!("/proc/{pid}/fd").as_str(), flags | OFlag::O_DIRECTORY, Mode::empty());
        let fds = fds.ok()?;
        let mut link = whole(self.socket()).into_os_string();
        link.push(" (deleted)");
        let name = self.file_names().0;
        for (number, to) in links_of(pid) {
            if to != Path::new(&link) {
                continue;
            }
            let Ok(fd) = openat(&fds, number.as_os_str(), flags, Mode::empty()) else {
                continue;
            };
            let file = Pinned::new(fd).ok()?;
            if file.is_socket() && has_listener(pid, file.stat(), &name) {
                return Some(file);
            }
        }
        None
    }
}

/// The processes of this user. Anybody may bind a socket that has the path of another user's, in a mount
/// namespace of theirs.
fn own_processes() -> Vec<i32> {
    let own = geteuid().as_raw();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| user_of(*pid) == Some(own)).collect()
}

/// The numbers of a process's descriptors, and what each leads to.
fn links_of(pid: i32) -> impl Iterator<Item = (OsString, PathBuf)> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some((entry.file_name(), fs::read_link(entry.path()).ok()?)))
}

/// A path without symbolic links and relative parts, as far as it exists.
fn whole(path: &Path) -> PathBuf {
    let mut rest = Vec::new();
    let mut exists = path;
    loop {
        let looked_at = if exists == Path::new("") { Path::new(".") } else { exists };
        // The last part is a file that is looked for by its name.
        if !rest.is_empty()
            && let Some(whole) = Directory::open(looked_at).ok().and_then(|at| at.whole_path())
        {
            return rest.iter().rev().fold(whole, |path, part: &OsString| path.join(part));
        }
        match (exists.parent(), exists.components().next_back()) {
            (Some(parent), Some(Component::Normal(last))) => {
                rest.push(last.to_owned());
                exists = parent;
            }
            _ => return path.to_owned(),
        }
    }
}

/// The names of files that were removed from a directory and that processes of this user have open.
fn removed_files(directory: &Path) -> HashSet<OsString> {
    let links = own_processes().into_iter().flat_map(links_of);
    let name = |(_, link): (OsString, PathBuf)| {
        let path = link.into_os_string().into_vec();
        let path = PathBuf::from(OsString::from_vec(path.strip_suffix(b" (deleted)")?.to_vec()));
        let here = path.parent() == Some(directory);
        path.file_name().filter(|_| here).map(OsString::from)
    };
    links.filter_map(name).collect()
}

impl Home {
    /// The names of processes that serve here though the files of their sockets are gone, and have no
    /// NAME.json either. Those that are known are in order.
    pub(super) fn unlinked(&self, known: &[Name]) -> Vec<Name> {
        let mut names: Vec<Name> = Vec::new();
        let directories = [self.path().to_owned(), whole(&self.path().join("name"))];
        let [own, whole] = &directories;
        let whole = whole.parent().unwrap_or(own);
        // All are looked for at once: others may listen at any number of paths that lead here in mount
        // namespaces of theirs.
        let mut removed = None;
        for path in paths_listened_at() {
            let path = PathBuf::from(OsString::from_vec(path));
            let name = || {
                let parent = path.parent()?;
                let file = path.file_name()?.to_str()?;
                let here = parent == own || parent == whole;
                file.strip_suffix(".sock").filter(|_| here)?.parse().ok()
            };
            let Some(name) = name() else { continue };
            let removed = removed.get_or_insert_with(|| removed_files(whole));
            if removed.contains(path.file_name().unwrap_or_default())
                && known.binary_search(&name).is_err()
                && !names.contains(&name)
            {
                names.push(name);
            }
        }
        names.retain(|name| self.place(name).unlinked().is_some());
        names
    }
}

impl Process {
    /// Makes the socket of a persistent process anew, whose file was removed, with the directory if that
    /// is gone as well: a new one is bound and served in its place. What is under way goes on.
    ///
    /// Without it the process is reached by who looks for it through /proc, as [`attach`](super::attach)
    /// and all of `farcall` do, and by nobody else.
    ///
    /// # Errors
    ///
    /// [`Error::Home`] if a socket is there, whose it may be, or the directory can't be written;
    /// [`Error::Misuse`] if the process is not persistent; errors of the calls.
    pub async fn restore_socket(&self) -> Result<()> {
        let process = self.clone();
        to_the_end(async move { process.bind_anew().await }).await
    }

    async fn bind_anew(&self) -> Result<()> {
        let place = self.persistent_place()?;
        let anew = place.bind_anew()?;
        let listen = self.send_server_fds(&[anew.listen()?.as_fd()]).await?;
        let file = self.send_server_fds(&[anew.socket_file()]).await;
        let (Some(&listen), file) = (listen.first(), file.ok()) else {
            return Err(Error::Protocol("not as many descriptors as were sent"));
        };
        let file = file.and_then(|numbers| numbers.first().copied());
        let call = serve(-1, listen, file, self.inner().token);
        self.connection.call("SERVE", call).await?;
        let old = {
            let mut fds = self.server_fds();
            let file = file.unwrap_or(-1);
            [std::mem::replace(&mut fds.listen, listen), std::mem::replace(&mut fds.file, file)]
        };
        anew.keep();
        self.table().close_later(old.into_iter().filter(|number| *number >= 0));
        let connection = self.connection.stream_inode();
        self.recorded(place.write_holder(self.pid(), connection));
        Ok(())
    }

    /// Tells who attached by way of /proc that others can't.
    pub(super) fn warn_if_unlinked(&self, place: &Place) {
        let there = place.directory().and_then(|directory| place.socket_file(&directory));
        if there.is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            self.warn(Warning::SocketRemoved { path: place.socket().to_owned() });
        }
    }
}
