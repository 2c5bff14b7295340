//! What the ring is to do, with the part of each side that does it.

use loom::model::Builder;
use loom::sync::atomic::{AtomicU32, Ordering::Relaxed};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

use super::ring::{Ring, Sent};
use super::wire::{Request, Word};

const EINTR: i64 = -4;

/// All orders with at most so many points at which a thread is interrupted in favour of the other:
/// loom's authors have seen no bug that needs more than three.
fn model(preemptions: usize, run: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(run);
}

/// What the kernel does for the two: bells, and a signal to the server.
struct Kernel {
    server: Events,
    controller: Events,
    /// How many signals there have been, for a look that orders nothing.
    sent: AtomicU32,
}

/// What a thread can be blocked for.
struct Events {
    happened: Mutex<Happened>,
    changed: Condvar,
}

#[derive(Clone, Copy, Default)]
struct Happened {
    rung: bool,
    signals: u32,
    over: bool,
}

impl Events {
    fn new() -> Self {
        Self { happened: Mutex::new(Happened::default()), changed: Condvar::new() }
    }

    fn happen(&self, change: impl Fn(&mut Happened)) {
        change(&mut self.happened.lock().unwrap());
        self.changed.notify_one();
    }

    /// Blocks until something has happened, and takes the bell's count.
    fn wait(&self, ready: impl Fn(&Happened) -> bool) -> Happened {
        let mut happened = self.happened.lock().unwrap();
        while !ready(&happened) {
            happened = self.changed.wait(happened).unwrap();
        }
        let now = *happened;
        happened.rung = false;
        now
    }
}

impl Kernel {
    fn new() -> Self {
        Self { server: Events::new(), controller: Events::new(), sent: AtomicU32::new(0) }
    }

    fn send_signal(&self) {
        self.server.happen(|happened| happened.signals += 1);
        self.sent.fetch_add(1, Relaxed);
    }
}

/// A ring and its kernel, for both threads.
type Both = Arc<(Ring, Kernel)>;

fn both() -> Both {
    Arc::new((Ring::default(), Kernel::new()))
}

fn request(index: u64) -> Request {
    let args = [1, 2, 3, 4, 5, 6].map(|argument| 100 * (index + 1) + argument);
    Request { word: Word::FLUSH | index, args }
}

fn result(index: u64) -> i64 {
    1000 + index as i64
}

pub fn what_is_handed_over_arrives_whole() {
    const CALLS: u64 = 4;
    model(3, || {
        let shared = both();
        let server = shared.clone();
        let server = thread::spawn(move || {
            let (ring, _) = &*server;
            for index in 0..CALLS {
                let mut taken = Request::default();
                while !ring.take(index, &mut taken) {
                    thread::yield_now();
                }
                assert_eq!(taken, request(index), "what was submitted");
                ring.complete(index, taken.word, result(index));
            }
        });
        let (ring, _) = &*shared;
        let collect = |index| {
            let got = loop {
                match ring.result(index) {
                    Some(got) => break got,
                    None => thread::yield_now(),
                }
            };
            assert_eq!(got, result(index), "the result");
        };
        // Two under way at a time, in as many records.
        ring.submit(0, &request(0));
        for index in 1..CALLS {
            ring.submit(index, &request(index));
            collect(index - 1);
        }
        collect(CALLS - 1);
        server.join().unwrap();
    });
}

/// A server that sleeps as soon as there is nothing to do.
fn serve(shared: &Both, calls: u64) {
    let (ring, kernel) = &**shared;
    for index in 0..calls {
        while !ring.take(index, &mut Request::default()) {
            wake_controller(ring, kernel);
            if ring.sleep(index) {
                kernel.server.wait(|happened| happened.rung);
            }
            ring.wake();
        }
        ring.complete(index, 0, result(index));
    }
    wake_controller(ring, kernel);
}

fn wake_controller(ring: &Ring, kernel: &Kernel) {
    if ring.controller_waits() {
        kernel.controller.happen(|happened| happened.rung = true);
    }
}

