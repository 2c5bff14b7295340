//! Processes: how they are made, waited for, ended, scheduled and limited.

use nix::libc;

use super::Shape::*;
use super::control::{A_NAME, A_SIGNAL, AN_ADDRESS, AN_INT};
use super::time::TIMESPEC;
use super::{Row, commands, layouts, names, rows};

names! {
    /// Of clone(2), with the signal that is sent when the child ends.
    CLONE = flags(0xff) {
        CLONE_VM CLONE_FS CLONE_FILES CLONE_SIGHAND CLONE_PIDFD CLONE_PTRACE CLONE_VFORK CLONE_PARENT CLONE_THREAD
        CLONE_NEWNS CLONE_SYSVSEM CLONE_SETTLS CLONE_PARENT_SETTID CLONE_CHILD_CLEARTID CLONE_DETACHED
        CLONE_UNTRACED CLONE_CHILD_SETTID CLONE_NEWCGROUP CLONE_NEWUTS CLONE_NEWIPC CLONE_NEWUSER CLONE_NEWPID
        CLONE_NEWNET CLONE_IO SIGHUP SIGINT SIGQUIT SIGILL SIGTRAP SIGABRT SIGBUS SIGFPE SIGKILL SIGUSR1 SIGSEGV
        SIGUSR2 SIGPIPE SIGALRM SIGTERM SIGSTKFLT SIGCHLD SIGCONT SIGSTOP SIGTSTP SIGTTIN SIGTTOU SIGURG SIGXCPU
        SIGXFSZ SIGVTALRM SIGPROF SIGWINCH SIGIO SIGPWR SIGSYS
    }
    EXECVEAT = flags { AT_EMPTY_PATH AT_SYMLINK_NOFOLLOW AT_EXECVE_CHECK = 0x10000 }
    WAIT_FOR = one { P_ALL P_PID P_PGID P_PIDFD }
    WAIT = flags { WNOHANG WUNTRACED WEXITED WCONTINUED WNOWAIT __WNOTHREAD __WALL __WCLONE }
    PIDFD = flags { PIDFD_NONBLOCK PIDFD_THREAD = 0x80 }
    PIDFD_SIGNAL = flags {
        PIDFD_SIGNAL_THREAD = 0x1 PIDFD_SIGNAL_THREAD_GROUP = 0x2 PIDFD_SIGNAL_PROCESS_GROUP = 0x4
    }
    RESOURCE = one {
        RLIMIT_CPU RLIMIT_FSIZE RLIMIT_DATA RLIMIT_STACK RLIMIT_CORE RLIMIT_RSS RLIMIT_NPROC RLIMIT_NOFILE
        RLIMIT_MEMLOCK RLIMIT_AS RLIMIT_LOCKS RLIMIT_SIGPENDING RLIMIT_MSGQUEUE RLIMIT_NICE RLIMIT_RTPRIO
        RLIMIT_RTTIME
    }
    RUSAGE_OF = one { RUSAGE_SELF RUSAGE_CHILDREN RUSAGE_THREAD }
    PRIORITY_OF = one { PRIO_PROCESS PRIO_PGRP PRIO_USER }
    POLICY = flags(0xff) {
        SCHED_OTHER SCHED_FIFO SCHED_RR SCHED_BATCH SCHED_IDLE SCHED_DEADLINE SCHED_EXT = 7 SCHED_RESET_ON_FORK
    }
    IOPRIO_OF = one { IOPRIO_WHO_PROCESS = 1 IOPRIO_WHO_PGRP = 2 IOPRIO_WHO_USER = 3 }
    KCMP = one {
        KCMP_FILE = 0 KCMP_VM = 1 KCMP_FILES = 2 KCMP_FS = 3 KCMP_SIGHAND = 4 KCMP_IO = 5 KCMP_SYSVSEM = 6
        KCMP_EPOLL_TFD = 7
    }
    PERSONALITY = flags(0xff) {
        PER_LINUX = 0x0 PER_LINUX_32BIT = 0x800000 PER_SVR4 = 0x1 PER_BSD = 0x6 PER_LINUX32 = 0x8 UNAME26 = 0x20000 ADDR_NO_RANDOMIZE
        FDPIC_FUNCPTRS = 0x80000 MMAP_PAGE_ZERO ADDR_COMPAT_LAYOUT READ_IMPLIES_EXEC ADDR_LIMIT_32BIT SHORT_INODE
        WHOLE_SECONDS STICKY_TIMEOUTS ADDR_LIMIT_3GB
    }
    DUMPABLE = one { SUID_DUMP_DISABLE = 0 SUID_DUMP_USER = 1 SUID_DUMP_ROOT = 2 }
    SECCOMP_MODE = one { SECCOMP_MODE_DISABLED SECCOMP_MODE_STRICT SECCOMP_MODE_FILTER }
    CAP = one {
        CAP_CHOWN = 0 CAP_DAC_OVERRIDE = 1 CAP_DAC_READ_SEARCH = 2 CAP_FOWNER = 3 CAP_FSETID = 4 CAP_KILL = 5
        CAP_SETGID = 6 CAP_SETUID = 7 CAP_SETPCAP = 8 CAP_LINUX_IMMUTABLE = 9 CAP_NET_BIND_SERVICE = 10
        CAP_NET_BROADCAST = 11 CAP_NET_ADMIN = 12 CAP_NET_RAW = 13 CAP_IPC_LOCK = 14 CAP_IPC_OWNER = 15
        CAP_SYS_MODULE = 16 CAP_SYS_RAWIO = 17 CAP_SYS_CHROOT = 18 CAP_SYS_PTRACE = 19 CAP_SYS_PACCT = 20
        CAP_SYS_ADMIN = 21 CAP_SYS_BOOT = 22 CAP_SYS_NICE = 23 CAP_SYS_RESOURCE = 24 CAP_SYS_TIME = 25
        CAP_SYS_TTY_CONFIG = 26 CAP_MKNOD = 27 CAP_LEASE = 28 CAP_AUDIT_WRITE = 29 CAP_AUDIT_CONTROL = 30
        CAP_SETFCAP = 31 CAP_MAC_OVERRIDE = 32 CAP_MAC_ADMIN = 33 CAP_SYSLOG = 34 CAP_WAKE_ALARM = 35
        CAP_BLOCK_SUSPEND = 36 CAP_AUDIT_READ = 37 CAP_PERFMON = 38 CAP_BPF = 39 CAP_CHECKPOINT_RESTORE = 40
    }
    AMBIENT = one {
        PR_CAP_AMBIENT_IS_SET PR_CAP_AMBIENT_RAISE PR_CAP_AMBIENT_LOWER PR_CAP_AMBIENT_CLEAR_ALL
    }
    SECUREBITS = flags {
        SECBIT_NOROOT = 0x1 SECBIT_NOROOT_LOCKED = 0x2 SECBIT_NO_SETUID_FIXUP = 0x4
        SECBIT_NO_SETUID_FIXUP_LOCKED = 0x8 SECBIT_KEEP_CAPS = 0x10 SECBIT_KEEP_CAPS_LOCKED = 0x20
        SECBIT_NO_CAP_AMBIENT_RAISE = 0x40 SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED = 0x80
    }
    PR_MM_WHAT = one {
        PR_SET_MM_START_CODE = 1 PR_SET_MM_END_CODE = 2 PR_SET_MM_START_DATA = 3 PR_SET_MM_END_DATA = 4
        PR_SET_MM_START_STACK = 5 PR_SET_MM_START_BRK = 6 PR_SET_MM_BRK = 7 PR_SET_MM_ARG_START = 8
        PR_SET_MM_ARG_END = 9 PR_SET_MM_ENV_START = 10 PR_SET_MM_ENV_END = 11 PR_SET_MM_AUXV = 12
        PR_SET_MM_EXE_FILE = 13 PR_SET_MM_MAP = 14 PR_SET_MM_MAP_SIZE = 15
    }
}

