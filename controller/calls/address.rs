//! Socket addresses, as bind(2), connect(2) and getsockname(2) have them.

use std::ffi::OsStr;
use std::mem::offset_of;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::libc::{self, sa_family_t, sockaddr_storage, sockaddr_un};
use nix::sys::socket::{
    AddressFamily, AlgAddr, LinkAddr, NetlinkAddr, SockaddrIn, SockaddrIn6, SockaddrLike,
    SockaddrStorage, UnixAddr, VsockAddr,
};

use crate::error::{Error, Result};

/// Room for any address: `struct sockaddr_storage`.
pub(crate) const ADDRESS_SIZE: usize = size_of::<sockaddr_storage>();

/// Where the path of a `struct sockaddr_un` begins.
const PATH: usize = offset_of!(sockaddr_un, sun_path);

/// The longest path or name in a `struct sockaddr_un`.
const PATH_MAX: usize = size_of::<sockaddr_un>() - PATH;

/// The address of a socket, of any family: bytes as the kernel takes and gives them.
///
/// The address types of `nix` and [`std::net::SocketAddr`] convert into it.
///
/// ```
/// use farcall::calls::SocketAddress;
///
/// let loopback: SocketAddress = std::net::SocketAddr::from(([127, 0, 0, 1], 80)).into();
/// assert_eq!(loopback.as_inet().map(|address| address.port()), Some(80));
/// let socket = SocketAddress::unix("/run/web.sock")?;
/// assert_eq!(socket.path(), Some(std::path::Path::new("/run/web.sock")));
/// # Ok::<(), farcall::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SocketAddress {
    bytes: [u8; ADDRESS_SIZE],
    len: u8,
}

impl SocketAddress {
    /// The address with these bytes, which begin with the family: `struct sockaddr`.
    ///
    /// # Errors
    ///
    /// [`Error::Misuse`] if they are more than any address has.
    pub fn from_bytes(address: &[u8]) -> Result<Self> {
        if address.len() > ADDRESS_SIZE {
            return Err(Error::Misuse {
                what: "a socket address of more than 128 bytes",
                advice: "no address family has such addresses",
            });
        }
        Ok(Self::clamped(address))
    }

    /// The address of a unix(7) socket at a path, which the target process resolves.
    ///
    /// # Errors
    ///
    /// [`Error::Misuse`] for a path that is empty, has more than 108 bytes, or a zero in it.
    pub fn unix(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().as_os_str().as_bytes();
        if path.is_empty() || path.len() > PATH_MAX || path.contains(&0) {
            return Err(Error::Misuse {
                what: "a path that no unix(7) socket can have",
                advice: "it has 1 to 108 bytes, none of them zero; a longer path is reached through the working directory or /proc/self/fd",
            });
        }
        let mut address = Self::unix_name(path);
        // The zero that ends a path, where there is room for one.
        address.len = (address.len + 1).min((PATH + PATH_MAX) as u8);
        Ok(address)
    }

    /// The abstract address of a unix(7) socket: a name without a file, in the target process's
    /// network namespace.
    ///
    /// # Errors
    ///
    /// [`Error::Misuse`] for a name of more than 107 bytes.
    pub fn unix_abstract(name: impl AsRef<[u8]>) -> Result<Self> {
        let name = name.as_ref();
        if name.len() >= PATH_MAX {
            return Err(Error::Misuse {
                what: "an abstract name that no unix(7) socket can have",
                advice: "it has at most 107 bytes",
            });
        }
        Ok(Self::unix_name(&[&[0], name].concat()))
    }

    /// The address of a unix(7) socket that has none. With bind(2) the kernel chooses an abstract
    /// one.
    #[must_use]
    pub fn unix_unnamed() -> Self {
        Self::unix_name(&[])
    }

    fn unix_name(name: &[u8]) -> Self {
        let mut address = [0; PATH + PATH_MAX];
        address[..PATH].copy_from_slice(&(libc::AF_UNIX as sa_family_t).to_ne_bytes());
        address[PATH..PATH + name.len()].copy_from_slice(name);
        Self::clamped(&address[..PATH + name.len()])
    }

    /// The address that a call has left in the first `len` bytes.
    pub(crate) fn returned(bytes: &[u8], len: u64) -> Self {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let mut address = Self::clamped(&bytes[..bytes.len().min(len)]);
        if address.family() == Some(AddressFamily::Unix) {
            // Behind the longest path the kernel tells of a zero that it does not take back.
            address.len = address.len.min((PATH + PATH_MAX) as u8);
        }
        address
    }

    fn clamped(address: &[u8]) -> Self {
        let len = address.len().min(ADDRESS_SIZE);
        let mut bytes = [0; ADDRESS_SIZE];
        bytes[..len].copy_from_slice(&address[..len]);
        Self { bytes, len: len as u8 }
    }

    /// The bytes: `struct sockaddr`.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// The address family, if it is one that `nix` has a name for.
    #[must_use]
    pub fn family(&self) -> Option<AddressFamily> {
        let family = self.as_bytes().first_chunk()?;
        AddressFamily::from_i32(i32::from(sa_family_t::from_ne_bytes(*family)))
    }