fn submit(shared: &Both, index: u64) {
    let (ring, kernel) = &**shared;
    ring.submit(index, &Request::default());
    wake_server(ring, kernel);
}

fn wake_server(ring: &Ring, kernel: &Kernel) {
    if ring.server_sleeps() {
        kernel.server.happen(|happened| happened.rung = true);
    }
}

/// A controller that sleeps until a result is there.
fn wait(shared: &Both, index: u64) {
    let (ring, kernel) = &**shared;
    assert_eq!(sleep_until_complete(ring, kernel, index), result(index));
}

fn sleep_until_complete(ring: &Ring, kernel: &Kernel, index: u64) -> i64 {
    while ring.wait_for(index) {
        kernel.controller.wait(|happened| happened.rung);
    }
    ring.awake();
    ring.result(index).expect("it was there")
}

pub fn a_server_that_sleeps_is_woken_by_a_call() {
    model(3, || {
        let shared = both();
        let server = shared.clone();
        let server = thread::spawn(move || serve(&server, 2));
        submit(&shared, 0);
        submit(&shared, 1);
        server.join().unwrap();
    });
}

pub fn a_controller_that_waits_is_woken_by_a_result() {
    model(3, || {
        let shared = both();
        shared.0.submit(0, &Request::default());
        shared.0.submit(1, &Request::default());
        let server = shared.clone();
        let server = thread::spawn(move || serve(&server, 2));
        wait(&shared, 0);
        wait(&shared, 1);
        server.join().unwrap();
    });
}

pub fn both_sides_sleep_and_every_call_is_made() {
    model(2, || {
        let shared = both();
        let server = shared.clone();
        let server = thread::spawn(move || serve(&server, 3));
        for index in 0..3 {
            submit(&shared, index);
            wait(&shared, index);
        }
        server.join().unwrap();
    });
}

/// What a call does that can be interrupted.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// Only a signal ends it.
    Blocks,
    /// It ends by itself.
    Ends,
}
use Kind::{Blocks, Ends};

/// The server's thread, which signals interrupt.
struct Interruptible<'a> {
    ring: &'a Ring,
    kernel: &'a Kernel,
    heard: u32,
    signals: Signals,
    sent: Sent,
    /// The call that is about to be made, or is being made.
    executing: Option<u64>,
}

/// When signals arrive.
#[derive(Clone, Copy, PartialEq)]
enum Signals {
    /// While the controller waits for them.
    InTime,
    /// Also later: the process has blocked them for a while.
    AnyTime,
}

