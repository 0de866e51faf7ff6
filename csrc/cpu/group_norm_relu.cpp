// Group normalisation and the rectifier after it, y = relu(γ (x − μ) / σ + β), forward and backward. fp32, channels_last.
//
// Two passes over the pixels: sums of each channel, which make those of its group, and then the results. What is rectified
// is computed again for the gradient, not kept.
#include "../stable_abi.h"
#include "aligned.h"
#include "layout.h"
#include "parallel.h"
#include "simd.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

namespace fastris {
namespace {

constexpr int64_t kChunk = 128;  // pixels whose sums are in fp32; those of chunks are added in fp64

struct Maps {
  int64_t batch, pixels, channels, groups;
  const float* x;

  int64_t chunks() const { return (pixels + kChunk - 1) / kChunk; }
  int64_t tasks() const { return batch * chunks(); }
  int64_t in_group() const { return channels / groups; }

  // A chunk of an image: the numbers from first to last, of which channel c has every channels-th from first + c on.
  struct Chunk {
    int64_t task, image, first, last;
  };

  // step(bytes, chunk, c) for the channels of some tasks.
  template <int Bytes, typename Step>
  FASTRIS_INLINE void for_chunks(int64_t begin, int64_t end, const Step& step) const {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / chunks(), from = task % chunks() * kChunk, to = std::min(from + kChunk, pixels);
      const Chunk chunk{task, image, (image * pixels + from) * channels, (image * pixels + to) * channels};
      for_channels<Bytes>(channels, [&](auto bytes, int64_t c) FASTRIS_INLINE_LAMBDA { step(bytes, chunk, c); });
    }
  }
};

// So many sums of each chunk's channels: [task][kind][channel].
struct Sums {
  const Maps& maps;
  int64_t kinds;
  Lanes<float> of_chunks;

  Sums(const Maps& maps_, int64_t kinds_)
      : maps(maps_), kinds(kinds_), of_chunks(new_lanes<float>(maps_.tasks() * kinds_ * maps_.channels)) {}

  FASTRIS_INLINE float* at(int64_t task, int64_t kind, int64_t channel) const {
    return of_chunks.get() + (task * kinds + kind) * maps.channels + channel;
  }

  double of_image(int64_t image, int64_t kind, int64_t channel) const {
    double sum = 0;
    for (int64_t task = image * maps.chunks(); task < (image + 1) * maps.chunks(); ++task) sum += *at(task, kind, channel);
    return sum;
  }
};

// About the mean of each chunk's channel, Σ d and Σ d²: the mean is rounded, so Σ d is not quite nothing.
struct MomentsKernel {
  Maps maps;
  const Sums& sums;  // of three kinds: mean, Σ d, Σ d²
  int64_t begin, end;  // tasks

  template <int Bytes>
  FASTRIS_INLINE void run() const {
    const int64_t C = maps.channels;
    maps.for_chunks<Bytes>(begin, end, [&](auto bytes, const Maps::Chunk& chunk, int64_t c) FASTRIS_INLINE_LAMBDA {
      using Real = Vector<float, bytes.value>;
      Real mean{}, sum{}, squares{};
      for (int64_t at = chunk.first + c; at < chunk.last; at += C) mean += unaligned_at<bytes.value>(maps.x + at);
      mean /= static_cast<float>((chunk.last - chunk.first) / C);
      for (int64_t at = chunk.first + c; at < chunk.last; at += C) {
        const Real d = unaligned_at<bytes.value>(maps.x + at) - mean;
        sum += d;
        squares += d * d;
      }
      unaligned_at<bytes.value>(sums.at(chunk.task, 0, c)) = mean;
      unaligned_at<bytes.value>(sums.at(chunk.task, 1, c)) = sum;
      unaligned_at<bytes.value>(sums.at(chunk.task, 2, c)) = squares;
    });
  }
};

// What makes z = scale (x − μ) + β of every image's channels: [image][channel], and β [channel].
struct Affine {
  Lanes<float> scale, mean;
  const float* bias;

  Affine(const Maps& maps, const float* weight, const float* bias_, const float* means, const float* rstd)
      : scale(new_lanes<float>(maps.batch * maps.channels)),
        mean(new_lanes<float>(maps.batch * maps.channels)),
        bias(bias_) {
    for (int64_t i = 0; i < maps.batch * maps.channels; ++i) {
      scale[i] = weight[i % maps.channels] * rstd[i / maps.in_group()];
      mean[i] = means[i / maps.in_group()];
    }
  }
};

// That of some channels of an image.
template <int Bytes>
struct AffineOf {
  Vector<float, Bytes> scale, mean, bias;

  FASTRIS_INLINE AffineOf(const Affine& all, const Maps& maps, int64_t image, int64_t c)
      : scale(unaligned_at<Bytes>(all.scale.get() + image * maps.channels + c)),
        mean(unaligned_at<Bytes>(all.mean.get() + image * maps.channels + c)),
        bias(unaligned_at<Bytes>(all.bias + c)) {}
};

struct ForwardKernel {
  Maps maps;
  const Affine& affine;
  float* y;
  int64_t begin, end;  // tasks

