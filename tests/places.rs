//! The command line in containers: under the default seccomp profiles and capabilities of container
//! runtimes, and in a kernel of another make. They need the runtimes (Debian's packages crun, runc, runsc)
//! and root, and are run by `cargo xtask test --places`.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::libc;
use serde_json::{Value, json};

/// What a container of Docker, containerd or Podman may do by default.
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// What Docker's and containerd's default profiles refuse with EPERM without further capabilities, of calls
/// that there are on x86-64. They refuse clone3(2) with ENOSYS, and clone(2) with a new namespace.
const REFUSED_BY_DOCKER: [&str; 54] = [
    "acct",
    "add_key",
    "bpf",
    "clock_settime",
    "delete_module",
    "fanotify_init",
    "finit_module",
    "fsconfig",
    "fsmount",
    "fsopen",
    "fspick",
    "get_mempolicy",
    "init_module",
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    "ioperm",
    "iopl",
    "kcmp",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "lookup_dcookie",
    "mbind",
    "migrate_pages",
    "mount",
    "mount_setattr",
    "move_mount",
    "move_pages",
    "open_by_handle_at",
    "open_tree",
    "perf_event_open",
    "pidfd_getfd",
    "pivot_root",
    "process_madvise",
    "quotactl",
    "quotactl_fd",
    "reboot",
    "request_key",
    "set_mempolicy",
    "setdomainname",
    "sethostname",
    "setns",
    "settimeofday",
    "swapoff",
    "swapon",
    "sysfs",
    "syslog",
    "umount2",
    "unshare",
    "uselib",
    "userfaultfd",
    "ustat",
    "vhangup",
];

/// What Podman's default profile of 2022 (Debian 12) refuses with ENOSYS, of calls that programs make.
const REFUSED_BY_PODMAN: [&str; 11] = [
    "add_key",
    "bpf",
    "futex_waitv",
    "io_uring_setup",
    "kcmp",
    "open_by_handle_at",
    "process_madvise",
    "request_key",
    "sethostname",
    "userfaultfd",
    "vmsplice",
];

/// What earlier profiles of all of them refused besides.
const REFUSED_EARLIER: [&str; 3] = ["process_vm_readv", "process_vm_writev", "ptrace"];

/// All of the command line, as a user of a container would use it.
const COMMANDS: &str = r#"
set -e
f=/farcall/farcall
$f start one
$f ls | grep '^one .*detached'
test "$($f call one getuid)" = 0
$f call one openat AT_FDCWD /etc/passwd O_RDONLY
$f log one | grep 'openat(.*= '
$f upgrade one
$f names one
$f names one --unclaimed | grep passwd
$f image -o /tmp/image && test -x /tmp/image
$f stop one
$f start two && $f stop two --kill
$f demo
$f torture --kills 12 --seed 1
$f bench --only memory
test -z "$(ls -A $FARCALL_DIR)"
echo all done
"#;

/// A profile that refuses these calls.
fn profile(refused: &[&[&str]], errno: i32) -> Value {
    const NAMESPACES: i32 = libc::CLONE_NEWNS
        | libc::CLONE_NEWCGROUP
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET;
    let one_of_them = |flag: i32| {
        let args = json!([{
            "index": 0, "value": flag, "valueTwo": flag, "op": "SCMP_CMP_MASKED_EQ"
        }]);
        json!({"names": ["clone"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno, "args": args})
    };
    let mut rules = vec![
        json!({"names": refused.concat(), "action": "SCMP_ACT_ERRNO", "errnoRet": errno}),
        json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::ENOSYS}),
    ];
    rules.extend((0..31).map(|bit| 1 << bit).filter(|bit| NAMESPACES & bit != 0).map(one_of_them));
    json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": rules,
    })
}

/// A container's bundle, with this machine's programs and libraries.
struct Bundle(tempfile::TempDir);

