//! Processes: what children share and what they have for themselves, and how they end.

use crate::common;

use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use common::{
    LIMIT, Role, alive, alone, fds, limit_descriptors, role, root, roots, tell, until, until_async,
};
use farcall::calls::{Sysno, WaitStatus};
use farcall::host::local::Stdio;
use farcall::image::Carrier;
use farcall::link::Polling;
use farcall::{Child, Error, Local, Process, image};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;
use nix::sched::CloneFlags;
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid};

async fn word(process: &Process, address: u64) -> u64 {
    let bytes = process.read_memory(address, 8).await.unwrap();
    u64::from_le_bytes(bytes.try_into().unwrap())
}

#[tokio::test]
async fn an_isolated_child_has_a_copy_of_the_memory_and_a_sharing_one_the_memory_itself() {
    let root = root().await;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let memory = root.mmap(4096, protection, MapFlags::MAP_PRIVATE, None).await.unwrap();
    let at = memory.address();
    root.write_memory(at, 1u64.to_le_bytes()).await.unwrap();
    let isolated = root.child().spawn().await.unwrap();
    let sharing = root.child().share_memory().spawn().await.unwrap();
    assert!(!isolated.shares_memory());
    assert!(sharing.shares_memory());
    root.write_memory(at, 2u64.to_le_bytes()).await.unwrap();
    assert_eq!(word(&isolated, at).await, 1);
    assert_eq!(word(&sharing, at).await, 2);
    sharing.write_memory(at, 3u64.to_le_bytes()).await.unwrap();
    isolated.write_memory(at, 4u64.to_le_bytes()).await.unwrap();
    assert_eq!(word(&root, at).await, 3);
    assert_eq!(word(&isolated, at).await, 4);
}

#[tokio::test]
async fn only_the_root_keeps_the_stack_that_its_program_was_started_with() {
    let root = root().await;
    // So the request that says so has been executed.
    root.getpid().await.unwrap();
    let isolated = root.child().spawn().await.unwrap();
    let sharing = root.child().share_memory().spawn().await.unwrap();
    for (process, has_stack) in [(&root, true), (&*isolated, false), (&*sharing, true)] {
        let proc = format!("/proc/{}", process.pid().unwrap());
        let maps = std::fs::read_to_string(format!("{proc}/maps")).unwrap();
        assert_eq!(maps.contains("[stack]"), has_stack, "{maps}");
        assert_eq!(std::fs::read_to_string(format!("{proc}/comm")).unwrap(), "farcall\n");
    }
}

#[tokio::test]
async fn descriptors_and_the_working_directory_are_shared_where_that_is_asked_for() {
    let root = root().await;
    let own = root.child().spawn().await.unwrap();
    let sharing = root.child().share_files().share_fs().spawn().await.unwrap();
    let fd = root.openat(None, "/etc/passwd", OFlag::O_RDONLY, Mode::empty()).await.unwrap();
    let first = sharing.read(&fd, 4).await.unwrap();
    assert_eq!(first, std::fs::read("/etc/passwd").unwrap()[..4]);
    assert!(matches!(own.read(&fd, 4).await, Err(Error::ForeignFd { .. })));
    let number = fd.number() as u64;
    assert!(own.syscall(Sysno::fcntl, [number, 1, 0, 0, 0, 0]).await.is_err());

    let directory = tempfile::tempdir().unwrap();
    let mut path = directory.path().as_os_str().as_encoded_bytes().to_vec();
    path.push(0);
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let memory = sharing.mmap(4096, protection, MapFlags::MAP_PRIVATE, None).await.unwrap();
    sharing.write_memory(memory.address(), path).await.unwrap();
    sharing.syscall(Sysno::chdir, [memory.address(), 0, 0, 0, 0, 0]).await.unwrap();
    let link = |process: &Process| {
        std::fs::read_link(format!("/proc/{}/cwd", process.pid().unwrap())).unwrap()
    };
    assert_eq!(link(&root), directory.path());
    assert_ne!(link(&own), directory.path());
}

#[tokio::test]
async fn namespaces_are_flags() {
    let root = root().await;
    let flags = CloneFlags::CLONE_NEWUSER
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC;
    let child = root.child().flags(flags).spawn().await.unwrap();
    assert_eq!(child.getpid().await.unwrap(), 1);
    assert_eq!(child.getppid().await.unwrap(), 0);
    for name in ["user", "pid", "mnt", "net", "uts", "ipc"] {
        let of = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
        assert_ne!(of(child.pid().unwrap()), of(root.pid().unwrap()), "{name}");
    }
    // And its children are in them.
    let grandchild = child.child().share_memory().share_files().spawn().await.unwrap();
    assert_eq!(grandchild.getpid().await.unwrap(), 2);
}

