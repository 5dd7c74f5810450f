//! The metric families: names, labels, help texts and buckets, all in one place.
//!
//! Promise: what is described ([`described`]) is what is registered, since one call does both.

use std::cell::RefCell;

use prometheus::core::Collector;
use prometheus::{CounterVec, GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry};

/// Bucket bounds of pauses and their parts: 10 us to 2.6 s, doubling.
const PAUSE_SECONDS: (f64, f64, usize) = (10e-6, 2.0, 19);
/// Bucket bounds of commits, epochs, failover phases and witness requests: 100 us to 13 s, doubling.
const LATENCY_SECONDS: (f64, f64, usize) = (100e-6, 2.0, 18);
/// Bucket bounds of dirty pages: 1 to 4 million (16 GiB), by four.
const PAGES: (f64, f64, usize) = (1.0, 4.0, 12);

use super::describe::{Kind, MetricFamily};

/// The parts of a pause, as label values.
pub(super) const PAUSE_PARTS: [&str; 6] = ["stop", "harvest", "device", "copy", "resume", "total"];
/// The phases of a failover, as label values.
pub(super) const FAILOVER_PHASES: [&str; 5] = ["detection", "grant", "load", "resume", "activation"];

/// How a rehearsal ends, as label values.
pub(super) const REHEARSAL_OUTCOMES: [&str; 2] = ["loads", "fails"];
/// What the fence command says, as label values.
pub(super) const FENCE_OUTCOMES: [&str; 2] = ["confirmed", "failed"];
/// How a request to the witness ends, as label values.
pub(super) const WITNESS_OUTCOMES: [&str; 4] = ["granted", "refused", "read", "lost"];

/// Every family, described, in the order of this file.
pub(super) fn described() -> Vec<MetricFamily> {
    let registry = Registry::new();
    let make = Maker { registry: &registry, described: RefCell::default() };
    let _ = Families::make(&make);
    make.described.into_inner()
}

/// Every family, registered once.
#[derive(Debug)]
pub(super) struct Families {
    pub(super) build_info: IntGaugeVec,
    pub(super) vm_state: IntGaugeVec,
    pub(super) vm_role: IntGaugeVec,
    pub(super) vm_generation: IntGaugeVec,
    pub(super) epochs: IntCounterVec,
    pub(super) epoch_committed: IntGaugeVec,
    pub(super) epoch_seconds: HistogramVec,
    pub(super) pause_seconds: HistogramVec,
    pub(super) clock_lag_seconds: CounterVec,
    pub(super) pause_share: GaugeVec,
    pub(super) commit_seconds: HistogramVec,
    pub(super) lag_seconds: GaugeVec,
    pub(super) dirty_pages: HistogramVec,
    pub(super) encoded_bytes: IntCounterVec,
    pub(super) wire_bytes: IntCounterVec,
    pub(super) held_frames: IntGaugeVec,
    pub(super) held_bytes: IntGaugeVec,
    pub(super) held_age_seconds: GaugeVec,
    pub(super) held_limit_bytes: IntGaugeVec,
    pub(super) held_limit_seconds: GaugeVec,
    pub(super) released_frames: IntCounterVec,
    pub(super) dropped_frames: IntCounterVec,
    pub(super) sync_done_pages: IntGaugeVec,
    pub(super) sync_total_pages: IntGaugeVec,
    pub(super) sync_round: IntGaugeVec,
    pub(super) disk_journal_bytes: IntGaugeVec,
    pub(super) disk_journal_limit_bytes: IntGaugeVec,
    pub(super) disk_hold_seconds: HistogramVec,
    pub(super) disk_held_bytes: IntCounterVec,
    pub(super) failovers: IntCounterVec,
    pub(super) failover_phase_seconds: HistogramVec,
    pub(super) rehearsal_timestamp_seconds: GaugeVec,
    pub(super) peer_phi: GaugeVec,
    pub(super) peer_silence_seconds: GaugeVec,
    pub(super) peer_rtt_seconds: GaugeVec,
    pub(super) peer_path_up: IntGaugeVec,
    pub(super) peer_path_phi: GaugeVec,
    pub(super) peer_path_silence_seconds: GaugeVec,
    pub(super) peer_path_rtt_seconds: GaugeVec,
    pub(super) heartbeats_sent: IntCounterVec,
    pub(super) heartbeats_received: IntCounterVec,
    pub(super) witness_request_seconds: HistogramVec,
    pub(super) witness_reachable: IntGaugeVec,
    pub(super) fence_seconds: HistogramVec,
}

