//! `cargo xtask kernels`: the release binary and some tests in guests, under Debian's kernels.
//!
//! Nothing of this system is touched: packages are looked up and downloaded by an apt of its own
//! (lists, cache and sources under `target/kernels`), and a guest has nothing but its initramfs.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::tools::{self, Tool};

/// Versions, each of which has a package of Debian's at the time of writing.
const SERIES: [&str; 6] = ["5.10", "6.1", "6.12", "6.16", "7.0", "7.3"];

/// The suites that have them.
const SOURCES: [&str; 5] = [
    "debian bullseye",
    "debian-security bullseye-security",
    "debian bookworm",
    "debian trixie",
    "debian trixie-backports",
];

const TOOLS: [Tool; 6] = [
    ("apt-get", "apt"),
    ("busybox", "busybox-static"),
    ("cpio", "cpio"),
    ("dpkg", "dpkg"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("strip", "binutils"),
];

/// What a guest has besides busybox: tests run these.
const PROGRAMS: [&str; 3] = ["/usr/bin/setpriv", "/usr/bin/strace", "/usr/bin/unshare"];

/// How long a guest may take: it is emulated.
const LIMIT: &str = "1800";

/// Boots guests of these series, or of all, with one and with two processors. The error says what is
/// wrong.
pub fn run(series: &[&str]) -> Result<(), String> {
    tools::provide(&TOOLS)?;
    let folder = root().join("target/kernels");
    make(&folder)?;
    let series = if series.is_empty() { &SERIES } else { series };
    let apt = Apt::new(&folder)?;
    let kernels = series.iter().map(|series| apt.kernel(series)).collect::<Result<Vec<_>, _>>()?;
    let initramfs = initramfs(&folder)?;
    let mut failed = false;
    let mut table = String::new();
    for kernel in &kernels {
        for processors in ["1", "2"] {
            let told = boot(kernel, &initramfs, processors)?;
            failed |= !told.is_good();
            table += &format!("{} × {processors}: {}\n", told.kernel, told.row());
            print!(
                "xtask: {}",
                table.lines().last().map_or(String::new(), |row| format!("{row}\n"))
            );
        }
    }
    println!("\n{table}");
    if failed { Err("not all of it passes".into()) } else { Ok(()) }
}

/// What a guest has told.
#[derive(Default)]
struct Told {
    kernel: String,
    /// Names of steps, with their exit statuses and times.
    steps: Vec<(String, String)>,
    has_ended: bool,
}

impl Told {
    fn parse(console: &str) -> Self {
        let mut told = Self::default();
        let lines = console.lines().filter_map(|line| line.trim_end().strip_prefix("@@ "));
        for line in lines {
            match (line.strip_prefix("kernel "), line.split_once(": ")) {
                (Some(kernel), _) => told.kernel = kernel.into(),
                (None, Some((name, how))) => told.steps.push((name.into(), how.into())),
                (None, None) => told.has_ended = line == "end",
            }
        }
        told
    }

    fn is_good(&self) -> bool {
        self.has_ended && self.steps.iter().all(|(_, how)| how.starts_with("0 "))
    }

    fn row(&self) -> String {
        let cells = self.steps.iter().map(|(name, how)| match how.strip_prefix("0 ") {
            Some(time) => format!("{name} ok {time}"),
            None => format!("{name} FAILED, {how}"),
        });
        let end = if self.has_ended { None } else { Some("and then NOTHING".to_owned()) };
        cells.chain(end).collect::<Vec<_>>().join(", ")
    }
}

/// Boots a guest and waits for its end. What it prints is shown if not all is well.
fn boot(kernel: &Path, initramfs: &Path, processors: &str) -> Result<Told, String> {
    let mut qemu = Command::new("timeout");
    qemu.args([
        LIMIT,
        "qemu-system-x86_64",
        "-M",
        "pc",
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        "max",
    ])
    .args(["-m", "3072", "-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"])
    .args(["-append", "console=ttyS0 quiet panic=-1", "-smp", processors])
    .arg("-kernel")
    .arg(kernel)
    .arg("-initrd")
    .arg(initramfs);
    let console = output(qemu.stderr(Stdio::inherit()))?;
    let told = Told::parse(&console);
    if !told.is_good() {
        println!("{console}");
    }
    Ok(told)
}

/// An apt that knows nothing of this system's.
struct Apt {
    folder: PathBuf,
}

impl Apt {
    fn new(folder: &Path) -> Result<Self, String> {
        let apt = Self { folder: folder.into() };
        for name in ["lists/partial", "cache/archives/partial", "packages"] {
            make(&folder.join(name))?;
        }
        let key = "/usr/share/keyrings/debian-archive-keyring.gpg";
        let sources: String = SOURCES
            .iter()
            .map(|source| format!("deb [signed-by={key}] http://deb.debian.org/{source} main\n"))
            .collect();
        write(&folder.join("sources.list"), sources.as_bytes())?;
        output(apt.command("apt-get").arg("update"))?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let at = |name: &str| self.folder.join(name).display().to_string();
        let options = [
            format!("Dir::Etc::SourceList={}", at("sources.list")),
            "Dir::Etc::SourceParts=/dev/null".into(),
            "Dir::Etc::Parts=/dev/null".into(),
            "Dir::State::status=/dev/null".into(),
            format!("Dir::State::Lists={}", at("lists")),
            format!("Dir::Cache={}", at("cache")),
            "Acquire::Languages=none".into(),
            "APT::Sandbox::User=root".into(),
        ];
        let mut command = Command::new(program);
        command.args(options.iter().flat_map(|option| ["-o", option.as_str()]));
        command.current_dir(self.folder.join("packages"));
        command
    }

    /// The newest kernel of a series.
    fn kernel(&self, series: &str) -> Result<PathBuf, String> {
        // Newer packages have it in another one than before.
        let mut newest = None;
        for prefix in ["linux-binary-", "linux-image-"] {
            let prefix = format!("{prefix}{series}.");
            let names = output(self.command("apt-cache").args(["pkgnames", &prefix]))?;
            newest = names
                .lines()
                .filter(|name| name.ends_with("-cloud-amd64") && !name.contains(".deb11."))
                .max_by_key(|name| numbers(name))
                .map(str::to_owned);
            if newest.is_some() {
                break;
            }
        }
        let package = newest.ok_or_else(|| format!("Debian has no kernel {series} any more"))?;
        let folder = self.folder.join("packages").join(&package);
        if !folder.exists() {
            println!("xtask: downloading {package}");
            output(self.command("apt-get").args(["download", &package]))?;
            let file = entries(&self.folder.join("packages"))?
                .into_iter()
                .find(|file| file.to_string_lossy().contains(&format!("{package}_")))
                .ok_or_else(|| format!("{package} was not downloaded"))?;
            output(Command::new("dpkg").arg("-x").arg(&file).arg(&folder))?;
        }
        find(&folder, "vmlinuz")?.ok_or_else(|| format!("{package} has no vmlinuz"))
    }
}

/// The numbers in a name, to be compared.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|letter: char| !letter.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
}

