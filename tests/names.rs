//! What a persistent process keeps under names: the next controller finds it, whatever became of the
//! one before.

mod common;

use std::fs;
use std::os::fd::AsFd;

use common::TestHome;
use farcall::persist::{Attach, Place, Resource, Sameness, SharedMemory, attach};
use farcall::process::Child;
use farcall::sys::{Sysno, WaitStatus};
use farcall::{Error, Local, Process};
use nix::fcntl::OFlag;
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::stat::{Mode, fstat};

async fn persistent(home: &TestHome, root: &Process) -> (Child, Place) {
    let place = home.home.reserve(&"names".parse().unwrap()).unwrap();
    let socket = place.place().socket().to_owned();
    let child = root.child().spawn_persistent(place, SharedMemory::Refuse).await.unwrap();
    (child, Place::at(socket))
}

fn names_of(named: &[farcall::persist::Named]) -> Vec<&str> {
    named.iter().map(|named| named.name.as_str()).collect()
}

#[tokio::test]
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
                Sameness::Same
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
    let number = |named: &[farcall::persist::Named], name: &str| {
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
        Err(Error::Name { .. } | Error::Protocol(_)) => {}
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
