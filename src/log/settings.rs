//! What the environment asks for.

use std::ffi::{CString, OsString};
use std::path::PathBuf;

use crate::error::{FlashInferError, Result};
use crate::settings::{
    DUMP_DIR, DUMP_EXCLUDE, DUMP_INCLUDE, DUMP_MAX_COUNT, DUMP_MAX_SIZE_GB, Given, LOGDEST, LOGLEVEL, TRACE_DUMP,
    Variable,
};

/// How much is logged of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    Nothing,
    Names,
    Arguments,
    Statistics,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Destination {
    Stdout,
    Stderr,
    /// Events of `tracing` alone.
    #[cfg(feature = "tracing")]
    Tracing,
    File(PathBuf),
}

/// Which calls are dumped, and where.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Dumps {
    pub(super) folder: PathBuf,
    /// None for all.
    pub(super) include: Vec<CString>,
    pub(super) exclude: Vec<CString>,
    pub(super) max_count: u64,
    pub(super) max_bytes: u64,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Settings {
    pub(super) level: Level,
    pub(super) destination: Destination,
    pub(super) dumps: Option<Dumps>,
    /// Where the definitions of what is called are written.
    pub(super) definitions: Option<PathBuf>,
}

impl Settings {
    /// Reads the variables.
    ///
    /// # Errors
    /// [`Setting`](FlashInferError::Setting).
    pub(crate) fn read() -> Result<Self> {
        Self::read_from(&|name| std::env::var_os(name))
    }

    fn read_from(environment: &impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let given = |variable: &Variable| variable.read_from(environment);
        let (level, dumping) = given(&LOGLEVEL).map_or(Ok((Level::Nothing, false)), |given| level(&given))?;
        let destination = given(&LOGDEST).map_or(Ok(Destination::Stdout), |given| destination(&given))?;
        let include = given(&DUMP_INCLUDE).map_or(Vec::new(), |given| patterns(&given));
        let exclude = given(&DUMP_EXCLUDE).map_or(Vec::new(), |given| patterns(&given));
        let max_count = given(&DUMP_MAX_COUNT).map_or(Ok(1000), |given| {
            text(&given).and_then(|text| text.parse().ok()).ok_or_else(|| refuse(&DUMP_MAX_COUNT, &given))
        })?;
        let max_gib = given(&DUMP_MAX_SIZE_GB).map_or(Ok(20.0), |given| {
            let number = text(&given).and_then(|text| text.parse::<f64>().ok());
            number.filter(|gib| *gib >= 0.0).ok_or_else(|| refuse(&DUMP_MAX_SIZE_GB, &given))
        })?;
        // FlashInfer's folder alone asks for nothing, there as here.
        let folder = given(&DUMP_DIR).filter(|given| dumping || given.variable == DUMP_DIR.name);
        let folder = folder.map(|given| PathBuf::from(given.value));
        let folder = folder.or_else(|| dumping.then(|| PathBuf::from("flashinfer_dumps")));
        // Saturates: more than 2^64 bytes are no limit.
        let max_bytes = (max_gib * f64::from(1 << 30)) as u64;
        let dumps = folder.map(|folder| Dumps { folder, include, exclude, max_count, max_bytes });
        let definitions = given(&TRACE_DUMP).map(|given| PathBuf::from(given.value));
        Ok(Self { level, destination, dumps, definitions })
    }

    /// Whether anything is asked for.
    pub(crate) fn ask_for_anything(&self) -> bool {
        self.level > Level::Nothing || self.dumps.is_some() || self.definitions.is_some()
    }
}

fn text(given: &Given) -> Option<&str> {
    given.value.to_str().map(str::trim)
}

#[cold]
fn refuse(variable: &Variable, given: &Given) -> FlashInferError {
    let found = given.value.to_string_lossy().into_owned();
    FlashInferError::Setting { variable: given.variable, found, expected: variable.values }
}

