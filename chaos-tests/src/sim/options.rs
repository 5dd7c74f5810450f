//! What a seed decides before it runs: the swarm options and the faults.

use std::time::Duration;

use heartbeat_core::time::Time;

use super::rng::Rng;

/// How the simulator joins the cores to the simulated world. All but the first are deliberately wrong: the checkers must find each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wiring {
    /// As it should be.
    Faithful,
    /// The driver releases output when the epoch is sent, not when it is acknowledged.
    ReleaseOnSent,
    /// The standby's driver goes on acknowledging after its grant.
    AcknowledgeAfterGrant,
    /// The primary's driver takes a refused ask for a grant.
    RefusalIsGrant,
    /// Frames emitted after a capture are tagged as before it: an early release.
    SealEarly,
    /// Holding begins one capture later than it should.
    HoldLate,
    /// The standby's driver activates the epoch before the last acknowledged one.
    ActivateOlder,
    /// The primary's driver takes silence of the witness for a grant, after a while.
    SilenceIsGrant,
    /// The witness answers before its record is durable, and loses it.
    WitnessForgets,
    /// A new life of an agent frees the guest that it finds before it has read whose that is.
    FreeUnread,
    /// A new life of a standby's agent gives a grant back without a look at its mark.
    ForgetMark,
    /// The witness shows a record to a reader while it is being written, and writes slowly.
    ReadUndurable,
    /// The primary's driver takes a refused ask for its defeat and destroys its guest.
    RefusalIsDefeat,
    /// The loser's driver destroys its guest when it falls mute.
    DestroyEarly,
    /// An agent that restarts loads the copy that it had activated once more.
    ActivateTwice,
    /// An operator forces the other host out without anything that says that it is dead.
    ForceUnconfirmed,
    /// A store that one of the two hosts keeps answers in a new life before it knows that its host was not forced out.
    AnswerUnconfirmed,
    /// A standby that must have the other host switched off first activates without waiting for that.
    ActivateUnfenced,
    /// A host that has the other one confirmed dead, to force it out, shows that one the record of before until it begins to write.
    ShowWhileFencing,
    /// A new life goes on with a copy that a former one kept while it waited for its fence, whatever grant it is of and whoever ran by that.
    KeptIsEnough,
    /// A host may force the other one out with a copy that it kept before it was off, and may have been forced out itself then.
    ForceAfterOff,
}

/// What goes wrong, or is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A host loses power for good.
    Kill(usize),
    /// A host stands still.
    PauseHost(usize, Duration),
    /// An agent stands still, its guest runs on.
    PauseAgent(usize, Duration),
    /// Nothing passes from one end to the other (hosts 0 and 1, witness 2).
    Cut(usize, usize, Duration),
    /// As [`Fault::Cut`], both ways.
    CutBoth(usize, usize, Duration),
    /// The replication connection breaks.
    BreakConnection,
    /// The standby's agent restarts and has forgotten everything.
    RestartStandby,
    /// An agent restarts; its guest, if it has one, lives on without it.
    RestartAgent(usize),
    /// The guest's process dies.
    GuestDies,
    /// The guest shuts down; its process ends too if true.
    GuestShutsDown(bool),
    /// A device was added.
    GuestChanged,
    /// The operator ends the protection.
    Unprotect,
    /// The operator moves the VM.
    Planned,
    /// The operator asks the standby to take over.
    TakeOver,
    /// The operator asks both sides to rehearse.
    Rehearse,
    /// Somebody pauses the guest and lets it go on later.
    PauseGuest(Duration),
    /// The guest's process stands still and answers nobody; its agent is not told.
    GuestFreezes(Duration),
    /// The guest shuts down, and a moment later its process has ended.
    GuestShutsDownAndEnds,
    /// The operator protects the VM, where it runs, with the other host.
    Protect,
    /// A host loses power for so long. Then it begins anew, without a guest.
    PowerLoss(usize, Duration),
    /// The operator of this host forces the other one out, which is fenced: it loses power for so long.
    Force(usize, Duration),
}

/// Everything a seed decided.
#[derive(Clone, Debug)]
pub struct Options {
    /// Messages lost, of 1000.
    pub loss: u64,
    /// Messages doubled, of 1000.
    pub doubled: u64,
    /// Messages that are much later than others, of 1000.
    pub straggle: u64,
    /// Captures that fail, of 1000.
    pub capture_failures: u64,
    /// Activations that fail, of 1000.
    pub activation_failures: u64,
    /// Activations, and fence commands, that the agent does not live to see the end of, of 1000: another life of it begins meanwhile.
    pub restarts: u64,
    /// The witness's writes that fail, of 1000. It answers nothing more then, until it restarts.
    pub disk_failures: u64,
    /// The longest delay of an ordinary message, in microseconds.
    pub delay: u64,
    /// Epochs by `auto`, not fixed.
    pub auto: bool,
    /// What was protected is protected again by itself.
    pub again: bool,
    /// There is no third host: the record is kept by one of the two.
    pub pair: bool,
    /// A winner must have the other host switched off before its copy runs.
    pub fence: bool,
    /// Fence commands that fail, of 1000.
    pub fence_failures: u64,
    /// How long the replication connection lives without a sign of the other side.
    pub connection_timeout: Duration,
    /// When what goes wrong.
    pub faults: Vec<(Time, Fault)>,
    /// When all is healed but what is dead.
    pub healed: Time,
    /// When the run ends.
    pub end: Time,
}

