//! Calls from threads, without a runtime around them and beside one.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use farcall::calls::Sysno;
use farcall::host::local::Stdio;
use farcall::link::Polling;
use farcall::proto::Call;
use farcall::{Error, Local, Process, blocking};
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::common;

fn root(polling: Option<Polling>) -> Process {
    blocking::wait(Local::new().polling(polling).start()).unwrap()
}

/// lseek(2) on a descriptor of its own says whose result it is.
fn asks_and_gets_its_own(process: &Process, number: u64) {
    let memory = process.clone();
    let fd = blocking::wait(async move {
        use nix::fcntl::OFlag;
        use nix::sys::stat::Mode;
        memory.openat(None, "/proc/self/stat", OFlag::O_RDONLY, Mode::empty()).await
    })
    .unwrap();
    for step in 0..500 {
        let to = number << 20 | step;
        let seek = [fd.number() as u64, to, nix::libc::SEEK_SET as u64, 0, 0, 0];
        assert_eq!(process.syscall_blocking(Sysno::lseek, seek).unwrap(), to);
    }
}

#[test]
fn many_threads_without_a_runtime_get_each_its_own_results() {
    for polling in [None, Some(Polling::Adaptive), Some(Polling::Never), Some(Polling::Always)] {
        let root = Arc::new(root(polling));
        if let Some(polling) = polling {
            let process = root.clone();
            blocking::wait(async move { process.enter_ring(polling).await }).unwrap();
        }
        std::thread::scope(|scope| {
            for number in 1..=4 {
                let root = &root;
                scope.spawn(move || asks_and_gets_its_own(root, number));
            }
        });
    }
}

#[test]
fn a_call_that_takes_long_is_waited_for_and_holds_nobody_up_here() {
    for ring in [false, true] {
        let root = root(None);
        if ring {
            let process = root.clone();
            blocking::wait(async move { process.enter_ring(Polling::Adaptive).await }).unwrap();
        }
        let (read, write) = {
            let process = root.clone();
            blocking::wait(async move { process.pipe2(nix::fcntl::OFlag::empty()).await }).unwrap()
        };
        let child = {
            let process = root.clone();
            blocking::wait(async move { process.child().share_files().spawn().await }).unwrap()
        };
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut poll = [0u8; 8];
                poll[..4].copy_from_slice(&read.number().to_le_bytes());
                poll[4..6].copy_from_slice(&nix::libc::POLLIN.to_le_bytes());
                let process = root.clone();
                let memory = blocking::wait(async move {
                    use nix::sys::mman::{MapFlags, ProtFlags};
                    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
                    let memory =
                        process.mmap(4096, protection, MapFlags::MAP_PRIVATE, None).await?;
                    process.write_memory(memory.address(), poll).await?;
                    Ok(memory)
                })
                .unwrap();
                let forever = [memory.address(), 1, u64::MAX, 0, 0, 0];
                root.syscall_blocking(Sysno::poll, forever)
            });
            // In another process of the same table, while the first one waits.
            let write = [write.number() as u64, 0, 0, 0, 0, 0];
            common::until("the root server waits in poll", || {
                let syscall = format!("/proc/{}/syscall", root.pid().unwrap());
                let syscall = std::fs::read_to_string(syscall).unwrap();
                syscall.starts_with(&format!("{} ", Sysno::poll.id()))
            });
            assert_eq!(child.syscall_blocking(Sysno::close, write).unwrap(), 0);
            assert_eq!(reader.join().unwrap().unwrap(), 1);
        });
        // It is closed already.
        let _ = write.into_raw();
    }
}

#[test]
fn the_end_of_the_process_ends_the_waiting() {
    for polling in [None, Some(Polling::Adaptive)] {
        let root = root(polling);
        let process = root.clone();
        let child = blocking::wait(async move { process.child().spawn().await }).unwrap();
        for _ in 0..200 {
            child.syscall_blocking(Sysno::getpid, [0; 6]).unwrap();
        }
        let ended = child.syscall_blocking(Sysno::exit_group, [0; 6]);
        assert!(matches!(ended, Err(Error::Lost(_))), "{ended:?}");
        let refused = child.syscall_blocking(Sysno::getpid, [0; 6]);
        assert!(matches!(refused, Err(Error::Gone | Error::Lost(_))), "{refused:?}");
    }
}

#[test]
fn an_error_of_the_call_is_its_errno() {
    let root = root(None);
    let error = root.syscall_blocking(Sysno::close, [u64::MAX, 0, 0, 0, 0, 0]).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::EBADF));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn threads_and_tasks_share_a_connection_over_the_stream_and_in_the_ring() {
    for ring in [false, true] {
        let root = Local::new().polling(None).start().await.unwrap();
        if ring {
            root.enter_ring(Polling::Adaptive).await.unwrap();
        }
        let pid = root.pid().unwrap() as u64;
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let root = root.clone();
                std::thread::spawn(move || {
                    for _ in 0..2000 {
                        assert_eq!(root.syscall_blocking(Sysno::getpid, [0; 6]).unwrap(), pid);
                    }
                })
            })
            .collect();
        let tasks: Vec<_> = (0..2)
            .map(|_| {
                let root = root.clone();
                tokio::spawn(async move {
                    for _ in 0..2000 {
                        assert_eq!(root.getpid().await.unwrap() as u64, pid);
                    }
                })
            })
            .collect();
        for task in tasks {
            tokio::time::timeout(common::LIMIT, task).await.unwrap().unwrap();
        }
        for thread in threads {
            tokio::task::spawn_blocking(move || thread.join().unwrap()).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_thread_that_executes_tasks_is_not_blocked_and_one_that_may_block_is() {
    let root = Local::new().stdio(Stdio::Null).polling(None).start().await.unwrap();
    let begin = || root.connection().call("getpid", Call::syscall(Sysno::getpid, [0; 6]));
    // Nobody would read the reply that it waits for.
    let receipt = begin();
    assert!(catch_unwind(AssertUnwindSafe(|| receipt.wait())).is_err());
    let receipt = begin();
    let pid = tokio::task::spawn_blocking(|| receipt.wait()).await.unwrap().unwrap();
    assert_eq!(pid, root.pid().unwrap() as u64);
}

#[test]
fn without_free_descriptors_waiting_is_an_error_until_there_are_some() {
    if !common::alone("without_free_descriptors_waiting_is_an_error_until_there_are_some") {
        return;
    }
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let mut refused = 0;
    for most in 3.. {
        setrlimit(Resource::RLIMIT_NOFILE, most, hard).unwrap();
        match blocking::wait(async move { Ok(most) }) {
            Ok(told) => {
                assert_eq!(told, most);
                break;
            }
            Err(Error::Io { source, .. }) => {
                assert_eq!(source.raw_os_error(), Some(Errno::EMFILE as i32), "{most}: {source}");
            }
            Err(error) => panic!("{most}: {error}"),
        }
        refused += 1;
    }
    assert!(refused > 0);
}
