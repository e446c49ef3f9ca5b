//! Constraints: the part of Python's expressions that definitions use, evaluated without Python.

use std::fmt;

use super::definition::Axes;
use super::error::unfit;
use super::inputs::Input;
use super::named::Named;
use crate::error::{FlashInferError, Result};

const MAX_LENGTH: usize = 4096;
/// What is evaluated as deep as it is long must fit a thread's stack.
const MAX_TOKENS: usize = 256;
const MAX_DEPTH: usize = 32;
const SYNTAX: &str = "comparisons, `and`, `or`, `not`, + - * / // %, numbers, axes, `x.shape[i]`, `x[i].item()`";

/// What holds between axes and inputs: `num_pages * page_size >= kv_indptr[-1].item()` for example.
///
/// Comparisons (also in chains), `and`, `or`, `not`, `+ - * / // %`, parentheses, whole and other numbers, `True`, `False`,
/// axes and scalars by name, `x.shape[i]`, `len(x)`, and the elements of inputs: `x[i]`, `x[i, j]`, with `.item()` or without.
/// Nothing else of Python, and nothing with an effect. Whole numbers have 128 bits.
#[derive(Debug, Clone, PartialEq)]
pub struct Constraint {
    text: String,
    root: Node,
}

/// What comes of a constraint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It holds.
    Holds,
    /// It does not: the reason, with the numbers on both sides.
    Broken(String),
    /// It cannot be said, for want of this.
    Unknown(String),
}

