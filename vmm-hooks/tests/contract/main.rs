//! One behaviour contract for every back end.
//!
//! Each clause is written once, against the traits of `vmm_hooks::guest` and a [`fixture::World`] that can do what no
//! trait offers: write memory as the guest would, listen to the wire, order a failure. A back end whose means are
//! missing here prints `skipped: ` and why.

mod capture;
mod disks;
mod fixture;
mod gate;
mod kvm;
mod life;
mod qemu;
mod sim;
mod twin;

/// Makes one test of each clause for each back end, with what the guest needs.
macro_rules! contract {
    ($($part:ident::$name:ident: $needs:ident;)*) => {
        mod on_sim {
            $(#[test] fn $name() { super::fixture::hold(&super::sim::Sim, super::fixture::Needs::$needs, super::$part::$name); })*
        }
        mod on_kvm {
            use vmm_hooks::kvm::Dirty;
            $(#[test] fn $name() { super::fixture::hold(&super::kvm::Kvm { dirty: Dirty::Bitmap, process: false }, super::fixture::Needs::$needs, super::$part::$name); })*
        }
        mod on_kvm_with_rings {
            use vmm_hooks::kvm::Dirty;
            $(#[test] fn $name() { super::fixture::hold(&super::kvm::Kvm { dirty: Dirty::Ring, process: false }, super::fixture::Needs::$needs, super::$part::$name); })*
        }
        mod on_kvm_in_a_process {
            use vmm_hooks::kvm::Dirty;
            $(#[test] fn $name() { super::fixture::hold(&super::kvm::Kvm { dirty: Dirty::Bitmap, process: true }, super::fixture::Needs::$needs, super::$part::$name); })*
        }
        mod on_qemu {
            $(#[test] fn $name() { super::fixture::hold(&super::qemu::Qemu, super::fixture::Needs::$needs, super::$part::$name); })*
        }
    };
}

contract! {
    capture::pausing_twice_is_one_pause: Nothing;
    capture::a_written_page_is_found_once: Nothing;
    capture::what_is_put_back_comes_again: Nothing;
    capture::a_capture_is_ascending_unique_and_true: Nothing;
    capture::a_capture_that_fails_loses_nothing: Nothing;
    capture::pages_are_read_in_the_order_asked_for: Nothing;
    capture::a_failed_pause_or_resume_changes_nothing: Nothing;
    disks::a_guest_without_disks_is_mirrored_at_once: Nothing;
    disks::the_first_copy_and_the_writes_after_it_are_the_disks: Disks;
    disks::a_capture_has_the_writes_up_to_the_stop: Disks;
    disks::writes_that_are_put_back_come_first: Disks;
    disks::a_capture_that_fails_keeps_the_writes: Disks;
    disks::unmirroring_leaves_the_disks_alone: Disks;
    gate::output_is_held_sealed_and_released_in_order: Network;
    gate::a_gate_that_is_opened_releases_and_lets_pass: Network;
    gate::a_gate_that_is_shut_is_silent_for_ever: Network;
    gate::waiting_for_output_ends_at_the_deadline: Network;
    twin::a_twin_goes_on_from_the_committed_memory: Nothing;
    twin::a_rehearsal_changes_nothing: Nothing;
    twin::a_device_state_that_does_not_load_harms_nothing: Nothing;
    twin::a_destroyed_twin_leaves_nothing: Nothing;
    twin::another_back_ends_recipe_is_refused: Nothing;
    life::a_detached_guest_runs_and_can_be_attached_again: Network;
    life::a_second_attachment_is_refused: Nothing;
    life::a_fence_ends_the_guest_and_says_so: Nothing;
}
