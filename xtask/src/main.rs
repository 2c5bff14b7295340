//! What developers of farcall run, as `cargo xtask COMMAND`.

mod kernels;
mod reap;
mod residue;
mod test;
mod tools;

use std::process::ExitCode;

const HELP: &str = "\
What developers of farcall run.

Usage: cargo xtask COMMAND

Commands:
  test    Run all tests, those in the documentation and the models of models/ too, and check that
          they leave nothing behind. Groups of tests that take long or need much are left out.
          Tools that they need and that are missing are installed if this is Debian and you are
          root; elsewhere you are told what to install.
  test --places
          Run what `test` leaves out: container runtimes, security profiles and guests.
  test --long
          Run what `test` leaves out: torture of 2,000 kills with three seeds, and long races.
  kernels [VERSION...]
          Boot Debian's kernels of these versions, or of some from 5.10 on, in QEMU with one and two
          processors, and run the demo, the command line, a short torture and tests in them: as root
          on Debian, in an hour or so. Nothing is installed but tools. Consoles and kernels are
          kept in target/kernels.
      --processors N  guests with so many only
      --steps A,B     these steps: demo, commands, torture, tests, scope1 to scope3 (the first two
                      as a user at Yama's ptrace_scope), and the test programs, suite, wire,
                      footprint and survival
      --tests WORDS   filters and options of the test programs, such as '--test-threads 1 chain::'
      --limit N       the seconds that each step may take, in place of 1200
      --json          print JSON, not a table
  help    Print this.

Exit status: 0 if all is well, 1 if something failed, 2 if the command line makes no sense.
";

fn main() -> ExitCode {
    let arguments: Vec<String> =
        std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned()).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["help" | "--help" | "-h"] | ["test" | "kernels", "--help" | "-h"] => {
            print!("{HELP}");
            ExitCode::SUCCESS
        }
        ["test", ref options @ ..] if groups(options).is_some() => {
            let groups = groups(options).unwrap_or_default();
            let result = if groups.is_empty() { test::run() } else { test::run_groups(&groups) };
            match result {
                Ok(()) => ExitCode::SUCCESS,
                Err(problem) => {
                    eprintln!("xtask: {problem}");
                    ExitCode::FAILURE
                }
            }
        }
        ["kernels", ref words @ ..] => match kernels::Options::parse(words) {
            Ok(options) => match kernels::run(&options) {
                Ok(()) => ExitCode::SUCCESS,
                Err(problem) => {
                    eprintln!("xtask: {problem}");
                    ExitCode::FAILURE
                }
            },
            Err(problem) => {
                eprintln!("xtask: {problem}; `cargo xtask help` lists what there is");
                ExitCode::from(2)
            }
        },
        [] => {
            eprint!("xtask: a command is needed\n\n{HELP}");
            ExitCode::from(2)
        }
        _ => {
            let unknown = arguments.join(" ");
            eprintln!("xtask: there is no command `{unknown}`; `cargo xtask help` lists them");
            ExitCode::from(2)
        }
    }
}

/// The groups of tests that these options name, if all of them are such options.
fn groups(options: &[&str]) -> Option<Vec<&'static test::Group>> {
    let group = |option: &&str| {
        let name = option.strip_prefix("--")?;
        test::GROUPS.iter().find(|group| group.name == name)
    };
    options.iter().map(group).collect()
}