impl Families {
    /// Makes all of them and registers them there.
    pub(super) fn new(registry: &Registry) -> Self {
        Self::make(&Maker { registry, described: RefCell::default() })
    }

    #[allow(clippy::too_many_lines)] // A table: one entry per family.
    fn make(make: &Maker<'_>) -> Self {
        Self {
            build_info: make.gauges("build_info", "1; the label is the program's version.", &["version"]),
            vm_state: make.gauges(
                "vm_state",
                "1 for the protection state that the VM is in, 0 for the others.",
                &["vm", "state"],
            ),
            vm_role: make.gauges(
                "vm_role",
                "1 for the copy that this agent has of the VM, 0 for the others.",
                &["vm", "role"],
            ),
            vm_generation: make.gauges(
                "vm_generation",
                "Generation of the VM's ownership that this agent knows; grows with each change of who may run.",
                &["vm"],
            ),
            epochs: make.counters(
                "epochs_total",
                "Epochs committed on the primary: the standby's acknowledgement was read.",
                &["vm"],
            ),
            epoch_committed: make.gauges(
                "epoch_committed",
                "Number of the last committed epoch; on the standby, of the last epoch that it holds whole.",
                &["vm"],
            ),
            epoch_seconds: make.histograms(
                "epoch_seconds",
                "Length of an epoch: from the end of one pause to the end of the next, that pause included. Committed epochs.",
                &["vm"],
                LATENCY_SECONDS,
            ),
            pause_seconds: make.histograms(
                "epoch_pause_seconds",
                "Time the guest stood for an epoch, by part: stop (until the vCPUs stood and I/O was drained), harvest \
                 (finding dirty pages, arming the tracker), device (saving device state), copy (copying dirty pages \
                 aside), resume (until the guest ran), total (call of pause to return of resume). Parts may overlap. \
                 Encoding and sending are not in it.",
                &["vm", "part"],
                PAUSE_SECONDS,
            ),
            clock_lag_seconds: make.float_counters(
                "guest_clock_lag_seconds_total",
                "Time that this agent made the guest stand, in which the guest's clock stood too: what it fell behind, \
                 unless something in the guest sets it right. Pauses by the guest's owner do not count.",
                &["vm"],
            ),
            pause_share: make.float_gauges(
                "guest_pause_share_ratio",
                "Part of the time that the guest stood, over the last 1024 committed epochs: 0.05 is one twentieth.",
                &["vm"],
            ),
            commit_seconds: make.histograms(
                "epoch_commit_seconds",
                "From the end of an epoch's pause until the standby's acknowledgement was read: encoding, sending, \
                 staging, the way back. The pause is not in it.",
                &["vm"],
                LATENCY_SECONDS,
            ),
            lag_seconds: make.float_gauges(
                "replication_lag_seconds",
                "Age of what the standby could go on with: from the end of the last committed epoch's pause until now. \
                 Looked at twice a second on the primary while the VM is protected or failing over; 0 else.",
                &["vm"],
            ),
            dirty_pages: make.histograms(
                "epoch_dirty_pages",
                "Pages found dirty in an epoch, those that turned out unchanged included.",
                &["vm"],
                PAGES,
            ),
            encoded_bytes: make.counters(
                "epoch_encoded_bytes_total",
                "Bytes of committed epochs by encoding (zero, same, delta, lz4, raw; device is device state), frame \
                 headers included. The initial synchronisation is not in it.",
                &["vm", "encoding"],
            ),
            wire_bytes: make.counters(
                "epoch_wire_bytes_total",
                "Bytes of committed epochs given to the transport, message headers included, QUIC's own excluded.",
                &["vm"],
            ),
            held_frames: make.gauges("held_output_frames", "Frames held until their epoch is acknowledged.", &["vm"]),
            held_bytes: make.gauges("held_output_bytes", "Bytes of the held frames.", &["vm"]),
            held_age_seconds: make.float_gauges(
                "held_output_age_seconds",
                "Age of the oldest held frame, from its emission by the guest; 0 if none is held.",
                &["vm"],
            ),
            held_limit_bytes: make.gauges(
                "held_output_limit_bytes",
                "This agent's bound on the bytes held for one VM; beyond it frames are dropped.",
                &[],
            ),
            held_limit_seconds: make.float_gauges(
                "held_output_limit_seconds",
                "This agent's bound on the age of a held frame; older ones are dropped, never released late.",
                &[],
            ),
            released_frames: make.counters("output_released_frames_total", "Held frames that were released.", &["vm"]),
            dropped_frames: make.counters(
                "output_dropped_frames_total",
                "Held frames that were dropped: at the bound, too old, or of a copy that lost ownership.",
                &["vm"],
            ),
            sync_done_pages: make.gauges(
                "sync_done_pages",
                "Pages sent in the present round of the initial synchronisation; 0 outside of it.",
                &["vm"],
            ),
            sync_total_pages: make.gauges(
                "sync_total_pages",
                "Pages that the present round of the initial synchronisation sends; 0 outside of it.",
                &["vm"],
            ),
            sync_round: make.gauges(
                "sync_round",
                "Round of the initial synchronisation, from 1; 0 outside of it.",
                &["vm"],
            ),
            disk_journal_bytes: make.gauges(
                "disk_journal_bytes",
                "On the standby of a VM with disks: bytes of its journal in use, by epochs that are not yet surely in the \
                 images.",
                &["vm"],
            ),
            disk_journal_limit_bytes: make.gauges(
                "disk_journal_limit_bytes",
                "On the standby of a VM with disks: size of its journal. An epoch that finds no room waits; one that is \
                 larger ends the protection.",
                &["vm"],
            ),
            disk_hold_seconds: make.histograms(
                "disk_hold_seconds",
                "On the standby of a VM with disks: from an epoch's having come whole until its disk writes were held as the \
                 durability policy says; waiting for room in the journal included. The epoch's acknowledgement waits for it.",
                &["vm"],
                LATENCY_SECONDS,
            ),
            disk_held_bytes: make.counters(
                "disk_held_bytes_total",
                "On the standby of a VM with disks: bytes of disk writes held, written zeroes included. The first copy is \
                 not in it.",
                &["vm"],
            ),
            failovers: make.counters(
                "failovers_total",
                "Failovers whose survivor ran on this host, by cause.",
                &["vm", "cause"],
            ),
            failover_phase_seconds: make.histograms(
                "failover_phase_seconds",
                "A failover by phase: detection (last heartbeat heard until the failure was detected), grant (until the \
                 ownership grant was read), load (loading device state), resume (from there until the guest ran), \
                 activation (grant read until the guest ran). Clients' retransmission timers are not in it.",
                &["vm", "phase"],
                LATENCY_SECONDS,
            ),
            rehearsal_timestamp_seconds: make.float_gauges(
                "rehearsal_timestamp_seconds",
                "Unix time at which a rehearsal on this host ended so last, by outcome (loads, fails); 0 if none did.",
                &["vm", "outcome"],
            ),
            peer_phi: make.float_gauges(
                "peer_phi",
                "The failure detector's suspicion of the peer (phi) on the path that is heard best; at most 1000.",
                &["peer"],
            ),
            peer_silence_seconds: make.float_gauges(
                "peer_silence_seconds",
                "Time since a heartbeat of the peer was last heard, on whichever path.",
                &["peer"],
            ),
            peer_rtt_seconds: make.float_gauges(
                "peer_rtt_seconds",
                "Last round trip of a heartbeat, on the path that is heard best.",
                &["peer"],
            ),
            peer_path_up: make.gauges(
                "peer_path_up",
                "1 if the peer is heard on this path, 0 if it never was or is silent there past the detector's bound. Paths \
                 are counted from 0, as in `heartbeat_listen`.",
                &["peer", "path"],
            ),
            peer_path_phi: make.float_gauges(
                "peer_path_phi",
                "The failure detector's suspicion (phi) on this path alone; at most 1000. The peer is suspected when all \
                 its paths are silent.",
                &["peer", "path"],
            ),
            peer_path_silence_seconds: make.float_gauges(
                "peer_path_silence_seconds",
                "Time since a heartbeat of the peer was last heard on this path.",
                &["peer", "path"],
            ),
            peer_path_rtt_seconds: make.float_gauges(
                "peer_path_rtt_seconds",
                "Last round trip of a heartbeat on this path, without the time the peer held it.",
                &["peer", "path"],
            ),
            heartbeats_sent: make.counters(
                "heartbeats_sent_total",
                "Heartbeats sent to the peer, by path.",
                &["peer", "path"],
            ),
            heartbeats_received: make.counters(
                "heartbeats_received_total",
                "Heartbeats heard from the peer on this path, duplicates and late ones excluded.",
                &["peer", "path"],
            ),
            witness_request_seconds: make.histograms(
                "witness_request_seconds",
                "A request to the witness: from sending until its answer was read (granted, refused, read) or given up \
                 (lost).",
                &["witness", "outcome"],
                LATENCY_SECONDS,
            ),
            fence_seconds: make.histograms(
                "fence_seconds",
                "Time from the fence command's start to its end, by whether it confirmed that the other host is off. Leaves out hosts that an operator confirmed to be dead.",
                &["outcome"],
                LATENCY_SECONDS,
            ),
            witness_reachable: make.gauges(
                "witness_reachable",
                "1 if the witness answered the last question that this agent asks it every few seconds, else 0.",
                &["witness"],
            ),
        }
    }
}

