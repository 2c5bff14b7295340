//! Who may attach. A second uid is needed for that, and only root has one to give.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;

use nix::libc;
use nix::unistd::geteuid;

use crate::client::{Client, Ends, TOKEN, attach, hello};
use crate::server::{Persistent, check};
use crate::stream::read_up_to;

/// Connects and shakes hands as user 1000. The answer's bytes.
fn as_another_user(path: &Path) -> Vec<u8> {
    assert!(geteuid().is_root(), "this test acts as two users: run it as root");
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            // SAFETY: touches no memory. The system call, unlike libc's function of that name,
            // changes the credentials of this thread alone, and the thread ends here.
            let result = unsafe { libc::syscall(libc::SYS_setresuid, 1000, 1000, 1000) };
            assert_eq!(result, 0);
            let client = Client::connect(path);
            let sent = client.send(&hello(&TOKEN), &Ends::new().raw());
            if sent { read_up_to(&client.0, 72) } else { vec![] }
        });
        other.join().unwrap()
    })
}

#[test]
fn another_user_is_refused_even_where_the_socket_is_open_to_all() {
    let mut process = Persistent::new();
    process.open_to_all();
    let before = process.fds_when_detached();
    assert!(as_another_user(&process.path).is_empty());
    process.is_detached_again(&before, "a client of another user");
    let attached = attach(&process.path, &TOKEN);
    assert_eq!(attached.answer.generation(), 1);
    let before = process.server.fds();
    assert!(as_another_user(&process.path).is_empty());
    process.has_again(&before, "a client of another user");
    attached.stream.is_in_step();
}

/// A process in a user namespace of its own, in which its uid is 0 or none at all.
fn in_a_user_namespace(mapped: bool) -> Persistent {
    assert!(geteuid().is_root(), "this test acts as two users: run it as root");
    let process = Persistent::changed(|command| {
        // SAFETY: between fork and execve only system calls are made, on plain numbers and on
        // constants.
        unsafe {
            command.pre_exec(move || {
                check(libc::unshare(libc::CLONE_NEWUSER))?;
                check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
                if mapped {
                    let map = b"0 0 1";
                    let file = libc::open(c"/proc/self/uid_map".as_ptr(), libc::O_WRONLY);
                    check(file)?;
                    check(libc::write(file, map.as_ptr().cast(), map.len()) as i32)?;
                }
                Ok(())
            })
        };
    });
    process.open_to_all();
    process
}

#[test]
fn the_overflow_uid_is_refused_where_the_owner_has_a_uid() {
    let process = in_a_user_namespace(true);
    assert!(as_another_user(&process.path).is_empty());
    attach(&process.path, &TOKEN);
}

#[test]
fn where_nobody_has_a_uid_the_socket_file_decides() {
    let mut process = in_a_user_namespace(false);
    let before = process.fds_when_detached();
    drop(attach(&process.path, &TOKEN));
    process.is_detached_again(&before, "a connection");
    assert_eq!(as_another_user(&process.path).len(), 72);
    process.is_detached_again(&before, "a connection");
    fs::set_permissions(&process.path, std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .unwrap();
    attach(&process.path, &TOKEN);
}
