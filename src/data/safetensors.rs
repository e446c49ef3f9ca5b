//! Files of tensors in the safetensors format: eight bytes of a length, a JSON header, the tensors' bytes.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use super::dtype::DataType;
use super::error::{Finding, io, not_a_pointer, refused};
use super::json::{Document, Json, MAX_BYTES, field, text};
use super::named::Named;
use super::tensor::{HostTensor, extent};
use crate::error::Result;

const METADATA: &str = "__metadata__";
const DAMAGED: &str = "fetch the file anew";

/// A tensor's place in a file.
#[derive(Debug, Clone)]
struct Entry {
    dtype: DataType,
    shape: Vec<u64>,
    begin: u64,
    len: u64,
}

/// A safetensors file whose header was read and checked: tensors that cover the file without a gap or an overlap.
#[derive(Debug)]
pub struct Safetensors {
    path: PathBuf,
    file: File,
    entries: Named<Entry>,
    metadata: Named<String>,
}

impl Safetensors {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// [`Io`](crate::FlashInferError::Io), and [`Data`](crate::FlashInferError::Data) for a pointer of Git LFS in the file's place, a header
    /// that is damaged, types that are not known, and places that are not those of such tensors.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut file = File::open(path).map_err(io("opening", path))?;
        let size = file.metadata().map_err(io("reading", path))?.len();
        let name = path.display().to_string();
        let refuse = |place: &str, found: String, expected: &str| {
            let (place, expected) = (place.to_owned(), expected.to_owned());
            refused(&name, Finding { place, found, expected, remedy: DAMAGED })
        };
        let mut begin = Vec::new();
        (&mut file).take(64).read_to_end(&mut begin).map_err(io("reading", path))?;
        not_a_pointer(path, &begin)?;
        let Some(length) = begin.first_chunk::<8>() else {
            return Err(refuse("the beginning", format!("{} bytes", begin.len()), "a length of 8 bytes"));
        };
        let length = u64::from_le_bytes(*length);
        if length > MAX_BYTES as u64 || length > size.saturating_sub(8) {
            let found = format!("a header of {length} bytes in a file of {size}");
            return Err(refuse("the beginning", found, "a header inside of the file, and of at most 64 MiB"));
        }
        let mut header = vec![0; length as usize];
        read_exact_at(&file, &mut header, 8).map_err(io("reading", path))?;
        let data = size - 8 - length;
        let (entries, metadata) = entries(&name, &header, data)?;
        let entries = entries.into_iter().map(|(name, entry)| {
            let begin = entry.begin + 8 + length;
            (name, Entry { begin, ..entry })
        });
        Ok(Self { path: path.to_path_buf(), file, entries: Named::distinct(entries.collect()), metadata })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The texts that the file has beside its tensors.
    pub fn metadata(&self) -> &Named<String> {
        &self.metadata
    }

    /// The tensors' names, in the header's order.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.entries.names()
    }

    /// A tensor's element type and shape.
    pub fn form(&self, name: &str) -> Option<(&DataType, &[u64])> {
        self.entries.get(name).map(|entry| (&entry.dtype, entry.shape.as_slice()))
    }

    /// Reads a tensor.
    ///
    /// # Errors
    /// [`Data`](crate::FlashInferError::Data) for a name that is not there, which lists those that are; [`Io`](crate::FlashInferError::Io).
    pub fn read(&self, name: &str) -> Result<HostTensor> {
        let Some(entry) = self.entries.get(name) else {
            let names: Vec<_> = self.names().take(20).collect();
            return Err(refused(
                &self.path.display().to_string(),
                Finding {
                    place: "the header".to_owned(),
                    found: format!("the tensors {names:?}"),
                    expected: format!("one of the name {name:?}"),
                    remedy: "correct the workload's `tensor_key`",
                },
            ));
        };
        let mut tensor = HostTensor::zeros(entry.dtype.clone(), &entry.shape)?;
        read_exact_at(&self.file, tensor.bytes_mut(), entry.begin).map_err(io("reading", &self.path))?;
        Ok(tensor)
    }
}

/// Fills `bytes` from a place in the file, which other threads may read meanwhile.
#[cfg(unix)]
fn read_exact_at(file: &File, bytes: &mut [u8], begin: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, begin)
}

