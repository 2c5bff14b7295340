//! The sockets' directory as others may have left it: full, read-only, made under any umask, not one's
//! own.

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown, lchown, symlink};
use std::os::unix::net::UnixListener;
use std::process::Command;

use farcall::calls::Sysno;
use farcall::persist::{Incarnation, State};

use nix::unistd::{Uid, mkfifo};
use serde_json::json;

use super::command::{
    Ran, Running, fail, farcall, farcall_as, json as parsed, run, start, succeed, succeed_json,
};
use crate::common::{TestHome, alive, blocked_in, until};

/// A user that nobody is.
const STRANGER: u32 = 65_530;

/// Runs a script in a mount namespace of its own, in which a small tmpfs is the sockets' directory;
/// `$f` is farcall.
fn in_a_small_directory(test: &TestHome, script: &str) -> Ran {
    let script = format!(
        "mkdir -m 700 $FARCALL_DIR && mount -t tmpfs -o size=64k,mode=700 none $FARCALL_DIR || exit 77
        trap '$f stop --kill web >/dev/null 2>&1 || true' EXIT
        {script}"
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "bash", "-c", &script]);
    command.env("f", env!("CARGO_BIN_EXE_farcall")).env("FARCALL_DIR", test.path());
    let ran = Running::start(&mut command).finish();
    assert_ne!(ran.status.code(), Some(77), "this test mounts a tmpfs: run it as root");
    ran
}

/// Where NAME.json can't be written, a process is called, taken over and stopped all the same.
fn goes_on(test: &TestHome, obstacle: &str, warning: &str) {
    let ran = in_a_small_directory(
        test,
        &format!(
            "set -e; $f start web >/dev/null
            {obstacle}
            $f call web getuid; $f call --take-over web getuid; $f names web; $f upgrade web >/dev/null
            $f ls >/dev/null"
        ),
    );
    assert_eq!(ran.status.code(), Some(0), "{ran:?}");
    assert_eq!(ran.stdout, "0\n0\n", "{ran:?}");
    assert!(ran.stderr.contains(warning), "{ran:?}");
    assert_eq!(ran.stderr.matches("farcall: warning: ").count(), 4, "each says it once: {ran:?}");
}

#[test]
fn in_a_full_directory_a_process_is_reached_with_a_warning() {
    let fill = "(dd if=/dev/zero of=$FARCALL_DIR/fill bs=4096 || true) 2>/dev/null";
    goes_on(&TestHome::new(), fill, "No space left on device");
}

#[test]
fn in_a_read_only_directory_a_process_is_reached_with_a_warning() {
    goes_on(&TestHome::new(), "mount -o remount,ro $FARCALL_DIR", "Read-only file system");
}

#[test]
fn a_directory_made_under_any_umask_is_its_owners_to_use() {
    for umask in [0, 0o117, 0o177, 0o277, 0o777] {
        let test = TestHome::new();
        chown(test.path().parent().unwrap(), Some(STRANGER), Some(STRANGER)).unwrap();
        let run = |arguments: &[&str]| {
            let ran = Running::start(&mut farcall_as(STRANGER, umask, &test, arguments)).finish();
            assert_eq!(ran.status.code(), Some(0), "umask {umask:o}, {arguments:?}: {ran:?}");
            assert_eq!(ran.stderr, "", "umask {umask:o}, {arguments:?}");
        };
        run(&["start", "web"]);
        let mode = |path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(test.path().to_owned()), 0o700, "umask {umask:o}");
        assert_eq!(mode(test.path().join("web.sock")), 0o600, "umask {umask:o}");
        assert_eq!(mode(test.path().join("web.json")), 0o600, "umask {umask:o}");
        run(&["call", "web", "getpid"]);
        run(&["stop", "web"]);
        assert_eq!(fs::read_dir(test.path()).unwrap().count(), 0);

        // What an earlier version has left that way is made good.
        fs::set_permissions(test.path(), Permissions::from_mode(0o700 & !umask)).unwrap();
        run(&["start", "web"]);
        run(&["stop", "web"]);
    }
}