  template <int Bytes>
  FASTRIS_INLINE void run() const {
    maps.for_chunks<Bytes>(begin, end, [&](auto bytes, const Maps::Chunk& chunk, int64_t c) FASTRIS_INLINE_LAMBDA {
      using Real = Vector<float, bytes.value>;
      const AffineOf<bytes.value> of(affine, maps, chunk.image, c);
      for (int64_t at = chunk.first + c; at < chunk.last; at += maps.channels) {
        const Real z = of.scale * (unaligned_at<bytes.value>(maps.x + at) - of.mean) + of.bias;
        unaligned_at<bytes.value>(y + at) = rectified<bytes.value>(z);
      }
    });
  }
};

// What the kernels of the backward have in common.
struct Gradients {
  Maps maps;
  const Affine& affine;
  const float* dy;

  // dz, and x − μ
  template <int Bytes>
  FASTRIS_INLINE void load(
      int64_t at, const AffineOf<Bytes>& of, Vector<float, Bytes>& dz, Vector<float, Bytes>& centred) const {
    using Real = Vector<float, Bytes>;
    const Real zero{};
    centred = unaligned_at<Bytes>(maps.x + at) - of.mean;
    dz = of.scale * centred + of.bias <= zero ? zero : Real(unaligned_at<Bytes>(dy + at));
  }
};

// Σ dz and Σ dz (x − μ).
struct GradientSumsKernel : Gradients {
  const Sums& sums;  // of two kinds
  int64_t begin, end;  // tasks

  template <int Bytes>
  FASTRIS_INLINE void run() const {
    const int64_t C = maps.channels;
    maps.for_chunks<Bytes>(begin, end, [&](auto bytes, const Maps::Chunk& chunk, int64_t c) FASTRIS_INLINE_LAMBDA {
      const AffineOf<bytes.value> of(affine, maps, chunk.image, c);
      Vector<float, bytes.value> sum{}, product{}, dz, centred;
      for (int64_t at = chunk.first + c; at < chunk.last; at += C) {
        load<bytes.value>(at, of, dz, centred);
        sum += dz;
        product += dz * centred;
      }
      unaligned_at<bytes.value>(sums.at(chunk.task, 0, c)) = sum;
      unaligned_at<bytes.value>(sums.at(chunk.task, 1, c)) = product;
    });
  }
};

// dx = scale · dz + of_x (x − μ) + added
struct BackwardKernel : Gradients {
  const float *of_x, *added;  // [image][channel]
  float* dx;
  int64_t begin, end;  // tasks

