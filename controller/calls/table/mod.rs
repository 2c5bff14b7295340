//! The table of system calls: what is known of each, once.
//!
//! A row has a call's name and its arguments as the man page names them, and for each argument its
//! [`Shape`]: how its value is shown, and how text is read back into it. Rows are for whoever meets a call
//! by its number or its name: `farcall log`, `farcall call`, errors.

mod row;

pub use row::{Argument, Names, Row, Shape};
