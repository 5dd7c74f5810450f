//! Logs: lines on standard error, for a terminal or for the journal.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

/// The variable that overrides what is logged, such as `debug` or `replicator=trace,info`.
pub(super) const VARIABLE: &str = "UNDERSTUDY_LOG";

/// Starts logging at `level` and above. Under systemd lines have no time and no colour: the journal has its own.
pub(super) fn start(level: &str) {
    let filter = EnvFilter::try_from_env(VARIABLE).unwrap_or_else(|_| EnvFilter::new(level));
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        lines.with_ansi(false).without_time().with_target(false).init();
    } else {
        lines.with_ansi(std::io::stderr().is_terminal()).init();
    }
}
