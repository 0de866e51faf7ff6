// 3×3 convolutions of stride 1 that keep H and W, by Winograd's minimal filtering F(2×2, 3×3): 16 products where the direct
// way takes 36. fp32, channels_last.
//
// A. Lavin & S. Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016: with the matrices
//
//     Bᵀ = 1  0 -1  0      G = 1   0   0      Aᵀ = 1  1  1  0
//          0  1  1  0          ½   ½   ½           0  1 -1 -1
//          0 -1  1  0          ½  -½   ½
//          0  1  0 -1          0   0   1
//
// a tile of 2×2 results is y = Aᵀ (G w Gᵀ ∘ Bᵀ x B) A of the 4×4 inputs x around it. Summed over the input channels, each of
// the 16 places is a matrix product [tiles × in] · [in × out]. The gradient of the input is a convolution with the weight
// turned around, and that of the weight is Gᵀ (Σ Bᵀ x B ∘ A dy Aᵀ) G.
#include "../stable_abi.h"
#include "aligned.h"
#include "layout.h"
#include "matmul.h"
#include "parallel.h"
#include "simd.h"

#include <algorithm>

namespace fastris {
namespace {

constexpr int64_t kPlaces = 16;
constexpr int64_t kStrip = 4 * kRows;  // tiles at a time: their places stay in the second level of cache
constexpr int64_t kGradientStrip = 8 * kRows;  // more for the weight, whose gradient is read and written once a strip
constexpr int64_t kGradientParts = 4;  // sums of their own, whatever the number of threads

// Room for n numbers from one place to the next: not a power of two, so that the 16 do not share a set of the cache.
inline int64_t skewed(int64_t n) { return padded(n) + 16; }

// Pixels of (B, H, W, channels) and their tiles.
struct Tiles {
  int64_t H, W, rows, columns, count;

  Tiles(int64_t B, int64_t H_, int64_t W_)
      : H(H_), W(W_), rows((H + 1) / 2), columns((W + 1) / 2), count(B * rows * columns) {}

};

// The first pixel of a tile's results.
struct Corner {
  int64_t y, x, pixel;

  FASTRIS_INLINE Corner(const Tiles& tiles, int64_t tile) {
    const int64_t image = tile / (tiles.rows * tiles.columns), place = tile % (tiles.rows * tiles.columns);
    y = place / tiles.columns * 2;
    x = place % tiles.columns * 2;
    pixel = (image * tiles.H + y) * tiles.W + x;
  }

