//! The registry of a persistent process, as far as this controller knows it: which entries are
//! taken, and which it is about to take. See [`crate::abi::registry`] for what lies in the process.
//!
//! What is known is read from the process, and forgotten whenever an entry may have changed: the
//! process decides, and this side asks again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::abi::log::LogHead;
use crate::abi::registry::{ENTRY_SIZE, Entry};

/// What a controller knows of a process's registry.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    state: Mutex<State>,
    /// Held while it is read or made larger.
    pub(crate) turn: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct State {
    /// The process is persistent.
    enabled: bool,
    /// Where it lies, and how many entries it has room for.
    address: u64,
    capacity: u64,
    /// All entries from this one on are free.
    used: u64,
    /// Those that are taken, if that is known.
    taken: Option<BTreeMap<u64, Kept>>,
    /// Those that calls under way may take.
    preparing: BTreeSet<u64>,
    /// The names of those.
    names: BTreeSet<String>,
}

/// An entry that is taken, and the bytes behind it.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    pub(crate) entry: Entry,
    pub(crate) bytes: Vec<u8>,
}

/// How many of its user's bytes an entry holds that only goes on with what is before it.
const PART: usize = ENTRY_SIZE - std::mem::offset_of!(Entry, kind);

/// What kinds of entries mean.
pub(crate) mod kind {
    pub(crate) const FD: u64 = 1;
    pub(crate) const CHILD: u64 = 2;
    pub(crate) const MAPPING: u64 = 3;
    pub(crate) const BYTES: u64 = 4;
}

impl Kept {
    /// How many entries it takes.
    fn size(entry: &Entry) -> u64 {
        let bytes = if entry.kind == kind::BYTES { entry.details[0] } else { 0 };
        1 + bytes.div_ceil(PART as u64)
    }

    /// Bytes as they lie in the entries behind theirs: each begins as one that is free.
    pub(crate) fn parts(bytes: &[u8]) -> Vec<u8> {
        let mut parts = Vec::with_capacity(bytes.len().div_ceil(PART) * ENTRY_SIZE);
        for part in bytes.chunks(PART) {
            parts.extend([0; ENTRY_SIZE - PART]);
            parts.extend(part);
        }
        parts.resize(parts.len().next_multiple_of(ENTRY_SIZE), 0);
        parts
    }

    /// Its name, as far as it is one.
    pub(crate) fn name(&self) -> String {
        let name = self.entry.name.split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(name).into_owned()
    }
}

/// Entries that a call is about to take.
#[derive(Debug)]
pub(crate) struct Slots {
    registry: Arc<Registry>,
    pub(crate) first: u64,
    count: u64,
    names: Vec<String>,
}

impl Drop for Slots {
    fn drop(&mut self) {
        let mut state = self.registry.lock();
        for slot in self.first..self.first + self.count {
            state.preparing.remove(&slot);
        }
        for name in &self.names {
            state.names.remove(name);
        }
        // Some of them may be taken now.
        state.taken = None;
    }
}

/// Why no entries can be taken at once.
#[derive(Debug)]
pub(crate) enum Unready {
    /// The process is not persistent.
    Disabled,
    /// What is in it has to be read: so many bytes at that address.
    Unread { address: u64, len: usize },
    /// It has to be made larger: it lies at that address, or nowhere, and has room for so many.
    Full { address: u64, capacity: u64 },
    /// There is a resource of that name.
    Taken(String),
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The process is persistent, or about to become so, and has none yet unless this was said before.
    pub(crate) fn begin(&self) {
        let mut state = self.lock();
        if !state.enabled {
            state.enabled = true;
            state.taken = Some(BTreeMap::new());
        }
    }

    /// The process says where it lies. What is in it may be others' doing.
    pub(crate) fn told(&self, head: &LogHead) {
        let mut state = self.lock();
        state.enabled = true;
        (state.address, state.capacity) = (head.registry, head.capacity);
        state.used = state.used.max(head.used);
        state.taken = (head.registry == 0).then(BTreeMap::new);
    }

