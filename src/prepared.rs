//! Calls that are checked once and launched many times.

use std::ffi::CStr;
use std::fmt;
use std::marker::PhantomData;

use crate::contract::{Kind, MAX_ARGUMENTS, Operand, unrolled};
use crate::engine::{Fixed, Kernel};
use crate::error::Result;
use crate::stream::Stream;

/// A call of the kernel `K` that was checked once, to be launched many times. It keeps no tensor: each launch is given them
/// again, of the same form and in whatever memory; their form, alignment and stream are all that is compared.
///
/// ```
/// # use flashinfer_rs::kernels::norm::{NormOptions, Rmsnorm};
/// # use flashinfer_rs::{FlashInferRuntime, Prepared, RuntimeConfig, Stream, TensorMut, TensorRef};
/// # FlashInferRuntime::initialize(RuntimeConfig::default())?;
/// let (weight, input) = ([1f32; 4], [1f32, 2.0, 3.0, 4.0]);
/// let (mut first, mut second) = ([0f32; 4], [0f32; 4]);
/// let mut first = TensorMut::from_slice(&mut first, &[1, 4])?;
/// let mut second = TensorMut::from_slice(&mut second, &[1, 4])?;
/// let (input, weight) = (TensorRef::from_slice(&input, &[1, 4])?, TensorRef::from_slice(&weight, &[4])?);
///
/// let norm = Prepared::<Rmsnorm>::new(&first, &input, &weight, &NormOptions::default())?;
/// norm.launch(&mut first, &input, &weight, Stream::NULL)?;
/// norm.launch(&mut second, &first.as_ref(), &weight, Stream::NULL)?;
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
pub struct Prepared<K> {
    fixed: Fixed,
    /// The arguments that are no tensors, each in its place.
    others: [Other; MAX_ARGUMENTS],
    kernel: PhantomData<K>,
}

/// An argument that is no tensor.
#[derive(Clone, Copy)]
enum Other {
    Nothing,
    Number(f64),
    Whole(i64),
    Word(&'static CStr),
    Bool(bool),
}

impl<K> fmt::Debug for Prepared<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prepared").field("kernel", &self.fixed.row().kernel).finish_non_exhaustive()
    }
}

#[allow(private_bounds, reason = "kernels are this crate's")]
impl<K: Kernel> Prepared<K> {
    pub(crate) fn checked(operands: &[Operand<'_, '_>]) -> Result<Self> {
        let mut others = [Other::Nothing; MAX_ARGUMENTS];
        for (other, operand) in others.iter_mut().zip(operands) {
            *other = match *operand {
                Operand::Number(value) => Other::Number(value),
                Operand::Whole(value) => Other::Whole(value),
                Operand::Word(word) => Other::Word(word),
                Operand::Bool(value) => Other::Bool(value),
                Operand::Tensor(..) | Operand::Absent => Other::Nothing,
            };
        }
        Ok(Self { fixed: Fixed::new::<K>(operands)?, others, kernel: PhantomData })
    }

    /// Launches with these tensors, in the row's order; an optional one that is not there is absent.
    ///
    /// # Safety
    /// As for [`call`](crate::engine::call).
    #[inline(always)]
    pub(crate) unsafe fn launch_with<const N: usize>(
        &self,
        tensors: &[Operand<'_, '_>],
        stream: Stream<'_>,
    ) -> Result<()> {
        const { assert!(K::ROW.arguments.len() == N) };
        let mut operands = [Operand::Absent; N];
        let mut next = 0;
        unrolled!(i in ARGUMENTS < N, {
            operands[i] = match K::ROW.arguments[i].kind {
                Kind::Tensor(_) => {
                    next += 1;
                    tensors[next - 1]
                }
                _ => match self.others[i] {
                    Other::Number(value) => Operand::Number(value),
                    Other::Whole(value) => Operand::Whole(value),
                    Other::Word(word) => Operand::Word(word),
                    Other::Bool(value) => Operand::Bool(value),
                    Other::Nothing => Operand::Absent,
                },
            };
        });
        // SAFETY: the caller's promise.
        unsafe { self.fixed.launch::<K>(&operands, stream) }
    }
}
