//! What a shared object says of itself, read without loading it. Nothing here trusts a byte of it.

use std::collections::BTreeSet;

use object::elf;
use object::read::elf::{ElfFile64, FileHeader};
use object::{Endianness, Object, ObjectSection, ObjectSymbol, ReadRef};

/// What a shared object says of itself.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Elf {
    /// `e_machine`.
    pub(crate) machine: u16,
    /// The libraries that it needs, in order.
    pub(crate) needed: Vec<String>,
    /// Where it says that they may lie.
    pub(crate) search_paths: Vec<String>,
    /// Symbols that must be found when it is loaded.
    pub(crate) undefined: BTreeSet<String>,
    /// The functions and data that it exports.
    pub(crate) defined: BTreeSet<String>,
    /// What its GPU code was compiled for.
    pub(crate) targets: BTreeSet<Target>,
    /// The kinds of the modules that are embedded in it, `_lib` for itself; `None` where none are.
    pub(crate) embedded: Option<Vec<String>>,
    /// Whether it has the tables that tell all this.
    pub(crate) is_complete: bool,
}

/// What GPU code was compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Target {
    /// Whether it is PTX, which the driver compiles for the GPU that is there.
    pub(crate) ptx: bool,
    /// Major and minor in one number: 90, 120.
    pub(crate) arch: u32,
    /// Whether it runs on that very architecture only (`sm_90a`) or on its family (`sm_100f`).
    pub(crate) limit: Limit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Limit {
    None,
    Family,
    Architecture,
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let suffix = match self.limit {
            Limit::None => "",
            Limit::Family => "f",
            Limit::Architecture => "a",
        };
        write!(f, "{}_{}{suffix}", if self.ptx { "compute" } else { "sm" }, self.arch)
    }
}

impl Target {
    /// Whether it runs on a GPU of this compute capability.
    pub(crate) fn runs_on(self, major: u32, minor: u32) -> bool {
        let (device, same_major) = (major.saturating_mul(10).saturating_add(minor), self.arch / 10 == major);
        match (self.limit, self.ptx) {
            (Limit::Architecture, _) => self.arch == device,
            (Limit::Family, _) => same_major && self.arch <= device,
            (Limit::None, false) => same_major && self.arch <= device,
            (Limit::None, true) => self.arch <= device,
        }
    }
}

/// Why a file is no shared object for this machine: what it is, and what is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unfit {
    pub(crate) problem: String,
    pub(crate) remedy: String,
}

fn unfit<T>(problem: impl Into<String>, remedy: impl Into<String>) -> Result<T, Unfit> {
    Err(Unfit { problem: problem.into(), remedy: remedy.into() })
}

/// What TVM-FFI puts before an exported function's name.
pub(crate) const PREFIX: &str = "__tvm_ffi_";

/// What stands before the symbols of TVM-FFI's C functions.
const C_SYMBOLS: &str = "TVMFFI";
/// What stands in the symbols of its C++ functions.
const CXX_SYMBOLS: &str = "N3tvm3ffi";

/// What a library exports whose functions need more than to be found: modules that were embedded in it, a context.
const EMBEDDED: [&str; 2] = ["_library_bin", "_library_ctx"];

/// Functions of TVM-FFI's that change tables without a lock, or something that the whole process shares: what their names begin
/// with.
const REGISTERING: [&str; 5] = [
    "TVMFFIFunctionSetGlobal",
    "TVMFFITypeGetOrAllocIndex",
    "TVMFFITypeRegister",
    "TVMFFIEnvRegister",
    "TVMFFISetCustomAllocator",
];

/// Those of CUDA's libraries whose number is CUDA's own: what their sonames begin with.
const NUMBERED_AS_CUDA: [&str; 5] =
    ["libcudart.so.", "libcublas.so.", "libcublasLt.so.", "libnvrtc.so.", "libnvJitLink.so."];

/// The release of CUDA that a library's soname implies.
pub(crate) fn cuda_major(soname: &str) -> Option<u32> {
    let number = NUMBERED_AS_CUDA.iter().find_map(|start| soname.strip_prefix(start))?;
    number.split('.').next()?.parse().ok()
}

