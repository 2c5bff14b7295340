//! What becomes of calls when links end and change.

use super::submit::CORK_MAX;
use super::*;
use crate::abi::ring::Sent;
use crate::abi::wire::{REQUEST_SIZE, RESULT_SIZE, Request, Word};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as Peer;
use std::pin::pin;
use std::task::{Context, Waker};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use syscalls::Sysno;

use crate::error::{Error, Outcome, Result};
use crate::link;
use crate::link::Polling;
use crate::proto::Call;
use crate::proto::ring::Memory as _;

fn pair() -> (Socket, Peer) {
    let (ours, theirs) = Peer::pair().unwrap();
    (Socket::new(ours).unwrap(), theirs)
}

/// Waits for a request without payload.
async fn request(peer: &Peer) -> Request {
    let mut peer = peer.try_clone().unwrap();
    let read = move || {
        let mut request = [0; REQUEST_SIZE];
        peer.read_exact(&mut request).unwrap();
        Request::from_bytes(&request)
    };
    tokio::task::spawn_blocking(read).await.unwrap()
}

fn getpid() -> Call {
    Call::syscall(Sysno::getpid, [0; 6])
}

#[tokio::test]
async fn what_does_not_fit_is_written_by_the_new_links_task_though_the_old_one_still_waits() {
    let (stream, _old) = pair();
    let connection = Connection::over(stream);
    connection.set_persistent();
    tokio::task::yield_now().await;
    let (stream, mut server) = pair();
    let pause = connection.quiesce();
    connection.attach(stream, None, None);
    let bytes = vec![1; 4 << 20];
    let receipt = connection.call("COPY_IN", Call::copy_in(0, bytes.clone()));
    drop(pause);
    let server = tokio::task::spawn_blocking(move || {
        let mut request = vec![0; REQUEST_SIZE + bytes.len()];
        server.read_exact(&mut request).unwrap();
        server.write_all(&7i64.to_le_bytes()).unwrap();
    });
    let limit = std::time::Duration::from_secs(20);
    let result = tokio::time::timeout(limit, receipt).await;
    assert_eq!(result.expect("it is written").unwrap(), 7);
    server.await.unwrap();
}

#[tokio::test]
async fn replies_before_a_broken_one_count() {
    let (stream, mut server) = pair();
    let connection = Connection::over(stream);
    // What a completion owns is given up outside of the connection's lock.
    struct Uses(Connection);
    impl Drop for Uses {
        fn drop(&mut self) {
            let _ = self.0.is_connected();
        }
    }
    let uses = Uses(connection.clone());
    let receipt = connection.submit(vec![getpid()], move |replies| {
        let _uses = uses;
        Ok(replies.len())
    });
    request(&server).await;
    // Nobody asked for the second one.
    server.write_all(&[0; 16]).unwrap();
    assert_eq!(receipt.await.unwrap(), 1);
    let after = connection.call("getpid", getpid()).await;
    assert!(matches!(
        after,
        Err(Error::Gone | Error::Lost(Outcome::NotExecuted | Outcome::PossiblyExecuted))
    ));
}

#[tokio::test]
async fn replies_that_a_dead_process_has_left_count() {
    let (stream, mut server) = pair();
    let connection = Connection::over(stream);
    let answered = connection.call("getpid", getpid());
    let unanswered = connection.call("getpid", getpid());
    request(&server).await;
    request(&server).await;
    server.write_all(&42i64.to_le_bytes()).unwrap();
    connection.process_died();
    assert_eq!(answered.await.unwrap(), 42);
    assert!(matches!(unanswered.await, Err(Error::Lost(Outcome::PossiblyExecuted))));
    assert!(matches!(connection.call("getpid", getpid()).await, Err(Error::Gone)));
}

#[tokio::test]
async fn an_empty_batch_is_complete() {
    let (stream, _server) = pair();
    let connection = Connection::over(stream);
    assert_eq!(connection.submit(Vec::new(), |replies| Ok(replies.len())).await.unwrap(), 0);
}

#[tokio::test]
async fn what_can_wait_goes_out_with_what_comes_next_or_else_by_itself() {
    let (stream, mut server) = pair();
    let connection = Connection::over(stream);
    let first = connection.submit_soon(vec![getpid()], |replies| Ok(replies.len()));
    let second = connection.call("getpid", getpid());
    let mut requests = [0; 2 * REQUEST_SIZE + 1];
    // Both have been written by now, in order.
    assert_eq!(server.read(&mut requests).unwrap(), 2 * REQUEST_SIZE);
    server.write_all(&[1i64.to_le_bytes(), 2i64.to_le_bytes()].concat()).unwrap();
    assert_eq!((first.await.unwrap(), second.await.unwrap()), (1, 2));
    let alone = connection.submit_soon(vec![getpid()], |replies| Ok(replies.len()));
    request(&server).await;
    server.write_all(&3i64.to_le_bytes()).unwrap();
    assert_eq!(alone.await.unwrap(), 1);
    // Who waits until nothing is unanswered waits for it too.
    let held = connection.submit_soon(vec![getpid()], |replies| Ok(replies.len()));
    assert!(connection.try_quiesce_idle().is_none());
    request(&server).await;
    server.write_all(&4i64.to_le_bytes()).unwrap();
    assert_eq!(held.await.unwrap(), 1);
}

