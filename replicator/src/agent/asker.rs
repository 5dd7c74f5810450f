//! Questions to the ownership store, asked beside the VM task.
//!
//! Each question is a task of its own; an answer comes back through a queue, a silence comes back as nothing: the core
//! asks again by its own clock (docs/protocol.md: a lost answer is no answer).

use std::sync::Arc;
use std::time::Instant;

use heartbeat::store::OwnershipStore;
use heartbeat_core::store::{StoreAnswer, StoreOp, StoreRequest};
use tokio::sync::{Semaphore, mpsc};

use crate::metrics::{WitnessMetrics, WitnessOutcome};

/// Questions under way at once; more are dropped, as if the network had lost them.
const UNDER_WAY: usize = 8;

/// Asks one store for one VM.
#[derive(Debug)]
pub(super) struct Asker {
    store: Arc<dyn OwnershipStore>,
    metrics: WitnessMetrics,
    answers: mpsc::UnboundedSender<StoreAnswer>,
    under_way: Arc<Semaphore>,
}

impl Asker {
    /// An asker and the queue of its answers.
    pub(super) fn new(
        store: Arc<dyn OwnershipStore>,
        metrics: WitnessMetrics,
    ) -> (Self, mpsc::UnboundedReceiver<StoreAnswer>) {
        let (answers, queue) = mpsc::unbounded_channel();
        (Self { store, metrics, answers, under_way: Arc::new(Semaphore::new(UNDER_WAY)) }, queue)
    }

    /// Asks another store from now on. What the former one was asked may still be answered.
    pub(super) fn turn_to(&mut self, (store, metrics): (Arc<dyn OwnershipStore>, WitnessMetrics)) {
        (self.store, self.metrics) = (store, metrics);
    }

    /// Asks, in the background.
    pub(super) fn ask(&self, request: StoreRequest) {
        let Ok(permit) = Arc::clone(&self.under_way).try_acquire_owned() else {
            tracing::debug!(?request, "too many questions to the store are under way");
            return;
        };
        let (store, metrics, answers) = (Arc::clone(&self.store), self.metrics.clone(), self.answers.clone());
        tokio::spawn(async move {
            let began = Instant::now();
            let answer = store.ask(request).await;
            let outcome = match (&answer, request.op) {
                (Err(_), _) => WitnessOutcome::Lost,
                (Ok(_), StoreOp::Read) => WitnessOutcome::Read,
                (Ok(answer), StoreOp::Change { .. }) if answer.applied => WitnessOutcome::Granted,
                (Ok(_), StoreOp::Change { .. }) => WitnessOutcome::Refused,
            };
            metrics.observe(outcome, began.elapsed());
            match answer {
                // Dropped if the protection has ended.
                Ok(answer) => drop(answers.send(answer)),
                Err(error) => tracing::warn!(%error, "the ownership store gave no answer"),
            }
            drop(permit);
        });
    }
}
