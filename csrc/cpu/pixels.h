// Rows of pixels, whatever their dtype and strides, as tiles of the type that is computed with; label maps as segments.
//
// B = batch, R = rows (predictions or targets), N = pixels.
#pragma once

#include "../stable_abi.h"
#include "aligned.h"
#include "simd.h"

#include <algorithm>
#include <type_traits>

namespace fastris {

// Pixels at a time: enough that keeping sums in registers pays, with tens of rows still in the second level of cache.
constexpr int64_t kTile = 1024;

// A loaded row goes on with zeros to a multiple of this: whole groups of four of the widest vectors.
constexpr int64_t kGroup = 64;
inline int64_t end_of_group(int64_t n) { return (n + kGroup - 1) / kGroup * kGroup; }

// A row of a tile ends with one line of padding, because rows a power of two apart would share a few sets of the cache.
template <typename T>
constexpr int64_t kTileRow = kTile + kCacheLine / static_cast<int64_t>(sizeof(T));

// How an image is cut for the threads, whose number never matters: the sums are the same with any.
struct Chunks {
  int64_t N, size, count;

  explicit Chunks(int64_t N_) : N(N_) {
    count = std::clamp<int64_t>(N / 16384, 1, 8);
    size = (N + count * kTile - 1) / (count * kTile) * kTile;
  }
  int64_t begin(int64_t chunk) const { return std::min(N, chunk * size); }
  int64_t end(int64_t chunk) const { return std::min(N, (chunk + 1) * size); }
};

// (B, R, H, W) of any floating type, bool or uint8. Copies where the pixels of a row have no single stride.
struct Masks {
  Tensor tensor;  // (B, R, N)
  ScalarType type;
  const void* data;
  int64_t batch_stride, row_stride, pixel_stride, element_bytes;

  explicit Masks(const Tensor& masks)
      : tensor(torch::stable::flatten(masks, 2, 3)),
        type(tensor.scalar_type()),
        data(tensor.const_data_ptr()),
        batch_stride(tensor.stride(0)),
        row_stride(tensor.stride(1)),
        pixel_stride(tensor.stride(2)),
        element_bytes(static_cast<int64_t>(tensor.element_size())) {}

  const char* address(int64_t b, int64_t row, int64_t x) const {
    const int64_t at = b * batch_stride + row * row_stride + x * pixel_stride;
    return static_cast<const char*>(data) + at * element_bytes;
  }
};

template <typename From>
FASTRIS_INLINE const From* pixels_of(const Masks& masks, int64_t b, int64_t row, int64_t x) {
  return reinterpret_cast<const From*>(masks.address(b, row, x));
}

template <typename From, typename To>
FASTRIS_INLINE void load_row_of(const Masks& masks, int64_t b, int64_t row, int64_t x, int64_t n, To* to) {
  const From* from = pixels_of<From>(masks, b, row, x);
  if (masks.pixel_stride != 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(from[i * masks.pixel_stride]);
    return;
  }
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(from[i]);
}

// Pixels [x, x + n) of a row, then zeros up to the end of the group.
template <typename To>
FASTRIS_INLINE void load_row(const Masks& masks, int64_t b, int64_t row, int64_t x, int64_t n, To* to) {
  switch (masks.type) {
    case ScalarType::Float:
      load_row_of<float>(masks, b, row, x, n, to);
      break;
    case ScalarType::Double:
      load_row_of<double>(masks, b, row, x, n, to);
      break;
    case ScalarType::BFloat16:
      load_row_of<BFloat16>(masks, b, row, x, n, to);
      break;
    case ScalarType::Half:
      load_row_of<Half>(masks, b, row, x, n, to);
      break;
    default:  // bool and uint8: check_masks() lets no other pass
      load_row_of<uint8_t>(masks, b, row, x, n, to);
  }
  std::fill(to + n, to + end_of_group(n), To(0));
}

template <typename T>
struct Rows {
  const T* first;
  int64_t stride;
};

// Pixels [x, x + n) of `count` rows: where they are, if they are whole vectors of the compute type, or else loaded.
template <int Bytes, typename T>
FASTRIS_INLINE Rows<T> rows_at(
    const Masks& masks, int64_t b, int64_t row, int64_t count, int64_t x, int64_t n, T* loaded) {
  constexpr ScalarType own = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  constexpr int64_t lanes = VectorOf<T, Bytes>::lanes;
  if (masks.type == own && masks.pixel_stride == 1 && n % lanes == 0 && masks.row_stride % lanes == 0) {
    const T* there = pixels_of<T>(masks, b, row, x);
    if (reinterpret_cast<uintptr_t>(there) % Bytes == 0) return {there, masks.row_stride};
  }
  for (int64_t r = 0; r < count; ++r) load_row(masks, b, row + r, x, n, loaded + r * kTileRow<T>);
  return {loaded, kTileRow<T>};
}

inline void check_masks(const Tensor& masks, const char* name) {
  FASTRIS_CHECK(masks.dim() == 4, name, " must be masks (B,R,H,W), got ", masks.dim(), " dimensions");
  switch (masks.scalar_type()) {
    case ScalarType::Float:
    case ScalarType::Double:
    case ScalarType::BFloat16:
    case ScalarType::Half:
    case ScalarType::Bool:
    case ScalarType::Byte:
      return;
    default:
      FASTRIS_CHECK(false, name, " must be floating, bool or uint8");
  }
}

// (B, H, W) int32 or int64.
struct LabelMap {
  Tensor tensor;  // (B, N)
  bool wide;
  int64_t batch_stride, pixel_stride;

