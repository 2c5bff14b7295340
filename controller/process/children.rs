//! The children that a process has, whoever made them, and their exit statuses: nothing is reaped that
//! nobody has asked to be.

use std::collections::BTreeSet;
use std::fs;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use nix::errno::Errno;
use nix::libc;

use super::Process;
use crate::calls::handle::{Fd, kind};
use crate::calls::{SIGINFO_SIZE, WaitStatus, pid_of_siginfo, waitid};
use crate::error::{Error, Result};
use crate::proto::Call;

/// The children of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Children {
    /// Those that are known, in the order of their pids.
    pub known: Vec<ListedChild>,
    /// Whether these are all. They are not where neither the process nor this one has a /proc that
    /// lists them: then they are those that have names, and one that has ended, if any has.
    pub complete: bool,
}

/// A child of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListedChild {
    /// Its pid, in the process's own pid namespace.
    pub pid: i32,
    /// Whether it runs.
    pub state: ChildState,
}

/// What has become of a child that has not been reaped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChildState {
    /// It has not ended.
    Lives,
    /// It has ended, and keeps its status until it is reaped.
    Ended(WaitStatus),
    /// It has ended with status 0 and never executed a program. A child that was made and served until
    /// its controller was gone ends so: that is no success of a program's.
    ///
    /// What has executed a program is told by proc_pid_stat(5), the process's own or this one's. Where
    /// neither has it, this state is told as [`ChildState::Ended`].
    NeverExecuted,
}

impl ChildState {
    /// The status that it keeps, if it has ended.
    #[must_use]
    pub fn status(self) -> Option<WaitStatus> {
        match self {
            Self::Lives => None,
            Self::Ended(status) => Some(status),
            Self::NeverExecuted => Some(WaitStatus::Exited(0)),
        }
    }
}

impl std::fmt::Display for ChildState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Lives => f.write_str("lives"),
            Self::Ended(status) => write!(f, "{status}"),
            Self::NeverExecuted => f.write_str("never executed a program"),
        }
    }
}

/// The statuses of children that were reaped for somebody who does not wait for them any more.
#[derive(Debug, Default)]
pub(super) struct Untold(Mutex<Vec<Reaped>>);

#[derive(Debug)]
struct Reaped {
    pid: i32,
    status: WaitStatus,
    /// That of [`Process::tenure`] in which it was reaped: later the pid may be another child's.
    tenure: usize,
    /// Whoever it is for, as long as that one waits.
    waits: Weak<()>,
}

impl Children {
    fn first_ended(&self) -> Option<i32> {
        self.known.iter().find(|child| child.state.status().is_some()).map(|child| child.pid)
    }
}

/// What waitid(2) says of a pid that is no child's.
const NO_CHILD: Error = Error::Call { call: "waitid", errno: Errno::ECHILD };

/// How many children are looked at together: two calls for each.
const AT_ONCE: usize = 32;

impl Untold {
    fn take(&self, which: impl Fn(&Reaped) -> bool) -> Option<(i32, WaitStatus)> {
        let mut reaped = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let place = reaped.iter().position(which)?;
        let Reaped { pid, status, .. } = reaped.remove(place);
        Some((pid, status))
    }

    /// One that nobody waits for.
    fn abandoned(&self, which: impl Fn(&Reaped) -> bool) -> Option<(i32, WaitStatus)> {
        self.take(|reaped| reaped.waits.strong_count() == 0 && which(reaped))
    }

    fn put(&self, reaped: Reaped) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(reaped);
    }
}

impl Process {
    /// The children of the process with what has become of them: those that it has made itself, and,
    /// where it is a [subreaper](crate::calls::Task::set_child_subreaper) or process 1 of a pid namespace,
    /// those that it got when their parents ended. None is reaped: who wants to lose no status whatever
    /// happens writes down what this tells, and reaps then.
    ///
    /// They are read from the process's own /proc, else from this one's: proc_tid_children(5), which
    /// the kernel may be built without; and looked at by waitid(2) with WNOWAIT.
    ///
    /// # Errors
    ///
    /// Those of the calls.
    pub async fn children(&self) -> Result<Children> {
        let (pids, complete) = match self.children_by_its_proc().await? {
            Some(pids) => (pids, true),
            None => match self.children_here() {
                Some(pids) => (pids.into_iter().map(|(own, _)| own).collect(), true),
                None => (self.children_by_waiting().await?, false),
            },
        };
        let pids: Vec<i32> = pids.into_iter().collect();
        let mut known = Vec::new();
        for some in pids.chunks(AT_ONCE) {
            known.extend(self.look_at(some).await?);
        }
        self.tell_executed(&mut known).await;
        Ok(Children { known, complete })
    }