#[tokio::test]
async fn children_have_children_to_any_depth() {
    for root in roots().await {
        let mut line: Vec<Child> = Vec::new();
        for depth in 0..12 {
            let parent = line.last().map_or(&root, |child| child.process());
            let builder = parent.child();
            let builder = match depth % 3 {
                0 => builder,
                1 => builder.share_memory(),
                _ => builder.share_memory().share_files(),
            };
            let child = builder.spawn().await.unwrap();
            assert_eq!(child.getppid().await.unwrap(), parent.getpid().await.unwrap());
            line.push(child);
        }
        // Each still answers, and each ends with a status of its own, youngest first.
        for (status, mut child) in line.into_iter().enumerate().rev() {
            child.exit(status as i32).await.unwrap();
            assert_eq!(child.wait().await.unwrap(), WaitStatus::Exited(status as i32));
        }
    }
}

#[tokio::test]
async fn flags_that_would_break_a_child_are_refused() {
    let root = root().await;
    for flags in [
        CloneFlags::CLONE_THREAD | CloneFlags::CLONE_VM | CloneFlags::CLONE_SIGHAND,
        CloneFlags::CLONE_SIGHAND,
        CloneFlags::CLONE_VFORK,
        CloneFlags::CLONE_PARENT,
        CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS,
    ] {
        let refused = root.child().flags(flags).spawn().await;
        assert!(matches!(refused, Err(Error::CloneFlags(_))), "{flags:?}: {refused:?}");
    }
    let handlers = CloneFlags::CLONE_VM | CloneFlags::CLONE_SIGHAND;
    let child = root.child().flags(handlers).spawn().await.unwrap();
    child.getpid().await.unwrap();
}

#[tokio::test]
async fn a_status_is_the_real_one() {
    for root in roots().await {
        for share in [false, true] {
            let spawn = || {
                let child = root.child();
                if share { child.share_memory().share_files() } else { child }.spawn()
            };
            for status in [0, 1, 42, 255] {
                let mut child = spawn().await.unwrap();
                child.exit(status).await.unwrap();
                assert_eq!(child.wait().await.unwrap(), WaitStatus::Exited(status));
                // And it stays so.
                assert_eq!(child.wait().await.unwrap(), WaitStatus::Exited(status));
            }
            for signal in [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGUSR1] {
                let mut child = spawn().await.unwrap();
                child.kill(signal).unwrap();
                let WaitStatus::Signaled { signal: got, .. } = child.wait().await.unwrap() else {
                    panic!("it was killed");
                };
                assert_eq!(got, signal as i32);
            }
        }
    }
}

#[tokio::test]
async fn a_program_runs_in_a_child_of_every_kind() {
    for root in roots().await {
        for (memory, files) in [(false, false), (true, false), (false, true), (true, true)] {
            let mut builder = root.child();
            if memory {
                builder = builder.share_memory();
            }
            if files {
                builder = builder.share_files();
            }
            let mut child = builder.spawn().await.unwrap();
            let (reading, writing) = child.pipe2(OFlag::empty()).await.unwrap();
            let pipe = child.fetch_fd(&reading).await.unwrap();
            child.dup2(&writing, 1).await.unwrap();
            let failed = child.execve("/nonexistent", ["x"], [""; 0]).await;
            assert_eq!(failed.unwrap_err().errno(), Some(Errno::ENOENT));
            // It serves on after that.
            child.getpid().await.unwrap();
            let script = "echo \"$GREETING $1\"; exit 7";
            child
                .execve("/bin/sh", ["sh", "-c", script, "sh", "there"], ["GREETING=hello"])
                .await
                .unwrap();
            assert!(matches!(child.getpid().await, Err(Error::Gone)));
            assert_eq!(child.wait().await.unwrap(), WaitStatus::Exited(7));
            drop((reading, writing));
            let mut text = [0; 64];
            let n = nix::unistd::read(&pipe, &mut text).unwrap();
            assert_eq!(&text[..n], b"hello there\n");
        }
    }
}

