//! The controller's memory: it dumps core, it is killed for what it takes, and it is gone.

use std::fs;

use nix::errno::Errno;
use nix::libc;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;

use crate::common::{TestHome, alive, until};
use crate::controller::{Controller, Model, play, survives};
use crate::tree::Tree;

/// Whether two processes have one address space: kcmp(2).
fn share_memory(a: i32, b: i32) -> bool {
    const KCMP_VM: libc::c_int = 1;
    // SAFETY: the call takes numbers.
    match unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_VM, 0, 0) } {
        -1 => panic!("this test needs kcmp(2), and the right to trace: {}", Errno::last()),
        order => order == 0,
    }
}

#[test]
fn it_has_an_address_space_of_its_own() {
    play();
    for (model, shares) in [(Model::Start, false), (Model::Later, false), (Model::Memory, true)] {
        let home = TestHome::new();
        let test = "dump::it_has_an_address_space_of_its_own";
        let controller = Controller::start(&mut Controller::command(test, model, &home));
        assert!(!share_memory(controller.process, controller.pid));
        // What it can share is its parent's, if that was asked for.
        let stat = fs::read_to_string(format!("/proc/{}/stat", controller.process)).unwrap();
        let parent = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(1).unwrap();
        let parent = parent.parse().unwrap();
        assert_ne!(parent, controller.pid, "the root server is in between");
        assert_eq!(share_memory(controller.process, parent), shares, "{model:?}");
    }
}

#[test]
fn the_core_dump_of_its_controller() {
    play();
    let (_, most) = getrlimit(Resource::RLIMIT_CORE).unwrap();
    assert!(most > 0, "this test needs core dumps: the hard limit of RLIMIT_CORE is 0");
    for (word, signal) in [("segv", Signal::SIGSEGV), ("abort", Signal::SIGABRT)] {
        for model in [Model::Start, Model::Later, Model::Memory] {
            let home = TestHome::new();
            let mut command =
                Controller::command("dump::the_core_dump_of_its_controller", model, &home);
            // There a dump goes, unless the kernel has been told another place.
            command.current_dir(home.path().parent().unwrap());
            let limit = move || Ok(setrlimit(Resource::RLIMIT_CORE, most, most)?);
            // SAFETY: setrlimit(2) may be called between fork and exec.
            unsafe { std::os::unix::process::CommandExt::pre_exec(&mut command, limit) };
            let mut controller = Controller::start(&mut command);
            controller.role.say(word);
            let dumped = controller.died_of(signal);
            let pattern = fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
            assert!(dumped, "this test needs core dumps: core_pattern is {pattern}");
            survives(&home, controller.process);
        }
    }
}

#[test]
fn the_killing_of_its_controller_for_the_memory_that_it_takes() {
    play();
    let tree = Tree::with_memory();
    for model in [Model::Start, Model::Later] {
        let home = TestHome::new();
        let group = tree.group();
        group.limit_memory(64 << 20);
        let test = "dump::the_killing_of_its_controller_for_the_memory_that_it_takes";
        let mut command = Controller::command(test, model, &home);
        let mut controller = Controller::start_when(&mut command, |pid| group.put(pid));
        let process = controller.process;
        assert!(group.processes().contains(&process), "it is in the same cgroup");
        controller.role.say("eat");
        controller.died_of(Signal::SIGKILL);
        assert!(group.out_of_memory(), "it was killed for that");
        survives(&home, process);
        until("it is gone", || !alive(process));
    }
}