impl Bundle {
    fn new(args: &[&str], seccomp: Option<Value>) -> Self {
        let bundle = Self(tempfile::tempdir().unwrap());
        let root = bundle.0.path().join("root");
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::write(
            root.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh
",
        )
        .unwrap();
        let farcall = Path::new(env!("CARGO_BIN_EXE_farcall")).parent().unwrap();
        let mut mounts = vec![
            json!({"destination": "/proc", "type": "proc", "source": "proc"}),
            json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs"}),
            json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}),
            json!({"destination": "/run", "type": "tmpfs", "source": "tmpfs"}),
        ];
        let mut bind = |from: &Path, to: &str| {
            let options = ["rbind", "ro"];
            mounts.push(json!({"destination": to, "source": from, "options": options}));
        };
        bind(farcall, "/farcall");
        for folder in ["/usr", "/bin", "/lib", "/lib64"].map(Path::new) {
            match fs::read_link(folder) {
                Ok(link) => symlink(link, root.join(folder.strip_prefix("/").unwrap())).unwrap(),
                Err(_) if folder.exists() => bind(folder, folder.to_str().unwrap()),
                Err(_) => {}
            }
        }
        let capabilities = json!({
            "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES,
        });
        let env = ["PATH=/usr/bin:/bin", "FARCALL_DIR=/run/farcall"];
        let namespaces = ["pid", "mount", "ipc", "uts", "network"];
        let config = json!({
            "ociVersion": "1.0.0",
            "process": {
                "terminal": false, "user": {"uid": 0, "gid": 0}, "args": args, "env": env, "cwd": "/",
                "capabilities": capabilities,
            },
            "root": {"path": root},
            "mounts": mounts,
            "linux": {
                "namespaces": namespaces.map(|kind| json!({"type": kind})),
                "seccomp": seccomp,
            },
        });
        fs::write(bundle.0.path().join("config.json"), config.to_string()).unwrap();
        bundle
    }

    fn path(&self) -> PathBuf {
        self.0.path().into()
    }

    /// Runs it to its end with that input: its output, and what else was said.
    fn run(&self, runtime: &mut Command, input: &[u8]) -> (Vec<u8>, String) {
        let name = format!("farcall-{}", self.path().file_name().unwrap().display());
        let command = runtime.args(["run", "--bundle"]).arg(self.path()).arg(&name);
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        child.stdin.take().unwrap().write_all(input).unwrap();
        let output = child.wait_with_output().unwrap();
        (output.stdout, String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// gVisor's runtime.
    fn gvisor(&self) -> Command {
        let mut runsc = Command::new("runsc");
        runsc.arg("--root").arg(self.path().join("state"));
        runsc.args(["--network=none", "--platform=ptrace", "--ignore-cgroups"]);
        runsc
    }
}

/// Runs all commands in a container with that profile.
#[track_caller]
fn commands_work(seccomp: Value) {
    let bundle = Bundle::new(&["/bin/sh", "-c", COMMANDS], Some(seccomp));
    let mut runc = Command::new("runc");
    runc.arg("--root").arg(bundle.path().join("state"));
    let (stdout, stderr) = bundle.run(&mut runc, b"");
    let stdout = String::from_utf8_lossy(&stdout);
    assert!(stdout.ends_with("all done\n"), "{stdout}{stderr}");
}

#[test]
#[ignore = "cargo xtask test --places"]
fn all_commands_work_under_the_default_profile_of_docker_and_containerd() {
    commands_work(profile(&[&REFUSED_BY_DOCKER], libc::EPERM));
}

#[test]
#[ignore = "cargo xtask test --places"]
fn all_commands_work_under_the_default_profile_of_podman() {
    commands_work(profile(&[&REFUSED_BY_PODMAN], libc::ENOSYS));
}

#[test]
#[ignore = "cargo xtask test --places"]
fn all_commands_work_where_no_process_may_be_traced() {
    commands_work(profile(&[&REFUSED_BY_DOCKER, &REFUSED_EARLIER], libc::EPERM));
}

#[test]
#[ignore = "cargo xtask test --places"]
fn the_image_serves_under_gvisor() {
    let bundle = Bundle::new(&["/image"], None);
    let image = bundle.path().join("root/image");
    fs::write(&image, farcall::image::IMAGE).unwrap();
    fs::set_permissions(image, fs::Permissions::from_mode(0o755)).unwrap();
    let request = |word: u64, args: [u64; 6]| {
        let words = [[word].as_slice(), &args].concat();
        words.into_iter().flat_map(u64::to_le_bytes).collect::<Vec<u8>>()
    };
    // Where the kernel has mapped memory is not known beforehand.
    let (at, operation) = (0x1000_0000_u64, 1 << 32);
    let protection = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED) as u64;
    let mmap = [at, 0x10000, protection, flags, u64::MAX, 0];
    let input = [
        request(libc::SYS_getpid as u64, [0; 6]),
        request(libc::SYS_mmap as u64, mmap),
        request(operation | 1, [at, 5, 0, 0, 0, 0]),
        b"hello".to_vec(),
        request(operation | 2, [at, 5, 0, 0, 0, 0]),
        request(operation | 5, [at + 8, 4, 7, 0, 0, 0]),
        request(operation | 4, [at + 8, 4, 0, 0, 0, 0]),
    ];
    let (stdout, stderr) = bundle.run(&mut bundle.gvisor(), &input.concat());
    let result = |number: u64| number.to_le_bytes().to_vec();
    let hello = [result(5), b"hello".to_vec(), result(5)].concat();
    let expected = [result(1), result(at), result(5), hello, result(0), result(7)].concat();
    assert_eq!(stdout, expected, "{stderr}");
}

#[test]
#[ignore = "cargo xtask test --places"]
fn a_controller_under_gvisor_works_or_says_what_is_missing() {
    let bundle = Bundle::new(&["/farcall/farcall", "start", "one"], None);
    let (stdout, stderr) = bundle.run(&mut bundle.gvisor(), b"");
    let works = String::from_utf8_lossy(&stdout).starts_with("one: pid ");
    let says = ["pidfd_open", "farcall needs"].iter().all(|word| stderr.contains(word));
    assert!(works || says, "{stdout:?}{stderr}");
}
