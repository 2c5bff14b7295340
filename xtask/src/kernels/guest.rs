//! A guest under QEMU, and what it tells on its console.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use super::Options;
use super::debian::Kernel;

/// How many of the last lines of a console an error repeats.
const LAST: usize = 40;

/// A step that has ended.
pub struct Step {
    pub name: String,
    pub status: u8,
    pub time: Duration,
}

/// What a guest has told.
pub struct Told {
    pub kernel: String,
    pub processors: u32,
    pub steps: Vec<Step>,
    /// Why the guest did not come to its end.
    pub failure: Option<String>,
    console: Vec<String>,
}

impl Told {
    pub fn is_good(&self) -> bool {
        self.failure.is_none() && self.steps.iter().all(|step| step.status == 0)
    }

    /// What is wrong, with the last lines of the console.
    pub fn problem(&self) -> String {
        let mut problem = format!("{}, {}:", self.kernel, processors(self.processors));
        for step in self.steps.iter().filter(|step| step.status != 0) {
            let _ = write!(problem, " {} failed ({});", step.name, step.status);
        }
        if let Some(failure) = &self.failure {
            let _ = write!(problem, " {failure};");
        }
        let skipped = self.console.len().saturating_sub(LAST);
        let _ = write!(problem, " the last lines of its console:");
        for line in &self.console[skipped..] {
            let _ = write!(problem, "\n  | {line}");
        }
        problem
    }
}

pub fn processors(number: u32) -> String {
    if number == 1 { "1 processor".into() } else { format!("{number} processors") }
}

/// QEMU. It is killed when this is dropped, and when this process ends in whatever way.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Qemu {
    fn start(
        kernel: &Path,
        initramfs: &Path,
        append: &str,
        processors: u32,
    ) -> Result<Self, String> {
        let mut qemu = Command::new("setpriv");
        qemu.args(["--pdeathsig", "KILL", "qemu-system-x86_64", "-M", "pc"])
            .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-m", "3072"])
            .args(["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"])
            .args(["-append", append, "-smp", &processors.to_string()])
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(initramfs)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        qemu.spawn().map(Self).map_err(|error| format!("setpriv: {error}"))
    }

    /// The lines of its console, as they come.
    fn console(&mut self) -> Receiver<String> {
        let (sender, lines) = mpsc::channel();
        let mut console = BufReader::new(self.0.stdout.take().expect("it is a pipe"));
        thread::spawn(move || {
            let mut line = Vec::new();
            while console.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send(text).is_err() {
                    break;
                }
                line.clear();
            }
        });
        lines
    }
}

/// Boots a guest, shows how far it is, and waits for its end. One that is quiet about its steps for
/// longer than the limit is ended.
pub fn boot(
    kernel: &Kernel,
    initramfs: &Path,
    processors: u32,
    options: &Options,
    folder: &Path,
) -> Result<Told, String> {
    let steps = options.steps.join(",");
    let append = format!("console=ttyS0 quiet panic=-1 STEPS={steps} TESTS=\"{}\"", options.tests);
    // All that it prints, for a reader.
    let log = folder.join(format!("console-{}-{processors}.log", kernel.name));
    let log = File::create(&log).map_err(|error| format!("{}: {error}", log.display()))?;
    eprint!("xtask: {}, {}: boot: ", kernel.name, self::processors(processors));
    let mut qemu = Qemu::start(&kernel.image, initramfs, &append, processors)?;
    let lines = qemu.console();
    let mut told = Told {
        kernel: kernel.name.clone(),
        processors,
        steps: Vec::new(),
        failure: None,
        console: Vec::new(),
    };
    told.failure = follow(&mut told, &lines, options.limit, log).err();
    if let Some(failure) = &told.failure {
        eprintln!("{failure}");
    }
    drop(qemu);
    Ok(told)
}

/// Follows a guest to its end. The error says why that does not come.
fn follow(
    told: &mut Told,
    lines: &Receiver<String>,
    limit: Duration,
    mut log: File,
) -> Result<(), String> {
    let mut doing = "boot".to_owned();
    let mut begin = Instant::now();
    loop {
        let line =
            match lines.recv_timeout((begin + limit).saturating_duration_since(Instant::now())) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => {
                    return Err(format!("{doing} did not end within {} s", limit.as_secs()));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(format!("QEMU ended during {doing}"));
                }
            };
        writeln!(log, "{line}").map_err(|error| format!("the log of its console: {error}"))?;
        let words: Vec<&str> = match line.strip_prefix("@@ ") {
            Some(words) => words.split(' ').collect(),
            None => Vec::new(),
        };
        let time = begin.elapsed();
        match words[..] {
            ["kernel", kernel] => {
                told.kernel = kernel.into();
                eprintln!("{} s", time.as_secs());
            }
            ["begin", name] => {
                eprint!("xtask: {}, {}: {name}: ", told.kernel, processors(told.processors));
                doing = name.into();
                begin = Instant::now();
            }
            ["end", name, status] => {
                let status = status.parse().unwrap_or(u8::MAX);
                let how = if status == 0 { "ok".into() } else { format!("FAILED ({status})") };
                eprintln!("{how}, {} s", time.as_secs());
                told.steps.push(Step { name: name.into(), status, time });
            }
            ["off"] => return Ok(()),
            _ => {}
        }
        told.console.push(line);
    }
}
