//! Tables of TOML, read strictly: what is missing, of another kind, or not known is an error that names the line. By hand,
//! since macros for it are a good part of what a user of this crate compiles.

use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// What is wrong, and how many bytes of the file are before it.
pub struct Fault {
    at: usize,
    what: String,
}

impl Fault {
    /// With the line and the column, both from 1 on. The line itself is not shown: there may be a password in it.
    pub fn in_text(&self, text: &str) -> String {
        let before = text.get(..self.at).unwrap_or(text);
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        format!("line {line}, column {column}: {}", self.what)
    }
}

pub type Parsed<T> = Result<T, Fault>;
/// What a value is read into, or what is wrong with it.
pub type Checked<T> = Result<T, String>;

/// One table: each entry is taken out once, and none may be left.
pub struct Table<'t> {
    entries: DeTable<'t>,
    at: usize,
    known: Vec<&'static str>,
}

impl<'t> Table<'t> {
    /// The root of a file.
    pub fn parse(text: &'t str) -> Parsed<Self> {
        let fault = |e: toml::de::Error| Fault { at: e.span().unwrap_or_default().start, what: e.message().to_owned() };
        Ok(Self { entries: DeTable::parse(text).map_err(fault)?.into_inner(), at: 0, known: Vec::new() })
    }

    fn new(value: Spanned<DeValue<'t>>) -> Parsed<Self> {
        let at = value.span().start;
        match value.into_inner() {
            DeValue::Table(entries) => Ok(Self { entries, at, known: Vec::new() }),
            other => Err(Fault { at, what: unlike("a table", &other) }),
        }
    }

    fn take(&mut self, key: &'static str) -> Option<Spanned<DeValue<'t>>> {
        self.known.push(key);
        self.entries.remove(key)
    }

    fn missing(&self, key: &str) -> Fault {
        Fault { at: self.at, what: format!("missing field `{key}`") }
    }

    /// An entry that may be missing.
    pub fn optional<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(DeValue<'t>) -> Checked<T>,
    ) -> Parsed<Option<T>> {
        let Some(value) = self.take(key) else { return Ok(None) };
        let at = value.span().start;
        read(value.into_inner()).map(Some).map_err(|fault| Fault { at, what: format!("`{key}`: {fault}") })
    }

    pub fn required<T>(&mut self, key: &'static str, read: impl FnOnce(DeValue<'t>) -> Checked<T>) -> Parsed<T> {
        self.optional(key, read)?.ok_or_else(|| self.missing(key))
    }

    /// A table that may be missing.
    pub fn optional_table<T>(&mut self, key: &'static str, read: impl FnOnce(Self) -> Parsed<T>) -> Parsed<Option<T>> {
        self.take(key).map(|value| read(Self::new(value)?)).transpose()
    }

    /// An array of tables that may be missing.
    pub fn optional_tables<T>(
        &mut self,
        key: &'static str,
        read: impl Fn(Self) -> Parsed<T>,
    ) -> Parsed<Option<Vec<T>>> {
        let Some(value) = self.take(key) else { return Ok(None) };
        let at = value.span().start;
        match value.into_inner() {
            DeValue::Array(all) => {
                all.into_iter().map(|value| read(Self::new(value)?)).collect::<Parsed<_>>().map(Some)
            }
            other => Err(Fault { at, what: format!("`{key}`: {}", unlike("an array of tables", &other)) }),
        }
    }

    pub fn tables<T>(&mut self, key: &'static str, read: impl Fn(Self) -> Parsed<T>) -> Parsed<Vec<T>> {
        self.optional_tables(key, read)?.ok_or_else(|| self.missing(key))
    }

    /// The one entry of a table that has one, under any of these keys.
    pub fn one_of<T>(
        mut self,
        keys: &[&'static str],
        read: impl FnOnce(&'static str, String) -> Checked<T>,
    ) -> Parsed<T> {
        let there: Vec<_> = keys.iter().copied().filter(|key| self.entries.contains_key(*key)).collect();
        if let ([key], 1) = (&there[..], self.entries.len()) {
            return self.required(key, |value| read(key, text(value)?));
        }
        self.known = keys.to_vec();
        there.iter().for_each(|key| drop(self.entries.remove(*key)));
        let fault = Fault { at: self.at, what: format!("{} entries, expected one of {}", there.len(), listed(keys)) };
        self.end("variant")?;
        Err(fault)
    }

    /// That nothing is left.
    pub fn end(self, kind: &str) -> Parsed<()> {
        let known = || if self.known.is_empty() { "none".to_owned() } else { listed(&self.known) };
        match self.entries.keys().min_by_key(|key| key.span().start) {
            None => Ok(()),
            Some(key) => {
                let (at, name) = (key.span().start, key.get_ref().escape_debug());
                Err(Fault { at, what: format!("unknown {kind} `{name}`, expected one of {}", known()) })
            }
        }
    }
}

fn listed(names: &[&str]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

fn unlike(expected: &str, found: &DeValue<'_>) -> String {
    let found = match found {
        DeValue::String(_) => "a text",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a number",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "an array",
        DeValue::Table(_) => "a table",
    };
    format!("{found}, expected {expected}")
}

pub fn text(value: DeValue<'_>) -> Checked<String> {
    match value {
        DeValue::String(text) => Ok(text.into_owned()),
        other => Err(unlike("a text", &other)),
    }
}

/// A whole number that is not negative.
pub fn whole<T: TryFrom<u64>>(value: DeValue<'_>) -> Checked<T> {
    let DeValue::Integer(number) = &value else { return Err(unlike("a whole number", &value)) };
    let small = u64::from_str_radix(number.as_str(), number.radix()).ok().and_then(|number| T::try_from(number).ok());
    small.ok_or_else(|| format!("{number} is out of range, expected 0 to {}", u64::MAX >> (64 - 8 * size_of::<T>())))
}

pub fn flag(value: DeValue<'_>) -> Checked<bool> {
    match value {
        DeValue::Boolean(value) => Ok(value),
        other => Err(unlike("true or false", &other)),
    }
}

pub fn texts(value: DeValue<'_>) -> Checked<Vec<String>> {
    match value {
        DeValue::Array(all) => all.into_iter().map(|value| text(value.into_inner())).collect(),
        other => Err(unlike("an array of texts", &other)),
    }
}

/// A text that is one of these.
pub fn named<T: Copy>(value: DeValue<'_>, all: &[(&str, T)]) -> Checked<T> {
    let name = text(value)?;
    let found = all.iter().find(|(known, _)| *known == name).map(|(_, value)| *value);
    found.ok_or_else(|| {
        let names: Vec<&str> = all.iter().map(|(name, _)| *name).collect();
        format!("unknown variant `{}`, expected one of {}", name.escape_debug(), listed(&names))
    })
}
