//! The simulator's program: the same arguments give the same bytes of standard output.

use std::process::Command;

fn printed(arguments: &[&str]) -> Vec<u8> {
    let output = Command::new(env!("CARGO_BIN_EXE_sim")).args(arguments).output().expect("it starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    output.stdout
}

#[test]
fn the_same_arguments_give_the_same_standard_output() {
    for arguments in [&["--seeds", "20", "--seed", "7"][..], &["--seed", "7", "--trace"]] {
        let first = printed(arguments);
        assert!(!first.is_empty());
        assert_eq!(first, printed(arguments), "{arguments:?}");
    }
    assert_ne!(printed(&["--seeds", "20", "--seed", "7"]), printed(&["--seeds", "20", "--seed", "8"]));
}
