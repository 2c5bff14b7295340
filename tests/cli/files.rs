//! Where commands write to and read from: files, devices, standard input and output, and terminals.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::process::{Command, Stdio};

use farcall::image::IMAGE;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::pty::{Winsize, openpty};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::command::{Running, fail, farcall, json, run, start, succeed};
use crate::common::{TestHome, until};

fn mode(path: &std::path::Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn the_image_replaces_a_file_that_may_be_running() {
    let test = TestHome::new();
    fs::create_dir(test.path()).unwrap();
    fs::set_permissions(test.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let (file, socket) = (test.file("server"), test.path().join("one.sock"));
    let path = file.to_str().unwrap();
    succeed(&test, &["image", "-o", path]);
    // Killed if this fails.
    let server = Running::start(Command::new(&file).arg(&socket));
    let place = farcall::persist::Place::at(&socket);
    until("it listens", || place.is_listening());
    succeed(&test, &["image", "-o", path]);
    assert_eq!((fs::read(&file).unwrap(), mode(&file)), (IMAGE.to_vec(), 0o755));
    succeed(&test, &["call", "one", "getpid"]);
    succeed(&test, &["stop", "one"]);
    assert!(server.finish().status.success());

    // A link stays, and what it leads to is replaced.
    let (link, behind) = (test.file("link"), test.file("behind"));
    fs::write(&behind, "old").unwrap();
    symlink(&behind, &link).unwrap();
    succeed(&test, &["image", "-o", link.to_str().unwrap()]);
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(fs::read(&behind).unwrap(), IMAGE);
    let message = fail(&test, 1, &["image", "-o", test.path().to_str().unwrap()]);
    assert!(message.contains("directory"), "{message}");
}

#[test]
fn a_device_or_a_pipe_gets_the_image_and_stays_what_it_is() {
    let test = TestHome::new();
    let null = test.file("null");
    mknod(&null, SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(1, 3)).unwrap();
    fs::set_permissions(&null, fs::Permissions::from_mode(0o666)).unwrap();
    succeed(&test, &["image", "-o", null.to_str().unwrap()]);
    assert!(fs::metadata(&null).unwrap().file_type().is_char_device());
    assert_eq!(mode(&null), 0o666);

    let fifo = test.file("fifo");
    nix::unistd::mkfifo(&fifo, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    let command = Running::start(&mut farcall(&test, &["image", "-o", fifo.to_str().unwrap()]));
    let mut bytes = Vec::new();
    File::open(&fifo).unwrap().read_to_end(&mut bytes).unwrap();
    assert_eq!((bytes, mode(&fifo)), (IMAGE.to_vec(), 0o600));
    assert_eq!(command.finish().status.code(), Some(0));
}

#[test]
fn where_there_is_no_room_the_old_file_stays() {
    /// Unmounted when the test is over.
    struct Mounted(std::path::PathBuf);
    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = umount2(&self.0, MntFlags::MNT_DETACH);
        }
    }
    let test = TestHome::new();
    let small = test.file("small");
    fs::create_dir(&small).unwrap();
    mount(Some("none"), &small, Some("tmpfs"), MsFlags::empty(), Some("size=12k")).unwrap();
    let _mounted = Mounted(small.clone());
    let file = small.join("image");
    fs::write(&file, "old").unwrap();
    fs::write(small.join("full"), [0; 4096]).unwrap();
    let message = fail(&test, 1, &["image", "-o", file.to_str().unwrap()]);
    assert!(message.contains("No space left"), "{message}");
    assert_eq!(fs::read(&file).unwrap(), b"old");
    assert_eq!(fs::read_dir(&small).unwrap().count(), 2, "nothing else is left");
}

#[test]
fn a_hyphen_is_standard_input_or_output() {
    let test = TestHome::new();
    start(&test, "one");
    let output = farcall(&test, &["image", "-o", "-"]).output().unwrap();
    assert!(output.status.success() && output.stdout == IMAGE && output.stderr.is_empty());

    let file = test.file("file");
    let open =
        ["call", "one", "openat", "AT_FDCWD", file.to_str().unwrap(), "O_RDWR|O_CREAT", "0600"];
    let fd = succeed(&test, &open);
    let fd = fd.trim();
    // From a pipe, and from a file that is partly read.
    let write = ["call", "one", "write", fd, "@@-", "@len"];
    let mut command = farcall(&test, &write);
    let mut running = Running::start(command.stdin(Stdio::piped()));
    running.stdin().write_all(b"by a pipe, ").unwrap();
    assert_eq!(running.finish().stdout, "11\n");
    fs::write(test.file("input"), "not this: by a file").unwrap();
    let mut input = File::open(test.file("input")).unwrap();
    input.read_exact(&mut [0; 10]).unwrap();
    let ran = Running::start(farcall(&test, &write).stdin(input)).finish();
    assert_eq!(ran.stdout, "9\n", "{ran:?}");
    assert_eq!(fs::read(&file).unwrap(), b"by a pipe, by a file");

    let ran = run(&test, &["call", "--output", "-", "one", "pread64", fd, "@64", "@len", "3"]);
    assert_eq!(ran.stdout, "a pipe, by a file");
    assert_eq!(ran.stderr, "17\nargument 2: 17 bytes in standard output\n");

    let mut image = farcall(&test, &["upgrade", "one", "--image", "-", "--json"]);
    let mut running = Running::start(image.stdin(Stdio::piped()));
    running.stdin().write_all(IMAGE).unwrap();
    assert_eq!(json(&running.finish().stdout)["upgraded"], false);

    for arguments in [
        &["image", "-o", "-", "--json"][..],
        &["call", "--output", "-", "--json", "one", "read", "0", "@1", "1"],
        &["bench", "--svg", "-", "--json"],
    ] {
        fail(&test, 2, arguments);
    }
}

/// What a command prints on a terminal of so many columns.
fn on_a_terminal(test: &TestHome, columns: u16, arguments: &[&str]) -> String {
    let size = Winsize { ws_row: 24, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(&size, None).unwrap();
    let (mut master, slave): (File, OwnedFd) = (pty.master.into(), pty.slave);
    let ran = Running::start_into(slave.into(), &mut farcall(test, arguments)).finish();
    assert_eq!(ran.status.code(), Some(0), "{ran:?}");
    // It is all there: the terminal keeps what was written.
    let mut text = vec![0; 64 * 1024];
    let flags = nix::fcntl::OFlag::O_NONBLOCK;
    nix::fcntl::fcntl(&master, nix::fcntl::FcntlArg::F_SETFL(flags)).unwrap();
    let mut len = 0;
    while let Ok(n @ 1..) = master.read(&mut text[len..]) {
        len += n;
    }
    assert!(master.as_raw_fd() >= 0);
    String::from_utf8(text[..len].to_vec()).unwrap().replace("\r\n", "\n")
}

#[test]
fn on_a_narrow_terminal_tables_are_lists() {
    let test = TestHome::new();
    let (one, two) = (start(&test, "one"), start(&test, "two"));
    let wide = on_a_terminal(&test, 200, &["ls"]);
    assert_eq!(wide.lines().count(), 3, "{wide}");
    let narrow = on_a_terminal(&test, 40, &["ls"]);
    assert!(narrow.lines().all(|line| line.chars().count() <= 40), "{narrow}");
    let value = |of: &str, word: &str| {
        let list = narrow.split("\n\n").find(|list| list.contains(of)).unwrap();
        let line = list.lines().find(|line| line.split_whitespace().next() == Some(word));
        line.unwrap().split_whitespace().nth(1).unwrap().to_owned()
    };
    assert_eq!(value("one", "PID"), one.to_string(), "{narrow}");
    assert_eq!(value("two", "PID"), two.to_string(), "{narrow}");
    assert_eq!(value("two", "STATE"), "detached", "{narrow}");
    let long = test.file("a file with a long name");
    fs::write(&long, "").unwrap();
    let open = ["call", "one", "openat", "AT_FDCWD", long.to_str().unwrap(), "O_RDONLY"];
    succeed(&test, &open);
    let narrow = on_a_terminal(&test, 40, &["names", "one", "--unclaimed"]);
    assert!(narrow.contains("STATE  unclaimed"), "{narrow}");
    // In a pipe a table is a table.
    assert_eq!(succeed(&test, &["ls"]).lines().count(), 3);
}