#[tokio::test]
async fn nothing_of_a_child_is_left_in_its_parent() {
    for root in roots().await {
        let pid = root.pid().unwrap();
        // What the first child of its kind leaves is there to be used again: a stack, and a stream.
        let mut first = root.child().share_memory().share_files().spawn().await.unwrap();
        first.exit(0).await.unwrap();
        first.wait().await.unwrap();
        let maps = || std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().lines().count();
        // A program takes the stream with it that its child has used again.
        let quiet = |before: (usize, usize)| fds(pid).len() <= before.0 && maps() == before.1;
        let children = || {
            let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
            list.split_whitespace().count()
        };
        until_async("the first child is reaped", || children() == 0).await;
        root.getpid().await.unwrap();
        let before = (fds(pid).len(), maps());
        for (share, exec, wait) in [
            (false, false, false),
            (false, true, true),
            (true, false, true),
            (true, false, false),
            (true, true, true),
            (true, true, false),
        ] {
            let builder = root.child();
            let builder = if share { builder.share_memory().share_files() } else { builder };
            let mut child = builder.spawn().await.unwrap();
            if exec {
                child.execve("/bin/true", ["true"], [""; 0]).await.unwrap();
            } else {
                child.exit(0).await.unwrap();
            }
            if wait {
                child.wait().await.unwrap();
            }
            drop(child);
            until_async("descriptors, mappings and zombies are gone", || {
                quiet(before) && children() == 0
            })
            .await;
        }
    }
}

#[tokio::test]
async fn a_child_dies_with_its_parent() {
    for root in roots().await {
        for share in [false, true] {
            for credentials in [false, true] {
                let parent = root.child().spawn().await.unwrap();
                let builder = parent.child();
                let builder = if share { builder.share_memory().share_files() } else { builder };
                let child = builder.spawn().await.unwrap();
                if credentials {
                    let (user, group) = (Uid::from_raw(65_533), Gid::from_raw(65_533));
                    child.setgroups(&[group]).await.unwrap();
                    child.setresgid(Some(group), Some(group), Some(group)).await.unwrap();
                    child.setresuid(Some(user), Some(user), Some(user)).await.unwrap();
                    assert_eq!(child.syscall(Sysno::geteuid, [0; 6]).await.unwrap(), 65_533);
                }
                let pid = child.pid().unwrap();
                // Blocked in a call, it does not see the end of its stream.
                let sleeping = child.nanosleep(Duration::from_secs(3600));
                tokio::pin!(sleeping);
                let blocked = || common::blocked_in(pid) == Some(Sysno::nanosleep as usize);
                let asleep = tokio::select! {
                    _ = &mut sleeping => false,
                    () = until_async("the child sleeps", blocked) => true,
                };
                assert!(asleep);
                parent.kill(Signal::SIGKILL).unwrap();
                until_async("the child dies with its parent", || !alive(pid)).await;
                assert!(matches!(sleeping.await, Err(Error::Lost(_))));
            }
        }
    }
}

#[tokio::test]
async fn a_program_is_run_in_a_new_child_of_any_kind_or_there_is_no_child() {
    let [old, new] = roots().await;
    // Without memory in common a child is asked whether it has begun.
    let with_ring = root().await;
    with_ring.enter_ring(Polling::Adaptive).await.unwrap();
    for root in [old, new, with_ring] {
        let kinds = [
            root.child(),
            root.child().share_memory(),
            root.child().share_memory().share_files(),
            root.child().share_memory().flags(CloneFlags::CLONE_NEWPID),
        ];
        for kind in kinds {
            // It has no descriptors of servers.
            let script = "test \"$0 $1 $GREETING\" = 'sh there hello' \
                          && ! ls -l /proc/$$/fd | grep -q socket && exit 42";
            let argv = ["sh", "-c", script, "sh", "there"];
            let run = kind.clone().exec("/bin/sh", argv, ["GREETING=hello"]).await;
            let mut child = run.unwrap();
            assert_eq!(child.wait().await.unwrap(), WaitStatus::Exited(42));
            assert!(child.getpid().await.is_err());
            let failed = kind.clone().exec("/nonexistent", ["x"], [""; 0]).await;
            assert_eq!(failed.unwrap_err().errno(), Some(Errno::ENOENT));
            let failed = kind.exec("/bin/true", ["nul\0"], [""; 0]).await;
            assert_eq!(failed.unwrap_err().errno(), Some(Errno::EINVAL));
        }
        // Those that could not run it are gone.
        let pid = root.pid().unwrap();
        let children = || std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        until_async("no child is left", || children().unwrap().is_empty()).await;
        root.getpid().await.unwrap();
    }
}

