//! What controllers under torture do until they are killed.

use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::io::BufRead;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use clap::ValueEnum;
use farcall::calls::chain::{Chain, Later};
use farcall::calls::{SocketAddress, Sysno};
use farcall::link::Polling;
use farcall::persist::Place;
use farcall::{Error, Fd, Process};
use nix::fcntl::OFlag;
use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::socket::{
    AddressFamily, Shutdown, SockFlag, SockType, getsockopt, shutdown, sockopt,
};
use nix::sys::stat::Mode;

use super::random::Random;
use super::recover::{Count, Recovered, check_status};
use super::words::{Word, say};

/// The name of the file that records are appended to, and that of how many there are.
pub const LOG: &str = "log";
pub const COUNT: &str = "count";
/// Bytes of a record: its number.
pub const RECORD: usize = 8;
/// With what a child exits that was told to.
pub const CHILD_STATUS: i32 = 7;

/// So many names are enough.
const MANY: usize = 60;
/// So many of them are large.
const MANY_LARGE: usize = 10;
/// Records that are appended together. No more calls are under way than the log remembers.
pub(super) const TOGETHER: u64 = 24;
/// Records that are appended by one chain.
const IN_ONE: u64 = 4;
/// After so many calls the number of records is kept: what the log forgets is behind it then, also if
/// a few controllers in a row die before they have read it.
pub(super) const UNCOUNTED: u64 = 56;
/// Records that one appends before it stops to hear anything, the threads that make calls then besides
/// the one that appends, and how long it goes on without hearing anything.
const BEFORE: u64 = 10;
const OTHERS: u64 = 4;
const DEAF: Duration = Duration::from_millis(20);
/// How long the process is kept from what is handed over to it before its link is cut.
pub(super) const PAUSE: Duration = Duration::from_micros(500);

/// One thing that a controller does. A new feature that must survive the death of its controller at
/// any instant gets its line here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Op {
    /// Appends a record
    Append,
    /// Appends many at once
    Pipeline,
    /// The same through a ring
    Ring,
    /// Opens a file with a name
    File,
    /// Opens a socket with a name
    Socket,
    /// Opens a pipe, each of whose ends has a name
    Pipe,
    /// Opens a file, and then gives it a name
    Late,
    /// Maps memory and gives it a name
    Map,
    /// Keeps bytes
    Bytes,
    /// Keeps others in their place
    Replace,
    /// Keeps so many that the registry has to grow
    Grow,
    /// Starts a child and gives it a name
    Child,
    /// Starts a child that has its name from the start
    Named,
    /// Reaps a child, and gives up its name
    Reap,
    /// Gives up something else
    Release,
    /// Opens something and forgets it
    Unnamed,
    /// Attaches again in the midst of calls
    Reconnect,
    /// The same after the link was lost
    Cut,
    /// Ends the connection in good order and attaches again
    Detach,
    /// Loses the link in the midst of calls, and another controller works before it attaches again
    Guest,
    /// Works with few descriptors free, or none
    Starve,
    /// Makes calls that block, each with a deadline or somebody who interrupts it
    Deadlines,
    /// The process goes on as another image
    Upgrade,
    /// Hands over calls and does not listen, so that it does not hear that the process is lost
    Deaf,
    /// Blocks the process in a call
    Block,
}

/// Those that are done at any time.
pub(super) const RANDOM: &[Op] = &[
    Op::Append,
    Op::Append,
    Op::Pipeline,
    Op::Ring,
    Op::File,
    Op::Socket,
    Op::Pipe,
    Op::Late,
    Op::Map,
    Op::Bytes,
    Op::Replace,
    Op::Replace,
    Op::Grow,
    Op::Child,
    Op::Named,
    Op::Reap,
    Op::Release,
    Op::Release,
    Op::Release,
    Op::Unnamed,
    Op::Starve,
    Op::Deadlines,
    Op::Reconnect,
    Op::Cut,
    Op::Detach,
    Op::Guest,
    Op::Upgrade,
];

/// Those of them that end the link, which may be another controller's by then.
pub const LINK: &[Op] = &[Op::Reconnect, Op::Cut, Op::Detach, Op::Guest];

/// What kind of thing has that name.
pub fn kind(name: &str) -> &str {
    name.split('-').next().unwrap_or_default()
}

