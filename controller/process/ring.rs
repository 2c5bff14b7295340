//! Giving a server a ring: the memory and the bells, and telling it.
//!
//! That takes a few round trips and two descriptors, and pages on both sides. So a process gets its
//! ring when it turns out to be called often, or when it is asked for.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard, PoisonError, Weak};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::mman::{MapFlags, ProtFlags};
use syscalls::{Sysno, syscall};

use super::{Inner, Process, to_the_end};
use crate::abi::ring::INTERRUPT_SIGNAL;
use crate::abi::wire::Operation;
use crate::call::{Call, Error, Polling, Result};
use crate::handle::Mapping;
use crate::sys::{Message, last};
use crate::transport::{Prepared, SHARED_SIZE};

impl Process {
    /// Calls go through shared memory from here on, where they can, without the detour through the
    /// kernel that a stream is. A process that is called often gets that by itself.
    ///
    /// When the connection ends, so does the ring; after a reconnect it is made anew when the process
    /// is called often again.
    ///
    /// # Errors
    ///
    /// Where the server can't read ahead (version 0 of the stream), and those of the calls that map
    /// the memory.
    pub async fn enter_ring(&self, polling: Polling) -> Result<()> {
        if self.connection.version() == 0 {
            return Err(Error::Protocol(
                "the server speaks version 0 of the stream, without a ring",
            ));
        }
        let process = self.clone();
        to_the_end(async move { process.make_ring(polling).await }).await
    }

    async fn make_ring(&self, polling: Polling) -> Result<()> {
        // What is waited for here may be another link: whoever brings it needs the lock.
        let buffer = self.buffer(Message::size(1)).await?;
        // Neither the link nor the table is exchanged meanwhile. Nothing here waits for another link.
        let _turn = self.inner().reconnecting.clone().lock_owned().await;
        let (table, _quiet) = self.quiet_table().await;
        if self.connection.has_ring() {
            return Ok(());
        }
        let epoch = self.connection.epoch();
        let prepared = Prepared::new()?;
        let (bell_there, bell_here) = (eventfd()?, eventfd()?);
        let sent = [prepared.memfd(), bell_there.as_fd(), bell_here.as_fd()];
        let numbers = self.send_server_fds_with(buffer, &sent).await?;
        let [memfd, bells @ ..] = numbers.as_slice() else {
            return Err(Error::Protocol("not three descriptors"));
        };
        let &[their_bell, our_bell] = bells else {
            return Err(Error::Protocol("not three descriptors"));
        };
        let mapped = self.map_ring(*memfd).await;
        // It is closed; or the link is over, and it is closed by who sweeps.
        table.unreserve([*memfd]);
        let entered = match mapped {
            Ok(mapping) => {
                let address = mapping.address();
                // Also if the reply is lost: the server may name it next time.
                self.rings().insert(address);
                let interregna = self.inner().interregna.clone();
                let since = interregna.load(Ordering::Relaxed);
                let there = There { mapping: Some(mapping), interregna, since };
                let memory = Arc::new(prepared.mapped(address, there));
                let bells = their_bell as u64 | (our_bell as u64) << 32;
                let args = [address, bells, 0, 0, 0, 0];
                let call = Call::operation(Operation::Ring, args);
                let entered = self.connection.submit_on_link(vec![call], |replies| {
                    last(&replies)?.value().map_err(Error::call("RING"))
                });
                entered.await.map(|before| (memory, before))
            }
            Err(error) => Err(error),
        };
        let (memory, before) = match entered {
            Ok(entered) => entered,
            Err(error) => {
                if matches!(error, Error::Lost(_)) && self.is_persistent() {
                    // The server may have closed them with the link, and have others of these numbers
                    // by now. If it has not, who sweeps does.
                    table.unreserve([their_bell, our_bell]);
                } else {
                    table.close_later([their_bell, our_bell]);
                }
                return Err(error);
            }
        };
        self.server_fds().ring = bells.to_vec();
        if let Some(remains) = self.remains() {
            remains.add_in_parent(&table, bells);
        }
        self.forget_ring(before);
        self.set_shared(&memory);
        let (pidfd, address) = (self.shared_pidfd().clone(), memory.address());
        let signal = Arc::new(move || interrupt(&pidfd, address));
        self.connection.enter_ring(epoch, memory, polling, signal, bell_there, bell_here)
    }

