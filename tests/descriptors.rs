//! Tables of descriptors that are full, on either side: every step that passes or receives a descriptor
//! works or says so, and the process answers the next call.

use std::fs::File;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::time::Duration;

use crate::common::{
    LIMIT, Role, TestHome, alone, cut, limit_descriptors, role, root_without_rings,
    spawn_persistent, tell, until_async,
};
use farcall::calls::Sysno;
use farcall::host::local::Stdio;
use farcall::link::Polling;
use farcall::persist::{Attach, Home, Place, SharedMemory, attach};
use farcall::{Child, Error, Fd, Local, Outcome, Process};
use nix::errno::Errno;
use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// More calls than it takes until a process gets its ring by itself.
const OFTEN: usize = 200;
/// How many descriptors a process may have whose table is filled.
const MOST: u64 = 100;
/// So many free descriptors are enough for everything.
const ENOUGH: usize = 12;

/// Whose table is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Controller,
    Target,
}

/// A table with few free descriptors.
enum Full {
    Here(Vec<OwnedFd>),
    There(Vec<Fd>),
}

impl Full {
    /// All but `free` of the descriptors that this process, or the target, may have are in use.
    async fn but(free: usize, side: Side, target: &Process) -> Self {
        match side {
            Side::Controller => {
                let null = OwnedFd::from(File::open("/dev/null").unwrap());
                let mut taken = vec![null];
                while let Ok(fd) = taken[0].try_clone() {
                    taken.push(fd);
                }
                taken.truncate(taken.len() - free);
                Self::Here(taken)
            }
            Side::Target => {
                limit_descriptors(target.pid().unwrap(), MOST);
                let mut taken = vec![null(target).await];
                while let Ok(fd) = target.dup(&taken[0]).await {
                    taken.push(fd);
                }
                for fd in taken.split_off(taken.len() - free) {
                    fd.close().await.unwrap();
                }
                Self::There(taken)
            }
        }
    }

    async fn end(self) {
        match self {
            Self::Here(taken) => drop(taken),
            Self::There(taken) => {
                for fd in taken {
                    fd.close().await.unwrap();
                }
            }
        }
    }
}

/// Whether an error says that no descriptor was free.
fn says_so(error: &Error) -> bool {
    let text = error.to_string();
    text.contains("EMFILE") || text.contains(Errno::EMFILE.desc()) || text.contains("did not fit")
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future)
        .await
        .unwrap_or_else(|_| panic!("{what}: still not over after {LIMIT:?}"))
}

type Step<'a> = Pin<Box<dyn Future<Output = Result<(), Error>> + 'a>>;

/// Lets `step` be done in the target with 0, 1, 2 … free descriptors. It works, or says that there were
/// too few; the target answers afterwards, and the step works when there are enough.
async fn with_few<'a>(name: &str, side: Side, target: &Process, step: impl Fn() -> Step<'a>) {
    for free in 0..=ENOUGH {
        let what = format!("{name}, {free} free on the side of the {side:?}");
        let full = Full::but(free, side, target).await;
        let result = within(&what, step()).await;
        within(&what, full.end()).await;
        if let Err(error) = &result {
            assert!(says_so(error), "{what}: {error:?}");
        }
        within(&what, target.getpid()).await.unwrap_or_else(|error| panic!("{what}: {error:?}"));
        if free == ENOUGH {
            result.unwrap_or_else(|error| panic!("{what}: {error:?}"));
        }
        let again = within(&what, step()).await;
        again.unwrap_or_else(|error| panic!("{what}, and then freed: {error:?}"));
    }
}

/// The same for a step that changes the target: each time it is another one.
async fn with_few_of_its_own(
    name: &str,
    side: Side,
    root: &Process,
    step: impl AsyncFn(&Child) -> Result<(), Error>,
) {
    for free in 0..=ENOUGH {
        let what = format!("{name}, {free} free on the side of the {side:?}");
        let child = root.child().spawn().await.unwrap();
        let full = Full::but(free, side, &child).await;
        let result = within(&what, step(&child)).await;
        within(&what, full.end()).await;
        if let Err(error) = &result {
            assert!(says_so(error), "{what}: {error:?}");
        }
        let pid = within(&what, child.getpid()).await;
        assert_eq!(pid.unwrap_or_else(|error| panic!("{what}: {error:?}")), child.pid_in_parent());
        if free == ENOUGH {
            result.unwrap_or_else(|error| panic!("{what}: {error:?}"));
        }
        let again = within(&what, step(&child)).await;
        again.unwrap_or_else(|error| panic!("{what}, and then freed: {error:?}"));
    }
}

