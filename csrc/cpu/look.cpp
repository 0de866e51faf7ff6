// How likely each cell of a map is, and what is in the most likely one. fp32.
#include "../stable_abi.h"
#include "activations.h"
#include "layout.h"
#include "parallel.h"

#include <algorithm>
#include <cmath>

namespace fastris {
namespace {

constexpr int64_t kCellsTogether = 256;  // whose sum is added to those before in double

// (B, channels, H, W) of any strides.
struct Maps {
  const float* first;
  int64_t channels, width, strides[4];

  explicit Maps(const Tensor& maps) : first(data(maps)), channels(maps.size(1)), width(maps.size(3)) {
    for (int64_t dim = 0; dim < 4; ++dim) strides[dim] = maps.stride(dim);
  }

  FASTRIS_INLINE void copy_cell(int64_t b, int64_t cell, float* to) const {
    const float* from = first + b * strides[0] + cell / width * strides[2] + cell % width * strides[3];
    for (int64_t c = 0; c < channels; ++c) to[c] = from[c * strides[1]];
  }
};

struct Forward {
  int64_t cells;
  const float* logits;  // [B][cells]
  Maps hidden, features;
  float *log_place, *place;  // [B][cells]
  float *seen, *attended, *centre;  // [B][C + F], [B][C + F + 1], [B][2]
  int64_t* chosen;  // [B]
  int64_t begin, end;  // images

  template <int Bytes>
  FASTRIS_INLINE void run() const {
    const int64_t both = hidden.channels + features.channels;
    for (int64_t b = begin; b < end; ++b) {
      const float* const of = logits + b * cells;
      const int64_t most = most_likely(of);
      const float log_sum = static_cast<float>(std::log(sum_of_exponentials<Bytes>(of, of[most])));
      for (int64_t i = 0; i < cells; ++i) log_place[b * cells + i] = of[i] - of[most] - log_sum;
      std::fill(place + b * cells, place + (b + 1) * cells, 0.0f);
      place[b * cells + most] = 1.0f;
      hidden.copy_cell(b, most, seen + b * both);
      features.copy_cell(b, most, seen + b * both + hidden.channels);
      std::copy(seen + b * both, seen + (b + 1) * both, attended + b * (both + 1));
      attended[b * (both + 1) + both] = of[most];
      centre[2 * b] = static_cast<float>(most % hidden.width) + 0.5f;
      centre[2 * b + 1] = static_cast<float>(most / hidden.width) + 0.5f;
      chosen[b] = most;
    }
  }

 private:
  // The first of the largest, or the first NaN.
  FASTRIS_INLINE int64_t most_likely(const float* of) const {
    int64_t most = 0;
    for (int64_t i = 0; i < cells; ++i) {
      if (std::isnan(of[i])) return i;
      if (of[i] > of[most]) most = i;
    }
    return most;
  }

  template <int Bytes>
  FASTRIS_INLINE double sum_of_exponentials(const float* of, float largest) const {
    double sum = 0;
    for (int64_t i = 0; i < cells; i += kCellsTogether) {
      Vector<float, Bytes> part{};
      for_each_once<Bytes>(std::min(kCellsTogether, cells - i), [&](auto bytes, int64_t x) FASTRIS_INLINE_LAMBDA {
        const auto e = exponential_of_minus<bytes.value>(largest - unaligned_at<bytes.value>(of + i + x));
        if constexpr (bytes.value == Bytes) {
          part += e;
        } else {
          part[0] += e[0];
        }
      });
      for (int lane = 0; lane < VectorOf<float, Bytes>::lanes; ++lane) sum += part[lane];
    }
    return sum;
  }
};

struct Backward {
  int64_t cells, channels, others;
  const float *log_place, *d_log_place;  // [B][cells]; the latter or nullptr
  const float *d_seen, *d_attended;  // [B][C + F], [B][C + F + 1], or nullptr
  const int64_t* chosen;  // [B]
  float *d_logits, *d_hidden, *d_features;  // [B][cells], zeros at first: [B][cells][C], [B][cells][F]
  int64_t begin, end;  // images

  template <int Bytes>
  FASTRIS_INLINE void run() const {
    const int64_t both = channels + others;
    for (int64_t b = begin; b < end; ++b) {
      float* const to = d_logits + b * cells;
      d_log_place == nullptr ? std::fill(to, to + cells, 0.0f) : of_log_softmax<Bytes>(b, to);
      const int64_t cell = b * cells + chosen[b];
      for (int64_t c = 0; c < both; ++c) {
        float d = d_seen == nullptr ? 0.0f : d_seen[b * both + c];
        if (d_attended != nullptr) d += d_attended[b * (both + 1) + c];
        (c < channels ? d_hidden[cell * channels + c] : d_features[cell * others + c - channels]) = d;
      }
      if (d_attended != nullptr) to[chosen[b]] += d_attended[b * (both + 1) + both];
    }
  }

