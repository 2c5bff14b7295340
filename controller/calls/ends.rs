//! What a server runs on: its descriptors, and the data socket, which a child gets when it is first
//! needed.
//!
//! Most children pass no descriptors, and a pair of sockets costs a tenth of what a child does. So
//! the other end of the data socket comes later and the only way there is: through the child's
//! stream. See [`Connection::begin_transfer`].

use std::collections::BTreeSet;
use std::future::Future;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, TryLockError};

use nix::errno::Errno;
use tokio::sync::OwnedMutexGuard;

use super::rights::{Message, duplicate, taken};
use super::{Buffer, Task, last};
use crate::calls::handle::{FdTable, Lent};
use crate::descriptor::{FIRST, socketpair};
use crate::error::{Error, Result};
use crate::link::{Connection, DataSocket, FdTransfer, take, to_the_end};
use crate::proto::Call;
use crate::proto::batch::{Batch, Places};

/// The descriptors that a server runs on; a negative one is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServerFds {
    pub(crate) input: i32,
    pub(crate) output: i32,
    pub(crate) data: i32,
    /// The listening socket, once it is persistent, and the descriptor of its file.
    pub(crate) listen: i32,
    pub(crate) file: i32,
    /// The spares.
    pub(crate) persistent: Vec<i32>,
    /// The bells of a ring.
    pub(crate) ring: Vec<i32>,
    /// What interrupts its calls.
    pub(crate) source: Option<i32>,
}

impl ServerFds {
    /// Those of a connection with the stream `stream` and the data socket `data`.
    pub(crate) fn new(stream: i32, data: i32) -> Self {
        let (persistent, ring) = (Vec::new(), Vec::new());
        let (listen, file, source) = (-1, -1, None);
        Self { input: stream, output: stream, data, listen, file, persistent, ring, source }
    }

    pub(crate) fn all(&self) -> BTreeSet<i32> {
        let connection = [self.input, self.output, self.data, self.listen, self.file];
        let more = self.persistent.iter().chain(&self.ring).copied().chain(self.source);
        connection.into_iter().chain(more).filter(|number| *number >= 0).collect()
    }
}

/// What a server runs on, and our end of its data socket.
pub(crate) struct Ends {
    table: RwLock<Arc<FdTable>>,
    fds: Mutex<ServerFds>,
    data: Mutex<Option<DataSocket>>,
    making: Arc<tokio::sync::Mutex<()>>,
    /// Where what a child has in its parent's table is told.
    lent: Option<Arc<Lent>>,
}

impl Ends {
    pub(crate) fn new(
        table: Arc<FdTable>,
        fds: ServerFds,
        data: Option<DataSocket>,
        lent: Option<Arc<Lent>>,
    ) -> Arc<Self> {
        let (table, fds, data) = (RwLock::new(table), Mutex::new(fds), Mutex::new(data));
        let making = Arc::default();
        Arc::new(Self { table, fds, data, making, lent })
    }

    pub(super) fn table(&self) -> Arc<FdTable> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_table(&self, table: Arc<FdTable>) {
        *self.table.write().unwrap_or_else(PoisonError::into_inner) = table;
    }

    /// See [`Task::quiet_table`].
    pub(super) async fn quiet_table(&self) -> (Arc<FdTable>, OwnedMutexGuard<()>) {
        loop {
            let table = self.table();
            let quiet = table.quiet.clone().lock_owned().await;
            // It may have got another one meanwhile.
            if Arc::ptr_eq(&table, &self.table()) {
                return (table, quiet);
            }
        }
    }

