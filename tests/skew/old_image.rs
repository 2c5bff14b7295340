//! The server of the farcall before calls could be withdrawn and were interrupted from a source, with the
//! controller of this one.
//!
//! `old.image` is the image of commit 15fb6b2, as `farcall image --output` of that one writes it.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use farcall::calls::Sysno;
use farcall::image::IMAGE;
use farcall::link::Polling;
use farcall::persist::{Attach, Place, attach};
use farcall::proto::Call;
use farcall::{Error, Outcome, Process};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::Pid;

use crate::common::{LIMIT, TestHome, blocked_in, cut, until_async};

const OLD: &[u8] = include_bytes!("old.image");

/// A process that was started as that image, killed and reaped when this is dropped.
struct Old(Child);

impl Old {
    /// Persistent, on a socket that it was given.
    fn start(test: &TestHome) -> (Self, Place) {
        let (program, socket) = (test.file("old"), test.file("old.sock"));
        fs::write(&program, OLD).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        let mut command = Command::new(&program);
        command.env_clear().env("LISTEN_FDS", "1").stdin(Stdio::null()).stdout(Stdio::null());
        let given = listener.as_raw_fd();
        // SAFETY: between fork and execve only system calls are made, on plain numbers.
        unsafe {
            command.pre_exec(move || {
                let result = match given {
                    3 => libc::fcntl(3, libc::F_SETFD, 0),
                    _ => libc::dup2(given, 3),
                };
                if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
            })
        };
        loop {
            match command.spawn() {
                Ok(child) => return (Self(child), Place::at(&socket)),
                // Another test's child, between fork and execve, has a copy of what it was written by.
                Err(error) if error.kind() == ErrorKind::ExecutableFileBusy => {}
                Err(error) => panic!("{error}"),
            }
        }
    }
}