/// An initramfs with the release binary, the suite, and what these need.
fn initramfs(folder: &Path) -> Result<PathBuf, String> {
    let farcall = cargo(&["build", "--release", "--bin", "farcall"])?;
    drop(farcall);
    let built = cargo(&["test", "--no-run", "--test", "suite"])?;
    let suite = built
        .lines()
        .find_map(|line| line.trim().strip_prefix("Executable ")?.split(['(', ')']).nth(1))
        .ok_or("cargo does not say where the suite is")?;
    let guest = folder.join("guest");
    let _ = fs::remove_dir_all(&guest);
    let mut libraries = BTreeSet::new();
    let mut put = |from: &Path, to: &str| -> Result<(), String> {
        let to = guest.join(to.trim_start_matches('/'));
        make(to.parent().ok_or("no folder")?)?;
        fs::copy(from, &to).map_err(|error| format!("{}: {error}", from.display()))?;
        // What can't be stripped is as it is.
        let _ = Command::new("strip").arg(&to).stderr(Stdio::null()).status();
        let needed = Command::new("ldd").arg(from).output();
        let needed = needed.map(|ldd| String::from_utf8_lossy(&ldd.stdout).into_owned());
        let words = needed.iter().flat_map(|text| text.split_whitespace());
        libraries.extend(words.filter(|word| word.starts_with('/')).map(str::to_owned));
        Ok(())
    };
    put(&root().join("target/release/farcall"), "farcall")?;
    put(&root().join(suite), "suite")?;
    // Where the suite looks for the program that was built with it.
    let debug = root().join("target/debug/farcall");
    put(&debug, &debug.display().to_string())?;
    put(Path::new("/bin/busybox"), "bin/busybox")?;
    for program in PROGRAMS {
        put(Path::new(program), program)?;
    }
    for library in libraries {
        let to = guest.join(library.trim_start_matches('/'));
        make(to.parent().ok_or("no folder")?)?;
        fs::copy(&library, to).map_err(|error| format!("{library}: {error}"))?;
    }
    for name in ["dev", "etc", "mnt", "sbin"] {
        make(&guest.join(name))?;
    }
    let users = "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n";
    write(&guest.join("etc/passwd"), users.as_bytes())?;
    write(&guest.join("steps"), include_bytes!("../guest/steps"))?;
    write(&guest.join("init"), include_bytes!("../guest/init"))?;
    let all = fs::Permissions::from_mode(0o755);
    fs::set_permissions(guest.join("init"), all).map_err(|error| error.to_string())?;
    let pack = "mknod -m 600 dev/console c 5 1 && \
                find . | cpio -o -H newc --quiet | gzip -1 > ../initramfs";
    output(Command::new("sh").args(["-ec", pack]).current_dir(&guest))?;
    Ok(folder.join("initramfs"))
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask/ lies in the root")
}

/// What cargo says.
fn cargo(arguments: &[&str]) -> Result<String, String> {
    println!("xtask: cargo {}", arguments.join(" "));
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let output = cargo.args(arguments).args(["--package", "farcall"]).current_dir(root());
    let output = output.stdin(Stdio::null()).output().map_err(|error| format!("cargo: {error}"))?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(text) } else { Err(text) }
}

/// What a command prints, if it succeeds; of a guest that was given up, what it has printed until then.
fn output(command: &mut Command) -> Result<String, String> {
    let output = command.stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{command:?}: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() || command.get_program() == "timeout" {
        return Ok(text);
    }
    Err(format!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)))
}

/// The file below a folder whose name begins so.
fn find(folder: &Path, name: &str) -> Result<Option<PathBuf>, String> {
    for path in entries(folder)? {
        let begins = path.file_name().is_some_and(|own| own.to_string_lossy().starts_with(name));
        if begins && path.is_file() {
            return Ok(Some(path));
        }
        if path.is_dir() && !path.is_symlink() {
            let found = find(&path, name)?;
            if found.is_some() {
                return Ok(found);
            }
        }
    }
    Ok(None)
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let failed = |error| format!("{}: {error}", folder.display());
    let entries = fs::read_dir(folder).map_err(failed)?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

fn make(folder: &Path) -> Result<(), String> {
    fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))
}

fn write(file: &Path, bytes: &[u8]) -> Result<(), String> {
    fs::write(file, bytes).map_err(|error| format!("{}: {error}", file.display()))
}
