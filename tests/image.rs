//! The image: what must not be in it is refused by name, and what is in it is what it says.

mod embedded;
mod judged;
mod refused;
pub mod workshop;
