//! The handshake's I/O: connecting to the listening socket, and waiting for the answer.

use std::future::Future;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, getsockopt, sendmsg, socket,
    sockopt,
};
use nix::unistd::geteuid;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::attach::refused;
use super::condition::why_silent;
use super::knock::Knock;
use super::place::Place;
use super::target::Standing;
use crate::abi::handshake::{ANSWER_SIZE, HELLO_SIZE, Token};
use crate::descriptor::off_standard_streams;
use crate::error::{Error, Result};
use crate::fault;
use crate::process::Sockets;
use crate::proto::handshake::{self, Answered, Arriving, Hold};
use crate::proto::log::Log;

/// How long a server that does not answer is given before NAME.json is asked who holds it.
const PATIENCE: Duration = Duration::from_millis(500);

/// How often a handshake is tried again that was closed.
const TRIES: u32 = 4;

/// The most bytes of an answer with all that may be behind it.
const MOST: usize = 16 << 20;

/// How long to wait before the next try, where there is nothing to wait for.
pub(super) const PAUSE: Duration = Duration::from_millis(20);

/// The instant that is so far away, or so far that nobody waits for it.
pub(super) fn deadline(timeout: Duration) -> Instant {
    /// Instants can't be told for all of time.
    const FAR: Duration = Duration::from_secs(10 * 365 * 86_400);
    Instant::now() + timeout.min(FAR)
}

/// As whom to come, and how.
#[derive(Clone, Copy)]
pub(super) struct Manner {
    pub(super) token: Token,
    /// Whoever else holds the process loses it.
    pub(super) take_over: bool,
    /// The byte of the registry from which on it is to be told.
    pub(super) names: Option<u64>,
}

impl Manner {
    /// As the controller that holds the process, or held it last.
    pub(super) fn again(token: Token) -> Self {
        Self { token, take_over: false, names: None }
    }

    fn hello(self) -> [u8; HELLO_SIZE] {
        match self.names {
            Some(from) => handshake::asking_for_names(self.token, from),
            None => handshake::hello(self.token, self.take_over),
        }
    }
}

/// What a server answered.
pub(super) struct Heard {
    pub(super) hold: Hold,
    /// What it has executed last.
    pub(super) log: Log,
    /// What was connected to.
    pub(super) standing: Option<Standing>,
}

/// Connects, shakes hands, and waits for the answer. Somebody else's hold is returned as such only
/// if that somebody lives: a dead one's is about to end.
pub(super) async fn meet(
    place: &Place,
    how: Manner,
    sockets: &Sockets,
    timeout: Duration,
) -> Result<Heard> {
    let begin = Instant::now();
    let end = deadline(timeout);
    let mut tries = TRIES;
    loop {
        let heard = meet_once(place, how, sockets, end).await?;
        match heard.hold {
            // Somebody else may have come at the same moment.
            Hold::Closed if tries > 0 => {
                tries -= 1;
                sleep(PAUSE).await;
            }
            Hold::Theirs { pid, .. } if holder_is_dead(place, pid) && Instant::now() < end => {
                // It ends when the kernel has closed what the dead one had, unless somebody else has it.
                if begin.elapsed() > PATIENCE && !place.heirs().is_empty() {
                    return Ok(heard);
                }
                sleep(PAUSE).await;
            }
            _ => return Ok(heard),
        }
    }
}

/// Whether the controller with that pid, by what NAME.json knows of it, has died.
pub(super) fn holder_is_dead(place: &Place, pid: Option<i32>) -> bool {
    place
        .state()
        .and_then(|state| state.holder)
        .is_some_and(|holder| pid.is_none_or(|pid| pid == holder.pid) && holder.is_gone())
}

async fn meet_once(place: &Place, how: Manner, sockets: &Sockets, end: Instant) -> Result<Heard> {
    let (client, standing) = connect_to(place, end).await?;
    let heard = shake_hands(place, how, sockets, client, end).await?;
    Ok(Heard { standing: Some(standing), ..heard })
}

