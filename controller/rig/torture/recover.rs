//! What a controller does first that knows nothing but the socket: it learns what there is from the
//! process alone, checks it, and gives back what nobody has a name for.

use std::collections::BTreeSet;
use std::time::Duration;

use farcall::abi::wire::{Operation, Word as Bits};
use farcall::calls::{Sysno, WaitStatus};
use farcall::persist::{Named, Place, Resource, Sameness, Unclaimed, flight};
use farcall::{Error, Fd, Process};
use nix::errno::Errno;
use nix::libc;

use super::words::{State, Word, say};
use super::workload::{self, CHILD_STATUS, COUNT, LOG, RECORD};

/// How long a server may be busy before it tells its log.
const TIMEOUT: Duration = Duration::from_secs(30);

/// What is known then.
pub struct Recovered {
    /// The number of the next record.
    pub next: u64,
    /// The file that records are appended to, if it has been opened.
    pub log: Option<Fd>,
    /// What has names, each with its version.
    pub names: Vec<(String, u64)>,
}

/// What is kept under [`COUNT`]: the number of the next record, and children that may have no name.
#[derive(Default)]
pub struct Count {
    pub next: u64,
    pub children: BTreeSet<i32>,
}

impl Count {
    pub fn to_bytes(&self) -> Vec<u8> {
        let children = self.children.iter().flat_map(|pid| i64::from(*pid).to_le_bytes());
        self.next.to_le_bytes().into_iter().chain(children).collect()
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        let mut numbers = bytes.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes));
        let next = numbers.next().unwrap_or_default();
        Self { next, children: numbers.map(|pid| pid as i32).collect() }
    }
}

/// Learns everything, and tells it.
///
/// The log is read first, and what it says is kept before more calls are made, which take its place:
/// a controller that dies in here leaves the next one what it needs.
pub async fn recover(process: &Process, place: &Place) -> Result<Recovered, Error> {
    let log = flight(place, TIMEOUT).await?.log;
    say(&Word::Calls(log.head.calls));
    let mut count = match named(process, COUNT).await? {
        Some(Named { what: Resource::Bytes(bytes), .. }) => Count::from_bytes(&bytes),
        _ => Count { next: 1, ..Count::default() },
    };
    let file = match named(process, LOG).await? {
        Some(Named { what: Resource::Fd(fd), .. }) => Some(fd),
        Some(other) => {
            say(&Word::Wrong(format!("the file of records is {other:?}")));
            None
        }
        None => None,
    };
    let mut made_with_names = BTreeSet::new();
    let mut keeps = false;
    for (_, record) in log.calls() {
        let [fd, _, len, number, ..] = record.request.args;
        let is = |call: Sysno| record.request.word == call as u64;
        if let Some(file) = &file
            && is(Sysno::write)
            && (fd, len, record.result) == (file.number() as u64, RECORD as u64, RECORD as i64)
        {
            count.next = count.next.max(number + 1);
        }
        if is(Sysno::clone) && record.result > 0 {
            count.children.insert(record.result as i32);
            if keeps {
                made_with_names.insert(record.result as i32);
            }
        }
        let keep = Bits::OP | Operation::Keep as u64;
        keeps = record.request.word & (Bits::OP | Bits::NUMBER) == keep && record.result == 0;
    }
    say(&Word::Keeping(COUNT.into(), 0));
    process.keep_bytes(COUNT, &count.to_bytes()).await?;
    say(&Word::Kept(COUNT.into(), 0));
    let named = process.names().await?;
    for named in &named {
        if let Resource::Child(pid) = named.what {
            count.children.remove(&pid);
        }
    }
    for pid in count.children {
        if reap(process, pid).await? && made_with_names.contains(&pid) {
            say(&Word::Wrong(format!("child {pid} was made with a name, and has none")));
        }
    }
    let mut names = Vec::new();
    for named in named {
        names.extend(check(process, place, named).await?);
    }
    for unclaimed in process.unclaimed().await? {
        if is_orphan(process, &unclaimed).await? {
            let what = unclaimed.what.unwrap_or_default();
            say(&Word::Orphan(format!("{} {what}", unclaimed.number)));
        }
    }
    process.close_unclaimed().await?;
    let left = process.unclaimed().await?;
    if !left.is_empty() {
        say(&Word::Wrong(format!("unclaimed descriptors were not closed: {left:?}")));
    }
    say(&Word::Recovered(count.next));
    Ok(Recovered { next: count.next, log: file, names })
}

