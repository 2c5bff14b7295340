//! Making a process persistent.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sched::CloneFlags;
use nix::sys::stat::Mode;
use syscalls::Sysno;

use super::attach::reserve_arena;
use super::reserved::Reserved;
use crate::abi::handshake::Token;
use crate::abi::wire::{Operation, Spares};
use crate::error::{Error, Result, is_forbidden};
use crate::link::to_the_end;
use crate::process::{Child, ChildBuilder, Extent, Legacy, Process};
use crate::proto::Call;

/// What becomes of memory that a process shares when it becomes persistent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SharedMemory {
    /// A process that shares its memory does not become persistent.
    #[default]
    Refuse,
    /// It does, with all that this means: it keeps the whole of that memory alive, its parent's
    /// buffers and mappings among it; the kernel's out-of-memory killer, and before Linux 5.16 a
    /// core dump, ends all processes that share it together; and whoever else is left in it can
    /// change what it holds. It survives its controller's death like any other.
    Keep,
}

impl Process {
    /// Makes the process persistent at a place that [`Home::reserve`](super::Home::reserve) made:
    /// from here on it outlives this controller and waits there for the next one.
    ///
    /// Where a cgroup of its own was asked for ([`Reserved::in_own_cgroup`]), it is moved there.
    ///
    /// In the process: [`unshare`](Process::unshare) of the table of descriptors, setsid(2), the
    /// parent-death signal off, and the listening socket. Its standard streams stay as they are;
    /// what is to be kept of a terminal or a pipe of this process's is for the caller to decide
    /// ([`ChildBuilder::spawn_persistent`] keeps nothing). After a table was unshared, handles
    /// belong to the parent's table, and `inherited_fd` makes handles to the copies.
    ///
    /// Until this returns, the process can still end with this controller; it never becomes one
    /// that nobody can reach.
    ///
    /// # Errors
    ///
    /// [`Error::SharesMemory`] without the word for it; [`Error::Cgroup`]; errors of the calls. The
    /// place is given up then.
    pub async fn make_persistent(&self, reserved: Reserved, memory: SharedMemory) -> Result<()> {
        if self.shares_memory() && memory == SharedMemory::Refuse {
            return Err(Error::SharesMemory);
        }
        if self.is_persistent() {
            return Err(Error::misuse(
                "making a process persistent that is persistent already",
                "it stays what it is: its place is Process::place",
            ));
        }
        let process = self.clone();
        to_the_end(async move { process.become_persistent(reserved).await }).await
    }

    /// Gives the process a table of descriptors that nobody shares.
    async fn own_table(&self) -> Result<()> {
        match self.unshare(CloneFlags::CLONE_FILES).await {
            // Neither way is allowed, and nobody is known to share it.
            Err(Error::Call { errno, .. }) if is_forbidden(errno) && !self.table().is_shared() => {
                Ok(())
            }
            done => done,
        }
    }

    async fn become_persistent(&self, reserved: Reserved) -> Result<()> {
        // SERVE names it.
        self.need_data().await?;
        self.own_table().await?;
        match self.setsid().await {
            // The leader of a group can't: it may be the leader of a session already.
            Err(Error::Call { errno: Errno::EPERM, .. }) => {
                let session = self.syscall(Sysno::getsid, [0; 6]).await?;
                if session != self.getpid().await? as u64 {
                    return Err(Error::Call { call: "setsid", errno: Errno::EPERM });
                }
            }
            other => drop(other?),
        }
        // The first attach needs no memory that the process may not have by then. It can go without.
        if let Ok(pid) = self.getpid().await {
            let _ = reserve_arena(&self.connection, pid).await;
        }
        let pid = self.pid();
        // Moving can take a while in the kernel.
        let moving = tokio::task::spawn_blocking(move || (reserved.enter_cgroup(pid), reserved));
        let (cgroups, reserved) = moving.await.map_err(|_| Error::Gone)?;
        let cgroups = cgroups?;
        // Written before anybody can connect.
        reserved.place().write_holder(pid, self.connection.stream_inode())?;
        let listen = self.send_server_fds(&[reserved.listen()?.as_fd()]).await?[0];
        // By it the process can be reached when the file is gone. Where there is no room for one more, it
        // does without.
        let file = self.send_server_fds(&[reserved.socket_file()]).await.ok();
        let file = file.and_then(|numbers| numbers.first().copied());
        let data = self.server_fds().data;
        let table = self.table();
        let serve = serve(data, listen, file, self.inner().token);
        let spares = self.connection.submit(vec![serve], move |replies| {
            let reply = replies.first().ok_or(Error::Protocol("no reply"))?;
            let spares = reply.value().map_err(Error::call("SERVE"))?;
            let spares: Vec<i32> = Spares(spares.cast_signed()).fds().collect();
            table.reserve(spares.iter().copied());
            Ok(spares)
        });
        let spares = spares.await?;
        {
            let mut fds = self.server_fds();
            fds.persistent = spares;
            fds.listen = listen;
            fds.file = file.unwrap_or(-1);
        }
        // It listens: whatever happens from here on, the way to it is not taken away.
        let place = reserved.keep();
        if let Some(cgroups) = cgroups {
            cgroups.keep();
        }
        // Only now that it can be reached does it stop depending on its parent.
        if let Some(remains) = self.remains() {
            remains.set_free();
        }
        self.set_pdeathsig(0).await?;
        self.set_free();
        // Other controllers do not know of these.
        self.table().close_spares();
        // SERVE has begun the first connection that counts.
        self.inner().controllers.store(1, Ordering::Relaxed);
        self.registry().begin();
        self.set_persistent();
        self.set_place(place);
        Ok(())
    }
}

/// The operation with which a server begins to listen, held by this controller. Descriptors are positive;
/// a negative `data` keeps the one that it has.
pub(super) fn serve(data: i32, listen: i32, file: Option<i32>, token: Token) -> Call {
    let [low, high] = token.0;
    let keep = u64::from(u32::MAX);
    let args = [
        keep | keep << 32,
        u64::from(data as u32) | (listen as u64) << 32,
        low,
        high,
        u64::from(std::process::id()),
        file.map_or(0, |file| file as u64 + 1),
    ];
    Call::operation(Operation::Serve, args)
}

impl ChildBuilder {
    /// Makes a child that is persistent from the start: it holds nothing of this process, its
    /// standard streams are /dev/null, and what it inherited from its parent besides is closed, except
    /// for what [`ChildBuilder::inherit`] names. That has its names before the process can be reached:
    /// there is no instant at which it is persistent and lacks any of them.
    ///
    /// # Errors
    ///
    /// Those of [`ChildBuilder::spawn`], [`Process::keep_fd_of`] and [`Process::make_persistent`];
    /// nothing is left then.
    pub async fn spawn_persistent(
        mut self,
        reserved: Reserved,
        memory: SharedMemory,
    ) -> Result<Child> {
        let legacy = std::mem::take(&mut self.legacy);
        // Whoever lists processes sees what it is.
        self.extent = Extent::All;
        let child = self.spawn().await?;
        child.own_table().await?;
        for call in child.table().sweep() {
            child.connection.call("close_range", call).await?;
        }
        let null = child.openat(None, "/dev/null", OFlag::O_RDWR, Mode::empty()).await?;
        for number in 0..=2 {
            child.dup2(&null, number).await?;
        }
        null.close().await?;
        if !legacy.is_empty() {
            child.registry().begin();
        }
        for Legacy { name, owner, fd } in legacy {
            child.keep_fd_of(&name, &owner, &fd).await?;
        }
        child.make_persistent(reserved, memory).await?;
        Ok(child)
    }
}
