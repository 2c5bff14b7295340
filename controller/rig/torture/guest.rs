//! Another controller that has the process between two links of one under torture: what the first one had
//! begun is not executed after it, and nothing that it did is undone.

use std::collections::BTreeSet;
use std::future::poll_fn;
use std::task::Poll;
use std::time::Duration;

use farcall::link::Polling;
use farcall::persist::{Attach, Place, attach};
use farcall::{Error, Outcome, Process};
use nix::fcntl::OFlag;

use super::recover::recover;
use super::words::{Word, say};
use super::workload::{
    LINK, Op, PAUSE, RANDOM, Step, TOGETHER, UNCOUNTED, Workload, append, bytes, cut, open,
    poll_all,
};

/// The most that one does besides finding out what there is.
const MOST: u64 = 8;

/// How long the process is given to answer before one comes.
const ASKED: Duration = Duration::from_millis(10);

/// What one is to be.
struct Guest {
    place: Place,
    id: u64,
    seed: u64,
    image: Option<Vec<u8>>,
    /// How many names have been given.
    made: u64,
}

/// What one has found.
struct Found {
    /// The number of the next record.
    next: u64,
    names: BTreeSet<String>,
}

impl Workload {
    /// Loses the link while records are appended, names given and one given up. Another controller attaches,
    /// and works. When this one is back, each call must have been told what the other one has found.
    pub(super) async fn guest(&mut self) -> Result<(), Error> {
        if self.random.one_in(2) {
            // What it hands over then lies in memory that the other one unmaps.
            self.process.enter_ring(Polling::Adaptive).await?;
        }
        let flags = OFlag::O_CREAT | OFlag::O_RDWR;
        let unnamed = open(&self.process, None, &self.directory.join("unnamed"), flags).await?;
        let first = self.next;
        say(&Word::Appending(first + TOGETHER - 1));
        let (kept, opened) = (self.new_name("bytes"), self.new_name("file"));
        self.keeping(&[&kept, &opened], 0);
        let given = self.one_of(&["bytes", "big", "file"]);
        given.iter().for_each(|name| say(&Word::Giving(name.clone())));

        let seed = self.random.below(u64::MAX);
        let (place, image) = (self.place.clone(), self.image.clone());
        let guest = Guest { place, id: self.id, seed, image, made: self.made };
        let hears_of_nobody = self.random.one_in(2);
        let process = self.process.clone();
        let contents = bytes(&kept, 0);
        let path = self.directory.join(format!("kept-{opened}"));
        let mut steps: Vec<Option<Step<'_>>> = vec![Some(Box::pin(process.nanosleep(PAUSE)))];
        for number in first..first + TOGETHER {
            steps.push(Some(Box::pin(append(&process, &self.file, number))));
        }
        steps.push(Some(Box::pin(process.keep_bytes(&kept, &contents))));
        let open = open(&process, Some(&opened), &path, flags);
        steps.push(Some(Box::pin(async { open.await.map(drop) })));
        if let Some(name) = &given {
            steps.push(Some(Box::pin(process.release(name))));
        }
        let mut results = poll_fn(|context| Poll::Ready(poll_all(&mut steps, context))).await;
        cut(&process);
        if hears_of_nobody {
            // The process is asked who has it when the link is lost, and in most cases nobody has it yet.
            tokio::time::sleep(ASKED).await;
        }
        let (found, made) = guest.comes_and_goes().await?;
        process.reconnect().await?;
        poll_fn(|context| {
            results.extend(poll_all(&mut steps, context));
            if steps.iter().all(Option::is_none) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        drop(steps);

        for (place, result) in results {
            let number = first + (place as u64).saturating_sub(1);
            let is_there = match place as u64 {
                0 => continue,
                record if record <= TOGETHER => number < found.next,
                place if place == TOGETHER + 1 => found.names.contains(&kept),
                place if place == TOGETHER + 2 => found.names.contains(&opened),
                _ => given.as_ref().is_some_and(|name| !found.names.contains(name)),
            };
            check(place, &result, is_there)?;
        }
        if self.file.is_stale() {
            say(&Word::Wrong("the file of records has its name, and its handle is stale".into()));
        }
        if !unnamed.is_stale() {
            say(&Word::Wrong("a handle is not stale though it has no name".into()));
        }
        // It begins anew, as the other one did.
        self.made = made;
        say(&Word::Process(self.process.pid().unwrap_or_default()));
        let recovered = recover(&self.process, &self.place).await?;
        self.next = recovered.next;
        self.names = recovered.names.into_iter().collect();
        self.uncounted = UNCOUNTED;
        Ok(())
    }
}

impl Guest {
    /// Attaches, finds out what there is, works, and leaves. Returns what it has found, and how many names
    /// have been given by then.
    async fn comes_and_goes(self) -> Result<(Found, u64), Error> {
        let Self { place, id, seed, image, made } = self;
        // If the link could not be cut, it is taken.
        let process: Process = match attach(place.clone()).await {
            Err(Error::Held { .. }) => Attach::default().take_over().to(place.clone()).await?,
            attached => attached?,
        };
        say(&Word::Process(process.pid().unwrap_or_default()));
        let recovered = recover(&process, &place).await?;
        let names = recovered.names.iter().map(|(name, _)| name.clone()).collect();
        let found = Found { next: recovered.next, names };
        let mut work = Workload::new(&process, &place, recovered, (id, true), seed, image).await?;
        work.made = made;
        for _ in 0..work.random.below(MOST) {
            let op = *work.random.pick(RANDOM).unwrap_or(&Op::Append);
            if !LINK.contains(&op) {
                work.execute(op).await?;
            }
        }
        process.prepare_for_reconnect().await?;
        Ok((found, work.made))
    }
}

/// What a call has been told is what has been found.
fn check(place: usize, result: &Result<(), Error>, is_there: bool) -> Result<(), Error> {
    let outcome = match result {
        Ok(()) => Some(Outcome::Executed),
        Err(error) => error.outcome(),
    };
    let is_true = match outcome {
        Some(Outcome::Executed) => is_there,
        Some(Outcome::NotExecuted) => !is_there,
        Some(Outcome::PossiblyExecuted) => {
            say(&Word::Lost(format!("step {place}: {result:?}")));
            return Ok(());
        }
        None => true,
    };
    if !is_true {
        say(&Word::Wrong(format!(
            "step {place} was told {result:?}, and another controller has found {}",
            if is_there { "it done" } else { "nothing of it" }
        )));
    }
    match result {
        Err(error) if outcome.is_none() => {
            Err(Error::Attach { path: "a guest".into(), reason: error.to_string() })
        }
        _ => Ok(()),
    }
}