commands! {
    /// The option of prctl(2).
    PRCTL {
        PR_SET_PDEATHSIG(Signal);
        PR_GET_PDEATHSIG(A_SIGNAL);
        PR_GET_DUMPABLE() -> DUMPABLE;
        PR_SET_DUMPABLE(DUMPABLE);
        PR_GET_UNALIGN(Struct("unsigned int"));
        PR_SET_UNALIGN(Bits);
        PR_GET_KEEPCAPS() -> Int;
        PR_SET_KEEPCAPS(Int);
        PR_GET_TIMING() -> Int;
        PR_SET_TIMING(Int);
        PR_SET_NAME(Text);
        PR_GET_NAME(A_NAME);
        PR_GET_SECCOMP() -> SECCOMP_MODE;
        PR_SET_SECCOMP(SECCOMP_MODE, Struct("sock_fprog"));
        PR_CAPBSET_READ(CAP) -> Int;
        PR_CAPBSET_DROP(CAP);
        PR_GET_TSC(Struct("int"));
        PR_SET_TSC(Int);
        PR_GET_SECUREBITS() -> SECUREBITS;
        PR_SET_SECUREBITS(SECUREBITS);
        PR_SET_TIMERSLACK(Size);
        PR_GET_TIMERSLACK() -> Size;
        PR_TASK_PERF_EVENTS_DISABLE();
        PR_TASK_PERF_EVENTS_ENABLE();
        PR_MCE_KILL(Int, Int);
        PR_MCE_KILL_GET() -> Int;
        PR_SET_MM(PR_MM_WHAT, Address, Size);
        PR_SET_PTRACER(Int);
        PR_SET_CHILD_SUBREAPER(Int);
        PR_GET_CHILD_SUBREAPER(AN_INT);
        PR_SET_NO_NEW_PRIVS(Int, Int, Int, Int);
        PR_GET_NO_NEW_PRIVS(Int, Int, Int, Int) -> Int;
        PR_GET_TID_ADDRESS(Struct("int *"));
        PR_SET_THP_DISABLE(Int, Int, Int, Int);
        PR_GET_THP_DISABLE(Int, Int, Int, Int) -> Int;
        PR_CAP_AMBIENT(AMBIENT, CAP, Int, Int) -> Int;
        PR_GET_SPECULATION_CTRL(Int) -> Bits;
        PR_SET_SPECULATION_CTRL(Int, Bits);
        PR_SET_IO_FLUSHER = 57 (Int);
        PR_GET_IO_FLUSHER = 58 () -> Int;
        PR_SET_SYSCALL_USER_DISPATCH = 59 (Int, Address, Size, Struct("char"));
        PR_SCHED_CORE(Int, Pid, Int, Address);
        PR_SET_MDWE(Bits);
        PR_GET_MDWE() -> Bits;
        PR_SET_VMA(Int, Address, Size, Text);
        PR_SET_MEMORY_MERGE = 67 (Int);
        PR_GET_MEMORY_MERGE = 68 () -> Int;
        PR_FUTEX_HASH = 78 (Int, Int, Int) -> Int;
    }
}

