//! Descriptors: a table that one or more processes share, and handles to its entries.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use syscalls::Sysno;

use super::{Spare, Tag};
use crate::error::{Error, Result};
use crate::link::{Connection, Receipt, WeakConnection};
use crate::proto::Call;

/// A table of descriptors, as `CLONE_FILES` shares it: which of its entries have handles, which
/// belong to servers, and which processes can be asked to act on it.
///
/// When another controller has held the process whose table it is, that process goes on with a new one
/// of these, and what was in this one is not known any more: see `FdTable::supersede`.
pub struct FdTable {
    inner: Mutex<Inner>,
    /// 1 once it has been superseded: handles from before are stale.
    tenure: AtomicU64,
    /// Held while descriptors are in the table that nothing here knows yet: while a child is made.
    pub(crate) quiet: Arc<tokio::sync::Mutex<()>>,
    /// See there.
    pub(super) spares: Mutex<Vec<Spare>>,
}

#[derive(Default)]
struct Inner {
    /// How many handles name a number.
    handles: BTreeMap<i32, usize>,
    /// The descriptors that servers run on.
    servers: BTreeSet<i32>,
    /// How many calls are under way that close a number. As long as one is, nothing else may close
    /// it: the number would be used anew, and the call would close what has it then.
    closing: BTreeMap<i32, usize>,
    /// Those that have a name in the process's registry, with the entry's tag: nothing closes them but
    /// giving that up.
    named: BTreeMap<i32, Tag>,
    members: Vec<WeakConnection>,
    /// In which table handles from before it was superseded go on, by their numbers.
    moved: BTreeMap<i32, Arc<FdTable>>,
    /// In it are descriptors that others have opened, and that nothing here closes unasked.
    has_others: bool,
}

/// An open descriptor in a table. Dropping it closes the descriptor there, in the background;
/// [`Fd::close`] does so and reports the error. One that has a name in the process's registry stays
/// open: giving up the name closes it.
///
/// While the process is detached the closing waits, like every call; if the process is dead there
/// is nothing left to close.
///
/// Once another controller has held the process, a handle from before is *stale*: its number may be
/// something else by now. Calls that it is given to say [`Error::Stale`], and dropping it closes nothing.
/// One whose descriptor has a name, and still is what had that name, goes on.
#[derive(Debug)]
pub struct Fd {
    number: i32,
    table: Arc<FdTable>,
    /// That of the table when it was made.
    tenure: u64,
    open: bool,
}

/// A number that a call is going to close, and that nothing else closes until then.
struct Closing {
    number: i32,
    table: Arc<FdTable>,
    tenure: u64,
}

impl Drop for Closing {
    fn drop(&mut self) {
        let mut inner = self.table.lock();
        if self.table.tenure() == self.tenure {
            inner.closing.release(self.number);
        }
    }
}

/// Counts by number.
trait Counts {
    fn take(&mut self, number: i32);
    /// Says whether that was the last.
    fn release(&mut self, number: i32) -> bool;
}

impl Counts for BTreeMap<i32, usize> {
    fn take(&mut self, number: i32) {
        *self.entry(number).or_default() += 1;
    }

    fn release(&mut self, number: i32) -> bool {
        let Some(count) = self.get_mut(&number) else { return false };
        *count -= 1;
        let last = *count == 0;
        if last {
            self.remove(&number);
        }
        last
    }
}

impl std::fmt::Debug for FdTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let inner = self.lock();
        f.debug_struct("FdTable")
            .field("handles", &inner.handles)
            .field("servers", &inner.servers)
            .finish_non_exhaustive()
    }
}

