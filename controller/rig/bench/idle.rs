//! A controller and a server that have nothing to do, as a process of its own: whoever measures is not
//! one of the two.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::thread;
use std::time::Duration;

use clap::Args;
use farcall::link::Polling;

use super::{number, root};
use crate::command::{Done, Failure};

/// A controller that makes a server, calls it, and is idle then until the end of its input.
#[derive(Args)]
pub struct BenchIdle {}

impl BenchIdle {
    pub async fn run(self) -> Done {
        let process = root(Some(Polling::default())).await?;
        process.enter_ring(Polling::default()).await?;
        for _ in 0..1000 {
            process.getppid().await?;
        }
        let pid = process.pid().ok_or_else(|| Failure::new("the process has no pid"))?;
        let mut stdout = std::io::stdout();
        writeln!(stdout, "{pid}")?;
        stdout.flush()?;
        let (over, end) = oneshot::async_channel();
        thread::spawn(move || {
            let _ = std::io::stdin().read(&mut [0]);
            let _ = over.send(());
        });
        let _ = end.await;
        Ok(ExitCode::SUCCESS)
    }
}

/// The pair, from outside.
pub struct Pair {
    controller: Child,
    server: i32,
    _input: ChildStdin,
}

impl Pair {
    pub fn start() -> Result<Self, Failure> {
        let mut controller = Command::new(std::env::current_exe()?)
            .arg("bench-idle")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let none = || Failure::new("the idle pair did not start");
        let input = controller.stdin.take().ok_or_else(none)?;
        let mut line = String::new();
        BufReader::new(controller.stdout.take().ok_or_else(none)?).read_line(&mut line)?;
        let server = line.trim().parse().map_err(|_| none())?;
        Ok(Self { controller, server, _input: input })
    }

    /// Context switches a second of both, once they have settled.
    pub fn switches(&self) -> Result<f64, Failure> {
        const SETTLED: Duration = Duration::from_millis(200);
        const IDLE: Duration = Duration::from_secs(2);
        let count = || {
            // Pids are below 2^22.
            let both = [self.controller.id() as i32, self.server].map(switches);
            let [controller, server] = both;
            let both = controller.zip(server).map(|(controller, server)| controller + server);
            both.ok_or_else(|| Failure::new("/proc tells no context switches"))
        };
        thread::sleep(SETTLED);
        let before = count()?;
        thread::sleep(IDLE);
        Ok((count()? - before) as f64 / IDLE.as_secs_f64())
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // The server dies with it.
        let _ = self.controller.kill();
        let _ = self.controller.wait();
    }
}

/// How often all threads of a process have been switched away from, by their own doing or not.
fn switches(pid: i32) -> Option<u64> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let statuses =
        tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("status")).ok());
    let count = |status: String| {
        let voluntary = number(&status, "voluntary_ctxt_switches:")?;
        Some(voluntary + number(&status, "nonvoluntary_ctxt_switches:")?)
    };
    statuses.map(count).sum()
}