impl Drop for Old {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Without a deadline: it never ends by itself.
fn blocks() -> Call {
    Call::syscall(Sysno::ppoll, [0; 6])
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.unwrap_or_else(|_| panic!("{what}: not over"))
}

async fn is_blocked(process: &Process) {
    let pid = process.pid().unwrap();
    let call = Sysno::ppoll.id() as usize;
    // Its own ppoll is another one: it has arguments.
    let waits = || {
        let syscall = std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
        blocked_in(pid) == Some(call) && syscall.split(' ').nth(1) == Some("0x0")
    };
    until_async("the call blocks", waits).await;
}

fn begun<T: std::fmt::Debug>(result: Result<T, Error>) -> bool {
    match result {
        Err(Error::TimedOut { begun, .. }) => begun,
        other => panic!("{other:?}"),
    }
}

/// Calls, interrupts and deadlines of a process that has a ring, whatever image it runs.
async fn all_works(process: &Process) {
    let pid = process.pid().unwrap();
    assert_eq!(process.getpid().await.unwrap(), pid);
    assert!(process.connection().has_ring());

    let blocked = process.connection().call("ppoll", blocks());
    let behind = process.connection().call("getpid", Call::syscall(Sysno::getpid, [0; 6]));
    let interrupter = blocked.interrupter().unwrap();
    let blocked = tokio::spawn(blocked);
    is_blocked(process).await;
    soon("an interruption", interrupter.interrupt()).await.unwrap();
    let result = soon("what was interrupted", blocked).await.unwrap();
    assert!(matches!(result, Err(Error::Call { errno: Errno::EINTR, .. })), "{result:?}");
    assert_eq!(soon("the next call", behind).await.unwrap(), pid as u64);

    for _ in 0..10 {
        let long = Duration::from_secs(60);
        let fast = process.syscall_within(long, Sysno::getpid, [0; 6]).await;
        assert_eq!(fast.unwrap(), pid as u64);
        let short = Duration::from_millis(2);
        let late = process.syscall_within(short, Sysno::ppoll, [0; 6]);
        // On a busy machine it may not have begun.
        begun(soon("a deadline", late).await);
    }
}

/// Of a call with a deadline whose turn does not come before another one is over. Says whether it was told
/// before that.
async fn a_deadline_behind_a_call_is_told_as_not_begun(process: &Process) -> bool {
    let blocked = tokio::spawn(process.connection().call("ppoll", blocks()));
    is_blocked(process).await;
    // If it were executed, the process would be gone.
    let exits = {
        let process = process.clone();
        tokio::spawn(async move {
            process
                .syscall_within(Duration::from_millis(5), Sysno::exit_group, [3, 0, 0, 0, 0, 0])
                .await
        })
    };
    let told = tokio::time::timeout(Duration::from_millis(200), async {
        while !exits.is_finished() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    let told = told.await.is_ok();
    // A signal with a handler ends the first one. (An interruption would take the place of the second
    // one's on the old image, which could begin before it has it back.)
    kill(Pid::from_raw(process.pid().unwrap()), Signal::SIGPIPE).unwrap();
    soon("what was blocked", blocked).await.unwrap().unwrap_err();
    let late = soon("the deadline", exits).await.unwrap();
    assert_eq!(late.as_ref().unwrap_err().outcome(), Some(Outcome::NotExecuted), "{late:?}");
    assert!(!begun(late));
    process.getpid().await.unwrap();
    told
}

#[tokio::test]
async fn an_image_from_before_sources_and_withdrawn_calls_serves_this_controller() {
    let test = TestHome::new();
    let (mut old, place) = Old::start(&test);
    let first = attach(place.clone()).await.unwrap();
    first.enter_ring(Polling::Adaptive).await.unwrap();
    all_works(&first).await;

    // A link that is lost, and one that is given up.
    for lost in [true, false] {
        if lost {
            cut(&first);
        } else {
            first.prepare_for_reconnect().await.unwrap();
        }
        soon("a reconnect", first.reconnect()).await.unwrap();
        first.enter_ring(Polling::Adaptive).await.unwrap();
        all_works(&first).await;
    }

    // Other controllers, one that is handed the process and one that takes it from a blocked call.
    first.prepare_for_reconnect().await.unwrap();
    let second = attach(place.clone()).await.unwrap();
    assert_eq!(second.read_image().await.unwrap(), OLD);
    second.enter_ring(Polling::Adaptive).await.unwrap();
    all_works(&second).await;
    let blocked = tokio::spawn(second.connection().call("ppoll", blocks()));
    is_blocked(&second).await;
    let third = soon("a takeover", Attach::default().take_over().to(place)).await.unwrap();
    // The takeover has interrupted it.
    let result = soon("what is taken over", blocked).await.unwrap();
    assert!(matches!(result, Err(Error::Call { errno: Errno::EINTR, .. })), "{result:?}");
    let result = second.getpid().await;
    assert!(matches!(result, Err(Error::Superseded { .. })), "{result:?}");
    third.enter_ring(Polling::Adaptive).await.unwrap();
    all_works(&third).await;
    assert!(!a_deadline_behind_a_call_is_told_as_not_begun(&third).await, "nothing is withdrawn");
    let file = third.openat(None, "/etc/passwd", OFlag::O_RDONLY, Mode::empty()).await.unwrap();

    third.upgrade().await.unwrap();
    assert_eq!(third.read_image().await.unwrap(), IMAGE);
    // The ring that it has stays as it was made.
    all_works(&third).await;
    third.prepare_for_reconnect().await.unwrap();
    soon("a reconnect", third.reconnect()).await.unwrap();
    soon("a ring with a source", third.enter_ring(Polling::Adaptive)).await.unwrap();
    all_works(&third).await;
    assert!(a_deadline_behind_a_call_is_told_as_not_begun(&third).await, "it is withdrawn");
    assert_eq!(third.read(&file, 4).await.unwrap(), b"root");
    third.exit(3).await.unwrap();
    assert_eq!(old.0.wait().unwrap().code(), Some(3));
}
