//! `cargo xtask kernels`, with a QEMU that only prints what a guest would.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(20);

/// A folder that is all of PATH, and a target directory.
struct Programs(TempDir);

impl Programs {
    /// With this in place of QEMU.
    fn new(qemu: &str) -> Self {
        let programs = Self(tempfile::tempdir().unwrap());
        for name in ["bash", "busybox", "cpio", "find", "gzip", "mknod", "strace", "unshare"] {
            programs.put(name, "");
        }
        for name in ["apt-get", "ldd", "strip"] {
            programs.put(name, "");
        }
        programs.put(
            "cargo",
            "for test in suite wire footprint survival; do
            echo \"  Executable tests/$test.rs ($HERE/busybox)\" >&2
        done",
        );
        programs.put("apt-cache", "for last; do :; done; echo \"${last}9-cloud-amd64\"");
        programs.put("dpkg", "/bin/mkdir -p \"$3\" && : >\"$3/vmlinuz-of-it\"");
        programs.put("mv", "exec /bin/mv \"$@\"");
        programs.put("qemu-system-x86_64", qemu);
        // It sees to it that QEMU ends with its parent: that is the real one.
        let setpriv =
            ["/usr/bin/setpriv", "/bin/setpriv"].into_iter().find(|f| Path::new(f).exists());
        symlink(setpriv.expect("util-linux is installed"), programs.path("setpriv")).unwrap();
        for file in ["target/release/farcall", "target/debug/farcall"] {
            fs::create_dir_all(programs.path(file).parent().unwrap()).unwrap();
            fs::write(programs.path(file), "").unwrap();
        }
        // What apt-get would have downloaded.
        let packages = programs.path("target/kernels/packages");
        fs::create_dir_all(&packages).unwrap();
        for series in ["6.1", "7.3"] {
            fs::write(
                packages.join(format!("linux-binary-{series}.9-cloud-amd64_1_amd64.deb")),
                "",
            )
            .unwrap();
        }
        programs
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn put(&self, name: &str, script: &str) {
        let file = self.path(name);
        fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(file, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn command(&self) -> Command {
        self.started_by(Command::new(env!("CARGO_BIN_EXE_xtask")))
    }

    fn started_by(&self, mut command: Command) -> Command {
        command
            .arg("kernels")
            .current_dir(self.0.path())
            .env("PATH", self.0.path())
            .env("HERE", self.0.path())
            .env("CARGO", self.path("cargo"))
            .env("CARGO_TARGET_DIR", self.path("target"));
        command
    }

    fn kernels(&self, arguments: &[&str]) -> Output {
        self.command().args(arguments).output().unwrap()
    }

    /// The process that plays QEMU, when it has said who it is.
    fn qemu(&self) -> Pid {
        let end = Instant::now() + LIMIT;
        loop {
            let text = fs::read_to_string(self.path("pid")).unwrap_or_default();
            if let Some(pid) = text.strip_suffix('\n') {
                return Pid::from_raw(pid.parse().unwrap());
            }
            assert!(Instant::now() < end, "QEMU was not started");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A guest in which all steps succeed.
const GOOD: &str = "echo \"$@\" >>$HERE/boots
echo booting; echo '@@ kernel 1.2.3'
for word in $*; do case $word in STEPS=*) steps=${word#STEPS=};; esac; done
IFS=,; for step in $steps; do printf '\\n@@ begin %s\\nsome output\\n@@ end %s 0\\n' $step $step; done
echo '@@ off'";

/// One that hangs in its second step.
const HANGING: &str = "echo $$ >$HERE/pid
echo '@@ kernel 1.2.3'; echo '@@ begin demo'; echo '@@ end demo 0'; echo '@@ begin torture'
echo 'the last words'
exec /bin/sleep 1000";

#[test]
fn each_kernel_is_booted_with_one_and_two_processors_and_a_table_tells_how_it_went() {
    let programs = Programs::new(GOOD);
    let output = programs.kernels(&["6.1", "7.3", "--steps", "demo,torture"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let table = text(&output.stdout);
    let rows: Vec<Vec<&str>> =
        table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["kernel", "processors", "demo", "torture"]);
    let rest: Vec<String> = rows[1..].iter().map(|row| row[..3].join(" ")).collect();
    assert_eq!(rest, ["1.2.3 1 ok", "1.2.3 2 ok", "1.2.3 1 ok", "1.2.3 2 ok"], "{table}");
    let boots = fs::read_to_string(programs.path("boots")).unwrap();
    let has = |line: &str, words: &str| line.contains(words);
    let booted: Vec<bool> = boots
        .lines()
        .zip(["6.1", "6.1", "7.3", "7.3"].into_iter().zip(["-smp 1", "-smp 2", "-smp 1", "-smp 2"]))
        .map(|(line, (series, processors))| {
            has(line, &format!("linux-binary-{series}.9-cloud-amd64/vmlinuz"))
                && has(line, processors)
        })
        .collect();
    assert_eq!(booted, [true; 4], "{boots}");
    assert!(text(&output.stderr).contains("1.2.3, 2 processors: torture: ok"), "{output:?}");
    // What is kept: what was downloaded and is unpacked, what was built, and the consoles.
    let mut kept: Vec<String> = fs::read_dir(programs.path("target/kernels"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.starts_with("console-"))
        .collect();
    kept.sort();
    assert_eq!(kept, ["cache", "initramfs", "lists", "lock", "packages", "sources.list"]);
}

#[test]
fn programs_read_the_table_as_json() {
    let programs = Programs::new(GOOD);
    let output = programs.kernels(&["6.1", "--steps", "demo", "--processors", "2", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let json = text(&output.stdout);
    let expected = r#"[{"kernel":"1.2.3","processors":2,"steps":[{"name":"demo","status":0,"seconds":0.0}],"failure":null}]"#;
    let digits = |text: &str| text.replace(|letter: char| letter.is_ascii_digit(), "0");
    assert_eq!(digits(json.trim_end()), digits(expected));
}

#[test]
fn a_guest_that_hangs_is_ended_and_its_last_words_are_told() {
    let programs = Programs::new(HANGING);
    let output =
        programs.kernels(&["6.1", "--steps", "demo,torture", "--processors", "1", "--limit", "1"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(kill(programs.qemu(), None).is_err(), "QEMU has ended");
    let error = text(&output.stderr);
    assert!(error.contains("torture did not end within 1 s"), "{error}");
    assert!(error.ends_with("| the last words\n"), "{error}");
    let row = text(&output.stdout);
    assert!(row.contains("ok 0 s") && row.contains("no end"), "{row}");
}

#[test]
fn a_step_that_fails_and_a_guest_that_dies_are_failures() {
    for (guest, words) in [
        ("echo '@@ begin demo'; echo why; echo '@@ end demo 7'; echo '@@ off'", "demo failed (7)"),
        ("echo '@@ begin demo'; echo why", "QEMU ended during demo"),
    ] {
        let programs = Programs::new(guest);
        let output = programs.kernels(&["6.1", "--steps", "demo", "--processors", "1"]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let error = text(&output.stderr);
        assert!(error.contains(words) && error.contains("| why\n"), "{error}");
    }
}

#[test]
fn no_guest_outlives_the_command() {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
        let programs = Programs::new(HANGING);
        // A shell's background job ignores SIGINT.
        let mut env = Command::new("/usr/bin/env");
        env.args(["--default-signal=INT,TERM", env!("CARGO_BIN_EXE_xtask")]);
        let mut command = programs.started_by(env);
        let mut xtask =
            command.arg("6.1").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let qemu = programs.qemu();
        end(&mut xtask, signal);
        let limit = Instant::now() + LIMIT;
        while is_running(qemu) {
            assert!(Instant::now() < limit, "QEMU runs after {signal}");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Ends it by a signal, which it must have at its default to be ended by it.
fn end(xtask: &mut Child, signal: Signal) {
    kill(Pid::from_raw(xtask.id().cast_signed()), signal).unwrap();
    assert!(!xtask.wait().unwrap().success());
}

/// Whether a process is there and is no zombie.
fn is_running(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

#[test]
fn options_without_sense_end_with_2() {
    for words in [&["--limit"][..], &["--limit", "long"], &["--processors", "0"], &["--frobnicate"]]
    {
        let output = Programs::new("").kernels(words);
        assert_eq!(output.status.code(), Some(2), "{words:?}");
    }
}
