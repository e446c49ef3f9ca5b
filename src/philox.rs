//! Where random numbers come from: Philox 4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
//! 2011), the generator of FlashInfer's sampling kernels, with cuRAND's way to count.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{FlashInferError, Result};
use crate::stream::Stream;

/// The source of a sampling call's random numbers: a seed, and how far it has been used.
///
/// Nothing is hidden: a call takes its numbers from where the source stands and moves it on past them. Two sources that are
/// equal give the same tokens for the same probabilities on the same kind of GPU; whoever wants independent draws uses one
/// source for call after call, or another seed.
///
/// ```
/// use flashinfer_rs::Philox;
///
/// let mut philox = Philox::new(42);
/// assert_eq!((philox.seed(), philox.offset()), (42, 0));
/// philox.advance(5);
/// assert_eq!(philox.offset(), 8, "in steps of four numbers, which the generator makes at once");
/// assert_eq!(philox, Philox::new(42).at(8));
/// ```
///
/// # Graphs
/// FlashInfer's kernels take seed and offset by value, so a CUDA graph by itself replays the very numbers that it was captured
/// with. A call in a capture is therefore refused, with [`FrozenRandomness`](FlashInferError::FrozenRandomness), unless
/// - the source is one of the graph's buffers: then each launch draws anew, from where the source stands, and moves it on, as
///   calls without a graph do (`LaunchGraph` sets the captured kernels' numbers before it launches them); or
/// - the source says that the same numbers in every launch are meant: [`frozen`](Self::frozen).
#[derive(Debug)]
pub struct Philox {
    seed: u64,
    offset: u64,
    frozen: bool,
    /// Of a graph's buffer, the latest capture that it was given to.
    captured: Option<Arc<Drawing>>,
}

/// A source at the same place, which is no graph's buffer.
impl Clone for Philox {
    fn clone(&self) -> Self {
        let Self { seed, offset, frozen, captured: _ } = *self;
        Self { seed, offset, frozen, captured: None }
    }
}

impl PartialEq for Philox {
    fn eq(&self, other: &Self) -> bool {
        let of = |philox: &Self| (philox.seed, philox.offset, philox.frozen);
        of(self) == of(other)
    }
}

impl Eq for Philox {}

/// What is drawn in a capture from one of the graph's sources; nothing more once that has ended, wherever the program has moved
/// the source meanwhile, which it is given by `&mut`.
#[derive(Debug)]
pub(crate) struct Drawing(Mutex<Option<Vec<Drawn>>>);

impl Drawing {
    #[cfg_attr(not(feature = "cudarc"), allow(dead_code, reason = "graphs come from cudarc"))]
    fn begun() -> Arc<Self> {
        Arc::new(Self(Mutex::new(Some(Vec::new()))))
    }

    fn with<T>(&self, f: impl FnOnce(&mut Option<Vec<Drawn>>) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What was drawn; from now on nothing is.
    #[cfg(feature = "cudarc")]
    pub(crate) fn end(&self) -> Vec<Drawn> {
        self.with(|drawn| drawn.take().unwrap_or_default())
    }
}

/// A draw that a graph repeats, each time with numbers of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Drawn {
    /// What stands in the offset's place in the captured call, by which its kernel is found.
    pub(crate) mark: u64,
    /// How far it moves the source on.
    pub(crate) count: u64,
}

/// What stands in the seed's place in calls that are captured with a graph whose buffer their source is. With a mark that no other
/// has it is what no other argument of a kernel is by accident.
pub(crate) const MARKED: u64 = 0x5EED_F1A5_411F_E0D1;

