// RMSNorm for the host. It returns its output, in memory that the caller's allocator gives.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

using tvm::ffi::Tensor;

constexpr int64_t HIDDEN = 512;
constexpr float EPS = 1e-6f;

float widen(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// To nearest, ties to even.
uint16_t narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (std::isnan(value)) return 0x7FC0;
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

void check(const Tensor& tensor, const char* name) {
  const DLDataType dtype = tensor.dtype();
  if (dtype.code != kDLBfloat || dtype.bits != 16 || dtype.lanes != 1) {
    TVM_FFI_THROW(TypeError) << name << " must be bfloat16";
  }
  if (tensor.device().device_type != kDLCPU || !tensor.IsContiguous()) {
    TVM_FFI_THROW(ValueError) << name << " must be contiguous host memory";
  }
}

Tensor rmsnorm(Tensor hidden_states, Tensor weight) {
  check(hidden_states, "hidden_states");
  check(weight, "weight");
  if (hidden_states.ndim() != 2 || hidden_states.size(1) != HIDDEN || weight.ndim() != 1 || weight.size(0) != HIDDEN) {
    TVM_FFI_THROW(ValueError) << "hidden_states must be [batch_size, 512] and weight [512]";
  }
  const int64_t rows = hidden_states.size(0);
  Tensor output = Tensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, {rows, HIDDEN}, hidden_states.dtype(), hidden_states.device());
  const uint16_t* in = static_cast<const uint16_t*>(hidden_states.data_ptr());
  const uint16_t* scale = static_cast<const uint16_t*>(weight.data_ptr());
  uint16_t* out = static_cast<uint16_t*>(output.data_ptr());
  for (int64_t row = 0; row < rows; ++row) {
    float sum = 0;
    for (int64_t i = 0; i < HIDDEN; ++i) {
      const float value = widen(in[row * HIDDEN + i]);
      sum += value * value;
    }
    const float inverse = 1 / std::sqrt(sum / HIDDEN + EPS);
    for (int64_t i = 0; i < HIDDEN; ++i) {
      out[row * HIDDEN + i] = narrow(widen(in[row * HIDDEN + i]) * inverse * widen(scale[i]));
    }
  }
  return output;
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rmsnorm_h512, rmsnorm);
