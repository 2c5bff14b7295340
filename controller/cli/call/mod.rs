//! `farcall call`: one system call in a persistent process.

mod argument;
mod input;
mod interrupts;
mod made;
mod report;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use farcall::Process;
use farcall::calls::{Sysno, table};
use farcall::persist::{Home, Name};

use crate::cli::reach::{Reach, seconds};
use crate::cli::suggest::suggest;
use crate::command::output::{Stdout, warn};
use crate::command::{Done, Failure};
use argument::{Argument, arguments};
use interrupts::Interrupts;
use made::{Stopped, make};
use report::{Format, Target};

/// Makes one system call in a persistent process and prints its result.
///
/// Arguments are numbers (42, -1, 0x1f, 0o644 or 0644, 0b101), names of constants (O_RDONLY,
/// AT_FDCWD) joined by '|', strings, or buffers. A wrong one is answered with what the call takes:
///
///   "text"   a string, in double quotes of its own ('"text"' in a shell), with \n, \t, \0, \", \\
///            and \xNN; the quotes can be left out where it is not a number, and not all capitals
///   @N       the address of a buffer of N bytes, printed after the call, or put into a file
///   @@FILE   the address of a buffer with the content of a regular file of this machine; @@- with that
///            of standard input, to its end
///   @len     the length of the string or buffer that stands before it
///
/// Examples:
///
///   farcall call web getpid
///   farcall call web openat AT_FDCWD /etc/hostname 'O_RDONLY|O_CLOEXEC'
///   farcall call web read 4 @100 @len
///   farcall call --output core web pread64 4 @0x10000000 @len 0
///   farcall call web write 5 @@disk.img @len
///
/// Data go through in pieces: this command needs little memory for much data (the process needs it
/// all at once), but for what comes by a pipe. Exits with 1 if the call failed.
///
/// Ctrl-C interrupts the call, as a signal would: it returns EINTR, or how far it came. A second one
/// ends the command and leaves the process in its call.
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct CallCommand {
    #[command(flatten)]
    reach: Reach,
    /// The process
    name: Name,
    /// The call's name in its man page, or its number
    syscall: String,
    /// Up to six arguments; those left out are 0
    #[arg(allow_hyphen_values = true)]
    arguments: Vec<String>,
    /// Put what is in output buffers into a file, one behind the other, instead of printing it; with '-'
    /// standard output gets it, and nothing else, and the result goes to standard error
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Print {"call", "result", "errno", "error", "buffers"} instead of text
    #[arg(long)]
    json: bool,
}

impl CallCommand {
    pub async fn run(mut self) -> Done {
        self.take_options()?;
        let syscall = number(&self.syscall)?;
        let arguments = arguments(table::row(syscall.id() as usize), &self.arguments)?;
        let has_output = arguments.iter().any(|argument| matches!(argument, Argument::Output(_)));
        if self.output.is_some() && !has_output {
            return Err(Failure::usage("--output: the call has no output buffer (@N)"));
        }
        if self.json && self.output.as_deref() == Some(Path::new("-")) {
            return Err(Failure::usage("--json and --output -: both are standard output"));
        }
        let target = self.output.take().map(Target::open).transpose()?;
        let place = Home::find()?.place(&self.name);
        let mut interrupts = Interrupts::new()?;
        let attached = tokio::select! {
            attached = self.reach.attach(&place) => attached,
            () = interrupts.next() => return Err(Failure::new("interrupted: nothing was called")),
        };
        let process = attached.map_err(|error| self.reach.explain(&self.name, &place, error))?;
        spare_the_server(&process, syscall, &arguments)?;
        let made = match make(&process, syscall, arguments, &mut interrupts).await {
            Ok(made) => made,
            Err(Stopped::Failed(failure)) => return Err(failure),
            Err(Stopped::NotCalled) => {
                // What was mapped for it is given back.
                process.prepare_for_reconnect().await?;
                return Err(Failure::new("interrupted: nothing was called"));
            }
            Err(Stopped::Left(why)) => return Err(self.left(syscall, &why)),
        };
        drop(interrupts);
        // What is short is printed when the process is free for the next command.
        let mut stdout = Stdout::new();
        let format = if self.json { Format::Json } else { Format::Text };
        let result = made.result;
        report::print(&process, made, format, target, &mut stdout).await?;
        process.prepare_for_reconnect().await?;
        warn(&process);
        stdout.finish()?;
        Ok(if result.is_err() { ExitCode::from(1) } else { ExitCode::SUCCESS })
    }