#[tokio::test]
async fn calls_go_out_together_when_the_first_of_them_is_awaited_or_dropped_or_has_company_enough()
{
    let (stream, mut server) = pair();
    let connection = Connection::over(stream);
    let mut context = Context::from_waker(Waker::noop());
    let mut requests = vec![0; (CORK_MAX + 2) * REQUEST_SIZE];
    server.set_nonblocking(true).unwrap();
    let nothing = Err(std::io::ErrorKind::WouldBlock);
    for awaited in [true, false] {
        let mut first = pin!(connection.call("getpid", getpid()));
        let second = connection.call("getpid", getpid());
        assert_eq!(server.read(&mut requests).map_err(|error| error.kind()), nothing);
        if awaited {
            assert!(first.as_mut().poll(&mut context).is_pending());
        } else {
            first.set(Receipt::failed(Error::Gone));
        }
        assert_eq!(server.read(&mut requests).unwrap(), 2 * REQUEST_SIZE);
        server.write_all(&[1i64.to_le_bytes(), 2i64.to_le_bytes()].concat()).unwrap();
        assert_eq!(second.await.unwrap(), 2);
    }
    let many: Vec<_> = (0..CORK_MAX).map(|_| connection.call("getpid", getpid())).collect();
    assert_eq!(server.read(&mut requests).map_err(|error| error.kind()), nothing);
    let last = connection.call("getpid", getpid());
    assert_eq!(server.read(&mut requests).unwrap(), (CORK_MAX + 1) * REQUEST_SIZE);
    // What comes behind them waits for their replies, as ever.
    server.write_all(&[0; RESULT_SIZE].repeat(CORK_MAX + 1)).unwrap();
    for receipt in many.into_iter().chain([last]) {
        receipt.await.unwrap();
    }
    server.set_nonblocking(false).unwrap();
    // Whoever waits for nothing does not keep it back for ever.
    let alone = connection.call("getpid", getpid());
    request(&server).await;
    server.write_all(&[0; RESULT_SIZE]).unwrap();
    alone.await.unwrap();
}

#[tokio::test]
async fn descriptors_that_can_not_be_passed_now_take_no_room() {
    let (stream, _server) = pair();
    let connection = Connection::over(stream);
    let mut unanswered = pin!(connection.call("getpid", getpid()));
    let mut context = Context::from_waker(Waker::noop());
    assert!(unanswered.as_mut().poll(&mut context).is_pending());
    let mut pause = connection.quiesce();
    // More than fit.
    for _ in 0..20_000 {
        let begun = connection.begin_transfer(pause, vec![getpid()], getpid()).unwrap();
        pause = begun.err().expect("something is unanswered");
    }
    assert!(pin!(connection.ready()).poll(&mut context).is_ready());
}

#[tokio::test]
async fn results_that_nobody_waits_for_are_sent_before_what_blocks_but_not_before_the_servers_end()
{
    let calls = [(Sysno::exit_group, false), (Sysno::execve, false), (Sysno::pause, true)];
    for (number, is_flushed) in calls {
        let (stream, mut server) = pair();
        let connection = Connection::over(stream);
        connection.set_version(1);
        drop(connection.submit_soon(vec![getpid()], |_| Ok(())));
        drop(connection.call("it", Call::syscall(number, [0; 6])));
        let mut requests = [0; 2 * REQUEST_SIZE + 1];
        assert_eq!(server.read(&mut requests).unwrap(), 2 * REQUEST_SIZE);
        let request = Request::from_bytes(requests[REQUEST_SIZE..].first_chunk().unwrap());
        let flush = if is_flushed { Word::FLUSH } else { 0 };
        assert_eq!(request.word, number as u64 | flush);
    }
    // What somebody waits for is sent first whatever comes.
    let (stream, mut server) = pair();
    let connection = Connection::over(stream);
    connection.set_version(1);
    let first = connection.call("getpid", getpid());
    drop(connection.call("exit_group", Call::syscall(Sysno::exit_group, [0; 6])));
    assert_eq!(request(&server).await.word, Sysno::getpid as u64);
    server.write_all(&[0; RESULT_SIZE]).unwrap();
    first.await.unwrap();
    assert_eq!(request(&server).await.word, Sysno::exit_group as u64 | Word::FLUSH);
}

