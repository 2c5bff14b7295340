//! The library's layers: each uses those below it, and no other. The command line's folders beside it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// From the lowest up. Modules of one line do not use each other, unless one contains the other.
const LAYERS: [&[&str]; 10] = [
    &["abi"],
    &["error", "fault"],
    &["descriptor", "runtime"],
    &["image"],
    &["proto"],
    &["link"],
    &["calls"],
    &["process", "blocking"],
    &["persist"],
    &["host"],
];

/// What stands at the root of the library for its users, and where it is.
const REEXPORTED: [(&str, &str); 11] = [
    ("Child", "process"),
    ("ChildBuilder", "process"),
    ("Error", "error"),
    ("Fd", "calls"),
    ("FdTable", "calls"),
    ("Local", "host"),
    ("Mapping", "calls"),
    ("Outcome", "error"),
    ("Process", "process"),
    ("Result", "error"),
    ("errno_name", "error"),
];

/// Uses of a higher layer that there still are, as file and module. This list only gets shorter.
const UPWARD: [(&str, &str); 2] =
    [("process/adopted.rs", "persist"), ("process/mod.rs", "persist")];

/// The folders of the command line, and which of them each may use. `main.rs` puts them together.
const COMMAND_LINE: [(&str, &[&str]); 3] =
    [("command", &["command"]), ("cli", &["cli", "command"]), ("rig", &["rig", "command"])];

/// Whether a file or folder of the root is the command line's.
fn is_command_line(name: &str) -> bool {
    name == "main" || COMMAND_LINE.iter().any(|(folder, _)| *folder == name)
}

/// The library's folder, in which the command line's are as well.
fn library() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("controller")
}

/// The files of a folder and of those in it.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> = entries
        .flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] })
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .collect();
    files.sort();
    files
}

/// The modules of the library's root that a text names behind `crate::`, comments aside.
fn named(text: &str) -> BTreeSet<String> {
    let code = |line: &str| line.split("//").next().unwrap_or_default().to_owned();
    let text: String = text.lines().map(|line| code(line) + "\n").collect();
    let mut named = BTreeSet::new();
    for rest in text.split("crate::").skip(1) {
        match rest.strip_prefix('{') {
            None => named.extend(word(rest)),
            Some(list) => named.extend(items(list).iter().filter_map(|item| word(item))),
        }
    }
    named
}

/// The identifier at the beginning of a text.
fn word(text: &str) -> Option<String> {
    let is_part = |char: char| char.is_alphanumeric() || char == '_';
    let end = text.find(|char| !is_part(char)).unwrap_or(text.len());
    Some(text[..end].to_owned()).filter(|word| !word.is_empty())
}

/// The items of a list in braces, of which the opening one has been taken.
fn items(list: &str) -> Vec<String> {
    let mut depth = 0;
    let mut items = vec![String::new()];
    for char in list.chars() {
        match char {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => items.push(String::new()),
            _ if char.is_whitespace() => {}
            _ if depth == 0 => items.last_mut().unwrap().push(char),
            _ => {}
        }
    }
    items
}

/// How high a module of the root stands.
fn layer(module: &str) -> Option<usize> {
    let reexported = REEXPORTED.iter().find(|(name, _)| *name == module);
    let module = reexported.map_or(module, |(_, module)| *module);
    LAYERS.iter().position(|layer| layer.contains(&module))
}

#[test]
fn a_layer_uses_those_below_it_and_no_other() {
    let library = library();
    let mut upward = BTreeSet::new();
    for path in files(&library) {
        let file = path.strip_prefix(&library).unwrap().to_str().unwrap();
        let own = file.split('/').next().unwrap().trim_end_matches(".rs");
        if own == "lib" || is_command_line(own) {
            continue;
        }
        let from = layer(own).unwrap_or_else(|| panic!("{own} is in no layer"));
        for module in named(&fs::read_to_string(&path).unwrap()) {
            let to = layer(&module)
                .unwrap_or_else(|| panic!("{file} names crate::{module}, which is in no layer"));
            let reexported = REEXPORTED.iter().find(|(name, _)| *name == module);
            let module = reexported.map_or(module.as_str(), |(_, module)| *module);
            if module != own && to >= from {
                upward.insert(format!("{file} uses {module}"));
            }
        }
    }
    let known = UPWARD.iter().map(|(file, module)| format!("{file} uses {module}")).collect();
    assert_eq!(upward, known, "found, and expected");
}

#[test]
fn daily_commands_and_the_rig_do_not_use_each_other() {
    for (folder, allowed) in COMMAND_LINE {
        let files = files(&library().join(folder));
        assert!(!files.is_empty(), "there is no {folder}");
        for path in files {
            let text = fs::read_to_string(&path).unwrap();
            for module in named(&text) {
                assert!(allowed.contains(&&*module), "{} uses {module}", path.display());
            }
            for (other, _) in COMMAND_LINE.iter().filter(|(other, _)| !allowed.contains(other)) {
                assert!(
                    !text.contains(&format!("super::{other}::")),
                    "{}: {other}",
                    path.display()
                );
            }
        }
    }
}

#[test]
fn what_a_file_uses_is_found_in_its_imports_and_in_its_code() {
    let text = "use crate::error::Error; // crate::host\n\
                use crate::{link::{self, Bell}, Fd};\n\
                fn f() -> crate::proto::Call {}\n";
    let expected = ["Fd", "error", "link", "proto"].map(str::to_owned);
    assert_eq!(named(text), BTreeSet::from(expected));
}
