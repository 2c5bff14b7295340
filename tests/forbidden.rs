//! Calls that a seccomp filter forbids, as container runtimes and old kernels do: what goes on without
//! them, and what is said where nothing does.

use farcall::call::Polling;
use farcall::host::local::Stdio;
use farcall::persist::{SharedMemory, attach};
use farcall::sys::Sysno;
use farcall::{Error, Local, Process};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;

use crate::common::{TestHome, deny, fds};

async fn root() -> Process {
    Local::new().stdio(Stdio::Null).start().await.unwrap()
}

#[tokio::test]
async fn a_process_becomes_persistent_where_unshare_is_forbidden() {
    let test = TestHome::new();
    let root = root().await;
    deny(&root, Sysno::unshare, None, Errno::EPERM).await;
    let reserved = test.home.reserve(&"start".parse().unwrap()).unwrap();
    let start = root.child().spawn_persistent(reserved, SharedMemory::Refuse).await.unwrap();
    let files = root.child().share_files().spawn().await.unwrap();
    let reserved = test.home.reserve(&"files".parse().unwrap()).unwrap();
    files.make_persistent(reserved, SharedMemory::Refuse).await.unwrap();
    // It has a table of its own: what others open from here on is not in it.
    let file = root.openat(None, "/etc/passwd", OFlag::O_RDONLY, Mode::empty()).await.unwrap();
    let in_table = |process: &Process| {
        let open = fds(process.pid().unwrap());
        open.get(&file.number()).is_some_and(|file| file.ends_with("passwd"))
    };
    assert!(in_table(&root) && !in_table(&files));
    for process in [start, files] {
        let place = process.place().unwrap();
        process.prepare_for_reconnect().await.unwrap();
        let again = attach((*place).clone()).await.unwrap();
        assert_eq!(again.pid(), process.pid());
        again.exit(0).await.unwrap();
    }
}

#[tokio::test]
async fn a_table_that_cannot_be_unshared_is_no_obstacle_if_nobody_shares_it() {
    let test = TestHome::new();
    let root = root().await;
    let alone = root.child().spawn().await.unwrap();
    let shares = root.child().share_files().spawn().await.unwrap();
    for process in [&alone, &shares] {
        for call in [Sysno::unshare, Sysno::close_range] {
            deny(process, call, None, Errno::EPERM).await;
        }
    }
    let reserved = test.home.reserve(&"shares".parse().unwrap()).unwrap();
    let error = shares.make_persistent(reserved, SharedMemory::Refuse).await.unwrap_err();
    assert!(matches!(error, Error::Call { call: "unshare", errno: Errno::EPERM }), "{error}");
    let reserved = test.home.reserve(&"alone".parse().unwrap()).unwrap();
    alone.make_persistent(reserved, SharedMemory::Refuse).await.unwrap();
    alone.kill(Signal::SIGKILL).unwrap();
}

#[tokio::test]
async fn children_and_rings_are_made_where_madvise_is_forbidden() {
    let test = TestHome::new();
    let root = root().await;
    deny(&root, Sysno::madvise, None, Errno::EPERM).await;
    let reserved = test.home.reserve(&"one".parse().unwrap()).unwrap();
    let one = root.child().spawn_persistent(reserved, SharedMemory::Refuse).await.unwrap();
    root.enter_ring(Polling::Adaptive).await.unwrap();
    let isolated = root.child().spawn().await.unwrap();
    let sharing = isolated.child().share_memory().share_files().spawn().await.unwrap();
    for process in [&one, &isolated, &sharing] {
        process.enter_ring(Polling::Adaptive).await.unwrap();
        assert_eq!(process.getpid().await.unwrap(), process.pid().unwrap());
    }
    one.kill(Signal::SIGKILL).unwrap();
}

#[tokio::test]
async fn the_call_that_failed_is_named_and_not_one_that_was_canceled_for_it() {
    let root = root().await;
    let child = root.child().spawn().await.unwrap();
    deny(&child, Sysno::fcntl, None, Errno::EPERM).await;
    deny(&child, Sysno::mmap, None, Errno::EACCES).await;
    let error = child.enter_ring(Polling::Adaptive).await.unwrap_err();
    assert!(matches!(error, Error::Call { call: "fcntl", errno: Errno::EPERM }), "{error}");
    let error = child.child().spawn().await.unwrap_err();
    assert!(matches!(error, Error::Call { call: "mmap", errno: Errno::EACCES }), "{error}");
}
