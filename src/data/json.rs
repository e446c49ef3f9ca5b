//! JSON as FlashInfer-Bench's and safetensors files hold it: read with its place in the file, refused where it is hostile, and written as
//! upstream's models write it.
//!
//! The reader is our own since a library's does not do what these files need: numbers that are not finite stand in them as
//! bare words, whole numbers and others must be told apart, a name that occurs twice is refused, and every error names
//! its line and the way there.

use std::collections::HashSet;
use std::fmt::Write as _;

use super::error::{Finding, refused};
use crate::error::Result;

/// The largest file, or line of a file, that is read as JSON, in bytes.
pub const MAX_BYTES: usize = 64 << 20;
/// How deep lists and objects may be nested.
pub const MAX_DEPTH: usize = 64;
/// How many values one document may have.
pub const MAX_VALUES: usize = 1 << 20;
/// How many axes, inputs or outputs there may be: each is looked up among the others.
const MAX_NAMES: usize = 4096;

const WELL_FORMED: &str = "write the file again, or fetch it anew";

/// A JSON value. Objects keep the order of their names.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Json {
    /// `null`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A number that was written without a point or an exponent.
    Int(i128),
    /// Any other number. One that is not finite is written as one of the texts `"NaN"`, `"Infinity"`, `"-Infinity"`.
    Float(f64),
    /// A text.
    Text(String),
    /// A list.
    List(Vec<Json>),
    /// An object.
    Object(Vec<(String, Json)>),
}

impl Json {
    /// Reads a document. The words `NaN`, `Infinity` and `-Infinity` are numbers, as upstream reads them.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) for what is not JSON, a name that occurs twice in an object, and more than
    /// [`MAX_DEPTH`], [`MAX_VALUES`] or [`MAX_BYTES`].
    pub fn parse(text: &str) -> Result<Self> {
        let document = Document::parse("the text", text.as_bytes(), 1)?;
        Ok(document.root.into())
    }

    /// On one line.
    pub fn compact(&self) -> String {
        let mut out = String::new();
        self.write(&mut out, None, 0);
        out
    }

    /// On many lines, indented by two spaces.
    pub fn pretty(&self) -> String {
        let mut out = String::new();
        self.write(&mut out, Some(2), 0);
        out
    }

    fn write(&self, out: &mut String, indent: Option<usize>, level: usize) {
        match self {
            Self::Null => out.push_str("null"),
            Self::Bool(flag) => out.push_str(if *flag { "true" } else { "false" }),
            Self::Int(number) => _ = write!(out, "{number}"),
            Self::Float(number) => out.push_str(&figure(*number)),
            Self::Text(text) => quote(out, text),
            Self::List(items) => Self::group(out, ['[', ']'], items, indent, level, |out, item, level| {
                item.write(out, indent, level);
            }),
            Self::Object(fields) => Self::group(out, ['{', '}'], fields, indent, level, |out, (name, value), level| {
                quote(out, name);
                out.push_str(if indent.is_some() { ": " } else { ":" });
                value.write(out, indent, level);
            }),
        }
    }

    fn group<T>(
        out: &mut String,
        [open, close]: [char; 2],
        items: &[T],
        indent: Option<usize>,
        level: usize,
        mut write: impl FnMut(&mut String, &T, usize),
    ) {
        out.push(open);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                out.push(',');
            }
            if let Some(indent) = indent {
                _ = write!(out, "\n{:1$}", "", indent * (level + 1));
            }
            write(out, item, level + 1);
        }
        if let (Some(indent), false) = (indent, items.is_empty()) {
            _ = write!(out, "\n{:1$}", "", indent * level);
        }
        out.push(close);
    }
}

/// A number as upstream's writer puts it: the shortest that reads back as itself, with a point or an exponent.
fn figure(number: f64) -> String {
    if number.is_nan() {
        return "\"NaN\"".to_owned();
    }
    if number.is_infinite() {
        return if number > 0.0 { "\"Infinity\"".to_owned() } else { "\"-Infinity\"".to_owned() };
    }
    let text = format!("{number:?}");
    match text.split_once('e') {
        Some((_, "-5")) => format!("{number}"),
        Some((digits, exponent)) if !exponent.starts_with('-') => format!("{digits}e+{exponent}"),
        _ => text,
    }
}

