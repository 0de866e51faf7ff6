// 3×3 convolutions of stride 1 that keep H and W, by Winograd's minimal filtering (winograd.h). channels_last; the arithmetic
// is fp32, and maps may be bfloat16 in memory.
//
// Summed over the input channels, each of the (m+2)² places of a tile is a matrix product [tiles × in] · [in × out]. All
// matrices with out columns, those of the weight and of its gradient too, are panels of up to 32 columns, one after the other,
// so that a panel's places for some tiles stay in the second level of cache.
#include "winograd.h"

#include "../stable_abi.h"
#include "aligned.h"
#include "layout.h"
#include "matmul.h"
#include "parallel.h"
#include "storage.h"

#include <algorithm>

namespace fastris {
namespace {

constexpr int64_t kStrip = 4 * kRows;  // tiles at a time
constexpr int64_t kGradientStrip = 8 * kRows;  // more for the weight, whose gradient is read and written once a strip
constexpr int64_t kPanel = 32;
constexpr int64_t kLeastTasks = 4;  // of the gradient of a weight, whatever the number of threads

// Room for n numbers from one place to the next: not a power of two, so that places do not share a set of the cache.
inline int64_t skewed(int64_t n) { return padded(n) + 16; }

// Pixels of (B, H, W, channels) and their tiles of results.
struct Tiles {
  int64_t side, H, W, rows, columns, count;

  Tiles(int64_t side_, const Tensor& x)
      : side(side_),
        H(x.size(2)),
        W(x.size(3)),
        rows((H + side - 1) / side),
        columns((W + side - 1) / side),
        count(x.size(0) * rows * columns) {}
};

// The pixels of a tile, or of more around it: Size × Size of them, those outside of the image -1.
template <int Size>
struct Window {
  int64_t pixels[Size * Size];