/// Bound on the faults of one run.
const MAX_FAULTS: u64 = 5;

impl Options {
    /// What a seed decides. One seed in four has no third host, one in three fences.
    pub fn of(seed: u64, rng: &mut Rng) -> Self {
        let mut options = Self::draw(rng);
        options.fence = seed.is_multiple_of(3);
        if options.fence {
            options.fence_failures = rng.below(1_001);
            // Waiting may take long: agents are upgraded meanwhile.
            options.restarts = options.restarts.max(400);
        }
        if seed.is_multiple_of(4) {
            options.pair = true;
            // What fails to be written is the witness's business.
            options.disk_failures = 0;
            for _ in 0..=rng.below(2) {
                let (host, long) = (rng.index(2), rng.micros(10_000, 1_500_000));
                let at = Time::from_start(rng.micros(300_000, 1_800_000));
                let forced = at + rng.micros(100_000, 900_000);
                let trouble = [Fault::PowerLoss(host, long), Fault::PauseHost(host, long), Fault::CutBoth(0, 1, long)];
                options.faults.push((at, trouble[rng.index(3)]));
                options.faults.push((forced, Fault::Force(1 - host, rng.micros(10_000, 1_200_000))));
            }
            options.faults.sort_by_key(|&(at, _)| at);
        }
        options
    }

    /// What does not depend on who keeps the record. Swarm: each seed leaves some kinds of trouble out, so that others meet undisturbed.
    fn draw(rng: &mut Rng) -> Self {
        let mut dial = |most: u64| if rng.chance(500) { 0 } else { rng.below(most + 1) };
        let (loss, doubled, straggle) = (dial(200), dial(200), dial(100));
        let (capture_failures, disk_failures, some) = (dial(30), dial(150), dial(900));
        let restarts = dial(500);
        // In some runs no activation goes well.
        let activation_failures = if rng.chance(250) { 1_000 } else { some };
        let mut faults = Vec::new();
        let mut killed = false;
        for _ in 0..rng.below(MAX_FAULTS + 1) {
            let at = Time::from_start(rng.micros(100_000, 2_200_000));
            let host = rng.index(2);
            let long = rng.micros(10_000, 1_500_000);
            let fault = match rng.below(31) {
                0..=2 if !killed => {
                    killed = true;
                    Fault::Kill(host)
                }
                0..=3 => Fault::PauseHost(host, long),
                4 => Fault::PauseAgent(host, long),
                5 | 6 => Fault::Cut(rng.index(3), rng.index(3), long),
                7 => Fault::CutBoth(host, 2, long),
                8..=10 => Fault::CutBoth(0, 1, long),
                11 => Fault::BreakConnection,
                12 => Fault::RestartStandby,
                13 => Fault::GuestDies,
                14 => Fault::GuestShutsDown(rng.chance(500)),
                15 => Fault::GuestChanged,
                16 => Fault::Unprotect,
                17 => Fault::Planned,
                18 | 19 => Fault::TakeOver,
                20 | 21 => Fault::Rehearse,
                22 | 23 => Fault::PauseGuest(long),
                24 => Fault::GuestShutsDownAndEnds,
                25 | 26 => Fault::GuestFreezes(long),
                27..=29 => Fault::RestartAgent(host),
                _ => Fault::Protect,
            };
            faults.push((at, fault));
            // Trouble seldom comes alone: a second fault shortly after the first meets it half way.
            if rng.chance(300) {
                let soon = at + rng.micros(100, 60_000);
                faults.push((soon, Fault::CutBoth(rng.index(2), 2, long)));
            }
            if rng.chance(200) {
                faults.push((at + rng.micros(300_000, 1_000_000), Fault::Protect));
            }
        }
        faults.sort_by_key(|&(at, _)| at);
        Self {
            loss,
            doubled,
            straggle,
            capture_failures,
            activation_failures,
            restarts,
            disk_failures,
            delay: if rng.chance(800) { 3_000 } else { 40_000 },
            auto: rng.chance(500),
            again: rng.chance(700),
            pair: false,
            fence: false,
            fence_failures: 0,
            connection_timeout: rng.micros(100_000, 2_000_000),
            faults,
            healed: Time::from_start(Duration::from_millis(2_800)),
            end: Time::from_start(Duration::from_millis(9_000)),
        }
    }
}
