//! What becomes of a controller's calls and handles when another one has held the process between two of
//! its links, and is gone again.

use crate::common;

use std::fmt::Debug;
use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::{TestHome, cut, fds, until_async};
use farcall::call::Polling;
use farcall::host::local::Stdio;
use farcall::persist::{Place, Resource, Sameness, SharedMemory, attach, flight};
use farcall::process::Child;
use farcall::sys::{Sysno, WaitStatus};
use farcall::{Error, Fd, Local, Outcome, Process};
use nix::fcntl::OFlag;
use nix::sched::CloneFlags;
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::stat::Mode;
use tokio::task::JoinHandle;

const READ_WRITE: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

async fn start(home: &TestHome) -> (Child, Place) {
    let root = Local::new().polling(None).stdio(Stdio::Null).start().await.unwrap();
    let name = "one".parse().unwrap();
    let reserved = home.home.reserve(&name).unwrap();
    let child = root.child().spawn_persistent(reserved, SharedMemory::Refuse).await.unwrap();
    (child, home.home.place(&name))
}

async fn open(process: &Process, path: &Path) -> farcall::Result<Fd> {
    let flags = OFlag::O_CREAT | OFlag::O_RDWR | OFlag::O_APPEND;
    process.openat(None, path, flags, Mode::S_IRUSR | Mode::S_IWUSR).await
}

async fn open_named(process: &Process, name: &str, path: &Path) -> farcall::Result<Fd> {
    let mut chain = process.chain();
    chain.keep(name);
    let flags = OFlag::O_CREAT | OFlag::O_RDWR | OFlag::O_APPEND;
    let fd = chain.openat(None, path, flags, Mode::S_IRUSR | Mode::S_IWUSR);
    chain.run().await?.fd(fd)
}

/// What has the process, by its names: each with whether it is what it was.
async fn names(process: &Process) -> Vec<(String, Sameness)> {
    let names = process.names().await.unwrap();
    names.into_iter().map(|named| (named.name, named.state)).collect()
}

/// The link of `process` is lost, and this side knows it.
async fn lose(process: &Process) {
    cut(process);
    until_async("the link is lost", || !process.connection().is_connected()).await;
    // Whether another controller is there is asked now, and nobody is.
    let place = process.place().unwrap();
    flight(&place, Duration::from_secs(20)).await.unwrap();
}

/// Another controller has the process for as long as `work` takes, and leaves in good order.
async fn another<R>(place: &Place, work: impl AsyncFnOnce(&Process) -> R) -> R {
    let other = attach(place.clone()).await.unwrap();
    let result = work(&other).await;
    other.prepare_for_reconnect().await.unwrap();
    result
}

/// Begins something, and lets it come as far as it can without a link.
async fn begin<T: Send + 'static>(
    work: impl Future<Output = farcall::Result<T>> + Send + 'static,
) -> JoinHandle<farcall::Result<T>> {
    let begun = tokio::spawn(work);
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
    begun
}

async fn is_not_executed<T: Debug>(what: &str, begun: JoinHandle<farcall::Result<T>>) {
    let told = begun.await.unwrap();
    let superseded = matches!(told, Err(Error::Superseded { outcome: Outcome::NotExecuted, .. }));
    assert!(superseded, "{what}: {told:?}");
}

fn is_stale<T: Debug>(told: farcall::Result<T>) {
    assert!(matches!(told, Err(Error::Stale { .. })), "{told:?}");
}

