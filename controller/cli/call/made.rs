//! Makes the call, with its strings and buffers in memory that is mapped for it.

use farcall::sys::Sysno;
use farcall::{Error, Mapping, Process};
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags};

use super::argument::Argument;
use crate::Failure;
use crate::progress::Transfer;

/// Buffers begin at multiples of it.
const ALIGN: usize = 64;

/// The calls whose result is how many bytes of their buffer they have filled.
const COUNTED: [Sysno; 13] = [
    Sysno::read,
    Sysno::pread64,
    Sysno::recvfrom,
    Sysno::readlink,
    Sysno::readlinkat,
    Sysno::getcwd,
    Sysno::getdents64,
    Sysno::getrandom,
    Sysno::getxattr,
    Sysno::listxattr,
    Sysno::fgetxattr,
    Sysno::flistxattr,
    Sysno::syslog,
];

/// A call that has been made.
pub struct Made {
    pub call: Sysno,
    pub result: Result<u64, Errno>,
    pub buffers: Vec<Filled>,
    /// Where the buffers are: it is unmapped with this.
    _memory: Option<Mapping>,
}

/// What a call has left in an output buffer.
pub struct Filled {
    /// Counted from 1.
    pub argument: usize,
    pub address: u64,
    pub size: usize,
}

pub async fn make(
    process: &Process,
    call: Sysno,
    arguments: Vec<Argument>,
) -> Result<Made, Failure> {
    let total: usize = arguments.iter().map(|a| a.size().next_multiple_of(ALIGN)).sum();
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let memory = match total {
        0 => None,
        total => Some(process.mmap(total, protection, MapFlags::MAP_PRIVATE, None).await?),
    };
    let files = arguments.iter().map(|argument| match argument {
        Argument::Input(input) => input.size(),
        _ => 0,
    });
    let transfer = Transfer::new("sent", files.sum())?;
    let mut next = memory.as_ref().map_or(0, Mapping::address);
    let mut buffers = Vec::new();
    let mut args = [0; 6];
    for (index, (slot, argument)) in args.iter_mut().zip(arguments).enumerate() {
        *slot = next;
        next += argument.size().next_multiple_of(ALIGN) as u64;
        match argument {
            Argument::Number(number) => *slot = number.cast_unsigned(),
            Argument::Text(bytes) => process.write_memory(*slot, bytes).await?,
            Argument::Input(mut input) => input.copy(process, *slot, &transfer).await?,
            Argument::Output(size) => {
                buffers.push(Filled { argument: index + 1, address: *slot, size });
            }
        }
    }
    drop(transfer);
    let result = match process.syscall(call, args).await {
        Ok(value) => Ok(value),
        Err(Error::Call { errno, .. }) => Err(errno),
        Err(Error::Lost(_)) => {
            let name = call.name();
            return Err(Failure::new(format!(
                "{name} did not return: the process ended, or its connection did"
            )));
        }
        Err(error) => return Err(error.into()),
    };
    if let (true, Ok(count)) = (COUNTED.contains(&call), result) {
        for buffer in &mut buffers {
            buffer.size = buffer.size.min(count as usize);
        }
    }
    Ok(Made { call, result, buffers, _memory: memory })
}