/// The handshake over a connected socket.
pub(super) async fn shake_hands(
    place: &Place,
    how: Manner,
    sockets: &Sockets,
    client: OwnedFd,
    end: Instant,
) -> Result<Heard> {
    let fds = [sockets.stream_there.as_raw_fd(), sockets.data_there.as_raw_fd()];
    let Some(client) = say_hello(place, how, &fds, client)? else {
        return Ok(Answered::closed().into());
    };
    fault::point("handshake.sent");
    let answer = read_answer(&client);
    tokio::pin!(answer);
    let patience = end.min(Instant::now() + PATIENCE);
    let answered = match timeout_at(patience, &mut answer).await {
        Ok(answered) => answered,
        Err(_) if how.take_over => {
            let answered = timeout_at(end, interrupting(place, &client, &mut answer)).await;
            answered.map_err(|_| no_answer(place))?
        }
        Err(_) => {
            if let Some(state) = place.state()
                && let Some(holder) = state.holder
                && holder.is_alive()
                && holder.pid != std::process::id() as i32
            {
                let hold = Hold::Theirs { pid: Some(holder.pid), since: state.since };
                return Ok(Heard { hold, log: Log::default(), standing: None });
            }
            timeout_at(end, &mut answer).await.map_err(|_| no_answer(place))?
        }
    };
    fault::point("handshake.answered");
    Ok(answered.unwrap_or_else(|_| Answered::closed()).into())
}

/// Sends the handshake, with these descriptors. `None`: the server has closed it already.
fn say_hello(
    place: &Place,
    how: Manner,
    fds: &[RawFd],
    client: OwnedFd,
) -> Result<Option<UnixStream>> {
    let owner =
        getsockopt(&client, sockopt::PeerCredentials).map_err(Error::local("getsockopt"))?;
    if !geteuid().is_root() && owner.uid() != geteuid().as_raw() {
        return Err(refused(
            place,
            format!("it belongs to uid {}: only that user, or root, may attach", owner.uid()),
        ));
    }
    let hello = how.hello();
    let rights = [ControlMessage::ScmRights(fds)];
    // A fresh socket's buffer takes it as a whole.
    let sent = sendmsg::<()>(
        client.as_raw_fd(),
        &[IoSlice::new(&hello)],
        if fds.is_empty() { &[] } else { &rights },
        MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
        None,
    );
    match sent {
        Err(Errno::EPIPE | Errno::ECONNRESET) => Ok(None),
        Err(errno) => Err(Error::local("sendmsg")(errno)),
        Ok(_) => UnixStream::from_std(client.into()).map(Some).map_err(Error::io("attaching")),
    }
}

/// Asks, without attaching, who holds the process and what it has executed last. Waits until the
/// server has time to answer.
pub(super) async fn ask(place: &Place, token: Token, end: Instant) -> Result<Heard> {
    let answered = asked(place, Manner::again(token), end, read_answer).await?;
    Ok(answered.unwrap_or_else(|_| Answered::closed()).into())
}

/// Asks for the registry from that byte on. What comes is an answer, the log, and a part of the registry,
/// of which the first byte may be the last; nothing if the server closes the connection.
pub(super) async fn ask_for_names(
    place: &Place,
    token: Token,
    from: u64,
    end: Instant,
) -> Result<Vec<u8>> {
    let how = Manner { names: Some(from), ..Manner::again(token) };
    asked(place, how, end, read_to_the_end).await.map(io::Result::unwrap_or_default)
}

