//! Processes that many tests begin with.

use farcall::host::local::Stdio;
use farcall::persist::{Attach, Home, Place, SharedMemory};
use farcall::{Child, Local, Process, Result};

use super::{LIMIT, TestHome};

/// A root server without standard streams.
pub async fn root() -> Process {
    Local::new().stdio(Stdio::Null).start().await.unwrap()
}

/// Root servers of both versions of the stream.
pub async fn roots() -> [Process; 2] {
    let root = |version| Local::new().stdio(Stdio::Null).stream_version(version).start();
    let roots = [root(1).await.unwrap(), root(0).await.unwrap()];
    assert_eq!(roots.each_ref().map(|root| root.connection().version()), [1, 0]);
    roots
}

/// A persistent process "one", and where the next controller finds it.
pub async fn persistent(home: &TestHome, root: &Process) -> (Child, Place) {
    (spawn_persistent(&home.home, root).await, home.home.place(&"one".parse().unwrap()))
}

/// The same where that is known.
pub async fn spawn_persistent(home: &Home, root: &Process) -> Child {
    let reserved = home.reserve(&"one".parse().unwrap()).unwrap();
    root.child().spawn_persistent(reserved, SharedMemory::Refuse).await.unwrap()
}

/// Attaches to a persistent process, which an emulated machine may keep from answering for more than the ten
/// seconds that are the default.
pub async fn attach(place: Place) -> Result<Process> {
    Attach::default().timeout(LIMIT).to(place).await
}

/// A root server whose children get no ring unless they ask for one.
pub async fn root_without_rings() -> Process {
    Local::new().polling(None).stdio(Stdio::Null).start().await.unwrap()
}

/// Sets the soft limit on a process's descriptors, and returns what it was. (0 is this process, and only
/// for a test that is alone in it.)
pub fn limit_descriptors(pid: i32, soft: u64) -> u64 {
    use nix::libc::{RLIMIT_NOFILE, prlimit, rlimit};
    let mut limit = rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both pointers are to a struct of that kind, or null.
    unsafe {
        assert_eq!(prlimit(pid, RLIMIT_NOFILE, std::ptr::null(), &mut limit), 0);
        let new = rlimit { rlim_cur: soft, ..limit };
        assert_eq!(prlimit(pid, RLIMIT_NOFILE, &new, std::ptr::null_mut()), 0);
    }
    limit.rlim_cur
}