fn quote(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' => _ = write!(out, "\\u{:04x}", u32::from(c)),
            c => out.push(c),
        }
    }
    out.push('"');
}

/// A field of an object.
pub(crate) fn field(name: &str, value: Json) -> (String, Json) {
    (name.to_owned(), value)
}

/// A text.
pub(crate) fn text(text: &str) -> Json {
    Json::Text(text.to_owned())
}

/// A value with its place.
#[derive(Debug)]
pub(crate) struct Node {
    at: usize,
    value: Value,
}

#[derive(Debug)]
enum Value {
    Null,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Object(Vec<(String, Node)>),
}

impl From<Node> for Json {
    fn from(node: Node) -> Self {
        match node.value {
            Value::Null => Self::Null,
            Value::Bool(flag) => Self::Bool(flag),
            Value::Int(number) => Self::Int(number),
            Value::Float(number) => Self::Float(number),
            Value::Text(text) => Self::Text(text),
            Value::List(items) => Self::List(items.into_iter().map(Self::from).collect()),
            Value::Object(fields) => Self::Object(fields.into_iter().map(|(name, node)| (name, node.into())).collect()),
        }
    }
}

impl From<&Node> for Json {
    fn from(node: &Node) -> Self {
        match &node.value {
            Value::Null => Self::Null,
            Value::Bool(flag) => Self::Bool(*flag),
            Value::Int(number) => Self::Int(*number),
            Value::Float(number) => Self::Float(*number),
            Value::Text(text) => Self::Text(text.clone()),
            Value::List(items) => Self::List(items.iter().map(Self::from).collect()),
            Value::Object(fields) => {
                Self::Object(fields.iter().map(|(name, node)| (name.clone(), node.into())).collect())
            }
        }
    }
}

/// Where a text came from, for errors.
#[derive(Debug)]
struct Source {
    file: String,
    /// The number of the text's first line in the file.
    first_line: usize,
    /// Where each line begins.
    lines: Vec<usize>,
}

impl Source {
    fn place(&self, at: usize) -> String {
        let line = self.lines.partition_point(|&begin| begin <= at).max(1);
        let column = at - self.lines.get(line - 1).copied().unwrap_or(0) + 1;
        format!("line {} column {column}", self.first_line + line - 1)
    }
}

/// A document that was read.
#[derive(Debug)]
pub(crate) struct Document {
    source: Source,
    root: Node,
}

impl Document {
    /// Reads one; `file` and `first_line` say where it stands.
    pub(crate) fn parse(file: &str, bytes: &[u8], first_line: usize) -> Result<Self> {
        let begins = bytes.iter().enumerate().filter(|&(_, &byte)| byte == b'\n').map(|(at, _)| at + 1);
        let lines = std::iter::once(0).chain(begins.take(MAX_VALUES)).collect();
        let source = Source { file: file.to_owned(), first_line, lines };
        let fail = |fault: Fault| {
            let Fault { at, found, expected } = fault;
            refused(
                file,
                Finding { place: source.place(at), found, expected: expected.to_owned(), remedy: WELL_FORMED },
            )
        };
        if bytes.len() > MAX_BYTES {
            let found = format!("{} bytes", bytes.len());
            return Err(fail(Fault { at: 0, found, expected: "at most 64 MiB of JSON" }));
        }
        let text = std::str::from_utf8(bytes).map_err(|error| {
            let at = error.valid_up_to();
            fail(Fault { at, found: format!("the byte {:#04x}", bytes[at]), expected: "UTF-8" })
        })?;
        let mut parser = Parser { text, at: 0, values: 0 };
        let root = parser.document().map_err(fail)?;
        Ok(Self { source, root })
    }

    pub(crate) fn root(&self) -> Cursor<'_> {
        Cursor { source: &self.source, node: &self.root, path: String::new() }
    }
}

struct Fault {
    at: usize,
    found: String,
    expected: &'static str,
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    values: usize,
}

type Parsed<T> = std::result::Result<T, Fault>;

