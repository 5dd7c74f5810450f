//! Whether this host has room for the memory of one more guest.
//!
//! Promise: a guest that does not fit is refused before anything is made of it. The memory of a twin is taken page by page as
//! it arrives, so that without this look a host that is too small would first take up the guest and then lose its agent to
//! the kernel's out-of-memory killer, and with it every other VM that it stands by for.

use std::fs;

use crate::guest::{GuestError, GuestErrorKind};
use crate::layout::{Layout, PAGE_SIZE};

/// Refuses a guest that does not fit into what the kernel says is available now.
pub(super) fn check(layout: &Layout) -> Result<(), GuestError> {
    // A kernel that does not say is believed to have room: its limits still hold.
    let available = fs::read_to_string("/proc/meminfo").ok().and_then(|text| available(&text));
    available.map_or(Ok(()), |available| fits(layout, available))
}

/// The bytes that can be had without swapping, by `/proc/meminfo`.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn fits(layout: &Layout, available: u64) -> Result<(), GuestError> {
    let needed = layout.pages().saturating_mul(PAGE_SIZE as u64);
    if needed <= available {
        return Ok(());
    }
    let mib = |bytes: u64| bytes >> 20;
    let message = format!(
        "this host has {} MiB of memory available, and the guest has {} MiB",
        mib(available),
        mib(needed.next_multiple_of(1 << 20))
    );
    Err(GuestError::new(GuestErrorKind::Refused, message).advise("free memory on it, or choose a larger standby"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Block;

    #[test]
    fn a_guest_fits_into_what_is_available_and_no_more() {
        let text = "MemTotal:       24576000 kB\nMemFree:          100000 kB\nMemAvailable:       8192 kB\n";
        assert_eq!(available(text), Some(8 << 20));
        for odd in ["", "MemAvailable:", "MemAvailable: x kB", "MemAvailable: 99999999999999999999 kB", "MemFree: 1 kB"]
        {
            assert_eq!(available(odd), None, "{odd}");
        }
        let layout = |pages| Layout::new(vec![Block { name: "pc.ram".to_owned(), pages }]).expect("a layout");
        assert!(fits(&layout(2048), 8 << 20).is_ok());
        let refused = fits(&layout(2049), 8 << 20).expect_err("one page too many");
        assert_eq!(refused.kind, GuestErrorKind::Refused);
        assert!(refused.message.contains("8 MiB") && refused.message.contains("9 MiB"), "{refused}");
    }
}
