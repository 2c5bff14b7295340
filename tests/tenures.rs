//! What becomes of a controller's calls and handles when another one has held the process between two of
//! its links, and is gone again.

use crate::common;

use std::fmt::Debug;
use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use common::{TestHome, blocked_in, cut, fds, persistent, root_without_rings, until, until_async};
use farcall::calls::{Sysno, WaitStatus};
use farcall::host::local::Stdio;
use farcall::link::Polling;
use farcall::persist::{Attach, Place, Resource, Sameness, attach, flight};
use farcall::proto::Call;
use farcall::{Error, Fd, Local, Outcome, Process};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sched::CloneFlags;
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::Pid;
use tokio::task::JoinHandle;

const READ_WRITE: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

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
    // Whether another controller is there is asked now, and in most cases nobody is yet: else calls are told
    // what has become of them before the next link, which is as good.
    tokio::time::sleep(Duration::from_millis(10)).await;
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
#[expect(clippy::too_many_lines, reason = "a test is one story")]
async fn whatever_waits_is_not_executed_once_another_controller_has_held_the_process() {
    let home = TestHome::new();
    let (process, place) = persistent(&home, &root_without_rings().await).await;
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
    let (process, place) = persistent(&home, &root_without_rings().await).await;
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
    assert_eq!(process.tenure(), 3);
    process.exit(0).await.unwrap();
}

#[tokio::test]
async fn bytes_for_a_call_that_waits_reach_nothing_of_the_other_controllers() {
    const SIZE: usize = (8 << 20) - 4096;
    let home = TestHome::new();
    let (process, place) = persistent(&home, &root_without_rings().await).await;
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
    let (process, place) = persistent(&home, &root_without_rings().await).await;
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
    let (process, place) = persistent(&home, &root_without_rings().await).await;
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

fn poll<F: Future>(future: &mut Pin<Box<F>>) -> Poll<F::Output> {
    future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
}

/// The outcome of a call that another controller came before.
fn outcome<T: Debug>(told: farcall::Result<T>) -> Outcome {
    match told {
        Err(Error::Superseded { outcome, .. }) => outcome,
        other => panic!("{other:?}"),
    }
}

/// Others hold the process, one after the other, while nothing happens on this thread, which is the only
/// one of its runtime.
fn others_come_and_go(place: &Place, count: usize, calls: usize) {
    let place = place.clone();
    let others = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            for _ in 0..count {
                another(&place, async |other| {
                    for _ in 0..calls {
                        other.getpid().await.unwrap();
                    }
                })
                .await;
            }
        });
    });
    others.join().unwrap();
}

/// What the calls are told that were under way when the link was lost: the server was blocked in the
/// first one, had read the others but the last one, and executed them before `others` came, which made so
/// many calls.
struct Unconfirmed {
    blocked: farcall::Result<u64>,
    simple: farcall::Result<u64>,
    bytes: farcall::Result<u64>,
    opened: farcall::Result<Fd>,
    behind: farcall::Result<usize>,
}

async fn unconfirmed(others: usize, calls: usize) -> (Process, Unconfirmed) {
    let home = TestHome::new();
    let (process, place) = persistent(&home, &root_without_rings().await).await;
    let pid = process.pid().unwrap();
    let file = open_named(&process, "log", &home.file("log")).await.unwrap();
    let memory = process.mmap(4096, READ_WRITE, MapFlags::MAP_PRIVATE, None).await.unwrap();
    let connection = process.connection();
    let blocked = connection.call("pause", Call::syscall(Sysno::pause, [0; 6]));
    let simple = connection.call("getppid", Call::syscall(Sysno::getppid, [0; 6]));
    let bytes = connection.call("COPY_OUT", Call::copy_out(memory.address(), 8));
    let mut opened = Box::pin(process.dup(&file));
    // With that they are written, all together.
    assert!(poll(&mut opened).is_pending());
    until("it is blocked", || blocked_in(pid) == Some(Sysno::pause as usize));
    let mut behind = Box::pin(process.write(&file, "behind"));
    assert!(poll(&mut behind).is_pending());
    tokio::task::yield_now().await;
    cut(&process);
    kill(Pid::from_raw(pid), Signal::SIGPIPE).unwrap();
    others_come_and_go(&place, others, calls);
    process.reconnect().await.unwrap();
    let told = Unconfirmed {
        blocked: blocked.await,
        simple: simple.await,
        bytes: bytes.await,
        opened: opened.await,
        behind: behind.await,
    };
    assert_eq!(fs::read(home.file("log")).unwrap(), b"");
    process.exit(0).await.unwrap();
    (process.process().clone(), told)
}