impl Parser<'_> {
    fn document(&mut self) -> Parsed<Node> {
        let root = self.value(0)?;
        self.skip();
        if self.at < self.text.len() { Err(self.unexpected("the end")) } else { Ok(root) }
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn skip(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn unexpected(&self, expected: &'static str) -> Fault {
        let found = match self.text.get(self.at..).and_then(|rest| rest.chars().next()) {
            Some(c) => format!("{c:?}"),
            None => "the end".to_owned(),
        };
        Fault { at: self.at, found, expected }
    }

    fn value(&mut self, depth: usize) -> Parsed<Node> {
        self.skip();
        let at = self.at;
        self.values += 1;
        if self.values > MAX_VALUES {
            return Err(Fault { at, found: "more values".to_owned(), expected: "at most 1048576 values" });
        }
        if depth > MAX_DEPTH {
            return Err(Fault { at, found: "a deeper value".to_owned(), expected: "at most 64 levels" });
        }
        let value = match self.peek() {
            Some(b'{') => self.object(depth)?,
            Some(b'[') => self.list(depth)?,
            Some(b'"') => Value::Text(self.string()?),
            Some(b'-' | b'0'..=b'9') if !self.rest().starts_with("-Inf") => self.number()?,
            _ => self.word()?,
        };
        Ok(Node { at, value })
    }

    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    fn word(&mut self) -> Parsed<Value> {
        let words = [
            ("null", Value::Null),
            ("true", Value::Bool(true)),
            ("false", Value::Bool(false)),
            ("NaN", Value::Float(f64::NAN)),
            ("Infinity", Value::Float(f64::INFINITY)),
            ("-Infinity", Value::Float(f64::NEG_INFINITY)),
        ];
        for (word, value) in words {
            if self.rest().starts_with(word) {
                self.at += word.len();
                return Ok(value);
            }
        }
        Err(self.unexpected("a JSON value"))
    }

    fn object(&mut self, depth: usize) -> Parsed<Value> {
        self.at += 1;
        let (mut fields, mut names) = (Vec::new(), HashSet::new());
        self.skip();
        if self.peek() == Some(b'}') {
            self.at += 1;
            return Ok(Value::Object(fields));
        }
        loop {
            self.skip();
            let at = self.at;
            if self.peek() != Some(b'"') {
                return Err(self.unexpected("a name in quotation marks"));
            }
            let name = self.string()?;
            if !names.insert(name.clone()) {
                let found = format!("{:?} a second time", shortened(&name));
                return Err(Fault { at, found, expected: "each name once in an object" });
            }
            self.skip();
            if self.peek() != Some(b':') {
                return Err(self.unexpected("a colon"));
            }
            self.at += 1;
            fields.push((name, self.value(depth + 1)?));
            self.skip();
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(b'}') => break,
                _ => return Err(self.unexpected("a comma or a closing brace")),
            }
        }
        self.at += 1;
        Ok(Value::Object(fields))
    }

    fn list(&mut self, depth: usize) -> Parsed<Value> {
        self.at += 1;
        let mut items = Vec::new();
        self.skip();
        if self.peek() == Some(b']') {
            self.at += 1;
            return Ok(Value::List(items));
        }
        loop {
            items.push(self.value(depth + 1)?);
            self.skip();
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(b']') => break,
                _ => return Err(self.unexpected("a comma or a closing bracket")),
            }
        }
        self.at += 1;
        Ok(Value::List(items))
    }

    fn digits(&mut self) -> Parsed<()> {
        let begin = self.at;
        while matches!(self.peek(), Some(b'0'..=b'9')) {
            self.at += 1;
        }
        if self.at == begin { Err(self.unexpected("a digit")) } else { Ok(()) }
    }

    fn number(&mut self) -> Parsed<Value> {
        let begin = self.at;
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        if self.peek() == Some(b'0') {
            self.at += 1;
            if matches!(self.peek(), Some(b'0'..=b'9')) {
                return Err(self.unexpected("no digit behind a leading zero"));
            }
        } else {
            self.digits()?;
        }
        let mut whole = true;
        if self.peek() == Some(b'.') {
            whole = false;
            self.at += 1;
            self.digits()?;
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            whole = false;
            self.at += 1;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            self.digits()?;
        }
        let text = &self.text[begin..self.at];
        let beyond = || Fault { at: begin, found: shortened(text).to_owned(), expected: "a whole number below 2^127" };
        match whole {
            true => text.parse().map(Value::Int).map_err(|_| beyond()),
            // What these characters make up is always a number; one beyond the largest is infinite.
            false => text.parse().map(Value::Float).map_err(|_| beyond()),
        }
    }

    fn string(&mut self) -> Parsed<String> {
        self.at += 1;
        let mut out = String::new();
        loop {
            let begin = self.at;
            while self.peek().is_some_and(|byte| byte >= b' ' && byte != b'"' && byte != b'\\') {
                self.at += 1;
            }
            out.push_str(&self.text[begin..self.at]);
            match self.peek() {
                Some(b'"') => break,
                Some(b'\\') => {
                    self.at += 1;
                    out.push(self.escape()?);
                }
                _ => return Err(self.unexpected("more of a text, whose control characters are escaped")),
            }
        }
        self.at += 1;
        Ok(out)
    }

    fn escape(&mut self) -> Parsed<char> {
        let plain = match self.peek() {
            Some(b'"') => '"',
            Some(b'\\') => '\\',
            Some(b'/') => '/',
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(b'n') => '\n',
            Some(b'r') => '\r',
            Some(b't') => '\t',
            Some(b'u') => return self.code_point(),
            _ => return Err(self.unexpected("an escape of JSON")),
        };
        self.at += 1;
        Ok(plain)
    }

    fn code_point(&mut self) -> Parsed<char> {
        const WHOLE: &str = "a code point, or both halves of a surrogate pair";
        let begin = self.at;
        let first = self.unit()?;
        let point = match first {
            0xD800..=0xDBFF => {
                let at = self.at;
                if !self.rest().starts_with("\\u") {
                    return Err(Fault { at: begin, found: format!("\\u{first:04x} alone"), expected: WHOLE });
                }
                self.at += 1;
                match self.unit()? {
                    second @ 0xDC00..=0xDFFF => 0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00),
                    second => return Err(Fault { at, found: format!("\\u{second:04x}"), expected: WHOLE }),
                }
            }
            point => point,
        };
        char::from_u32(point).ok_or(Fault { at: begin, found: format!("\\u{point:04x} alone"), expected: WHOLE })
    }

    /// The four digits behind the `u` that this stands at.
    fn unit(&mut self) -> Parsed<u32> {
        let digits = self.text.as_bytes().get(self.at + 1..self.at + 5);
        let digits = digits.filter(|digits| digits.iter().all(u8::is_ascii_hexdigit));
        let value = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        let value = value.and_then(|digits| u32::from_str_radix(digits, 16).ok());
        match value {
            Some(value) => {
                self.at += 5;
                Ok(value)
            }
            None => Err(Fault {
                at: self.at,
                found: "another escape".to_owned(),
                expected: "four hexadecimal digits behind \\u",
            }),
        }
    }
}

