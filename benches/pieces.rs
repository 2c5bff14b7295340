//! What this side of a call costs, without any process: the stream's state, the handshake, buffers.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use farcall::abi::handshake::{
    ANSWER_SIZE, Answer, HANDSHAKE_MAGIC, HANDSHAKE_VERSION, Hello, Token,
};
use farcall::abi::wire::{RESULT_SIZE, STREAM_VERSION};
use farcall::calls::Sysno;
use farcall::calls::arena::{ARENA_SIZE, Arena};
use farcall::persist::answer as read_answer;
use farcall::proto::stream::Stream;
use farcall::proto::{Call, Replies};

const MEGABYTE: usize = 1 << 20;

fn getppid() -> Call {
    Call::syscall(Sysno::getppid, [0; 6])
}

/// A stream whose only batch is written, all at once.
fn written(calls: Vec<Call>) -> Stream<()> {
    let mut stream = Stream::default();
    stream.set_version(STREAM_VERSION);
    stream.push(calls, ());
    let size = stream.output(false).iter().map(|piece| piece.len()).sum();
    stream.wrote(size);
    stream
}

fn received(stream: &mut Stream<()>, bytes: &[u8]) -> Vec<((), Replies)> {
    let mut complete = Vec::new();
    stream.receive(bytes, &mut complete).expect("the replies follow the protocol");
    complete
}

/// Batches of calls from being pushed to having their replies.
fn stream(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("stream");
    for count in [1, 64] {
        group.throughput(Throughput::Elements(count as u64));
        let results = vec![0; count * RESULT_SIZE];
        group.bench_function(format!("batch of {count}"), |bencher| {
            bencher.iter(|| {
                let mut stream = written((0..count).map(|_| getppid()).collect());
                received(&mut stream, black_box(&results))
            });
        });
        if count == 1 {
            continue;
        }
        group.bench_function(format!("{count} batches"), |bencher| {
            bencher.iter(|| {
                let mut stream = Stream::default();
                for _ in 0..count {
                    stream.push(vec![getppid()], ());
                }
                while !stream.is_written() {
                    let size = stream.output(false).iter().map(|piece| piece.len()).sum();
                    stream.wrote(size);
                }
                received(&mut stream, black_box(&results))
            });
        });
    }
    group.throughput(Throughput::Bytes(MEGABYTE as u64));
    group.bench_function("COPY_OUT of 1 MiB", |bencher| {
        let mut bytes = (MEGABYTE as u64).to_le_bytes().to_vec();
        bytes.resize(RESULT_SIZE + MEGABYTE, 7);
        bytes.extend((MEGABYTE as u64).to_le_bytes());
        bencher.iter_batched(
            || written(vec![Call::copy_out(0x1000, MEGABYTE)]),
            |mut stream| {
                let mut complete = Vec::new();
                // As much as one read of a connection's takes.
                for piece in bytes.chunks(64 * 1024) {
                    stream.receive(piece, &mut complete).expect("it follows the protocol");
                }
                complete
            },
            BatchSize::LargeInput,
        );
    });
    group.finish();
}

/// Buffers taken and given back.
fn arena(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("arena");
    let arena = Arena::new(0x1000, ARENA_SIZE);
    group.bench_function("take and drop", |bencher| {
        bencher.iter(|| arena.take(black_box(100)));
    });
    // Every other piece is free: the worst place to find a large one in.
    let mut pieces: Vec<_> = std::iter::from_fn(|| arena.take(64)).collect();
    let mut index = 0;
    pieces.retain(|_| {
        index += 1;
        index % 2 == 0
    });
    group.bench_function("take and drop, in pieces", |bencher| {
        bencher.iter(|| arena.take(black_box(64)));
    });
    group.bench_function("find nothing, in pieces", |bencher| {
        bencher.iter(|| arena.take(black_box(65)).is_none());
    });
    group.finish();
}

/// What goes over a listening socket.
fn handshake(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("handshake");
    let hello = Hello {
        magic: HANDSHAKE_MAGIC,
        version: HANDSHAKE_VERSION,
        stream_version: STREAM_VERSION,
        token: Token([1, 2]),
        pid: 4711,
        flags: 0,
        from: 0,
    };
    group.bench_function("encode", |bencher| bencher.iter(|| black_box(&hello).to_bytes()));
    let answer = Answer {
        magic: HANDSHAKE_MAGIC,
        status: 0,
        version: HANDSHAKE_VERSION,
        stream_version: STREAM_VERSION,
        pid: 4712,
        generation: 1,
        fds: [3, 4, -1],
        listen: 5,
        spares: 0,
        holder_pid: 4711,
        socket_file: 0,
        holder_since: 0,
    };
    let bytes: [u8; ANSWER_SIZE] = answer.to_bytes();
    group.bench_function("parse", |bencher| bencher.iter(|| read_answer(black_box(&bytes))));
    group.finish();
}

criterion_group!(pieces, stream, arena, handshake);
criterion_main!(pieces);