/// Where TVM-FFI embeds modules in a library.
const LIBRARY_BIN: &str = "__tvm_ffi__library_bin";

const REBUILD: &str = "build it for this machine";

pub(crate) const X86_64: u16 = elf::EM_X86_64.0;
pub(crate) const AARCH64: u16 = elf::EM_AARCH64.0;
/// The machine that this program runs on.
pub(crate) const HOST: u16 = if cfg!(target_arch = "aarch64") { AARCH64 } else { X86_64 };

/// A machine by its number, for messages.
pub(crate) fn machine_name(machine: u16) -> String {
    match elf::Machine(machine) {
        elf::EM_X86_64 => "x86_64".to_owned(),
        elf::EM_AARCH64 => "aarch64".to_owned(),
        elf::EM_386 => "x86 (32 bits)".to_owned(),
        elf::EM_ARM => "ARM (32 bits)".to_owned(),
        elf::EM_PPC64 => "ppc64".to_owned(),
        elf::EM_RISCV => "RISC-V".to_owned(),
        elf::EM_CUDA => "an NVIDIA GPU (a cubin)".to_owned(),
        _ => format!("machine number {machine}"),
    }
}

impl Elf {
    /// What a file says of itself, if it is a shared object for a machine like this one.
    pub(crate) fn read<'data, R: ReadRef<'data>>(data: R) -> Result<Self, Unfit> {
        Self::read_for(&[HOST], data)
    }

    /// As [`read`](Self::read), for one of these machines, of which the first is this one.
    pub(crate) fn read_for<'data, R: ReadRef<'data>>(machines: &[u16], data: R) -> Result<Self, Unfit> {
        refuse_what_is_no_elf(data)?;
        let malformed = |error: object::Error| Unfit {
            problem: format!("it is a damaged ELF file ({error})"),
            remedy: "copy or build it again".to_owned(),
        };
        let file = ElfFile64::<Endianness, R>::parse(data).map_err(malformed)?;
        let (header, endian) = (file.elf_header(), file.endian());
        let mut elf = Self { machine: header.e_machine(endian).0, ..Self::default() };
        if !machines.contains(&elf.machine) || endian != Endianness::Little {
            let order = if endian == Endianness::Little { "" } else { ", with the most significant byte first" };
            let found = machine_name(elf.machine);
            let wanted: Vec<_> = machines.iter().map(|machine| machine_name(*machine)).collect();
            return unfit(format!("it is for {found}{order}, and this is {}", wanted.join(" or ")), REBUILD);
        }
        match header.e_type(endian) {
            elf::ET_DYN => {}
            elf::ET_REL => {
                return unfit("it is an object file (.o), not a shared object", "link it with `-shared`");
            }
            elf::ET_EXEC => return unfit("it is a program, not a shared object", "link it with `-shared`"),
            other => return unfit(format!("it is an ELF file of type {}, not a shared object", other.0), REBUILD),
        }
        elf.is_complete = !file.elf_section_table().is_empty();
        let dynamic = file.elf_dynamic_table().map_err(malformed)?;
        for entry in dynamic.iter() {
            let list = match entry.tag {
                elf::DT_NEEDED => &mut elf.needed,
                elf::DT_RPATH | elf::DT_RUNPATH => &mut elf.search_paths,
                _ => continue,
            };
            list.push(String::from_utf8_lossy(dynamic.string(entry).map_err(malformed)?).into_owned());
        }
        for symbol in file.dynamic_symbols() {
            let Ok(name) = symbol.name() else { continue };
            if symbol.is_definition() {
                if name == LIBRARY_BIN {
                    let data = file
                        .sections()
                        .find_map(|section| behind(section.data().ok()?, section.address(), symbol.address()));
                    elf.embedded = Some(data.and_then(embedded_kinds).unwrap_or_default());
                }
                elf.defined.insert(name.to_owned());
            } else if symbol.is_undefined() && !symbol.is_weak() && !name.is_empty() {
                elf.undefined.insert(name.to_owned());
            }
        }
        for section in file.sections().filter(|section| is_of_fatbins(section.name())) {
            // What cannot be read is not judged.
            elf.targets.extend(section.data().map(targets).unwrap_or_default());
        }
        Ok(elf)
    }

