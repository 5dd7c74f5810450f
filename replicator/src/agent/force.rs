//! Forces a host out that is dead, where no third host keeps the record (docs/protocol.md P13); and learns whether this host was.
//!
//! Promise: nothing is forced before the fence command confirmed that the other host is off, or the operator typed its name. The record
//! is durable in this host's own store before its VM's task hears of it, and in a new life of the agent that store answers for no VM
//! before the VM's other host was asked.

use std::sync::Arc;
use std::time::Duration;

use heartbeat::store::OwnershipStore;
use heartbeat::trust::Role;
use heartbeat::witness::keeper::{Question, ask_what_is_kept};
use heartbeat_core::ids::{Generation, NodeId, Party, StoreId, VmId};
use heartbeat_core::record::{Owner, Record};

use super::arbiter::Arbiter;
use super::asker::Asker;
use super::durable::Durable;
use super::protection::HostRef;
use super::{Agent, FenceWord, Forceable, Request, fence};
use crate::control::api::{Accepted, ErrorBody, ErrorKind, WithoutWitness};
use crate::metrics::WitnessMetrics;

/// How often other hosts are asked what they keep, while there is something to ask.
const ASK: Duration = Duration::from_millis(500);
/// How often, and how many times at most, it is looked whether a host is silent that is said to be dead.
const SILENT_LOOK: Duration = Duration::from_millis(100);
const SILENT_LOOKS: u32 = 30;

impl Durable {
    /// What forcing needs to know.
    pub(super) fn forceable(&self) -> Forceable {
        let without_witness = self.protection().and_then(|protection| protection.without_witness);
        Forceable { vm: self.vm(), generation: Generation(self.generation()), without_witness, fencing: false }
    }
}

/// Notes that this host, `me`, keeps the record from now on, and asks its store.
pub(super) fn keep(
    durable: &mut Durable,
    asker: &mut Asker,
    me: NodeId,
    store: StoreId,
    keeper: (Arc<dyn OwnershipStore>, WitnessMetrics),
) -> Result<(), ErrorBody> {
    let noted = durable.set_keeper(me, Some(store));
    noted.map_err(|error| {
        ErrorBody::new(ErrorKind::Failed, "this host cannot write its state directory").because(&error)
    })?;
    asker.turn_to(keeper);
    Ok(())
}

/// The operator typed another name than that of the host in question.
fn another(name: &str, other: &HostRef, typed: &str) -> ErrorBody {
    ErrorBody::new(ErrorKind::Refused, format!("the other host of {name} is {}, not {typed}", other.name))
        .advise("nothing was changed; look again which host is dead")
}

