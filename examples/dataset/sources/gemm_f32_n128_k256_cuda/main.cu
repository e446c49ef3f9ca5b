// C = A * B^T: a block computes a tile of C, and reads each tile of A and B once.
#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

#include "shape.h"

namespace {

using tvm::ffi::TensorView;

constexpr int TILE = 16;
static_assert(N % TILE == 0 && K % TILE == 0, "tiles cover B");

__global__ void multiply(const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ c, int64_t rows) {
  // One more in each row, so that a column lies in as many banks as it has elements.
  __shared__ float left[TILE][TILE + 1], right[TILE][TILE + 1];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * TILE + threadIdx.y;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * TILE;
  float sum = 0;
  for (int64_t k = 0; k < K; k += TILE) {
    left[threadIdx.y][threadIdx.x] = row < rows ? a[row * K + k + threadIdx.x] : 0;
    right[threadIdx.y][threadIdx.x] = b[(first + threadIdx.y) * K + k + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < TILE; ++i) sum += left[threadIdx.y][i] * right[threadIdx.x][i];
    __syncthreads();
  }
  if (row < rows) c[row * N + first + threadIdx.x] = sum;
}

void check(const TensorView& tensor, const char* name, int64_t rows, int64_t columns, DLDevice device) {
  const DLDataType dtype = tensor.dtype();
  if (dtype.code != kDLFloat || dtype.bits != 32 || dtype.lanes != 1) {
    TVM_FFI_THROW(TypeError) << name << " must be float32";
  }
  if (tensor.ndim() != 2 || tensor.size(0) != rows || tensor.size(1) != columns) {
    TVM_FFI_THROW(ValueError) << name << " must be [" << rows << ", " << columns << "]";
  }
  const DLDevice found = tensor.device();
  if (found.device_type != kDLCUDA || found.device_id != device.device_id || !tensor.IsContiguous()) {
    TVM_FFI_THROW(ValueError) << name << " must be contiguous memory of one GPU";
  }
}

void gemm(TensorView a, TensorView b, TensorView c) {
  const int64_t rows = a.ndim() > 0 ? a.size(0) : 0;
  const DLDevice device = a.device();
  check(a, "A", rows, K, device);
  check(b, "B", N, K, device);
  check(c, "C", rows, N, device);
  if (rows == 0) return;
  const int64_t blocks = (rows + TILE - 1) / TILE;
  if (blocks > INT32_MAX) TVM_FFI_THROW(ValueError) << "A has too many rows";
  const auto stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
  multiply<<<dim3(static_cast<unsigned>(blocks), N / TILE), dim3(TILE, TILE), 0, stream>>>(
      static_cast<const float*>(a.data_ptr()), static_cast<const float*>(b.data_ptr()),
      static_cast<float*>(c.data_ptr()), rows);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) TVM_FFI_THROW(RuntimeError) << cudaGetErrorString(error);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_f32_n128_k256, gemm);
