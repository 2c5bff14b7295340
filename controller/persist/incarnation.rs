//! Which process a pid in NAME.json means, and whether that process still runs.
//!
//! A pid means something in one pid namespace only, and /proc/PID/stat tells the start as the reader's
//! time namespace counts it. So a record says whose pids it has, and counts time as the machine does.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use nix::libc;
use nix::unistd::{SysconfVar, sysconf};
use serde::{Deserialize, Serialize};

/// A process, told from later ones with the same pid.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incarnation {
    /// Its pid, as the process that wrote this saw it.
    pub pid: i32,
    /// When it started, in clock ticks since boot: field 22 of /proc/PID/stat, without what the
    /// reader's time namespace adds.
    pub start_time: u64,
    /// The pid namespace in which it has that pid: the inode of /proc/self/ns/pid. None: an older
    /// farcall wrote this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid_ns: Option<u64>,
}

impl Incarnation {
    /// The process that has this pid now, if this process's /proc can tell: it has to be that of its
    /// own pid namespace.
    #[must_use]
    pub fn of(pid: i32) -> Option<Self> {
        Sight::of_this_process().ok()??.look(pid).ok()?
    }

    /// The same for one that is to be written down: where nothing could be looked at, for want of a
    /// descriptor or memory, that is an error and not the end of the process.
    pub(super) fn found(pid: i32) -> io::Result<Option<Self>> {
        Sight::of_this_process()?.map_or(Ok(None), |sight| sight.look(pid))
    }

    /// Whether it still runs; `None` if its number says nothing here: it is one of another pid
    /// namespace, there is no /proc of this one, or it can't be looked at just now.
    #[must_use]
    pub fn judge(&self) -> Option<bool> {
        let sight = Sight::of_this_process().ok()??;
        if self.pid <= 0 || self.pid_ns.is_some_and(|ns| ns != sight.pid_ns) {
            return None;
        }
        // Time namespaces with fractions of a tick round differently.
        let same = |now: Self| now.start_time.abs_diff(self.start_time) <= 1;
        let runs = sight.look(self.pid).ok()?.is_some_and(same);
        // A record without a namespace may be of another one.
        if runs || self.pid_ns.is_some() { Some(runs) } else { None }
    }

    /// Whether it is known to run still.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.judge() == Some(true)
    }

    /// Whether it is known to run no more.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.judge() == Some(false)
    }

    /// How long it has been running.
    #[must_use]
    pub fn age(&self) -> Option<Duration> {
        let text = fs::read_to_string("/proc/uptime").ok()?;
        let uptime: f64 = text.split_whitespace().next()?.parse().ok()?;
        let sight = Sight::of_this_process().ok()??;
        let started = self.start_time.checked_add_signed(sight.boot_offset)?;
        let age = uptime - started as f64 / ticks_per_second()? as f64;
        Some(Duration::from_secs_f64(age.max(0.0)))
    }
}

/// What numbers in /proc mean to this process.
struct Sight {
    pid_ns: u64,
    /// What its time namespace adds to the machine's time since boot, in clock ticks.
    boot_offset: i64,
}

impl Sight {
    /// `None`: /proc tells nothing that holds here.
    fn of_this_process() -> io::Result<Option<Self>> {
        let Some(status) = if_there_is(fs::read_to_string("/proc/self/status"))? else {
            return Ok(None);
        };
        // One number a pid namespace, from that of /proc down to the process's own. Kernels before
        // 4.1 have no such line.
        let pids = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
        if pids.is_some_and(|pids| pids.split_whitespace().count() != 1) {
            return Ok(None);
        }
        let pid_ns = if_there_is(fs::metadata("/proc/self/ns/pid"))?;
        let sight = |(pid_ns, boot_offset)| Self { pid_ns, boot_offset };
        Ok(pid_ns.map(|pid_ns| pid_ns.ino()).zip(boot_offset()?).map(sight))
    }

