//! Reconnecting: the same controller, over another stream.

use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType};
use syscalls::Sysno;
use tokio::sync::OwnedMutexGuard;
use tokio::time::{Instant, sleep, timeout};

use super::attach::{Taken, find_image_first, map_arena_first, refused, taken};
use super::meet::{Heard, Manner, PAUSE, meet, no_answer, shake_hands};
use super::place::Place;
use crate::abi::log::LogHead;
use crate::calls::handle::{FdTable, Unready};
use crate::calls::registry::tags_of;
use crate::calls::{SocketAddress, Task};
use crate::error::{Error, Result};
use crate::fault;
use crate::link::{Connection, DataSocket, LinkHistory, to_the_end};
use crate::process::{Process, Sockets};
use crate::proto::Call;

/// How long a reconnect waits for a server that is busy.
const TIMEOUT: Duration = Duration::from_secs(10);

impl Process {
    /// Where a persistent process can be reached.
    #[must_use]
    pub fn place(&self) -> Option<Arc<Place>> {
        self.inner().place.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_place(&self, place: Place) {
        let place = Arc::new(place);
        self.watch_for_successors(&place);
        *self.inner().place.lock().unwrap_or_else(PoisonError::into_inner) = Some(place);
    }

    /// Ends the connection in good order: lets calls in flight finish first. Calls that are made
    /// from here on wait for the next [`Process::reconnect`], and go out in order then.
    ///
    /// The process stays as it is, inert, and any controller may attach to it.
    ///
    /// A process that is stopped or blocked is waited for. If this is dropped before calls in flight have
    /// finished, the connection goes on; later, the process ends it when it goes on itself, calls that are
    /// made meanwhile wait as said, and NAME.json still names this controller.
    ///
    /// # Errors
    ///
    /// [`Error::Misuse`] if the process is not persistent: it would end. [`Error::LeaderExited`].
    pub async fn prepare_for_reconnect(&self) -> Result<()> {
        let place = self.persistent_place()?;
        self.connection.shut_down().await?;
        fault::point("detach.shut_down");
        self.recorded(place.erase_holder());
        Ok(())
    }

    /// Reconnects to a persistent process after its connection has ended, or in place of one that
    /// hangs.
    ///
    /// Every call that was in flight gets its true result: from the process's log if it was executed,
    /// else it is sent again, in order, and what a COPY_OUT brings is fetched again. Then calls that
    /// waited go out. Every descriptor of the process that no handle knows is closed, as soon as
    /// nothing is in flight in any server of its table.
    ///
    /// If another controller has held the process in between, nothing of that is sent, and nothing is
    /// closed: calls that were executed have their results, all others fail with
    /// [`Error::Superseded`], which says whether they were executed. Handles from before are stale, see
    /// [`Error::Stale`], except for those whose descriptors still have the names that they had.
    ///
    /// # Errors
    ///
    /// [`Error::Held`] if another controller has attached meanwhile; [`Error::Attach`], also if the process
    /// does not answer within ten seconds, or does not do within as many what is asked of it then.
    pub async fn reconnect(&self) -> Result<()> {
        let place = self.persistent_place()?;
        let turn = self.inner().reconnecting.clone().lock_owned().await;
        let sockets = Sockets::new()?;
        let heard = meet(&place, Manner::again(self.inner().token), &sockets, TIMEOUT).await?;
        self.go_on_to_the_end(place, heard, sockets, turn).await
    }

    /// The same by way of `through`, another process that is driven from here and that reaches the
    /// socket where this process does not: in another mount namespace, behind another root. `path`
    /// is the socket's path as `through` sees it.
    ///
    /// # Errors
    ///
    /// Those of [`Process::reconnect`], and of the calls in `through`.
    pub async fn reconnect_through(&self, through: &Process, path: &Place) -> Result<()> {
        let place = self.persistent_place()?;
        let turn = self.inner().reconnecting.clone().lock_owned().await;
        let sockets = Sockets::new()?;
        let client = connect_through(through, path).await?;
        let end = Instant::now() + TIMEOUT;
        let heard =
            shake_hands(&place, Manner::again(self.inner().token), &sockets, client, end).await?;
        self.go_on_to_the_end(place, heard, sockets, turn).await
    }

    pub(super) fn persistent_place(&self) -> Result<Arc<Place>> {
        self.place().ok_or(Error::misuse(
            "a reconnect to a process that is not persistent",
            "it ended with its connection; Process::make_persistent makes one that can be reconnected to",
        ))
    }

    async fn go_on_to_the_end(
        &self,
        place: Arc<Place>,
        heard: Heard,
        sockets: Sockets,
        turn: OwnedMutexGuard<()>,
    ) -> Result<()> {
        let process = self.clone();
        to_the_end(async move {
            let _turn = turn;
            let mut going_on = pin!(process.go_on(&place, heard, sockets));
            if let Ok(done) = timeout(TIMEOUT, &mut going_on).await {
                return done;
            }
            // It has been stopped, or what no handle knows takes that long to close. The next reconnect
            // finds what has become of it.
            process.connection.end_link(process.connection.epoch());
            let _ = going_on.await;
            Err(no_answer(&place))
        })
        .await
    }

    /// The handshake is over: the connection goes on over the new sockets.
    async fn go_on(&self, place: &Place, heard: Heard, sockets: Sockets) -> Result<()> {
        fault::point("reconnect.answered");
        let Heard { hold, log, .. } = heard;
        let Taken { mut fds, version, pid } = taken(place, hold)?;
        let controllers = log.head.controllers;
        let number = self.inner().controllers.load(Ordering::Relaxed);
        let held = number != controllers;
        if held {
            self.give_rings_up();
            // It may have upgraded it, too.
            self.lose_sight_of_image();
        }
        let end = log.end_of(self.inner().token, number);
        let end = end.filter(|_| fault::mutant("no-log").is_none());
        let past = LinkHistory { end, log, held };
        if version != self.connection.version() {
            return Err(refused(place, "the server changed the version of the stream"));
        }
        if !held && fds.file < 0 {
            // A server that is older than this one does not tell.
            fds.file = self.server_fds().file;
        }
        let table = self.table();
        let old = std::mem::replace(&mut *self.server_fds(), fds.clone());
        table.unreserve(old.all());
        table.reserve(fds.all());
        drop((sockets.stream_there, sockets.data_there));
        // What waits in the queue goes out after the sweep.
        let pause = self.connection.quiesce();
        {
            // What passes descriptors does so with both of the old link's sockets or of the new.
            let mut data = self.ends.data();
            let next = DataSocket::new(sockets.data, fds.data);
            self.connection.attach(sockets.stream, Some(&past), (!held).then_some(&next));
            // What fails before this is not known to have been told.
            self.inner().controllers.store(controllers, Ordering::Relaxed);
            *data = Some(next);
        }
        fault::point("reconnect.resumed");
        if self.connection.is_outdated() {
            self.begin_tenure(pid, &past.log.head).await?;
        } else {
            // What has a name is not swept away.
            self.registry().told(&past.log.head);
            self.read_registry_first(self, Some(self.table())).await?;
        }
        let table = self.table();
        if self.image_may_differ() {
            self.set_image(find_image_first(&self.connection).await?);
        }
        fault::point("reconnect.sweeping");
        let busy = match table.has_others() {
            true => Ok(None),
            false => try_sweep(&table, &self.connection).await,
        };
        fault::point("reconnect.swept");
        drop(pause);
        if let Some(busy) = busy? {
            let connection = self.connection.clone();
            tokio::spawn(async move {
                // If the connection ends first, the next reconnect sweeps.
                let _ = sweep_when_idle(&table, &connection, busy).await;
            });
        }
        self.warn_if_unlinked(place);
        self.recorded(place.write_holder(self.pid(), self.connection.stream_inode()));
        Ok(())
    }

    async fn read_registry_first(&self, task: &Task, table: Option<Arc<FdTable>>) -> Result<()> {
        if let Err(Unready::Unread { address, len }) = task.registry().kept() {
            let (calls, read) = task.reading(address, len, table);
            task.connection.submit_first(calls, read).await?;
        }
        Ok(())
    }

    /// Another controller has held the process: all that is known of it is made anew or looked at again,
    /// in a pause of the caller's, over a link that is there. Then calls can be made again.
    async fn begin_tenure(&self, pid: i32, head: &LogHead) -> Result<()> {
        let connection = self.connection().of_this_tenure();
        // What was executed before has its handles, which are of the earlier tenure.
        connection.is_owned().await;
        let arena = map_arena_first(&connection, pid).await?;
        let task = self.renewed(arena);
        task.registry().told(head);
        self.read_registry_first(&task, None).await?;
        let own = self.server_fds().all();
        let kept = task.registry().kept().unwrap_or_default();
        let same = self.still_named(&task, &kept, &own).await?;
        fault::point("reconnect.renewed");
        let table = self.table().supersede(&task.connection, &own, &same, tags_of(&kept));
        self.space.supersede(&task.connection);
        self.begin(task, table);
        Ok(())
    }
}

/// Closes what no handle knows, if nothing is in flight in any server of the table: a call that is
/// may just have made a descriptor whose handle does not exist yet. Returns a connection on which
/// something is.
///
/// The socket of a client whose handshake is under way is closed by that, too. The server sees that when
/// it waits for its next request: before, nobody is to open anything under that number.
async fn try_sweep(table: &FdTable, connection: &Connection) -> Result<Option<Connection>> {
    let mut pauses = Vec::new();
    for member in table.members() {
        match member.try_quiesce_idle() {
            Some(pause) => pauses.push(pause),
            None => return Ok(Some(member)),
        }
    }
    connection.submit_first(table.sweep(), |_| Ok(())).await?;
    let getpid = vec![Call::syscall(Sysno::getpid, [0; 6])];
    connection.submit_first(getpid, |_| Ok(())).await.map(|()| None)
}

/// Sweeps at the first moment at which nothing is in flight, and returns then.
pub(super) async fn sweep_when_idle(
    table: &FdTable,
    connection: &Connection,
    mut busy: Connection,
) -> Result<()> {
    loop {
        let mut changes = busy.subscribe();
        match try_sweep(table, connection).await? {
            Some(other) if other.is(&busy) => drop(changes.changed().await),
            Some(other) => busy = other,
            None => return Ok(()),
        }
    }
}

/// Lets `through` connect to `path`, and takes the connected socket over. It is not blocked: the
/// socket does not wait, and a full backlog is tried again.
async fn connect_through(through: &Process, path: &Place) -> Result<OwnedFd> {
    let address = SocketAddress::unix(path.socket())
        .map_err(|_| refused(path, "the path is too long for a socket"))?;
    let end = Instant::now() + TIMEOUT;
    loop {
        let flags = SockFlag::SOCK_NONBLOCK;
        let client = through.socket(AddressFamily::Unix, SockType::Stream, flags, 0).await?;
        match through.connect(&client, address).await {
            Err(error) if error.errno() == Some(Errno::EAGAIN) && Instant::now() < end => {
                sleep(PAUSE).await;
            }
            Err(error) => return Err(error),
            Ok(()) => return through.fetch_fd(&client).await,
        }
    }
}
