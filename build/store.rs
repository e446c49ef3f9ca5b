//! Files that appear whole or not at all, and the cache of verified wheels, one folder per digest.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::digest::{Digest, hash_reader};
use super::error::{Error, Result};
use super::lock::Member;

/// What temporaries are called, before a random part.
pub const TEMPORARY: &str = ".tmp-";
/// The lock file of a wheel's folder.
pub const LOCK: &str = ".lock";

/// Writes a file through a unique temporary beside it, syncs it, and gives it its name by rename. Whatever fails, no
/// half of it is left behind.
pub fn publish<T>(path: &Path, write: impl FnOnce(&mut File) -> Result<T>) -> Result<T> {
    publish_by_way_of(make_folder_of(path)?, path, write)
}

fn make_folder_of(path: &Path) -> Result<&Path> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(|e| Error::io("creating the folder", folder, &e))?;
    Ok(folder)
}

/// As [`publish`], with the temporary in another folder of the same file system. Both folders must be there.
fn publish_by_way_of<T>(folder: &Path, path: &Path, write: impl FnOnce(&mut File) -> Result<T>) -> Result<T> {
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
        self.folder(sha256).join(file)
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

    /// Writes a member of a wheel, whose folder must be locked: the temporary lies in there, where
    /// [`locked`](Self::locked) removes what a killed process left of it.
    pub fn publish_member<T>(
        &self,
        wheel: &Digest,
        path: &Path,
        write: impl FnOnce(&mut File) -> Result<T>,
    ) -> Result<T> {
        make_folder_of(path)?;
        publish_by_way_of(&self.folder(wheel), path, write)
    }

    /// Copies a member of a wheel into the cache, unless it is there already.
    pub fn keep_member(&self, wheel: &Digest, sha256: &Digest, soname: &str, from: &Path) -> Result<()> {
        let path = self.member_path(sha256, soname);
        self.locked(wheel, || {
            if verified(path.clone(), sha256).is_some() {
                return Ok(());
            }
            make_folder_of(&path)?;
            publish_copy(from, &path, &self.folder(wheel), sha256)
        })
    }

    /// Copies a wheel into the cache; its folder must be locked.
    pub fn keep_wheel(&self, sha256: &Digest, file: &str, from: &Path) -> Result<()> {
        let folder = self.folder(sha256);
        publish_copy(from, &folder.join(file), &folder, sha256)
    }

    fn folder(&self, sha256: &Digest) -> PathBuf {
        self.root.join("wheels").join(sha256.to_string())
    }

    /// Runs `work` with the wheel's folder locked, so that however many processes ask for a wheel, one fetches it: they
    /// wait for each other, and who comes second finds what the first one left.
    pub fn locked<T>(&self, sha256: &Digest, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let folder = self.folder(sha256);
        let _lock = lock(&folder).map_err(|e| {
            let fault = Error::io("writing to the cache folder", &folder, &e);
            Error::Refused(format!("{fault}; {} names another cache folder", super::env::CACHE_DIR))
        })?;
        sweep(&folder);
        work()
    }
}

/// Waits for a folder's lock, which ends with the file that this answers, or with the process.
fn lock(folder: &Path) -> std::io::Result<File> {
    let path = folder.join(LOCK);
    loop {
        fs::create_dir_all(folder)?;
        let lock = match File::options().create(true).truncate(false).write(true).open(&path) {
            // Cleaned away between the two lines above.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && !folder.exists() => continue,
            lock => lock?,
        };
        lock.lock()?;
        // Whoever cleaned the cache meanwhile removed the file, and a lock on what has no name keeps nobody out.
        if is_still_at(&lock, &path) {
            return Ok(lock);
        }
    }
}

#[cfg(unix)]
fn is_still_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let place = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    fs::metadata(path).is_ok_and(|there| file.metadata().is_ok_and(|held| place(held) == place(there)))
}

/// Elsewhere nobody can remove a file that is open.
#[cfg(not(unix))]
fn is_still_at(_: &File, _: &Path) -> bool {
    true
}

/// Copies a file that must have this digest. It is the copy that is hashed: the source may change while it is read.
fn publish_copy(from: &Path, to: &Path, folder: &Path, sha256: &Digest) -> Result<()> {
    let mut source = File::open(from).map_err(|e| Error::io("opening", from, &e))?;
    let failed = |e: std::io::Error| Error::io(&format!("copying {} to", from.display()), to, &e);
    publish_by_way_of(folder, to, |copy| {
        std::io::copy(&mut source, copy).map_err(failed)?;
        copy.rewind().map_err(failed)?;
        let (found, _) = hash_reader(copy).map_err(failed)?;
        if found != *sha256 {
            return Err(Error::Unavailable(format!("{} has sha256 {found}, expected {sha256}", from.display())));
        }
        Ok(())
    })
}

/// Opens a file if its content has this digest. Whoever the folder belongs to, only these bytes come out of it: they
/// are read again through the same descriptor, and checked where they arrive.
fn verified(path: PathBuf, sha256: &Digest) -> Option<(PathBuf, File)> {
    // Opening a pipe that somebody planted would wait for ever.
    if !path.is_file() {
        return None;
    }
    let mut opened = File::open(&path).ok()?;
    let (found, _) = hash_reader(&opened).ok()?;
    opened.seek(SeekFrom::Start(0)).ok()?;
    (found == *sha256).then_some((path, opened))
}

/// Removes what a killed process left. The folder's lock must be held: then nobody else writes here.
fn sweep(folder: &Path) {
    // The files of whatever a link leads to are not ours.
    if folder.is_symlink() {
        return;
    }
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
            let _ = fs::remove_file(entry.path());
        }
    }
}
