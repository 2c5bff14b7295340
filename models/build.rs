//! Copies of `abi/src/ring.rs`, each with one thing wrong, as tests that have to fail.

use std::fmt::Write;
use std::path::Path;
use std::{env, fs};

/// What is wrong: in which function, what is replaced by what, the claim that does not hold then, and
/// a part of what is said about it.
struct Mutant {
    function: &'static str,
    from: &'static str,
    to: &'static str,
    claim: &'static str,
    says: &'static str,
}

const FENCE: &str = "fence(Ordering::SeqCst)";
/// As strong as what orders no store before a later load.
const WEAK_FENCE: &str = "fence(Ordering::AcqRel)";
const DEADLOCK: &str = "deadlock";

const fn weak_fence(function: &'static str, claim: &'static str, says: &'static str) -> Mutant {
    Mutant { function, from: FENCE, to: WEAK_FENCE, claim, says }
}

const fn mutant(
    function: &'static str,
    from: &'static str,
    to: &'static str,
    claim: &'static str,
    says: &'static str,
) -> Mutant {
    Mutant { function, from, to, claim, says }
}

const MUTANTS: &[Mutant] = &[
    mutant("submit", "Release", "Relaxed", HANDED_OVER, "what was submitted"),
    mutant("take", "Acquire", "Relaxed", HANDED_OVER, "what was submitted"),
    mutant("complete", "Release", "Relaxed", HANDED_OVER, "the result"),
    mutant("result", "Acquire", "Relaxed", HANDED_OVER, "the result"),
    weak_fence("server_sleeps", SERVER_WOKEN, DEADLOCK),
    weak_fence("sleep", SERVER_WOKEN, DEADLOCK),
    mutant("sleep", "store(1", "store(0", SERVER_WOKEN, DEADLOCK),
    weak_fence("wait_for", CONTROLLER_WOKEN, DEADLOCK),
    weak_fence("controller_waits", CONTROLLER_WOKEN, DEADLOCK),
    mutant("wait_for", "store(1", "store(0", CONTROLLER_WOKEN, DEADLOCK),
    weak_fence("interrupt", BLOCKED, DEADLOCK),
    weak_fence("begin", BLOCKED, DEADLOCK),
    weak_fence("interrupt", COMPLETING, "another call"),
    weak_fence("begin", COMPLETING, DEADLOCK),
    mutant("begin", "cancel > index", "cancel >= index", COMPLETING, "another call"),
    mutant("hold", "store(1", "store(0", COMPLETING, DEADLOCK),
    mutant(
        "undelivered",
        "signals != self",
        "false && signals != self",
        COMPLETING,
        "another call",
    ),
    mutant("claim", ".is_ok()", ".is_ok() || true", WITHDRAWN, DEADLOCK),
    mutant("withdraw", "word | WITHDRAWN", "word", WITHDRAWN, DEADLOCK),
    mutant("begin", "fence(Ordering::SeqCst);", "", WITHDRAWN, DEADLOCK),
    mutant("is_heard", ">= 0", "== 0", GIVEN_UP, DEADLOCK),
];

const HANDED_OVER: &str = "what_is_handed_over_arrives_whole";
const SERVER_WOKEN: &str = "a_server_that_sleeps_is_woken_by_a_call";
const CONTROLLER_WOKEN: &str = "a_controller_that_waits_is_woken_by_a_result";
const BLOCKED: &str = "a_call_that_blocks_is_interrupted";
const COMPLETING: &str = "a_call_that_completes_meanwhile_is_interrupted_or_complete";
const WITHDRAWN: &str = "a_call_is_either_withdrawn_or_can_be_interrupted";
const GIVEN_UP: &str = "after_a_signal_that_was_given_up_the_next_call_can_be_interrupted";

fn main() {
    // For this crate; loom itself does not look at it.
    println!("cargo::rustc-cfg=loom");
    println!("cargo::rerun-if-changed=../abi/src/ring.rs");
    println!("cargo::rerun-if-changed=build.rs");
    let ring = fs::read_to_string("../abi/src/ring.rs").expect("abi/ lies beside this crate");
    let out = env::var("OUT_DIR").expect("set by cargo");
    let claims = Path::new(&env::var("CARGO_MANIFEST_DIR").expect("set by cargo"))
        .join("src/claims.rs")
        .display()
        .to_string();
    let mut modules = String::new();
    for (number, Mutant { function, from, to, claim, says }) in MUTANTS.iter().enumerate() {
        let file = format!("{out}/mutant_{number}.rs");
        fs::write(&file, mutate(&ring, function, from, to)).expect("OUT_DIR can be written");
        writeln!(
            modules,
            "#[cfg(test)] mod {function}_{number} {{
                use crate::wire;
                #[path = {file:?}] mod ring;
                #[path = {claims:?}] mod claims;
                /// `{from}` replaced by `{to}`.
                #[test]
                fn {claim}() {{ crate::does_not_hold(module_path!(), {claim:?}, claims::{claim}, {says:?}); }}
            }}"
        )
        .expect("a String takes everything");
    }
    fs::write(format!("{out}/mutants.rs"), modules).expect("OUT_DIR can be written");
}

/// The source with what stands in one function replaced.
fn mutate(source: &str, function: &str, from: &str, to: &str) -> String {
    let start = source.find(&format!("fn {function}(")).expect(function);
    let (before, rest) = source.split_at(start);
    let end = rest.find("\n    }\n").or_else(|| rest.find("\n}\n")).expect(function);
    let (body, after) = rest.split_at(end);
    assert!(body.contains(from), "`{from}` is not in `{function}`: what is its mutant now?");
    format!("{before}{}{after}", body.replacen(from, to, 1))
}
