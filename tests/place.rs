//! Where a persistent process is found: its socket, and what is written down beside it.

use crate::common;

use std::fs;
use std::os::unix::net::UnixListener;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{TestHome, alive, cut, fds, persistent, root, spawn_persistent, until, until_async};
use farcall::calls::Sysno;
use farcall::link::Polling;
use farcall::persist::{Attach, Place, Warning, attach};
use farcall::{Child, Error, Process};
use nix::fcntl::{Flock, FlockArg, OFlag};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;

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
    let process = spawn_persistent(&test.home, &root).await;
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
    let first = spawn_persistent(&test.home, &root).await;
    let files = place.files().unwrap();
    assert!(!files.is_empty() && !files.is_left_behind());
    first.kill(Signal::SIGKILL).unwrap();
    first.ended().await;
    assert!(files.is_left_behind());

    // The next one takes the place.
    let second = spawn_persistent(&test.home, &root).await;
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

/// Does `work` while another one has the directory, and says whether that one was done before it was.
fn takes_its_turn(test: &TestHome, work: impl FnOnce() + Send) -> bool {
    let directory = fs::File::open(test.path()).unwrap();
    let lock = Flock::lock(directory, FlockArg::LockExclusive).map_err(|(_, errno)| errno).unwrap();
    let is_free = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let working = scope.spawn(|| {
            work();
            is_free.load(Ordering::SeqCst)
        });
        // It has the directory open to look around, and to wait for its turn.
        let waits = || {
            fds(std::process::id() as i32).into_values().filter(|path| path == test.path()).count()
                > 2
        };
        until("it waits", || waits() || working.is_finished());
        is_free.store(true, Ordering::SeqCst);
        drop(lock);
        working.join().unwrap()
    })
}

#[test]
fn who_makes_and_who_removes_files_of_a_process_take_turns() {
    let test = TestHome::new();
    let reserve = |name: &str| test.home.reserve(&name.parse().unwrap()).unwrap();
    let reserved = Mutex::new(Some(reserve("one")));
    let make = || *reserved.lock().unwrap() = Some(reserve("two"));
    assert!(takes_its_turn(&test, make), "who reserves a place");
    assert!(takes_its_turn(&test, || drop(reserved.lock().unwrap().take())), "who gives one up");
    let files = test.home.place(&"two".parse().unwrap()).files().unwrap();
    assert!(takes_its_turn(&test, || files.remove().unwrap()), "who removes what was left");
}

#[test]
fn a_place_that_is_reserved_is_nobody_elses() {
    let test = TestHome::new();
    let one = "one".parse().unwrap();
    let reserved = test.home.reserve(&one).unwrap();
    let error = test.home.reserve(&one).unwrap_err().to_string();
    assert!(error.contains(&format!("pid {} has reserved it", std::process::id())), "{error}");
    assert!(reserved.place().socket().exists());
    drop(reserved);
    drop(test.home.reserve(&one).unwrap());
}

/// Removes the socket alone, that and NAME.json, or the whole directory.
const REMOVED: [&str; 3] = ["one.sock", "one.sock one.json", ""];

fn remove(test: &TestHome, what: &str) {
    if what.is_empty() {
        fs::remove_dir_all(test.path()).unwrap();
    }
    for file in what.split(' ').filter(|file| !file.is_empty()) {
        fs::remove_file(test.path().join(file)).unwrap();
    }
}

/// There is one warning, which says that the socket was removed.
#[track_caller]
fn is_told_of_the_socket(process: &Process) {
    let warnings = process.take_warnings();
    assert!(matches!(&warnings[..], [Warning::SocketRemoved { .. }]), "{warnings:?}");
}

/// A persistent process, its root, and where it is found.
async fn placed() -> (TestHome, Process, Child, Place) {
    let (test, root) = (TestHome::new(), root().await);
    let (process, place) = persistent(&test, &root).await;
    (test, root, process, place)
}

#[tokio::test]
async fn a_process_whose_socket_was_removed_is_listed_reached_and_not_replaced() {
    for what in REMOVED {
        let (test, root, process, place) = placed().await;
        let one = "one".parse().unwrap();
        let pid = process.pid().unwrap();
        process.prepare_for_reconnect().await.unwrap();
        remove(&test, what);
        assert_eq!(place.served_unlinked(), Some(pid), "{what}");
        assert_eq!(test.home.names().unwrap(), std::slice::from_ref(&one), "{what}");
        let error = test.home.reserve(&one).unwrap_err().to_string();
        assert!(error.contains(&format!("(pid {pid})")) && error.contains("restore"), "{error}");
        assert!(!place.socket().exists(), "{what}");

        // Its own controller, and another one.
        process.reconnect().await.unwrap();
        is_told_of_the_socket(&process);
        process.prepare_for_reconnect().await.unwrap();
        let other = attach(place.clone()).await.unwrap();
        is_told_of_the_socket(&other);
        assert_eq!(other.pid(), Some(pid));
        assert_eq!(place.target().unwrap().pid(), pid);
        other.exit(0).await.unwrap();
        process.ended().await;
        assert_eq!(place.served_unlinked(), None, "{what}");
        let next = spawn_persistent(&test.home, &root).await;
        next.exit(0).await.unwrap();
        next.ended().await;
    }
}