impl Philox {
    /// A source that has not been used.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self { seed, offset: 0, frozen: false, captured: None }
    }

    /// The source at another place: after so many numbers of each of its sequences.
    #[must_use]
    pub const fn at(mut self, offset: u64) -> Self {
        self.offset = offset;
        self
    }

    /// A source whose numbers may be captured into a graph, which then draws the same ones in every launch.
    #[must_use]
    pub const fn frozen(mut self) -> Self {
        self.frozen = true;
        self
    }

    /// The seed.
    pub const fn seed(&self) -> u64 {
        self.seed
    }

    /// How many numbers of each of the seed's sequences were used.
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// Moves the source on past so many numbers, rounded up to a multiple of four. From 2⁶⁴ on it starts anew.
    pub const fn advance(&mut self, count: u64) {
        self.offset = self.offset.wrapping_add(count.saturating_add(3) & !3);
    }

    /// Seed and offset for a call, which then tells [how far it used](Self::used) the source.
    pub(crate) fn draw(&mut self) -> [u64; 2] {
        static MARKS: AtomicU64 = AtomicU64::new(0);
        let marked = self.captured.as_ref().and_then(|drawing| {
            drawing.with(|drawn| {
                let mark = MARKS.fetch_add(1, Ordering::Relaxed);
                drawn.as_mut()?.push(Drawn { mark, count: 0 });
                Some([MARKED, mark])
            })
        });
        marked.unwrap_or([self.seed, self.offset])
    }

    /// Moves the source on past what a call drew; in a capture, as far as each launch will. A call that draws nothing, without
    /// rows, launches nothing that is to be found.
    pub(crate) fn used(&mut self, count: u64) {
        let is_captured = self.captured.as_ref().is_some_and(|drawing| {
            drawing.with(|drawn| {
                let Some(drawn) = drawn else { return false };
                match drawn.last_mut() {
                    Some(_) if count == 0 => drop(drawn.pop()),
                    Some(draw) => draw.count = count,
                    None => {}
                }
                true
            })
        });
        if !is_captured {
            self.advance(count);
        }
    }

    /// Until what is answered ends, calls are captured with the graph whose buffer this is.
    #[cfg(feature = "cudarc")]
    pub(crate) fn begin_capture(&mut self) -> Arc<Drawing> {
        let drawing = Drawing::begun();
        self.captured = (!self.frozen).then(|| Arc::clone(&drawing));
        drawing
    }

    /// The numbers, above 0 and up to 1, that a call draws for one of its outputs: the source has a sequence for each, by its
    /// place in the output, and a call starts it at the [offset](Self::offset).
    ///
    /// ```
    /// use flashinfer_rs::Philox;
    ///
    /// // What `sampling_from_probs` draws for the second row.
    /// let u = Philox::new(42).numbers(1).next().unwrap();
    /// assert!(0.0 < u && u <= 1.0);
    /// ```
    pub fn numbers(&self, output: u64) -> impl Iterator<Item = f32> + use<> {
        Sequence::new(self.seed, output, self.offset)
    }

    /// That a call on this stream draws what is expected of it: not in a capture, unless it is to be the same again and again.
    pub(crate) fn check(&self, function: &'static str, stream: Stream<'_>) -> Result<()> {
        let is_captured = || self.captured.as_ref().is_some_and(|drawing| drawing.with(|drawn| drawn.is_some()));
        if self.frozen || stream.capture().is_none() || is_captured() {
            return Ok(());
        }
        Err(FlashInferError::FrozenRandomness { function })
    }
}

/// One sequence of a seed: a counter of 128 bits, whose upper half is the sequence's number, encrypted block by block.
struct Sequence {
    key: [u32; 2],
    counter: [u32; 4],
    block: [u32; 4],
    /// Which number of the block is next.
    next: usize,
}

impl Sequence {
    /// A sequence from its number `offset` on, as cuRAND's `curand_init` has it.
    fn new(seed: u64, sequence: u64, offset: u64) -> Self {
        let key = [seed as u32, (seed >> 32) as u32];
        let counter = [(offset >> 2) as u32, (offset >> 34) as u32, sequence as u32, (sequence >> 32) as u32];
        Self { key, counter, block: block(counter, key), next: (offset & 3) as usize }
    }
}

impl Iterator for Sequence {
    type Item = f32;

    fn next(&mut self) -> Option<f32> {
        if self.next == self.block.len() {
            for word in &mut self.counter {
                *word = word.wrapping_add(1);
                if *word != 0 {
                    break;
                }
            }
            self.block = block(self.counter, self.key);
            self.next = 0;
        }
        let number = self.block[self.next];
        self.next += 1;
        Some(unit(number))
    }
}

/// A number of 32 bits as one above 0 and up to 1, as cuRAND makes it: in single precision, with one rounding.
fn unit(number: u32) -> f32 {
    const STEP: f32 = 1.0 / 4_294_967_296.0;
    (number as f32).mul_add(STEP, STEP / 2.0)
}

