//! Target `epochs`: a history of a small guest, chosen by the input, through encoder, wire, stager and memory.
//!
//! Holds: the standby has the guest's memory and device state after each epoch; applying it again, also after an
//! application that stopped half way, gives the same; a stream that is cut or damaged anywhere is not staged; a stream that
//! was not applied and forgotten leaves later ones right.

use bytes::Bytes;
use vmm_hooks::guest::Capture;
use vmm_hooks::layout::{PAGE_SIZE, PageSet};

use super::{Choices, Memory};
use crate::pages::decode::{StageError, Stager};
use crate::pages::encode::Encoder;
use crate::pages::frame::StreamId;
use crate::pages::shadow::ShadowMode;
use crate::pages::staged::{DeviceState, StagedEpoch};

const PAGES: usize = 5;
const LIMIT: usize = 256 << 10;
const MAX_EPOCHS: u64 = 6;
const MAX_WRITES: usize = 12;

pub(super) fn run(bytes: &[u8]) {
    let mut choices = Choices(bytes);
    let shadow = match choices.below(3) {
        0 => ShadowMode::Full,
        1 => ShadowMode::Bounded { bytes: 2 * PAGE_SIZE as u64 },
        _ => ShadowMode::Off,
    };
    let mut guest =
        Guest { memory: vec![0; PAGES * PAGE_SIZE], device: Vec::new(), dirty: PageSet::full(PAGES as u64) };
    let mut encoder = Encoder::new(PAGES as u64, shadow);
    let standby = Memory::new(PAGES);
    let mut device: Option<DeviceState> = None;
    for epoch in 1..=MAX_EPOCHS {
        guest.write(&mut choices);
        let capture = guest.capture();
        let mut stream = Vec::new();
        let mut sink = |frame: Bytes| stream.extend_from_slice(&frame);
        let id = StreamId { vm: [1; 16], generation: 2, incarnation: 3, epoch, binding: epoch > 1, sync: false };
        let stats = encoder.encode_epoch(&id, &capture, &mut sink).expect("a small device state");
        assert_eq!(stats.wire_bytes, stream.len() as u64);
        damage(&stream, device.as_ref(), &mut choices);
        if choices.byte() % 8 == 7 {
            // It got lost: its pages come again with the next one.
            let mut pages = PageSet::empty(PAGES as u64);
            for &page in &capture.pages {
                pages.insert(page);
            }
            encoder.forget(&pages);
            for page in pages.iter() {
                guest.dirty.insert(page);
            }
            continue;
        }
        let staged = stage(&stream, 1 + choices.below(300), device.clone()).expect("our own stream");
        assert_eq!((staged.epoch(), staged.id().binding), (epoch, id.binding));
        standby.die_after(choices.below(9));
        staged.apply(&standby);
        standby.die_after(usize::MAX);
        for _ in 0..2 {
            staged.apply(&standby);
            assert!(standby.bytes() == guest.memory, "epoch {epoch}: the memory differs");
        }
        assert!(staged.device_state() == guest.device, "epoch {epoch}: the device state differs");
        device = staged.device();
        if choices.is_empty() {
            return;
        }
    }
}

fn stage(stream: &[u8], piece: usize, device: Option<DeviceState>) -> Result<StagedEpoch, StageError> {
    let mut stager = Stager::new(PAGES as u64, device, LIMIT);
    for piece in stream.chunks(piece) {
        stager.push(piece)?;
    }
    stager.finish()
}

/// Up to 32 damaged bits in a row are always found, and so is a cut.
fn damage(stream: &[u8], device: Option<&DeviceState>, choices: &mut Choices<'_>) {
    let cut = choices.below(stream.len());
    assert!(stage(&stream[..cut], stream.len(), device.cloned()).is_err(), "a stream cut at {cut} was staged");
    let (at, mask) = (choices.below(stream.len()), choices.byte());
    let mut damaged = stream.to_vec();
    damaged[at] ^= mask;
    let staged = stage(&damaged, stream.len(), device.cloned());
    assert_eq!(staged.is_ok(), mask == 0, "damage {mask:#x} at {at}");
    damaged[at] = stream[at];
    damaged.push(mask);
    assert_eq!(stage(&damaged, stream.len(), device.cloned()).err(), Some(StageError::Trailing));
}

struct Guest {
    memory: Vec<u8>,
    device: Vec<u8>,
    dirty: PageSet,
}

impl Guest {
    fn write(&mut self, choices: &mut Choices<'_>) {
        for _ in 0..choices.below(MAX_WRITES) {
            let page = choices.below(PAGES);
            let (offset, value) = (choices.below(PAGE_SIZE), choices.byte());
            let length = choices.word().min(PAGE_SIZE - offset);
            let start = page * PAGE_SIZE + offset;
            let bytes = &mut self.memory[start..start + length];
            if value == 0xff {
                // Bytes that nothing packs well.
                for (at, byte) in bytes.iter_mut().enumerate() {
                    *byte = (at.wrapping_mul(0x9E37_79B9) >> 7).to_le_bytes()[0] ^ (at >> 8).to_le_bytes()[0];
                }
            } else {
                bytes.fill(value);
            }
            self.dirty.insert(page as u64);
        }
        if choices.byte() % 2 == 1 {
            self.device.resize(choices.below(3 * PAGE_SIZE), 1);
        }
        if !self.device.is_empty() {
            let at = choices.below(self.device.len());
            self.device[at] = choices.byte();
        }
    }

    fn capture(&mut self) -> Capture {
        let pages: Vec<u64> = self.dirty.iter().collect();
        self.dirty.clear();
        let mut bytes = Vec::new();
        for &page in &pages {
            let start = usize::try_from(page).expect("small") * PAGE_SIZE;
            bytes.extend_from_slice(&self.memory[start..start + PAGE_SIZE]);
        }
        Capture { bytes, pages, device: self.device.clone(), ..Capture::default() }
    }
}
