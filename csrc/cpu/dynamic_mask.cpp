// The mask of an object, drawn by a filter of two 1×1 layers that is the object's own: Tian, Shen & Chen, "Conditional
// Convolutions for Instance Segmentation", ECCV 2020. fp32; all between what is read and the mask stays in registers.
//
// A pixel shows the filter 8 channels of detail, how far it is from the centre in x, y and squared, and with a middle also
// how far the point that its two last channels of detail lead to is from that, likewise.
#include "../stable_abi.h"
#include "aligned.h"
#include "layout.h"
#include "parallel.h"
#include "simd.h"

#include <algorithm>

namespace fastris {
namespace {

constexpr int kWidth = 8;  // channels of detail that the filter sees, and of its inner layer
constexpr int kMostInputs = kWidth + 6;
constexpr int64_t kSlot = 16;  // floats of a sum: lanes of any vector
constexpr int64_t kRowsTogether = 8;  // whose sums are added to those before as one

template <bool Middle>
constexpr int kInputs = kWidth + (Middle ? 6 : 3);

template <bool Middle>
constexpr int64_t kFilter = kInputs<Middle> * kWidth + 2 * kWidth + 1;

// One image, its filter the other way around.
template <bool Middle>
struct Image {
  float first[kInputs<Middle>][kWidth], bias[kWidth], second[kWidth], last_bias;
  float centre[2], middle[2], scale;
  int64_t H, W;
  const float* detail;  // [channels][H][W]

  Image(
      int64_t H_, int64_t W_, const float* detail_, const float* filter, const float* centre_, const float* middle_,
      float radius)
      : scale(1.0f / radius), H(H_), W(W_), detail(detail_) {
    for (int k = 0; k < kWidth; ++k) {
      for (int i = 0; i < kInputs<Middle>; ++i) first[i][k] = filter[k * kInputs<Middle> + i];
      bias[k] = filter[kInputs<Middle> * kWidth + k];
      second[k] = filter[(kInputs<Middle> + 1) * kWidth + k];
    }
    last_bias = filter[(kInputs<Middle> + 2) * kWidth];
    for (int i = 0; i < 2; ++i) {
      centre[i] = centre_[i];
      middle[i] = Middle ? middle_[i] : 0.0f;
    }
  }

  // What pixels from (y, x) on show, and what the inner layer makes of it before it is rectified.
  template <int Bytes>
  FASTRIS_INLINE void look(
      int64_t y, int64_t x, Vector<float, Bytes> (&in)[kMostInputs], Vector<float, Bytes> (&inner)[kWidth]) const {
    using Real = Vector<float, Bytes>;
    constexpr int lanes = VectorOf<float, Bytes>::lanes;
    const float* const here = detail + y * W + x;
#pragma GCC unroll 8
    for (int i = 0; i < kWidth; ++i) in[i] = unaligned_at<Bytes>(here + i * H * W);
    Real column;
    for (int lane = 0; lane < lanes; ++lane) column[lane] = static_cast<float>(x + lane) + 0.5f;
    in[kWidth] = (column - centre[0]) * scale;
    in[kWidth + 1] = Real{} + (static_cast<float>(y) + 0.5f - centre[1]) * scale;
    in[kWidth + 2] = in[kWidth] * in[kWidth] + in[kWidth + 1] * in[kWidth + 1];
    if constexpr (Middle) {
      in[kWidth + 3] = in[kWidth] + unaligned_at<Bytes>(here + kWidth * H * W) - middle[0];
      in[kWidth + 4] = in[kWidth + 1] + unaligned_at<Bytes>(here + (kWidth + 1) * H * W) - middle[1];
      in[kWidth + 5] = in[kWidth + 3] * in[kWidth + 3] + in[kWidth + 4] * in[kWidth + 4];
    }
#pragma GCC unroll 8
    for (int k = 0; k < kWidth; ++k) inner[k] = Real{} + bias[k];
#pragma GCC unroll 14
    for (int i = 0; i < kInputs<Middle>; ++i) {
#pragma GCC unroll 8
      for (int k = 0; k < kWidth; ++k) inner[k] += first[i][k] * in[i];
    }
  }
};

struct Maps {
  int64_t B, channels, H, W;
  const float *detail, *filter, *centre, *middle;
  float radius;
  int64_t begin, end;

  template <bool Middle>
  Image<Middle> image(int64_t b) const {
    return Image<Middle>(
        H, W, detail + b * channels * H * W, filter + b * kFilter<Middle>, centre + 2 * b,
        Middle ? middle + 2 * b : nullptr, radius);
  }
};

// Rows of the masks of all images.
template <bool Middle>
struct Forward : Maps {
  float* logits;  // [B][H][W]