/// A ring's memory, and the bell that the server rings, to be given to a connection: the test is the
/// server.
fn ring() -> (Arc<link::Shared>, Bell) {
    let memory = link::Prepared::new().unwrap().mapped(1 << 32, ());
    (Arc::new(memory), Bell::new(eventfd()).unwrap())
}

fn enter_ring(
    connection: &Connection,
    memory: Arc<link::Shared>,
    bell: Bell,
    signal: impl Fn() -> Result<()> + Send + Sync + 'static,
) {
    let (signal, sent) = (Box::new(signal), Sent::ToBeCounted);
    let interrupts = Interrupts { signal, sent, withdraws: false };
    connection.enter_ring(1, memory, Polling::Never, interrupts, eventfd(), bell);
}

fn eventfd() -> OwnedFd {
    EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap().into()
}

#[tokio::test]
async fn a_call_with_a_deadline_that_waits_for_a_pause_goes_out_when_that_is_over() {
    let (stream, _server) = pair();
    let connection = Connection::over(stream);
    // Deadlines need a server that reads ahead.
    connection.set_version(1);
    let (memory, bell) = ring();
    enter_ring(&connection, memory.clone(), bell, || Ok(()));
    let pause = connection.try_quiesce_idle().unwrap();
    let waiting = connection.clone();
    let limit = Duration::from_secs(60);
    let call = tokio::spawn(async move { waiting.call_within(limit, "getpid", getpid()).await });
    tokio::task::yield_now().await;
    drop(pause);
    let handed_over = async {
        while !memory.ring().take(0, &mut Request::default()) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), handed_over).await.expect("it is handed over");
    call.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_signal_that_meant_a_call_of_the_ring_can_meet_one_of_the_stream() {
    let (stream, mut server) = pair();
    server.set_nonblocking(true).unwrap();
    let connection = Connection::over(stream);
    let (memory, bell) = ring();
    let rings = bell.as_fd().try_clone_to_owned().unwrap();
    let seen = Arc::new(Mutex::new(None));
    let signal = {
        let (seen, memory) = (seen.clone(), memory.clone());
        let server = server.try_clone().unwrap();
        move || {
            // The call ends by itself before the signal comes.
            memory.ring().complete(0, 0, 1);
            nix::unistd::write(&rings, &1u64.to_ne_bytes()).unwrap();
            // There is no event for "nothing is written".
            std::thread::sleep(Duration::from_millis(50));
            let read = (&server).read(&mut [0; REQUEST_SIZE]);
            *seen.lock().unwrap() = Some(read.map_err(|error| error.kind()));
            memory.ring().count_signal();
            Ok(())
        }
    };
    enter_ring(&connection, memory.clone(), bell, signal);
    let pause = Call::syscall(syscalls::Sysno::pause, [0; 6]);
    let in_ring = connection.call("pause", pause);
    let interrupter = in_ring.interrupter().unwrap();
    assert!(memory.ring().take(0, &mut Request::default()) && memory.ring().begin(0));
    let on_stream = connection.call("COPY_IN", Call::copy_in(0, Vec::new()));
    interrupter.interrupt().await.unwrap();
    let seen = seen.lock().unwrap().take();
    assert_eq!(seen, Some(Err(std::io::ErrorKind::WouldBlock)));
    assert_eq!(in_ring.await.unwrap(), 1);
    server.set_nonblocking(false).unwrap();
    request(&server).await;
    server.write_all(&2i64.to_le_bytes()).unwrap();
    assert_eq!(on_stream.await.unwrap(), 2);
}

#[tokio::test]
async fn who_ends_a_pause_ends_nobody_elses() {
    let (stream, mut server) = pair();
    server.set_nonblocking(true).unwrap();
    let connection = Connection::over(stream);
    let (one, other) = (connection.quiesce(), connection.try_quiesce_idle().unwrap());
    let receipt = connection.call("getpid", getpid());
    drop(one);
    let read = server.read(&mut [0; REQUEST_SIZE]).map_err(|error| error.kind());
    assert_eq!(read, Err(std::io::ErrorKind::WouldBlock));
    drop(other);
    assert_eq!(server.read(&mut [0; REQUEST_SIZE]).unwrap(), REQUEST_SIZE);
    server.write_all(&5i64.to_le_bytes()).unwrap();
    assert_eq!(receipt.await.unwrap(), 5);
}

#[tokio::test]
async fn what_is_to_go_first_is_not_executed_when_the_link_is_over() {
    let (stream, server) = pair();
    let connection = Connection::over(stream);
    connection.set_persistent();
    drop(server);
    let mut changed = connection.subscribe();
    while connection.is_connected() {
        changed.changed().await.unwrap();
    }
    let _pause = connection.quiesce();
    let first = connection.submit_first(vec![getpid()], |replies| Ok(replies.len()));
    assert!(matches!(first.await, Err(Error::Lost(Outcome::NotExecuted))));
}

