//! A file system that another user's program serves (FUSE), and that never answers: root and others refuse
//! to look into it. Even SIGKILL would not end who waits for it.

use std::os::unix::fs::chown;
use std::process::Command;

use super::command::{Ran, Running};
use crate::common::TestHome;

/// Mounts file systems of a user's in a mount namespace of its own, and runs a script there. `serve FD
/// PATH MODE` mounts one that is asked and never answers; `$f` is farcall. The end of the script ends
/// the file systems, and who waits for them with them.
fn beside_a_silent_file_system(test: &TestHome, script: &str) -> Ran {
    let script = format!(
        r#"
        servers=
        serve() {{
            [ -e /dev/fuse ] || {{ mount -t tmpfs none /dev && mknod /dev/fuse c 10 229; }} || exit 77
            eval "exec $1<>/dev/fuse"
            mount -i -t fuse -o fd=$1,rootmode=$3,user_id=65530,group_id=65530,allow_other silent $2 ||
                exit 77
            # The first request is answered (struct fuse_init_out), all others are only read.
            dd bs=135168 count=1 <&$1 2>/dev/null | wc -c >/dev/null
            {{ printf '\x50\0\0\0\0\0\0\0\2\0\0\0\0\0\0\0\7\0\0\0\x1f\0\0\0\0\0\2\0\0\0\0\0\0\0\0\0\0\0\2\0\1\0\0\0'
               head -c 36 /dev/zero; }} | dd bs=80 count=1 iflag=fullblock >&$1 2>/dev/null
            setpriv --pdeathsig KILL dd bs=135168 <&$1 >/dev/null 2>&1 &
            servers="$servers $!" mounted=$2
        }}
        try() {{
            echo "-- $*"
            timeout -s KILL 60 $f "$@" 2>&1 9<&- & wait $!
            echo "ended with $?"
        }}
        finish() {{
            exec 9<&-
            [ -z "$servers" ] || kill -KILL $servers
            # None of this is told: it is over with them.
            exec 2>/dev/null
            wait $servers
            umount -l $mounted
            $f stop --kill web >/dev/null 2>&1
            return 0
        }}
        trap finish EXIT
        mkdir -p -m 700 $FARCALL_DIR
        {script}"#
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "bash", "-c", &script]);
    command.env("f", env!("CARGO_BIN_EXE_farcall")).env("FARCALL_DIR", test.path());
    let ran = Running::start(&mut command).finish();
    assert_ne!(ran.status.code(), Some(77), "this test mounts FUSE: run it as root: {ran:?}");
    ran
}

const REFUSAL: &str = "a program of uid 65530 serves";

#[test]
fn in_a_file_system_that_a_strangers_program_serves_nobody_waits() {
    let test = TestHome::new();
    let commands = "try ls; try call web getpid; try call --take-over web getpid; try stop web
        try stop --kill web; try log web; try names web; try restore web; try upgrade web; try start web\n";
    let ran = beside_a_silent_file_system(
        &test,
        &format!(
            "serve 9 $FARCALL_DIR 40755
            {commands}
            FARCALL_DIR=$FARCALL_DIR/below/it
            {commands}"
        ),
    );
    assert_eq!(ran.stdout.matches("-- ").count(), 20, "{ran:?}");
    assert_eq!(ran.stdout.matches("ended with 1\n").count(), 20, "{ran:?}");
    assert_eq!(ran.stdout.matches(REFUSAL).count(), 20, "{ran:?}");
}

#[test]
fn a_file_that_a_strangers_program_serves_is_not_looked_into() {
    let run = |file: &str, mode: &str| {
        let script = format!(
            "$f start web >/dev/null
            serve 9 $FARCALL_DIR/{file} {mode}
            try call web getuid; try ls; try stop web"
        );
        let ran = beside_a_silent_file_system(&TestHome::new(), &script);
        let parts: Vec<String> = ran.stdout.split("-- ").map(str::to_owned).collect();
        parts.try_into().unwrap_or_else(|_| panic!("{ran:?}"))
    };
    let [_, call, list, stop]: [String; 4] = run("web.json", "100644");
    assert!(call.contains("\n0\n") && call.contains("warning"), "{call}");
    assert!(list.contains("detached") && list.ends_with("ended with 0\n"), "{list}");
    // It ends, and what is mounted can't be removed.
    assert!(stop.contains("busy") && stop.ends_with("ended with 1\n"), "{stop}");
    let [_, call, list, stop] = run("web.sock", "140777");
    assert!(call.contains(REFUSAL) && call.ends_with("ended with 1\n"), "{call}");
    assert!(list.contains("web") && list.ends_with("ended with 0\n"), "{list}");
    assert!(stop.contains(REFUSAL) && stop.ends_with("ended with 1\n"), "{stop}");
}

#[test]
fn a_cgroup_that_is_said_to_lie_in_such_a_file_system_keeps_nobody_waiting() {
    let test = TestHome::new();
    chown(test.path().parent().unwrap(), Some(65_530), Some(65_530)).unwrap();
    let ran = beside_a_silent_file_system(
        &test,
        r#"mkdir $FARCALL_DIR/fs
        serve 9 $FARCALL_DIR/fs 40755
        echo '{"pid":2000000000,"start_time":1,"pid_ns":'$(stat -L -c %i /proc/self/ns/pid)',"holder":null,
            "since":1,"cgroups":["'$FARCALL_DIR/fs/a/b'"]}' > $FARCALL_DIR/gone.json
        chown -h 65530:65530 $FARCALL_DIR $FARCALL_DIR/gone.json
        try ls; try stop gone
        chown 0:0 $FARCALL_DIR"#,
    );
    assert!(ran.stdout.contains("\ngone ") && ran.stdout.contains("ended with 0\n"), "{ran:?}");
    assert!(ran.stdout.contains("no such persistent process\nended with 1\n"), "{ran:?}");
}
