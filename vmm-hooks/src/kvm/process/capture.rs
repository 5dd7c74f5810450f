//! What a microVM's process has captured, as its protector takes it from the board.
//!
//! Promises: pages that were found come again until a capture with their bytes was returned. Of a machine that went on by itself a capture counts only
//! if it was let, and the copies are those of all pages that were found: as many, for both are in ascending order and what is copied is found. What a
//! process says that was broken into is read within bounds; it can spoil its own guest's capture, and no more.

use std::time::{Duration, Instant};

use super::board::instant;
use super::guest::{ANSWER_MAX, ProcessGuest, unexpected};
use super::link::LinkError;
use super::wire::{Answer, Captured, GoneOn, Request, Writes};
use crate::disk::DiskWrite;
use crate::guest::{After, Capture, GuestError, PauseParts};
use crate::kvm::guest::not_whole;

/// Most bytes of disk writes on the board that one capture can hold: more than a log does.
const WRITES_MAX: usize = 256 << 20;

impl ProcessGuest {
    /// Asks for a capture.
    pub(super) fn ask_captured(&mut self, request: &Request) -> Result<Captured, GuestError> {
        if self.broken {
            return Err(not_whole());
        }
        self.untaken = true;
        match self.machine.0.ask(request) {
            Ok(Answer::Captured(captured)) => Ok(captured),
            other => {
                let error = other.map_or_else(|error| error, |_| unexpected(&self.machine.0.spec.name));
                // Of one that is only late the writes would come with nothing.
                self.broken |= self.mirrored && error.source.as_ref().is_some_and(|source| source.is::<LinkError>());
                Err(error)
            }
        }
    }

    /// See [`crate::guest::Guest::capture_epoch`].
    pub(super) fn epoch(
        &mut self,
        begin: bool,
        next: u64,
        after: After,
        into: &mut Capture,
        parts: &mut PauseParts,
    ) -> Result<u64, GuestError> {
        // The process copies what it finds. What was found before, and was not taken or was put back, belongs to this epoch, too.
        let go_on = after == After::Run && !self.untaken && !self.ledger.owes();
        let start = Instant::now();
        // It may, whatever is answered.
        (self.paused, self.gone_on, parts.ran_again) = (true, false, None);
        let stays = self.take_turns();
        let captured = self.ask_captured(&Request::Epoch { begin, next, go_on });
        let answered = Instant::now();
        // A copy is long: whoever cannot run elsewhere runs here meanwhile, and this thread elsewhere.
        drop(stays);
        let captured = captured?;
        if captured.gone_on.is_some() && !go_on {
            return Err(self.not_believed());
        }
        let mut stood = answered - start;
        if let Some(GoneOn { at, .. }) = captured.gone_on {
            (self.paused, self.gone_on) = (false, true);
            let ran = instant(at).map_or(answered, |ran| ran.clamp(start, answered));
            parts.ran_again = Some(ran);
            stood = ran - start;
        }
        let taken = self.take(&captured, answered - start, into, parts);
        // The way there, and back if the machine stands, counts as stopping it.
        let inside = captured.gone_on.map_or(0, |gone_on| gone_on.copy_nanos.saturating_add(gone_on.resume_nanos));
        let inside = inside.saturating_add(captured.harvest_nanos).saturating_add(captured.device_nanos);
        parts.stop = stood.saturating_sub(Duration::from_nanos(inside));
        taken.map(|()| captured.held)
    }

    /// What an answer says cannot be. The disk writes that came with it are lost.
    pub(super) fn not_believed(&mut self) -> GuestError {
        self.broken |= self.mirrored;
        unexpected(&self.machine.0.spec.name)
    }

    /// Takes an epoch from the board, which was asked for for so long.
    pub(super) fn take(
        &mut self,
        captured: &Captured,
        asked: Duration,
        into: &mut Capture,
        parts: &mut PauseParts,
    ) -> Result<(), GuestError> {
        let said = |nanos| Duration::from_nanos(nanos).min(asked);
        let start = Instant::now();
        self.dirty.clear();
        self.ledger.harvest(&mut self.dirty).expect("the board is there");
        self.untaken = false;
        into.pages.clear();
        into.pages.extend(self.dirty.iter());
        (parts.harvest, parts.device) = (said(captured.harvest_nanos), said(captured.device_nanos));
        let copying = Instant::now();
        let taken = self.take_the_rest(captured, into);
        if let Some(gone_on) = captured.gone_on {
            (parts.copy, parts.resume) = (said(gone_on.copy_nanos), said(gone_on.resume_nanos));
        } else {
            parts.harvest += copying - start;
            parts.copy = copying.elapsed();
        }
        if taken.is_err() {
            self.ledger.put_back(&self.dirty);
        }
        taken
    }

    fn take_the_rest(&mut self, captured: &Captured, into: &mut Capture) -> Result<(), GuestError> {
        let (board, device) = (&self.machine.0.board, &mut into.device);
        let mut read_state = || board.read_state(captured.state, device);
        let read = match captured.gone_on {
            None => self.copying.copy(&into.pages, &mut into.bytes, read_state),
            Some(GoneOn { pages, .. }) => {
                let found = into.pages.len();
                pages == found as u64 && board.read_copies(found, &mut into.bytes) && read_state()
            }
        };
        if !read {
            return Err(self.not_believed());
        }
        into.disk.clear();
        into.disk.append(&mut self.returned);
        self.fetch(captured.writes, &mut into.disk)
    }

    /// Takes writes from the board, and those that wait behind them.
    pub(super) fn fetch(&mut self, mut writes: Writes, into: &mut Vec<DiskWrite>) -> Result<(), GuestError> {
        let fetched = self.fetch_all(&mut writes, into);
        if fetched.is_err() {
            self.broken = true;
        }
        fetched
    }

    fn fetch_all(&self, writes: &mut Writes, into: &mut Vec<DiskWrite>) -> Result<(), GuestError> {
        let inner = &self.machine.0;
        let (mut bytes, begun) = (0, Instant::now());
        loop {
            let read = inner.board.read_writes(writes.count, &inner.sizes, into);
            bytes += read.map_err(|why| unexpected(&inner.spec.name).because(why))?;
            if !writes.more {
                return Ok(());
            }
            if writes.count == 0 || bytes > WRITES_MAX || begun.elapsed() > ANSWER_MAX {
                return Err(unexpected(&inner.spec.name));
            }
            *writes = match inner.ask(&Request::MoreWrites)? {
                Answer::Writes(writes) => writes,
                _ => return Err(unexpected(&inner.spec.name)),
            };
        }
    }
}

#[cfg(test)]
mod tests;
