//! The commands of fcntl(2) and of ioctl(2).

use super::Shape::*;
use super::files::OPEN;
use super::namespaces::CLONE_NEW;
use super::{Count, Item, Memory, Shape, commands, layouts, names};

names! {
    /// Of a descriptor.
    FD_FLAGS = flags { FD_CLOEXEC }
    SEALS = flags {
        F_SEAL_SEAL F_SEAL_SHRINK F_SEAL_GROW F_SEAL_WRITE F_SEAL_FUTURE_WRITE F_SEAL_EXEC = 0x20
    }
    LEASE = one { F_RDLCK F_WRLCK F_UNLCK }
    NOTIFY = flags {
        DN_ACCESS = 0x1 DN_MODIFY = 0x2 DN_CREATE = 0x4 DN_DELETE = 0x8 DN_RENAME = 0x10 DN_ATTRIB = 0x20 DN_MULTISHOT = 0x80000000
    }
    TTY_QUEUE = one { TCIFLUSH TCOFLUSH TCIOFLUSH }
    TTY_FLOW = one { TCOOFF TCOON TCIOFF TCION }
}

/// Where a pid is put.
const A_PID: Shape = Filled(&Memory { item: Item::Word(Pid), count: Count::Fixed(1) });

/// Where an int is put.
pub(super) const AN_INT: Shape = Filled(&Memory { item: Item::Word(Int), count: Count::Fixed(1) });

/// Where a signal is put.
pub(super) const A_SIGNAL: Shape =
    Filled(&Memory { item: Item::Word(Signal), count: Count::Fixed(1) });

/// Where an address is put.
pub(super) const AN_ADDRESS: Shape =
    Filled(&Memory { item: Item::Long(Address), count: Count::Fixed(1) });

/// Where the name of a thread is put.
pub(super) const A_NAME: Shape = Filled(&Memory { item: Item::Text, count: Count::Fixed(16) });

/// Where the size of a terminal is put.
const A_WINSIZE: Shape = Filled(&Memory { item: Item::Struct(&WINSIZE), count: Count::Fixed(1) });

commands! {
    /// The command of fcntl(2).
    FCNTL {
        F_DUPFD(Fd) -> Fd, quick;
        F_DUPFD_CLOEXEC(Fd) -> Fd, quick;
        F_GETFD() -> FD_FLAGS, quick;
        F_SETFD(FD_FLAGS), quick;
        F_GETFL() -> OPEN, quick;
        F_SETFL(OPEN);
        F_GETLK(Struct("flock"));
        F_SETLK(Struct("flock"));
        F_SETLKW(Struct("flock"));
        F_OFD_GETLK(Struct("flock"));
        F_OFD_SETLK(Struct("flock"));
        F_OFD_SETLKW(Struct("flock"));
        F_GETOWN() -> Pid;
        F_SETOWN(Pid), quick;
        F_GETOWN_EX = 16 (Struct("f_owner_ex"));
        F_SETOWN_EX = 15 (Struct("f_owner_ex"));
        F_GETSIG = 11 () -> Signal;
        F_SETSIG = 10 (Signal);
        F_GETLEASE() -> LEASE;
        F_SETLEASE(LEASE);
        F_NOTIFY(NOTIFY);
        F_CANCELLK = 1029 ();
        F_SETPIPE_SZ(Size) -> Size;
        F_GETPIPE_SZ() -> Size;
        F_ADD_SEALS(SEALS);
        F_GET_SEALS() -> SEALS;
        F_GET_RW_HINT = 1035 (Struct("uint64_t"));
        F_SET_RW_HINT = 1036 (Struct("uint64_t"));
        F_GET_FILE_RW_HINT = 1037 (Struct("uint64_t"));
        F_SET_FILE_RW_HINT = 1038 (Struct("uint64_t"));
        F_DUPFD_QUERY = 1027 (Fd) -> Int;
        F_CREATED_QUERY = 1028 () -> Int;
    }
}

