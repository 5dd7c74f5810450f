//! What a run found, for people and for programs.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

/// A run.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// What its schedule was drawn from.
    pub seed: u64,
    /// How many rounds it was to have.
    pub planned: u64,
    /// What was to be drawn, and cannot be played on this machine, and why: a sentence each.
    pub left_out: Vec<String>,
    /// Its rounds, in order.
    pub rounds: Vec<Round>,
    /// What was wrong in the end, if anything: one sentence.
    pub failure: Option<String>,
    /// Where logs, captures and event logs are, if they were kept.
    pub kept: Option<String>,
    /// How many writes and steps of counters were answered and found on both disks, after both hosts lost power at the end.
    pub on_disk: Option<u64>,
    /// How long all of it took, in seconds.
    pub seconds: f64,
}

/// A round. Instants are milliseconds since it began.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Round {
    /// Its number, from 1.
    pub number: u64,
    /// What ran the VM, and who was asked who may.
    pub setting: String,
    /// Its fault's name.
    pub fault: String,
    /// Its fault's kind.
    pub kind: String,
    /// Where the VM ran when it began, and when it ended.
    pub hosts: (String, String),
    /// Operations of the clients that were answered.
    pub answered: u64,
    /// Operations whose outcome is not known.
    pub unknown: u64,
    /// Connections that broke.
    pub broken: u64,
    /// Copies that were activated.
    pub activated: usize,
    /// Frames of the guest heard at the switch.
    pub frames: u64,
    /// The longest time that a client waited for an answer.
    pub longest_wait_ms: u64,
    /// From the fault's end until the VM was protected again.
    pub restored_ms: u64,
    /// What was done, and when.
    pub deeds: Vec<Moment>,
    /// What the agents noted of the VM, and when.
    pub events: Vec<Moment>,
    /// What the clients saw, second by second.
    pub seconds: Vec<Second>,
}

/// Something that happened.
#[derive(Debug, Clone, Serialize)]
pub struct Moment {
    /// When, in milliseconds since the round began; before it if negative.
    pub at_ms: i64,
    /// What.
    pub what: String,
}

/// A second of the clients' life.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Second {
    /// Answers that came in it.
    pub answers: u64,
    /// The longest that one of these was waited for, in microseconds.
    pub longest_us: u64,
}

impl Round {
    /// One line about it.
    #[must_use]
    pub fn line(&self) -> String {
        let Self { number, setting, fault, hosts: (from, to), answered, unknown, activated, .. } = self;
        let (wait, restored) = (self.longest_wait_ms, self.restored_ms);
        format!(
            "{number:4}  {setting:<12}  {fault:<34} {from} -> {to}  {activated} activated  {answered:6} answers, {unknown} unknown  longest wait {wait:6} ms  protected again after {restored:6} ms"
        )
    }
}

/// What one kind of fault did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sum {
    /// The kind.
    pub fault: String,
    /// Its rounds.
    pub rounds: usize,
    /// Copies that were activated in them.
    pub activated: usize,
    /// The longest that a client waited for an answer in any.
    pub longest_wait_ms: u64,
    /// The longest that it took to be protected again in any.
    pub restored_ms: u64,
}

impl Report {
    /// What each kind of fault did at worst, by name.
    #[must_use]
    pub fn sums(&self) -> Vec<Sum> {
        let mut sums: BTreeMap<&str, Sum> = BTreeMap::new();
        for round in &self.rounds {
            let sum = sums.entry(&round.kind).or_default();
            sum.fault.clone_from(&round.kind);
            sum.rounds += 1;
            sum.activated += round.activated;
            sum.longest_wait_ms = sum.longest_wait_ms.max(round.longest_wait_ms);
            sum.restored_ms = sum.restored_ms.max(round.restored_ms);
        }
        sums.into_values().collect()
    }

    /// For a terminal: what each fault did at worst, and the verdict.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = format!(
            "{:<24}{:>7}{:>11}{:>18}{:>22}\n",
            "fault", "rounds", "activated", "longest wait ms", "protected again ms"
        );
        for Sum { fault, rounds, activated, longest_wait_ms, restored_ms } in self.sums() {
            let _ = writeln!(text, "{fault:<24}{rounds:>7}{activated:>11}{longest_wait_ms:>18}{restored_ms:>22}");
        }
        let mut settings: BTreeMap<&str, usize> = BTreeMap::new();
        for round in &self.rounds {
            *settings.entry(&round.setting).or_default() += 1;
        }
        for (setting, rounds) in settings {
            let _ = writeln!(text, "{rounds} rounds with {setting}");
        }
        let answered: u64 = self.rounds.iter().map(|round| round.answered).sum();
        let unknown: u64 = self.rounds.iter().map(|round| round.unknown).sum();
        let _ = writeln!(
            text,
            "{} rounds in {:.0} s, seed {}: {answered} answers and {unknown} unknown outcomes judged",
            self.rounds.len(),
            self.seconds,
            self.seed
        );
        if let Some(on_disk) = self.on_disk {
            let _ = writeln!(text, "both hosts lost power at the end: {on_disk} answered writes are on each disk");
        }
        for left_out in &self.left_out {
            let _ = writeln!(text, "not played: {left_out}");
        }
        match &self.failure {
            None => text.push_str("nothing was broken\n"),
            Some(failure) => {
                let _ = writeln!(text, "BROKEN: {failure}");
                if let Some(kept) = &self.kept {
                    let _ = writeln!(text, "logs, captures and event logs are in {kept}");
                }
                let _ = writeln!(text, "again: cargo xtask chaos --seed {} --rounds {}", self.seed, self.planned);
            }
        }
        text
    }
}

/// Answers, second by second, from `begun_ns`: when each was asked and when it came.
#[must_use]
pub fn seconds(begun_ns: u64, answers: impl Iterator<Item = (u64, u64)>) -> Vec<Second> {
    let mut all: Vec<Second> = Vec::new();
    for (asked_ns, came_ns) in answers {
        let at = usize::try_from(came_ns.saturating_sub(begun_ns) / 1_000_000_000).unwrap_or(usize::MAX);
        if all.len() <= at {
            all.resize(at + 1, Second::default());
        }
        all[at].answers += 1;
        all[at].longest_us = all[at].longest_us.max((came_ns - asked_ns) / 1_000);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_second_is_there_with_no_answer() {
        const S: u64 = 1_000_000_000;
        let answers = [(5 * S, 5 * S + 1_000), (5 * S + 2_000, 7 * S), (7 * S, 7 * S + 3_000)];
        let seconds = seconds(5 * S, answers.into_iter());
        let of = |answers, longest_us| Second { answers, longest_us };
        assert_eq!(seconds, [of(1, 1), of(0, 0), of(2, 1_999_998)]);
    }

    #[test]
    fn a_failure_names_its_seed_and_where_to_look() {
        let report = Report {
            seed: 42,
            planned: 2,
            left_out: vec!["short-of-memory: no controller".to_owned()],
            rounds: vec![Round {
                kind: "kill-agent".to_owned(),
                setting: "kvm+witness".to_owned(),
                answered: 7,
                ..Round::default()
            }],
            failure: Some("round 2: lost".to_owned()),
            kept: Some("/somewhere".to_owned()),
            on_disk: Some(8),
            seconds: 1.0,
        };
        let text = report.text();
        for word in [
            "kill-agent",
            "not played: short-of-memory: no controller",
            "8 answered writes",
            "BROKEN: round 2: lost",
            "/somewhere",
            "--seed 42 --rounds 2",
        ] {
            assert!(text.contains(word), "{text}");
        }
    }
}