/// Plays the role of a process whose table of descriptors is full, with what there is to be done in it;
/// or starts that process.
fn in_a_process_of_its_own(test: &str, steps: impl AsyncFn(Process, Home)) {
    let Some(home) = role() else {
        let home = TestHome::new();
        let mut other = Role::start(test, home.path());
        assert_eq!(other.told(), "done");
        assert!(other.ended().success());
        return;
    };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let root = Local::new().stdio(Stdio::Null).start().await.unwrap();
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, MOST, hard).unwrap();
        steps(root, Home::at(home)).await;
    });
    tell("done");
}

async fn null(process: &Process) -> Fd {
    let flags = nix::fcntl::OFlag::O_RDWR;
    let open = process.openat(None, "/dev/null", flags, nix::sys::stat::Mode::empty());
    open.await.unwrap()
}

/// Ends a child, and waits until nothing of it is left.
async fn ended(mut child: Child) -> Result<(), Error> {
    child.exit(0).await?;
    child.wait().await.map(drop)
}

async fn fetches(child: &Process) -> Result<(), Error> {
    let number = child.server_descriptors().first().copied().unwrap();
    let dup =
        child.syscall(Sysno::fcntl, [number as u64, libc::F_DUPFD_CLOEXEC as u64, 3, 0, 0, 0]);
    let fd = child.adopt_fd(dup.await? as i32)?;
    let fetched = child.fetch_fd(&fd).await.map(drop);
    fd.close().await?;
    fetched
}

async fn sends(child: &Process) -> Result<(), Error> {
    // One that is open already.
    let sent = child.send_fds(&[io::stdin().as_fd()]).await?;
    for fd in sent {
        fd.close().await?;
    }
    Ok(())
}

async fn is_called_often(child: &Process) -> Result<(), Error> {
    for _ in 0..OFTEN {
        child.getpid().await?;
    }
    Ok(())
}

/// What passes descriptors to a child that has not had any, and no socket for them, or from it.
async fn first_steps(side: Side, root: &Process) {
    with_few_of_its_own("fetch_fd", side, root, async |child| fetches(child).await).await;
    with_few_of_its_own("send_fds", side, root, async |child| sends(child).await).await;
    let ring = async |child: &Child| child.enter_ring(Polling::Adaptive).await;
    with_few_of_its_own("enter_ring", side, root, ring).await;
    let often = async |child: &Child| is_called_often(child).await;
    with_few_of_its_own("a ring of its own accord", side, root, often).await;
    let spawn = async |child: &Child| ended(child.child().spawn().await?).await;
    with_few_of_its_own("a child's child", side, root, spawn).await;
}

/// What makes children of a process and runs programs.
async fn children(side: Side, root: &Process) {
    let parent = root.child().spawn().await.unwrap();
    let of = |builder: farcall::ChildBuilder| async move { ended(builder.spawn().await?).await };
    with_few("spawn", side, &parent, || Box::pin(of(parent.child()))).await;
    with_few("spawn, memory shared", side, &parent, || Box::pin(of(parent.child().share_memory())))
        .await;
    let shared = || parent.child().share_memory().share_files();
    with_few("spawn, all shared", side, &parent, || Box::pin(of(shared()))).await;
    let exec = |builder: farcall::ChildBuilder| async move {
        let mut program = builder.exec("/bin/true", ["true"], [""; 0]).await?;
        program.wait().await.map(drop)
    };
    with_few("exec", side, &parent, || Box::pin(exec(parent.child().share_memory()))).await;
    with_few("exec, isolated", side, &parent, || Box::pin(exec(parent.child()))).await;
    with_few("pidfd of a child", side, &parent, || {
        Box::pin(async {
            let child = parent.child().spawn().await?;
            child.exit(0).await?;
            let waited = parent.wait_for_child(child.pid_in_parent()).await;
            if waited.is_err() {
                ended(child).await?;
            }
            waited.map(drop)
        })
    })
    .await;
}

