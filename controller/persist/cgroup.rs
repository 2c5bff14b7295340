//! A cgroup of a process's own, so that the clean-up of the one that it was in does not take it.
//!
//! - It is made as far up as this user may, never below the cgroup that the process was in: who
//!   kills all in a cgroup kills what is below it too.
//! - It is written down in NAME.json before it is made, so that whoever comes after a crash can
//!   remove it.
//! - It is removed by rmdir(2) alone, which the kernel refuses while a process is in it.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, open};
use nix::sys::stat::{Mode, fstatat};
use nix::sys::statfs::{CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, fstatfs};
use nix::unistd::{AccessFlags, UnlinkatFlags, faccessat, unlinkat};

use super::directory::Author;
use super::rights::as_user;
use crate::error::{Error, Result};

/// What unprivileged users can do.
const ADVICE: &str = "as root, or let a service manager make one: `systemd-run --scope farcall \
                      start …`, for a user `systemd-run --user --scope farcall start …`";

/// How often an rmdir(2) that is refused is tried again, and how long after: a process that has just
/// ended counts for a moment still.
const TRIES: usize = 50;
const PAUSE: Duration = Duration::from_millis(2);

/// A hierarchy that a process is in: a line of /proc/PID/cgroup.
#[derive(Debug, PartialEq, Eq)]
struct Membership {
    /// The controllers of a version 1 hierarchy, or `name=NAME`; empty for version 2.
    controllers: String,
    /// The process's cgroup.
    path: PathBuf,
}

impl Membership {
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.splitn(3, |byte| *byte == b':').skip(1);
        let controllers = String::from_utf8(fields.next()?.into()).ok()?;
        let path = OsString::from_vec(fields.next()?.into()).into();
        Some(Self { controllers, path })
    }

    fn is_version_2(&self) -> bool {
        self.controllers.is_empty()
    }

    /// Whether service managers know their services by it: the others have to do with resources.
    fn tells_services(&self) -> bool {
        self.is_version_2() || self.controllers.starts_with("name=")
    }

    fn is_mounted_as(&self, mount: &Mount) -> bool {
        if self.is_version_2() {
            return mount.kind == "cgroup2";
        }
        let has = |controller| mount.options.split(',').any(|option| option == controller);
        mount.kind == "cgroup" && self.controllers.split(',').all(has)
    }
}

/// A mounted file system: a line of /proc/self/mountinfo.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    /// What of the file system is mounted.
    root: PathBuf,
    point: PathBuf,
    kind: String,
    /// Those of the file system, which for a version 1 hierarchy name its controllers.
    options: String,
}

impl Mount {
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == b' ');
        let (root, point) = (path(fields.nth(3)?), path(fields.next()?));
        // Any number of optional fields, then a separator.
        fields.find(|field| *field == b"-")?;
        let kind = String::from_utf8(fields.next()?.into()).ok()?;
        let options = String::from_utf8(fields.nth(1)?.into()).ok()?;
        Some(Self { root, point, kind, options })
    }

    /// The directories from the top of what is mounted down to a cgroup, if it lies in there.
    fn way_to(&self, cgroup: &Path) -> Option<Vec<PathBuf>> {
        let below = cgroup.strip_prefix(&self.root).ok()?;
        // Outside the cgroup namespace: `..`.
        if !below.components().all(|part| matches!(part, Component::Normal(_))) {
            return None;
        }
        let mut way = vec![self.point.clone()];
        for part in below.components() {
            way.push(way[way.len() - 1].join(part));
        }
        Some(way)
    }
}

/// The lines of a file that `parse` knows.
fn lines<T>(file: &str, parse: impl Fn(&[u8]) -> Option<T>) -> Result<Vec<T>> {
    let text = fs::read(file).map_err(|error| refuse(Path::new(file), error.to_string()))?;
    Ok(text.split(|byte| *byte == b'\n').filter_map(parse).collect())
}

