//! `cargo xtask kernel add`: pins a kernel as FlashInfer-Bench hands them out, a folder with `kernel.so` and
//! `kernel_metadata.txt`, by a `[[kernel]]` entry in a lock file.
//!
//! All that the entry says is read out of the files themselves, and what would fail later is refused now. The lock is written
//! once, when every kernel was found good.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Component, Path, PathBuf};

use clap::Args;
use object::ReadCache;
use serde::Deserialize;
use toml_edit::{Array, ArrayOfTables, DocumentMut, InlineTable, Item, Table, Value, value};

use crate::elf::{self, Elf, Target, Unfit};
use crate::metadata::Metadata;
use crate::shell::{self, say};
use crate::vendoring::digest::hash;
use crate::vendoring::env::{self, Env};
use crate::vendoring::error::{Error, Result, refuse};
use crate::vendoring::fetch::{Client, redacted};
use crate::vendoring::kernels::{self, Kernel, LFS_POINTER, Part, TEXT_LIMIT};
use crate::vendoring::lock::{Lock, Member};
use crate::vendoring::source::{Ladder, Supply};
use crate::vendoring::store::publish_bytes;
use crate::vendoring::wheel::Wheel as Archive;

/// Kernels for all architectures with debug information are far smaller than this.
const LIBRARY_LIMIT: u64 = 4 << 30;
/// What a lock begins with that is made here.
const NEW: &str = "# FlashInfer-Bench kernels that builds of flashinfer-rs vendor, where FLASHINFER_RS_KERNELS names this file.\n\
                   # `cargo xtask kernel add` in a checkout of that crate writes the entries; docs/kernel-lock.md explains them.\n\
                   version = 1\n";

#[derive(Args)]
pub struct Add {
    /// Folders with a kernel.so and a kernel_metadata.txt, or the folders' addresses
    #[arg(required = true, value_name = "URL or PATH")]
    kernels: Vec<String>,
    /// The lock file, made where there is none; default: what FLASHINFER_RS_KERNELS names, else this checkout's artifacts.lock
    #[arg(long)]
    lock: Option<PathBuf>,
    /// What programs ask for it by; default: the solution's name, else the definition's
    #[arg(long)]
    name: Option<String>,
    /// The definition's name, where neither the metadata nor a definition.json says it
    #[arg(long)]
    definition: Option<String>,
    /// The author's name, where no solution.json says it
    #[arg(long)]
    author: Option<String>,
    /// Another address where the same folder may be had; must be given for a folder that does not lie beside the lock
    #[arg(long, value_name = "URL")]
    source: Vec<String>,
    /// Pin what is there in place of what is pinned under its name
    #[arg(long)]
    replace: bool,
}

/// `cargo xtask kernel add`
pub fn command(options: &Add) -> Result<()> {
    let env = Env::process();
    let path = match &options.lock {
        Some(path) => path.clone(),
        None => env.path(env::KERNELS).unwrap_or_else(|| shell::root().join("artifacts.lock")),
    };
    let said = add(options, &path, &env)?;
    said.iter().for_each(say);
    if path != shell::root().join("artifacts.lock") && env.path(env::KERNELS).is_none() {
        say(format!("builds take it where {} names {}", env::KERNELS, path.display()));
    }
    Ok(())
}

/// Adds the kernels to a lock; answers what to tell.
fn add(options: &Add, path: &Path, env: &Env) -> Result<Vec<String>> {
    if options.kernels.len() > 1 && [&options.name, &options.definition, &options.author].iter().any(|o| o.is_some()) {
        refuse!("--name, --definition and --author are of one kernel, and {} are given", options.kernels.len());
    }
    if let Some(url) = options.source.iter().find(|url| !kernels::is_address(url)) {
        refuse!("--source {} is not an http or https address; correct it", redacted(url));
    }
    let shown = path.display().to_string();
    let old = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(e) => return Err(Error::io("reading", path, &e)),
    };
    let mut text = if old.is_empty() { NEW.to_owned() } else { old.clone() };
    let mut said = Vec::new();
    for from in &options.kernels {
        let handed = Handed::read(from)?;
        let entry = handed.entry(options, path, env)?;
        let (next, word) = with(&text, &shown, entry, options.replace)?;
        text = next;
        said.push(word);
    }
    if text != old {
        publish_bytes(path, text.as_bytes())?;
    }
    Ok(said)
}