#[test]
fn where_no_files_can_be_made_the_variable_is_told_that_names_another_place() {
    let test = TestHome::new();
    let error = |uid: u32, variable: &str, place: &str, arguments: &[&str]| {
        let mut command = farcall_as(uid, 0o022, &test, arguments);
        let ran = Running::start(command.env(variable, place)).finish();
        assert_eq!(ran.status.code(), Some(1), "{ran:?}");
        ran.stderr
    };
    // Not even root can make one in /sys.
    for (uid, place) in [(0, "/sys/farcall"), (STRANGER, "/usr/farcall"), (STRANGER, "/usr")] {
        let error = error(uid, "FARCALL_DIR", place, &["start", "web"]);
        let advice = "choose a directory of your own, as with FARCALL_DIR";
        assert!(error.contains(place) && error.contains(advice), "{error}");
    }
    for command in ["demo", "torture"] {
        let error = error(STRANGER, "TMPDIR", "/usr", &[command]);
        assert!(error.contains("/usr/") && error.contains("TMPDIR names another place"), "{error}");
    }
}

#[test]
fn nobody_is_told_to_close_a_directory_that_others_may_need() {
    let test = TestHome::new();
    let advice = |mode: u32, file: Option<&str>| {
        let _ = fs::remove_dir_all(test.path());
        fs::create_dir(test.path()).unwrap();
        if let Some(file) = file {
            fs::write(test.path().join(file), "").unwrap();
        }
        fs::set_permissions(test.path(), Permissions::from_mode(mode)).unwrap();
        let error = fail(&test, 1, &["start", "web"]);
        assert!(error.contains(&format!("has mode {mode:o}")), "{error}");
        error
    };
    for (mode, file) in
        [(0o1777, None), (0o1777, Some("a.sock")), (0o755, None), (0o755, Some("hosts"))]
    {
        let error = advice(mode, file);
        assert!(error.contains("choose a directory of your own"), "{error}");
        assert!(!error.contains("chmod"), "{error}");
    }
    // One that has sockets and nothing else is farcall's own make.
    assert!(advice(0o755, Some("old.sock")).contains("chmod 700"));
}

