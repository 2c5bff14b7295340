//! Whether another controller has taken a process over: asked whenever a link is lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::meet::{Heard, PAUSE, ask};
use super::place::Place;
use crate::abi::handshake::Token;
use crate::link::{LinkHistory, Successor};
use crate::process::Process;
use crate::proto::handshake::Hold;

/// How long a server may be busy with a call of its new controller before it says who that is. Until
/// then calls wait for a reconnect, which is told as well.
const TIMEOUT: Duration = Duration::from_secs(60);

impl Process {
    /// From here on the end of a link that is another controller's doing is told to all calls.
    pub(super) fn watch_for_successors(&self, place: &Arc<Place>) {
        let (place, token) = (place.clone(), self.inner().token);
        let controllers = self.inner().controllers.clone();
        let connection = self.connection.downgrade();
        self.connection.when_down(move || {
            // Until somebody asks, it is kept by those who hold it otherwise.
            let Some(connection) = connection.upgrade() else { return };
            let epoch = connection.epoch();
            let connection = connection.downgrade();
            let (place, controllers) = (place.clone(), controllers.clone());
            tokio::spawn(async move {
                let answer = look(&place, token, &controllers).await;
                if let (Some(answer), Some(connection)) = (answer, connection.upgrade()) {
                    let (successor, past) = answer;
                    connection.supersede(epoch, successor, &past);
                }
            });
        });
    }
}

/// Who holds the process, if it is somebody else, or has held it and is gone again: `controllers` is
/// how many there had been when this one came.
async fn look(
    place: &Place,
    token: Token,
    controllers: &AtomicU64,
) -> Option<(Successor, LinkHistory)> {
    let limit = Instant::now() + TIMEOUT;
    let mut pause = PAUSE;
    let Heard { hold, log, .. } = loop {
        // A process that is gone is noticed as such.
        let heard = ask(place, token, limit).await.ok()?;
        if !matches!(heard.hold, Hold::Closed) || Instant::now() > limit {
            break heard;
        }
        // Others ask as well, and the newest of them is heard.
        sleep(pause).await;
        pause *= 2;
    };
    let number = controllers.load(Ordering::Relaxed);
    let successor = match hold {
        Hold::Theirs { pid, since } => Successor { pid, since: Some(since) },
        Hold::Nobody { .. } if log.head.controllers != number => {
            Successor { pid: None, since: None }
        }
        _ => return None,
    };
    let end = log.end_of(token, number);
    Some((successor, LinkHistory { log, end, held: true }))
}
