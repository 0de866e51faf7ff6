// soft_iou_backward on the CPU: out[p] = offset[p] + Σ_g weight[p, g] · y_g over the pixels, zero weights skipped.
//
// B = batch, P = rows of the result, G = masks or labels, N = pixels.
#include "parallel.h"
#include "pixels.h"

namespace fastris {
namespace {

template <typename To, typename T>
FASTRIS_INLINE void store_row_of(const T* row, int64_t n, void* to, int64_t at) {
  To* out = static_cast<To*>(to) + at;
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<To>(row[i]);
}

template <typename T>
struct WeightedSumKernel {
  const T* weight;  // (B, P, G)
  const T* offset;  // (B, P)
  const Masks* masks;  // or nullptr:
  const LabelMap* labels;
  int64_t P, G;
  Chunks chunks;
  void* out;  // (B, P, N)
  ScalarType out_type;
  int64_t begin, end;  // tasks: image, chunk

  template <int Bytes>
  FASTRIS_INLINE void run() const {
    const Lanes<T> y = new_lanes<T>(masks ? G * kTileRow<T> : 0);
    const Lanes<T> row = new_lanes<T>(kTileRow<T>);
    Lanes<Segments<T, Bytes>> segments;
    if (labels) segments = new_lanes<Segments<T, Bytes>>(1);
    std::vector<int64_t> columns(static_cast<size_t>(P * G));  // of the weights that are not zero, row by row
    std::vector<int64_t> column_end(static_cast<size_t>(P));
    std::vector<char> used(static_cast<size_t>(G));

    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / chunks.count;
      const int64_t chunk = task % chunks.count;
      find_weights(weight + b * P * G, columns.data(), column_end.data(), used.data());
      for (int64_t x = chunks.begin(chunk); x < chunks.end(chunk); x += kTile) {
        const int64_t n = std::min(kTile, chunks.end(chunk) - x);
        for (int64_t g = 0; masks && g < G; ++g) {
          if (used[g]) load_row(*masks, b, g, x, n, y.get() + g * kTileRow<T>);
        }
        if (labels) segments[0].find(*labels, b, x, n, G);
        for (int64_t p = 0; p < P; ++p) {
          const T* weights = weight + (b * P + p) * G;
          const int64_t first = p == 0 ? 0 : column_end[p - 1];
          const int64_t* column = columns.data() + first;
          const int64_t count = column_end[p] - first;
          if (masks) {
            add_masks<Bytes>(offset[b * P + p], weights, column, count, y.get(), row.get(), n);
          } else {
            add_labels<Bytes>(offset[b * P + p], weights, count > 0, segments[0], row.get());
          }
          store(row.get(), n, (b * P + p) * chunks.N + x);
        }
      }
    }
  }

 private:
  void find_weights(const T* weights, int64_t* columns, int64_t* column_end, char* used) const {
    std::fill(used, used + G, 0);
    int64_t count = 0;
    for (int64_t p = 0; p < P; ++p) {
      for (int64_t g = 0; g < G; ++g) {
        if (weights[p * G + g] == 0) continue;
        used[g] = 1;
        columns[count++] = g;
      }
      column_end[p] = count;
    }
  }

  template <int Bytes>
  FASTRIS_INLINE static void add_masks(
      T offset, const T* weights, const int64_t* columns, int64_t count, const T* y, T* row, int64_t n) {
    constexpr int lanes = VectorOf<T, Bytes>::lanes;
    constexpr int together = 4;  // vectors of pixels, so that their additions overlap
    static_assert(kGroup % (together * lanes) == 0, "a row goes on to the end of its group");
    for (int64_t x = 0; x < n; x += together * lanes) {
      Vector<T, Bytes> sum[together] = {};
#pragma GCC unroll 4
      for (int i = 0; i < together; ++i) sum[i] += offset;
      for (int64_t k = 0; k < count; ++k) {
        const T factor = weights[columns[k]];
        const T* column = y + columns[k] * kTileRow<T> + x;
#pragma GCC unroll 4
        for (int i = 0; i < together; ++i) sum[i] += factor * vector_at<Bytes>(column + i * lanes);
      }
#pragma GCC unroll 4
      for (int i = 0; i < together; ++i) vector_at<Bytes>(row + x + i * lanes) = sum[i];
    }
  }

