//! Chains: calls that travel together and use each other's results.

use crate::common;

use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::path::Path;

use common::{fds, root, roots, until_async};
use farcall::calls::Sysno;
use farcall::calls::chain::Arg;
use farcall::link::Polling;
use farcall::proto::Call;
use farcall::{Error, Process};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;
use nix::mount::MsFlags;
use nix::sched::CloneFlags;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn};
use nix::sys::stat::Mode;

#[tokio::test]
async fn a_file_is_opened_read_and_closed_in_one_round_trip() {
    let root = root().await;
    let pid = root.pid().unwrap();
    let before = fds(pid);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    for size in [0, 1, 5, 4000, 4096, 10_000] {
        let content: Vec<u8> = (0..size).map(|i| i as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let mut chain = root.chain();
        let fd = chain.openat(None, &path, OFlag::O_RDONLY, Mode::empty());
        let bytes = chain.read(fd, 8192);
        chain.close(fd);
        let mut done = chain.run().await.unwrap();
        assert_eq!(done.bytes(bytes).unwrap(), content[..size.min(8192)], "{size}");
        assert_eq!(done.round_trips(), 1);
        assert!(done.fd(fd).is_err(), "it is closed");
        assert_eq!(fds(pid), before);
    }
}

/// What /proc tells of a process's transfers: how often it has called read(2) and the like, say.
fn transfers(pid: i32, name: &str) -> u64 {
    let io = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
    let line = io.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim_start_matches(':').trim().parse().unwrap()
}

#[tokio::test]
async fn bytes_of_a_chain_come_through_the_ring_wherever_in_it_they_are_read() {
    const SIZE: usize = 20_000;
    let root = root().await;
    root.enter_ring(Polling::default()).await.unwrap();
    let pid = root.pid().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    let content: Vec<u8> = (0..2 * SIZE).map(|i| i as u8).collect();
    std::fs::write(&path, &content).unwrap();
    let before = transfers(pid, "wchar");
    let mut chain = root.chain();
    let fd = chain.openat(None, &path, OFlag::O_RDONLY, Mode::empty());
    let first = chain.read(fd, SIZE);
    let second = chain.read(fd, 2 * SIZE);
    chain.close(fd);
    let mut done = chain.run().await.unwrap();
    assert_eq!(done.round_trips(), 1);
    assert_eq!(done.bytes(first).unwrap(), content[..SIZE]);
    assert_eq!(done.bytes(second).unwrap(), content[SIZE..]);
    // It writes no more than a bell.
    assert!(transfers(pid, "wchar") - before < SIZE as u64);
}

#[tokio::test]
async fn bytes_that_a_later_call_overwrites_are_those_of_their_place_in_the_chain() {
    let root = root().await;
    root.enter_ring(Polling::default()).await.unwrap();
    let (reader, writer) = root.pipe2(OFlag::empty()).await.unwrap();
    root.write(&writer, "first, second").await.unwrap();
    let mut chain = root.chain();
    let place = chain.output(8);
    let fd = Arg::from(reader.number());
    let zero = Arg::from(0);
    let mut read = |len: u64| {
        let read = chain.syscall(Sysno::read, [fd, place, len.into(), zero, zero, zero]);
        chain.copy_out(place, read)
    };
    let (first, second) = (read(7), read(8));
    let mut done = chain.run().await.unwrap();
    assert_eq!(done.bytes(first).unwrap(), b"first, ");
    assert_eq!(done.bytes(second).unwrap(), b"second");
}

#[tokio::test]
async fn a_read_is_one_round_trip_over_a_stream_too() {
    for root in roots().await {
        let fd = root.openat(None, "/dev/zero", OFlag::O_RDONLY, Mode::empty()).await.unwrap();
        let before = transfers(root.pid().unwrap(), "syscr");
        for len in [0, 1, 5000] {
            assert_eq!(root.read(&fd, len).await.unwrap(), vec![0; len]);
        }
        // The calls themselves, and the requests that came together for each. In version 0 they are read
        // one by one, however they came.
        if root.connection().version() > 0 {
            assert!(transfers(root.pid().unwrap(), "syscr") - before <= 6);
        }
    }
}

#[tokio::test]
async fn a_listening_socket_is_set_up_in_one_round_trip() {
    let root = root().await;
    let mut chain = root.chain();
    let socket = chain.socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty());
    chain.setsockopt(socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1);
    chain.bind(socket, SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)));
    chain.listen(socket, 1);
    let address = chain.getsockname(socket);
    let mut done = chain.run().await.unwrap();
    assert_eq!(done.round_trips(), 1);
    let port = done.address(address).unwrap().as_inet().unwrap().port();
    let socket = done.fd(socket).unwrap();
    let _client = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    root.accept4(&socket, SockFlag::empty()).await.unwrap();
}

