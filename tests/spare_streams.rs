//! Streams that children leave to the next ones: whose they are, and that nothing of one child reaches
//! another.

use crate::common;

use std::collections::BTreeSet;

use common::{TestHome, blocked_in, fds, roots, until_async};
use farcall::calls::{Sysno, WaitStatus};
use farcall::host::local::Stdio;
use farcall::persist::SharedMemory;
use farcall::proto::Call;
use farcall::{Child, Local, Process};
use nix::sys::signal::Signal;

async fn sharing(root: &Process) -> Child {
    root.child().share_files().spawn().await.unwrap()
}

/// Ends a child in good order.
async fn end(mut child: Child, status: i32) {
    child.exit(status).await.unwrap();
    assert_eq!(child.wait().await.unwrap(), WaitStatus::Exited(status));
}

/// The number of the one stream that a child has left in its parent's table.
async fn spare(root: &Process) -> i32 {
    let child = sharing(root).await;
    let own = child.server_descriptors();
    end(child, 0).await;
    let left: Vec<i32> = own.intersection(&root.server_descriptors()).copied().collect();
    let &[number] = left.as_slice() else { panic!("{left:?}") };
    assert!(fds(root.pid().unwrap()).contains_key(&number));
    number
}

#[tokio::test]
async fn a_stream_that_a_child_has_left_is_the_next_ones_and_is_made_once() {
    for root in roots().await {
        let pid = root.pid().unwrap();
        let own = root.server_descriptors();
        end(sharing(&root).await, 1).await;
        let kept: Vec<i32> = root.server_descriptors().difference(&own).copied().collect();
        let &[number] = kept.as_slice() else { panic!("{kept:?}") };
        let before = fds(pid);
        for status in 2..20 {
            let child = sharing(&root).await;
            assert_eq!(child.server_descriptors(), BTreeSet::from([number]));
            // What was passed on meanwhile is closed with the next call.
            root.getpid().await.unwrap();
            assert_eq!(fds(pid), before);
            assert_eq!(child.getppid().await.unwrap(), root.getpid().await.unwrap());
            end(child, status).await;
        }
        assert_eq!(fds(pid), before);
    }
}

#[tokio::test]
async fn children_side_by_side_have_streams_of_their_own_and_few_are_kept() {
    for root in roots().await {
        let own = root.server_descriptors();
        for _ in 0..3 {
            let mut children = Vec::new();
            for _ in 0..10 {
                children.push(sharing(&root).await);
            }
            let numbers: BTreeSet<i32> =
                children.iter().flat_map(|child| child.server_descriptors()).collect();
            assert_eq!(numbers.len(), children.len());
            for child in &children {
                assert_eq!(child.getpid().await.unwrap(), child.pid_in_parent());
            }
            for (status, child) in (0..).zip(children) {
                end(child, status).await;
            }
            assert_eq!(root.server_descriptors().len(), own.len() + 4);
        }
    }
}

#[tokio::test]
async fn what_a_killed_child_has_not_read_reaches_no_other() {
    for root in roots().await {
        let pid = root.pid().unwrap();
        let mut child = sharing(&root).await;
        // What was passed on meanwhile is closed with the next call.
        root.getpid().await.unwrap();
        let before: BTreeSet<i32> = fds(pid).into_keys().collect();
        let stream = child.server_descriptors();
        let blocked = child.connection().call("pause", Call::syscall(Sysno::pause, [0; 6]));
        let here = child.pid().unwrap();
        until_async("it is blocked", || blocked_in(here) == Some(Sysno::pause as usize)).await;
        // It lies in the stream, and would end whoever reads it.
        let exit = Call::syscall(Sysno::exit_group, [7, 0, 0, 0, 0, 0]);
        let unread = child.connection().call("exit_group", exit);
        tokio::task::yield_now().await;
        child.kill(Signal::SIGKILL).unwrap();
        let killed = WaitStatus::Signaled { signal: Signal::SIGKILL as i32, core_dumped: false };
        assert_eq!(child.wait().await.unwrap(), killed);
        assert!(blocked.await.is_err() && unread.await.is_err());
        drop(child);
        until_async("its stream is closed", || {
            fds(pid).into_keys().collect::<BTreeSet<i32>>() == &before - &stream
        })
        .await;
        for status in 0..3 {
            let child = sharing(&root).await;
            child.getpid().await.unwrap();
            end(child, status).await;
        }
    }
}

#[tokio::test]
async fn a_child_that_is_dropped_leaves_no_stream() {
    for root in roots().await {
        let pid = root.pid().unwrap();
        let before = fds(pid);
        drop(sharing(&root).await);
        until_async("all is as before", || fds(pid) == before).await;
    }
}

#[tokio::test]
async fn a_child_with_a_copy_of_the_table_has_no_stream_of_others_in_it() {
    for root in roots().await {
        let number = spare(&root).await;
        for memory in [false, true] {
            let builder = root.child();
            let builder = if memory { builder.share_memory() } else { builder };
            let child = builder.spawn().await.unwrap();
            child.getpid().await.unwrap();
            let own = child.server_descriptors();
            assert!(own.contains(&number) || !fds(child.pid().unwrap()).contains_key(&number));
            // The stream is as good as before.
            let next = sharing(&root).await;
            assert_eq!(next.server_descriptors(), BTreeSet::from([number]));
            end(next, 3).await;
        }
    }
}

#[tokio::test]
async fn a_stream_that_somebody_has_closed_is_not_used() {
    for root in roots().await {
        let number = spare(&root).await as u64;
        root.syscall(Sysno::close, [number, 0, 0, 0, 0, 0]).await.unwrap();
        // The number is another one's now.
        let socket = root.syscall(Sysno::eventfd2, [0, 0, 0, 0, 0, 0]).await.unwrap();
        assert_eq!(socket, number);
        let child = sharing(&root).await;
        assert!(!child.server_descriptors().contains(&(number as i32)));
        child.getpid().await.unwrap();
        end(child, 4).await;
        assert!(fds(root.pid().unwrap()).contains_key(&(number as i32)));
    }
}

#[tokio::test]
async fn a_process_that_becomes_persistent_keeps_none() {
    let test = TestHome::new();
    let root = Local::new().stdio(Stdio::Null).start().await.unwrap();
    let parent = root.child().spawn().await.unwrap();
    let number = spare(&parent).await;
    let pid = parent.pid().unwrap();
    let stream = fds(pid).remove(&number);
    let reserved = test.home.reserve(&"one".parse().unwrap()).unwrap();
    parent.make_persistent(reserved, SharedMemory::Refuse).await.unwrap();
    parent.getpid().await.unwrap();
    assert!(stream.is_some() && !fds(pid).into_values().any(|other| Some(other) == stream));
    let own = parent.server_descriptors();
    // Nor do its children leave theirs.
    end(sharing(&parent).await, 5).await;
    until_async("nothing is left", || parent.server_descriptors() == own).await;
    parent.exit(0).await.unwrap();
}

#[test]
fn a_runtime_that_is_gone_takes_no_stream_with_it() {
    let runtime = || tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    // It carries the root server all the time.
    let first = runtime();
    let root = first.block_on(async {
        let root = Local::new().stdio(Stdio::Null).start().await.unwrap();
        end(sharing(&root).await, 0).await;
        root
    });
    for status in 1..4 {
        runtime().block_on(async { end(sharing(&root).await, status).await });
    }
    first.block_on(async { end(sharing(&root).await, 9).await });
}
