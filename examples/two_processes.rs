//! Moves a tensor from one process into another, from Rust: `two_processes.py` in the other language.
//!
//! The receiver starts itself once more as the sender, and tells it on its command line where to write.

use std::env::{args, current_exe};
use std::error::Error;
use std::process::Command;
use std::time::Duration;

use anyfabric_engine::{Config, Engine, WriteOptions};

fn main() -> Result<(), Box<dyn Error>> {
    match &args().collect::<Vec<_>>()[1..] {
        [descriptor, imm] => send(descriptor, imm.parse()?),
        _ => receive(),
    }
}

/// Offer memory, wait for one arrival, look at the bytes.
fn receive() -> Result<(), Box<dyn Error>> {
    let engine = Engine::new(Config::default())?;
    let region = engine.allocate(NBYTES)?;
    let counter = engine.counter(None, &[])?;
    let (descriptor, imm) = (region.descriptor()?.encode(), counter.imm().value());
    let mut sender = Command::new(current_exe()?).args([hex(&descriptor), imm.to_string()]).spawn()?;
    counter.wait(1, Some(Duration::from_secs(10)))?;
    // SAFETY: the region has NUM_ELEMENTS floats, and its only writer is done.
    let last = unsafe { region.as_ptr().cast::<f32>().add(NUM_ELEMENTS - 1).read() };
    println!("received {NBYTES} bytes, the last element is {last}");
    sender.wait()?;
    Ok(())
}

/// Write into the memory that the receiver offers.
fn send(descriptor: &str, imm: u32) -> Result<(), Box<dyn Error>> {
    let engine = Engine::new(Config::default())?;
    let source = engine.allocate(NBYTES)?;
    for idx in 0..NUM_ELEMENTS {
        // SAFETY: the region has NUM_ELEMENTS floats, and nobody else uses it yet.
        unsafe { source.as_ptr().cast::<f32>().add(idx).write(idx as f32) };
    }
    let remote = engine.import(&unhex(descriptor)?)?;
    engine.write(&source.slice(0..NBYTES)?, &remote.slice(0..NBYTES)?, WriteOptions::counted(imm))?.wait(None)?;
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Result<Vec<u8>, Box<dyn Error>> {
    (0..text.len()).step_by(2).map(|at| Ok(u8::from_str_radix(&text[at..at + 2], 16)?)).collect()
}

const NUM_ELEMENTS: usize = 1 << 20;
const NBYTES: u64 = 4 * NUM_ELEMENTS as u64;
