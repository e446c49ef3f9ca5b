//! `kernel_metadata.txt`, which FlashInfer-Bench hands out beside a kernel: a line for each thing, its name ahead of a colon. `cargo
//! xtask` reads and writes it by this file too.

/// The file's name.
pub(crate) const FILE: &str = "kernel_metadata.txt";

/// What it says.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Metadata {
    /// The function to call.
    pub(crate) entry_symbol: Option<String>,
    /// What it computes, by its name.
    pub(crate) definition: Option<String>,
    /// What it was built of, by its name.
    pub(crate) solution: Option<String>,
}

impl Metadata {
    /// As upstream's readers do: a line's beginning, and what follows without the space around it. Other lines say nothing.
    pub(crate) fn parse(text: &str) -> Self {
        let value = |name: &str| {
            let values = text.lines().filter_map(|line| line.trim_start().strip_prefix(name)?.strip_prefix(':'));
            values.map(str::trim).find(|value| !value.is_empty()).map(str::to_owned)
        };
        Self { entry_symbol: value("Entry Symbol"), definition: value("Definition"), solution: value("Solution") }
    }

    /// The text that upstream's readers find these in, each on a line of its own whatever it holds.
    pub(crate) fn text(entry_symbol: &str, definition: &str, solution: &str) -> String {
        let line = |text: &str| text.replace(['\n', '\r'], " ");
        let [entry_symbol, definition, solution] = [entry_symbol, definition, solution].map(line);
        format!("Entry Symbol: {entry_symbol}\nDefinition: {definition}\nSolution: {solution}\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_what_upstream_takes_too() {
        let said = |text: &str| {
            let Metadata { entry_symbol, definition, solution } = Metadata::parse(text);
            [entry_symbol, definition, solution].map(Option::unwrap_or_default)
        };
        assert_eq!(said(&Metadata::text("run", "gemm_n16", "by\r\nhand")), ["run", "gemm_n16", "by  hand"]);
        assert_eq!(said("more\n  Entry Symbol:\nEntry Symbol:  run \r\nSolution of: a\n"), ["run", "", ""]);
        assert_eq!(Metadata::parse(""), Metadata::default());
    }
}
