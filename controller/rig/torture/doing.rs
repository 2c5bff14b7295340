//! What /proc says of a process from which something was expected in vain.

use std::collections::BTreeMap;
use std::fs;

/// Its threads, each with its state, the call that it is in and where in the kernel it sleeps; and its
/// descriptors.
pub fn doing(pid: i32) -> String {
    let text = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let entries = |folder: &str| {
        let entries = fs::read_dir(format!("/proc/{pid}/{folder}")).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let threads: Vec<String> = entries("task")
        .into_iter()
        .filter_map(|path| path.file_name()?.to_str().map(|tid| format!("task/{tid}")))
        .map(|thread| {
            let (stat, call) =
                (text(&format!("{thread}/stat")), text(&format!("{thread}/syscall")));
            let state = stat.rsplit_once(')').map_or("?", |(_, rest)| rest.trim_start());
            let state = state.get(..1).unwrap_or("?");
            let number = call.split_whitespace().next().unwrap_or("?");
            format!("{state} in call {number}, {}", text(&format!("{thread}/wchan")))
        })
        .collect();
    let mut fds: BTreeMap<String, usize> = BTreeMap::new();
    for path in entries("fd") {
        let what = fs::read_link(path).unwrap_or_default().display().to_string();
        *fds.entry(what).or_default() += 1;
    }
    let limit = text("limits");
    let limit = limit.lines().find_map(|line| line.strip_prefix("Max open files"));
    let limit = limit.and_then(|line| line.split_whitespace().next()).unwrap_or("?");
    let open: usize = fds.values().sum();
    format!("pid {pid}: threads {threads:?}, {open} of {limit} descriptors: {fds:?}")
}
