//! Control groups that the laboratory's hosts are born in.

use std::path::{Path, PathBuf};

use super::Lab;

/// Enters the group, and becomes the program.
const BORN: &str = "echo $$ > \"$0\" && exec \"$@\"";

impl Lab {
    /// Whatever the laboratory starts on a host (`a`, `b`) from now on is born in the control group whose list of processes is the
    /// file `processes`; so are its children.
    pub fn set_group(&mut self, role: &str, processes: PathBuf) {
        self.groups.push((role.to_owned(), processes));
    }

    /// What to start instead of a program on a host, so that it is born there.
    pub(super) fn born(&self, role: &str, program: &Path, args: Vec<String>) -> (PathBuf, Vec<String>) {
        let Some((_, group)) = self.groups.iter().find(|(its, _)| its == role) else {
            return (program.to_owned(), args);
        };
        let mut words = ["-c", BORN].map(str::to_owned).to_vec();
        // `ip netns exec` mounts another /sys, without control groups: ours is where this process sees it.
        words.push(format!("/proc/{}/root{}", self.maker, group.display()));
        words.push(program.display().to_string());
        words.extend(args);
        (PathBuf::from("sh"), words)
    }
}