/// What transfers much.
async fn bulk(side: Side, root: &Process) {
    const SIZE: usize = 1 << 20;
    let step = async |child: &Child| {
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let memory = child.mmap(SIZE, protection, MapFlags::MAP_PRIVATE, None).await?;
        child.write_memory(memory.address(), vec![7; SIZE]).await?;
        assert!(child.read_memory(memory.address(), SIZE).await? == vec![7; SIZE]);
        Ok::<(), Error>(())
    };
    for free in 0..=ENOUGH {
        let child = root.child().spawn().await.unwrap();
        child.enter_ring(Polling::Adaptive).await.unwrap();
        let full = Full::but(free, side, &child).await;
        within("a large transfer", step(&child)).await.unwrap();
        full.end().await;
        within("a large transfer", step(&child)).await.unwrap();
    }
}

/// What is done to processes that outlive their controllers.
#[expect(clippy::too_many_lines, reason = "a test is one story")]
async fn persistent(side: Side, root: &Process, home: &Home) {
    let name = |text: &str| text.parse().unwrap();
    let start = async |text: &str| {
        let reserved = home.reserve(&name(text)).unwrap();
        root.child().spawn_persistent(reserved, SharedMemory::Refuse).await.unwrap()
    };
    let process = start("one").await;
    let place = process.place().unwrap();
    let fd = null(root).await;
    with_few("keep_fd_of", side, &process, || {
        Box::pin(async {
            drop(process.keep_fd_of("kept", root, &fd).await?);
            process.release("kept").await
        })
    })
    .await;
    with_few("upgrade", side, &process, || Box::pin(process.upgrade())).await;
    with_few("reconnect", side, &process, || Box::pin(process.reconnect())).await;
    for free in 0..=ENOUGH {
        let what = format!("reconnect after a lost link, {free} free on the side of the {side:?}");
        let there = match side {
            Side::Target => Some(Full::but(free, side, &process).await),
            Side::Controller => None,
        };
        cut(&process);
        until_async("the link is lost", || !process.connection().is_connected()).await;
        let here = match side {
            Side::Target => None,
            Side::Controller => Some(Full::but(free, side, &process).await),
        };
        let result = within(&what, process.reconnect()).await;
        drop(here);
        if let Err(error) = result {
            assert!(side == Side::Controller && says_so(&error), "{what}: {error:?}");
            within(&what, process.reconnect()).await.unwrap();
        }
        within(&what, process.getpid()).await.unwrap();
        if let Some(there) = there {
            there.end().await;
        }
    }
    for free in 0..=ENOUGH {
        let what = format!("take over, {free} free on the side of the {side:?}");
        let full = Full::but(free, side, &process).await;
        let taken = within(&what, Attach::default().take_over().to(Place::clone(&place))).await;
        // Handles from before are stale afterwards.
        let numbers: Vec<i32> = match full {
            Full::Here(taken) => {
                drop(taken);
                Vec::new()
            }
            Full::There(taken) => taken.into_iter().map(Fd::into_raw).collect(),
        };
        match taken {
            Ok(other) => {
                within(&what, other.getpid()).await.unwrap();
                other.prepare_for_reconnect().await.unwrap();
            }
            Err(error) => assert!(says_so(&error), "{what}: {error:?}"),
        }
        within(&what, process.reconnect()).await.unwrap();
        within(&what, process.getpid()).await.unwrap();
        for number in numbers {
            process.syscall(Sysno::close, [number as u64, 0, 0, 0, 0, 0]).await.unwrap();
        }
    }
    process.exit(0).await.unwrap();
    for free in 0..=ENOUGH {
        let what = format!("attach, {free} free");
        let process = start("other").await;
        let place = process.place().unwrap();
        process.prepare_for_reconnect().await.unwrap();
        let full =
            Full::but(if side == Side::Controller { free } else { 0 }, Side::Controller, &process)
                .await;
        let attached = within(&what, attach(Place::clone(&place))).await;
        drop(full);
        match attached {
            Err(error) => assert!(says_so(&error), "{what}: {error:?}"),
            Ok(attached) => attached.prepare_for_reconnect().await.unwrap(),
        }
        let attached = within(&what, attach(Place::clone(&place))).await.unwrap();
        attached.exit(0).await.unwrap();
    }
    for free in 0..=ENOUGH {
        let what = format!("a persistent child that inherits, {free} free");
        let parent = root.child().spawn().await.unwrap();
        let reserved = home.reserve(&name(&format!("inherits-{free}"))).unwrap();
        let builder = parent.child().inherit("null", root, &fd).unwrap();
        let full = Full::but(free, side, &parent).await;
        let made = within(&what, builder.spawn_persistent(reserved, SharedMemory::Refuse)).await;
        within(&what, full.end()).await;
        match made {
            Err(error) => assert!(says_so(&error), "{what}: {error:?}"),
            Ok(made) => made.exit(0).await.unwrap(),
        }
        within(&what, parent.getpid()).await.unwrap();
        within(&what, root.getpid()).await.unwrap();
    }
}