impl Agent {
    /// Goes on with a VM here, because its other host is dead.
    pub(super) async fn force(&self, name: &str, confirm: Option<&str>) -> Result<Accepted, ErrorBody> {
        let refused = |message: String| ErrorBody::new(ErrorKind::Refused, message);
        let forceable = self.ask(name, Request::MayForce).await?;
        if forceable.fencing {
            return self.fenced_by_hand(name, confirm).await;
        }
        match forceable.without_witness {
            Some(WithoutWitness::Manual) => {}
            Some(WithoutWitness::Stall) => {
                return Err(refused(format!("{name} is protected with --without-witness=stall: it waits for its other host"))
                    .advise("bring that host back; nothing is lost. To be able to force one, protect with --without-witness=manual"));
            }
            None => {
                return Err(refused(format!("who may run {name} is decided by a third host, which is asked already"))
                    .advise("bring that one or the VM's other host back; only a VM of two hosts alone (--without-witness=manual) can be forced"));
            }
        }
        let other = self.other_host(name)?;
        // Before anything is confirmed: a host that is back before it is forced out must not be told that nobody did.
        let forcing = self.keeper.begin_force(forceable.vm).ok_or_else(|| {
            ErrorBody::new(ErrorKind::Busy, format!("the other host of {name} is being forced out already"))
                .advise("wait for that; see `understudy status`")
        })?;
        let by = match (confirm, &self.config.fence) {
            (Some(typed), _) if typed == other.name => {
                self.is_silent(name, &other).await?;
                format!("an operator, who typed its name, says that {} is dead", other.name)
            }
            (Some(typed), _) => return Err(another(name, &other, typed)),
            (None, Some(config)) => {
                fence::switch_off(config, &other, &self.metrics).await?;
                format!("the fence command confirmed that {} is off", other.name)
            }
            (None, None) => {
                return Err(refused(format!(
                    "nothing confirms that {} is dead, and two running copies would corrupt the VM",
                    other.name
                ))
                .advise(format!(
                    "switch {0} off, then use --confirm-dead {0}; or configure `[fence] command` in this agent",
                    other.name
                )));
            }
        };
        // It may have answered meanwhile.
        let Forceable { generation, .. } = self.ask(name, Request::MayForce).await?;
        let record = forcing.confirmed(self.me(), generation).await.map_err(|error| {
            ErrorBody::new(ErrorKind::Failed, format!("{name} does not go on here")).because(&error)
        })?;
        tracing::warn!(vm = name, by, generation = %record.generation, "the other host is forced out");
        self.note_force(name, &by);
        let keeper = (self.store(&Arbiter::Host(self.me().node)), self.metrics.keeper(self.identity.name()));
        self.ask(name, |reply| Request::Forced { store: record.store, keeper, reply }).await?;
        Ok(Accepted { vm: name.to_owned() })
    }

    /// Whoever types the name of a host that is heard has looked at another one. One that died just now is silent soon.
    async fn is_silent(&self, name: &str, other: &HostRef) -> Result<(), ErrorBody> {
        let is_heard = || {
            let paths = self.beat.stats();
            paths.iter().any(|path| path.node.to_string() == other.node && path.silence.is_some() && !path.suspected)
        };
        for _ in 0..SILENT_LOOKS {
            if !is_heard() {
                return Ok(());
            }
            tokio::time::sleep(SILENT_LOOK).await;
        }
        Err(ErrorBody::new(ErrorKind::Refused, format!("{} is not dead: its heartbeats are heard", other.name)).advise(
            format!(
                "nothing was changed; {name} goes on when {0} answers. Switch {0} off first if it is to be forced out",
                other.name
            ),
        ))
    }

    /// The VM is this host's already and waits for the other one to be off: the operator says that it is, or wants it tried now.
    async fn fenced_by_hand(&self, name: &str, confirm: Option<&str>) -> Result<Accepted, ErrorBody> {
        let other = self.other_host(name)?;
        let word = match confirm {
            Some(typed) if typed != other.name => return Err(another(name, &other, typed)),
            Some(_) => FenceWord::Confirmed,
            None => FenceWord::Now,
        };
        self.ask(name, |reply| Request::Fence { word, reply }).await?;
        if word == FenceWord::Confirmed
            && let Some(vm) = self.vms().get(name)
        {
            let says = format!("an operator, who typed its name, says that {} is off", other.name);
            tracing::warn!(vm = name, says, "the other host is confirmed to be off");
            vm.view.note_ownership(&says);
        }
        Ok(Accepted { vm: name.to_owned() })
    }

    fn note_force(&self, name: &str, by: &str) {
        if let Some(vm) = self.vms().get(name) {
            vm.view.note_ownership(&format!(
                "forced: {by}. What was heard of the VM until this host heard of the other one last is kept; what the other one did alone after that is lost"
            ));
        }
    }

