//! Memory: mappings, protection, policies, and what processes share.

use nix::libc;

use super::Shape::*;
use super::{Row, commands, names, rows};

names! {
    PROT = flags { PROT_READ PROT_WRITE PROT_EXEC PROT_SEM = 0x8 PROT_GROWSDOWN PROT_GROWSUP PROT_NONE }
    MAP = flags(libc::MAP_TYPE) {
        MAP_SHARED MAP_PRIVATE MAP_SHARED_VALIDATE MAP_FIXED MAP_ANONYMOUS MAP_32BIT MAP_GROWSDOWN MAP_DENYWRITE
        MAP_EXECUTABLE MAP_LOCKED MAP_NORESERVE MAP_POPULATE MAP_NONBLOCK MAP_STACK MAP_HUGETLB MAP_SYNC
        MAP_FIXED_NOREPLACE
    }
    MREMAP = flags { MREMAP_MAYMOVE MREMAP_FIXED MREMAP_DONTUNMAP }
    MSYNC = flags { MS_ASYNC MS_INVALIDATE MS_SYNC }
    ADVICE = one {
        MADV_NORMAL MADV_RANDOM MADV_SEQUENTIAL MADV_WILLNEED MADV_DONTNEED MADV_FREE MADV_REMOVE MADV_DONTFORK
        MADV_DOFORK MADV_MERGEABLE MADV_UNMERGEABLE MADV_HUGEPAGE MADV_NOHUGEPAGE MADV_DONTDUMP MADV_DODUMP
        MADV_WIPEONFORK MADV_KEEPONFORK MADV_COLD MADV_PAGEOUT MADV_POPULATE_READ MADV_POPULATE_WRITE
        MADV_DONTNEED_LOCKED MADV_COLLAPSE MADV_HWPOISON MADV_SOFT_OFFLINE MADV_GUARD_INSTALL = 102
        MADV_GUARD_REMOVE = 103
    }
    MLOCKALL = flags { MCL_CURRENT MCL_FUTURE MCL_ONFAULT }
    MLOCK2 = flags { MLOCK_ONFAULT }
    PKEY = flags { PKEY_DISABLE_ACCESS = 0x1 PKEY_DISABLE_WRITE = 0x2 }
    POLICY = flags(0xfff) {
        MPOL_DEFAULT = 0 MPOL_PREFERRED = 1 MPOL_BIND = 2 MPOL_INTERLEAVE = 3 MPOL_LOCAL = 4
        MPOL_PREFERRED_MANY = 5 MPOL_WEIGHTED_INTERLEAVE = 6 MPOL_F_STATIC_NODES = 0x8000
        MPOL_F_RELATIVE_NODES = 0x4000 MPOL_F_NUMA_BALANCING = 0x2000
    }
    GET_POLICY = flags { MPOL_F_NODE = 0x1 MPOL_F_ADDR = 0x2 MPOL_F_MEMS_ALLOWED = 0x4 }
    BIND = flags { MPOL_MF_STRICT = 0x1 MPOL_MF_MOVE = 0x2 MPOL_MF_MOVE_ALL = 0x4 }
    USERFAULTFD = flags { UFFD_USER_MODE_ONLY = 0x1 O_CLOEXEC O_NONBLOCK }
    MEMBARRIER = one {
        MEMBARRIER_CMD_QUERY = 0 MEMBARRIER_CMD_GLOBAL = 1 MEMBARRIER_CMD_GLOBAL_EXPEDITED = 2
        MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED = 4 MEMBARRIER_CMD_PRIVATE_EXPEDITED = 8
        MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED = 16 MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE = 32
        MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE = 64 MEMBARRIER_CMD_PRIVATE_EXPEDITED_RSEQ = 128
        MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_RSEQ = 256 MEMBARRIER_CMD_GET_REGISTRATIONS = 512
    }
    MEMBARRIER_FLAGS = flags { MEMBARRIER_CMD_FLAG_CPU = 0x1 }
    SHADOW_STACK = flags { SHADOW_STACK_SET_TOKEN = 0x1 }
    FUTEX2 = flags(0x3) {
        FUTEX2_SIZE_U8 = 0x0 FUTEX2_SIZE_U16 = 0x1 FUTEX2_SIZE_U32 = 0x2 FUTEX2_SIZE_U64 = 0x3 FUTEX2_NUMA = 0x4
        FUTEX2_MPOL = 0x8 FUTEX2_PRIVATE = 0x80
    }
    RSEQ = flags { RSEQ_FLAG_UNREGISTER = 0x1 }
}

commands! {
    /// The operation of futex(2).
    FUTEX | FUTEX_PRIVATE_FLAG | FUTEX_CLOCK_REALTIME {
        FUTEX_WAIT(Size, Struct("timespec"));
        FUTEX_WAKE(Size) -> Size;
        FUTEX_FD(Signal) -> Fd;
        FUTEX_REQUEUE(Size, Size, Address) -> Size;
        FUTEX_CMP_REQUEUE(Size, Size, Address, Size) -> Size;
        FUTEX_WAKE_OP(Size, Size, Address, Bits) -> Size;
        FUTEX_LOCK_PI(Size, Struct("timespec"));
        FUTEX_UNLOCK_PI();
        FUTEX_TRYLOCK_PI();
        FUTEX_WAIT_BITSET(Size, Struct("timespec"), Address, Bits);
        FUTEX_WAKE_BITSET(Size, Zero, Zero, Bits) -> Size;
        FUTEX_WAIT_REQUEUE_PI(Size, Struct("timespec"), Address);
        FUTEX_CMP_REQUEUE_PI(Size, Size, Address, Size) -> Size;
        FUTEX_LOCK_PI2(Size, Struct("timespec"));
    }
}