#[tokio::test]
async fn what_was_executed_has_its_result_but_for_bytes_that_have_not_arrived() {
    let (process, told) = unconfirmed(1, 3).await;
    assert_eq!(told.blocked.unwrap_err().errno(), Some(Errno::EINTR));
    assert!(told.simple.is_ok(), "{:?}", told.simple);
    assert_eq!(outcome(told.bytes), Outcome::Executed);
    let opened = told.opened.unwrap();
    assert!(opened.is_stale());
    is_stale(process.fetch_fd(&opened).await);
    assert_eq!(outcome(told.behind), Outcome::NotExecuted);
}

#[tokio::test]
async fn what_was_executed_and_has_left_the_log_says_so() {
    let (_, told) = unconfirmed(2, 200).await;
    assert_eq!(outcome(told.blocked), Outcome::Executed);
    assert_eq!(outcome(told.simple), Outcome::Executed);
    assert_eq!(outcome(told.bytes), Outcome::Executed);
    assert_eq!(outcome(told.opened), Outcome::Executed);
    assert_eq!(outcome(told.behind), Outcome::NotExecuted);
}

#[tokio::test]
async fn after_more_others_than_are_remembered_what_was_unconfirmed_may_have_been_executed() {
    let (_, told) = unconfirmed(6, 1).await;
    assert_eq!(outcome(told.blocked), Outcome::PossiblyExecuted);
    assert_eq!(outcome(told.bytes), Outcome::PossiblyExecuted);
    assert_eq!(outcome(told.opened), Outcome::PossiblyExecuted);
    assert_eq!(outcome(told.behind), Outcome::PossiblyExecuted);
}

/// Who waits for room has looked at its handle already.
#[tokio::test]
async fn who_waits_for_room_meanwhile_sends_nothing_after() {
    let home = TestHome::new();
    let (process, place) = persistent(&home, &root_without_rings().await).await;
    let file = open(&process, &home.file("file")).await.unwrap();
    lose(&process).await;
    let getpid = || Call::syscall(Sysno::getpid, [0; 6]);
    let queued = process.connection().submit(vec![getpid(); 20_000], Ok);
    let p = process.process().clone();
    let number = file.number() as u64;
    let waiting = begin(async move {
        let file = file;
        p.write(&file, "into what has its number").await
    })
    .await;
    let p = process.process().clone();
    let raw = begin(async move { p.syscall(Sysno::close, [number, 0, 0, 0, 0, 0]).await }).await;
    another(&place, async |other| {
        let of_b = open(other, &home.file("of-B")).await.unwrap().into_raw();
        other.syscall(Sysno::dup2, [of_b as u64, number, 0, 0, 0, 0]).await.unwrap();
    })
    .await;
    process.reconnect().await.unwrap();
    assert_eq!(outcome(queued.await.map(|replies| replies.len())), Outcome::NotExecuted);
    is_not_executed("write", waiting).await;
    is_not_executed("close", raw).await;
    assert_eq!(fs::read(home.file("of-B")).unwrap(), b"");
    assert!(fds(process.pid().unwrap()).contains_key(&(number as i32)));
    process.exit(0).await.unwrap();
}

#[tokio::test]
async fn who_has_only_asked_or_was_refused_has_not_held_it() {
    let home = TestHome::new();
    let (process, place) = persistent(&home, &root_without_rings().await).await;
    let file = open(&process, &home.file("file")).await.unwrap();
    for round in 0..5 {
        let refused = attach(place.clone()).await;
        assert!(matches!(refused, Err(Error::Held { .. })), "{refused:?}");
        lose(&process).await;
        let (p, f) = (process.process().clone(), process.inherited_fd(&file).unwrap());
        let write = begin(async move { p.write(&f, "1").await }).await;
        for _ in 0..3 {
            flight(&place, common::LIMIT).await.unwrap();
        }
        // One who goes away in the middle of a handshake.
        drop(std::os::unix::net::UnixStream::connect(place.socket()).unwrap());
        process.reconnect().await.unwrap();
        assert_eq!(write.await.unwrap().unwrap(), 1);
        assert_eq!(fs::read(home.file("file")).unwrap().len(), round + 1);
    }
    assert!(!file.is_stale());
    assert_eq!(process.tenure(), 0);
    process.exit(0).await.unwrap();
}

