//! The disk-write log: what the guest writes while its disks are mirrored, and the first copy of what was there before.
//!
//! Promise: writes stand in the order in which the guest was told that they are done. A piece of the first copy is read
//! under its disk's lock and put behind every write that it already shows, so applied in order the log makes the same disk. Memory is
//! bounded: at the bound the guest's writes wait.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::disk::{DiskChange, DiskWrite, MirrorProgress};

/// Bytes of writes that may wait; a write waits while there are more.
const BYTES_MAX: usize = 64 << 20;
/// Bytes that are read at once for the first copy.
pub(super) const PIECE: u64 = 256 << 10;

#[derive(Debug, Default)]
struct State {
    /// Bytes of each disk that are copied, while mirrored.
    copied: Option<Vec<u64>>,
    writes: VecDeque<DiskWrite>,
    bytes: usize,
    broken: bool,
    /// Whether waiting writes are to give up, because the machine is to stand.
    stop: bool,
}

/// The log of all disks of a machine.
#[derive(Debug)]
pub(in crate::kvm) struct DiskLog {
    sizes: Vec<u64>,
    state: Mutex<State>,
    changed: Condvar,
}

fn data(write: &DiskWrite) -> usize {
    match &write.change {
        DiskChange::Data(data) => data.len(),
        DiskChange::Zero(_) => 1,
    }
}

/// The change that puts `bytes` on a disk.
pub(super) fn change(bytes: Vec<u8>) -> DiskChange {
    if bytes.iter().all(|&byte| byte == 0) { DiskChange::Zero(bytes.len() as u64) } else { DiskChange::Data(bytes) }
}

impl DiskLog {
    /// A log of disks of these sizes, in bytes.
    pub(in crate::kvm) fn new(sizes: Vec<u64>) -> Self {
        Self { sizes, state: Mutex::default(), changed: Condvar::new() }
    }

    /// The disks' sizes.
    pub(in crate::kvm) fn sizes(&self) -> &[u64] {
        &self.sizes
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics while it holds the log")
    }

    /// Begins anew.
    pub(in crate::kvm) fn start(&self) {
        let mut state = self.lock();
        *state = State { copied: Some(vec![0; self.sizes.len()]), stop: state.stop, ..State::default() };
        self.changed.notify_all();
    }

    /// Ends; what was not taken is dropped.
    pub(in crate::kvm) fn end(&self) {
        let mut state = self.lock();
        *state = State { stop: state.stop, ..State::default() };
        self.changed.notify_all();
    }

    /// Whether writes are logged.
    pub(in crate::kvm) fn active(&self) -> bool {
        let state = self.lock();
        state.copied.is_some() && !state.broken
    }

    /// Lets writes wait (`false`), or give up waiting (`true`).
    pub(in crate::kvm) fn stop(&self, stop: bool) {
        let mut state = self.lock();
        state.stop = stop;
        // Nobody waits for room that is there, and no pause is to pay for telling nobody.
        if stop && state.bytes > BYTES_MAX {
            self.changed.notify_all();
        }
    }

    /// Waits until there is room for a write. False if it is to be tried again when the machine runs again.
    pub(super) fn room(&self) -> bool {
        let state = self.lock();
        let full = |state: &mut State| state.bytes > BYTES_MAX && !state.stop;
        let state = self.changed.wait_while(state, full).expect("nobody panics while it holds the log");
        state.bytes <= BYTES_MAX
    }

    /// A write that is done. To be called under its disk's lock.
    pub(super) fn wrote(&self, disk: u32, offset: u64, change: DiskChange) {
        let mut state = self.lock();
        if state.copied.is_some() && !state.broken {
            let write = DiskWrite { disk, offset, change };
            state.bytes += data(&write);
            state.writes.push_back(write);
            self.changed.notify_all();
        }
    }