  FASTRIS_INLINE Window(const Tiles& tiles, int64_t tile) {
    const int64_t around = (Size - tiles.side) / 2;
    const int64_t image = tile / (tiles.rows * tiles.columns), place = tile % (tiles.rows * tiles.columns);
    const int64_t top = place / tiles.columns * tiles.side - around, left = place % tiles.columns * tiles.side - around;
    for (int64_t i = 0; i < Size; ++i) {
      const int64_t y = top + i, row = (image * tiles.H + y) * tiles.W;
      for (int64_t j = 0; j < Size; ++j) {
        const int64_t x = left + j;
        pixels[i * Size + j] = y >= 0 && y < tiles.H && x >= 0 && x < tiles.W ? row + x : -1;
      }
    }
  }
};

// Asks for some channels of a tile's pixels, to be read or written while the tile before it is transformed.
template <int Size, typename T>
FASTRIS_INLINE void prefetch(const Window<Size>& window, const T* x, int64_t channels, int64_t some) {
  for (const int64_t pixel : window.pixels) {
    if (pixel < 0) continue;
    for (int64_t c = 0; c < some; c += kCacheLine / static_cast<int64_t>(sizeof(T))) {
      __builtin_prefetch(x + pixel * channels + c);
    }
  }
}

// Some tiles, and `some` of the channels that a pixel has, each tile's places `place` apart.
struct Strip {
  const Tiles& tiles;
  int64_t first, count, channels, some, row, place;
};

// step(window, t) for every tile of a strip, while the pixels of the next are under way.
template <int Size, typename T, typename Step>
FASTRIS_INLINE void for_tiles(const Strip& strip, const T* x, const Step& step) {
  Window<Size> next(strip.tiles, strip.first);
  for (int64_t t = 0; t < strip.count; ++t) {
    const Window<Size> window = next;
    next = Window<Size>(strip.tiles, strip.first + std::min(t + 1, strip.count - 1));
    prefetch(next, x, strip.channels, strip.some);
    step(window, t);
  }
}

// From Size × Size pixels of every tile to To × To places: to[place][tile][channel].
template <int Bytes, int Size, int To, typename T, typename Step>
FASTRIS_INLINE void transform(const Strip& strip, const T* x, const T* zeros, float* to, const Step& step) {
  for_tiles<Size>(strip, x, [&](const Window<Size>& window, int64_t t) FASTRIS_INLINE_LAMBDA {
    const T* from[Size * Size];
    for (int64_t i = 0; i < Size * Size; ++i) {
      from[i] = window.pixels[i] < 0 ? zeros : x + window.pixels[i] * strip.channels;
    }
    float* row = to + t * strip.row;
    for_channels<Bytes>(strip.some, [&](auto bytes, int64_t c) FASTRIS_INLINE_LAMBDA {
      using Real = Vector<float, bytes.value>;
      both_ways<Size, To, Real>(
          [&](int i, Real& d) FASTRIS_INLINE_LAMBDA { d = load_lanes<bytes.value>(from[i] + c); },
          step,
          [&](int i, const Real& e) FASTRIS_INLINE_LAMBDA { unaligned_at<bytes.value>(row + i * strip.place + c) = e; });
    });
  });
}

// Bᵀ x B
template <int Bytes, typename Filter, typename T>
FASTRIS_INLINE void transform_inputs(const Strip& strip, const T* x, const T* zeros, float* to) {
  transform<Bytes, Filter::span, Filter::span>(
      strip, x, zeros, to, [](const auto* d, auto* e) FASTRIS_INLINE_LAMBDA { Filter::inputs(d, e); });
}

// A dy Aᵀ
template <int Bytes, typename Filter, typename T>
FASTRIS_INLINE void transform_gradients(const Strip& strip, const T* dy, const T* zeros, float* to) {
  transform<Bytes, Filter::side, Filter::span>(
      strip, dy, zeros, to, [](const auto* y, auto* e) FASTRIS_INLINE_LAMBDA { Filter::gradients(y, e); });
}

// Aᵀ m A, into the pixels that there are.
template <int Bytes, typename Filter, typename T>
FASTRIS_INLINE void transform_outputs(const Strip& strip, const float* products, const float* bias, T* y) {
  for_tiles<Filter::side>(strip, y, [&](const Window<Filter::side>& window, int64_t t) FASTRIS_INLINE_LAMBDA {
    const float* row = products + t * strip.row;
    for_channels<Bytes>(strip.some, [&](auto bytes, int64_t c) FASTRIS_INLINE_LAMBDA {
      using Real = Vector<float, bytes.value>;
      Real b{};
      if (bias != nullptr) b = unaligned_at<bytes.value>(bias + c);
      both_ways<Filter::span, Filter::side, Real>(
          [&](int i, Real& m) FASTRIS_INLINE_LAMBDA { m = unaligned_at<bytes.value>(row + i * strip.place + c); },
          [](const Real* m, Real* out) FASTRIS_INLINE_LAMBDA { Filter::outputs(m, out); },
          [&](int i, const Real& out) FASTRIS_INLINE_LAMBDA {
            const int64_t pixel = window.pixels[i];
            if (pixel >= 0) store_lanes<bytes.value>(out + b, y + pixel * strip.channels + c);
          });
    });
  });
}

template <typename Filter, typename T>
struct ConvolveKernel {
  static constexpr int64_t places = Filter::span * Filter::span;

  Tiles tiles;
  int64_t in, out;
  const T* x;
  const float* weight;  // [panel][place][in][column]
  const float* bias;  // or nullptr
  T* y;
  int64_t begin, end;  // strips

  template <int Bytes>
  FASTRIS_INLINE void run() const {
    const int64_t n = padded(out), input_place = skewed(kStrip * in), product_place = skewed(kStrip * kPanel);
    const Lanes<T> zeros = new_zeros<T>(in);
    const Lanes<float> inputs = new_lanes<float>(places * input_place);  // beyond the tiles anything: no result comes of it
    const Lanes<float> products = new_lanes<float>(places * product_place);
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t first = strip * kStrip, count = std::min(kStrip, tiles.count - first);
      transform_inputs<Bytes, Filter>({tiles, first, count, in, in, in, input_place}, x, zeros.get(), inputs.get());
      for (int64_t p = 0; p < out; p += kPanel) {
        const int64_t columns = std::min(kPanel, n - p);
        for (int64_t place = 0; place < places; ++place) {
          multiply<Bytes, false>(
              whole_rows(count), columns, in, inputs.get() + place * input_place, in, 1,
              weight + (p * places + place * columns) * in, products.get() + place * product_place);
        }
        transform_outputs<Bytes, Filter>(
            {tiles, first, count, out, std::min(kPanel, out - p), columns, product_place}, products.get(),
            bias == nullptr ? nullptr : bias + p, y + p);
      }
    }
  }
};

// A task is a panel of one part of the tiles; a weight of few panels has several parts.
template <typename Filter, typename T>
struct WeightGradientKernel {
  static constexpr int64_t places = Filter::span * Filter::span;

