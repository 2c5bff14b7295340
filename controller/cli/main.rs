//! The command line: starts persistent processes, lists them, calls into them, shows what they keep and
//! stops them.

mod bench;
mod call;
mod constants;
mod demo;
mod image;
mod list;
mod log;
mod names;
mod output;
mod progress;
mod start;
mod stop;
mod torture;
mod upgrade;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

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

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Demo(command) => command.run().await,
        Command::Start(command) => command.run().await,
        Command::Ls(command) => command.run().await,
        Command::Call(command) => command.run().await,
        Command::Log(command) => command.run().await,
        Command::Names(command) => command.run().await,
        Command::Stop(command) => command.run().await,
        Command::Upgrade(command) => command.run().await,
        Command::Image(command) => command.run(),
        Command::Bench(command) => command.run().await,
        Command::BenchServer(command) => return command.run(),
        Command::BenchIdle(command) => command.run().await,
        Command::Torture(command) => command.run().await,
        Command::DemoController(command) => command.run().await,
        Command::TortureController(command) => command.run().await,
        Command::DemoChild(command) => return command.run(),
    };
    result.unwrap_or_else(|failure| {
        eprintln!("farcall: {}", failure.message);
        ExitCode::from(failure.code)
    })
}

/// Why a command failed, and with which exit code.
struct Failure {
    message: String,
    code: u8,
}

type Done = Result<ExitCode, Failure>;

impl Failure {
    fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), code: 1 }
    }

    /// The command line is wrong.
    fn usage(message: impl Into<String>) -> Self {
        Self { message: message.into(), code: 2 }
    }
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::new(error.to_string())
    }
}
