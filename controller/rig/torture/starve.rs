//! A controller under torture that has no descriptor free, or few: what needs one says so, and the process
//! answers the next call.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use farcall::Error;
use farcall::link::Polling;
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::workload::{Link, Workload};

/// How many descriptors this process may have meanwhile.
const MOST: u64 = 64;
/// With so many free all that is done here works.
const ENOUGH: u64 = 12;

/// All of this process's descriptors but a few are in use until it is dropped.
struct Full {
    taken: Vec<OwnedFd>,
    limit: (u64, u64),
}

impl Full {
    fn but(free: usize) -> io::Result<Self> {
        let limit = getrlimit(Resource::RLIMIT_NOFILE)?;
        let mut full = Self { taken: vec![File::open("/dev/null")?.into()], limit };
        setrlimit(Resource::RLIMIT_NOFILE, MOST.min(limit.0), limit.1)?;
        while let Some(Ok(fd)) = full.taken.first().map(OwnedFd::try_clone) {
            full.taken.push(fd);
        }
        full.taken.truncate(full.taken.len().saturating_sub(free));
        Ok(full)
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, self.limit.0, self.limit.1);
    }
}

/// Whether it worked; an error that says that no descriptor was free is none.
fn worked(result: Result<(), Error>) -> Result<bool, Error> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.errno() == Some(Errno::EMFILE) => Ok(false),
        Err(error) if error.to_string().contains(Errno::EMFILE.desc()) => Ok(false),
        Err(error) => Err(error),
    }
}

impl Workload {
    /// Passes descriptors, makes a ring and attaches again with few descriptors free, and goes on.
    pub(super) async fn starve(&mut self) -> Result<(), Error> {
        let free = self.random.below(ENOUGH) as usize;
        let failed = |source| Error::Io { context: "filling the table", source };
        let full = Full::but(free).map_err(failed)?;
        let fetched = self.process.fetch_fd(&self.file).await.map(drop);
        let ring = self.process.enter_ring(Polling::Adaptive).await;
        let attached = match self.gentle {
            true => Ok(()),
            false => self.process.reconnect().await,
        };
        drop(full);
        worked(fetched)?;
        worked(ring)?;
        if !worked(attached)? {
            self.process.reconnect().await?;
        }
        self.append(1, Link::Same).await
    }
}