  template <int Bytes>
  FASTRIS_INLINE void run() const {
    const int64_t C = maps.channels;
    maps.for_chunks<Bytes>(begin, end, [&](auto bytes, const Maps::Chunk& chunk, int64_t c) FASTRIS_INLINE_LAMBDA {
      using Real = Vector<float, bytes.value>;
      const AffineOf<bytes.value> of(affine, maps, chunk.image, c);
      const Real k = unaligned_at<bytes.value>(of_x + chunk.image * C + c);
      const Real plus = unaligned_at<bytes.value>(added + chunk.image * C + c);
      Real dz, centred;
      for (int64_t at = chunk.first + c; at < chunk.last; at += C) {
        load<bytes.value>(at, of, dz, centred);
        unaligned_at<bytes.value>(dx + at) = of.scale * dz + (k * centred + plus);
      }
    });
  }
};

Maps checked(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups) {
  FASTRIS_CHECK(
      x.dim() == 4 && x.scalar_type() == ScalarType::Float, "group_norm_relu: x must be float32 (B,C,H,W)");
  FASTRIS_CHECK(is_dense(x, true), "group_norm_relu: x must be channels_last");
  const int64_t C = x.size(1);
  FASTRIS_CHECK(
      groups > 0 && C % groups == 0, "group_norm_relu: groups must divide the ", C, " channels of x, got ", groups);
  for (const auto& [one, name] : {std::pair(&weight, "weight"), std::pair(&bias, "bias")}) {
    FASTRIS_CHECK(
        one->dim() == 1 && one->size(0) == C && one->scalar_type() == ScalarType::Float && one->is_contiguous(),
        "group_norm_relu: ", name, " must be contiguous float32 (C)");
  }
  return {x.size(0), x.size(2) * x.size(3), C, groups, data(x)};
}

struct Moments {
  double mean, variance;
};

// Of the group that begins at a channel; 0 of no pixels. The chunks are merged by the formula of T. F. Chan, G. H. Golub &
// R. J. LeVeque, "Algorithms for Computing the Sample Variance", 1983.
Moments moments(const Maps& maps, const Sums& sums, int64_t image, int64_t first) {
  double count = 0, mean = 0, squares = 0;
  for (int64_t k = 0; k < maps.chunks(); ++k) {
    const double n = static_cast<double>(std::min(kChunk, maps.pixels - k * kChunk));
    for (int64_t c = first; c < first + maps.in_group(); ++c) {
      const int64_t task = image * maps.chunks() + k;
      const double d = *sums.at(task, 1, c) / n, off = *sums.at(task, 0, c) + d - mean;
      squares += *sums.at(task, 2, c) - n * d * d + off * off * n * count / (n + count);
      count += n;
      mean += off * n / count;
    }
  }
  return {mean, count == 0 ? 0 : std::max(squares, 0.0) / count};
}

// y, channels_last, and the mean and 1/σ of each image's groups (B, groups).
std::tuple<Tensor, Tensor, Tensor> group_norm_relu(Tensor x, Tensor weight, Tensor bias, int64_t groups, double eps) {
  const Maps maps = checked(x, weight, bias, groups);
  Tensor y = empty_channels_last(x, x.size(0), x.size(1), x.size(2), x.size(3), ScalarType::Float);
  Tensor mean = empty_on(x, {maps.batch, groups}, ScalarType::Float), rstd = empty_on(x, {maps.batch, groups}, ScalarType::Float);
  const Sums sums(maps, 3);
  run_parallel(MomentsKernel{maps, sums, 0, 0}, maps.tasks(), 4);
  for (int64_t i = 0; i < maps.batch * groups; ++i) {
    const Moments of_group = moments(maps, sums, i / groups, i % groups * maps.in_group());
    mutable_data(mean)[i] = static_cast<float>(of_group.mean);
    mutable_data(rstd)[i] = static_cast<float>(1 / std::sqrt(of_group.variance + eps));
  }
  const Affine affine(maps, data(weight), data(bias), data(mean), data(rstd));
  run_parallel(ForwardKernel{maps, affine, mutable_data(y), 0, 0}, maps.tasks(), 4);
  return {y, mean, rstd};
}

// dx, channels_last, and the gradients of weight and bias.
std::tuple<Tensor, Tensor, Tensor> group_norm_relu_backward(
    Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, int64_t groups) {
  const Maps maps = checked(x, weight, bias, groups);
  FASTRIS_CHECK(
      grad.dim() == 4 && grad.size(0) == x.size(0) && grad.size(1) == x.size(1) && grad.size(2) == x.size(2) &&
          grad.size(3) == x.size(3) && grad.scalar_type() == ScalarType::Float && is_dense(grad, true),
      "group_norm_relu: grad must be float32 and channels_last like x");
  for (const Tensor& one : {mean, rstd}) {
    FASTRIS_CHECK(
        one.dim() == 2 && one.size(0) == maps.batch && one.size(1) == groups &&
            one.scalar_type() == ScalarType::Float && one.is_contiguous(),
        "group_norm_relu: mean and rstd must be contiguous float32 (B,groups)");
  }
  const int64_t C = maps.channels, all = maps.batch * C;
  const Affine affine(maps, data(weight), data(bias), data(mean), data(rstd));
  const Lanes<float> of_x = new_lanes<float>(all), added = new_lanes<float>(all);
  const Gradients gradients{maps, affine, data(grad)};
  const Sums sums(maps, 2);
  run_parallel(GradientSumsKernel{gradients, sums, 0, 0}, maps.tasks(), 4);

  Tensor d_x = empty_channels_last(x, x.size(0), C, x.size(2), x.size(3), ScalarType::Float);
  Tensor d_weight = empty_on(x, {C}, ScalarType::Float), d_bias = empty_on(x, {C}, ScalarType::Float);
  std::vector<double> of_weight(static_cast<size_t>(C)), of_bias(static_cast<size_t>(C));
  const double count = std::max(1.0, static_cast<double>(maps.pixels * maps.in_group()));
  for (int64_t i = 0; i < maps.batch * groups; ++i) {
    const int64_t image = i / groups, first = i % groups * maps.in_group();
    const double r = data(rstd)[i];
    double sum = 0, product = 0;
    for (int64_t c = first; c < first + maps.in_group(); ++c) {
      const double dz = sums.of_image(image, 0, c), dz_x = sums.of_image(image, 1, c);
      of_bias[static_cast<size_t>(c)] += dz;
      of_weight[static_cast<size_t>(c)] += r * dz_x;
      sum += data(weight)[c] * dz;
      product += data(weight)[c] * dz_x;
    }
    std::fill_n(of_x.get() + image * C + first, maps.in_group(), static_cast<float>(-r * r * r * product / count));
    std::fill_n(added.get() + image * C + first, maps.in_group(), static_cast<float>(-r * sum / count));
  }
  std::copy(of_weight.begin(), of_weight.end(), mutable_data(d_weight));
  std::copy(of_bias.begin(), of_bias.end(), mutable_data(d_bias));
  run_parallel(BackwardKernel{gradients, of_x.get(), added.get(), mutable_data(d_x), 0, 0}, maps.tasks(), 4);
  return {d_x, d_weight, d_bias};
}

}  // namespace
}  // namespace fastris

STABLE_TORCH_LIBRARY_IMPL(fastris, CPU, m) {
  m.impl("group_norm_relu", TORCH_BOX(&fastris::group_norm_relu));
  m.impl("group_norm_relu_backward", TORCH_BOX(&fastris::group_norm_relu_backward));
}
