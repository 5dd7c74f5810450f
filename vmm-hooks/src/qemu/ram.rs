//! Where QEMU keeps guest memory: every RAM block with its address in QEMU's own address space.
//!
//! Promise: an address is reported only if nothing contradicts it. QEMU 7.2 prints no addresses, so they come from its own
//! record of the block, found in its heap by name and three numbers, and are checked against `/proc/PID/maps` and, for
//! every block that is mapped into the guest, against `gpa2hva`. Guest memory is never searched: a guest could forge a
//! record there, but it cannot make two contradicting ones agree.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::qmp::{Qmp, QmpError};

/// Bound on the heap that is searched: 1 GiB.
const HEAP_MAX: u64 = 1 << 30;

/// How often a QEMU whose heap changes is looked at.
const LOOKS_MAX: usize = 5;

/// How far before its name the numbers of a block's record may be.
const RECORD_REACH: usize = 128;

/// One block of guest memory and where QEMU has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RamBlock {
    /// Its name, the same on both hosts.
    pub(super) name: String,
    /// Bytes in use now; a firmware table may grow up to `total`.
    pub(super) used: u64,
    /// Bytes that are mapped; all of them are tracked.
    pub(super) total: u64,
    /// Its page size in bytes: more than 4096 for huge pages.
    pub(super) page_size: u64,
    /// QEMU's number for its start. Grows in the order in which the blocks were made.
    pub(super) offset: u64,
    /// Its address in QEMU.
    pub(super) host: u64,
    /// Other processes may map it, too.
    pub(super) shared: bool,
}

/// Why guest memory could not be found.
#[derive(Debug, thiserror::Error)]
pub(super) enum RamError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("cannot read /proc/{pid}/{what}")]
    Proc { pid: u32, what: &'static str, source: std::io::Error },
    #[error("`info ramblock` has a line that cannot be read: {line}")]
    Unreadable { line: String },
    #[error("QEMU's memory changes faster than it can be read")]
    Changing,
    #[error("QEMU has no RAM block")]
    None,
    #[error("the RAM block {name} cannot be found in QEMU's memory")]
    NotFound { name: String },
    #[error("the RAM block {name} could be at more than one place ({first:#x} and {second:#x})")]
    Ambiguous { name: String, first: u64, second: u64 },
    #[error("the RAM block {name} is not mapped at {host:#x} as it should be")]
    NotMapped { name: String, host: u64 },
}

/// Finds all RAM blocks of a QEMU, in the order in which they were made.
pub(super) fn find(qmp: &mut Qmp, pid: u32) -> Result<Vec<RamBlock>, RamError> {
    let mut looks = 1;
    loop {
        match look(qmp, pid) {
            // The heap may have grown or moved its records between one reading and the next.
            Err(RamError::NotFound { .. } | RamError::NotMapped { .. } | RamError::Changing) if looks < LOOKS_MAX => {
                looks += 1;
            }
            found => return found,
        }
    }
}

/// Looks for the blocks once.
fn look(qmp: &mut Qmp, pid: u32) -> Result<Vec<RamBlock>, RamError> {
    let mut listed = parse_ramblock(&qmp.hmp("info ramblock")?)?;
    if listed.is_empty() {
        return Err(RamError::None);
    }
    listed.sort_by_key(|block| block.offset);
    let views = mapped_blocks(qmp, &listed)?;
    let maps = read_maps(pid)?;
    let heap = read_heap(pid, &maps)?;
    for block in &mut listed {
        let mut candidates = records(&heap, block);
        if block.host != 0 {
            candidates.push(block.host);
        }
        candidates.extend(views.iter().filter(|(name, _)| *name == block.name).map(|(_, host)| *host));
        if candidates.is_empty() {
            candidates = lonely_mappings(&maps, block.total);
        }
        candidates.sort_unstable();
        candidates.dedup();
        block.host = match candidates.as_slice() {
            [] => return Err(RamError::NotFound { name: block.name.clone() }),
            [host] => *host,
            [first, second, ..] => {
                return Err(RamError::Ambiguous { name: block.name.clone(), first: *first, second: *second });
            }
        };
        if !is_mapped(&maps, block.host, block.total) {
            return Err(RamError::NotMapped { name: block.name.clone(), host: block.host });
        }
        let end = block.host + block.total;
        block.shared = maps.iter().any(|map| map.shared && map.start < end && map.end > block.host);
    }
    let mut by_host: Vec<&RamBlock> = listed.iter().collect();
    by_host.sort_by_key(|block| block.host);
    for pair in by_host.windows(2) {
        if pair[0].host + pair[0].total > pair[1].host {
            let [first, second] = [pair[0].host, pair[1].host];
            return Err(RamError::Ambiguous { name: pair[1].name.clone(), first, second });
        }
    }
    Ok(listed)
}

