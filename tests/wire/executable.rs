//! The image as an executable: what it is given decides what it serves, and its exit code says why
//! it doesn't.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::fcntl::OFlag;
use nix::libc;
use nix::unistd::pipe2;

use crate::client::{TOKEN, attach};
use crate::server::{Home, Persistent, Server, isolate};
use crate::stream::{read_up_to, until};

/// Starts a server that listens at `path`.
fn at(home: Home, path: &Path, change: impl FnOnce(&mut Command)) -> Persistent {
    let mut command = home.command(None);
    command.arg(path);
    change(&mut command);
    let server = Server::start(home, &mut command);
    until("the socket is there", || UnixStream::connect(path).ok());
    Persistent { server, path: path.into() }
}

#[test]
fn the_socket_of_a_path_argument_is_its_owners_alone() {
    let home = Home::new();
    let path = home.path("socket");
    let process = at(home, &path, |command| {
        // SAFETY: between fork and execve, umask is a system call without memory.
        unsafe {
            command.pre_exec(|| {
                libc::umask(0o017);
                Ok(())
            })
        };
    });
    let file = fs::metadata(&path).unwrap();
    assert!(file.file_type().is_socket());
    assert_eq!(file.permissions().mode() & 0o7777, 0o600);
    let attached = attach(&path, &TOKEN);
    assert_eq!(attached.answer.pid(), process.server.pid());
    // The process has its own umask again.
    assert_eq!(attached.stream.call(libc::SYS_umask, &[0o022]), 0o017);
}

#[test]
fn it_keeps_a_descriptor_of_its_sockets_file_and_says_which() {
    let home = Home::new();
    let path = home.path("socket");
    let process = at(home, &path, |_| {});
    let attached = attach(&path, &TOKEN);
    let number = i32::from_le_bytes(*attached.answer.0[60..].first_chunk().unwrap()) - 1;
    assert_eq!(process.server.fds().get(&number), Some(&path));
    fs::remove_file(&path).unwrap();
    let here = format!("/proc/{}/fd/{number}", process.server.pid());
    drop(attached);
    let attached = attach(Path::new(&here), &TOKEN);
    // Another image knows it too.
    attached.stream.speaks_version_1();
    crate::upgrade::upgrade(&attached.stream);
    drop(attached);
    let answer = attach(Path::new(&here), &TOKEN).answer;
    assert_eq!(answer.0[60..64], (number + 1).to_le_bytes());
}

#[test]
fn a_path_may_be_107_bytes_long() {
    let home = Home::new();
    let len = 107 - home.path("").as_os_str().len();
    let path = home.path(&"x".repeat(len));
    let _process = at(home, &path, |_| {});
    attach(&path, &TOKEN);
}

#[test]
fn a_path_goes_before_listen_fds() {
    let home = Home::new();
    let path = home.path("socket");
    let _process = at(home, &path, |command| {
        command.env("LISTEN_FDS", "1");
    });
    attach(&path, &TOKEN);
}

#[test]
fn listen_fds_without_a_pid_is_for_whoever_is_executed() {
    let process = Persistent::new();
    attach(&process.path, &TOKEN);
}

#[test]
fn listen_fds_for_another_pid_is_ignored() {
    for (name, value) in [("LISTEN_PID", "1"), ("LISTEN_FDS", "0")] {
        let home = Home::new();
        let listener = UnixListener::bind(home.path("socket")).unwrap();
        let mut command = home.command(Some(listener.as_fd()));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.env("LISTEN_FDS", "1").env(name, value);
        let (mut server, stream) = Server::with_its_pipes(home, &mut command);
        stream.is_in_step();
        drop(stream);
        server.exits_with(0);
    }
}

#[test]
fn listen_fds_for_the_right_pid_is_taken() {
    let home = Home::new();
    let path = home.path("socket");
    let listener = UnixListener::bind(&path).unwrap();
    // Only a process that is there already knows its pid: the shell becomes the image.
    let mut command = Command::new("/bin/sh");
    isolate(&mut command, Some(listener.as_fd()));
    command.args(["-c", "LISTEN_FDS=1 LISTEN_PID=$$ exec \"$0\""]).arg(home.path("image"));
    let server = Server::start(home, &mut command);
    let attached = attach(&path, &TOKEN);
    assert_eq!(attached.answer.pid(), server.pid());
}

/// The exit code of an image that can't listen, with /dev/null as its descriptor 3. It says why.
fn fails(change: impl FnOnce(&Home, &mut Command)) -> i32 {
    let home = Home::new();
    let null = fs::File::open("/dev/null").unwrap();
    let mut command = home.command(Some(null.as_fd()));
    change(&home, &mut command);
    let (text, their_text) = pipe2(OFlag::O_CLOEXEC).unwrap();
    command.stderr(their_text);
    let mut server = Server::start(home, &mut command);
    drop(command);
    let text = String::from_utf8(read_up_to(text, 1000)).unwrap();
    assert!(text.starts_with("farcall: cannot listen: ") && text.ends_with('\n'), "{text}");
    server.status().code().unwrap()
}

#[test]
fn a_path_that_is_too_long_is_exit_2() {
    for len in [108, 109, 500] {
        let code = fails(|_, command| {
            command.arg("x".repeat(len));
        });
        assert_eq!(code, 2);
    }
}

#[test]
fn a_descriptor_3_that_is_no_listener_is_exit_2() {
    let code = fails(|_, command| {
        command.env("LISTEN_FDS", "1");
    });
    assert_eq!(code, 2);
}

#[test]
fn a_path_in_use_is_exit_1() {
    let code = fails(|home, command| {
        fs::write(home.path("socket"), "a file").unwrap();
        command.arg(home.path("socket"));
    });
    assert_eq!(code, 1);
}

#[test]
fn a_path_in_no_directory_is_exit_1() {
    let code = fails(|home, command| {
        command.arg(home.path("none/socket"));
    });
    assert_eq!(code, 1);
}