    /// `None`: there is no such process, or it has ended.
    fn look(&self, pid: i32) -> io::Result<Option<Incarnation>> {
        let stat = if_there_is(fs::read_to_string(format!("/proc/{pid}/stat")))?;
        Ok(stat.and_then(|stat| self.parse(pid, &stat)))
    }

    fn parse(&self, pid: i32, stat: &str) -> Option<Incarnation> {
        // The name, in parentheses, may contain anything; the state follows it, then field 4.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        if *fields.first()? == "Z" || *fields.first()? == "X" {
            return None;
        }
        let start_time: u64 = fields.get(19)?.parse().ok()?;
        let start_time = start_time.checked_add_signed(-self.boot_offset)?;
        Some(Incarnation { pid, start_time, pid_ns: Some(self.pid_ns) })
    }
}

/// What is in a file of /proc. `None`: the file is not there, is nobody's to read, or its process has ended.
/// That there are no descriptors or no memory to read it says nothing of that.
fn if_there_is<T>(read: io::Result<T>) -> io::Result<Option<T>> {
    match read {
        Err(error) if is_of_this_process(&error) => Err(error),
        read => Ok(read.ok()),
    }
}

fn is_of_this_process(error: &io::Error) -> bool {
    const OURS: [i32; 3] = [libc::EMFILE, libc::ENFILE, libc::ENOMEM];
    error.raw_os_error().is_some_and(|errno| OURS.contains(&errno))
}

/// What the time namespace adds to the time since boot. `None`: the process is about to leave its
/// namespace with its next child, and nobody tells what its own adds.
fn boot_offset() -> io::Result<Option<i64>> {
    let Some(own) = if_there_is(fs::metadata("/proc/self/ns/time"))? else { return Ok(Some(0)) };
    let next = if_there_is(fs::metadata("/proc/self/ns/time_for_children"))?;
    if next.is_none_or(|next| next.ino() != own.ino()) {
        return Ok(None);
    }
    let text = if_there_is(fs::read_to_string("/proc/self/timens_offsets"))?;
    Ok(text.and_then(|text| ticks_of_boottime(&text)))
}

fn ticks_of_boottime(offsets: &str) -> Option<i64> {
    let boottime = offsets.lines().find_map(|line| line.strip_prefix("boottime"))?;
    let mut numbers = boottime.split_whitespace().map(str::parse::<i64>);
    let (seconds, nanoseconds) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    let ticks = ticks_per_second()?;
    seconds.checked_mul(ticks)?.checked_add(nanoseconds / (1_000_000_000 / ticks))
}

fn ticks_per_second() -> Option<i64> {
    sysconf(SysconfVar::CLK_TCK).ok()?.filter(|ticks| *ticks > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What one says of this process, changed so.
    fn judged(change: impl FnOnce(&mut Incarnation)) -> Option<bool> {
        let mut record = Incarnation::of(std::process::id() as i32).unwrap();
        change(&mut record);
        record.judge()
    }

    #[test]
    fn numbers_are_judged_in_their_own_namespace_alone() {
        assert_eq!(judged(|_| {}), Some(true));
        assert_eq!(judged(|record| record.start_time += 100), Some(false));
        assert_eq!(judged(|record| record.pid_ns = Some(1)), None);
    }

    #[test]
    fn numbers_without_a_namespace_say_that_a_process_runs_and_not_that_it_has_ended() {
        let old = |record: &mut Incarnation| {
            let mut json = serde_json::to_value(&*record).unwrap();
            json.as_object_mut().unwrap().remove("pid_ns").unwrap();
            *record = serde_json::from_value(json).unwrap();
        };
        assert_eq!(judged(old), Some(true));
        let other = |record: &mut Incarnation| {
            old(record);
            record.start_time += 100;
        };
        assert_eq!(judged(other), None, "it may be one of another namespace");
    }
}
