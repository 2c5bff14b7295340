//! What the documents name exists, and what tests there are is run.

use std::fs;
use std::path::Path;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The tests that a text names as `file.rs: name`, in backticks; a line may end between the two.
fn named(text: &str) -> Vec<(&str, &str)> {
    text.split('`')
        .skip(1)
        .step_by(2)
        .filter_map(|code| code.split_once(".rs:"))
        .map(|(file, name)| (file, name.trim_start()))
        .filter(|(file, _)| !file.contains(char::is_whitespace))
        .collect()
}

#[test]
fn every_test_that_the_specification_names_exists() {
    let text = fs::read_to_string(Path::new(ROOT).join("docs/specification.md")).unwrap();
    // A backtick without its partner would make this look at what lies between the names.
    assert!(text.matches('`').count().is_multiple_of(2), "backticks come in pairs");
    let named = named(&text);
    assert!(named.len() > 20, "{named:?}");
    let unknown: Vec<String> = named
        .into_iter()
        .filter(|(file, name)| {
            let folder = if file.starts_with("controller/") { "" } else { "tests" };
            let path = Path::new(ROOT).join(folder).join(format!("{file}.rs"));
            let source = fs::read_to_string(&path).unwrap_or_default();
            !source.contains(&format!("fn {name}("))
        })
        .map(|(file, name)| format!("{file}.rs: {name}"))
        .collect();
    assert!(unknown.is_empty(), "there is no such test: {}", unknown.join(", "));
}

#[test]
fn every_file_of_tests_is_part_of_a_program() {
    let read = |file: &str| fs::read_to_string(Path::new(ROOT).join(file)).unwrap();
    let (manifest, suite) = (read("Cargo.toml"), read("tests/suite.rs"));
    for entry in fs::read_dir(Path::new(ROOT).join("tests")).unwrap() {
        let file = entry.unwrap().file_name().into_string().unwrap();
        let Some(name) = file.strip_suffix(".rs") else { continue };
        let is_module = suite.lines().any(|line| line == format!("mod {name};"));
        let is_program = manifest.contains(&format!("path = \"tests/{file}\""));
        assert!(is_module || is_program, "tests/{file}: neither suite.rs nor Cargo.toml names it");
    }
}