/// Each kind of thing that a controller can ask for waits for a link, and another controller comes
/// before that.
#[tokio::test]
async fn whatever_waits_is_not_executed_once_another_controller_has_held_the_process() {
    let home = TestHome::new();
    let (process, place) = start(&home).await;
    let file = open(&process, &home.file("file")).await.unwrap();
    let other_file = process.dup(&file).await.unwrap();
    let memory = process.mmap(4096, READ_WRITE, MapFlags::MAP_PRIVATE, None).await.unwrap();
    let to_keep = process.mmap(4096, READ_WRITE, MapFlags::MAP_PRIVATE, None).await.unwrap();
    let at = memory.address();
    process.keep_bytes("kept", b"of A").await.unwrap();
    let job = process.child().spawn().await.unwrap();
    let job = Arc::new(job);
    let kept_job = job.clone();
    lose(&process).await;

    macro_rules! begun {
        ($($what:ident: |$p:ident| $work:expr;)*) => {
            vec![$((stringify!($what), {
                let $p = process.process().clone();
                begin(async move { $work.await.map(drop) }).await
            })),*]
        };
    }
    let path = home.file("of-A");
    let here = tempfile::tempfile().unwrap();
    let all = begun! {
        open_named: |p| async { open_named(&p, "of-A", &path).await };
        write: |p| async { p.write(&file, "of A").await };
        read: |p| async { p.read(&p.adopt_fd(0)?, 8).await };
        close: |p| async { let _p = p; other_file.close().await };
        raw: |p| p.syscall(Sysno::getppid, [0; 6]);
        write_memory: |p| p.write_memory(at, b"of A".to_vec());
        much_memory: |p| p.write_memory(at, vec![7; 1 << 20]);
        read_memory: |p| p.read_memory(at, 64);
        keep_bytes: |p| p.keep_bytes("kept", b"of A again");
        keep_more: |p| p.keep_bytes("more of A", &[7; 20_000]);
        keep_mapping: |p| p.keep_mapping("memory", to_keep);
        keep_child: |p| async { p.keep_child("job", &kept_job).await };
        release: |p| p.release("kept");
        forget: |p| p.forget("kept");
        names: |p| p.names();
        mmap: |p| p.mmap(4096, READ_WRITE, MapFlags::MAP_PRIVATE, None);
        spawn: |p| p.child().spawn();
        spawn_named: |p| p.child().named("child").spawn();
        spawn_sharing: |p| p.child().share_memory().share_files().spawn();
        exec: |p| p.child().share_memory().exec("/bin/true", ["true"], [""; 0]);
        send: |p| p.send_fds(&[here.as_fd()]);
        unshare: |p| p.unshare(CloneFlags::CLONE_FS);
        reap_any: |p| p.reap_any();
        children: |p| p.children();
        unclaimed: |p| p.unclaimed();
        close_unclaimed: |p| p.close_unclaimed();
        upgrade: |p| p.upgrade();
    };
    for (what, begun) in &all {
        assert!(!begun.is_finished(), "{what} waits for nothing");
    }
    another(&place, async |other| {
        other.release("kept").await.unwrap();
        other.keep_bytes("kept", b"of B").await.unwrap();
        // The registry grows, and lies where it did.
        for i in 0..100 {
            other.keep_bytes(&format!("bytes-{i}"), &[i; 300]).await.unwrap();
        }
        open_named(other, "of-B", &home.file("of-B")).await.unwrap();
    })
    .await;
    process.reconnect().await.unwrap();
    for (what, begun) in all {
        is_not_executed(what, begun).await;
    }

    let found = names(&process).await;
    assert_eq!(found.len(), 102);
    assert!(found.iter().all(|(_, state)| *state == Sameness::Same), "{found:?}");
    let Resource::Bytes(kept) = process.name("kept").await.unwrap().what else { panic!() };
    assert_eq!(kept, b"of B");
    for i in 0..100 {
        let named = process.name(&format!("bytes-{i}")).await.unwrap();
        assert!(matches!(named.what, Resource::Bytes(bytes) if bytes == [i; 300]));
    }
    assert!(!home.file("of-A").exists());
    assert_eq!(fs::read(home.file("file")).unwrap(), b"");
    // What it was driving before it drives on.
    job.exit(3).await.unwrap();
    let mut job = Arc::into_inner(job).unwrap();
    assert_eq!(job.wait().await.unwrap(), WaitStatus::Exited(3));
    assert_eq!(process.children().await.unwrap().known, []);
    // And all works anew, also in a ring.
    process.keep_bytes("again of A", b"1").await.unwrap();
    process.enter_ring(Polling::Adaptive).await.unwrap();
    let file = open_named(&process, "again", &home.file("again")).await.unwrap();
    process.write(&file, vec![7; 100_000]).await.unwrap();
    assert_eq!(fs::read(home.file("again")).unwrap(), vec![7; 100_000]);
    process.exit(0).await.unwrap();
}

