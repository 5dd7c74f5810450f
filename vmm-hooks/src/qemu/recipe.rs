//! What the standby is told about a QEMU, so that it can make a twin of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::cmdline::{Backend, Disk, Image, Network, Plan, rewrite};
use super::discover::{Discovered, display_name, taps};
use super::disks::Drive;
use super::ram::RamBlock;
use crate::disk::DiskSpec;
use crate::guest::{GuestError, GuestErrorKind, Recipe};
use crate::layout::{Block, Layout, PAGE_SIZE};

/// Which back end reads these recipes.
const BACKEND: &str = "qemu";

/// The body of a [`Recipe`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct QemuRecipe {
    /// The VM's name, for messages.
    pub(super) name: String,
    /// The program and its arguments.
    pub(super) argv: Vec<String>,
    /// The user and the group that it runs as: its twin has no other rights.
    pub(super) user: (u32, u32),
    /// Where relative paths start.
    pub(super) cwd: PathBuf,
    /// The program's path.
    pub(super) exe: PathBuf,
    /// Its version, package included.
    pub(super) version: String,
    /// The machine type's canonical name.
    pub(super) machine: String,
    /// The memory blocks that are in backends and so can be shared with a twin.
    pub(super) backends: Vec<RecipeBackend>,
    /// Its tap interfaces.
    pub(super) taps: Vec<RecipeTap>,
    /// The disks that are mirrored, in the order of [`Recipe::disks`].
    pub(super) disks: Vec<RecipeDisk>,
}

/// A disk of the primary, and how to find it on the command line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RecipeDisk {
    /// Its name, as in [`Recipe::disks`].
    pub(super) name: String,
    /// Its size in bytes, as the guest sees it.
    pub(super) bytes: u64,
    /// The primary's image, an absolute path as the command line has it.
    pub(super) source: PathBuf,
}

/// A memory backend and its block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RecipeBackend {
    /// The object's id.
    pub(super) id: String,
    /// The block's name.
    pub(super) block: String,
}

/// A tap interface of the primary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RecipeTap {
    /// The netdev on it.
    pub(super) netdev: String,
    /// The interface.
    pub(super) ifname: String,
    /// The bridge that it is on, if any.
    pub(super) bridge: Option<String>,
    /// Its MTU in bytes, if known.
    pub(super) mtu: Option<u32>,
}

impl QemuRecipe {
    /// What a standby must know about this QEMU.
    pub(super) fn of(found: &Discovered, blocks: &[RamBlock]) -> Self {
        Self {
            name: display_name(&found.argv, found.pid),
            argv: found.argv.clone(),
            user: found.user,
            cwd: found.cwd.clone(),
            exe: found.exe.clone(),
            version: found.version.clone(),
            machine: found.machine.clone(),
            backends: backends(&found.objects, blocks),
            taps: taps(found.pid, &found.network),
            disks: found.storage.disks().map(|drive| disk(drive, &found.cwd)).collect(),
        }
    }

    /// The disks of a machine that never runs.
    pub(super) fn scratch_disks(&self) -> Vec<Disk> {
        let disk = |disk: &RecipeDisk| Disk { source: disk.source.clone(), image: Image::Null(disk.bytes) };
        self.disks.iter().map(disk).collect()
    }

    /// The disks of a machine with these images.
    pub(super) fn disks_in(&self, images: &[PathBuf]) -> Vec<Disk> {
        let disk = |(disk, image): (&RecipeDisk, &PathBuf)| Disk {
            source: disk.source.clone(),
            image: Image::File(image.clone()),
        };
        self.disks.iter().zip(images).map(disk).collect()
    }

    /// In the form that travels.
    pub(super) fn pack(&self) -> Recipe {
        let body = serde_json::to_string(self).expect("strings and paths that came from UTF-8");
        let disks = self.disks.iter().map(|disk| DiskSpec { name: disk.name.clone(), bytes: disk.bytes }).collect();
        Recipe { backend: BACKEND.to_owned(), body, disks }
    }

    /// Out of the form that travels.
    pub(super) fn unpack(recipe: &Recipe) -> Result<Self, GuestError> {
        if recipe.backend != BACKEND {
            let message = format!("the primary's guest is of back end {}, not {BACKEND}", recipe.backend);
            return Err(GuestError::new(GuestErrorKind::Refused, message));
        }
        serde_json::from_str(&recipe.body).map_err(|error| {
            GuestError::new(GuestErrorKind::Refused, "the description of the primary's QEMU cannot be read")
                .advise("run the same version of Understudy on both hosts")
                .because(error)
        })
    }
}

