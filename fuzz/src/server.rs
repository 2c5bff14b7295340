//! A persistent process for one input, and its clients.

use std::io::{ErrorKind, IoSlice, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::{fs, io::Write, thread};

use farcall::image::IMAGE;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use tempfile::TempDir;

/// A process that runs the image, detached; killed when this is dropped.
pub struct Server {
    process: Child,
    home: TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Server {
    pub fn start() -> Self {
        let home = tempfile::Builder::new().prefix("farcall-fuzz-").tempdir().unwrap();
        let image = home.path().join("image");
        let mut options = fs::OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(0o755).open(&image).unwrap();
        file.write_all(IMAGE).unwrap();
        drop(file);
        let mut command = Command::new(&image);
        let process = command.arg(home.path().join("socket")).spawn().unwrap();
        Self { process, home }
    }

    /// A client of its listening socket. The process may still be making it, but not be gone.
    pub fn connect(&mut self) -> UnixStream {
        loop {
            if let Ok(client) = UnixStream::connect(self.home.path().join("socket")) {
                return client;
            }
            assert_eq!(self.process.try_wait().unwrap(), None, "the process has ended");
            thread::yield_now();
        }
    }

    /// What it answers to `hello`, up to the end.
    pub fn answer(&mut self, hello: &[u8]) -> Vec<u8> {
        let mut client = self.connect();
        client.write_all(hello).unwrap();
        let mut answer = Vec::new();
        match client.read_to_end(&mut answer) {
            // What is refused is closed with bytes that were not received.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            read => drop(read.unwrap()),
        }
        answer
    }
}

/// Sends bytes with descriptors. False: the server has hung up.
pub fn send(client: &UnixStream, bytes: &[u8], fds: &[RawFd]) -> bool {
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    let iov = [IoSlice::new(bytes)];
    sendmsg::<()>(client.as_raw_fd(), &iov, control, MsgFlags::MSG_NOSIGNAL, None).is_ok()
}
