//! A container with this machine's programs, and the runtimes that run it.

use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::profiles::CAPABILITIES;

/// Folders that programs need.
const SYSTEM: [&str; 4] = ["/usr", "/bin", "/lib", "/lib64"];

/// Who runs in the container.
#[derive(Clone, Copy, Debug)]
pub enum User {
    /// With the default capabilities.
    Root,
    /// 1000, without any.
    Ordinary,
}

impl User {
    pub fn id(self) -> u32 {
        match self {
            Self::Root => 0,
            Self::Ordinary => 1000,
        }
    }

    fn capabilities(self) -> &'static [&'static str] {
        match self {
            Self::Root => &CAPABILITIES,
            Self::Ordinary => &[],
        }
    }
}

/// What runs a container.
#[derive(Clone, Copy, Debug)]
pub enum Runtime {
    Runc,
    Crun,
    /// gVisor's.
    Runsc,
}

impl Runtime {
    /// It keeps what it has to keep in that folder.
    fn command(self, state: &Path) -> Command {
        let mut command = match self {
            Self::Runc => Command::new("runc"),
            Self::Crun => without_hybrid_cgroups("crun"),
            Self::Runsc => Command::new("runsc"),
        };
        command.arg("--root").arg(state);
        match self {
            Self::Runc => &mut command,
            Self::Crun => command.arg("--cgroup-manager=disabled"),
            Self::Runsc => {
                command.args(["--network=none", "--platform=ptrace", "--ignore-cgroups"])
            }
        };
        command
    }
}

/// A command in a mount namespace that has no cgroup v2 tree beside those of v1: crun refuses both.
pub fn without_hybrid_cgroups(program: &str) -> Command {
    const SCRIPT: &str = r#"
        if mountpoint -q /sys/fs/cgroup/unified; then umount /sys/fs/cgroup/unified; fi
        exec "$@"
    "#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", SCRIPT, "sh", program]);
    command
}

/// A container's bundle, with this machine's programs and libraries. /farcall/farcall is the command line.
pub struct Bundle(tempfile::TempDir);

impl Bundle {
    pub fn new(args: &[&str], user: User, seccomp: Option<Value>) -> Self {
        let bundle = Self(tempfile::tempdir().unwrap());
        // The container's user comes through here.
        fs::set_permissions(bundle.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let root = bundle.root();
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\n").unwrap();
        let tmpfs = |destination, mode| {
            let options = [format!("mode={mode}")];
            json!({"destination": destination, "type": "tmpfs", "source": "tmpfs", "options": options})
        };
        let mut mounts = vec![
            json!({"destination": "/proc", "type": "proc", "source": "proc"}),
            tmpfs("/dev", "755"),
            tmpfs("/tmp", "1777"),
            tmpfs("/run", "1777"),
        ];
        let mut bind = |from: &Path, to: &str| {
            let options = ["rbind", "ro"];
            mounts.push(json!({"destination": to, "source": from, "options": options}));
        };
        bind(Path::new(env!("CARGO_BIN_EXE_farcall")), "/farcall/farcall");
        for folder in SYSTEM.map(Path::new) {
            match fs::read_link(folder) {
                Ok(link) => symlink(link, root.join(folder.strip_prefix("/").unwrap())).unwrap(),
                Err(_) if folder.exists() => bind(folder, folder.to_str().unwrap()),
                Err(_) => {}
            }
        }
        let namespaces = ["pid", "mount", "ipc", "uts", "network"];
        let env = ["PATH=/usr/bin:/bin", "FARCALL_DIR=/run/farcall", "RUST_BACKTRACE=1"];
        let config = json!({
            "ociVersion": "1.0.0",
            "process": {
                "terminal": false,
                "user": {"uid": user.id(), "gid": user.id()},
                "args": args,
                "env": env,
                "cwd": "/",
                "capabilities": {
                    "bounding": CAPABILITIES,
                    "effective": user.capabilities(),
                    "permitted": user.capabilities(),
                },
            },
            "root": {"path": root},
            "mounts": mounts,
            "linux": {
                "namespaces": namespaces.map(|kind| json!({"type": kind})),
                "seccomp": seccomp,
                // As all of these runtimes' callers do by default.
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"],
            },
        });
        fs::write(bundle.path().join("config.json"), config.to_string()).unwrap();
        bundle
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn root(&self) -> PathBuf {
        self.path().join("root")
    }

    /// Runs it to its end with that input: its output, and what else was said.
    pub fn run(&self, runtime: Runtime, input: &[u8]) -> (Vec<u8>, String) {
        let name = format!("farcall-{}", self.path().file_name().unwrap().display());
        let mut command = runtime.command(&self.path().join("state"));
        command.args(["run", "--bundle"]).arg(self.path()).arg(&name);
        output(command, input)
    }
}

/// Runs a command to its end with that input: its output, and what else was said.
pub fn output(mut command: Command, input: &[u8]) -> (Vec<u8>, String) {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    // Who ends without reading says why.
    match child.stdin.take().unwrap().write_all(input) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => panic!("{command:?}: {error}"),
        _ => {}
    }
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    (output.stdout, format!("{stderr}\n{}", output.status))
}
