//! Giving a server a ring: when, and what becomes of it afterwards.
//!
//! A ring takes two descriptors, and pages on both sides. So a process gets its ring when it turns out
//! to be called often, or when it is asked for.
//!
//! While one is made, nobody may reconnect, make a child that copies the table of descriptors, or leave
//! that table. So it is made at a moment at which the server has nothing else to do: all of that takes
//! one round trip then, which waits behind no call that takes long. Until there is such a moment,
//! nothing is held that others need.

mod making;
mod signal;

use std::collections::BTreeSet;
use std::sync::{Arc, MutexGuard, PoisonError, Weak};

use self::making::Making;
use super::{Inner, Process};
use crate::calls::handle::Mapping;
use crate::calls::{Buffer, Message};
use crate::error::Result;
use crate::link::{Polling, Quiesce, SHARED_SIZE, WhenBusy, to_the_end};

/// What has come of trying to make a ring.
enum Try {
    /// It was there already.
    There,
    /// It is being made.
    Begun(Box<Making>),
    /// Something is under way.
    Busy,
    /// Somebody reconnects, or makes a child, or leaves the table.
    Locked,
}

impl Process {
    /// Calls go through shared memory from here on, where they can, without the detour through the
    /// kernel that a stream is. A process that is called often gets that by itself.
    ///
    /// The ring is made when the calls that are under way are complete. Calls that are made meanwhile
    /// go out after that; dropping the future lets them go out at once.
    ///
    /// When the connection ends, so does the ring; after a reconnect it is made anew when the process
    /// is called often again.
    ///
    /// # Errors
    ///
    /// [`Error::NoReadAhead`](crate::Error::NoReadAhead), and those of the calls that map the memory.
    pub async fn enter_ring(&self, polling: Polling) -> Result<()> {
        self.connection.needs_read_ahead("a ring")?;
        // Two that pause the connection would wait for each other.
        let _turn = self.inner().entering.lock().await;
        let process = self.in_this_tenure();
        process.need_data().await?;
        let buffer = Arc::new(process.buffer(Message::SIZE).await?);
        let mut changed = process.connection.subscribe();
        loop {
            // Where there is always something under way it would never be idle by itself.
            let pause = process.connection.quiesce();
            let tried = loop {
                match process.try_ring(polling, Some(&pause), || Some(buffer.clone()))? {
                    // The sender lives in what `self` holds.
                    Try::Busy => drop(changed.changed().await),
                    other => break other,
                }
            };
            drop(pause);
            match tried {
                Try::Begun(making) => return to_the_end(making.finish()).await,
                Try::There => return Ok(()),
                // Whoever it is may wait for calls that the pause has kept.
                Try::Busy | Try::Locked => {
                    drop(process.inner().reconnecting.lock().await);
                    drop(process.quiet_table().await);
                }
            }
        }
    }

    /// Begins to make a ring, if nothing is in the way: waits for nothing. It is made with a buffer for
    /// a [`Message`] with one byte.
    fn try_ring(
        &self,
        polling: Polling,
        own: Option<&Quiesce>,
        buffer: impl FnOnce() -> Option<Arc<Buffer>>,
    ) -> Result<Try> {
        if self.connection.has_ring() {
            return Ok(Try::There);
        }
        if !self.connection.is_idle(own)? {
            return Ok(Try::Busy);
        }
        let Ok(turn) = self.inner().reconnecting.clone().try_lock_owned() else {
            return Ok(Try::Locked);
        };
        let table = self.table();
        let Ok(quiet) = table.quiet.clone().try_lock_owned() else { return Ok(Try::Locked) };
        if !Arc::ptr_eq(&table, &self.table()) {
            return Ok(Try::Locked);
        }
        let Some(buffer) = buffer() else { return Ok(Try::Busy) };
        let begun = Making::begin(self, polling, own, buffer, table, [turn, quiet])?;
        // Who passes descriptors, or is about to, comes first, and would wait for the end of a pause.
        Ok(begun.map_or(Try::Locked, |making| Try::Begun(Box::new(making))))
    }

    /// Unmaps the ring of a controller before this one, of which nobody else knows.
    fn forget_ring(&self, before: u64) {
        if before != 0 && !self.rings().contains(&before) {
            drop(Mapping::new(&self.space, before, SHARED_SIZE));
        }
    }

    /// Another controller may have held the process meanwhile, and have unmapped what it did not know:
    /// nothing here uses or unmaps it any more. If it is still there, the next RING names it.
    pub(crate) fn give_rings_up(&self) {
        self.rings().clear();
        self.forget_shared();
    }

    fn rings(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.inner().rings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What makes a ring once the process is called often.
pub(super) fn when_busy(
    process: Weak<Inner>,
    polling: Polling,
) -> impl Fn() -> WhenBusy + Send + Sync {
    let runtime = tokio::runtime::Handle::try_current();
    move || {
        let (Ok(runtime), Some(inner)) = (&runtime, process.upgrade()) else {
            return WhenBusy::Done;
        };
        let process = Process { inner, tenure: None };
        let _runtime = runtime.enter();
        if process.has_data() {
            return process.begin_ring(polling);
        }
        match process.try_data() {
            Ok(Some(coming)) => {
                runtime.spawn(async move {
                    let epoch = process.connection.epoch();
                    let next = match coming.await {
                        Ok(()) => process.begin_ring(polling),
                        Err(_) => WhenBusy::CallLater,
                    };
                    process.connection.call_when_busy(epoch, next);
                });
                WhenBusy::Done
            }
            Ok(None) => WhenBusy::CallAgain,
            Err(_) => WhenBusy::CallLater,
        }
    }
}

impl Process {
    /// Makes a ring, if nothing is in the way. Says when that is to be tried again: what it takes may
    /// be there later.
    fn begin_ring(&self, polling: Polling) -> WhenBusy {
        let buffer = || self.arena.take(Message::SIZE).map(Buffer::Arena).map(Arc::new);
        match self.try_ring(polling, None, buffer) {
            Ok(Try::Begun(making)) => {
                let process = self.clone();
                tokio::spawn(async move {
                    let epoch = process.connection.epoch();
                    // If it can't be had, the stream goes on.
                    if making.finish().await.is_err() {
                        process.connection.call_when_busy(epoch, WhenBusy::CallLater);
                    }
                });
                WhenBusy::Done
            }
            Ok(Try::Busy | Try::Locked) => WhenBusy::CallAgain,
            Ok(Try::There) => WhenBusy::Done,
            Err(_) => WhenBusy::CallLater,
        }
    }
}