#[tokio::test]
async fn ending_a_link_in_good_order_does_not_end_the_next_one() {
    let (stream, mut server) = pair();
    let connection = Connection::over(stream);
    connection.set_persistent();
    let mut ends = std::pin::pin!(connection.shut_down());
    let mut context = Context::from_waker(std::task::Waker::noop());
    assert!(ends.as_mut().poll(&mut context).is_pending());
    assert_eq!(server.read(&mut [0]).unwrap(), 0);
    drop(server);
    let mut changed = connection.subscribe();
    while connection.is_connected() {
        changed.changed().await.unwrap();
    }
    let (stream, mut server) = pair();
    server.set_nonblocking(true).unwrap();
    connection.attach(stream, None, None);
    assert!(ends.as_mut().poll(&mut context).is_ready());
    let read = server.read(&mut [0]).map_err(|error| error.kind());
    assert_eq!(read, Err(std::io::ErrorKind::WouldBlock));
}

#[tokio::test]
async fn a_batch_that_waits_behind_nothing_is_sent_only_then() {
    let (stream, mut server) = pair();
    let connection = Connection::over(stream);
    let submit = |own: Option<&Quiesce>| {
        connection.submit_if_idle(own, || Ok(()), vec![getpid()], |replies| Ok(replies.len()))
    };
    let before = connection.call("getpid", getpid());
    assert!(submit(None).unwrap().is_none());
    request(&server).await;
    server.write_all(&1i64.to_le_bytes()).unwrap();
    before.await.unwrap();
    let pause = connection.quiesce();
    let other = connection.quiesce();
    assert!(submit(Some(&pause)).unwrap().is_none());
    drop(other);
    // What the pause keeps comes behind it.
    let behind = connection.call("getpid", getpid());
    assert!(submit(None).unwrap().is_none());
    let first = submit(Some(&pause)).unwrap().unwrap();
    assert!(submit(Some(&pause)).unwrap().is_none());
    request(&server).await;
    server.write_all(&2i64.to_le_bytes()).unwrap();
    assert_eq!(first.await.unwrap(), 1);
    drop(pause);
    request(&server).await;
    server.write_all(&3i64.to_le_bytes()).unwrap();
    assert_eq!(behind.await.unwrap(), 3);
}

/// What finds that the main thread of process 7 has exited.
fn leaderless() -> HealthChecks {
    HealthChecks { leader_has_exited: Box::new(|| Some(7)), ring_is_lost: Box::new(|_| {}) }
}

#[tokio::test]
async fn a_link_that_no_server_will_end_is_over_all_the_same() {
    let limit = Duration::from_secs(20);
    let (stream, _server) = pair();
    let connection = Connection::over(stream);
    connection.set_persistent();
    connection.set_health_checks(leaderless());
    let ended = tokio::time::timeout(limit, connection.shut_down()).await;
    let ended = ended.expect("it is seen that there is no server");
    assert!(matches!(ended, Err(Error::LeaderExited { pid: 7, .. })), "{ended:?}");
    // So is one that nobody has any more.
    let (stream, mut server) = pair();
    let connection = Connection::over(stream);
    connection.set_health_checks(leaderless());
    drop(connection);
    let closed = async {
        while server.write(&[0]).is_ok() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(limit, closed).await.expect("this end is closed");
}

/// How many descriptors of this process are the socket's.
fn duplicates(socket: &impl AsFd) -> usize {
    let inode = nix::sys::stat::fstat(socket).unwrap().st_ino;
    let name = format!("socket:[{inode}]");
    let fds = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    fds.filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to.as_os_str() == &*name)).count()
}

#[tokio::test]
async fn a_write_that_waits_for_room_needs_no_descriptor() {
    let (stream, mut server) = pair();
    let ours = stream.as_fd().try_clone_to_owned().unwrap();
    let connection = Connection::over(stream);
    const SIZE: usize = 4 << 20;
    let receipt = connection.call_at_once("COPY_IN", Call::copy_in(0, vec![1; SIZE]));
    for _ in 0..20 {
        tokio::task::yield_now().await;
        assert_eq!(duplicates(&ours), 2);
    }
    let server = tokio::task::spawn_blocking(move || {
        let mut request = vec![0; REQUEST_SIZE + SIZE];
        server.read_exact(&mut request).unwrap();
        server.write_all(&7i64.to_le_bytes()).unwrap();
        server
    });
    let limit = Duration::from_secs(20);
    let result = tokio::time::timeout(limit, receipt).await;
    assert_eq!(result.expect("it is written").unwrap(), 7);
    server.await.unwrap();
}