impl FdTable {
    /// A table that `member` can act on.
    pub(crate) fn new(member: &Connection) -> Arc<Self> {
        let table = Arc::new(Self {
            inner: Mutex::default(),
            tenure: AtomicU64::new(0),
            quiet: Arc::default(),
            spares: Mutex::default(),
        });
        table.join(member);
        table
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more process acts on the table, in its present tenure.
    pub(crate) fn join(&self, member: &Connection) {
        let member = member.of_this_tenure();
        let mut inner = self.lock();
        inner.members.retain(WeakConnection::is_alive);
        inner.members.push(member.downgrade());
    }

    /// A process does not use the table any more.
    pub(crate) fn leave(&self, member: &Connection) {
        self.lock().members.retain(|other| !other.is(member));
    }

    /// The connections of the processes that share the table.
    pub(crate) fn members(&self) -> Vec<Connection> {
        let members = self.lock().members.clone();
        members.iter().filter_map(WeakConnection::upgrade).collect()
    }

    /// Whether more than one process that is driven from here uses it.
    pub(crate) fn is_shared(&self) -> bool {
        self.members().len() > 1
    }

    /// A process that can act on the table now, or at least later: the persistent one, if there is one,
    /// whose table may be another controller's to act on while it has no link.
    fn member(&self) -> Option<Connection> {
        let members = self.members();
        let persistent = members.iter().find(|member| member.is_persistent());
        let best = persistent.or_else(|| members.iter().find(|member| member.is_connected()));
        best.or(members.first()).cloned()
    }

    /// Changes when it is superseded.
    pub(super) fn tenure(&self) -> u64 {
        self.tenure.load(Ordering::Acquire)
    }

    /// Those of its descriptors that have a handle and a name, with the tags of these.
    pub(crate) fn named_handles(&self) -> BTreeMap<i32, Tag> {
        let inner = self.lock();
        let named = inner.named.iter().filter(|(number, _)| inner.handles.contains_key(*number));
        named.map(|(number, tag)| (*number, *tag)).collect()
    }

    /// Another controller has held the process behind `leaver`, which goes on with the table that is
    /// returned: what was known of this one is not any more. `own` are the descriptors that its server
    /// runs on; `same` those whose handles go on, because they have the names that they had; `named` all
    /// that have names.
    ///
    /// Other processes that share this table keep it, if the other controller has left them in it.
    pub(crate) fn supersede(
        self: &Arc<Self>,
        leaver: &Connection,
        own: &BTreeSet<i32>,
        same: &BTreeSet<i32>,
        named: BTreeMap<i32, Tag>,
    ) -> Arc<Self> {
        let next = Self::new(leaver);
        // Nobody uses what was kept there for children.
        drop(std::mem::take(&mut *self.spares.lock().unwrap_or_else(PoisonError::into_inner)));
        let mut inner = self.lock();
        self.tenure.store(1, Ordering::Release);
        inner.members.retain(|other| !other.is(leaver));
        inner.closing.clear();
        inner.named.clear();
        inner.has_others = true;
        let handles = std::mem::take(&mut inner.handles);
        {
            let mut of_next = next.lock();
            of_next.handles = handles.into_iter().filter(|(n, _)| same.contains(n)).collect();
            of_next.named = named;
            of_next.has_others = true;
            // Those of other servers' that live, too.
            of_next.servers = inner.servers.clone();
            inner.moved = of_next.handles.keys().map(|number| (*number, next.clone())).collect();
        }
        inner.servers.retain(|number| !own.contains(number));
        drop(inner);
        next
    }

    /// Whether others have opened descriptors in it that nothing here knows of.
    pub(crate) fn has_others(&self) -> bool {
        self.lock().has_others
    }

    /// All that is open in it is known here.
    pub(crate) fn is_known(&self) {
        self.lock().has_others = false;
    }

    /// A handle to descriptor `number`, which is open in the table.
    ///
    /// # Errors
    ///
    /// [`Error::Misuse`] for a number that belongs to a server: a handle would close it.
    pub(crate) fn adopt(self: &Arc<Self>, number: i32) -> Result<Fd> {
        let inner = self.lock();
        if inner.servers.contains(&number) {
            return Err(Error::SERVERS_FD);
        }
        Ok(self.handle(inner, number))
    }

    /// A handle to a descriptor that a call has just made. If a server had kept that number in
    /// reserve, it has given it up.
    pub(crate) fn made(self: &Arc<Self>, number: i32) -> Fd {
        let mut inner = self.lock();
        inner.servers.remove(&number);
        self.handle(inner, number)
    }

    fn handle(self: &Arc<Self>, mut inner: MutexGuard<'_, Inner>, number: i32) -> Fd {
        inner.handles.take(number);
        let tenure = self.tenure();
        drop(inner);
        Fd { number, table: self.clone(), tenure, open: true }
    }

    /// A server runs on these descriptors from here on.
    pub(crate) fn reserve(&self, numbers: impl IntoIterator<Item = i32>) {
        self.lock().servers.extend(numbers.into_iter().filter(|number| *number >= 0));
    }

    /// No server runs on these any more.
    pub(crate) fn unreserve(&self, numbers: impl IntoIterator<Item = i32>) {
        let mut inner = self.lock();
        for number in numbers {
            inner.servers.remove(&number);
        }
    }

    /// The descriptors that servers run on.
    pub(crate) fn reserved(&self) -> BTreeSet<i32> {
        self.lock().servers.clone()
    }

    /// The calls that close every descriptor which neither a handle nor a server nor a name nor the
    /// standard streams account for, nor a call that is going to close it.
    pub(crate) fn sweep(&self) -> Vec<Call> {
        close_others(self.known())
    }

    /// The descriptors that something accounts for.
    pub(crate) fn known(&self) -> BTreeSet<i32> {
        let inner = self.lock();
        let mut known = inner.servers.clone();
        known.extend(inner.handles.keys());
        known.extend(inner.closing.keys());
        known.extend(inner.named.keys());
        known.extend(0..=2);
        known
    }

    /// These descriptors have names, in entries with these tags, and no others.
    pub(crate) fn set_named(&self, named: impl IntoIterator<Item = (i32, Tag)>) {
        self.lock().named = named.into_iter().collect();
    }

    /// The descriptor has a name from here on, in an entry with that tag.
    pub(crate) fn name(&self, number: i32, tag: Tag) {
        self.lock().named.insert(number, tag);
    }

    /// The descriptor has no name any more.
    pub(crate) fn unname(&self, number: i32) {
        self.lock().named.remove(&number);
    }

    /// Whether a handle names the descriptor.
    pub(crate) fn has_handle(&self, number: i32) -> bool {
        self.lock().handles.contains_key(&number)
    }

    /// Closes descriptors, by whichever process is there, and does not wait for it. If a server ran
    /// on them, none does any more.
    pub(crate) fn close_later(self: &Arc<Self>, numbers: impl IntoIterator<Item = i32>) {
        let numbers: BTreeSet<i32> = numbers.into_iter().collect();
        let mut inner = self.lock();
        for number in &numbers {
            inner.servers.remove(number);
            inner.closing.take(*number);
        }
        drop(inner);
        let tenure = self.tenure();
        let closing = |number| Closing { number, table: self.clone(), tenure };
        close_soon(numbers.into_iter().map(closing).collect());
    }
}

impl Closing {
    /// Closes it, unless nobody is left to do it.
    fn submit(self) -> Option<Receipt<()>> {
        let member = self.table.member()?;
        let call = close(self.number);
        Some(member.submit(vec![call], move |replies| {
            drop(self);
            let reply = replies.first().ok_or(Error::Protocol("no reply"))?;
            reply.value().map(|_| ()).map_err(Error::call("close"))
        }))
    }
}

/// Closes descriptors of one table in ascending order, unless nobody is left to do it: together
/// with the next call, if that is made soon.
fn close_soon(closing: Vec<Closing>) {
    let Some(member) = closing.first().and_then(|first| first.table.member()) else { return };
    let neighbours = closing.chunk_by(|one, next| one.number + 1 == next.number);
    let calls = neighbours
        .filter_map(|run| match run {
            [] => None,
            [one] => Some(close(one.number)),
            [first, .., last] => Some(close_range(first.number as u64, last.number as u64)),
        })
        .collect();
    // Dropping the receipt loses nothing.
    drop(member.submit_soon(calls, move |_| {
        drop(closing);
        Ok(())
    }));
}

/// The calls that close all descriptors but these: close_range(2) on the gaps, which needs no /proc.
pub(crate) fn close_others(kept: BTreeSet<i32>) -> Vec<Call> {
    let mut calls = Vec::new();
    let mut next = 0u64;
    for number in kept {
        // Numbers are positive: what is not was never adopted or reserved.
        let number = number as u64;
        if number > next {
            calls.push(close_range(next, number - 1));
        }
        next = number + 1;
    }
    calls.push(close_range(next, u64::from(u32::MAX)));
    calls
}

/// Both ends are closed too.
fn close_range(first: u64, last: u64) -> Call {
    Call::syscall(Sysno::close_range, [first, last, 0, 0, 0, 0])
}

fn close(number: i32) -> Call {
    Call::syscall(Sysno::close, [number as u64, 0, 0, 0, 0, 0])
}

impl Fd {
    /// The number in its table.
    #[must_use]
    pub fn number(&self) -> i32 {
        self.number
    }

