//! `farcall upgrade`: another image for a process that goes on.

use std::fs;

use farcall::image::IMAGE;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::command::{Running, fail, farcall, keys, start, succeed, succeed_json};
use crate::common::{TestHome, blocked_in, fds, until};

/// A file with the image in which one number is another one.
fn image_with(test: &TestHome, at: usize, value: u32) -> String {
    let mut image = IMAGE.to_vec();
    image[at..at + 4].copy_from_slice(&value.to_le_bytes());
    let file = test.file(&format!("image-{at}"));
    fs::write(&file, image).unwrap();
    file.to_str().unwrap().into()
}

/// One that can be told from this build's: nobody looks at the last bytes of e_ident.
fn another(test: &TestHome) -> String {
    image_with(test, 12, 7)
}

#[test]
fn upgrade_says_from_which_image_to_which_and_the_process_goes_on() {
    let test = TestHome::new();
    let pid = start(&test, "one");
    let opened = succeed(&test, &["call", "one", "openat", "AT_FDCWD", "/etc/passwd", "O_RDONLY"]);
    let (before, file) = (fds(pid), another(&test));
    let own = succeed_json(&test, &["image", "--json"]);
    let upgraded = succeed_json(&test, &["upgrade", "one", "--image", &file, "--json"]);
    assert_eq!(keys(&upgraded), ["from", "name", "pid", "to", "upgraded"]);
    assert_eq!((&upgraded["name"], &upgraded["pid"]), (&json!("one"), &json!(pid)));
    assert_eq!(upgraded["upgraded"], true);
    for image in [&upgraded["from"], &upgraded["to"]] {
        assert_eq!(keys(image), ["sha256", "size", "version"]);
        assert_eq!((&image["version"], &image["size"]), (&own["version"], &own["size"]));
    }
    assert_eq!(upgraded["from"]["sha256"], own["sha256"]);
    assert_ne!(upgraded["to"]["sha256"], own["sha256"]);
    assert_eq!(fds(pid), before, "as before");
    let fd = opened.trim();
    assert!(succeed(&test, &["call", "one", "read", fd, "@8", "@len"]).starts_with("8\n"));

    // Back to this build's, in words.
    let text = succeed(&test, &["upgrade", "one"]);
    let hash = |image: &serde_json::Value| image["sha256"].as_str().unwrap().to_owned();
    let lines: Vec<_> = text.lines().collect();
    let [first, from, to] = lines[..] else { panic!("{text}") };
    assert_eq!(first, "one: upgraded");
    assert!(from.contains("from") && from.ends_with(&hash(&upgraded["to"])), "{text}");
    assert!(to.contains("to ") && to.ends_with(&hash(&own)), "{text}");
    assert!(from.contains("version 1") && to.contains("version 1"), "{text}");
    // And no farther.
    let again = succeed_json(&test, &["upgrade", "one", "--json"]);
    assert_eq!((&again["upgraded"], &again["from"]), (&json!(false), &again["to"]));
    assert!(succeed(&test, &["upgrade", "one"]).contains("already"));
    // It is a call in the log.
    let log = succeed(&test, &["log", "one", "--all"]);
    assert!(log.contains("UPGRADE("), "{log}");
}

#[test]
fn a_bad_image_is_named_and_the_old_one_goes_on() {
    let test = TestHome::new();
    let pid = start(&test, "one");
    let version = image_with(&test, 184, 2);
    let entry = image_with(&test, 208, 1 << 20);
    let forgets = image_with(&test, 212, 8);
    let missing = test.file("missing").to_str().unwrap().to_owned();
    for (file, said) in [
        (version.as_str(), &["version 2", "version 1", version.as_str()][..]),
        (&entry, &["outside", &entry]),
        (&forgets, &["392 bytes", "takes 8"]),
        ("/bin/sh", &["/bin/sh", "no server image"]),
        ("/dev/null", &["/dev/null", "no server image"]),
        (&missing, &[&missing, "No such file"]),
    ] {
        let message = fail(&test, 1, &["upgrade", "one", "--image", file]);
        assert!(said.iter().all(|said| message.contains(said)), "{file}: {message}");
    }
    assert_eq!(succeed(&test, &["call", "one", "getpid"]), format!("{pid}\n"));
    assert!(succeed(&test, &["upgrade", "one"]).contains("already"));
}

#[test]
fn who_cannot_be_reached_is_not_upgraded() {
    let test = TestHome::new();
    let message = fail(&test, 1, &["upgrade", "none"]);
    assert!(message.contains("no such persistent process"), "{message}");
    fail(&test, 2, &["upgrade", "a/b"]);
    fail(&test, 2, &["upgrade"]);
    let pid = start(&test, "one");
    let mut command = farcall(&test, &["call", "one", "pause"]);
    let running = Running::start(&mut command);
    until("it is blocked", || blocked_in(pid) == Some(nix::libc::SYS_pause as usize));
    let file = another(&test);
    let held = fail(&test, 1, &["upgrade", "one", "--image", &file, "--timeout", "5"]);
    assert!(held.contains("held by"), "{held}");
    succeed(&test, &["upgrade", "one", "--image", &file, "--take-over"]);
    assert!(!running.finish().status.success());
    // A process that is busy without a controller.
    let mut command = farcall(&test, &["call", "one", "pause"]);
    let running = Running::start(&mut command);
    until("it is blocked", || blocked_in(pid) == Some(nix::libc::SYS_pause as usize));
    kill(Pid::from_raw(running.pid()), Signal::SIGKILL).unwrap();
    drop(running);
    let late = fail(&test, 1, &["upgrade", "one", "--timeout", "1"]);
    assert!(late.contains("no answer"), "{late}");
}
