//! Calls that a seccomp filter forbids, as container runtimes and old kernels do: what goes on without
//! them, and what is said where nothing does.

use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::time::Duration;

use farcall::calls::Sysno;
use farcall::host::local::Stdio;
use farcall::image::Carrier;
use farcall::link::Polling;
use farcall::persist::{Resource, SharedMemory};
use farcall::{Error, Local, Process};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;

use crate::common::{TestHome, attach, cut, deny, deny_here, fds, root, until};

const PAGE: usize = 4096;

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
    // What there is no other way for says what it needs.
    let reserved = test.home.reserve(&"start".parse().unwrap()).unwrap();
    let error = alone.child().spawn_persistent(reserved, SharedMemory::Refuse).await.unwrap_err();
    assert!(error.to_string().contains("Linux 5.9"), "{error}");
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

/// A persistent process that runs the image as a program in which these calls fail from its first
/// instruction on, and as a controller that has attached to it.
async fn executed(test: &TestHome, root: &Process, forbidden: &[Sysno]) -> Process {
    let child = root.child().spawn().await.unwrap();
    for call in forbidden {
        deny(&child, *call, None, Errno::ENOSYS).await;
    }
    let image = farcall::image::executable(Carrier::Automatic).unwrap();
    let image = child.send_fds(&[image.as_fd()]).await.unwrap().remove(0);
    std::fs::DirBuilder::new().mode(0o700).create(test.path()).unwrap();
    let place = test.home.place(&"one".parse().unwrap());
    let program = format!("/proc/self/fd/{}", image.number());
    child.execve(program, ["farcall".as_ref(), place.socket()], [""; 0]).await.unwrap();
    until("it listens", || place.is_listening());
    attach(place).await.unwrap()
}

#[tokio::test]
async fn a_server_that_may_not_copy_in_its_process_by_a_call_does_so_through_a_pipe() {
    let test = TestHome::new();
    let root = root().await;
    let process = executed(&test, &root, &[Sysno::process_vm_writev]).await;
    assert_eq!(process.connection().version(), 1);
    let pid = process.pid().unwrap();
    let before = fds(pid);
    // Memory, wherever it begins and ends, and memory that ends half way.
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let memory = process.mmap(4 * PAGE, protection, MapFlags::MAP_PRIVATE, None).await.unwrap();
    let (start, end) = (memory.address(), memory.address() + 4 * PAGE as u64);
    let none = [end - PAGE as u64, PAGE as u64, ProtFlags::PROT_NONE.bits() as u64, 0, 0, 0];
    process.syscall(Sysno::mprotect, none).await.unwrap();
    let bytes: Vec<u8> = (0..2 * PAGE).map(|i| (i % 251) as u8).collect();
    for at in [0, 1, 4000] {
        process.write_memory(start + at, bytes.clone()).await.unwrap();
        assert_eq!(process.read_memory(start + at, bytes.len()).await.unwrap(), bytes);
    }
    let mut chain = process.chain();
    chain.store(start, 8, 7);
    let stored = chain.load(start, 8);
    let copied = chain.copy(start + 100, start + 4000, 5000);
    let across = chain.copy(start, end - PAGE as u64 - 100, 200);
    let done = chain.run().await.unwrap();
    assert_eq!([stored, copied, across].map(|later| done.value(later).unwrap()), [7, 5000, 100]);
    for address in [end - PAGE as u64, 0] {
        let mut chain = process.chain();
        chain.load(address, 8);
        let Err(Error::Chain(error)) = chain.run().await else { panic!("{address:#x}") };
        assert_eq!(error.errno, Errno::EFAULT);
    }
    // Names, the log, the ring, children, and calls that are sent again.
    process.keep_bytes("bytes", &bytes).await.unwrap();
    process.enter_ring(Polling::Adaptive).await.unwrap();
    let file = process.openat(None, "/etc/passwd", OFlag::O_RDONLY, Mode::empty()).await.unwrap();
    process.keep_fd("file", &file).await.unwrap();
    let late = process.syscall_within(Duration::from_millis(20), Sysno::pause, [0; 6]).await;
    assert!(matches!(late, Err(Error::TimedOut { .. })), "{late:?}");
    let child = process.child().spawn().await.unwrap();
    assert_eq!(child.getppid().await.unwrap(), pid);
    child.exit(3).await.unwrap();
    drop(child);
    cut(&process);
    process.reconnect().await.unwrap();
    process.prepare_for_reconnect().await.unwrap();
    let again = attach((*process.place().unwrap()).clone()).await.unwrap();
    assert!(again.log_before().is_some_and(|log| log.calls().next().is_some()));
    let named = again.name("bytes").await.unwrap().what;
    assert!(matches!(named, Resource::Bytes(kept) if kept == bytes));
    // No end of a pipe is left.
    let left = fds(pid).into_values().filter(|what| what.to_string_lossy().starts_with("pipe:"));
    assert_eq!(left.count(), 0, "{before:?}");
    again.exit(0).await.unwrap();
}

