//! Where the sequences of a packed batch start: checked on the host, copied to the GPU.

use crate::error::{FlashInferError, Result};

#[cfg(feature = "cudarc")]
pub use gpu::{CapturedCuSeqlens, CuSeqlensMut, DeviceCuSeqlens, Sequences};

/// Where the sequences of a packed batch start: `0 = c0 ≤ c1 ≤ … ≤ cN`, the number of tokens. Sequences may be empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CuSeqlens {
    offsets: Vec<i64>,
    runs: Vec<Run>,
}

/// Sequences one after the other that have tokens, or that have none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) first: usize,
    pub(crate) count: usize,
    pub(crate) empty: bool,
}

fn invalid<T>(found: String, expected: impl Into<String>) -> Result<T> {
    let expected = expected.into();
    Err(FlashInferError::InvalidArgument { function: "CuSeqlens", argument: "cu_seqlens", found, expected })
}

impl CuSeqlens {
    /// From `N + 1` offsets.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) unless they start with 0, do not decrease, name at least one
    /// sequence, and fit 32 bits.
    pub fn from_offsets(offsets: &[i64]) -> Result<Self> {
        let [first, .., last] = offsets else {
            return invalid(format!("{offsets:?}"), "offsets of at least one sequence, two numbers or more");
        };
        if *first != 0 {
            return invalid(format!("{first} at the start"), "0 there");
        }
        if let Some(i) = offsets.windows(2).position(|pair| pair[1] < pair[0]) {
            let found = format!("{} at {i} and {} after it", offsets[i], offsets[i + 1]);
            return invalid(found, "offsets that do not decrease");
        }
        if *last > i32::MAX.into() || offsets.len() > i32::MAX as usize {
            let found = format!("for {last} tokens of {} sequences", offsets.len() - 1);
            return invalid(found, "numbers that fit 32 bits");
        }
        let mut runs: Vec<Run> = Vec::new();
        for (sequence, pair) in offsets.windows(2).enumerate() {
            let empty = pair[0] == pair[1];
            match runs.last_mut().filter(|run| run.empty == empty) {
                Some(run) => run.count += 1,
                None => runs.push(Run { first: sequence, count: 1, empty }),
            }
        }
        Ok(Self { offsets: offsets.to_vec(), runs })
    }

    /// From the sequences' lengths.
    ///
    /// # Errors
    /// As for [`from_offsets`](Self::from_offsets), and for a negative length.
    pub fn from_lengths(lengths: &[i64]) -> Result<Self> {
        let mut offsets = Vec::with_capacity(lengths.len() + 1);
        offsets.push(0i64);
        let mut sum = 0i64;
        for &length in lengths {
            sum = if length < 0 { -1 } else { sum.saturating_add(length) };
            offsets.push(sum);
        }
        Self::from_offsets(&offsets)
    }

    /// The number of sequences.
    pub fn sequences(&self) -> usize {
        self.offsets.len() - 1
    }

    /// The number of tokens of all sequences.
    pub fn tokens(&self) -> i64 {
        self.offsets[self.sequences()]
    }

    /// The offsets.
    pub fn offsets(&self) -> &[i64] {
        &self.offsets
    }

    pub(crate) fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// These sequences in the place of others, which a captured call has the sizes of: filled up to as many sequences and
    /// tokens with sequences of one token, the last of which takes what is left.
    #[cfg_attr(not(feature = "cudarc"), allow(dead_code, reason = "GPU memory comes from cudarc"))]
    fn filled_up(&self, capacity: &Self) -> Result<Self> {
        let (sequences, tokens) = (capacity.sequences(), capacity.tokens());
        let described = || format!("{} tokens of {} sequences", self.tokens(), self.sequences());
        if [self, capacity].iter().any(|cu_seqlens| cu_seqlens.runs.iter().any(|run| run.empty)) {
            return invalid(
                described() + ", with an empty one here or where it was captured",
                "a token in each sequence",
            );
        }
        let Some(more) = sequences.checked_sub(self.sequences()) else {
            return invalid(described(), format!("at most {sequences} sequences, as captured"));
        };
        let left = tokens - self.tokens();
        if left < more as i64 || (more == 0 && left != 0) {
            let expected = format!(
                "what fills up to the captured {tokens} tokens of {sequences} sequences with a token or more for each \
                 sequence that is missing"
            );
            return invalid(described(), expected);
        }
        let mut offsets = self.offsets.clone();
        offsets.extend((1..=more as i64).map(|i| self.tokens() + i));
        if more > 0 {
            offsets[sequences] = tokens;
        }
        Self::from_offsets(&offsets)
    }
}