#[tokio::test]
async fn a_mount_namespace_is_prepared_in_one_round_trip() {
    let root = root().await;
    let child = root.child().spawn().await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let (new, inner) = (directory.path().join("new"), directory.path().join("new/inner"));
    let mut chain = child.chain();
    chain.unshare(CloneFlags::CLONE_NEWNS);
    chain.mount(None, "/", None, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None);
    chain.mkdirat(None, &new, Mode::S_IRWXU);
    let tmpfs = Some("tmpfs");
    chain.mount(Some(Path::new("none")), &new, tmpfs, MsFlags::empty(), Some("size=64k"));
    chain.mkdirat(None, &inner, Mode::S_IRWXU);
    chain.mount(Some(Path::new("/proc")), &inner, None, MsFlags::MS_BIND | MsFlags::MS_REC, None);
    chain.chdir(&new);
    let done = chain.run().await.unwrap();
    assert_eq!(done.round_trips(), 1);
    assert!(!inner.exists(), "only the child sees it");
    let mut chain = child.chain();
    let status = chain.openat(None, "inner/self/status", OFlag::O_RDONLY, Mode::empty());
    let text = chain.read(status, 4096);
    chain.close(status);
    let text = chain.run().await.unwrap().bytes(text).unwrap();
    assert!(String::from_utf8(text).unwrap().contains(&format!("Pid:\t{}", child.pid().unwrap())));
}

#[tokio::test]
async fn a_failure_names_the_call_and_what_was_not_executed() {
    let root = root().await;
    let pid = root.pid().unwrap();
    let before = fds(pid);
    for one_by_one in [false, true] {
        let mut chain = root.chain();
        if one_by_one {
            chain.one_by_one();
        }
        let socket = chain.socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty());
        // Not an address of this machine's.
        chain.bind(socket, SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, 1), 1)));
        chain.listen(socket, 1);
        chain.getsockname(socket);
        let Err(Error::Chain(error)) = chain.run().await else { panic!("it must fail") };
        assert_eq!((error.step, error.call, error.errno), (1, "bind", Errno::EADDRNOTAVAIL));
        let skipped: Vec<&str> = error.skipped.iter().map(|(_, name)| *name).collect();
        assert_eq!(skipped, ["listen", "getsockname", "LOAD", "COPY_OUT"]);
        assert!(error.to_string().contains("EADDRNOTAVAIL"), "{error}");
        // What it had opened is given back.
        root.getpid().await.unwrap();
        until_async("the socket is closed", || fds(pid) == before).await;
    }
}

#[tokio::test]
async fn what_is_unlinked_is_executed_after_a_failure_too() {
    let root = root().await;
    let pid = root.pid().unwrap();
    let before = fds(pid);
    for one_by_one in [false, true] {
        let mut chain = root.chain();
        if one_by_one {
            chain.one_by_one();
        }
        let fd = chain.openat(None, "/", OFlag::O_RDONLY | OFlag::O_DIRECTORY, Mode::empty());
        chain.read(fd, 100);
        chain.unlinked();
        chain.close(fd);
        // It refers to what was not executed.
        let length = chain.read(fd, 1);
        chain.copy_out(0u64, length);
        let Err(Error::Chain(error)) = chain.run().await else { panic!("it must fail") };
        assert_eq!((error.step, error.call, error.errno), (1, "read", Errno::EISDIR));
        let skipped: Vec<usize> = error.skipped.iter().map(|(step, _)| *step).collect();
        // COPY_OUTs of what was not read; the close was executed, and the read after it failed.
        assert_eq!(skipped, [2, 5, 6]);
        assert_eq!(fds(pid), before, "closed by the chain itself");
    }
}

#[tokio::test]
async fn long_chains_are_split_and_references_reach_across() {
    let root = root().await;
    let mut chain = root.chain();
    let (reading, writing) = chain.pipe2(OFlag::empty());
    let counter = chain.input(0u64.to_le_bytes());
    let mut stored = chain.store(counter, 8, 0u64);
    for i in 0..100u64 {
        chain.write(writing, [i as u8]);
        chain.load(counter, 8);
        stored = chain.store(counter, 8, i + 1);
    }
    let all = chain.read(reading, 200);
    let end = chain.load(counter, 8);
    chain.close(reading);
    let mut done = chain.run().await.unwrap();
    assert_eq!(done.bytes(all).unwrap(), (0..100).collect::<Vec<u8>>());
    assert_eq!((done.value(end).unwrap(), done.value(stored).unwrap()), (100, 0));
    // 3 + 1 + 300 + 2 + 2 calls and the COPY_IN, at most 64 at once.
    assert_eq!(done.round_trips(), 5);
    assert!(done.fd(reading).is_err());
    done.fd(writing).unwrap().close().await.unwrap();
}