/// What a lock pins, whether it is a user's or this crate's own.
fn pinned(text: &str, name: &str) -> Result<Vec<Kernel>> {
    let document: DocumentMut = text.parse().map_err(|e| Error::Refused(format!("{name} is no TOML: {e}; mend it")))?;
    match document.contains_key("wheel") {
        true => Ok(Lock::parse(text, name)?.kernels),
        false => kernels::parse(text, name),
    }
}

/// A lock's text with an entry more, and what to tell; comments and order stay.
fn with(text: &str, shown: &str, entry: Table, replace: bool) -> Result<(String, String)> {
    let old = pinned(text, shown)?;
    let mut document: DocumentMut = text.parse().map_err(|e| Error::Refused(format!("{shown}: {e}")))?;
    let new = alone(entry.clone())?;
    let list = document.entry("kernel").or_insert(Item::ArrayOfTables(ArrayOfTables::new()));
    let Some(list) = list.as_array_of_tables_mut() else { refuse!("{shown} has no [[kernel]] tables; write it so") };
    let Kernel { name, target, .. } = &new;
    let at = old.iter().position(|kernel| kernel.name == *name && kernel.target == *target);
    let done = match at.map(|at| (at, &old[at])) {
        None => {
            list.push(entry);
            "is pinned now"
        }
        Some((_, there)) if same(there, &new) && new.sources.iter().all(|source| there.sources.contains(source)) => {
            return Ok((text.to_owned(), format!("{name} for {target} is pinned in {shown} already")));
        }
        // The same kernel from one place more.
        Some((at, there)) if same(there, &new) && !replace => {
            let more = new.sources.iter().zip(entry["sources"].as_array().into_iter().flatten());
            let more: Vec<Value> =
                more.filter(|(source, _)| !there.sources.contains(source)).map(|(_, value)| value.clone()).collect();
            let sources = list.get_mut(at).and_then(|table| table["sources"].as_array_mut());
            let Some(sources) = sources else { refuse!("{shown}: {name} has no list of sources; write it so") };
            sources.extend(more);
            "has a source more"
        }
        Some((at, _)) if replace => {
            let Some(table) = list.get_mut(at) else { refuse!("{shown}: {name} is not where it was read") };
            let (decor, position) = (table.decor().clone(), table.position());
            *table = entry;
            *table.decor_mut() = decor;
            table.set_position(position);
            "is replaced"
        }
        Some((_, there)) => {
            let differs = differences(there, &new).join(", and ");
            refuse!(
                "{shown} pins {name} for {target} already, and not this: {differs}; pin this one in its place by --replace, \
                 or under another name by --name"
            );
        }
    };
    let text = document.to_string();
    // What was written must be what a build reads.
    let all = pinned(&text, shown)?;
    if !all.iter().any(|kernel| same(kernel, &new)) {
        refuse!("{shown} cannot be written so that it says the same again; keep to [[kernel]] tables in it");
    }
    let sha256 = library(&new).map(|pin| pin.sha256.to_string()).unwrap_or_default();
    let code = if new.arch.is_empty() { "no GPU code".to_owned() } else { format!("code for {}", new.arch.join(", ")) };
    Ok((text, format!("{name} for {target} {done} in {shown}: sha256 {sha256}, {code}")))
}

fn library(kernel: &Kernel) -> Option<&kernels::Pin> {
    kernel.files.iter().find(|file| file.name == Part::Library)
}

