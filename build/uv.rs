//! What uv's own files say of indexes: those of the user and of the system. A project's, `uv.toml` or `pyproject.toml`, are those
//! of a Python project, which this build is no part of.

use std::path::{Path, PathBuf};

use toml::de::DeValue;

use super::env::{Env, Named};
use super::error::{Error, Result, refuse};
use super::store::read_text;
use super::table::{Fault, Parsed, Table, flag, text, texts};

/// Without which uv reads none of its files, and this build neither.
const NO_CONFIG: &str = "UV_NO_CONFIG";
/// The one file that is read instead of all others.
const CONFIG_FILE: &str = "UV_CONFIG_FILE";
/// What is set and has no effect here, and why that may be what is wrong where an index cannot be used.
const UNHEEDED: [(&str, &str); 2] = [
    ("allow-insecure-host", "certificates are always checked"),
    ("keyring-provider", "no keyring is asked: give user and password in the index's address or in netrc"),
];

/// What uv is told, all files together: of lists the user's come first, and of what there is one of the user's counts.
#[derive(Default)]
pub struct Uv {
    /// The index in the default one's place.
    pub default: Option<Index>,
    /// Those that are asked before it.
    pub further: Vec<Index>,
    /// Folders, and pages of links.
    pub links: Vec<Named>,
    /// Whether no index is to be asked, and what says so.
    no_index: Option<(bool, String)>,
    unheeded: Vec<String>,
}

/// An index, and what its user and password are looked for by.
#[derive(Clone)]
pub struct Index {
    pub label: Option<String>,
    pub address: Named,
}

/// An index as it is written.
struct Entry {
    name: Option<String>,
    url: String,
    default: bool,
    /// Asked only for packages that a project takes from it.
    explicit: bool,
    /// A page of links, and no index.
    flat: bool,
}

impl Entry {
    fn of(mut table: Table<'_>) -> Parsed<Self> {
        // What else there is, of caches and publishing for example, is uv's own affair.
        Ok(Self {
            name: table.optional("name", text)?,
            url: table.required("url", text)?,
            default: table.optional("default", flag)?.unwrap_or_default(),
            explicit: table.optional("explicit", flag)?.unwrap_or_default(),
            flat: table.optional("format", text)?.is_some_and(|format| format == "flat"),
        })
    }
}

/// The settings of one table: the file's, or that of `uv pip`.
#[derive(Default)]
struct Settings {
    index_url: Option<String>,
    extra: Vec<String>,
    indexes: Vec<Entry>,
    links: Vec<String>,
    no_index: Option<bool>,
    unheeded: Vec<String>,
}

impl Settings {
    fn of(table: &mut Table<'_>) -> Parsed<Self> {
        let unheeded = |table: &mut Table<'_>, (key, why): (&'static str, &str)| {
            let is_set = table.optional(key, |value| Ok(!is_off(&value)))?.unwrap_or_default();
            Ok(is_set.then(|| format!("{key} {{}} has no effect here: {why}")))
        };
        let mut told = Vec::new();
        for one in UNHEEDED {
            told.extend(unheeded(table, one)?);
        }
        Ok(Self {
            index_url: table.optional("index-url", text)?,
            extra: table.optional("extra-index-url", texts)?.unwrap_or_default(),
            indexes: table.optional_tables("index", Entry::of)?.unwrap_or_default(),
            links: table.optional("find-links", texts)?.unwrap_or_default(),
            no_index: table.optional("no-index", flag)?,
            unheeded: told,
        })
    }
}

/// Whether a setting that is there turns nothing on.
fn is_off(value: &DeValue<'_>) -> bool {
    match value {
        DeValue::String(text) => text == "disabled",
        DeValue::Array(all) => all.is_empty(),
        _ => false,
    }
}

impl Uv {
    pub fn read(env: &Env) -> Result<Self> {
        let mut all = Self::default();
        for path in files_of(env)? {
            let file = match read_text(&path) {
                Ok(file) => file,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound && env.path(CONFIG_FILE).is_none() => continue,
                Err(e) => return Err(Error::io("reading uv's configuration,", &path, &e)),
            };
            match parse(&file) {
                // Those of `uv pip` are for what is installed by hand, as wheels are here.
                Ok([own, pip]) => {
                    all.add(&path, pip);
                    all.add(&path, own);
                }
                Err(fault) => refuse!(
                    "uv's configuration {} is malformed: {fault}; correct it, or set {NO_CONFIG}=1, which ignores it",
                    path.display()
                ),
            }
        }
        Ok(all)
    }