pub(super) static ROWS: &[Row] = &rows! {
    mmap(addr: Address, length: Size, prot: PROT, flags: MAP, fd: Fd, offset: Bits) -> Address;
    mprotect(addr: Address, len: Size, prot: PROT);
    munmap(addr: Address, length: Size);
    mremap(old_address: Address, old_size: Size, new_size: Size, flags: MREMAP, new_address: Address) -> Address,
        may_block, optional(1);
    brk(addr: Address) -> Address, may_block;
    msync(addr: Address, length: Size, flags: MSYNC), may_block;
    mincore(addr: Address, length: Size, vec: Struct("unsigned char")), may_block;
    madvise(addr: Address, length: Size, advice: ADVICE), may_block;
    process_madvise(pidfd: Fd, iovec: Struct("iovec"), vlen: Size, advice: ADVICE, flags: Bits) -> Size,
        may_block;
    mlock(addr: Address, len: Size), may_block;
    mlock2(addr: Address, len: Size, flags: MLOCK2), may_block;
    munlock(addr: Address, len: Size), may_block;
    mlockall(flags: MLOCKALL), may_block;
    munlockall(), may_block;
    mseal(addr: Address, len: Size, flags: Bits), may_block;
    remap_file_pages(addr: Address, size: Size, prot: PROT, pgoff: Size, flags: MAP), may_block;
    pkey_alloc(flags: Bits, access_rights: PKEY) -> Int, may_block;
    pkey_free(pkey: Int), may_block;
    pkey_mprotect(addr: Address, len: Size, prot: PROT, pkey: Int), may_block;
    mbind(addr: Address, len: Size, mode: POLICY, nodemask: Struct("unsigned long"), maxnode: Size, flags: BIND),
        may_block;
    set_mempolicy(mode: POLICY, nodemask: Struct("unsigned long"), maxnode: Size), may_block;
    get_mempolicy(mode => [Int; 1], nodemask: Struct("unsigned long"), maxnode: Size, addr: Address,
        flags: GET_POLICY), may_block;
    set_mempolicy_home_node(start: Address, len: Size, home_node: Size, flags: Bits), may_block;
    migrate_pages(pid: Pid, maxnode: Size, old_nodes: Struct("unsigned long"), new_nodes: Struct("unsigned long"))
        -> Size, may_block;
    move_pages(pid: Pid, count: Size, pages: Struct("void *"), nodes: Struct("int"), status: Struct("int"),
        flags: BIND) -> Size, may_block;
    process_vm_readv(pid: Pid, local_iov: Struct("iovec"), liovcnt: Size, remote_iov: Struct("iovec"),
        riovcnt: Size, flags: Bits) -> Size, may_block;
    process_vm_writev(pid: Pid, local_iov: Struct("iovec"), liovcnt: Size, remote_iov: Struct("iovec"),
        riovcnt: Size, flags: Bits) -> Size, may_block;
    userfaultfd(flags: USERFAULTFD) -> Fd, may_block;
    membarrier(cmd: MEMBARRIER, flags: MEMBARRIER_FLAGS, cpu_id: Int) -> Long, may_block, optional(1);
    map_shadow_stack(addr: Address, size: Size, flags: SHADOW_STACK) -> Address, may_block;
    futex(uaddr: Address, futex_op: FUTEX, val: Size, timeout: Address, uaddr2: Address, val3: Bits) -> Long,
        may_block;
    futex_wait(uaddr: Address, val: Size, mask: Bits, flags: FUTEX2, timeout: Struct("timespec"),
        clockid: super::time::CLOCK), may_block;
    futex_wake(uaddr: Address, mask: Bits, nr: Int, flags: FUTEX2) -> Size, may_block;
    futex_requeue(waiters: Struct("futex_waitv"), flags: Bits, nr_wake: Int, nr_requeue: Int) -> Size, may_block;
    futex_waitv(waiters: Struct("futex_waitv"), nr_futexes: Size, flags: Bits, timeout: Struct("timespec"),
        clockid: super::time::CLOCK) -> Size, may_block;
    set_robust_list(head: Struct("robust_list_head"), len: Size), may_block;
    get_robust_list(pid: Pid, head_ptr => [Address; 1], len_ptr => [Long; 1]), may_block;
    rseq(rseq: Struct("rseq"), rseq_len: Size, flags: RSEQ, sig: Bits), may_block;
    set_thread_area(u_info: Struct("user_desc")), may_block;
    get_thread_area(u_info: Struct("user_desc")), may_block;
    modify_ldt(func: Int, ptr: Address, bytecount: Size) -> Size, may_block;
};
