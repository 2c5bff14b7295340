//! The first controller: sets things up in a persistent process, and does not live to use them.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use std::{env, fs};

use clap::Args;
use farcall::calls::Sysno;
use farcall::host::local::Stdio;
use farcall::persist::{Home, Name, SharedMemory};
use farcall::{Local, Mapping};
use nix::fcntl::OFlag;
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn};
use nix::sys::stat::Mode;

use super::{FIRST_HALF, Handover, REMEMBERED, Step, check};
use crate::command::output::print_json;
use crate::command::{Done, Failure};

/// The step that says that the last call has begun.
pub const LAST_STEP: &str = "the first controller begins a long call";
/// That call.
pub const LAST_CALL: Sysno = Sysno::nanosleep;
/// How long it blocks the process.
const LAST_CALL_TAKES: Duration = Duration::from_millis(1500);
/// How long the child takes to exit.
const CHILD_TAKES: Duration = Duration::from_millis(3000);

/// The first half of the demo; prints its steps as JSON, a line each.
#[derive(Args)]
pub struct FirstController {
    name: Name,
    file: PathBuf,
    handover: PathBuf,
}

impl FirstController {
    pub async fn run(self) -> Done {
        let mut since = Instant::now();
        let mut done = move |step: &str, checked: String| -> Result<(), Failure> {
            let ms = since.elapsed().as_secs_f64() * 1e3;
            since = Instant::now();
            print_json(&Step { step: step.into(), checked, ms })
        };

        let reserved = Home::find()?.reserve(&self.name)?;
        let socket = reserved.place().socket().display().to_string();
        let root = Local::new().stdio(Stdio::Null).start().await?;
        let process = root.child().spawn_persistent(reserved, SharedMemory::Refuse).await?;
        let pid = process.pid().ok_or_else(|| Failure::new("the process has no pid"))?;
        done("a persistent process is started", format!("pid {pid}, {socket}"))?;

        let file = process.openat(None, &self.file, OFlag::O_RDONLY, Mode::empty()).await?;
        let read = process.read(&file, FIRST_HALF.len()).await?;
        check("the first half of the file", &read, &FIRST_HALF.to_vec())?;
        done("it opens a file and reads half of it", format!("{} bytes", read.len()))?;

        let listener =
            process.socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), 0).await?;
        let any_port = SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0));
        process.bind(&listener, any_port).await?;
        process.listen(&listener, 1).await?;
        let address = process.getsockname(&listener).await?;
        let port = address.as_inet().map_or(0, |address| address.port());
        done("it listens on a loopback TCP port", format!("127.0.0.1:{port}"))?;

        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let memory: Mapping = process.mmap(4096, protection, MapFlags::MAP_PRIVATE, None).await?;
        process.write_memory(memory.address(), REMEMBERED).await?;
        let address = memory.address();
        done("bytes are put into its memory", format!("{} at {address:#x}", REMEMBERED.len()))?;

        let child = process.child().spawn().await?;
        let milliseconds = CHILD_TAKES.as_millis().to_string();
        let program = env::current_exe()?;
        child.execve(&program, ["farcall", "demo-child", &milliseconds], [""; 0]).await?;
        let child_pid = child.pid_in_parent();
        done(
            "it starts a child that will exit with 42",
            format!("pid {child_pid}, in {milliseconds} ms"),
        )?;

        let handover = Handover {
            pid,
            file: file.number(),
            listener: listener.number(),
            port,
            address,
            child: child_pid,
        };
        fs::write(&self.handover, serde_json::to_vec(&handover)?)?;
        let call = process.nanosleep(LAST_CALL_TAKES);
        done(LAST_STEP, format!("{} of {} ms", LAST_CALL.name(), LAST_CALL_TAKES.as_millis()))?;
        call.await?;
        Err(Failure::new("the first controller was to be killed before this call returned"))
    }
}