    /// Something in it changes.
    pub(crate) fn changes(&self) {
        self.lock().taken = None;
    }

    /// It lies there from here on, and has room for so many.
    pub(crate) fn entered(&self, address: u64, capacity: u64) {
        let mut state = self.lock();
        (state.address, state.capacity) = (address, capacity);
    }

    /// What lies in its first entries.
    pub(crate) fn read(&self, bytes: &[u8]) {
        self.lock().taken = Some(taken_in(bytes));
    }

    /// What is in it.
    pub(crate) fn kept(&self) -> Result<BTreeMap<u64, Kept>, Unready> {
        let state = self.lock();
        state.ready()?;
        state.taken.clone().ok_or(Unready::Disabled)
    }

    /// Sets `count` entries in a row aside, for resources of those names.
    pub(crate) fn prepare(
        self: &Arc<Self>,
        count: u64,
        names: &[String],
    ) -> Result<Slots, Unready> {
        let mut state = self.lock();
        state.ready()?;
        let taken = state.taken.as_ref().ok_or(Unready::Disabled)?;
        let is_taken = |name: &&String| {
            state.names.contains(*name) || taken.values().any(|kept| kept.name() == **name)
        };
        if let Some(name) = names.iter().find(is_taken) {
            return Err(Unready::Taken(name.clone()));
        }
        let mut first = 0;
        let ranges = taken.iter().map(|(slot, kept)| (*slot, Kept::size(&kept.entry)));
        let mut busy: Vec<(u64, u64)> =
            ranges.chain(state.preparing.iter().map(|slot| (*slot, 1))).collect();
        busy.sort_unstable();
        for (slot, size) in busy {
            if first + count <= slot {
                break;
            }
            first = first.max(slot + size);
        }
        let end = first + count;
        if end > state.capacity {
            let (address, capacity) = (state.address, state.capacity);
            return Err(Unready::Full { address, capacity });
        }
        state.preparing.extend(first..end);
        state.names.extend(names.iter().cloned());
        state.used = state.used.max(end);
        Ok(Slots { registry: self.clone(), first, count, names: names.to_vec() })
    }
}

/// What is taken in these first entries of a registry.
pub(crate) fn taken_in(bytes: &[u8]) -> BTreeMap<u64, Kept> {
    let (entries, _) = bytes.as_chunks::<ENTRY_SIZE>();
    let mut taken = BTreeMap::new();
    let mut slot = 0;
    while let Some(bytes_of) = entries.get(slot) {
        let entry = Entry::from_bytes(bytes_of);
        let size = if entry.state == Entry::TAKEN { Kept::size(&entry) } else { 1 };
        // What claims more than there is has what there is.
        let end = usize::try_from(size).map_or(entries.len(), |size| slot.saturating_add(size));
        let behind = entries.get(slot + 1..end.min(entries.len())).unwrap_or_default();
        if entry.state == Entry::TAKEN {
            let parts = behind.iter().map(|entry| &entry[ENTRY_SIZE - PART..]);
            let mut bytes: Vec<u8> = parts.flatten().copied().collect();
            if entry.kind == kind::BYTES {
                bytes.truncate(usize::try_from(entry.details[0]).unwrap_or(usize::MAX));
            }
            taken.insert(slot as u64, Kept { entry, bytes });
        }
        slot += 1 + behind.len();
    }
    taken
}

impl State {
    fn ready(&self) -> Result<(), Unready> {
        if !self.enabled {
            return Err(Unready::Disabled);
        }
        if self.taken.is_none() {
            // Nothing is behind its capacity, whatever the process claims.
            let len = self.used.min(self.capacity) as usize * ENTRY_SIZE;
            return Err(Unready::Unread { address: self.address, len });
        }
        Ok(())
    }
}
