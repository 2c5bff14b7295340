//! Calls through shared memory, from many tasks and threads at once, and from none.

use crate::common;

use std::collections::BTreeMap;
use std::fs;
use std::future::Future;
use std::os::unix::fs::FileExt;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use common::{LIMIT, Random, Role, fds, hear, role, state, tell, until, until_async};
use farcall::calls::Sysno;
use farcall::host::local::Stdio;
use farcall::link::Polling;
use farcall::proto::Call;
use farcall::{Fd, Local, Process};
use nix::fcntl::OFlag;
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::stat::Mode;
use nix::unistd::Whence;

async fn with_a_ring(polling: Polling) -> Process {
    let root = Local::new().stdio(Stdio::Null).polling(None).start().await.unwrap();
    root.enter_ring(polling).await.unwrap();
    assert!(root.connection().has_ring());
    root
}

/// A file that has no name any more, in the process.
async fn file(process: &Process) -> Fd {
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR;
    process.openat(None, std::env::temp_dir(), flags, Mode::S_IRWXU).await.unwrap()
}

/// Polls a call once, which hands it over, and drops it.
fn begin_and_drop<T>(call: impl Future<Output = T>) -> Option<T> {
    match pin!(call).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => Some(result),
        Poll::Pending => None,
    }
}

