//! The command line. `cli` has what people use daily: it starts persistent processes, lists them, calls
//! into them, shows what they keep and stops them. `rig` measures, tortures and demonstrates. Neither
//! uses the other; `command` has what commands of both need.

mod cli;
mod command;
mod rig;

use std::fs::File;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tokio::runtime::Builder;

use cli::{call, image, list, log, names, restore, start, stop, upgrade};
use command::{Done, Failure, output};
use rig::{bench, demo, torture};

/// Runs Linux system calls in other processes, and in processes that outlive their controller.
///
/// A persistent process has a name and a socket NAME.sock in $FARCALL_DIR, else
/// $XDG_RUNTIME_DIR/farcall, for root /run/farcall.
///
/// Exit codes: 0 done, 1 it failed (or the call did), 2 the command line is wrong.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::Demo),
    Start(start::Start),
    Ls(list::List),
    Call(call::CallCommand),
    Log(log::LogCommand),
    Names(names::Names),
    Stop(stop::Stop),
    Restore(restore::Restore),
    Upgrade(upgrade::Upgrade),
    Image(image::Image),
    Bench(bench::Bench),
    Torture(torture::Torture),
    #[command(hide = true)]
    BenchServer(bench::BenchServer),
    #[command(hide = true)]
    BenchIdle(bench::BenchIdle),
    #[command(hide = true)]
    DemoController(demo::FirstController),
    #[command(hide = true)]
    DemoChild(demo::DemoChild),
    #[command(hide = true)]
    TortureController(torture::TortureController),
}

fn main() -> ExitCode {
    let command = Arguments::parse().command;
    let build = || Builder::new_current_thread().enable_all().build();
    let result = match has_room().and_then(|()| build()) {
        Ok(runtime) => runtime.block_on(run(command)),
        Err(error) => Err(Failure::new(format!("waiting for events: {error}"))),
    };
    result.unwrap_or_else(|failure| {
        let advice = if failure.message.contains(&too_many_files()) {
            ": allow this command more descriptors (ulimit -n 64)"
        } else {
            ""
        };
        eprintln!("farcall: {}{advice}", output::harmless(&failure.message));
        ExitCode::from(failure.code)
    })
}

/// Whether the runtime's descriptors are free: where the last of them is not, tokio panics.
fn has_room() -> std::io::Result<()> {
    const NEEDED: usize = 10;
    let null = File::open("/dev/null")?;
    (1..NEEDED).map(|_| null.try_clone()).collect::<std::io::Result<Vec<File>>>().map(drop)
}

/// How an error is told that says that no descriptor is free here.
fn too_many_files() -> String {
    std::io::Error::from(nix::errno::Errno::EMFILE).to_string()
}

async fn run(command: Command) -> Done {
    match command {
        Command::Demo(command) => command.run().await,
        Command::Start(command) => command.run().await,
        Command::Ls(command) => command.run().await,
        Command::Call(command) => command.run().await,
        Command::Log(command) => command.run().await,
        Command::Names(command) => command.run().await,
        Command::Stop(command) => command.run().await,
        Command::Restore(command) => command.run().await,
        Command::Upgrade(command) => command.run().await,
        Command::Image(command) => command.run(),
        Command::Bench(command) => command.run().await,
        Command::BenchServer(command) => Ok(command.run()),
        Command::BenchIdle(command) => command.run().await,
        Command::Torture(command) => command.run().await,
        Command::DemoController(command) => command.run().await,
        Command::TortureController(command) => command.run().await,
        Command::DemoChild(command) => Ok(command.run()),
    }
}
