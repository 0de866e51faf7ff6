// Memory that starts on a cache line.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

namespace fastris {

constexpr int64_t kCacheLine = 64;

template <typename T>
struct FreeAligned {
  void operator()(T* lanes) const { ::operator delete[](lanes, std::align_val_t(kCacheLine)); }
};

template <typename T>
using Lanes = std::unique_ptr<T[], FreeAligned<T>>;

// Uninitialised memory that starts on a cache line.
template <typename T>
Lanes<T> new_lanes(int64_t count) {
  const size_t bytes = static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T);
  void* lanes = ::operator new[](bytes, std::align_val_t(kCacheLine));
#if defined(__SANITIZE_ADDRESS__)  // full of NaN, so that tests see what is read unwritten
  std::memset(lanes, 0xFF, bytes);
#endif
  return Lanes<T>(static_cast<T*>(lanes));
}

template <typename T>
Lanes<T> new_zeros(int64_t count) {
  Lanes<T> lanes = new_lanes<T>(count);
  std::fill(lanes.get(), lanes.get() + count, T(0));
  return lanes;
}

}  // namespace fastris