/// What one task does: every result says which call it belongs to.
async fn task(process: Process, number: u64, rounds: u64) {
    let mut random = Random::new(number + 1);
    let fd = file(&process).await;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let size = 300_000;
    let memory = process.mmap(size, protection, MapFlags::MAP_PRIVATE, None).await.unwrap();
    for round in 0..rounds {
        // Positions that no other call of the test asks for.
        let position = (number << 32 | round << 8).cast_signed();
        let expected = position.cast_unsigned();
        match random.below(8) {
            0 => {
                let moved = process.lseek(&fd, position, Whence::SeekSet).await.unwrap();
                assert_eq!(moved, expected);
                assert_eq!(process.lseek(&fd, 0, Whence::SeekCur).await.unwrap(), expected);
            }
            1 => {
                let bytes = format!("task {number} round {round}");
                process.lseek(&fd, 0, Whence::SeekSet).await.unwrap();
                let n = process.write(&fd, bytes.as_bytes()).await.unwrap();
                assert_eq!(n, bytes.len());
                process.lseek(&fd, 0, Whence::SeekSet).await.unwrap();
                assert_eq!(process.read(&fd, n).await.unwrap(), bytes.as_bytes());
            }
            2 => {
                // More than goes through the shared memory at once, or into it at all.
                let len = [1, 5000, size][random.below(3)];
                let bytes = vec![(number * 31 + round) as u8; len];
                process.write_memory(memory.address(), bytes.clone()).await.unwrap();
                assert!(process.read_memory(memory.address(), len).await.unwrap() == bytes);
            }
            3 => {
                let copy = process.dup(&fd).await.unwrap();
                process.lseek(&copy, position, Whence::SeekSet).await.unwrap();
                assert_eq!(process.lseek(&fd, 0, Whence::SeekCur).await.unwrap(), expected);
                if random.below(2) == 0 {
                    copy.close().await.unwrap();
                }
            }
            4 => {
                // A call whose future is dropped is made nevertheless, in its place.
                begin_and_drop(process.lseek(&fd, position, Whence::SeekSet));
                assert_eq!(process.lseek(&fd, 0, Whence::SeekCur).await.unwrap(), expected);
            }
            5 => {
                // What it makes is given back.
                begin_and_drop(process.dup(&fd));
                begin_and_drop(process.pipe2(OFlag::empty()));
            }
            6 => {
                // Handed over together, answered each by itself.
                let seeks = (0..70).map(|i| {
                    let args = [fd.number() as u64, expected + i, 0, 0, 0, 0];
                    process.connection().call("lseek", Call::syscall(Sysno::lseek, args))
                });
                for (i, seek) in seeks.collect::<Vec<_>>().into_iter().enumerate() {
                    assert_eq!(seek.await.unwrap(), expected + i as u64);
                }
            }
            _ => {
                let pause = Duration::from_micros(random.below(2000) as u64);
                if random.below(4) == 0 {
                    process.nanosleep(pause / 8).await.unwrap();
                } else {
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }
    drop(memory);
    fd.close().await.unwrap();
}

/// What one thread does, with a descriptor of its own.
fn thread(process: &Process, number: u64, fd: i32, rounds: u64) {
    let mut random = Random::new(1000 + number);
    let call = |offset: u64, whence: Whence| {
        let args = [fd as u64, offset, whence as u64, 0, 0, 0];
        process.connection().call_blocking("lseek", &Call::syscall(Sysno::lseek, args)).unwrap()
    };
    for round in 0..rounds {
        let position = number << 32 | round << 8;
        assert_eq!(call(position, Whence::SeekSet), position);
        assert_eq!(call(0, Whence::SeekCur), position);
        if random.below(50) == 0 {
            std::thread::sleep(Duration::from_micros(random.below(1000) as u64));
        }
    }
}

/// The mappings of a process, without what lies on its stack.
fn mappings(pid: i32) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let lines = text.lines().filter(|line| !line.ends_with("[stack]"));
    lines.map(|line| format!("{line}\n")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn many_tasks_and_threads_get_their_own_results_in_order_and_leave_nothing() {
    for polling in [Polling::Adaptive, Polling::Never, Polling::Always] {
        let root = with_a_ring(polling).await;
        let pid = root.pid().unwrap();
        // What is left of making the ring is given up in the background.
        root.getpid().await.unwrap();
        let (fds_before, mappings_before) = (fds(pid), mappings(pid));

        let tasks = (1..=12).map(|number| tokio::spawn(task(root.clone(), number, 60)));
        let mut all: Vec<_> = tasks.collect();
        for number in 101..=103 {
            let (process, fd) = (root.clone(), file(&root).await);
            // Not one of the runtime's: it would wait for it for ever if it never ended.
            let (over, ended) = tokio::sync::oneshot::channel();
            std::thread::spawn(move || {
                thread(&process, number, fd.number(), 1000);
                drop(fd);
                let _ = over.send(());
            });
            all.push(tokio::spawn(async move { ended.await.unwrap() }));
        }
        for one in all {
            tokio::time::timeout(LIMIT, one).await.expect("it ends").unwrap();
        }
        assert!(root.connection().has_ring(), "it was in use all the time");
        // And pipes for large transfers, one for each direction, which stay.
        until_async("its descriptors are those from before", || {
            let now = fds(pid);
            let new: Vec<_> =
                now.iter().filter(|(number, link)| fds_before.get(number) != Some(link)).collect();
            new.len() <= 2
                && new.iter().all(|(_, link)| link.to_string_lossy().starts_with("pipe:"))
                && now.len() == fds_before.len() + new.len()
        })
        .await;
        until_async("its mappings are those from before", || mappings(pid) == mappings_before)
            .await;
    }
}

#[tokio::test]
async fn what_a_dropped_call_has_made_is_given_back_though_no_other_call_is_made() {
    for polling in [Polling::Adaptive, Polling::Never, Polling::Always] {
        let root = with_a_ring(polling).await;
        let pid = root.pid().unwrap();
        let fd = file(&root).await;
        let copies = || {
            let fds = fds(pid);
            fds.values().filter(|link| **link == fds[&fd.number()]).count()
        };
        for _ in 0..100 {
            begin_and_drop(root.dup(&fd));
            until_async("the copy is closed", || copies() == 1).await;
        }
    }
}

#[tokio::test]
async fn a_task_whose_results_are_always_there_lets_others_have_their_turn() {
    let root = with_a_ring(Polling::Always).await;
    let other = tokio::spawn(async {});
    let mut calls = 0;
    while !other.is_finished() {
        assert!(calls < 300, "no turn for others");
        calls += 1;
        let getppid = Call::syscall(Sysno::getppid, [0; 6]);
        let receipt = root.connection().submit(vec![getppid], Ok);
        // On the thread that everything here runs on: the server alone goes on meanwhile.
        std::thread::sleep(Duration::from_millis(1));
        receipt.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_go_on_while_the_ring_is_made() {
    let root = Local::new().stdio(Stdio::Null).polling(None).start().await.unwrap();
    let over = std::sync::Arc::new(AtomicBool::new(false));
    let made = std::sync::Arc::new(AtomicU64::new(0));
    let tasks: Vec<_> = (1..=4u64)
        .map(|number| {
            let (root, over, made) = (root.clone(), over.clone(), made.clone());
            tokio::spawn(async move {
                let fd = file(&root).await;
                while !over.load(Ordering::Relaxed) {
                    let position = (number << 32) + made.fetch_add(1, Ordering::Relaxed);
                    let moved = root.lseek(&fd, position.cast_signed(), Whence::SeekSet).await;
                    assert_eq!(moved.unwrap(), position);
                }
            })
        })
        .collect();
    until_async("calls are made", || made.load(Ordering::Relaxed) > 100).await;
    root.enter_ring(Polling::Adaptive).await.unwrap();
    let then = made.load(Ordering::Relaxed);
    until_async("calls are made", || made.load(Ordering::Relaxed) > then + 1000).await;
    over.store(true, Ordering::Relaxed);
    for task in tasks {
        task.await.unwrap();
    }
    assert!(root.connection().has_ring());
}

/// How often the threads of a process have given up the processor, by themselves or not.
fn switches(pid: i32) -> BTreeMap<String, Vec<String>> {
    let mut switches = BTreeMap::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let path = thread.unwrap().path();
        let status = fs::read_to_string(path.join("status")).unwrap();
        let counts = status.lines().filter(|line| line.contains("ctxt_switches"));
        let counts: Vec<String> = counts.map(String::from).collect();
        assert_eq!(counts.len(), 2, "{status}");
        switches.insert(path.display().to_string(), counts);
    }
    switches
}

/// Waits until a process has come to rest: for a moment none of its threads has run.
fn rests(pid: i32) {
    let mut last = switches(pid);
    until("it comes to rest", || {
        std::thread::sleep(Duration::from_millis(100));
        let before = std::mem::replace(&mut last, switches(pid));
        before == last
    });
}

#[test]
fn an_idle_pair_never_runs() {
    if role().is_some() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let root = runtime.block_on(async {
            let root = with_a_ring(Polling::Always).await;
            for _ in 0..10_000 {
                root.getpid().await.unwrap();
            }
            root
        });
        tell(root.pid().unwrap());
        hear();
        drop(root);
        return;
    }
    let mut controller = Role::start("an_idle_pair_never_runs", "");
    let server: i32 = controller.told().parse().unwrap();
    rests(controller.pid());
    rests(server);
    let before = (switches(controller.pid()), switches(server));
    // There is no event for "nothing happens".
    std::thread::sleep(Duration::from_secs(3));
    let after = (switches(controller.pid()), switches(server));
    assert_eq!(before, after);
    assert_eq!(state(server), Some('S'));
    controller.say("go");
}

/// How often the server is told to look for a call before it sleeps, and how long it has run, in
/// nanoseconds.
fn patience_and_time(pid: i32) -> (u32, u64) {
    let maps = mappings(pid);
    let ring = maps.lines().find(|line| line.contains("memfd:farcall-ring")).unwrap();
    let address = u64::from_str_radix(ring.split('-').next().unwrap(), 16).unwrap();
    let memory = fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut patience = [0; 4];
    memory.read_exact_at(&mut patience, address + 72).unwrap();
    let time = fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap();
    let time = time.split(' ').next().unwrap().parse().unwrap();
    (u32::from_le_bytes(patience), time)
}

#[tokio::test]
async fn a_server_that_is_never_to_poll_does_not_and_one_that_is_to_does() {
    let processors = std::thread::available_parallelism().unwrap().get();
    for (polling, looks) in [(Polling::Never, false), (Polling::Always, processors > 1)] {
        let root = with_a_ring(polling).await;
        let pid = root.pid().unwrap();
        for round in 0..50 {
            root.getpid().await.unwrap();
            let (patience, _) = patience_and_time(pid);
            assert_eq!(patience > 0, looks, "{polling:?}, call {round}");
            if round % 10 == 0 {
                // Between slow calls it uses no processor, once it has gone to sleep.
                rests(pid);
                let (_, before) = patience_and_time(pid);
                tokio::time::sleep(Duration::from_millis(100)).await;
                assert_eq!(patience_and_time(pid).1, before);
            }
        }
    }
}