    /// The names behind [`PREFIX`] of what it exports, in alphabetical order.
    pub(crate) fn tvm_ffi_exports(&self) -> impl Iterator<Item = &str> {
        self.defined.iter().filter_map(|symbol| symbol.strip_prefix(PREFIX))
    }

    /// The symbols of TVM-FFI that it needs.
    pub(crate) fn tvm_ffi_symbols(&self) -> impl Iterator<Item = &str> {
        let undefined = self.undefined.iter().map(String::as_str);
        undefined.filter(|symbol| symbol.starts_with(C_SYMBOLS) || symbol.contains(CXX_SYMBOLS))
    }

    /// A function that it needs and that registers something with TVM-FFI, perhaps while it is loaded.
    pub(crate) fn registering_symbol(&self) -> Option<&str> {
        self.tvm_ffi_symbols().find(|symbol| REGISTERING.iter().any(|start| symbol.starts_with(start)))
    }

    /// Whether its functions work only where TVM-FFI itself loads it.
    pub(crate) fn has_embedded(&self) -> bool {
        EMBEDDED.iter().any(|name| self.defined.contains(&format!("{PREFIX}{name}")))
    }

    /// The release of CUDA that the needed libraries imply, if any does.
    pub(crate) fn cuda_major(&self) -> Option<u32> {
        self.needed.iter().find_map(|name| cuda_major(name))
    }
}

/// What follows an address, of a section that lies at another one.
fn behind(data: &[u8], section: u64, address: u64) -> Option<&[u8]> {
    let offset = usize::try_from(address.checked_sub(section)?).ok()?;
    data.get(offset..).filter(|rest| !rest.is_empty() && section != 0)
}

/// The kinds of embedded modules, by what TVM-FFI writes: the size of what follows, the tree of imports as two lists of
/// numbers, and each module's kind, behind which its bytes are unless it is the library itself.
fn embedded_kinds(data: &[u8]) -> Option<Vec<String>> {
    const ITSELF: &str = "_lib";
    fn take<'a>(data: &mut &'a [u8], size: u64) -> Option<&'a [u8]> {
        let (taken, rest) = data.split_at_checked(usize::try_from(size).ok()?)?;
        *data = rest;
        Some(taken)
    }
    fn number(data: &mut &[u8]) -> Option<u64> {
        Some(u64::from_le_bytes(take(data, 8)?.first_chunk().copied()?))
    }
    let mut data = data;
    let size = number(&mut data)?;
    let mut data = take(&mut data, size)?;
    let starts = number(&mut data)?;
    take(&mut data, starts.checked_mul(8)?)?;
    let children = number(&mut data)?;
    take(&mut data, children.checked_mul(8)?)?;
    let mut kinds = Vec::new();
    for _ in 1..starts {
        let size = number(&mut data)?;
        let kind = String::from_utf8_lossy(take(&mut data, size)?).into_owned();
        if kind != ITSELF {
            let size = number(&mut data)?;
            take(&mut data, size)?;
        }
        kinds.push(kind);
    }
    Some(kinds)
}

fn is_of_fatbins(name: object::Result<&str>) -> bool {
    // The second holds code that is linked for the device when the library is made; it has been copied to the first by then.
    matches!(name, Ok(".nv_fatbin" | "__nv_relfatbin"))
}

