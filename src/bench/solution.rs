//! How a definition is implemented: sources, and what they are built with.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::{Component, Path, PathBuf};

use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};

use super::Dialect;
use super::definition::{field, optional_text, text, write};
use super::error::read;
use super::json::{Cursor, Document, Json, MAX_BYTES, shortened};
use crate::error::Result;

/// How a dependency names a module that this crate vendors.
const VENDORED: &str = "flashinfer-rs:";

/// Declares an enum of words.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)*
        }

        impl $name {
            const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The word that files have for it.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)*
                }
            }

            pub(super) fn read(cursor: &$crate::bench::json::Cursor<'_>) -> $crate::error::Result<Self> {
                let word = cursor.text()?;
                Self::ALL.iter().copied().find(|known| known.name() == word).ok_or_else(|| {
                    let known: Vec<_> = Self::ALL.iter().map(|known| known.name()).collect();
                    let found = format!("{:?}", $crate::bench::json::shortened(&word));
                    cursor.refuse(found, format!("one of {known:?}"), "correct the word")
                })
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}
pub(super) use words;

words! {
    /// What a solution is written in.
    Language {
        /// Python.
        Python = "python",
        /// Triton.
        Triton = "triton",
        /// C++ for the host.
        Cpp = "cpp",
        /// CUDA C++.
        Cuda = "cuda",
        /// TileLang.
        TileLang = "tilelang",
        /// CuTe in Python. FlashInfer's dialect alone has it.
        CuteDsl = "cutedsl",
        /// CUTLASS in C++. FlashInfer's dialect alone has it.
        Cutlass = "cutlass",
        /// cuTile in Python. FlashInfer's dialect alone has it.
        CuTile = "cutile",
    }
}

words! {
    /// What a compiled solution exports its function through.
    Binding {
        /// TVM-FFI, which this crate calls.
        TvmFfi = "tvm-ffi",
        /// PyTorch's extensions, which need Python.
        Torch = "torch",
    }
}

impl Language {
    /// Whether it is compiled to a library that needs no Python.
    pub fn is_compiled(self) -> bool {
        matches!(self, Self::Cpp | Self::Cuda | Self::Cutlass)
    }

    fn is_benchmarked(self) -> bool {
        matches!(self, Self::Python | Self::Triton | Self::Cpp | Self::Cuda | Self::TileLang)
    }
}

/// A file of a solution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFile {
    /// Its relative path.
    pub path: String,
    /// Its text.
    pub content: String,
}

/// What a solution is built with, and how it is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildSpec {
    /// What it is written in.
    pub language: Language,
    /// What it runs on, in free words: `cuda`, `NVIDIA_H100`, `sm100`.
    pub target_hardware: Vec<String>,
    /// `FILE::FUNCTION`: a source and the function to call.
    pub entry_point: String,
    /// Libraries it wants.
    pub dependencies: Vec<String>,
    /// Whether outputs are arguments, behind the inputs, instead of results. `None` where the file does not say, which means
    /// another thing in each [dialect](Self::is_destination_passing).
    pub destination_passing_style: Option<bool>,
    /// What the function is exported through; TVM-FFI where the file does not say.
    pub binding: Option<Binding>,
}

impl BuildSpec {
    /// Whether outputs are arguments. A file that does not say means yes in FlashInfer-Bench, and no in FlashInfer.
    pub fn is_destination_passing(&self, dialect: Dialect) -> bool {
        self.destination_passing_style.unwrap_or(dialect == Dialect::FlashInferBench)
    }

    /// The entry point's file.
    pub fn entry_file(&self) -> &str {
        self.entry_point.split_once("::").map_or("", |(file, _)| file)
    }

    /// The entry point's function: exported as `__tvm_ffi_` and this.
    pub fn entry_symbol(&self) -> &str {
        self.entry_point.split_once("::").map_or("", |(_, symbol)| symbol)
    }

    fn read(cursor: &Cursor<'_>) -> Result<Self> {
        let targets = cursor.need("target_hardware")?;
        let target_hardware = targets.items()?.iter().map(Cursor::text).collect::<Result<Vec<_>>>()?;
        if target_hardware.is_empty() {
            return Err(targets.refuse("an empty list", "a piece of hardware", "name what it runs on"));
        }
        let entry = cursor.need("entry_point")?;
        let entry_point = entry.word()?;
        let whole = entry_point.split_once("::").is_some_and(|(file, symbol)| {
            !file.is_empty() && !symbol.is_empty() && !symbol.contains("::") && !symbol.contains('\0')
        });
        if !whole {
            let found = format!("{:?}", shortened(&entry_point));
            return Err(entry.refuse(found, "FILE::FUNCTION", "name a source and its function"));
        }
        Ok(Self {
            language: Language::read(&cursor.need("language")?)?,
            target_hardware,
            entry_point,
            dependencies: cursor.get("dependencies").map_or(Ok(Vec::new()), |list| list.words())?,
            destination_passing_style: cursor.get("destination_passing_style").map(|flag| flag.flag()).transpose()?,
            binding: cursor.given("binding").map(|word| Binding::read(&word)).transpose()?,
        })
    }

