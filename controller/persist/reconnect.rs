//! Reconnecting: the same controller, over another stream.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType};
use syscalls::Sysno;

use super::attach::{meet, refused, taken, there};
use super::handshake::{self, Hold};
use super::home::Place;
use crate::abi::handshake::ANSWER_SIZE;
use crate::call::{Call, Connection, Error, Result};
use crate::handle::FdTable;
use crate::process::{Process, Sockets, to_the_end};
use crate::sys::DataSocket;

/// How long a reconnect waits for a server that is busy.
const TIMEOUT: Duration = Duration::from_secs(10);

impl Process {
    /// Where a persistent process can be reached.
    #[must_use]
    pub fn place(&self) -> Option<Arc<Place>> {
        self.inner().place.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_place(&self, place: Place) {
        *self.inner().place.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(place));
    }

    /// Ends the connection in good order: lets calls in flight finish first. Calls that are made
    /// from here on wait for the next [`Process::reconnect`], and go out in order then.
    ///
    /// The process stays as it is, inert, and any controller may attach to it.
    ///
    /// # Errors
    ///
    /// [`Error::Protocol`] if the process is not persistent: it would end.
    pub async fn prepare_for_reconnect(&self) -> Result<()> {
        let place = self.persistent_place()?;
        self.connection.shut_down().await;
        place.erase_holder()
    }

    /// Reconnects to a persistent process after its connection has ended, or in place of one that
    /// hangs. Calls that waited go out in order; then every descriptor of the process that no
    /// handle knows is closed, as soon as nothing is in flight in any server of its table.
    ///
    /// # Errors
    ///
    /// [`Error::Held`] if another controller has attached meanwhile; [`Error::Attach`].
    pub async fn reconnect(&self) -> Result<()> {
        let place = self.persistent_place()?;
        let sockets = Sockets::new()?;
        let hold = meet(&place, self.inner().token, &sockets, TIMEOUT).await?;
        let (process, place) = (self.clone(), Place::clone(&place));
        to_the_end(async move { process.go_on(&place, hold, sockets).await }).await
    }

    /// The same by way of `through`, another process that is driven from here and that reaches the
    /// socket where this process does not: in another mount namespace, behind another root. `path`
    /// is the socket's path as `through` sees it.
    ///
    /// # Errors
    ///
    /// Those of [`Process::reconnect`], and of the calls in `through`.
    pub async fn reconnect_through(&self, through: &Process, path: &Place) -> Result<()> {
        self.persistent_place()?;
        let sockets = Sockets::new()?;
        let hold = shake_hands_through(through, path, self, &sockets).await?;
        let (process, place) = (self.clone(), path.clone());
        to_the_end(async move { process.go_on(&place, hold, sockets).await }).await
    }

    fn persistent_place(&self) -> Result<Arc<Place>> {
        self.place().ok_or(Error::Protocol("the process is not persistent"))
    }

    /// The handshake is over: the connection goes on over the new sockets.
    async fn go_on(&self, place: &Place, hold: Hold, sockets: Sockets) -> Result<()> {
        let (fds, _) = taken(place, hold)?;
        let table = self.table();
        let old = std::mem::replace(&mut *self.server_fds(), fds.clone());
        table.unreserve(old.all());
        table.reserve(fds.all());
        drop((sockets.stream_there, sockets.data_there));
        {
            // What passes descriptors does so with both of the old link's sockets or of the new.
            let mut data = self.data.lock().unwrap_or_else(PoisonError::into_inner);
            // Held: what waits in the queue goes out after the sweep.
            self.connection.attach(sockets.stream);
            *data = DataSocket::new(sockets.data, fds.data);
        }
        let busy = try_sweep(&table, &self.connection).await;
        self.connection.release();
        if let Some(busy) = busy? {
            tokio::spawn(sweep_later(table, self.connection.clone(), busy));
        }
        place.write_holder(self.pid())
    }
}

/// Closes what no handle knows, if nothing is in flight in any server of the table: a call that is
/// may just have made a descriptor whose handle does not exist yet. Returns a connection on which
/// something is. `connection` stays held.
async fn try_sweep(table: &FdTable, connection: &Connection) -> Result<Option<Connection>> {
    let mut members = table.members();
    let busy = members.iter().position(|member| !member.try_hold());
    let swept = match busy {
        Some(_) => Ok(()),
        None => connection.submit_held(table.sweep(), |_| Ok(())).await,
    };
    for member in &members[..busy.unwrap_or(members.len())] {
        if !member.is(connection) {
            member.release();
        }
    }
    swept.map(|()| busy.map(|busy| members.swap_remove(busy)))
}

/// Sweeps at the first moment at which nothing is in flight.
async fn sweep_later(table: Arc<FdTable>, connection: Connection, mut busy: Connection) {
    loop {
        let mut changes = busy.watch();
        let swept = try_sweep(&table, &connection).await;
        connection.release();
        match swept {
            Ok(Some(other)) if other.is(&busy) => drop(changes.changed().await),
            Ok(Some(other)) => busy = other,
            // Done; or the connection ended, and the next reconnect sweeps.
            Ok(None) | Err(_) => return,
        }
    }
}

/// Lets `through` connect to `path` and shake hands there for `target`.
async fn shake_hands_through(
    through: &Process,
    path: &Place,
    target: &Process,
    sockets: &Sockets,
) -> Result<Hold> {
    let fds = through.send_fds(&there(sockets)).await?;
    let client =
        through.socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), 0).await?;
    let address = nix::sys::socket::UnixAddr::new(path.socket())
        .map_err(|_| refused(path, "the path is too long for a socket"))?;
    through.connect(&client, &address).await?;
    through.send_with_fds(&client, &handshake::hello(target.inner().token), &fds).await?;
    let mut pollfd = client.number().to_le_bytes().to_vec();
    pollfd.extend([1, 0, 0, 0]);
    let limit = TIMEOUT.as_millis() as u64;
    let ready = through
        .call_with("poll", pollfd, |at| Call::syscall(Sysno::poll, [at, 1, limit, 0, 0, 0]))
        .await?;
    if ready == 0 {
        return Err(refused(path, "no answer: the process is blocked in a call"));
    }
    let bytes = through.read(&client, ANSWER_SIZE).await?;
    match bytes.first_chunk() {
        Some(answer) => Ok(handshake::answer(answer)),
        None => Err(refused(path, "the server closed the handshake")),
    }
}
