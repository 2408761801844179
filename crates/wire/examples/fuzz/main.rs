//! Fuzzes every decoder of this crate for as long as one asks.
//!
//! ```text
//! cargo run --release -p anyfabric-wire --example fuzz -- --seconds 60 [--seed 7]
//! cargo run --release -p anyfabric-wire --example fuzz -- --inputs 100000 --seed 7
//! cargo run --release -p anyfabric-wire --example fuzz -- --replay frame:0200...
//! ```
//!
//! It takes one valid encoding of everything (`tests/common/samples.rs`),
//! mutates it, mostly repairs what would stop a mutant at the door (magic,
//! checksum, proof, length), and decodes it. An input fails when its decoder
//! panics, allocates out of proportion to the input, or yields a value that
//! its own encoding does not give back. The run then prints decoder, seed and
//! input, and exits with 1. Inputs that were accepted are mutated further.
//!
//! With `--release` it is ten times as fast, without it also finds arithmetic
//! that overflows; `cargo test` does a little of that.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use corpus::{Corpus, Rng};
use decoders::{Decoder, Verdict};
use harness::{attempt, prove_harness};

mod corpus;
mod decoders;
mod harness;
#[path = "../../tests/common/samples.rs"]
mod samples;

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(why) => {
            eprintln!("{why}\nusage: fuzz [--seconds N | --inputs N] [--seed S] [--replay DECODER:HEX]");
            return ExitCode::from(2);
        }
    };
    let outcome = match options.replay {
        Some((decoder, input)) => attempt(|| decoder.decode(&input)).map(|verdict| format!("{verdict:?}")),
        None => fuzz(options.seed, options.limit),
    };
    match outcome {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::FAILURE
        }
    }
}

/// When to stop.
#[derive(Clone, Copy)]
enum Limit {
    Time(Duration),
    Inputs(u64),
}

/// Runs until the limit or the first failure, and says which.
fn fuzz(seed: u64, limit: Limit) -> Result<String, String> {
    prove_harness()?;
    let mut rng = Rng(seed);
    let mut corpus = Corpus::new();
    let began = Instant::now();
    let mut num_inputs = 0_u64;
    let mut num_accepted = [0_u64; Decoder::ALL.len()];
    loop {
        let done = match limit {
            // Asking for the time costs as much as decoding: ask seldom.
            Limit::Time(time) => num_inputs.is_multiple_of(1024) && began.elapsed() >= time,
            Limit::Inputs(inputs) => num_inputs >= inputs,
        };
        if done {
            break;
        }
        let (decoder, input) = corpus.mutant(&mut rng);
        match attempt(|| decoder.decode(&input)) {
            Ok(Verdict::Accepted) => {
                num_accepted[decoder as usize] += 1;
                corpus.keep(&mut rng, decoder, input);
            }
            Ok(Verdict::Refused) => {}
            Err(why) => {
                let input = hex(&input);
                return Err(format!(
                    "{decoder:?} {why}\nseed {seed}, input number {num_inputs}\nagain: fuzz --replay {decoder:?}:{input}"
                ));
            }
        }
        num_inputs += 1;
    }
    let accepted: Vec<_> =
        Decoder::ALL.iter().map(|decoder| format!("{decoder:?} {}", num_accepted[*decoder as usize])).collect();
    // A decoder that accepts nothing is not being tested.
    if num_inputs > 10_000 && num_accepted.contains(&0) {
        return Err(format!("nothing reaches some decoder, seed {seed}: {}", accepted.join(", ")));
    }
    Ok(format!(
        "{num_inputs} inputs in {:.1} s, seed {seed}; accepted and given back: {}",
        began.elapsed().as_secs_f64(),
        accepted.join(", ")
    ))
}

/// What the command line asked for.
struct Options {
    limit: Limit,
    seed: u64,
    replay: Option<(Decoder, Vec<u8>)>,
}

impl Options {
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Self, String> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let mut options =
            Self { limit: Limit::Time(Duration::from_secs(10)), seed: now.as_nanos() as u64, replay: None };
        while let Some(name) = args.next() {
            let value = args.next().ok_or_else(|| format!("{name} needs a value"))?;
            let number = || value.parse().map_err(|_| format!("{name} {value}: not a number"));
            match name.as_str() {
                "--seconds" => options.limit = Limit::Time(Duration::from_secs(number()?)),
                "--inputs" => options.limit = Limit::Inputs(number()?),
                "--seed" => options.seed = number()?,
                "--replay" => options.replay = Some(parse_replay(&value)?),
                _ => return Err(format!("unknown option {name}")),
            }
        }
        Ok(options)
    }
}

fn parse_replay(text: &str) -> Result<(Decoder, Vec<u8>), String> {
    let (name, digits) = text.split_once(':').ok_or("--replay takes DECODER:HEX")?;
    let decoder = Decoder::ALL.into_iter().find(|decoder| format!("{decoder:?}").eq_ignore_ascii_case(name));
    let input = digits
        .as_bytes()
        .chunks(2)
        .map(|pair| std::str::from_utf8(pair).ok().and_then(|pair| u8::from_str_radix(pair, 16).ok()))
        .collect::<Option<_>>();
    Ok((decoder.ok_or_else(|| format!("no decoder {name}"))?, input.ok_or("not hexadecimal")?))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twenty_thousand_inputs_of_a_fixed_seed() {
        if let Err(failure) = fuzz(1, Limit::Inputs(20_000)) {
            panic!("{failure}");
        }
    }

    #[test]
    fn the_command_line_is_understood() {
        let parse = |text: &str| Options::parse(text.split_whitespace().map(str::to_owned));
        let options = parse("--replay hello:00ff --seed 7").unwrap();
        assert_eq!(options.seed, 7);
        assert_eq!(options.replay, Some((Decoder::Hello, vec![0, 0xff])));
        for wrong in
            ["--seconds", "--seconds x", "--replay hello", "--replay nobody:00", "--replay hello:0g", "--fast 1"]
        {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