  Tiles tiles;
  int64_t in, out;
  const T* x;
  const T* dy;
  float* sums;  // [part][panel][place][in rounded up to whole blocks][column], of which in × out mean something
  int64_t begin, end;  // tasks

  int64_t panels() const { return std::max<int64_t>(1, (padded(out) + kPanel - 1) / kPanel); }
  int64_t parts() const { return (kLeastTasks + panels() - 1) / panels(); }
  int64_t part_size() const { return places * whole_rows(in) * padded(out); }

  template <int Bytes>
  FASTRIS_INLINE void run() const {
    for (int64_t part = begin / panels(); part * panels() < end; ++part) {
      const int64_t first = std::max<int64_t>(0, begin - part * panels()), last = std::min(panels(), end - part * panels());
      add_part<Bytes>(part, first * kPanel, std::min(last * kPanel, out));
    }
  }

 private:
  // The columns from `left` to `right`, which begin a panel.
  template <int Bytes>
  FASTRIS_INLINE void add_part(int64_t part, int64_t left, int64_t right) const {
    const int64_t n = padded(out), m = whole_rows(in);
    const int64_t input_place = skewed(kGradientStrip * m), gradient_place = skewed(kGradientStrip * kPanel);
    const Lanes<T> zeros = new_zeros<T>(std::max(in, out));
    // Beyond the channels of x and dy these hold anything, and so do the sums.
    const Lanes<float> inputs = new_lanes<float>(places * input_place);
    const Lanes<float> gradients = new_lanes<float>(places * gradient_place);
    const int64_t strips = (tiles.count + kGradientStrip - 1) / kGradientStrip;
    const int64_t first_strip = strips * part / parts(), last_strip = strips * (part + 1) / parts();
    float* part_sums = sums + part * part_size();
    if (first_strip == last_strip) std::fill(part_sums + left * places * m, part_sums + padded(right) * places * m, 0.0f);
    for (int64_t strip = first_strip; strip < last_strip; ++strip) {
      const int64_t first = strip * kGradientStrip, count = std::min(kGradientStrip, tiles.count - first);
      transform_inputs<Bytes, Filter>({tiles, first, count, in, in, m, input_place}, x, zeros.get(), inputs.get());
      for (int64_t p = left; p < right; p += kPanel) {
        const int64_t columns = std::min(kPanel, n - p);
        transform_gradients<Bytes, Filter>(
            {tiles, first, count, out, std::min(kPanel, out - p), columns, gradient_place}, dy + p, zeros.get(),
            gradients.get());
        for (int64_t place = 0; place < places; ++place) {
          float* to = part_sums + (p * places + place * columns) * m;
          if (strip == first_strip) std::fill_n(to, m * columns, 0.0f);
          multiply<Bytes, true>(
              m, columns, count, inputs.get() + place * input_place, 1, m, gradients.get() + place * gradient_place, to);
        }
      }
    }
  }
};

// G w Gᵀ of a weight (out, in, 3, 3) whose strides these are.
template <typename Filter>
struct WeightKernel {
  static constexpr int64_t places = Filter::span * Filter::span;

  int64_t in, out, in_step, out_step, tap_steps[9];
  const float* weight;
  float* to;  // [panel][place][in][column]
  int64_t begin, end;  // input channels