  template <int Bytes>
  FASTRIS_INLINE static void add_labels(
      T offset, const T* weights, bool any_weight, const Segments<T, Bytes>& segments, T* row) {
    for (int64_t i = 0; i < segments.num_runs; ++i) {
      const auto& run = segments.run[i];
      const bool weighed = any_weight && run.label > 0;
      std::fill(row + run.begin, row + run.end, weighed ? offset + weights[run.label - 1] : offset);
    }
    for (int64_t i = 0; any_weight && i < segments.num_parts; ++i) {
      const auto& part = segments.part[i];
      Vector<T, Bytes> factor{};
      factor += weights[part.label - 1];
      add_masked(vector_at<Bytes>(row + part.pixel), factor, part.mask);
    }
  }

  FASTRIS_INLINE void store(const T* row, int64_t n, int64_t at) const {
    switch (out_type) {
      case ScalarType::Float:
        return store_row_of<float>(row, n, out, at);
      case ScalarType::Double:
        return store_row_of<double>(row, n, out, at);
      case ScalarType::BFloat16:
        return store_row_of<BFloat16>(row, n, out, at);
      default:  // Half: soft_iou_backward() lets no other pass
        return store_row_of<Half>(row, n, out, at);
    }
  }
};

template <typename T>
void weighted_sum(const Tensor& weight, const Tensor& offset, const Tensor& target, Tensor& out) {
  const bool with_labels = target.dim() == 3;
  const std::optional<Masks> masks = with_labels ? std::nullopt : std::optional<Masks>(target);
  const std::optional<LabelMap> labels = with_labels ? std::optional<LabelMap>(target) : std::nullopt;
  const WeightedSumKernel<T> kernel{
      static_cast<const T*>(weight.data_ptr()),
      static_cast<const T*>(offset.data_ptr()),
      masks ? &*masks : nullptr,
      labels ? &*labels : nullptr,
      weight.size(1),
      weight.size(2),
      Chunks(out.size(2) * out.size(3)),
      out.data_ptr(),
      out.scalar_type(),
      0,
      0};
  run_parallel(kernel, out.size(0) * kernel.chunks.count, 1);
}

Tensor soft_iou_backward(Tensor weight, Tensor offset, Tensor target, ScalarType dtype) {
  const bool labels = target.dim() == 3;
  labels ? check_labels(target) : check_masks(target, "soft_iou_backward: target");
  const ScalarType type = weight.scalar_type();
  FASTRIS_CHECK(
      weight.dim() == 3 && weight.size(0) == target.size(0) && (labels || weight.size(2) == target.size(1)) &&
          (type == ScalarType::Float || type == ScalarType::Double),
      "soft_iou_backward: weight must be float32 or float64 (B,P,G)");
  FASTRIS_CHECK(
      offset.dim() == 2 && offset.size(0) == weight.size(0) && offset.size(1) == weight.size(1) &&
          offset.scalar_type() == type,
      "soft_iou_backward: offset must be (B,P) in the dtype of weight");
  FASTRIS_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
          dtype == ScalarType::Half,
      "soft_iou_backward: dtype must be floating");
  weight = torch::stable::contiguous(weight);
  offset = torch::stable::contiguous(offset);
  const int64_t height = target.dim() - 2;
  Tensor out =
      empty_on(weight, {weight.size(0), weight.size(1), target.size(height), target.size(height + 1)}, dtype);
  type == ScalarType::Double ? weighted_sum<double>(weight, offset, target, out)
                             : weighted_sum<float>(weight, offset, target, out);
  return out;
}

}  // namespace
}  // namespace fastris

STABLE_TORCH_LIBRARY_IMPL(fastris, CPU, m) { m.impl("soft_iou_backward", TORCH_BOX(&fastris::soft_iou_backward)); }