impl Interruptible<'_> {
    /// A point at which a signal may arrive. Says whether it means the call that is being executed.
    fn look(&mut self) -> bool {
        if self.kernel.sent.load(Relaxed) <= self.heard {
            return false;
        }
        // Who is delivered a signal sees what was before it was sent.
        self.kernel.server.wait(|_| true);
        self.deliver()
    }

    fn deliver(&mut self) -> bool {
        self.heard += 1;
        if self.sent == Sent::ToBeCounted {
            self.ring.count_signal();
            // A controller that waits for this looks now and then.
            self.kernel.controller.happen(|happened| happened.rung = true);
        }
        self.executing.is_some_and(|index| self.ring.is_canceled(index))
    }

    /// A system call in which all signals are delivered that are pending.
    fn flush(&mut self) {
        let pending = self.kernel.server.wait(|_| true).signals;
        while self.heard < pending {
            assert!(!self.deliver(), "a signal means a call that has not begun");
        }
    }

    /// Blocks for a signal or, if that ends it, the bell. Says whether a signal meant the call that
    /// is being executed.
    fn block(&mut self, bell: bool) -> (bool, Happened) {
        let heard = self.heard;
        let ready = |now: &Happened| now.signals != heard || bell && (now.rung || now.over);
        let happened = self.kernel.server.wait(ready);
        if happened.signals == self.heard {
            return (false, happened);
        }
        (self.deliver(), happened)
    }

    /// Executes calls that have been handed over, and sleeps until the end.
    fn serve(&mut self, calls: &[Kind]) {
        for (index, kind) in (0..).zip(calls) {
            let mut request = Request::default();
            assert!(self.ring.take(index, &mut request), "submitted before the server ran");
            wake_controller(self.ring, self.kernel);
            while !self.ring.begin(index) && self.ring.hold(index) {
                // Meanwhile there may be calls of the stream.
                let (meant, _) = self.block(true);
                assert!(!meant, "a signal means a call that has not begun");
                self.ring.wake();
            }
            self.ring.wake();
            if self.sent == Sent::BySource
                && let Some(signals) = self.ring.undelivered()
            {
                self.flush();
                self.ring.delivered(signals);
            }
            let result = self.call(index, *kind);
            // A signal between the call and its result meets nothing.
            self.look();
            self.ring.complete(index, request.word, result);
            self.look();
        }
        wake_controller(self.ring, self.kernel);
        while !self.block(true).1.over {}
    }

    /// The call itself.
    fn call(&mut self, index: u64, kind: Kind) -> i64 {
        let heard = self.heard;
        self.executing = Some(index);
        let canceled = self.ring.is_canceled(index);
        // Until the instruction `syscall` a signal turns the thread back.
        let mut interrupted = canceled | self.look();
        while !interrupted {
            match kind {
                Blocks => interrupted = self.block(false).0,
                Ends => {
                    interrupted = self.look();
                    break;
                }
            }
        }
        self.executing = None;
        let met = !interrupted && self.heard != heard;
        assert!(!met || self.signals == Signals::AnyTime, "a signal meets another call");
        if interrupted { EINTR } else { result(index) }
    }
}

/// Runs the server with calls that have been handed over, against a controller. Says the results.
fn interrupting(
    calls: &'static [Kind],
    controller: impl Fn(&Ring, &Kernel, Sent) + Copy + Send + Sync + 'static,
    check: impl Fn(&[i64]) + Copy + Send + Sync + 'static,
) {
    for sent in [Sent::BySource, Sent::ToBeCounted] {
        let controller = move |ring: &Ring, kernel: &Kernel| controller(ring, kernel, sent);
        interrupting_with(Signals::InTime, sent, calls, controller, check);
    }
}

fn interrupting_with(
    signals: Signals,
    sent: Sent,
    calls: &'static [Kind],
    controller: impl Fn(&Ring, &Kernel) + Send + Sync + 'static,
    check: impl Fn(&[i64]) + Send + Sync + 'static,
) {
    model(3, move || {
        let shared = both();
        for index in 0..calls.len() as u64 {
            shared.0.submit(index, &Request::default());
        }
        let server = shared.clone();
        let server = thread::spawn(move || {
            let (ring, kernel) = &*server;
            let (heard, executing) = (0, None);
            Interruptible { ring, kernel, heard, signals, sent, executing }.serve(calls);
        });
        let (ring, kernel) = &*shared;
        controller(ring, kernel);
        let last = calls.len() as u64 - 1;
        sleep_until_complete(ring, kernel, last);
        kernel.server.happen(|happened| happened.over = true);
        server.join().unwrap();
        let results: Vec<i64> =
            (0..=last).map(|index| ring.result(index).expect("all are complete")).collect();
        check(&results);
    });
}

/// Interrupts one call.
fn interrupt(ring: &Ring, kernel: &Kernel, sent: Sent, index: u64) {
    if ring.interrupt(index, sent) {
        kernel.send_signal();
    }
    sleep_until_complete(ring, kernel, index);
    while sent == Sent::ToBeCounted && !ring.is_heard() {
        kernel.controller.wait(|happened| happened.rung);
    }
    ring.interrupted(sent);
    wake_server(ring, kernel);
}

pub fn a_call_that_blocks_is_interrupted() {
    let check = |results: &[i64]| assert_eq!(results, [EINTR, result(1)]);
    interrupting(&[Blocks, Ends], |ring, kernel, sent| interrupt(ring, kernel, sent, 0), check);
}