/// A path in mountinfo: space, tab, newline and backslash are three octal digits after a backslash.
fn path(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, after @ ..] = rest {
        let (byte, after) = match rest {
            [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..] => {
                ((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'), after)
            }
            _ => (*first, after),
        };
        bytes.push(byte);
        rest = after;
    }
    OsString::from_vec(bytes).into()
}

/// Where a process goes in one hierarchy.
#[derive(Debug)]
struct Move {
    from: PathBuf,
    to: PathBuf,
}

/// What moves a process into a cgroup of its own in every hierarchy that could be cleaned up.
///
/// That is version 2, and of version 1 those in which the process is below the top. In a hierarchy
/// that only manages resources it stays where it is if this user may not move it.
#[derive(Debug)]
pub(super) struct Plan {
    pid: i32,
    moves: Vec<Move>,
}

impl Plan {
    /// For a process, and a name that no cgroup must have there.
    pub(super) fn new(pid: i32, name: &str) -> Result<Self> {
        let memberships = lines(&format!("/proc/{pid}/cgroup"), Membership::parse)?;
        let mounts = lines("/proc/self/mountinfo", Mount::parse)?;
        Self::of(pid, name, &memberships, &mounts)
    }

    fn of(pid: i32, name: &str, memberships: &[Membership], mounts: &[Mount]) -> Result<Self> {
        let mut moves = Vec::new();
        let mut refused = None;
        for membership in memberships {
            let ways: Vec<_> = mounts
                .iter()
                .filter(|mount| membership.is_mounted_as(mount))
                .filter_map(|mount| mount.way_to(&membership.path))
                // What lies at the top of a hierarchy is no service of anybody's.
                .filter(|way| membership.is_version_2() || way.len() > 1)
                .collect();
            let mut denied = None;
            let found = ways.iter().find_map(|way| {
                let from = &way[way.len() - 1];
                // Beside it at most. The top has nothing beside it.
                way[..way.len().saturating_sub(1).max(1)].iter().find_map(
                    |parent| match may_make_in(parent) {
                        Ok(()) => Some(Move { from: from.clone(), to: parent.join(name) }),
                        Err(errno) => {
                            denied = Some((parent.clone(), errno, way.len() > 1));
                            None
                        }
                    },
                )
            });
            match (found, denied) {
                (Some(found), _) => moves.push(found),
                (None, Some((parent, errno, true))) if membership.tells_services() => {
                    return Err(denial(parent, errno));
                }
                (None, denied) => refused = refused.or(denied),
            }
        }
        if !moves.is_empty() {
            return Ok(Self { pid, moves });
        }
        Err(match refused {
            Some((parent, errno, _)) => denial(parent, errno),
            None => Error::Cgroup {
                path: PathBuf::from("/proc/self/mountinfo"),
                reason: "there is no cgroup tree that the process could move in: mount one \
                         (`mount -t cgroup2 none /sys/fs/cgroup`), or do without"
                    .into(),
            },
        })
    }

    /// The cgroups that it makes.
    pub(super) fn cgroups(&self) -> Vec<PathBuf> {
        self.moves.iter().map(|step| step.to.clone()).collect()
    }

    /// Makes them. An error leaves none behind.
    pub(super) fn make(self) -> Result<OwnCgroups> {
        let mut made = OwnCgroups { pid: self.pid, moves: Vec::new() };
        for step in self.moves {
            fs::create_dir(&step.to).map_err(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => refuse(
                    &step.to,
                    "exists already: choose another name, or rmdir it if nobody uses it",
                ),
                _ => refuse(&step.to, error.to_string()),
            })?;
            // Whatever the umask is, its owner moves the process there. If not, that says so.
            if let Ok(made) = fs::metadata(&step.to) {
                let mode = made.permissions().mode() | 0o700;
                let _ = fs::set_permissions(&step.to, fs::Permissions::from_mode(mode));
            }
            made.moves.push(step);
        }
        Ok(made)
    }
}

/// Cgroups that were made for a process. Unless it is kept there it goes back to where it was, and
/// they are removed.
#[derive(Debug)]
#[must_use = "they are removed when this is dropped"]
pub(crate) struct OwnCgroups {
    pid: i32,
    moves: Vec<Move>,
}

impl OwnCgroups {
    /// Moves the process there.
    pub(super) fn enter(&self) -> Result<()> {
        for Move { to, .. } in &self.moves {
            fill_cpuset(to)
                .and_then(|()| put(self.pid, to))
                .map_err(|error| refuse(to, format!("moving pid {} there: {error}", self.pid)))?;
        }
        Ok(())
    }

    pub(crate) fn keep(mut self) {
        self.moves.clear();
    }
}

impl Drop for OwnCgroups {
    fn drop(&mut self) {
        for step in self.moves.iter().rev() {
            // What is left stands in NAME.json: whoever uses the name next removes it.
            let _ = put(self.pid, &step.from);
            let _ = fs::remove_dir(&step.to);
        }
    }
}