/// To what a socket is bound that has that name.
pub fn socket_address(place: &Place, name: &str) -> Result<SocketAddress, Error> {
    SocketAddress::unix_abstract(format!("{}-{name}", place.socket().display()))
}

/// The bytes of that version of a name.
pub fn bytes(name: &str, version: u64) -> Vec<u8> {
    let len = if kind(name) == "big" { 64 * 1024 } else { 8 + (version * 37 % 3000) as usize };
    let mut bytes = vec![version as u8; len];
    bytes[..8].copy_from_slice(&version.to_le_bytes());
    bytes
}

pub(super) type Step<'w> = Pin<Box<dyn Future<Output = Result<(), Error>> + 'w>>;

/// A controller at work.
pub struct Workload {
    pub(super) process: Process,
    pub(super) place: Place,
    pub(super) directory: PathBuf,
    pub(super) random: Random,
    /// Of which controller the names are that are new, and how many there are.
    pub(super) id: u64,
    pub(super) made: u64,
    /// The number of the next record.
    pub(super) next: u64,
    pub(super) file: Fd,
    /// What has names, and their versions.
    pub(super) names: BTreeMap<String, u64>,
    /// Calls since the number of records was kept.
    pub(super) uncounted: u64,
    /// Another controller may take the process over: what ends the link is left out.
    pub(super) gentle: bool,
    /// What the process goes on as, if not as the image that is built in.
    pub(super) image: Option<Vec<u8>>,
}

impl Workload {
    /// Goes on where the controllers before have stopped.
    pub async fn new(
        process: &Process,
        place: &Place,
        recovered: Recovered,
        (id, gentle): (u64, bool),
        seed: u64,
        image: Option<Vec<u8>>,
    ) -> Result<Self, Error> {
        let (process, place) = (process.clone(), place.clone());
        let Recovered { next, log, names } = recovered;
        let directory = place.socket().parent().unwrap_or(Path::new("/")).to_owned();
        let file = match log {
            Some(file) => file,
            None => {
                say(&Word::Keeping(LOG.into(), 0));
                let flags = OFlag::O_CREAT | OFlag::O_WRONLY | OFlag::O_APPEND;
                let path = directory.join("appended");
                let file = open(&process, Some(LOG), &path, flags).await?;
                say(&Word::Kept(LOG.into(), 0));
                file
            }
        };
        let random = Random::new(seed, id);
        let names = names.into_iter().collect();
        let (made, uncounted) = (0, UNCOUNTED);
        Ok(Self {
            process,
            place,
            directory,
            random,
            id,
            made,
            next,
            file,
            names,
            uncounted,
            gentle,
            image,
        })
    }

    /// Does this first, and then whatever comes.
    pub async fn run(&mut self, first: &[Op]) -> Result<(), Error> {
        for op in first {
            self.prepare(*op).await?;
            self.execute(*op).await?;
        }
        say(&Word::Begun);
        loop {
            let mut op = *self.random.pick(RANDOM).unwrap_or(&Op::Append);
            if self.gentle && LINK.contains(&op) {
                op = Op::Append;
            }
            if self.names.len() > MANY && self.random.one_in(2) {
                op = Op::Release;
            }
            self.execute(op).await?;
        }
    }

    /// Sees to it that there is what an operation is about.
    async fn prepare(&mut self, op: Op) -> Result<(), Error> {
        match op {
            Op::Release | Op::Replace if self.one_of(&["bytes"]).is_none() => {
                self.execute(Op::Bytes).await
            }
            Op::Reap if self.one_of(&["child"]).is_none() => self.execute(Op::Child).await,
            _ => Ok(()),
        }
    }

