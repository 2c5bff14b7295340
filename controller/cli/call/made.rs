//! Makes the call, with its strings and buffers in memory that is mapped for it.

use farcall::calls::{Sysno, table};
use farcall::link::Polling;
use farcall::proto::Call;
use farcall::{Error, Mapping, Process};
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags};

use super::argument::Argument;
use super::interrupts::Interrupts;
use crate::cli::progress::Transfer;
use crate::command::Failure;

/// Buffers begin at multiples of it.
const ALIGN: usize = 64;

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

/// Why there is no result.
pub enum Stopped {
    Failed(Failure),
    /// Ctrl-C came before the call.
    NotCalled,
    /// The process goes on in the call without this command.
    Left(String),
}

impl<E: Into<Failure>> From<E> for Stopped {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

pub async fn make(
    process: &Process,
    call: Sysno,
    arguments: Vec<Argument>,
    interrupts: &mut Interrupts,
) -> Result<Made, Stopped> {
    let prepared = tokio::select! {
        prepared = prepare(process, arguments) => prepared?,
        () = interrupts.next() => return Err(Stopped::NotCalled),
    };
    let Prepared { args, mut buffers, memory } = prepared;
    let result = match execute(process, call, args, interrupts).await? {
        Ok(value) => Ok(value),
        Err(Error::Call { errno, .. }) => Err(errno),
        Err(Error::Lost(_)) => {
            let name = call.name();
            return Err(Stopped::Failed(Failure::new(format!(
                "{name} did not return: the process ended, or its connection did"
            ))));
        }
        Err(error) => return Err(error.into()),
    };
    if let (true, Ok(count)) =
        (table::row(call.id() as usize).is_some_and(|row| row.counted), result)
    {
        for buffer in &mut buffers {
            buffer.size = buffer.size.min(count as usize);
        }
    }
    Ok(Made { call, result, buffers, _memory: memory })
}

/// Arguments as the call gets them, and where its buffers are.
struct Prepared {
    args: [u64; 6],
    buffers: Vec<Filled>,
    memory: Option<Mapping>,
}

async fn prepare(process: &Process, arguments: Vec<Argument>) -> Result<Prepared, Failure> {
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
    Ok(Prepared { args, buffers, memory })
}

/// Makes the call so that it can be interrupted, where it may take long.
async fn execute(
    process: &Process,
    number: Sysno,
    args: [u64; 6],
    interrupts: &mut Interrupts,
) -> Result<farcall::Result<u64>, Stopped> {
    let call = Call::syscall(number, args);
    let connection = process.connection();
    let mut why = "it can't be interrupted".to_owned();
    let mut in_ring = None;
    if call.may_block() && table::row(number.id() as usize).is_some_and(|row| row.interruptible) {
        // Only in memory in common it is known what the process is executing.
        let handed_over = async {
            process.enter_ring(Polling::Never).await?;
            connection.call_in_ring(number.name(), call.clone()).await
        };
        let handed_over = tokio::select! {
            handed_over = handed_over => handed_over,
            () = interrupts.next() => return Err(Stopped::NotCalled),
        };
        match handed_over {
            Ok(receipt) => in_ring = Some(receipt),
            // Nothing was executed: without it the call can be made all the same.
            Err(error) => why = format!("it can't be interrupted: {error}"),
        }
    }
    let receipt = in_ring.unwrap_or_else(|| connection.call(number.name(), call));
    let interrupter = receipt.interrupter();
    tokio::pin!(receipt);
    tokio::select! {
        result = &mut receipt => return Ok(result),
        () = interrupts.next() => {}
    }
    let Some(interrupter) = interrupter else {
        eprintln!("farcall: {why}; Ctrl-C again leaves the process in {}", number.name());
        tokio::select! {
            result = &mut receipt => return Ok(result),
            () = interrupts.next() => return Err(Stopped::Left(why)),
        }
    };
    let interrupted = async {
        match interrupter.interrupt().await {
            // Its result is here, or about to be.
            Ok(()) => std::future::pending().await,
            Err(error) => error,
        }
    };
    tokio::select! {
        result = &mut receipt => Ok(result),
        error = interrupted => Err(Stopped::Left(error.to_string())),
        () = interrupts.next() => Err(Stopped::Left("it does not return".into())),
    }
}
