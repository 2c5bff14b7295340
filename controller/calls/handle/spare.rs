//! Streams whose other ends are in a table already, for children to come that share it.
//!
//! To make a pair of sockets, to pass one end, and to close both costs more than to make such a
//! child. So a child that has ended leaves its stream to the next one, as it leaves its stack. The
//! other end stays open in the table, under its number, and counts as a server's: a child with a copy
//! of the table closes it there.
//!
//! A stream is only left if nothing is in it in either direction, and only used if its other end is
//! still open.

use std::sync::{Arc, PoisonError};

use super::FdTable;
use crate::link::Socket;

/// How many streams a table keeps.
const KEPT: usize = 4;

/// A stream that no child uses.
pub(crate) struct Spare {
    pub(crate) stream: Socket,
    /// Its other end, in the table.
    pub(crate) number: i32,
}

impl FdTable {
    /// Keeps a stream for the next child, or closes its other end if there are enough. That is
    /// reserved.
    pub(super) fn keep_spare(self: &Arc<Self>, spare: Spare) {
        let mut spares = self.spares.lock().unwrap_or_else(PoisonError::into_inner);
        if spares.len() < KEPT {
            spares.push(spare);
            return;
        }
        drop(spares);
        self.close_later([spare.number]);
    }

    /// A stream that an earlier child has left.
    pub(crate) fn take_spare(&self) -> Option<Spare> {
        self.spares.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    /// The numbers of the streams that are kept.
    pub(crate) fn spares(&self) -> Vec<i32> {
        let spares = self.spares.lock().unwrap_or_else(PoisonError::into_inner);
        spares.iter().map(|spare| spare.number).collect()
    }

    /// Keeps none of them any longer.
    pub(crate) fn close_spares(self: &Arc<Self>) {
        let spares =
            std::mem::take(&mut *self.spares.lock().unwrap_or_else(PoisonError::into_inner));
        self.close_later(spares.into_iter().map(|spare| spare.number));
    }
}
