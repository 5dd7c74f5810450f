//! The gate of a machine in another process, as its protector has it.
//!
//! Promises: what it holds is heard only by a message of [`ProcessGate`]. After [`Gate::shut`] no such message is sent any more, so the gate is mute
//! whatever becomes of the process; and none that releases an epoch after a seal that was not confirmed. Nothing here waits for the guest;
//! [`Gate::release`] waits for nobody.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::board::{Board, Shown, instant};
use super::link::{Link, LinkError};
use super::wire::{Answer, GateRequest};
use crate::guest::{Gate, GuestError, GuestErrorKind, Held};

/// Longest wait for an answer. The gate's thread only writes to the network.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// The same of a gate that is shut, which is mute without it.
const SHUT_MAX: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct State {
    link: Link,
    /// It is not known which epoch output is of: what is let out is let out by opening.
    unsealed: bool,
}

/// The gate.
#[derive(Debug)]
pub(super) struct ProcessGate {
    name: String,
    /// Nothing is let out any more. Outside of the lock, which may be held while an answer is waited for.
    shut: AtomicBool,
    state: Mutex<State>,
    board: Arc<Board>,
}

impl ProcessGate {
    pub(super) fn new(name: &str, link: Link, board: Arc<Board>) -> Self {
        Self {
            name: name.to_owned(),
            shut: AtomicBool::new(false),
            state: Mutex::new(State { link, unsealed: false }),
            board,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics while it holds the gate")
    }

    fn failed(&self, error: LinkError) -> GuestError {
        let kind = if matches!(error, LinkError::Closed) { GuestErrorKind::Gone } else { GuestErrorKind::Failed };
        let message = format!("the gate of the microVM {} does not answer", self.name);
        GuestError::new(kind, message).advise("what it holds stays held; end the microVM if it hangs").because(error)
    }

    fn ask(&self, state: &mut State, request: GateRequest) -> Result<Answer, GuestError> {
        state.link.ask(&request, &[], ANSWER_MAX).map_err(|error| self.failed(error))
    }

    fn must(&self, state: &mut State, request: GateRequest) -> Result<(), GuestError> {
        match self.ask(state, request)? {
            Answer::Done => Ok(()),
            _ => Err(self.failed(LinkError::Invalid)),
        }
    }

    /// See [`crate::guest::Guest::hold_output`].
    pub(super) fn hold(&self, epoch: u64) -> Result<(), GuestError> {
        self.must(&mut self.lock(), GateRequest::Hold(epoch))
    }

    /// See [`crate::guest::Guest::open_output`].
    pub(super) fn open(&self) -> Result<(), GuestError> {
        let mut state = self.lock();
        if self.is_shut() {
            return Ok(());
        }
        self.must(&mut state, GateRequest::Open)?;
        state.unsealed = false;
        Ok(())
    }

    /// Whether it was shut for good.
    pub(super) fn is_shut(&self) -> bool {
        self.shut.load(Ordering::SeqCst)
    }

    /// Tells the network where the machine is.
    pub(super) fn announce(&self) -> Result<(), GuestError> {
        self.must(&mut self.lock(), GateRequest::Announce)
    }
}

impl Gate for ProcessGate {
    fn seal(&self, next: u64) -> u64 {
        let mut state = self.lock();
        match self.ask(&mut state, GateRequest::Seal(next)) {
            Ok(Answer::Sealed(frames)) => frames,
            other => {
                // What comes may be of an epoch that is released soon.
                state.unsealed = true;
                tracing::error!(vm = self.name, ?other, "an epoch could not be sealed: its output stays held");
                0
            }
        }
    }

    fn release(&self, through: u64) {
        let mut state = self.lock();
        if self.is_shut() || state.unsealed {
            return;
        }
        if let Err(error) = state.link.post(&GateRequest::Release(through)) {
            // The next release takes it with it.
            tracing::debug!(vm = self.name, %error, through, "a release did not get through");
        }
    }

    fn shut(&self) {
        self.shut.store(true, Ordering::SeqCst);
        let mut state = self.lock();
        match state.link.ask::<Answer>(&GateRequest::Shut, &[], SHUT_MAX) {
            Ok(_) | Err(LinkError::Closed) => {}
            Err(error) => {
                tracing::error!(vm = self.name, %error, "a gate was not confirmed to be shut: it releases nothing any more");
            }
        }
    }

    fn held(&self) -> Held {
        let shown = |what| self.board.shown(what);
        Held {
            frames: shown(Shown::HeldFrames),
            bytes: shown(Shown::HeldBytes),
            oldest: instant(shown(Shown::HeldSince)),
            released: shown(Shown::Released),
            dropped: shown(Shown::Dropped),
        }
    }

    fn wait_output(&self, deadline: Instant) -> Option<Instant> {
        loop {
            if let Some(first) = instant(self.board.shown(Shown::First)) {
                return Some(first);
            }
            if !self.board.wait_for_ring(deadline) {
                return None;
            }
        }
    }
}
