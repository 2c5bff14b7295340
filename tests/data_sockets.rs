//! Data sockets that children get when they are first needed.

use crate::common;

use std::os::fd::AsFd;

use common::{LIMIT, blocked_in, fds, roots, until_async};
use farcall::calls::Sysno;
use farcall::proto::Call;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[tokio::test]
async fn a_child_has_none_until_it_is_needed_and_one_from_then_on() {
    for root in roots().await {
        let child = root.child().spawn().await.unwrap();
        let pid = child.pid().unwrap();
        child.getpid().await.unwrap();
        let before = fds(pid).len();
        assert_eq!(child.server_descriptors().len(), 1);
        for _ in 0..3 {
            let null = std::fs::File::open("/dev/null").unwrap();
            let sent = child.send_fds(&[null.as_fd()]).await.unwrap();
            child.fetch_fd(&sent[0]).await.unwrap();
            for fd in sent {
                fd.close().await.unwrap();
            }
            assert_eq!(child.server_descriptors().len(), 2);
            assert_eq!(fds(pid).len(), before + 1);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn it_comes_in_between_of_many_calls() {
    for root in roots().await {
        for _ in 0..20 {
            let child = root.child().spawn().await.unwrap();
            let pid = child.pid_in_parent();
            let process = child.process().clone();
            let callers = (0..4).map(|_| {
                let process = process.clone();
                tokio::spawn(async move {
                    for _ in 0..50 {
                        assert_eq!(process.getpid().await.unwrap(), pid);
                    }
                })
            });
            let passers = (0..3).map(|_| {
                let process = process.clone();
                tokio::spawn(async move {
                    let null = std::fs::File::open("/dev/null").unwrap();
                    let sent = process.send_fds(&[null.as_fd()]).await.unwrap();
                    process.fetch_fd(&sent[0]).await.unwrap();
                })
            });
            let tasks: Vec<_> = callers.chain(passers).collect();
            for task in tasks {
                tokio::time::timeout(LIMIT, task).await.unwrap().unwrap();
            }
            // A ring, which it may have too, has two bells and what interrupts its calls.
            let own = child.server_descriptors().len();
            assert!(own == 2 || own == 5, "{own}");
            child.exit(0).await.unwrap();
        }
    }
}

#[tokio::test]
async fn to_wait_for_one_in_a_child_that_is_blocked_blocks_nobody_else() {
    for root in roots().await {
        let child = root.child().share_files().spawn().await.unwrap();
        let blocked = child.connection().call("pause", Call::syscall(Sysno::pause, [0; 6]));
        let pid = child.pid().unwrap();
        until_async("it is blocked", || blocked_in(pid) == Some(Sysno::pause as usize)).await;
        let process = child.process().clone();
        let passed = tokio::spawn(async move {
            let null = std::fs::File::open("/dev/null").unwrap();
            process.send_fds(&[null.as_fd()]).await.map(|sent| sent.len())
        });
        tokio::task::yield_now().await;
        // They share a table with it.
        let sibling = tokio::time::timeout(LIMIT, root.child().share_files().spawn()).await;
        let sibling = sibling.unwrap().unwrap();
        sibling.unshare(nix::sched::CloneFlags::CLONE_FILES).await.unwrap();
        kill(Pid::from_raw(pid), Signal::SIGPIPE).unwrap();
        assert!(blocked.await.is_err());
        assert_eq!(passed.await.unwrap().unwrap(), 1);
    }
}

#[tokio::test]
async fn one_that_is_given_up_is_made_all_the_same_and_the_stream_stays_in_step() {
    for root in roots().await {
        for polls in 1..6 {
            let child = root.child().spawn().await.unwrap();
            let null = std::fs::File::open("/dev/null").unwrap();
            let fds = [null.as_fd()];
            let mut passing = Box::pin(child.send_fds(&fds));
            for _ in 0..polls {
                tokio::select! {
                    biased;
                    _ = &mut passing => break,
                    () = tokio::task::yield_now() => {}
                }
            }
            drop(passing);
            for _ in 0..10 {
                assert_eq!(child.getpid().await.unwrap(), child.pid_in_parent());
            }
            child.send_fds(&fds).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_child_that_dies_meanwhile_is_an_error() {
    for root in roots().await {
        let mut child = root.child().share_files().spawn().await.unwrap();
        child.kill(Signal::SIGSTOP).unwrap();
        let process = child.process().clone();
        let passed = tokio::spawn(async move {
            let null = std::fs::File::open("/dev/null").unwrap();
            process.send_fds(&[null.as_fd()]).await.map(|sent| sent.len())
        });
        tokio::task::yield_now().await;
        child.kill(Signal::SIGKILL).unwrap();
        child.wait().await.unwrap();
        assert!(tokio::time::timeout(LIMIT, passed).await.unwrap().unwrap().is_err());
        // Others go on.
        let null = std::fs::File::open("/dev/null").unwrap();
        let next = root.child().share_files().spawn().await.unwrap();
        next.send_fds(&[null.as_fd()]).await.unwrap();
    }
}