/// Removes cgroups that `owner` made and nobody is in. Only cgroups are removed, whatever the paths
/// say: another user may have written them down, with whose rights it is done then.
pub(super) fn remove(cgroups: &[PathBuf], author: Author, owner: u32) -> Result<()> {
    for cgroup in cgroups {
        for again in (0..TRIES).rev() {
            let removed = match author {
                Author::Trusted => remove_one(cgroup, owner),
                // A longer one would need memory on the way to the kernel.
                Author::User(_) if cgroup.as_os_str().len() >= SHORT => Err(Errno::ENAMETOOLONG),
                // SAFETY: with a path as short as that only system calls are made.
                Author::User(uid) => unsafe { as_user(uid, None, || remove_one(cgroup, owner)) },
            };
            match removed {
                Ok(()) | Err(Errno::ENOENT | Errno::ENOTDIR) => break,
                Err(Errno::EBUSY) if again > 0 => std::thread::sleep(PAUSE),
                Err(Errno::EBUSY) => return Err(refuse(cgroup, still_in(cgroup))),
                Err(errno) => return Err(refuse(cgroup, errno.desc())),
            }
        }
    }
    Ok(())
}

/// Paths below this are handed to the kernel from the stack.
const SHORT: usize = 1000;

fn remove_one(cgroup: &Path, owner: u32) -> Result<(), Errno> {
    let (Some(parent), Some(name)) = (cgroup.parent(), cgroup.file_name()) else { return Ok(()) };
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let parent = open(parent, flags, Mode::empty())?;
    let kind = fstatfs(&parent)?.filesystem_type();
    let is_cgroup = kind == CGROUP_SUPER_MAGIC || kind == CGROUP2_SUPER_MAGIC;
    if !is_cgroup || fstatat(&parent, name, AtFlags::AT_SYMLINK_NOFOLLOW)?.st_uid != owner {
        return Ok(());
    }
    unlinkat(&parent, name, UnlinkatFlags::RemoveDir)
}

/// Why a cgroup can't be removed, and what to do.
fn still_in(cgroup: &Path) -> String {
    let processes = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let processes: Vec<&str> = processes.lines().collect();
    if processes.is_empty() {
        return "there are cgroups below it: remove those first".into();
    }
    format!("processes are in it: end them first (pid {})", processes.join(", "))
}

/// The cgroup with which a process is frozen, in whichever version: the topmost that was told to freeze.
pub(super) fn frozen(pid: i32) -> Option<PathBuf> {
    let memberships = lines(&format!("/proc/{pid}/cgroup"), Membership::parse).ok()?;
    let mounts = lines("/proc/self/mountinfo", Mount::parse).ok()?;
    let says = |directory: &Path, file, word: &str| {
        let text = fs::read_to_string(directory.join(file)).unwrap_or_default();
        text.lines().any(|line| line == word)
    };
    let freezers = memberships
        .iter()
        .filter(|one| one.is_version_2() || one.controllers.split(',').any(|c| c == "freezer"));
    freezers.into_iter().find_map(|membership| {
        let mounted = |mount: &&Mount| membership.is_mounted_as(mount);
        let way = mounts.iter().filter(mounted).find_map(|m| m.way_to(&membership.path))?;
        let own = way.last()?;
        let is_frozen = if membership.is_version_2() {
            says(own, "cgroup.events", "frozen 1")
        } else {
            says(own, "freezer.state", "FROZEN")
        };
        let told = way.iter().find(|directory| {
            says(directory, "cgroup.freeze", "1") || says(directory, "freezer.self_freezing", "1")
        });
        is_frozen.then(|| told.unwrap_or(own).clone())
    })
}

/// Whether this user may make a cgroup there, and move a process into it from below.
fn may_make_in(parent: &Path) -> Result<(), Errno> {
    let may = |path: &Path, mode| faccessat(AT_FDCWD, path, mode, AtFlags::AT_EACCESS);
    may(parent, AccessFlags::W_OK | AccessFlags::X_OK)?;
    may(&parent.join("cgroup.procs"), AccessFlags::W_OK)
}

fn denial(parent: PathBuf, errno: Errno) -> Error {
    let reason = match errno {
        Errno::EROFS => "is mounted read-only: no cgroup can be made there".into(),
        errno => format!("no cgroup may be made there ({}): {ADVICE}", errno.desc()),
    };
    Error::Cgroup { path: parent, reason }
}