/// Whether two entries differ in their sources alone.
fn same(a: &Kernel, b: &Kernel) -> bool {
    let Kernel { sources, .. } = a;
    Kernel { sources: sources.clone(), ..b.clone() } == *a
}

/// In what two entries of one name differ, in words.
fn differences(there: &Kernel, here: &Kernel) -> Vec<String> {
    let mut all = Vec::new();
    for part in Part::ALL {
        let digest = |kernel: &Kernel| kernel.files.iter().find(|file| file.name == part).map(|file| file.sha256);
        let word =
            |digest: Option<_>| digest.map_or("is not there".to_owned(), |sha256| format!("has sha256 {sha256}"));
        let (was, is) = (digest(there), digest(here));
        if was != is {
            all.push(format!("{} {} there, and here it {}", part.file(), word(was), word(is)));
        }
    }
    let facts = [
        ("its definition", there.definition != here.definition),
        ("its solution", there.solution != here.solution),
        ("its author", there.author != here.author),
        ("its entry", there.entry != here.entry),
        ("its destination_passing_style", there.destination_passing_style != here.destination_passing_style),
        ("its architectures", there.arch != here.arch),
        ("what it needs", (&there.needed, there.cuda) != (&here.needed, here.cuda)),
    ];
    all.extend(facts.into_iter().filter(|(_, differs)| *differs).map(|(what, _)| format!("{what} is another")));
    all
}

/// An entry as a build reads it.
fn alone(entry: Table) -> Result<Kernel> {
    let mut document = DocumentMut::new();
    document["version"] = value(1);
    let mut list = ArrayOfTables::new();
    list.push(entry);
    document.insert("kernel", Item::ArrayOfTables(list));
    let mut kernels = kernels::parse(&document.to_string(), "the new entry")?;
    kernels.pop().ok_or_else(|| Error::Refused("the new entry says nothing".to_owned()))
}

/// Where a kernel is handed out.
enum From {
    Folder(PathBuf),
    Url(String),
}

/// A kernel as it is handed out.
struct Handed {
    from: From,
    shown: String,
    files: Vec<(Part, Vec<u8>)>,
}

/// The part of a definition that is of use here.
#[derive(Deserialize)]
struct Definition {
    name: String,
}

/// The part of a solution that is of use here.
#[derive(Deserialize)]
struct Solution {
    name: String,
    definition: String,
    author: Option<String>,
    spec: Spec,
}

#[derive(Deserialize)]
struct Spec {
    entry_point: String,
    destination_passing_style: Option<bool>,
}

impl Handed {
    fn read(from: &str) -> Result<Self> {
        let is_url = kernels::is_address(from);
        if !is_url && from.contains("://") {
            refuse!("{} is not the address of a folder; correct it", redacted(from));
        }
        let (from, shown) = match is_url {
            true => (From::Url(from.to_owned()), redacted(from)),
            false => (From::Folder(PathBuf::from(from)), from.to_owned()),
        };
        let mut files = Vec::new();
        for part in Part::ALL {
            let limit = if part == Part::Library { LIBRARY_LIMIT } else { TEXT_LIMIT };
            let file = part.file();
            let bytes = match &from {
                From::Folder(folder) => read(&folder.join(file), limit)?,
                From::Url(url) => Client::new(&Env::process()).unknown(&kernels::file_address(url, part)?, limit)?,
            };
            match bytes {
                Some(bytes) if bytes.starts_with(LFS_POINTER) => refuse!(
                    "{shown}: {file} is a Git LFS pointer, which stands for the file itself; fetch that by `git lfs pull`, or \
                     give the address where it really lies"
                ),
                Some(bytes) => files.push((part, bytes)),
                None if part.is_required() => {
                    refuse!("{shown} has no {file}; name the folder that has it, or its address")
                }
                None => {}
            }
        }
        Ok(Self { from, shown, files })
    }