/// What `info ramblock` lists; the address is 0 where it is not printed.
pub(super) fn parse_ramblock(text: &str) -> Result<Vec<RamBlock>, RamError> {
    let mut blocks = Vec::new();
    for line in text.lines() {
        let tokens: Vec<&str> = line.split_whitespace().collect();
        let Some(first) = tokens.iter().position(|token| token.starts_with("0x")) else { continue };
        let numbers: Vec<u64> = tokens[first..].iter().map_while(|token| hex(token)).collect();
        let unreadable = || RamError::Unreadable { line: line.to_owned() };
        if first < 3 || numbers.len() < 3 {
            return Err(unreadable());
        }
        let unit = match tokens[first - 1] {
            "B" => 1,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1_u64 << 30,
            _ => return Err(unreadable()),
        };
        let page_size = tokens[first - 2].parse::<u64>().map_err(|_| unreadable())?.saturating_mul(unit);
        blocks.push(RamBlock {
            name: tokens[..first - 2].join(" "),
            offset: numbers[0],
            used: numbers[1],
            total: numbers[2],
            page_size,
            host: numbers.get(3).copied().unwrap_or(0),
            shared: false,
        });
    }
    Ok(blocks)
}

fn hex(token: &str) -> Option<u64> {
    u64::from_str_radix(token.strip_prefix("0x")?, 16).ok()
}

/// One line of `/proc/PID/maps`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) readable: bool,
    pub(super) writable: bool,
    pub(super) shared: bool,
    pub(super) name: String,
}

pub(super) fn parse_maps(text: &str) -> Vec<Mapping> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let (start, end) = fields.next()?.split_once('-')?;
            let rights = fields.next()?;
            let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
            (start < end).then(|| Mapping {
                start,
                end,
                readable: rights.starts_with('r'),
                writable: rights.get(1..2) == Some("w"),
                shared: rights.get(3..4) == Some("s"),
                name: fields.skip(3).collect::<Vec<_>>().join(" "),
            })
        })
        .collect()
}

/// Whether `host..host+total` is readable and writable all over, in one or more mappings without a hole.
pub(super) fn is_mapped(maps: &[Mapping], host: u64, total: u64) -> bool {
    let Some(end) = host.checked_add(total) else { return false };
    let mut at = host;
    for map in maps.iter().filter(|map| map.readable && map.writable) {
        if map.start <= at && at < map.end {
            at = map.end;
        }
        if at >= end {
            return true;
        }
    }
    false
}

/// Mappings of exactly this length with a guard page behind them, as QEMU makes them; used only when nothing else is known.
pub(super) fn lonely_mappings(maps: &[Mapping], total: u64) -> Vec<u64> {
    const GUARD: u64 = 4096;
    maps.windows(2)
        .filter(|pair| pair[0].end - pair[0].start == total && pair[0].readable && pair[0].writable)
        .filter(|pair| pair[1].start == pair[0].end && !pair[1].readable && pair[1].end - pair[1].start >= GUARD)
        .map(|pair| pair[0].start)
        .collect()
}

fn read_maps(pid: u32) -> Result<Vec<Mapping>, RamError> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"));
    maps.map(|maps| parse_maps(&maps)).map_err(|source| RamError::Proc { pid, what: "maps", source })
}

/// The heap by these maps, or [`RamError::Changing`] if a part of it is gone.
fn read_heap(pid: u32, maps: &[Mapping]) -> Result<Vec<u8>, RamError> {
    let mem = File::open(format!("/proc/{pid}/mem")).map_err(|source| RamError::Proc { pid, what: "mem", source })?;
    let mut heap = Vec::new();
    for map in maps.iter().filter(|map| map.name == "[heap]") {
        let length = map.end - map.start;
        if length > HEAP_MAX {
            continue;
        }
        let old = heap.len();
        heap.resize(old + usize::try_from(length).expect("bounded above"), 0);
        mem.read_exact_at(&mut heap[old..], map.start).map_err(|_| RamError::Changing)?;
    }
    Ok(heap)
}