commands! {
    /// The request of ptrace(2).
    PTRACE {
        PTRACE_TRACEME();
        PTRACE_PEEKTEXT(Pid, Address, Address) -> Bits;
        PTRACE_PEEKDATA(Pid, Address, Address) -> Bits;
        PTRACE_PEEKUSER(Pid, Address, Address) -> Bits;
        PTRACE_POKETEXT(Pid, Address, Bits);
        PTRACE_POKEDATA(Pid, Address, Bits);
        PTRACE_POKEUSER(Pid, Address, Bits);
        PTRACE_CONT(Pid, Zero, Signal);
        PTRACE_KILL(Pid);
        PTRACE_SINGLESTEP(Pid, Zero, Signal);
        PTRACE_GETREGS(Pid, Zero, Struct("user_regs_struct"));
        PTRACE_SETREGS(Pid, Zero, Struct("user_regs_struct"));
        PTRACE_GETFPREGS(Pid, Zero, Struct("user_fpregs_struct"));
        PTRACE_SETFPREGS(Pid, Zero, Struct("user_fpregs_struct"));
        PTRACE_ATTACH(Pid);
        PTRACE_DETACH(Pid, Zero, Signal);
        PTRACE_SYSCALL(Pid, Zero, Signal);
        PTRACE_SETOPTIONS(Pid, Zero, Bits);
        PTRACE_GETEVENTMSG(Pid, Zero, Struct("unsigned long"));
        PTRACE_GETSIGINFO(Pid, Zero, Struct("siginfo_t"));
        PTRACE_SETSIGINFO(Pid, Zero, Struct("siginfo_t"));
        PTRACE_GETREGSET(Pid, Bits, Struct("iovec"));
        PTRACE_SETREGSET(Pid, Bits, Struct("iovec"));
        PTRACE_SEIZE(Pid, Zero, Bits);
        PTRACE_INTERRUPT(Pid);
        PTRACE_LISTEN(Pid);
        PTRACE_PEEKSIGINFO(Pid, Struct("ptrace_peeksiginfo_args"), Struct("siginfo_t")) -> Size;
        PTRACE_GETSIGMASK = 0x420a (Pid, Size, Struct("sigset_t"));
        PTRACE_SETSIGMASK = 0x420b (Pid, Size, Struct("sigset_t"));
        PTRACE_SECCOMP_GET_FILTER = 0x420c (Pid, Size, Struct("sock_filter")) -> Size;
        PTRACE_GET_SYSCALL_INFO = 0x420e (Pid, Size, Struct("ptrace_syscall_info")) -> Size;
        PTRACE_SET_SYSCALL_INFO = 0x4212 (Pid, Size, Struct("ptrace_syscall_info"));
    }
}

