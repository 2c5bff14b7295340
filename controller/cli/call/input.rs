//! Files that fill input buffers.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;

use farcall::Process;
use nix::libc;

use super::argument::MAX_BUFFER;
use crate::cli::progress::{PIECE, Transfer};
use crate::command::Failure;

/// A file whose content a call is to get.
pub struct Input {
    path: String,
    content: Box<dyn Read + Send>,
    size: usize,
}

impl Input {
    pub fn open(path: &str) -> Result<Self, Failure> {
        let failed = |reason: String| Failure::new(format!("{path}: {reason}"));
        if path == "-" {
            return Self::standard_input();
        }
        // A FIFO would wait for a writer.
        let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        let file = opened.map_err(|error| failed(error.to_string()))?;
        let data = file.metadata().map_err(|error| failed(error.to_string()))?;
        // The buffer is made before it is read.
        if !data.is_file() {
            return Err(failed("only a regular file has a size that is known before".into()));
        }
        let size = usize::try_from(data.len()).ok().filter(|size| *size <= MAX_BUFFER);
        let size = size.ok_or_else(|| failed("a buffer has up to 2^30 bytes".into()))?;
        Ok(Self { path: path.into(), content: Box::new(file), size })
    }

    /// Standard input from where it is on. What is no regular file is read to its end before the buffer is
    /// made.
    fn standard_input() -> Result<Self, Failure> {
        let path = "standard input".to_owned();
        let failed = |reason: String| Failure::new(format!("{path}: {reason}"));
        let duplicate = io::stdin().as_fd().try_clone_to_owned();
        let mut file = File::from(duplicate.map_err(|error| failed(error.to_string()))?);
        let data = file.metadata().map_err(|error| failed(error.to_string()))?;
        let at = file.stream_position();
        let (size, content): (u64, Box<dyn Read + Send>) = match at {
            Ok(at) if data.is_file() => (data.len().saturating_sub(at), Box::new(file)),
            _ => {
                let mut bytes = Vec::new();
                let read = file.take(MAX_BUFFER as u64 + 1).read_to_end(&mut bytes);
                read.map_err(|error| failed(error.to_string()))?;
                (bytes.len() as u64, Box::new(io::Cursor::new(bytes)))
            }
        };
        let size = usize::try_from(size).ok().filter(|size| *size <= MAX_BUFFER);
        let size = size.ok_or_else(|| failed("a buffer has up to 2^30 bytes".into()))?;
        Ok(Self { path, content, size })
    }

    pub fn size(&self) -> usize {
        self.size
    }

    /// Copies the content to `address` in the process.
    pub async fn copy(
        &mut self,
        process: &Process,
        address: u64,
        transfer: &Transfer,
    ) -> Result<(), Failure> {
        let mut at = 0;
        loop {
            let mut piece = Vec::new();
            // One byte more than there should be tells that there is more.
            let want = (self.size - at).min(PIECE) as u64;
            let last = at as u64 + want == self.size as u64;
            let read = (&mut self.content).take(want + u64::from(last)).read_to_end(&mut piece);
            let n = read.map_err(|error| self.failed(&error.to_string()))?;
            if n as u64 != want {
                let size = self.size;
                return Err(self.failed(&format!("its content is not the {size} bytes it tells")));
            }
            process.write_memory(address + at as u64, piece).await?;
            at += n;
            transfer.add(n);
            if last {
                return Ok(());
            }
        }
    }

    fn failed(&self, reason: &str) -> Failure {
        Failure::new(format!("{}: {reason}", self.path))
    }
}
