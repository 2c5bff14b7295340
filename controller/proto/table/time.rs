//! Time, timers and signals.

use super::Shape::*;
use super::{Row, layouts, names, rows};

names! {
    /// The clocks.
    CLOCK = one {
        CLOCK_REALTIME CLOCK_MONOTONIC CLOCK_PROCESS_CPUTIME_ID CLOCK_THREAD_CPUTIME_ID CLOCK_MONOTONIC_RAW
        CLOCK_REALTIME_COARSE CLOCK_MONOTONIC_COARSE CLOCK_BOOTTIME CLOCK_REALTIME_ALARM CLOCK_BOOTTIME_ALARM
        CLOCK_TAI
    }
    TIMER = flags { TIMER_ABSTIME }
    ITIMER = one { ITIMER_REAL ITIMER_VIRTUAL ITIMER_PROF }
    TIMERFD = flags { TFD_CLOEXEC TFD_NONBLOCK }
    TIMERFD_SET = flags { TFD_TIMER_ABSTIME TFD_TIMER_CANCEL_ON_SET }
    SIGNALFD = flags { SFD_CLOEXEC SFD_NONBLOCK }
    HOW = one { SIG_BLOCK SIG_UNBLOCK SIG_SETMASK }
}

layouts! {
    /// A time in nanoseconds.
    TIMESPEC = timespec { tv_sec: Long, tv_nsec: Long }
    /// A time in microseconds.
    TIMEVAL = timeval { tv_sec: Long, tv_usec: Long }
    TIMEZONE = timezone {}
    STACK = stack_t { ss_sp: Address, ss_flags: Bits, ss_size: Size }
}

/// A timer's interval and what is left of it.
const ITIMERVAL: super::Layout = super::Layout {
    name: "itimerval",
    size: 32,
    members: &[
        super::Member { name: "it_interval.tv_sec", offset: 0, size: 8, shape: Long },
        super::Member { name: "it_interval.tv_usec", offset: 8, size: 8, shape: Long },
        super::Member { name: "it_value.tv_sec", offset: 16, size: 8, shape: Long },
        super::Member { name: "it_value.tv_usec", offset: 24, size: 8, shape: Long },
    ],
};

/// A timer's interval and what is left of it.
const ITIMERSPEC: super::Layout = super::Layout {
    name: "itimerspec",
    size: 32,
    members: &[
        super::Member { name: "it_interval.tv_sec", offset: 0, size: 8, shape: Long },
        super::Member { name: "it_interval.tv_nsec", offset: 8, size: 8, shape: Long },
        super::Member { name: "it_value.tv_sec", offset: 16, size: 8, shape: Long },
        super::Member { name: "it_value.tv_nsec", offset: 24, size: 8, shape: Long },
    ],
};

pub(super) static ROWS: &[Row] = &rows! {
    time(tloc => [Long; 1]) -> Long;
    gettimeofday(tv => [TIMEVAL; 1], tz => [TIMEZONE; 1]);
    settimeofday(tv: Struct("timeval"), tz: Struct("timezone")), may_block;
    clock_gettime(clockid: CLOCK, tp => [TIMESPEC; 1]);
    clock_settime(clockid: CLOCK, tp: Struct("timespec")), may_block;
    clock_getres(clockid: CLOCK, res => [TIMESPEC; 1]), may_block;
    clock_adjtime(clk_id: CLOCK, buf: Struct("timex")) -> Int, may_block;
    adjtimex(buf: Struct("timex")) -> Int, may_block;
    clock_nanosleep(clockid: CLOCK, flags: TIMER, request: Struct("timespec"), remain => [TIMESPEC; 1]), may_block;
    nanosleep(req: Struct("timespec"), rem => [TIMESPEC; 1]), may_block;
    alarm(seconds: Size) -> Size, may_block;
    getitimer(which: ITIMER, curr_value => [ITIMERVAL; 1]), may_block;
    setitimer(which: ITIMER, new_value: Struct("itimerval"), old_value => [ITIMERVAL; 1]), may_block;
    timer_create(clockid: CLOCK, sevp: Struct("sigevent"), timerid => [Int; 1]), may_block;
    timer_settime(timerid: Int, flags: TIMER, new_value: Struct("itimerspec"), old_value => [ITIMERSPEC; 1]),
        may_block;
    timer_gettime(timerid: Int, curr_value => [ITIMERSPEC; 1]), may_block;
    timer_getoverrun(timerid: Int) -> Int, may_block;
    timer_delete(timerid: Int), may_block;
    timerfd_create(clockid: CLOCK, flags: TIMERFD) -> Fd, may_block;
    timerfd_settime(fd: Fd, flags: TIMERFD_SET, new_value: Struct("itimerspec"), old_value => [ITIMERSPEC; 1]),
        may_block;
    timerfd_gettime(fd: Fd, curr_value => [ITIMERSPEC; 1]), may_block;
    kill(pid: Pid, sig: Signal), may_block;
    tkill(tid: Pid, sig: Signal), may_block;
    tgkill(tgid: Pid, tid: Pid, sig: Signal), may_block;
    rt_sigqueueinfo(tgid: Pid, sig: Signal, info: Struct("siginfo_t")), may_block;
    rt_tgsigqueueinfo(tgid: Pid, tid: Pid, sig: Signal, info: Struct("siginfo_t")), may_block;
    rt_sigaction(signum: Signal, act: Struct("sigaction"), oldact => [Byte; 32], sigsetsize: Size);
    rt_sigprocmask(how: HOW, set: Struct("sigset_t"), oldset => [Byte; sigsetsize], sigsetsize: Size), may_block,
        not_interrupted;
    rt_sigpending(set => [Byte; sigsetsize], sigsetsize: Size), may_block;
    rt_sigsuspend(mask: Struct("sigset_t"), sigsetsize: Size), may_block;
    rt_sigtimedwait(set: Struct("sigset_t"), info => [Byte; 128], timeout: Struct("timespec"), sigsetsize: Size)
        -> Signal, may_block;
    rt_sigreturn(), may_block;
    sigaltstack(ss: Struct("stack_t"), old_ss => [STACK; 1]), may_block;
    signalfd(fd: Fd, mask: Struct("sigset_t"), sizemask: Size) -> Fd, may_block;
    signalfd4(fd: Fd, mask: Struct("sigset_t"), sizemask: Size, flags: SIGNALFD) -> Fd, may_block;
    pause(), may_block;
    restart_syscall(), may_block;
};