/// The beginning of a text that an error names.
pub(crate) fn shortened(text: &str) -> &str {
    match text.char_indices().nth(60) {
        Some((end, _)) => &text[..end],
        None => text,
    }
}

/// A value in a document that is being read, which knows the way there.
#[derive(Debug, Clone)]
pub(crate) struct Cursor<'a> {
    source: &'a Source,
    node: &'a Node,
    path: String,
}

impl<'a> Cursor<'a> {
    /// What is wrong with this value.
    pub(crate) fn refuse(
        &self,
        found: impl Into<String>,
        expected: impl Into<String>,
        remedy: &'static str,
    ) -> crate::FlashInferError {
        let place = self.source.place(self.node.at);
        let place = if self.path.is_empty() { place } else { format!("{} at {place}", self.path) };
        refused(&self.source.file, Finding { place, found: found.into(), expected: expected.into(), remedy })
    }

    fn mismatch(&self, expected: &str) -> crate::FlashInferError {
        let found = match &self.node.value {
            Value::Null => "null".to_owned(),
            Value::Bool(flag) => flag.to_string(),
            Value::Int(number) => number.to_string(),
            Value::Float(number) => number.to_string(),
            Value::Text(text) => format!("the text {:?}", shortened(text)),
            Value::List(items) => format!("a list of {}", items.len()),
            Value::Object(fields) => format!("an object of {}", fields.len()),
        };
        self.refuse(found, expected, "correct the value")
    }