    /// Tells those that never executed a program from others that exited with 0, where /proc does. Which
    /// /proc that is is found out once.
    async fn tell_executed(&self, children: &mut [ListedChild]) {
        let zero = ChildState::Ended(WaitStatus::Exited(0));
        if children.iter().all(|child| child.state != zero) {
            return;
        }
        // None: the process's own.
        let here = match self.is_in_its_proc().await {
            Ok(true) => None,
            _ => Some(self.children_here().unwrap_or_default()),
        };
        for child in children {
            if child.state == zero
                && self.has_executed(child.pid, here.as_deref()).await == Some(false)
            {
                child.state = ChildState::NeverExecuted;
            }
        }
    }

    /// Whether a child of that pid has executed a program, if the process's own /proc tells, or this
    /// one's, in which children have the second of these pids.
    async fn has_executed(&self, pid: i32, here: Option<&[(i32, i32)]>) -> Option<bool> {
        let stat = match here {
            None => self.text_of(&format!("/proc/{pid}/stat")).await.ok()?,
            Some(pids) => {
                let (_, here) = pids.iter().find(|(own, _)| *own == pid)?;
                fs::read_to_string(format!("/proc/{here}/stat")).ok()?
            }
        };
        /// Forked, and has not executed: linux/sched.h.
        const PF_FORKNOEXEC: u32 = 0x40;
        // What is behind the name, in which anything can be: the state, five numbers, the flags.
        let flags = stat.rsplit_once(')')?.1.split_whitespace().nth(6)?.parse::<u32>().ok()?;
        Some(flags & PF_FORKNOEXEC == 0)
    }

    /// What has become of the child with that pid, which is not reaped: waitid(2) with WNOWAIT.
    ///
    /// # Errors
    ///
    /// ECHILD if the process has no such child.
    pub async fn child_state(&self, pid: i32) -> Result<ChildState> {
        let mut children = self.look_at(&[pid]).await?;
        self.tell_executed(&mut children).await;
        Ok(children.first().ok_or(NO_CHILD)?.state)
    }

    /// Reaps one of the children that have ended, and tells its pid and its status; none if there is no
    /// such child: waitid(2) with WNOHANG. Stops of children that the process traces, see ptrace(2), stay
    /// for whoever waits for them; where one has stopped and there is no /proc that lists children, those
    /// that ended behind it and have no name are not found.
    ///
    /// If this is dropped while it is under way, the status is not lost with it: the next that asks
    /// in this controller is told.
    ///
    /// # Errors
    ///
    /// What became of the connection: a status may be lost with that.
    pub async fn reap_any(&self) -> Result<Option<(i32, WaitStatus)>> {
        if let Some(reaped) = self.inner().untold.abandoned(|_| true) {
            return Ok(Some(reaped));
        }
        let process = self.in_this_tenure();
        loop {
            let pid = match process.first_to_tell().await? {
                None => return Ok(None),
                Some((pid, true)) => Some(pid),
                // A stop, which the kernel tells of until it is taken, whatever is asked for.
                Some((_, false)) => process.children().await?.first_ended(),
            };
            let Some(pid) = pid else { return Ok(None) };
            match process.reap_one(libc::P_PID, pid as u64).await {
                // Somebody else was faster.
                Ok(None) | Err(Error::Call { errno: Errno::ECHILD, .. }) => {}
                reaped => return reaped,
            }
        }
    }

    /// The child that waitid(2) tells of first, and whether that has ended: it may only have stopped.
    async fn first_to_tell(&self) -> Result<Option<(i32, bool)>> {
        let call = |at| waitid(libc::P_ALL, 0, at, libc::WNOWAIT);
        let told = self.call_fills("waitid", SIGINFO_SIZE, call, |info| {
            let pid = pid_of_siginfo(&info);
            (pid != 0).then(|| (pid, WaitStatus::from_siginfo(&info).is_some()))
        });
        match told.await {
            Err(Error::Call { errno: Errno::ECHILD, .. }) => Ok(None),
            told => told,
        }
    }

    /// Reaps the child with that pid, behind a pidfd of its own.
    pub(super) async fn reap_pidfd(&self, pidfd: &Fd) -> Result<WaitStatus> {
        let reaped = self.reap_one(libc::P_PIDFD, self.number(pidfd)?).await?;
        let (_, status) = reaped.ok_or(Error::Protocol("a child that ended can't be reaped"))?;
        Ok(status)
    }

    /// The status of a child that was reaped for somebody who has not waited for it.
    pub(super) fn untold(&self, pid: i32) -> Option<WaitStatus> {
        let tenure = self.tenure();
        let is_it = |reaped: &Reaped| (reaped.pid, reaped.tenure) == (pid, tenure);
        self.inner().untold.abandoned(is_it).map(|(_, status)| status)
    }