    fn bytes(&self, part: Part) -> Option<&[u8]> {
        self.files.iter().find(|(name, _)| *name == part).map(|(_, bytes)| bytes.as_slice())
    }

    fn text(&self, part: Part) -> Result<Option<&str>> {
        let text = self.bytes(part).map(std::str::from_utf8).transpose();
        text.map_err(|e| Error::Refused(format!("{}: {} is not UTF-8: {e}; write it so", self.shown, part.file())))
    }

    fn json<'a, T: Deserialize<'a>>(&'a self, part: Part) -> Result<Option<T>> {
        let parsed = self.text(part)?.map(serde_json::from_str).transpose();
        parsed.map_err(|e| Error::Refused(format!("{}: {} is malformed: {e}; get it again", self.shown, part.file())))
    }

    /// The entry for a lock that lies there, after all that can be looked at was.
    fn entry(&self, options: &Add, lock: &Path, env: &Env) -> Result<Table> {
        let shown = &self.shown;
        let metadata = Metadata::parse(self.text(Part::Metadata)?.unwrap_or_default());
        let definition: Option<Definition> = self.json(Part::Definition)?;
        let solution: Option<Solution> = self.json(Part::Solution)?;
        let solution = solution.as_ref();
        let same = |what: &str, places: &[(&str, Option<&str>)]| -> Result<Option<String>> {
            let mut said = places.iter().filter_map(|(place, value)| Some((place, (*value)?)));
            let Some((first, value)) = said.next() else { return Ok(None) };
            if let Some((place, other)) = said.find(|(_, other)| *other != value) {
                refuse!(
                    "{shown}: {what} is {value:?} by {first} and {other:?} by {place}; keep the files of one kernel together"
                );
            }
            Ok(Some(value.to_owned()))
        };
        let [by_metadata, by_definition, by_solution] =
            [Part::Metadata, Part::Definition, Part::Solution].map(Part::file);
        let symbol = solution.and_then(|solution| Some(solution.spec.entry_point.split_once("::")?.1));
        let entry = same("the entry", &[(by_metadata, metadata.entry_symbol.as_deref()), (by_solution, symbol)])?;
        let Some(entry) = entry.filter(|_| metadata.entry_symbol.is_some()) else {
            refuse!(
                "{shown}: {by_metadata} has no line `Entry Symbol: NAME`; add it, with the function's name behind the entry \
                 point's `::`"
            );
        };
        kernels::check_symbol(&entry).map_err(|fault| Error::Refused(format!("{shown}: {by_metadata}: {fault}")))?;
        let definition = same(
            "the definition",
            &[
                ("--definition", options.definition.as_deref()),
                (by_metadata, metadata.definition.as_deref()),
                (by_definition, definition.as_ref().map(|definition| definition.name.as_str())),
                (by_solution, solution.map(|solution| solution.definition.as_str())),
            ],
        )?;
        let Some(definition) = definition else {
            refuse!(
                "{shown}: nothing says what it computes; add a line `Definition: NAME` to {by_metadata}, or give --definition"
            )
        };
        let name_of_solution = same(
            "the solution",
            &[
                (by_metadata, metadata.solution.as_deref()),
                (by_solution, solution.map(|solution| solution.name.as_str())),
            ],
        )?;
        let author = same(
            "the author",
            &[
                ("--author", options.author.as_deref()),
                (by_solution, solution.and_then(|solution| solution.author.as_deref())),
            ],
        )?;
        let name = options.name.as_ref().or(name_of_solution.as_ref()).unwrap_or(&definition);
        kernels::check_name(name).map_err(|fault| Error::Refused(format!("{shown}: {fault}; give one by --name")))?;
        let elf = self.preflight(&entry, env)?;

        let mut table = Table::new();
        table["name"] = value(name);
        table["target"] = value(target(elf.machine));
        table["definition"] = value(definition);
        let mut optional = |key: &str, text: Option<String>| {
            if let Some(text) = text {
                table[key] = value(text);
            }
        };
        optional("solution", name_of_solution);
        optional("author", author);
        table["entry"] = value(entry);
        if let Some(style) = solution.and_then(|solution| solution.spec.destination_passing_style) {
            table["destination_passing_style"] = value(style);
        }
        if !elf.targets.is_empty() {
            table["arch"] = value(elf.targets.iter().map(Target::to_string).collect::<Array>());
        }
        if let Some(major) = elf.cuda_major() {
            table["cuda"] = value(i64::from(major));
        }
        if !elf.needed.is_empty() {
            table["needed"] = value(elf.needed.iter().collect::<Array>());
        }
        table["sources"] = value(self.sources(options, lock)?);
        let mut files = ArrayOfTables::new();
        for (part, bytes) in &self.files {
            let mut file = Table::new();
            file["name"] = value(part.file());
            file["size"] = value(i64::try_from(bytes.len()).unwrap_or(i64::MAX));
            file["sha256"] = value(hash(bytes).to_string());
            files.push(file);
        }
        table.insert("file", Item::ArrayOfTables(files));
        Ok(table)
    }

