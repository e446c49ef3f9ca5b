//! Files that appear whole or not at all, and the cache of verified wheels, one folder per digest.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::digest::{Digest, hash_reader};
use super::error::{Error, Result};

const TEMPORARY: &str = ".tmp-";

/// Writes a file through a unique temporary beside it, syncs it, and gives it its name by rename. Whatever fails, no
/// half of it is left behind.
pub fn publish<T>(path: &Path, write: impl FnOnce(&mut File) -> Result<T>) -> Result<T> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(|e| Error::io("creating the folder", folder, &e))?;
    let mut builder = tempfile::Builder::new();
    builder.prefix(TEMPORARY);
    // As any other program would make it, within the umask; a private file would serve one user only.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let temporary = builder.tempfile_in(folder);
    let mut temporary = temporary.map_err(|e| Error::io("writing to the folder", folder, &e))?;
    let value = write(temporary.as_file_mut())?;
    temporary.as_file().sync_all().map_err(|e| Error::io("writing", path, &e))?;
    temporary.persist(path).map_err(|e| Error::io("naming", path, &e.error))?;
    Ok(value)
}

/// As [`publish`], from bytes.
pub fn publish_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::io::Write;
    publish(path, |file| file.write_all(bytes).map_err(|e| Error::io("writing", path, &e)))
}

/// The shared cache.
pub struct Store {
    root: PathBuf,
}

impl Store {
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where a file with this digest is kept.
    pub fn path(&self, sha256: &Digest, file: &str) -> PathBuf {
        self.root.join("wheels").join(sha256.to_string()).join(file)
    }

    /// A kept file, open, if its content still has the digest. One that has not is passed over: a later [`fill`]
    /// replaces it.
    ///
    /// [`fill`]: Store::fill
    pub fn lookup(&self, sha256: &Digest, file: &str) -> Option<(PathBuf, File)> {
        let path = self.path(sha256, file);
        let opened = File::open(&path).ok()?;
        let (found, _) = hash_reader(&opened).ok()?;
        (found == *sha256).then_some((path, opened))
    }

    /// Gets a file into the cache, once however many processes ask: they wait for each other at a lock file, and who
    /// comes second finds the file there. `write` must check what it writes against the digest.
    pub fn fill(
        &self,
        sha256: &Digest,
        file: &str,
        write: impl FnOnce(&mut File) -> Result<()>,
    ) -> Result<(PathBuf, File)> {
        let path = self.path(sha256, file);
        let folder = path.parent().unwrap_or(&self.root);
        let not_writable = |e: &std::io::Error| {
            let fault = Error::io("writing to the cache folder", folder, e);
            Error::Refused(format!("{fault}; {} names another cache folder", super::env::CACHE_DIR))
        };
        fs::create_dir_all(folder).map_err(|e| not_writable(&e))?;
        let lock = File::options().create(true).truncate(false).write(true).open(folder.join(".lock"));
        let lock = lock.map_err(|e| not_writable(&e))?;
        lock.lock().map_err(|e| not_writable(&e))?;
        if let Some(found) = self.lookup(sha256, file) {
            return Ok(found);
        }
        self.sweep(folder);
        publish(&path, write)?;
        let opened = File::open(&path).map_err(|e| Error::io("opening", &path, &e))?;
        Ok((path, opened))
    }

    /// Removes what a killed process left. The folder's lock must be held: then nobody else writes here.
    fn sweep(&self, folder: &Path) {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}
