//! Users, groups, capabilities.

use super::Shape::*;
use super::{Row, rows};

pub(super) static ROWS: &[Row] = &rows! {
    getuid() -> Id;
    geteuid() -> Id;
    getgid() -> Id;
    getegid() -> Id;
    getresuid(ruid => [Id; 1], euid => [Id; 1], suid => [Id; 1]);
    getresgid(rgid => [Id; 1], egid => [Id; 1], sgid => [Id; 1]);
    getgroups(size: Int, list => [Id; size]) -> Size;
    setuid(uid: Id), may_block;
    setgid(gid: Id), may_block;
    setreuid(ruid: Id, euid: Id), may_block;
    setregid(rgid: Id, egid: Id), may_block;
    setresuid(ruid: Id, euid: Id, suid: Id), may_block;
    setresgid(rgid: Id, egid: Id, sgid: Id), may_block;
    setfsuid(fsuid: Id) -> Id, may_block;
    setfsgid(fsgid: Id) -> Id, may_block;
    setgroups(size: Size, list: Struct("gid_t")), may_block;
    capget(hdrp: Struct("user_cap_header"), datap: Struct("user_cap_data")), may_block;
    capset(hdrp: Struct("user_cap_header"), datap: Struct("user_cap_data")), may_block;
};
