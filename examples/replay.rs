//! Makes a dumped call again and compares what it gives with what was dumped: on a GPU where there is one, else by the reference
//! on the host. `cargo run --example replay DUMP [cpu]`, where DUMP is one of the folders that `FLASHINFER_RS_DUMP_DIR` asked
//! for, and `cpu` keeps it from the GPU. It ends with 0 where all is the same but for rounding.

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;

use flashinfer_rs::log::{Dump, Replay};
use flashinfer_rs::{FlashInferRuntime, RuntimeConfig};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (folder, on_host) = match &args[..] {
        [folder] => (folder, false),
        [folder, device] if device == "cpu" => (folder, true),
        _ => {
            eprintln!("usage: replay DUMP [cpu]");
            return ExitCode::from(2);
        }
    };
    match replay(Path::new(folder), on_host) {
        Ok(replay) => {
            println!("{replay}");
            if replay.outputs.is_none() || replay.matches() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprint!("replay: {error}");
            let mut cause = error.source();
            while let Some(reason) = cause {
                eprint!(": {reason}");
                cause = reason.source();
            }
            eprintln!();
            ExitCode::from(2)
        }
    }
}

/// Makes the call again.
pub fn replay(folder: &Path, on_host: bool) -> Result<Replay, Box<dyn Error>> {
    let runtime = FlashInferRuntime::initialize(RuntimeConfig::default())?;
    let dump = Dump::open(folder)?;
    println!("a call of {} on {}", dump.kernel(), dump.device());
    if on_host || !runtime.gpu_available() {
        return Ok(dump.replay()?);
    }
    // SAFETY: whoever runs this says that the dump is of a sound call, and that nobody changed it so that it is none.
    Ok(unsafe { dump.replay_on_gpu(0) }?)
}
