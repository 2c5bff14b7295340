//! Directories, names of files, and what is known of files by their names.

use nix::libc;

use super::Shape::*;
use super::{Row, layouts, names, rows};

names! {
    /// What is looked up at a descriptor.
    AT = flags {
        AT_SYMLINK_NOFOLLOW AT_SYMLINK_FOLLOW AT_NO_AUTOMOUNT AT_EMPTY_PATH AT_RECURSIVE
    }
    UNLINK = flags { AT_REMOVEDIR }
    ACCESS_AT = flags { AT_EACCESS AT_SYMLINK_NOFOLLOW AT_EMPTY_PATH }
    ACCESS = flags { R_OK W_OK X_OK F_OK }
    RENAME = flags { RENAME_NOREPLACE RENAME_EXCHANGE RENAME_WHITEOUT }
    STATX_AT = flags(libc::AT_STATX_SYNC_TYPE) {
        AT_STATX_SYNC_AS_STAT AT_STATX_FORCE_SYNC AT_STATX_DONT_SYNC AT_SYMLINK_NOFOLLOW AT_NO_AUTOMOUNT
        AT_EMPTY_PATH
    }
    STATX = flags {
        STATX_ALL = 0xfff STATX_BASIC_STATS STATX_TYPE STATX_MODE STATX_NLINK STATX_UID STATX_GID STATX_ATIME
        STATX_MTIME STATX_CTIME STATX_INO STATX_SIZE STATX_BLOCKS STATX_BTIME STATX_MNT_ID STATX_DIOALIGN
        STATX_MNT_ID_UNIQUE = 0x4000 STATX_SUBVOL = 0x8000 STATX_WRITE_ATOMIC = 0x10000
        STATX_DIO_READ_ALIGN = 0x20000
    }
    HANDLE_AT = flags {
        AT_SYMLINK_FOLLOW AT_EMPTY_PATH AT_HANDLE_FID = 0x200 AT_HANDLE_MNT_ID_UNIQUE = 0x1
        AT_HANDLE_CONNECTABLE = 0x2
    }
    XATTR = flags { XATTR_CREATE XATTR_REPLACE }
}

layouts! {
    /// What stat(2) tells.
    STAT = stat {
        st_dev: Device, st_ino: Size, st_nlink: Size, st_mode: Mode, st_uid: Id, st_gid: Id, st_rdev: Device,
        st_size: Long, st_blksize: Long, st_blocks: Long, st_atime: Long, st_atime_nsec: Long, st_mtime: Long,
        st_mtime_nsec: Long, st_ctime: Long, st_ctime_nsec: Long,
    }
    STATX_BUFFER = statx {
        stx_mask: STATX, stx_blksize: Size, stx_attributes: Bits, stx_nlink: Size, stx_uid: Id, stx_gid: Id,
        stx_mode: Mode, stx_ino: Size, stx_size: Size, stx_blocks: Size, stx_attributes_mask: Bits,
        stx_rdev_major: Size, stx_rdev_minor: Size, stx_dev_major: Size, stx_dev_minor: Size, stx_mnt_id: Size,
    }
}