    /// The table that it was opened in.
    #[must_use]
    pub fn table(&self) -> &Arc<FdTable> {
        &self.table
    }

    /// Whether another controller has held the process since, which may have closed the descriptor, so
    /// that its number is something else's: it has no name, or is not what had that name.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        self.home().is_none()
    }

    /// The table that it is in now; none if it is stale.
    pub(crate) fn home(&self) -> Option<Arc<FdTable>> {
        let (mut table, mut tenure) = (self.table.clone(), self.tenure);
        while table.tenure() != tenure {
            let next = table.lock().moved.get(&self.number).filter(|_| tenure == 0).cloned()?;
            (table, tenure) = (next, 0);
        }
        Some(table)
    }

    fn stale(&self) -> Error {
        Error::Stale { what: format!("descriptor {}", self.number) }
    }

    /// Its number, if it is in that table.
    pub(crate) fn number_in(&self, table: &Arc<FdTable>) -> Result<u64> {
        // Numbers are positive.
        let number = self.number as u64;
        if Arc::ptr_eq(&self.table, table) && table.tenure() == self.tenure {
            return Ok(number);
        }
        let home = self.home().ok_or_else(|| self.stale())?;
        let same = Arc::ptr_eq(&home, table);
        same.then_some(number).ok_or(Error::ForeignFd { fd: self.number })
    }