#[test]
fn a_child_that_is_stopped_when_it_is_there_dies_with_its_controller() {
    const TEST: &str = "a_child_that_is_stopped_when_it_is_there_dies_with_its_controller";
    const CHILDREN: usize = 240;
    if role().is_some() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let root = root().await;
            // With memory that is shared with this process, in which children can say something.
            root.enter_ring(Polling::Adaptive).await.unwrap();
            let mut children = Vec::new();
            for number in 0..CHILDREN {
                let child = match number % 3 {
                    0 => root.child().share_memory().share_files(),
                    1 => root.child().share_memory(),
                    _ => root.child(),
                };
                let child = child.spawn().await.unwrap();
                // Nothing more that it would do, it does.
                child.kill(Signal::SIGSTOP).unwrap();
                children.push(child);
            }
            let pids = children.iter().map(|child| child.pid().unwrap().to_string());
            tell(pids.collect::<Vec<_>>().join(" "));
            std::future::pending::<()>().await;
        });
        return;
    }
    let mut controller = Role::start(TEST, "controller");
    let told = controller.told();
    let pids: Vec<i32> = told.split(' ').map(|pid| pid.parse().unwrap()).collect();
    assert_eq!(pids.len(), CHILDREN);
    controller.kill();
    let left = || pids.iter().filter(|pid| alive(**pid)).count();
    let end = std::time::Instant::now() + LIMIT;
    while left() > 0 && std::time::Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
    }
    let tied = left();
    for pid in pids.iter().filter(|pid| alive(**pid)) {
        // None is left behind by the test.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(*pid), Signal::SIGKILL);
    }
    assert_eq!(tied, 0, "children that outlived their controller, of {CHILDREN}");
}

#[test]
fn all_die_with_their_controller() {
    const TEST: &str = "all_die_with_their_controller";
    if role().is_some() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let root = root().await;
            let one = root.child().spawn().await.unwrap();
            let two = one.child().share_memory().share_files().spawn().await.unwrap();
            let three = two.child().spawn().await.unwrap();
            let nobody = Some(Uid::from_raw(65_533));
            three.setresuid(nobody, nobody, nobody).await.unwrap();
            let four = two.child().share_memory().spawn().await.unwrap();
            four.execve("/bin/sleep", ["sleep", "3600"], [""; 0]).await.unwrap();
            let pids: Vec<String> = [&root, &one, &two, &three, &four]
                .map(|process: &Process| process.pid().unwrap().to_string())
                .into();
            tell(pids.join(" "));
            // All of them are blocked in calls.
            let sleep = Duration::from_secs(3600);
            let _ = tokio::join!(
                root.nanosleep(sleep),
                one.nanosleep(sleep),
                two.nanosleep(sleep),
                three.nanosleep(sleep)
            );
        });
        return;
    }
    let mut controller = Role::start(TEST, "controller");
    let told = controller.told();
    let pids: Vec<i32> = told.split(' ').map(|pid| pid.parse().unwrap()).collect();
    until("they are blocked", || {
        pids[..4].iter().all(|pid| common::blocked_in(*pid) == Some(Sysno::nanosleep as usize))
    });
    controller.kill();
    for pid in pids {
        until("it dies with its controller", || !alive(pid));
    }
}

#[test]
fn nothing_dies_with_the_thread_that_asked_for_it() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let handle = runtime.handle().clone();
    let asked = std::thread::spawn(move || {
        handle.block_on(async {
            let root = root().await;
            let child = root.child().spawn().await.unwrap();
            let sharing = child.child().share_memory().share_files().spawn().await.unwrap();
            (root, child, sharing)
        })
    });
    let (root, child, sharing) = asked.join().unwrap();
    runtime.block_on(async {
        for process in [&root, &child, &sharing] as [&Process; 3] {
            process.getpid().await.unwrap();
            assert!(alive(process.pid().unwrap()));
        }
    });
}

#[tokio::test]
async fn a_process_that_blocks_blocks_nobody_else() {
    let root = root().await;
    let mut sleeper = root.child().share_memory().share_files().spawn().await.unwrap();
    let other = root.child().share_memory().share_files().spawn().await.unwrap();
    let sleeping = tokio::spawn({
        let process = sleeper.process().clone();
        async move { process.nanosleep(Duration::from_secs(3600)).await }
    });
    let pid = sleeper.pid().unwrap();
    let nanosleep = Some(Sysno::nanosleep as usize);
    until_async("it sleeps", || common::blocked_in(pid) == nanosleep).await;
    root.getpid().await.unwrap();
    other.getpid().await.unwrap();
    // Waiting for it does not block its parent either.
    let waiting = sleeper.wait();
    tokio::pin!(waiting);
    let early = tokio::select! {
        _ = &mut waiting => true,
        _ = root.getpid() => false,
    };
    assert!(!early);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    let status = waiting.await.unwrap();
    assert_eq!(status, WaitStatus::Signaled { signal: Signal::SIGTERM as i32, core_dumped: false });
    assert!(matches!(sleeping.await.unwrap(), Err(Error::Lost(_))));
}

#[tokio::test]
async fn what_a_dropped_call_has_made_is_given_back() {
    let root = root().await;
    let pid = root.pid().unwrap();
    let before = fds(pid);
    for _ in 0..50 {
        let open = root.openat(None, "/etc/passwd", OFlag::O_RDONLY, Mode::empty());
        // Polled once: the request is on its way.
        tokio::select! {
            biased;
            _ = open => {}
            () = std::future::ready(()) => {}
        }
    }
    root.getpid().await.unwrap();
    until_async("all are closed", || fds(pid) == before).await;
}

