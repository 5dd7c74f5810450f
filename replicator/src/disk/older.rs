//! Beginning a standby's new images with an older copy of the same disks, wherever one is.
//!
//! Promises: the older copy is only read; what a new image holds afterwards is what is said of it, piece by piece, also if somebody
//! writes to the older one meanwhile; an older copy that cannot be read costs only that the disk is sent whole.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{OFlags, SeekFrom, ioctl_ficlone, seek};
use rustix::io::Errno;

use vmm_hooks::disk::DiskImage;

use super::known::{Digest, Known, PIECE};

/// Byte for byte.
pub(crate) const RAW: &str = "raw";
/// QEMU's own format.
const QCOW2: &str = "qcow2";

/// Fills new, empty images, each from the first of its older copies that has its size, and says what is in them then.
///
/// # Errors
/// If a new image cannot be read or written; what is in the images is unknown then.
pub(crate) fn fill(images: &[(u64, PathBuf)], older: &[Vec<DiskImage>]) -> io::Result<Known> {
    let sizes: Vec<u64> = images.iter().map(|(bytes, _)| *bytes).collect();
    let mut known = Known::empty(&sizes);
    for (index, (bytes, path)) in images.iter().enumerate() {
        let image = OpenOptions::new().read(true).write(true).open(path)?;
        for candidate in older.get(index).into_iter().flatten() {
            let filled = match candidate.format.as_str() {
                RAW => {
                    let Some(from) = usable(&candidate.path, *bytes) else { continue };
                    fill_one(&from, &image, &mut known.0[index])
                }
                QCOW2 if candidate.path.is_file() => {
                    convert(&candidate.path, path).and_then(|()| read(&image, &image, &mut known.0[index]))
                }
                _ => continue,
            };
            let older = candidate.path.display();
            match filled {
                Ok(()) => {
                    tracing::info!(image = %path.display(), %older, "begins with an older copy");
                    break;
                }
                Err(Trouble::Older(error)) => {
                    tracing::warn!(%older, %error, "an older copy of a disk cannot be read");
                }
                // Such as no more room: less of it would have fit, perhaps.
                Err(Trouble::Image(error)) => {
                    tracing::warn!(image = %path.display(), %error, "an image cannot begin with an older copy");
                }
            }
            image.set_len(0)?;
            image.set_len(*bytes)?;
            known.0[index].fill(Digest::ZEROES);
        }
    }
    Ok(known)
}

enum Trouble {
    Older(io::Error),
    Image(io::Error),
}

/// An older copy, if it is a file or a block device of this size.
fn usable(path: &Path, bytes: u64) -> Option<File> {
    // Something else by that name, a pipe for example, would be waited for.
    let flags = OFlags::NONBLOCK.bits().try_into().ok()?;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).ok()?;
    let kind = file.metadata().ok()?.file_type();
    let plain = kind.is_file() || kind.is_block_device();
    (plain && seek(&file, SeekFrom::End(0)) == Ok(bytes)).then_some(file)
}

/// Brings what is in a qcow2 image into a new one, by QEMU's own program. Its format is known: nothing is guessed from what a guest wrote.
fn convert(older: &Path, image: &Path) -> Result<(), Trouble> {
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-n", "--target-is-zero", "-f", QCOW2, "-O", RAW]).arg(older).arg(image);
    let done = convert.output().map_err(Trouble::Older)?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr).trim().to_owned();
    Err(Trouble::Older(io::Error::other(format!("qemu-img convert ended with {}: {said}", done.status))))
}

fn fill_one(older: &File, image: &File, known: &mut [Digest]) -> Result<(), Trouble> {
    // Where the file system can share blocks, nothing is copied.
    let shared = ioctl_ficlone(image, older).is_ok();
    read(if shared { image } else { older }, image, known)
}

/// Says what is in `source`, and writes it to `image` unless that is the same.
fn read(source: &File, image: &File, known: &mut [Digest]) -> Result<(), Trouble> {
    let shared = std::ptr::eq(source, image);
    let bytes = seek(source, SeekFrom::End(0)).map_err(|error| Trouble::Older(error.into()))?;
    let length = bytes.min(known.len() as u64 * PIECE);
    let mut buffer = vec![0; usize::try_from(PIECE).expect("small")];
    let mut at = 0;
    while let Some(next) = next_data(source, at, length).map_err(Trouble::Older)? {
        at = next - next % PIECE;
        let piece = usize::try_from(at / PIECE).expect("bounded");
        let end = (at + PIECE).min(bytes);
        let buffer = &mut buffer[..usize::try_from(end - at).expect("small")];
        source.read_exact_at(buffer, at).map_err(Trouble::Older)?;
        known[piece] = Digest::of(buffer);
        if !shared && known[piece] != Digest::ZEROES {
            image.write_all_at(buffer, at).map_err(Trouble::Image)?;
        }
        at = end;
    }
    Ok(())
}

