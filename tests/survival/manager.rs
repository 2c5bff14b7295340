//! The clean-up of a service manager, which kills all in the cgroup of a service.

use std::fs;
use std::path::Path;
use std::process::Command;

use farcall::persist::State;

use crate::common::{TestHome, alive, until};
use crate::controller::{Controller, Model, one, play, survives};
use crate::tree::{Group, Tree, VERSIONS};

fn state(home: &TestHome) -> State {
    home.home.place(&one()).state().unwrap()
}

/// All in the cgroup are killed, by pid or by the kernel; and the next one removes what is left.
fn cleaned_up(test: &str, model: Model, clean_up: fn(&Group)) {
    let _all_the_time = VERSIONS.map(Tree::of);
    for version in VERSIONS {
        let tree = Tree::of(version);
        let (home, group) = (TestHome::new(), tree.group());
        let mut command = Controller::command(test, model, &home);
        let controller = Controller::start_when(&mut command, |pid| group.put(pid));
        let process = controller.process;
        assert!(group.processes().contains(&controller.child), "an ordinary child is in there");
        clean_up(&group);
        controller.died();
        if model != Model::Cgroup {
            until("it is killed too", || !alive(process));
            continue;
        }
        let cgroups = state(&home).cgroups;
        assert!(!cgroups.is_empty() && cgroups.iter().all(|cgroup| cgroup.exists()), "{cgroups:?}");
        survives(&home, process);
        home.home.place(&one()).remove().unwrap();
        assert!(!cgroups.iter().any(|cgroup| cgroup.exists()), "{cgroups:?}");
    }
}

#[test]
fn the_kill_of_all_in_its_controllers_cgroup_if_it_has_its_own() {
    play();
    let test = "manager::the_kill_of_all_in_its_controllers_cgroup_if_it_has_its_own";
    cleaned_up(test, Model::Cgroup, Group::clean_up);
}

#[test]
fn the_kill_of_each_pid_in_its_controllers_cgroup_if_it_has_its_own() {
    play();
    let test = "manager::the_kill_of_each_pid_in_its_controllers_cgroup_if_it_has_its_own";
    cleaned_up(test, Model::Cgroup, Group::kill_each);
}

#[test]
fn without_its_own_it_does_not_survive_the_kill_of_all_in_its_controllers_cgroup() {
    play();
    let test =
        "manager::without_its_own_it_does_not_survive_the_kill_of_all_in_its_controllers_cgroup";
    cleaned_up(test, Model::Start, Group::clean_up);
    cleaned_up(test, Model::Start, Group::kill_each);
}

#[test]
fn the_end_of_a_service_that_starts_it_with_the_option() {
    let _all_the_time = VERSIONS.map(Tree::of);
    for (option, lives) in [(&["--cgroup"][..], true), (&[], false)] {
        for version in VERSIONS {
            let tree = Tree::of(version);
            let (home, group) = (TestHome::new(), tree.group());
            let mut service = Command::new("/bin/sh");
            service
                .args(["-c", r#"echo $$ >"$1/cgroup.procs" && shift && exec "$@""#, "sh"])
                .arg(group.path())
                .args([env!("CARGO_BIN_EXE_farcall"), "start", "one"])
                .args(option)
                .env("FARCALL_DIR", home.path());
            assert!(service.status().unwrap().success());
            let process = state(&home).process.pid;
            assert!(alive(process));
            group.clean_up();
            if lives {
                survives(&home, process);
                home.home.place(&one()).remove().unwrap();
            } else {
                until("it is killed", || !alive(process));
            }
        }
    }
}

#[test]
fn its_children_are_in_its_cgroup_and_not_in_a_services() {
    play();
    let _all_the_time = VERSIONS.map(Tree::of);
    for version in VERSIONS {
        let tree = Tree::of(version);
        let (home, group) = (TestHome::new(), tree.group());
        let test = "manager::its_children_are_in_its_cgroup_and_not_in_a_services";
        let mut command = Controller::command(test, Model::Cgroup, &home);
        let mut controller = Controller::start_when(&mut command, |pid| group.put(pid));
        controller.role.say("sleep");
        let sleeping: i32 = controller.role.told().parse().unwrap();
        group.clean_up();
        controller.died();
        assert!(alive(sleeping));
        let cgroups = state(&home).cgroups;
        let has = |cgroup: &Path| {
            let text = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap();
            text.lines().any(|pid| pid == sleeping.to_string())
        };
        assert!(cgroups.iter().all(|cgroup| has(cgroup)), "{cgroups:?}");
        survives(&home, controller.process);
        until("it ends with the process", || !alive(sleeping));
        home.home.place(&one()).remove().unwrap();
        assert!(!cgroups.iter().any(|cgroup| cgroup.exists()), "{cgroups:?}");
    }
}
