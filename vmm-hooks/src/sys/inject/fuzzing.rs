//! What the fuzzer may see of the reader of `/proc`.

use std::ops::Range;

use super::victim;

/// The range and the rights of one line of `/proc/PID/maps`, if it is one.
pub(crate) fn mapping(line: &str) -> Option<(Range<u64>, String)> {
    victim::parse_mapping(line).map(|mapping| (mapping.range, mapping.permissions))
}

/// Whether a stack frame may be laid in `range`, by these lines of `/proc/PID/maps`.
pub(crate) fn writable(lines: &str, range: &Range<u64>) -> bool {
    let maps: Vec<_> = lines.lines().filter_map(victim::parse_mapping).collect();
    victim::writable(&maps, range)
}

/// The features in a userfaultfd's line of `/proc/PID/fdinfo`.
pub(crate) fn features(api: &str) -> Option<u64> {
    victim::parse_features(api)
}
