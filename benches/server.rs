//! Calls over a local server. `farcall bench` compares such figures with baselines; these are for
//! finding out what a change has done.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use farcall::calls::Sysno;
use farcall::proto::Call;
use farcall::{Local, Process};
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use tokio::runtime::{Builder, Runtime};

/// Calls in flight together.
const IN_FLIGHT: usize = 64;

fn start() -> (Runtime, Process) {
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    let process = runtime.block_on(Local::new().start()).expect("a local server");
    (runtime, process)
}

fn calls(criterion: &mut Criterion) {
    let (runtime, process) = start();
    let mut group = criterion.benchmark_group("calls");
    group.bench_function("one", |bencher| {
        bencher.iter(|| runtime.block_on(process.getppid()).expect("getppid"));
    });
    group.throughput(Throughput::Elements(IN_FLIGHT as u64));
    group.bench_function("64 in flight", |bencher| {
        bencher.iter(|| {
            runtime.block_on(async {
                let call = || Call::syscall(Sysno::getppid, [0; 6]);
                let receipts: Vec<_> =
                    (0..IN_FLIGHT).map(|_| process.connection().call("getppid", call())).collect();
                for receipt in receipts {
                    black_box(receipt.await.expect("getppid"));
                }
            });
        });
    });
    group.finish();
}

/// Chains that are built, and that are executed as well.
fn chains(criterion: &mut Criterion) {
    let (runtime, process) = start();
    let mut group = criterion.benchmark_group("chain of open, read, close");
    let build = || {
        let mut chain = process.chain();
        let file = chain.openat(None, "/proc/self/stat", OFlag::O_RDONLY, Mode::empty());
        let bytes = chain.read(file, 4096);
        chain.close(file);
        (chain, bytes)
    };
    group.bench_function("built", |bencher| bencher.iter(|| black_box(build()).1));
    group.bench_function("run", |bencher| {
        bencher.iter(|| {
            let (chain, bytes) = build();
            let mut done = runtime.block_on(chain.run()).expect("the chain");
            done.bytes(bytes)
        });
    });
    group.finish();
}

criterion_group!(server, calls, chains);
criterion_main!(server);
