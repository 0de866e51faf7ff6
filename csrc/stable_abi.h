// Everything fastris needs from LibTorch's stable ABI, and every way around its gaps. No other file includes torch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

namespace fastris {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Uninitialised. torch::stable::new_empty looks its operator up by name, which costs over 1 µs a tensor.
inline Tensor empty_strided_on(
    const Tensor& like, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType type) {
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device_type, device_index, &made));
#if defined(__SANITIZE_ADDRESS__)  // full of NaN, so that tests see what is left unwritten
  if (device_type == aoti_torch_device_type_cpu()) {
    void* data = nullptr;
    int64_t bytes = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(made, &data));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(made, &bytes));
    if (bytes > 0) std::memset(data, 0xFF, static_cast<size_t>(bytes));
  }
#endif
  return Tensor(made);
}

// Contiguous, uninitialised.
inline Tensor empty_on(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = stride;
    stride *= sizes[dim] > 1 ? sizes[dim] : 1;
  }
  return empty_strided_on(like, sizes, strides, type);
}

// (B, C, H, W) in channels_last, uninitialised.
inline Tensor empty_channels_last(const Tensor& like, int64_t B, int64_t C, int64_t H, int64_t W, ScalarType type) {
  return empty_strided_on(like, {B, C, H, W}, {H * W * C, 1, W * C, C}, type);
}

}  // namespace fastris

// FASTRIS_CHECK(condition, "assignment: cost must be ...", value): raises RuntimeError in Python.
#define FASTRIS_CHECK(...) STD_TORCH_CHECK(__VA_ARGS__)

#ifdef __CUDACC__

#include <cuda_runtime.h>

// Only a CUDA build of torch has this symbol. Weak, it is null on a CPU build instead of an import error; setup links
// libtorch without --as-needed so that the dynamic loader finds it where it exists.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

// torch's own STD_CUDA_CHECK needs a symbol that CPU builds lack, hence this one.
#define FASTRIS_CUDA_CHECK(call)                                                         \
  do {                                                                                   \
    const cudaError_t fastris_error = (call);                                            \
    FASTRIS_CHECK(fastris_error == cudaSuccess, #call, ": ", cudaGetErrorString(fastris_error)); \
  } while (0)

namespace fastris {

// Makes the tensor's device current for the scope and gives its current stream.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    const int32_t device = tensor.get_device_index();
    // The CUDA runtime linked here is another copy than torch's: it wants to be told too. No synchronisation.
    FASTRIS_CUDA_CHECK(cudaSetDevice(device));
    FASTRIS_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "fastris: this torch was built without CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  // Bytes that a kernel of this device may ask for.
  int64_t shared_memory_per_block() const {
    int device = 0, bytes = 0;
    FASTRIS_CUDA_CHECK(cudaGetDevice(&device));
    FASTRIS_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return bytes;
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace fastris

#endif  // __CUDACC__
