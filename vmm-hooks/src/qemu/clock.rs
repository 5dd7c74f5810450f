//! What the guest's clock does while the guest is paused, and what to do about it. Pure.
//!
//! `stop` stops QEMU's virtual clock, from which TSC (under TCG), HPET, PIT, LAPIC and ACPI timers take their time, and `cont`
//! starts it where it stood. Under KVM, QEMU saves the kvm-clock at `stop` and sets it back at `cont`, on purpose. No command moves
//! either of them forward. The RTC alone follows the host (unless `-rtc` says otherwise), but a guest reads it only when it boots.
//! So the time is set right in the guest or nowhere.

use super::cmdline::rtc_clock;
use super::{Check, CheckLevel};

/// The point of the checklist about the guest's clock.
pub(super) fn check(kvm: bool, argv: &[String]) -> Check {
    let rtc = match rtc_clock(argv).as_deref() {
        None | Some("host") => "",
        Some(_) => "; by the option -rtc its RTC stands too, so that a reboot does not set it right either",
    };
    let message = format!(
        "the guest's clock stands in each pause and falls behind by their share of the time: `understudy status` shows how far{rtc}"
    );
    let advice = if kvm {
        "run chrony in the guest: `modprobe ptp_kvm`, then `refclock PHC /dev/ptp0 poll 0` and `makestep 0.1 -1` in its configuration"
    } else {
        "run chrony in the guest with a time server of your network and `makestep 0.1 -1` in its configuration"
    };
    Check { name: "guest's clock".to_owned(), level: CheckLevel::Warning, message, advice: advice.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::check;

    fn argv(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn it_advises_what_the_guest_can_use() {
        assert!(check(true, &argv("qemu -m 64")).advice.contains("ptp_kvm"));
        assert!(!check(false, &argv("qemu -m 64")).advice.contains("ptp_kvm"));
    }

    #[test]
    fn an_rtc_that_does_not_follow_the_host_is_named() {
        for (line, named) in [
            ("qemu -m 64", false),
            ("qemu -rtc base=utc,clock=host", false),
            ("qemu -rtc base=localtime", false),
            ("qemu -rtc clock=vm", true),
            ("qemu -rtc clock=host -rtc clock=rt,driftfix=slew", true),
        ] {
            assert_eq!(check(false, &argv(line)).message.contains("-rtc"), named, "{line}");
        }
    }
}
