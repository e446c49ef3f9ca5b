// C = A * B^T for the host: one row of A after the other against all rows of B.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

#include "shape.h"

namespace {

using tvm::ffi::TensorView;

void check(const TensorView& tensor, const char* name, int64_t rows, int64_t columns) {
  const DLDataType dtype = tensor.dtype();
  if (dtype.code != kDLFloat || dtype.bits != 32 || dtype.lanes != 1) {
    TVM_FFI_THROW(TypeError) << name << " must be float32";
  }
  if (tensor.ndim() != 2 || tensor.size(0) != rows || tensor.size(1) != columns) {
    TVM_FFI_THROW(ValueError) << name << " must be [" << rows << ", " << columns << "]";
  }
  if (tensor.device().device_type != kDLCPU || !tensor.IsContiguous()) {
    TVM_FFI_THROW(ValueError) << name << " must be contiguous host memory";
  }
}

void gemm(TensorView a, TensorView b, TensorView c) {
  const int64_t rows = a.ndim() > 0 ? a.size(0) : 0;
  check(a, "A", rows, K);
  check(b, "B", N, K);
  check(c, "C", rows, N);
  const float* left = static_cast<const float*>(a.data_ptr());
  const float* right = static_cast<const float*>(b.data_ptr());
  float* out = static_cast<float*>(c.data_ptr());
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < N; ++j) {
      float sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += left[i * K + k] * right[j * K + k];
      out[i * N + j] = sum;
    }
  }
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_f32_n128_k256, gemm);
