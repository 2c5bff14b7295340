//! Fault points and mutants of controllers: see controller/fault.rs.

use std::process::Command;

/// Lets a controller die or stop at a point: `NAME:N` or `NAME:N:stop`.
pub fn with_fault<'c>(command: &'c mut Command, point: &str) -> &'c mut Command {
    assert_there_are_faults();
    command.env("FARCALL_FAULT", point)
}

/// Lets something go wrong in a controller: `NAME` or `NAME=VALUE`.
pub fn with_mutant<'c>(command: &'c mut Command, mutant: &str) -> &'c mut Command {
    assert_there_are_faults();
    command.env("FARCALL_MUTANT", mutant)
}

/// Without the feature nothing would happen, and a test could pass that has shown nothing.
fn assert_there_are_faults() {
    if !cfg!(feature = "faults") {
        panic!("this test is run with --features faults");
    }
}
