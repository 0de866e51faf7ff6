// How likely each cell of a map is the place to look at: two layers over its channels, the inner one rectified. fp32,
// channels_last.
//
//     logit = last · relu(base + weight · [hidden, found]) + last_bias
//
// Columns of the weight that are for neither, in its middle, are those that base was made with.
// Tiles of cells go through both layers while they are in the first level of cache; nothing between the layers is kept.
#include "../stable_abi.h"
#include "aligned.h"
#include "layout.h"
#include "matmul.h"
#include "parallel.h"

#include <algorithm>
#include <numeric>

namespace fastris {
namespace {

constexpr int64_t kTile = 4 * kRows;  // cells
constexpr int64_t kParts = 4;  // sums of their own, whatever the number of threads

template <int Bytes>
FASTRIS_INLINE void copy(const float* from, int64_t n, float* to) {
  for_channels<Bytes>(n, [&](auto bytes, int64_t c) FASTRIS_INLINE_LAMBDA {
    unaligned_at<bytes.value>(to + c) = unaligned_at<bytes.value>(from + c);
  });
}

struct Cells {
  int64_t count;  // of all images
  int64_t channels, more, inner;  // of hidden, of found, between the layers
  const float *hidden, *base;
  const float* found;  // or nullptr
  const float* weight;  // [channels + more][n]
  const float* last;  // [n]
  float last_bias;
  int64_t begin, end;  // tiles, or parts of them

  int64_t n() const { return padded(inner); }
  int64_t width() const { return channels + more; }
  // The column of a weight of `columns` that a channel of [hidden, found] has: found has the last ones.
  int64_t column(int64_t c, int64_t columns) const { return c < channels ? c : columns - width() + c; }
  int64_t row() const { return padded(width()) + 16; }  // of what a cell shows: room for whole rows and whole columns
  int64_t tiles() const { return (count + kTile - 1) / kTile; }

  // The channels of some cells, one after the other, and what they make of the inner layer before it is rectified.
  template <int Bytes>
  FASTRIS_INLINE void look(int64_t first, int64_t some, float* seen, float* layer) const {
    for (int64_t cell = 0; cell < some; ++cell) {
      copy<Bytes>(hidden + (first + cell) * channels, channels, seen + cell * row());
      copy<Bytes>(found + (first + cell) * more, more, seen + cell * row() + channels);
      copy<Bytes>(base + (first + cell) * inner, inner, layer + cell * n());
      std::fill(layer + cell * n() + inner, layer + (cell + 1) * n(), 0.0f);  // not what a NaN left there
    }
    multiply<Bytes, true>(kTile, n(), width(), seen, row(), 1, weight, layer);
  }
};

struct Forward : Cells {
  float* logits;  // [count]

  template <int Bytes>
  FASTRIS_INLINE void run() const {
    constexpr int lanes = VectorOf<float, Bytes>::lanes;
    const Lanes<float> seen = new_zeros<float>(kTile * row()), layer = new_zeros<float>(kTile * n());
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kTile, some = std::min(kTile, count - first);
      look<Bytes>(first, some, seen.get(), layer.get());
      for (int64_t cell = 0; cell < some; ++cell) {
        Vector<float, Bytes> sum = {};
        for (int64_t j = 0; j < n(); j += lanes) {
          sum += vector_at<Bytes>(last + j) * rectified<Bytes>(vector_at<Bytes>(layer.get() + cell * n() + j));
        }
        float logit = last_bias;
        for (int lane = 0; lane < lanes; ++lane) logit += sum[lane];
        logits[first + cell] = logit;
      }
    }
  }
};

struct Backward : Cells {
  const float* grad;  // [count]
  const float* turned;  // [n][padded channels]: the weight's part for hidden
  float *d_hidden, *d_base;
  float* sums;  // [part][part_size()], zeros at first: of weight [whole_rows(width)][n], of last [n]

  int64_t part_size() const { return (whole_rows(width()) + 1) * n(); }

