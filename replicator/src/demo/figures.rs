//! What a demo measured: one round's figures, their sum, the table and the JSON.

use std::fmt::Write as _;

use serde::Serialize;

/// The figures of one round, or of several: then counts are summed, times are the worst and throughput is the lowest.
/// The field names are the JSON's keys.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Figures {
    /// Rounds.
    pub rounds: u64,
    /// Committed epochs.
    pub epochs: u64,
    /// Start of an epoch to the start of the next, median over the last epochs before the kill.
    pub epoch_ms_p50: f64,
    /// Call of pause to return of resume, median.
    pub pause_ms_p50: f64,
    /// The same, 99th percentile.
    pub pause_ms_p99: f64,
    /// Pages found dirty in an epoch, median.
    pub dirty_pages_p50: u64,
    /// End of the pause until the standby's acknowledgement was read, median.
    pub commit_ms_p50: f64,
    /// Kill until the standby suspected its primary.
    pub detection_ms: f64,
    /// Grant read until the survivor ran.
    pub activation_ms: f64,
    /// Kill until the first reply of the survivor to the prober.
    pub failover_ms: f64,
    /// The longest time between two answers that the TCP client saw around the kill.
    pub client_stall_ms: f64,
    /// Writes that the client was told are done.
    pub acked_writes: u64,
    /// Those of them that the survivor does not hold.
    pub lost_writes: u64,
    /// Connections that broke.
    pub connections_broken: u64,
    /// What the guest's clock lost while nothing was asked of it, in percent of the time.
    pub clock_lost_idle_percent: f64,
    /// The same under the load of the protected throughput measurement.
    pub clock_lost_busy_percent: f64,
    /// SETs per second over 50 connections before protection.
    pub unprotected_ops_per_s: f64,
    /// The same under protection.
    pub protected_ops_per_s: f64,
}

impl Figures {
    /// Adds another round's.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            rounds: self.rounds + other.rounds,
            epochs: self.epochs + other.epochs,
            epoch_ms_p50: self.epoch_ms_p50.max(other.epoch_ms_p50),
            pause_ms_p50: self.pause_ms_p50.max(other.pause_ms_p50),
            pause_ms_p99: self.pause_ms_p99.max(other.pause_ms_p99),
            dirty_pages_p50: self.dirty_pages_p50.max(other.dirty_pages_p50),
            commit_ms_p50: self.commit_ms_p50.max(other.commit_ms_p50),
            detection_ms: self.detection_ms.max(other.detection_ms),
            activation_ms: self.activation_ms.max(other.activation_ms),
            failover_ms: self.failover_ms.max(other.failover_ms),
            client_stall_ms: self.client_stall_ms.max(other.client_stall_ms),
            acked_writes: self.acked_writes + other.acked_writes,
            lost_writes: self.lost_writes + other.lost_writes,
            connections_broken: self.connections_broken + other.connections_broken,
            clock_lost_idle_percent: self.clock_lost_idle_percent.max(other.clock_lost_idle_percent),
            clock_lost_busy_percent: self.clock_lost_busy_percent.max(other.clock_lost_busy_percent),
            unprotected_ops_per_s: self.unprotected_ops_per_s.min(other.unprotected_ops_per_s),
            protected_ops_per_s: self.protected_ops_per_s.min(other.protected_ops_per_s),
        }
    }

    /// Whether nothing was lost and nothing broke.
    #[must_use]
    pub fn good(&self) -> bool {
        self.lost_writes == 0 && self.connections_broken == 0
    }

    /// One line a round.
    #[must_use]
    pub fn line(&self) -> String {
        format!(
            "failover {:.0} ms (detection {:.0}, activation {:.0}), client stall {:.0} ms, pause {:.1} ms, \
             {} writes acknowledged, {} lost, {} connections broken",
            self.failover_ms,
            self.detection_ms,
            self.activation_ms,
            self.client_stall_ms,
            self.pause_ms_p50,
            self.acked_writes,
            self.lost_writes,
            self.connections_broken,
        )
    }

    /// The table for people, with what each figure means.
    #[must_use]
    pub fn table(&self) -> String {
        let rows: [(&str, String, &str); 18] = [
            ("rounds", self.rounds.to_string(), "times below are the worst round's, counts are sums"),
            ("epochs", self.epochs.to_string(), "epochs that the standby acknowledged before the kill"),
            ("epoch_ms_p50", ms(self.epoch_ms_p50), "start of an epoch to the start of the next"),
            ("pause_ms_p50", ms(self.pause_ms_p50), "the guest stands: call of stop to return of cont"),
            ("pause_ms_p99", ms(self.pause_ms_p99), "the same, 99th percentile"),
            ("dirty_pages_p50", self.dirty_pages_p50.to_string(), "pages of 4 KiB written in an epoch"),
            ("commit_ms_p50", ms(self.commit_ms_p50), "end of a pause until its acknowledgement was read"),
            ("detection_ms", ms(self.detection_ms), "kill until the standby suspected its primary"),
            ("activation_ms", ms(self.activation_ms), "grant read until the survivor ran"),
            ("failover_ms", ms(self.failover_ms), "kill until the survivor answered a prober that asks each ms"),
            ("client_stall_ms", ms(self.client_stall_ms), "longest wait of the TCP client, its own timer included"),
            ("acked_writes", self.acked_writes.to_string(), "writes the client was told are done"),
            ("lost_writes", self.lost_writes.to_string(), "of these not on the survivor: must be 0"),
            ("connections_broken", self.connections_broken.to_string(), "must be 0"),
            (
                "clock_lost_idle_percent",
                ms(self.clock_lost_idle_percent),
                "the guest's clock stands in pauses: of an idle guest",
            ),
            ("clock_lost_busy_percent", ms(self.clock_lost_busy_percent), "the same under load"),
            (
                "unprotected_ops_per_s",
                ops(self.unprotected_ops_per_s),
                "SETs over 50 connections, or transactions, before protection",
            ),
            ("protected_ops_per_s", ops(self.protected_ops_per_s), "the same with --epoch auto"),
        ];
        let mut text = String::new();
        for (name, value, meaning) in rows {
            writeln!(text, "  {name:<23} {value:>10}   {meaning}").expect("a string takes everything");
        }
        text
    }
}