#[test]
fn a_controller_without_free_descriptors_says_so_and_its_processes_answer() {
    let test = "a_controller_without_free_descriptors_says_so_and_its_processes_answer";
    in_a_process_of_its_own(test, async |root, home| {
        first_steps(Side::Controller, &root).await;
        children(Side::Controller, &root).await;
        bulk(Side::Controller, &root).await;
        persistent(Side::Controller, &root, &home).await;
        for free in 0..=ENOUGH {
            let full = Full::but(free, Side::Controller, &root).await;
            let started = within("a root server", Local::new().start()).await;
            full.end().await;
            match started {
                Err(error) => assert!(says_so(&error), "{free} free: {error:?}"),
                Ok(started) => drop(started.getpid().await.unwrap()),
            }
        }
        Local::new().start().await.unwrap().getpid().await.unwrap();
    });
}

#[test]
fn a_process_without_free_descriptors_says_so_and_answers() {
    let test = "a_process_without_free_descriptors_says_so_and_answers";
    in_a_process_of_its_own(test, async |root, home| {
        first_steps(Side::Target, &root).await;
        children(Side::Target, &root).await;
        bulk(Side::Target, &root).await;
        persistent(Side::Target, &root, &home).await;
    });
}

#[test]
fn a_process_that_got_no_ring_for_want_of_descriptors_gets_it_when_there_are_some() {
    let test = "a_process_that_got_no_ring_for_want_of_descriptors_gets_it_when_there_are_some";
    in_a_process_of_its_own(test, async |root, _| {
        // What one that ends gives back in the background would be free for the next.
        let mut kept = Vec::new();
        for side in [Side::Controller, Side::Target] {
            for free in 0..=1 {
                let child = root.child().spawn().await.unwrap();
                let full = Full::but(free, side, &child).await;
                within("calls", is_called_often(&child)).await.unwrap();
                assert!(!child.connection().has_ring(), "{side:?}, {free}");
                full.end().await;
                let gets_it = async {
                    while !child.connection().has_ring() {
                        is_called_often(&child).await.unwrap();
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                };
                within("a ring", gets_it).await;
                kept.push(child);
            }
        }
    });
}

/// It has to ask who has the process, for which it has no descriptor; it asks again.
#[tokio::test]
async fn a_controller_without_free_descriptors_is_told_later_that_it_has_lost_its_process() {
    if !alone("a_controller_without_free_descriptors_is_told_later_that_it_has_lost_its_process") {
        return;
    }
    let home = TestHome::new();
    let child = spawn_persistent(&home.home, &root_without_rings().await).await;
    limit_descriptors(0, MOST);
    for free in 0..=3 {
        let place = Place::clone(&child.place().unwrap());
        // This thread is the runtime's only one: nothing is heard here until the table is full.
        let other = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                let other = Attach::default().take_over().to(place).await.unwrap();
                other.prepare_for_reconnect().await.unwrap();
            });
        });
        other.join().unwrap();
        let full = Full::but(free, Side::Controller, &child).await;
        let process = child.process().clone();
        let call = tokio::spawn(async move { process.getpid().await });
        until_async("the link is lost", || !child.connection().is_connected()).await;
        // Whoever asks at once has asked.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        full.end().await;
        let told = within("a call", call).await.unwrap();
        assert!(
            matches!(told, Err(Error::Superseded { outcome: Outcome::NotExecuted, .. })),
            "{free} free: {told:?}"
        );
        child.reconnect().await.unwrap();
        child.getpid().await.unwrap();
    }
    child.exit(0).await.unwrap();
}

/// Which of the standard streams' numbers a process has in use.
fn standard_streams(pid: i32) -> Vec<i32> {
    crate::common::fds(pid).into_keys().filter(|number| *number <= 2).collect()
}

