//! The store on this host's file system.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vmm_hooks::disk::{DiskChange, DiskSpec, DiskWrite};

use crate::disk::files::HostFiles;
use crate::disk::{
    DiskError, DiskStore, EpochId, Policy, Recovered, Setup, StandbyDisk, State, create, recover, reset,
};

const BYTES: u64 = 1 << 20;

fn setup(dir: &Path, bytes: u64, journal_bytes: u64) -> Setup {
    let disk = |name: &str| StandbyDisk { spec: DiskSpec { name: name.into(), bytes }, image: None };
    Setup { dir: dir.to_path_buf(), disks: vec![disk("root"), disk("data")], journal_bytes, policy: Policy::Disk }
}

fn id(epoch: u64) -> EpochId {
    EpochId { generation: 3, incarnation: 4, epoch }
}

fn data(disk: u32, offset: u64, bytes: usize, fill: u8) -> DiskWrite {
    DiskWrite { disk, offset, change: DiskChange::Data(vec![fill; bytes]) }
}

fn whole(setup: &Setup) -> DiskStore {
    let store = create(&HostFiles, setup).expect("creates");
    store.begin(id(0)).expect("begins");
    store
}

fn image(setup: &Setup, disk: usize) -> Vec<u8> {
    std::fs::read(&setup.images()[disk].1).expect("reads")
}

#[test]
fn p40_p43_a_life_from_first_copy_to_survivor_and_back() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let setup = setup(dir.path(), BYTES, 64 << 10);
    let store = create(&HostFiles, &setup).expect("creates");
    assert!(matches!(create(&HostFiles, &setup), Err(DiskError::Exists { .. })));
    assert!(matches!(reset(&HostFiles, &setup), Err(DiskError::InUse { .. })));
    assert!(matches!(store.append(id(1), &[]), Err(DiskError::OutOfTurn { .. })), "the images are not whole yet");
    store.write(&[data(0, 0, 300 << 10, 1), data(1, 5, 10, 2)]).expect("first copy");
    drop(store);
    let (store, found) = recover(&HostFiles, &setup, None).expect("recovers");
    assert_eq!(found, Recovered::Syncing);
    store.begin(id(10)).expect("begins");
    assert!(matches!(store.write(&[data(0, 0, 1, 1)]), Err(DiskError::OutOfTurn { .. })));

    let bad = |write: DiskWrite| matches!(store.append(id(11), &[write]), Err(DiskError::BadWrite { .. }));
    assert!(
        bad(data(2, 0, 1, 1)) && bad(data(0, BYTES, 1, 1)) && bad(data(0, u64::MAX, 2, 1)) && bad(data(0, 0, 0, 1))
    );
    let large = store.append(id(11), &[data(0, 0, 64 << 10, 1)]);
    assert!(matches!(large, Err(DiskError::TooLarge { .. })), "{large:?}");
    let zero = DiskWrite { disk: 0, offset: 0, change: DiskChange::Zero(256 << 10) };
    store.append(id(11), &[zero]).expect("appends");
    store.append(id(12), &[data(1, 4096, 40 << 10, 3)]).expect("appends");
    let full = store.append(id(13), &[data(1, 4096, 40 << 10, 3)]);
    assert!(matches!(full, Err(DiskError::Full { .. })), "{full:?}");
    for wrong in [id(12), id(9), EpochId { generation: 9, ..id(13) }, EpochId { incarnation: 9, ..id(13) }] {
        assert!(matches!(store.append(wrong, &[]), Err(DiskError::OutOfTurn { .. })), "{wrong:?}");
    }
    assert!(store.commit(13).is_err(), "not held");
    store.commit(11).expect("commits");
    assert_eq!(store.apply().expect("applies"), 11);
    assert!(image(&setup, 1)[4096..8192].iter().all(|&b| b == 0), "epoch 12 is not committed");
    assert!(image(&setup, 0)[..256 << 10].iter().all(|&b| b == 0));
    assert!(std::fs::metadata(&setup.images()[0].1).expect("metadata").blocks() * 512 < 200 << 10, "a hole");
    store.append(id(13), &[]).expect("an epoch without writes");
    assert!(matches!(store.finish(10), Err(DiskError::OutOfTurn { .. })), "later ones are committed");
    assert!(matches!(store.activated(4), Err(DiskError::OutOfTurn { .. })), "not finished");
    store.finish(11).expect("finishes");
    assert!(image(&setup, 1)[4096..8192].iter().all(|&b| b == 0), "epoch 12 was not acknowledged");
    assert!(matches!(store.append(id(14), &[]), Err(DiskError::OutOfTurn { .. })));
    store.activated(4).expect("activates");
    assert_eq!(store.progress().state, State::Activated(4));
    drop(store);
    let refused = recover(&HostFiles, &setup, None);
    assert!(matches!(refused, Err(DiskError::Activated { generation: 4, .. })));
    assert!(matches!(create(&HostFiles, &setup), Err(DiskError::Exists { .. })));
    let store = reset(&HostFiles, &setup).expect("given up");
    assert_eq!(store.progress().state, State::Syncing);
    assert_eq!(image(&setup, 1)[5..15], [2; 10], "the images are left to be compared");
}

