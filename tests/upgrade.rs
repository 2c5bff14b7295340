//! The live upgrade: a process goes on as another image, whatever it has and whoever drives it.

use crate::common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use common::{Role, TestHome, blocked_in, cut, fds, persistent, role, tell, until, until_async};
use farcall::calls::{Sysno, WaitStatus};
use farcall::image::IMAGE;
use farcall::link::Polling;
use farcall::persist::{Attach, Home, Place, attach};
use farcall::proto::Call;
use farcall::{Error, Local, Process};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;
use nix::sched::CloneFlags;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::Pid;

/// Where the version lies in an image, and how much of a handover it takes.
const VERSION: usize = 184;
const RESUME: usize = 208;
const HANDOVER: usize = 212;

/// The image with one number changed.
fn with(at: usize, value: u32) -> Vec<u8> {
    let mut image = IMAGE.to_vec();
    image[at..at + 4].copy_from_slice(&value.to_le_bytes());
    image
}

/// An image that can be told from this build's: nobody looks at the last bytes of e_ident.
fn another() -> Vec<u8> {
    with(12, 0x4242_4242)
}

/// The mappings of a process that can be executed, the kernel's own not counted.
fn executable(pid: i32) -> Vec<String> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let lines = maps.lines().filter(|line| line.contains(" r-xp ") && !line.contains("[v"));
    lines.map(String::from).collect()
}

async fn serves(process: &Process) {
    assert_eq!(process.getpid().await.unwrap(), process.pid().unwrap());
}

/// A child can be made, serves, and tells how it ended.
async fn has_children(process: &Process) {
    let mut child = process.child().spawn().await.unwrap();
    serves(&child).await;
    child.exit(7).await.unwrap();
    assert_eq!(child.wait().await.unwrap(), WaitStatus::Exited(7));
}

#[tokio::test]
async fn a_persistent_process_keeps_all_that_it_has() {
    let home = TestHome::new();
    let root = Local::new().start().await.unwrap();
    let (process, place) = persistent(&home, &root).await;
    let pid = process.pid().unwrap();
    let file = process.openat(None, "/etc/passwd", OFlag::O_RDONLY, Mode::empty()).await.unwrap();
    process.keep_fd("passwd", &file).await.unwrap();
    let address = process.mmap_address().await;
    process.write_memory(address, b"in memory").await.unwrap();
    let zombie = process.child().spawn().await.unwrap();
    zombie.exit(42).await.unwrap();
    zombie.ended().await;
    let mut alive = process.child().spawn().await.unwrap();
    let before = (fds(pid), process.server_descriptors());

    process.upgrade_to(&another()).await.unwrap();

    assert_eq!(process.read_image().await.unwrap(), another());
    assert_eq!(process.pid(), Some(pid));
    assert_eq!((fds(pid), process.server_descriptors()), before);
    assert_eq!(process.read(&file, 4).await.unwrap().len(), 4);
    serves(&process).await;
    // A child that is older has its own copy of the old image.
    serves(&alive).await;
    has_children(&alive).await;
    assert_eq!(alive.read_image().await.unwrap(), IMAGE);
    alive.exit(3).await.unwrap();
    assert_eq!(alive.wait().await.unwrap(), WaitStatus::Exited(3));
    has_children(&process).await;
    let child = process.child().spawn().await.unwrap();
    assert_eq!(child.read_image().await.unwrap(), another());
    drop(child);
    let zombie = zombie.pid_in_parent();
    process.prepare_for_reconnect().await.unwrap();

    let next = attach(place).await.unwrap();
    assert_eq!(next.pid(), Some(pid));
    assert_eq!(next.read_image().await.unwrap(), another());
    assert_eq!(next.read_memory(address, 9).await.unwrap(), b"in memory");
    assert_eq!(next.wait_for_child(zombie).await.unwrap(), WaitStatus::Exited(42));
    let named = next.names().await.unwrap();
    assert_eq!(named.iter().map(|named| named.name.as_str()).collect::<Vec<_>>(), ["passwd"]);
    has_children(&next).await;
    next.upgrade().await.unwrap();
    assert_eq!(next.read_image().await.unwrap(), IMAGE);
    has_children(&next).await;
}