#[derive(Debug, Clone, PartialEq)]
enum Node {
    Value(Value),
    Name(String),
    /// `x.shape[i]`.
    Shape(String, Box<Node>),
    /// `x[i, j]`.
    Element(String, Vec<Node>),
    /// `len(x)`.
    Length(String),
    Not(Box<Node>),
    Negative(Box<Node>),
    Both(Box<Node>, Box<Node>),
    Either(Box<Node>, Box<Node>),
    Arithmetic(char, Box<Node>, Box<Node>),
    /// The first, then each comparison with the next.
    Chain(Box<Node>, Vec<(Comparison, Node)>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Comparison {
    Equal,
    Different,
    Less,
    AtMost,
    More,
    AtLeast,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Value {
    Int(i128),
    Float(f64),
    Bool(bool),
}

impl Value {
    fn is_true(self) -> bool {
        match self {
            Self::Int(number) => number != 0,
            Self::Float(number) => number != 0.0,
            Self::Bool(flag) => flag,
        }
    }

    fn float(self) -> f64 {
        match self {
            Self::Int(number) => number as f64,
            Self::Float(number) => number,
            Self::Bool(flag) => f64::from(u8::from(flag)),
        }
    }

    /// As a whole number: Python counts with `True` and `False`, too.
    fn int(self) -> Option<i128> {
        match self {
            Self::Int(number) => Some(number),
            Self::Bool(flag) => Some(i128::from(flag)),
            Self::Float(_) => None,
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int(number) => number.fmt(f),
            Self::Float(number) => write!(f, "{number:?}"),
            Self::Bool(flag) => f.write_str(if *flag { "True" } else { "False" }),
        }
    }
}

impl Constraint {
    /// Reads one.
    ///
    /// # Errors
    /// [`Data`](FlashInferError::Data) for anything but the expressions above.
    pub fn parse(text: &str) -> Result<Self> {
        if text.len() > MAX_LENGTH {
            return Err(unfit("a constraint", "its length", text.len().to_string(), "at most 4096", "shorten it"));
        }
        let mut parser = Parser { text, tokens: tokens(text)?, at: 0, depth: 0 };
        let root = parser.either()?;
        match parser.peek() {
            None => Ok(Self { text: text.to_owned(), root }),
            Some(_) => Err(parser.unexpected("the end")),
        }
    }

    /// The expression.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether it holds for these axes, constant ones too, and these inputs.
    pub fn check(&self, axes: &Axes, inputs: &Named<Input>) -> Verdict {
        let scope = Scope { axes, inputs };
        match scope.value(&self.root) {
            Ok(value) if value.is_true() => Verdict::Holds,
            Ok(_) => Verdict::Broken(scope.explain(self)),
            Err(Stop::Missing(what)) => Verdict::Unknown(what),
            Err(Stop::Wrong(what)) => Verdict::Broken(format!("{}: {what}", self.text)),
        }
    }
}

/// Why there is no value.
enum Stop {
    Missing(String),
    Wrong(String),
}

struct Scope<'a> {
    axes: &'a Axes,
    inputs: &'a Named<Input>,
}

impl Scope<'_> {
    /// The text, with what stands on both sides of a comparison.
    fn explain(&self, constraint: &Constraint) -> String {
        let text = &constraint.text;
        let Node::Chain(first, others) = &constraint.root else { return text.clone() };
        let values = std::iter::once(first.as_ref()).chain(others.iter().map(|(_, node)| node));
        let values = values.map(|node| self.value(node).map_or_else(|_| "?".to_owned(), |value| value.to_string()));
        format!("{text}: {}", values.collect::<Vec<_>>().join(" against "))
    }

    fn input(&self, name: &str) -> std::result::Result<&Input, Stop> {
        self.inputs.get(name).ok_or_else(|| Stop::Missing(format!("the input {name:?}")))
    }

    fn index(&self, node: &Node, size: u64) -> std::result::Result<u64, Stop> {
        let value = self.value(node)?;
        let size = i128::from(size);
        match value.int().map(|index| if index < 0 { index + size } else { index }) {
            Some(index) if (0..size).contains(&index) => Ok(index as u64),
            _ => Err(Stop::Wrong(format!("the index {value} is outside of {size}"))),
        }
    }

    fn value(&self, node: &Node) -> std::result::Result<Value, Stop> {
        Ok(match node {
            Node::Value(value) => *value,
            Node::Name(name) => match (self.axes.get(name), self.inputs.get(name)) {
                (Some(&size), _) => Value::Int(i128::from(size)),
                (None, Some(Input::Int(number))) => Value::Int(i128::from(*number)),
                (None, Some(Input::Float(number))) => Value::Float(*number),
                (None, Some(Input::Bool(flag))) => Value::Bool(*flag),
                _ => return Err(Stop::Missing(format!("a number for {name:?}"))),
            },
            Node::Shape(name, index) => {
                let Input::Tensor(tensor) = self.input(name)? else {
                    return Err(Stop::Wrong(format!("{name:?} is no tensor")));
                };
                let index = self.index(index, tensor.shape().len() as u64)?;
                Value::Int(i128::from(tensor.shape()[index as usize]))
            }
            Node::Length(name) => match self.input(name)? {
                Input::Tensor(tensor) if !tensor.shape().is_empty() => Value::Int(i128::from(tensor.shape()[0])),
                _ => return Err(Stop::Wrong(format!("{name:?} has no length"))),
            },
            Node::Element(name, indices) => self.element(name, indices)?,
            Node::Not(node) => Value::Bool(!self.value(node)?.is_true()),
            Node::Negative(node) => match self.value(node)? {
                Value::Float(number) => Value::Float(-number),
                value => Value::Int(value.int().and_then(i128::checked_neg).ok_or_else(overflow)?),
            },
            Node::Both(first, second) => {
                let first = self.value(first)?;
                if first.is_true() { self.value(second)? } else { first }
            }
            Node::Either(first, second) => {
                let first = self.value(first)?;
                if first.is_true() { first } else { self.value(second)? }
            }
            Node::Arithmetic(operator, first, second) => {
                arithmetic(*operator, self.value(first)?, self.value(second)?)?
            }
            Node::Chain(first, others) => {
                let mut left = self.value(first)?;
                for (comparison, node) in others {
                    let right = self.value(node)?;
                    if !compare(*comparison, left, right) {
                        return Ok(Value::Bool(false));
                    }
                    left = right;
                }
                Value::Bool(true)
            }
        })
    }

    fn element(&self, name: &str, indices: &[Node]) -> std::result::Result<Value, Stop> {
        let Input::Tensor(tensor) = self.input(name)? else {
            return Err(Stop::Wrong(format!("{name:?} is no tensor")));
        };
        let shape = tensor.shape();
        if indices.len() != shape.len() {
            return Err(Stop::Wrong(format!("{} indices for {name:?} of shape {shape:?}", indices.len())));
        }
        let mut at = 0u64;
        for (index, &size) in indices.iter().zip(shape) {
            // Inside of the tensor, whose number of elements fits.
            at = at * size + self.index(index, size)?;
        }
        match tensor.int(at as usize) {
            Some(number) => Ok(Value::Int(number)),
            None => Ok(Value::Float(tensor.float(at as usize).into())),
        }
    }
}

fn overflow() -> Stop {
    Stop::Wrong("a number does not fit 128 bits".to_owned())
}

fn arithmetic(operator: char, first: Value, second: Value) -> std::result::Result<Value, Stop> {
    let divides = matches!(operator, '/' | '%' | 'd');
    if divides && second.float() == 0.0 {
        return Err(Stop::Wrong("a division by zero".to_owned()));
    }
    if let (Some(a), Some(b), true) = (first.int(), second.int(), operator != '/') {
        let result = match operator {
            '+' => a.checked_add(b),
            '-' => a.checked_sub(b),
            '*' => a.checked_mul(b),
            // As Python divides: towards minus infinity.
            'd' => a.checked_div_euclid(b).and_then(|q| match b < 0 && a.rem_euclid(b) != 0 {
                true => q.checked_sub(1),
                false => Some(q),
            }),
            _ => a.checked_rem_euclid(b).map(|r| if b < 0 && r != 0 { r + b } else { r }),
        };
        return result.map(Value::Int).ok_or_else(overflow);
    }
    let (a, b) = (first.float(), second.float());
    Ok(Value::Float(match operator {
        '+' => a + b,
        '-' => a - b,
        '*' => a * b,
        '/' => a / b,
        'd' => (a / b).floor(),
        _ => a - b * (a / b).floor(),
    }))
}

fn compare(comparison: Comparison, first: Value, second: Value) -> bool {
    let order = match (first.int(), second.int()) {
        (Some(a), Some(b)) => Some(a.cmp(&b)),
        _ => first.float().partial_cmp(&second.float()),
    };
    match comparison {
        Comparison::Equal => order.is_some_and(|order| order.is_eq()),
        Comparison::Different => order.is_none_or(|order| order.is_ne()),
        Comparison::Less => order.is_some_and(|order| order.is_lt()),
        Comparison::AtMost => order.is_some_and(|order| order.is_le()),
        Comparison::More => order.is_some_and(|order| order.is_gt()),
        Comparison::AtLeast => order.is_some_and(|order| order.is_ge()),
    }
}

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Number(Value),
    Name(String),
    Sign(&'static str),
}

const SIGNS: [&str; 17] = ["==", "!=", "<=", ">=", "//", "**", "<", ">", "+", "-", "*", "/", "%", "(", ")", "[", "]"];
const MORE_SIGNS: [&str; 2] = [".", ","];

fn wrong(text: &str, at: usize, found: String) -> FlashInferError {
    unfit(&format!("the constraint {text:?}"), format!("column {}", at + 1), found, SYNTAX, "write it in these")
}

fn tokens(text: &str) -> Result<Vec<(usize, Token)>> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(c) = text[at..].chars().next() {
        let rest = &text[at..];
        let length_of = |is: fn(char) -> bool| rest.find(|c| !is(c)).unwrap_or(rest.len());
        let (length, token) = if matches!(c, ' ' | '\t') {
            at += 1;
            continue;
        } else if c.is_ascii_digit() {
            let whole = length_of(|c| c.is_ascii_digit() || c == '_');
            let mut length = whole;
            if rest[whole..].starts_with('.') {
                length += 1 + rest[whole + 1..].find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len() - whole - 1);
            }
            if let Some(tail) = rest[length..].strip_prefix(['e', 'E']) {
                let signed = usize::from(tail.starts_with(['+', '-']));
                let digits = tail[signed..].find(|c: char| !c.is_ascii_digit()).unwrap_or(tail.len() - signed);
                length += if digits > 0 { 1 + signed + digits } else { 0 };
            }
            let digits = rest[..length].replace('_', "");
            let value = match length == whole {
                true => digits.parse().map(Value::Int).ok(),
                false => digits.parse().map(Value::Float).ok(),
            };
            let value = value.ok_or_else(|| wrong(text, at, format!("the number {:?}", &rest[..length])))?;
            (length, Token::Number(value))
        } else if c.is_alphabetic() || c == '_' {
            let length = length_of(|c| c.is_alphanumeric() || c == '_');
            (length, Token::Name(rest[..length].to_owned()))
        } else if let Some(sign) = SIGNS.iter().chain(&MORE_SIGNS).find(|sign| rest.starts_with(**sign)) {
            (sign.len(), Token::Sign(sign))
        } else {
            return Err(wrong(text, at, format!("{c:?}")));
        };
        found.push((at, token));
        if found.len() > MAX_TOKENS {
            return Err(wrong(text, at, "more than 256 words and signs".to_owned()));
        }
        at += length;
    }
    Ok(found)
}

