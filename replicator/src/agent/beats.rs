//! Gives what the failure detector says of a node to the VM tasks that this node concerns.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use heartbeat::beat::{GuestStatus, PeerEvent};
use heartbeat_core::ids::{Incarnation, NodeId, VmId};
use heartbeat_core::time::Time;
use tokio::sync::mpsc;

use super::clock;

/// What a VM task learns of its peer's node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Beat {
    /// It is silent for too long.
    Suspected {
        /// When it was heard last.
        last_heard: Option<Time>,
    },
    /// It is heard again, in the same life.
    Heard,
    /// It is in this life, which is another one if it was heard before.
    Restarted(Incarnation),
    /// It says that a guest of its own died or does not answer.
    GuestLost(VmId),
}

/// Who wants to know. Queues are unbounded; what fills them is a few events per failure.
#[derive(Debug, Default)]
pub(super) struct Beats {
    lives: Mutex<BTreeMap<NodeId, Incarnation>>,
    subscribers: Mutex<BTreeMap<NodeId, Vec<mpsc::UnboundedSender<Beat>>>>,
}

impl Beats {
    /// Events of `node` from now on.
    pub(super) fn subscribe(&self, node: NodeId) -> mpsc::UnboundedReceiver<Beat> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.lock().entry(node).or_default().push(sender);
        receiver
    }

    /// Events of any of these nodes from now on.
    pub(super) fn subscribe_all(&self, nodes: &[NodeId]) -> mpsc::UnboundedReceiver<Beat> {
        let (sender, receiver) = mpsc::unbounded_channel();
        for node in nodes {
            self.lock().entry(*node).or_default().push(sender.clone());
        }
        receiver
    }

    /// The life in which a node was heard last, if it was in this one of ours.
    pub(super) fn life(&self, node: NodeId) -> Option<Incarnation> {
        self.lives.lock().unwrap_or_else(PoisonError::into_inner).get(&node).copied()
    }

    /// Notes it, and tells.
    fn lives_on(&self, node: NodeId, life: Incarnation) {
        self.lives.lock().unwrap_or_else(PoisonError::into_inner).insert(node, life);
        self.tell(node, Beat::Restarted(life));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<NodeId, Vec<mpsc::UnboundedSender<Beat>>>> {
        self.subscribers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes events on until the heartbeats stop.
    pub(super) async fn run(&self, mut events: mpsc::Receiver<PeerEvent>) {
        while let Some(event) = events.recv().await {
            match event {
                PeerEvent::Suspected { node, phi, silence } => {
                    tracing::warn!(%node, phi, ?silence, "a peer is silent");
                    self.tell(node, Beat::Suspected { last_heard: Some(before(silence)) });
                }
                PeerEvent::PathDown { node, path, silence } => {
                    tracing::warn!(%node, path, ?silence, "one path to a peer is silent; it is heard on another one");
                }
                PeerEvent::PathUp { node, path, silence } => {
                    tracing::info!(%node, path, ?silence, "a path to a peer is heard again");
                }
                PeerEvent::HeardAgain { node, silence } => {
                    tracing::info!(%node, ?silence, "a peer is heard again");
                    self.tell(node, Beat::Heard);
                }
                PeerEvent::Incarnation { node, old, new } => {
                    tracing::warn!(%node, %old, %new, "a peer has started again");
                    self.lives_on(node, new);
                }
                PeerEvent::Heard { node, incarnation } => {
                    tracing::info!(%node, %incarnation, "a peer is heard");
                    self.lives_on(node, incarnation);
                }
                PeerEvent::Starved { late } => {
                    tracing::warn!(?late, "heartbeats were not scheduled in time; nobody is judged for one silence");
                }
                PeerEvent::GuestReport { node, vm, status } => {
                    tracing::debug!(%node, %vm, ?status, "a peer's guest");
                    if matches!(status, GuestStatus::Dead | GuestStatus::Frozen) {
                        self.tell(node, Beat::GuestLost(vm));
                    }
                }
            }
        }
    }

    /// Tells those who still want to know, and forgets the others.
    fn tell(&self, node: NodeId, beat: Beat) {
        if let Some(subscribers) = self.lock().get_mut(&node) {
            subscribers.retain(|subscriber| subscriber.send(beat).is_ok());
        }
    }
}

fn before(silence: Duration) -> Time {
    clock::now().saturating_sub(silence)
}