/// The addresses in QEMU's own records of a block: its name, with its offset, used and total length one after the other a
/// little before it, and its address two words before these.
pub(super) fn records(heap: &[u8], block: &RamBlock) -> Vec<u64> {
    let mut name = block.name.clone().into_bytes();
    name.push(0);
    let mut numbers = Vec::with_capacity(24);
    for number in [block.offset, block.used, block.total] {
        numbers.extend_from_slice(&number.to_le_bytes());
    }
    let mut found = Vec::new();
    // The numbers are aligned, as everything that malloc gives is. A search byte by byte could step over them from a place
    // before, where zeroes look alike.
    for start in (0..heap.len()).step_by(8).filter(|start| heap[*start..].starts_with(&numbers)) {
        let after = start + numbers.len();
        let reach = &heap[after..heap.len().min(after + RECORD_REACH + name.len())];
        // The record continues with a function, flags and then its name.
        let named = reach.windows(name.len()).any(|window| window == name);
        if let (true, Some(host)) = (named, start.checked_sub(16).and_then(|at| word(heap, at))) {
            found.push(host);
        }
    }
    found
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().expect("eight bytes")))
}

/// The addresses of the blocks that the guest sees at some physical address, as QEMU itself translates them.
fn mapped_blocks(qmp: &mut Qmp, blocks: &[RamBlock]) -> Result<Vec<(String, u64)>, RamError> {
    let mut found: Vec<(String, u64)> = Vec::new();
    for region in parse_flat_view(&qmp.hmp("info mtree -f")?) {
        // A region is called `vga.vram` where its block is called `0000:00:02.0/vga.vram`.
        let mut named = blocks.iter().filter(|block| {
            block.name == region.name || block.name.strip_suffix(&region.name).is_some_and(|rest| rest.ends_with('/'))
        });
        let (Some(block), None) = (named.next(), named.next()) else { continue };
        if found.iter().any(|(name, _)| *name == block.name) {
            continue;
        }
        let answer = qmp.hmp(&format!("gpa2hva {:#x}", region.address))?;
        let Some(host) = answer.split_whitespace().last().and_then(hex) else { continue };
        // The view may have changed since it was printed; then the answer names another region.
        if answer.contains(&format!("({})", region.name)) && host >= region.offset {
            found.push((block.name.clone(), host - region.offset));
        }
    }
    Ok(found)
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) address: u64,
    pub(super) name: String,
    pub(super) offset: u64,
}

