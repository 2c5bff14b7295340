//! UPGRADE: a process goes on as another image, and keeps all that it has.

use std::fs;

use nix::libc;

use crate::client::{Attached, Client, Ends, OTHER, TOKEN, attach, hello, spares};
use crate::log::{attach_and_ask, look, record};
use crate::ring::{Ring, blocked_in, with_a_ring};
use crate::server::{Persistent, Server};
use crate::stream::{
    COPY_IN, COPY_OUT, IMAGE, KEEP, OP, REGISTRY, Stream, UPGRADE, request, until,
};
use crate::vectors;

const EINVAL: i64 = -(libc::EINVAL as i64);
const EFAULT: i64 = -(libc::EFAULT as i64);
const CANCELED: i64 = -(libc::ECANCELED as i64);
const LINK: u64 = 1 << 33;
const REF0: u64 = 1 << 35;
const GETPID: u64 = libc::SYS_getpid as u64;
const CLOSE: u64 = libc::SYS_close as u64;
const DUP: u64 = libc::SYS_dup as u64;

/// Where the fields of the entry table lie in an image.
const MAGIC: usize = 176;
const VERSION: usize = 184;
const SIZE: usize = 188;
const RESUME: usize = 208;
const HANDOVER: usize = 212;

/// The pages of an image.
const PAGES: u64 = 12_288;

/// The image with one field of its table changed.
fn with(at: usize, value: u32) -> Vec<u8> {
    let mut image = farcall::image::IMAGE.to_vec();
    image[at..at + 4].copy_from_slice(&value.to_le_bytes());
    image
}

/// Puts an image into a server's memory; where it is there.
#[track_caller]
fn load(stream: &Stream, image: &[u8]) -> u64 {
    let address = stream.memory(PAGES);
    assert_eq!(stream.copy_in(address, image), image.len() as i64);
    address
}

/// Lets a server go on as the same image at another address, and takes the old one away. The address.
#[track_caller]
pub fn upgrade(stream: &Stream) -> u64 {
    let old = stream.ask(IMAGE, &[]);
    let new = load(stream, farcall::image::IMAGE);
    assert_eq!(stream.ask(UPGRADE, &[new]), old);
    assert_eq!(stream.ask(IMAGE, &[]), new as i64);
    stream.done(libc::SYS_munmap, &[old as u64, PAGES]);
    new
}

/// A persistent process, with a controller, in version 1.
fn persistent() -> (Persistent, Attached) {
    let process = Persistent::new();
    let attached = attach(&process.path, &TOKEN);
    attached.stream.speaks_version_1();
    (process, attached)
}