/// Where the other one has not left in good order, and the process is reached by way of a helper.
#[tokio::test]
async fn that_is_so_also_if_the_other_one_died_and_by_way_of_another_process() {
    let home = TestHome::new();
    let (process, place) = start(&home).await;
    let helper = Local::new().stdio(Stdio::Null).start().await.unwrap();
    for _ in 0..3 {
        lose(&process).await;
        let p = process.process().clone();
        let waiting = begin(async move { p.keep_bytes("of A", b"1").await }).await;
        let other = attach(place.clone()).await.unwrap();
        let name = format!("of B, {}", names(&other).await.len());
        other.keep_bytes(&name, b"2").await.unwrap();
        drop(other);
        process.reconnect_through(&helper, &place).await.unwrap();
        is_not_executed("keep_bytes", waiting).await;
        assert!(process.name(&name).await.is_ok());
    }
    assert_eq!(names(&process).await.len(), 3);
    process.exit(0).await.unwrap();
}

#[tokio::test]
async fn bytes_for_a_call_that_waits_reach_nothing_of_the_other_controllers() {
    const SIZE: usize = (8 << 20) - 4096;
    let home = TestHome::new();
    let (process, place) = start(&home).await;
    let file = open_named(&process, "log", &home.file("log")).await.unwrap();
    process.enter_ring(Polling::Adaptive).await.unwrap();
    let shared = process.shared_buffer(4096).unwrap();
    lose(&process).await;
    // Their place is in the memory of a ring that is over, and in the arena when that is full.
    let p = process.process().clone();
    let large = vec![0xaa; 40_000];
    let all = begin(async move {
        let writes = (0..8).map(|_| p.write(&file, large.clone()));
        let mut results = Vec::new();
        for write in writes.map(Box::pin).collect::<Vec<_>>() {
            results.push(write.await.map(drop));
        }
        results.into_iter().collect::<farcall::Result<Vec<()>>>()
    })
    .await;
    let secret = b"B's own bytes...".repeat(SIZE / 16);
    let at = another(&place, async |other| {
        // With this the earlier ring is unmapped.
        other.enter_ring(Polling::Adaptive).await.unwrap();
        for _ in 0..100 {
            other.getpid().await.unwrap();
        }
        let memory = other.mmap(SIZE, READ_WRITE, MapFlags::MAP_PRIVATE, None).await.unwrap();
        let at = memory.address();
        other.write_memory(at, secret.clone()).await.unwrap();
        other.keep_mapping("secret", memory).await.unwrap();
        at
    })
    .await;
    process.reconnect().await.unwrap();
    is_not_executed("write", all).await;
    assert!(process.read_memory(at, SIZE).await.unwrap() == secret, "B's memory has changed");
    assert_eq!(fs::read(home.file("log")).unwrap(), b"");
    let mut shared = shared;
    assert!(shared.is_stale());
    is_stale(shared.write(0, b"x"));
    is_stale(shared.read(0, 1));
    drop(shared);
    assert!(process.read_memory(at, SIZE).await.unwrap() == secret, "B's memory has changed");
    process.exit(0).await.unwrap();
}

