//! Bytes of every kind of memory: what a call may read and write in a process can be transferred, at
//! any size and by any way, and what it may not is the same error everywhere.

use farcall::calls::Sysno;
use farcall::host::local::Stdio;
use farcall::link::Polling;
use farcall::{Error, Fd, Local, Process};
use nix::libc;

const SIZE: usize = 2 << 20;

/// From one byte to what goes through a pipe, and not only at pages' starts.
const PIECES: [(u64, usize); 6] =
    [(0, 1), (8, 8), (100, 3000), (0, 5000), (4090, 20_000), (4096, SIZE - 8192)];

/// What is looked at.
struct Memory {
    what: String,
    address: u64,
    size: u64,
    /// What is written there is read again, and not changed by the kernel.
    keeps: bool,
}

/// A file, and memory full of zeros.
struct Scratch {
    file: Fd,
    zeros: u64,
}

impl Scratch {
    async fn new(process: &Process) -> Self {
        let zeros = mapped(process, SIZE, libc::PROT_READ | libc::PROT_WRITE, None).await;
        // Its name is empty.
        let file = process.syscall(Sysno::memfd_create, [zeros, 0, 0, 0, 0, 0]).await.unwrap();
        Self { file: process.adopt_fd(file as i32).unwrap(), zeros }
    }

    /// What calls may do there, in the kernel's word: a write(2) from there and a read(2) into it.
    async fn may(&self, process: &Process, address: u64) -> (bool, bool) {
        let number = self.file.number() as u64;
        let call = async |call, at| process.syscall(call, [number, at, 8, 0, 0, 0]).await.is_ok();
        let readable = call(Sysno::pwrite64, address).await;
        assert!(call(Sysno::pwrite64, self.zeros).await);
        (readable, call(Sysno::pread64, address).await)
    }
}

async fn mapped(process: &Process, size: usize, protection: i32, fd: Option<&Fd>) -> u64 {
    let (flags, fd) = match fd {
        Some(fd) => (libc::MAP_SHARED, fd.number() as u64),
        None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, u64::MAX),
    };
    let args = [0, size as u64, protection as u64, flags as u64, fd, 0];
    process.syscall(Sysno::mmap, args).await.unwrap()
}

async fn check(process: &Process, scratch: &Scratch, memory: Memory) {
    let Memory { what, address, size, keeps } = memory;
    let (readable, writable) = scratch.may(process, address).await;
    for (at, len) in PIECES.into_iter().filter(|(at, len)| at + *len as u64 <= size) {
        let address = address + at;
        let bytes: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
        let written = process.write_memory(address, bytes.clone()).await;
        assert_eq!(written.is_ok(), writable, "{what}: {len} bytes in: {written:?}");
        let read = process.read_memory(address, len).await;
        assert_eq!(read.is_ok(), readable, "{what}: {len} bytes out: {:?}", read.err());
        for error in [written.as_ref().err(), read.as_ref().err()].into_iter().flatten() {
            assert!(matches!(error, Error::Fault { .. }), "{what}: {error:?}");
        }
        if readable && writable && keeps {
            assert!(read.unwrap() == bytes, "{what}: {len} bytes are others");
        }
        process.getpid().await.unwrap();
    }
}

/// A page through which perf_event_open(2) tells of an event.
async fn perf_page(process: &Process, scratch: &Scratch) -> farcall::Result<(Fd, u64)> {
    let mut attributes = [0u8; 120];
    // PERF_TYPE_SOFTWARE, its size; the event is the processor's clock; disabled.
    attributes[0] = 1;
    attributes[4] = 120;
    attributes[40] = 1;
    let at = scratch.zeros + 4096;
    process.write_memory(at, attributes).await?;
    let args = [at, 0, u64::MAX, u64::MAX, 0, 0];
    let event = process.syscall(Sysno::perf_event_open, args).await?;
    let event = process.adopt_fd(event as i32)?;
    let address = mapped(process, 4096, libc::PROT_READ | libc::PROT_WRITE, Some(&event)).await;
    Ok((event, address))
}

/// Servers of every way: version 0 and 1 of the stream, the ring and pipes.
async fn roots() -> Vec<(&'static str, Process)> {
    let local = || Local::new().stdio(Stdio::Null);
    let version_0 = local().stream_version(0).start().await.unwrap();
    let version_1 = local().polling(None).start().await.unwrap();
    let ring = local().start().await.unwrap();
    ring.enter_ring(Polling::Adaptive).await.unwrap();
    vec![("version 0", version_0), ("version 1", version_1), ("ring", ring)]
}

#[tokio::test]
async fn what_calls_may_read_and_write_is_transferred_at_any_size() {
    for (way, process) in roots().await {
        let scratch = Scratch::new(&process).await;
        let (read, write, execute) = (libc::PROT_READ, libc::PROT_WRITE, libc::PROT_EXEC);
        for (what, protection) in [
            ("read and write", read | write),
            ("read only", read),
            ("write only", write),
            ("execute only", execute),
            ("nothing", libc::PROT_NONE),
        ] {
            let address = mapped(&process, SIZE, protection, None).await;
            let what = format!("{way}, {what}");
            check(&process, &scratch, Memory { what, address, size: SIZE as u64, keeps: true })
                .await;
        }
        match process.syscall(Sysno::memfd_secret, [0; 6]).await {
            Ok(secret) => {
                let secret = process.adopt_fd(secret as i32).unwrap();
                let truncate = [secret.number() as u64, SIZE as u64, 0, 0, 0, 0];
                process.syscall(Sysno::ftruncate, truncate).await.unwrap();
                let address = mapped(&process, SIZE, read | write, Some(&secret)).await;
                let what = format!("{way}, memfd_secret");
                let memory = Memory { what, address, size: SIZE as u64, keeps: true };
                check(&process, &scratch, memory).await;
            }
            Err(error) => eprintln!("not tested, memory of memfd_secret(2): {error}"),
        }
        match perf_page(&process, &scratch).await {
            Ok((_event, address)) => {
                let what = format!("{way}, a control page of perf");
                check(&process, &scratch, Memory { what, address, size: 4096, keeps: false }).await;
            }
            Err(error) => eprintln!("not tested, a control page of perf: {error}"),
        }
    }
}