    pub(super) async fn execute(&mut self, op: Op) -> Result<(), Error> {
        let calls = match op {
            Op::Append | Op::Unnamed | Op::Block => 2,
            Op::Pipeline | Op::Ring | Op::Reconnect | Op::Cut => TOGETHER + 16,
            Op::Deaf | Op::Guest => UNCOUNTED,
            _ => 24,
        };
        if self.uncounted + calls > UNCOUNTED {
            let next = self.next;
            let count = Count { next, ..Count::default() };
            say(&Word::Keeping(COUNT.into(), 0));
            self.process.keep_bytes(COUNT, &count.to_bytes()).await?;
            say(&Word::Kept(COUNT.into(), 0));
            self.uncounted = 0;
        }
        self.uncounted += calls;
        say(&Word::Doing(format!("{op:?}")));
        match op {
            Op::Append => self.append(1, Link::Same).await,
            Op::Pipeline => self.append(TOGETHER, Link::Same).await,
            Op::Ring => {
                self.process.enter_ring(Polling::Adaptive).await?;
                self.append_in_one().await?;
                self.append(TOGETHER, Link::Same).await
            }
            Op::Reconnect => self.append(TOGETHER, Link::Another).await,
            Op::Cut => self.append(TOGETHER, Link::Cut).await,
            Op::Detach => {
                self.process.prepare_for_reconnect().await?;
                self.process.reconnect().await
            }
            // Its own kind of controller does the same in there.
            Op::Guest => Box::pin(self.guest()).await,
            Op::Starve => self.starve().await,
            Op::Deadlines => self.deadlines().await,
            Op::Deaf => self.deaf().await,
            Op::Block => self.process.nanosleep(Duration::from_secs(3600)).await,
            Op::Unnamed => {
                let path = self.directory.join("unnamed");
                let fd = open(&self.process, None, &path, OFlag::O_CREAT | OFlag::O_RDWR).await?;
                let _ = fd.into_raw();
                Ok(())
            }
            Op::Upgrade => match &self.image {
                Some(image) => self.process.upgrade_to(image).await,
                None => self.process.upgrade().await,
            },
            Op::File | Op::Socket | Op::Pipe | Op::Late | Op::Map | Op::Child | Op::Named => {
                self.keep(op).await
            }
            Op::Bytes => {
                let name = self.new_name("bytes");
                self.keep_bytes(name, 1).await
            }
            Op::Grow => {
                let large = |name: &&String| kind(name) == "big";
                if self.names.keys().filter(large).count() >= MANY_LARGE {
                    return self.give_up(&["big"]).await;
                }
                let name = self.new_name("big");
                self.keep_bytes(name, 1).await
            }
            Op::Replace => match self.one_of(&["bytes"]) {
                Some(name) => {
                    let version = self.names.get(&name).copied().unwrap_or_default();
                    self.keep_bytes(name, version + 1).await
                }
                None => Ok(()),
            },
            Op::Release => {
                self.give_up(&["bytes", "big", "file", "sock", "late", "pipe", "map"]).await
            }
            Op::Reap => self.reap().await,
        }
    }

    pub(super) fn new_name(&mut self, kind: &str) -> String {
        self.made += 1;
        format!("{kind}-{}-{}", self.id, self.made)
    }

    pub(super) fn one_of(&mut self, kinds: &[&str]) -> Option<String> {
        let names: Vec<&String> =
            self.names.keys().filter(|name| kinds.contains(&kind(name))).collect();
        self.random.pick(&names).map(|name| (*name).clone())
    }

    pub(super) fn keeping(&self, names: &[&str], version: u64) {
        for name in names {
            say(&Word::Keeping((*name).into(), version));
        }
    }

    fn kept(&mut self, names: &[&str], version: u64) {
        for name in names {
            say(&Word::Kept((*name).into(), version));
            self.names.insert((*name).into(), version);
        }
    }

    async fn keep_bytes(&mut self, name: String, version: u64) -> Result<(), Error> {
        self.keeping(&[&name], version);
        self.process.keep_bytes(&name, &bytes(&name, version)).await?;
        self.kept(&[&name], version);
        Ok(())
    }

