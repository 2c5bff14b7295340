//! Commands that may have few descriptors.

use std::os::unix::process::CommandExt;

use nix::sys::resource::{Resource, setrlimit};

use super::command::{Running, farcall};
use crate::common::TestHome;

/// With fewer the dynamic loader can't open libraries. With the last one there are enough.
const LIMITS: std::ops::RangeInclusive<u64> = 4..=48;

#[test]
fn a_command_with_too_few_descriptors_says_what_to_do() {
    let test = TestHome::new();
    for most in LIMITS.step_by(2) {
        let mut command = farcall(&test, &["start", &format!("with-{most}")]);
        let limit = move || Ok(setrlimit(Resource::RLIMIT_NOFILE, most, most)?);
        // SAFETY: setrlimit(2) may be called between fork and exec.
        unsafe { command.pre_exec(limit) };
        let ran = Running::start(&mut command).finish();
        assert!(!ran.stderr.contains("panicked"), "{most}: {}", ran.stderr);
        let place = test.home.place(&format!("with-{most}").parse().unwrap());
        if ran.status.success() {
            // It is written down which process it is: whoever ends it finds it.
            assert!(place.state().is_some_and(|state| state.process.is_alive()), "{most}");
            continue;
        }
        // What a command without descriptors could not remove is a record of nobody.
        assert!(!place.state().is_some_and(|state| state.process.is_alive()), "{most}");
        assert_eq!(ran.status.code(), Some(1), "{most}: {}", ran.stderr);
        assert!(ran.stderr.contains("ulimit -n"), "{most}: {}", ran.stderr);
        assert!(most < *LIMITS.end(), "{most}: {}", ran.stderr);
    }
}
