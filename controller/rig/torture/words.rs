//! What a controller under torture tells its supervisor, a line each on its standard output: what it
//! is about to do, before it does it, and what it has seen done, once it has.
//!
//! The lines come over a pipe that has nothing to do with the process: they are the truth that the
//! process is compared with. A line is written at once and as a whole, so that none is torn.

use std::fmt;
use std::str::FromStr;

/// A line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Word {
    /// The process has this pid.
    Process(i32),
    /// It begins with this.
    Doing(String),
    /// Records up to that number are about to be appended.
    Appending(u64),
    /// All up to that number are.
    Appended(u64),
    /// This name is about to be given, to that version of what has it.
    Keeping(String, u64),
    /// It is.
    Kept(String, u64),
    /// It is about to be given up.
    Giving(String),
    /// It is.
    Given(String),
    /// The child with this name is about to be reaped.
    Reaping(String),
    /// The process has this name, and this is what there is of it: the number of the descriptor, the
    /// pid, or the version.
    Found(String, State, u64),
    /// A descriptor has no name, although it was opened with one.
    Orphan(String),
    /// The process has executed so many calls.
    Calls(u64),
    /// All of the process is known, and the next record has that number.
    Recovered(u64),
    /// It has a ring, and waits.
    Ready,
    /// What it was told to do first is done.
    Begun,
    /// The descriptors that the connection uses.
    Own(Vec<i32>),
    /// Another controller has the process now.
    Over(String),
    /// A call was possibly executed, or has lost its result, though the process lives.
    Lost(String),
    /// Something is not as it has to be.
    Wrong(String),
}

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// What it stood for before, as far as anybody can tell.
    Same,
    /// Something else.
    Changed,
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(pid) => write!(f, "process {pid}"),
            Self::Doing(what) => write!(f, "doing {what}"),
            Self::Appending(number) => write!(f, "appending {number}"),
            Self::Appended(number) => write!(f, "appended {number}"),
            Self::Keeping(name, version) => write!(f, "keeping {name} {version}"),
            Self::Kept(name, version) => write!(f, "kept {name} {version}"),
            Self::Giving(name) => write!(f, "giving {name}"),
            Self::Given(name) => write!(f, "given {name}"),
            Self::Reaping(name) => write!(f, "reaping {name}"),
            Self::Found(name, State::Same, value) => write!(f, "same {name} {value}"),
            Self::Found(name, State::Changed, value) => write!(f, "changed {name} {value}"),
            Self::Orphan(what) => write!(f, "orphan {what}"),
            Self::Calls(calls) => write!(f, "calls {calls}"),
            Self::Recovered(next) => write!(f, "recovered {next}"),
            Self::Ready => f.write_str("ready"),
            Self::Begun => f.write_str("begun"),
            Self::Own(fds) => {
                f.write_str("own")?;
                fds.iter().try_for_each(|fd| write!(f, " {fd}"))
            }
            Self::Over(why) => write!(f, "over {why}"),
            Self::Lost(what) => write!(f, "lost {what}"),
            Self::Wrong(what) => write!(f, "wrong {what}"),
        }
    }
}

impl FromStr for Word {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let unknown = || format!("a controller said {line:?}");
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let number = || rest.parse().map_err(|_| unknown());
        let both = || {
            let (name, number) = rest.rsplit_once(' ').ok_or_else(unknown)?;
            Ok::<_, String>((name.to_owned(), number.parse().map_err(|_| unknown())?))
        };
        Ok(match word {
            "process" => Self::Process(rest.parse().map_err(|_| unknown())?),
            "doing" => Self::Doing(rest.into()),
            "appending" => Self::Appending(number()?),
            "appended" => Self::Appended(number()?),
            "keeping" => both().map(|(name, version)| Self::Keeping(name, version))?,
            "kept" => both().map(|(name, version)| Self::Kept(name, version))?,
            "giving" => Self::Giving(rest.into()),
            "given" => Self::Given(rest.into()),
            "reaping" => Self::Reaping(rest.into()),
            "same" => both().map(|(name, value)| Self::Found(name, State::Same, value))?,
            "changed" => both().map(|(name, value)| Self::Found(name, State::Changed, value))?,
            "orphan" => Self::Orphan(rest.into()),
            "calls" => Self::Calls(number()?),
            "recovered" => Self::Recovered(number()?),
            "ready" => Self::Ready,
            "begun" => Self::Begun,
            "own" => Self::Own(rest.split(' ').filter_map(|fd| fd.parse().ok()).collect()),
            "over" => Self::Over(rest.into()),
            "lost" => Self::Lost(rest.into()),
            "wrong" => Self::Wrong(rest.into()),
            _ => return Err(unknown()),
        })
    }
}

/// Tells the supervisor. Where that is gone, this process has nothing left to do.
pub fn say(word: &Word) {
    let line = format!("{}\n", word.to_string().replace('\n', "; "));
    // One write(2) of less than PIPE_BUF bytes: the standard library would keep the line's beginning.
    let line = &line.as_bytes()[..line.len().min(4096)];
    if nix::unistd::write(std::io::stdout(), line) != Ok(line.len()) {
        std::process::exit(1);
    }
}