/// Fills `bytes` from a place in the file, which other threads may read meanwhile.
#[cfg(windows)]
fn read_exact_at(file: &File, mut bytes: &mut [u8], mut begin: u64) -> std::io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, bytes, begin) {
            Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => {
                bytes = &mut bytes[read..];
                begin += read as u64;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// A file's tensors, and its texts.
type Header = (Vec<(String, Entry)>, Named<String>);

/// Reads a header for a file of so many bytes behind it.
fn entries(file: &str, header: &[u8], data: u64) -> Result<Header> {
    let document = Document::parse(file, header, 1)?;
    let (mut found, mut metadata) = (Vec::new(), Vec::new());
    for (name, cursor) in document.root().fields()? {
        if name == METADATA {
            for (name, value) in cursor.fields()? {
                metadata.push((name.to_owned(), value.text()?));
            }
            continue;
        }
        let word = cursor.need("dtype")?;
        let dtype = DataType::from_safetensors(&word.text()?)
            .ok_or_else(|| word.refuse("another type", "a type of safetensors that is known", "convert the file"))?;
        let shape = cursor.need("shape")?.items()?;
        let shape = shape.iter().map(super::json::Cursor::size).collect::<Result<Vec<_>>>()?;
        let offsets = cursor.need("data_offsets")?;
        let places = offsets.items()?.iter().map(super::json::Cursor::size).collect::<Result<Vec<_>>>()?;
        let &[begin, end] = places.as_slice() else {
            return Err(offsets.refuse(format!("{} numbers", places.len()), "begin and end", DAMAGED));
        };
        // Four bits have a shape of elements there, and one of bytes in a framework.
        let stored = match dtype {
            DataType::Float4E2m1 => packed(&shape),
            _ => Some(shape.clone()),
        };
        let bytes = stored.as_ref().and_then(|shape| extent(&dtype, shape)).map(|(_, bytes)| bytes as u64);
        let len = end.checked_sub(begin);
        match (stored, len) {
            (Some(shape), Some(len)) if bytes == Some(len) && end <= data => {
                found.push((name.to_owned(), Entry { dtype, shape, begin, len }));
            }
            _ => {
                let there = format!("bytes {begin} to {end} of {data} for {dtype}{shape:?}");
                return Err(offsets.refuse(there, "as many bytes as the tensor has, inside of the file", DAMAGED));
            }
        }
    }
    let mut places: Vec<(u64, u64)> = found.iter().map(|(_, entry)| (entry.begin, entry.len)).collect();
    places.sort_unstable();
    let end = places.iter().try_fold(0, |end, &(begin, len)| (begin == end).then_some(begin + len));
    if end != Some(data) {
        let found = "a gap or an overlap between tensors".to_owned();
        let (place, expected) = ("data_offsets".to_owned(), format!("tensors that cover all {data} bytes"));
        return Err(refused(file, Finding { place, found, expected, remedy: DAMAGED }));
    }
    Ok((found, Named::distinct(metadata)))
}

/// The shape in bytes of one in four-bit elements.
fn packed(shape: &[u64]) -> Option<Vec<u64>> {
    let (last, outer) = shape.split_last()?;
    (last % 2 == 0).then(|| outer.iter().copied().chain([last / 2]).collect())
}

/// Writes a tensor's bytes.
pub(crate) type Bytes<'a> = Box<dyn FnOnce(&mut dyn Write) -> std::io::Result<()> + 'a>;

/// A tensor of a file that is to be written.
pub(crate) struct Part<'a> {
    pub(crate) name: &'a str,
    pub(crate) dtype: DataType,
    pub(crate) shape: Vec<u64>,
    /// Writes as many bytes as type and shape say.
    pub(crate) write: Bytes<'a>,
}

/// Writes tensors into a new file, in the order that upstream's writer has: larger elements first, then by name.
///
/// # Errors
/// [`Data`](crate::FlashInferError::Data) for a type that the format does not have; [`Io`](crate::FlashInferError::Io), also where the file
/// is there already.
pub fn write_safetensors(path: impl AsRef<Path>, tensors: &[(&str, &HostTensor)]) -> Result<()> {
    let parts = tensors.iter().map(|&(name, tensor)| {
        let write = Box::new(|out: &mut dyn Write| out.write_all(tensor.bytes()));
        Part { name, dtype: tensor.dtype().clone(), shape: tensor.shape().to_vec(), write }
    });
    write_parts(path.as_ref(), &[], parts.collect())
}

/// As [`write_safetensors`], with texts beside the tensors. Of a file that cannot be written whole nothing is left.
pub(crate) fn write_parts(path: &Path, metadata: &[(&str, String)], mut parts: Vec<Part<'_>>) -> Result<()> {
    let alignment = |part: &Part<'_>| std::cmp::Reverse(part.dtype.size());
    parts.sort_by(|a, b| (alignment(a), a.name).cmp(&(alignment(b), b.name)));
    let (mut fields, mut begin) = (Vec::new(), 0i128);
    if !metadata.is_empty() {
        let texts = metadata.iter().map(|(name, value)| field(name, text(value)));
        fields.push(field(METADATA, Json::Object(texts.collect())));
    }
    for Part { name, dtype, shape, .. } in &parts {
        let refuse = |found: String, expected: &str, remedy| {
            let (place, expected) = (format!("the tensor {name:?}"), expected.to_owned());
            Err(refused(&path.display().to_string(), Finding { place, found, expected, remedy }))
        };
        if *name == METADATA || fields.iter().any(|(known, _): &(String, Json)| known == name) {
            return refuse("its name a second time".to_owned(), "a name of its own", "rename it");
        }
        let (Some(word), Some((_, bytes))) = (dtype.safetensors(), extent(dtype, shape)) else {
            return refuse(dtype.to_string(), "a type of safetensors", "convert it");
        };
        let mut shape: Vec<i128> = shape.iter().map(|&size| i128::from(size)).collect();
        if let (DataType::Float4E2m1, Some(last)) = (dtype, shape.last_mut()) {
            *last *= 2;
        }
        let end = begin + bytes as i128;
        let list = |numbers: &[i128]| Json::List(numbers.iter().map(|&number| Json::Int(number)).collect());
        let entry =
            vec![field("dtype", text(word)), field("shape", list(&shape)), field("data_offsets", list(&[begin, end]))];
        fields.push(field(name, Json::Object(entry)));
        begin = end;
    }
    let mut header = Json::Object(fields).compact();
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(io("making the folder", folder))?;
    }
    let mut file = File::create_new(path).map_err(io("writing", path))?;
    let written = (|| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        parts.into_iter().try_for_each(|part| (part.write)(&mut file))
    })();
    written.map_err(|error| {
        // Half a file is of no use. That it cannot be removed either would say nothing more.
        _ = std::fs::remove_file(path);
        io("writing", path)(error)
    })
}