struct Parser<'a> {
    text: &'a str,
    tokens: Vec<(usize, Token)>,
    at: usize,
    depth: usize,
}

impl Parser<'_> {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|(_, token)| token)
    }

    fn unexpected(&self, expected: &str) -> FlashInferError {
        let at = self.tokens.get(self.at).map_or(self.text.len(), |(at, _)| *at);
        let found = match self.peek() {
            Some(Token::Number(value)) => value.to_string(),
            Some(Token::Name(name)) => format!("{name:?}"),
            Some(Token::Sign(sign)) => format!("{sign:?}"),
            None => "the end".to_owned(),
        };
        wrong(self.text, at, format!("{found} in the place of {expected}"))
    }

    fn takes(&mut self, sign: &str) -> bool {
        let there = matches!(self.peek(), Some(Token::Sign(found)) if *found == sign);
        self.at += usize::from(there);
        there
    }

    fn takes_word(&mut self, word: &str) -> bool {
        let there = matches!(self.peek(), Some(Token::Name(found)) if found == word);
        self.at += usize::from(there);
        there
    }

    fn needs(&mut self, sign: &'static str) -> Result<()> {
        if self.takes(sign) { Ok(()) } else { Err(self.unexpected(&format!("{sign:?}"))) }
    }

    /// One level deeper, as far as there are levels.
    fn deeper<T>(&mut self, parse: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.depth == MAX_DEPTH {
            return Err(self.unexpected("at most 32 levels"));
        }
        self.depth += 1;
        let parsed = parse(self);
        self.depth -= 1;
        parsed
    }

    fn either(&mut self) -> Result<Node> {
        self.deeper(|parser| {
            let mut node = parser.both()?;
            while parser.takes_word("or") {
                node = Node::Either(Box::new(node), Box::new(parser.both()?));
            }
            Ok(node)
        })
    }

    fn both(&mut self) -> Result<Node> {
        let mut node = self.negation()?;
        while self.takes_word("and") {
            node = Node::Both(Box::new(node), Box::new(self.negation()?));
        }
        Ok(node)
    }

    fn negation(&mut self) -> Result<Node> {
        if self.takes_word("not") {
            return self.deeper(|parser| parser.negation().map(|node| Node::Not(Box::new(node))));
        }
        self.chain()
    }

    fn comparison(&mut self) -> Option<Comparison> {
        let Some(Token::Sign(sign)) = self.peek() else { return None };
        let comparison = match *sign {
            "==" => Comparison::Equal,
            "!=" => Comparison::Different,
            "<" => Comparison::Less,
            "<=" => Comparison::AtMost,
            ">" => Comparison::More,
            ">=" => Comparison::AtLeast,
            _ => return None,
        };
        self.at += 1;
        Some(comparison)
    }

    fn chain(&mut self) -> Result<Node> {
        let first = self.sum()?;
        let mut others = Vec::new();
        while let Some(comparison) = self.comparison() {
            others.push((comparison, self.sum()?));
        }
        Ok(if others.is_empty() { first } else { Node::Chain(Box::new(first), others) })
    }

    fn sum(&mut self) -> Result<Node> {
        let mut node = self.product()?;
        loop {
            let operator = match self.peek() {
                Some(Token::Sign("+")) => '+',
                Some(Token::Sign("-")) => '-',
                _ => return Ok(node),
            };
            self.at += 1;
            node = Node::Arithmetic(operator, Box::new(node), Box::new(self.product()?));
        }
    }

    fn product(&mut self) -> Result<Node> {
        let mut node = self.sign()?;
        loop {
            let operator = match self.peek() {
                Some(Token::Sign("*")) => '*',
                Some(Token::Sign("/")) => '/',
                Some(Token::Sign("//")) => 'd',
                Some(Token::Sign("%")) => '%',
                _ => return Ok(node),
            };
            self.at += 1;
            node = Node::Arithmetic(operator, Box::new(node), Box::new(self.sign()?));
        }
    }

    fn sign(&mut self) -> Result<Node> {
        if self.takes("-") {
            return self.deeper(|parser| parser.sign().map(|node| Node::Negative(Box::new(node))));
        }
        if self.takes("+") {
            return self.deeper(Self::sign);
        }
        self.atom()
    }

    fn atom(&mut self) -> Result<Node> {
        if self.takes("(") {
            let node = self.either()?;
            self.needs(")")?;
            return Ok(node);
        }
        let name = match self.peek() {
            Some(Token::Number(value)) => {
                let node = Node::Value(*value);
                self.at += 1;
                return Ok(node);
            }
            Some(Token::Name(name)) if !matches!(name.as_str(), "and" | "or" | "not") => name.clone(),
            _ => return Err(self.unexpected("a value")),
        };
        self.at += 1;
        match name.as_str() {
            "True" => return Ok(Node::Value(Value::Bool(true))),
            "False" => return Ok(Node::Value(Value::Bool(false))),
            "len" if self.takes("(") => {
                let Some(Token::Name(name)) = self.peek().cloned() else { return Err(self.unexpected("a name")) };
                self.at += 1;
                self.needs(")")?;
                return Ok(Node::Length(name));
            }
            _ => {}
        }
        if self.takes(".") {
            if !self.takes_word("shape") {
                return Err(self.unexpected("\"shape\""));
            }
            self.needs("[")?;
            let index = self.either()?;
            self.needs("]")?;
            return Ok(Node::Shape(name, Box::new(index)));
        }
        if !self.takes("[") {
            return Ok(Node::Name(name));
        }
        let mut indices = vec![self.either()?];
        loop {
            if self.takes(",") {
                indices.push(self.either()?);
            } else if self.takes("]") {
                // `x[i][j]` is `x[i, j]`.
                if !self.takes("[") {
                    break;
                }
                indices.push(self.either()?);
            } else {
                return Err(self.unexpected("\"]\""));
            }
        }
        if self.takes(".") {
            if !self.takes_word("item") {
                return Err(self.unexpected("\"item\""));
            }
            self.needs("(")?;
            self.needs(")")?;
        }
        Ok(Node::Element(name, indices))
    }
}
