// Masks of an image's pixels from the logits of a map's cells: enlarged bilinearly, then their sigmoid. fp32.
//
// A cell is `stride` pixels wide, and its value is that of its middle. The pixels between the middles of two cells are a
// gap, of `stride` pixels that all maps share the weights of; the first and the last gap, half of them outside of the map,
// lie between a cell and itself. A row of cells is enlarged once, and pairs of such rows make the rows of the image.
#include "../stable_abi.h"
#include "activations.h"
#include "aligned.h"
#include "layout.h"
#include "parallel.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

namespace fastris {
namespace {

constexpr int64_t kMostStride = 65536;

struct Enlargement {
  int64_t maps, together;  // of an image
  int64_t h, w, H, W;  // of a map, of the image
  int64_t stride, offset;
  std::vector<float> after;  // the weight of the cell after a gap in its k-th pixel; the cell before has what is left
  int64_t begin = 0, end = 0;  // maps

  int64_t half() const { return stride / 2; }
  int64_t gaps_row() const { return (w + 1) * stride; }
  int64_t first() const { return stride - half() + offset; }  // the place of the image's first pixel among the gaps'
};

// The two rows of cells that a row of pixels lies between.
struct Between {
  int64_t above, below;
  float weight_below;

  Between(const Enlargement& all, int64_t y) {
    const int64_t place = all.first() + y, gap = place / all.stride - 1;
    above = std::max<int64_t>(gap, 0);
    below = std::min(gap + 1, all.h - 1);
    weight_below = all.after[place % all.stride];
  }
};

// The two rows of cells that are needed at a time, each `gaps_row` pixels.
class TwoRows {
 public:
  explicit TwoRows(const Enlargement& all) : row_(all.gaps_row()), rows_(new_zeros<float>(2 * row_)) {}

  // The room of a row; leave(row before, room) and enter(row, room) where it was another's.
  template <typename Leave, typename Enter>
  FASTRIS_INLINE float* at(int64_t row, const Leave& leave, const Enter& enter) {
    float* const room = rows_.get() + row % 2 * row_;
    if (held_[row % 2] != row) {
      if (held_[row % 2] >= 0) leave(held_[row % 2], room);
      held_[row % 2] = row;
      enter(row, room);
    }
    return room;
  }

  template <typename Leave>
  FASTRIS_INLINE void finish(const Leave& leave) {
    for (int64_t& row : held_) {
      if (row >= 0) leave(row, rows_.get() + row % 2 * row_);
      row = -1;
    }
  }

 private:
  int64_t row_;
  Lanes<float> rows_;
  int64_t held_[2] = {-1, -1};
};

struct Forward : Enlargement {
  const float* logits;  // [maps][h][w]
  const uint8_t* void_pixels;  // [images][H][W], or nullptr
  float* masks;  // [maps][H][W]

  template <int Bytes>
  FASTRIS_INLINE void run() const {
    TwoRows rows(*this);
    for (int64_t map = begin; map < end; ++map) {
      const float* const cells = logits + map * h * w;
      const auto leave = [](int64_t, float*) FASTRIS_INLINE_LAMBDA {};
      const auto enter = [&](int64_t row, float* room) FASTRIS_INLINE_LAMBDA { enlarge_row(cells + row * w, room); };
      for (int64_t y = 0; y < H; ++y) {
        const Between between(*this, y);
        const float* const above = rows.at(between.above, leave, enter) + first();
        const float* const below = rows.at(between.below, leave, enter) + first();
        float* const to = masks + (map * H + y) * W;
        for_channels<Bytes>(W, [&](auto bytes, int64_t x) FASTRIS_INLINE_LAMBDA {
          using Real = Vector<float, bytes.value>;
          const Real upper = unaligned_at<bytes.value>(above + x), lower = unaligned_at<bytes.value>(below + x);
          Activations<float, bytes.value, 1, Curve::sigmoid> chance;
          chance.set(0, upper * (1.0f - between.weight_below) + lower * between.weight_below);
          chance.find();
          unaligned_at<bytes.value>(to + x) = chance.template value<0>(0);
        });
        if (void_pixels != nullptr) clear(void_pixels + (map / together * H + y) * W, to);
      }
      rows.finish(leave);
    }
  }

 private:
  FASTRIS_INLINE void enlarge_row(const float* cells, float* to) const {
    for (int64_t gap = -1; gap < w; ++gap) {
      const float before = cells[std::max<int64_t>(gap, 0)], behind = cells[std::min(gap + 1, w - 1)];
      for (int64_t k = 0; k < stride; ++k) *to++ = before * (1.0f - after[k]) + behind * after[k];
    }
  }

  // By stretches, of which most have no void pixel.
  FASTRIS_INLINE void clear(const uint8_t* is_void, float* row) const {
    constexpr int64_t stretch = sizeof(uint64_t);
    for (int64_t x = 0; x < W; x += stretch) {
      uint64_t any = 1;
      if (x + stretch <= W) std::memcpy(&any, is_void + x, stretch);
      if (any == 0) continue;
      for (int64_t i = x; i < std::min(W, x + stretch); ++i) {
        if (is_void[i] != 0) row[i] = 0.0f;
      }
    }
  }
};

// A sigmoid is never 0 here, so that a mask is 0 only where it is void.
struct Backward : Enlargement {
  const float *grad, *masks;  // [maps][H][W]
  float* d_logits;  // [maps][h][w], zeros at first