    /// The host that a VM is protected with, or was.
    fn other_host(&self, name: &str) -> Result<HostRef, ErrorBody> {
        let known = self.vms().get(name).map(|vm| vm.view.peer()).unwrap_or_default();
        let named =
            self.peers.by_name(&known).ok().map(|peer| HostRef { node: peer.node.to_string(), name: peer.name });
        let remembered = || {
            let durable = Durable::find(&self.config.state_dir, name).ok().flatten()?;
            let hosts = durable.protection()?.hosts.clone();
            let mine = self.me().node.to_string();
            let mut others = hosts.into_iter().filter(|host| host.node != mine);
            others.next().filter(|_| others.next().is_none())
        };
        named.or_else(remembered).ok_or_else(|| {
            ErrorBody::new(ErrorKind::Failed, format!("it is not known which other host may run {name}"))
                .advise("nothing was changed; bring the VM's other hosts back")
        })
    }

    /// A standby asks for the record where its primary does. Where this host kept it itself, it must have learnt that it lost it.
    ///
    /// # Errors
    /// If the record that is known here is another one.
    pub(super) fn follow_keeper(
        &self,
        name: &str,
        vm: VmId,
        primary: Party,
        arbiter: &Arbiter,
    ) -> Result<(), ErrorBody> {
        let unusable = |error: std::io::Error| {
            ErrorBody::new(ErrorKind::Failed, format!("what this host remembers of {name} cannot be used"))
                .because(&error)
        };
        let refused = |message: String| {
            ErrorBody::new(ErrorKind::Refused, message).advise("nothing was changed; see which host runs the VM")
        };
        let mut durable = Durable::open(&self.config.state_dir, name, vm).map_err(unusable)?;
        durable.set_vm(vm).map_err(unusable)?;
        let Arbiter::Host(keeper) = arbiter else {
            return match durable.keeper() {
                Some(known) => Err(refused(format!(
                    "the record of {name} is kept by {}, as far as this host knows",
                    self.name_of(known)
                ))),
                None => Ok(()),
            };
        };
        match durable.keeper() {
            Some(known) if known == self.me().node && known != *keeper && !self.has_lost(vm, primary.node) => {
                return Err(refused(format!(
                    "this host keeps the record of {name}, and was not forced out as far as it knows"
                )));
            }
            None if durable.store().is_some() => {
                return Err(refused(format!(
                    "the record of {name} is kept by a third host, as far as this host knows"
                )));
            }
            _ => {}
        }
        durable.set_keeper(*keeper, None).map_err(unusable)
    }

    /// Whether this host's own store says, and is sure, that the VM is the other host's.
    fn has_lost(&self, vm: VmId, to: NodeId) -> bool {
        let owner = self.keeper.record(vm).map(|record| record.owner);
        self.keeper.is_confirmed(vm)
            && matches!(owner, Some(Owner::Solo { node, .. } | Owner::Paired { primary: node, .. }) if node.node == to)
    }

    /// Asks other hosts what they keep, for ever, while this host's own store must know.
    pub(super) async fn ask_what_others_keep(self: Arc<Self>) {
        let mut tick = tokio::time::interval(ASK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            for Question { vm, of } in self.keeper.questions() {
                let agents = || self.peers.list().into_iter().filter(|peer| peer.role == Role::Agent);
                let nodes = of.map_or_else(|| agents().map(|peer| peer.node).collect(), |node| vec![node]);
                if let Some(kept) = self.kept_by(vm, &nodes).await {
                    self.keeper.told(vm, kept.as_ref());
                }
            }
        }
    }

    /// The newest record that these hosts keep; `None` if one of them does not answer.
    async fn kept_by(&self, vm: VmId, nodes: &[NodeId]) -> Option<Option<Record>> {
        let mut newest: Option<Record> = None;
        for node in nodes {
            let kept = match ask_what_is_kept(&self.control, *node, vm).await {
                Ok(kept) => kept,
                Err(error) => {
                    tracing::debug!(%vm, host = self.name_of(*node), %error, "whether this host was forced out is not known");
                    return None;
                }
            };
            if kept.map(|record| record.generation) > newest.map(|record| record.generation) {
                newest = kept;
            }
        }
        Some(newest)
    }
}
