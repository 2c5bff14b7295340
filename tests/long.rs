//! The group `cargo xtask test --long`: what other tests do, for minutes.

use crate::race::race;
#[cfg(feature = "cli")]
use crate::torture::nothing_is_lost_or_doubled;

#[cfg(feature = "cli")]
#[test]
#[ignore = "cargo xtask test --long"]
fn torture_of_2000_kills_with_seed_1() {
    nothing_is_lost_or_doubled(2000, 1);
}

#[cfg(feature = "cli")]
#[test]
#[ignore = "cargo xtask test --long"]
fn torture_of_2000_kills_with_seed_2() {
    nothing_is_lost_or_doubled(2000, 2);
}

/// It is printed, and `farcall torture --kills 2000 --seed SEED` decides the same again.
#[cfg(feature = "cli")]
#[test]
#[ignore = "cargo xtask test --long"]
fn torture_of_2000_kills_with_a_seed_that_is_new() {
    nothing_is_lost_or_doubled(2000, u64::from(getrandom::u32().unwrap()));
}

#[test]
#[ignore = "cargo xtask test --long"]
fn two_that_attach_ten_thousand_times_are_never_attached_both() {
    race("two_that_attach_ten_thousand_times_are_never_attached_both", false, 5_000);
}

#[test]
#[ignore = "cargo xtask test --long"]
fn two_that_take_over_ten_thousand_times_are_never_attached_both() {
    race("two_that_take_over_ten_thousand_times_are_never_attached_both", true, 5_000);
}
