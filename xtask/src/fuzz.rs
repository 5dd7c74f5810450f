//! `cargo xtask fuzz [TARGET] [--seconds N] [--keep]`: coverage-guided fuzzing with libFuzzer, on the stable compiler.
//!
//! The compiler's own coverage instrumentation is asked for by plain code generation options; nothing but a C++ compiler is
//! needed beyond Rust. What is kept of a target lies in `chaos-tests/fuzz/corpus/TARGET.hex`, one input a line, and is
//! replayed by `cargo test`. Everything else is below `target/fuzz`.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::shell;

/// Edge coverage with counters, and traced comparisons, so that magic numbers are found.
const COVERAGE: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions";
/// A target must be named where flags are to leave build scripts alone.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";
/// Bound on the length of an input.
const MAX_INPUT: u32 = 4096;
/// Bound on what is kept of one target, in bytes of input; the file has twice as many.
const MAX_KEPT: usize = 16 << 10;

/// What to do.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// One target; all of them, one after the other, if it is not given
    target: Option<String>,
    /// How long each target is run
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Keep a smallest set of inputs with the same coverage in the repository
    #[arg(long)]
    keep: bool,
}

/// Builds the fuzzer and runs it.
///
/// # Errors
/// If it cannot be built, or a target found something; the input is named then.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let known = targets()?;
    let chosen: Vec<&str> = match &args.target {
        Some(target) if !known.contains(target) => {
            bail!("there is no target {target}; there are {}", known.into_iter().collect::<Vec<_>>().join(", "))
        }
        Some(target) => vec![target.as_str()],
        None => known.iter().map(String::as_str).collect(),
    };
    let program = build()?;
    for target in chosen {
        println!("\n== {target}, {} s", args.seconds);
        one(&program, target, args)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn corpus_dir() -> PathBuf {
    shell::root().join("chaos-tests/fuzz/corpus")
}

fn kept_file(target: &str) -> PathBuf {
    corpus_dir().join(format!("{target}.hex"))
}

/// The targets are those that something is kept of.
fn targets() -> Result<BTreeSet<String>> {
    let dir = corpus_dir();
    let entries = fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))?;
    let stem = |path: PathBuf| Some(path.file_stem()?.to_str()?.to_owned());
    Ok(entries.filter_map(|entry| stem(entry.ok()?.path())).collect())
}

fn build() -> Result<PathBuf> {
    if shell::find("c++").is_none() {
        bail!("libFuzzer needs a C++ compiler: apt install g++");
    }
    let dir = shell::target().join("fuzz");
    let mut cargo = shell::cargo();
    cargo.env("CARGO_TARGET_DIR", &dir).env("RUSTFLAGS", COVERAGE);
    cargo.args(["build", "--release", "--target", TRIPLE, "--package", "chaos-fuzz", "--features", "libfuzzer"]);
    shell::run(&mut cargo)?;
    Ok(dir.join(TRIPLE).join("release/fuzz"))
}

fn one(program: &Path, target: &str, args: &Args) -> Result<()> {
    let work = shell::target().join("fuzz/run").join(target);
    let corpus = work.join("corpus");
    fs::create_dir_all(&corpus)?;
    for (number, input) in kept(target)?.into_iter().enumerate() {
        fs::write(corpus.join(format!("kept-{number}")), input)?;
    }
    let fuzz = || {
        let mut command = Command::new(program);
        command.env("FUZZ_TARGET", target).arg(format!("-max_len={MAX_INPUT}"));
        command.args(["-timeout=10", "-rss_limit_mb=2048", "-verbosity=1"]);
        command.arg(format!("-artifact_prefix={}/", work.display()));
        command
    };
    let mut command = fuzz();
    command.arg(format!("-max_total_time={}", args.seconds)).args(["-print_final_stats=1"]).arg(&corpus);
    shell::run(&mut command).with_context(|| {
        format!("{target} found something: the input is below {}; mend it, then add it to {target}.hex", work.display())
    })?;
    if args.keep {
        let merged = work.join("merged");
        let _ = fs::remove_dir_all(&merged);
        fs::create_dir_all(&merged)?;
        shell::run(fuzz().arg("-merge=1").arg(&merged).arg(&corpus))?;
        keep(target, &merged)?;
    }
    Ok(())
}

/// The kept inputs.
fn kept(target: &str) -> Result<Vec<Vec<u8>>> {
    let file = kept_file(target);
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    text.lines()
        .map(|line| from_hex(line).with_context(|| format!("{}: not hexadecimal: {line}", file.display())))
        .collect()
}

/// Writes the shortest of the inputs in `dir` down, within the bound, and all that were kept because they once failed: those
/// stand before the empty line.
fn keep(target: &str, dir: &Path) -> Result<()> {
    let mut inputs: Vec<Vec<u8>> = Vec::new();
    for entry in fs::read_dir(dir)? {
        inputs.push(fs::read(entry?.path())?);
    }
    inputs.sort_by_key(|input| (input.len(), input.clone()));
    let text = fs::read_to_string(kept_file(target))?;
    let pinned: Vec<&str> = text.split_once("\n\n").map_or(Vec::new(), |(pinned, _)| pinned.lines().collect());
    let mut out: String = pinned.iter().flat_map(|line| [line, "\n"]).collect();
    if !pinned.is_empty() {
        out.push('\n');
    }
    let (mut total, mut number) = (0, pinned.len());
    for input in inputs.iter().filter(|input| !input.is_empty()) {
        total += input.len();
        if total > MAX_KEPT {
            break;
        }
        out.push_str(&to_hex(input));
        out.push('\n');
        number += 1;
    }
    println!("{target}: {number} inputs are kept, of {} that were found", inputs.len());
    fs::write(kept_file(target), out).with_context(|| format!("cannot write what is kept of {target}"))
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string grows");
        text
    })
}

fn from_hex(line: &str) -> Option<Vec<u8>> {
    let pairs = line.as_bytes().chunks(2);
    pairs.map(|pair| u8::from_str_radix(str::from_utf8(pair).ok().filter(|pair| pair.len() == 2)?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::{from_hex, targets, to_hex};

    #[test]
    fn inputs_survive_the_file() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(from_hex(&to_hex(&all)), Some(all));
        assert_eq!(from_hex("0g"), None);
        assert_eq!(from_hex("0"), None);
    }

    #[test]
    fn every_kept_corpus_is_a_target_of_some_crate() {
        let root = crate::shell::root();
        let sources =
            ["heartbeat/src/fuzzing.rs", "vmm-hooks/src/qemu/fuzzing/mod.rs", "replicator/src/pages/fuzzing/mod.rs"];
        let text: String = sources.map(|path| std::fs::read_to_string(root.join(path)).expect("it is there")).concat();
        let targets = targets().expect("the corpus is there");
        assert!(!targets.is_empty());
        for target in targets {
            assert!(text.contains(&format!("(\"{target}\", ")), "{target}.hex is replayed by nobody");
        }
    }
}
