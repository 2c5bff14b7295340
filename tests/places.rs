//! The command line in containers: under the default seccomp profiles and capabilities of container
//! runtimes, and in a kernel of another make. They need the runtimes (Debian's packages crun, podman, runc
//! and runsc) and root, and are run by `cargo xtask test --places`.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use nix::libc;
use serde_json::Value;

mod bundle;
mod profiles;

use bundle::{Bundle, Runtime, User, output, without_hybrid_cgroups};

/// All of the command line.
const COMMANDS: &str = include_str!("places/commands.sh");

/// Calls that Docker's profile refuses, among them those with rules of their own.
const BY_DOCKER: [&str; 7] = [
    "clone,CLONE_NEWNET=EPERM",
    "clone3=ENOSYS",
    "io_uring_setup=EPERM",
    "personality,1=EPERM",
    "socket,AF_VSOCK,SOCK_STREAM=EPERM",
    "unshare,CLONE_FILES=EPERM",
    "userfaultfd=EPERM",
];

/// Calls that Podman's profile refuses.
const BY_PODMAN: [&str; 4] = [
    "futex_waitv=ENOSYS",
    "perf_event_open=EPERM",
    "personality,1=ENOSYS",
    "vmsplice,0,0,0,0=EPERM",
];

/// Runs all commands in containers of both runtimes and kinds of users.
#[track_caller]
fn commands_work(seccomp: Value, refused: &[&str]) {
    for runtime in [Runtime::Runc, Runtime::Crun] {
        for user in [User::Root, User::Ordinary] {
            let id = user.id().to_string();
            let arguments = [&["/bin/sh", "-c", COMMANDS, "commands", &id], refused].concat();
            let bundle = Bundle::new(&arguments, user, Some(seccomp.clone()));
            let (stdout, stderr) = bundle.run(runtime, b"");
            let stdout = String::from_utf8_lossy(&stdout);
            assert!(stdout.ends_with("all done\n"), "{runtime:?}, {user:?}:\n{stdout}\n{stderr}");
        }
    }
}

#[test]
#[ignore = "cargo xtask test --places"]
fn all_commands_work_under_the_default_profile_of_docker_and_containerd() {
    commands_work(profiles::docker(""), &BY_DOCKER);
}

#[test]
#[ignore = "cargo xtask test --places"]
fn all_commands_work_under_the_default_profile_of_podman() {
    commands_work(profiles::podman(), &BY_PODMAN);
}

#[test]
#[ignore = "cargo xtask test --places"]
fn all_commands_work_where_no_process_may_be_traced() {
    let refused = [BY_DOCKER.as_slice(), &["process_vm_writev=EPERM", "ptrace=EPERM"]].concat();
    commands_work(profiles::docker(profiles::OF_OTHER_PROCESSES), &refused);
}

/// Podman chooses the profile, the capabilities, the mounts and the limits by itself here; also with what
/// is advised to harden a container. Nothing of it is kept outside of the test's folder.
#[test]
#[ignore = "cargo xtask test --places"]
fn all_commands_work_in_a_container_that_podman_makes() {
    const ENGINE: &str = r#"
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
netns = "none"
cgroups = "disabled"
log_driver = "none"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
lock_type = "file"
runtime = "crun"
"#;
    const HARDENED: &[&str] =
        &["--read-only", "--cap-drop=all", "--security-opt=no-new-privileges"];
    for (user, options) in [(User::Root, &[][..]), (User::Ordinary, &[]), (User::Root, HARDENED)] {
        let bundle = Bundle::new(&[], user, None);
        let folder = bundle.root().with_file_name("podman");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("containers.conf"), ENGINE).unwrap();
        let mut podman = without_hybrid_cgroups("podman");
        podman.env("CONTAINERS_CONF", folder.join("containers.conf"));
        for (option, name) in [("--root", "root"), ("--runroot", "run"), ("--tmpdir", "tmp")] {
            podman.arg(option).arg(folder.join(name));
        }
        podman.args([
            "--storage-driver",
            "vfs",
            "run",
            "--rm",
            "--env",
            "FARCALL_DIR=/run/farcall",
        ]);
        podman.args(["--tmpfs=/tmp:mode=1777", "--tmpfs=/run:mode=1777", "--volume=/usr:/usr:ro"]);
        podman.args(options);
        podman.arg(format!("--volume={}:/farcall/farcall:ro", env!("CARGO_BIN_EXE_farcall")));
        podman.arg(format!("--user={0}:{0}", user.id())).arg("--rootfs").arg(bundle.root());
        podman.args(["/bin/sh", "-c", COMMANDS, "commands", &user.id().to_string()]);
        podman.args(BY_PODMAN);
        let (stdout, stderr) = output(podman, b"");
        let stdout = String::from_utf8_lossy(&stdout);
        assert!(stdout.ends_with("all done\n"), "{user:?}, {options:?}:\n{stdout}\n{stderr}");
    }
}

#[test]
#[ignore = "cargo xtask test --places"]
fn the_image_serves_under_gvisor() {
    let bundle = Bundle::new(&["/image"], User::Root, None);
    let image = bundle.root().join("image");
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
    let (stdout, stderr) = bundle.run(Runtime::Runsc, &input.concat());
    let result = |number: u64| number.to_le_bytes().to_vec();
    let hello = [result(5), b"hello".to_vec(), result(5)].concat();
    let expected = [result(1), result(at), result(5), hello, result(0), result(7)].concat();
    assert_eq!(stdout, expected, "{stderr}");
}

#[test]
#[ignore = "cargo xtask test --places"]
fn a_controller_under_gvisor_works_or_says_what_is_missing() {
    let bundle = Bundle::new(&["/farcall/farcall", "start", "one"], User::Root, None);
    let (stdout, stderr) = bundle.run(Runtime::Runsc, b"");
    let works = String::from_utf8_lossy(&stdout).starts_with("one: pid ");
    let says = ["pidfd_open", "farcall needs"].iter().all(|word| stderr.contains(word));
    assert!(works || says, "{stdout:?}{stderr}");
}