#[cfg(feature = "cudarc")]
mod gpu {
    use std::sync::Arc;

    use cudarc::driver::{CudaContext, CudaSlice, CudaStream, CudaViewMut, DeviceSlice};

    use super::{CuSeqlens, invalid};
    use crate::buffers::check_context;
    use crate::error::{Result, driver};
    use crate::graph::{GraphRef, Launched, Leaf, Site};
    use crate::owner::refuse_capture;
    use crate::tensor::TensorRef;

    /// [`CuSeqlens`] with its copy on a GPU.
    #[derive(Debug)]
    pub struct DeviceCuSeqlens {
        host: CuSeqlens,
        buffer: CudaSlice<i64>,
    }

    impl CuSeqlens {
        /// Copies the offsets to the stream's GPU, asynchronously.
        ///
        /// # Errors
        /// [`Cuda`](crate::FlashInferError::Cuda) where there is no memory, and
        /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for a stream that captures, whose graph would copy later.
        pub fn to_device(&self, stream: &Arc<CudaStream>) -> Result<DeviceCuSeqlens> {
            refuse_capture("cu_seqlens", stream)?;
            let mut runs = Vec::with_capacity(self.offsets.len());
            for run in self.runs.iter().filter(|run| !run.empty) {
                let offsets = &self.offsets[run.first..=run.first + run.count];
                runs.extend(offsets.iter().map(|offset| offset - offsets[0]));
            }
            // As many as there are offsets, so that the whole can be described by its length.
            runs.resize(runs.len().max(self.offsets.len()), 0);
            let buffer = stream.clone_htod(&runs).map_err(driver("copying cu_seqlens"))?;
            Ok(DeviceCuSeqlens { host: self.clone(), buffer })
        }
    }

    impl DeviceCuSeqlens {
        /// The offsets on the host.
        pub fn host(&self) -> &CuSeqlens {
            &self.host
        }

        /// Offsets that are on the GPU already, in sequences that each have a token.
        ///
        /// # Errors
        /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) unless `offsets` are right by themselves, none of the
        /// sequences is empty, and the buffer is as long.
        ///
        /// # Safety
        /// The buffer must hold these very offsets whenever it is used.
        pub unsafe fn from_device(offsets: &[i64], buffer: CudaSlice<i64>) -> Result<Self> {
            let host = CuSeqlens::from_offsets(offsets)?;
            if host.runs.iter().any(|run| run.empty) || buffer.len() != offsets.len() {
                let found = format!("{} numbers on the GPU for {offsets:?}", buffer.len());
                return invalid(found, "as many as there are offsets, of sequences that each have a token");
            }
            Ok(Self { host, buffer })
        }

