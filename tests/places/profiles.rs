//! The default seccomp profiles of container runtimes, as rules of an OCI configuration.
//!
//! Those of Docker (moby's profiles) and containerd let the same through with the default capabilities, as
//! of 2026; they are compiled into these programs, so their rules stand here in a form of their own: all
//! calls of x86-64 but those that they refuse. Podman's comes as a file, and is taken from there.

use std::fs;

use farcall::calls::Sysno;
use nix::libc;
use serde_json::{Value, json};

/// What a container may do by default under Docker, containerd and Debian's Podman.
pub const CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// What takes a capability under Docker that is not among the default ones.
const PRIVILEGED: [(&str, &str); 11] = [
    ("CAP_BPF or CAP_SYS_ADMIN", "bpf"),
    ("CAP_DAC_READ_SEARCH", "open_by_handle_at"),
    ("CAP_PERFMON or CAP_SYS_ADMIN", "perf_event_open"),
    (
        "CAP_SYS_ADMIN",
        "fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount mount_setattr move_mount \
         open_tree quotactl quotactl_fd setdomainname sethostname setns umount2 unshare",
    ),
    ("CAP_SYS_BOOT", "reboot"),
    ("CAP_SYS_MODULE", "delete_module finit_module init_module"),
    ("CAP_SYS_NICE", "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"),
    ("CAP_SYS_PACCT", "acct"),
    ("CAP_SYS_PTRACE", "kcmp pidfd_getfd process_madvise"),
    ("CAP_SYS_RAWIO and others", "ioperm iopl syslog vhangup"),
    ("CAP_SYS_TIME", "clock_settime settimeofday"),
];

/// What no capability opens under Docker.
const NEVER: &str = "_sysctl add_key afs_syscall create_module file_getattr file_setattr \
    get_kernel_syms getpmsg io_uring_enter io_uring_register io_uring_setup kexec_file_load kexec_load \
    keyctl lsm_get_self_attr lsm_list_modules lsm_set_self_attr migrate_pages move_pages nfsservctl \
    open_tree_attr pivot_root putpmsg query_module request_key security swapoff swapon sysfs tuxcall \
    uprobe uselib userfaultfd ustat vserver";

/// What depends on arguments under Docker, and has rules of its own.
const JUDGED: &str = "clone clone3 personality socket";

/// What Docker refuses before Linux 4.8, and other profiles of that time everywhere.
pub const OF_OTHER_PROCESSES: &str = "process_vm_readv process_vm_writev ptrace";

/// The profile of Docker and containerd, which refuses `besides` as well.
pub fn docker(besides: &str) -> Value {
    let refused: Vec<&str> = PRIVILEGED
        .iter()
        .map(|(_, names)| *names)
        .chain([NEVER, JUDGED, besides])
        .flat_map(str::split_whitespace)
        .collect();
    for name in &refused {
        assert!(name.parse::<Sysno>().is_ok(), "there is no call {name}");
    }
    let allowed: Vec<&str> =
        Sysno::iter().map(|call| call.name()).filter(|name| !refused.contains(name)).collect();
    let mut rules = vec![
        json!({"names": allowed, "action": "SCMP_ACT_ALLOW"}),
        json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::ENOSYS}),
    ];
    let mut allow_if = |name: &str, operator: &str, value: u64, other: u64| {
        let arguments = json!([{"index": 0, "op": operator, "value": value, "valueTwo": other}]);
        rules.push(json!({"names": [name], "action": "SCMP_ACT_ALLOW", "args": arguments}));
    };
    // Without new namespaces.
    let namespaces = libc::CLONE_NEWNS
        | libc::CLONE_NEWCGROUP
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET;
    allow_if("clone", "SCMP_CMP_MASKED_EQ", namespaces as u64, 0);
    // All families but AF_ALG and AF_VSOCK.
    allow_if("socket", "SCMP_CMP_LT", libc::AF_ALG as u64, 0);
    allow_if("socket", "SCMP_CMP_EQ", libc::AF_ALG as u64 + 1, 0);
    allow_if("socket", "SCMP_CMP_GT", libc::AF_VSOCK as u64, 0);
    // Linux and Linux 32, with UNAME26, and asking.
    for personality in [0, 0x8, 0x20000, 0x20008, 0xffff_ffff] {
        allow_if("personality", "SCMP_CMP_EQ", personality, 0);
    }
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": libc::EPERM,
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": rules,
    })
}

/// Podman's profile, as the package brings it that Podman depends on.
pub fn podman() -> Value {
    let file = "/usr/share/containers/seccomp.json";
    let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{file}: {error}"));
    let mut profile: Value = serde_json::from_str(&text).unwrap();
    let names_ours = |filter: &Value, key: &str, ours: &[&str]| {
        let words = filter[key].as_array().filter(|words| !words.is_empty())?;
        Some(words.iter().any(|word| ours.contains(&word.as_str().unwrap())))
    };
    let applies = |rule: &Value| {
        [("caps", CAPABILITIES.as_slice()), ("arches", &["amd64"])].into_iter().all(
            |(key, ours)| {
                names_ours(&rule["includes"], key, ours) != Some(false)
                    && names_ours(&rule["excludes"], key, ours) != Some(true)
            },
        )
    };
    let mut rules = profile["syscalls"].take();
    let rules = rules.as_array_mut().unwrap();
    rules.retain(applies);
    for rule in rules.iter_mut().map(|rule| rule.as_object_mut().unwrap()) {
        rule.retain(|key, _| ["names", "action", "args", "errnoRet"].contains(&key.as_str()));
    }
    json!({
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile["defaultErrnoRet"],
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": rules,
    })
}