/// The RAM and ROM regions of the guest's physical address space, by `info mtree -f`.
pub(super) fn parse_flat_view(text: &str) -> Vec<Region> {
    let mut in_memory = false;
    let mut regions = Vec::new();
    for line in text.lines() {
        if line.starts_with("FlatView") {
            in_memory = false;
        } else if line.trim_start().starts_with("AS \"memory\"") {
            in_memory = true;
        }
        let Some((range, rest)) = line.trim().split_once(" (prio ") else { continue };
        let Some((kind, name)) = rest.split_once("): ") else { continue };
        let kind = kind.rsplit_once(", ").map_or("", |(_, kind)| kind);
        if !in_memory || !matches!(kind, "ram" | "rom") {
            continue;
        }
        let Some(address) = range.split_once('-').and_then(|(start, _)| u64::from_str_radix(start, 16).ok()) else {
            continue;
        };
        // Newer ones print "KVM" or an owner behind the name and the offset.
        let mut words = name.split_whitespace();
        let Some(name) = words.next() else { continue };
        let offset = words.next().and_then(|word| u64::from_str_radix(word.strip_prefix('@')?, 16).ok()).unwrap_or(0);
        regions.push(Region { address, name: name.to_owned(), offset });
    }
    regions
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LISTING: &str = "              Block Name    PSize              Offset               Used              Total\n\
        \x20                 pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000\n\
        \x20   /rom@etc/acpi/tables    4 KiB  0x0000000005100000 0x0000000000020000 0x0000000000200000\n";

    fn block(name: &str, offset: u64, used: u64, total: u64) -> RamBlock {
        RamBlock { name: name.to_owned(), used, total, page_size: 4096, offset, host: 0, shared: false }
    }

    #[test]
    fn reads_the_listing_with_and_without_addresses() {
        let blocks = parse_ramblock(LISTING).expect("readable");
        assert_eq!(
            blocks,
            vec![
                block("pc.ram", 0, 0x400_0000, 0x400_0000),
                block("/rom@etc/acpi/tables", 0x510_0000, 0x2_0000, 0x20_0000)
            ]
        );
        let newer = "  mem0    2 MiB  0x0 0x200000 0x200000 0x00007f0000000000  rw\n";
        let blocks = parse_ramblock(newer).expect("readable");
        assert_eq!((blocks[0].host, blocks[0].page_size), (0x7f00_0000_0000, 2 << 20));
        assert!(parse_ramblock("x 0x1 0x2\n").is_err());
    }

    #[test]
    fn finds_a_record_by_its_numbers_and_name_only() {
        let wanted = block("0000:00:02.0/vga.rom", 0x508_0000, 0x1_0000, 0x1_0000);
        let mut heap = vec![0_u8; 64];
        let record = |host: u64, offset: u64, name: &str| {
            let mut bytes = Vec::new();
            for word in [host, 0, offset, 0x1_0000, 0x1_0000, 0x5555, 0x10] {
                bytes.extend_from_slice(&word.to_le_bytes());
            }
            bytes.extend_from_slice(name.as_bytes());
            bytes.resize(400, 0);
            bytes
        };
        heap.extend(record(0x7f00_0000_0000, 0x508_0000, "0000:00:02.0/vga.rom"));
        heap.extend(record(0x7f00_1000_0000, 0x508_0000, "0000:00:02.0/vga.ro"));
        heap.extend(record(0x7f00_2000_0000, 0x509_0000, "0000:00:02.0/vga.rom"));
        assert_eq!(records(&heap, &wanted), vec![0x7f00_0000_0000]);
    }

    #[test]
    fn a_heap_that_shrank_after_its_maps_were_read_is_looked_at_again() {
        const PAGE: usize = 4096;
        let bytes = vec![7_u8; 4 * PAGE];
        let start = (bytes.as_ptr() as u64).next_multiple_of(PAGE as u64);
        let heap = |start, end| Mapping {
            start,
            end,
            readable: true,
            writable: true,
            shared: false,
            name: "[heap]".to_owned(),
        };
        let read = |maps: &[Mapping]| read_heap(std::process::id(), maps);
        let whole = read(&[heap(start, start + 2 * PAGE as u64)]).expect("it is ours");
        assert_eq!(whole, vec![7; 2 * PAGE]);
        // Nothing is mapped below the lowest address that a process may use.
        let gone = read(&[heap(start, start + PAGE as u64), heap(0x1000, 0x2000)]);
        assert!(matches!(gone, Err(RamError::Changing)), "{gone:?}");
        let gone = read_heap(u32::MAX, &[]);
        assert!(matches!(gone, Err(RamError::Proc { what: "mem", .. })), "{gone:?}");
    }

    #[test]
    fn reads_the_memory_view_and_no_other() {
        let text = "FlatView #0\n AS \"memory\", root: system\n AS \"cpu-memory-0\", root: system\n Root memory region: system\n  \
            0000000000000000-00000000000bffff (prio 0, ram): pc.ram\n  \
            00000000000c0000-00000000000cafff (prio 0, rom): pc.ram @00000000000c0000 KVM\n  \
            00000000febc0000-00000000febdffff (prio 1, i/o): e1000-mmio\n\
            FlatView #1\n AS \"I/O\", root: io\n  0000000000000000-0000000000000007 (prio 0, ram): dma-chan\n";
        let regions = parse_flat_view(text);
        assert_eq!(regions.len(), 2);
        assert_eq!(regions[1], Region { address: 0xc0000, name: "pc.ram".to_owned(), offset: 0xc0000 });
    }

    #[test]
    fn a_block_must_be_mapped_without_a_hole() {
        let maps = parse_maps(
            "7f0000000000-7f0000200000 rw-p 00000000 00:00 0 \n7f0000200000-7f0000400000 rw-s 00000000 00:01 9 /memfd:x (deleted)\n\
             7f0000400000-7f0000401000 ---p 00000000 00:00 0 \n",
        );
        assert!(is_mapped(&maps, 0x7f00_0000_0000, 0x40_0000));
        assert!(!is_mapped(&maps, 0x7f00_0000_0000, 0x40_1000));
        assert!(!is_mapped(&maps, 0x7eff_ffff_f000, 0x2000));
        assert_eq!(lonely_mappings(&maps, 0x20_0000), vec![0x7f00_0020_0000]);
        assert_eq!(maps[1].name, "/memfd:x (deleted)");
        let backwards = parse_maps("2000-1000 rw-p 0 0:0 0\n1000-2000 ---p 0 0:0 0\n");
        assert!(lonely_mappings(&backwards, 0x1000).is_empty(), "what ends before it starts is no mapping");
    }

    proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(text in "[ -~\n]{0,300}") {
            let _ = parse_ramblock(&text);
            parse_maps(&text);
            parse_flat_view(&text);
        }
    }
}