  template <int Bytes>
  FASTRIS_INLINE void run() const {
    for (int64_t row = begin; row < end;) {
      const int64_t b = row / H, stop = std::min(end, (b + 1) * H);
      const Image<Middle> image = this->template image<Middle>(b);
      for (; row < stop; ++row) {
        for_each_once<Bytes>(W, [&](auto bytes, int64_t x) FASTRIS_INLINE_LAMBDA {
          using Real = Vector<float, bytes.value>;
          Real in[kMostInputs], inner[kWidth];
          image.template look<bytes.value>(row - b * H, x, in, inner);
          Real logit = Real{} + image.last_bias;
#pragma GCC unroll 8
          for (int k = 0; k < kWidth; ++k) logit += image.second[k] * rectified<bytes.value>(inner[k]);
          unaligned_at<bytes.value>(logits + row * W + x) = logit;
        });
      }
    }
  }
};

// Whole images.
template <bool Middle>
struct Backward : Maps {
  static constexpr int64_t sums = kFilter<Middle> + 4;  // of the filter, the centre, the middle

  const float* grad;  // [B][H][W]
  float *d_detail, *d_filter, *d_centre, *d_middle;

  template <int Bytes>
  FASTRIS_INLINE void run() const {
    const Lanes<float> room = new_lanes<float>(sums * kSlot);
    for (int64_t b = begin; b < end; ++b) {
      const Image<Middle> image = this->template image<Middle>(b);
      float total[sums] = {};
      for (int64_t y = 0; y < H; y += kRowsTogether) {
        std::fill(room.get(), room.get() + sums * kSlot, 0.0f);
        for (int64_t row = y; row < std::min(H, y + kRowsTogether); ++row) add_row<Bytes>(image, b, row, room.get());
        for (int64_t i = 0; i < sums; ++i) {
          float sum = 0.0f;
          for (int64_t lane = 0; lane < kSlot; ++lane) sum += room[i * kSlot + lane];
          total[i] += sum;
        }
      }
      float* const filter = d_filter + b * kFilter<Middle>;
      for (int k = 0; k < kWidth; ++k) {
        for (int i = 0; i < kInputs<Middle>; ++i) filter[k * kInputs<Middle> + i] = total[i * kWidth + k];
      }
      for (int64_t i = kInputs<Middle> * kWidth; i < kFilter<Middle>; ++i) filter[i] = total[i];
      for (int64_t i = 0; i < 2; ++i) {
        d_centre[2 * b + i] = -image.scale * total[kFilter<Middle> + i];
        if (Middle) d_middle[2 * b + i] = -total[kFilter<Middle> + 2 + i];
      }
    }
  }

  template <int Bytes>
  FASTRIS_INLINE void add_row(const Image<Middle>& image, int64_t b, int64_t row, float* room) const {
    for_each_once<Bytes>(W, [&](auto bytes, int64_t x) FASTRIS_INLINE_LAMBDA {
      constexpr int width = bytes.value;
      using Real = Vector<float, width>;
      const Real zero = {};
      const auto add = [room](int64_t i, const Real& value) FASTRIS_INLINE_LAMBDA {
        vector_at<width>(room + i * kSlot) += value;
      };
      Real in[kMostInputs], inner[kWidth], d_in[kMostInputs];
      image.template look<width>(row, x, in, inner);
      const Real g = unaligned_at<width>(grad + (b * H + row) * W + x);
      constexpr int64_t bias = kInputs<Middle> * kWidth, second = bias + kWidth;
#pragma GCC unroll 8
      for (int k = 0; k < kWidth; ++k) {
        add(second + k, g * rectified<width>(inner[k]));
        inner[k] = inner[k] <= zero ? zero : g * image.second[k];
        add(bias + k, inner[k]);
      }
      add(second + kWidth, g);
#pragma GCC unroll 14
      for (int i = 0; i < kInputs<Middle>; ++i) {
        d_in[i] = zero;
#pragma GCC unroll 8
        for (int k = 0; k < kWidth; ++k) {
          add(i * kWidth + k, in[i] * inner[k]);
          d_in[i] += image.first[i][k] * inner[k];
        }
      }
      float* const to = d_detail + (b * channels * H + row) * W + x;
      for (int i = 0; i < kWidth; ++i) unaligned_at<width>(to + i * H * W) = d_in[i];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        Real d_offset = d_in[kWidth + i] + 2.0f * in[kWidth + i] * d_in[kWidth + 2];
        if constexpr (Middle) {
          const Real d_lead = d_in[kWidth + 3 + i] + 2.0f * in[kWidth + 3 + i] * d_in[kWidth + 5];
          unaligned_at<width>(to + (kWidth + i) * H * W) = d_lead;
          add(kFilter<Middle> + 2 + i, d_lead);
          d_offset += d_lead;
        }
        add(kFilter<Middle> + i, d_offset);
      }
    });
  }
};

void check_points(const Tensor& points, int64_t B, const char* name) {
  FASTRIS_CHECK(
      points.dim() == 2 && points.size(0) == B && points.size(1) == 2 && points.scalar_type() == ScalarType::Float,
      "dynamic_mask: ", name, " must be float32 (B,2)");
}

// What a call is about. Holds on to what it had to copy.
struct Call {
  Tensor detail, filter, centre;
  std::optional<Tensor> middle;
  Maps maps{};

