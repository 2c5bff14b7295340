//! Where a persistent process is found: its socket, and what is written down beside it.

use crate::common;

use std::fs;

use common::{TestHome, alive, cut, until};
use farcall::host::local::Stdio;
use farcall::persist::{Attach, Home, SharedMemory, Warning, attach};
use farcall::{Child, Error, Local, Process};
use nix::sys::signal::Signal;

async fn root() -> Process {
    Local::new().stdio(Stdio::Null).start().await.unwrap()
}

/// A persistent process of its own, from the start.
async fn start(home: &Home, root: &Process) -> Child {
    let reserved = home.reserve(&"one".parse().unwrap()).unwrap();
    root.child().spawn_persistent(reserved, SharedMemory::Refuse).await.unwrap()
}

/// There is one warning, and it names the file.
#[track_caller]
fn is_warned(process: &Process) {
    let warnings = process.take_warnings();
    assert!(
        matches!(&warnings[..], [Warning::NotRecorded { path, .. }] if path.ends_with("one.json")),
        "{warnings:?}"
    );
}

#[tokio::test]
async fn what_can_not_be_written_down_ends_no_attach_no_detach_and_no_takeover() {
    let test = TestHome::new();
    let root = root().await;
    let process = start(&test.home, &root).await;
    assert_eq!(process.take_warnings(), []);
    let pid = process.getpid().await.unwrap();
    // Nothing can be renamed to what is a directory.
    let record = test.path().join("one.json");
    fs::remove_file(&record).unwrap();
    fs::create_dir_all(record.join("in the way")).unwrap();

    process.prepare_for_reconnect().await.unwrap();
    process.reconnect().await.unwrap();
    assert_eq!(process.getpid().await.unwrap(), pid);
    is_warned(&process);
    cut(&process);
    process.reconnect().await.unwrap();
    assert_eq!(process.getpid().await.unwrap(), pid);
    is_warned(&process);

    let place = test.home.place(&"one".parse().unwrap());
    let other = Attach::default().take_over().to(place.clone()).await.unwrap();
    assert_eq!(other.getpid().await.unwrap(), pid);
    is_warned(&other);
    let lost = process.getpid().await;
    assert!(matches!(lost, Err(Error::Superseded { .. })), "{lost:?}");
    other.prepare_for_reconnect().await.unwrap();
    let next = attach(place).await.unwrap();
    assert_eq!(next.getpid().await.unwrap(), pid);
    is_warned(&next);
    next.exit(0).await.unwrap();
    until("it ends", || !alive(pid));
}

#[tokio::test]
async fn what_is_removed_is_only_what_was_looked_at() {
    let test = TestHome::new();
    let root = root().await;
    let place = test.home.place(&"one".parse().unwrap());
    let first = start(&test.home, &root).await;
    let files = place.files().unwrap();
    assert!(!files.is_empty() && !files.is_left_behind());
    first.kill(Signal::SIGKILL).unwrap();
    first.ended().await;
    assert!(files.is_left_behind());

    // The next one takes the place.
    let second = start(&test.home, &root).await;
    files.remove().unwrap();
    second.prepare_for_reconnect().await.unwrap();
    let process = attach(place.clone()).await.unwrap();
    assert_eq!(process.pid(), second.pid());
    process.exit(0).await.unwrap();
    second.ended().await;

    // So does one that has only reserved it.
    let files = place.files().unwrap();
    let reserved = test.home.reserve(&"one".parse().unwrap()).unwrap();
    files.remove().unwrap();
    assert!(place.socket().exists() && place.state().is_some_and(|state| state.is_reserved()));
    let files = place.files().unwrap();
    fs::remove_file(place.socket()).unwrap();
    fs::write(place.socket(), "of somebody else").unwrap();
    drop(reserved);
    files.remove().unwrap();
    assert_eq!(fs::read(place.socket()).unwrap(), b"of somebody else");
}