#[tokio::test]
async fn handles_from_before_are_stale_and_close_nothing_unless_they_have_their_names() {
    let home = TestHome::new();
    let (process, place) = start(&home).await;
    let pid = process.pid().unwrap();
    let path = |name: &str| home.file(name);
    let unnamed = open(&process, &path("unnamed")).await.unwrap();
    let dropped = process.dup(&unnamed).await.unwrap();
    let same = open_named(&process, "same", &path("same")).await.unwrap();
    let Resource::Fd(found) = process.name("same").await.unwrap().what else { panic!() };
    let forgotten = open_named(&process, "forgotten", &path("forgotten")).await.unwrap();
    let again = open_named(&process, "again", &path("again")).await.unwrap();
    let replaced = open_named(&process, "replaced", &path("replaced")).await.unwrap();
    let event = process.syscall(Sysno::eventfd2, [0; 6]).await.unwrap();
    let event = process.adopt_fd(event as i32).unwrap();
    process.keep_fd("event", &event).await.unwrap();
    let memory = process.mmap(4096, READ_WRITE, MapFlags::MAP_PRIVATE, None).await.unwrap();
    let not_named = process.mmap(4096, READ_WRITE, MapFlags::MAP_PRIVATE, None).await.unwrap();
    let at = memory.address();
    lose(&process).await;
    // What is given up while nobody can be asked is given up later, or not at all.
    let dropped_number = dropped.number();
    drop(dropped);
    let numbers = [&unnamed, &again, &replaced].map(Fd::number);
    another(&place, async |other| {
        let of_b = open(other, &path("of-B")).await.unwrap().into_raw();
        other.forget("forgotten").await.unwrap();
        other.release("again").await.unwrap();
        // The same file under the same name and number, opened by somebody else; another one under what
        // has its name still; and one under each number that has none.
        let onto =
            |from: i32, to: i32| other.syscall(Sysno::dup2, [from as u64, to as u64, 0, 0, 0, 0]);
        let reopened = open(other, &path("again")).await.unwrap();
        onto(reopened.number(), numbers[1]).await.unwrap();
        other.keep_fd("again", &other.adopt_fd(numbers[1]).unwrap()).await.unwrap();
        for number in [numbers[0], numbers[2], dropped_number] {
            onto(of_b, number).await.unwrap();
        }
        let fixed = (MapFlags::MAP_PRIVATE | MapFlags::MAP_ANONYMOUS | MapFlags::MAP_FIXED).bits();
        let mmap = [at, 4096, READ_WRITE.bits() as u64, fixed as u64, u64::MAX, 0];
        other.syscall(Sysno::mmap, mmap).await.unwrap();
        other.write_memory(at, b"B's".to_vec()).await.unwrap();
    })
    .await;
    let before = fds(pid);
    process.reconnect().await.unwrap();

    assert!(![&same, &found].map(Fd::is_stale).contains(&true));
    let stale = [&unnamed, &forgotten, &again, &replaced, &event];
    assert_eq!(stale.map(Fd::is_stale), [true; 5]);
    assert_eq!(process.write(&same, "1").await.unwrap(), 1);
    assert_eq!(process.write(&found, "2").await.unwrap(), 1);
    for fd in stale {
        is_stale(process.write(fd, "not any more").await);
    }
    is_stale(process.dup(&unnamed).await);
    let mut chain = process.chain();
    chain.read(&unnamed, 1);
    is_stale(chain.run().await.map(drop));
    is_stale(process.child().inherit("x", &process, &unnamed).map(drop));
    is_stale(unnamed.close().await);
    drop((forgotten, again, replaced, event));
    assert!(memory.is_stale());
    is_stale(process.keep_mapping("memory", not_named).await);
    drop(memory);
    // Behind whatever these would have sent.
    process.getpid().await.unwrap();
    assert_eq!(process.read_memory(at, 3).await.unwrap(), b"B's");
    let now = fds(pid);
    for (number, what) in before.iter().filter(|(_, what)| what.is_absolute()) {
        assert_eq!(now.get(number), Some(what), "{number}");
    }
    // What goes on does so in every way.
    let refused = process.release("same").await;
    assert!(matches!(refused, Err(Error::Name { .. })), "{refused:?}");
    let number = same.number();
    drop(same);
    drop(found);
    process.release("same").await.unwrap();
    assert!(!fds(pid).contains_key(&number));
    assert_eq!(fs::read(path("same")).unwrap(), b"12");
    for name in ["unnamed", "forgotten", "again", "replaced", "of-B"] {
        assert_eq!(fs::read(path(name)).unwrap(), b"", "{name}");
    }
    process.exit(0).await.unwrap();
}

#[tokio::test]
async fn a_handle_goes_on_over_several_others_as_long_as_its_name_stays() {
    let home = TestHome::new();
    let (process, place) = start(&home).await;
    let path = home.file("log");
    let log = open_named(&process, "log", &path).await.unwrap();
    let mut expected = String::new();
    for round in 0..10 {
        if round % 3 == 1 {
            lose(&process).await;
        } else {
            process.prepare_for_reconnect().await.unwrap();
        }
        for _ in 0..round % 4 {
            another(&place, async |other| {
                let Resource::Fd(log) = other.name("log").await.unwrap().what else { panic!() };
                other.write(&log, "b").await.unwrap();
            })
            .await;
        }
        process.reconnect().await.unwrap();
        assert_eq!(process.write(&log, "a").await.unwrap(), 1);
        expected += &"b".repeat(round % 4);
        expected += "a";
    }
    assert_eq!(fs::read_to_string(&path).unwrap(), expected);
    process.forget("log").await.unwrap();
    // Without its name it is an ordinary handle again.
    let number = log.number();
    drop(log);
    process.getpid().await.unwrap();
    assert!(!fds(process.pid().unwrap()).contains_key(&number));
    process.exit(0).await.unwrap();
}
