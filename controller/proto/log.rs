//! The call log, as a server tells it at a handshake: see [`crate::abi::log`].

use crate::abi::handshake::Token;
use crate::abi::log::{LOG_CAPACITY, LOG_HEAD_SIZE, LOG_SIZE, LogHead, PAST, Record};

/// What a server has executed last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Log {
    /// How far it is.
    pub head: LogHead,
    /// The record of call `n` is at `n` modulo the length; none if the server keeps no records.
    records: Vec<Record>,
}

impl Log {
    /// Reads what follows an answer. `None`: that is not all yet.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (head, records) = bytes.split_first_chunk::<LOG_HEAD_SIZE>()?;
        let head = LogHead::from_bytes(head);
        if head.memory == 0 {
            return Some(Self { head, records: Vec::new() });
        }
        let (records, []) = records.get(..LOG_SIZE)?.as_chunks() else { return None };
        Some(Self { head, records: records.iter().map(Record::from_bytes).collect() })
    }

    /// What call `number` was and returned, if it is remembered.
    #[must_use]
    pub fn record(&self, number: u64) -> Option<&Record> {
        let back = self.head.calls.checked_sub(number)?;
        let there = (1..=LOG_CAPACITY).contains(&back);
        self.records.get((number % LOG_CAPACITY) as usize).filter(|_| there)
    }

    /// The calls that are remembered, the oldest first, each with its number.
    pub fn calls(&self) -> impl Iterator<Item = (u64, &Record)> {
        let first = self.head.calls.saturating_sub(LOG_CAPACITY);
        (first..self.head.calls).filter_map(|number| Some((number, self.record(number)?)))
    }

    /// For which controller call `number` was executed, counted from 0, which is nobody or one of version
    /// 0; the last one is [`LogHead::controllers`]. One that came back after others counts again. `None`
    /// if so many have come since that nobody knows.
    #[must_use]
    pub fn controller_of(&self, number: u64) -> Option<u64> {
        let LogHead { controllers, past, .. } = self.head;
        // Controller n begins where the one before it ends.
        let begin = |n: &u64| past[(n % PAST as u64) as usize].end;
        let known = controllers.saturating_sub(PAST as u64 - 1).max(1);
        (known..=controllers).rev().find(|n| begin(n) <= number).or((known == 1).then_some(0))
    }

    /// The number of the first call that was not executed for controller `number`, counted as in
    /// [`Log::controller_of`], which has this token. `None` if so many have come since that nobody knows
    /// any more. The same controller in a later tenure is another one: calls of one tenure end with that.
    #[must_use]
    pub fn end_of(&self, token: Token, number: u64) -> Option<u64> {
        let LogHead { calls, controllers, past, .. } = self.head;
        match controllers.checked_sub(number)? {
            0 => Some(calls),
            // The one before controller n is at n.
            since if since <= PAST as u64 => {
                let tenure = past[((number + 1) % PAST as u64) as usize];
                (tenure.token == token).then_some(tenure.end)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::log::Tenure;

    #[test]
    fn the_calls_of_a_controller_end_with_the_tenure_that_is_meant() {
        let ours = Token([1, 2]);
        let mut log = Log::default();
        // Which of the controllers were this one, in several tenures.
        let tokens: Vec<Token> =
            (0..20).map(|n| if n % 3 == 0 { ours } else { Token([n, 7]) }).collect();
        let mut ends = Vec::new();
        for (number, token) in (1..).zip(&tokens) {
            // As a server enters them, each when the next one comes.
            log.head.controllers = number;
            assert_eq!(log.end_of(*token, number), Some(log.head.calls));
            for (earlier, end) in (1..).zip(&ends) {
                let token = tokens[earlier as usize - 1];
                let known = number - earlier <= PAST as u64;
                assert_eq!(log.end_of(token, earlier), known.then_some(*end), "{earlier}");
                assert_eq!(log.end_of(Token([99, 99]), earlier), None);
            }
            assert_eq!(log.end_of(*token, number + 1), None, "nobody has come after");
            log.head.calls += number;
            let end = log.head.calls;
            log.head.past[(number + 1) as usize % PAST] = Tenure { token: *token, end };
            ends.push(end);
        }
    }

    #[test]
    fn each_call_is_the_controllers_that_held_the_process_then_as_far_back_as_that_is_known() {
        let mut log = Log::default();
        let mut owners = Vec::new();
        for controller in 0..12 {
            if controller > 0 {
                let end = log.head.calls;
                log.head.controllers = controller;
                log.head.past[controller as usize % PAST] = Tenure { end, ..Tenure::default() };
            }
            // Some make no call.
            owners.extend(vec![controller; [3, 0, 5, 1][controller as usize % 4]]);
            log.head.calls = owners.len() as u64;
            let oldest = if controller <= PAST as u64 { 0 } else { controller - PAST as u64 + 1 };
            for (number, owner) in (0..).zip(&owners) {
                let expected = (*owner >= oldest).then_some(*owner);
                assert_eq!(log.controller_of(number), expected, "{number} of {controller}");
            }
        }
    }
}
