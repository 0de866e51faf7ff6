// How a tensor lies in memory.
#pragma once

#include "../stable_abi.h"

namespace fastris {

// Whether a (B, channels, H, W) tensor is dense in NCHW or channels_last; strides of dimensions of one element are free.
inline bool is_dense(const Tensor& tensor, bool channels_last) {
  const int64_t C = tensor.size(1), H = tensor.size(2), W = tensor.size(3);
  const int64_t nchw[] = {C * H * W, H * W, W, 1}, nhwc[] = {C * H * W, 1, W * C, C};
  const int64_t* strides = channels_last ? nhwc : nchw;
  if (tensor.numel() == 0) return true;
  for (int64_t dim = 0; dim < 4; ++dim) {
    if (tensor.size(dim) != 1 && tensor.stride(dim) != strides[dim]) return false;
  }
  return true;
}

template <typename T = float>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T = float>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

}  // namespace fastris