  explicit LabelMap(const Tensor& labels)
      : tensor(torch::stable::flatten(labels, 1, 2)),
        wide(tensor.scalar_type() == ScalarType::Long),
        batch_stride(tensor.stride(0)),
        pixel_stride(tensor.stride(1)) {}
};

inline void check_labels(const Tensor& labels) {
  FASTRIS_CHECK(labels.dim() == 3, "target must be labels (B,H,W), got ", labels.dim(), " dimensions");
  const ScalarType type = labels.scalar_type();
  FASTRIS_CHECK(type == ScalarType::Int || type == ScalarType::Long, "target labels must be int32 or int64");
}

// Labels outside 1 … num_labels become 0.
template <typename From, typename To>
FASTRIS_INLINE void
load_labels(const LabelMap& map, int64_t b, int64_t x, int64_t n, int64_t num_labels, To* to) {
  const From* from =
      static_cast<const From*>(map.tensor.data_ptr()) + b * map.batch_stride + x * map.pixel_stride;
  for (int64_t i = 0; i < n; ++i) {
    const From label = from[i * map.pixel_stride];
    to[i] = label >= 1 && label <= num_labels ? static_cast<To>(label) : To(0);
  }
  std::fill(to + n, to + end_of_group(n), To(0));
}

// A tile of a label map, which is constant over long stretches. Runs, which cover the tile, are of vectors of pixels with
// one label, or (as background, 0) with several; of those, each label but the background is a part, with a mask.
template <typename T, int Bytes>
struct Segments {
  using Label = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  static constexpr int lanes = VectorOf<T, Bytes>::lanes;

  struct Run {
    int64_t label;       // 0 … num_labels, 0 the background
    int64_t begin, end;  // pixels, whole vectors within the tile
  };
  struct Part {
    Vector<Label, Bytes> mask;  // all bits of a lane set or none
    int64_t label;              // 1 … num_labels
    int64_t pixel;              // the first of the vector
  };
  int64_t num_runs, num_parts;
  Run run[kTile / lanes];
  Part part[kTile];

  FASTRIS_INLINE void find(const LabelMap& map, int64_t b, int64_t x, int64_t n, int64_t num_labels) {
    alignas(kCacheLine) Label labels[kTile];
    if (map.wide) {
      load_labels<int64_t>(map, b, x, n, num_labels, labels);
    } else {
      load_labels<int32_t>(map, b, x, n, num_labels, labels);
    }
    num_runs = num_parts = 0;
    for (int64_t pixel = 0; pixel < n; pixel += lanes) {
      Label* label = labels + pixel;
      Label other = 0;
      for (int i = 1; i < lanes; ++i) other |= label[i] ^ label[0];
      const Label whole = other == 0 ? label[0] : 0;
      if (other != 0) find_parts(pixel, label);
      if (num_runs > 0 && run[num_runs - 1].label == whole) {
        run[num_runs - 1].end = pixel + lanes;
      } else {
        run[num_runs++] = {whole, pixel, pixel + lanes};
      }
    }
  }

 private:
  FASTRIS_INLINE void find_parts(int64_t pixel, Label* left) {
    for (int i = 0; i < lanes; ++i) {
      if (left[i] == 0) continue;
      Part& to = part[num_parts++];
      to.label = left[i];
      to.pixel = pixel;
      to.mask = vector_at<Bytes>(left) == left[i];
      vector_at<Bytes>(left) &= ~to.mask;
    }
  }
};

// value in the lanes of the mask, 0 elsewhere.
template <typename Value, typename Mask>
FASTRIS_INLINE void add_masked(Value& sum, const Value& value, const Mask& mask) {
  sum += (Value)((Mask)value & mask);
}

}  // namespace fastris
