//! What becomes of calls, memory and descriptors when a ring, or who uses it, comes to an end.

use crate::common;

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use common::{LIMIT, TestHome, alive, blocked_in, cut, fds, until, until_async};
use farcall::calls::Sysno;
use farcall::link::Polling;
use farcall::persist::{SharedMemory, attach};
use farcall::proto::Call;
use farcall::{Error, Fd, Local, Process, blocking};
use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::Pid;
use tokio::time::timeout;

/// The reading end of a pipe of this process, and the writing end in the other.
async fn pipe(process: &Process) -> (std::io::PipeReader, Fd) {
    let (reader, writer) = std::io::pipe().unwrap();
    let fds = process.send_fds(&[writer.as_fd()]).await.unwrap();
    (reader, fds.into_iter().next().unwrap())
}

#[tokio::test]
async fn what_was_handed_over_is_executed_though_the_last_handle_is_dropped() {
    let root = Local::new().polling(None).start().await.unwrap();
    // Wherever in its round of 128 calls the server looks at its connection.
    for before in [20, 40, 60] {
        let child = root.child().spawn().await.unwrap();
        child.enter_ring(Polling::Never).await.unwrap();
        let (mut reader, writer) = pipe(&child).await;
        let gates = [(); 3].map(|()| std::io::pipe().unwrap());
        let ours: Vec<_> = gates.iter().map(|(reader, _)| reader.as_fd()).collect();
        let there = child.send_fds(&ours).await.unwrap();
        let pid = child.pid().unwrap();
        let bytes = child.shared_buffer(1).unwrap();
        let call = |number, fd: &Fd| {
            let args = [fd.number() as u64, bytes.address(), 1, 0, 0, 0];
            child.connection().call("read or write", Call::syscall(number, args))
        };
        let mut reading = call(Sysno::read, &there[0]);
        for gate in 0..3 {
            let line = format!("0 {:#x} ", there[gate].number());
            until("it reads", || {
                let syscall = std::fs::read_to_string(format!("/proc/{pid}/syscall"));
                syscall.is_ok_and(|syscall| syscall.starts_with(&line))
            });
            // Makes room: what is complete is taken.
            let waited = timeout(Duration::from_millis(10), &mut reading).await;
            assert!(waited.is_err());
            if gate == 2 {
                break;
            }
            for _ in 0..before {
                drop(call(Sysno::getpid, &there[0]));
            }
            let next = call(Sysno::read, &there[gate + 1]);
            (&gates[gate].1).write_all(b"1").unwrap();
            assert_eq!(std::mem::replace(&mut reading, next).await.unwrap(), 1);
        }
        drop(reading);
        for _ in 0..60 {
            drop(call(Sysno::write, &writer));
        }
        // Closing it would be one more call.
        for fd in there.into_iter().chain([writer]) {
            let _ = fd.into_raw();
        }
        drop(bytes);
        drop(child);
        // There is no event for "the end of the stream does not come".
        tokio::time::sleep(Duration::from_millis(10)).await;
        (&gates[2].1).write_all(b"1").unwrap();
        let read = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            all.len()
        });
        assert_eq!(timeout(LIMIT, read).await.unwrap().unwrap(), 60, "{before}");
    }
}

#[test]
fn an_interrupt_that_nobody_carries_on_holds_nothing_up() {
    let root = blocking::wait(async {
        let root = Local::new().polling(None).start().await?;
        root.enter_ring(Polling::Adaptive).await?;
        Ok(root)
    })
    .unwrap();
    let pid = root.pid().unwrap();
    let gate = std::io::pipe().unwrap();
    let process = root.clone();
    let there = gate.0.as_fd().try_clone_to_owned().unwrap();
    let fd = blocking::wait(async move { process.send_fds(&[there.as_fd()]).await }).unwrap();
    let memory = root.shared_buffer(8).unwrap();
    let read = [fd[0].number() as u64, memory.address(), 1, 0, 0, 0];
    let first = root.connection().call("read", Call::syscall(Sysno::read, read));
    // One of several, whose turn it waits for.
    let calls = [Sysno::getpid, Sysno::ppoll].map(|number| Call::syscall(number, [0; 6])).to_vec();
    let second = root.connection().submit(calls, |_| Ok(()));
    let interrupter = second.interrupter().unwrap();
    until("it reads", || blocked_in(pid) == Some(Sysno::read.id() as usize));
    {
        // One that ends before the interruption does.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let limit = Duration::from_millis(20);
        let interrupted = runtime.block_on(async { timeout(limit, interrupter.interrupt()).await });
        assert!(interrupted.is_err());
    }
    (&gate.1).write_all(b"1").unwrap();
    assert_eq!(first.wait().unwrap(), 1);
    until("it waits", || blocked_in(pid) == Some(Sysno::ppoll.id() as usize));
    drop(second);
    // A signal with a handler ends that.
    kill(Pid::from_raw(pid), Signal::SIGPIPE).unwrap();
    let process = root.clone();
    let slept = blocking::wait(async move {
        let call = process.nanosleep(Duration::from_millis(1));
        timeout(LIMIT, call).await.expect("it is not held up")
    });
    slept.unwrap();
}