    /// The address and port, if it is one of ip(7) or ipv6(7).
    #[must_use]
    pub fn as_inet(&self) -> Option<SocketAddr> {
        let port = u16::from_be_bytes([self.bytes[2], self.bytes[3]]);
        let number = |at: usize| u32::from_ne_bytes(std::array::from_fn(|i| self.bytes[at + i]));
        match (self.family()?, self.len) {
            (AddressFamily::Inet, 16..) => {
                let ip: [u8; 4] = std::array::from_fn(|i| self.bytes[4 + i]);
                Some(SocketAddr::from((ip, port)))
            }
            (AddressFamily::Inet6, 28..) => {
                let ip: [u8; 16] = std::array::from_fn(|i| self.bytes[8 + i]);
                let address =
                    std::net::SocketAddrV6::new(ip.into(), port, number(4).to_be(), number(24));
                Some(address.into())
            }
            _ => None,
        }
    }

    /// The path of a unix(7) socket, if it has one.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        let name = self.unix_part()?;
        let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
        (end > 0).then(|| Path::new(OsStr::from_bytes(&name[..end])))
    }

    /// The abstract name of a unix(7) socket, if it has one.
    #[must_use]
    pub fn abstract_name(&self) -> Option<&[u8]> {
        self.unix_part()?.strip_prefix(&[0])
    }

    fn unix_part(&self) -> Option<&[u8]> {
        (self.family()? == AddressFamily::Unix).then(|| self.as_bytes().get(PATH..))?
    }
}

impl std::fmt::Display for SocketAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(address) = self.as_inet() {
            return write!(f, "{address}");
        }
        if let Some(path) = self.path() {
            return write!(f, "{}", path.display());
        }
        if let Some(name) = self.abstract_name() {
            return write!(f, "@{}", name.escape_ascii());
        }
        match self.family() {
            Some(AddressFamily::Unix) => f.write_str("unnamed"),
            Some(family) => write!(f, "{family:?} {}", self.as_bytes()[2..].escape_ascii()),
            None => write!(f, "{}", self.as_bytes().escape_ascii()),
        }
    }
}

impl std::fmt::Debug for SocketAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SocketAddress({self})")
    }
}

/// From an address type of `nix` that has bytes of its own. The trait `SockaddrLike` alone does not
/// say that: it is also implemented for `()`, with a null pointer.
macro_rules! from_nix {
    ($($type:ty),*) => { $(
        impl From<$type> for SocketAddress {
            fn from(address: $type) -> Self {
                Self::from(&address)
            }
        }

        impl From<&$type> for SocketAddress {
            fn from(address: &$type) -> Self {
                let (start, len) = (address.as_ptr().cast::<u8>(), address.len() as usize);
                // SAFETY: values of this type hold a kernel struct, all of which they initialise,
                // and point to it; `len` is at most its size.
                Self::clamped(unsafe { std::slice::from_raw_parts(start, len) })
            }
        }
    )* };
}

from_nix!(
    AlgAddr,
    LinkAddr,
    NetlinkAddr,
    SockaddrIn,
    SockaddrIn6,
    SockaddrStorage,
    UnixAddr,
    VsockAddr
);

impl From<SocketAddr> for SocketAddress {
    fn from(address: SocketAddr) -> Self {
        SockaddrStorage::from(address).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_each_family_come_back_as_they_were() {
        for address in ["127.0.0.1:80", "[::1]:443", "[fe80::1%7]:65535"] {
            let address: SocketAddr = address.parse().unwrap();
            assert_eq!(SocketAddress::from(address).as_inet(), Some(address));
        }
        let netlink = SocketAddress::from(NetlinkAddr::new(7, 9));
        assert_eq!(netlink.family(), Some(AddressFamily::Netlink));
        assert_eq!(netlink.as_bytes().len(), 12);
        assert_eq!((netlink.path(), netlink.as_inet()), (None, None));
    }

    #[test]
    fn paths_have_up_to_108_bytes_and_what_none_can_have_is_refused() {
        for len in [1, 107, 108] {
            let path = "x".repeat(len);
            let address = SocketAddress::unix(&path).unwrap();
            assert_eq!(address.path(), Some(Path::new(&path)));
            assert_eq!(address.as_bytes().len(), (2 + len + 1).min(110));
            // The kernel tells that of the longest one with a zero behind it.
            let told = [&address.as_bytes()[..2 + len], &[0]].concat();
            assert_eq!(SocketAddress::returned(&told, 111).path(), Some(Path::new(&path)));
        }
        for path in ["", "a\0b", &"x".repeat(109)] {
            assert!(matches!(SocketAddress::unix(path), Err(Error::Misuse { .. })));
        }
        assert!(SocketAddress::unix_abstract([1; 107]).is_ok());
        assert!(SocketAddress::unix_abstract([1; 108]).is_err());
        assert!(SocketAddress::from_bytes(&[0; 129]).is_err());
    }

    #[test]
    fn abstract_names_and_no_name_are_told_apart() {
        let named = SocketAddress::unix_abstract("a\0b").unwrap();
        assert_eq!((named.abstract_name(), named.path()), (Some(&b"a\0b"[..]), None));
        let nix = UnixAddr::new_abstract(b"a\0b").unwrap();
        assert_eq!(SocketAddress::from(nix), named);
        let unnamed = SocketAddress::unix_unnamed();
        assert_eq!((unnamed.abstract_name(), unnamed.path()), (None, None));
    }

    #[test]
    fn what_a_process_claims_of_an_address_is_cut_to_what_there_is() {
        assert_eq!(SocketAddress::returned(&[1], u64::MAX).as_bytes(), [1]);
        assert_eq!(SocketAddress::returned(&[1, 0], 0).family(), None);
        let short = SocketAddress::returned(&[2, 0, 0, 80], 4);
        assert_eq!((short.family(), short.as_inet()), (Some(AddressFamily::Inet), None));
    }
}
