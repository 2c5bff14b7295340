//! Whether another controller has taken a process over: asked whenever a link is lost.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::handshake::Hold;
use super::home::Place;
use super::meet::{Heard, ask};
use crate::abi::handshake::Token;
use crate::call::{Past, Successor};
use crate::process::Process;

/// How long a server may be busy with a call of its new controller before it says who that is. Until
/// then calls wait for a reconnect, which is told as well.
const TIMEOUT: Duration = Duration::from_secs(60);

impl Process {
    /// From here on the end of a link that is another controller's doing is told to all calls.
    pub(super) fn watch_for_successors(&self, place: &Arc<Place>) {
        let (place, token) = (place.clone(), self.inner().token);
        let connection = self.connection.downgrade();
        self.connection.when_down(move || {
            // Until somebody asks, it is kept by those who hold it otherwise.
            let Some(connection) = connection.upgrade() else { return };
            let epoch = connection.epoch();
            let connection = connection.downgrade();
            let place = place.clone();
            tokio::spawn(async move {
                let answer = look(&place, token).await;
                if let (Some(answer), Some(connection)) = (answer, connection.upgrade()) {
                    let (successor, past) = answer;
                    connection.supersede(epoch, successor, &past);
                }
            });
        });
    }
}

/// Who holds the process, if it is somebody else.
async fn look(place: &Place, token: Token) -> Option<(Successor, Past)> {
    // A process that is gone is noticed as such.
    let Heard { hold, log } = ask(place, token, Instant::now() + TIMEOUT).await.ok()?;
    let Hold::Theirs { pid, since } = hold else { return None };
    let end = log.end_of(token, false);
    Some((Successor { pid, since: Some(since) }, Past { log, end }))
}
