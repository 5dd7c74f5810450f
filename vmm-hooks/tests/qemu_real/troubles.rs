//! What goes wrong: late answers, filters that stay, guests that end, agents that were killed.

use super::*;

/// A client of a monitor that reads its events.
fn listen(socket: &Path) -> impl Iterator<Item = serde_json::Value> + use<> {
    use std::io::{BufRead, BufReader, Write};
    let mut stream = std::os::unix::net::UnixStream::connect(socket).expect("QEMU listens");
    stream.set_read_timeout(Some(SOON)).expect("a socket");
    writeln!(stream, r#"{{"execute":"qmp_capabilities"}}"#).expect("QEMU reads");
    let mut lines = BufReader::new(stream).lines().map(|line| line.expect("QEMU speaks"));
    assert_eq!(lines.by_ref().take(2).count(), 2, "a greeting and an answer");
    lines.map(|line| serde_json::from_str(&line).expect("JSON"))
}

#[test]
fn a_stop_that_comes_late_does_not_leave_the_guest_standing() {
    use rustix::process::{Pid, Signal, kill_process};
    let Some(qemu) = Qemu::start(&["-M", "pc", "-nic", "none", "-qmp", SECOND]) else { return };
    let pid = Pid::from_child(&qemu.child);
    let mut guest = qemu.attach();
    let mut events = listen(&qemu.second());
    // QEMU takes the command and answers after the bound.
    kill_process(pid, Signal::STOP).expect("ours");
    assert_eq!(guest.pause().expect_err("it does not answer").kind, GuestErrorKind::Failed);
    kill_process(pid, Signal::CONT).expect("ours");
    assert!(events.any(|event| event["event"] == "STOP"), "the command was taken");
    assert!(events.any(|event| event["event"] == "RESUME"), "a guest whose pause failed runs on");
    drop(events);
    assert_eq!(guest.events(), [], "nobody but us stopped it");
    let mut capture = Capture::default();
    guest.pause().expect("pauses");
    guest.arm().expect("arms");
    guest.capture(&mut capture, &mut PauseParts::default()).expect("captures");
    guest.resume().expect("resumes");
    assert_eq!(status(&qemu.second()), "running");
    Box::new(guest).detach().expect("leaves it");
}

#[test]
fn filters_that_could_not_be_removed_are_not_forgotten() {
    let Some(qemu) = Qemu::start(&[&HEARD[..], &["-qmp", SECOND]].concat()) else { return };
    let heard = UnixDatagram::bind(qemu.dir.path().join("remote")).expect("a socket");
    heard.set_read_timeout(Some(SOON)).expect("a socket");
    let second = qemu.second();
    // Something that cannot be removed while it is used.
    let occupy = |id: &str| {
        let backend = r#""backend":{"type":"null","data":{}}"#;
        qmp(&second, &format!(r#"{{"execute":"chardev-add","arguments":{{"id":"{id}",{backend}}}}}"#));
        let mirror = r#""qom-type":"filter-mirror","id":"other","netdev":"n0","queue":"rx""#;
        qmp(&second, &format!(r#"{{"execute":"object-add","arguments":{{{mirror},"outdev":"{id}"}}}}"#));
    };
    let free = || drop(qmp(&second, r#"{"execute":"object-del","arguments":{"id":"other"}}"#));
    let left = || traces(&qemu, &second).into_iter().filter(|trace| trace.contains("-0")).collect::<Vec<_>>();
    let mut guest = qemu.attach();

    occupy("understudy-in-0");
    guest.pause().expect("pauses");
    guest.hold_output(1).expect_err("its name is taken");
    guest.hold_output(1).expect_err("and cannot be freed");
    free();
    guest.hold_output(1).expect("what is left is removed first");
    guest.resume().expect("resumes");

    occupy("understudy-x-0");
    for _ in 0..2 {
        assert_eq!(guest.open_output().expect_err("something stays").kind, GuestErrorKind::Failed);
        assert!(!left().is_empty());
    }
    free();
    guest.open_output().expect("finishes");
    assert_eq!(left(), Vec::<String>::new());
    while_drained(&heard);
    assert!(heard.recv(&mut [0; 4096]).is_ok(), "frames pass by themselves");

    guest.pause().expect("pauses");
    guest.hold_output(2).expect("holds");
    occupy("understudy-x-0");
    guest.open_output().expect_err("something stays");
    let error = Box::new(guest).detach().expect_err("it still does");
    assert!(error.message.contains("understudy-x-0"), "{error}");
    free();
    assert_eq!(remove_leftovers(&qemu.target()).expect("removes it"), ["understudy-x-0"]);
    assert_eq!(status(&second), "running");
}

/// A boot sector that waits for a key and then asks for the power to be turned off: `int 0x16`, and S5 to the register that
/// SeaBIOS puts at port 0x604.
const TURNS_OFF: [u8; 14] = [0x31, 0xc0, 0xcd, 0x16, 0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef, 0xf4, 0xeb, 0xfd];

#[test]
fn a_guest_that_shut_down_while_protected_ends_when_it_is_left() {
    let dir = tempfile::tempdir().expect("a directory");
    // Large enough that SeaBIOS finds a cylinder in it.
    let mut image = vec![0; 1 << 20];
    image[..TURNS_OFF.len()].copy_from_slice(&TURNS_OFF);
    image[510..512].copy_from_slice(&[0x55, 0xaa]);
    let disk = dir.path().join("boot");
    fs::write(&disk, image).expect("room");
    let drive = format!("file={},format=raw,if=virtio,readonly=on", disk.display());
    let arguments = ["-M", "pc", "-nic", "none", "-qmp", SECOND, "-drive", &drive];
    for protected in [true, false] {
        let Some(mut qemu) = Qemu::start(&arguments) else { return };
        let second = qemu.second();
        let press = || {
            let key = r#"{"type":"qcode","data":"a"}"#;
            qmp(&second, &format!(r#"{{"execute":"send-key","arguments":{{"keys":[{key}]}}}}"#));
        };
        let mut guest = qemu.attach();
        if protected {
            guest.pause().expect("pauses");
            guest.arm().expect("arms");
            guest.resume().expect("resumes");
            wait_for("the shutdown", || {
                press();
                guest.events().contains(&GuestEvent::Shutdown)
            });
            assert_eq!(status(&second), "shutdown");
            guest.pause().expect("nothing to do");
            guest.capture(&mut Capture::default(), &mut PauseParts::default()).expect("its last state can be taken");
            guest.resume().expect("nothing to do");
        }
        Box::new(guest).detach().expect("leaves it");
        if protected {
            let ended = qemu.child.try_wait().expect("ours").expect("it ended as it would have");
            assert!(ended.success(), "{ended}");
        } else {
            assert_eq!(status(&second), "running", "one that runs is not ended");
        }
    }
}

#[test]
fn a_guest_whose_agent_died_within_a_pause_runs_again() {
    let Some(qemu) = Qemu::start(&["-M", "pc", "-nic", "none"]) else { return };
    let mut guest = qemu.attach();
    guest.pause().expect("pauses");
    guest.arm().expect("arms");
    drop(guest);
    assert_eq!(status(&qemu.socket()), "paused");
    let removed = remove_leftovers(&qemu.target()).expect("removes them");
    assert!(removed.iter().any(|what| what.contains("pause")), "{removed:?}");
    assert_eq!(status(&qemu.socket()), "running");
    // An owner's pause of a guest with nothing of ours in it stays.
    qmp(&qemu.socket(), r#"{"execute":"stop"}"#);
    assert_eq!(remove_leftovers(&qemu.target()).expect("nothing to do"), Vec::<String>::new());
    assert_eq!(status(&qemu.socket()), "paused");
}

/// Where a helper process is to make its twin, and whether it is to activate it.
const HELPER: &str = "UNDERSTUDY_TEST_TWIN";

/// Not a test of its own: in another process it makes a twin, says so, and waits until it is killed.
#[test]
#[ignore = "only another test starts it, as another process"]
fn helper_that_makes_a_twin() {
    let Ok(order) = std::env::var(HELPER) else { return };
    let (order, run_dir) = order.split_once(' ').expect("two words");
    let Some(mut qemu) = Qemu::start(&["-M", "pc", "-nic", "none", "-name", "orphan"]) else { return };
    let mut guest = qemu.attach();
    let host = QemuTwinHost::new(TwinHostOptions { run_dir: run_dir.into(), ..TwinHostOptions::default() });
    let mut twin = host.prepare("orphan", guest.recipe(), guest.layout(), &[]).expect("a twin");
    sync(&mut guest, &*twin.memory());
    let mut capture = Capture::default();
    epoch(&mut guest, &mut capture);
    apply(&*twin.memory(), &capture);
    qemu.kill();
    drop(qemu);
    if order == "activate" {
        twin.activate(&capture.device).expect("goes on");
    }
    fs::write(Path::new(run_dir).join("ready"), []).expect("room");
    loop {
        std::thread::park();
    }
}

#[test]
fn a_killed_agents_twin_is_removed_if_it_never_ran_and_left_alone_if_it_did() {
    for order in ["wait", "activate"] {
        let Some(qemu) = Qemu::start(&["-M", "pc", "-nic", "none"]) else { return };
        let guest = qemu.attach();
        let run_dir = tempfile::Builder::new().prefix("qemu-twin").tempdir().expect("a directory");
        let mut helper = Command::new(std::env::current_exe().expect("this program"))
            .args(["--ignored", "--exact", "troubles::helper_that_makes_a_twin"])
            .env(HELPER, format!("{order} {}", run_dir.path().display()))
            .stdout(Stdio::null())
            .spawn()
            .expect("this program starts");
        wait_for("the twin", || {
            assert!(helper.try_wait().expect("ours").is_none(), "the helper ended");
            run_dir.path().join("ready").exists()
        });
        fs::remove_file(run_dir.path().join("ready")).expect("there");
        let host = QemuTwinHost::new(TwinHostOptions { run_dir: run_dir.path().to_owned(), ..Default::default() });
        assert_eq!(host.remove_leftovers().paths, Vec::<PathBuf>::new(), "its maker lives");
        helper.kill().expect("ours");
        helper.wait().expect("ours");
        let twin = PidFd::open(twin_pid(run_dir.path())).expect("it outlives its maker");
        let dir = run_dir.path().join("orphan");
        if order == "wait" {
            let removed = host.remove_leftovers();
            assert_eq!(removed.paths, [dir]);
            assert_eq!(removed.never_ran, ["orphan"]);
            assert!(twin.has_exited());
            assert_eq!(fs::read_dir(run_dir.path()).expect("a directory").count(), 0);
            let again = host.prepare("orphan", guest.recipe(), guest.layout(), &[]).expect("there is room again");
            again.destroy().expect("nothing is left");
        } else {
            assert_eq!(host.remove_leftovers().paths, Vec::<PathBuf>::new());
            let refused = host.prepare("orphan", guest.recipe(), guest.layout(), &[]).map(drop).expect_err("it runs");
            assert_eq!(refused.kind, GuestErrorKind::Refused);
            assert!(refused.message.contains("state `running`"), "{refused}");
            assert_eq!(status(&dir.join("qmp.sock")), "running");
            twin.kill_confirmed(SOON).expect("ours");
            let removed = host.remove_leftovers();
            assert_eq!(removed.paths, [dir], "it has ended");
            assert!(removed.never_ran.is_empty(), "it has run");
        }
    }
}
