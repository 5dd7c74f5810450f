//! The raw images of a VM's disks on the standby: sparse files of the disks' sizes.
//!
//! Promises: nothing is written outside of a disk; what is zeroed becomes a hole where the file system makes one; only
//! [`Images::sync`] makes anything durable.

use std::path::{Path, PathBuf};

use vmm_hooks::disk::{DiskChange, DiskSpec, DiskWrite};

use super::error::DiskError;
use super::files::{File, Files, parent};
use super::record::Piece;

const KEPT: &str = "the journal still holds all that was acknowledged";

/// One image.
#[derive(Debug)]
struct Image {
    path: PathBuf,
    file: Box<dyn File>,
    dirty: bool,
}

/// All images of a VM, in the order of its disks.
#[derive(Debug)]
pub(super) struct Images(Vec<Image>);

impl Images {
    /// Opens the images; those that are missing are made, empty, if `make`. What is in them is left as it is.
    pub(super) fn open(files: &dyn Files, disks: &[(DiskSpec, PathBuf)], make: bool) -> Result<Self, DiskError> {
        let safe = "nothing was changed";
        let mut images = Vec::with_capacity(disks.len());
        for (spec, path) in disks {
            let file = match files.open(path).map_err(|error| DiskError::io("open", path, safe, error))? {
                Some(file) => file,
                None if make => files.create(path).map_err(|error| DiskError::io("make", path, safe, error))?,
                None => return Err(DiskError::Missing { path: path.clone() }),
            };
            if make {
                settle(files, file.as_ref(), path, spec.bytes).map_err(|e| DiskError::io("make", path, safe, e))?;
            }
            let bytes = file.bytes().map_err(|error| DiskError::io("look at", path, safe, error))?;
            if bytes != spec.bytes {
                let what = format!("it has {bytes} bytes and the disk {}; move it away", spec.bytes);
                return Err(DiskError::Strange { path: path.clone(), what });
            }
            images.push(Image { path: path.clone(), file, dirty: true });
        }
        Ok(Self(images))
    }

    /// Writes pieces of a record.
    pub(super) fn apply(&mut self, pieces: &[Piece<'_>]) -> Result<(), DiskError> {
        for piece in pieces {
            self.put(piece.disk, piece.offset, piece.data.ok_or(piece.bytes))?;
        }
        Ok(())
    }

    /// Writes what a guest wrote. The caller has checked that it fits.
    pub(super) fn write(&mut self, writes: &[DiskWrite]) -> Result<(), DiskError> {
        for write in writes {
            let what = match &write.change {
                DiskChange::Data(data) => Ok(data.as_slice()),
                DiskChange::Zero(bytes) => Err(*bytes),
            };
            self.put(write.disk, write.offset, what)?;
        }
        Ok(())
    }

    /// Writes bytes, or so many zeroes.
    fn put(&mut self, disk: u32, offset: u64, what: Result<&[u8], u64>) -> Result<(), DiskError> {
        let image = &mut self.0[usize::try_from(disk).expect("a u32 fits")];
        image.dirty = true;
        match what {
            Ok(data) => image.file.write_at(offset, data),
            Err(bytes) => image.file.zero(offset, bytes),
        }
        .map_err(|error| DiskError::io("write to", &image.path, KEPT, error))
    }

    /// Brings all of them onto the disk.
    pub(super) fn sync(&mut self) -> Result<(), DiskError> {
        for image in self.0.iter_mut().filter(|image| image.dirty) {
            image.file.sync().map_err(|error| DiskError::io("sync", &image.path, KEPT, error))?;
            image.dirty = false;
        }
        Ok(())
    }
}

/// Gives an empty file, new or left behind by a crash, its size, and brings it and its name onto the disk.
fn settle(files: &dyn Files, file: &dyn File, path: &Path, bytes: u64) -> std::io::Result<()> {
    if file.bytes()? == 0 {
        file.set_len(bytes)?;
    }
    file.sync()?;
    files.sync_dir(&parent(path))
}

/// Refuses what does not fit the disks.
pub(super) fn check(disks: &[(DiskSpec, PathBuf)], writes: &[DiskWrite]) -> Result<(), DiskError> {
    for write in writes {
        let bytes = write.bytes();
        let disk = usize::try_from(write.disk).ok().and_then(|disk| disks.get(disk));
        let what = match (disk, write.offset.checked_add(bytes)) {
            (None, _) => "there is no such disk",
            _ if bytes == 0 => "it is empty",
            (Some((spec, _)), Some(end)) if end <= spec.bytes => continue,
            _ => "it does not lie inside of the disk",
        };
        return Err(DiskError::BadWrite { disk: write.disk, offset: write.offset, bytes, what });
    }
    Ok(())
}
