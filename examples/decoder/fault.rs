//! What this example answers where something is wrong: a sentence with what was found, what was expected and what to do.

use std::fmt;

#[derive(Debug)]
pub struct Fault(String);

pub fn fault(text: impl Into<String>) -> Fault {
    Fault(text.into())
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Fault {}

impl From<flashinfer_rs::FlashInferError> for Fault {
    fn from(error: flashinfer_rs::FlashInferError) -> Self {
        Self(error.to_string())
    }
}