#[tokio::test]
async fn what_others_have_opened_is_closed_only_by_who_asks_for_it() {
    let home = TestHome::new();
    let (process, place) = persistent(&home, &root_without_rings().await).await;
    let pid = process.pid().unwrap();
    process.prepare_for_reconnect().await.unwrap();
    let of_b =
        another(&place, async |other| open(other, &home.file("of-B")).await.unwrap().into_raw())
            .await;
    process.reconnect().await.unwrap();
    // Nor by a reconnect before which there was nobody.
    for _ in 0..2 {
        lose(&process).await;
        process.reconnect().await.unwrap();
        assert!(fds(pid).contains_key(&of_b));
    }
    let unclaimed = process.unclaimed().await.unwrap();
    assert_eq!(unclaimed.iter().map(|fd| fd.number).collect::<Vec<_>>(), [of_b]);
    process.close_unclaimed().await.unwrap();
    assert!(!fds(pid).contains_key(&of_b));
    // From then on all is known again, and what is not is this controller's own.
    let lost = open(&process, &home.file("lost")).await.unwrap().into_raw();
    lose(&process).await;
    process.reconnect().await.unwrap();
    until("it is swept", || !fds(pid).contains_key(&lost));
    process.exit(0).await.unwrap();
}

#[tokio::test]
async fn children_are_driven_on_and_what_they_share_with_their_parent_is_left_as_it_is() {
    let home = TestHome::new();
    let (process, place) = persistent(&home, &root_without_rings().await).await;
    let pid = process.pid().unwrap();
    let mut isolated = process.child().spawn().await.unwrap();
    let mut reaped = process.child().spawn().await.unwrap();
    let mut sharing = process.child().share_memory().share_files().spawn().await.unwrap();
    let file = open(&process, &home.file("file")).await.unwrap();
    sharing.write(&file, "1").await.unwrap();
    let of_sharing = open(&sharing, &home.file("file")).await.unwrap();
    lose(&process).await;
    // It is closed through the parent, or not at all.
    let number = of_sharing.number();
    drop(of_sharing);
    sharing.getpid().await.unwrap();
    assert!(fds(pid).contains_key(&number));
    reaped.exit(5).await.unwrap();
    another(&place, async |other| {
        let status = other.wait_for_child(reaped.pid_in_parent()).await.unwrap();
        assert_eq!(status, WaitStatus::Exited(5));
    })
    .await;
    process.reconnect().await.unwrap();
    is_stale(sharing.write(&file, "2").await);
    is_stale(process.write(&file, "2").await);
    // What it opens from here on is its own to close.
    let fresh = open(&sharing, &home.file("file")).await.unwrap();
    sharing.write(&fresh, "3").await.unwrap();
    let number_of_fresh = fresh.number();
    fresh.close().await.unwrap();
    assert!(!fds(pid).contains_key(&number_of_fresh));
    let isolated_file = open(&isolated, &home.file("file")).await.unwrap();
    isolated.write(&isolated_file, "4").await.unwrap();
    assert_eq!(fs::read(home.file("file")).unwrap(), b"134");
    assert_eq!(reaped.wait().await.unwrap_err().errno(), Some(Errno::ECHILD));
    isolated.exit(3).await.unwrap();
    assert_eq!(isolated.wait().await.unwrap(), WaitStatus::Exited(3));
    sharing.exit(4).await.unwrap();
    assert_eq!(sharing.wait().await.unwrap(), WaitStatus::Exited(4));
    // Whatever becomes of the child's end of its stream, another one can be made.
    let mut another_one = process.child().share_memory().share_files().spawn().await.unwrap();
    another_one.exit(6).await.unwrap();
    assert_eq!(another_one.wait().await.unwrap(), WaitStatus::Exited(6));
    process.exit(0).await.unwrap();
}

#[tokio::test]
async fn two_that_take_it_from_each_other_lose_nothing_of_each_other() {
    let home = TestHome::new();
    let (process, place) = persistent(&home, &root_without_rings().await).await;
    let log = open_named(&process, "log", &home.file("log")).await.unwrap();
    let mut kept = 0;
    for round in 0..6 {
        if round % 2 == 0 {
            process.enter_ring(Polling::Adaptive).await.unwrap();
        }
        let p = process.process().clone();
        let blocked = begin(async move { p.nanosleep(Duration::from_secs(3600)).await }).await;
        let p = process.process().clone();
        let behind = begin(async move { p.keep_bytes("of A", b"1").await }).await;
        let other = Attach::default().take_over().to(place.clone()).await.unwrap();
        other.keep_bytes(&format!("of B, {round}"), &[round; 2000]).await.unwrap();
        let interrupted = blocked.await.unwrap();
        assert_eq!(interrupted.unwrap_err().errno(), Some(Errno::EINTR));
        // The server looks who else is there now and then.
        match behind.await.unwrap() {
            Ok(()) => kept = 1,
            told => assert!(told.is_err_and(|told| told.outcome() == Some(Outcome::NotExecuted))),
        }
        other.prepare_for_reconnect().await.unwrap();
        process.reconnect().await.unwrap();
        assert_eq!(process.write(&log, [round]).await.unwrap(), 1);
        assert_eq!(names(&process).await.len(), usize::from(round) + 2 + kept);
        // The other one, too, has not forgotten that it held it.
        let held = other.reconnect().await;
        assert!(matches!(held, Err(Error::Held { .. })), "{held:?}");
    }
    assert_eq!(fs::read(home.file("log")).unwrap(), (0..6).collect::<Vec<u8>>());
    process.exit(0).await.unwrap();
}

