//! HELLO, IMAGE and SERVE.

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;

use nix::libc;

use crate::client::{Client, Ends, OTHER, TOKEN, attach, hello, spares};
use crate::server::{Home, Persistent, Server, sockets};
use crate::stream::{HELLO, IMAGE, SERVE, Stream, request, until};
use crate::vectors;

#[test]
fn hello_tells_version_0_and_what_is_offered() {
    let (_server, stream) = Server::on_pipes();
    stream.send(&vectors::bytes("request-hello"));
    vectors::assert_matches(&stream.receive(8), "result-hello");
    // Whatever the client would speak, this is what there is.
    assert_eq!(stream.ask(HELLO, &[u64::MAX]), crate::vectors::offered());
    stream.is_in_step();
}

#[test]
fn image_tells_where_the_image_lies() {
    let (_server, stream) = Server::on_pipes();
    stream.send(&vectors::bytes("request-image"));
    let image = stream.result() as u64;
    assert_eq!(image % 4096, 0);
    let (table, real) = stream.copy_out(image + 176, 40);
    assert_eq!(real, 40);
    vectors::assert_matches(&table, "entry-table");
    let size = u32::from_le_bytes(*table[12..].first_chunk().unwrap());
    assert!(size <= 12_288);
    let whole = farcall::image::IMAGE;
    assert_eq!(size as usize, whole.len());
    assert!(stream.copy_out(image, whole.len()).0 == whole, "the image as it is in the file");
}

#[test]
fn every_entry_lies_inside_the_image() {
    let (_server, stream) = Server::on_pipes();
    let image = stream.ask(IMAGE, &[]) as u64;
    let (table, _) = stream.copy_out(image + 176, 40);
    let words: Vec<u32> =
        table.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
    let [size, entries @ .., _handover] = &words[3..] else { panic!("10 words") };
    assert!(entries.iter().all(|entry| (216..*size).contains(entry)), "{entries:?} in {size}");
}

#[test]
fn serve_goes_on_with_other_descriptors() {
    let (ours, theirs) = sockets();
    let (mut server, stream) = Server::on_pipes_with(Some(theirs.as_fd()));
    drop(theirs);
    let second = Stream { results: ours.try_clone().unwrap(), requests: ours };
    // The result comes where the request came from, and names no spare descriptors.
    assert_eq!(stream.ask(SERVE, &[3 | 3 << 32, u64::MAX]), 0);
    second.is_in_step();
    // The old ones are still open.
    assert!(server.fds().keys().copied().eq(0..4));
    // Only the output, and back.
    assert_eq!(second.ask(SERVE, &[0xffff_ffff | 1 << 32, u64::MAX]), 0);
    second.send(&vectors::bytes("request-getpid"));
    assert_eq!(stream.result(), i64::from(server.pid()));
    drop(second);
    server.exits_with(0);
}

#[test]
fn serve_with_a_listener_makes_a_process_persistent() {
    let home = Home::new();
    let path = home.path("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let mut command = home.command(Some(listener.as_fd()));
    command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let (server, stream) = Server::with_its_pipes(home, &mut command);
    drop(listener);
    let mut process = Persistent { server, path };

    stream.send(&vectors::bytes("request-serve"));
    let packed = stream.receive(8);
    vectors::assert_matches(&packed, "result-serve");
    assert_eq!(spares(i64::from_le_bytes(packed.try_into().unwrap())), [6, 5, 4]);

    // It is held by the token and pid that SERVE named.
    let client = Client::connect(&process.path);
    assert!(client.send(&hello(&OTHER), &Ends::new().raw()));
    let answer = client.answer();
    assert_eq!((answer.status(), answer.holder()), (-libc::EBUSY, 4711));
    assert_eq!(answer.generation(), 1);
    stream.is_in_step();

    // Its pipes were its connection: they are closed with that.
    drop(stream);
    let waiting = until("the process waits", || {
        let fds = process.server.fds();
        (!fds.contains_key(&0) && !fds.contains_key(&1) && fds.len() == 5).then_some(fds)
    });
    let attached = attach(&process.path, &TOKEN);
    assert_eq!(attached.answer.generation(), 2);
    drop(attached);
    process.is_detached_again(&waiting, "a connection");
}

#[test]
fn serve_ends_no_call_that_was_sent_ahead() {
    let (ours, theirs) = sockets();
    let (server, stream) = Server::on_pipes_with(Some(theirs.as_fd()));
    drop(theirs);
    let second = Stream { results: ours.try_clone().unwrap(), requests: ours };
    // What waits in the new input already is executed after SERVE, in order.
    second.send(&vectors::bytes("request-getpid"));
    stream.send(&request(SERVE, &[3 | 3 << 32, u64::MAX]));
    assert_eq!(stream.result(), 0);
    assert_eq!(second.result(), i64::from(server.pid()));
}
