//! Debian's kernels, by an apt that knows nothing of this system's.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::files::{entries, find, make, output, write};

/// The suites that have kernels.
const SOURCES: [&str; 5] = [
    "debian bullseye",
    "debian-security bullseye-security",
    "debian bookworm",
    "debian trixie",
    "debian trixie-backports",
];

/// A kernel that can be booted.
pub struct Kernel {
    pub name: String,
    pub image: PathBuf,
}

/// Lists, cache, sources and unpacked packages, all in one folder.
pub struct Apt {
    folder: PathBuf,
}

impl Apt {
    pub fn new(folder: &Path) -> Result<Self, String> {
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
    pub fn kernel(&self, series: &str) -> Result<Kernel, String> {
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
        let package = newest.ok_or_else(|| format!("Debian has no kernel {series}"))?;
        let folder = self.folder.join("packages").join(&package);
        if !folder.exists() {
            self.unpack(&package, &folder)?;
        }
        let image = find(&folder, "vmlinuz")?;
        let name = package.splitn(3, '-').last().unwrap_or_default().to_owned();
        Ok(Kernel { name, image: image.ok_or_else(|| format!("{package} has no vmlinuz"))? })
    }

    /// Downloads a package. The folder exists only when all of it is there.
    fn unpack(&self, package: &str, folder: &Path) -> Result<(), String> {
        eprintln!("xtask: downloading {package}");
        output(self.command("apt-get").args(["download", package]))?;
        let begin = format!("{package}_");
        let is_it = |file: &PathBuf| {
            file.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&begin))
        };
        let file = entries(&self.folder.join("packages"))?
            .into_iter()
            .find(is_it)
            .ok_or_else(|| format!("{package} was not downloaded"))?;
        let part = self.folder.join("part");
        let _ = fs::remove_dir_all(&part);
        output(Command::new("dpkg").arg("-x").arg(&file).arg(&part))?;
        let _ = fs::remove_file(file);
        fs::rename(part, folder).map_err(|error| format!("{}: {error}", folder.display()))
    }
}

/// The numbers in a name, to be compared.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|letter: char| !letter.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
}
