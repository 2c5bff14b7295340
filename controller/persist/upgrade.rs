//! The live upgrade: a process goes on as another image, and keeps all that it has.
//!
//! The new image is put into the process's memory and entered there by the old one. Until then the old
//! one serves, whatever becomes of this controller; from then on the new one does.

use nix::errno::Errno;
use nix::libc;
use nix::sched::CloneFlags;
use syscalls::Sysno;

use super::attach::{IMAGE_PLACE, find_image, image_places};
use crate::abi::entry::EntryTable;
use crate::abi::wire::{HelloResult, Operation, STREAM_VERSION};
use crate::error::{Error, Result};
use crate::fault;
use crate::image::{IMAGE, Loaded, table_of};
use crate::link::to_the_end;
use crate::process::Process;
use crate::proto::batch::{Arg, Batch, Part, PartSteps, Places};
use crate::proto::hello;
use crate::proto::{Call, Reply};

impl Process {
    /// The process goes on as the image that this build of farcall carries: see
    /// [`Process::upgrade_to`].
    ///
    /// # Errors
    ///
    /// Those of [`Process::upgrade_to`].
    pub async fn upgrade(&self) -> Result<()> {
        self.upgrade_to(IMAGE).await
    }

    /// The process goes on as `image`, the bytes of a server image: its pid, descriptors, memory,
    /// children and names, its connection and its log stay as they are. Nothing is executed anew:
    /// the server that runs hands over to the image in its memory.
    ///
    /// Children that are made from here on begin in the new image. Those that share the process's
    /// memory go on in the old one, which stays in memory then.
    ///
    /// Calls that are made meanwhile go out before or after it, in order. No child is made meanwhile.
    ///
    /// # Errors
    ///
    /// [`Error::ForeignImage`] and [`Error::Upgrade`] if the image can't be used, or not by this
    /// process, and errors of the calls that prepare it: the process goes on as the image that it runs.
    pub async fn upgrade_to(&self, image: &[u8]) -> Result<()> {
        let table = table_of(image)?;
        if image.len() > IMAGE_PLACE {
            return refuse(format!("the image is larger than {IMAGE_PLACE} bytes"));
        }
        let (process, image) = (self.in_this_tenure(), image.to_vec());
        to_the_end(async move { process.go_on_as(image, table).await }).await
    }

    /// The image that the process runs, byte for byte.
    ///
    /// # Errors
    ///
    /// [`Error::Fault`] if it is not readable.
    pub async fn read_image(&self) -> Result<Vec<u8>> {
        let process = self.in_this_tenure();
        let image = process.image();
        let (address, len) = (image.base(), image.entries().size as usize);
        let out = Call::copy_out(address, len);
        process
            .connection
            .submit(vec![out], move |mut replies| {
                let reply = replies.pop().filter(|reply| reply.data.len() == len);
                Ok(reply.ok_or(Error::Fault { address, len })?.data)
            })
            .await
    }

