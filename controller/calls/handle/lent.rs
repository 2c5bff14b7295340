//! Descriptors that a child's server has in a table that is its parent's too.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{FdTable, Spare};
use crate::link::Socket;

/// What a child's server has in the table that it shares with its parent: closed there when the
/// child has ended, because nothing else would.
#[derive(Debug)]
pub(crate) struct Lent {
    table: Arc<FdTable>,
    /// That of the table when the child was made. In a later one the numbers may be something else's.
    tenure: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    numbers: Vec<i32>,
    /// The child has ended: what is added from here on is closed at once.
    ended: bool,
}

impl Lent {
    pub(crate) fn new(table: Arc<FdTable>, numbers: Vec<i32>) -> Self {
        let tenure = table.tenure();
        Self { table, tenure, state: Mutex::new(State { numbers, ended: false }) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The child has more of them in `table`, if that is the parent's.
    pub(crate) fn add(&self, table: &Arc<FdTable>, numbers: &[i32]) {
        if !Arc::ptr_eq(table, &self.table) || self.is_stale() {
            return;
        }
        let mut state = self.lock();
        if !state.ended {
            state.numbers.extend(numbers);
            return;
        }
        drop(state);
        table.close_later(numbers.iter().copied());
    }

    fn is_stale(&self) -> bool {
        self.table.tenure() != self.tenure
    }

    /// The child has closed these in `table`.
    pub(crate) fn take_back(&self, table: &Arc<FdTable>, numbers: &[i32]) {
        if Arc::ptr_eq(table, &self.table) {
            self.lock().numbers.retain(|number| !numbers.contains(number));
        }
    }

    /// The child uses its parent's table no more, and what it had there has been closed.
    pub(crate) fn left_table(&self) {
        self.lock().numbers.clear();
    }

    /// The child has ended. If it has left its stream, with the other end of that number, the next
    /// one can have that.
    pub(crate) fn ended(&self, left: Option<(Socket, i32)>) {
        let mut numbers = {
            let mut state = self.lock();
            state.ended = true;
            std::mem::take(&mut state.numbers)
        };
        if self.is_stale() {
            return;
        }
        if let Some((stream, number)) = left
            && let Some(place) = numbers.iter().position(|other| *other == number)
        {
            numbers.swap_remove(place);
            self.table.keep_spare(Spare { stream, number });
        }
        if !numbers.is_empty() {
            self.table.close_later(numbers);
        }
    }
}
