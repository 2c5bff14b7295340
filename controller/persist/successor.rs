//! Whether another controller has taken a process over: asked whenever a link is lost.
//!
//! It is asked until somebody knows, or another link is there: there may be no descriptor free to ask with,
//! and the server may be busy with a call of its new controller. Nothing else tells those whose calls wait
//! for a link that there will be none.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::sleep;

use super::meet::{Heard, PAUSE, ask, deadline};
use super::place::Place;
use crate::abi::handshake::Token;
use crate::link::{LinkHistory, Successor, WeakConnection};
use crate::process::Process;
use crate::proto::handshake::Hold;

/// How long at most to wait before asking again, where there is nothing to wait for.
const LONGEST: Duration = Duration::from_secs(4);

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
                let answer = tokio::select! {
                    answer = look(&place, token, &controllers) => answer,
                    () = no_longer_down(&connection, epoch) => None,
                };
                if let (Some(answer), Some(connection)) = (answer, connection.upgrade()) {
                    let (successor, past) = answer;
                    connection.supersede(epoch, successor, &past);
                }
            });
        });
    }
}

/// Returns when nobody waits any more for what comes after link `epoch`: there is another one, the process
/// is known to be dead, or the connection is given up.
async fn no_longer_down(connection: &WeakConnection, epoch: u64) {
    let Some(mut changed) = connection.upgrade().map(|connection| connection.subscribe()) else {
        return;
    };
    while connection.upgrade().is_some_and(|connection| connection.is_down_after(epoch)) {
        if changed.changed().await.is_err() {
            break;
        }
    }
}

/// Who holds the process, if it is somebody else, or has held it and is gone again: `controllers` is
/// how many there had been when this one came.
async fn look(
    place: &Place,
    token: Token,
    controllers: &AtomicU64,
) -> Option<(Successor, LinkHistory)> {
    let mut pause = PAUSE;
    let Heard { hold, log, .. } = loop {
        // However long the server is busy. Where that fails no descriptor may be free for it now; and where
        // it is closed others ask as well, and the newest of them is heard. A process that is gone is noticed
        // as such.
        if let Ok(heard) = ask(place, token, deadline(Duration::MAX)).await
            && heard.hold != Hold::Closed
        {
            break heard;
        }
        sleep(pause).await;
        pause = (2 * pause).min(LONGEST);
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
