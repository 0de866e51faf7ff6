// Memory that starts on a cache line.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <memory>
#include <new>

namespace fastris {

constexpr int64_t kCacheLine = 64;

// Blocks that a thread gave back, for its next kernel. To get aligned memory anew takes microseconds, and many more where
// the system has taken the pages back meanwhile: 8 of the 430 ms of a training step. Up to 8 of up to 2 MiB are kept.
class Blocks {
 public:
  static Blocks& of_thread() {
    static thread_local Blocks blocks;
    return blocks;
  }

  // At least so many bytes; sets `bytes` to how many there are.
  void* take(size_t& bytes) {
    Block* best = nullptr;
    for (Block& block : blocks_) {
      const bool fits = block.bytes >= bytes && block.bytes / 2 <= bytes;
      if (fits && (best == nullptr || block.bytes < best->bytes)) best = &block;
    }
    if (best == nullptr) return ::operator new[](bytes, std::align_val_t(kCacheLine));
    bytes = best->bytes;
    best->bytes = 0;
    return best->memory;
  }

  void give(void* memory, size_t bytes) {
    if (bytes > kMostBytes) return release({memory, bytes});
    Block* place = std::find_if(std::begin(blocks_), std::end(blocks_), [](const Block& one) { return one.bytes == 0; });
    if (place == std::end(blocks_)) {
      place = &blocks_[turn_++ % kKept];
      release(*place);
    }
    *place = {memory, bytes};
  }

  ~Blocks() {
    for (const Block& block : blocks_) release(block);
  }

 private:
  static constexpr unsigned kKept = 8;
#if defined(__SANITIZE_ADDRESS__)  // which sees what is used after it was given back
  static constexpr size_t kMostBytes = 0;
#else
  static constexpr size_t kMostBytes = size_t{1} << 21;
#endif

  struct Block {
    void* memory;
    size_t bytes;  // 0: none
  };

  static void release(const Block& block) {
    if (block.bytes > 0) ::operator delete[](block.memory, std::align_val_t(kCacheLine));
  }

  Block blocks_[kKept] = {};
  unsigned turn_ = 0;  // whose it is to leave
};

template <typename T>
struct FreeAligned {
  size_t bytes;
  void operator()(T* lanes) const { Blocks::of_thread().give(lanes, bytes); }
};

template <typename T>
using Lanes = std::unique_ptr<T[], FreeAligned<T>>;

// Uninitialised memory that starts on a cache line.
template <typename T>
Lanes<T> new_lanes(int64_t count) {
  size_t bytes = static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T);
  void* lanes = Blocks::of_thread().take(bytes);
#if defined(__SANITIZE_ADDRESS__)  // full of NaN, so that tests see what is read unwritten
  std::memset(lanes, 0xFF, bytes);
#endif
  return Lanes<T>(static_cast<T*>(lanes), FreeAligned<T>{bytes});
}

template <typename T>
Lanes<T> new_zeros(int64_t count) {
  Lanes<T> lanes = new_lanes<T>(count);
  std::fill(lanes.get(), lanes.get() + count, T(0));
  return lanes;
}

}  // namespace fastris
