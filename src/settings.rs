//! The variables of the environment that a running program reads: one table.

use std::ffi::OsString;
use std::fmt;

/// A variable.
pub(crate) struct Variable {
    pub(crate) name: &'static str,
    /// FlashInfer's own variable, which is taken where ours is not set.
    pub(crate) upstream: Option<&'static str>,
    /// The values that it may have.
    pub(crate) values: &'static str,
    /// What it does, for the documentation.
    #[cfg_attr(not(test), allow(dead_code, reason = "a test holds the documentation against it"))]
    pub(crate) effect: &'static str,
}

/// What a variable is set to.
pub(crate) struct Given {
    /// The one of the two that is set.
    pub(crate) variable: &'static str,
    pub(crate) value: OsString,
}

macro_rules! variables {
    ($($constant:ident = $name:literal, $upstream:expr, $values:literal, $effect:literal;)*) => {
        $(pub(crate) const $constant: Variable =
            Variable { name: $name, upstream: $upstream, values: $values, effect: $effect };)*

        /// All of them, in the order of the documentation.
        #[cfg(test)]
        const ALL: &[Variable] = &[$($constant),*];
    };
}

variables! {
    LIB_DIR = "FLASHINFER_RS_LIB_DIR", None, "a folder",
        "load the libraries from here; they are still checked against what was vendored";
    LOGLEVEL = "FLASHINFER_RS_LOGLEVEL", Some("FLASHINFER_LOGLEVEL"),
        "0 (nothing), 1 (names), 3 (arguments), 5 (what tensors hold) or 10 (5, and dumps)",
        "how much is logged of each call; 0 where it is not set";
    LOGDEST = "FLASHINFER_RS_LOGDEST", Some("FLASHINFER_LOGDEST"),
        "stdout, stderr, tracing (with the feature `tracing`) or a file, in whose name %i becomes the process id",
        "where logs go; stdout where it is not set";
    DUMP_DIR = "FLASHINFER_RS_DUMP_DIR", Some("FLASHINFER_DUMP_DIR"), "a folder",
        "dump the inputs and outputs of each call below this folder; FlashInfer's variable only says where, at level 10";
    DUMP_INCLUDE = "FLASHINFER_RS_DUMP_INCLUDE", Some("FLASHINFER_DUMP_INCLUDE"),
        "patterns of kernels' names with commas between them, in which * is any text, ? one character and [ab] a choice",
        "dump only these kernels; all where it is not set";
    DUMP_EXCLUDE = "FLASHINFER_RS_DUMP_EXCLUDE", Some("FLASHINFER_DUMP_EXCLUDE"), "patterns as for including",
        "do not dump these kernels";
    DUMP_MAX_COUNT = "FLASHINFER_RS_DUMP_MAX_COUNT", Some("FLASHINFER_DUMP_MAX_COUNT"), "a whole number, 0 or more",
        "the most dumps of a process; 1000 where it is not set";
    DUMP_MAX_SIZE_GB = "FLASHINFER_RS_DUMP_MAX_SIZE_GB", Some("FLASHINFER_DUMP_MAX_SIZE_GB"),
        "a number of GiB, 0 or more",
        "how large a process's dumps may become together; 20 where it is not set";
    TRACE_DUMP = "FLASHINFER_RS_TRACE_DUMP", None, "a folder",
        "write the definition of every kernel that is called into this folder; takes the feature `bench`";
}

impl Variable {
    /// What it is set to: ours, else FlashInfer's. An empty value is none.
    pub(crate) fn read(&self) -> Option<Given> {
        self.read_from(&|name| std::env::var_os(name))
    }

    pub(crate) fn read_from(&self, environment: &impl Fn(&str) -> Option<OsString>) -> Option<Given> {
        [Some(self.name), self.upstream].into_iter().flatten().find_map(|variable| {
            let value = environment(variable).filter(|value| !value.is_empty())?;
            Some(Given { variable, value })
        })
    }
}

impl fmt::Display for Variable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_has_every_variable_of_a_running_program() {
        let mut table = String::from("| variable | values | effect |\n|---|---|---|\n");
        for Variable { name, values, effect, .. } in ALL {
            table += &format!("| `{name}` | {values} | {effect} |\n");
        }
        let page = include_str!("../docs/logging.md");
        assert!(page.contains(&table), "docs/logging.md should have this table:\n{table}");
        for Variable { name, upstream, .. } in ALL {
            // One rule, which the page states once.
            assert!(upstream.is_none_or(|upstream| upstream == name.replace("_RS", "")), "{name}");
        }
    }
}