    fn json(&self) -> Json {
        let words = |words: &[String]| Json::List(words.iter().map(|word| text(word)).collect());
        let mut fields = vec![
            field("language", text(self.language.name())),
            field("target_hardware", words(&self.target_hardware)),
            field("entry_point", text(&self.entry_point)),
            field("dependencies", words(&self.dependencies)),
        ];
        fields.extend(self.destination_passing_style.map(|flag| field("destination_passing_style", Json::Bool(flag))));
        fields.extend(self.binding.map(|binding| field("binding", text(binding.name()))));
        Json::Object(fields)
    }
}

/// Which of upstream's hashes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum HashRule {
    /// FlashInfer-Bench up to 0.1.2: SHA-1 with the solution's name.
    Named,
    /// FlashInfer-Bench after 0.1.2: SHA-1 without the name.
    Nameless,
    /// FlashInfer: SHA-256, of the targets and the calling style too, whatever the sources' order.
    FlashInfer,
}

/// An implementation of a definition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Solution {
    /// Its name, which no other solution has.
    pub name: String,
    /// The definition's name.
    pub definition: String,
    /// Who wrote it. What `baseline` wrote is what others are measured against.
    pub author: String,
    /// What it is built with.
    pub spec: BuildSpec,
    /// Its files.
    pub sources: Vec<SourceFile>,
    /// What it does.
    pub description: Option<String>,
}

impl Solution {
    /// Reads one of either dialect.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) for what is no JSON, lacks a field or has one of another type; for an entry point
    /// that is not `FILE::FUNCTION` of one of the sources; and for sources outside of the solution's folder, or twice in the
    /// same place.
    pub fn from_json(json: &str) -> Result<Self> {
        Self::parse("the solution", json.as_bytes())
    }

