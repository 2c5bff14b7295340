//! The supervisor: starts processes and controllers, kills these, and compares what is left with what
//! must be.

use std::collections::BTreeMap;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use farcall::fault::POINTS;
use farcall::persist::{Home, Place};
use indicatif::ProgressBar;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::NAME;
use super::doing::doing;
use super::random::Random;
use super::running::Running;
use super::truth::{Tally, Truth};
use super::words::Word;
use crate::command::Failure;

/// How long a controller may take for something before that is a mismatch. No claim is about time.
const LIMIT: Duration = Duration::from_secs(40);
/// How long a controller is given to come to a point at which it is to die.
const POINT: Duration = Duration::from_secs(3);
/// A process is tortured for so many kills, and looked at after so many.
const PROCESS: u64 = 100;
const LOOK: u64 = 20;
/// One round in so many is about a controller that wakes up later, one about links that are lost, and one
/// about other controllers that come meanwhile.
const TURNS: u64 = 8;
/// So many controllers in a row may die before they have recovered. See `workload::UNCOUNTED`.
const UNRECOVERED: u32 = 2;
/// After so many failures nobody learns more from going on.
const FAILURES: u64 = 200;

pub struct Supervisor<'s> {
    directory: PathBuf,
    seed: u64,
    image: Option<PathBuf>,
    random: Random,
    stop: &'s AtomicBool,
    bar: &'s ProgressBar,
    pub kills: u64,
    pub tally: Tally,
    /// How often a controller died at which point.
    pub points: BTreeMap<&'static str, u64>,
    started: u64,
    processes: u64,
    process: Option<Tortured>,
    /// The next controller interrupts what the process is blocked in.
    blocked: bool,
    unrecovered: u32,
}

/// A process and its controllers.
struct Tortured {
    directory: PathBuf,
    place: Place,
    truth: Truth,
    /// It was started from an image here.
    child: Option<Child>,
    controllers: Vec<Running>,
    /// When it was made and when it was looked at last, in kills; failures there were then.
    since: u64,
    looked: u64,
    failures: u64,
}

