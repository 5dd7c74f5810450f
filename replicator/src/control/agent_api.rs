//! What the control server asks of the agent behind it, and of a witness.
//!
//! The methods are asynchronous and called from the server's tasks, many at a time. An implementation writes them as plain
//! `async fn`. None of them may wait for long work: `protect` and `failover` start it and return.

use std::future::Future;

use super::api::{
    Accepted, AgentStatus, DoctorReport, DoctorRequest, ErrorBody, FailoverRequest, PairJoinRequest, PairOpenRequest,
    PairWindow, Paired, ProtectRequest, RehearsalReport, VmEvent, VmRequest, VmStatus, WitnessStatus,
};
use super::drill::{DrillPlan, DrillRequest};
use super::latch::{MayStart, MayStartRequest};
use super::microvm::{RunRequest, Started};

/// An agent, as its control server sees it.
pub trait AgentApi: Send + Sync + 'static {
    /// The agent and all its VMs and peers.
    fn status(&self) -> impl Future<Output = Result<AgentStatus, ErrorBody>> + Send;

    /// One VM, by name.
    fn vm_status(&self, name: &str) -> impl Future<Output = Result<VmStatus, ErrorBody>> + Send;

    /// How far the change of hands is that was asked for last of a VM: its status, and once the change has ended the status by
    /// which it had, even if this host knows the VM no more.
    fn vm_change(&self, name: &str) -> impl Future<Output = Result<VmStatus, ErrorBody>> + Send;

    /// The last `last` things that happened to a VM here, oldest first; also of one that is protected no more.
    fn vm_events(&self, name: &str, last: usize) -> impl Future<Output = Result<Vec<VmEvent>, ErrorBody>> + Send;

    /// Starts a microVM, unprotected. Returns when it runs.
    fn run(&self, request: RunRequest) -> impl Future<Output = Result<Started, ErrorBody>> + Send;

    /// Ends a microVM that nobody protects. Returns when it has ended.
    fn end(&self, request: VmRequest) -> impl Future<Output = Result<Accepted, ErrorBody>> + Send;

    /// Starts to protect a VM. Returns when it was found, is not refused and work has begun; from then on its status shows
    /// how far it is, until it is `protected`, or `error` with a reason.
    fn protect(&self, request: ProtectRequest) -> impl Future<Output = Result<Accepted, ErrorBody>> + Send;

    /// Ends a protection and leaves the VM as it was found, running. Returns when that is done.
    fn unprotect(&self, request: VmRequest) -> impl Future<Output = Result<VmStatus, ErrorBody>> + Send;

    /// Has the standby load its copy into a scratch twin. Returns when that is done.
    fn rehearse(&self, request: VmRequest) -> impl Future<Output = Result<RehearsalReport, ErrorBody>> + Send;

    /// Starts a change of hands. Returns when work has begun.
    fn failover(&self, request: FailoverRequest) -> impl Future<Output = Result<Accepted, ErrorBody>> + Send;

    /// Says whether a drill may begin and what it would hit; injures nothing.
    fn drill(&self, request: DrillRequest) -> impl Future<Output = Result<DrillPlan, ErrorBody>> + Send;
    /// Whether something else may start a VM here from its disks. An error is a no.
    fn may_start(&self, request: MayStartRequest) -> impl Future<Output = Result<MayStart, ErrorBody>> + Send;

    /// Opens a pairing window.
    fn pair_open(&self, request: PairOpenRequest) -> impl Future<Output = Result<PairWindow, ErrorBody>> + Send;

    /// Pairs with a node whose window is open. Returns when both have pinned each other.
    fn pair_join(&self, request: PairJoinRequest) -> impl Future<Output = Result<Paired, ErrorBody>> + Send;

    /// Checks what would stop protection here. Changes nothing.
    fn doctor(&self, request: DoctorRequest) -> impl Future<Output = Result<DoctorReport, ErrorBody>> + Send;
}

/// A witness, as its control server sees it.
pub trait WitnessApi: Send + Sync + 'static {
    /// The witness and what it keeps.
    fn status(&self) -> impl Future<Output = Result<WitnessStatus, ErrorBody>> + Send;

    /// Opens a pairing window.
    fn pair_open(&self, request: PairOpenRequest) -> impl Future<Output = Result<PairWindow, ErrorBody>> + Send;
}
