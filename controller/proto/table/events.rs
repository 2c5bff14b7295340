//! Waiting for events: poll, epoll, inotify, fanotify, asynchronous input and output.

use super::Shape::*;
use super::files::OPEN;
use super::{Row, layouts, names, rows};

names! {
    EPOLL_CREATE = flags { EPOLL_CLOEXEC }
    EPOLL_CTL = one { EPOLL_CTL_ADD EPOLL_CTL_DEL EPOLL_CTL_MOD }
    EPOLL_EVENTS = flags {
        EPOLLIN EPOLLPRI EPOLLOUT EPOLLERR EPOLLHUP EPOLLRDNORM EPOLLRDBAND EPOLLWRNORM EPOLLWRBAND EPOLLMSG
        EPOLLRDHUP EPOLLEXCLUSIVE EPOLLWAKEUP EPOLLONESHOT EPOLLET
    }
    INOTIFY = flags { IN_CLOEXEC IN_NONBLOCK }
    INOTIFY_EVENTS = flags {
        IN_ALL_EVENTS IN_ACCESS IN_MODIFY IN_ATTRIB IN_CLOSE_WRITE IN_CLOSE_NOWRITE IN_OPEN IN_MOVED_FROM
        IN_MOVED_TO IN_CREATE IN_DELETE IN_DELETE_SELF IN_MOVE_SELF IN_ONLYDIR IN_DONT_FOLLOW IN_EXCL_UNLINK
        IN_MASK_CREATE IN_MASK_ADD IN_ONESHOT
    }
    FANOTIFY = flags {
        FAN_CLOEXEC FAN_NONBLOCK FAN_CLASS_CONTENT FAN_CLASS_PRE_CONTENT FAN_UNLIMITED_QUEUE
        FAN_UNLIMITED_MARKS FAN_ENABLE_AUDIT = 0x40 FAN_REPORT_PIDFD FAN_REPORT_TID FAN_REPORT_FID
        FAN_REPORT_DIR_FID FAN_REPORT_NAME FAN_REPORT_TARGET_FID FAN_REPORT_FD_ERROR = 0x2000
        FAN_REPORT_MNT = 0x4000
    }
    FANOTIFY_MARK = flags {
        FAN_MARK_ADD FAN_MARK_REMOVE FAN_MARK_DONT_FOLLOW FAN_MARK_ONLYDIR FAN_MARK_MOUNT
        FAN_MARK_IGNORED_MASK FAN_MARK_IGNORED_SURV_MODIFY FAN_MARK_FLUSH FAN_MARK_FILESYSTEM FAN_MARK_EVICTABLE
        FAN_MARK_IGNORE
    }
    FANOTIFY_EVENTS = flags {
        FAN_ACCESS FAN_MODIFY FAN_ATTRIB FAN_CLOSE_WRITE FAN_CLOSE_NOWRITE FAN_OPEN FAN_MOVED_FROM
        FAN_MOVED_TO FAN_CREATE FAN_DELETE FAN_DELETE_SELF FAN_MOVE_SELF FAN_OPEN_EXEC FAN_Q_OVERFLOW
        FAN_FS_ERROR FAN_OPEN_PERM FAN_ACCESS_PERM FAN_OPEN_EXEC_PERM FAN_PRE_ACCESS = 0x100000
        FAN_MNT_ATTACH = 0x1000000 FAN_MNT_DETACH = 0x2000000 FAN_EVENT_ON_CHILD FAN_RENAME FAN_ONDIR
    }
}

