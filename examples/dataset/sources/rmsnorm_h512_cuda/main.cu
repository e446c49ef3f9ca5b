// RMSNorm: a block of 128 threads for each row, four elements a thread.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

#include <cstdint>

namespace {

using tvm::ffi::TensorView;

constexpr int HIDDEN = 512;
constexpr int THREADS = 128;
constexpr int EACH = HIDDEN / THREADS;
constexpr float EPS = 1e-6f;

__global__ void normalize(const __nv_bfloat16* __restrict__ in, const __nv_bfloat16* __restrict__ weight,
                          __nv_bfloat16* __restrict__ out) {
  __shared__ float parts[THREADS / 32];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * HIDDEN;
  float values[EACH], sum = 0;
  for (int i = 0; i < EACH; ++i) {
    values[i] = __bfloat162float(in[begin + i * THREADS + threadIdx.x]);
    sum += values[i] * values[i];
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, step);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
  for (int i = 0; i < THREADS / 32; ++i) sum += parts[i];
  const float inverse = rsqrtf(sum / HIDDEN + EPS);
  for (int i = 0; i < EACH; ++i) {
    const int at = i * THREADS + threadIdx.x;
    out[begin + at] = __float2bfloat16(values[i] * inverse * __bfloat162float(weight[at]));
  }
}

void check(const TensorView& tensor, const char* name, DLDevice device) {
  const DLDataType dtype = tensor.dtype();
  if (dtype.code != kDLBfloat || dtype.bits != 16 || dtype.lanes != 1) {
    TVM_FFI_THROW(TypeError) << name << " must be bfloat16";
  }
  const DLDevice found = tensor.device();
  if (found.device_type != kDLCUDA || found.device_id != device.device_id || !tensor.IsContiguous()) {
    TVM_FFI_THROW(ValueError) << name << " must be contiguous memory of one GPU";
  }
}

void rmsnorm(TensorView hidden_states, TensorView weight, TensorView output) {
  const DLDevice device = hidden_states.device();
  check(hidden_states, "hidden_states", device);
  check(weight, "weight", device);
  check(output, "output", device);
  const bool fits = hidden_states.ndim() == 2 && hidden_states.size(1) == HIDDEN && weight.ndim() == 1 &&
                    weight.size(0) == HIDDEN && output.ndim() == 2 && output.size(1) == HIDDEN &&
                    output.size(0) == hidden_states.size(0);
  if (!fits) TVM_FFI_THROW(ValueError) << "hidden_states and output must be [batch_size, 512] and weight [512]";
  const int64_t rows = hidden_states.size(0);
  if (rows == 0) return;
  if (rows > INT32_MAX) TVM_FFI_THROW(ValueError) << "hidden_states has too many rows";
  const auto stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
  normalize<<<static_cast<unsigned>(rows), THREADS, 0, stream>>>(
      static_cast<const __nv_bfloat16*>(hidden_states.data_ptr()), static_cast<const __nv_bfloat16*>(weight.data_ptr()),
      static_cast<__nv_bfloat16*>(output.data_ptr()));
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) TVM_FFI_THROW(RuntimeError) << cudaGetErrorString(error);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rmsnorm_h512, rmsnorm);
