//! Message queues, semaphores and memory of System V and of POSIX.

use super::Shape::*;
use super::files::OPEN;
use super::{Row, commands, layouts, names, rows};

names! {
    KEY = one { IPC_PRIVATE }
    GET = flags(0o777) { IPC_CREAT IPC_EXCL IPC_NOWAIT }
    SHMGET = flags(0o777) { IPC_CREAT IPC_EXCL SHM_HUGETLB SHM_NORESERVE = 0o10000 }
    SHMAT = flags { SHM_RDONLY SHM_RND SHM_REMAP SHM_EXEC }
    MESSAGE = flags { IPC_NOWAIT MSG_NOERROR MSG_EXCEPT MSG_COPY }
}

commands! {
    /// The command of shmctl(2).
    SHMCTL {
        IPC_RMID(Address);
        IPC_SET(Struct("shmid_ds"));
        IPC_STAT(Struct("shmid_ds"));
        IPC_INFO(Struct("shminfo")) -> Int;
        SHM_LOCK(Address);
        SHM_UNLOCK(Address);
        SHM_STAT = 13 (Struct("shmid_ds")) -> Int;
        SHM_INFO = 14 (Struct("shm_info")) -> Int;
        SHM_STAT_ANY = 15 (Struct("shmid_ds")) -> Int;
    }
}

commands! {
    /// The command of semctl(2).
    SEMCTL {
        IPC_RMID();
        IPC_SET(Struct("semid_ds"));
        IPC_STAT(Struct("semid_ds"));
        IPC_INFO(Struct("seminfo")) -> Int;
        GETPID() -> Pid;
        GETVAL() -> Int;
        GETALL(Struct("unsigned short"));
        GETNCNT() -> Int;
        GETZCNT() -> Int;
        SETVAL(Int);
        SETALL(Struct("unsigned short"));
        SEM_STAT(Struct("semid_ds")) -> Int;
        SEM_INFO(Struct("seminfo")) -> Int;
        SEM_STAT_ANY(Struct("semid_ds")) -> Int;
    }
}

commands! {
    /// The command of msgctl(2).
    MSGCTL {
        IPC_RMID(Address);
        IPC_SET(Struct("msqid_ds"));
        IPC_STAT(Struct("msqid_ds"));
        IPC_INFO(Struct("msginfo")) -> Int;
        MSG_STAT(Struct("msqid_ds")) -> Int;
        MSG_INFO(Struct("msginfo")) -> Int;
        MSG_STAT_ANY = 13 (Struct("msqid_ds")) -> Int;
    }
}

layouts! {
    /// The attributes of a message queue.
    MQ_ATTR = mq_attr { mq_flags: Long, mq_maxmsg: Long, mq_msgsize: Long, mq_curmsgs: Long }
}

pub(super) static ROWS: &[Row] = &rows! {
    shmget(key: KEY, size: Size, shmflg: SHMGET) -> Int, may_block;
    shmat(shmid: Int, shmaddr: Address, shmflg: SHMAT) -> Address, may_block;
    shmdt(shmaddr: Address), may_block;
    shmctl(shmid: Int, cmd: SHMCTL, buf: Address) -> Int, may_block;
    semget(key: KEY, nsems: Int, semflg: GET) -> Int, may_block;
    semop(semid: Int, sops: Struct("sembuf"), nsops: Size), may_block;
    semtimedop(semid: Int, sops: Struct("sembuf"), nsops: Size, timeout: Struct("timespec")), may_block;
    semctl(semid: Int, semnum: Int, cmd: SEMCTL, arg: Bits) -> Int, may_block, optional(1);
    msgget(key: KEY, msgflg: GET) -> Int, may_block;
    msgsnd(msqid: Int, msgp: Struct("msgbuf"), msgsz: Size, msgflg: MESSAGE), may_block;
    msgrcv(msqid: Int, msgp: Struct("msgbuf"), msgsz: Size, msgtyp: Long, msgflg: MESSAGE) -> Size, may_block;
    msgctl(msqid: Int, cmd: MSGCTL, buf: Address) -> Int, may_block;
    mq_open(name: Text, oflag: OPEN, mode: Mode, attr: Struct("mq_attr")) -> Fd, may_block, optional(2);
    mq_unlink(name: Text), may_block;
    mq_timedsend(mqdes: Fd, msg_ptr: Bytes, msg_len: Size, msg_prio: Size, abs_timeout: Struct("timespec")),
        may_block;
    mq_timedreceive(mqdes: Fd, msg_ptr => [Byte; msg_len], msg_len: Size, msg_prio => [Int; 1],
        abs_timeout: Struct("timespec")) -> Size, may_block, counted;
    mq_notify(mqdes: Fd, sevp: Struct("sigevent")), may_block;
    mq_getsetattr(mqdes: Fd, newattr: Struct("mq_attr"), oldattr => [MQ_ATTR; 1]), may_block;
};
