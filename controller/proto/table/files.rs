//! Files: what is opened, read, written, locked, copied, polled.

use nix::libc;

use super::Shape::*;
use super::control::{FCNTL, IOCTL};
use super::{Closes, Row, names, rows};

names! {
    /// Of open(2).
    OPEN = flags(libc::O_ACCMODE) {
        O_RDONLY O_WRONLY O_RDWR O_CREAT O_EXCL O_NOCTTY O_TRUNC O_APPEND O_NONBLOCK O_SYNC O_DSYNC
        O_ASYNC O_DIRECT O_LARGEFILE = 0o100000 O_TMPFILE O_DIRECTORY O_NOFOLLOW O_NOATIME O_CLOEXEC O_PATH
    }
    /// Of pipe2(2).
    PIPE = flags { O_CLOEXEC O_NONBLOCK O_DIRECT O_NOTIFICATION_PIPE = 0o200 }
    /// Of dup3(2).
    CLOEXEC = flags { O_CLOEXEC }
    CLOSE_RANGE = flags { CLOSE_RANGE_UNSHARE CLOSE_RANGE_CLOEXEC }
    SEEK = one { SEEK_SET SEEK_CUR SEEK_END SEEK_DATA SEEK_HOLE }
    RWF = flags {
        RWF_HIPRI RWF_DSYNC RWF_SYNC RWF_NOWAIT RWF_APPEND RWF_NOAPPEND = 0x20 RWF_ATOMIC = 0x40
        RWF_DONTCACHE = 0x80
    }
    LOCK = flags { LOCK_SH LOCK_EX LOCK_UN LOCK_NB LOCK_MAND = 32 LOCK_READ = 64 LOCK_WRITE = 128 }
    FALLOCATE = flags {
        FALLOC_FL_KEEP_SIZE FALLOC_FL_PUNCH_HOLE FALLOC_FL_NO_HIDE_STALE = 0x4 FALLOC_FL_COLLAPSE_RANGE
        FALLOC_FL_ZERO_RANGE FALLOC_FL_INSERT_RANGE FALLOC_FL_UNSHARE_RANGE FALLOC_FL_WRITE_ZEROES = 0x80
    }
    ADVICE = one {
        POSIX_FADV_NORMAL POSIX_FADV_RANDOM POSIX_FADV_SEQUENTIAL POSIX_FADV_WILLNEED POSIX_FADV_DONTNEED
        POSIX_FADV_NOREUSE
    }
    SYNC_RANGE = flags {
        SYNC_FILE_RANGE_WAIT_BEFORE SYNC_FILE_RANGE_WRITE SYNC_FILE_RANGE_WAIT_AFTER
    }
    SPLICE = flags { SPLICE_F_MOVE SPLICE_F_NONBLOCK SPLICE_F_MORE SPLICE_F_GIFT }
    MEMFD = flags {
        MFD_CLOEXEC MFD_ALLOW_SEALING MFD_HUGETLB MFD_NOEXEC_SEAL MFD_EXEC MFD_HUGE_64KB MFD_HUGE_1MB
        MFD_HUGE_2MB MFD_HUGE_1GB
    }
    EVENTFD = flags { EFD_CLOEXEC EFD_NONBLOCK EFD_SEMAPHORE }
}