 private:
  template <int Bytes>
  FASTRIS_INLINE void of_log_softmax(int64_t b, float* to) const {
    const float *of = log_place + b * cells, *d = d_log_place + b * cells;
    double sum = 0;
    for (int64_t i = 0; i < cells; ++i) sum += d[i];
    const float total = static_cast<float>(sum);
    for_each_once<Bytes>(cells, [&](auto bytes, int64_t x) FASTRIS_INLINE_LAMBDA {
      const auto chance = exponential_of_minus<bytes.value>(-unaligned_at<bytes.value>(of + x));
      unaligned_at<bytes.value>(to + x) = unaligned_at<bytes.value>(d + x) - chance * total;
    });
  }
};

bool is_float(const Tensor& tensor, int64_t dims) {
  return tensor.dim() == dims && tensor.scalar_type() == ScalarType::Float;
}

// log_place and place (B,H,W), seen (B,C+F), attended (B,C+F+1), centre (B,2) and chosen (B).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> look(Tensor logits, Tensor hidden, Tensor features) {
  FASTRIS_CHECK(is_float(logits, 3) && logits.is_contiguous(), "look: logits must be contiguous float32 (B,H,W)");
  const int64_t B = logits.size(0), H = logits.size(1), W = logits.size(2);
  FASTRIS_CHECK(H > 0 && W > 0, "look: logits must have cells");
  const auto check = [&](const Tensor& maps, const char* name) {
    FASTRIS_CHECK(
        is_float(maps, 4) && maps.size(0) == B && maps.size(2) == H && maps.size(3) == W, "look: ", name,
        " must be float32 (B,·,H,W) like logits");
  };
  check(hidden, "hidden");
  check(features, "features");
  const int64_t both = hidden.size(1) + features.size(1);
  const auto empty = [&](const std::vector<int64_t>& sizes) { return empty_on(logits, sizes, ScalarType::Float); };
  Tensor log_place = empty({B, H, W}), place = empty({B, H, W});
  Tensor seen = empty({B, both}), attended = empty({B, both + 1}), centre = empty({B, 2});
  Tensor chosen = empty_on(logits, {B}, ScalarType::Long);
  const Forward kernel{
      H * W,
      data(logits),
      Maps(hidden),
      Maps(features),
      mutable_data(log_place),
      mutable_data(place),
      mutable_data(seen),
      mutable_data(attended),
      mutable_data(centre),
      mutable_data<int64_t>(chosen),
      0,
      0};
  run_parallel(kernel, B, 16);
  return {log_place, place, seen, attended, centre, chosen};
}

// The gradients of logits, hidden and features; those of maps are channels_last.
std::tuple<Tensor, Tensor, Tensor> look_backward(
    std::optional<Tensor> d_log_place,
    std::optional<Tensor> d_seen,
    std::optional<Tensor> d_attended,
    Tensor log_place,
    Tensor chosen,
    int64_t channels,
    int64_t others) {
  FASTRIS_CHECK(
      is_float(log_place, 3) && log_place.is_contiguous(), "look: log_place must be contiguous float32 (B,H,W)");
  const int64_t B = log_place.size(0), H = log_place.size(1), W = log_place.size(2), both = channels + others;
  FASTRIS_CHECK(
      chosen.dim() == 1 && chosen.size(0) == B && chosen.scalar_type() == ScalarType::Long && chosen.is_contiguous(),
      "look: chosen must be contiguous int64 (B)");
  for (int64_t b = 0; b < B; ++b) {
    const int64_t cell = data<int64_t>(chosen)[b];
    FASTRIS_CHECK(cell >= 0 && cell < H * W, "look: chosen must be cells of log_place");
  }
  const auto checked = [&](std::optional<Tensor>& d, int64_t numel, const char* name) -> const float* {
    if (!d) return nullptr;
    FASTRIS_CHECK(
        d->scalar_type() == ScalarType::Float && d->numel() == numel, "look: ", name, " must be float32 like its result");
    d = torch::stable::contiguous(*d);
    return data(*d);
  };
  Tensor d_logits = empty_on(log_place, {B, H, W}, ScalarType::Float);
  Tensor d_hidden = empty_channels_last(log_place, B, channels, H, W, ScalarType::Float);
  Tensor d_features = empty_channels_last(log_place, B, others, H, W, ScalarType::Float);
  const Backward kernel{
      H * W,
      channels,
      others,
      data(log_place),
      checked(d_log_place, log_place.numel(), "d_log_place"),
      checked(d_seen, B * both, "d_seen"),
      checked(d_attended, B * (both + 1), "d_attended"),
      data<int64_t>(chosen),
      mutable_data(d_logits),
      mutable_data(d_hidden),
      mutable_data(d_features),
      0,
      0};
  std::fill(kernel.d_hidden, kernel.d_hidden + d_hidden.numel(), 0.0f);
  std::fill(kernel.d_features, kernel.d_features + d_features.numel(), 0.0f);
  run_parallel(kernel, B, 16);
  return {d_logits, d_hidden, d_features};
}

}  // namespace
}  // namespace fastris

STABLE_TORCH_LIBRARY_IMPL(fastris, CPU, m) {
  m.impl("look", TORCH_BOX(&fastris::look));
  m.impl("look_backward", TORCH_BOX(&fastris::look_backward));
}
