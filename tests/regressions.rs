//! What went wrong once, a test for each.

mod common;

use std::future::Future;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::task::{Context, Waker};
use std::time::Duration;

use common::{LIMIT, TestHome, alive, fds, until_async};
use farcall::host::local::Stdio;
use farcall::persist::{Home, Name, SharedMemory, attach};
use farcall::sys::Sysno;
use farcall::{Child, Error, Local, Process};
use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::Pid;

async fn root() -> Process {
    Local::new().stdio(Stdio::Null).start().await.unwrap()
}

fn name(name: &str) -> Name {
    name.parse().unwrap()
}

async fn start(home: &Home, root: &Process) -> Child {
    let reserved = home.reserve(&name("one")).unwrap();
    root.child().spawn_persistent(reserved, SharedMemory::Refuse).await.unwrap()
}

/// Lets a future begin: what it asks for first is on its way. Says whether it is still under way.
fn begin<F: Future + ?Sized>(future: &mut Pin<Box<F>>) -> bool {
    future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending()
}

async fn in_time<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.unwrap_or_else(|_| panic!("{what}: not in time"))
}

fn children(pid: i32) -> Vec<i32> {
    let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    list.unwrap_or_default().split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

fn maps(pid: i32) -> usize {
    std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().lines().count()
}

#[tokio::test]
async fn a_spawn_that_is_given_up_leaves_nothing_in_the_parent() {
    let root = root().await;
    let pid = root.pid().unwrap();
    drop(root.child().spawn().await.unwrap());
    until_async("the first child is reaped", || children(pid).is_empty()).await;
    root.getpid().await.unwrap();
    let before = (fds(pid).len(), maps(pid));
    for share in [false, true] {
        // Given up at another point each time: after that many of the test's own calls.
        for calls in 0..12 {
            let builder = root.child();
            let builder = if share { builder.share_memory().share_files() } else { builder };
            let mut spawn = Box::pin(builder.spawn());
            for _ in 0..calls {
                if !begin(&mut spawn) {
                    break;
                }
                root.getpid().await.unwrap();
            }
            drop(spawn);
            until_async("descriptors, mappings and zombies are gone", || {
                (fds(pid).len(), maps(pid)) == before && children(pid).is_empty()
            })
            .await;
        }
    }
}