#[test]
fn p46_appending_does_not_wait_for_applying() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut setup = setup(dir.path(), BYTES, 1 << 20);
    setup.policy = Policy::Memory;
    let store = whole(&setup);
    let side = store.side.lock().expect("held, as by a long application");
    store.append(id(1), &[data(0, 0, 4096, 7)]).expect("appends meanwhile");
    store.commit(1).expect("commits meanwhile");
    drop(side);
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Acquire) {
                store.apply().expect("applies");
            }
        });
        let all = (2..400_u64).try_for_each(|epoch| {
            let fill = epoch.to_le_bytes()[0];
            store.append(id(epoch), &[data(0, epoch * 8, 9000, fill), data(1, 0, 100, fill)])?;
            store.commit(epoch)
        });
        ended.store(true, Ordering::Release);
        all.expect("appends and commits");
    });
    store.finish(399).expect("finishes");
    let mut expected = vec![0; usize::try_from(BYTES).expect("small")];
    expected[..4096].fill(7);
    for epoch in 2..400_usize {
        expected[epoch * 8..epoch * 8 + 9000].fill(epoch.to_le_bytes()[0]);
    }
    assert!(image(&setup, 0) == expected);
}

#[test]
fn p42_a_damaged_epoch_between_whole_ones_is_no_torn_tail() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let setup = setup(dir.path(), BYTES, 64 << 10);
    let store = whole(&setup);
    for epoch in 1..4 {
        store.append(id(epoch), &[data(0, epoch * 100, 50, 9)]).expect("appends");
    }
    drop(store);
    let journal =
        std::fs::File::options().read(true).write(true).open(dir.path().join("disks.journal")).expect("opens");
    let damage = |record: u64| {
        let mut byte = [0];
        let at = 8192 + record * 4096 + 120;
        journal.read_exact_at(&mut byte, at).expect("reads");
        journal.write_all_at(&[byte[0] ^ 1], at).expect("damages");
    };
    damage(1);
    let refused = recover(&HostFiles, &setup, None);
    assert!(matches!(refused, Err(DiskError::Strange { .. })), "{refused:?}");
    damage(1);
    damage(2);
    let (_, found) = recover(&HostFiles, &setup, None).expect("the last one may be torn");
    assert_eq!(found, Recovered::Whole(id(2)));
}

#[test]
fn images_of_another_size_and_journals_of_other_disks_are_refused() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let setup = setup(dir.path(), BYTES, 64 << 10);
    assert!(matches!(recover(&HostFiles, &setup, None), Err(DiskError::Missing { .. })));
    drop(whole(&setup));
    let mut other = setup.clone();
    other.disks.pop();
    assert!(matches!(recover(&HostFiles, &other, None), Err(DiskError::Strange { .. })));
    std::fs::File::options().write(true).open(&setup.images()[1].1).and_then(|f| f.set_len(5)).expect("cuts");
    assert!(matches!(recover(&HostFiles, &setup, None), Err(DiskError::Strange { .. })));
    assert!(matches!(reset(&HostFiles, &setup), Err(DiskError::Strange { .. })));
    std::fs::remove_file(&setup.images()[1].1).expect("removes");
    assert!(matches!(recover(&HostFiles, &setup, None), Err(DiskError::Missing { .. })));
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e6
}

/// `cargo test -p replicator --lib --release -- --ignored --nocapture disk::tests::host::measure`
#[test]
#[ignore = "a measurement"]
fn measure_appending_against_a_raw_write_and_sync() {
    const ROUNDS: u64 = 200;
    const JOURNAL: u64 = 64 << 20;
    for bytes in [4 << 10, 64 << 10, 1 << 20_usize] {
        let dir = tempfile::tempdir().expect("temporary directory");
        let setup = setup(dir.path(), 16 << 20, JOURNAL);
        let store = whole(&setup);
        let raw = std::fs::File::create(dir.path().join("raw")).expect("creates");
        rustix::fs::fallocate(&raw, rustix::fs::FallocateFlags::empty(), 0, JOURNAL).expect("reserves");
        raw.sync_all().expect("syncs");
        let block = vec![5; bytes];
        let (mut appends, mut raws, mut applies) = (Vec::new(), Vec::new(), Vec::new());
        for epoch in 1..=ROUNDS {
            let at = epoch * bytes as u64 % (JOURNAL - bytes as u64);
            let began = Instant::now();
            raw.write_all_at(&block, at).expect("writes");
            raw.sync_data().expect("syncs");
            raws.push(began.elapsed());
            let writes = [data(0, at % (8 << 20), bytes, 6)];
            let began = Instant::now();
            store.append(id(epoch), &writes).expect("appends");
            appends.push(began.elapsed());
            store.commit(epoch).expect("commits");
            let began = Instant::now();
            store.apply().expect("applies");
            applies.push(began.elapsed());
        }
        let (append, raw, apply) = (median(appends), median(raws), median(applies));
        println!(
            "{bytes:8} bytes: append {append:7.0} us, raw {raw:7.0} us, ratio {:.2}; apply {apply:.0} us",
            append / raw
        );
    }
}
