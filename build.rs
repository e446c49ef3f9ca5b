//! Vendors the pinned wheels' shared objects into OUT_DIR and tells the library about them. The work is in `build/`;
//! here is only what a cargo build script knows: features, target, folders.

#[path = "build/mod.rs"]
mod vendoring;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use vendoring::cargo;
use vendoring::emit;
use vendoring::env::{self, Env};
use vendoring::error::Result;
use vendoring::families;
use vendoring::kernels;
use vendoring::local;
use vendoring::lock::Lock;
use vendoring::modules;
use vendoring::report::{Meter, say};
use vendoring::source::Ladder;
use vendoring::vendor::{Missing, vendor};

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            // cargo shows a failed build script's stderr; a Debug print or a panic would bury the one paragraph.
            eprintln!("\nflashinfer-rs: {fault}\n");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<()> {
    let manifest = cargo::folder("CARGO_MANIFEST_DIR")?;
    let out_dir = cargo::folder("OUT_DIR")?;
    let lock_file = manifest.join("artifacts.lock");
    let own = [manifest.join("build.rs"), manifest.join("build"), lock_file.clone()];
    emit::rerun(&own.each_ref().map(PathBuf::as_path), &[]);

    let folders = families::list(&manifest, &out_dir)?;
    emit::rerun(&folders.each_ref().map(PathBuf::as_path), &[]);

    // Only CARGO_CFG_*: `cfg!` here would speak of the machine that builds.
    let target = format!("{}-{}", cargo_text("CARGO_CFG_TARGET_ARCH"), cargo_text("CARGO_CFG_TARGET_OS"));
    let env = Env::process();
    let mut lock = Lock::read(&lock_file)?;
    let musl = cargo_text("CARGO_CFG_TARGET_ENV") == "musl";
    let without = if env.flag(env::SKIP_VENDOR) {
        Some(format!("{} was set when the crate was built", env::SKIP_VENDOR))
    } else if env.flag("DOCS_RS") {
        Some("the crate was built by docs.rs, which has no network".to_owned())
    } else if lock.for_target(&target).next().is_none() || musl {
        let with = if musl { " with musl" } else { "" };
        Some(format!("there are no wheels for {target}{with}; supported are x86_64 and aarch64 Linux with glibc"))
    } else {
        None
    };
    if let Some(reason) = without {
        emit::rerun(&[], &env.names_read());
        let all = Missing { reason: reason.clone(), ..Missing::default() };
        emit::table(&out_dir, &[], &[all], &lock, false)?;
        return kernels::table(&out_dir, &[], &[reason], false);
    }

    let named = modules::add(&mut lock, &env);
    // Told even where it is refused, so that a corrected list is read.
    emit::rerun(&[], &env.names_read());
    named?;
    let lib_dir = out_dir.join("lib");
    let has_feature = |name: &str| {
        std::env::var_os(format!("CARGO_FEATURE_{}", name.to_ascii_uppercase().replace('-', "_"))).is_some()
    };
    let workspace = cargo::workspace(&out_dir);
    let checkout = local::is_checkout(&manifest, workspace.as_deref()).then(|| manifest.clone());
    let record = checkout.as_ref().map(|checkout| checkout.join(local::RECORD)).filter(|record| record.exists());
    let users = kernels::named_lock(&env, workspace.as_deref());
    emit::rerun(&[], &env.names_read());
    let users = users?;
    let pinned = kernels::pinned(&lock, &lock_file, users.as_deref())?;
    let mut meter = Meter::new(std::io::stderr());
    let mut progress = |done, total| meter.tell(Instant::now(), done, total);
    let mut ladder = Ladder { workspace, checkout, ..Ladder::new(&env, &mut progress) };
    let result = vendor(&lock, &target, &has_feature, &mut ladder, &lib_dir);
    emit::rerun(&[], &env.names_read());
    let outcome = result?;
    let mut sonames: Vec<&str> = outcome.rows.iter().map(|row| row.soname).collect();
    let result = kernels::vendor(&pinned, &target, &mut ladder, &lib_dir, &sonames);
    emit::rerun(&[], &env.names_read());
    let kernels = result?;
    let watched = outcome.watch.iter().chain(&kernels.watch).chain(&record).chain(&users);
    let absent = emit::watch_absent(&out_dir, &outcome.absent);
    emit::rerun(&watched.chain(&absent).map(PathBuf::as_path).collect::<Vec<_>>(), &[]);
    outcome.told.iter().chain(&kernels.told).for_each(say);
    for row in &outcome.rows {
        say(format_args!("{} of {} {} ({})", row.soname, row.wheel.distribution, row.version, row.source));
    }
    for row in &kernels.rows {
        say(format_args!("{} ({})", row.kernel.soname(), row.source));
    }
    outcome.warnings.iter().chain(&kernels.warnings).for_each(|text| emit::warn(text));
    let names: Vec<String> = kernels.rows.iter().map(|row| row.kernel.soname()).collect();
    sonames.extend(names.iter().map(String::as_str));
    emit::prune(&lib_dir, &sonames)?;
    emit::table(&out_dir, &outcome.rows, &outcome.missing, &lock, has_feature("embed"))?;
    kernels::table(&out_dir, &kernels.rows, &kernels.missing, has_feature("embed"))?;
    emit::metadata(&lib_dir);
    Ok(())
}

/// What cargo says of the target; outside cargo nothing, for which there are no wheels.
fn cargo_text(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}