    /// Maps the memory into the process, and keeps it out of children that get a copy of the
    /// process's memory: they must not find their parent's ring.
    async fn map_ring(&self, memfd: i32) -> Result<Mapping> {
        let protection = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE).bits() as u64;
        let shared = MapFlags::MAP_SHARED.bits() as u64;
        let args = [0, SHARED_SIZE as u64, protection, shared, memfd as u64, 0];
        let dontfork = nix::libc::MADV_DONTFORK as u64;
        let advice = [1, SHARED_SIZE as u64, dontfork, 0, 0, 0];
        let calls = vec![
            Call::syscall(Sysno::mmap, args),
            Call::syscall(Sysno::madvise, advice).referring(0, 1),
            Call::syscall(Sysno::close, [memfd as u64, 0, 0, 0, 0, 0]),
        ];
        let space = self.space.clone();
        let mapped = self.connection.submit_on_link(calls, move |replies| {
            let address = replies.first().ok_or(Error::Protocol("no reply"))?;
            let address = address.value().map_err(Error::call("mmap"))?;
            let mapping = Mapping::new(&space, address, SHARED_SIZE);
            let advised = replies.get(1).ok_or(Error::Protocol("no reply"))?;
            advised.value().map_err(Error::call("madvise"))?;
            Ok(mapping)
        });
        mapped.await
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
        self.inner().interregna.fetch_add(1, Ordering::Relaxed);
        self.rings().clear();
        self.forget_shared();
    }

    fn rings(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.inner().rings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A ring's memory in the process, as long as no other controller has held that.
struct There {
    mapping: Option<Mapping>,
    interregna: Arc<AtomicU64>,
    since: u64,
}

impl Drop for There {
    fn drop(&mut self) {
        if let Some(mapping) = self.mapping.take()
            && self.interregna.load(Ordering::Relaxed) != self.since
        {
            let _ = mapping.into_raw();
        }
    }
}

/// What makes a ring once the process is called often.
pub(super) fn when_busy(process: Weak<Inner>, polling: Polling) -> impl Fn() + Send + Sync {
    let runtime = tokio::runtime::Handle::try_current();
    move || {
        let Ok(runtime) = &runtime else { return };
        let Some(inner) = process.upgrade() else { return };
        // If it can't be had, the stream goes on.
        runtime.spawn(async move { Process { inner }.make_ring(polling).await });
    }
}

/// Sends a process the signal that interrupts a call of the ring at `address` in it.
fn interrupt(pidfd: &OwnedFd, address: u64) -> Result<()> {
    /// siginfo_t, as far as it is used, and as large.
    #[repr(C)]
    struct Info {
        signal: i32,
        errno: i32,
        code: i32,
        pad: i32,
        pid: i32,
        uid: u32,
        value: u64,
        rest: [u64; 12],
    }
    const { assert!(size_of::<Info>() == 128) };
    let info = Info {
        signal: INTERRUPT_SIGNAL as i32,
        errno: 0,
        code: nix::libc::SI_QUEUE,
        pad: 0,
        pid: 0,
        uid: 0,
        value: address,
        rest: [0; 12],
    };
    // SAFETY: the kernel reads the structure, which is as large as it takes it to be.
    let sent = unsafe {
        syscall!(Sysno::pidfd_send_signal, pidfd.as_raw_fd(), INTERRUPT_SIGNAL, &raw const info, 0)
    };
    sent.map(|_| ())
        .map_err(|errno| Error::local("pidfd_send_signal")(Errno::from_raw(errno.into_raw())))
}

fn eventfd() -> Result<OwnedFd> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let fd = EventFd::from_value_and_flags(0, flags).map_err(Error::local("eventfd"))?;
    Ok(fd.into())
}