pub(super) static ROWS: &[Row] = &rows! {
    poll(fds: Struct("pollfd"), nfds: Size, timeout: Int) -> Size, may_block;
    ppoll(fds: Struct("pollfd"), nfds: Size, tmo_p: Struct("timespec"), sigmask: Struct("sigset_t"),
        sigsetsize: Size) -> Size, may_block;
    select(nfds: Int, readfds: Struct("fd_set"), writefds: Struct("fd_set"), exceptfds: Struct("fd_set"),
        timeout: Struct("timeval")) -> Size, may_block;
    pselect6(nfds: Int, readfds: Struct("fd_set"), writefds: Struct("fd_set"), exceptfds: Struct("fd_set"),
        timeout: Struct("timespec"), sigmask: Struct("sigset_t")) -> Size, may_block;
    epoll_create(size: Int) -> Fd;
    epoll_create1(flags: EPOLL_CREATE) -> Fd;
    epoll_ctl(epfd: Fd, op: EPOLL_CTL, fd: Fd, event: Struct("epoll_event"));
    epoll_wait(epfd: Fd, events => [EPOLL_EVENT; maxevents], maxevents: Int, timeout: Int) -> Size, may_block;
    epoll_pwait(epfd: Fd, events => [EPOLL_EVENT; maxevents], maxevents: Int, timeout: Int,
        sigmask: Struct("sigset_t"), sigsetsize: Size) -> Size, may_block;
    epoll_pwait2(epfd: Fd, events => [EPOLL_EVENT; maxevents], maxevents: Int, timeout: Struct("timespec"),
        sigmask: Struct("sigset_t"), sigsetsize: Size) -> Size, may_block;
    epoll_ctl_old(epfd: Fd, op: EPOLL_CTL, fd: Fd, event: Struct("epoll_event")), may_block;
    epoll_wait_old(epfd: Fd, events: Struct("epoll_event"), maxevents: Int, timeout: Int) -> Size, may_block;
    inotify_init() -> Fd;
    inotify_init1(flags: INOTIFY) -> Fd;
    inotify_add_watch(fd: Fd, pathname: Text, mask: INOTIFY_EVENTS) -> Int, may_block;
    inotify_rm_watch(fd: Fd, wd: Int), may_block;
    fanotify_init(flags: FANOTIFY, event_f_flags: OPEN) -> Fd, may_block;
    fanotify_mark(fanotify_fd: Fd, flags: FANOTIFY_MARK, mask: FANOTIFY_EVENTS, dirfd: DirFd, pathname: Text),
        may_block;
    io_setup(nr_events: Size, ctx_idp: Struct("aio_context_t")), may_block;
    io_destroy(ctx_id: Bits), may_block;
    io_getevents(ctx_id: Bits, min_nr: Long, nr: Long, events: Struct("io_event"),
        timeout: Struct("timespec")) -> Size, may_block;
    io_pgetevents(ctx_id: Bits, min_nr: Long, nr: Long, events: Struct("io_event"),
        timeout: Struct("timespec"), sigmask: Struct("sigset_t")) -> Size, may_block;
    io_submit(ctx_id: Bits, nr: Long, iocbpp: Struct("iocb *")) -> Size, may_block;
    io_cancel(ctx_id: Bits, iocb: Struct("iocb"), result: Struct("io_event")), may_block;
    io_uring_setup(entries: Size, params: Struct("io_uring_params")) -> Fd, may_block;
    io_uring_enter(fd: Fd, to_submit: Size, min_complete: Size, flags: IO_URING_ENTER, argp: Address,
        argsz: Size) -> Size, may_block;
    io_uring_register(fd: Fd, opcode: IO_URING_REGISTER, arg: Address, nr_args: Size) -> Long, may_block;
};
layouts! {
    /// What epoll_wait(2) tells.
    EPOLL_EVENT = epoll_event { events: EPOLL_EVENTS, u64: Bits }
}

names! {
    IO_URING_ENTER = flags {
        IORING_ENTER_GETEVENTS = 0x1 IORING_ENTER_SQ_WAKEUP = 0x2 IORING_ENTER_SQ_WAIT = 0x4
        IORING_ENTER_EXT_ARG = 0x8 IORING_ENTER_REGISTERED_RING = 0x10 IORING_ENTER_ABS_TIMER = 0x20
        IORING_ENTER_EXT_ARG_REG = 0x40 IORING_ENTER_NO_IOWAIT = 0x80
    }
    IO_URING_REGISTER = one {
        IORING_REGISTER_BUFFERS = 0 IORING_UNREGISTER_BUFFERS = 1 IORING_REGISTER_FILES = 2
        IORING_UNREGISTER_FILES = 3 IORING_REGISTER_EVENTFD = 4 IORING_UNREGISTER_EVENTFD = 5
        IORING_REGISTER_FILES_UPDATE = 6 IORING_REGISTER_EVENTFD_ASYNC = 7 IORING_REGISTER_PROBE = 8
        IORING_REGISTER_PERSONALITY = 9 IORING_UNREGISTER_PERSONALITY = 10 IORING_REGISTER_RESTRICTIONS = 11
        IORING_REGISTER_ENABLE_RINGS = 12 IORING_REGISTER_FILES2 = 13 IORING_REGISTER_FILES_UPDATE2 = 14
        IORING_REGISTER_BUFFERS2 = 15 IORING_REGISTER_BUFFERS_UPDATE = 16 IORING_REGISTER_IOWQ_AFF = 17
        IORING_UNREGISTER_IOWQ_AFF = 18 IORING_REGISTER_IOWQ_MAX_WORKERS = 19 IORING_REGISTER_RING_FDS = 20
        IORING_UNREGISTER_RING_FDS = 21 IORING_REGISTER_PBUF_RING = 22 IORING_UNREGISTER_PBUF_RING = 23
        IORING_REGISTER_SYNC_CANCEL = 24 IORING_REGISTER_FILE_ALLOC_RANGE = 25 IORING_REGISTER_PBUF_STATUS = 26
        IORING_REGISTER_NAPI = 27 IORING_UNREGISTER_NAPI = 28 IORING_REGISTER_CLOCK = 29
        IORING_REGISTER_CLONE_BUFFERS = 30 IORING_REGISTER_SEND_MSG_RING = 31 IORING_REGISTER_ZCRX_IFQ = 32
        IORING_REGISTER_RESIZE_RINGS = 33 IORING_REGISTER_MEM_REGION = 34
    }
}
