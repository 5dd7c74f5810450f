//! What `/proc` tells of the process before it is touched: who traces it, its threads, the code to borrow, its userfaultfds.

use std::fs;
use std::io;
use std::ops::Range;

use super::super::process::{PidFd, ProcessError, ProcessMemory};
use super::InjectError;

/// `mov $15, %rax; syscall`: the signal restorer of glibc (`rt_sigreturn` is call 15).
const RESTORER: &[u8] = &[0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05];
/// `mov $15, %eax; syscall`: another compiler's.
const SHORT_RESTORER: &[u8] = &[0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05];
/// `syscall; ret`.
const SYSCALL: &[u8] = &[0x0f, 0x05, 0xc3];

/// Bound on the code that is searched, and on what is read of it at once.
const MAX_CODE: u64 = 256 << 20;
const CHUNK: u64 = 1 << 20;

/// Features our userfaultfd has: `WP_HUGETLBFS_SHMEM | WP_UNPOPULATED | WP_ASYNC`, and `PAGEFAULT_FLAG_WP`, which they need.
pub(super) const FEATURES: u64 = (1 << 12) | (1 << 13) | (1 << 15) | 1;

/// Set by the kernel among the features once they were agreed on (`UFFD_FEATURE_INITIALIZED`).
const INITIALIZED: u64 = 1 << 31;

/// One line of `/proc/PID/maps`.
#[derive(Debug, Clone)]
pub(super) struct Mapping {
    pub range: Range<u64>,
    pub permissions: String,
    pub name: String,
}

/// The code in the process that is borrowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Code {
    /// Address of `syscall; ret`.
    pub syscall: u64,
    /// Address of a signal restorer.
    pub restorer: u64,
    /// Address after its `syscall` instruction.
    pub restored_at: u64,
}

/// A userfaultfd in the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Userfaultfd {
    /// Ours: it has just our features.
    Ours(u32),
    /// Made, never set up: an attachment that was cut off, or the process is just setting it up.
    Idle(u32),
    /// Somebody else's.
    Foreign(u32),
}

fn os(pid: u32, what: &'static str) -> impl FnOnce(io::Error) -> InjectError {
    move |source| ProcessError::Os { pid, what, source }.into()
}

pub(super) fn maps(pid: u32) -> Result<Vec<Mapping>, InjectError> {
    let text = fs::read_to_string(format!("/proc/{pid}/maps")).map_err(os(pid, "read the mappings"))?;
    Ok(text.lines().filter_map(parse_mapping).collect())
}

pub(super) fn parse_mapping(line: &str) -> Option<Mapping> {
    let mut fields = line.split_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let range = u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?;
    if range.is_empty() {
        return None;
    }
    let permissions = fields.next()?.to_owned();
    let name = fields.nth(3).unwrap_or("").to_owned();
    Some(Mapping { range, permissions, name })
}

/// Whether all of `range` can be read and written, privately.
pub(super) fn writable(maps: &[Mapping], range: &Range<u64>) -> bool {
    maps.iter().any(|mapping| {
        mapping.permissions == "rw-p" && mapping.range.start <= range.start && range.end <= mapping.range.end
    })
}

/// The value of a line of `/proc/PID/status` (or of a thread's).
pub(super) fn status(path: &str, key: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| Some(line.strip_prefix(key)?.strip_prefix(':')?.trim().to_owned()))
}

/// Who traces it, if anybody.
pub(super) fn tracer(pid: u32) -> Option<u32> {
    status(&format!("/proc/{pid}/status"), "TracerPid")?.parse().ok().filter(|&tracer| tracer != 0)
}

/// Its threads, the main thread first.
pub(super) fn threads(pid: u32) -> Result<Vec<u32>, InjectError> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).map_err(os(pid, "list the threads"))?;
    let mut threads: Vec<u32> =
        entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).filter(|&tid| tid != pid).collect();
    threads.sort_unstable();
    threads.insert(0, pid);
    Ok(threads)
}