  template <int Bytes>
  FASTRIS_INLINE void run() const {
    using Real = Vector<float, Bytes>;
    const int64_t n = padded(out);
    const Lanes<float> taps = new_zeros<float>(9 * n);  // [tap][out]
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t o = 0; o < out; ++o) {
        const float* from = weight + i * in_step + o * out_step;
        for (int64_t k = 0; k < 9; ++k) taps[k * n + o] = from[tap_steps[k]];
      }
      for (int64_t p = 0; p < n; p += kPanel) {
        const int64_t columns = std::min(kPanel, n - p);
        float* panel = to + p * places * in + i * columns;
        for (int64_t c = 0; c < columns; c += VectorOf<float, Bytes>::lanes) {
          both_ways<3, Filter::span, Real>(
              [&](int k, Real& w) FASTRIS_INLINE_LAMBDA { w = vector_at<Bytes>(taps.get() + k * n + p + c); },
              [](const Real* w, Real* e) FASTRIS_INLINE_LAMBDA { Filter::weights(w, e); },
              [&](int k, const Real& e) FASTRIS_INLINE_LAMBDA { vector_at<Bytes>(panel + k * in * columns + c) = e; });
        }
      }
    }
  }
};

// Gᵀ Σ G of the sums of all parts.
template <typename Filter>
struct SumKernel {
  int64_t in, out, parts, part_size;
  const float* sums;  // as above
  float* to;  // (out, in, 3, 3)
  int64_t begin, end;  // input channels

  template <int Bytes>
  FASTRIS_INLINE void run() const {
    using Real = Vector<float, Bytes>;
    const int64_t n = padded(out), m = whole_rows(in);
    const Lanes<float> taps = new_lanes<float>(9 * n);  // [tap][out]
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t p = 0; p < n; p += kPanel) {
        const int64_t columns = std::min(kPanel, n - p);
        const float* panel = sums + p * Filter::span * Filter::span * m + i * columns;
        for (int64_t c = 0; c < columns; c += VectorOf<float, Bytes>::lanes) {
          both_ways<Filter::span, 3, Real>(
              [&](int k, Real& sum) FASTRIS_INLINE_LAMBDA {
                sum = Real{};
                for (int64_t part = 0; part < parts; ++part) {
                  sum += vector_at<Bytes>(panel + part * part_size + k * m * columns + c);
                }
              },
              [](const Real* e, Real* w) FASTRIS_INLINE_LAMBDA { Filter::weight_gradients(e, w); },
              [&](int k, const Real& w) FASTRIS_INLINE_LAMBDA { vector_at<Bytes>(taps.get() + k * n + p + c) = w; });
        }
      }
      for (int64_t o = 0; o < out; ++o) {
        for (int64_t k = 0; k < 9; ++k) to[(o * in + i) * 9 + k] = taps[k * n + o];
      }
    }
  }
};

void check(const Tensor& x, const char* name) {
  FASTRIS_CHECK(
      x.dim() == 4 && (x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16), "winograd: ", name,
      " must be float32 or bfloat16 (B,C,H,W)");
  FASTRIS_CHECK(is_dense(x, true), "winograd: ", name, " must be channels_last");
}

// run(filter, T()) for tiles of a side and maps of a type.
template <typename Run>
void with_types(int64_t side, ScalarType type, const Run& run) {
  FASTRIS_CHECK(side == 2 || side == 4, "winograd: side must be 2 or 4, got ", side);
  const auto with_type = [&](auto filter) { type == ScalarType::Float ? run(filter, float()) : run(filter, BFloat16()); };
  side == 2 ? with_type(Filter<2>()) : with_type(Filter<4>());
}

// Input channels of a weight that are worth a thread.
int64_t grain(int64_t out) { return std::max<int64_t>(1, 4096 / std::max<int64_t>(1, out)); }