    async fn keep(&mut self, op: Op) -> Result<(), Error> {
        let kind = match op {
            Op::File => "file",
            Op::Socket => "sock",
            Op::Pipe => "pipe",
            Op::Late => "late",
            Op::Map => "map",
            _ => "child",
        };
        let name = self.new_name(kind);
        let process = self.process.clone();
        let flags = OFlag::O_CREAT | OFlag::O_RDWR;
        if op == Op::Pipe {
            let ends = [format!("{name}-r"), format!("{name}-w")];
            let names = [ends[0].as_str(), ends[1].as_str()];
            self.keeping(&names, 0);
            let mut chain = process.chain();
            chain.keep(names[0]).keep(names[1]);
            chain.pipe2(OFlag::empty());
            chain.run().await?;
            self.kept(&names, 0);
            return Ok(());
        }
        self.keeping(&[&name], 0);
        match op {
            Op::File => {
                let path = self.directory.join(format!("kept-{name}"));
                open(&process, Some(&name), &path, flags).await.map(drop)?;
            }
            Op::Socket => {
                let mut chain = process.chain();
                chain.keep(&name);
                let (unix, datagram) = (AddressFamily::Unix, SockType::Datagram);
                let socket = chain.socket(unix, datagram, SockFlag::empty());
                let address = socket_address(&self.place, &name)?;
                chain.bind(socket, address);
                chain.run().await?;
            }
            Op::Late => {
                let path = self.directory.join(&name);
                let fd = open(&process, None, &path, flags).await?;
                process.keep_fd(&name, &fd).await?;
            }
            Op::Map => {
                let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
                let memory = process.mmap(4096, protection, MapFlags::MAP_PRIVATE, None).await?;
                process.write_memory(memory.address(), name.as_bytes()).await?;
                process.keep_mapping(&name, memory).await?;
            }
            _ => {
                let child = if op == Op::Named {
                    process.child().named(&name).spawn().await?
                } else {
                    let child = process.child().spawn().await?;
                    process.keep_child(&name, &child).await?;
                    child
                };
                if self.random.one_in(2) {
                    child.exit(CHILD_STATUS).await?;
                }
            }
        }
        self.kept(&[&name], 0);
        Ok(())
    }

    async fn give_up(&mut self, kinds: &[&str]) -> Result<(), Error> {
        let Some(name) = self.one_of(kinds) else { return Ok(()) };
        say(&Word::Giving(name.clone()));
        self.names.remove(&name);
        self.process.release(&name).await?;
        say(&Word::Given(name));
        Ok(())
    }

    async fn reap(&mut self) -> Result<(), Error> {
        let Some(name) = self.one_of(&["child"]) else { return Ok(()) };
        let pid = self.process.name(&name).await?;
        let farcall::persist::Resource::Child(pid) = pid.what else { return Ok(()) };
        say(&Word::Reaping(name.clone()));
        check_status(&name, self.process.wait_for_child(pid).await?);
        self.names.remove(&name);
        self.process.release(&name).await?;
        say(&Word::Given(name));
        Ok(())
    }