#[tokio::test]
async fn handles_close_what_they_own_and_know_whose_it_is() {
    let root = root().await;
    let pid = root.pid().unwrap();
    let before = fds(pid);
    let fd = root.openat(None, "/etc/passwd", OFlag::O_RDONLY, Mode::empty()).await.unwrap();
    assert_eq!(fds(pid)[&fd.number()], std::path::Path::new("/etc/passwd"));
    // A second handle to the same number: the last one closes it.
    let again = root.adopt_fd(fd.number()).unwrap();
    fd.close().await.unwrap();
    assert_eq!(fds(pid).len(), before.len() + 1);
    again.close().await.unwrap();
    assert_eq!(fds(pid), before);
    // The server's own descriptors are not to be had.
    for number in before.keys().filter(|number| **number > 2) {
        assert!(root.adopt_fd(*number).is_err(), "{number}");
    }
}

#[tokio::test]
async fn descriptors_travel_both_ways() {
    for root in roots().await {
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"from here", 0).unwrap();
        use std::os::fd::AsFd;
        let there = root.send_fds(&[file.as_fd(), file.as_fd()]).await.unwrap();
        assert_eq!(root.read(&there[0], 64).await.unwrap(), b"from here");
        let back = root.fetch_fd(&there[1]).await.unwrap();
        let inode = |fd: i32| std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap();
        assert_eq!(inode(back.as_raw_fd()), inode(file.as_raw_fd()));
        // Fetches that overlap, and fetches that are given up, do not mix up the others.
        let (reading, writing) = root.pipe2(OFlag::empty()).await.unwrap();
        for _ in 0..20 {
            tokio::select! {
                biased;
                _ = root.fetch_fd(&reading) => {}
                () = std::future::ready(()) => {}
            }
            let (a, b) = tokio::join!(root.fetch_fd(&writing), root.fetch_fd(&there[0]));
            let target = |fd: std::os::fd::OwnedFd| inode(fd.as_raw_fd());
            assert!(target(a.unwrap()).to_str().unwrap().starts_with("pipe:"));
            assert_eq!(target(b.unwrap()), inode(file.as_raw_fd()));
        }
    }
}

#[tokio::test]
async fn memory_that_is_not_there_is_an_error_and_the_stream_stays_in_step() {
    let root = root().await;
    assert!(matches!(root.read_memory(8, 16).await, Err(Error::Fault { address: 8, len: 16 })));
    assert!(matches!(root.write_memory(8, vec![1; 100_000]).await, Err(Error::Fault { .. })));
    let big = vec![7; 3 << 20];
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let memory = root.mmap(big.len(), protection, MapFlags::MAP_PRIVATE, None).await.unwrap();
    root.write_memory(memory.address(), big.clone()).await.unwrap();
    assert_eq!(root.read_memory(memory.address(), big.len()).await.unwrap(), big);
    let beyond = memory.address() + big.len() as u64 - 10;
    let _guarded = root.read_memory(beyond, 1 << 20).await;
    root.getpid().await.unwrap();
}

#[tokio::test]
async fn the_image_is_executed_from_a_sealed_memfd_or_from_an_unlinked_file() {
    let temporary = std::env::temp_dir();
    for (carrier, prefix) in [
        (Carrier::Memfd, "/memfd:farcall"),
        (Carrier::UnlinkedFile, temporary.to_str().unwrap()),
        (Carrier::Automatic, "/"),
    ] {
        let root = Local::new().stdio(Stdio::Null).carrier(carrier).start().await.unwrap();
        let exe = std::fs::read_link(format!("/proc/{}/exe", root.pid().unwrap())).unwrap();
        let exe = exe.to_str().unwrap().to_owned();
        assert!(exe.starts_with(prefix) && exe.ends_with("(deleted)"), "{exe}");
        let child = root.child().share_memory().spawn().await.unwrap();
        child.getpid().await.unwrap();
    }
    let seals = |fd: &std::os::fd::OwnedFd| {
        nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GET_SEALS).unwrap()
    };
    use nix::libc::{F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_WRITE};
    let all = F_SEAL_GROW | F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_WRITE;
    for file in [image::executable(Carrier::Memfd).unwrap(), image::mappable().unwrap()] {
        assert_eq!(seals(&file) & all, all);
    }
}