fn ms(value: f64) -> String {
    format!("{value:.1}")
}

fn ops(value: f64) -> String {
    format!("{value:.0}")
}

#[cfg(test)]
mod tests {
    use super::Figures;

    fn round(time: f64, count: u64, ops: f64) -> Figures {
        Figures {
            rounds: 1,
            epochs: count,
            epoch_ms_p50: time,
            pause_ms_p50: time,
            pause_ms_p99: time,
            dirty_pages_p50: count,
            commit_ms_p50: time,
            detection_ms: time,
            activation_ms: time,
            failover_ms: time,
            client_stall_ms: time,
            acked_writes: count,
            lost_writes: 0,
            connections_broken: 0,
            clock_lost_idle_percent: time,
            clock_lost_busy_percent: time,
            unprotected_ops_per_s: ops,
            protected_ops_per_s: ops,
        }
    }

    #[test]
    fn rounds_sum_counts_and_keep_the_worst() {
        let both = round(5.0, 3, 100.0).and(round(7.0, 2, 50.0));
        assert_eq!((both.rounds, both.epochs, both.acked_writes), (2, 5, 5));
        assert_eq!((both.failover_ms, both.client_stall_ms, both.dirty_pages_p50), (7.0, 7.0, 3));
        assert_eq!((both.unprotected_ops_per_s, both.protected_ops_per_s), (50.0, 50.0));
        assert!(both.good());
        assert!(!Figures { lost_writes: 1, ..both }.good());
        assert!(!Figures { connections_broken: 1, ..both }.good());
    }

    #[test]
    fn the_json_has_exactly_the_promised_keys() {
        let json = serde_json::to_value(round(1.0, 1, 1.0)).expect("numbers serialise");
        let mut keys: Vec<_> = json.as_object().expect("an object").keys().map(String::as_str).collect();
        let promised = "rounds epochs epoch_ms_p50 pause_ms_p50 pause_ms_p99 dirty_pages_p50 commit_ms_p50 detection_ms \
                        activation_ms failover_ms client_stall_ms acked_writes lost_writes connections_broken \
                        clock_lost_idle_percent clock_lost_busy_percent unprotected_ops_per_s protected_ops_per_s";
        let mut promised: Vec<_> = promised.split_whitespace().collect();
        keys.sort_unstable();
        promised.sort_unstable();
        assert_eq!(keys, promised);
        let table = round(1.0, 1, 1.0).table();
        assert!(promised.iter().all(|key| table.contains(key)), "{table}");
    }
}