/// Makes families, registers and describes them. Names are constants, so a failure is our own bug.
struct Maker<'a> {
    registry: &'a Registry,
    described: RefCell<Vec<MetricFamily>>,
}

impl Maker<'_> {
    fn register<C: Collector + Clone + 'static>(&self, family: Result<C, prometheus::Error>) -> C {
        let family = family.expect("a metric's name and labels are valid");
        self.registry.register(Box::new(family.clone())).expect("a metric is registered once");
        family
    }

    fn opts(&self, kind: Kind, name: &str, help: &str, labels: &[&'static str]) -> Opts {
        let opts = Opts::new(name, help).namespace("understudy");
        let (name, help, labels) = (opts.fq_name(), help.to_owned(), labels.to_vec());
        self.described.borrow_mut().push(MetricFamily { name, kind, labels, help });
        opts
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&'static str]) -> IntGaugeVec {
        self.register(IntGaugeVec::new(self.opts(Kind::Gauge, name, help, labels), labels))
    }

    fn float_gauges(&self, name: &str, help: &str, labels: &[&'static str]) -> GaugeVec {
        self.register(GaugeVec::new(self.opts(Kind::Gauge, name, help, labels), labels))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&'static str]) -> IntCounterVec {
        self.register(IntCounterVec::new(self.opts(Kind::Counter, name, help, labels), labels))
    }

    fn float_counters(&self, name: &str, help: &str, labels: &[&'static str]) -> CounterVec {
        self.register(CounterVec::new(self.opts(Kind::Counter, name, help, labels), labels))
    }

    fn histograms(&self, name: &str, help: &str, labels: &[&'static str], bounds: (f64, f64, usize)) -> HistogramVec {
        let (start, factor, count) = bounds;
        let buckets = prometheus::exponential_buckets(start, factor, count).expect("bucket bounds are valid");
        let opts = HistogramOpts::from(self.opts(Kind::Histogram, name, help, labels)).buckets(buckets);
        self.register(HistogramVec::new(opts, labels))
    }
}