/// What a twin must know of a disk.
fn disk(drive: &Drive, cwd: &Path) -> RecipeDisk {
    let source = cwd.join(drive.file.strip_prefix("file:").unwrap_or(&drive.file));
    RecipeDisk { name: drive.name.clone(), bytes: drive.bytes, source }
}

/// Which blocks are in memory backends.
fn backends(objects: &[(String, String)], blocks: &[RamBlock]) -> Vec<RecipeBackend> {
    objects
        .iter()
        .filter(|(_, kind)| kind.starts_with("memory-backend-"))
        .filter_map(|(id, _)| {
            let block = blocks.iter().find(|block| block.name == *id || block.name == format!("/objects/{id}"))?;
            Some(RecipeBackend { id: id.clone(), block: block.name.clone() })
        })
        .collect()
}

/// The layout of these blocks: all that is mapped of each, in the order in which QEMU made them.
pub(super) fn layout(blocks: &[RamBlock]) -> Result<Layout, GuestError> {
    let blocks =
        blocks.iter().map(|block| Block { name: block.name.clone(), pages: block.total.div_ceil(PAGE_SIZE as u64) });
    Layout::new(blocks.collect()).map_err(|error| {
        GuestError::new(GuestErrorKind::Refused, "the guest's memory cannot be described").because(error)
    })
}

/// Rewrites the command line for trial: gives what a twin would go without, or why there can be none.
pub(super) fn try_out(found: &Discovered) -> Result<Vec<String>, String> {
    let Ok(blocks) = &found.blocks else { return Ok(Vec::new()) };
    let recipe = QemuRecipe::of(found, blocks);
    let backends: Vec<Backend> = recipe
        .backends
        .iter()
        .map(|backend| Backend { id: backend.id.clone(), size: 1, path: "/dev/null".to_owned() })
        .collect();
    if backends.is_empty() {
        return Err("none of the guest's memory is in a memory backend, so none can be shared with a twin".to_owned());
    }
    let taps: BTreeMap<String, String> =
        recipe.taps.iter().map(|tap| (tap.netdev.clone(), tap.ifname.clone())).collect();
    let mut left_out = Vec::new();
    for network in [Network::Null, Network::Same { taps, bridges: BTreeMap::new() }] {
        let plan = Plan {
            argv: &recipe.argv,
            user: recipe.user,
            version: &recipe.version,
            cwd: &recipe.cwd,
            machine: &recipe.machine,
            memory: &backends,
            share: true,
            network,
            disks: &recipe.scratch_disks(),
            run_dir: Path::new("/"),
        };
        left_out = rewrite(&plan).map_err(|error| error.to_string())?.left_out;
    }
    Ok(left_out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_backends_by_either_name_of_their_block() {
        let block = |name: &str, total| RamBlock {
            name: name.to_owned(),
            used: total,
            total,
            page_size: 4096,
            offset: 0,
            host: 0,
            shared: false,
        };
        let blocks = [block("pc.ram", 8192), block("/objects/m1", 4097), block("vga.vram", 4096)];
        let object = |id: &str, kind: &str| (id.to_owned(), kind.to_owned());
        let objects = [
            object("pc.ram", "memory-backend-ram"),
            object("m1", "memory-backend-file"),
            object("vga.vram", "secret"),
            object("gone", "memory-backend-ram"),
        ];
        let names: Vec<_> =
            backends(&objects, &blocks).into_iter().map(|backend| (backend.id, backend.block)).collect();
        assert_eq!(names, [object("pc.ram", "pc.ram"), object("m1", "/objects/m1")]);
        assert_eq!(
            layout(&blocks).expect("good").blocks().iter().map(|block| block.pages).collect::<Vec<_>>(),
            [2, 2, 1]
        );
    }

    #[test]
    fn a_foreign_or_broken_recipe_is_refused() {
        let recipe = |backend: &str, body: &str| Recipe {
            backend: backend.to_owned(),
            body: body.to_owned(),
            disks: Vec::new(),
        };
        assert!(QemuRecipe::unpack(&recipe("sim", "{}")).expect_err("foreign").message.contains("sim"));
        assert_eq!(QemuRecipe::unpack(&recipe("qemu", "{}")).expect_err("broken").kind, GuestErrorKind::Refused);
    }
}
