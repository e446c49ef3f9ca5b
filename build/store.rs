//! Files that appear whole or not at all, and the cache of verified wheels, one folder per digest.

use std::cell::Cell;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use super::digest::{Digest, hash_reader};
use super::error::{Error, Result};
use super::lock::Member;
use super::report::say;

/// What temporaries are called, before a random part.
pub const TEMPORARY: &str = ".tmp-";
/// How the name of a wheel that is not yet complete ends.
pub const PART: &str = ".part";
/// The lock file of a wheel's folder.
pub const LOCK: &str = ".lock";
/// How long another process may hold a lock without anything coming into the folder. Longer than a fetch may wait for a server.
const PATIENCE: Duration = Duration::from_secs(180);
/// When a user is told that a build waits, and how often.
const QUIET: Duration = Duration::from_secs(1);
const REMINDER: Duration = Duration::from_secs(30);
/// Between two tries to take a lock.
const PAUSE: Duration = Duration::from_millis(50);
/// A temporary that nobody wrote to for so long is nobody's.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);

/// Opens a file for reading: every file that somebody else may have put there. What is no file, and would stop a build that
/// opens it, is refused at once: a pipe waits for somebody who writes.
pub fn open_file(path: &Path) -> io::Result<File> {
    let file = |metadata: &fs::Metadata| match metadata.is_file() {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a file, but a folder, a pipe or a device")),
    };
    file(&fs::metadata(path)?)?;
    let mut options = File::options();
    #[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    // O_NONBLOCK: what lies there may be another thing by now.
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, 0o4000);
    let opened = options.read(true).open(path)?;
    file(&opened.metadata()?)?;
    Ok(opened)
}

/// The text of such a file.
pub fn read_text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    open_file(path)?.read_to_string(&mut text)?;
    Ok(text)
}

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
    patience: Duration,
    /// Whether work goes on in a folder that others may write to meanwhile, since it cannot be locked.
    unlocked: Cell<bool>,
}

impl Store {
    pub fn new(root: PathBuf) -> Self {
        Self { root, patience: PATIENCE, unlocked: Cell::new(false) }
    }

    /// Another process may hold a lock for so long without anything coming into the folder.
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
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

    /// Writes a wheel whose folder is locked, by way of a file that outlives a failure: the next try, of this build or of
    /// another one, goes on where this one ended. Only what turned out to be something else is thrown away.
    pub fn publish_in_parts<T>(
        &self,
        sha256: &Digest,
        file: &str,
        write: impl FnOnce(&mut File) -> Result<T>,
    ) -> Result<T> {
        let path = self.path(sha256, file);
        if self.unlocked.get() {
            return publish(&path, write);
        }
        let part = make_folder_of(&path)?.join(format!("{file}{PART}"));
        let failed = |e: io::Error| Error::io("writing", &part, &e);
        let mut opened = open_part(&part).map_err(failed)?;
        // Where there are no locks, another process may write the same part: each has a file of its own then.
        if opened.try_lock().is_err() {
            return publish_by_way_of(&self.folder(sha256), &path, write);
        }
        match write(&mut opened) {
            Ok(value) => {
                opened.sync_all().map_err(failed)?;
                fs::rename(&part, &path).map_err(|e| {
                    let _ = fs::remove_file(&part);
                    Error::io("naming", &path, &e)
                })?;
                Ok(value)
            }
            Err(Error::Unavailable(fault)) if opened.metadata().is_ok_and(|metadata| metadata.len() > 0) => {
                Err(Error::Unavailable(format!("{fault} (what came is kept: the next build goes on after it)")))
            }
            Err(fault) => {
                let _ = fs::remove_file(&part);
                Err(fault)
            }
        }
    }

    fn folder(&self, sha256: &Digest) -> PathBuf {
        self.root.join("wheels").join(sha256.to_string())
    }