pub fn a_call_that_completes_meanwhile_is_interrupted_or_complete() {
    let check = |results: &[i64]| {
        assert!([EINTR, result(0)].contains(&results[0]), "{results:?}");
        assert_eq!(results[1], result(1));
    };
    interrupting(&[Ends, Ends], |ring, kernel, sent| interrupt(ring, kernel, sent, 0), check);
}

pub fn a_call_that_has_not_begun_is_not_executed() {
    let check = |results: &[i64]| assert_eq!(results, [result(0), EINTR]);
    interrupting(&[Ends, Blocks], |ring, kernel, sent| interrupt(ring, kernel, sent, 1), check);
}

pub fn the_next_call_can_be_interrupted_too() {
    let check = |results: &[i64]| assert_eq!(results, [EINTR, EINTR]);
    let controller = |ring: &Ring, kernel: &Kernel, sent| {
        interrupt(ring, kernel, sent, 0);
        interrupt(ring, kernel, sent, 1);
    };
    interrupting(&[Blocks, Blocks], controller, check);
}

pub fn a_signal_that_never_arrives_holds_nothing_up() {
    let check = |results: &[i64]| assert_eq!(results[1], result(1));
    let controller = |ring: &Ring, kernel: &Kernel, sent| {
        // It may be that it is meant to be sent: the process blocks it.
        ring.interrupt(0, sent);
        sleep_until_complete(ring, kernel, 0);
        ring.interrupted(sent);
        wake_server(ring, kernel);
    };
    interrupting(&[Ends, Ends], controller, check);
}

/// Interrupts a call of a process that has blocked the signal, and lets it through later.
fn interrupt_late(ring: &Ring, kernel: &Kernel, index: u64) {
    let sent = ring.interrupt(index, Sent::ToBeCounted);
    sleep_until_complete(ring, kernel, index);
    ring.interrupted(Sent::ToBeCounted);
    wake_server(ring, kernel);
    if sent {
        kernel.send_signal();
    }
}

pub fn a_signal_that_arrives_after_it_was_given_up_holds_nothing_up() {
    let check = |results: &[i64]| assert_eq!(results[1], result(1));
    let controller = |ring: &Ring, kernel: &Kernel| interrupt_late(ring, kernel, 0);
    interrupting_with(Signals::AnyTime, Sent::ToBeCounted, &[Ends, Ends], controller, check);
}

pub fn after_a_signal_that_was_given_up_the_next_call_can_be_interrupted() {
    let check = |results: &[i64]| assert_eq!(results[1], EINTR);
    let controller = |ring: &Ring, kernel: &Kernel| {
        interrupt_late(ring, kernel, 0);
        interrupt(ring, kernel, Sent::ToBeCounted, 1);
    };
    interrupting_with(Signals::AnyTime, Sent::ToBeCounted, &[Ends, Blocks], controller, check);
}

pub fn a_call_is_either_withdrawn_or_can_be_interrupted() {
    model(3, || {
        let shared = both();
        shared.0.submit(0, &request(0));
        let server = shared.clone();
        let server = thread::spawn(move || {
            let (ring, kernel) = &*server;
            let mut taken = Request::default();
            assert!(ring.take(0, &mut taken) && ring.begin(0), "submitted before the server ran");
            let begun = ring.claim(0, taken.word);
            if begun && !ring.is_canceled(0) {
                // Only a signal ends it.
                kernel.server.wait(|happened| happened.signals > 0);
            }
            ring.complete(0, taken.word, if begun { result(0) } else { EINTR });
        });
        let (ring, kernel) = &*shared;
        let withdrawn = ring.withdraw(0);
        if !withdrawn && ring.interrupt(0, Sent::BySource) {
            kernel.send_signal();
        }
        server.join().unwrap();
        let begun = ring.result(0).expect("it is complete") == result(0);
        assert_eq!(begun, !withdrawn, "begun, or withdrawn");
    });
}