async fn named(process: &Process, name: &str) -> Result<Option<Named>, Error> {
    match process.name(name).await {
        Ok(named) => Ok(Some(named)),
        Err(Error::Name { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Ends and reaps a child that an earlier controller made and did not come to name. That controller
/// may live, and its stream with it. False: it was reaped before.
async fn reap(process: &Process, pid: i32) -> Result<bool, Error> {
    let gone = |error: &Error| matches!(error.errno(), Some(Errno::ECHILD | Errno::ESRCH));
    let flags = (libc::WEXITED | libc::WNOHANG | libc::WNOWAIT) as u64;
    let is_child = [u64::from(libc::P_PID), pid as u64, 0, flags, 0, 0];
    let kill = [pid as u64, libc::SIGKILL as u64, 0, 0, 0, 0];
    let reaped = async {
        // The pid is the child's as long as that has not been reaped.
        process.syscall(Sysno::waitid, is_child).await?;
        process.syscall(Sysno::kill, kill).await?;
        process.wait_for_child(pid).await
    };
    match reaped.await {
        // It was reaped before that controller died.
        Err(error) if gone(&error) => Ok(false),
        Err(error) => Err(error),
        Ok(_) => Ok(true),
    }
}

/// Children leave with one status if they were told to, and with another at the end of their stream.
pub fn check_status(child: &str, status: WaitStatus) {
    if ![WaitStatus::Exited(0), WaitStatus::Exited(CHILD_STATUS)].contains(&status) {
        say(&Word::Wrong(format!("child {child}: {status}")));
    }
}

/// Tells what there is under a name. Returns the name, with its version, if it is what it has to be.
async fn check(
    process: &Process,
    place: &Place,
    named: Named,
) -> Result<Option<(String, u64)>, Error> {
    let Named { name, what, state, .. } = named;
    if let Sameness::Changed(what) = state {
        if workload::kind(&name) != "child" {
            say(&Word::Wrong(format!("{name} has changed: {what}")));
        }
        say(&Word::Found(name.clone(), State::Changed, 0));
        process.forget(&name).await?;
        return Ok(None);
    }
    let (kind, mut wrong) = (workload::kind(&name), None);
    let value = match what {
        Resource::Fd(fd) if ["log", "file", "late", "pipe", "sock"].contains(&kind) => {
            if kind == "sock" {
                let address = process.getsockname(&fd).await?;
                let address = address.abstract_name();
                let expected = workload::socket_address(place, &name)?;
                // One that was not bound before its controller died has none.
                if let Some(address) = address
                    && Some(address) != expected.abstract_name()
                {
                    let address = address.escape_ascii();
                    wrong = Some(format!("a socket that is bound to @{address}"));
                }
            }
            fd.number() as u64
        }
        Resource::Child(pid) if kind == "child" => pid as u64,
        Resource::Mapping(mapping) if kind == "map" => {
            let bytes = process.read_memory(mapping.address(), name.len()).await?;
            if bytes != name.as_bytes() {
                wrong = Some(format!("memory with {:?} in it", String::from_utf8_lossy(&bytes)));
            }
            mapping.address()
        }
        Resource::Bytes(_) if kind == COUNT => 0,
        Resource::Bytes(bytes) if kind == "bytes" || kind == "big" => {
            let version = bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            if bytes != workload::bytes(&name, version) {
                wrong = Some(format!("{} bytes that are not its version {version}", bytes.len()));
            }
            version
        }
        other => {
            wrong = Some(format!("{other:?}"));
            0
        }
    };
    if let Some(wrong) = wrong {
        say(&Word::Wrong(format!("{name} is {wrong}")));
    }
    say(&Word::Found(name.clone(), State::Same, value));
    Ok(Some((name, value)))
}

/// Whether a descriptor that has no name was opened with one: the workload opens pipes, datagram
/// sockets and files of a certain name in no other way.
async fn is_orphan(process: &Process, unclaimed: &Unclaimed) -> Result<bool, Error> {
    let Some(what) = &unclaimed.what else { return Ok(false) };
    if what.contains("/kept-") || what.starts_with("pipe:") {
        return Ok(true);
    }
    if !what.starts_with("socket:") {
        return Ok(false);
    }
    let mut chain = process.chain();
    let (kind, size) = (chain.output(4), chain.input(4u32.to_le_bytes()));
    let args = [
        unclaimed.number.into(),
        libc::SOL_SOCKET.into(),
        libc::SO_TYPE.into(),
        kind,
        size,
        0.into(),
    ];
    chain.syscall(Sysno::getsockopt, args);
    let kind = chain.load(kind, 4);
    Ok(chain.run().await?.value(kind)? == libc::SOCK_DGRAM as u64)
}