// (side + 2, side + 2, in · padded out): G w Gᵀ of a weight (out, in, 3, 3), in panels; turned around, the roles of in and
// out exchanged, for the gradient of the input.
Tensor winograd_weight(Tensor weight, bool turned, int64_t side) {
  FASTRIS_CHECK(
      weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 && weight.scalar_type() == ScalarType::Float,
      "winograd: weight must be float32 (out,in,3,3)");
  const int64_t out = weight.size(turned ? 1 : 0), in = weight.size(turned ? 0 : 1);
  const int64_t span = side + 2;
  Tensor transformed = empty_on(weight, {span, span, in * padded(out)}, ScalarType::Float);
  with_types(side, ScalarType::Float, [&](auto filter, float) {
    WeightKernel<decltype(filter)> kernel{
        in, out, weight.stride(turned ? 0 : 1), weight.stride(turned ? 1 : 0), {}, data(weight), nullptr, 0, 0};
    for (int64_t k = 0; k < 9; ++k) {
      const int64_t tap = turned ? 8 - k : k;
      kernel.tap_steps[k] = tap / 3 * weight.stride(2) + tap % 3 * weight.stride(3);
    }
    kernel.to = mutable_data(transformed);
    run_parallel(kernel, in, grain(out));
  });
  return transformed;
}

void winograd_convolve_out(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor y) {
  check(x, "x");
  check(y, "y");
  const int64_t in = x.size(1), out = y.size(1);
  FASTRIS_CHECK(
      weight.dim() == 3 && weight.size(0) == weight.size(1) && weight.size(2) == in * padded(out) &&
          weight.scalar_type() == ScalarType::Float && weight.is_contiguous(),
      "winograd: weight must come from winograd_weight");
  FASTRIS_CHECK(
      !bias || (bias->dim() == 1 && bias->size(0) == out && bias->scalar_type() == ScalarType::Float && bias->is_contiguous()),
      "winograd: bias must be contiguous float32 (out)");
  FASTRIS_CHECK(
      y.size(0) == x.size(0) && y.size(2) == x.size(2) && y.size(3) == x.size(3) && y.scalar_type() == x.scalar_type(),
      "winograd: y must be as large as x and of its dtype");
  with_types(weight.size(0) - 2, x.scalar_type(), [&](auto filter, auto of_type) {
    using T = decltype(of_type);
    const ConvolveKernel<decltype(filter), T> kernel{
        Tiles(filter.side, x),
        in,
        out,
        data<T>(x),
        data(weight),
        bias ? data(*bias) : nullptr,
        mutable_data<T>(y),
        0,
        0};
    run_parallel(kernel, (kernel.tiles.count + kStrip - 1) / kStrip, filter.side == 2 ? 4 : 1);
  });
}

Tensor winograd_weight_gradient(Tensor x, Tensor dy, int64_t side) {
  check(x, "x");
  check(dy, "dy");
  FASTRIS_CHECK(
      dy.size(0) == x.size(0) && dy.size(2) == x.size(2) && dy.size(3) == x.size(3) && dy.scalar_type() == x.scalar_type(),
      "winograd: dy must be as large as x and of its dtype");
  const int64_t in = x.size(1), out = dy.size(1);
  Tensor gradient = empty_on(x, {out, in, 3, 3}, ScalarType::Float);
  with_types(side, x.scalar_type(), [&](auto filter, auto of_type) {
    using T = decltype(of_type);
    WeightGradientKernel<decltype(filter), T> kernel{
        Tiles(filter.side, x), in, out, data<T>(x), data<T>(dy), nullptr, 0, 0};
    const Lanes<float> sums = new_lanes<float>(kernel.parts() * kernel.part_size());
    kernel.sums = sums.get();
    run_parallel(kernel, kernel.parts() * kernel.panels(), 1);
    const SumKernel<decltype(filter)> sum{
        in, out, kernel.parts(), kernel.part_size(), sums.get(), mutable_data(gradient), 0, 0};
    run_parallel(sum, in, grain(out));
  });
  return gradient;
}

}  // namespace
}  // namespace fastris

STABLE_TORCH_LIBRARY_IMPL(fastris, CPU, m) {
  m.impl("winograd_weight", TORCH_BOX(&fastris::winograd_weight));
  m.impl("winograd_convolve_out", TORCH_BOX(&fastris::winograd_convolve_out));
  m.impl("winograd_weight_gradient", TORCH_BOX(&fastris::winograd_weight_gradient));
}
