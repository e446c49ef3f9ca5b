//! Files that appear whole or not at all, and the cache of verified wheels, one folder per digest.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::digest::{Digest, hash_reader};
use super::error::{Error, Result};
use super::lock::Member;

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

    /// Where a member with this digest is kept.
    pub fn member_path(&self, sha256: &Digest, soname: &str) -> PathBuf {
        self.root.join("members").join(sha256.to_string()).join(soname)
    }

    /// Kept members, open, if all of them are there and their contents still have their locked digests.
    pub fn members(&self, members: &[&Member]) -> Option<Vec<(PathBuf, File)>> {
        let one = |member: &&Member| {
            let sha256 = member.sha256?;
            verified(self.member_path(&sha256, &member.soname), &sha256)
        };
        members.iter().map(one).collect()
    }

    /// A kept file, open, if its content still has the digest. One that has not is passed over, and
    /// replaced by the next download.
    pub fn lookup(&self, sha256: &Digest, file: &str) -> Option<(PathBuf, File)> {
        verified(self.path(sha256, file), sha256)
    }

    /// Copies a file into the cache.
    pub fn keep(&self, path: &Path, from: &Path) -> Result<()> {
        let mut source = File::open(from).map_err(|e| Error::io("opening", from, &e))?;
        publish(path, |file| {
            std::io::copy(&mut source, file).map_err(|e| Error::io("writing", path, &e))?;
            Ok(())
        })
    }

    /// Runs `work` with the wheel's folder locked, so that however many processes ask for a wheel, one fetches it: they
    /// wait for each other, and who comes second finds what the first one left.
    pub fn locked<T>(&self, sha256: &Digest, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let folder = self.root.join("wheels").join(sha256.to_string());
        let not_writable = |e: std::io::Error| {
            let fault = Error::io("writing to the cache folder", &folder, &e);
            Error::Refused(format!("{fault}; {} names another cache folder", super::env::CACHE_DIR))
        };
        fs::create_dir_all(&folder).map_err(not_writable)?;
        let lock = File::options().create(true).truncate(false).write(true).open(folder.join(".lock"));
        let lock = lock.map_err(not_writable)?;
        lock.lock().map_err(not_writable)?;
        sweep(&folder);
        work()
    }
}

/// Opens a file if its content has this digest. Whoever the folder belongs to, only these bytes come out of it: they are
/// read again through the same descriptor, and checked where they arrive.
fn verified(path: PathBuf, sha256: &Digest) -> Option<(PathBuf, File)> {
    let mut opened = File::open(&path).ok()?;
    let (found, _) = hash_reader(&opened).ok()?;
    opened.seek(SeekFrom::Start(0)).ok()?;
    (found == *sha256).then_some((path, opened))
}

/// Removes what a killed process left. The folder's lock must be held: then nobody else writes here.
fn sweep(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
            let _ = fs::remove_file(entry.path());
        }
    }
}
