//! What a caller gets wrong: an error that says so and what to do, before anything is sent.

use crate::common;

use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;

use common::{TestHome, root};
use farcall::abi::wire::{Operation, Request, Word};
use farcall::calls::{SocketAddress, Sysno};
use farcall::host::local::Stdio;
use farcall::link::Polling;
use farcall::proto::Call;
use farcall::{Error, Local, Process, blocking};
use nix::fcntl::OFlag;
use nix::sched::CloneFlags;
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, UnixAddr};
use nix::sys::stat::Mode;

/// The error is one of misuse, speaks of `what`, and says what to do; the process still answers.
async fn refused<T>(process: &Process, what: &str, result: farcall::Result<T>) {
    let error = result.err().unwrap_or_else(|| panic!("{what} was accepted"));
    assert!(matches!(error, Error::Misuse { .. }), "{what}: {error:?}");
    let text = error.to_string();
    assert!(text.contains(what), "{what}: {text}");
    assert!(!text.contains("server does not speak"), "{text}");
    process.getpid().await.unwrap();
}

#[tokio::test]
async fn a_placeholder_of_another_chain_is_refused_by_calls_and_by_results() {
    let root = root().await;
    let other = "placeholder of another chain";
    let mut a = root.chain();
    let first = a.openat(None, "/etc/passwd", OFlag::O_RDONLY, Mode::empty());
    let bytes = a.read(first, 10);
    let place = a.output(8);
    for step in 0..5 {
        let mut b = root.chain();
        let own = b.openat(None, "/etc/hostname", OFlag::O_RDONLY, Mode::empty());
        match step {
            0 => drop(b.read(first, 10)),
            1 => drop(b.close(first)),
            2 => drop(b.load(place, 8)),
            3 => drop(b.copy_out(place.offset(4), 4u64)),
            _ => drop(b.syscall(
                Sysno::dup,
                [bytes.into(), 0.into(), 0.into(), 0.into(), 0.into(), 0.into()],
            )),
        }
        let _ = own;
        refused(&root, other, b.run().await).await;
    }
    let mut b = root.chain();
    b.openat(None, "/etc/hostname", OFlag::O_RDONLY, Mode::empty());
    let mut done = b.run().await.unwrap();
    refused(&root, other, done.fd(first)).await;
    refused(&root, other, done.bytes(bytes)).await;
    refused(&root, other, done.value(first)).await;
    let mut done = a.run().await.unwrap();
    assert_eq!(done.bytes(bytes).unwrap().len(), 10);
    assert!(done.fd(first).is_ok());
}

#[tokio::test]
async fn a_result_is_taken_once() {
    let root = root().await;
    let mut chain = root.chain();
    let file = chain.openat(None, "/etc/passwd", OFlag::O_RDONLY, Mode::empty());
    let bytes = chain.read(file, 4);
    let mut done = chain.run().await.unwrap();
    done.bytes(bytes).unwrap();
    let _file = done.fd(file).unwrap();
    refused(&root, "taken twice", done.bytes(bytes)).await;
    refused(&root, "taken twice", done.fd(file)).await;
}

#[tokio::test]
async fn what_a_chain_cannot_do_is_told_as_that() {
    let root = root().await;
    let mut chain = root.chain();
    chain.keep("x").chdir("/");
    refused(&root, "opens nothing", chain.run().await).await;
    let mut chain = root.chain();
    chain.keep("x");
    refused(&root, "Chain::keep", chain.run().await).await;
    let mut chain = root.chain();
    chain.keep("x").pipe2(OFlag::empty());
    refused(&root, "number of names", chain.run().await).await;
    let mut chain = root.chain();
    chain.unshare(CloneFlags::CLONE_FILES);
    refused(&root, "CLONE_FILES", chain.run().await).await;
    let mut chain = root.chain();
    chain.keep("x").openat(None, "/etc/passwd", OFlag::O_RDONLY, Mode::empty());
    refused(&root, "not persistent", chain.run().await).await;
}

#[tokio::test]
async fn descriptors_of_the_server_are_not_to_be_had() {
    let root = root().await;
    let own = *root.server_descriptors().iter().next().unwrap();
    refused(&root, "the server itself uses", root.adopt_fd(own)).await;
    let file = root.openat(None, "/etc/passwd", OFlag::O_RDONLY, Mode::empty()).await.unwrap();
    refused(&root, "the server itself uses", root.dup2(&file, own).await).await;
}

#[tokio::test]
async fn what_only_a_persistent_process_can_do_is_told_as_that() {
    let home = TestHome::new();
    let root = root().await;
    refused(&root, "not persistent", root.reconnect().await).await;
    let reserve = |name: &str| home.home.reserve(&name.parse().unwrap()).unwrap();
    let child = root.child().spawn().await.unwrap();
    let memory = farcall::persist::SharedMemory::Refuse;
    child.make_persistent(reserve("misuse"), memory).await.unwrap();
    let twice = child.make_persistent(reserve("twice"), memory).await;
    refused(&child, "persistent already", twice).await;
    child.exit(0).await.unwrap();
}

