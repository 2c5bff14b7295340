//! `farcall log`: what a persistent process has executed last.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use farcall::abi::log::{LogHead, Record};
use farcall::abi::wire::{MAX_ERRNO, Operation, Word};
use farcall::calls::{Sysno, table};
use farcall::error::errno_name;
use farcall::persist::{Flight, Home, Name, flight};
use farcall::proto::log::Log;
use nix::errno::Errno;
use serde::Serialize;

use crate::cli::reach::seconds;
use crate::command::output::{print, print_json};
use crate::command::{Done, Failure};

/// Shows what a persistent process has executed last, the latest call at the end.
///
/// The process itself remembers its last 128 calls, over all controllers: also those of one that was
/// killed in the middle. It is only asked, and whoever is attached stays so. Calls are shown as
/// strace does, with names for flags, commands and errors; what was in memory is an address. The results
/// of earlier calls are in the places of arguments that referred to them. What is in capitals are operations of the server itself.
#[derive(Args)]
pub struct LogCommand {
    /// Its name
    name: Name,
    /// Show the server's own operations too (HELLO, COPY_IN, ...); --json has them always
    #[arg(long)]
    all: bool,
    /// Show only so many calls, the latest ones
    #[arg(short = 'n', long, value_name = "COUNT")]
    lines: Option<usize>,
    /// Wait so many seconds for a process that is busy with a call
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    timeout: Duration,
    /// Print one object: name, holder {pid, since} or null, calls (how many there were), controllers
    /// (how many there were) and records, an array of {number, call, args, result, errno, controller,
    /// own}; controller counts them from 1, 0 is who came without a token, null is not known any more;
    /// own is true for calls of the connection that there is, or was last
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    name: String,
    holder: Option<Holder>,
    calls: u64,
    controllers: u64,
    records: Vec<Row>,
}

#[derive(Serialize)]
struct Holder {
    pid: Option<i32>,
    since: i64,
}

#[derive(Serialize)]
struct Row {
    number: u64,
    call: String,
    args: [u64; 6],
    result: i64,
    errno: Option<String>,
    controller: Option<u64>,
    own: bool,
}

impl LogCommand {
    pub async fn run(self) -> Done {
        let place = Home::find()?.place(&self.name);
        let told = flight(&place, self.timeout).await;
        let flight = told.map_err(|error| Failure::new(format!("{}: {error}", self.name)))?;
        let head = flight.log.head;
        if head.memory == 0 {
            return Err(Failure::new(format!(
                "{}: it keeps no log yet; from the first `farcall call` or attach on it does",
                self.name
            )));
        }
        // Calls that came before the process had memory for them left nothing.
        let there = || flight.log.calls().skip_while(|(_, record)| **record == Record::default());
        // Operations of the server are the plumbing of calls.
        let is_shown =
            |record: &Record| self.all || self.json || record.request.word & Word::OP == 0;
        let there = || there().filter(|(_, record)| is_shown(record));
        let skip = there().count().saturating_sub(self.lines.unwrap_or(usize::MAX));
        let rows: Vec<Row> =
            there().skip(skip).map(|(number, record)| row(&flight.log, number, record)).collect();
        if self.json {
            let holder = flight.holder.map(|(pid, since)| Holder { pid, since });
            let (name, LogHead { calls, controllers, .. }) = (self.name.to_string(), head);
            print_json(&Report { name, holder, calls, controllers, records: rows })?;
        } else if rows.is_empty() && self.lines != Some(0) {
            eprintln!("{}: no call is on record", self.name);
        } else {
            print(&text(&flight, &rows))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn row(log: &Log, number: u64, record: &Record) -> Row {
    let Record { request, result } = *record;
    let what = (request.word & Word::NUMBER) as u32;
    let call = if request.word & Word::OP == 0 {
        Sysno::new(what as usize)
            .map_or_else(|| format!("syscall {what}"), |number| number.name().into())
    } else {
        Operation::from_number(what)
            .map_or_else(|| format!("operation {what}"), |operation| operation.name().into())
    };
    let failed = (-MAX_ERRNO..0).contains(&result);
    // In range: it was just compared.
    let errno = failed.then(|| errno_name(Errno::from_raw(-result as i32)));
    let controller = log.controller_of(number);
    let own = number >= log.head.first;
    Row { number, call, args: request.args, result, errno, controller, own }
}

fn text(flight: &Flight, rows: &[Row]) -> String {
    let mut text = String::new();
    let mut before = rows.first();
    for row in rows {
        if before.is_some_and(|before| before.controller != row.controller) {
            text.push_str("-- another controller --\n");
        } else if before.is_some_and(|before| before.own != row.own) {
            text.push_str("-- another connection of the same controller --\n");
        }
        before = Some(row);
        let _ = writeln!(text, "{:>8}  {}", row.number, line(row));
    }
    let held = match flight.holder {
        None => "nobody is attached".to_owned(),
        Some((Some(pid), _)) => format!("pid {pid} is attached"),
        Some((None, _)) => "a controller that did not say its pid is attached".to_owned(),
    };
    let _ = writeln!(text, "{} calls so far; {held}", flight.log.head.calls);
    text
}

/// A call with its result, as strace(1) writes them.
fn line(row: &Row) -> String {
    let known = row.call.parse::<Sysno>().ok().and_then(|call| table::row(call.id() as usize));
    let call = known.map_or_else(|| plain(row), |known| known.show(&row.args));
    let value = row.result.cast_unsigned();
    let result = match (&row.errno, known) {
        (Some(errno), _) => errno.clone(),
        (None, Some(known)) => known.show_result(&row.args, value),
        (None, None) => number(value),
    };
    format!("{call} = {result}")
}

/// An operation of the server's, or a call that the table does not know.
fn plain(row: &Row) -> String {
    // Arguments that are zero at the end are mostly those that it does not have.
    let used = row.args.iter().rposition(|argument| *argument != 0).map_or(0, |last| last + 1);
    let args: Vec<String> = row.args[..used].iter().map(|value| number(*value)).collect();
    format!("{}({})", row.call, args.join(", "))
}

/// As a person reads it: small numbers and negative ints in decimal, addresses in hexadecimal.
fn number(value: u64) -> String {
    let signed = value.cast_signed();
    if (-4096..0).contains(&signed) {
        return signed.to_string();
    }
    // An int that was negative, such as AT_FDCWD.
    match i32::try_from(value.cast_signed()) {
        Ok(value) => value.to_string(),
        Err(_) => format!("{value:#x}"),
    }
}