  template <int Bytes>
  FASTRIS_INLINE void run() const {
    constexpr int lanes = VectorOf<float, Bytes>::lanes;
    using Real = Vector<float, Bytes>;
    const int64_t m = padded(channels);
    const Lanes<float> seen = new_zeros<float>(kTile * row()), layer = new_zeros<float>(kTile * n());
    const Lanes<float> d_seen = new_lanes<float>(kTile * m), d_last = new_lanes<float>(n());
    for (int64_t part = begin; part < end; ++part) {
      float* const d_weight = sums + part * part_size();
      float* const d_last_sum = d_weight + whole_rows(width()) * n();
      for (int64_t tile = tiles() * part / kParts; tile < tiles() * (part + 1) / kParts; ++tile) {
        const int64_t first = tile * kTile, some = std::min(kTile, count - first);
        look<Bytes>(first, some, seen.get(), layer.get());
        std::fill(d_last.get(), d_last.get() + n(), 0.0f);
        for (int64_t cell = 0; cell < some; ++cell) {
          const float g = grad[first + cell];
          for (int64_t j = 0; j < n(); j += lanes) {
            Real& value = vector_at<Bytes>(layer.get() + cell * n() + j);
            vector_at<Bytes>(d_last.get() + j) += g * rectified<Bytes>(value);
            const Real zero = {};
            value = value <= zero ? zero : g * vector_at<Bytes>(last + j);
          }
          copy<Bytes>(layer.get() + cell * n(), inner, d_base + (first + cell) * inner);
        }
        multiply<Bytes, false>(kTile, m, n(), layer.get(), n(), 1, turned, d_seen.get());
        for (int64_t cell = 0; cell < some; ++cell) {
          copy<Bytes>(d_seen.get() + cell * m, channels, d_hidden + (first + cell) * channels);
        }
        multiply<Bytes, true>(whole_rows(width()), n(), some, seen.get(), 1, row(), layer.get(), d_weight);
        for (int64_t j = 0; j < n(); j += lanes) vector_at<Bytes>(d_last_sum + j) += vector_at<Bytes>(d_last.get() + j);
      }
    }
  }
};

void check_maps(const Tensor& maps, const Tensor& hidden, const char* name) {
  FASTRIS_CHECK(
      maps.dim() == 4 && maps.scalar_type() == ScalarType::Float && maps.size(0) == hidden.size(0) &&
          maps.size(2) == hidden.size(2) && maps.size(3) == hidden.size(3),
      "place_logits: ", name, " must be float32 (B,·,H,W) like hidden");
  FASTRIS_CHECK(is_dense(maps, true), "place_logits: ", name, " must be channels_last");
}

// What a call is about. The weights are copied to whole vectors, which zeros fill up.
template <typename Kernel>
struct Call {
  Kernel kernel{};
  Lanes<float> weight, last;

