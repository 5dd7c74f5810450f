//! What passed the client's port of the switch, as `pcap` files for who looks at a failure: all ways, the first bytes of each frame.
//!
//! Promise: no more than two files of a bounded size, the newer one last.

use std::fs::File;
use std::io::{self, BufWriter, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use socket2::SockFilter;

use super::sniffer::{EQUAL, INTERFACE, LOAD_WORD, RETURN, open};
use super::space;

/// Bytes kept of a frame: its headers, and the beginning of a question or an answer.
const KEPT: u32 = 160;
/// Size of a file.
const FILE: u64 = 32 << 20;

/// See the module. Dropping it ends it.
#[derive(Debug)]
pub struct Capture {
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Capture {
    /// Captures at interface number `port` of namespace `space` into `dir`.
    ///
    /// # Errors
    /// If the socket or the file cannot be made.
    pub fn start(space: &str, port: u32, dir: &Path) -> Result<Self> {
        let end: Arc<AtomicBool> = Arc::default();
        let ends = Arc::clone(&end);
        let mut files = Files::new(dir)?;
        let filter = [
            SockFilter::new(LOAD_WORD, 0, 0, INTERFACE),
            SockFilter::new(EQUAL, 0, 1, port),
            SockFilter::new(RETURN, 0, 0, KEPT),
            SockFilter::new(RETURN, 0, 0, 0),
        ];
        let thread = space::spawn(
            space,
            move || open(&filter),
            move |mut socket| {
                let mut frame = [0; KEPT as usize];
                while !ends.load(Ordering::SeqCst) {
                    let Ok(length) = socket.read(&mut frame) else { continue };
                    // A full disk must not end the run that it is to explain.
                    let _ = files.add(&frame[..length]);
                }
            },
        )?;
        Ok(Self { end, thread: Some(thread) })
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.end.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The file that is written, and the one before.
struct Files {
    now: PathBuf,
    before: PathBuf,
    file: BufWriter<File>,
    written: u64,
}

impl Files {
    fn new(dir: &Path) -> io::Result<Self> {
        let (now, before) = (dir.join("client.pcap"), dir.join("client.before.pcap"));
        let file = begin(&now)?;
        Ok(Self { now, before, file, written: 0 })
    }

    fn add(&mut self, frame: &[u8]) -> io::Result<()> {
        if self.written >= FILE {
            self.file.flush()?;
            std::fs::rename(&self.now, &self.before)?;
            self.file = begin(&self.now)?;
            self.written = 0;
        }
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let length = u32::try_from(frame.len()).unwrap_or(u32::MAX);
        // Seconds, microseconds, length here, length then, which is not known.
        for word in [u32::try_from(at.as_secs()).unwrap_or(u32::MAX), at.subsec_micros(), length, length] {
            self.file.write_all(&word.to_le_bytes())?;
        }
        self.file.write_all(frame)?;
        self.written += 16 + frame.len() as u64;
        Ok(())
    }
}

/// The header of a `pcap` file of Ethernet frames.
fn begin(path: &Path) -> io::Result<BufWriter<File>> {
    let mut file = BufWriter::new(File::create(path)?);
    for word in [0xa1b2_c3d4, 0x0004_0002, 0, 0, KEPT, 1] {
        file.write_all(&u32::to_le_bytes(word))?;
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_files_at_most_and_each_can_be_read_from_its_start() {
        let dir = std::env::temp_dir().join(format!("us-capture-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let mut files = Files::new(&dir).unwrap();
        for byte in [1, 2, 3] {
            files.add(&[byte; 20]).unwrap();
            files.written = FILE;
        }
        drop(files);
        let frame = |name: &str| {
            let bytes = std::fs::read(dir.join(name)).unwrap();
            assert_eq!((bytes.len(), &bytes[..4]), (24 + 16 + 20, &[0xd4, 0xc3, 0xb2, 0xa1][..]));
            bytes[40]
        };
        assert_eq!((frame("client.before.pcap"), frame("client.pcap")), (2, 3));
        std::fs::remove_dir_all(dir).unwrap();
    }
}