/// That a file is an ELF of 64 bits; else what it seems to be.
fn refuse_what_is_no_elf<'data, R: ReadRef<'data>>(data: R) -> Result<(), Unfit> {
    const LONGEST: u64 = 64;
    let len = data.len().unwrap_or(0);
    let start = data.read_bytes_at(0, len.min(LONGEST)).unwrap_or_default();
    if let Some(rest) = start.strip_prefix(b"\x7fELF") {
        const CLASS_64: u8 = 2;
        return match rest.first() {
            Some(&CLASS_64) => Ok(()),
            Some(_) => unfit("it is an ELF file of 32 bits, and this program is one of 64", REBUILD),
            None => unfit(format!("it ends after {len} bytes"), "copy or build it again"),
        };
    }
    let (what, remedy) = match start {
        [] => ("an empty file", "copy or build it again"),
        _ if start.starts_with(b"version https://git-lfs") => (
            "a Git LFS pointer, which stands for the file itself",
            "fetch the file by `git lfs pull`, or name where it really lies",
        ),
        _ if start.starts_with(b"!<arch>") => ("an archive of object files", "link it with `-shared`"),
        _ if start.starts_with(b"MZ") => ("a program or library for Windows", REBUILD),
        [0xcf | 0xce, 0xfa, 0xed, 0xfe, ..] | [0xca, 0xfe, 0xba, 0xbe, ..] => ("a library for macOS", REBUILD),
        _ if start.starts_with(b"PK\x03\x04") => ("a zip archive, perhaps a wheel", "extract the library from it"),
        [0x1f, 0x8b, ..] => ("compressed (gzip)", "extract the library from it"),
        [0x50, 0xed, 0x55, 0xba, ..] => ("GPU code alone (a fatbin)", "name the library that launches it"),
        _ if start.starts_with(b"#!") => ("a script", "name the library that it stands for"),
        _ if start.trim_ascii_start().starts_with(b"<") => ("a page of HTML or XML", "download the file itself"),
        _ if start.trim_ascii_start().starts_with(b"{") => ("JSON", "name the library that belongs to it"),
        _ => {
            let first: String = start.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
            return unfit(format!("it is no ELF file: it begins with the bytes {first}"), "name a shared object");
        }
    };
    unfit(format!("it is {what}, not a shared object"), remedy)
}

/// The architectures of all GPU code in a section of fatbins, which lie one behind the other. Each has a header with its
/// size, and entries with headers of their own; zeros fill the space between them.
///
/// The layout is nowhere documented; it is what CUDA 12 and 13 write. Anything else ends the walk, and is not judged.
fn targets(section: &[u8]) -> BTreeSet<Target> {
    const MAGIC: u32 = 0xba55_ed50;
    const ALIGNMENT: usize = 8;
    let mut targets = BTreeSet::new();
    let mut at = 0;
    while let Some(magic) = word(section, at) {
        if magic != MAGIC {
            if magic != 0 {
                return targets;
            }
            at += ALIGNMENT;
            continue;
        }
        let (Some(header), Some(size)) = (half_word(section, at + 6), long_word(section, at + 8)) else {
            return targets;
        };
        let start = at + usize::from(header);
        let Some(end) = usize::try_from(size).ok().and_then(|size| start.checked_add(size)) else { return targets };
        let Some(entries) = section.get(start..end) else { return targets };
        entries_of(entries, &mut targets);
        let next = end.next_multiple_of(ALIGNMENT);
        if next <= at {
            return targets;
        }
        at = next;
    }
    targets
}

fn entries_of(entries: &[u8], targets: &mut BTreeSet<Target>) {
    const PTX: u16 = 1;
    const CUBIN: u16 = 2;
    const ARCHITECTURE: u64 = 1 << 20;
    const FAMILY: u64 = 1 << 21;
    let mut at = 0usize;
    // An entry's header: kind, version, size of the header, size of what follows, and further on architecture and flags.
    while let (Some(kind), Some(header), Some(size), Some(arch), Some(flags)) = (
        half_word(entries, at),
        word(entries, at + 4),
        long_word(entries, at + 8),
        word(entries, at + 28),
        long_word(entries, at + 40),
    ) {
        // Beyond this it is no architecture but something that is not understood here.
        const GREATEST: u32 = 999;
        if matches!(kind, PTX | CUBIN) && (1..=GREATEST).contains(&arch) {
            let limit = match flags {
                flags if flags & ARCHITECTURE != 0 => Limit::Architecture,
                flags if flags & FAMILY != 0 => Limit::Family,
                _ => Limit::None,
            };
            targets.insert(Target { ptx: kind == PTX, arch, limit });
        }
        let entry = usize::try_from(size).ok().and_then(|size| size.checked_add(header as usize));
        match entry.filter(|&entry| entry > 0).and_then(|entry| at.checked_add(entry)) {
            Some(next) if next < entries.len() => at = next,
            _ => return,
        }
    }
}

fn half_word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

fn long_word(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}
