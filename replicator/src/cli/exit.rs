//! How the program ends: a typed exit code, and an error printed once with its causes and advice.

use std::fmt::Write as _;
use std::process::ExitCode;

use super::config::ConfigError;
use crate::control::api::{ErrorBody, ErrorKind};
use crate::control::client::ClientError;

/// The exit codes. Documented in `understudy --help`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Ok = 0,
    /// It failed.
    Failed = 1,
    /// The command line or a configuration is wrong.
    Usage = 2,
    /// Refused: it cannot be done with this VM or in its state; nothing was changed.
    Refused = 3,
    /// No agent answers on the control socket.
    NoAgent = 4,
    /// The VM is not protected.
    NotProtected = 5,
    /// A peer or a witness does not answer.
    Unavailable = 6,
    /// There is no such VM, peer or witness.
    NotFound = 7,
}

/// The table of exit codes for the help text.
pub const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed
  2  the command line or a configuration is wrong
  3  refused: it cannot be done with this VM or in its state; nothing was changed
  4  no agent answers on the control socket
  5  the VM is not protected
  6  a peer or a witness does not answer
  7  there is no such VM, peer or witness";

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// An error on its way out of the program.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct CliError {
    /// How the program ends.
    pub exit: Exit,
    /// What happened.
    pub message: String,
    /// What caused it, outermost first.
    pub causes: Vec<String>,
    /// What is safe and what to do; empty if there is nothing to add.
    pub advice: String,
}

impl CliError {
    /// An error without causes and advice.
    #[must_use]
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), causes: Vec::new(), advice: String::new() }
    }

    /// Adds what is safe and what to do.
    #[must_use]
    pub fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = advice.into();
        self
    }

    /// `error` with its chain of causes.
    #[must_use]
    pub fn of(exit: Exit, error: &dyn std::error::Error) -> Self {
        let mut causes = Vec::new();
        let mut next = error.source();
        while let Some(cause) = next {
            causes.push(cause.to_string());
            next = cause.source();
        }
        Self { exit, message: error.to_string(), causes, advice: String::new() }
    }

    /// The text for the terminal: message, causes, advice, each once.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = format!("error: {}\n", self.message);
        let mut last = &self.message;
        for cause in &self.causes {
            // A cause that only repeats what was said says nothing.
            if !last.contains(cause.as_str()) {
                let _ = writeln!(text, "  because {}", cause.trim_end().replace('\n', "\n  "));
            }
            last = cause;
        }
        if !self.advice.is_empty() {
            let _ = writeln!(text, "  {}", self.advice);
        }
        text
    }
}

impl From<ErrorBody> for CliError {
    fn from(body: ErrorBody) -> Self {
        let exit = match body.kind {
            ErrorKind::Invalid => Exit::Usage,
            ErrorKind::NotFound => Exit::NotFound,
            ErrorKind::Refused | ErrorKind::Busy => Exit::Refused,
            ErrorKind::NotProtected => Exit::NotProtected,
            ErrorKind::Unavailable => Exit::Unavailable,
            ErrorKind::Failed => Exit::Failed,
        };
        Self { exit, message: body.message, causes: body.causes, advice: body.advice }
    }
}

impl From<ClientError> for CliError {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Agent(body) => body.into(),
            ClientError::NoAgent { .. } => Self::of(Exit::NoAgent, &error).advise(
                "Start it with `understudy agent` (systemctl start understudy-agent), or name its socket with --control.",
            ),
            ClientError::NotAllowed { .. } => Self::of(Exit::Failed, &error).advise("Run it as root."),
            ClientError::Timeout(_) => Self::of(Exit::Failed, &error)
                .advise("It may still be at work: `understudy status` and the agent's log say."),
            ClientError::Answer(_) => Self::of(Exit::Failed, &error)
                .advise("Use the same version of understudy for the command line and the agent."),
            ClientError::Io { .. } | ClientError::Http(_) | ClientError::Body(_) => {
                Self::of(Exit::Failed, &error).advise("The agent's log says more.")
            }
        }
    }
}

impl From<ConfigError> for CliError {
    fn from(error: ConfigError) -> Self {
        Self::of(Exit::Usage, &error)
    }
}

impl From<anyhow::Error> for CliError {
    fn from(error: anyhow::Error) -> Self {
        let error: &(dyn std::error::Error + 'static) = error.as_ref();
        Self::of(Exit::Failed, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_printed_once_with_causes_and_advice() {
        let disk = std::io::Error::other("the disk is full");
        let body = ErrorBody::new(ErrorKind::Failed, "cannot keep the generation")
            .because(&disk)
            .advise("The VM runs on. Make room and try again.");
        assert_eq!(
            CliError::from(body).render(),
            "error: cannot keep the generation\n  because the disk is full\n  The VM runs on. Make room and try again.\n"
        );
    }

    #[test]
    fn a_cause_that_repeats_the_message_is_left_out() {
        let mut error = CliError::new(Exit::Failed, "cannot read x: no such file");
        error.causes = vec!["no such file".into(), "os error 2".into()];
        assert_eq!(error.render(), "error: cannot read x: no such file\n  because os error 2\n");
    }

    #[test]
    fn kinds_have_their_exit_codes() {
        for (kind, code) in [
            (ErrorKind::Failed, 1),
            (ErrorKind::Invalid, 2),
            (ErrorKind::Refused, 3),
            (ErrorKind::Busy, 3),
            (ErrorKind::NotProtected, 5),
            (ErrorKind::Unavailable, 6),
            (ErrorKind::NotFound, 7),
        ] {
            assert_eq!(CliError::from(ErrorBody::new(kind, "x")).exit as u8, code, "{kind:?}");
        }
        let none = CliError::from(ClientError::NoAgent { socket: "/s".into() });
        assert_eq!(none.exit as u8, 4);
        assert!(none.render().contains("no agent answers on /s"), "{}", none.render());
        assert!(none.render().contains("understudy agent"), "{}", none.render());
    }

    #[test]
    fn the_help_names_every_code() {
        for exit in [
            Exit::Ok,
            Exit::Failed,
            Exit::Usage,
            Exit::Refused,
            Exit::NoAgent,
            Exit::NotProtected,
            Exit::Unavailable,
            Exit::NotFound,
        ] {
            assert!(EXIT_CODES.contains(&format!("\n  {}  ", exit as u8)), "{exit:?}");
        }
    }
}
