//! What goes wrong while vendoring. A message is one paragraph: the thing, what was found, what was expected, and the
//! remedy last. Where many places were looked at, the remedy comes before them, and each has a line.

use std::fmt;
use std::path::Path;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// The thing is not there or cannot be reached: another place may have it.
    Unavailable(String),
    /// The thing is there and is not what was expected, or this machine refuses: going on would hide it.
    Refused(String),
}

impl Error {
    pub fn message(&self) -> &str {
        match self {
            Self::Unavailable(message) | Self::Refused(message) => message,
        }
    }

    pub fn is_unavailable(&self) -> bool {
        matches!(self, Self::Unavailable(_))
    }

    /// An I/O error on `path`, with the remedy for the causes a user can mend.
    pub fn io(doing: &str, path: &Path, error: &std::io::Error) -> Self {
        use std::io::ErrorKind as Kind;
        let remedy = match error.kind() {
            Kind::StorageFull | Kind::QuotaExceeded => "; free some space there, or choose another disk",
            Kind::PermissionDenied | Kind::ReadOnlyFilesystem => {
                "; make it accessible to this user, or choose another place"
            }
            Kind::NotFound => "; check the path",
            _ => "",
        };
        Self::Refused(format!("{doing} {} failed: {error}{remedy}", path.display()))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.message())
    }
}

impl std::error::Error for Error {}

/// `Err(Refused(format!(…)))`
macro_rules! refuse {
    ($($arg:tt)*) => { return Err($crate::vendoring::error::Error::Refused(format!($($arg)*))) };
}
pub(crate) use refuse;