    pub(crate) fn fds(&self) -> MutexGuard<'_, ServerFds> {
        self.fds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The data socket, if there is one. Whoever holds the guard knows that the order of messages is
    /// the order of the calls that take them.
    pub(crate) fn data(&self) -> MutexGuard<'_, Option<DataSocket>> {
        self.data.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same, if nobody has it.
    pub(crate) fn try_data(&self) -> Option<MutexGuard<'_, Option<DataSocket>>> {
        match self.data.try_lock() {
            Ok(data) => Some(data),
            Err(TryLockError::Poisoned(data)) => Some(data.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// The server has these descriptors too, in `table`.
    pub(crate) fn lend(&self, table: &Arc<FdTable>, numbers: &[i32]) {
        if let Some(lent) = &self.lent {
            lent.add(table, numbers);
        }
    }

    /// The server has closed these, in `table`.
    pub(crate) fn take_back(&self, table: &Arc<FdTable>, numbers: Vec<i32>) {
        if let Some(lent) = &self.lent {
            lent.take_back(table, &numbers);
        }
        table.unreserve(numbers);
    }

    /// Nobody makes the data socket while this is held. To be taken before the table is kept quiet.
    pub(crate) async fn settled(&self) -> OwnedMutexGuard<()> {
        self.making.clone().lock_owned().await
    }

    /// The calls that take the other end of a data socket, with a message in the buffer.
    fn taking(&self, buffer: &Buffer) -> (Vec<Call>, Call) {
        let mut batch = Batch::default();
        Message::receiving(&mut batch, 1);
        // It is the first piece of the input: it lies where that does.
        let memory = buffer.address();
        let part = batch.whole(Places { memory, slot: 0 });
        (part.calls, take(self.fds().input, memory))
    }
}

fn pair() -> Result<(OwnedFd, OwnedFd)> {
    socketpair().map_err(Error::io("socketpair"))
}

/// A data socket whose other end is on its way. Nothing that it needs can change meanwhile.
struct Coming {
    ends: Arc<Ends>,
    connection: Connection,
    table: Arc<FdTable>,
    buffer: Buffer,
    /// The socket's ends, made before the server waits for the second one.
    pair: (OwnedFd, OwnedFd),
    passing: FdTransfer,
    _locks: [OwnedMutexGuard<()>; 2],
}

impl Coming {
    async fn finish(self) -> Result<()> {
        let Self { ends, connection, table, buffer, pair: (here, there), passing, _locks } = self;
        let pause = passing.finish(there.as_fd()).await?;
        let message = vec![Call::copy_out(buffer.address(), Message::SIZE)];
        let taken = connection.submit_first(message, |replies| taken(&replies)).await;
        let (numbers, _) = taken?;
        let &[mut number] = numbers.as_slice() else {
            return Err(Error::Call { call: "recvmsg", errno: Errno::EMFILE });
        };
        table.reserve([number]);
        if number < FIRST {
            let other = connection.submit_first(vec![duplicate(number)], |replies| {
                last(&replies)?.value().map_err(Error::call("fcntl"))
            });
            // Where there is no room, it stays where it is.
            if let Ok(other) = other.await {
                table.reserve([other as i32]);
                table.close_later([number]);
                number = other as i32;
            }
        }
        drop((pause, buffer));
        ends.fds().data = number;
        ends.lend(&table, &[number]);
        *ends.data() = Some(DataSocket::new(here, number));
        Ok(())
    }
}

impl Task {
    /// Returns when there is a data socket. Whoever calls this must not keep the table quiet: it is
    /// while the socket is on its way.
    ///
    /// The table is kept quiet once nothing is unanswered, and not before: others share it, and calls may
    /// take long. Whoever keeps it quiet waits for no call of this connection, which pauses meanwhile:
    /// it has a data socket already, or has [`Ends::settled`].
    pub(crate) async fn need_data(&self) -> Result<()> {
        if self.ends.data().is_some() {
            return Ok(());
        }
        let buffer = self.buffer(Message::SIZE).await?;
        let (ends, connection) = (self.ends.clone(), self.connection.clone());
        to_the_end(async move {
            let settled = ends.settled().await;
            if ends.data().is_some() {
                return Ok(());
            }
            let pair = pair()?;
            let mut pause = connection.quiesce_idle().await;
            let (table, quiet) = ends.quiet_table().await;
            let mut changed = connection.subscribe();
            let passing = loop {
                let (first, receive) = ends.taking(&buffer);
                match connection.begin_transfer(pause, first, receive)? {
                    Ok(passing) => break passing,
                    Err(back) => pause = back,
                }
                // The sender lives in the connection.
                let _ = changed.changed().await;
            };
            let _locks = [settled, quiet];
            Coming { ends, connection, table, buffer, pair, passing, _locks }.finish().await
        })
        .await
    }

    /// Whether there is a data socket. Nobody who makes one keeps others from looking.
    pub(crate) fn has_data(&self) -> bool {
        self.ends.try_data().is_none_or(|data| data.is_some())
    }

    /// Begins to make a data socket, if nothing is in the way: waits for nothing. What is returned is
    /// to be carried out to the end.
    pub(crate) fn try_data(
        &self,
    ) -> Result<Option<impl Future<Output = Result<()>> + Send + 'static>> {
        let Ok(settled) = self.ends.making.clone().try_lock_owned() else { return Ok(None) };
        let table = self.table();
        let Ok(quiet) = table.quiet.clone().try_lock_owned() else { return Ok(None) };
        if self.has_data() || !Arc::ptr_eq(&table, &self.table()) {
            return Ok(None);
        }
        let Some(buffer) = self.arena.take(Message::SIZE).map(Buffer::Arena) else {
            return Ok(None);
        };
        let pair = pair()?;
        let (ends, connection) = (self.ends.clone(), self.connection.clone());
        let Some(pause) = connection.try_quiesce_idle() else { return Ok(None) };
        let (first, receive) = ends.taking(&buffer);
        let begun = connection.begin_transfer(pause, first, receive)?;
        let _locks = [settled, quiet];
        let coming =
            |passing| Coming { ends, connection, table, buffer, pair, passing, _locks }.finish();
        Ok(begun.ok().map(coming))
    }
}
