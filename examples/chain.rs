//! Calls that travel together: each of these is one round trip, whatever the latency.
//!
//! `cargo run --example chain`

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;

use farcall::{Local, Result};
use nix::fcntl::OFlag;
use nix::libc::{SO_REUSEADDR, SOL_SOCKET};
use nix::mount::MsFlags;
use nix::sched::CloneFlags;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn};
use nix::sys::stat::Mode;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let root = Local::new().start().await?;

    // A file: path in, content out.
    let mut chain = root.chain();
    let file = chain.openat(None, "/etc/hostname", OFlag::O_RDONLY, Mode::empty());
    let content = chain.read(file, 4096);
    chain.unlinked().close(file);
    let mut done = chain.run().await?;
    let content = String::from_utf8_lossy(&done.bytes(content)?).trim_end().to_owned();
    println!("/etc/hostname: {content:?}, {} round trip", done.round_trips());

    // A listening socket, and the port that it got.
    let mut chain = root.chain();
    let socket = chain.socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty());
    chain.setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, 1);
    chain.bind(socket, SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)));
    chain.listen(socket, 16);
    let address = chain.getsockname(socket);
    let mut done = chain.run().await?;
    println!("listening on {}, {} round trip", done.address(address)?, done.round_trips());

    // A mount namespace, in a child of its own. Needs privileges.
    let child = root.child().spawn().await?;
    let mut chain = child.chain();
    chain.unshare(CloneFlags::CLONE_NEWNS);
    chain.mount(None, "/", None, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None);
    chain.mount(Some(Path::new("none")), "/mnt", Some("tmpfs"), MsFlags::empty(), None);
    chain.chdir("/mnt");
    match chain.run().await {
        Ok(done) => println!("a tmpfs on /mnt for one process, {} round trip", done.round_trips()),
        Err(error) => println!("no mount namespace: {error}"),
    }
    Ok(())
}