    /// Reaps a child that has ended: of one that is traced and has stopped the stop would be taken.
    async fn reap_one(&self, kind: libc::idtype_t, id: u64) -> Result<Option<(i32, WaitStatus)>> {
        let waits = Arc::new(());
        let (untold, weak) = (self.inner().untold.clone(), Arc::downgrade(&waits));
        let tenure = self.tenure();
        let call = |at| waitid(kind, id, at, 0);
        self.call_fills("waitid", SIGINFO_SIZE, call, move |info| {
            if let Some(status) = WaitStatus::from_siginfo(&info) {
                untold.put(Reaped { pid: pid_of_siginfo(&info), status, tenure, waits: weak });
            }
        })
        .await?;
        let mine = Arc::downgrade(&waits);
        Ok(self.inner().untold.take(|reaped| reaped.waits.ptr_eq(&mine)))
    }

    /// Those of the pids that are children's.
    async fn look_at(&self, pids: &[i32]) -> Result<Vec<ListedChild>> {
        let buffer = self.buffer(pids.len() * SIGINFO_SIZE).await?;
        let mut calls = Vec::new();
        for (place, pid) in pids.iter().enumerate() {
            let at = buffer.address() + (place * SIGINFO_SIZE) as u64;
            calls.push(waitid(libc::P_PID, *pid as u64, at, libc::WNOWAIT));
            calls.push(Call::copy_out(at, SIGINFO_SIZE));
        }
        let pids = pids.to_vec();
        self.connection
            .submit(calls, move |replies| {
                let _buffer = buffer;
                let mut children = Vec::new();
                for (pid, replies) in pids.into_iter().zip(replies.chunks_exact(2)) {
                    match replies[0].value() {
                        Ok(_) => {}
                        // It has been reaped meanwhile, or is another one's.
                        Err(Errno::ECHILD) => continue,
                        Err(errno) => return Err(Error::Call { call: "waitid", errno }),
                    }
                    replies[1].value().map_err(Error::call("COPY_OUT"))?;
                    let state = WaitStatus::from_siginfo(&replies[1].data)
                        .map_or(ChildState::Lives, ChildState::Ended);
                    children.push(ListedChild { pid, state });
                }
                Ok(children)
            })
            .await
    }

    /// Whether the process has a /proc of its own pid namespace.
    async fn is_in_its_proc(&self) -> Result<bool> {
        Ok(pids_by_namespace(&self.text_of("/proc/self/status").await?).len() == 1)
    }

    /// Those that the process's own /proc lists, if it is one of its own pid namespace.
    async fn children_by_its_proc(&self) -> Result<Option<BTreeSet<i32>>> {
        let read = async {
            if !self.is_in_its_proc().await? {
                return Ok(None);
            }
            let mut pids = BTreeSet::new();
            for thread in self.numbers_in("/proc/self/task").await? {
                pids.extend(numbers(
                    &self.text_of(&format!("/proc/self/task/{thread}/children")).await?,
                ));
            }
            Ok(Some(pids))
        };
        match read.await {
            // There is no /proc, or not this file of it.
            Err(Error::Call { .. } | Error::Chain(_)) => Ok(None),
            pids => pids,
        }
    }

    /// Those that /proc lists here, with their pids in the process's pid namespace and here, which
    /// their statuses tell.
    fn children_here(&self) -> Option<Vec<(i32, i32)>> {
        let pid = self.pid()?;
        let status = |pid: i32| fs::read_to_string(format!("/proc/{pid}/status")).ok();
        // In this one's pid namespace, in those below it, in its own.
        let own = pids_by_namespace(&status(pid)?).len().checked_sub(1)?;
        let mut pids = Vec::new();
        for thread in fs::read_dir(format!("/proc/{pid}/task")).ok()? {
            let list = fs::read_to_string(thread.ok()?.path().join("children")).ok()?;
            // One without a status has been reaped meanwhile.
            let all = numbers(&list).filter_map(|here| Some((status(here)?, here)));
            let in_own =
                |(status, here): (String, i32)| Some((*pids_by_namespace(&status).get(own)?, here));
            pids.extend(all.filter_map(in_own));
        }
        Some(pids)
    }

    /// One that has ended, if any has, and those that have names.
    async fn children_by_waiting(&self) -> Result<BTreeSet<i32>> {
        let mut pids = BTreeSet::new();
        if self.is_persistent() {
            let kept = self.kept().await?;
            let named = kept.values().filter(|kept| kept.entry.kind == kind::CHILD);
            pids.extend(named.map(|kept| kept.entry.value as i32));
        }
        pids.extend(self.first_to_tell().await?.map(|(pid, _)| pid));
        Ok(pids)
    }
}

/// The pids of a process in the pid namespaces that it is in, from the one of the /proc that tells them
/// to its own: NSpid of proc_pid_status(5).
fn pids_by_namespace(status: &str) -> Vec<i32> {
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    numbers(line.unwrap_or_default()).collect()
}

fn numbers(text: &str) -> impl Iterator<Item = i32> {
    text.split_whitespace().filter_map(|number| number.parse().ok())
}
