//! The pause thread with a guest that goes on by itself, if it may, long before its capture returns.

use std::sync::Mutex;
use std::sync::mpsc::{channel, sync_channel};

use tokio::sync::mpsc::unbounded_channel;
use vmm_hooks::guest::{Fence, Recipe};
use vmm_hooks::layout::{Block, Layout};
use vmm_hooks::sim::{SimGuest, SimMachine, attach};

use super::super::lag::Lag;
use super::*;

/// How much longer its capture takes.
const LONGER: Duration = Duration::from_millis(5);

struct GoesOn {
    guest: SimGuest,
    told: Arc<Mutex<Vec<After>>>,
}

impl Guest for GoesOn {
    fn capture_epoch(
        &mut self,
        begin: bool,
        next: u64,
        after: After,
        into: &mut Capture,
        parts: &mut PauseParts,
    ) -> Result<u64, GuestError> {
        self.told.lock().expect("nobody panics").push(after);
        let held = self.guest.capture_epoch(begin, next, after, into, parts)?;
        if after == After::Run {
            self.guest.resume()?;
            let ran = Instant::now();
            parts.ran_again = Some(ran);
            while ran.elapsed() < LONGER {
                std::thread::yield_now();
            }
        }
        Ok(held)
    }

    fn layout(&self) -> &Layout {
        self.guest.layout()
    }

    fn recipe(&self) -> &Recipe {
        self.guest.recipe()
    }

    fn gate(&self) -> Arc<dyn Gate> {
        self.guest.gate()
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        self.guest.pause()
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.guest.resume()
    }

    fn arm(&mut self) -> Result<(), GuestError> {
        self.guest.arm()
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), GuestError> {
        self.guest.harvest(dirty)
    }

    fn put_back(&mut self, dirty: &PageSet) {
        self.guest.put_back(dirty);
    }

    fn read_pages(&mut self, pages: &[u64], bytes: &mut Vec<u8>) -> Result<(), GuestError> {
        self.guest.read_pages(pages, bytes)
    }

    fn capture(&mut self, into: &mut Capture, parts: &mut PauseParts) -> Result<(), GuestError> {
        self.guest.capture(into, parts)
    }

    fn hold_output(&mut self, epoch: u64) -> Result<(), GuestError> {
        self.guest.hold_output(epoch)
    }

    fn open_output(&mut self) -> Result<(), GuestError> {
        self.guest.open_output()
    }

    fn events(&mut self) -> Vec<GuestEvent> {
        self.guest.events()
    }

    fn fence(&self) -> Arc<dyn Fence> {
        self.guest.fence()
    }

    fn detach(self: Box<Self>) -> Result<(), GuestError> {
        Box::new(self.guest).detach()
    }
}

fn order(epoch: u64, stay_paused: bool) -> Command {
    let (earliest, latest) = (Time(0), Time(0));
    Command::Capture(CaptureOrder { epoch, begin_hold: epoch == 1, earliest, latest, on_output: None, stay_paused })
}

fn captured(report: Report) -> Box<Captured> {
    match report {
        Report::Captured(captured) => captured,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_guest_goes_on_by_itself_unless_it_is_to_stand_and_no_time_counts_after_that() {
    let layout = Layout::new(vec![Block { name: "ram".to_owned(), pages: 16 }]).expect("a good layout");
    let machine = SimMachine::boot(1, layout);
    let told = Arc::<Mutex<Vec<After>>>::default();
    let mut guest = GoesOn { guest: attach(&machine).expect("nobody is attached"), told: Arc::clone(&told) };
    guest.pause().and_then(|()| guest.arm()).and_then(|()| guest.resume()).expect("it runs");
    let ((ask, commands), (reports, mut heard)) = (channel(), unbounded_channel());
    let ((chunks, _jobs), (_spare, spares), (_tell, known)) = (sync_channel(1), channel(), channel());
    let lag = Arc::<Lag>::default();
    let thread =
        PauseThread::new(Box::new(guest), commands, reports, chunks, (spares, known), Stand::new(Arc::clone(&lag)));
    let running = std::thread::spawn(move || thread.run());
    let mut tell = |command: Command| {
        let asked = Instant::now();
        ask.send(command).expect("it lives");
        (heard.blocking_recv().expect("it lives"), asked.elapsed())
    };
    let (first, took) = tell(order(1, false));
    let first = captured(first);
    let ran = first.parts.ran_again.expect("it may go on");
    assert!(machine.is_running());
    assert!(first.parts.total + LONGER <= took, "{:?} of {took:?}", first.parts);
    assert!(lag.total() > Duration::ZERO && lag.total() <= first.parts.total, "{:?}", lag.total());
    let second = captured(tell(order(2, false)).0);
    assert!(second.ran >= LONGER && second.ran <= ran.elapsed(), "{:?}: from where it went on", second.ran);
    let before = lag.total();
    let third = captured(tell(order(3, true)).0);
    assert!(!machine.is_running() && third.parts.ran_again.is_none(), "its last epoch here");
    assert!(matches!(tell(Command::Resume).0, Report::Resumed(Ok(()))) && machine.is_running());
    assert!(lag.total() > before, "the time that it stood counts");
    assert!(matches!(tell(Command::Pause).0, Report::Paused(Ok(()))));
    let fourth = captured(tell(order(4, false)).0);
    assert!(!machine.is_running() && fourth.parts.ran_again.is_none(), "it was stopped before");
    assert_eq!(*told.lock().expect("nobody panics"), [After::Run, After::Run, After::Stand, After::Stand]);
    drop(ask);
    running.join().expect("it does not panic");
}