    /// As [`from_json`](Self::from_json), of a file.
    ///
    /// # Errors
    /// Also [`Io`](crate::FlashInferError::Io).
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::parse(&path.display().to_string(), &read(path, MAX_BYTES)?)
    }

    fn parse(file: &str, bytes: &[u8]) -> Result<Self> {
        let document = Document::parse(file, bytes, 1)?;
        let root = document.root();
        let spec_at = root.need("spec")?;
        let spec = BuildSpec::read(&spec_at)?;
        let list = root.need("sources")?;
        let (mut sources, mut places) = (Vec::new(), HashSet::new());
        for source in list.items()? {
            let place = source.need("path")?;
            let path = place.word()?;
            let inside = inside(&path).ok_or_else(|| {
                let found = format!("{:?}", shortened(&path));
                place.refuse(found, "a relative path without `..`", "keep sources in the solution's folder")
            })?;
            if !places.insert(inside) {
                let found = format!("{:?} a second time", shortened(&path));
                return Err(place.refuse(found, "each file once", "remove or rename one of them"));
            }
            sources.push(SourceFile { path, content: source.need("content")?.word()? });
        }
        if sources.is_empty() {
            return Err(list.refuse("an empty list", "a source", "add the sources"));
        }
        if !sources.iter().any(|source| source.path == spec.entry_file()) {
            let found = format!("{:?}", shortened(spec.entry_file()));
            return Err(spec_at.refuse(found, "an entry point in one of the sources", "correct the path"));
        }
        Ok(Self {
            name: root.need("name")?.word()?,
            definition: root.need("definition")?.word()?,
            author: root.need("author")?.word()?,
            spec,
            sources,
            description: optional_text(&root, "description")?,
        })
    }

    /// As upstream writes one: on many lines, with what is set.
    pub fn to_json(&self) -> String {
        let source = |source: &SourceFile| {
            Json::Object(vec![field("path", text(&source.path)), field("content", text(&source.content))])
        };
        let mut fields = vec![
            field("name", text(&self.name)),
            field("definition", text(&self.definition)),
            field("author", text(&self.author)),
            field("spec", self.spec.json()),
            field("sources", Json::List(self.sources.iter().map(source).collect())),
        ];
        fields.extend(self.description.as_deref().map(|words| field("description", text(words))));
        Json::Object(fields).pretty()
    }

    /// Writes it into a file, whose folder is made.
    ///
    /// # Errors
    /// [`Io`](crate::FlashInferError::Io).
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        write(path.as_ref(), &self.to_json())
    }

    /// Whether this crate can run it once it is built: compiled, and exported through TVM-FFI.
    pub fn is_native(&self) -> bool {
        self.spec.language.is_compiled() && self.spec.binding != Some(Binding::Torch)
    }

    /// The module that this crate vendors, `gdn_prefill_sm90` for example, where the solution is one of its kernels and nothing
    /// to be built: a dependency `flashinfer-rs:MODULE` says so. The entry point's function is the module's.
    pub fn vendored_module(&self) -> Option<&str> {
        self.spec.dependencies.iter().find_map(|dependency| dependency.strip_prefix(VENDORED))
    }

    /// The stricter of the dialects that have its language.
    pub fn dialect(&self) -> Dialect {
        if self.spec.language.is_benchmarked() { Dialect::FlashInferBench } else { Dialect::FlashInfer }
    }

    /// Upstream's hash, in hexadecimal. It is no proof of what was built: neither of FlashInfer-Bench's two has the calling
    /// style or the targets in it, and no text is told apart from the next.
    pub fn hash(&self, rule: HashRule) -> String {
        let mut context = Context::new(match rule {
            HashRule::Named | HashRule::Nameless => &SHA1_FOR_LEGACY_USE_ONLY,
            HashRule::FlashInfer => &SHA256,
        });
        let spec = &self.spec;
        if rule == HashRule::Named {
            context.update(self.name.as_bytes());
        }
        let binding = spec.binding.map_or("", Binding::name);
        for part in [&self.definition, spec.language.name(), &spec.entry_point, binding] {
            context.update(part.as_bytes());
        }
        let mut sources: Vec<_> = self.sources.iter().collect();
        if rule == HashRule::FlashInfer {
            spec.target_hardware.iter().for_each(|target| context.update(target.as_bytes()));
            context.update(if spec.is_destination_passing(Dialect::FlashInfer) { b"1" } else { b"0" });
            // As Python sorts: by code points, as UTF-8 does.
            sources.sort_by(|a, b| a.path.cmp(&b.path));
        }
        spec.dependencies.iter().for_each(|dependency| context.update(dependency.as_bytes()));
        for source in sources {
            context.update(source.path.as_bytes());
            context.update(source.content.as_bytes());
        }
        let digest = context.finish();
        digest.as_ref().iter().fold(String::new(), |mut hex, byte| {
            _ = write!(hex, "{byte:02x}");
            hex
        })
    }

    /// What FlashInfer-Bench calls what it builds of it: `tvm_ffi_`, the name in letters, digits and underscores, and the
    /// beginning of the hash.
    pub fn package_name(&self, rule: HashRule) -> String {
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '_' { c } else { '_' };
        let mut name: String = self.name.chars().map(plain).collect();
        if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
            name.insert(0, '_');
        }
        format!("tvm_ffi_{name}_{}", &self.hash(rule)[..6])
    }

    /// The same solution by a name that its contents are in, as FlashInfer-Bench after 0.1.2 makes one: the name, and the
    /// beginning of the [nameless](HashRule::Nameless) hash.
    pub fn with_unique_name(&self) -> Self {
        Self { name: format!("{}_{}", self.name, &self.hash(HashRule::Nameless)[..8]), ..self.clone() }
    }

    /// Writes the sources into a folder, and answers their paths there.
    ///
    /// # Errors
    /// [`Io`](crate::FlashInferError::Io); [`Data`](crate::FlashInferError::Data) for a path that leads out of the folder.
    pub fn write_sources(&self, folder: impl AsRef<Path>) -> Result<Vec<PathBuf>> {
        let folder = folder.as_ref();
        self.sources
            .iter()
            .map(|source| {
                let path = folder.join(super::inputs::within(&source.path)?);
                write(&path, &source.content)?;
                Ok(path)
            })
            .collect()
    }
}

/// A path without its dots; `None` where it leads out of its folder, or nowhere.
fn inside(path: &str) -> Option<PathBuf> {
    let mut inside = PathBuf::new();
    for part in Path::new(path).components() {
        match part {
            Component::Normal(name) => inside.push(name),
            Component::CurDir => {}
            _ => return None,
        }
    }
    (inside.file_name().is_some() && !path.contains('\0')).then_some(inside)
}