#[test]
fn a_record_that_is_no_file_or_has_no_end_keeps_nobody_waiting() {
    let test = TestHome::new();
    let pid = start(&test, "one");
    let record = test.path().join("one.json");
    let text = fs::read(&record).unwrap();
    let elsewhere = test.file("elsewhere.json");
    fs::write(&elsewhere, &text).unwrap();
    let again = || fs::remove_file(&record).unwrap();
    let look = || {
        assert_eq!(succeed(&test, &["call", "one", "getpid"]), format!("{pid}\n"));
        let state = fs::symlink_metadata(&record).unwrap();
        assert!(state.is_file() && state.len() < 1000, "it is written anew");
        let ran = run(&test, &["ls", "--json"]);
        assert!(ran.stdout.contains(&format!("\"pid\":{pid}")), "{ran:?}");
    };
    again();
    mkfifo(&record, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(run(&test, &["ls"]).stdout.contains("detached"), "it listens");
    look();
    again();
    symlink(&elsewhere, &record).unwrap();
    look();
    assert_eq!(fs::read(&elsewhere).unwrap(), text, "what a link leads to is not written to");
    fs::File::options().write(true).open(&record).unwrap().set_len(1 << 40).unwrap();
    look();
    assert_eq!(succeed(&test, &["stop", "one"]), "one: stopped\n");
    assert!(!alive(pid));
}

#[test]
fn a_record_that_a_pipe_would_bring_is_none() {
    let test = TestHome::new();
    let pid = start(&test, "one");
    let place = test.home.place(&"one".parse().unwrap());
    let record = test.path().join("one.json");
    let text = fs::read(&record).unwrap();
    assert_eq!(place.state().unwrap().process.pid, pid);
    fs::remove_file(&record).unwrap();
    mkfifo(&record, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // Who reads gets all of it, and then the end.
    let (mut reading, mut writing) = (fs::File::options(), fs::File::options());
    let mut reader = reading.read(true).custom_flags(nix::libc::O_NONBLOCK).open(&record).unwrap();
    writing.write(true).open(&record).unwrap().write_all(&text).unwrap();
    assert_eq!(place.state(), None);
    let mut left = Vec::new();
    reader.read_to_end(&mut left).unwrap();
    assert_eq!(left, text, "nothing is taken out of it");
    assert_eq!(succeed(&test, &["stop", "one"]), "one: stopped\n");
    assert!(!alive(pid));
}

#[test]
fn a_strangers_link_leads_to_no_directory_of_anybody_elses() {
    assert!(Uid::effective().is_root(), "this test acts as two users: run it as root");
    let test = TestHome::new();
    let pid = start(&test, "one");
    let link = test.file("link");
    symlink(test.path(), &link).unwrap();
    let through_link = |arguments: &[&str]| {
        Running::start(farcall(&test, arguments).env("FARCALL_DIR", &link)).finish()
    };
    assert_eq!(through_link(&["call", "one", "getuid"]).stdout, "0\n", "one's own is followed");
    lchown(&link, Some(STRANGER), None).unwrap();
    for arguments in [
        &["call", "one", "getuid"][..],
        &["stop", "one"],
        &["stop", "--kill", "one"],
        &["start", "two"],
        &["ls"],
    ] {
        let ran = through_link(arguments);
        assert_eq!(ran.status.code(), Some(1), "{arguments:?}: {ran:?}");
        assert!(ran.stderr.contains("symbolic link of uid 65530"), "{arguments:?}: {ran:?}");
    }
    assert!(alive(pid));
}

/// A process that is root's, and ends with the test.
struct Victim(std::process::Child);

impl Victim {
    fn new() -> Self {
        Self(Command::new("sleep").arg("1000").spawn().unwrap())
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Makes what is in the sockets' directory, and itself, that user's.
fn give_to(uid: u32, test: &TestHome) {
    chown(test.path(), Some(uid), Some(uid)).unwrap();
    for file in fs::read_dir(test.path()).unwrap() {
        lchown(file.unwrap().path(), Some(uid), Some(uid)).unwrap();
    }
}

#[test]
fn root_signals_nobody_on_another_users_word() {
    assert!(Uid::effective().is_root(), "this test acts as two users: run it as root");
    let test = TestHome::new();
    fs::create_dir(test.path()).unwrap();
    fs::set_permissions(test.path(), Permissions::from_mode(0o700)).unwrap();
    // Somebody who listens and does not answer, and says that it is another process.
    let _listener = UnixListener::bind(test.path().join("one.sock")).unwrap();
    let victim = Victim::new();
    let process = Incarnation::of(victim.pid()).unwrap();
    let state = State { process, holder: None, since: 1, cgroups: Vec::new(), connection: None };
    let record = test.path().join("one.json");
    fs::write(&record, serde_json::to_vec(&state).unwrap()).unwrap();
    give_to(STRANGER, &test);
    let error = fail(&test, 1, &["names", "one", "--take-over", "--timeout", "1"]);
    assert!(error.contains("no answer"), "{error}");
    assert!(alive(victim.pid()));
    // Who has the socket, this test, is none of that user's either.
    let error = fail(&test, 1, &["stop", "one", "--kill"]);
    assert!(error.contains("is another user's"), "{error}");
    assert!(alive(victim.pid()));
    // Where the record is root's, in a directory in which others may have put it there: the process has
    // to have the socket.
    lchown(&record, Some(0), Some(0)).unwrap();
    let error = fail(&test, 1, &["stop", "one", "--kill"]);
    assert!(error.contains("does not have that socket"), "{error}");
    assert!(alive(victim.pid()));
    // A record with two names may be that of another directory.
    fs::hard_link(&record, test.file("elsewhere.json")).unwrap();
    let error = fail(&test, 1, &["stop", "one", "--kill"]);
    assert!(error.contains("is another user's"), "{error}");
    assert!(alive(victim.pid()));
}

#[test]
fn root_does_in_a_users_directory_what_that_user_may_do() {
    let test = TestHome::new();
    chown(test.path().parent().unwrap(), Some(STRANGER), Some(STRANGER)).unwrap();
    let as_user = |arguments: &[&str]| farcall_as(STRANGER, 0o022, &test, arguments);
    let ran = Running::start(&mut as_user(&["start", "one", "--json"])).finish();
    assert_eq!(ran.status.code(), Some(0), "{ran:?}");
    let pid = parsed(&ran.stdout)["pid"].as_i64().unwrap() as i32;
    let blocked = Running::start(&mut as_user(&["call", "one", "pause"]));
    until("it is blocked", || blocked_in(pid) == Some(Sysno::pause as usize));
    // What it is blocked in is interrupted with that user's rights.
    assert_eq!(succeed(&test, &["call", "--take-over", "one", "getuid"]), format!("{STRANGER}\n"));
    drop(blocked);
    let record = fs::metadata(test.path().join("one.json")).unwrap();
    assert_eq!(record.uid(), STRANGER, "and what is written down is that user's to read");
    assert!(succeed(&test, &["ls"]).contains(&format!(" {pid} ")));
    assert_eq!(succeed(&test, &["stop", "one", "--kill"]), "one: stopped\n");
    assert!(!alive(pid));
    assert_eq!(fs::read_dir(test.path()).unwrap().count(), 0);
}

/// Starts processes as that user, in that user's directory.
fn started_by_a_stranger<const N: usize>(test: &TestHome, names: [&str; N]) -> [i32; N] {
    assert!(Uid::effective().is_root(), "this test acts as two users: run it as root");
    chown(test.path().parent().unwrap(), Some(STRANGER), Some(STRANGER)).unwrap();
    names.map(|name| {
        let arguments = ["start", name, "--json"];
        let ran = Running::start(&mut farcall_as(STRANGER, 0o022, test, &arguments)).finish();
        assert_eq!(ran.status.code(), Some(0), "{ran:?}");
        parsed(&ran.stdout)["pid"].as_i64().unwrap() as i32
    })
}

#[test]
fn root_reads_no_file_that_a_directorys_owner_may_not_read() {
    let test = TestHome::new();
    let [pid] = started_by_a_stranger(&test, ["one"]);
    let record = test.path().join("one.json");
    let mut state: State = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    state.cgroups = vec!["/secret".into()];
    fs::write(&record, serde_json::to_vec(&state).unwrap()).unwrap();
    let seen = || run(&test, &["ls", "--json"]).stdout.contains("secret");
    assert!(seen(), "one's own record is read");
    // Nobody's to read, and root's.
    fs::set_permissions(&record, Permissions::from_mode(0o000)).unwrap();
    assert!(!seen());
    fs::set_permissions(&record, Permissions::from_mode(0o600)).unwrap();
    lchown(&record, Some(0), Some(0)).unwrap();
    assert!(!seen());
    lchown(&record, Some(STRANGER), Some(STRANGER)).unwrap();
    state.cgroups.clear();
    fs::write(&record, serde_json::to_vec(&state).unwrap()).unwrap();
    // Nor does it connect where that user may not.
    let socket = test.path().join("one.sock");
    fs::set_permissions(&socket, Permissions::from_mode(0o400)).unwrap();
    let error = fail(&test, 1, &["call", "one", "getpid"]);
    assert!(error.contains("it is another user's"), "{error}");
    fs::set_permissions(&socket, Permissions::from_mode(0o600)).unwrap();
    assert_eq!(succeed(&test, &["call", "one", "getpid"]), format!("{pid}\n"));
    assert_eq!(succeed(&test, &["stop", "one"]), "one: stopped\n");
    assert!(!alive(pid));
}

#[test]
fn root_is_told_what_a_directorys_owner_is_told() {
    let test = TestHome::new();
    let pids = started_by_a_stranger(&test, ["one", "two"]);
    let told = |uid: u32, arguments: &[&str]| {
        let ran = Running::start(&mut farcall_as(uid, 0o022, &test, arguments)).finish();
        (ran.status.code(), ran.stdout, ran.stderr)
    };
    let mode = |mode| fs::set_permissions(test.path(), Permissions::from_mode(mode)).unwrap();
    for (bits, arguments) in [
        (0, &["ls"][..]),
        (0, &["call", "one", "getuid"]),
        (0o300, &["ls"]),
        (0o300, &["call", "one", "getuid"]),
        (0o500, &["call", "one", "getuid"]),
        (0o500, &["names", "one"]),
    ] {
        mode(bits);
        let by_owner = told(STRANGER, arguments);
        let refusals = ["Permission denied", "it is another user's"];
        assert!(refusals.iter().any(|why| by_owner.2.contains(why)), "{bits:o}: {by_owner:?}");
        assert_eq!(told(0, arguments), by_owner, "{bits:o} {arguments:?}");
    }
    // It ends, and its files can't be removed.
    let (code, stdout, stderr) = told(STRANGER, &["stop", "one"]);
    assert!(stderr.contains("Permission denied"), "{stderr}");
    let [stdout, stderr] = [stdout, stderr].map(|text| text.replace("one", "two"));
    assert_eq!(told(0, &["stop", "two"]), (code, stdout, stderr));
    mode(0o700);
    until("both have ended", || !pids.into_iter().any(alive));
}

#[test]
fn root_that_can_not_become_a_directorys_owner_uses_it_all_the_same() {
    let test = TestHome::new();
    let [pid] = started_by_a_stranger(&test, ["one"]);
    let incapable = |arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set=-setuid", "--inh-caps=-setuid"]);
        command.arg(env!("CARGO_BIN_EXE_farcall")).args(arguments);
        let ran = Running::start(command.env("FARCALL_DIR", test.path())).finish();
        assert_eq!((ran.status.code(), &*ran.stderr), (Some(0), ""), "{arguments:?}");
        ran.stdout
    };
    // Which that user could not read: it is done with root's rights.
    let record = test.path().join("one.json");
    fs::set_permissions(&record, Permissions::from_mode(0o000)).unwrap();
    assert!(incapable(&["ls"]).contains(&format!(" {pid} ")));
    assert_eq!(incapable(&["call", "one", "getpid"]), format!("{pid}\n"));
    assert_eq!(incapable(&["stop", "one"]), "one: stopped\n");
    assert!(!alive(pid));
    assert_eq!(fs::read_dir(test.path()).unwrap().count(), 0);
}

#[test]
fn what_a_stranger_has_written_controls_no_terminal() {
    let test = TestHome::new();
    fs::create_dir(test.path()).unwrap();
    fs::set_permissions(test.path(), Permissions::from_mode(0o700)).unwrap();
    // What a dead process has left, and a cgroup's path that is refused.
    drop(UnixListener::bind(test.path().join("one.sock")).unwrap());
    let process =
        Incarnation { start_time: 1, ..Incarnation::of(std::process::id() as i32).unwrap() };
    let cgroups = vec![format!("/\u{1b}[2J{}", "a".repeat(1200)).into()];
    let state = State { process, holder: None, since: 1, cgroups, connection: None };
    fs::write(test.path().join("one.json"), serde_json::to_vec(&state).unwrap()).unwrap();
    give_to(STRANGER, &test);
    let error = fail(&test, 1, &["stop", "one"]);
    assert!(error.contains("\\u{1b}[2J") && !error.contains('\u{1b}'), "{error}");
}

#[test]
fn however_many_do_not_answer_all_are_listed() {
    let test = TestHome::new();
    fs::create_dir(test.path()).unwrap();
    fs::set_permissions(test.path(), Permissions::from_mode(0o700)).unwrap();
    let socket = test.path().join("n0.sock");
    let _silent = UnixListener::bind(&socket).unwrap();
    // Of another pid namespace: each has to be asked.
    let process = Incarnation { pid: 1, start_time: 1, pid_ns: Some(1) };
    let state = State { process, holder: None, since: 1, cgroups: Vec::new(), connection: None };
    let state = serde_json::to_vec(&state).unwrap();
    for number in 0..400 {
        if number > 0 {
            fs::hard_link(&socket, test.path().join(format!("n{number}.sock"))).unwrap();
        }
        fs::write(test.path().join(format!("n{number}.json")), &state).unwrap();
    }
    let pid = start(&test, "one");
    let rows = succeed_json(&test, &["ls", "--json"]);
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 401);
    assert!(rows.iter().all(|row| row["state"] == "detached"), "{rows:?}");
    assert_eq!(rows.iter().filter(|row| row["pid"] == pid).count(), 1);
    assert_eq!(succeed(&test, &["stop", "one"]), "one: stopped\n");
}

#[test]
fn root_attaches_to_no_socket_that_another_user_may_have_linked_there() {
    assert!(Uid::effective().is_root(), "this test acts as two users: run it as root");
    let test = TestHome::new();
    let pid = start(&test, "one");
    let theirs = test.file("theirs");
    fs::create_dir(&theirs).unwrap();
    fs::set_permissions(&theirs, Permissions::from_mode(0o700)).unwrap();
    let socket = test.path().join("one.sock");
    symlink(&socket, theirs.join("soft.sock")).unwrap();
    fs::hard_link(&socket, theirs.join("hard.sock")).unwrap();
    chown(&theirs, Some(STRANGER), Some(STRANGER)).unwrap();
    for (name, reason) in [("soft", "it is no socket"), ("hard", "has several names")] {
        for arguments in [&["call", name, "getpid"][..], &["stop", name], &["stop", name, "--kill"]]
        {
            let mut command = farcall(&test, arguments);
            let ran = Running::start(command.env("FARCALL_DIR", &theirs)).finish();
            assert_eq!(ran.status.code(), Some(1), "{arguments:?}: {ran:?}");
            assert!(ran.stderr.contains(reason), "{arguments:?}: {ran:?}");
        }
    }
    assert!(alive(pid));
    fs::remove_dir_all(&theirs).unwrap();
    assert_eq!(succeed(&test, &["call", "one", "getpid"]), format!("{pid}\n"));
}

/// The state that `ls` tells, with the pid.
#[track_caller]
fn state_of(test: &TestHome, pid: i32) -> String {
    let rows = succeed_json(test, &["ls", "--json"]);
    let row = rows.as_array().unwrap().iter().find(|row| row["pid"] == pid);
    row.unwrap_or_else(|| panic!("pid {pid} is not in {rows}"))["state"].as_str().unwrap().into()
}

#[test]
fn a_socket_that_was_removed_is_made_anew() {
    let test = TestHome::new();
    for directory in [false, true] {
        let pid = start(&test, "one");
        let error = fail(&test, 1, &["restore", "one"]);
        assert!(error.contains("nothing is to be restored"), "{error}");
        if directory {
            fs::remove_dir_all(test.path()).unwrap();
        } else {
            fs::remove_file(test.path().join("one.sock")).unwrap();
        }
        assert_eq!(state_of(&test, pid), "unlinked");
        let ran = run(&test, &["call", "one", "getpid"]);
        assert_eq!((ran.status.code(), ran.stdout), (Some(0), format!("{pid}\n")));
        assert!(ran.stderr.contains("`farcall restore one`"), "{}", ran.stderr);
        let error = fail(&test, 1, &["start", "one"]);
        assert!(error.contains(&format!("(pid {pid})")), "{error}");

        let restored = succeed_json(&test, &["restore", "one", "--json"]);
        let socket = test.path().join("one.sock");
        assert_eq!(restored, json!({ "name": "one", "pid": pid, "socket": socket }));
        assert_eq!(state_of(&test, pid), "detached");
        assert_eq!(succeed(&test, &["call", "one", "getpid"]), format!("{pid}\n"));
        assert_eq!(succeed(&test, &["stop", "one"]), "one: stopped\n");
        assert_eq!(fs::read_dir(test.path()).unwrap().count(), 0);
    }
}

#[test]
fn a_process_whose_socket_was_removed_is_stopped() {
    let test = TestHome::new();
    for arguments in [&["stop", "one"][..], &["stop", "one", "--kill"]] {
        for directory in [false, true] {
            let pid = start(&test, "one");
            if directory {
                fs::remove_dir_all(test.path()).unwrap();
            } else {
                fs::remove_file(test.path().join("one.sock")).unwrap();
            }
            let ran = run(&test, arguments);
            assert_eq!((ran.status.code(), &*ran.stdout), (Some(0), "one: stopped\n"), "{ran:?}");
            assert!(!alive(pid));
            assert!(fs::read_dir(test.path()).map_or(0, Iterator::count) == 0);
        }
    }
}

#[test]
fn a_user_reaches_and_restores_what_is_that_users() {
    let test = TestHome::new();
    chown(test.path().parent().unwrap(), Some(STRANGER), Some(STRANGER)).unwrap();
    let as_user = |arguments: &[&str]| {
        Running::start(&mut farcall_as(STRANGER, 0o022, &test, arguments)).finish()
    };
    let ran = as_user(&["start", "one", "--json"]);
    let pid = parsed(&ran.stdout)["pid"].as_i64().unwrap() as i32;
    fs::remove_file(test.path().join("one.sock")).unwrap();
    let ran = as_user(&["call", "one", "getpid"]);
    assert_eq!((ran.status.code(), ran.stdout), (Some(0), format!("{pid}\n")));
    // Root reaches it, and leaves it to its owner to make a socket in that directory.
    assert_eq!(state_of(&test, pid), "unlinked");
    let error = fail(&test, 1, &["restore", "one"]);
    assert!(error.contains("that user restores it"), "{error}");
    assert_eq!(as_user(&["restore", "one"]).status.code(), Some(0));
    assert_eq!(succeed(&test, &["call", "one", "getpid"]), format!("{pid}\n"));
    assert_eq!(succeed(&test, &["stop", "one"]), "one: stopped\n");
}

#[test]
fn without_proc_a_process_is_called_and_stopped() {
    let test = TestHome::new();
    start(&test, "one");
    let script = "umount -l /proc || exit 77
        $f call one getuid && $f stop one && ! $f call one getuid";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]);
    command.env("f", env!("CARGO_BIN_EXE_farcall")).env("FARCALL_DIR", test.path());
    let ran = Running::start(&mut command).finish();
    assert_ne!(ran.status.code(), Some(77), "this test unmounts /proc: run it as root");
    assert_eq!((ran.status.code(), &*ran.stdout), (Some(0), "0\none: stopped\n"), "{ran:?}");
    assert_eq!(fs::read_dir(test.path()).unwrap().count(), 0);
}