    async fn go_on_as(&self, image: Vec<u8>, table: EntryTable) -> Result<()> {
        // No child is on its way into an image, and nobody who waits for that keeps the calls waiting.
        let _settled = self.ends.settled().await;
        let (_, _quiet) = self.quiet_table().await;
        // What is found out holds on this link: before another one, others may upgrade it too.
        let epoch = self.connection.epoch();
        let old = find_image(&self.connection).await?;
        self.can_hand_over(&old, &table).await?;
        let memory = self.sharing(CloneFlags::CLONE_VM).await?;
        if memory == Sharing::Shared
            && self.sharing(CloneFlags::CLONE_SIGHAND).await? == Sharing::Shared
        {
            return refuse("it shares its signal handlers with another process");
        }
        // What others execute must stay.
        let place = match memory {
            Sharing::Alone => Some(self.place_for_image(&old).await?),
            Sharing::Shared | Sharing::Unknown => None,
        };
        let new = |base| Loaded::of_table(base, table);
        let (batch, steps) = batch(place, &image, &old);
        let buffer = self.buffer(batch.size()).await?;
        let Part { calls, steps: part } = batch.whole(Places { memory: buffer.address(), slot: 0 });
        self.lose_sight_of_image();
        fault::point("upgrade.prepared");
        let done = self.connection.submit_on_this_link(epoch, calls, move |replies| {
            let _buffer = buffer;
            Done::from_replies(&part.in_order(replies)?, &part, steps, image.len())
        });
        fault::point("upgrade.sent");
        let done = done.await?;
        fault::point("upgrade.done");
        match done {
            Done::Serves { at } => self.set_image(new(at)),
            Done::Refused { error, mapped } => {
                self.set_image(old);
                if let Some(base) = mapped {
                    let unmap = vec![munmap(base, table.size)];
                    // A link that ends now leaves it to the next upgrade.
                    let _ = self.connection.submit_on_this_link(epoch, unmap, |_| Ok(())).await;
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Whether the server knows how to, and the image takes all that it has to hand over.
    async fn can_hand_over(&self, old: &Loaded, new: &EntryTable) -> Result<()> {
        self.connection.needs_read_ahead("an upgrade")?;
        // In version 1 it only tells what is there.
        let hello = self.connection.call("HELLO", hello(STREAM_VERSION, 0, false)).await?;
        if HelloResult(hello.cast_signed()).features() & HelloResult::UPGRADE == 0 {
            return refuse("its server is older than upgrades");
        }
        let (has, takes) = (old.entries().handover, new.handover);
        if takes < has {
            return refuse(format!(
                "the image that it runs hands {has} bytes over, and this one, which is older, takes \
                 {takes}: it would forget something"
            ));
        }
        Ok(())
    }

    /// Whether the process shares something with another one: unshare(2) of what a process of one thread
    /// has for itself does nothing, and of these it can't give a process what it shares.
    async fn sharing(&self, what: CloneFlags) -> Result<Sharing> {
        // The bits of the flags, as they are.
        let args = [what.bits() as u32 as u64, 0, 0, 0, 0, 0];
        match self.connection.call("unshare", Call::syscall(Sysno::unshare, args)).await {
            Ok(_) => Ok(Sharing::Alone),
            Err(Error::Call { errno: Errno::EINVAL, .. }) => Ok(Sharing::Shared),
            // In containers it is often forbidden altogether.
            Err(Error::Call { .. }) => Ok(Sharing::Unknown),
            Err(error) => Err(error),
        }
    }

    /// The one of the two places in which the image does not lie that runs.
    async fn place_for_image(&self, old: &Loaded) -> Result<u64> {
        let pid = self.connection.call("getpid", Call::syscall(Sysno::getpid, [0; 6])).await?;
        let [one, other] = image_places(pid as i32);
        Ok(if old.base() == one { other } else { one })
    }
}

/// The indices of the batch's steps.
#[derive(Clone, Copy)]
struct Steps {
    mapped: usize,
    filled: usize,
    entered: usize,
    told: usize,
}

/// The batch: behind UPGRADE it is the new image that executes and answers. With `place` nobody else
/// executes the old one, and it is taken away.
fn batch(place: Option<u64>, image: &[u8], old: &Loaded) -> (Batch, Steps) {
    let mut batch = Batch::default();
    let bytes = batch.input(image);
    let len = Arg::from(image.len() as u64);
    let fixed = if place.is_some() { libc::MAP_FIXED } else { 0 };
    let flags = Arg::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed);
    let protection = Arg::from(libc::PROT_READ | libc::PROT_WRITE);
    let mmap = [place.unwrap_or(0).into(), len, protection, flags, (-1).into()];
    let mapped = batch.syscall(Sysno::mmap, mmap);
    let filled = batch.operation(Operation::Copy, [Arg::Result(mapped), bytes, len]);
    let entered = batch.operation(Operation::Upgrade, [Arg::Result(mapped)]);
    if place.is_some() {
        // What UPGRADE says is where the old image was.
        let size = Arg::from(u64::from(old.entries().size));
        batch.syscall(Sysno::munmap, [Arg::Result(entered), size]);
    }
    let told = batch.operation(Operation::Image, []);
    batch.unlink(told);
    (batch, Steps { mapped, filled, entered, told })
}

fn munmap(base: u64, size: u32) -> Call {
    Call::syscall(Sysno::munmap, [base, u64::from(size), 0, 0, 0, 0])
}

/// What has come of the batch.
enum Done {
    /// The new image serves.
    Serves { at: u64 },
    /// The old one serves.
    Refused { error: Error, mapped: Option<u64> },
}

impl Done {
    fn from_replies(
        replies: &[Reply],
        part: &PartSteps,
        steps: Steps,
        image_size: usize,
    ) -> Result<Self> {
        let value = |step| part.value(replies, step);
        let base = match value(steps.mapped) {
            Ok(base) => base,
            Err(error) => return Ok(Self::Refused { error, mapped: None }),
        };
        let refused = |error| Ok(Self::Refused { error, mapped: Some(base) });
        match value(steps.filled) {
            Ok(filled) if filled == image_size as u64 => {}
            Ok(_) => return refused(Error::Fault { address: base, len: image_size }),
            Err(error) => return refused(error),
        }
        match value(steps.entered) {
            Ok(_) => {}
            Err(Error::Call { errno: Errno::EACCES | Errno::EPERM, .. }) => {
                return refused(cannot(
                    "the system forbids it to execute memory that it has written (PR_SET_MDWE, or \
                     a security module)",
                ));
            }
            Err(Error::Call { errno: Errno::EINVAL, .. }) => {
                return refused(cannot("its server does not take the image"));
            }
            Err(error) => return refused(error),
        }
        if value(steps.told)? != base {
            return Err(Error::Protocol("another image serves than the one that was entered"));
        }
        Ok(Self::Serves { at: base })
    }
}

/// Whether a process shares something with another one.
#[derive(PartialEq, Eq)]
enum Sharing {
    Alone,
    Shared,
    Unknown,
}

fn cannot(reason: impl Into<String>) -> Error {
    Error::Upgrade { reason: reason.into() }
}

fn refuse<T>(reason: impl Into<String>) -> Result<T> {
    Err(cannot(reason))
}