/// Finds the code to borrow in what is mapped from files and cannot be written. `None` if there is none.
pub(super) fn find_code(memory: &ProcessMemory, maps: &[Mapping]) -> Result<Option<Code>, InjectError> {
    let (mut syscall, mut restorer, mut searched) = (None, None, 0);
    // The C library has both; what is mapped last is the likelier to be it.
    let code = maps.iter().rev().filter(|mapping| mapping.permissions == "r-xp" && mapping.name.starts_with('/'));
    for mapping in code {
        let mut start = mapping.range.start;
        while start < mapping.range.end && searched < MAX_CODE {
            // Chunks overlap, so that nothing hides at their edge.
            let end = mapping.range.end.min(start + CHUNK + RESTORER.len() as u64);
            let mut bytes = vec![0; usize::try_from(end - start).expect("a chunk")];
            memory.read(start, &mut bytes)?;
            let find = |pattern: &[u8]| bytes.windows(pattern.len()).position(|window| window == pattern);
            let at = |index: usize| start + index as u64;
            syscall = syscall.or_else(|| find(SYSCALL).map(at));
            let mut find_restorer = |pattern: &[u8]| {
                let found = find(pattern).map(|index| (at(index), at(index + pattern.len())));
                restorer = restorer.or(found);
            };
            find_restorer(RESTORER);
            find_restorer(SHORT_RESTORER);
            if let (Some(syscall), Some((restorer, restored_at))) = (syscall, restorer) {
                return Ok(Some(Code { syscall, restorer, restored_at }));
            }
            searched += CHUNK;
            start += CHUNK;
        }
    }
    Ok(None)
}

/// Whether the borrowed code is still what it was.
pub(super) fn code_is_there(memory: &ProcessMemory, code: Code) -> Result<bool, InjectError> {
    let mut call = [0; SYSCALL.len()];
    let mut back = [0; RESTORER.len()];
    memory.read(code.syscall, &mut call)?;
    memory.read(code.restorer, &mut back)?;
    Ok(call == SYSCALL && (back == RESTORER || back.starts_with(SHORT_RESTORER)))
}

/// The userfaultfds of the process.
pub(super) fn userfaultfds(process: &PidFd) -> Result<Vec<Userfaultfd>, InjectError> {
    let pid = process.pid();
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).map_err(os(pid, "list the descriptors"))?;
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let is_one = fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str() == "anon_inode:[userfaultfd]");
        let Some(fd) = entry.file_name().to_str().and_then(|name| name.parse().ok()).filter(|_| is_one) else {
            continue;
        };
        let features = status(&format!("/proc/{pid}/fdinfo/{fd}"), "API").and_then(|api| parse_features(&api));
        found.push(match features {
            Some(0) => Userfaultfd::Idle(fd),
            Some(features) if features & !INITIALIZED == FEATURES => Userfaultfd::Ours(fd),
            _ => Userfaultfd::Foreign(fd),
        });
    }
    if process.has_exited() { Err(ProcessError::Gone { pid }.into()) } else { Ok(found) }
}

/// The features in `aa:FEATURES:IOCTLS`.
pub(super) fn parse_features(api: &str) -> Option<u64> {
    u64::from_str_radix(api.split(':').nth(1)?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_lines_of_proc() {
        let line = "7f0000001000-7f0000003000 r-xp 00028000 fe:00 1234   /usr/lib/with space/libc.so.6";
        let mapping = parse_mapping(line).expect("a mapping");
        assert_eq!((mapping.range, mapping.permissions.as_str()), (0x7f00_0000_1000..0x7f00_0000_3000, "r-xp"));
        assert_eq!(mapping.name, "/usr/lib/with");
        assert!(parse_mapping("3000-1000 rw-p 0 0:0 0").is_none());
        assert_eq!(parse_features("aa:8000b001:ff").map(|features| features & !INITIALIZED), Some(FEATURES));
    }

    #[test]
    fn stacks_must_be_private_and_whole() {
        let maps =
            [parse_mapping("1000-3000 rw-p 0 0:0 0"), parse_mapping("4000-5000 rw-s 0 0:0 0")].map(Option::unwrap);
        assert!(writable(&maps, &(0x1000..0x3000)));
        assert!(!writable(&maps, &(0x2000..0x3001)));
        assert!(!writable(&maps, &(0x4000..0x4100)));
    }
}