    /// What may begin with a hyphen takes options as well: those behind the name are told apart
    /// here.
    fn take_options(&mut self) -> Result<(), Failure> {
        let mut given = std::mem::take(&mut self.arguments).into_iter();
        while let Some(text) = given.next() {
            if text == "--json" {
                self.json = true;
            } else if text == "--take-over" {
                self.reach.take_over = true;
            } else if text == "--wait" {
                self.reach.wait = true;
            } else if text == "--timeout" {
                let number =
                    given.next().ok_or_else(|| Failure::usage("--timeout needs SECONDS"))?;
                self.reach.timeout = Some(timeout(&number)?);
            } else if let Some(number) = text.strip_prefix("--timeout=") {
                self.reach.timeout = Some(timeout(number)?);
            } else if text == "--output" {
                let path = given.next().ok_or_else(|| Failure::usage("--output needs a FILE"))?;
                self.output = Some(path.into());
            } else if let Some(path) = text.strip_prefix("--output=") {
                self.output = Some(path.into());
            } else {
                self.arguments.push(text);
            }
        }
        if self.arguments.len() > 6 {
            return Err(Failure::usage("a system call has at most six arguments"));
        }
        if self.reach.take_over && self.reach.wait {
            return Err(Failure::usage("--take-over and --wait: one of the two"));
        }
        Ok(())
    }

    /// A call that goes on without this command.
    fn left(&self, call: Sysno, why: &str) -> Failure {
        let (name, call) = (&self.name, call.name());
        Failure::new(format!(
            "{name} is still in {call}: {why}\n  `farcall call --take-over {name} getpid` interrupts \
             it, and `farcall stop --kill {name}` ends the process"
        ))
    }
}

fn timeout(text: &str) -> Result<Duration, Failure> {
    seconds(text).map_err(|error| Failure::usage(format!("--timeout {text}: {error}")))
}

fn number(text: &str) -> Result<Sysno, Failure> {
    let known = if text.starts_with(|c: char| c.is_ascii_digit()) {
        let Ok(number) = text.parse::<usize>() else {
            let what = if text.bytes().all(|byte| byte.is_ascii_digit()) {
                "is too large: numbers of system calls are small"
            } else {
                "is neither the number of a system call nor the name of one"
            };
            return Err(Failure::usage(format!("{text} {what}")));
        };
        let last = Sysno::iter().map(|call| call.id() as usize).max().unwrap_or(0);
        if number > last {
            return Err(Failure::usage(format!(
                "{text} is too large: the last system call that farcall knows is {last}"
            )));
        }
        Sysno::new(number)
    } else {
        text.parse().ok()
    };
    known.ok_or_else(|| {
        let like = suggest(text, Sysno::iter().map(|call| call.name()));
        Failure::usage(format!("{text} is no system call of this architecture{like}"))
    })
}

/// Refuses what would close or replace what the server runs on.
fn spare_the_server(
    process: &Process,
    syscall: Sysno,
    arguments: &[Argument],
) -> Result<(), Failure> {
    let mut args = [0; 6];
    for (value, argument) in args.iter_mut().zip(arguments) {
        if let Argument::Number(number) = argument {
            *value = number.cast_unsigned();
        }
    }
    let taken = process.server_descriptors_taken_by(syscall, args);
    if taken.is_empty() {
        return Ok(());
    }
    let numbers: Vec<String> = taken.iter().map(ToString::to_string).collect();
    let (what, it) = if let [_] = &numbers[..] {
        ("descriptor", "is one that the server itself runs on: closing it")
    } else {
        ("descriptors", "are some that the server itself runs on: closing them")
    };
    Err(Failure::new(format!(
        "{what} {} {it} would end the connection, or make the process unreachable",
        numbers.join(", ")
    )))
}