/// Sends a handshake without descriptors, and reads what is answered; again if that fails.
async fn asked<T>(
    place: &Place,
    how: Manner,
    end: Instant,
    read: impl AsyncFn(&UnixStream) -> io::Result<T>,
) -> Result<io::Result<T>> {
    let mut tries = TRIES;
    loop {
        let (client, _) = connect_to(place, end).await?;
        let answered = match say_hello(place, how, &[], client)? {
            Some(client) => timeout_at(end, read(&client)).await,
            None => Ok(Err(io::ErrorKind::BrokenPipe.into())),
        };
        match answered {
            Ok(Err(_)) if tries > 0 => {
                tries -= 1;
                sleep(PAUSE).await;
            }
            Ok(answered) => return Ok(answered),
            Err(_) => return Err(no_answer(place)),
        }
    }
}

/// All that comes, of which a server sends no more at once than fits into a socket.
async fn read_to_the_end(stream: &UnixStream) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while bytes.len() < MOST {
        stream.readable().await?;
        match stream.try_read_buf(&mut bytes) {
            Ok(0) if bytes.len() < ANSWER_SIZE => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(0) => break,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // It has closed the socket with bytes of ours unread.
            Err(error) if bytes.len() < ANSWER_SIZE => return Err(error),
            Err(_) => break,
        }
    }
    Ok(bytes)
}

pub(super) fn no_answer(place: &Place) -> Error {
    refused(place, format!("no answer: {}", why_silent(place)))
}

impl From<Answered> for Heard {
    fn from(Answered { hold, log }: Answered) -> Self {
        Self { hold, log, standing: None }
    }
}

/// Waits for the answer of a server that is blocked in a call of the controller before: interrupts
/// the call, until there is one.
///
/// The signal has a handler in a server, which does nothing: only the call returns. It may come just
/// before the call begins, so once is not enough. None comes once the server has answered: see [`Knock`].
async fn interrupting<T>(
    place: &Place,
    client: &UnixStream,
    answer: &mut (impl Future<Output = T> + Unpin),
) -> T {
    let mut knock = None;
    loop {
        knock = knock.or_else(|| Some(Knock::new(place.target_of(client).ok()?, client)));
        if let Some(knock) = &knock {
            fault::point("takeover.interrupting");
            // Where that is not allowed, the call may end by itself.
            let _ = knock.knock();
        }
        if let Ok(answered) = timeout(PAUSE, &mut *answer).await {
            return answered;
        }
    }
}

/// The answer, and the log behind it. The error is how the connection ended without one.
async fn read_answer(stream: &UnixStream) -> io::Result<Answered> {
    let mut arriving = Arriving::default();
    let over = loop {
        stream.readable().await?;
        match stream.try_read_buf(arriving.buffer()) {
            Ok(0) => break io::ErrorKind::UnexpectedEof.into(),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => break error,
        }
        if let Some(answered) = arriving.whole() {
            return Ok(answered);
        }
    };
    let is_broken = over.kind() != io::ErrorKind::UnexpectedEof;
    match arriving.end(is_broken) {
        Answered { hold: Hold::Closed, .. } => Err(over),
        answered => Ok(answered),
    }
}

/// Connects to the listening socket. Its backlog may be full for a while.
async fn connect_to(place: &Place, end: Instant) -> Result<(OwnedFd, Standing)> {
    loop {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let client = socket(AddressFamily::Unix, SockType::Stream, flags, None)
            .map_err(Error::local("socket"))?;
        let client = off_standard_streams(client).map_err(Error::io("dup"))?;
        let error = match place.connect(&client) {
            Ok(standing) => return Ok((client, standing)),
            Err(error) => error,
        };
        let reason = match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EAGAIN) if Instant::now() < end => {
                sleep(PAUSE).await;
                continue;
            }
            Some(Errno::ENOENT) => {
                place.why_lost().unwrap_or_else(|| "there is no such persistent process".into())
            }
            Some(Errno::ECONNREFUSED) => "its process is gone".into(),
            Some(Errno::EACCES) => "it is another user's".into(),
            Some(Errno::EAGAIN) => "too many others wait to attach".into(),
            Some(errno) => errno.desc().into(),
            None => error.to_string(),
        };
        return Err(refused(place, reason));
    }
}
