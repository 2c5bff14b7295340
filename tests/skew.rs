//! Controllers and servers of other versions: each error says which, and what to do.

use crate::common;

mod old_image;

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread::JoinHandle;

use common::{LIMIT, TestHome};
use farcall::Error;
use farcall::abi::handshake::{
    ANSWER_SIZE, Answer, HANDSHAKE_MAGIC, HANDSHAKE_VERSION, HELLO_SIZE, Hello,
};
use farcall::abi::log::{LOG_HEAD_SIZE, LogHead};
use farcall::abi::registry::{ENTRY_SIZE, Entry, NAME_SIZE, USER_SIZE};
use farcall::abi::wire::STREAM_VERSION;
use farcall::persist::{Attach, Incarnation, Place, State, flight, names_of};
use nix::errno::Errno;

/// Answers handshakes as a server of another version would, with those bytes, until somebody connects
/// and says nothing.
fn fake_server(socket: &Path, answer: Vec<u8>) -> JoinHandle<u32> {
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        let mut handshakes = 0;
        loop {
            let (mut client, _) = listener.accept().unwrap();
            let mut hello = [0; HELLO_SIZE];
            if client.read_exact(&mut hello).is_err() {
                return handshakes;
            }
            handshakes += 1;
            let hello = Hello::from_bytes(&hello);
            assert_eq!((hello.magic, hello.version), (HANDSHAKE_MAGIC, HANDSHAKE_VERSION));
            // Who has heard enough need not read it all.
            let _ = client.write_all(&answer);
        }
    })
}

/// What attaching and asking say of a server that answers with these bytes.
fn told(answer: Vec<u8>) -> [String; 2] {
    let home = TestHome::new();
    let socket = home.file("one.sock");
    let server = fake_server(&socket, answer);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let place = Place::at(&socket);
    let errors = runtime.block_on(async {
        let attached = Attach::default().timeout(LIMIT).to(place.clone()).await.map(|_| ());
        let asked = flight(&place, LIMIT).await.map(|_| ());
        [attached, asked]
    });
    drop(std::os::unix::net::UnixStream::connect(&socket).unwrap());
    assert!(server.join().unwrap() >= 2);
    errors.map(|error| match error {
        Err(error @ Error::Attach { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    })
}

fn refusal(errno: Errno, version: u32) -> Vec<u8> {
    let status = -(errno as i32);
    let magic = HANDSHAKE_MAGIC;
    Answer { magic, status, version, fds: [-1; 3], ..Answer::default() }.to_bytes().to_vec()
}

#[test]
fn a_server_of_another_version_of_the_handshake_is_named_with_both_versions() {
    for version in [0, 2, 77] {
        for error in told(refusal(Errno::EPROTONOSUPPORT, version)) {
            assert!(error.contains(&format!("server speaks version {version} ")), "{error}");
            assert!(
                error.contains(&format!("this farcall version {HANDSHAKE_VERSION}")),
                "{error}"
            );
            assert!(error.contains("use the farcall that started it"), "{error}");
        }
    }
}

#[test]
fn so_is_one_that_does_not_know_what_it_is_asked_for() {
    // As one did from before there was a log.
    for error in told(refusal(Errno::EINVAL, 1)) {
        assert!(error.contains("speaks version 1 of the handshake"), "{error}");
        assert!(error.contains(&format!("with version {HANDSHAKE_VERSION}")), "{error}");
        assert!(error.contains("use the farcall that started it"), "{error}");
    }
}

#[test]
fn so_is_one_that_goes_on_in_another_version_of_the_stream() {
    let answer = Answer {
        magic: HANDSHAKE_MAGIC,
        version: HANDSHAKE_VERSION,
        stream_version: STREAM_VERSION + 1,
        fds: [4, 5, -1],
        ..Answer::default()
    };
    let bytes = [&answer.to_bytes()[..], &[0; LOG_HEAD_SIZE]].concat();
    let [attached, _] = told(bytes);
    assert!(
        attached.contains(&format!("version {} of the stream", STREAM_VERSION + 1)),
        "{attached}"
    );
    assert!(attached.contains(&format!("up to version {STREAM_VERSION}")), "{attached}");
}

#[test]
fn what_is_no_server_is_not_taken_for_one_of_another_version() {
    let [attached, asked] = told(vec![b'x'; ANSWER_SIZE + size_of::<LogHead>()]);
    for error in [attached, asked] {
        assert!(error.contains("not a farcall server"), "{error}");
    }
    // Half an answer is none.
    for error in told(refusal(Errno::EINVAL, 1)[..30].to_vec()) {
        assert!(error.contains("closed the"), "{error}");
    }
    // Nor is an answer that says yes and leaves out what belongs to it.
    let yes = Answer {
        magic: HANDSHAKE_MAGIC,
        version: HANDSHAKE_VERSION,
        fds: [4, 5, -1],
        ..Answer::default()
    };
    let [attached, _] = told(yes.to_bytes().to_vec());
    assert!(attached.contains("ends before its log"), "{attached}");
}

#[tokio::test]
async fn names_of_a_server_that_does_not_tell_them_are_read_from_its_memory() {
    // The server of an older farcall, and its registry: here, in this process.
    let mut name = [0; NAME_SIZE];
    name[..4].copy_from_slice(b"left");
    let entry = Entry {
        value: 3,
        state: Entry::TAKEN,
        kind: 4,
        details: [3, 0, 0],
        name,
        user: [0; USER_SIZE],
    };
    let registry = Box::new([entry.to_bytes(), [0; ENTRY_SIZE]]);
    let busy = Answer {
        magic: HANDSHAKE_MAGIC,
        version: HANDSHAKE_VERSION,
        status: -(Errno::EBUSY as i32),
        holder_pid: 4711,
        holder_since: 1,
        ..Answer::default()
    };
    let refuses = Answer { status: -(Errno::EINVAL as i32), ..busy };
    let mut head = [0; LOG_HEAD_SIZE];
    for (at, number) in [(24, registry.as_ptr() as u64), (32, 2), (40, 2)] {
        head[at..at + 8].copy_from_slice(&u64::to_le_bytes(number));
    }
    let home = TestHome::new();
    let socket = home.file("one.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let server = std::thread::spawn(move || {
        for _ in 0..2 {
            let (mut client, _) = listener.accept().unwrap();
            let mut hello = [0; HELLO_SIZE];
            client.read_exact(&mut hello).unwrap();
            let asks = Hello::from_bytes(&hello).asks_for_names();
            let answer = if asks { refuses } else { busy };
            client.write_all(&[&answer.to_bytes()[..], &head].concat()).unwrap();
        }
    });
    let process = Incarnation::of(std::process::id() as i32).unwrap();
    let state = State { process, holder: None, since: 0, cgroups: Vec::new(), connection: None };
    std::fs::write(home.file("one.json"), serde_json::to_vec(&state).unwrap()).unwrap();
    let seen = names_of(&Place::at(&socket), LIMIT).await.unwrap();
    server.join().unwrap();
    assert_eq!(seen.holder, Some((Some(4711), 1)));
    let [left] = seen.names.as_slice() else { panic!("{seen:?}") };
    assert_eq!((left.name.as_str(), left.size), ("left", Some(3)));
    drop(registry);
}
