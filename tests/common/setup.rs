//! Processes that many tests begin with.

use farcall::host::local::Stdio;
use farcall::persist::{Place, SharedMemory};
use farcall::{Child, Local, Process};

use super::TestHome;

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
    let name = "one".parse().unwrap();
    let reserved = home.home.reserve(&name).unwrap();
    let child = root.child().spawn_persistent(reserved, SharedMemory::Refuse).await.unwrap();
    (child, home.home.place(&name))
}