  // The pixel a few rows and columns on, or -1 outside of the image.
  FASTRIS_INLINE int64_t at(const Tiles& tiles, int64_t row, int64_t column) const {
    const bool inside = y + row >= 0 && y + row < tiles.H && x + column >= 0 && x + column < tiles.W;
    return inside ? pixel + row * tiles.W + column : -1;
  }
};

// Steps over n channels by whole vectors, the last ending at n; by single ones if there are too few.
template <int Bytes, typename Step>
FASTRIS_INLINE void for_channels(int64_t n, const Step& step) {
  constexpr int64_t lanes = VectorOf<float, Bytes>::lanes;
  if (n < lanes) {
    for (int64_t c = 0; c < n; ++c) step(std::integral_constant<int, 4>(), c);
    return;
  }
  for (int64_t c = 0; c + lanes <= n; c += lanes) step(std::integral_constant<int, Bytes>(), c);
  if (n % lanes != 0) step(std::integral_constant<int, Bytes>(), n - lanes);
}

// Bᵀ x B of some tiles: to[place][tile][channel].
template <int Bytes>
FASTRIS_INLINE void transform_inputs(
    const Tiles& tiles, const float* x, const float* zeros, int64_t first, int64_t count, int64_t channels, int64_t row,
    int64_t place, float* to) {
  for (int64_t t = 0; t < count; ++t) {
    const Corner corner(tiles, first + t);
    const float* at[kPlaces];
    for (int64_t i = 0; i < kPlaces; ++i) {
      const int64_t pixel = corner.at(tiles, i / 4 - 1, i % 4 - 1);
      at[i] = pixel < 0 ? zeros : x + pixel * channels;
    }
    for_channels<Bytes>(channels, [&](auto bytes, int64_t c) FASTRIS_INLINE_LAMBDA {
      using Real = Vector<float, bytes.value>;
      Real d[kPlaces], e[kPlaces];
      for (int i = 0; i < kPlaces; ++i) d[i] = unaligned_at<bytes.value>(at[i] + c);
      for (int j = 0; j < 4; ++j) {
        e[j] = d[j] - d[8 + j];
        e[4 + j] = d[4 + j] + d[8 + j];
        e[8 + j] = d[8 + j] - d[4 + j];
        e[12 + j] = d[4 + j] - d[12 + j];
      }
      float* out = to + t * row + c;
      for (int i = 0; i < kPlaces; i += 4) {
        unaligned_at<bytes.value>(out + i * place) = e[i] - e[i + 2];
        unaligned_at<bytes.value>(out + (i + 1) * place) = e[i + 1] + e[i + 2];
        unaligned_at<bytes.value>(out + (i + 2) * place) = e[i + 2] - e[i + 1];
        unaligned_at<bytes.value>(out + (i + 3) * place) = e[i + 1] - e[i + 3];
      }
    });
  }
}

// A dy Aᵀ of some tiles: to[place][tile][channel].
template <int Bytes>
FASTRIS_INLINE void transform_gradients(
    const Tiles& tiles, const float* dy, const float* zeros, int64_t first, int64_t count, int64_t channels, int64_t row,
    int64_t place, float* to) {
  for (int64_t t = 0; t < count; ++t) {
    const Corner corner(tiles, first + t);
    const float* at[4];
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t pixel = corner.at(tiles, i / 2, i % 2);
      at[i] = pixel < 0 ? zeros : dy + pixel * channels;
    }
    for_channels<Bytes>(channels, [&](auto bytes, int64_t c) FASTRIS_INLINE_LAMBDA {
      using Real = Vector<float, bytes.value>;
      Real d[4], e[8];
      for (int i = 0; i < 4; ++i) d[i] = unaligned_at<bytes.value>(at[i] + c);
      for (int j = 0; j < 2; ++j) {
        e[j] = d[j];
        e[2 + j] = d[j] + d[2 + j];
        e[4 + j] = d[j] - d[2 + j];
        e[6 + j] = -d[2 + j];
      }
      float* out = to + t * row + c;
      for (int i = 0; i < 4; ++i) {
        unaligned_at<bytes.value>(out + (4 * i) * place) = e[2 * i];
        unaligned_at<bytes.value>(out + (4 * i + 1) * place) = e[2 * i] + e[2 * i + 1];
        unaligned_at<bytes.value>(out + (4 * i + 2) * place) = e[2 * i] - e[2 * i + 1];
        unaligned_at<bytes.value>(out + (4 * i + 3) * place) = -e[2 * i + 1];
      }
    });
  }
}

// Aᵀ m A of some tiles, into the pixels that there are.
template <int Bytes>
FASTRIS_INLINE void transform_outputs(
    const Tiles& tiles, const float* products, int64_t first, int64_t count, int64_t channels, int64_t row, int64_t place,
    const float* bias, float* y) {
  for (int64_t t = 0; t < count; ++t) {
    const Corner corner(tiles, first + t);
    float* to[4];
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t pixel = corner.at(tiles, i / 2, i % 2);
      to[i] = pixel < 0 ? nullptr : y + pixel * channels;
    }
    for_channels<Bytes>(channels, [&](auto bytes, int64_t c) FASTRIS_INLINE_LAMBDA {
      using Real = Vector<float, bytes.value>;
      const float* in = products + t * row + c;
      Real m[kPlaces], e[8];
      for (int i = 0; i < kPlaces; ++i) m[i] = unaligned_at<bytes.value>(in + i * place);
      for (int j = 0; j < 4; ++j) {
        e[j] = m[j] + m[4 + j] + m[8 + j];
        e[4 + j] = m[4 + j] - m[8 + j] - m[12 + j];
      }
      Real b{};
      if (bias != nullptr) b = unaligned_at<bytes.value>(bias + c);
      for (int i = 0; i < 2; ++i) {
        const Real left = e[4 * i] + e[4 * i + 1] + e[4 * i + 2] + b;
        const Real right = e[4 * i + 1] - e[4 * i + 2] - e[4 * i + 3] + b;
        if (to[2 * i] != nullptr) unaligned_at<bytes.value>(to[2 * i] + c) = left;
        if (to[2 * i + 1] != nullptr) unaligned_at<bytes.value>(to[2 * i + 1] + c) = right;
      }
    });
  }
}

struct ConvolveKernel {
  Tiles tiles;
  int64_t in, out;
  const float* x;
  const float* weight;  // [place][in][padded out]
  const float* bias;  // or nullptr
  float* y;
  int64_t begin, end;  // strips