  Call(Tensor detail_, Tensor filter_, Tensor centre_, std::optional<Tensor> middle_, double radius)
      : detail(torch::stable::contiguous(detail_)),
        filter(torch::stable::contiguous(filter_)),
        centre(torch::stable::contiguous(centre_)) {
    if (middle_) middle = torch::stable::contiguous(*middle_);
    FASTRIS_CHECK(
        detail.dim() == 4 && detail.size(1) == kWidth + (middle ? 2 : 0) && detail.scalar_type() == ScalarType::Float,
        "dynamic_mask: detail must be float32 (B,8,H,W), or with a middle (B,10,H,W)");
    const int64_t B = detail.size(0);
    FASTRIS_CHECK(
        filter.dim() == 2 && filter.size(0) == B && filter.size(1) == (middle ? kFilter<true> : kFilter<false>) &&
            filter.scalar_type() == ScalarType::Float,
        "dynamic_mask: filter must be float32 (B,105), or with a middle (B,129)");
    check_points(centre, B, "centre");
    if (middle) check_points(*middle, B, "middle");
    maps.B = B;
    maps.channels = detail.size(1);
    maps.H = detail.size(2);
    maps.W = detail.size(3);
    maps.detail = static_cast<const float*>(detail.const_data_ptr());
    maps.filter = static_cast<const float*>(filter.const_data_ptr());
    maps.centre = static_cast<const float*>(centre.const_data_ptr());
    maps.middle = middle ? static_cast<const float*>(middle->const_data_ptr()) : nullptr;
    maps.radius = static_cast<float>(radius);
  }
};

template <bool Middle>
void forward(const Maps& maps, float* logits) {
  Forward<Middle> kernel{};
  static_cast<Maps&>(kernel) = maps;
  kernel.logits = logits;
  run_parallel(kernel, maps.B * maps.H, 64);
}

template <bool Middle>
void backward(const Maps& maps, const float* grad, float* d_detail, float* d_filter, float* d_centre, float* d_middle) {
  Backward<Middle> kernel{};
  static_cast<Maps&>(kernel) = maps;
  kernel.grad = grad;
  kernel.d_detail = d_detail;
  kernel.d_filter = d_filter;
  kernel.d_centre = d_centre;
  kernel.d_middle = d_middle;
  run_parallel(kernel, maps.B, 1);
}

Tensor dynamic_mask(Tensor detail, Tensor filter, Tensor centre, std::optional<Tensor> middle, double radius) {
  const Call call(detail, filter, centre, middle, radius);
  Tensor logits = empty_on(detail, {call.maps.B, call.maps.H, call.maps.W}, ScalarType::Float);
  float* to = static_cast<float*>(logits.data_ptr());
  middle ? forward<true>(call.maps, to) : forward<false>(call.maps, to);
  return logits;
}

// The gradients of detail, filter, centre and middle, the last one empty without a middle.
std::tuple<Tensor, Tensor, Tensor, Tensor> dynamic_mask_backward(
    Tensor grad, Tensor detail, Tensor filter, Tensor centre, std::optional<Tensor> middle, double radius) {
  const Call call(detail, filter, centre, middle, radius);
  const Maps& maps = call.maps;
  FASTRIS_CHECK(
      grad.dim() == 3 && grad.size(0) == maps.B && grad.size(1) == maps.H && grad.size(2) == maps.W &&
          grad.scalar_type() == ScalarType::Float,
      "dynamic_mask: grad must be float32 (B,H,W)");
  grad = torch::stable::contiguous(grad);
  Tensor d_detail = empty_on(detail, {maps.B, maps.channels, maps.H, maps.W}, ScalarType::Float);
  Tensor d_filter = empty_on(detail, {maps.B, filter.size(1)}, ScalarType::Float);
  Tensor d_centre = empty_on(detail, {maps.B, 2}, ScalarType::Float);
  Tensor d_middle = empty_on(detail, {middle ? maps.B : 0, 2}, ScalarType::Float);
  const auto data = [](const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); };
  (middle ? backward<true> : backward<false>)(
      maps, static_cast<const float*>(grad.const_data_ptr()), data(d_detail), data(d_filter), data(d_centre),
      data(d_middle));
  return {d_detail, d_filter, d_centre, d_middle};
}

}  // namespace
}  // namespace fastris

STABLE_TORCH_LIBRARY_IMPL(fastris, CPU, m) {
  m.impl("dynamic_mask", TORCH_BOX(&fastris::dynamic_mask));
  m.impl("dynamic_mask_backward", TORCH_BOX(&fastris::dynamic_mask_backward));
}