    /// Closes the descriptor in the target process: close(2).
    ///
    /// # Errors
    ///
    /// The errno of close(2); the descriptor is closed even then. [`Error::Misuse`] if it has a name
    /// in the registry, which it keeps; [`Error::Stale`].
    pub async fn close(mut self) -> Result<()> {
        let home = self.home().ok_or_else(|| self.stale())?;
        if home.lock().named.contains_key(&self.number) {
            return Err(Error::misuse(
                "closing a descriptor that has a name",
                "Process::release closes it and gives up its name; Process::forget gives up the name alone",
            ));
        }
        let Some(closing) = self.forget() else { return Ok(()) };
        closing.submit().ok_or(Error::Gone)?.await
    }

    /// Gives the descriptor up without closing it, and returns its number.
    #[must_use = "nothing else knows the number"]
    pub fn into_raw(mut self) -> i32 {
        drop(self.forget());
        self.number
    }

    /// If this was the last handle of an open descriptor, the descriptor is to be closed.
    fn forget(&mut self) -> Option<Closing> {
        if !std::mem::replace(&mut self.open, false) {
            return None;
        }
        loop {
            let home = self.home()?;
            let tenure = if Arc::ptr_eq(&home, &self.table) { self.tenure } else { 0 };
            let mut inner = home.lock();
            if home.tenure() != tenure {
                // Superseded just now.
                continue;
            }
            let last = inner.handles.release(self.number);
            if !last || inner.named.contains_key(&self.number) {
                return None;
            }
            inner.closing.take(self.number);
            drop(inner);
            return Some(Closing { number: self.number, table: home, tenure });
        }
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        close_soon(self.forget().into_iter().collect());
    }
}
