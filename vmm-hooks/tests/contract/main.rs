//! One behaviour contract for every back end.
//!
//! Each clause is written once, against the traits of `vmm_hooks::guest` and a [`fixture::World`] that can do what no
//! trait offers: write memory as the guest would, listen to the wire, order a failure. A back end whose means are
//! missing here prints `skipped: ` and why.

mod capture;
mod fixture;
mod gate;
mod life;
mod qemu;
mod sim;
mod twin;

/// Makes one test of each clause for each back end. `true`: the guest needs a network card.
macro_rules! contract {
    ($($part:ident::$name:ident: $network:expr;)*) => {
        mod on_sim {
            $(#[test] fn $name() { super::fixture::hold(&super::sim::Sim, $network, super::$part::$name); })*
        }
        mod on_qemu {
            $(#[test] fn $name() { super::fixture::hold(&super::qemu::Qemu, $network, super::$part::$name); })*
        }
    };
}

contract! {
    capture::pausing_twice_is_one_pause: false;
    capture::a_written_page_is_found_once: false;
    capture::what_is_put_back_comes_again: false;
    capture::a_capture_is_ascending_unique_and_true: false;
    capture::a_capture_that_fails_loses_nothing: false;
    capture::pages_are_read_in_the_order_asked_for: false;
    capture::a_failed_pause_or_resume_changes_nothing: false;
    gate::output_is_held_sealed_and_released_in_order: true;
    gate::a_gate_that_is_opened_releases_and_lets_pass: true;
    gate::a_gate_that_is_shut_is_silent_for_ever: true;
    gate::waiting_for_output_ends_at_the_deadline: true;
    twin::a_twin_goes_on_from_the_committed_memory: false;
    twin::a_rehearsal_changes_nothing: false;
    twin::a_device_state_that_does_not_load_harms_nothing: false;
    twin::a_destroyed_twin_leaves_nothing: false;
    twin::another_back_ends_recipe_is_refused: false;
    life::a_detached_guest_runs_and_can_be_attached_again: true;
    life::a_second_attachment_is_refused: false;
    life::a_fence_ends_the_guest_and_says_so: false;
}