    /// Adds what is weaker than what is there.
    fn add(&mut self, path: &Path, settings: Settings) {
        let named = |value: String, key: &str| Named { value, from: format!("{key} in {}", path.display()) };
        let Settings { index_url, extra, indexes, links, no_index, unheeded } = settings;
        for Entry { name: label, url, default, explicit, flat } in indexes {
            let index = Index { label, address: named(url, "an [[index]]") };
            match () {
                () if explicit => {}
                () if flat => self.links.push(index.address),
                () if !default => self.further.push(index),
                () => self.default = self.default.take().or(Some(index)),
            }
        }
        let plain = |url: String, key: &str| Index { label: None, address: named(url, key) };
        self.further.extend(extra.into_iter().map(|url| plain(url, "extra-index-url")));
        self.links.extend(links.into_iter().map(|link| named(link, "find-links")));
        self.default = self.default.take().or_else(|| Some(plain(index_url?, "index-url")));
        self.no_index = self.no_index.take().or_else(|| Some((no_index?, format!("no-index in {}", path.display()))));
        let shown = format!("in {}", path.display());
        self.unheeded.extend(unheeded.into_iter().map(|text| format!(" ({})", text.replace("{}", &shown))));
    }

    /// What says that no index is to be asked.
    pub fn no_index(&self) -> Option<Named> {
        let (_, from) = self.no_index.as_ref().filter(|(is_on, _)| *is_on)?;
        Some(Named { value: "true".to_owned(), from: from.clone() })
    }

    /// What is set and has no effect here, to be told where an index cannot be used.
    pub fn unheeded(&self) -> String {
        self.unheeded.concat()
    }
}

/// The file's own settings, and those of its table `pip`.
fn parse(file: &str) -> std::result::Result<[Settings; 2], String> {
    let read = || {
        let mut root = Table::parse(file)?;
        let pip = root.optional_table("pip", |mut table| Settings::of(&mut table))?.unwrap_or_default();
        Ok([Settings::of(&mut root)?, pip])
    };
    read().map_err(|fault: Fault| fault.in_text(file))
}

/// The files that uv would read outside of any project, strongest first.
fn files_of(env: &Env) -> Result<Vec<PathBuf>> {
    if env.flag(NO_CONFIG) {
        return Ok(Vec::new());
    }
    if let Some(path) = env.path(CONFIG_FILE) {
        if !path.is_absolute() {
            refuse!("{CONFIG_FILE}={} is not an absolute path; correct or unset it", path.display());
        }
        return Ok(vec![path]);
    }
    let absolute = |path: &PathBuf| path.is_absolute();
    let home = || Some(env.path("HOME").filter(absolute)?.join(".config"));
    let users = env.path("XDG_CONFIG_HOME").filter(absolute).or_else(home);
    let dirs = env.os("XDG_CONFIG_DIRS").unwrap_or_else(|| "/etc/xdg".into());
    let systems: Vec<PathBuf> = std::env::split_paths(&dirs).filter(absolute).chain(["/etc".into()]).collect();
    let file = |folder: PathBuf| folder.join("uv").join("uv.toml");
    let of_system = systems.into_iter().map(file).find(|path| path.is_file());
    Ok(users.map(file).into_iter().chain(of_system).collect())
}

/// What a project's files beside the user's workspace say, where they say something: they are not heeded, which is told where
/// an index cannot be used.
pub fn of_project(workspace: Option<&Path>) -> String {
    let Some(folder) = workspace else { return String::new() };
    let files = [folder.join("uv.toml"), folder.join("pyproject.toml")];
    let speaks = |path: &&PathBuf| {
        let text = read_text(path).unwrap_or_default();
        let lines = || text.lines().map(str::trim_start);
        !text.is_empty()
            && (path.ends_with("uv.toml") || lines().any(|line| line.trim_start_matches('[').starts_with("tool.uv")))
    };
    let told = |path: &PathBuf| {
        format!(
            " ({} has no effect here: it is of a Python project; give its indexes by UV_INDEX and UV_DEFAULT_INDEX, or in the \
             user's uv.toml)",
            path.display()
        )
    };
    files.iter().find(speaks).map(told).unwrap_or_default()
}
