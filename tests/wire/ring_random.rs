//! A controller that writes anything into the memory of a ring breaks its own calls, never the
//! server.
//!
//! Anything in a record may be any system call. So the process gets a filter first that lets nothing
//! happen but what a server itself needs, none of which reaches beyond its own descriptors and memory.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::libc;

use crate::client::{Attached, TOKEN, attach};
use crate::random::Random;
use crate::ring::{
    ASLEEP, CANCEL, DELIVERED, FLUSH, LINK, PATIENCE, RECORDS, RUNNING, Ring, SIGNALS, WAITING,
};
use crate::server::{Open, Persistent};
use crate::stream::{Stream, until};

/// What a persistent server does. Everything else is ENOSYS.
const NEEDED: [libc::c_long; 15] = [
    libc::SYS_getpid,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_close,
    libc::SYS_ppoll,
    libc::SYS_shutdown,
    libc::SYS_accept4,
    libc::SYS_fcntl,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_getsockopt,
    libc::SYS_clock_gettime,
    libc::SYS_nanosleep,
    libc::SYS_process_vm_writev,
    libc::SYS_rt_sigreturn,
];

/// Makes every call but those that are needed fail, from here on and without a way back.
pub fn confine(stream: &Stream) {
    filter(stream, &NEEDED, false, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32);
    assert_eq!(stream.call(libc::SYS_kill, &[0, 0]), -i64::from(libc::ENOSYS));
    stream.is_in_step();
}

/// Lets a filter of seccomp(2) give this answer to calls with these numbers, or to all others.
pub fn filter(stream: &Stream, numbers: &[libc::c_long], these: bool, answer: u32) {
    // seccomp(2)'s program: the number is the word at 0; each comparison jumps to the last
    // instruction, or goes on to the next one.
    let instruction = |code: u32, jt: u8, value: u32| -> Vec<u8> {
        let mut bytes = (code as u16).to_le_bytes().to_vec();
        bytes.extend([jt, 0]);
        bytes.extend(value.to_le_bytes());
        bytes
    };
    let mut program = instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0);
    for (at, number) in numbers.iter().enumerate() {
        let to_the_last = (numbers.len() - at) as u8;
        let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
        program.extend(instruction(equal, to_the_last, *number as u32));
    }
    let mut answers = [answer, libc::SECCOMP_RET_ALLOW];
    if these {
        answers.reverse();
    }
    for answer in answers {
        program.extend(instruction(libc::BPF_RET | libc::BPF_K, 0, answer));
    }
    let memory = stream.memory(4096);
    assert_eq!(stream.copy_in(memory, &program), program.len() as i64);
    let header = [(program.len() / 8) as u64, memory].map(u64::to_le_bytes).concat();
    assert_eq!(stream.copy_in(memory + 2048, &header), 16);
    stream.done(libc::SYS_prctl, &[libc::PR_SET_NO_NEW_PRIVS as u64, 1, 0, 0, 0]);
    let set = u64::from(libc::SECCOMP_SET_MODE_FILTER);
    stream.done(libc::SYS_seccomp, &[set, 0, memory + 2048]);
}

impl Random {
    /// A word of a record without its mark: a system call that does nothing in a process that is
    /// confined, with any flags, or an operation that touches no memory.
    fn harmless_word(&mut self) -> u64 {
        let number = match self.below(4) {
            0 => libc::SYS_getpid as u64,
            // Any that the filter refuses.
            1 | 2 => {
                let number = self.number(460);
                let needed = NEEDED.iter().any(|needed| *needed as u64 == number);
                if needed { 1000 + number } else { number }
            }
            // An operation that the ring does not have.
            _ => (1 << 32) + 12 + self.number(1 << 20),
        };
        let flags = self.next() & (0x7f << 34 | LINK | FLUSH);
        let unknown = if self.below(8) == 0 { 1 << (41 + self.below(7)) } else { 0 };
        number | flags | unknown
    }

    /// Something for the words of the header that the controller writes.
    fn header(&mut self, ring: &Ring) {
        for at in [WAITING, SIGNALS, PATIENCE] {
            ring.memory.u32(at).store(self.next() as u32, Ordering::Relaxed);
        }
        let near = self.number(3000);
        let cancel = [0, near, self.next()][self.below(3)];
        ring.memory.u64(CANCEL).store(cancel, Ordering::Relaxed);
    }
}

/// A persistent process that is confined, what it has open when it is detached, and a connection.
fn confined() -> (Persistent, Open, Attached, Ring) {
    let process = Persistent::new();
    let before = process.fds_when_detached();
    let attached = attach(&process.path, &TOKEN);
    // Its memory is mapped before it is confined.
    let ring = Ring::new(process.server.pid(), &attached.stream);
    confine(&attached.stream);
    (process, before, attached, ring)
}

/// The connection ends, and the process is there for the next one.
fn survives(mut process: Persistent, before: &Open, attached: Attached, ring: Ring) {
    process.server.is_alive();
    drop(attached);
    process.is_detached_again(before, "whatever was in the ring");
    drop(ring);
    for _ in 0..3 {
        let next = attach(&process.path, &TOKEN);
        next.stream.is_in_step();
        drop(next);
        process.is_detached_again(before, "a connection");
    }
}

#[test]
fn calls_and_header_of_any_kind_do_not_harm_a_server() {
    let (process, before, attached, ring) = confined();
    let mut random = Random::new(0x1234_5678_9abc_def1);
    for lap in 0..60 {
        for index in lap * RECORDS..(lap + 1) * RECORDS {
            let record = ring.record(index);
            for at in 1..8 {
                let value = [random.number(70), random.next()][random.below(2)];
                ring.memory.u64(record + at * 8).store(value, Ordering::Relaxed);
            }
            let word = random.harmless_word() | (2 * lap + 1) << 48;
            ring.memory.u64(record).store(word, Ordering::Release);
            if random.below(16) == 0 {
                random.header(&ring);
                ring.ring();
            }
        }
        let last = lap * RECORDS + RECORDS - 1;
        until("all of them are answered", || {
            // What is to be interrupted may hold others up.
            random.header(&ring);
            ring.ring();
            ring.result(last)
        });
    }
    attached.stream.is_in_step();
    survives(process, &before, attached, ring);
}

#[test]
fn random_bytes_all_over_do_not_harm_a_server() {
    let (process, before, attached, ring) = confined();
    let mut random = Random::new(0xfeed_0000_dead_beef);
    let end = Instant::now() + Duration::from_secs(1);
    let mut rounds = 0u64;
    while Instant::now() < end || rounds < 100 {
        rounds += 1;
        for index in 0..RECORDS {
            for at in 0..8 {
                let at = ring.record(index) + at * 8;
                ring.memory.u64(at).store(random.next(), Ordering::Relaxed);
            }
        }
        random.header(&ring);
        for at in [ASLEEP, DELIVERED, RUNNING, RUNNING + 4] {
            ring.memory.u32(at).store(random.next() as u32, Ordering::Relaxed);
        }
        for at in (0..64).step_by(8) {
            ring.memory.u64(at).store(random.next(), Ordering::Relaxed);
        }
        ring.ring();
        ring.hear();
        if rounds.is_multiple_of(64) {
            attached.stream.is_in_step();
        }
    }
    survives(process, &before, attached, ring);
}