pub(super) static ROWS: &[Row] = &rows! {
    read(fd: Fd, buf => [Byte; count], count: Size) -> Size, may_block, counted;
    write(fd: Fd, buf: Bytes, count: Size) -> Size, may_block;
    open(pathname: Text, flags: OPEN, mode: Mode) -> Fd, may_block, optional(1);
    openat(dirfd: DirFd, pathname: Text, flags: OPEN, mode: Mode) -> Fd, may_block, optional(1);
    openat2(dirfd: DirFd, pathname: Text, how: Struct("open_how"), size: Size) -> Fd, may_block;
    creat(pathname: Text, mode: Mode) -> Fd, may_block;
    close(fd: Fd), may_block, not_interrupted, closes(Closes::First);
    close_range(first: Size, last: Size, flags: CLOSE_RANGE), may_block, not_interrupted,
        closes(Closes::Range);
    dup(oldfd: Fd) -> Fd;
    dup2(oldfd: Fd, newfd: Fd) -> Fd, closes(Closes::Second);
    dup3(oldfd: Fd, newfd: Fd, flags: CLOEXEC) -> Fd, closes(Closes::Second);
    pipe(pipefd => [Fd; 2]);
    pipe2(pipefd => [Fd; 2], flags: PIPE);
    fcntl(fd: Fd, cmd: FCNTL, arg: Bits) -> Long, may_block_by_command("cmd"), optional(1);
    ioctl(fd: Fd, request: IOCTL, arg: Bits) -> Long, may_block, optional(1);
    lseek(fd: Fd, offset: Long, whence: SEEK) -> Long, may_block;
    pread64(fd: Fd, buf => [Byte; count], count: Size, offset: Long) -> Size, may_block, counted;
    pwrite64(fd: Fd, buf: Bytes, count: Size, offset: Long) -> Size, may_block;
    readv(fd: Fd, iov: Struct("iovec"), iovcnt: Int) -> Size, may_block;
    writev(fd: Fd, iov: Struct("iovec"), iovcnt: Int) -> Size, may_block;
    preadv(fd: Fd, iov: Struct("iovec"), iovcnt: Int, pos_l: Long, pos_h: Long) -> Size, may_block;
    pwritev(fd: Fd, iov: Struct("iovec"), iovcnt: Int, pos_l: Long, pos_h: Long) -> Size, may_block;
    preadv2(fd: Fd, iov: Struct("iovec"), iovcnt: Int, pos_l: Long, pos_h: Long, flags: RWF) -> Size,
        may_block;
    pwritev2(fd: Fd, iov: Struct("iovec"), iovcnt: Int, pos_l: Long, pos_h: Long, flags: RWF) -> Size,
        may_block;
    sendfile(out_fd: Fd, in_fd: Fd, offset: Struct("off_t"), count: Size) -> Size, may_block;
    splice(fd_in: Fd, off_in: Struct("off64_t"), fd_out: Fd, off_out: Struct("off64_t"), len: Size,
        flags: SPLICE) -> Size, may_block;
    tee(fd_in: Fd, fd_out: Fd, len: Size, flags: SPLICE) -> Size, may_block;
    vmsplice(fd: Fd, iov: Struct("iovec"), nr_segs: Size, flags: SPLICE) -> Size, may_block;
    copy_file_range(fd_in: Fd, off_in: Struct("off64_t"), fd_out: Fd, off_out: Struct("off64_t"), len: Size,
        flags: Bits) -> Size, may_block;
    truncate(path: Text, length: Long), may_block;
    ftruncate(fd: Fd, length: Long), may_block;
    fallocate(fd: Fd, mode: FALLOCATE, offset: Long, len: Long), may_block;
    fadvise64(fd: Fd, offset: Long, len: Long, advice: ADVICE), may_block;
    readahead(fd: Fd, offset: Long, count: Size), may_block;
    cachestat(fd: Fd, cstat_range: Struct("cachestat_range"), cstat: Struct("cachestat"), flags: Bits),
        may_block;
    sync(), may_block;
    syncfs(fd: Fd), may_block;
    fsync(fd: Fd), may_block;
    fdatasync(fd: Fd), may_block;
    sync_file_range(fd: Fd, offset: Long, nbytes: Long, flags: SYNC_RANGE), may_block;
    flock(fd: Fd, operation: LOCK), may_block;
    memfd_create(name: Text, flags: MEMFD) -> Fd, may_block;
    memfd_secret(flags: CLOEXEC) -> Fd, may_block;
    eventfd(initval: Size, flags: EVENTFD) -> Fd, optional(1);
    eventfd2(initval: Size, flags: EVENTFD) -> Fd;
};