/// The link is lost again, at many instants while all is looked at anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_is_lost_while_all_is_looked_at_anew_changes_nothing_of_that() {
    const ROUNDS: usize = 60;
    let home = TestHome::new();
    let (process, place) = persistent(&home, &root_without_rings().await).await;
    let log = open_named(&process, "log", &home.file("log")).await.unwrap();
    for round in 0..ROUNDS {
        let unnamed = open(&process, &home.file("unnamed")).await.unwrap();
        let number = unnamed.number();
        lose(&process).await;
        another(&place, async |other| {
            let of_b = open(other, &home.file("of-B")).await.unwrap().into_raw();
            other.syscall(Sysno::dup2, [of_b as u64, number as u64, 0, 0, 0, 0]).await.unwrap();
            other.keep_fd("of-B", &other.adopt_fd(number).unwrap()).await.unwrap();
            other.syscall(Sysno::close, [of_b as u64, 0, 0, 0, 0, 0]).await.unwrap();
        })
        .await;
        let again = std::thread::spawn({
            let process = process.process().clone();
            move || {
                std::thread::sleep(Duration::from_micros(round as u64 * 30));
                cut(&process);
            }
        });
        let _ = process.reconnect().await;
        again.join().unwrap();
        // Whichever link it was that is lost.
        until_reconnected(&process).await;
        assert_eq!(process.tenure(), round + 1);
        is_stale(process.write(&unnamed, "A").await);
        drop(unnamed);
        assert_eq!(process.write(&log, "A").await.unwrap(), 1);
        assert!(fds(process.pid().unwrap()).contains_key(&number));
        process.release("of-B").await.unwrap();
        process.close_unclaimed().await.unwrap();
    }
    assert_eq!(fs::read(home.file("log")).unwrap().len(), ROUNDS);
    assert_eq!(fs::read(home.file("of-B")).unwrap(), b"");
    process.exit(0).await.unwrap();
}

async fn until_reconnected(process: &Process) {
    for _ in 0..100 {
        let told = process.reconnect().await;
        if told.is_ok() && process.getpid().await.is_ok() {
            return;
        }
        assert!(!matches!(told, Err(Error::Held { .. })), "{told:?}");
    }
    panic!("it can't be reached any more");
}

/// It is entered where it lies then, by children too.
#[tokio::test]
async fn an_image_that_another_controller_has_put_in_its_place_is_found() {
    let home = TestHome::new();
    let (process, place) = persistent(&home, &root_without_rings().await).await;
    for _ in 0..3 {
        lose(&process).await;
        another(&place, async |other| other.upgrade().await.unwrap()).await;
        process.reconnect().await.unwrap();
        let child = process.child().spawn().await.unwrap();
        assert_eq!(child.getppid().await.unwrap(), process.pid().unwrap());
        child.exit(0).await.unwrap();
    }
    process.exit(0).await.unwrap();
}

#[tokio::test]
async fn of_the_rings_of_those_who_have_gone_nothing_is_left_in_memory() {
    let home = TestHome::new();
    let (process, place) = persistent(&home, &root_without_rings().await).await;
    let pid = process.pid().unwrap();
    let mapped = || {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        maps.lines().filter(|line| line.contains("/memfd:")).count()
    };
    let mut before = None;
    for turn in 0..4 {
        process.enter_ring(Polling::Adaptive).await.unwrap();
        assert_eq!(process.getpid().await.unwrap(), pid);
        let now = mapped();
        assert_eq!(*before.get_or_insert(now), now, "after {turn} others");
        lose(&process).await;
        another(&place, async |other| {
            other.enter_ring(Polling::Adaptive).await.unwrap();
            assert_eq!(other.getpid().await.unwrap(), pid);
        })
        .await;
        process.reconnect().await.unwrap();
    }
    process.exit(0).await.unwrap();
}