commands! {
    /// The request of ioctl(2).
    IOCTL {
        TCGETS(Struct("termios"));
        TCSETS(Struct("termios"));
        TCSETSW(Struct("termios"));
        TCSETSF(Struct("termios"));
        TCGETS2(Struct("termios2"));
        TCSETS2(Struct("termios2"));
        TCSETSW2(Struct("termios2"));
        TCSETSF2(Struct("termios2"));
        TCSBRK(Int);
        TCXONC(TTY_FLOW);
        TCFLSH(TTY_QUEUE);
        TIOCEXCL();
        TIOCNXCL();
        TIOCSCTTY(Int);
        TIOCNOTTY();
        TIOCGPGRP(A_PID);
        TIOCSPGRP(Struct("pid_t"));
        TIOCGSID(A_PID);
        TIOCSTI(Struct("char"));
        TIOCGWINSZ(A_WINSIZE);
        TIOCSWINSZ(Struct("winsize"));
        TIOCMGET(Struct("int"));
        TIOCMBIS(Struct("int"));
        TIOCMBIC(Struct("int"));
        TIOCMSET(Struct("int"));
        TIOCOUTQ(AN_INT);
        TIOCINQ(AN_INT);
        TIOCCONS();
        TIOCPKT(Struct("int"));
        TIOCGPTN(AN_INT);
        TIOCSPTLCK(Struct("int"));
        TIOCGPTPEER(OPEN) -> Fd;
        FIONBIO(Struct("int"));
        FIOCLEX();
        FIONCLEX();
        FIOASYNC(Struct("int"));
        FIOQSIZE = 0x5460 (Struct("loff_t"));
        FIGETBSZ = 0x2 (Struct("int"));
        FIBMAP = 0x1 (Struct("int"));
        FICLONE(Fd);
        FICLONERANGE(Struct("file_clone_range"));
        FIDEDUPERANGE = 0xc0189436 (Struct("file_dedupe_range"));
        FIFREEZE = 0xc0045877 ();
        FITHAW = 0xc0045878 ();
        FITRIM = 0xc0185879 (Struct("fstrim_range"));
        FS_IOC_GETFLAGS(Struct("int"));
        FS_IOC_SETFLAGS(Struct("int"));
        FS_IOC_GETVERSION(Struct("int"));
        FS_IOC_SETVERSION(Struct("int"));
        FS_IOC_FSGETXATTR = 0x801c581f (Struct("fsxattr"));
        FS_IOC_FSSETXATTR = 0x401c5820 (Struct("fsxattr"));
        FS_IOC_FIEMAP = 0xc020660b (Struct("fiemap"));
        SIOCGIFNAME(Struct("ifreq"));
        SIOCGIFCONF(Struct("ifconf"));
        SIOCGIFFLAGS(Struct("ifreq"));
        SIOCSIFFLAGS(Struct("ifreq"));
        SIOCGIFADDR(Struct("ifreq"));
        SIOCSIFADDR(Struct("ifreq"));
        SIOCGIFNETMASK(Struct("ifreq"));
        SIOCSIFNETMASK(Struct("ifreq"));
        SIOCGIFMTU(Struct("ifreq"));
        SIOCSIFMTU(Struct("ifreq"));
        SIOCSIFNAME(Struct("ifreq"));
        SIOCGIFHWADDR(Struct("ifreq"));
        SIOCSIFHWADDR(Struct("ifreq"));
        SIOCGIFINDEX(Struct("ifreq"));
        SIOCADDRT(Struct("rtentry"));
        SIOCDELRT(Struct("rtentry"));
        SIOCETHTOOL = 0x8946 (Struct("ifreq"));
        SIOCBRADDBR = 0x89a0 (Text);
        SIOCBRDELBR = 0x89a1 (Text);
        SIOCGSKNS = 0x894c () -> Fd;
        TUNSETIFF(Struct("ifreq"));
        TUNGETIFF(Struct("ifreq"));
        TUNSETPERSIST(Int);
        TUNSETOWNER(Id);
        TUNSETGROUP(Id);
        NS_GET_USERNS() -> Fd;
        NS_GET_PARENT() -> Fd;
        NS_GET_NSTYPE() -> CLONE_NEW;
        NS_GET_OWNER_UID(Struct("uid_t"));
        LOOP_SET_FD = 0x4c00 (Fd);
        LOOP_CLR_FD = 0x4c01 ();
        LOOP_SET_STATUS64 = 0x4c04 (Struct("loop_info64"));
        LOOP_GET_STATUS64 = 0x4c05 (Struct("loop_info64"));
        LOOP_CONFIGURE = 0x4c0a (Struct("loop_config"));
        LOOP_CTL_ADD = 0x4c80 (Int) -> Int;
        LOOP_CTL_REMOVE = 0x4c81 (Int) -> Int;
        LOOP_CTL_GET_FREE = 0x4c82 () -> Int;
        BLKGETSIZE64 = 0x80081272 (Struct("uint64_t"));
        BLKSSZGET(Struct("int"));
        BLKRRPART = 0x125f ();
        BLKFLSBUF = 0x1261 ();
        BLKDISCARD = 0x1277 (Struct("uint64_t [2]"));
        SECCOMP_IOCTL_NOTIF_RECV(Struct("seccomp_notif"));
        SECCOMP_IOCTL_NOTIF_SEND(Struct("seccomp_notif_resp"));
        SECCOMP_IOCTL_NOTIF_ID_VALID(Struct("uint64_t"));
        SECCOMP_IOCTL_NOTIF_ADDFD(Struct("seccomp_notif_addfd")) -> Fd;
        UFFDIO_API = 0xc018aa3f (Struct("uffdio_api"));
        UFFDIO_REGISTER = 0xc020aa00 (Struct("uffdio_register"));
        UFFDIO_UNREGISTER = 0x8010aa01 (Struct("uffdio_range"));
        UFFDIO_WAKE = 0x8010aa02 (Struct("uffdio_range"));
        UFFDIO_COPY = 0xc028aa03 (Struct("uffdio_copy"));
        UFFDIO_ZEROPAGE = 0xc020aa04 (Struct("uffdio_zeropage"));
        UFFDIO_WRITEPROTECT = 0xc018aa06 (Struct("uffdio_writeprotect"));
        PERF_EVENT_IOC_ENABLE = 0x2400 (Bits);
        PERF_EVENT_IOC_DISABLE = 0x2401 (Bits);
        PERF_EVENT_IOC_RESET = 0x2403 (Bits);
        KVM_GET_API_VERSION = 0xae00 () -> Int;
        KVM_CREATE_VM = 0xae01 (Bits) -> Fd;
        KVM_CREATE_VCPU = 0xae41 (Int) -> Fd;
        KVM_RUN = 0xae80 ();
        PIDFD_GET_INFO = 0xc040ff0b (Struct("pidfd_info"));
    }
}

layouts! {
    /// Of TIOCGWINSZ.
    WINSIZE = winsize { ws_row: Size, ws_col: Size, ws_xpixel: Size, ws_ypixel: Size }
}
