//! What a persistent process keeps under names: the next controller finds it, whatever became of the
//! one before.

use crate::common;

use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use common::{Role, TestHome, hear, is_same_child, persistent, role, tell};
use farcall::calls::{Sysno, WaitStatus};
use farcall::link::Polling;
use farcall::persist::{Attach, Named, Place, Resource, Sameness, attach};
use farcall::{Error, Local, Process};
use nix::fcntl::OFlag;
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::stat::{Mode, fstat};

fn names_of(named: &[Named]) -> Vec<&str> {
    named.iter().map(|named| named.name.as_str()).collect()
}

#[tokio::test]
#[expect(clippy::too_many_lines, reason = "a test is one story")]
async fn the_next_controller_finds_what_was_kept_and_nothing_else() {
    let home = TestHome::new();
    let root = Local::new().start().await.unwrap();
    let (child, place) = persistent(&home, &root).await;
    let file = home.home.path().join("file");
    let mut chain = child.chain();
    chain.keep("log");
    let log = chain.openat(None, &file, OFlag::O_CREAT | OFlag::O_RDWR, Mode::S_IRWXU);
    chain.keep("read").keep("write");
    let (_, write) = chain.pipe2(OFlag::empty());
    chain.write(write, b"in the pipe");
    let mut done = chain.run().await.unwrap();
    assert_eq!(done.round_trips(), 1);
    let log = done.fd(log).unwrap();
    // Their handles are dropped, and they stay open.
    drop(done);
    let other = child.openat(None, "/", OFlag::O_RDONLY, Mode::empty()).await.unwrap();
    child.keep_fd("root", &other).await.unwrap();
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let memory = child.mmap(4096, protection, MapFlags::MAP_PRIVATE, None).await.unwrap();
    let address = memory.address();
    child.write_memory(address, b"in memory").await.unwrap();
    child.keep_mapping("memory", memory).await.unwrap();
    child.keep_bytes("state", &[7; 1000]).await.unwrap();
    child.keep_bytes("state", &[8; 3000]).await.unwrap();
    let grandchild = child.child().spawn().await.unwrap();
    let pid = grandchild.pid_in_parent();
    child.keep_child("worker", &grandchild).await.unwrap();
    grandchild.exit(42).await.unwrap();
    // Without a name: it is listed, and closed on request.
    let unnamed = child.openat(None, "/dev/null", OFlag::O_RDONLY, Mode::empty()).await.unwrap();
    let unnamed = unnamed.into_raw();
    drop((log, other));
    child.prepare_for_reconnect().await.unwrap();

    let next = attach(place).await.unwrap();
    let named = next.names().await.unwrap();
    let all = ["log", "memory", "read", "root", "state", "worker", "write"];
    assert_eq!(names_of(&named), all);
    for named in &named {
        let expected = match &named.what {
            Resource::Mapping(mapping) => {
                assert_eq!((mapping.address(), mapping.size()), (address, 4096));
                assert_eq!(next.read_memory(address, 9).await.unwrap(), b"in memory");
                assert!(matches!(named.state, Sameness::Unverified(_)));
                continue;
            }
            Resource::Bytes(bytes) => {
                assert_eq!(*bytes, [8; 3000]);
                Sameness::Same
            }
            Resource::Child(child) => {
                assert_eq!(*child, pid);
                assert!(is_same_child(&named.state), "{named:?}");
                continue;
            }
            Resource::Fd(fd) => {
                if named.name == "read" {
                    assert_eq!(next.read(fd, 100).await.unwrap(), b"in the pipe");
                } else if named.name == "log" {
                    let here = next.fetch_fd(fd).await.unwrap();
                    let inode = fstat(here.as_fd()).unwrap().st_ino;
                    assert_eq!(
                        inode,
                        std::os::unix::fs::MetadataExt::ino(&fs::metadata(&file).unwrap())
                    );
                }
                Sameness::Same
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(named.state, expected, "{}", named.name);
    }
    drop(named);
    assert_eq!(next.wait_for_child(pid).await.unwrap(), WaitStatus::Exited(42));
    let unclaimed = next.unclaimed().await.unwrap();
    assert!(unclaimed.iter().any(|fd| fd.number == unnamed), "{unclaimed:?}");
    next.close_unclaimed().await.unwrap();
    assert_eq!(next.unclaimed().await.unwrap(), []);
    for name in all {
        next.release(name).await.unwrap();
    }
    assert!(next.names().await.unwrap().is_empty());
    assert_eq!(next.unclaimed().await.unwrap(), []);
    assert!(matches!(next.read_memory(address, 9).await, Err(Error::Fault { .. })));
    next.exit(0).await.unwrap();
}

#[tokio::test]
async fn what_is_something_else_now_is_said_to_be() {
    let home = TestHome::new();
    let root = Local::new().start().await.unwrap();
    let (child, place) = persistent(&home, &root).await;
    for name in ["replaced", "closed", "same"] {
        let mut chain = child.chain();
        chain.keep(name);
        chain.openat(None, "/dev/null", OFlag::O_RDONLY, Mode::empty());
        chain.run().await.unwrap();
    }
    let event = child.syscall(Sysno::eventfd2, [0; 6]).await.unwrap() as i32;
    let event = child.adopt_fd(event).unwrap();
    child.keep_fd("event", &event).await.unwrap();
    let number = |named: &[Named], name: &str| {
        let found = named.iter().find(|named| named.name == name).unwrap();
        match &found.what {
            Resource::Fd(fd) => fd.number() as u64,
            other => panic!("{other:?}"),
        }
    };
    let named = child.names().await.unwrap();
    let (replaced, closed) = (number(&named, "replaced"), number(&named, "closed"));
    // Behind the library's back.
    child.syscall(Sysno::dup2, [event.number() as u64, replaced, 0, 0, 0, 0]).await.unwrap();
    child.syscall(Sysno::close, [closed, 0, 0, 0, 0, 0]).await.unwrap();
    drop((named, event));
    child.prepare_for_reconnect().await.unwrap();
    let next = Attach::default().to(place).await.unwrap();
    let named = next.names().await.unwrap();
    let state = |name: &str| &named.iter().find(|named| named.name == name).unwrap().state;
    assert_eq!(*state("same"), Sameness::Same);
    assert!(matches!(state("event"), Sameness::Unverified(_)));
    assert!(matches!(state("replaced"), Sameness::Changed(what) if what.contains("anonymous")));
    // Its number may be that of the new stream.
    assert!(matches!(state("closed"), Sameness::Changed(_)));
    assert!(matches!(next.release("closed").await, Err(Error::Name { .. })));
    next.forget("closed").await.unwrap();
    drop(named);
    next.exit(0).await.unwrap();
}

#[tokio::test]
async fn names_that_can_not_be_are_refused_and_nothing_is_opened() {
    let home = TestHome::new();
    let root = Local::new().start().await.unwrap();
    let (child, _) = persistent(&home, &root).await;
    let refused = |result: Result<_, Error>| match result {
        Err(Error::Name { .. } | Error::Misuse { .. }) => {}
        Err(error) => panic!("{error}"),
        Ok(()) => panic!("it was kept"),
    };
    let open = async |names: &[&str], process: &Process| {
        let mut chain = process.chain();
        for name in names {
            chain.keep(*name);
        }
        chain.openat(None, "/", OFlag::O_RDONLY, Mode::empty());
        chain.run().await.map(drop)
    };
    let before = child.unclaimed().await.unwrap();
    refused(open(&[""], &child).await);
    refused(open(&[&"x".repeat(49)], &child).await);
    refused(open(&["with\0zero"], &child).await);
    refused(open(&["one", "two"], &child).await);
    open(&["one"], &child).await.unwrap();
    refused(open(&["one"], &child).await);
    refused(child.keep_bytes("one", b"bytes").await);
    refused(child.keep_bytes("many", &vec![0; 64 * 1024 + 1]).await);
    refused(child.release("none").await);
    // A process that ends with its controller keeps nothing.
    refused(open(&["one"], &root).await);
    assert_eq!(child.unclaimed().await.unwrap(), before);
    // A call that fails names nothing.
    let mut chain = child.chain();
    chain.keep("missing");
    chain.openat(None, "/no/such/file", OFlag::O_RDONLY, Mode::empty());
    assert!(matches!(chain.run().await, Err(Error::Chain(_))));
    assert_eq!(names_of(&child.names().await.unwrap()), ["one"]);
    let fd = child.name("one").await.unwrap();
    refused(child.release("one").await);
    drop(fd);
    child.release("one").await.unwrap();
    child.exit(0).await.unwrap();
}

#[tokio::test]
async fn the_registry_grows_and_names_stay() {
    let home = TestHome::new();
    let root = Local::new().start().await.unwrap();
    let (child, place) = persistent(&home, &root).await;
    for i in 0..300 {
        child.keep_bytes(&format!("{i:03}"), &vec![i as u8; i % 200]).await.unwrap();
    }
    child.prepare_for_reconnect().await.unwrap();
    let next = attach(place).await.unwrap();
    let named = next.names().await.unwrap();
    assert_eq!(named.len(), 300);
    for (i, named) in named.iter().enumerate() {
        assert!(matches!(&named.what, Resource::Bytes(bytes) if *bytes == vec![i as u8; i % 200]));
    }
    // After a reconnect as well, which sweeps.
    next.reconnect().await.unwrap();
    assert_eq!(next.names().await.unwrap().len(), 300);
    next.exit(0).await.unwrap();
}

#[tokio::test]
async fn bytes_that_look_like_a_registry_are_bytes() {
    let home = TestHome::new();
    let root = Local::new().start().await.unwrap();
    let (child, place) = persistent(&home, &root).await;
    // Entry after entry with the state of one that is taken, wherever one may be looked for.
    let forged: Vec<u8> = (0..1024).flat_map(|_| 1u64.to_le_bytes()).collect();
    child.keep_bytes("forged", &forged).await.unwrap();
    child.keep_bytes("other", b"other").await.unwrap();
    let named = child.names().await.unwrap();
    assert!(matches!(&named[0].what, Resource::Bytes(bytes) if *bytes == forged));
    // What is left of them when the name is gone is nothing.
    child.release("forged").await.unwrap();
    assert_eq!(names_of(&child.names().await.unwrap()), ["other"]);
    child.prepare_for_reconnect().await.unwrap();
    let next = attach(place).await.unwrap();
    assert_eq!(names_of(&next.names().await.unwrap()), ["other"]);
    next.exit(0).await.unwrap();
}

#[tokio::test]
async fn a_number_that_the_server_has_taken_since_is_said_to_be_its_own() {
    let home = TestHome::new();
    let root = Local::new().start().await.unwrap();
    let (child, place) = persistent(&home, &root).await;
    // All anonymous inodes are one: by that nobody could tell them from the bells of a ring.
    let events: Vec<u64> = {
        let mut events = Vec::new();
        for i in 0..8 {
            let event = child.syscall(Sysno::eventfd2, [0; 6]).await.unwrap();
            let fd = child.adopt_fd(event as i32).unwrap();
            child.keep_fd(&format!("event {i}"), &fd).await.unwrap();
            events.push(event);
        }
        events
    };
    for event in events {
        child.syscall(Sysno::close, [event, 0, 0, 0, 0, 0]).await.unwrap();
    }
    child.prepare_for_reconnect().await.unwrap();
    let next = attach(place).await.unwrap();
    next.enter_ring(Polling::Adaptive).await.unwrap();
    let named = next.names().await.unwrap();
    assert!(named.iter().all(|named| matches!(named.state, Sameness::Changed(_))), "{named:?}");
    let own =
        |named: &Named| matches!(&named.state, Sameness::Changed(what) if what.contains("own"));
    assert!(named.iter().any(own), "{named:?}");
    assert_eq!(named.len(), 8);
    next.exit(0).await.unwrap();
}

/// What is known of what has names, without the handles.
fn summary(named: &[Named]) -> Vec<String> {
    let line = |named: &Named| {
        let Named { name, kind, state, .. } = named;
        let what = match &named.what {
            Resource::Fd(fd) => format!("{}", fd.number()),
            other => format!("{other:?}"),
        };
        format!("{name}: {kind:?} {what}, {state:?}")
    };
    named.iter().map(line).collect()
}

/// The controller that writes random bytes all over the memory that it shares with the process.
async fn scribble(place: Place) {
    let process = attach(place).await.unwrap();
    process.enter_ring(Polling::Always).await.unwrap();
    for _ in 0..100 {
        process.getpid().await.unwrap();
    }
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let ring = maps.lines().find(|line| line.contains("memfd:farcall-ring")).unwrap();
    let (first, last) = ring.split(' ').next().unwrap().split_once('-').unwrap();
    let [first, last] = [first, last].map(|at| u64::from_str_radix(at, 16).unwrap());
    let memory = fs::OpenOptions::new().write(true).open("/proc/self/mem").unwrap();
    let bells = common::fds(std::process::id() as i32);
    let bells = bells.iter().filter(|(_, what)| what.ends_with("anon_inode:[eventfd]"));
    let bells: Vec<i32> = bells.map(|(number, _)| *number).collect();
    assert!(!bells.is_empty());
    let mut random = fs::File::open("/dev/urandom").unwrap();
    let mut bytes = vec![0; 1 << 20];
    // From here on nothing in this process looks at that memory: the runtime's thread is this one.
    for round in 0..200 {
        // All of it at first, then what the server reads.
        let last = if round == 0 { last } else { first + (64 << 10) };
        for at in (first..last).step_by(bytes.len()) {
            let n = (last - at).min(bytes.len() as u64) as usize;
            random.read_exact(&mut bytes[..n]).unwrap();
            memory.write_all_at(&bytes[..n], at).unwrap();
        }
        for bell in &bells {
            // SAFETY: the descriptor is open as long as the process's ring is, which nobody ends here;
            // nothing is closed by borrowing it.
            let bell = unsafe { BorrowedFd::borrow_raw(*bell) };
            nix::unistd::write(bell, &1u64.to_le_bytes()).unwrap();
        }
    }
    tell("scribbled");
    hear();
}

#[tokio::test]
async fn what_a_controller_writes_into_shared_memory_does_not_reach_the_registry() {
    if let Some(socket) = role() {
        scribble(Place::at(PathBuf::from(socket))).await;
        return;
    }
    let home = TestHome::new();
    let root = Local::new().start().await.unwrap();
    let (child, place) = persistent(&home, &root).await;
    let pid = child.pid();
    let mut chain = child.chain();
    chain.keep("root");
    chain.openat(None, "/", OFlag::O_RDONLY, Mode::empty());
    chain.run().await.unwrap();
    child.keep_bytes("state", &[7; 1000]).await.unwrap();
    drop(child.child().named("worker").spawn().await.unwrap());
    let before = summary(&child.names().await.unwrap());
    assert_eq!(before.len(), 3);
    child.prepare_for_reconnect().await.unwrap();
    for _ in 0..3 {
        let test = "what_a_controller_writes_into_shared_memory_does_not_reach_the_registry";
        let mut other = Role::start(test, place.socket());
        assert_eq!(other.told(), "scribbled");
        other.kill();
        let next = attach(place.clone()).await.unwrap();
        assert_eq!(next.pid(), pid);
        assert_eq!(summary(&next.names().await.unwrap()), before);
        next.prepare_for_reconnect().await.unwrap();
    }
    attach(place).await.unwrap().exit(0).await.unwrap();
}

#[tokio::test]
async fn a_descriptor_that_has_a_name_is_closed_by_giving_that_up_alone() {
    let home = TestHome::new();
    let (child, _) = persistent(&home, &Local::new().start().await.unwrap()).await;
    let fd = child.openat(None, "/dev/null", OFlag::O_RDONLY, Mode::empty()).await.unwrap();
    let number = fd.number();
    child.keep_fd("null", &fd).await.unwrap();
    let refused = fd.close().await;
    assert!(matches!(&refused, Err(Error::Misuse { advice, .. }) if advice.contains("release")));
    let is_open = async || {
        // What is closed in the background comes before this.
        child.getpid().await.unwrap();
        common::fds(child.pid().unwrap()).contains_key(&number)
    };
    assert!(is_open().await);
    // So does the handle of who finds it.
    let Resource::Fd(found) = child.name("null").await.unwrap().what else { panic!() };
    assert_eq!(found.number(), number);
    drop(found);
    assert!(is_open().await);
    child.release("null").await.unwrap();
    assert!(!is_open().await);
    child.exit(0).await.unwrap();
}