/// Ten rounds of Philox 4x32.
fn block(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    for _ in 0..10 {
        let products =
            [u64::from(MULTIPLIERS[0]) * u64::from(counter[0]), u64::from(MULTIPLIERS[1]) * u64::from(counter[2])];
        let high = products.map(|product| (product >> 32) as u32);
        counter =
            [high[1] ^ counter[1] ^ key[0], products[1] as u32, high[0] ^ counter[3] ^ key[1], products[0] as u32];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From the authors' own test vectors.
    #[test]
    fn blocks_are_those_of_the_authors_vectors() {
        assert_eq!(block([0; 4], [0; 2]), [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]);
        assert_eq!(block([!0; 4], [!0; 2]), [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD]);
        let pi = [0x243F_6A88, 0x85A3_08D3, 0x1319_8A2E, 0x0370_7344];
        assert_eq!(block(pi, [0xA409_3822, 0x299F_31D0]), [0xD16C_FE09, 0x94FD_CCEB, 0x5001_E420, 0x2412_6EA1]);
    }

    #[test]
    fn a_sequence_goes_on_where_another_starts_later() {
        let from = |offset| Philox::new(7).at(offset).numbers(3).take(9).collect::<Vec<_>>();
        let all: Vec<_> = Philox::new(7).numbers(3).take(20).collect();
        for offset in 0..11 {
            assert_eq!(from(offset), all[offset as usize..][..9], "from {offset} on");
        }
        assert_ne!(from(0), Philox::new(8).numbers(3).take(9).collect::<Vec<_>>(), "another seed");
        assert_ne!(from(0), Philox::new(7).numbers(4).take(9).collect::<Vec<_>>(), "another output");
        assert_ne!(from(0), Philox::new(7 | 1 << 40).numbers(3).take(9).collect::<Vec<_>>(), "the seed's upper half");
    }

    #[test]
    fn a_counter_carries() {
        let before = Philox::new(1).at(u64::from(u32::MAX) << 2).numbers(0).nth(4);
        assert_eq!(before, Philox::new(1).at(1 << 34).numbers(0).next());
    }

    #[test]
    fn numbers_are_above_0_and_up_to_1() {
        assert_eq!(unit(u32::MAX), 1.0);
        assert_eq!(unit(0), 2f32.powi(-33));
        // 3 · 2^-32 is rounded into by one half more.
        assert_eq!(unit(3), 3.5 * 2f32.powi(-32));
    }

    #[test]
    fn a_source_moves_on_in_steps_of_four_and_around() {
        let mut philox = Philox::new(0).at(u64::MAX - 3);
        philox.advance(0);
        assert_eq!(philox.offset(), u64::MAX - 3);
        philox.advance(4);
        assert_eq!(philox.offset(), 0);
        philox.advance(u64::MAX);
        assert_eq!(philox.offset(), u64::MAX - 3);
    }

    #[cfg(feature = "cudarc")]
    #[test]
    fn a_source_that_is_taken_out_of_a_capture_draws_as_any_other_behind_it() {
        let captured = Stream::NULL.capturing(crate::stream::Capture { pdl: false });
        let mut buffer = Philox::new(7).at(8);
        let drawing = buffer.begin_capture();
        let [seed, first] = buffer.draw();
        assert_eq!(seed, MARKED);
        buffer.used(5);
        assert_eq!(buffer.offset(), 8, "each launch moves it on");
        // Another is put in its place, as `&mut` allows; and what is copied is no buffer.
        let copy = buffer.clone();
        assert!(copy.check("f", captured).is_err() && copy == buffer);
        let mut taken = std::mem::replace(&mut buffer, Philox::new(1));
        assert!(buffer.check("f", captured).is_err() && taken.check("f", captured).is_ok());
        let [_, second] = taken.draw();
        taken.used(4);
        assert_eq!(drawing.end(), [Drawn { mark: first, count: 5 }, Drawn { mark: second, count: 4 }]);
        assert!(taken.check("f", captured).is_err());
        assert_eq!(taken.draw(), [7, 8]);
        taken.used(5);
        assert_eq!(taken, Philox::new(7).at(16));
    }

    #[cfg(feature = "cudarc")]
    #[test]
    fn a_captured_call_without_rows_leaves_no_draw_to_be_found() {
        let mut philox = Philox::new(7);
        let drawing = philox.begin_capture();
        philox.draw();
        philox.used(0);
        let [_, mark] = philox.draw();
        philox.used(3);
        philox.draw();
        philox.used(0);
        assert_eq!(drawing.end(), [Drawn { mark, count: 3 }]);
    }

    #[cfg(feature = "cudarc")]
    #[test]
    fn numbers_that_a_graph_would_repeat_are_refused_unless_that_is_meant() {
        let captured = Stream::NULL.capturing(crate::stream::Capture { pdl: false });
        assert!(Philox::new(1).check("f", Stream::NULL).is_ok());
        let error = Philox::new(1).check("f", captured).unwrap_err();
        assert!(matches!(error, FlashInferError::FrozenRandomness { function: "f" }), "{error}");
        assert!(error.to_string().contains("Philox::frozen"), "{error}");
        assert!(Philox::new(1).frozen().check("f", captured).is_ok());
    }
}