    /// That the library can be what it is handed out as.
    fn preflight(&self, entry: &str, env: &Env) -> Result<Elf> {
        let file = format!("{}: {}", self.shown, Part::Library.file());
        let other = [elf::X86_64, elf::AARCH64].into_iter().find(|machine| *machine != elf::HOST);
        let machines: Vec<u16> = [elf::HOST].into_iter().chain(other).collect();
        let unfit = |Unfit { problem, remedy }| Error::Refused(format!("{file}: {problem}; {remedy}"));
        let elf = Elf::read_for(&machines, self.bytes(Part::Library).unwrap_or_default()).map_err(unfit)?;
        if !elf.is_complete {
            refuse!(
                "{file} was stripped of the tables that tell what it exports; build it without `strip --strip-section-headers`"
            );
        }
        if !elf.tvm_ffi_exports().any(|name| name == entry) {
            let exported: Vec<_> = elf.tvm_ffi_exports().filter(|name| !name.starts_with('_')).take(20).collect();
            let exported = if exported.is_empty() { "none".to_owned() } else { exported.join(", ") };
            refuse!(
                "{file} does not export {}{entry}; of TVM-FFI's functions it exports {exported}; correct the metadata's Entry \
                 Symbol, or export it by TVM_FFI_DLL_EXPORT_TYPED_FUNC",
                elf::PREFIX
            );
        }
        if elf.has_embedded() {
            refuse!(
                "{file} has modules embedded in it, which TVM-FFI alone loads, by its path and whatever its digest is; \
                     hand out the library without them"
            );
        }
        if let Some(symbol) = elf.registering_symbol() {
            refuse!(
                "{file} needs {symbol}, which changes what a whole process shares: no safe call loads it; build it without, or \
                 let the program load it by the unsafe Module::open"
            );
        }
        match self.tvm_ffi(target(elf.machine), env)? {
            Some(there) => {
                let missing: Vec<_> = elf.tvm_ffi_symbols().filter(|symbol| !there.contains(*symbol)).collect();
                if !missing.is_empty() {
                    refuse!(
                        "{file} needs {} of TVM-FFI, which the pinned libtvm_ffi.so does not have; build it with the headers of \
                         that release",
                        missing.join(", ")
                    );
                }
            }
            None => say(format!("what {} needs of TVM-FFI is not compared: libtvm_ffi.so is not at hand", self.shown)),
        }
        Ok(elf)
    }

