//! What a host remembers: over restarts, by several at once, and when its disk fails.

use super::*;

#[test]
fn remembers_over_restarts() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (first, other) = (VmId([1; 16]), VmId([2; 16]));
    let mut memory = Durable::open(dir.path(), "../web 1", first).expect("opens");
    assert_eq!(memory.begin_session().expect("writes").first_epoch, 1);
    memory.set_generation(7).expect("writes");
    memory.set_generation(3).expect("never lower");
    memory.set_mark(Mark { generation: 8, epoch: 5 }, Vec::new()).expect("writes");
    drop(memory);
    let mut again = Durable::open(dir.path(), "../web 1", other).expect("opens again");
    assert_eq!((again.vm(), again.generation()), (first, 8));
    assert_eq!(again.text.mark, Some(Mark { generation: 8, epoch: 5 }));
    assert_eq!(again.begin_session().expect("writes").first_epoch, SESSION_NUMBERS + 1);
    assert_eq!(std::fs::read_dir(dir.path().join("vms")).expect("list").count(), 1, "nothing escapes the directory");
}

#[test]
fn a_copy_is_kept_until_it_is_marked() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut memory = Durable::open(dir.path(), "a/1", VmId([1; 16])).expect("opens");
    assert_eq!(memory.copies(), dir.path().join("copies/a%2f1"));
    let kept = |grant| KeptAt::now(Generation(grant), dir.path().join("copies/a%2f1/7"));
    assert!(!kept(7).off_since());
    assert!(KeptAt { boot: "another".into(), ..kept(7) }.off_since());
    memory.set_kept(Some(kept(7))).expect("writes");
    memory.set_kept(Some(kept(8))).expect("another life has it");
    let on_disk = || Durable::open(dir.path(), "a/1", VmId([2; 16])).expect("opens");
    assert_eq!(on_disk().kept(), Some(&kept(8)));
    memory.set_mark(Mark { generation: 8, epoch: 9 }, Vec::new()).expect("writes");
    assert_eq!((on_disk().kept(), on_disk().mark().map(|mark| mark.generation)), (None, Some(8)));
    // Nor is it kept for another VM, or for one that is not this host's business.
    memory.set_kept(Some(kept(9))).expect("writes");
    memory.set_vm(VmId([3; 16])).expect("writes");
    assert_eq!(on_disk().kept(), None);
    memory.set_kept(Some(kept(9))).expect("writes");
    memory.settle().expect("writes");
    assert_eq!(on_disk().kept(), None);
}

#[test]
fn what_is_settled_is_not_taken_up() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut memory = Durable::open(dir.path(), "a", VmId([1; 16])).expect("opens");
    let guest = GuestAt { name: "a".into(), pid: 7, started: 1, control: None, attached: true, microvm: false };
    memory.set_guest(Some(guest)).expect("writes");
    memory.set_protection(Some(Protection::default())).expect("writes");
    assert_eq!(Durable::with_parts(dir.path()).len(), 1);
    memory.settle().expect("writes");
    assert_eq!(Durable::with_parts(dir.path()).len(), 0);
    assert_eq!(memory.vm(), VmId([1; 16]), "what it is called in the record stays known");
}

#[test]
fn what_an_older_program_remembered_is_taken_over() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut memory = Durable::open(dir.path(), "a.b", VmId([1; 16])).expect("opens");
    memory.set_mark(Mark { generation: 4, epoch: 9 }, Vec::new()).expect("writes");
    let text = toml::to_string(&memory.text).expect("plain data");
    std::fs::write(&memory.path, &text).expect("room");
    let all = Durable::all(dir.path()).expect("reads");
    assert_eq!(all.vms.iter().map(|vm| vm.text.clone()).collect::<Vec<_>>(), [memory.text.clone()]);
    assert_eq!(std::fs::read_to_string(&memory.path).expect("there"), text, "who looks changes nothing");
    for _ in 0..2 {
        let found = Durable::find(dir.path(), "a.b").expect("reads").expect("is there");
        assert_eq!(found.text, memory.text);
        assert_ne!(std::fs::read_to_string(&memory.path).expect("there"), text, "it is taken over");
    }
}