  template <int Bytes>
  FASTRIS_INLINE void run() const {
    const int64_t n = padded(out), input_place = skewed(kStrip * in), product_place = skewed(kStrip * n);
    const Lanes<float> zeros = new_zeros<float>(in);
    const Lanes<float> inputs = new_zeros<float>(kPlaces * input_place);
    const Lanes<float> products = new_lanes<float>(kPlaces * product_place);
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t first = strip * kStrip, count = std::min(kStrip, tiles.count - first);
      transform_inputs<Bytes>(tiles, x, zeros.get(), first, count, in, in, input_place, inputs.get());
      for (int64_t place = 0; place < kPlaces; ++place) {
        multiply<Bytes, false>(
            kStrip, n, in, inputs.get() + place * input_place, in, 1, weight + place * in * n,
            products.get() + place * product_place);
      }
      transform_outputs<Bytes>(tiles, products.get(), first, count, out, n, product_place, bias, y);
    }
  }
};

struct WeightGradientKernel {
  Tiles tiles;
  int64_t in, out;
  const float* x;
  const float* dy;
  float* sums;  // [part][place][in rounded up to whole blocks][padded out], zeros at first
  int64_t begin, end;  // parts

  int64_t in_rows() const { return whole_rows(in); }
  int64_t part_size() const { return kPlaces * in_rows() * padded(out); }

  template <int Bytes>
  FASTRIS_INLINE void run() const {
    const int64_t n = padded(out), m = in_rows();
    const int64_t input_place = skewed(kGradientStrip * m), gradient_place = skewed(kGradientStrip * n);
    const Lanes<float> zeros = new_zeros<float>(std::max(in, out));
    const Lanes<float> inputs = new_zeros<float>(kPlaces * input_place);
    const Lanes<float> gradients = new_zeros<float>(kPlaces * gradient_place);
    const int64_t strips = (tiles.count + kGradientStrip - 1) / kGradientStrip;
    for (int64_t part = begin; part < end; ++part) {
      for (int64_t strip = strips * part / kGradientParts; strip < strips * (part + 1) / kGradientParts; ++strip) {
        const int64_t first = strip * kGradientStrip, count = std::min(kGradientStrip, tiles.count - first);
        transform_inputs<Bytes>(tiles, x, zeros.get(), first, count, in, m, input_place, inputs.get());
        transform_gradients<Bytes>(tiles, dy, zeros.get(), first, count, out, n, gradient_place, gradients.get());
        for (int64_t place = 0; place < kPlaces; ++place) {
          multiply<Bytes, true>(
              m, n, count, inputs.get() + place * input_place, 1, m, gradients.get() + place * gradient_place,
              sums + part * part_size() + place * m * n);
        }
      }
    }
  }
};

void check(const Tensor& x, const char* name) {
  FASTRIS_CHECK(
      x.dim() == 4 && x.scalar_type() == ScalarType::Float, "winograd: ", name, " must be float32 (B,C,H,W)");
  FASTRIS_CHECK(is_dense(x, true), "winograd: ", name, " must be channels_last");
}

// G times a column of three rows of n numbers: four.
void expand(const float* from, int64_t from_row, float* to, int64_t to_row, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float a = from[i], b = from[from_row + i], c = from[2 * from_row + i];
    to[i] = a;
    to[to_row + i] = 0.5f * (a + b + c);
    to[2 * to_row + i] = 0.5f * (a - b + c);
    to[3 * to_row + i] = c;
  }
}

// Gᵀ times a column of four rows of n numbers: three.
void contract(const float* from, int64_t from_row, float* to, int64_t to_row, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float a = from[i], b = from[from_row + i], c = from[2 * from_row + i], d = from[3 * from_row + i];
    to[i] = a + 0.5f * (b + c);
    to[to_row + i] = 0.5f * (b - c);
    to[2 * to_row + i] = 0.5f * (b + c) + d;
  }
}

// (4, 4, in, padded out) = G w Gᵀ of a weight (out, in, 3, 3); turned around, the roles of in and out exchanged, for the
// gradient of the input.
Tensor winograd_weight(Tensor weight, bool turned) {
  FASTRIS_CHECK(
      weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 && weight.scalar_type() == ScalarType::Float,
      "winograd: weight must be float32 (out,in,3,3)");
  const int64_t out = weight.size(turned ? 1 : 0), in = weight.size(turned ? 0 : 1), n = padded(out);
  Tensor transformed = empty_on(weight, {4, 4, in, n}, ScalarType::Float);
  const float* from = static_cast<const float*>(weight.const_data_ptr());
  float* to = static_cast<float*>(transformed.data_ptr());
  const int64_t out_step = weight.stride(turned ? 1 : 0), in_step = weight.stride(turned ? 0 : 1);
  const int64_t y_step = weight.stride(2), x_step = weight.stride(3);
  torch::stable::parallel_for(0, in, std::max<int64_t>(1, 4096 / std::max<int64_t>(1, out)), [&](int64_t begin, int64_t end) {
    const Lanes<float> w = new_zeros<float>(9 * n), e = new_lanes<float>(12 * n);  // [tap][out], G w
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t o = 0; o < out; ++o) {
        const float* taps = from + o * out_step + i * in_step;
        for (int64_t k = 0; k < 9; ++k) w[(turned ? 8 - k : k) * n + o] = taps[k / 3 * y_step + k % 3 * x_step];
      }
      for (int64_t k = 0; k < 3; ++k) expand(w.get() + k * n, 3 * n, e.get() + k * n, 3 * n, n);
      for (int64_t r = 0; r < 4; ++r) expand(e.get() + r * 3 * n, n, to + (r * 4 * in + i) * n, in * n, n);
    }
  });
  return transformed;
}