#[tokio::test]
async fn a_controller_makes_the_socket_anew_and_all_goes_on() {
    for what in REMOVED {
        let (test, _root, process, place) = placed().await;
        let pid = process.pid().unwrap();
        let file =
            process.openat(None, "/etc/passwd", OFlag::O_RDONLY, Mode::empty()).await.unwrap();
        process.enter_ring(Polling::Adaptive).await.unwrap();
        process.getpid().await.unwrap();
        let before = fds(pid).len();
        remove(&test, what);
        process.restore_socket().await.unwrap();
        assert_eq!(process.take_warnings(), [], "{what}");
        assert_eq!(place.state().unwrap().process.pid, pid, "it is written down again");
        until_async("the old ones are closed", || fds(pid).len() == before).await;
        assert_eq!(process.read(&file, 4).await.unwrap(), b"root");
        assert_eq!(process.unclaimed().await.unwrap(), [], "{what}");

        // A second one is not made, and the next controller comes as ever.
        let error = process.restore_socket().await.unwrap_err().to_string();
        assert!(error.contains("there is a socket already"), "{error}");
        process.prepare_for_reconnect().await.unwrap();
        process.reconnect().await.unwrap();
        assert_eq!(process.take_warnings(), [], "{what}");
        assert_eq!(process.read(&file, 1).await.unwrap(), b":");
        process.prepare_for_reconnect().await.unwrap();
        let other = attach(place.clone()).await.unwrap();
        assert_eq!((other.pid(), other.take_warnings()), (Some(pid), vec![]));
        assert!(place.is_listening() && place.served_unlinked().is_none());
        assert_eq!(place.state().unwrap().process.pid, pid);
        // It has been removed again, and is reached by the file that it has now.
        fs::remove_file(place.socket()).unwrap();
        // One of the same name has come and died since, and has left this.
        drop(UnixListener::bind(place.socket()).unwrap());
        other.restore_socket().await.unwrap();
        let unclaimed = other.unclaimed().await.unwrap();
        assert_eq!(unclaimed.len(), 1, "the file alone: {unclaimed:?}");
        other.exit(0).await.unwrap();
        process.ended().await;
    }
}

#[tokio::test]
async fn what_a_process_that_runs_another_program_has_left_is_replaced() {
    let (test, root, process, place) = placed().await;
    let pid = process.pid().unwrap();
    fs::remove_file(test.path().join("one.sock")).unwrap();
    process.execve("/bin/sleep", ["sleep", "1000"], [""; 0]).await.unwrap();
    until_async("it has another program", || {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "sleep\n")
    })
    .await;
    // NAME.json names it still.
    assert_eq!(place.served_unlinked(), None);
    let next = spawn_persistent(&test.home, &root).await;
    assert_ne!(next.pid(), Some(pid));
    next.exit(0).await.unwrap();
    process.kill(Signal::SIGKILL).unwrap();
}

#[tokio::test]
async fn a_process_without_a_descriptor_of_its_sockets_file_is_told_as_lost_with_the_file() {
    let test = TestHome::new();
    let root = root().await;
    let process = spawn_persistent(&test.home, &root).await;
    let pid = process.pid().unwrap();
    let socket = test.path().join("one.sock");
    let (file, _) = fds(pid).into_iter().find(|(_, path)| *path == socket).unwrap();
    process.syscall(Sysno::close, [file as u64, 0, 0, 0, 0, 0]).await.unwrap();
    process.prepare_for_reconnect().await.unwrap();
    fs::remove_file(&socket).unwrap();
    let place = test.home.place(&"one".parse().unwrap());
    let error = attach(place.clone()).await.unwrap_err().to_string();
    assert!(error.contains(&format!("pid {pid}")) && error.contains("RLIMIT_NOFILE"), "{error}");
    place.target().unwrap().signal(Signal::SIGKILL).unwrap();
    until("it ends", || !alive(pid));
    let error = attach(place).await.unwrap_err().to_string();
    assert!(error.contains("no such persistent process"), "{error}");
}