commands! {
    /// The code of arch_prctl(2).
    ARCH_PRCTL {
        ARCH_SET_GS = 0x1001 (Address);
        ARCH_SET_FS = 0x1002 (Address);
        ARCH_GET_FS = 0x1003 (AN_ADDRESS);
        ARCH_GET_GS = 0x1004 (AN_ADDRESS);
        ARCH_GET_CPUID = 0x1011 () -> Int;
        ARCH_SET_CPUID = 0x1012 (Int);
        ARCH_SHSTK_ENABLE = 0x5001 (Bits);
        ARCH_SHSTK_DISABLE = 0x5002 (Bits);
    }
}

layouts! {
    /// A limit.
    RLIMIT = rlimit { rlim_cur: Size, rlim_max: Size }
    /// The priority of a policy of real time.
    SCHED_PARAM = sched_param { sched_priority: Int }
    /// Consumed processor time.
    TMS = tms { tms_utime: Long, tms_stime: Long, tms_cutime: Long, tms_cstime: Long }
    RUSAGE = rusage {
        ru_maxrss: Long, ru_minflt: Long, ru_majflt: Long, ru_inblock: Long, ru_oublock: Long, ru_nvcsw: Long,
        ru_nivcsw: Long,
    }
}

pub(super) static ROWS: &[Row] = &rows! {
    fork() -> Pid, may_block, not_interrupted;
    vfork() -> Pid, may_block, not_interrupted;
    clone(flags: CLONE, stack: Address, parent_tid: Struct("pid_t"), child_tid: Struct("pid_t"), tls: Address)
        -> Pid, may_block_if("flags", libc::CLONE_VFORK), not_interrupted;
    clone3(cl_args: Struct("clone_args"), size: Size) -> Pid, may_block, not_interrupted;
    execve(pathname: Text, argv: Struct("char *"), envp: Struct("char *")), may_block, not_interrupted;
    execveat(dirfd: DirFd, pathname: Text, argv: Struct("char *"), envp: Struct("char *"), flags: EXECVEAT),
        may_block, not_interrupted;
    exit(status: Int), may_block, not_interrupted;
    exit_group(status: Int), may_block, not_interrupted;
    wait4(pid: Pid, wstatus => [Int; 1], options: WAIT, rusage => [RUSAGE; 1]) -> Pid, may_block;
    waitid(idtype: WAIT_FOR, id: Int, infop => [Byte; 128], options: WAIT, rusage => [RUSAGE; 1]),
        may_block_unless("options", libc::WNOHANG), optional(1);
    getpid() -> Pid;
    getppid() -> Pid;
    gettid() -> Pid;
    getpgid(pid: Pid) -> Pid;
    getpgrp() -> Pid;
    setpgid(pid: Pid, pgid: Pid);
    getsid(pid: Pid) -> Pid;
    setsid() -> Pid;
    pidfd_open(pid: Pid, flags: PIDFD) -> Fd, may_block;
    pidfd_getfd(pidfd: Fd, targetfd: Fd, flags: Bits) -> Fd, may_block;
    pidfd_send_signal(pidfd: Fd, sig: Signal, info: Struct("siginfo_t"), flags: PIDFD_SIGNAL), may_block;
    process_mrelease(pidfd: Fd, flags: Bits), may_block;
    kcmp(pid1: Pid, pid2: Pid, type: KCMP, idx1: Size, idx2: Size) -> Int, may_block;
    ptrace(request: PTRACE, pid: Pid, addr: Address, data: Address) -> Long, may_block;
    prctl(option: PRCTL, arg2: Bits, arg3: Bits, arg4: Bits, arg5: Bits) -> Long, optional(4);
    arch_prctl(code: ARCH_PRCTL, addr: Address), may_block;
    personality(persona: PERSONALITY) -> PERSONALITY, may_block;
    set_tid_address(tidptr: Address) -> Pid;
    getrlimit(resource: RESOURCE, rlim => [RLIMIT; 1]);
    setrlimit(resource: RESOURCE, rlim: Struct("rlimit"));
    prlimit64(pid: Pid, resource: RESOURCE, new_limit: Struct("rlimit"), old_limit => [RLIMIT; 1]);
    getrusage(who: RUSAGE_OF, usage => [RUSAGE; 1]);
    times(buf => [TMS; 1]) -> Long;
    acct(filename: Text), may_block;
    getpriority(which: PRIORITY_OF, who: Int) -> Int;
    setpriority(which: PRIORITY_OF, who: Int, prio: Int), may_block;
    sched_yield(), may_block;
    sched_setparam(pid: Pid, param: Struct("sched_param")), may_block;
    sched_getparam(pid: Pid, param => [SCHED_PARAM; 1]), may_block;
    sched_setscheduler(pid: Pid, policy: POLICY, param: Struct("sched_param")), may_block;
    sched_getscheduler(pid: Pid) -> POLICY, may_block;
    sched_get_priority_max(policy: POLICY) -> Int;
    sched_get_priority_min(policy: POLICY) -> Int;
    sched_rr_get_interval(pid: Pid, tp => [TIMESPEC; 1]), may_block;
    sched_setaffinity(pid: Pid, cpusetsize: Size, mask: Struct("cpu_set_t")), may_block;
    sched_getaffinity(pid: Pid, cpusetsize: Size, mask => [Byte; cpusetsize]) -> Size, may_block;
    sched_setattr(pid: Pid, attr: Struct("sched_attr"), flags: Bits), may_block;
    sched_getattr(pid: Pid, attr => [Byte; size], size: Size, flags: Bits), may_block;
    ioprio_set(which: IOPRIO_OF, who: Int, ioprio: Bits), may_block;
    ioprio_get(which: IOPRIO_OF, who: Int) -> Bits, may_block;
    getcpu(cpu => [Int; 1], node => [Int; 1], tcache: Address), may_block, optional(1);
    uselib(library: Text), may_block;
};
