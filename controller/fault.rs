//! Points at which this process can be made to die, and single things that can be made to go wrong:
//! so that `farcall torture` meets every window for certain, and is seen to notice what it is for.
//!
//! They exist in builds with the feature `faults` alone, as `cargo xtask test` makes them. There,
//! `FARCALL_FAULT=NAME:N` in the environment lets the process end with SIGKILL when it comes to point
//! NAME for the Nth time (`NAME:N:stop` stops it there with SIGSTOP), and `FARCALL_MUTANT=NAME` or
//! `NAME=VALUE` makes something go wrong. Other builds, debug builds included, do not look at these
//! variables.

/// The points, in the order in which a controller comes to them. None in a build without them.
pub const POINTS: &[&str] = if cfg!(feature = "faults") {
    &[
        "handshake.sent",
        "takeover.interrupting",
        "handshake.answered",
        "attach.mapped",
        "attach.attached",
        "keep.prepared",
        "keep.sent",
        "keep.done",
        "chain.prepared",
        "chain.sent",
        "chain.done",
        "registry.mapped",
        "registry.sent",
        "registry.entered",
        "release.found",
        "release.sent",
        "release.done",
        "ring.prepared",
        "ring.sent",
        "ring.made",
        "ring.entered",
        "ring.torn",
        "reconnect.answered",
        "reconnect.resumed",
        "reconnect.renewed",
        "reconnect.sweeping",
        "reconnect.swept",
        "detach.shut_down",
        "child.made",
        "upgrade.prepared",
        "upgrade.sent",
        "upgrade.done",
    ]
} else {
    &[]
};

/// The process comes to that point, and dies there if it is to.
#[inline(always)]
pub(crate) fn point(name: &str) {
    #[cfg(feature = "faults")]
    enabled::point(name);
    #[cfg(not(feature = "faults"))]
    let _ = name;
}

/// Whether the next [`point`] of that name is where the process dies: for what is done in another
/// way then.
#[inline(always)]
pub(crate) fn is_next(name: &str) -> bool {
    #[cfg(feature = "faults")]
    return enabled::is_next(name);
    #[cfg(not(feature = "faults"))]
    {
        let _ = name;
        false
    }
}

/// What is to go wrong, if that is it: what stands behind its name.
#[inline(always)]
pub(crate) fn mutant(name: &str) -> Option<&'static str> {
    #[cfg(feature = "faults")]
    return enabled::mutant(name);
    #[cfg(not(feature = "faults"))]
    {
        let _ = name;
        None
    }
}

#[cfg(feature = "faults")]
mod enabled {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use nix::sys::signal::{Signal, raise};

    struct Plan {
        point: String,
        stops: bool,
        /// How often it is still passed.
        left: AtomicU64,
    }

    fn plan(name: &str) -> Option<&'static Plan> {
        static PLAN: OnceLock<Option<Plan>> = OnceLock::new();
        let read = || {
            let text = std::env::var("FARCALL_FAULT").ok()?;
            let (point, count) = text.split_once(':').unwrap_or((&text, "1"));
            let (count, how) = count.split_once(':').unwrap_or((count, ""));
            let left = AtomicU64::new(count.parse().unwrap_or(1));
            Some(Plan { point: point.into(), stops: how == "stop", left })
        };
        PLAN.get_or_init(read).as_ref().filter(|plan| plan.point == name)
    }

    pub fn point(name: &str) {
        assert!(super::POINTS.contains(&name), "{name} is not in the list");
        if let Some(plan) = plan(name)
            && plan.left.fetch_sub(1, Ordering::Relaxed) == 1
        {
            let _ = raise(if plan.stops { Signal::SIGSTOP } else { Signal::SIGKILL });
        }
    }

    pub fn is_next(name: &str) -> bool {
        plan(name).is_some_and(|plan| plan.left.load(Ordering::Relaxed) == 1)
    }

    pub fn mutant(name: &str) -> Option<&'static str> {
        static MUTANT: OnceLock<Option<String>> = OnceLock::new();
        let text = MUTANT.get_or_init(|| std::env::var("FARCALL_MUTANT").ok()).as_deref()?;
        let (mutant, value) = text.split_once('=').unwrap_or((text, ""));
        (mutant == name).then_some(value)
    }
}