    fn step(&self, node: &'a Node, step: &str) -> Self {
        let path = match (self.path.is_empty(), step.starts_with('[')) {
            (true, _) | (false, true) => format!("{}{step}", self.path),
            (false, false) => format!("{}.{step}", self.path),
        };
        Self { source: self.source, node, path }
    }

    /// The fields of an object.
    pub(crate) fn fields(&self) -> Result<Vec<(&'a str, Self)>> {
        match &self.node.value {
            Value::Object(fields) => {
                Ok(fields.iter().map(|(name, node)| (name.as_str(), self.step(node, shortened(name)))).collect())
            }
            _ => Err(self.mismatch("an object")),
        }
    }

    /// The fields of an object whose names mean something, and must therefore not be empty.
    pub(crate) fn named(&self) -> Result<Vec<(&'a str, Self)>> {
        let fields = self.fields()?;
        if fields.len() > MAX_NAMES {
            return Err(self.mismatch("an object of at most 4096 names"));
        }
        match fields.iter().find(|(name, _)| name.is_empty()) {
            Some((_, cursor)) => Err(cursor.refuse("an empty name", "a name", "name it")),
            None => Ok(fields),
        }
    }

    /// A field, where it is there.
    pub(crate) fn get(&self, name: &str) -> Option<Self> {
        match &self.node.value {
            Value::Object(fields) => {
                fields.iter().find(|(known, _)| known == name).map(|(_, node)| self.step(node, name))
            }
            _ => None,
        }
    }

    /// A field that is there and not `null`.
    pub(crate) fn given(&self, name: &str) -> Option<Self> {
        self.get(name).filter(|cursor| !cursor.is_null())
    }

    /// A field that must be there.
    pub(crate) fn need(&self, name: &str) -> Result<Self> {
        match &self.node.value {
            Value::Object(_) => {
                self.get(name).ok_or_else(|| self.refuse("nothing", format!("the field {name:?}"), "add the field"))
            }
            _ => Err(self.mismatch("an object")),
        }
    }

    pub(crate) fn is_null(&self) -> bool {
        matches!(self.node.value, Value::Null)
    }

    pub(crate) fn items(&self) -> Result<Vec<Self>> {
        match &self.node.value {
            Value::List(items) => {
                Ok(items.iter().enumerate().map(|(i, node)| self.step(node, &format!("[{i}]"))).collect())
            }
            _ => Err(self.mismatch("a list")),
        }
    }

    pub(crate) fn text(&self) -> Result<String> {
        match &self.node.value {
            Value::Text(text) => Ok(text.clone()),
            _ => Err(self.mismatch("a text")),
        }
    }

    /// A text that is not empty.
    pub(crate) fn word(&self) -> Result<String> {
        match &self.node.value {
            Value::Text(text) if !text.is_empty() => Ok(text.clone()),
            _ => Err(self.mismatch("a text that is not empty")),
        }
    }

    /// A list of texts that are not empty.
    pub(crate) fn words(&self) -> Result<Vec<String>> {
        self.items()?.iter().map(Self::word).collect()
    }

    pub(crate) fn flag(&self) -> Result<bool> {
        match self.node.value {
            Value::Bool(flag) => Ok(flag),
            _ => Err(self.mismatch("true or false")),
        }
    }

    /// A size: a whole number of 63 bits that is not negative. One with a point is taken where nothing follows it.
    pub(crate) fn size(&self) -> Result<u64> {
        let size = match self.node.value {
            Value::Int(number) => i64::try_from(number).ok(),
            Value::Float(number) if number.fract() == 0.0 && number.abs() < 9e15 => Some(number as i64),
            _ => None,
        };
        size.and_then(|size| u64::try_from(size).ok()).ok_or_else(|| self.mismatch("a whole number from 0 to 2^63 - 1"))
    }

    /// A figure: a number, or the text of one, which may be infinite or no number.
    pub(crate) fn figure(&self) -> Result<f64> {
        let figure = match &self.node.value {
            Value::Int(number) => Some(*number as f64),
            Value::Float(number) => Some(*number),
            // Rust reads the words that Python does, in either case.
            Value::Text(text) => text.trim().parse().ok(),
            _ => None,
        };
        figure.ok_or_else(|| self.mismatch("a number, or one of \"NaN\" and \"Infinity\""))
    }

    /// As it is.
    pub(crate) fn json(&self) -> Json {
        self.node.into()
    }
}