impl Drop for Tortured {
    fn drop(&mut self) {
        self.controllers.clear();
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
        if let Some(state) = self.place.state() {
            let end = Instant::now() + LIMIT;
            while state.process.is_alive() && Instant::now() < end {
                let _ = kill(Pid::from_raw(state.process.pid), Signal::SIGKILL);
                thread::sleep(Duration::from_millis(1));
            }
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// From whom a process is taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Old {
    /// It works, or is stopped while it does.
    Works,
    /// The process is blocked in a call of its.
    Blocks,
    /// It is stopped, and goes on without hearing that it has lost the process.
    Deaf,
}

/// How a controller is run.
#[derive(Clone, Default)]
struct How<'h> {
    start: bool,
    take_over: bool,
    wait: bool,
    gentle: bool,
    check: bool,
    first: &'h str,
    fault: Option<(&'h str, u64)>,
}

impl<'s> Supervisor<'s> {
    pub fn new(
        directory: &Path,
        seed: u64,
        image: Option<PathBuf>,
        stop: &'s AtomicBool,
        bar: &'s ProgressBar,
    ) -> Self {
        Self {
            directory: directory.to_owned(),
            seed,
            image,
            random: Random::new(seed, u64::MAX),
            stop,
            bar,
            kills: 0,
            tally: Tally::default(),
            points: POINTS.iter().map(|point| (*point, 0)).collect(),
            started: 0,
            processes: 0,
            process: None,
            blocked: false,
            unrecovered: 0,
        }
    }

    /// Kills so many controllers.
    pub fn run(&mut self, kills: u64) -> Result<(), Failure> {
        let mut rounds = 0;
        while self.kills < kills && !self.stop.load(Ordering::Relaxed) {
            let point = if rounds % 2 == 1 {
                POINTS.get((rounds / 2) as usize % POINTS.len().max(1)).copied()
            } else {
                None
            };
            rounds += 1;
            // What grows is grown anew.
            let grows = point.is_some_and(|point| point.starts_with("registry."));
            self.have_a_process(grows)?;
            match point {
                Some(point) => self.die_at(point)?,
                None if rounds % TURNS == 1 => self.take_over(Old::Deaf)?,
                None if self.random.one_in(6) => {
                    let old = if self.random.one_in(10) { Old::Blocks } else { Old::Works };
                    self.take_over(old)?;
                }
                None => self.kill_one(rounds)?,
            }
            self.bar.set_position(self.kills.min(kills));
            self.look_if_due()?;
            if self.tally.failures() > FAILURES {
                break;
            }
        }
        self.look()?;
        self.end_process();
        Ok(())
    }

    fn tortured(&mut self) -> Result<&mut Tortured, Failure> {
        self.process.as_mut().ok_or_else(|| Failure::new("there is no process"))
    }

    fn end_process(&mut self) {
        if let Some(process) = self.process.take() {
            self.tally.calls += process.truth.calls();
        }
    }

    /// Starts a process if there is none.
    fn have_a_process(&mut self, new: bool) -> Result<(), Failure> {
        if new && self.process.is_some() {
            self.look()?;
            self.end_process();
        }
        if self.process.is_some() {
            return Ok(());
        }
        self.processes += 1;
        let directory = self.directory.join(self.processes.to_string());
        DirBuilder::new().mode(0o700).create(&directory)?;
        let place = Home::at(&directory).place(&NAME.parse().map_err(Failure::new)?);
        let child = match &self.image {
            Some(image) => {
                let mut command = Command::new(image);
                command.arg(place.socket()).stdin(Stdio::null()).stdout(Stdio::null());
                Some(command.spawn()?)
            }
            None => None,
        };
        let (since, failures) = (self.kills, self.tally.failures());
        let start = child.is_none();
        let truth = Truth::default();
        let controllers = Vec::new();
        let looked = since;
        self.process =
            Some(Tortured { directory, place, truth, child, controllers, since, looked, failures });
        (self.blocked, self.unrecovered) = (false, 0);
        if !start {
            let end = Instant::now() + LIMIT;
            while !self.tortured()?.place.is_listening() && Instant::now() < end {
                thread::sleep(Duration::from_millis(1));
            }
        }
        self.start(How { start, ..How::default() })?;
        self.wait_for(LIMIT, |all| all.iter().any(|one| one.recovered || one.ended.is_some()))?;
        // Set up altogether, or what follows is about nothing.
        let end = Instant::now() + LIMIT;
        while !self.tortured()?.truth.is_set_up() && Instant::now() < end {
            self.pump()?;
            if self.tortured()?.controllers.iter().all(|one| one.ended.is_some()) {
                break;
            }
            thread::sleep(Duration::from_millis(1));
        }
        self.kill_all()
    }

    fn start(&mut self, how: How<'_>) -> Result<(), Failure> {
        self.started += 1;
        let (id, seed) = (self.started, self.seed);
        let take_over = how.take_over || self.blocked;
        let image = self.image.clone();
        let process = self.tortured()?;
        let mut command = Command::new(env::current_exe()?);
        command.arg("torture-controller").arg(&process.directory);
        command.args(["--seed", &seed.to_string(), "--id", &id.to_string()]);
        for (flag, is_set) in [
            ("--start", how.start),
            ("--take-over", take_over),
            ("--wait", how.wait),
            ("--gentle", how.gentle),
            ("--check", how.check),
        ] {
            if is_set {
                command.arg(flag);
            }
        }
        if let Some(image) = image {
            command.arg("--image").arg(image);
        }
        if !how.first.is_empty() {
            command.args(["--first", how.first]);
        }
        command.env_remove("FARCALL_FAULT");
        if let Some((point, count)) = how.fault {
            command.env("FARCALL_FAULT", format!("{point}:{count}"));
        }
        let controller = Running::start(&mut command)?;
        process.controllers.push(controller);
        Ok(())
    }

    /// Hears what the controllers say. The last one is the one that holds the process, or is about to.
    fn pump(&mut self) -> Result<(), Failure> {
        let Self { process, tally, blocked, unrecovered, .. } = self;
        let Some(Tortured { truth, controllers, .. }) = process else { return Ok(()) };
        let Some((last, earlier)) = controllers.split_last_mut() else { return Ok(()) };
        for controller in earlier.iter_mut() {
            hear(controller, truth, tally)?;
        }
        for word in last.hear()? {
            match &word {
                Word::Recovered(_) => {
                    // What they have said of what was theirs.
                    for controller in earlier.iter_mut() {
                        hear(controller, truth, tally)?;
                    }
                    (last.recovered, *blocked, *unrecovered) = (true, false, 0);
                }
                Word::Ready => last.ready = true,
                Word::Begun => last.begun = true,
                Word::Over(why) if earlier.is_empty() || !last.recovered => {
                    last.over = true;
                    tally.mismatch(format!("nobody else has the process, but {why}"));
                }
                Word::Over(_) => last.over = true,
                Word::Own(fds) => last.own = Some(fds.clone()),
                _ => {}
            }
            let recovered = matches!(word, Word::Recovered(_));
            truth.hear(word, tally);
            if recovered {
                for controller in earlier.iter_mut() {
                    controller.lost_to.get_or_insert_with(|| truth.found.clone());
                }
            }
        }
        Ok(())
    }

    /// Waits until that is so of the controllers.
    fn wait_for(
        &mut self,
        limit: Duration,
        is: impl Fn(&[Running]) -> bool,
    ) -> Result<bool, Failure> {
        let end = Instant::now() + limit;
        loop {
            self.pump()?;
            if is(&self.tortured()?.controllers) {
                return Ok(true);
            }
            if Instant::now() > end || self.stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// Waits until the last controller has come so far. If it has not, that is a mismatch.
    fn expect(&mut self, what: &str, is: impl Fn(&Running) -> bool) -> Result<bool, Failure> {
        let of_last =
            |all: &[Running]| all.last().is_some_and(|one| is(one) || one.ended.is_some());
        let in_time = self.wait_for(LIMIT, of_last)?;
        let so = self.tortured()?.controllers.last().is_some_and(&is);
        if !so && !self.stop.load(Ordering::Relaxed) {
            let why = if in_time { "it has ended" } else { "nothing happens" };
            let last = self.tortured()?.controllers.last().map(Running::described);
            let last = last.unwrap_or_default();
            self.tally.mismatch(format!("a controller has not {what}: {why} {last}"));
        }
        Ok(so)
    }

    /// Kills all controllers, and hears what they have said.
    fn kill_all(&mut self) -> Result<(), Failure> {
        // The old ones first: the last one's word is the last.
        for controller in &mut self.tortured()?.controllers {
            controller.signal(Signal::SIGCONT);
            controller.kill()?;
        }
        self.pump()?;
        let process = self.tortured()?;
        let recovered = process.controllers.last().is_some_and(|one| one.recovered);
        process.controllers.clear();
        if !recovered {
            self.unrecovered += 1;
        }
        Ok(())
    }

    /// Kills a controller at any instant.
    fn kill_one(&mut self, rounds: u64) -> Result<(), Failure> {
        let loses_links = rounds % TURNS == 5;
        let has_guests = rounds % TURNS == 3;
        let first = match (loses_links, has_guests) {
            (true, _) => "cut,cut,cut",
            (_, true) => "guest,guest",
            _ => "",
        };
        let from_the_start =
            first.is_empty() && self.random.one_in(3) && self.unrecovered < UNRECOVERED;
        self.start(How { first, ..How::default() })?;
        let most = if loses_links || self.random.one_in(5) { 40_000 } else { 4_000 };
        if from_the_start {
            thread::sleep(Duration::from_micros(self.random.below(20_000)));
        } else if has_guests && !self.random.one_in(3) {
            self.expect("had guests", |one| one.begun)?;
        } else if has_guests {
            thread::sleep(Duration::from_micros(self.random.below(200_000)));
        } else if self.expect("recovered", |one| one.recovered)? {
            thread::sleep(Duration::from_micros(self.random.below(most)));
        }
        self.count_kill()?;
        self.kill_all()
    }

    /// Kills the last controller, which must not have ended before.
    fn count_kill(&mut self) -> Result<(), Failure> {
        self.pump()?;
        let Some(last) = self.tortured()?.controllers.last_mut() else { return Ok(()) };
        let said = last.over;
        let killed = last.kill()?;
        self.kills += u64::from(killed);
        if !killed && !said {
            self.tally.mismatch("a controller has ended by itself");
        }
        Ok(())
    }

    /// Lets a controller take the process over.
    fn take_over(&mut self, old: Old) -> Result<(), Failure> {
        let stops = old == Old::Deaf || self.random.one_in(2);
        let new_dies = old != Old::Deaf && self.random.one_in(3);
        let first = match old {
            Old::Works => "",
            Old::Blocks => "block",
            Old::Deaf => "deaf",
        };
        self.start(How { gentle: true, first, ..How::default() })?;
        let begins = |one: &Running| one.recovered && (one.ready || old != Old::Deaf);
        if !self.expect("begun", begins)? {
            return self.kill_all();
        }
        thread::sleep(Duration::from_micros(self.random.below(4_000)));
        if stops {
            self.signal_first(Signal::SIGSTOP)?;
        }
        // One by one in its own ring, past what the old one hands over in its, and many.
        let first = [vec!["append"; 50], vec!["ring"; 4]].concat().join(",");
        self.start(How { take_over: true, wait: true, first: &first, ..How::default() })?;
        self.blocked = old == Old::Blocks;
        if new_dies {
            thread::sleep(Duration::from_micros(self.random.below(12_000)));
        } else if self.expect("made a ring", |one| one.ready)? {
            self.signal_first(Signal::SIGCONT)?;
            if old == Old::Deaf {
                if let Some(old) = self.tortured()?.controllers.first_mut() {
                    old.go();
                }
                // Until it has handed over what reaches nobody.
                thread::sleep(Duration::from_millis(10));
            }
            if let Some(new) = self.tortured()?.controllers.last_mut() {
                new.go();
            }
            let over =
                |all: &[Running]| all.first().is_some_and(|one| one.over || one.ended.is_some());
            if !self.wait_for(LIMIT, over)? {
                let process = self.tortured()?;
                let all: Vec<String> = process.controllers.iter().map(Running::described).collect();
                let all = all.join("; then the next one, ");
                let pid = process.place.state().map_or(0, |state| state.process.pid);
                let it = doing(pid);
                self.tally.mismatch(format!(
                    "a controller does not hear that it has lost the process: {old:?}, {all}; and the \
                     process itself, {it}"
                ));
            }
            if old == Old::Deaf {
                // Past what reaches nobody. If it does not come there, what there is shows why.
                self.wait_for(POINT, |all| all.last().is_some_and(|one| one.begun))?;
            }
            thread::sleep(Duration::from_micros(self.random.below(4_000)));
        }
        self.count_kill()?;
        self.kill_all()
    }

    fn signal_first(&mut self, signal: Signal) -> Result<(), Failure> {
        if let Some(first) = self.tortured()?.controllers.first() {
            first.signal(signal);
        }
        Ok(())
    }

    /// Lets a controller die at that point.
    fn die_at(&mut self, point: &'static str) -> Result<(), Failure> {
        let interrupts = point == "takeover.interrupting";
        if self.unrecovered >= UNRECOVERED {
            self.start(How::default())?;
            self.expect("recovered", |one| one.recovered)?;
            self.kill_all()?;
        }
        if interrupts {
            self.start(How { gentle: true, first: "block", ..How::default() })?;
            self.expect("recovered", |one| one.recovered)?;
            thread::sleep(Duration::from_millis(20));
        }
        let first = match point.split('.').next() {
            Some("keep") => "bytes",
            Some("chain") => "file",
            Some("registry") => "grow",
            Some("release") => "release",
            Some("ring") => "ring",
            Some("reconnect") if point == "reconnect.renewed" => "guest",
            Some("reconnect") => "cut",
            Some("detach") => "detach",
            Some("child") => "named,child",
            Some("upgrade") => "upgrade",
            _ => "",
        };
        // Some of them are met while it recovers already, which is as good.
        let once = ["handshake", "takeover", "attach", "registry", "ring", "detach", "upgrade"];
        let early = once.iter().any(|part| point.starts_with(part));
        let count = if early { 1 } else { 1 + self.random.below(3) };
        let fault = Some((point, count));
        self.start(How { first, fault, take_over: interrupts, ..How::default() })?;
        self.blocked = interrupts;
        self.wait_for(POINT, |all| all.last().is_some_and(|one| one.ended.is_some()))?;
        let ended = self.tortured()?.controllers.last().and_then(|one| one.ended);
        if ended == Some(Signal::SIGKILL as i32) {
            *self.points.entry(point).or_default() += 1;
            self.kills += 1;
        } else {
            self.count_kill()?;
        }
        self.kill_all()
    }

    /// Looks at the process now and then, and after a failure, when it is given up.
    fn look_if_due(&mut self) -> Result<(), Failure> {
        let (kills, failures) = (self.kills, self.tally.failures());
        let process = self.tortured()?;
        let has_failed = failures > process.failures;
        if kills >= process.looked + LOOK || has_failed {
            process.looked = kills;
            self.look()?;
        }
        let failures = self.tally.failures();
        let process = self.tortured()?;
        if failures > process.failures || kills >= process.since + PROCESS {
            self.end_process();
        }
        self.tell();
        Ok(())
    }

    /// Compares what there is with what must be.
    fn look(&mut self) -> Result<(), Failure> {
        if self.process.is_none() {
            return Ok(());
        }
        self.start(How { check: true, ..How::default() })?;
        if self.expect("recovered and stopped", |one| one.own.is_some())? {
            let Self { process, tally, .. } = self;
            let Some(process) = process else { return Ok(()) };
            if let Some(last) = process.controllers.last_mut() {
                let own = last.own.take().unwrap_or_default();
                process.truth.compare(&own, &process.directory, tally)?;
                last.go();
            }
            self.expect("ended", |one| one.ended.is_some())?;
        }
        self.kill_all()?;
        self.tell();
        Ok(())
    }

    fn tell(&mut self) {
        for line in self.tally.told.drain(..) {
            let kills = self.kills;
            self.bar.suspend(|| eprintln!("after {kills} kills: {line}"));
        }
    }
}

/// Hears one that another one may have followed.
fn hear(controller: &mut Running, truth: &mut Truth, tally: &mut Tally) -> Result<(), Failure> {
    for word in controller.hear()? {
        controller.over |= matches!(word, Word::Over(_));
        match controller.lost_to.clone() {
            Some(found) => truth.hear_late(word, &found, tally),
            None => truth.hear(word, tally),
        }
    }
    Ok(())
}
