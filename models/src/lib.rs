//! Models of the ring: loom runs each claim in all orders in which two threads' accesses to the
//! memory may take effect.
//!
//! The code is `abi/src/ring.rs` itself, with loom's atomics. What stands around it in the server
//! and the controller is written down again in `claims`, as short as it can be. That the claims can
//! fail is shown with mutants: copies of the code in which one thing is wrong.

#![allow(dead_code, reason = "the models use a part of what both sides need")]
#![allow(clippy::duplicate_mod, reason = "each mutant has the claims for itself")]
#![allow(
    clippy::overly_complex_bool_expr,
    reason = "a mutant has a condition that is always or never met"
)]

#[path = "../../abi/src/bytes.rs"]
mod bytes;
#[path = "../../abi/src/handshake.rs"]
pub mod handshake;
#[path = "../../abi/src/log.rs"]
pub mod log;
#[path = "../../abi/src/ring.rs"]
pub mod ring;
#[path = "../../abi/src/wire.rs"]
pub mod wire;

mod claims;

#[cfg(test)]
mod tests {
    use super::claims;

    /// A test each.
    macro_rules! hold {
        ($($claim:ident)*) => { $(#[test] fn $claim() { claims::$claim(); })* };
    }
    hold! {
        what_is_handed_over_arrives_whole
        a_server_that_sleeps_is_woken_by_a_call
        a_controller_that_waits_is_woken_by_a_result
        both_sides_sleep_and_every_call_is_made
        a_call_that_blocks_is_interrupted
        a_call_that_completes_meanwhile_is_interrupted_or_complete
        a_call_that_has_not_begun_is_not_executed
        the_next_call_can_be_interrupted_too
        a_signal_that_never_arrives_holds_nothing_up
        a_signal_that_arrives_after_it_was_given_up_holds_nothing_up
        after_a_signal_that_was_given_up_the_next_call_can_be_interrupted
        a_call_is_either_withdrawn_or_can_be_interrupted
    }
}

/// A claim about a mutant fails, and says this. It does so in a process of its own: loom, which stops
/// threads wherever they are, may abort it.
#[cfg(test)]
fn does_not_hold(mutant: &str, name: &str, claim: fn(), says: &str) {
    const CHILD: &str = "FARCALL_MUTANT";
    if std::env::var_os(CHILD).is_some() {
        return claim();
    }
    let (_, module) = mutant.split_once("::").unwrap();
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("{module}::{name}"), "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains(says), "no `{says}`: {output:?}");
}

include!(concat!(env!("OUT_DIR"), "/mutants.rs"));
