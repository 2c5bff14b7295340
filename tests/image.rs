//! The image: what must not be in it is refused by name, and what is in it is what it says.

// The code that build.rs runs.
#[path = "../build/compile.rs"]
mod compile;
#[path = "../build/judge.rs"]
mod judge;

#[path = "image/embedded.rs"]
mod embedded;
#[path = "image/judged.rs"]
mod judged;
#[path = "image/refused.rs"]
mod refused;
#[path = "image/workshop.rs"]
mod workshop;