void winograd_convolve_out(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor y) {
  check(x, "x");
  check(y, "y");
  const int64_t in = x.size(1), out = y.size(1);
  FASTRIS_CHECK(
      weight.dim() == 4 && weight.size(0) == 4 && weight.size(2) == in && weight.size(3) == padded(out) &&
          weight.scalar_type() == ScalarType::Float,
      "winograd: weight must come from winograd_weight");
  FASTRIS_CHECK(
      !bias || (bias->dim() == 1 && bias->size(0) == out && bias->scalar_type() == ScalarType::Float),
      "winograd: bias must be float32 (out)");
  FASTRIS_CHECK(
      y.size(0) == x.size(0) && y.size(2) == x.size(2) && y.size(3) == x.size(3), "winograd: y must be as large as x");
  const ConvolveKernel kernel{
      Tiles(x.size(0), x.size(2), x.size(3)),
      in,
      out,
      static_cast<const float*>(x.const_data_ptr()),
      static_cast<const float*>(weight.const_data_ptr()),
      bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
      static_cast<float*>(y.data_ptr()),
      0,
      0};
  run_parallel(kernel, (kernel.tiles.count + kStrip - 1) / kStrip, 4);
}

Tensor winograd_weight_gradient(Tensor x, Tensor dy) {
  check(x, "x");
  check(dy, "dy");
  FASTRIS_CHECK(
      dy.size(0) == x.size(0) && dy.size(2) == x.size(2) && dy.size(3) == x.size(3), "winograd: dy must be as large as x");
  const int64_t in = x.size(1), out = dy.size(1), n = padded(out);
  WeightGradientKernel kernel{
      Tiles(x.size(0), x.size(2), x.size(3)),
      in,
      out,
      static_cast<const float*>(x.const_data_ptr()),
      static_cast<const float*>(dy.const_data_ptr()),
      nullptr,
      0,
      0};
  const int64_t m = kernel.in_rows(), size = kernel.part_size();
  const Lanes<float> sums = new_zeros<float>(kGradientParts * size);
  kernel.sums = sums.get();
  run_parallel(kernel, kGradientParts, 1);
  Tensor gradient = empty_on(x, {out, in, 3, 3}, ScalarType::Float);
  float* to = static_cast<float*>(gradient.data_ptr());
  const Lanes<float> u = new_lanes<float>(kPlaces * n), e = new_lanes<float>(12 * n), w = new_lanes<float>(9 * n);
  for (int64_t i = 0; i < in; ++i) {
    for (int64_t place = 0; place < kPlaces; ++place) {
      const float* row = sums.get() + (place * m + i) * n;
      for (int64_t o = 0; o < n; ++o) {
        float sum = 0.0f;
        for (int64_t part = 0; part < kGradientParts; ++part) sum += row[part * size + o];
        u[place * n + o] = sum;
      }
    }
    for (int64_t c = 0; c < 4; ++c) contract(u.get() + c * n, 4 * n, e.get() + c * n, 4 * n, n);
    for (int64_t r = 0; r < 3; ++r) contract(e.get() + r * 4 * n, n, w.get() + r * 3 * n, n, n);
    for (int64_t o = 0; o < out; ++o) {
      for (int64_t k = 0; k < 9; ++k) to[(o * in + i) * 9 + k] = w[k * n + o];
    }
  }
  return gradient;
}

}  // namespace
}  // namespace fastris

STABLE_TORCH_LIBRARY_IMPL(fastris, CPU, m) {
  m.impl("winograd_weight", TORCH_BOX(&fastris::winograd_weight));
  m.impl("winograd_convolve_out", TORCH_BOX(&fastris::winograd_convolve_out));
  m.impl("winograd_weight_gradient", TORCH_BOX(&fastris::winograd_weight_gradient));
}
