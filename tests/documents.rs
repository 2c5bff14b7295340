//! What the documents name exists, and what tests there are is run.

use std::fs;
use std::path::{Path, PathBuf};

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
            let in_root = ["controller/", "xtask/"].iter().any(|folder| file.starts_with(folder));
            let path =
                Path::new(ROOT).join(if in_root { "" } else { "tests" }).join(format!("{file}.rs"));
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

/// The groups of `cargo xtask test`: a module of the suite each.
const GROUPS: [&str; 2] = ["places", "long"];

/// All sources below a folder, and which group they are in.
fn sources(folder: &Path, group: Option<&'static str>, to: &mut Vec<(PathBuf, Option<&str>)>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap();
        let group = group.or_else(|| GROUPS.into_iter().find(|group| *group == name));
        if path.is_dir() {
            sources(&path, group, to);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            to.push((path, group));
        }
    }
}

/// What stands above a test that needs fault points or mutants.
const NEEDS_FAULTS: &str =
    r#"#[cfg_attr(not(feature = "faults"), ignore = "needs --features faults")]"#;

/// `cargo xtask test` has the feature: xtask/tests/command_line.rs looks at that.
#[test]
fn tests_that_need_faults_are_marked_and_no_others_are() {
    let mut files = Vec::new();
    sources(&Path::new(ROOT).join("tests"), None, &mut files);
    let mut using = Vec::new();
    for (file, _) in files {
        let text = fs::read_to_string(&file).unwrap();
        let file = file.strip_prefix(Path::new(ROOT).join("tests")).unwrap().to_str().unwrap();
        // What sets them fails where the feature is missing, instead of passing for nothing.
        let names = ["FARCALL_FAULT", "FARCALL_MUTANT"].iter().any(|name| text.contains(name));
        if names {
            let allowed = ["common/faults.rs", "documents.rs"];
            assert!(allowed.contains(&file), "{file}: common::faults sets these");
            continue;
        }
        let marks = text.matches(NEEDS_FAULTS).count();
        let needs = ["with_fault(", "with_mutant("].iter().any(|call| text.contains(call));
        assert_eq!(marks > 0, needs, "{file}: {marks} marks");
        if marks > 0 {
            using.push(file.to_owned());
        }
    }
    assert!(!using.is_empty());
}

#[test]
fn a_test_is_ignored_if_and_only_if_it_is_in_a_group() {
    let mut files = Vec::new();
    sources(&Path::new(ROOT).join("tests"), None, &mut files);
    let (mut ignored, mut in_groups) = (0, 0);
    for (file, group) in files {
        let text = fs::read_to_string(&file).unwrap();
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        for (number, line) in lines.iter().enumerate() {
            // The next test says which program runs those.
            if *line == NEEDS_FAULTS {
                assert_eq!(group, None, "{}: a group has the feature", file.display());
                continue;
            }
            let in_cfg = line.starts_with("#[cfg_attr(") && line.contains("ignore");
            assert!(!in_cfg, "{}, line {}: {line}", file.display(), number + 1);
            let Some(attribute) = line.strip_prefix("#[ignore") else { continue };
            ignored += 1;
            let expected = group.map(|group| format!(" = \"cargo xtask test --{group}\"]"));
            let place = format!("{}, line {}", file.display(), number + 1);
            assert_eq!(Some(attribute), expected.as_deref(), "{place}");
        }
        if group.is_some() {
            let is_test = |line: &&&str| line.starts_with("#[test") || line.contains("::test");
            in_groups += lines.iter().filter(is_test).count();
        }
    }
    assert_eq!(ignored, in_groups, "a test of a group is ignored");
    assert!(ignored > 0);
}