#[tokio::test]
async fn of_a_child_that_shares_the_table_no_bells_are_left() {
    let root = Local::new().polling(None).start().await.unwrap();
    // It leaves its stream to the next one.
    let mut first = root.child().share_files().spawn().await.unwrap();
    first.exit(0).await.unwrap();
    first.wait().await.unwrap();
    let before = fds(root.pid().unwrap());
    for _ in 0..3 {
        let mut child = root.child().share_files().spawn().await.unwrap();
        child.enter_ring(Polling::Adaptive).await.unwrap();
        child.getpid().await.unwrap();
        child.exit(0).await.unwrap();
        child.wait().await.unwrap();
        until_async("its descriptors are closed", || fds(root.pid().unwrap()) == before).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_ends_while_the_ring_is_made_leaves_nothing() {
    let home = TestHome::new();
    let root = Local::new().start().await.unwrap();
    let place = home.home.reserve(&"cut".parse().unwrap()).unwrap();
    let child = root.child().spawn_persistent(place, SharedMemory::Refuse).await.unwrap();
    let pid = child.pid().unwrap();
    child.reconnect().await.unwrap();
    let before = fds(pid).len();
    let mut made = 0;
    for round in 0..200u64 {
        let process = child.process().clone();
        let entering = tokio::spawn(async move { process.enter_ring(Polling::Adaptive).await });
        let end = Instant::now() + Duration::from_micros(round * 7 % 600);
        while Instant::now() < end {
            std::hint::spin_loop();
        }
        cut(&child);
        made += u32::from(entering.await.unwrap().is_ok());
        timeout(LIMIT, child.reconnect()).await.unwrap().unwrap();
        for _ in 0..10 {
            assert_eq!(timeout(LIMIT, child.getpid()).await.unwrap().unwrap(), pid);
        }
        until_async("its descriptors are those from before", || fds(pid).len() == before).await;
    }
    println!("{made} of them were made");
    assert!(alive(pid));
    child.exit(0).await.unwrap();
}

#[tokio::test]
async fn an_execve_is_not_interrupted() {
    let root = Local::new().polling(None).start().await.unwrap();
    let child = root.child().spawn().await.unwrap();
    child.enter_ring(Polling::Adaptive).await.unwrap();
    // Refused before it is executed: there is nothing at this path.
    let limit = Duration::from_millis(1);
    let refused = child.syscall_within(limit, Sysno::execve, [0; 6]).await;
    assert!(matches!(refused, Err(Error::NotInterruptible)), "{refused:?}");
    let executed = child.connection().call("execve", Call::syscall(Sysno::execve, [0; 6]));
    assert!(executed.interrupter().is_none());
    assert!(executed.await.is_err());
}

#[tokio::test]
async fn copies_are_made_in_their_turn_also_in_shared_memory() {
    let root = Local::new().polling(None).start().await.unwrap();
    root.enter_ring(Polling::Adaptive).await.unwrap();
    let gate = std::io::pipe().unwrap();
    let fd = &root.send_fds(&[gate.0.as_fd()]).await.unwrap()[0];
    let mut buffer = root.shared_buffer(8).unwrap();
    buffer.write(0, b"before..").unwrap();
    let read = [fd.number() as u64, buffer.address(), 8, 0, 0, 0];
    let connection = root.connection();
    let first = connection.call("read", Call::syscall(Sysno::read, read));
    let copy = vec![Call::copy_out(buffer.address(), 8)];
    let second = connection.submit(copy, |replies| Ok(replies[0].data.clone()));
    (&gate.1).write_all(b"the data").unwrap();
    assert_eq!(first.await.unwrap(), 8);
    assert_eq!(second.await.unwrap(), b"the data");
}

#[tokio::test]
async fn a_controller_that_comes_back_after_another_one_uses_no_memory_that_is_gone() {
    let home = TestHome::new();
    let root = Local::new().start().await.unwrap();
    let place = home.home.reserve(&"returns".parse().unwrap()).unwrap();
    let child = root.child().spawn_persistent(place, SharedMemory::Refuse).await.unwrap();
    child.enter_ring(Polling::Adaptive).await.unwrap();
    let open = || child.openat(None, "/dev/null", OFlag::O_RDWR, Mode::empty());
    open().await.unwrap();
    child.prepare_for_reconnect().await.unwrap();
    {
        let other = attach(home.home.place(&"returns".parse().unwrap())).await.unwrap();
        other.enter_ring(Polling::Adaptive).await.unwrap();
        other.getpid().await.unwrap();
        other.prepare_for_reconnect().await.unwrap();
    }
    child.reconnect().await.unwrap();
    open().await.unwrap();
    let memory = child.shared_buffer(1);
    assert!(matches!(memory, Err(Error::NotShared { .. })), "{memory:?}");
    child.enter_ring(Polling::Adaptive).await.unwrap();
    open().await.unwrap();
    // Of all three rings, one is left.
    let maps = || std::fs::read_to_string(format!("/proc/{}/maps", child.pid().unwrap())).unwrap();
    until_async("the others are unmapped", || maps().matches("memfd:farcall-ring").count() == 1)
        .await;
    child.exit(0).await.unwrap();
}