  Call(
      const Tensor& hidden, const Tensor& base, const std::optional<Tensor>& found, const Tensor& weight_,
      const Tensor& last_, const Tensor& last_bias) {
    FASTRIS_CHECK(hidden.dim() == 4, "place_logits: hidden must be float32 (B,C,H,W)");
    check_maps(hidden, hidden, "hidden");
    check_maps(base, hidden, "base");
    if (found) check_maps(*found, hidden, "found");
    Cells& cells = kernel;
    cells.count = hidden.size(0) * hidden.size(2) * hidden.size(3);
    cells.channels = hidden.size(1);
    cells.more = found ? found->size(1) : 0;
    cells.inner = base.size(1);
    FASTRIS_CHECK(cells.inner > 0, "place_logits: base must have channels");
    FASTRIS_CHECK(
        weight_.dim() == 2 && weight_.size(0) == cells.inner && weight_.size(1) >= cells.width() &&
            weight_.scalar_type() == ScalarType::Float,
        "place_logits: weight must be float32 (N,C+K or more), N of base, C of hidden, K of found");
    FASTRIS_CHECK(
        last_.dim() == 1 && last_.size(0) == cells.inner && last_.scalar_type() == ScalarType::Float,
        "place_logits: last must be float32 (N)");
    FASTRIS_CHECK(
        last_bias.numel() == 1 && last_bias.scalar_type() == ScalarType::Float,
        "place_logits: last_bias must be float32 (1)");
    cells.hidden = static_cast<const float*>(hidden.const_data_ptr());
    cells.base = static_cast<const float*>(base.const_data_ptr());
    cells.found = found ? static_cast<const float*>(found->const_data_ptr()) : nullptr;
    const int64_t n = cells.n();
    weight = new_zeros<float>(cells.width() * n);
    last = new_zeros<float>(n);
    const float* from = static_cast<const float*>(weight_.const_data_ptr());
    const float* from_last = static_cast<const float*>(last_.const_data_ptr());
    for (int64_t j = 0; j < cells.inner; ++j) {
      last[j] = from_last[j * last_.stride(0)];
      for (int64_t c = 0; c < cells.width(); ++c) {
        weight[c * n + j] = from[j * weight_.stride(0) + cells.column(c, weight_.size(1)) * weight_.stride(1)];
      }
    }
    cells.weight = weight.get();
    cells.last = last.get();
    cells.last_bias = *static_cast<const float*>(last_bias.const_data_ptr());
  }
};

Tensor place_logits(
    Tensor hidden, Tensor base, std::optional<Tensor> found, Tensor weight, Tensor last, Tensor last_bias) {
  Call<Forward> call(hidden, base, found, weight, last, last_bias);
  Tensor logits = empty_on(hidden, {hidden.size(0), hidden.size(2), hidden.size(3)}, ScalarType::Float);
  call.kernel.logits = static_cast<float*>(logits.data_ptr());
  run_parallel(call.kernel, call.kernel.tiles(), 16);
  return logits;
}

// The gradients of hidden and base, channels_last, and of weight, last and last_bias.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> place_logits_backward(
    Tensor grad, Tensor hidden, Tensor base, std::optional<Tensor> found, Tensor weight, Tensor last, Tensor last_bias) {
  Call<Backward> call(hidden, base, found, weight, last, last_bias);
  Backward& kernel = call.kernel;
  FASTRIS_CHECK(
      grad.dim() == 3 && grad.size(0) == hidden.size(0) && grad.size(1) == hidden.size(2) &&
          grad.size(2) == hidden.size(3) && grad.scalar_type() == ScalarType::Float,
      "place_logits: grad must be float32 (B,H,W)");
  grad = torch::stable::contiguous(grad);
  const int64_t B = hidden.size(0), H = hidden.size(2), W = hidden.size(3);
  const int64_t C = kernel.channels, N = kernel.inner, n = kernel.n(), m = padded(C);
  Tensor d_hidden = empty_channels_last(hidden, B, C, H, W, ScalarType::Float);
  Tensor d_base = empty_channels_last(hidden, B, N, H, W, ScalarType::Float);
  const Lanes<float> turned = new_zeros<float>(n * m);
  for (int64_t j = 0; j < N; ++j) {
    for (int64_t c = 0; c < C; ++c) turned[j * m + c] = kernel.weight[c * n + j];
  }
  const Lanes<float> sums = new_zeros<float>(kParts * kernel.part_size());
  kernel.grad = static_cast<const float*>(grad.const_data_ptr());
  kernel.turned = turned.get();
  kernel.d_hidden = static_cast<float*>(d_hidden.data_ptr());
  kernel.d_base = static_cast<float*>(d_base.data_ptr());
  kernel.sums = sums.get();
  run_parallel(kernel, kParts, 1);
  const int64_t size = kernel.part_size(), width = kernel.width();
  const auto sum_at = [&](int64_t i) {
    float sum = 0.0f;
    for (int64_t part = 0; part < kParts; ++part) sum += sums[part * size + i];
    return sum;
  };
  const int64_t columns = weight.size(1);
  Tensor d_weight = empty_on(hidden, {N, columns}, ScalarType::Float);
  Tensor d_last = empty_on(hidden, {N}, ScalarType::Float), d_last_bias = empty_on(hidden, {1}, ScalarType::Float);
  for (int64_t j = 0; j < N; ++j) {
    float* const row = static_cast<float*>(d_weight.data_ptr()) + j * columns;
    std::fill(row, row + columns, 0.0f);
    for (int64_t c = 0; c < width; ++c) row[kernel.column(c, columns)] = sum_at(c * n + j);
    static_cast<float*>(d_last.data_ptr())[j] = sum_at(whole_rows(width) * n + j);
  }
  const double sum_of_grad = std::accumulate(kernel.grad, kernel.grad + kernel.count, 0.0);
  *static_cast<float*>(d_last_bias.data_ptr()) = static_cast<float>(sum_of_grad);
  return {d_hidden, d_base, d_weight, d_last, d_last_bias};
}

}  // namespace
}  // namespace fastris

STABLE_TORCH_LIBRARY_IMPL(fastris, CPU, m) {
  m.impl("place_logits", TORCH_BOX(&fastris::place_logits));
  m.impl("place_logits_backward", TORCH_BOX(&fastris::place_logits_backward));
}