    /// What the pinned libtvm_ffi.so has, where it can be had.
    fn tvm_ffi(&self, target: &str, env: &Env) -> Result<Option<BTreeSet<String>>> {
        let lock = Lock::read(&shell::root().join("artifacts.lock"))?;
        let Some(wheel) = lock.for_target(target).find(|wheel| wheel.distribution == env::TVM_FFI) else {
            return Ok(None);
        };
        let members: Vec<&Member> = wheel.members.iter().collect();
        let mut silent = |_, _| {};
        let mut ladder = Ladder { workspace: Some(shell::root()), ..Ladder::new(env, &mut silent) };
        let scratch = tempfile::tempdir().map_err(|e| Error::io("writing to the folder", &std::env::temp_dir(), &e))?;
        let machines = [elf::X86_64, elf::AARCH64];
        let read = match ladder.supply(wheel, &members, scratch.path())? {
            Supply::Nowhere(_) => return Ok(None),
            Supply::Members { files, .. } => {
                let Some((_, file)) = files.first() else { return Ok(None) };
                Elf::read_for(&machines, &ReadCache::new(file))
            }
            Supply::Wheel(found) => {
                let (mut bytes, Some(member)) = (Vec::new(), members.first()) else { return Ok(None) };
                let mut archive = Archive::open(BufReader::new(found.file), wheel.file.clone())?;
                archive.copy(&member.unlocked(), &mut bytes, &found.path)?;
                Elf::read_for(&machines, bytes.as_slice())
            }
        };
        let unfit =
            |Unfit { problem, .. }| Error::Refused(format!("the pinned libtvm_ffi.so cannot be read: {problem}"));
        Ok(Some(read.map_err(unfit)?.defined))
    }

    /// Where a build is to look, for a lock that lies there.
    fn sources(&self, options: &Add, lock: &Path) -> Result<Array> {
        let source = |kind: &str, value: &str| {
            let mut table = InlineTable::new();
            table.insert(kind, value.into());
            Value::InlineTable(table)
        };
        let mut sources = Array::new();
        match &self.from {
            From::Url(url) => sources.push(source("url", url)),
            From::Folder(folder) => match below(folder, lock)? {
                Some(path) => sources.push(source("path", &path)),
                None if options.source.is_empty() => refuse!(
                    "{} does not lie below the folder of {}, so that other machines would not find it; move it there, or say \
                     by --source URL where it can be had",
                    self.shown,
                    lock.display()
                ),
                None => {}
            },
        }
        options.source.iter().for_each(|url| sources.push(source("url", url)));
        Ok(sources)
    }
}

/// A file's bytes; `None` where there is no such file.
fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    let failed = |e: std::io::Error| Error::io("reading", path, &e);
    match path.metadata() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(e)),
        // Opening a pipe would wait for ever.
        Ok(metadata) if !metadata.is_file() => refuse!("{} is no file; name a kernel's folder", path.display()),
        Ok(_) => {}
    }
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(limit + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > limit {
        refuse!("{} is longer than {limit} bytes, too long for what it should be", path.display());
    }
    Ok(Some(bytes))
}

/// A folder's path from a lock's folder on, if it lies below it.
fn below(folder: &Path, lock: &Path) -> Result<Option<String>> {
    let real = |path: &Path| path.canonicalize().map_err(|e| Error::io("reading", path, &e));
    let beside = lock.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(beside).map_err(|e| Error::io("creating the folder", beside, &e))?;
    let (folder, beside) = (real(folder)?, real(beside)?);
    let Ok(relative) = folder.strip_prefix(&beside) else { return Ok(None) };
    let parts = relative.components().filter_map(|part| match part {
        Component::Normal(part) => part.to_str().map(str::to_owned),
        _ => None,
    });
    let parts: Vec<String> = parts.collect();
    if parts.len() != relative.components().count() {
        refuse!("{} is no path that TOML can hold; give it another name", folder.display());
    }
    Ok(Some(if parts.is_empty() { ".".to_owned() } else { parts.join("/") }))
}

/// A machine as locks name targets.
fn target(machine: u16) -> &'static str {
    if machine == elf::AARCH64 { "aarch64-linux" } else { "x86_64-linux" }
}

#[cfg(test)]
mod tests;
