//! The second controller: finds everything as it was.

use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, TcpStream};
use std::time::{Duration, Instant};

use farcall::abi::wire::Word;
use farcall::calls::{Sysno, WaitStatus};
use farcall::persist::{Condition, Incarnation, Place, attach, flight};
use nix::sys::socket::SockFlag;

use super::first::LAST_CALL;
use super::{CHILD_STATUS, CleanUp, Handover, REMEMBERED, Report, SECOND_HALF, check};
use crate::command::Failure;
use crate::command::process::until_gone;

/// How long anything is waited for.
const LIMIT: Duration = Duration::from_secs(8);
/// How long an answer is waited for of a process that may be blocked.
const PATIENCE: Duration = Duration::from_millis(300);
/// How long the detached process is watched.
const WATCH: Duration = Duration::from_millis(300);

/// Waits until the process is blocked in that call of its controller's.
pub async fn until_in_call(place: &Place, pid: i32, call: Sysno) -> Result<(), Failure> {
    let end = Instant::now() + LIMIT;
    loop {
        match Condition::of(pid) {
            Some(Condition::InCall { call: blocks, .. }) if blocks.contains(call.name()) => break,
            // A tracer's right is needed to see that. But who is blocked does not answer.
            Some(Condition::Unknown) if flight(place, PATIENCE).await.is_err() => break,
            _ if Instant::now() > end => {
                return Err(Failure::new(format!("pid {pid} does not come to {}", call.name())));
            }
            _ => tokio::time::sleep(Duration::from_millis(2)).await,
        }
    }
    Ok(())
}

/// The process answers, and the last call in its log, if it has one, is that one, which has succeeded.
async fn has_finished(place: &Place, call: Sysno) -> Result<&'static str, Failure> {
    let log = flight(place, LIMIT).await?.log;
    if log.head.memory == 0 {
        return Ok("it answers");
    }
    let last = log.calls().last().map(|(_, last)| (last.request.word & Word::NUMBER, last.result));
    check("the last call", &last, &Some((call as u64, 0)))?;
    Ok("its log has the result")
}

/// How often a process has been scheduled, and how much processor time it has used, in ticks.
fn activity(pid: i32) -> Option<(u64, u64)> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let switches = status
        .lines()
        .filter(|line| line.contains("ctxt_switches"))
        .filter_map(|line| line.split_whitespace().last()?.parse::<u64>().ok())
        .sum();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    Some((switches, ticks))
}

/// The process lives, has finished its last call, and does nothing.
pub async fn inert(
    place: &Place,
    process: &Incarnation,
    report: &mut Report,
) -> Result<(), Failure> {
    let shown = has_finished(place, LAST_CALL).await?;
    report.done("the process lives, and has finished its call", shown)?;
    // It has answered, and goes back to wait.
    let end = Instant::now() + LIMIT;
    let mut before = activity(process.pid);
    loop {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let now = activity(process.pid);
        if std::mem::replace(&mut before, now) == now || Instant::now() > end {
            break;
        }
    }
    tokio::time::sleep(WATCH).await;
    check("what a detached process does", &activity(process.pid), &before)?;
    if before.is_none() || !process.is_alive() {
        return Err(Failure::new("the process ended while nobody was attached"));
    }
    report.done("it is inert", format!("watched for {} ms: never scheduled", WATCH.as_millis()))
}

/// Attaches and checks all that the first controller had set up.
pub async fn go_on(
    demo: &CleanUp,
    handover: &Handover,
    incarnation: &Incarnation,
    report: &mut Report,
) -> Result<(), Failure> {
    let process = attach(demo.home.place(&demo.name)).await?;
    check("its pid", &process.pid(), &Some(handover.pid))?;
    report.done("a second controller attaches", format!("still pid {}", handover.pid))?;

    let file = process.adopt_fd(handover.file)?;
    let rest = process.read(&file, 4096).await?;
    check("the rest of the file", &rest, &SECOND_HALF.to_vec())?;
    report.done("it reads the rest of the file", format!("{} bytes", rest.len()))?;

    let listener = process.adopt_fd(handover.listener)?;
    let greeting = b"hello from outside";
    let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, handover.port))?;
    client.write_all(greeting)?;
    let connection = process.accept4(&listener, SockFlag::empty()).await?;
    let heard = process.read(&connection, greeting.len()).await?;
    check("what came over the connection", &heard, &greeting.to_vec())?;
    report.done(
        "it accepts a connection on the same listener",
        format!("{} bytes on 127.0.0.1:{}", heard.len(), handover.port),
    )?;

    let remembered = process.read_memory(handover.address, REMEMBERED.len()).await?;
    check("the bytes in memory", &remembered, &REMEMBERED.to_vec())?;
    report.done("it reads the bytes in memory", format!("{} bytes", remembered.len()))?;

    let status = process.wait_for_child(handover.child).await?;
    check("the child's status", &status, &WaitStatus::Exited(i32::from(CHILD_STATUS)))?;
    report.done("it reaps the child", status.to_string())?;

    process.exit(0).await?;
    until_gone(incarnation, LIMIT).await?;
    report.done("it stops the process", format!("pid {} is gone", handover.pid))
}
