//! The machine as a whole, keys, modules, tracing; and calls that Linux no longer has.

use super::Shape::*;
use super::{Row, commands, layouts, names, rows};

names! {
    MAGIC = one { LINUX_REBOOT_MAGIC1 = 0xfee1dead }
    MAGIC2 = one {
        LINUX_REBOOT_MAGIC2 = 672274793 LINUX_REBOOT_MAGIC2A = 85072278 LINUX_REBOOT_MAGIC2B = 369367448
        LINUX_REBOOT_MAGIC2C = 537993216
    }
    REBOOT = one {
        LINUX_REBOOT_CMD_RESTART = 0x01234567 LINUX_REBOOT_CMD_HALT = 0xcdef0123
        LINUX_REBOOT_CMD_CAD_ON = 0x89abcdef LINUX_REBOOT_CMD_CAD_OFF = 0x0
        LINUX_REBOOT_CMD_POWER_OFF = 0x4321fedc LINUX_REBOOT_CMD_RESTART2 = 0xa1b2c3d4
        LINUX_REBOOT_CMD_SW_SUSPEND = 0xd000fce2 LINUX_REBOOT_CMD_KEXEC = 0x45584543
    }
    SYSLOG = one {
        SYSLOG_ACTION_CLOSE = 0 SYSLOG_ACTION_OPEN = 1 SYSLOG_ACTION_READ = 2 SYSLOG_ACTION_READ_ALL = 3
        SYSLOG_ACTION_READ_CLEAR = 4 SYSLOG_ACTION_CLEAR = 5 SYSLOG_ACTION_CONSOLE_OFF = 6
        SYSLOG_ACTION_CONSOLE_ON = 7 SYSLOG_ACTION_CONSOLE_LEVEL = 8 SYSLOG_ACTION_SIZE_UNREAD = 9
        SYSLOG_ACTION_SIZE_BUFFER = 10
    }
    RANDOM = flags { GRND_NONBLOCK GRND_RANDOM GRND_INSECURE }
    DELETE_MODULE = flags { O_NONBLOCK O_TRUNC }
    INIT_MODULE = flags {
        MODULE_INIT_IGNORE_MODVERSIONS = 0x1 MODULE_INIT_IGNORE_VERMAGIC = 0x2 MODULE_INIT_COMPRESSED_FILE = 0x4
    }
    KEXEC = flags(0xffff0000u32) { KEXEC_ON_CRASH = 0x1 KEXEC_PRESERVE_CONTEXT = 0x2 KEXEC_UPDATE_ELFCOREHDR = 0x4 }
    KEXEC_FILE = flags {
        KEXEC_FILE_UNLOAD = 0x1 KEXEC_FILE_ON_CRASH = 0x2 KEXEC_FILE_NO_INITRAMFS = 0x4 KEXEC_FILE_DEBUG = 0x8
    }
    PERF = flags { PERF_FLAG_FD_NO_GROUP = 0x1 PERF_FLAG_FD_OUTPUT = 0x2 PERF_FLAG_PID_CGROUP = 0x4 PERF_FLAG_FD_CLOEXEC = 0x8 }
    BPF = one {
        BPF_MAP_CREATE = 0 BPF_MAP_LOOKUP_ELEM = 1 BPF_MAP_UPDATE_ELEM = 2 BPF_MAP_DELETE_ELEM = 3
        BPF_MAP_GET_NEXT_KEY = 4 BPF_PROG_LOAD = 5 BPF_OBJ_PIN = 6 BPF_OBJ_GET = 7 BPF_PROG_ATTACH = 8
        BPF_PROG_DETACH = 9 BPF_PROG_TEST_RUN = 10 BPF_PROG_GET_NEXT_ID = 11 BPF_MAP_GET_NEXT_ID = 12
        BPF_PROG_GET_FD_BY_ID = 13 BPF_MAP_GET_FD_BY_ID = 14 BPF_OBJ_GET_INFO_BY_FD = 15 BPF_PROG_QUERY = 16
        BPF_RAW_TRACEPOINT_OPEN = 17 BPF_BTF_LOAD = 18 BPF_BTF_GET_FD_BY_ID = 19 BPF_TASK_FD_QUERY = 20
        BPF_MAP_LOOKUP_AND_DELETE_ELEM = 21 BPF_MAP_FREEZE = 22 BPF_BTF_GET_NEXT_ID = 23
        BPF_MAP_LOOKUP_BATCH = 24 BPF_MAP_LOOKUP_AND_DELETE_BATCH = 25 BPF_MAP_UPDATE_BATCH = 26
        BPF_MAP_DELETE_BATCH = 27 BPF_LINK_CREATE = 28 BPF_LINK_UPDATE = 29 BPF_LINK_GET_FD_BY_ID = 30
        BPF_LINK_GET_NEXT_ID = 31 BPF_ENABLE_STATS = 32 BPF_ITER_CREATE = 33 BPF_LINK_DETACH = 34
        BPF_PROG_BIND_MAP = 35 BPF_TOKEN_CREATE = 36 BPF_PROG_STREAM_READ_BY_FD = 37
    }
    KEYRING = one {
        KEY_SPEC_THREAD_KEYRING = 0xffffffff KEY_SPEC_PROCESS_KEYRING = 0xfffffffe
        KEY_SPEC_SESSION_KEYRING = 0xfffffffd KEY_SPEC_USER_KEYRING = 0xfffffffc
        KEY_SPEC_USER_SESSION_KEYRING = 0xfffffffb KEY_SPEC_GROUP_KEYRING = 0xfffffffa
        KEY_SPEC_REQKEY_AUTH_KEY = 0xfffffff9 KEY_SPEC_REQUESTOR_KEYRING = 0xfffffff8
    }
}