    /// Nobody knows what is on a disk: nothing more comes before the mirror is begun anew.
    pub(super) fn break_down(&self) {
        let mut state = self.lock();
        state.broken = true;
        state.writes.clear();
        state.bytes = 0;
        self.changed.notify_all();
    }

    /// The next piece of the first copy: disk, offset, length. `None`: there is none.
    fn piece(&self, state: &State) -> Option<(u32, u64, u64)> {
        let copied = state.copied.as_ref().filter(|_| !state.broken)?;
        let (disk, &offset) = copied.iter().enumerate().find(|&(disk, &done)| done < self.sizes[disk])?;
        let disk_number = u32::try_from(disk).expect("few disks");
        Some((disk_number, offset, PIECE.min(self.sizes[disk] - offset)))
    }

    /// Moves writes to `into`, at most `bytes` of data but one at least; reads a piece of the first copy by `copy`, which calls its
    /// second argument with the bytes under the disk's lock, if nothing else waits. Waits up to `wait` for the first.
    pub(in crate::kvm) fn take(
        &self,
        into: &mut Vec<DiskWrite>,
        bytes: usize,
        wait: Duration,
        copy: impl Fn(u32, u64, u64, &mut dyn FnMut(Option<Vec<u8>>)),
    ) {
        let state = self.lock();
        if state.writes.is_empty()
            && let Some((disk, offset, length)) = self.piece(&state)
        {
            drop(state);
            copy(disk, offset, length, &mut |read| self.copied(disk, offset, read));
        } else {
            drop(state);
        }
        let deadline = Instant::now() + wait;
        let mut state = self.lock();
        while state.writes.is_empty() {
            let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else {
                return;
            };
            state = self.changed.wait_timeout(state, left).expect("nobody panics while it holds the log").0;
        }
        let mut taken = 0;
        while let Some(write) = state.writes.front() {
            let size = data(write);
            if taken > 0 && taken + size > bytes {
                break;
            }
            taken += size;
            into.extend(state.writes.pop_front());
        }
        state.bytes -= taken;
        self.changed.notify_all();
    }

    /// A piece was read; `None`: it could not be.
    fn copied(&self, disk: u32, offset: u64, read: Option<Vec<u8>>) {
        let Some(read) = read else { return self.break_down() };
        let mut state = self.lock();
        let place = disk as usize;
        // Begun anew meanwhile?
        let Some(copied) = state.copied.as_mut().filter(|copied| copied[place] == offset) else { return };
        copied[place] += read.len() as u64;
        let write = DiskWrite { disk, offset, change: change(read) };
        state.bytes += data(&write);
        state.writes.push_back(write);
    }

    /// Everything that was written, for a capture. False if something is missing.
    pub(in crate::kvm) fn capture(&self, into: &mut Vec<DiskWrite>) -> bool {
        into.clear();
        let mut state = self.lock();
        if state.copied.is_none() {
            return true;
        }
        if state.broken || self.piece(&state).is_some() {
            return false;
        }
        into.extend(state.writes.drain(..));
        state.bytes = 0;
        self.changed.notify_all();
        true
    }

    /// The next capture or taking begins with these.
    pub(in crate::kvm) fn put_back(&self, writes: Vec<DiskWrite>) {
        let mut state = self.lock();
        if state.copied.is_some() && !state.broken {
            state.bytes += writes.iter().map(data).sum::<usize>();
            writes.into_iter().rev().for_each(|write| state.writes.push_front(write));
        }
    }

    /// How far the first copy is; `None` if it is broken or was not begun.
    pub(in crate::kvm) fn progress(&self) -> Option<MirrorProgress> {
        if self.sizes.is_empty() {
            return Some(MirrorProgress { ready: true, ..MirrorProgress::default() });
        }
        let state = self.lock();
        let copied = state.copied.as_ref().filter(|_| !state.broken)?;
        let (done, total) = (copied.iter().sum(), self.sizes.iter().sum());
        Some(MirrorProgress { done, total, ready: done == total })
    }
}