#[tokio::test]
async fn a_call_that_announces_other_bytes_than_it_brings_is_not_sent() {
    for polling in [None, Some(Polling::Never)] {
        let root = Local::new().stdio(Stdio::Null).polling(polling).start().await.unwrap();
        if polling.is_some() {
            root.enter_ring(Polling::Never).await.unwrap();
        }
        let memory = root
            .mmap(4096, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE, None)
            .await
            .unwrap();
        let copy_in =
            |len| Request::operation(Operation::CopyIn, [memory.address(), len, 0, 0, 0, 0]);
        let getpid = Request::syscall(Sysno::getpid.id() as u32, [0; 6]);
        let mut refers = copy_in(1);
        refers.word |= Word::reference(1);
        for (request, payload) in [
            (copy_in(56), vec![]),
            (copy_in(1), vec![0; 2]),
            (getpid, vec![0; 56]),
            (refers, vec![0]),
        ] {
            let call = Call { request, payload, quick: false };
            let what = "announces other bytes";
            let both = vec![Call::syscall(Sysno::getpid, [0; 6]), call.clone()];
            refused(&root, what, root.connection().submit(both, Ok).await).await;
            refused(&root, what, root.connection().call("x", call.clone()).await).await;
            let connection = root.connection().clone();
            let waited = tokio::task::spawn_blocking(move || connection.call_blocking("x", &call));
            refused(&root, what, waited.await.unwrap()).await;
        }
    }
}

#[tokio::test]
async fn a_shared_buffer_refuses_every_place_outside_of_it() {
    let root = root().await;
    root.enter_ring(Polling::Adaptive).await.unwrap();
    let mut buffer = root.shared_buffer(64).unwrap();
    for (at, len) in [(65, 1), (64, 1), (0, 65), (usize::MAX, 1), (1, usize::MAX), (usize::MAX, 0)]
    {
        assert!(matches!(buffer.read(at, len), Err(Error::Fault { .. })), "{at} {len}");
        if len <= 65 {
            assert!(
                matches!(buffer.write(at, &vec![0; len]), Err(Error::Fault { .. })),
                "{at} {len}"
            );
        }
    }
    buffer.write(63, b"x").unwrap();
    assert_eq!(buffer.read(63, 1).unwrap(), b"x");
}

#[test]
fn binding_and_connecting_can_be_awaited_on_any_thread() {
    let directory = tempfile::tempdir().unwrap();
    // The longest that the kernel takes, without a zero at its end.
    let mut path = directory.path().as_os_str().as_bytes().to_vec();
    path.push(b'/');
    path.resize(108, b'x');
    let path = std::path::PathBuf::from(<std::ffi::OsStr as OsStrExt>::from_bytes(&path));
    let expected = path.clone();
    blocking::wait(async move {
        let root = root().await;
        let stream = (AddressFamily::Unix, SockType::Stream, SockFlag::empty());
        let listener = root.socket(stream.0, stream.1, stream.2, 0).await?;
        root.bind(&listener, SocketAddress::unix(&path)?).await?;
        root.listen(&listener, 1).await?;
        let told = root.getsockname(&listener).await?;
        assert_eq!(told.path(), Some(path.as_path()));
        let client = root.socket(stream.0, stream.1, stream.2, 0).await?;
        root.connect(&client, told).await?;
        assert_eq!(root.getsockname(&client).await?.path(), None);
        let mut chain = root.chain();
        let socket = chain.socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty());
        chain.bind(socket, SockaddrStorage::from(SocketAddr::from(([127, 0, 0, 1], 0))));
        let address = chain.getsockname(socket);
        let address = chain.run().await?.address(address)?.as_inet().unwrap();
        assert!(address.ip().is_loopback() && address.port() != 0);
        let named = root.socket(stream.0, stream.1, stream.2, 0).await?;
        root.bind(
            &named,
            &UnixAddr::new_abstract(expected.as_os_str().as_bytes()[..90].as_ref()).unwrap(),
        )
        .await
    })
    .unwrap();
}

#[test]
fn a_runtime_that_lacks_what_is_needed_is_refused() {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use tokio::runtime::Builder;

    let said = |result: farcall::Result<Process>, what: &str| {
        let error = result.err().unwrap_or_else(|| panic!("started without {what}"));
        assert!(matches!(error, Error::Misuse { .. }), "{what}: {error:?}");
        let text = error.to_string();
        assert!(text.contains(what) && text.contains("enable_all"), "{what}: {text}");
    };
    let start = || Local::new().stdio(Stdio::Null).start();
    let Poll::Ready(without) = pin!(start()).poll(&mut Context::from_waker(Waker::noop())) else {
        panic!("it waits for something that nothing will do");
    };
    said(without, "a tokio runtime");
    for (io, time, what) in
        [(false, false, "timers"), (true, false, "timers"), (false, true, "I/O")]
    {
        let mut builder = Builder::new_current_thread();
        if io {
            builder.enable_io();
        }
        if time {
            builder.enable_time();
        }
        said(builder.build().unwrap().block_on(start()), what);
    }
    let mut enough = Builder::new_current_thread();
    enough.enable_io().enable_time();
    enough.build().unwrap().block_on(async { start().await.unwrap().getpid().await.unwrap() });
}
