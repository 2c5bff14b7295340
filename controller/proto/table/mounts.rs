//! Mounts, file systems, swap and quotas.

use super::Shape::*;
use super::directories::AT;
use super::{Row, commands, layouts, names, rows};

names! {
    MOUNT = flags {
        MS_RDONLY MS_NOSUID MS_NODEV MS_NOEXEC MS_SYNCHRONOUS MS_REMOUNT MS_MANDLOCK MS_DIRSYNC
        MS_NOSYMFOLLOW = 0x100 MS_NOATIME MS_NODIRATIME MS_BIND MS_MOVE MS_REC MS_SILENT MS_POSIXACL
        MS_UNBINDABLE MS_PRIVATE MS_SLAVE MS_SHARED MS_RELATIME MS_KERNMOUNT MS_I_VERSION MS_STRICTATIME
        MS_LAZYTIME MS_NOUSER MS_ACTIVE
    }
    UMOUNT = flags { MNT_FORCE MNT_DETACH MNT_EXPIRE UMOUNT_NOFOLLOW }
    OPEN_TREE = flags {
        OPEN_TREE_CLONE OPEN_TREE_CLOEXEC AT_RECURSIVE AT_EMPTY_PATH AT_SYMLINK_NOFOLLOW AT_NO_AUTOMOUNT
    }
    MOVE_MOUNT = flags {
        MOVE_MOUNT_F_SYMLINKS MOVE_MOUNT_F_AUTOMOUNTS MOVE_MOUNT_F_EMPTY_PATH MOVE_MOUNT_T_SYMLINKS
        MOVE_MOUNT_T_AUTOMOUNTS MOVE_MOUNT_T_EMPTY_PATH MOVE_MOUNT_SET_GROUP MOVE_MOUNT_BENEATH
    }
    FSOPEN = flags { FSOPEN_CLOEXEC = 0x1 }
    FSMOUNT = flags { FSMOUNT_CLOEXEC = 0x1 }
    FSPICK = flags {
        FSPICK_CLOEXEC = 0x1 FSPICK_SYMLINK_NOFOLLOW = 0x2 FSPICK_NO_AUTOMOUNT = 0x4 FSPICK_EMPTY_PATH = 0x8
    }
    MOUNT_ATTR = flags(0x70) {
        MOUNT_ATTR_RELATIME = 0x0 MOUNT_ATTR_NOATIME = 0x10 MOUNT_ATTR_STRICTATIME = 0x20 MOUNT_ATTR_RDONLY = 0x1
        MOUNT_ATTR_NOSUID = 0x2 MOUNT_ATTR_NODEV = 0x4 MOUNT_ATTR_NOEXEC = 0x8 MOUNT_ATTR_NODIRATIME = 0x80
        MOUNT_ATTR_IDMAP = 0x100000 MOUNT_ATTR_NOSYMFOLLOW = 0x200000
    }
    SWAP = flags(0x7fff) {
        SWAP_FLAG_PREFER = 0x8000 SWAP_FLAG_DISCARD = 0x10000 SWAP_FLAG_DISCARD_ONCE = 0x20000
        SWAP_FLAG_DISCARD_PAGES = 0x40000
    }
}

commands! {
    /// The command of fsconfig(2).
    FSCONFIG {
        FSCONFIG_SET_FLAG = 0 (Text);
        FSCONFIG_SET_STRING = 1 (Text, Text);
        FSCONFIG_SET_BINARY = 2 (Text, Bytes, Size);
        FSCONFIG_SET_PATH = 3 (Text, Text, DirFd);
        FSCONFIG_SET_PATH_EMPTY = 4 (Text, Text, DirFd);
        FSCONFIG_SET_FD = 5 (Text, Zero, Fd);
        FSCONFIG_CMD_CREATE = 6 ();
        FSCONFIG_CMD_RECONFIGURE = 7 ();
        FSCONFIG_CMD_CREATE_EXCL = 8 ();
    }
}

layouts! {
    /// What statfs(2) tells.
    STATFS = statfs {
        f_type: Bits, f_bsize: Long, f_blocks: Size, f_bfree: Size, f_bavail: Size, f_files: Size, f_ffree: Size,
        f_namelen: Long, f_frsize: Long,
    }
}

pub(super) static ROWS: &[Row] = &rows! {
    mount(source: Text, target: Text, filesystemtype: Text, mountflags: MOUNT, data: Text), may_block;
    umount2(target: Text, flags: UMOUNT), may_block;
    pivot_root(new_root: Text, put_old: Text), may_block;
    open_tree(dfd: DirFd, filename: Text, flags: OPEN_TREE) -> Fd, may_block;
    open_tree_attr(dfd: DirFd, filename: Text, flags: OPEN_TREE, uattr: Struct("mount_attr"), usize: Size) -> Fd,
        may_block;
    move_mount(from_dfd: DirFd, from_pathname: Text, to_dfd: DirFd, to_pathname: Text, flags: MOVE_MOUNT),
        may_block;
    fsopen(fs_name: Text, flags: FSOPEN) -> Fd, may_block;
    fsconfig(fd: Fd, cmd: FSCONFIG, key: Text, value: Address, aux: Int), may_block;
    fsmount(fs_fd: Fd, flags: FSMOUNT, attr_flags: MOUNT_ATTR) -> Fd, may_block;
    fspick(dfd: DirFd, path: Text, flags: FSPICK) -> Fd, may_block;
    mount_setattr(dirfd: DirFd, pathname: Text, flags: AT, attr: Struct("mount_attr"), size: Size), may_block;
    statmount(req: Struct("mnt_id_req"), buf => [Byte; bufsize], bufsize: Size, flags: Bits), may_block;
    listmount(req: Struct("mnt_id_req"), mnt_ids => [Long; nr_mnt_ids], nr_mnt_ids: Size, flags: Bits) -> Size,
        may_block;
    statfs(path: Text, buf => [STATFS; 1]), may_block;
    fstatfs(fd: Fd, buf => [STATFS; 1]), may_block;
    ustat(dev: Device, ubuf => [Byte; 32]), may_block;
    sysfs(option: Int, arg1: Bits, arg2: Bits) -> Long, may_block, optional(2);
    swapon(path: Text, swapflags: SWAP), may_block;
    swapoff(path: Text), may_block;
    quotactl(cmd: Bits, special: Text, id: Id, addr: Address), may_block;
    quotactl_fd(fd: Fd, cmd: Bits, id: Id, addr: Address), may_block;
};