    /// Whether this wheel and these members can be kept here: whether the folders are there, or can be made, and files in them.
    pub fn check_writable(&self, wheel: &Digest, members: &[&Member]) -> Result<()> {
        let folder = self.folder(wheel);
        fs::create_dir_all(&folder).map_err(|e| unwritable(&folder, &e))?;
        tempfile::Builder::new().prefix(TEMPORARY).tempfile_in(&folder).map_err(|e| unwritable(&folder, &e))?;
        for member in members {
            let Some(sha256) = member.sha256 else { continue };
            let path = self.member_path(&sha256, &member.soname);
            let folder = path.parent().unwrap_or(&self.root);
            fs::create_dir_all(folder).map_err(|e| unwritable(folder, &e))?;
        }
        Ok(())
    }

    /// Runs `work` with the wheel's folder locked, so that however many processes ask for a wheel, one fetches it: they
    /// wait for each other, and who comes second finds what the first one left. Where the file system has no locks, several
    /// fetch it: a file is published by rename and used by digest, so that nothing worse comes of that.
    pub fn locked<T>(&self, sha256: &Digest, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let folder = self.folder(sha256);
        let lock = self.lock(&folder)?;
        self.unlocked.set(lock.is_none());
        sweep(&folder, lock.is_some());
        work()
    }

    /// Waits for a folder's lock, which ends with the file that this answers, or with the process. None where there are no
    /// locks.
    fn lock(&self, folder: &Path) -> Result<Option<File>> {
        let path = folder.join(LOCK);
        loop {
            fs::create_dir_all(folder).map_err(|e| unwritable(folder, &e))?;
            let lock = match open_lock(&path) {
                // Cleaned away between the two lines above.
                Err(e) if e.kind() == io::ErrorKind::NotFound && !folder.exists() => continue,
                Err(e) => return Err(unwritable(folder, &e)),
                Ok(lock) => lock,
            };
            if !self.wait_for(&lock, folder)? {
                return Ok(None);
            }
            // Whoever cleaned the cache meanwhile removed the file, and a lock on what has no name keeps nobody out.
            if is_still_at(&lock, &path) {
                return Ok(Some(lock));
            }
        }
    }

    /// Takes a lock. Whoever holds it may take as long as something comes into the folder. Whether there are locks here.
    fn wait_for(&self, lock: &File, folder: &Path) -> Result<bool> {
        let (began, mut told, mut seen) = (Instant::now(), None::<Instant>, Vec::new());
        let mut moved = began;
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(true),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Interrupted => continue,
                // Lustre without `-o flock`, NFS without a lock server, and what else calls this by other numbers.
                Err(TryLockError::Error(_)) => return Ok(false),
            }
            let (shown, now) = (folder.join(LOCK), Instant::now());
            let found = coming_in(folder);
            if found != seen {
                (seen, moved) = (found, now);
            }
            if now - moved >= self.patience {
                return Err(Error::Refused(format!(
                    "{} has held {} for {} s, and nothing has come into that folder for {} s; wait for it or end it, then build \
                     again, or give this build another cache folder by {}",
                    holder(lock),
                    shown.display(),
                    (now - began).as_secs(),
                    (now - moved).as_secs(),
                    super::env::CACHE_DIR
                )));
            }
            if now - told.unwrap_or(began) >= if told.is_some() { REMINDER } else { QUIET } {
                told = Some(now);
                let bytes: u64 = seen.iter().map(|(_, length, _)| length).sum();
                let fetching = match bytes {
                    0 => String::new(),
                    bytes => format!(", and has {:.1} MB of what it fetches there", bytes as f64 / 1e6),
                };
                say(format_args!("waiting for {}, which holds {}{fetching}", holder(lock), shown.display()));
            }
            std::thread::sleep(PAUSE);
        }
    }
}

fn unwritable(folder: &Path, e: &io::Error) -> Error {
    let fault = Error::io("writing to the cache folder", folder, e);
    Error::Refused(format!("{fault}; {} names another cache folder", super::env::CACHE_DIR))
}

/// A lock file, which is made where it is not there. That of another user, who lets others read it, serves as well.
fn open_lock(path: &Path) -> io::Result<File> {
    // Opening a pipe would wait for somebody who reads.
    if fs::metadata(path).is_ok_and(|there| !there.is_file()) {
        return open_file(path);
    }
    match File::options().create(true).truncate(false).read(true).write(true).open(path) {
        Err(e) if matches!(e.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem) => {
            open_file(path).map_err(|_| e)
        }
        lock => lock,
    }
}