#[tokio::test]
async fn a_root_server_holds_nothing_that_was_open_here() {
    if !alone("a_root_server_holds_nothing_that_was_open_here") {
        return;
    }
    // Not closed on exec, as what a shell leaves open.
    let (reading, writing) = nix::unistd::pipe().unwrap();
    let pipe = std::fs::read_link(format!("/proc/self/fd/{}", reading.as_raw_fd())).unwrap();
    let root = root().await;
    assert!(fds(root.pid().unwrap()).values().all(|what| *what != pipe));
    assert_eq!(fds(std::process::id() as i32)[&writing.as_raw_fd()], pipe);
    let streams: Vec<_> = fds(root.pid().unwrap()).into_iter().filter(|(n, _)| *n <= 2).collect();
    assert_eq!(streams.len(), 3);
    assert!(streams.iter().all(|(_, what)| what == std::path::Path::new("/dev/null")));
}

#[tokio::test]
async fn many_tasks_share_a_connection() {
    let root = root().await;
    // SAFETY: the call has no pointers.
    let nice = unsafe { nix::libc::getpriority(nix::libc::PRIO_PROCESS, 0) };
    let expected = u64::from((20 - nice).cast_unsigned());
    let calls: Vec<_> = (0..500u64)
        .map(|i| {
            let root = root.clone();
            tokio::spawn(async move {
                // getpriority answers 20 - nice; lseek on a pipe fails: both must reach their caller.
                if i % 2 == 0 {
                    assert_eq!(root.syscall(Sysno::getpriority, [0; 6]).await.unwrap(), expected);
                } else {
                    let errno = root.syscall(Sysno::close, [100_000 + i, 0, 0, 0, 0, 0]).await;
                    assert_eq!(errno.unwrap_err().errno(), Some(Errno::EBADF));
                }
            })
        })
        .collect();
    for call in calls {
        tokio::time::timeout(LIMIT, call).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_child_that_its_parents_signal_can_not_reach_dies_with_it_all_the_same() {
    let root = root().await;
    let parent = root.child().spawn().await.unwrap();
    let child = parent.child().spawn().await.unwrap();
    let pid = child.pid().unwrap();
    // The kernel sends the parent-death signal with the rights that the parent has left.
    let user = Some(Uid::from_raw(65_533));
    parent.setresuid(user, user, user).await.unwrap();
    let _blocked = tokio::spawn({
        let child = child.process().clone();
        async move { child.nanosleep(Duration::from_secs(3600)).await }
    });
    let blocked = || common::blocked_in(pid) == Some(Sysno::nanosleep as usize);
    until_async("the child sleeps", blocked).await;
    parent.kill(Signal::SIGKILL).unwrap();
    until_async("the child dies with its parent", || !alive(pid)).await;
}

#[tokio::test]
async fn a_child_that_does_not_fit_into_its_parents_table_leaves_nothing() {
    for root in roots().await {
        for share in [false, true] {
            let parent = root.child().spawn().await.unwrap();
            let pid = parent.pid().unwrap();
            // What the first child of its kind leaves is there to be used again.
            drop(parent.child().spawn().await.unwrap());
            let zombies = || {
                let list = format!("/proc/{pid}/task/{pid}/children");
                !std::fs::read_to_string(list).unwrap().is_empty()
            };
            until_async("the first child is reaped", || !zombies()).await;
            parent.getpid().await.unwrap();
            let used: Vec<u64> = fds(pid).into_keys().map(|number| number as u64).collect();
            // Room for none, for one (which is enough where the pidfd need not be there), and for
            // both descriptors.
            for room in 0..=2 {
                let free = (0..).filter(|number| !used.contains(number));
                limit_descriptors(pid, free.take(room + 1).last().unwrap());
                let before = fds(pid);
                let builder = parent.child();
                let builder = if share { builder.share_memory().share_files() } else { builder };
                let spawned = builder.spawn().await;
                if room != 1 {
                    assert_eq!(spawned.is_ok(), room == 2, "{share} {room}: {spawned:?}");
                }
                if let Err(error) = &spawned {
                    assert_eq!(error.errno(), Some(Errno::EMFILE), "{error}");
                }
                drop(spawned);
                until_async("all is as before", || fds(pid) == before && !zombies()).await;
                parent.getpid().await.unwrap();
            }
        }
    }
}

/// The addresses behind guard pages in a process: where stacks of its children begin.
fn stacks(pid: i32) -> Vec<u64> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let guards = maps.lines().filter(|line| line.contains(" ---p "));
    let end = |line: &str| u64::from_str_radix(line.split(['-', ' ']).nth(1).unwrap(), 16).unwrap();
    guards.map(end).collect()
}

#[tokio::test]
async fn a_stack_that_a_child_has_left_is_the_next_ones_and_nobody_elses() {
    for root in roots().await {
        let pid = root.pid().unwrap();
        let spawn = || root.child().share_memory().share_files().spawn();
        let mut first = spawn().await.unwrap();
        let stack = stacks(pid);
        assert_eq!(stack.len(), 1);
        // It is used, so an isolated child begins on another one, and both work.
        let isolated = root.child().spawn().await.unwrap();
        assert_eq!(stacks(pid).len(), 2);
        first.exit(0).await.unwrap();
        first.wait().await.unwrap();
        for _ in 0..20 {
            let mut next = spawn().await.unwrap();
            assert_eq!(next.getppid().await.unwrap(), root.getpid().await.unwrap());
            next.exit(3).await.unwrap();
            assert_eq!(next.wait().await.unwrap(), WaitStatus::Exited(3));
        }
        assert_eq!(stacks(pid).len(), 2);
        assert!(stacks(pid).contains(&stack[0]));
        isolated.getpid().await.unwrap();
        // Many at once have one each, whatever ends meanwhile.
        let mut children = Vec::new();
        for number in 0..12 {
            children.push(spawn().await.unwrap());
            if number % 3 == 2 {
                let mut ended = children.remove(0);
                ended.exit(0).await.unwrap();
                ended.wait().await.unwrap();
            }
        }
        assert_eq!(children.len(), 8);
        assert!(stacks(pid).len() >= 8);
        for child in &children {
            let null =
                child.openat(None, "/dev/null", OFlag::O_WRONLY, Mode::empty()).await.unwrap();
            assert_eq!(child.write(&null, [7; 100]).await.unwrap(), 100);
        }
        for mut child in children {
            child.exit(0).await.unwrap();
            child.wait().await.unwrap();
        }
        // And a few are kept, not all.
        root.getpid().await.unwrap();
        until_async("most stacks are unmapped", || stacks(pid).len() <= 4).await;
    }
}

#[tokio::test]
async fn a_parent_has_nothing_open_for_children_that_live() {
    let root = root().await;
    let pid = root.pid().unwrap();
    let before = fds(pid);
    let mut children = Vec::new();
    for _ in 0..10 {
        children.push(root.child().spawn().await.unwrap());
    }
    root.getpid().await.unwrap();
    assert_eq!(fds(pid), before);
    for child in &children {
        child.getpid().await.unwrap();
    }
}

#[tokio::test]
async fn a_child_that_somebody_else_has_reaped_has_no_status() {
    let root = root().await;
    let mut child = root.child().spawn().await.unwrap();
    child.exit(5).await.unwrap();
    child.ended().await;
    let status = root.waitid_pid(child.pid_in_parent()).await.unwrap();
    assert_eq!(status, Some(WaitStatus::Exited(5)));
    assert_eq!(child.wait().await.unwrap_err().errno(), Some(Errno::ECHILD));
    // A parent that ignores the signal keeps no zombies: nothing is waited for in vain.
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let memory = root.mmap(4096, protection, MapFlags::MAP_PRIVATE, None).await.unwrap();
    root.write_memory(memory.address(), 1u64.to_le_bytes()).await.unwrap();
    let ignore = [Signal::SIGCHLD as u64, memory.address(), 0, 8, 0, 0];
    root.syscall(Sysno::rt_sigaction, ignore).await.unwrap();
    let mut child = root.child().spawn().await.unwrap();
    child.exit(5).await.unwrap();
    assert_eq!(child.wait().await.unwrap_err().errno(), Some(Errno::ECHILD));
}

#[tokio::test]
async fn a_pid_that_is_another_childs_by_now_is_not_reaped_for_the_first() {
    let root = root().await;
    // In a pid namespace of its own a process may choose the pids of its children.
    let flags = CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWPID;
    let parent = root.child().flags(flags).spawn().await.unwrap();
    let mut child = parent.child().spawn().await.unwrap();
    let pid = child.pid_in_parent();
    child.exit(5).await.unwrap();
    child.ended().await;
    parent.waitid_pid(pid).await.unwrap();
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let memory = parent.mmap(4096, protection, MapFlags::MAP_PRIVATE, None).await.unwrap();
    let at = memory.address();
    // struct clone_args, and behind it the pid that set_tid points to.
    let signal = Signal::SIGCHLD as u64;
    let arguments = [0, 0, 0, 0, signal, 0, 0, 0, at + 88, 1, 0, pid as u64];
    let bytes: Vec<u8> = arguments.iter().flat_map(|word| word.to_le_bytes()).collect();
    parent.write_memory(at, bytes).await.unwrap();
    let other = parent.syscall(Sysno::clone3, [at, 88, 0, 0, 0, 0]).await.unwrap();
    assert_eq!(other, pid as u64);
    assert_eq!(child.wait().await.unwrap_err().errno(), Some(Errno::ECHILD));
    // The other one's status is still there.
    until_other_ended(&parent, pid).await;
}

async fn until_other_ended(parent: &Process, pid: i32) {
    let reaped = async {
        loop {
            if let Some(status) = parent.waitid_pid(pid).await.unwrap() {
                return status;
            }
        }
    };
    assert_eq!(tokio::time::timeout(LIMIT, reaped).await.unwrap(), WaitStatus::Exited(0));
}

#[tokio::test]
async fn a_process_that_may_have_no_descriptors_serves_on() {
    for root in roots().await {
        let child = root.child().spawn().await.unwrap();
        // ppoll fails then.
        limit_descriptors(child.pid().unwrap(), 0);
        for _ in 0..3 {
            child.getpid().await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn children_that_come_and_go_side_by_side_leave_nothing() {
    async fn come_and_go(root: Process, number: i32) {
        for step in 0..12 {
            let builder = root.child();
            let builder = match (number + step) % 4 {
                0 => builder,
                1 => builder.share_memory(),
                2 => builder.share_memory().share_files(),
                _ => builder.share_files(),
            };
            let mut child = builder.spawn().await.unwrap();
            let status = match step % 3 {
                0 => {
                    let grandchild = child.child().share_memory().spawn().await.unwrap();
                    grandchild.getpid().await.unwrap();
                    drop(grandchild);
                    child.exit(number).await.unwrap();
                    number
                }
                1 => {
                    child.execve("/bin/true", ["true"], [""; 0]).await.unwrap();
                    0
                }
                _ => continue,
            };
            assert_eq!(child.wait().await.unwrap(), WaitStatus::Exited(status));
        }
    }
    for root in roots().await {
        let pid = root.pid().unwrap();
        if root.connection().version() > 0 {
            // What it gets when it is called often, it has.
            root.enter_ring(Polling::Adaptive).await.unwrap();
        }
        // But streams that are kept for children to come.
        let others = || {
            let own = root.server_descriptors();
            fds(pid).into_iter().filter(|(number, _)| !own.contains(number)).collect::<Vec<_>>()
        };
        let before = others();
        let tasks: Vec<_> =
            (0..8).map(|number| tokio::spawn(come_and_go(root.clone(), number))).collect();
        for task in tasks {
            tokio::time::timeout(LIMIT, task).await.unwrap().unwrap();
        }
        let children = || std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        until_async("descriptors and zombies are gone", || {
            others() == before && children().unwrap().is_empty()
        })
        .await;
        until_async("most stacks are unmapped", || stacks(pid).len() <= 4).await;
    }
}

/// Asks on a thread of its own, which ends, for a root server on this runtime.
async fn asked_by_a_thread(change: impl FnOnce() + Send + 'static) -> Process {
    let runtime = tokio::runtime::Handle::current();
    let thread = std::thread::spawn(move || {
        change();
        runtime.block_on(Local::new().stdio(Stdio::Null).start()).unwrap()
    });
    tokio::task::spawn_blocking(|| thread.join().unwrap()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_root_server_is_where_the_thread_is_that_asks_for_it() {
    let status = |process: &Process, field: &str| {
        let text = std::fs::read_to_string(format!("/proc/{}/status", process.pid().unwrap()));
        let text = text.unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        line.trim_start_matches(':').trim().to_owned()
    };
    let uts = |process: &Process| {
        std::fs::read_link(format!("/proc/{}/ns/uts", process.pid().unwrap())).unwrap()
    };
    let before = asked_by_a_thread(|| {}).await;
    let confined = asked_by_a_thread(|| {
        nix::sched::unshare(CloneFlags::CLONE_NEWUTS).unwrap();
        // The bounding set, which is this thread's alone.
        // SAFETY: no pointers.
        unsafe {
            assert_eq!(libc::prctl(libc::PR_CAPBSET_DROP, 23, 0, 0, 0), 0);
            assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        }
    })
    .await;
    let after = asked_by_a_thread(|| {}).await;
    assert_eq!(uts(&before), std::fs::read_link("/proc/self/ns/uts").unwrap());
    assert_eq!(uts(&before), uts(&after));
    assert_ne!(uts(&before), uts(&confined));
    for (field, here) in [("NoNewPrivs", "0"), ("CapBnd", &*status(&before, "CapBnd"))] {
        assert_eq!(status(&before, field), here);
        assert_eq!(status(&after, field), here);
        assert_ne!(status(&confined, field), here);
    }
    // The threads that asked have ended, and the servers have not.
    for process in [before, confined, after] {
        process.getpid().await.unwrap();
        let pid = process.pid().unwrap();
        drop(process);
        until_async("it ends with its handle", || !Path::new(&format!("/proc/{pid}")).exists())
            .await;
    }
}
