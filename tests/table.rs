//! The table of system calls, and the page that shows it.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use farcall::calls::table::{Blocks, Closes, Row, Shape, TOPICS};

/// What the page says of an argument's or a result's shape.
fn word(shape: Shape) -> String {
    match shape {
        Shape::One(names) | Shape::Flags(names) => match names.names {
            [(first, _)] => (*first).into(),
            [(first, _), ..] => format!("{first} …"),
            [] => "number".into(),
        },
        Shape::Command(commands) => format!("{} …", commands.commands[0].name),
        Shape::Struct(name) => format!("{name} *"),
        Shape::Filled(_) => "filled".into(),
        other => format!("{other:?}").to_lowercase(),
    }
}

fn line(row: &Row) -> String {
    let args: Vec<String> =
        row.args.iter().map(|arg| format!("{}: {}", arg.name, word(arg.shape))).collect();
    let waits = if row.blocks == Blocks::No { "" } else { "may wait" };
    let closes = if row.closes == Closes::Nothing { "" } else { "closes descriptors" };
    let notes: Vec<&str> = [waits, closes].into_iter().filter(|note| !note.is_empty()).collect();
    let (result, notes) = (word(row.result), notes.join(", "));
    format!("| `{}` | {} | {result} | {notes} |\n", row.number.name(), args.join(", "))
}

fn page() -> String {
    let mut text = "# System calls\n\nThe table of `calls::table`, by which `farcall log` and `farcall call` \
                    show and read calls.\nA test writes this page where `FARCALL_WRITE_TABLE` is set, and \
                    compares it otherwise.\n"
        .to_owned();
    for topic in TOPICS {
        let _ = write!(
            text,
            "\n## {}\n\n| call | arguments | result | notes |\n|---|---|---|---|\n",
            topic.name
        );
        text.extend(topic.rows.iter().map(line));
    }
    text
}

#[test]
fn the_page_of_the_table_shows_what_the_table_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/table.md");
    if std::env::var_os("FARCALL_WRITE_TABLE").is_some() {
        fs::write(&path, page()).unwrap();
    }
    assert!(fs::read_to_string(path).unwrap() == page(), "FARCALL_WRITE_TABLE=1 writes it anew");
}