pub(super) static ROWS: &[Row] = &rows! {
    stat(pathname: Text, statbuf => [STAT; 1]), may_block;
    fstat(fd: Fd, statbuf => [STAT; 1]), may_block;
    lstat(pathname: Text, statbuf => [STAT; 1]), may_block;
    newfstatat(dirfd: DirFd, pathname: Text, statbuf => [STAT; 1], flags: AT), may_block;
    statx(dirfd: DirFd, pathname: Text, flags: STATX_AT, mask: STATX, statxbuf => [STATX_BUFFER; 1]), may_block;
    access(pathname: Text, mode: ACCESS), may_block;
    faccessat(dirfd: DirFd, pathname: Text, mode: ACCESS), may_block;
    faccessat2(dirfd: DirFd, pathname: Text, mode: ACCESS, flags: ACCESS_AT), may_block;
    getdents(fd: Fd, dirp => [Byte; count], count: Size) -> Size, may_block, counted;
    getdents64(fd: Fd, dirp => [Byte; count], count: Size) -> Size, may_block, counted;
    getcwd(buf => [Char; size], size: Size) -> Size, may_block, counted;
    chdir(path: Text), may_block;
    fchdir(fd: Fd), may_block;
    mkdir(pathname: Text, mode: Mode), may_block;
    mkdirat(dirfd: DirFd, pathname: Text, mode: Mode), may_block;
    rmdir(pathname: Text), may_block;
    mknod(pathname: Text, mode: Mode, dev: Device), may_block;
    mknodat(dirfd: DirFd, pathname: Text, mode: Mode, dev: Device), may_block;
    rename(oldpath: Text, newpath: Text), may_block;
    renameat(olddirfd: DirFd, oldpath: Text, newdirfd: DirFd, newpath: Text), may_block;
    renameat2(olddirfd: DirFd, oldpath: Text, newdirfd: DirFd, newpath: Text, flags: RENAME), may_block;
    link(oldpath: Text, newpath: Text), may_block;
    linkat(olddirfd: DirFd, oldpath: Text, newdirfd: DirFd, newpath: Text, flags: AT), may_block;
    symlink(target: Text, linkpath: Text), may_block;
    symlinkat(target: Text, newdirfd: DirFd, linkpath: Text), may_block;
    readlink(pathname: Text, buf => [Byte; bufsiz], bufsiz: Size) -> Size, may_block, counted;
    readlinkat(dirfd: DirFd, pathname: Text, buf => [Byte; bufsiz], bufsiz: Size) -> Size, may_block, counted;
    unlink(pathname: Text), may_block;
    unlinkat(dirfd: DirFd, pathname: Text, flags: UNLINK), may_block;
    chmod(pathname: Text, mode: Mode), may_block;
    fchmod(fd: Fd, mode: Mode), may_block;
    fchmodat(dirfd: DirFd, pathname: Text, mode: Mode), may_block;
    fchmodat2(dirfd: DirFd, pathname: Text, mode: Mode, flags: AT), may_block;
    chown(pathname: Text, owner: Id, group: Id), may_block;
    fchown(fd: Fd, owner: Id, group: Id), may_block;
    lchown(pathname: Text, owner: Id, group: Id), may_block;
    fchownat(dirfd: DirFd, pathname: Text, owner: Id, group: Id, flags: AT), may_block;
    utime(filename: Text, times: Struct("utimbuf")), may_block;
    utimes(filename: Text, times: Struct("timeval [2]")), may_block;
    futimesat(dirfd: DirFd, pathname: Text, times: Struct("timeval [2]")), may_block;
    utimensat(dirfd: DirFd, pathname: Text, times: Struct("timespec [2]"), flags: AT), may_block;
    umask(mask: Mode) -> Mode;
    name_to_handle_at(dirfd: DirFd, pathname: Text, handle: Struct("file_handle"), mount_id => [Int; 1],
        flags: HANDLE_AT), may_block;
    open_by_handle_at(mount_fd: DirFd, handle: Struct("file_handle"), flags: super::files::OPEN) -> Fd, may_block;
    setxattr(path: Text, name: Text, value: Bytes, size: Size, flags: XATTR), may_block;
    lsetxattr(path: Text, name: Text, value: Bytes, size: Size, flags: XATTR), may_block;
    fsetxattr(fd: Fd, name: Text, value: Bytes, size: Size, flags: XATTR), may_block;
    setxattrat(dfd: DirFd, pathname: Text, at_flags: AT, name: Text, uargs: Struct("xattr_args"), usize: Size),
        may_block;
    getxattr(path: Text, name: Text, value => [Byte; size], size: Size) -> Size, may_block, counted;
    lgetxattr(path: Text, name: Text, value => [Byte; size], size: Size) -> Size, may_block, counted;
    fgetxattr(fd: Fd, name: Text, value => [Byte; size], size: Size) -> Size, may_block, counted;
    getxattrat(dfd: DirFd, pathname: Text, at_flags: AT, name: Text, uargs: Struct("xattr_args"), usize: Size)
        -> Size, may_block;
    listxattr(path: Text, list => [Byte; size], size: Size) -> Size, may_block, counted;
    llistxattr(path: Text, list => [Byte; size], size: Size) -> Size, may_block, counted;
    flistxattr(fd: Fd, list => [Byte; size], size: Size) -> Size, may_block, counted;
    listxattrat(dfd: DirFd, pathname: Text, at_flags: AT, list => [Byte; size], size: Size) -> Size, may_block,
        counted;
    removexattr(path: Text, name: Text), may_block;
    lremovexattr(path: Text, name: Text), may_block;
    fremovexattr(fd: Fd, name: Text), may_block;
    removexattrat(dfd: DirFd, pathname: Text, at_flags: AT, name: Text), may_block;
    file_getattr(dfd: DirFd, filename: Text, ufattr: Struct("file_attr"), usize: Size, at_flags: AT), may_block;
    file_setattr(dfd: DirFd, filename: Text, ufattr: Struct("file_attr"), usize: Size, at_flags: AT), may_block;
    lookup_dcookie(cookie: Bits, buffer => [Char; len], len: Size) -> Size, may_block, counted;
};
