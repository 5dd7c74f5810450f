//! Target `ram`: `info ramblock`, `info mtree -f`, `/proc/PID/maps` (both readers of it), and the search for block records
//! in a heap. The first byte chooses.

use std::fmt::Write;

use crate::qemu::ram::{
    Mapping, RamBlock, is_mapped, lonely_mappings, parse_flat_view, parse_maps, parse_ramblock, records,
};
use crate::sys::inject::fuzzing as inject;

pub(super) fn run(bytes: &[u8]) {
    let Some((&choice, rest)) = bytes.split_first() else { return };
    match choice % 4 {
        0 => listing(&super::text(rest)),
        1 => flat_view(&super::text(rest)),
        2 => maps(&super::text(rest)),
        _ => heap(rest),
    }
}

/// What is read can be printed and read again.
fn listing(text: &str) {
    let Ok(blocks) = parse_ramblock(text) else { return };
    let mut printed = String::new();
    for RamBlock { name, used, total, page_size, offset, host, .. } in &blocks {
        assert!(!name.is_empty(), "a block without a name");
        write!(printed, "{name} {page_size} B {offset:#x} {used:#x} {total:#x}").expect("a string grows");
        match host {
            0 => printed.push('\n'),
            _ => writeln!(printed, " {host:#x}").expect("a string grows"),
        }
    }
    assert_eq!(parse_ramblock(&printed).expect("printed by us"), blocks);
}

fn flat_view(text: &str) {
    let regions = parse_flat_view(text);
    assert!(regions.len() <= text.lines().count());
    assert!(regions.iter().all(|region| !region.name.is_empty() && !region.name.contains(char::is_whitespace)));
}

/// Both readers of `/proc/PID/maps` agree, nothing is held to be mapped that is not, and a guess is a whole mapping.
fn maps(text: &str) {
    let maps = parse_maps(text);
    for map in &maps {
        assert!(map.start <= map.end, "a mapping that ends before it starts");
    }
    let theirs: Vec<_> = text.lines().filter_map(inject::mapping).collect();
    assert_eq!(maps.len(), theirs.len());
    for (map, (range, rights)) in maps.iter().zip(&theirs) {
        assert_eq!((map.start, map.end), (range.start, range.end));
        assert_eq!((map.readable, map.writable), (rights.starts_with('r'), rights.get(1..2) == Some("w")));
        assert_eq!(map.shared, rights.get(3..4) == Some("s"));
    }
    let _ = inject::features(text);
    let edges: Vec<u64> = maps.iter().take(8).flat_map(|map| [map.start, map.end]).collect();
    for &from in &edges {
        for &to in edges.iter().filter(|&&to| to > from) {
            if is_mapped(&maps, from, to - from) {
                assert!(covered(&maps, from, to), "{from:#x}..{to:#x} has a hole");
            }
            if inject::writable(text, &(from..to)) {
                assert!(covered(&maps, from, to));
            }
        }
        for host in lonely_mappings(&maps, from) {
            assert!(maps.iter().any(|map| map.start == host && map.end - map.start == from));
        }
    }
    assert!(!is_mapped(&maps, u64::MAX, 2), "a range past the end of the address space");
}

/// Whether each byte of the range is in some mapping that can be read and written: the slow way.
fn covered(maps: &[Mapping], from: u64, to: u64) -> bool {
    let mut at = from;
    while at < to {
        let reach = maps
            .iter()
            .filter(|map| map.readable && map.writable && map.start <= at && at < map.end)
            .map(|map| map.end);
        match reach.max() {
            Some(end) => at = end,
            None => return false,
        }
    }
    true
}

/// A record that QEMU keeps of a block is found wherever it lies (aligned, as all that malloc gives), whatever is around it.
fn heap(bytes: &[u8]) {
    let Some((numbers, rest)) = bytes.split_first_chunk::<5>() else { return };
    let [place, gap, offset, used, total] = numbers.map(usize::from);
    let number = |byte: usize| (byte as u64) << 12;
    let name = "pc.ram".to_owned();
    let block = RamBlock {
        name,
        used: number(used),
        total: number(total),
        page_size: 4096,
        offset: number(offset),
        host: 0,
        shared: false,
    };
    // Without a record there is nothing to find but what the bytes happen to be; it must not panic.
    let before = records(rest, &block);
    assert!(before.len() <= rest.len());
    let host = 0x7f12_3456_7000_u64;
    let words = [host, 0, block.offset, block.used, block.total];
    let mut record: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    record.extend(std::iter::repeat_n(0xcc, gap % 64));
    record.extend_from_slice(b"pc.ram\0");
    let place = place.min(rest.len()) / 8 * 8;
    let heap = [&rest[..place], &record, &rest[place..]].concat();
    assert!(records(&heap, &block).contains(&host), "the record at {place} is overlooked");
}
