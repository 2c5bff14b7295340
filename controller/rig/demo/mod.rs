//! `farcall demo`: a process survives its controller, and the next one goes on where it stopped.

mod first;
mod second;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use clap::Args;
use farcall::persist::{Home, Incarnation, Name};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::command::output::{print, print_json, terminal_width};
use crate::command::{Done, Failure};

pub use first::FirstController;

/// Shows a process that outlives its controller, with all that it holds.
///
/// A first controller, a process of its own, starts a persistent process, sets things up in it, and
/// is killed with SIGKILL in the middle of a call. A second one attaches and finds everything as it
/// was. Each step says what was checked; a mismatch exits with 1. Nothing is left behind.
#[derive(Args)]
pub struct Demo {
    /// Print one array of {"step", "checked", "ms"} instead of text
    #[arg(long)]
    json: bool,
}

/// Sleeps, then exits with status 42: the child that a persistent process keeps.
#[derive(Args)]
pub struct DemoChild {
    milliseconds: u64,
}

impl DemoChild {
    pub fn run(self) -> ExitCode {
        thread::sleep(Duration::from_millis(self.milliseconds));
        ExitCode::from(CHILD_STATUS)
    }
}

/// With what the child exits.
const CHILD_STATUS: u8 = 42;
/// The file's two halves.
const FIRST_HALF: &[u8] = b"The first controller has read this; ";
const SECOND_HALF: &[u8] = b"the second one reads on from here.";
/// What lies in the process's memory.
const REMEMBERED: &[u8] = b"bytes that no controller holds";

/// What the first controller leaves for the second one, until there is a registry.
#[derive(Debug, Serialize, Deserialize)]
struct Handover {
    pid: i32,
    file: i32,
    listener: i32,
    port: u16,
    address: u64,
    /// In the process's own pid namespace.
    child: i32,
}

/// One step: what was done and what was checked.
#[derive(Debug, Serialize, Deserialize)]
struct Step {
    step: String,
    checked: String,
    ms: f64,
}

/// Prints steps as they happen, or collects them.
struct Report {
    json: bool,
    steps: Vec<Step>,
    since: Instant,
}

impl Report {
    /// A step is done, and took the time since the last one.
    fn done(&mut self, step: &str, checked: impl Into<String>) -> Result<(), Failure> {
        let ms = self.since.elapsed().as_secs_f64() * 1e3;
        self.add(Step { step: step.into(), checked: checked.into(), ms })
    }

    fn add(&mut self, step: Step) -> Result<(), Failure> {
        self.since = Instant::now();
        if !self.json {
            let mut text = format!("{:>8.1} ms  {:<44}  {}\n", step.ms, step.step, step.checked);
            if terminal_width().is_some_and(|width| width < text.trim_end().chars().count()) {
                text =
                    format!("{:>8.1} ms  {}\n             {}\n", step.ms, step.step, step.checked);
            }
            print(&text)?;
        }
        self.steps.push(step);
        Ok(())
    }
}

/// Nothing of the demo outlives it, whatever happens.
struct CleanUp {
    directory: PathBuf,
    home: Home,
    name: Name,
    made_home: bool,
}

impl Drop for CleanUp {
    fn drop(&mut self) {
        let place = self.home.place(&self.name);
        if let Some(state) = place.state()
            && state.process.is_alive()
        {
            let _ = kill(Pid::from_raw(state.process.pid), Signal::SIGKILL);
        }
        let _ = place.remove();
        let _ = fs::remove_dir_all(&self.directory);
        if self.made_home {
            let _ = fs::remove_dir(self.home.path());
        }
    }
}

impl Demo {
    pub async fn run(self) -> Done {
        let name: Name = format!("demo-{}", std::process::id()).parse().map_err(Failure::new)?;
        let directory = env::temp_dir().join(format!("farcall-{name}"));
        fs::create_dir(&directory).map_err(|error| Failure::temporary(&directory, &error))?;
        // Where the user has no place for sockets the demo brings its own.
        let home = Home::find().unwrap_or_else(|_| Home::at(directory.join("home")));
        let made_home = !home.path().exists();
        let clean_up = CleanUp { directory, home, name, made_home };
        let mut report = Report { json: self.json, steps: Vec::new(), since: Instant::now() };
        self.steps(&clean_up, &mut report).await?;
        let (home, name) = (clean_up.home.clone(), clean_up.name.clone());
        drop(clean_up);
        let left = home.place(&name);
        if left.socket().exists() || left.state().is_some() {
            return Err(Failure::new(format!("{} was left behind", left.socket().display())));
        }
        report.done("nothing is left behind", "no process, no socket, no file")?;
        if self.json {
            print_json(&report.steps)?;
        }
        Ok(ExitCode::SUCCESS)
    }

    async fn steps(&self, demo: &CleanUp, report: &mut Report) -> Result<(), Failure> {
        let file = demo.directory.join("file");
        fs::write(&file, [FIRST_HALF, SECOND_HALF].concat())?;
        let handover = demo.directory.join("handover");
        run_first_controller(demo, &file, &handover, report).await?;
        let handover: Handover = serde_json::from_slice(&fs::read(&handover)?)?;
        let process = Incarnation::of(handover.pid).ok_or_else(|| {
            Failure::new(format!("pid {} died with its controller", handover.pid))
        })?;
        second::inert(&demo.home.place(&demo.name), &process, report).await?;
        second::go_on(demo, &handover, &process, report).await
    }
}

/// Runs the first controller until it is in the middle of a call, and kills it there.
async fn run_first_controller(
    demo: &CleanUp,
    file: &Path,
    handover: &Path,
    report: &mut Report,
) -> Result<(), Failure> {
    use std::io::{BufRead, BufReader};
    use std::os::unix::process::ExitStatusExt;
    let mut child = Command::new(env::current_exe()?)
        .arg("demo-controller")
        .arg(demo.name.to_string())
        .env("FARCALL_DIR", demo.home.path())
        .args([file, handover])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
    for line in lines {
        let step: Step = serde_json::from_str(&line?)?;
        let last = step.step == first::LAST_STEP;
        report.add(step)?;
        if last {
            break;
        }
    }
    if let Ok(text) = fs::read(handover)
        && let Ok(handover) = serde_json::from_slice::<Handover>(&text)
    {
        let place = demo.home.place(&demo.name);
        second::until_in_call(&place, handover.pid, first::LAST_CALL).await?;
    }
    child.kill()?;
    let status = child.wait()?;
    if status.signal() != Some(Signal::SIGKILL as i32) {
        return Err(Failure::new(format!("the first controller was to be killed: {status}")));
    }
    report.done("the first controller is killed", "by SIGKILL, in the middle of that call")
}

/// Whether what was found is what was expected.
fn check<T: PartialEq + std::fmt::Debug>(
    what: &str,
    found: &T,
    expected: &T,
) -> Result<(), Failure> {
    if found == expected {
        return Ok(());
    }
    Err(Failure::new(format!("{what}: found {found:?}, expected {expected:?}")))
}