  template <int Bytes>
  FASTRIS_INLINE void run() const {
    TwoRows rows(*this);
    for (int64_t map = begin; map < end; ++map) {
      float* const cells = d_logits + map * h * w;
      const auto leave = [&](int64_t row, float* room) FASTRIS_INLINE_LAMBDA { add_to_cells(room, cells + row * w); };
      const auto enter = [&](int64_t, float* room) FASTRIS_INLINE_LAMBDA { std::fill(room, room + gaps_row(), 0.0f); };
      for (int64_t y = 0; y < H; ++y) {
        const Between between(*this, y);
        float* const above = rows.at(between.above, leave, enter) + first();
        float* const below = rows.at(between.below, leave, enter) + first();
        const int64_t at = (map * H + y) * W;
        add_row<Bytes>(grad + at, masks + at, between, above, below);
      }
      rows.finish(leave);
    }
  }

 private:
  template <int Bytes>
  FASTRIS_INLINE void add_row(
      const float* g, const float* m, const Between& between, float* above, float* below) const {
    for_each_once<Bytes>(W, [&](auto bytes, int64_t x) FASTRIS_INLINE_LAMBDA {
      using Real = Vector<float, bytes.value>;
      const Real mask = unaligned_at<bytes.value>(m + x), zero = {};
      const Real slope = unaligned_at<bytes.value>(g + x) * mask * (1.0f - mask);
      const Real d = mask == zero ? zero : slope;
      unaligned_at<bytes.value>(above + x) += d * (1.0f - between.weight_below);
      unaligned_at<bytes.value>(below + x) += d * between.weight_below;
    });
  }

  FASTRIS_INLINE void add_to_cells(const float* from, float* cells) const {
    for (int64_t gap = -1; gap < w; ++gap) {
      float before = 0.0f, behind = 0.0f;
      for (int64_t k = 0; k < stride; ++k, ++from) {
        before += *from * (1.0f - after[k]);
        behind += *from * after[k];
      }
      cells[std::max<int64_t>(gap, 0)] += before;
      cells[std::min(gap + 1, w - 1)] += behind;
    }
  }
};

bool is_contiguous_maps(const Tensor& tensor) {
  return tensor.dim() == 4 && tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous();
}

Enlargement enlargement(
    const Tensor& like, int64_t h, int64_t w, int64_t H, int64_t W, int64_t stride, int64_t offset) {
  FASTRIS_CHECK(
      stride > 0 && stride <= kMostStride && offset >= 0,
      "image_masks: stride must be positive, at most ", kMostStride, ", and offset not negative");
  FASTRIS_CHECK(
      H >= 0 && W >= 0 && H <= h * stride && W <= w * stride && offset <= std::min(h * stride - H, w * stride - W),
      "image_masks: the maps must cover the image");
  std::vector<float> after(static_cast<size_t>(stride));
  for (int64_t k = 0; k < stride; ++k) {
    after[k] = static_cast<float>(2 * (stride / 2 + k) + 1 - stride) / static_cast<float>(2 * stride);
  }
  return {like.size(0) * like.size(1), like.size(1), h, w, H, W, stride, offset, std::move(after)};
}

Tensor image_masks(
    Tensor logits, std::optional<Tensor> void_pixels, int64_t stride, int64_t offset, int64_t height, int64_t width) {
  FASTRIS_CHECK(is_contiguous_maps(logits), "image_masks: logits must be contiguous float32 (B,T,h,w)");
  const int64_t B = logits.size(0), T = logits.size(1);
  FASTRIS_CHECK(
      !void_pixels ||
          (void_pixels->dim() == 3 && void_pixels->scalar_type() == ScalarType::Bool && void_pixels->is_contiguous() &&
           void_pixels->size(0) == B && void_pixels->size(1) == height && void_pixels->size(2) == width),
      "image_masks: void must be contiguous bool (B,H,W)");
  const Enlargement all = enlargement(logits, logits.size(2), logits.size(3), height, width, stride, offset);
  Tensor masks = empty_on(logits, {B, T, height, width}, ScalarType::Float);
  const Forward kernel{
      all, data(logits), void_pixels ? data<uint8_t>(*void_pixels) : nullptr, mutable_data(masks)};
  if (masks.numel() > 0) run_parallel(kernel, all.maps, 1);
  return masks;
}

Tensor image_masks_backward(
    Tensor grad, Tensor masks, int64_t stride, int64_t offset, int64_t map_height, int64_t map_width) {
  FASTRIS_CHECK(is_contiguous_maps(masks), "image_masks: masks must be contiguous float32 (B,T,H,W)");
  const int64_t B = masks.size(0), T = masks.size(1), H = masks.size(2), W = masks.size(3);
  FASTRIS_CHECK(
      is_contiguous_maps(grad) && grad.size(0) == B && grad.size(1) == T && grad.size(2) == H && grad.size(3) == W,
      "image_masks: grad must be contiguous float32 and as large as the masks");
  const Enlargement all = enlargement(masks, map_height, map_width, H, W, stride, offset);
  Tensor d_logits = empty_on(masks, {B, T, map_height, map_width}, ScalarType::Float);
  const Backward kernel{all, data(grad), data(masks), mutable_data(d_logits)};
  std::fill(kernel.d_logits, kernel.d_logits + d_logits.numel(), 0.0f);
  if (masks.numel() > 0) run_parallel(kernel, all.maps, 1);
  return d_logits;
}

}  // namespace
}  // namespace fastris

STABLE_TORCH_LIBRARY_IMPL(fastris, CPU, m) {
  m.impl("image_masks", TORCH_BOX(&fastris::image_masks));
  m.impl("image_masks_backward", TORCH_BOX(&fastris::image_masks_backward));
}
