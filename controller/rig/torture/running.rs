//! A controller as its supervisor sees it: a process that talks, and that is killed.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::rc::Rc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::doing::doing;
use super::truth::Found;
use super::words::Word;
use crate::command::Failure;

/// So many lines of a controller are repeated where it does not do what it has to.
const LINES: usize = 4;

/// A controller.
pub struct Running {
    child: Child,
    input: ChildStdin,
    output: ChildStdout,
    heard: Vec<u8>,
    /// Another one has taken the process over, and has found this.
    pub lost_to: Option<Rc<Found>>,
    pub recovered: bool,
    pub ready: bool,
    pub begun: bool,
    /// What it has said last, a few lines.
    said: Vec<String>,
    pub over: bool,
    pub own: Option<Vec<i32>>,
    /// The signal that it died of, or 0.
    pub ended: Option<i32>,
}

impl Running {
    pub fn start(command: &mut Command) -> Result<Self, Failure> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let (Some(input), Some(output)) = (input, output) else {
            return Err(Failure::new("a child without pipes"));
        };
        fcntl(&output, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(Self {
            child,
            input,
            output,
            heard: Vec::new(),
            lost_to: None,
            recovered: false,
            ready: false,
            begun: false,
            said: Vec::new(),
            over: false,
            own: None,
            ended: None,
        })
    }

    pub fn signal(&self, signal: Signal) {
        if self.ended.is_none() {
            let _ = kill(Pid::from_raw(self.child.id() as i32), signal);
        }
    }

    /// Tells it to go on.
    pub fn go(&mut self) {
        let _ = self.input.write_all(b"\n");
    }

    /// What it has said last, and what it does now.
    pub fn described(&self) -> String {
        format!("after {:?}; {}", self.said.join(", "), doing(self.child.id() as i32))
    }

    /// Ends it, and says whether that was necessary. What it has said can still be heard.
    pub fn kill(&mut self) -> Result<bool, Failure> {
        if self.ended.is_some() {
            return Ok(false);
        }
        // A controller that has just died by itself is reaped here as well.
        self.child.kill()?;
        let status = self.child.wait()?;
        self.ended = Some(status.signal().unwrap_or(0));
        Ok(status.signal() == Some(Signal::SIGKILL as i32))
    }

    /// What it has said since it was heard last.
    pub fn hear(&mut self) -> Result<Vec<Word>, Failure> {
        if self.ended.is_none()
            && let Some(status) = self.child.try_wait()?
        {
            self.ended = Some(status.signal().unwrap_or(0));
        }
        loop {
            let mut bytes = [0; 16384];
            match self.output.read(&mut bytes) {
                Ok(0) => break,
                Ok(n) => self.heard.extend_from_slice(&bytes[..n]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
        }
        let end = self.heard.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let lines: Vec<u8> = self.heard.drain(..end).collect();
        let lines = String::from_utf8_lossy(&lines);
        self.said.extend(lines.lines().map(str::to_owned));
        self.said.drain(..self.said.len().saturating_sub(LINES));
        lines
            .lines()
            .map(|line| line.parse().map_err(|error: String| Failure::new(error)))
            .collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}
