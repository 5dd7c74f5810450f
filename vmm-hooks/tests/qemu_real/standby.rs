//! Hosts that cannot stand by for a guest: each says why in one sentence, and keeps nothing of it.

use super::*;
use vmm_hooks::guest::Recipe;
use vmm_hooks::layout::{Block, Layout};

/// The recipe with one string in its body replaced by another.
fn altered(recipe: &Recipe, key: &str, to: &str) -> Recipe {
    let mut body: serde_json::Value = serde_json::from_str(&recipe.body).expect("JSON");
    assert!(body[key].is_string(), "{key} in {body}");
    body[key] = to.into();
    Recipe { body: body.to_string(), ..recipe.clone() }
}

/// The recipe with more arguments.
fn with_arguments(recipe: &Recipe, more: &[&str]) -> Recipe {
    let mut body: serde_json::Value = serde_json::from_str(&recipe.body).expect("JSON");
    let arguments = body["argv"].as_array_mut().expect("a list");
    arguments.extend(more.iter().map(|&argument| argument.into()));
    Recipe { body: body.to_string(), ..recipe.clone() }
}

/// Twins of this process that run.
fn twins(run_dir: &Path) -> usize {
    let needle = run_dir.display().to_string();
    let of_ours = |pid: &u32| {
        fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| String::from_utf8_lossy(&line).contains(&needle))
    };
    vmm_hooks::qemu::running().into_iter().map(|(pid, _)| pid).filter(of_ours).count()
}

#[test]
fn a_host_that_cannot_make_the_twin_says_why_and_keeps_nothing() {
    let Some(qemu) = Qemu::start(&["-M", "pc", "-nic", "none"]) else { return };
    let guest = qemu.attach();
    let run_dir = tempfile::Builder::new().prefix("qemu-twin").tempdir().expect("a directory");
    let host = QemuTwinHost::new(TwinHostOptions { run_dir: run_dir.path().to_owned(), ..TwinHostOptions::default() });
    let (recipe, layout) = (guest.recipe(), guest.layout());
    let blocks = |change: &dyn Fn(&mut Vec<Block>)| {
        let mut blocks = layout.blocks().to_vec();
        change(&mut blocks);
        Layout::new(blocks).expect("a layout")
    };
    let too_large = blocks(&|blocks| blocks[0].pages = 1 << 31);
    let other_firmware = blocks(&|blocks| blocks.last_mut().expect("a block").pages += 1);
    let missing = "/nonexistent/qemu-system-sparc128";
    for (recipe, layout, words) in [
        (altered(recipe, "version", "6.0.0 (Debian)"), layout, "the primary's is 6.0.0 (Debian)"),
        (altered(recipe, "machine", "pc-i440fx-99.0"), layout, "unsupported machine type"),
        (altered(recipe, "exe", missing), layout, "this host has no /nonexistent/qemu-system-sparc128"),
        (with_arguments(recipe, &["-cpu", "Skylake-Of-2099"]), layout, "unable to find CPU model"),
        (with_arguments(recipe, &["-kernel", "/nonexistent/vmlinuz"]), layout, "this host has no /nonexistent/vmlinuz"),
        (recipe.clone(), &too_large, "of memory available, and the guest has"),
        (recipe.clone(), &other_firmware, "the twin's memory differs from the primary's"),
    ] {
        let refused = host.prepare("t", &recipe, layout, &[]).map(drop).expect_err(words);
        assert_eq!(refused.kind, GuestErrorKind::Refused, "{refused}");
        assert!(refused.message.contains(words) && !refused.message.contains('\n'), "{words}: {refused}");
        assert_eq!(fs::read_dir(run_dir.path()).expect("a directory").count(), 0, "{words}");
        assert_eq!(twins(run_dir.path()), 0, "{words}");
    }
}

#[test]
fn a_twin_that_cannot_load_the_state_fails_its_rehearsal_and_goes_on_waiting() {
    let Some(qemu) = Qemu::start(&["-M", "pc", "-nic", "none"]) else { return };
    let mut guest = qemu.attach();
    guest.pause().expect("pauses");
    guest.arm().expect("arms");
    let mut capture = Capture::default();
    guest.capture(&mut capture, &mut PauseParts::default()).expect("captures");
    guest.resume().expect("resumes");
    let run_dir = tempfile::Builder::new().prefix("qemu-twin").tempdir().expect("a directory");
    let host = QemuTwinHost::new(TwinHostOptions { run_dir: run_dir.path().to_owned(), ..TwinHostOptions::default() });
    // It lacks a device whose state came.
    let mut twin = host
        .prepare("t", &with_arguments(guest.recipe(), &["-machine", "hpet=off"]), guest.layout(), &[])
        .expect("it starts");
    let error = twin.rehearse(&capture.device).expect_err("there is no such device");
    assert_eq!(error.kind, GuestErrorKind::Failed, "{error}");
    assert!(error.message.contains("QEMU said"), "{error}");
    assert!(twin.alive(), "a rehearsal harms no twin");
    // Whatever QEMU makes of a broken state, it is no harm to the twin either.
    for at in [100, capture.device.len() / 2, capture.device.len() - 100] {
        let mut broken = capture.device.clone();
        broken[at] ^= 0xff;
        let _ = twin.rehearse(&broken);
        assert!(twin.alive(), "byte {at}");
    }
    // It is asked to go on all the same: it does not run, and its memory is still there for another try.
    let error = twin.activate(&capture.device).expect_err("there is no such device");
    assert_eq!(error.kind, GuestErrorKind::Failed, "{error}");
    twin.destroy().expect("nothing is left");
    assert_eq!((fs::read_dir(run_dir.path()).expect("a directory").count(), twins(run_dir.path())), (0, 0));
    assert_eq!(guest.events(), [], "the primary felt nothing");
    Box::new(guest).detach().expect("leaves it");
}
