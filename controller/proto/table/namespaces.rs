//! Namespaces, and what a sandbox is made of.

use super::Shape::*;
use super::{Row, commands, layouts, names, rows};

names! {
    /// The kinds of namespaces.
    CLONE_NEW = flags {
        CLONE_NEWNS CLONE_NEWCGROUP CLONE_NEWUTS CLONE_NEWIPC CLONE_NEWUSER CLONE_NEWPID CLONE_NEWNET
        CLONE_NEWTIME = 0x80
    }
    UNSHARE = flags {
        CLONE_FS CLONE_FILES CLONE_SIGHAND CLONE_VM CLONE_THREAD CLONE_SYSVSEM CLONE_NEWNS CLONE_NEWCGROUP
        CLONE_NEWUTS CLONE_NEWIPC CLONE_NEWUSER CLONE_NEWPID CLONE_NEWNET CLONE_NEWTIME = 0x80
    }
    FILTER = flags {
        SECCOMP_FILTER_FLAG_TSYNC SECCOMP_FILTER_FLAG_LOG SECCOMP_FILTER_FLAG_SPEC_ALLOW
        SECCOMP_FILTER_FLAG_NEW_LISTENER SECCOMP_FILTER_FLAG_TSYNC_ESRCH
        SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV = 0x20
    }
    RULESET = flags { LANDLOCK_CREATE_RULESET_VERSION = 0x1 LANDLOCK_CREATE_RULESET_ERRATA = 0x2 }
    RULE = one { LANDLOCK_RULE_PATH_BENEATH = 1 LANDLOCK_RULE_NET_PORT = 2 }
    RESTRICT = flags {
        LANDLOCK_RESTRICT_SELF_LOG_SAME_EXEC_OFF = 0x1 LANDLOCK_RESTRICT_SELF_LOG_NEW_EXEC_ON = 0x2
        LANDLOCK_RESTRICT_SELF_LOG_SUBDOMAINS_OFF = 0x4
    }
    LSM_ATTR = one {
        LSM_ATTR_UNDEF = 0 LSM_ATTR_CURRENT = 100 LSM_ATTR_EXEC = 101 LSM_ATTR_FSCREATE = 102
        LSM_ATTR_KEYCREATE = 103 LSM_ATTR_PREV = 104 LSM_ATTR_SOCKCREATE = 105
    }
    LSM_FLAG = flags { LSM_FLAG_SINGLE = 0x1 }
}

commands! {
    /// The operation of seccomp(2).
    SECCOMP {
        SECCOMP_SET_MODE_STRICT;
        SECCOMP_SET_MODE_FILTER(FILTER, Struct("sock_fprog")) -> Fd;
        SECCOMP_GET_ACTION_AVAIL(Bits, Struct("uint32_t"));
        SECCOMP_GET_NOTIF_SIZES(Bits, Struct("seccomp_notif_sizes"));
    }
}

layouts! {
    /// What uname(2) tells.
    UTSNAME = utsname {
        sysname: Text, nodename: Text, release: Text, version: Text, machine: Text, domainname: Text,
    }
}

pub(super) static ROWS: &[Row] = &rows! {
    unshare(flags: UNSHARE), may_block, not_interrupted;
    setns(fd: Fd, nstype: CLONE_NEW), may_block, not_interrupted;
    chroot(path: Text), may_block;
    uname(buf => [UTSNAME; 1]);
    sethostname(name: Bytes, len: Size), may_block;
    setdomainname(name: Bytes, len: Size), may_block;
    seccomp(operation: SECCOMP, flags: Bits, args: Address) -> Long, may_block, not_interrupted;
    landlock_create_ruleset(attr: Struct("landlock_ruleset_attr"), size: Size, flags: RULESET) -> Fd, may_block;
    landlock_add_rule(ruleset_fd: Fd, rule_type: RULE, rule_attr: Struct("landlock_path_beneath_attr"),
        flags: Bits), may_block;
    landlock_restrict_self(ruleset_fd: Fd, flags: RESTRICT), may_block;
    lsm_get_self_attr(attr: LSM_ATTR, ctx: Struct("lsm_ctx"), size: Struct("__u32"), flags: LSM_FLAG) -> Size,
        may_block;
    lsm_set_self_attr(attr: LSM_ATTR, ctx: Struct("lsm_ctx"), size: Size, flags: Bits), may_block;
    lsm_list_modules(ids: Struct("__u64"), size: Struct("__u32"), flags: Bits) -> Size, may_block;
};