#[tokio::test]
async fn a_server_that_can_copy_nothing_in_its_process_says_why_and_makes_calls() {
    let test = TestHome::new();
    // What executes the image can copy nothing either.
    let root = Local::new().stdio(Stdio::Null).stream_version(0).start().await.unwrap();
    let process = executed(&test, &root, &[Sysno::process_vm_writev, Sysno::pipe2]).await;
    assert_eq!(process.connection().version(), 0);
    let file = process.openat(None, "/etc/passwd", OFlag::O_RDONLY, Mode::empty()).await.unwrap();
    assert_eq!(process.read(&file, 5).await.unwrap(), b"root:");
    let limit = Duration::from_millis(20);
    let errors = [
        process.keep_fd("file", &file).await.unwrap_err(),
        process.enter_ring(Polling::Adaptive).await.unwrap_err(),
        process.upgrade().await.unwrap_err(),
        process.syscall_within(limit, Sysno::getpid, [0; 6]).await.unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(error, Error::NoReadAhead { errno: Some(Errno::ENOSYS), .. }), "{error}");
        let text = error.to_string();
        assert!(["process_vm_writev", "pipe", "ENOSYS"].iter().all(|word| text.contains(word)));
    }
    // A child of it says the same.
    let child = process.child().spawn().await.unwrap();
    let error = child.enter_ring(Polling::Adaptive).await.unwrap_err();
    assert!(matches!(error, Error::NoReadAhead { errno: Some(Errno::ENOSYS), .. }), "{error}");
    let mut chain = process.chain();
    let memory = chain.output(8);
    chain.load(memory, 8);
    let Err(Error::Chain(error)) = chain.run().await else { panic!("it was loaded") };
    assert_eq!(error.errno, Errno::ENOSYS);
    process.exit(0).await.unwrap();
}

#[tokio::test]
async fn memory_that_only_a_process_itself_reaches_is_copied_at_any_size() {
    let root = root().await;
    let secret = root.syscall(Sysno::memfd_secret, [0; 6]).await;
    let secret = match secret {
        Ok(number) => root.adopt_fd(number as i32).unwrap(),
        // Where the kernel has none (before 5.14, or without secretmem.enable) there is nothing to copy.
        Err(error) => return assert_eq!(error.errno(), Some(Errno::ENOSYS)),
    };
    let (size, shared) = (4 * PAGE, MapFlags::MAP_SHARED);
    let args = [secret.number() as u64, size as u64, 0, 0, 0, 0];
    root.syscall(Sysno::ftruncate, args).await.unwrap();
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let memory = root.mmap(size, protection, shared, Some((&secret, 0))).await.unwrap();
    for len in [1, 8, 100, PAGE, 2 * PAGE + 1] {
        let bytes: Vec<u8> = (0..len).map(|i| i as u8 ^ 0x5a).collect();
        root.write_memory(memory.address() + 7, bytes.clone()).await.unwrap();
        assert_eq!(root.read_memory(memory.address() + 7, len).await.unwrap(), bytes);
    }
    let mut chain = root.chain();
    chain.store(memory.address(), 4, 42);
    let stored = chain.load(memory.address(), 4);
    assert_eq!(chain.run().await.unwrap().value(stored).unwrap(), 42);
}

#[tokio::test]
async fn much_data_takes_the_stream_where_vmsplice_is_forbidden() {
    const SIZE: usize = 1 << 20;
    let root = root().await;
    let process = root.child().spawn().await.unwrap();
    process.enter_ring(Polling::Adaptive).await.unwrap();
    deny(&process, Sysno::vmsplice, None, Errno::ENOSYS).await;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let memory = process.mmap(SIZE, protection, MapFlags::MAP_PRIVATE, None).await.unwrap();
    let bytes: Vec<u8> = (0..SIZE).map(|i| (i % 251) as u8).collect();
    for _ in 0..2 {
        process.write_memory(memory.address(), bytes.clone()).await.unwrap();
        assert!(process.read_memory(memory.address(), SIZE).await.unwrap() == bytes);
    }
}

#[test]
fn so_it_does_where_vmsplice_is_forbidden_to_the_controller() {
    const SIZE: usize = 1 << 20;
    let transfer = async {
        let root = root().await;
        let process = root.child().spawn().await.unwrap();
        process.enter_ring(Polling::Adaptive).await.unwrap();
        deny_here(Sysno::vmsplice, Errno::EPERM);
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let memory = process.mmap(SIZE, protection, MapFlags::MAP_PRIVATE, None).await.unwrap();
        let bytes: Vec<u8> = (0..SIZE).map(|i| (i % 251) as u8).collect();
        for _ in 0..2 {
            process.write_memory(memory.address(), bytes.clone()).await.unwrap();
            assert!(process.read_memory(memory.address(), SIZE).await.unwrap() == bytes);
        }
    };
    // The filter stays with the thread.
    let thread = std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.unwrap().block_on(transfer);
    });
    thread.join().unwrap();
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