commands! {
    /// The operation of keyctl(2).
    KEYCTL {
        KEYCTL_GET_KEYRING_ID = 0 (KEYRING, Int) -> KEYRING;
        KEYCTL_JOIN_SESSION_KEYRING = 1 (Text) -> KEYRING;
        KEYCTL_UPDATE = 2 (KEYRING, Bytes, Size);
        KEYCTL_REVOKE = 3 (KEYRING);
        KEYCTL_CHOWN = 4 (KEYRING, Id, Id);
        KEYCTL_SETPERM = 5 (KEYRING, Bits);
        KEYCTL_DESCRIBE = 6 (KEYRING, Address, Size) -> Size;
        KEYCTL_CLEAR = 7 (KEYRING);
        KEYCTL_LINK = 8 (KEYRING, KEYRING);
        KEYCTL_UNLINK = 9 (KEYRING, KEYRING);
        KEYCTL_SEARCH = 10 (KEYRING, Text, Text, KEYRING) -> KEYRING;
        KEYCTL_READ = 11 (KEYRING, Address, Size) -> Size;
        KEYCTL_INSTANTIATE = 12 (KEYRING, Bytes, Size, KEYRING);
        KEYCTL_NEGATE = 13 (KEYRING, Size, KEYRING);
        KEYCTL_SET_REQKEY_KEYRING = 14 (Int) -> Int;
        KEYCTL_SET_TIMEOUT = 15 (KEYRING, Size);
        KEYCTL_ASSUME_AUTHORITY = 16 (KEYRING) -> KEYRING;
        KEYCTL_GET_SECURITY = 17 (KEYRING, Address, Size) -> Size;
        KEYCTL_SESSION_TO_PARENT = 18 ();
        KEYCTL_REJECT = 19 (KEYRING, Size, Size, KEYRING);
        KEYCTL_INSTANTIATE_IOV = 20 (KEYRING, Struct("iovec"), Size, KEYRING);
        KEYCTL_INVALIDATE = 21 (KEYRING);
        KEYCTL_GET_PERSISTENT = 22 (Id, KEYRING) -> KEYRING;
        KEYCTL_DH_COMPUTE = 23 (Struct("keyctl_dh_params"), Address, Size, Struct("keyctl_kdf_params")) -> Size;
        KEYCTL_RESTRICT_KEYRING = 29 (KEYRING, Text, Text);
        KEYCTL_MOVE = 30 (KEYRING, KEYRING, KEYRING, Bits);
        KEYCTL_CAPABILITIES = 31 (Address, Size) -> Size;
        KEYCTL_WATCH_KEY = 32 (KEYRING, Fd, Int);
    }
}

layouts! {
    /// What sysinfo(2) tells.
    SYSINFO = sysinfo {
        uptime: Long, totalram: Size, freeram: Size, sharedram: Size, bufferram: Size, totalswap: Size,
        freeswap: Size, procs: Size, totalhigh: Size, freehigh: Size, mem_unit: Size,
    }
}

pub(super) static ROWS: &[Row] = &rows! {
    sysinfo(info => [SYSINFO; 1]), may_block;
    syslog(type: SYSLOG, bufp => [Byte; len], len: Int) -> Size, may_block, counted;
    reboot(magic: MAGIC, magic2: MAGIC2, cmd: REBOOT, arg: Text), may_block;
    getrandom(buf => [Byte; buflen], buflen: Size, flags: RANDOM) -> Size, may_block, counted;
    vhangup(), may_block;
    iopl(level: Int), may_block;
    ioperm(from: Size, num: Size, turn_on: Int), may_block;
    init_module(module_image: Bytes, len: Size, param_values: Text), may_block;
    finit_module(fd: Fd, param_values: Text, flags: INIT_MODULE), may_block;
    delete_module(name: Text, flags: DELETE_MODULE), may_block;
    kexec_load(entry: Address, nr_segments: Size, segments: Struct("kexec_segment"), flags: KEXEC), may_block;
    kexec_file_load(kernel_fd: Fd, initrd_fd: Fd, cmdline_len: Size, cmdline: Text, flags: KEXEC_FILE), may_block;
    perf_event_open(attr: Struct("perf_event_attr"), pid: Pid, cpu: Int, group_fd: Fd, flags: PERF) -> Fd,
        may_block;
    bpf(cmd: BPF, attr: Struct("bpf_attr"), size: Size) -> Long, may_block;
    add_key(type: Text, description: Text, payload: Bytes, plen: Size, keyring: KEYRING) -> KEYRING, may_block;
    request_key(type: Text, description: Text, callout_info: Text, dest_keyring: KEYRING) -> KEYRING, may_block;
    keyctl(operation: KEYCTL, arg2: Bits, arg3: Bits, arg4: Bits, arg5: Bits) -> Long, may_block, optional(4);
    uretprobe(), may_block;
    uprobe(), may_block;
    _sysctl(args: Struct("__sysctl_args")), may_block;
    create_module(name: Text, size: Size) -> Address, may_block;
    get_kernel_syms(table: Struct("kernel_sym")) -> Int, may_block;
    query_module(name: Text, which: Int, buf: Address, bufsize: Size, ret: Struct("size_t")), may_block;
    nfsservctl(cmd: Int, argp: Struct("nfsctl_arg"), resp: Struct("nfsctl_res")) -> Long, may_block;
    getpmsg(), may_block;
    putpmsg(), may_block;
    afs_syscall(), may_block;
    tuxcall(), may_block;
    security(), may_block;
    vserver(), may_block;
};
