//! Batches of any calls, as short values that a failure can print.

use farcall::abi::wire::{Operation, Word};
use farcall::proto::Call;
use proptest::prelude::*;
use proptest::sample::Index;

use super::server::{FILL, ID, LIMIT, MIX, MIX_AT_ONCE};

/// One call, or a few that belong together.
#[derive(Clone, Debug)]
pub struct Piece {
    what: What,
    /// Not executed if the one before was not, or failed.
    link: bool,
    /// Takes the result of an earlier one of the batch.
    refer: Option<Index>,
}

#[derive(Clone, Debug)]
enum What {
    Mix {
        blocks: bool,
    },
    Error,
    In {
        len: usize,
        fault: bool,
    },
    Fill {
        len: u16,
        real: Index,
    },
    /// Memory that nothing has been put into, of which not all is there.
    Edge {
        len: u16,
        real: Index,
    },
    /// What a fill has just put there.
    FillAndOut {
        len: u16,
        real: Index,
    },
    Store,
    Keep {
        error: bool,
    },
}

fn piece() -> impl Strategy<Value = Piece> {
    let len = prop_oneof![3 => 0..40_u16, 1 => 200..800_u16];
    let memory = (len, any::<Index>());
    let what = prop_oneof![
        4 => any::<bool>().prop_map(|blocks| What::Mix { blocks }),
        1 => Just(What::Error),
        2 => (0..100_usize, prop::bool::weighted(0.2))
            .prop_map(|(len, fault)| What::In { len, fault }),
        1 => memory.clone().prop_map(|(len, real)| What::Fill { len, real }),
        1 => memory.clone().prop_map(|(len, real)| What::Edge { len, real }),
        3 => memory.prop_map(|(len, real)| What::FillAndOut { len, real }),
        1 => Just(What::Store),
        3 => prop::bool::weighted(0.1).prop_map(|error| What::Keep { error }),
    ];
    (what, any::<bool>(), prop::option::of(any::<Index>())).prop_map(|(what, link, refer)| Piece {
        what,
        link,
        refer,
    })
}

/// A few calls, sometimes more than a log has records.
pub fn pieces() -> impl Strategy<Value = Vec<Piece>> {
    prop_oneof![
        20 => prop::collection::vec(piece(), 1..8),
        2 => prop::collection::vec(piece(), 30..70),
        1 => prop::collection::vec(piece(), 130..300),
    ]
}

/// Makes batches of which no two have a call's number or an address in common.
#[derive(Default)]
pub struct Maker {
    calls: u64,
    memory: u64,
}

impl Maker {
    pub fn batch(&mut self, pieces: &[Piece]) -> Vec<Call> {
        let mut batch = Vec::new();
        for piece in pieces {
            self.add(&mut batch, piece);
        }
        batch
    }

    fn address(&mut self, len: u64) -> u64 {
        self.memory += len;
        self.memory - len
    }

    fn add(&mut self, batch: &mut Vec<Call>, piece: &Piece) {
        let mix = |number, outcome: i64| Call::syscall(number, [0, 0, 0, 0, outcome as u64, 0]);
        match &piece.what {
            What::Mix { blocks: true } => self.push(batch, piece, mix(MIX, 0)),
            What::Mix { blocks: false } => self.push(batch, piece, mix(MIX_AT_ONCE, 0)),
            What::Error => self.push(batch, piece, mix(MIX_AT_ONCE, -2)),
            What::In { len, fault } => {
                let at = self.address(*len as u64);
                let bytes = (0..*len).map(|at| at as u8).collect();
                let at = if *fault { LIMIT + at } else { at };
                self.push(batch, piece, Call::copy_in(at, bytes));
            }
            What::Fill { len, real } => {
                let (_, call) = self.fill(*len, real);
                self.push(batch, piece, call);
            }
            What::Edge { len, real } => {
                let at = LIMIT - real.index(usize::from(*len) + 1) as u64;
                self.push(batch, piece, Call::copy_out(at, usize::from(*len)));
            }
            What::FillAndOut { len, real } => {
                let (at, call) = self.fill(*len, real);
                self.push(batch, piece, call);
                let mut out = Call::copy_out(at, 1);
                out.request.word |= Word::reference(1);
                self.push(batch, &Piece { refer: None, ..piece.clone() }, out);
            }
            What::Store => {
                let args = [self.address(8), 8, 5, 0, 0, 0];
                self.push(batch, piece, Call::operation(Operation::Store, args));
            }
            What::Keep { error } => {
                let args = [0, 0, 0, 0, if *error { -22_i64 as u64 } else { 0 }, 0];
                let no_reference = Piece { refer: None, ..piece.clone() };
                self.push(batch, &no_reference, Call::operation(Operation::Keep, args));
                self.push(batch, piece, mix(MIX, 0));
            }
        }
    }

    fn fill(&mut self, len: u16, real: &Index) -> (u64, Call) {
        let at = self.address(u64::from(len));
        let real = real.index(usize::from(len) + 1) as u64;
        (at, Call::syscall(FILL, [at, u64::from(len), 0, 0, real, 0]))
    }

    fn push(&mut self, batch: &mut Vec<Call>, piece: &Piece, mut call: Call) {
        let place = batch.len();
        if piece.link && place > 0 {
            call.request.word |= Word::LINK;
        }
        let takes = call.request.word & Word::OP == 0
            || call.request.word & Word::NUMBER == Operation::Store as u64;
        if let Some(refer) = piece.refer
            && takes
            && place > 0
        {
            // In long batches also further than a reference reaches.
            call.request.word |= Word::reference(2);
            call.request.args[2] = 1 + refer.index(place) as u64;
        }
        self.calls += 1;
        call.request.args[ID] = self.calls;
        batch.push(call);
    }
}