#[test]
fn a_damaged_file_is_never_taken_for_absent() {
    let dir = tempfile::tempdir().expect("temporary directory");
    drop(Durable::open(dir.path(), "a", VmId([1; 16])).expect("opens"));
    std::fs::write(dir.path().join("vms/a.toml"), "generation = 1").expect("damage");
    assert!(Durable::open(dir.path(), "a", VmId([1; 16])).is_err());
    assert!(Durable::find(dir.path(), "a").is_err());
    let all = Durable::all(dir.path()).expect("the directory can be read");
    assert!(all.vms.is_empty());
    assert_eq!(
        [(Some("a"), false), (None, true), (Some("b"), true)].map(|(vm, images)| all.unusable(vm, images)),
        [Some("a"); 3]
    );
    assert_eq!(all.unusable(Some("b"), false), None, "that one was not asked for");
    std::fs::remove_dir_all(dir.path().join("vms")).expect("remove");
    assert!(Durable::all(dir.path()).expect("nothing is there").vms.is_empty());
    std::fs::write(dir.path().join("vms"), "").expect("room");
    assert!(Durable::all(dir.path()).is_err(), "what there is, is not known");
}

#[test]
fn what_was_its_disk_before_it_ran_elsewhere_is_a_former_one() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let image = |name: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, "").expect("room");
        DiskImage { path, format: "raw".to_owned() }
    };
    let (first, copy, second) = (image("first"), image("copy"), image("second"));
    let mut memory = Durable::open(dir.path(), "a", VmId([1; 16])).expect("opens");
    assert!(!memory.is_latched());
    memory.latch(vec![first.clone()]).expect("writes");
    memory.latch(vec![first.clone()]).expect("again, by the next session");
    assert!(memory.is_latched() && memory.former().is_empty());
    memory.set_mark(Mark { generation: 3, epoch: 9 }, vec![copy.clone()]).expect("it comes back");
    let stale = ImageFile::of(&first);
    assert_eq!((memory.disks(), memory.former()), ([copy.clone()].as_slice(), [stale.clone()].as_slice()));
    assert!(memory.unlatch().expect("writes"));
    drop(memory);
    let mut memory = Durable::find(dir.path(), "a").expect("reads").expect("is there");
    assert!(!memory.is_latched(), "its own disks are free");
    assert_eq!(memory.former(), std::slice::from_ref(&stale), "and the stale one is not");
    std::fs::remove_file(&copy.path).expect("its copy is made anew");
    memory.set_mark(Mark { generation: 5, epoch: 20 }, vec![second]).expect("once more");
    assert_eq!(memory.former(), std::slice::from_ref(&stale), "what is gone need not be kept from anybody");
    std::fs::copy(&first.path, dir.path().join("newer")).expect("room");
    std::fs::rename(dir.path().join("newer"), &first.path).expect("in its place");
    assert!(!stale.is_there(), "another file is another image");
    memory.release(&first.path).expect("an operator knows better");
    assert!(memory.former().is_empty() && memory.is_latched());
}

#[test]
fn of_two_that_remember_a_vm_each_changes_what_the_other_wrote() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let vm = VmId([1; 16]);
    let open = || Durable::open(dir.path(), "a", vm).expect("opens");
    let (mut one, mut other) = (open(), open());
    one.set_generation(7).expect("writes");
    one.set_mark(Mark { generation: 8, epoch: 5 }, Vec::new()).expect("writes");
    other.set_generation(3).expect("writes");
    other.set_protection(Some(Protection::default())).expect("writes");
    assert_eq!((other.generation(), other.mark()), (8, Some(Mark { generation: 8, epoch: 5 })));
    assert_eq!((open().text, open().protection()), (other.text.clone(), Some(&Protection::default())));
    let first = other.begin_session().expect("writes").first_epoch;
    assert_ne!(one.begin_session().expect("writes").first_epoch, first);
    // What was decided by what one has read is not done over what the other wrote since.
    let on_disk = open().text;
    for _ in 0..2 {
        assert!(!other.unlatch().expect("reads") && !other.set_generation_unchanged(99).expect("reads"));
        assert_eq!(other.begin_session_unchanged().expect("reads"), None);
    }
    assert_eq!((&open().text, open().is_latched()), (&on_disk, true));
    assert!(one.set_generation_unchanged(99).expect("writes") && one.unlatch().expect("writes"));
    assert_eq!((open().generation(), open().is_latched()), (99, false));
    // Of two VMs of one name it is remembered that writes, and no number of a session is used again.
    other.set_vm(VmId([2; 16])).expect("writes");
    let session = other.begin_session().expect("writes").first_epoch;
    assert_eq!((open().vm(), open().mark()), (VmId([2; 16]), None));
    one.set_mark(Mark { generation: 100, epoch: 1 }, Vec::new()).expect("writes");
    assert_eq!((open().vm(), open().generation()), (vm, 100));
    assert!(one.begin_session().expect("writes").first_epoch > session);
}