/// The level, and whether it asks for dumps.
fn level(given: &Given) -> Result<(Level, bool)> {
    let number = text(given).and_then(|text| text.parse::<i64>().ok());
    let known = [(10, Level::Statistics), (5, Level::Statistics), (3, Level::Arguments), (1, Level::Names)];
    let number = number.ok_or_else(|| refuse(&LOGLEVEL, given))?;
    // FlashInfer takes any whole number for its variable, and does what the next lower level does.
    let exact = given.variable == LOGLEVEL.name;
    match known.into_iter().find(|&(least, _)| number >= least) {
        Some((least, level)) if !exact || number == least => Ok((level, least == 10)),
        None if !exact || number == 0 => Ok((Level::Nothing, false)),
        _ => Err(refuse(&LOGLEVEL, given)),
    }
}

fn destination(given: &Given) -> Result<Destination> {
    Ok(match given.value.as_encoded_bytes() {
        b"stdout" => Destination::Stdout,
        b"stderr" => Destination::Stderr,
        #[cfg(feature = "tracing")]
        b"tracing" => Destination::Tracing,
        #[cfg(not(feature = "tracing"))]
        b"tracing" => return Err(refuse(&LOGDEST, given)),
        path => {
            // SAFETY: these are the value's own bytes, with ASCII digits in the place of ASCII characters.
            let path = unsafe { OsString::from_encoded_bytes_unchecked(of_process(path)) };
            Destination::File(PathBuf::from(path))
        }
    })
}

/// With the process's number in the place of each `%i`.
fn of_process(path: &[u8]) -> Vec<u8> {
    let (mut out, mut rest) = (Vec::new(), path);
    while let Some((&first, behind)) = rest.split_first() {
        match rest.strip_prefix(b"%i") {
            Some(behind) => {
                out.extend_from_slice(std::process::id().to_string().as_bytes());
                rest = behind;
            }
            None => {
                out.push(first);
                rest = behind;
            }
        }
    }
    out
}

fn patterns(given: &Given) -> Vec<CString> {
    let parts = given.value.as_encoded_bytes().split(|&byte| byte == b',').map(<[u8]>::trim_ascii);
    // A variable has no zero byte.
    parts.filter(|part| !part.is_empty()).filter_map(|part| CString::new(part).ok()).collect()
}

impl Dumps {
    /// Whether a kernel of this name is dumped.
    #[cfg(unix)]
    pub(super) fn wants(&self, kernel: &str) -> bool {
        let Ok(kernel) = CString::new(kernel) else { return false };
        let matches = |pattern: &CString| {
            // SAFETY: both are C strings, which the function only reads.
            (unsafe { libc::fnmatch(pattern.as_ptr(), kernel.as_ptr(), libc::FNM_NOESCAPE) }) == 0
        };
        (self.include.is_empty() || self.include.iter().any(matches)) && !self.exclude.iter().any(matches)
    }