        pub(crate) fn offsets<'a>(&'a self, stream: &'a CudaStream) -> Result<TensorRef<'a>> {
            TensorRef::from_cudarc(stream, &self.buffer, &[self.host.offsets.len() as i64])
        }
    }

    /// Offsets, on the host or on a GPU.
    #[derive(Debug, Clone, Copy)]
    #[non_exhaustive]
    pub enum Sequences<'a> {
        /// On the host, for tensors there.
        Host(&'a CuSeqlens),
        /// On a GPU.
        Device(&'a DeviceCuSeqlens),
    }

    impl<'a> From<&'a CuSeqlens> for Sequences<'a> {
        fn from(sequences: &'a CuSeqlens) -> Self {
            Self::Host(sequences)
        }
    }

    impl<'a> From<&'a DeviceCuSeqlens> for Sequences<'a> {
        fn from(sequences: &'a DeviceCuSeqlens) -> Self {
            Self::Device(sequences)
        }
    }

    /// [`DeviceCuSeqlens`] in a capture.
    #[derive(Debug)]
    pub struct CapturedCuSeqlens<'a> {
        host: &'a CuSeqlens,
        buffer: GraphRef<'a, i64>,
    }

    impl CapturedCuSeqlens<'_> {
        pub(crate) fn host(&self) -> &CuSeqlens {
            self.host
        }

        pub(crate) fn offsets(&self) -> Result<TensorRef<'_>> {
            self.buffer.read(&[self.host.offsets.len() as i64])
        }
    }

    /// [`DeviceCuSeqlens`] between a graph's launches.
    #[derive(Debug)]
    pub struct CuSeqlensMut<'a> {
        host: &'a mut CuSeqlens,
        buffer: CudaViewMut<'a, i64>,
    }

    impl CuSeqlensMut<'_> {
        /// The offsets as they are, whose numbers of sequences and tokens the graph was captured with.
        pub fn host(&self) -> &CuSeqlens {
            self.host
        }

        /// Other sequences for the launches to come, copied asynchronously on `stream`. They may be fewer and shorter: those
        /// that are missing are filled up with sequences of one token behind them, and the last of those takes the tokens
        /// that are left. What the graph computes for these means nothing.
        ///
        /// # Errors
        /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) for what does not fit the captured sizes, or an empty
        /// sequence among them, for a stream of another `CudaContext` than the graph's, or one that captures;
        /// [`Cuda`](crate::FlashInferError::Cuda).
        pub fn replace(&mut self, sequences: &CuSeqlens, stream: &Arc<CudaStream>) -> Result<()> {
            check_context("cu_seqlens", "stream", stream.context(), self.buffer.stream().context())?;
            refuse_capture("cu_seqlens", stream)?;
            let filled = sequences.filled_up(self.host)?;
            stream.memcpy_htod(&filled.offsets, &mut self.buffer).map_err(driver("copying cu_seqlens"))?;
            *self.host = filled;
            Ok(())
        }
    }

    impl Leaf for DeviceCuSeqlens {
        type Captured<'a> = CapturedCuSeqlens<'a>;
        type Views<'a> = CuSeqlensMut<'a>;

        fn check(&self, context: &Arc<CudaContext>) -> Result<()> {
            self.buffer.check(context)
        }

        fn captured<'a>(&'a mut self, site: Site) -> CapturedCuSeqlens<'a> {
            CapturedCuSeqlens { host: &self.host, buffer: self.buffer.captured(site).into_ref() }
        }

        fn views(&mut self) -> CuSeqlensMut<'_> {
            CuSeqlensMut { host: &mut self.host, buffer: self.buffer.as_view_mut() }
        }

        fn take_over(&mut self, stream: &CudaStream) {
            self.buffer.take_over(stream);
        }

        fn hand_back(&mut self, launched: &Launched<'_>) -> Result<()> {
            self.buffer.hand_back(launched)
        }
    }

    crate::graph::graph_leaf!(DeviceCuSeqlens);
}

#[cfg(test)]
mod tests {
    use super::CuSeqlens;
    use crate::error::FlashInferError;

    fn filled(lengths: &[i64], capacity: &[i64]) -> crate::error::Result<Vec<i64>> {
        let of = |lengths: &[i64]| CuSeqlens::from_lengths(lengths).unwrap();
        of(lengths).filled_up(&of(capacity)).map(|filled| filled.offsets().to_vec())
    }

    #[test]
    fn missing_sequences_have_a_token_each_and_the_last_of_them_the_rest() {
        assert_eq!(filled(&[3, 5], &[4, 4]).unwrap(), [0, 3, 8], "as many, of other lengths");
        assert_eq!(filled(&[3], &[4, 4]).unwrap(), [0, 3, 8], "one is missing and takes what is left");
        assert_eq!(filled(&[2], &[1, 1, 1, 5]).unwrap(), [0, 2, 3, 4, 8]);
        assert_eq!(filled(&[5], &[1, 1, 1, 5]).unwrap(), [0, 5, 6, 7, 8], "exactly a token for each");
        assert_eq!(filled(&[1], &[1]).unwrap(), [0, 1]);
    }

    #[test]
    fn sequences_that_do_not_fit_the_captured_sizes_are_refused() {
        let refused = |lengths: &[i64], capacity: &[i64], says: &str| {
            let error = filled(lengths, capacity).unwrap_err();
            assert!(matches!(error, FlashInferError::InvalidArgument { argument: "cu_seqlens", .. }), "{error}");
            assert!(error.to_string().contains(says), "{error}");
        };
        refused(&[1, 1, 1], &[4, 4], "at most 2 sequences");
        refused(&[4, 3], &[4, 4], "what fills up to the captured 8 tokens of 2 sequences");
        refused(&[4, 5], &[4, 4], "what fills up to the captured 8 tokens of 2 sequences");
        refused(&[6], &[1, 1, 1, 5], "a token or more for each sequence that is missing");
        refused(&[9], &[4, 4], "what fills up");
        refused(&[3, 0], &[4, 4], "a token in each sequence");
        refused(&[3], &[4, 0, 4], "a token in each sequence");
    }
}