    /// Appends records, in the midst of which the link may be exchanged.
    pub(super) async fn append(&mut self, count: u64, link: Link) -> Result<(), Error> {
        let first = self.next;
        self.next += count;
        say(&Word::Appending(first + count - 1));
        let process = self.process.clone();
        let mut steps: Vec<Option<Step<'_>>> = Vec::new();
        // The link ends before the process comes to what stands behind this, and has it already.
        let pause = if link == Link::Cut { PAUSE } else { Duration::ZERO };
        steps.push(Some(Box::pin(process.nanosleep(pause))));
        for number in first..first + count {
            steps.push(Some(Box::pin(append(&process, &self.file, number))));
        }
        // In order, and without waiting for any.
        let mut results = poll_fn(|context| Poll::Ready(poll_all(&mut steps, context))).await;
        let again = match link {
            Link::Same => Ok(()),
            Link::Another => process.reconnect().await,
            Link::Cut => {
                cut(&process);
                process.reconnect().await
            }
        };
        poll_fn(|context| {
            results.extend(poll_all(&mut steps, context));
            if steps.iter().all(Option::is_none) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        appended(first - 1, results)?;
        again
    }

    /// Appends records by calls that are handed over together.
    async fn append_in_one(&mut self) -> Result<(), Error> {
        let first = self.next;
        self.next += IN_ONE;
        say(&Word::Appending(self.next - 1));
        let mut chain = self.process.chain();
        for number in first..self.next {
            write_record(&mut chain, &self.file, number);
        }
        chain.run().await?;
        say(&Word::Appended(self.next - 1));
        Ok(())
    }

    /// Waits with a ring, without hearing anything, until the supervisor says that another controller
    /// has taken the process over; and hands calls over then, in a ring that is none any more, before
    /// anybody here can know.
    async fn deaf(&mut self) -> Result<(), Error> {
        self.process.enter_ring(Polling::Adaptive).await?;
        for _ in 0..BEFORE {
            self.append(1, Link::Same).await?;
        }
        let (process, file, number) = (self.process.clone(), self.file.number(), self.next);
        // Not in the ring's memory, which the next controller gives back.
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let memory = process.mmap(RECORD, protection, MapFlags::MAP_PRIVATE, None).await?;
        process.write_memory(memory.address(), number.to_le_bytes()).await?;
        let args = [file as u64, memory.address(), RECORD as u64, number, 0, 0];
        // On the one thread of the runtime.
        say(&Word::Ready);
        wait_for_a_line();
        say(&Word::Appending(number));
        self.next += 1;
        let record = tokio::task::spawn_blocking(move || {
            let written = process.syscall_blocking(Sysno::write, args);
            drop(memory);
            written
        });
        for _ in 0..OTHERS {
            let process = self.process.clone();
            tokio::task::spawn_blocking(move || process.syscall_blocking(Sysno::getpid, [0; 6]));
        }
        // Long enough for all of them to hand over what they have.
        std::thread::sleep(DEAF);
        record.await.map_err(|_| Error::Gone)??;
        say(&Word::Appended(number));
        Ok(())
    }
}

/// The supervisor says when to go on. Nothing else happens here until then.
pub fn wait_for_a_line() {
    let _ = std::io::stdin().lock().read_line(&mut String::new());
}

/// What becomes of the link in the midst of calls.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Link {
    Same,
    Another,
    Cut,
}

/// Tells what was appended: the record `first` was before, and those behind it come now.
fn appended(first: u64, mut results: Vec<(usize, Result<(), Error>)>) -> Result<(), Error> {
    results.sort_by_key(|(place, _)| *place);
    let mut all = Ok(());
    let mut last = None;
    for (place, result) in results {
        match result {
            Ok(()) if all.is_ok() => last = Some(first + place as u64),
            Ok(()) => {
                let number = first + place as u64;
                say(&Word::Wrong(format!("record {number} was appended after one that was not")));
            }
            Err(error) => all = all.and(Err(error)),
        }
    }
    if let Some(last) = last {
        say(&Word::Appended(last));
    }
    all
}

/// Polls all that are not complete, in order. Returns the results that are new, with their places.
pub(super) fn poll_all(
    steps: &mut [Option<Step<'_>>],
    context: &mut Context<'_>,
) -> Vec<(usize, Result<(), Error>)> {
    let mut results = Vec::new();
    for (place, step) in steps.iter_mut().enumerate() {
        if let Some(running) = step
            && let Poll::Ready(result) = running.as_mut().poll(context)
        {
            *step = None;
            results.push((place, result));
        }
    }
    results
}

/// Appends a record. Its number is also an argument of the call, one that write(2) does not have: so
/// it stands in the process's log.
pub(super) async fn append(process: &Process, file: &Fd, number: u64) -> Result<(), Error> {
    let mut chain = process.chain();
    let written = write_record(&mut chain, file, number);
    let written = chain.run().await?.value(written)?;
    if written == RECORD as u64 { Ok(()) } else { Err(Error::Protocol("a record was torn")) }
}

fn write_record(chain: &mut Chain<'_>, file: &Fd, number: u64) -> Later<u64> {
    let bytes = chain.input(number.to_le_bytes());
    let (file, len, zero) = (file.number().into(), (RECORD as u64).into(), 0.into());
    chain.syscall(Sysno::write, [file, bytes, len, number.into(), zero, zero])
}

pub(super) async fn open(
    process: &Process,
    name: Option<&str>,
    path: &Path,
    flags: OFlag,
) -> Result<Fd, Error> {
    let mut chain = process.chain();
    if let Some(name) = name {
        chain.keep(name);
    }
    let file = chain.openat(None, path, flags, Mode::S_IRUSR | Mode::S_IWUSR);
    chain.run().await?.fd(file)
}

/// Ends the connection, by duplicates of the server's sockets. Where these can't be had it goes on.
pub(super) fn cut(process: &Process) {
    for number in process.server_descriptors() {
        let pidfd = process.pidfd().as_raw_fd();
        // SAFETY: the call has no pointers.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd, number, 0) } as i32;
        if fd < 0 {
            continue;
        }
        // SAFETY: the kernel just made this descriptor for us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        if getsockopt(&fd, sockopt::AcceptConn) == Ok(false) {
            let _ = shutdown(fd.as_raw_fd(), Shutdown::Both);
        }
    }
}