/// A mapping that nobody unmaps.
trait Memory {
    async fn mmap_address(&self) -> u64;
}

impl Memory for Process {
    async fn mmap_address(&self) -> u64 {
        let protection = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        self.syscall(Sysno::mmap, [0, 4096, protection, flags, u64::MAX, 0]).await.unwrap()
    }
}

#[tokio::test]
async fn every_process_can_be_upgraded_and_nothing_of_the_images_before_is_left() {
    let root = Local::new().start().await.unwrap();
    let child = root.child().spawn().await.unwrap();
    for process in [&root, child.process()] {
        let pid = process.pid().unwrap();
        let before = executable(pid).len();
        for round in 0..20 {
            let image = if round % 2 == 0 { another() } else { IMAGE.to_vec() };
            process.upgrade_to(&image).await.unwrap();
            assert_eq!(process.read_image().await.unwrap(), image);
            assert_eq!(executable(pid).len(), before, "round {round}");
        }
        has_children(process).await;
    }
}

#[tokio::test]
async fn an_image_that_cannot_be_used_leaves_the_old_one() {
    let home = TestHome::new();
    let root = Local::new().start().await.unwrap();
    let (process, _place) = persistent(&home, &root).await;
    let pid = process.pid().unwrap();
    let maps = executable(pid);
    let mut longer = IMAGE.to_vec();
    longer.push(0);
    for image in [vec![], vec![0; 100], vec![0; 4096], with(176, 0), fs::read("/bin/sh").unwrap()] {
        let error = process.upgrade_to(&image).await.unwrap_err();
        assert!(matches!(error, Error::ForeignImage { version: None }), "{error:?}");
    }
    let error = process.upgrade_to(&with(VERSION, 2)).await.unwrap_err();
    assert!(matches!(error, Error::ForeignImage { version: Some(2) }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("version 2") && text.contains("version 1"), "both are named: {text}");
    for image in [
        longer,
        IMAGE[..IMAGE.len() - 1].to_vec(),
        with(RESUME, IMAGE.len() as u32),
        with(RESUME, 100),
    ] {
        let error = process.upgrade_to(&image).await.unwrap_err();
        assert!(matches!(error, Error::Upgrade { .. }), "{error:?}");
    }
    let error = process.upgrade_to(&with(HANDOVER, 300)).await.unwrap_err().to_string();
    assert!(error.contains("392") && error.contains("300"), "both are named: {error}");
    // What the system forbids, in this process, for good: Linux 6.3.
    const PR_SET_MDWE: u64 = 65;
    let refuses = process.syscall(Sysno::prctl, [PR_SET_MDWE, 1, 0, 0, 0, 0]).await;
    if refuses.is_ok() {
        let error = process.upgrade().await.unwrap_err();
        assert!(error.to_string().contains("forbids"), "{error}");
    }
    assert_eq!(executable(pid), maps);
    assert_eq!(process.read_image().await.unwrap(), IMAGE);
    serves(&process).await;
    has_children(&process).await;
}

#[tokio::test]
async fn who_shares_the_memory_goes_on_in_the_old_image() {
    let root = Local::new().start().await.unwrap();
    let parent = root.child().spawn().await.unwrap();
    let mut sharer = parent.child().share_memory().spawn().await.unwrap();
    for _ in 0..4 {
        parent.upgrade_to(&another()).await.unwrap();
        serves(&sharer).await;
        has_children(&sharer).await;
        has_children(&parent).await;
        assert_eq!(sharer.read_image().await.unwrap(), IMAGE);
    }
    // The next one that shares it begins in the new one.
    let younger = parent.child().share_memory().spawn().await.unwrap();
    assert_eq!(younger.read_image().await.unwrap(), another());
    sharer.upgrade().await.unwrap();
    assert_eq!(parent.read_image().await.unwrap(), another());
    for process in [&sharer, &younger] {
        serves(process).await;
        has_children(process).await;
    }
    sharer.exit(0).await.unwrap();
    assert_eq!(sharer.wait().await.unwrap(), WaitStatus::Exited(0));
    // Handlers of signals have one address for all who share them.
    let _sighand =
        parent.child().share_memory().flags(CloneFlags::CLONE_SIGHAND).spawn().await.unwrap();
    let error = parent.upgrade().await.unwrap_err();
    assert!(matches!(error, Error::Upgrade { .. }), "{error:?}");
    serves(&parent).await;
}

#[tokio::test]
async fn a_ring_goes_on_and_its_calls_can_be_interrupted() {
    let root = Local::new().start().await.unwrap();
    let process = root.child().spawn().await.unwrap();
    process.enter_ring(Polling::Adaptive).await.unwrap();
    for _ in 0..10 {
        process.upgrade().await.unwrap();
        for _ in 0..200 {
            serves(&process).await;
        }
        let within = process.syscall_within(Duration::from_millis(20), Sysno::pause, [0; 6]).await;
        assert!(matches!(within, Err(Error::TimedOut { .. })), "{within:?}");
    }
    // A new one can be made, too.
    let other = root.child().spawn().await.unwrap();
    other.upgrade().await.unwrap();
    other.enter_ring(Polling::Adaptive).await.unwrap();
    let within = other.syscall_within(Duration::from_millis(20), Sysno::pause, [0; 6]).await;
    assert!(matches!(within, Err(Error::TimedOut { .. })), "{within:?}");
    serves(&other).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_and_children_of_others_meanwhile_notice_nothing() {
    let root = Local::new().start().await.unwrap();
    let process = root.child().spawn().await.unwrap();
    // What it has of its parent's descriptors is closed by the first call.
    serves(&process).await;
    let others = || fds(process.pid().unwrap()).len() - process.server_descriptors().len();
    let before = others();
    let callers: Vec<_> = (0..4)
        .map(|which| {
            let process = process.process().clone();
            tokio::spawn(async move {
                for round in 0..100 {
                    if which == 0 && round % 5 == 0 {
                        has_children(&process).await;
                    }
                    let flags = OFlag::O_RDONLY;
                    let file = process.openat(None, "/etc/passwd", flags, Mode::empty()).await;
                    let file = file.unwrap();
                    assert_eq!(process.read(&file, 8).await.unwrap().len(), 8);
                    file.close().await.unwrap();
                }
            })
        })
        .collect();
    let upgrades: Vec<_> = (0..2)
        .map(|_| {
            let process = process.process().clone();
            tokio::spawn(async move {
                for _ in 0..50 {
                    process.upgrade().await.unwrap();
                }
            })
        })
        .collect();
    for task in callers.into_iter().chain(upgrades) {
        task.await.unwrap();
    }
    serves(&process).await;
    assert_eq!(others(), before);
}

#[tokio::test]
async fn an_upgrade_that_another_controller_has_made_is_noticed() {
    let home = TestHome::new();
    let root = Local::new().start().await.unwrap();
    let (process, place) = persistent(&home, &root).await;
    for _ in 0..3 {
        process.prepare_for_reconnect().await.unwrap();
        let other = attach(place.clone()).await.unwrap();
        other.upgrade().await.unwrap();
        other.prepare_for_reconnect().await.unwrap();
        drop(other);
        process.reconnect().await.unwrap();
        has_children(&process).await;
        process.upgrade().await.unwrap();
        has_children(&process).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whenever_the_connection_is_lost_one_of_the_two_serves() {
    let home = TestHome::new();
    let root = Local::new().start().await.unwrap();
    let (process, place) = persistent(&home, &root).await;
    let pid = process.pid().unwrap();
    let mut failed = 0;
    for round in 0..60 {
        let upgrading = {
            let process = process.process().clone();
            tokio::spawn(async move { process.upgrade_to(&another()).await })
        };
        tokio::time::sleep(Duration::from_micros(round * 20)).await;
        cut(&process);
        until_async("the link is lost", || !process.connection().is_connected()).await;
        if round % 3 == 0 {
            // Whoever comes in between may upgrade it too, to the same place.
            let other = Attach::default().take_over().to(place.clone()).await.unwrap();
            other.upgrade().await.unwrap();
            other.prepare_for_reconnect().await.unwrap();
        }
        process.reconnect().await.unwrap();
        failed += i32::from(upgrading.await.unwrap().is_err());
        serves(&process).await;
        has_children(&process).await;
        let mapped = executable(pid);
        assert!(mapped.len() <= 2, "round {round}: {mapped:?}");
    }
    assert!(failed > 0, "none was in the middle");
    process.upgrade().await.unwrap();
    assert_eq!(executable(pid).len(), 1);
}

/// Upgrades its process again and again until it is killed.
async fn busy(home: &str) {
    let place = Home::at(PathBuf::from(home)).place(&"one".parse().unwrap());
    let process = Attach::default().take_over().to(place).await.unwrap();
    process.upgrade().await.unwrap();
    tell("upgrades");
    loop {
        process.upgrade().await.unwrap();
    }
}

#[test]
fn a_controller_that_is_killed_in_the_middle_leaves_a_process_that_serves() {
    const TEST: &str = "a_controller_that_is_killed_in_the_middle_leaves_a_process_that_serves";
    let runtime = tokio::runtime::Runtime::new().unwrap();
    if let Some(home) = role() {
        runtime.block_on(busy(&home));
    }
    let home = TestHome::new();
    let (pid, place) = runtime.block_on(async {
        let root = Local::new().start().await.unwrap();
        let (process, place) = persistent(&home, &root).await;
        process.prepare_for_reconnect().await.unwrap();
        (process.pid().unwrap(), place)
    });
    for round in 0..10 {
        let mut controller = Role::start(TEST, home.path());
        assert_eq!(controller.told(), "upgrades");
        std::thread::sleep(Duration::from_micros(round * 300));
        controller.kill();
        runtime.block_on(async {
            let process = attach(place.clone()).await.unwrap();
            serves(&process).await;
            has_children(&process).await;
            let mapped = executable(pid);
            assert!(mapped.len() <= 2, "round {round}: {mapped:?}");
            process.upgrade().await.unwrap();
            assert_eq!(executable(pid).len(), 1);
            process.prepare_for_reconnect().await.unwrap();
        });
    }
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
}

#[tokio::test]
async fn a_call_that_blocks_keeps_an_upgrade_waiting_and_is_not_disturbed() {
    let root = Local::new().start().await.unwrap();
    let process = root.child().spawn().await.unwrap();
    let pid = process.pid().unwrap();
    let poll = Call::syscall(Sysno::poll, [0, 0, 200, 0, 0, 0]);
    let poll = process.connection().call("poll", poll);
    until_async("it blocks", || blocked_in(pid) == Some(Sysno::poll as usize)).await;
    let upgraded = process.upgrade();
    let (poll, upgraded) = tokio::join!(poll, upgraded);
    assert_eq!(poll.unwrap(), 0);
    upgraded.unwrap();
    serves(&process).await;
}

/// A process that runs an image as its program.
struct Executed(std::process::Child);

impl Drop for Executed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn a_server_with_an_image_of_another_version_is_refused_and_both_are_named() {
    let home = TestHome::new();
    let (program, socket) = (home.file("image"), home.file("other.sock"));
    fs::write(&program, with(VERSION, 2)).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new(&program);
    // Another test may be making a child just now, which has the file open for writing.
    let spawned = loop {
        match command.arg(&socket).spawn() {
            Err(error) if error.raw_os_error() == Some(libc::ETXTBSY) => {
                command = Command::new(&program);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            spawned => break spawned.unwrap(),
        }
    };
    let _executed = Executed(spawned);
    until("it listens", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
    let error = attach(Place::at(&socket)).await.unwrap_err();
    assert!(matches!(error, Error::ForeignImage { version: Some(2) }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("version 2") && text.contains("version 1"), "{text}");
}

#[tokio::test]
async fn a_server_that_speaks_another_handshake_is_refused_and_both_versions_are_named() {
    let home = TestHome::new();
    let socket = home.file("other.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    // It says no more than what all versions do.
    let server = std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        client.read_exact(&mut [0; 48]).unwrap();
        let status = -(Errno::EPROTONOSUPPORT as i32);
        let answer = [&b"farcall1"[..], &status.to_le_bytes(), &9u32.to_le_bytes()].concat();
        client.write_all(&answer).unwrap();
    });
    let error = attach(Place::at(&socket)).await.unwrap_err().to_string();
    assert!(error.contains("version 9") && error.contains("version 1"), "{error}");
    server.join().unwrap();
}