/// What lies in a folder besides its lock: names, lengths and times. It changes while a process fetches.
fn coming_in(folder: &Path) -> Vec<(std::ffi::OsString, u64, Option<SystemTime>)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().filter(|entry| entry.file_name() != LOCK);
    let of = |entry: fs::DirEntry| {
        let metadata = entry.metadata().ok();
        let (length, time) = metadata.map_or((0, None), |metadata| (metadata.len(), metadata.modified().ok()));
        (entry.file_name(), length, time)
    };
    let mut all: Vec<_> = entries.map(of).collect();
    all.sort();
    all
}

/// Who holds the lock on a file, where the kernel tells.
fn holder(file: &File) -> String {
    #[cfg(target_os = "linux")]
    {
        use std::os::unix::fs::MetadataExt;
        let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
        let inode = file.metadata().map(|metadata| format!(":{}", metadata.ino())).unwrap_or_default();
        // `1: FLOCK  ADVISORY  WRITE 1234 08:01:5678 0 EOF`; a line with an arrow waits.
        let process = |line: &str| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let [_, "FLOCK", _, "WRITE", process, place, ..] = fields[..] else { return None };
            (place.ends_with(&inode) && process.parse::<u32>().is_ok_and(|id| id > 0)).then(|| process.to_owned())
        };
        if let Some(process) = locks.lines().find_map(process) {
            return format!("process {process}");
        }
    }
    let _ = file;
    "another process".to_owned()
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

/// Opens what there is of a file, or an empty one. Whatever else lies there is put out of the way: through a link, or a
/// second name, the file of somebody else would be written.
fn open_part(path: &Path) -> io::Result<File> {
    let open = || File::options().create(true).truncate(false).read(true).write(true).open(path);
    if path.symlink_metadata().is_ok_and(|metadata| metadata.is_file()) {
        let part = open()?;
        if is_still_at(&part, path) && is_sole_name(&part) {
            return Ok(part);
        }
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    File::options().create_new(true).read(true).write(true).open(path)
}

#[cfg(unix)]
fn is_sole_name(file: &File) -> bool {
    use std::os::unix::fs::MetadataExt;
    file.metadata().is_ok_and(|metadata| metadata.nlink() == 1)
}

#[cfg(not(unix))]
fn is_sole_name(_: &File) -> bool {
    true
}

/// Copies a file that must have this digest. It is the copy that is hashed: the source may change while it is read.
fn publish_copy(from: &Path, to: &Path, folder: &Path, sha256: &Digest) -> Result<()> {
    let mut source = open_file(from).map_err(|e| Error::io("opening", from, &e))?;
    let failed = |e: io::Error| Error::io(&format!("copying {} to", from.display()), to, &e);
    publish_by_way_of(folder, to, |copy| {
        io::copy(&mut source, copy).map_err(failed)?;
        copy.rewind().map_err(failed)?;
        let (found, _) = hash_reader(copy).map_err(failed)?;
        if found != *sha256 {
            return Err(Error::Unavailable(format!("{} has sha256 {found}, expected {sha256}", from.display())));
        }
        Ok(())
    })
}

/// Opens a file if its content has this digest. Somebody else may write it after that: whoever reads it again compares what
/// arrives, or reads a wheel by [`take`](super::snapshot::take).
fn verified(path: PathBuf, sha256: &Digest) -> Option<(PathBuf, File)> {
    let mut opened = open_file(&path).ok()?;
    let (found, _) = hash_reader(&opened).ok()?;
    opened.seek(SeekFrom::Start(0)).ok()?;
    (found == *sha256).then_some((path, opened))
}

/// Removes what a killed process left. With the folder's lock nobody else writes here; without, what was written to lately may
/// be somebody's.
fn sweep(folder: &Path, locked: bool) {
    // The files of whatever a link leads to are not ours.
    if folder.is_symlink() {
        return;
    }
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let age =
            entry.metadata().and_then(|metadata| metadata.modified()).map(|time| time.elapsed().unwrap_or_default());
        let nobodys = locked || age.is_ok_and(|age| age > ABANDONED);
        if nobodys && entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
            let _ = fs::remove_file(entry.path());
        }
    }
}