    /// No kernel ever runs there.
    #[cfg(not(unix))]
    pub(super) fn wants(&self, _: &str) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Settings> {
        Settings::read_from(&|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(*value))
        })
    }

    #[test]
    fn nothing_is_asked_for_where_nothing_is_set() {
        for variables in [&[][..], &[("FLASHINFER_RS_LOGLEVEL", "")], &[("FLASHINFER_DUMP_DIR", "x")]] {
            let settings = read(variables).unwrap();
            assert!(!settings.ask_for_anything() && settings.destination == Destination::Stdout);
        }
    }

    #[test]
    fn each_level_is_taken_and_no_other() {
        let level = |value| read(&[("FLASHINFER_RS_LOGLEVEL", value)]).map(|settings| settings.level);
        let levels = ["0", "1", "3", "5", " 10 "].map(|value| level(value).unwrap());
        assert_eq!(levels[..4], [Level::Nothing, Level::Names, Level::Arguments, Level::Statistics]);
        assert_eq!(levels[4], Level::Statistics);
        for bad in ["2", "-1", "debug", "3.0", "99999999999999999999"] {
            let error = level(bad).unwrap_err().to_string();
            assert!(error.contains("FLASHINFER_RS_LOGLEVEL is \"") && error.contains(bad), "{error}");
            assert!(error.contains("0 (nothing), 1 (names)"), "{error}");
        }
    }

    #[test]
    fn flashinfers_variables_are_taken_where_ours_are_not_set() {
        let theirs =
            [("FLASHINFER_LOGLEVEL", "4"), ("FLASHINFER_LOGDEST", "stderr"), ("FLASHINFER_DUMP_DIR", "theirs")];
        let settings = read(&theirs).unwrap();
        // As FlashInfer does with a level between two.
        assert_eq!((settings.level, settings.destination), (Level::Arguments, Destination::Stderr));
        assert_eq!(settings.dumps, None);
        let ours = [theirs[0], ("FLASHINFER_RS_LOGLEVEL", "1"), theirs[1], ("FLASHINFER_RS_LOGDEST", "stdout")];
        let settings = read(&ours).unwrap();
        assert_eq!((settings.level, settings.destination), (Level::Names, Destination::Stdout));
        let error = read(&[("FLASHINFER_LOGLEVEL", "on")]).unwrap_err().to_string();
        assert!(error.contains("FLASHINFER_LOGLEVEL is \"on\""), "{error}");
    }

    #[test]
    fn level_10_dumps_into_the_folder_that_is_named_or_flashinfers_usual_one() {
        let folder = |variables: &[_]| read(variables).unwrap().dumps.unwrap().folder;
        let ten = ("FLASHINFER_LOGLEVEL", "10");
        assert_eq!(folder(&[ten]), PathBuf::from("flashinfer_dumps"));
        assert_eq!(folder(&[ten, ("FLASHINFER_DUMP_DIR", "a")]), PathBuf::from("a"));
        assert_eq!(folder(&[ten, ("FLASHINFER_DUMP_DIR", "a"), ("FLASHINFER_RS_DUMP_DIR", "b")]), PathBuf::from("b"));
        assert_eq!(folder(&[("FLASHINFER_RS_DUMP_DIR", "b")]), PathBuf::from("b"));
    }

    #[test]
    fn a_files_name_may_have_the_process_in_it() {
        let settings = read(&[("FLASHINFER_RS_LOGDEST", "%i/a%i%%i.log%")]).unwrap();
        let id = std::process::id();
        assert_eq!(settings.destination, Destination::File(format!("{id}/a{id}%{id}.log%").into()));
    }

    #[test]
    fn patterns_choose_kernels() {
        let dumps = |include, exclude| {
            let set = |name, value: &'static str| (name, value);
            let variables = [
                set("FLASHINFER_RS_DUMP_DIR", "d"),
                set("FLASHINFER_RS_DUMP_INCLUDE", include),
                set("FLASHINFER_RS_DUMP_EXCLUDE", exclude),
            ];
            let dumps = read(&variables).unwrap().dumps.unwrap();
            ["rmsnorm", "gemma_rmsnorm", "gdn_prefill"].map(|kernel| dumps.wants(kernel))
        };
        assert_eq!(dumps("", ""), [true, true, true]);
        assert_eq!(dumps("*norm", ""), [true, true, false]);
        assert_eq!(dumps(" gdn_*, rmsnorm ,", ""), [true, false, true]);
        assert_eq!(dumps("", "*norm*,nothing"), [false, false, true]);
        assert_eq!(dumps("*", "gemma?rmsnor[mn]"), [true, false, true]);
        assert_eq!(dumps("[", ""), [false, false, false]);
    }

    #[test]
    fn what_is_no_limit_is_refused_by_its_name() {
        for (variable, bad) in [
            ("FLASHINFER_RS_DUMP_MAX_COUNT", "-1"),
            ("FLASHINFER_RS_DUMP_MAX_COUNT", "many"),
            ("FLASHINFER_RS_DUMP_MAX_SIZE_GB", "NaN"),
            ("FLASHINFER_DUMP_MAX_SIZE_GB", "-0.5"),
        ] {
            let error = read(&[(variable, bad)]).unwrap_err().to_string();
            assert!(error.contains(variable) && error.contains(bad) && error.contains("0 or more"), "{error}");
        }
        let limits = [("FLASHINFER_RS_DUMP_DIR", "d"), ("FLASHINFER_RS_DUMP_MAX_SIZE_GB", "0.5")];
        assert_eq!(read(&limits).unwrap().dumps.unwrap().max_bytes, 1 << 29);
    }

    #[cfg(not(feature = "tracing"))]
    #[test]
    fn events_alone_need_the_feature() {
        let error = read(&[("FLASHINFER_RS_LOGDEST", "tracing")]).unwrap_err().to_string();
        assert!(error.contains("with the feature `tracing`"), "{error}");
    }
}