async fn close_standard_streams(process: &Process) {
    process.syscall(Sysno::close_range, [0, 2, 0, 0, 0, 0]).await.unwrap();
}

#[tokio::test]
async fn a_servers_descriptors_stay_off_closed_standard_streams() {
    for version in [0, 1] {
        let root = Local::new().stdio(Stdio::Null).stream_version(version).start().await.unwrap();
        let parent = root.child().spawn().await.unwrap();
        close_standard_streams(&parent).await;
        let shared = || parent.child().share_files();
        for (what, builder) in
            [("isolated", parent.child()), ("shared", shared()), ("all", shared().share_memory())]
        {
            let child = builder.spawn().await.unwrap();
            for process in [child.process(), parent.process()] {
                fetches(process).await.unwrap();
                process.getpid().await.unwrap();
                let pid = process.pid().unwrap();
                assert!(process.server_descriptors().iter().all(|number| *number > 2), "{what}");
                // What is closed in the background comes before this.
                process.getpid().await.unwrap();
                assert!(standard_streams(pid).is_empty(), "{what}: {:?}", crate::common::fds(pid));
            }
            ended(child).await.unwrap();
        }
    }
}

#[tokio::test]
async fn so_do_those_of_a_persistent_process_and_of_its_clients() {
    let test = TestHome::new();
    let root = Local::new().stdio(Stdio::Null).start().await.unwrap();
    let reserved = test.home.reserve(&"closed".parse().unwrap()).unwrap();
    let child = root.child().spawn_persistent(reserved, SharedMemory::Refuse).await.unwrap();
    let (pid, place) = (child.pid().unwrap(), child.place().unwrap());
    close_standard_streams(&child).await;
    child.reconnect().await.unwrap();
    assert!(standard_streams(pid).is_empty(), "{:?}", crate::common::fds(pid));
    child.prepare_for_reconnect().await.unwrap();
    assert!(standard_streams(pid).is_empty(), "{:?}", crate::common::fds(pid));
    let attached = attach(Place::clone(&place)).await.unwrap();
    fetches(&attached).await.unwrap();
    attached.upgrade().await.unwrap();
    attached.getpid().await.unwrap();
    assert!(standard_streams(pid).is_empty(), "{:?}", crate::common::fds(pid));
    attached.exit(0).await.unwrap();
}

#[test]
fn so_do_the_controllers() {
    let test = "so_do_the_controllers";
    in_a_process_of_its_own(test, async |root, home| {
        let numbers: Vec<OwnedFd> = (0..=2)
            .map(|number| {
                // SAFETY: the number is open, and the call has no pointers.
                let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
                // SAFETY: the kernel just made it for us.
                unsafe { std::os::fd::FromRawFd::from_raw_fd(copy) }
            })
            .collect();
        // SAFETY: nothing else uses them here until they are put back.
        unsafe { libc::close_range(0, 2, 0) };
        let mut open = Vec::new();
        let opened = || {
            // SAFETY: the call has no pointers.
            (0..=2).filter(|number| unsafe { libc::fcntl(*number, libc::F_GETFD) } >= 0)
        };
        let other = Local::new().stdio(Stdio::Inherit).start().await.unwrap();
        for root in [&root, &other] {
            let child = root.child().spawn().await.unwrap();
            fetches(&child).await.unwrap();
            child.enter_ring(Polling::Adaptive).await.unwrap();
            let memory = child
                .mmap(1 << 20, ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE, None)
                .await
                .unwrap();
            child.write_memory(memory.address(), vec![7; 1 << 20]).await.unwrap();
            open.extend(opened());
        }
        let reserved = home.reserve(&"one".parse().unwrap()).unwrap();
        let child = root.child().spawn_persistent(reserved, SharedMemory::Refuse).await.unwrap();
        child.reconnect().await.unwrap();
        let place = child.place().unwrap();
        child.prepare_for_reconnect().await.unwrap();
        let attached = attach(Place::clone(&place)).await.unwrap();
        open.extend(opened());
        attached.exit(0).await.unwrap();
        for (number, copy) in (0..).zip(&numbers) {
            // SAFETY: the calls have no pointers.
            unsafe { libc::dup2(std::os::fd::AsRawFd::as_raw_fd(copy), number) };
        }
        assert!(open.is_empty(), "{open:?}");
    });
}
