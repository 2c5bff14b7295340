//! Steps that are not left half done.

use std::future::Future;

use crate::error::{Error, Outcome, Result};
use crate::runtime;

/// Carries steps out to the last one, even if nobody waits for it any more: for what takes several
/// calls, and would leave things behind, or out of step with the process, between two of them.
pub(crate) fn to_the_end<T: Send + 'static>(
    steps: impl Future<Output = Result<T>> + Send + 'static,
) -> impl Future<Output = Result<T>> + Send {
    // They are large, and would be moved from place to place.
    let steps = Box::pin(steps);
    async move {
        match runtime::check()?.spawn(steps).await.map_err(tokio::task::JoinError::try_into_panic) {
            Ok(result) => result,
            Err(Ok(panic)) => std::panic::resume_unwind(panic),
            // The runtime is being shut down.
            Err(Err(_)) => Err(Error::Lost(Outcome::PossiblyExecuted)),
        }
    }
}
