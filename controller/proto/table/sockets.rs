//! Sockets.

use super::Shape::*;
use super::{Row, names, rows};

names! {
    DOMAIN = one {
        AF_UNSPEC AF_UNIX AF_INET AF_AX25 AF_IPX AF_APPLETALK AF_NETROM AF_BRIDGE AF_ATMPVC AF_X25 AF_INET6
        AF_ROSE AF_KEY AF_NETLINK AF_PACKET AF_RDS AF_PPPOX AF_LLC AF_IB AF_MPLS AF_CAN AF_TIPC AF_BLUETOOTH
        AF_IUCV AF_RXRPC AF_PHONET AF_IEEE802154 AF_CAIF AF_ALG AF_NFC AF_VSOCK AF_KCM = 41 AF_QIPCRTR = 42
        AF_SMC = 43 AF_XDP
    }
    SOCKET_TYPE = flags(0xf) {
        SOCK_STREAM SOCK_DGRAM SOCK_RAW SOCK_RDM SOCK_SEQPACKET SOCK_DCCP SOCK_PACKET = 10 SOCK_CLOEXEC SOCK_NONBLOCK
    }
    ACCEPT = flags { SOCK_CLOEXEC SOCK_NONBLOCK }
    MSG = flags {
        MSG_OOB MSG_PEEK MSG_DONTROUTE MSG_CTRUNC MSG_TRUNC MSG_DONTWAIT MSG_EOR MSG_WAITALL MSG_FIN MSG_SYN
        MSG_CONFIRM MSG_RST MSG_ERRQUEUE MSG_NOSIGNAL MSG_MORE MSG_WAITFORONE MSG_ZEROCOPY = 0x4000000
        MSG_FASTOPEN MSG_CMSG_CLOEXEC
    }
    SHUT = one { SHUT_RD SHUT_WR SHUT_RDWR }
    LEVEL = one {
        SOL_IP SOL_SOCKET SOL_TCP SOL_UDP SOL_IPV6 SOL_ICMPV6 SOL_SCTP = 132 SOL_RAW SOL_PACKET SOL_NETLINK SOL_VSOCK = 287
        SOL_MPTCP = 284 SOL_TLS SOL_ALG SOL_XDP
    }
    OPTION = one {
        SO_DEBUG SO_REUSEADDR SO_TYPE SO_ERROR SO_DONTROUTE SO_BROADCAST SO_SNDBUF SO_RCVBUF SO_KEEPALIVE
        SO_OOBINLINE SO_NO_CHECK SO_PRIORITY SO_LINGER SO_BSDCOMPAT SO_REUSEPORT SO_PASSCRED SO_PEERCRED SO_RCVLOWAT
        SO_SNDLOWAT SO_RCVTIMEO SO_SNDTIMEO SO_BINDTODEVICE SO_ATTACH_FILTER SO_DETACH_FILTER SO_PEERNAME
        SO_TIMESTAMP SO_ACCEPTCONN SO_PEERSEC SO_SNDBUFFORCE SO_PASSSEC SO_TIMESTAMPNS SO_MARK SO_TIMESTAMPING
        SO_PROTOCOL SO_DOMAIN SO_RXQ_OVFL SO_WIFI_STATUS SO_PEEK_OFF SO_NOFCS SO_LOCK_FILTER
        SO_SELECT_ERR_QUEUE SO_BUSY_POLL SO_MAX_PACING_RATE SO_BPF_EXTENSIONS SO_INCOMING_CPU SO_ATTACH_BPF
        SO_ATTACH_REUSEPORT_CBPF SO_ATTACH_REUSEPORT_EBPF SO_CNX_ADVICE SO_MEMINFO SO_INCOMING_NAPI_ID
        SO_COOKIE SO_PEERGROUPS SO_ZEROCOPY SO_TXTIME SO_BINDTOIFINDEX SO_RCVBUFFORCE SO_PEERPIDFD = 77
        SO_PASSPIDFD = 76
    }
}

pub(super) static ROWS: &[Row] = &rows! {
    socket(domain: DOMAIN, type: SOCKET_TYPE, protocol: Int) -> Fd;
    socketpair(domain: DOMAIN, type: SOCKET_TYPE, protocol: Int, sv => [Fd; 2]);
    bind(sockfd: Fd, addr: Struct("sockaddr"), addrlen: Size);
    connect(sockfd: Fd, addr: Struct("sockaddr"), addrlen: Size), may_block;
    listen(sockfd: Fd, backlog: Int);
    accept(sockfd: Fd, addr: Struct("sockaddr"), addrlen: Struct("socklen_t")) -> Fd, may_block;
    accept4(sockfd: Fd, addr: Struct("sockaddr"), addrlen: Struct("socklen_t"), flags: ACCEPT) -> Fd, may_block;
    getsockname(sockfd: Fd, addr: Struct("sockaddr"), addrlen: Struct("socklen_t"));
    getpeername(sockfd: Fd, addr: Struct("sockaddr"), addrlen: Struct("socklen_t")), may_block;
    sendto(sockfd: Fd, buf: Bytes, len: Size, flags: MSG, dest_addr: Struct("sockaddr"), addrlen: Size) -> Size,
        may_block, optional(2);
    recvfrom(sockfd: Fd, buf => [Byte; len], len: Size, flags: MSG, src_addr: Struct("sockaddr"),
        addrlen: Struct("socklen_t")) -> Size, may_block, counted, optional(2);
    sendmsg(sockfd: Fd, msg: Struct("msghdr"), flags: MSG) -> Size,
        may_block_unless("flags", nix::libc::MSG_DONTWAIT);
    recvmsg(sockfd: Fd, msg: Struct("msghdr"), flags: MSG) -> Size,
        may_block_unless("flags", nix::libc::MSG_DONTWAIT);
    sendmmsg(sockfd: Fd, msgvec: Struct("mmsghdr"), vlen: Size, flags: MSG) -> Size, may_block;
    recvmmsg(sockfd: Fd, msgvec: Struct("mmsghdr"), vlen: Size, flags: MSG, timeout: Struct("timespec")) -> Size,
        may_block;
    shutdown(sockfd: Fd, how: SHUT), may_block;
    getsockopt(sockfd: Fd, level: LEVEL, optname: OPTION, optval: Struct("int"), optlen: Struct("socklen_t"));
    setsockopt(sockfd: Fd, level: LEVEL, optname: OPTION, optval: Bytes, optlen: Size);
};