/// Where data begins at or after `at`, before `end`; `None`: nowhere, only holes follow.
fn next_data(file: &File, at: u64, end: u64) -> io::Result<Option<u64>> {
    if at >= end {
        return Ok(None);
    }
    match seek(file, SeekFrom::Data(at)) {
        Ok(found) => Ok((found < end).then_some(found)),
        Err(Errno::NXIO) => Ok(None),
        // A file system without holes: everything is data.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some(at)),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    const BYTES: u64 = 40 * PIECE + 512;

    fn empty(path: &Path) -> io::Result<()> {
        File::create(path)?.set_len(BYTES)
    }

    #[test]
    fn a_new_image_begins_with_the_first_copy_that_fits_and_is_as_sparse() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = |name: &str| dir.path().join(name);
        empty(&path("older"))?;
        let older = OpenOptions::new().write(true).open(path("older"))?;
        older.write_all_at(&[7; 700], 3 * PIECE + 100)?;
        older.write_all_at(&[8; 512], BYTES - 512)?;
        fs::write(path("short"), [1; 100])?;
        fs::create_dir(path("directory"))?;
        rustix::fs::mkfifoat(rustix::fs::CWD, path("pipe"), rustix::fs::Mode::RUSR)?;
        for new in ["a", "b"] {
            empty(&path(new))?;
        }
        let raw = |name| DiskImage { path: path(name), format: RAW.to_owned() };
        let mut candidates = ["missing", "short", "directory", "pipe", "older"].map(raw).to_vec();
        // One whose format says something else is not looked into.
        candidates.insert(0, DiskImage { format: "vmdk".to_owned(), ..raw("older") });
        let known = fill(&[(BYTES, path("a")), (BYTES, path("b"))], &[candidates])?;
        let (a, b) = (fs::read(path("a"))?, fs::read(path("b"))?);
        assert!(a == fs::read(path("older"))? && b.iter().all(|&byte| byte == 0));
        assert!(fs::metadata(path("a"))?.blocks() * 512 <= 4 * PIECE, "holes stay holes");
        let piece = usize::try_from(PIECE).expect("small");
        let told: Vec<Vec<Digest>> = [a, b].map(|image| image.chunks(piece).map(Digest::of).collect()).into();
        assert_eq!(known.0, told);
        assert_eq!(known.filled(), 2);
        Ok(())
    }

    #[test]
    fn an_older_copy_in_qcow2_is_read_and_a_damaged_one_costs_nothing() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = |name: &str| dir.path().join(name);
        let mut content = vec![0; usize::try_from(BYTES).expect("small")];
        content[5000..250_000].fill(3);
        fs::write(path("raw"), &content)?;
        let made = Command::new("qemu-img")
            .args(["convert", "-f", RAW, "-O", QCOW2])
            .args([path("raw"), path("older")])
            .status();
        let Ok(made) = made else {
            println!("skipped: qemu-img is not installed");
            return Ok(());
        };
        assert!(made.success());
        fs::write(path("damaged"), [7; 4096])?;
        empty(&path("new"))?;
        let older = ["damaged", "older"].map(|name| DiskImage { path: path(name), format: QCOW2.to_owned() });
        let known = fill(&[(BYTES, path("new"))], &[older.to_vec()])?;
        assert!(fs::read(path("new"))? == content);
        let told: Vec<Digest> = content.chunks(usize::try_from(PIECE).expect("small")).map(Digest::of).collect();
        assert_eq!(known.0, [told]);
        assert!(fs::metadata(path("new"))?.blocks() * 512 <= 8 * PIECE, "holes stay holes");
        Ok(())
    }

    #[test]
    fn a_full_disk_only_costs_the_older_copy() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let (older, image) = (dir.path().join("older"), Path::new("/dev/full"));
        fs::write(&older, vec![1; usize::try_from(BYTES).expect("small")])?;
        // Writing to it fails as a full disk does; the rest of `fill` needs a file.
        let mut known = vec![Digest::ZEROES; 41];
        let target = OpenOptions::new().write(true).open(image)?;
        let done = fill_one(&File::open(&older)?, &target, &mut known);
        assert!(matches!(done, Err(Trouble::Image(error)) if error.kind() == io::ErrorKind::StorageFull));
        Ok(())
    }
}