fn refuse(path: &Path, reason: impl Into<String>) -> Error {
    Error::Cgroup { path: path.into(), reason: reason.into() }
}

fn put(pid: i32, cgroup: &Path) -> io::Result<()> {
    // One write: the kernel takes one pid a write.
    let mut file = File::options().write(true).open(cgroup.join("cgroup.procs"))?;
    file.write_all(pid.to_string().as_bytes())
}

/// A cpuset of version 1 is born without processors and memory, and takes no process so. In version 2
/// an empty file means what the parent has.
fn fill_cpuset(cgroup: &Path) -> io::Result<()> {
    let Some(parent) = cgroup.parent().filter(|_| !cgroup.join("cgroup.controllers").exists())
    else {
        return Ok(());
    };
    for file in ["cpuset.cpus", "cpuset.mems"].map(Path::new) {
        if cgroup.join(file).exists() {
            fs::write(cgroup.join(file), fs::read(parent.join(file))?)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(line: &str) -> Mount {
        Mount::parse(line.as_bytes()).unwrap()
    }

    fn membership(line: &str) -> Membership {
        Membership::parse(line.as_bytes()).unwrap()
    }

    #[test]
    fn a_mount_is_read_with_its_optional_fields_and_escapes() {
        let read =
            mount(r"41 31 0:38 /a /sys/fs/a\040b\134 rw shared:5 master:1 - cgroup2 none rw,x");
        let expected = Mount {
            root: "/a".into(),
            point: r"/sys/fs/a b\".into(),
            kind: "cgroup2".into(),
            options: "rw,x".into(),
        };
        assert_eq!(read, expected);
        assert_eq!(Mount::parse(b""), None);
        assert_eq!(Mount::parse(b"41 31 0:38 / /x rw"), None);
        assert_eq!(path(br"\04"), Path::new(r"\04"), "what is no escape stays");
    }

    #[test]
    fn a_cgroup_may_have_colons_in_its_path() {
        let read = membership("1:name=systemd:/a:b");
        assert_eq!(
            (read.controllers.as_str(), read.path.as_path()),
            ("name=systemd", Path::new("/a:b"))
        );
        assert_eq!(Membership::parse(b""), None);
    }

    #[test]
    fn a_hierarchy_is_known_by_all_its_controllers() {
        let two = mount("1 2 0:3 / /two rw - cgroup2 none rw");
        let cpu = mount("1 2 0:3 / /cpu rw - cgroup none rw,cpu,cpuacct");
        let named = mount("1 2 0:3 / /named rw - cgroup none rw,name=systemd");
        for (line, which) in
            [("0::/", &two), ("4:cpu,cpuacct:/", &cpu), ("1:name=systemd:/", &named)]
        {
            let membership = membership(line);
            for mount in [&two, &cpu, &named] {
                assert_eq!(membership.is_mounted_as(mount), mount == which, "{line}: {mount:?}");
            }
        }
        assert!(!membership("4:cpuset:/").is_mounted_as(&cpu));
    }

    #[test]
    fn the_way_to_a_cgroup_stays_in_what_is_mounted() {
        let all = mount("1 2 0:3 / /sys rw - cgroup2 none rw");
        let way = |paths: &[&str]| Some(paths.iter().map(PathBuf::from).collect());
        assert_eq!(all.way_to(Path::new("/")), way(&["/sys"]));
        assert_eq!(all.way_to(Path::new("/a/b")), way(&["/sys", "/sys/a", "/sys/a/b"]));
        assert_eq!(all.way_to(Path::new("/../a")), None);
        let part = mount("1 2 0:3 /a /sys rw - cgroup2 none rw");
        assert_eq!(part.way_to(Path::new("/a/b")), way(&["/sys", "/sys/b"]));
        assert_eq!(part.way_to(Path::new("/ab")), None);
    }

    #[test]
    fn without_any_tree_the_error_says_so() {
        let error = Plan::of(1, "x", &[membership("0::/")], &[]).unwrap_err().to_string();
        assert!(error.contains("there is no cgroup tree"), "{error}");
    }

    #[test]
    fn nothing_but_cgroups_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("empty");
        fs::create_dir(&path).unwrap();
        let (none, owner) = (directory.path().join("none"), nix::unistd::geteuid().as_raw());
        let paths = [path.clone(), none, "/".into(), "".into()];
        remove(&paths, Author::Trusted, owner).unwrap();
        assert!(path.exists());
    }
}