#[test]
fn a_copy_that_ends_late_takes_nothing_from_the_next_one() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let open = || Durable::open(dir.path(), "a", VmId([1; 16])).expect("opens");
    let (mut one, mut next) = (open(), open());
    one.begin_session().expect("writes");
    one.set_protection(Some(Protection::default())).expect("writes");
    next.begin_session().expect("writes");
    next.set_protection(Some(Protection::default())).expect("writes");
    let copy = one.copies().join("7");
    std::fs::create_dir_all(&copy).expect("room");
    open().forget_copy(one.session()).expect("writes");
    assert!(open().protection().is_some() && copy.exists());
    open().forget_copy(next.session()).expect("writes");
    assert!(open().protection().is_none() && !copy.exists());
}

#[test]
fn what_somebody_else_wrote_since_a_write_failed_is_not_mended_away() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let open = || Durable::open(dir.path(), "a", VmId([1; 16])).expect("opens");
    let vms = dir.path().join("vms");
    let (mut one, mut other) = (open(), open());
    std::fs::rename(&vms, dir.path().join("away")).expect("moves");
    assert!(one.set_generation(1).is_err());
    std::fs::rename(dir.path().join("away"), &vms).expect("moves back");
    other.set_generation(9).expect("writes");
    one.mend().expect("writes");
    assert_eq!((one.generation(), open().generation()), (9, 9));
    // What could not be written is on the disk, as far as anybody can tell, and nobody has acted upon it.
    let mut lost = one.text.clone();
    lost.generation = 12;
    slots::write(&one.path, &bytes(&lost).expect("plain data")).expect("writes");
    (one.failed, one.lost) = (true, Some(lost));
    one.mend().expect("writes");
    assert_eq!((one.generation(), open().generation()), (9, 9));
    other.set_vm(VmId([2; 16])).expect("writes");
    one.failed = true;
    one.mend().expect("writes");
    assert_eq!((open().vm(), open().generation()), (VmId([1; 16]), 9));
    // Nor is a write that failed while another VM had the name the end of this one.
    other.set_vm(VmId([2; 16])).expect("writes");
    assert!(one.set_store(&"x".repeat(2 << 20)).is_err(), "no record is so long");
    one.mend().expect("writes");
    one.set_generation(10).expect("writes");
    assert_eq!((one.vm(), open().vm(), open().generation()), (VmId([1; 16]), VmId([1; 16]), 10));
    // What one had read before somebody else wrote is not what it falls back to.
    other.set_vm(VmId([1; 16])).expect("nothing to write");
    other.set_generation(20).expect("writes");
    assert!(one.set_store(&"x".repeat(2 << 20)).is_err(), "no record is so long");
    assert_eq!((one.generation(), one.has_failed()), (20, true));
    slots::write(&one.path, &bytes(&one.text).expect("plain data")).expect("writes");
    one.lost = Some(one.text.clone());
    one.mend().expect("writes");
    assert_eq!(open().generation(), 20);
}

#[test]
fn a_failed_write_latches() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut memory = Durable::open(dir.path(), "a", VmId([1; 16])).expect("opens");
    std::fs::remove_dir_all(dir.path().join("vms")).expect("remove");
    assert!(memory.set_generation(1).is_err());
    std::fs::create_dir(dir.path().join("vms")).expect("back again");
    assert!(memory.has_failed() && memory.set_generation(2).is_err(), "what is on the disk is not known");
}

#[test]
fn a_latched_memory_takes_more_once_all_of_it_was_written_anew() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let vms = dir.path().join("vms");
    let mut memory = Durable::open(dir.path(), "a", VmId([1; 16])).expect("opens");
    memory.set_generation(3).expect("writes");
    std::fs::remove_dir_all(&vms).expect("remove");
    assert!(memory.set_mark(Mark { generation: 4, epoch: 9 }, Vec::new()).is_err());
    assert!(memory.mend().is_err() && memory.has_failed(), "there is still no room");
    std::fs::create_dir(&vms).expect("back again");
    memory.mend().expect("writes");
    let on_disk = || Durable::open(dir.path(), "a", VmId([2; 16])).expect("opens");
    assert_eq!((on_disk().generation(), on_disk().mark()), (3, None), "the failed write was not acted upon");
    memory.set_mark(Mark { generation: 4, epoch: 9 }, Vec::new()).expect("writes");
    assert_eq!((on_disk().generation(), on_disk().mark()), (4, Some(Mark { generation: 4, epoch: 9 })));
}