#[tokio::test]
async fn memory_is_loaded_stored_and_copied_with_honest_faults() {
    let root = root().await;
    let mut chain = root.chain();
    let from = chain.input(0x1122_3344_5566_7788u64.to_le_bytes());
    let to = chain.output(32);
    let widths = [1, 2, 4, 8].map(|width| chain.load(from, width));
    chain.copy(to, from, 8u64);
    chain.store(to.offset(8), 4, widths[1]);
    let copied = chain.copy_out(to, 12u64);
    let mut done = chain.run().await.unwrap();
    let values = widths.map(|width| done.value(width).unwrap());
    assert_eq!(values, [0x88, 0x7788, 0x5566_7788, 0x1122_3344_5566_7788]);
    let mut expected = 0x1122_3344_5566_7788u64.to_le_bytes().to_vec();
    expected.extend(0x7788u32.to_le_bytes());
    assert_eq!(done.bytes(copied).unwrap(), expected);

    for (what, errno) in [
        (["load", "8"], Errno::EFAULT),
        (["load", "3"], Errno::EINVAL),
        (["store", "8"], Errno::EFAULT),
        (["store", "16"], Errno::EINVAL),
        (["copy", "8"], Errno::EFAULT),
    ] {
        let mut chain = root.chain();
        let [operation, width] = what;
        let width: u64 = width.parse().unwrap();
        match operation {
            "load" => chain.load(8u64, width),
            "store" => chain.store(8u64, width, 1u64),
            _ => chain.copy(8u64, 16u64, width),
        };
        let Err(Error::Chain(error)) = chain.run().await else { panic!("{what:?}") };
        assert_eq!(error.errno, errno, "{what:?}");
    }
    root.getpid().await.unwrap();
}

/// The results of raw requests in one batch.
async fn raw(process: &Process, requests: Vec<(u64, [u64; 6])>) -> Vec<i64> {
    use farcall::abi::wire::Request;
    let calls =
        requests.into_iter().map(|(word, args)| Call::from(Request { word, args })).collect();
    let results = process.connection().submit(calls, |replies| {
        Ok(replies.into_iter().map(|reply| reply.result).collect::<Vec<i64>>())
    });
    results.await.unwrap()
}

#[tokio::test]
async fn links_and_references_follow_the_protocol() {
    use farcall::abi::wire::Word;
    let root = root().await;
    let pid = i64::from(root.pid().unwrap());
    let none = [0; 6];
    let (getpid, close) = (Sysno::getpid as u64, Sysno::close as u64);
    let bad = [1 << 20, 0, 0, 0, 0, 0];
    let canceled = -i64::from(libc::ECANCELED);
    let badf = -i64::from(libc::EBADF);
    let link = Word::LINK;
    let results = raw(
        &root,
        vec![
            (getpid, none),
            (getpid | link, none),
            (close, bad),
            (getpid | link, none),
            (getpid | link, none),
            (getpid, none),
            (getpid | link, none),
        ],
    )
    .await;
    assert_eq!(results, [pid, pid, badf, canceled, canceled, pid, pid]);

    // getpgid(pid) with a pid from one, two, none back; from a failure; from nowhere.
    let getpgid = Sysno::getpgid as u64 | Word::reference(0);
    let back = |k: u64| [k, 0, 0, 0, 0, 0];
    let group = i64::from(
        nix::unistd::getpgid(Some(nix::unistd::Pid::from_raw(pid as i32))).unwrap().as_raw(),
    );
    let results = raw(
        &root,
        vec![
            (getpid, none),
            (getpgid, back(1)),
            (getpgid, back(2)),
            (close, bad),
            (getpgid, back(1)),
            (getpgid, back(0)),
            (getpgid, back(65)),
            (getpgid, back(u64::MAX)),
        ],
    )
    .await;
    assert_eq!(results, [pid, group, group, badf, canceled, canceled, canceled, canceled]);

    // A bit that must be zero.
    let results = raw(&root, vec![(getpid | 1 << 41, none), (getpid | link, none)]).await;
    assert_eq!(results, [-i64::from(libc::EINVAL), canceled]);
    // Exactly 64 back is the farthest.
    let mut requests = vec![(getpid, none)];
    requests.extend(vec![(Sysno::getuid as u64, none); 63]);
    requests.push((getpgid, back(64)));
    requests.push((getpgid, back(65)));
    let results = raw(&root, requests).await;
    assert_eq!(results[64..], [group, canceled]);
}

#[tokio::test]
async fn arguments_that_make_no_sense_are_told_before_anything_is_sent() {
    let root = root().await;
    let other = root.child().spawn().await.unwrap();
    let fd = other.openat(None, "/", OFlag::O_RDONLY, Mode::empty()).await.unwrap();
    let mut chain = root.chain();
    chain.read(&fd, 1);
    assert!(matches!(chain.run().await, Err(Error::ForeignFd { .. })));
    let mut chain = root.chain();
    chain.openat(None, "a\0b", OFlag::O_RDONLY, Mode::empty());
    assert_eq!(chain.run().await.unwrap_err().errno(), Some(Errno::EINVAL));
    // An empty chain is no round trip.
    assert_eq!(root.chain().run().await.unwrap().round_trips(), 0);
    let _: Arg = 1u64.into();
}