/// An image in which `resume` is this code and which can do nothing else.
fn image_of(code: &[u8]) -> Vec<u8> {
    const AT: u32 = 256;
    let mut image = vec![0; AT as usize];
    image[MAGIC..MAGIC + 8].copy_from_slice(b"farcall\0");
    image.extend(code);
    let size = image.len() as u32;
    for (at, value) in [(VERSION, 1), (SIZE, size), (RESUME, AT), (HANDOVER, 392)] {
        image[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    image
}

#[test]
fn a_process_goes_on_as_the_other_image_and_needs_the_old_one_no_more() {
    let (mut server, stream) = Server::on_a_socket();
    stream.speaks_version_1();
    let before = server.fds();
    let memory = stream.memory(2 * 4096);
    stream.done(libc::SYS_mprotect, &[memory + 4096, 4096, 0]);
    assert_eq!(stream.copy_in(memory, b"kept"), 4);
    upgrade(&stream);
    assert_eq!(stream.getpid(), i64::from(server.pid()));
    assert_eq!(stream.copy_out(memory, 4), (b"kept".to_vec(), 4));
    assert_eq!(server.fds(), before);
    stream.send(&[request(DUP, &[0]), request(CLOSE | LINK | REF0, &[1])].concat());
    assert!(stream.result() > 0);
    assert_eq!(stream.result(), 0);
    assert_eq!(stream.copy_out(memory, 8192).1, 4096);
    stream.is_in_step();
    stream.hang_up();
    server.exits_with(0);
}

#[test]
fn what_cannot_take_over_is_refused_and_the_old_image_goes_on() {
    let (_server, stream) = Server::on_a_socket();
    let size = farcall::image::IMAGE.len() as u32;
    let fits = load(&stream, farcall::image::IMAGE);
    assert_eq!(stream.ask(UPGRADE, &[fits]), EINVAL, "in version 0");
    stream.speaks_version_1();
    let old = stream.ask(IMAGE, &[]);
    let goes_on = || {
        assert_eq!(stream.ask(IMAGE, &[]), old);
        stream.is_in_step();
    };
    for (what, image) in [
        ("no table", vec![0; 4096]),
        ("another magic", with(MAGIC, 0)),
        ("the second half of another magic", with(MAGIC + 4, 0)),
        ("an older version", with(VERSION, 0)),
        ("a newer version", with(VERSION, 2)),
        ("an entry behind its end", with(RESUME, size)),
        ("an entry far behind its end", with(RESUME, u32::MAX)),
        ("no bytes", with(SIZE, 0)),
        ("an image that forgets something", with(HANDOVER, 383)),
    ] {
        let address = load(&stream, &image);
        assert_eq!(stream.ask(UPGRADE, &[address]), EINVAL, "{what}");
        goes_on();
        assert_eq!(stream.copy_in(address, b"x"), 1, "{what}: nothing has been done to it");
    }
    // Not all of it is there.
    let cut = load(&stream, &with(SIZE, PAGES as u32 + 1));
    stream.done(libc::SYS_munmap, &[cut + 4096, 4096]);
    assert_eq!(stream.ask(UPGRADE, &[cut]), -i64::from(libc::ENOMEM));
    goes_on();
    let shifted = stream.memory(PAGES + 4096) + 8;
    assert_eq!(stream.copy_in(shifted, farcall::image::IMAGE), i64::from(size));
    assert_eq!(stream.ask(UPGRADE, &[shifted]), EINVAL, "not at a page");
    goes_on();
    let half = stream.memory(4096);
    stream.done(libc::SYS_munmap, &[half, 4096]);
    for nowhere in [0, half, u64::MAX, 1 << 63, u64::MAX - 175] {
        assert_eq!(stream.ask(UPGRADE, &[nowhere]), EFAULT, "{nowhere:#x}");
        goes_on();
    }
    // The table is there in part.
    assert_eq!(stream.ask(UPGRADE, &[cut + 4096 - 200]), EFAULT);
    let failing = request(CLOSE, &[77]);
    for word in [UPGRADE | LINK, UPGRADE | REF0] {
        let argument = if word & LINK == 0 { 1 } else { fits };
        stream.send(&[failing.clone(), request(word, &[argument])].concat());
        assert_eq!(stream.result(), -i64::from(libc::EBADF));
        assert_eq!(stream.result(), CANCELED);
    }
    goes_on();
    assert_eq!(stream.ask(UPGRADE, &[fits]), old, "after all of that");
    stream.is_in_step();
}

#[test]
fn where_the_system_forbids_it_the_old_image_goes_on() {
    let (_server, stream) = Server::on_a_socket();
    stream.speaks_version_1();
    let new = load(&stream, farcall::image::IMAGE);
    // PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN: Linux 6.3.
    if stream.call(libc::SYS_prctl, &[65, 1, 0, 0, 0]) != 0 {
        return;
    }
    assert_eq!(stream.ask(UPGRADE, &[new]), -i64::from(libc::EACCES));
    stream.is_in_step();
}

#[test]
fn an_image_can_be_the_result_of_another_call() {
    let (_server, stream) = Server::on_a_socket();
    stream.speaks_version_1();
    let old = stream.ask(IMAGE, &[]);
    // Itself: nothing says that it must be another one.
    stream.send(&[request(IMAGE, &[]), request(UPGRADE | LINK | REF0, &[1])].concat());
    assert_eq!([stream.result(), stream.result()], [old; 2]);
    stream.is_in_step();
}

/// The stack pointer with which the server waits for its next request.
fn stack_pointer(server: &Server) -> u64 {
    until("the server waits", || {
        (blocked_in(server.pid()) == Some(libc::SYS_ppoll)).then_some(())?;
        let call = fs::read_to_string(format!("/proc/{}/syscall", server.pid())).unwrap();
        let words: Vec<_> = call.split_whitespace().collect();
        u64::from_str_radix(words.get(7)?.strip_prefix("0x")?, 16).ok()
    })
}

#[test]
fn a_thousand_upgrades_take_no_stack_and_no_descriptors() {
    let (process, Attached { stream, .. }) = persistent();
    let before = process.server.fds();
    let mut images = [(); 2].map(|()| load(&stream, farcall::image::IMAGE));
    stream.ask(UPGRADE, &[images[1]]);
    let stack = stack_pointer(&process.server);
    for _ in 0..1000 {
        assert_eq!(stream.ask(UPGRADE, &[images[0]]), images[1] as i64);
        images.swap(0, 1);
    }
    assert_eq!(stack_pointer(&process.server), stack);
    assert_eq!(process.server.fds(), before);
    stream.is_in_step();
}

#[test]
fn what_has_been_read_ahead_is_executed_by_the_new_image() {
    let (server, stream) = Server::on_a_socket();
    stream.speaks_version_1();
    let (pid, old) = (i64::from(server.pid()), stream.ask(IMAGE, &[]));
    let new = load(&stream, farcall::image::IMAGE);
    let memory = stream.memory(4096);
    // In one piece, which is read at once.
    let batch = [
        request(GETPID, &[]),
        request(DUP, &[0]),
        request(UPGRADE, &[new]),
        request(IMAGE, &[]),
        // Results of the old image are found.
        request(CLOSE | REF0, &[3]),
        request(COPY_IN, &[memory, 5]),
        b"hello".to_vec(),
        request(COPY_OUT, &[memory, 5]),
        request(CLOSE, &[u64::MAX])[..30].to_vec(),
    ];
    stream.send(&batch.concat());
    assert_eq!(stream.result(), pid);
    assert!(stream.result() > 0);
    assert_eq!(stream.result(), old);
    assert_eq!(stream.result(), new as i64);
    assert_eq!([stream.result(), stream.result()], [0, 5]);
    assert_eq!((stream.result(), stream.receive(5), stream.result()), (5, b"hello".to_vec(), 5));
    stream.send(&request(CLOSE, &[u64::MAX])[30..]);
    assert_eq!(stream.result(), -i64::from(libc::EBADF));
    stream.is_in_step();
}

#[test]
fn the_results_before_it_are_sent_whatever_becomes_of_it() {
    let (mut server, stream) = Server::on_a_socket();
    stream.speaks_version_1();
    let pid = i64::from(server.pid());
    // ud2
    let broken = load(&stream, &image_of(&[0x0f, 0x0b]));
    stream.send(&[request(GETPID, &[]), request(UPGRADE, &[broken])].concat());
    assert_eq!(stream.result(), pid);
    stream.ends();
    assert_eq!(server.status().code(), None, "it dies of what it was told to execute");
}

#[test]
fn the_handover_is_the_documents() {
    let (mut process, Attached { stream, answer, .. }) = persistent();
    let old = stream.ask(IMAGE, &[]);
    // write(the output, the handover, 392), exit(0)
    let code = [
        0x48, 0x89, 0xfe, // mov rsi, rdi
        0x8b, 0x7e, 40, // mov edi, [rsi + 40]
        0xba, 0x88, 0x01, 0, 0, // mov edx, 392
        0xb8, 1, 0, 0, 0, // mov eax, 1
        0x0f, 0x05, // syscall
        0x31, 0xff, // xor edi, edi
        0xb8, 60, 0, 0, 0, // mov eax, 60
        0x0f, 0x05, // syscall
    ];
    let new = load(&stream, &image_of(&code));
    let calls = look(&process).calls();
    stream.send(&[request(UPGRADE, &[new]), request(GETPID, &[])].concat());
    let bytes = stream.receive(392);
    vectors::assert_matches(&bytes, "handover");
    let word = |at: usize| i32::from_le_bytes(*bytes[at..].first_chunk().unwrap());
    let long = |at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().unwrap());
    let [input, data, _] = answer.fds();
    assert_eq!((word(8), word(40), word(48)), (input, input, data));
    assert_eq!(spares(long(56) as i64), answer.spares());
    assert_eq!(long(104), new);
    assert_eq!(long(152), calls);
    assert_eq!(long(352) as i64, answer.since());
    assert_eq!(long(376), old as u64);
    stream.ends();
    process.server.exits_with(0);
}

#[test]
fn a_persistent_process_keeps_its_controller_its_log_and_its_registry() {
    let (process, attached) = persistent();
    let stream = &attached.stream;
    let registry = stream.memory(4096);
    assert_eq!(stream.ask(REGISTRY, &[registry, 4]), 0);
    let mut entry = vec![0; 128];
    entry[16] = 1;
    entry[48..51].copy_from_slice(b"one");
    let source = stream.memory(4096);
    assert_eq!(stream.copy_in(source, &entry), 128);
    let keep = |slot| stream.ask(KEEP, &[slot, source, 128, 0, 1, 0]);
    assert_eq!(keep(0), 0);
    let fd = stream.done(libc::SYS_dup, &[0]);
    let old = stream.ask(IMAGE, &[]);
    let new = load(stream, farcall::image::IMAGE);
    let before = look(&process);
    // What is prepared for it is forgotten: it makes nothing that could have a name.
    assert_eq!(keep(1), 0);
    assert_eq!(stream.ask(UPGRADE, &[new]), old);
    stream.is_in_step();
    let log = look(&process);
    log.goes_on(
        before.calls(),
        &[
            record(KEEP, &[1, source, 128, 0, 1, 0], 0),
            record(UPGRADE, &[new], old),
            record(CLOSE, &[u64::MAX], -i64::from(libc::EBADF)),
            record(GETPID, &[], i64::from(process.server.pid())),
        ],
    );
    assert_eq!((log.first(), log.memory()), (before.first(), before.memory()));
    assert_eq!(log.controllers(), before.controllers());
    let entries = stream.copy_out(registry, 256).0;
    assert_eq!((entries[0] as u64, entries[8]), (fd, 1), "it has its name");
    assert_eq!((&entries[128..136], entries[136]), (&[0; 8][..], 0), "nothing came in");
    assert_eq!(keep(2), 0);
    let another = stream.done(libc::SYS_dup, &[0]);
    assert_eq!(u64::from(stream.copy_out(registry + 256, 1).0[0]), another);

    // Another controller is told who holds it, and the same one comes again.
    let client = Client::connect(&process.path);
    let ends = Ends::new();
    assert!(client.send(&hello(&OTHER), &ends.raw()));
    let busy = client.answer();
    assert_eq!((busy.status(), busy.holder()), (-libc::EBUSY, 4711));
    assert_eq!(busy.since(), attached.answer.since());
    let (again, log) = attach_and_ask(&process, &TOKEN, 1);
    assert_eq!(again.answer.generation(), attached.answer.generation() + 1);
    assert_eq!(again.answer.listen(), attached.answer.listen());
    assert_eq!(log.controllers(), before.controllers());
    assert_eq!(again.stream.ask(IMAGE, &[]), new as i64);
}

#[test]
fn a_detached_process_is_as_inert_as_before_and_any_controller_may_come() {
    let (mut process, Attached { stream, .. }) = persistent();
    let new = upgrade(&stream);
    drop(stream);
    let open = process.fds_when_detached();
    process.is_detached_again(&open, "an upgrade");
    let other = attach(&process.path, &OTHER);
    assert_eq!(other.stream.ask(IMAGE, &[]), new as i64);
}

#[test]
fn a_client_whose_handshake_is_under_way_is_closed_and_may_come_again() {
    let (mut process, Attached { stream, .. }) = persistent();
    let image = load(&stream, farcall::image::IMAGE);
    let before = process.server.fds();
    let client = Client::connect(&process.path);
    let ends = Ends::new();
    assert!(client.send(&hello(&TOKEN)[..20], &ends.raw()));
    until("the client is pending", || {
        stream.is_in_step();
        (process.server.fds().len() == before.len() + 3).then_some(())
    });
    assert!(stream.ask(UPGRADE, &[image]) > 0);
    client.is_refused();
    process.has_again(&before, "a client that was dropped");
    let again = attach(&process.path, &TOKEN);
    assert_eq!(again.stream.ask(IMAGE, &[]), image as i64);
}

#[test]
fn a_ring_goes_on_where_it_was() {
    let (server, stream, mut ring) = with_a_ring();
    let pid = server.pid();
    for round in 0..5 {
        for _ in 0..100 {
            ring.is_in_step(pid);
        }
        ring.server_sleeps(pid);
        upgrade(&stream);
        // The new image sleeps and is woken.
        ring.server_sleeps(pid);
        let dup = ring.submit(DUP, &[0]);
        let close = ring.submit(CLOSE | REF0 | LINK, &[1]);
        assert!(ring.wait(dup) > 0, "round {round}");
        assert_eq!(ring.wait(close), 0);
        // It is nothing that a ring has.
        assert_eq!(ring.ask(UPGRADE, &[0]), EINVAL);
        stream.is_in_step();
    }
    let before = ring.address;
    let ring = Ring::beside(pid, &stream);
    assert_eq!(ring.before, before, "RING still names the one before");
}

/// The handlers that a server has for three signals.
fn handlers(stream: &Stream) -> [u64; 3] {
    let memory = stream.memory(4096);
    [libc::SIGPIPE as u64, libc::SIGIO as u64, 64].map(|signal| {
        stream.done(libc::SYS_rt_sigaction, &[signal, 0, memory, 8]);
        u64::from_le_bytes(*stream.copy_out(memory, 8).0.first_chunk().unwrap())
    })
}

#[test]
fn handlers_in_the_old_image_are_the_new_ones_afterwards_and_others_stay() {
    let (_server, stream) = Server::on_a_socket();
    stream.speaks_version_1();
    let old = stream.ask(IMAGE, &[]) as u64;
    let [pipe, source, interrupt] = handlers(&stream);
    assert!([pipe, source, interrupt].iter().all(|handler| (old..old + PAGES).contains(handler)));
    let new = upgrade(&stream);
    assert_eq!(handlers(&stream), [pipe, source, interrupt].map(|handler| new + handler - old));
    // One that the process has been given since is not the image's.
    let memory = stream.memory(4096);
    for handler in [0, 1, new - 4096] {
        assert_eq!(stream.ask(OP | 5, &[memory, 8, handler]), 0);
        stream.done(libc::SYS_rt_sigaction, &[libc::SIGPIPE as u64, memory, 0, 8]);
        let new = upgrade(&stream);
        assert_eq!(handlers(&stream), [handler, new + source - old, new + interrupt - old]);
    }
    // Nor is one right behind it.
    for is_behind in [true, false] {
        let image = stream.ask(IMAGE, &[]) as u64;
        let size = stream.copy_out(image + SIZE as u64, 4).0;
        let end = image + u64::from(u32::from_le_bytes(*size.first_chunk().unwrap()));
        let handler = if is_behind { end } else { end - 1 };
        assert_eq!(stream.ask(OP | 5, &[memory, 8, handler]), 0);
        stream.done(libc::SYS_rt_sigaction, &[libc::SIGPIPE as u64, memory, 0, 8]);
        let new = upgrade(&stream);
        let expected = if is_behind { handler } else { new + pipe - old };
        assert_eq!(handlers(&stream)[0], expected);
    }
}
