// soft_iou on the CPU. Every task sums Σq, Σy and Σqy of up to 24 predictions over a chunk of pixels, tile by tile:
// masks with a register-blocked product of rows, label maps with one addition per prediction and vector of pixels. The
// sums of a block of tiles are kept in the lanes of vectors of the compute type, those of blocks and chunks in fp64.
//
// B = batch, P = predictions, G = targets, N = pixels.
#include "parallel.h"
#include "pixels.h"

namespace fastris {
namespace {

constexpr int64_t kPanel = 24;    // predictions of a task
constexpr int64_t kColumns = 4;   // targets of a register block
constexpr int64_t kFlush = 4096;  // pixels whose sums are kept in lanes

// Predictions of a register block: 6 × 4 sums and their operands fill the 32 registers of AVX-512, 3 × 4 the 16 of
// AVX2.
template <int Bytes>
constexpr int kBlockRows = Bytes == 64 ? 6 : Bytes == 32 ? 3 : 2;
constexpr int kLabelRows = 4;  // that are added up together beside a label map

// The sums of one image and chunk: for every prediction Σqy with every target and then Σq, after that Σy of every
// target.
struct PartialSums {
  int64_t P, G;

  int64_t size() const { return P * (G + 1) + G; }
  int64_t pair(int64_t p, int64_t g) const { return p * (G + 1) + g; }
  int64_t pred(int64_t p) const { return p * (G + 1) + G; }
  int64_t target(int64_t g) const { return P * (G + 1) + g; }
};

template <typename T, int Bytes>
FASTRIS_INLINE double take_lanes(Vector<T, Bytes>& sum) {
  T* lanes = reinterpret_cast<T*>(&sum);
  for (int width = VectorOf<T, Bytes>::lanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  const double total = static_cast<double>(lanes[0]);
  sum = Vector<T, Bytes>{};
  return total;
}

template <typename T, int Bytes>
FASTRIS_INLINE void add_row(const T* row, int64_t vectors, Vector<T, Bytes>& sum) {
  constexpr int lanes = VectorOf<T, Bytes>::lanes;
  Vector<T, Bytes> part[4] = {sum};  // whose additions overlap
  int64_t v = 0;
  for (; v + 4 <= vectors; v += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) part[i] += vector_at<Bytes>(row + (v + i) * lanes);
  }
  for (; v < vectors; ++v) part[0] += vector_at<Bytes>(row + v * lanes);
  sum = (part[0] + part[1]) + (part[2] + part[3]);
}

// What to fetch meanwhile: one address for every vector.
struct Ahead {
  const char* address;
  int64_t step;
};

// The rows of the next tile, by turns. A product is bound by arithmetic and leaves the memory idle, so that each of them
// fetches one; the rows that they do not come to are left to the processor's own prefetcher.
template <int lanes>
struct NextTile {
  const Masks& pred;
  const Masks& masks;
  int64_t b, first, rows, targets, x;
  int64_t row = 0;

  FASTRIS_INLINE Ahead next() {
    const int64_t i = row++;
    if (i < rows) return ahead(pred, first + i);
    if (i < rows + targets) return ahead(masks, i - rows);
    return {pred.address(b, first, x), 0};
  }

 private:
  FASTRIS_INLINE Ahead ahead(const Masks& of, int64_t one) const {
    return {of.address(b, one, x), lanes * of.pixel_stride * of.element_bytes};
  }
};

// Adds the products of Count rows of q with kColumns rows of y to their sums; those of two targets are `stride` apart.
template <typename T, int Bytes, int Count>
FASTRIS_INLINE void multiply_block(
    const Rows<T>& q, const T* y, int64_t vectors, Vector<T, Bytes>* sums, int64_t stride, const Ahead& ahead) {
  constexpr int lanes = VectorOf<T, Bytes>::lanes;
  Vector<T, Bytes> sum[Count][kColumns];
#pragma GCC unroll 8
  for (int r = 0; r < Count; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) sum[r][c] = sums[c * stride + r];
  }
  for (int64_t v = 0; v < vectors; ++v) {
    __builtin_prefetch(ahead.address + v * ahead.step, 0, 2);  // into the second level of cache
    Vector<T, Bytes> column[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) column[c] = vector_at<Bytes>(y + c * kTileRow<T> + v * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < Count; ++r) {
      const Vector<T, Bytes> row = vector_at<Bytes>(q.first + r * q.stride + v * lanes);
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) sum[r][c] += row * column[c];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Count; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) sums[c * stride + r] = sum[r][c];
  }
}

template <typename T>
struct SumKernel {
  const Masks& pred;
  const Masks* masks;        // or nullptr:
  const LabelMap* labels;
  const int64_t* num_pred;   // (B,) or nullptr
  const int64_t* num_target;
  PartialSums layout;
  Chunks chunks;
  double* partial;  // (B, chunks, layout.size()), zeros
  int64_t begin, end;  // tasks: image, panel of predictions, chunk

  int64_t panels() const { return (layout.P + kPanel - 1) / kPanel; }

  template <int Bytes>
  FASTRIS_INLINE void run() const {
    masks ? run_tasks<Bytes, true>() : run_tasks<Bytes, false>();
  }

 private:
  template <int Bytes, bool WithMasks>
  FASTRIS_INLINE void run_tasks() const {
    using Vec = Vector<T, Bytes>;
    constexpr int lanes = VectorOf<T, Bytes>::lanes;
    constexpr int block_rows = WithMasks ? kBlockRows<Bytes> : kLabelRows;
    const int64_t padded_targets = (layout.G + kColumns - 1) / kColumns * kColumns;
    const int64_t panel = std::min(kPanel, layout.P);
    const Lanes<T> q = new_lanes<T>(block_rows * kTileRow<T>);
    const Lanes<T> y = new_lanes<T>(WithMasks ? padded_targets * kTileRow<T> : 0);
    Lanes<Segments<T, Bytes>> segments;
    if constexpr (!WithMasks) segments = new_lanes<Segments<T, Bytes>>(1);
    // Σqy of a target with the rows of the panel, for every target; then Σq of the rows; then Σy
    const int64_t sums = padded_targets * panel + panel + padded_targets;
    const Lanes<T> lane_sums = new_lanes<T>(sums * lanes);
    std::fill(lane_sums.get(), lane_sums.get() + sums * lanes, T(0));

    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task % chunks.count;
      const int64_t first = task / chunks.count % panels() * kPanel;
      const int64_t b = task / chunks.count / panels();
      const int64_t used = num_pred ? std::clamp<int64_t>(num_pred[b], 0, layout.P) : layout.P;
      const int64_t rows = std::min(panel, used - first);
      const int64_t targets = num_target ? std::clamp<int64_t>(num_target[b], 0, layout.G) : layout.G;
      if (rows <= 0) continue;
      double* sums_of_chunk = partial + (b * chunks.count + chunk) * layout.size();
      Vec* pair = &vector_at<Bytes>(lane_sums.get());
      Vec* of_pred = pair + padded_targets * rows;
      Vec* of_target = of_pred + rows;
      for (int64_t g = targets; WithMasks && g < padded_targets; ++g) {
        std::fill(y.get() + g * kTileRow<T>, y.get() + (g + 1) * kTileRow<T>, T(0));
      }

      int64_t pixels = 0;  // since the last flush
      for (int64_t x = chunks.begin(chunk); x < chunks.end(chunk); x += kTile) {
        const int64_t n = std::min(kTile, chunks.end(chunk) - x);
        const int64_t vectors = (n + lanes - 1) / lanes;
        if constexpr (WithMasks) {
          for (int64_t g = 0; g < targets; ++g) {
            load_row(*masks, b, g, x, n, y.get() + g * kTileRow<T>);
            add_row<T, Bytes>(y.get() + g * kTileRow<T>, vectors, of_target[g]);
          }
          NextTile<lanes> ahead{pred, *masks, b, first, rows, targets, x + n};
          for (int64_t r = 0; r < rows; r += block_rows) {
            const int64_t some = std::min<int64_t>(block_rows, rows - r);
            const Rows<T> block = rows_at<Bytes>(pred, b, first + r, some, x, n, q.get());
            for (int64_t i = 0; i < some; ++i) {
              add_row<T, Bytes>(block.first + i * block.stride, vectors, of_pred[r + i]);
            }
            with_count<block_rows>(some, [&](auto count) FASTRIS_INLINE_LAMBDA {
              for (int64_t g = 0; g < targets; g += kColumns) {
                multiply_block<T, Bytes, count>(
                    block, y.get() + g * kTileRow<T>, vectors, pair + g * rows + r, rows, ahead.next());
              }
            });
          }
        } else {
          segments[0].find(*labels, b, x, n, targets);
          for (int64_t r = 0; r < rows; r += block_rows) {
            const int64_t some = std::min<int64_t>(block_rows, rows - r);
            const Rows<T> block = rows_at<Bytes>(pred, b, first + r, some, x, n, q.get());
            with_count<block_rows>(some, [&](auto count) FASTRIS_INLINE_LAMBDA {
              add_segments<Bytes, count>(segments[0], block, pair + r, rows, of_pred + r);
            });
          }
          count_segments<Bytes>(segments[0], of_target);
        }
        pixels += n;
        if (pixels >= kFlush || x + n == chunks.end(chunk)) {
          pixels = 0;
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t g = 0; g < targets; ++g) {
              sums_of_chunk[layout.pair(first + r, g)] += take_lanes<T, Bytes>(pair[g * rows + r]);
            }
            sums_of_chunk[layout.pred(first + r)] += take_lanes<T, Bytes>(of_pred[r]);
          }
          for (int64_t g = 0; g < targets; ++g) {
            const double sum = take_lanes<T, Bytes>(of_target[g]);
            if (first == 0) sums_of_chunk[layout.target(g)] += sum;  // every panel has it, one writes it
          }
        }
      }
      // Only the padding rows can be other than zero here, by 0·inf.
      std::fill(
          lane_sums.get() + targets * rows * lanes, lane_sums.get() + padded_targets * rows * lanes, T(0));
    }
  }

  // step(count), the count from 1 to Most as a type.
  template <int Most, typename Step>
  FASTRIS_INLINE static void with_count(int64_t count, const Step& step) {
    if constexpr (Most > 1) {
      if (count < Most) return with_count<Most - 1>(count, step);
    }
    step(std::integral_constant<int, Most>());
  }

  // Adds the pixels of each label in Count rows to its sums, and all pixels to `all`; the sums of two labels are `stride`
  // apart.
  template <int Bytes, int Count>
  FASTRIS_INLINE static void add_segments(
      const Segments<T, Bytes>& segments,
      const Rows<T>& row,
      Vector<T, Bytes>* sums,
      int64_t stride,
      Vector<T, Bytes>* all) {
    constexpr int lanes = VectorOf<T, Bytes>::lanes;
    Vector<T, Bytes> total[Count] = {};
    for (int64_t i = 0; i < segments.num_runs; ++i) {
      const auto& run = segments.run[i];
      Vector<T, Bytes> sum[Count] = {};
      for (int64_t x = run.begin; x < run.end; x += lanes) {
#pragma GCC unroll 8
        for (int r = 0; r < Count; ++r) sum[r] += vector_at<Bytes>(row.first + r * row.stride + x);
      }
#pragma GCC unroll 8
      for (int r = 0; r < Count; ++r) total[r] += sum[r];
      if (run.label > 0) {
#pragma GCC unroll 8
        for (int r = 0; r < Count; ++r) sums[(run.label - 1) * stride + r] += sum[r];
      }
    }
    for (int64_t i = 0; i < segments.num_parts; ++i) {
      const auto& part = segments.part[i];
#pragma GCC unroll 8
      for (int r = 0; r < Count; ++r) {
        add_masked(
            sums[(part.label - 1) * stride + r], vector_at<Bytes>(row.first + r * row.stride + part.pixel), part.mask);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Count; ++r) all[r] += total[r];
  }

  template <int Bytes>
  FASTRIS_INLINE static void count_segments(const Segments<T, Bytes>& segments, Vector<T, Bytes>* sums) {
    constexpr int lanes = VectorOf<T, Bytes>::lanes;
    for (int64_t i = 0; i < segments.num_runs; ++i) {
      const auto& run = segments.run[i];
      if (run.label > 0) sums[run.label - 1] += static_cast<T>((run.end - run.begin) / lanes);
    }
    Vector<T, Bytes> one{};
    one += T(1);
    for (int64_t i = 0; i < segments.num_parts; ++i) {
      add_masked(sums[segments.part[i].label - 1], one, segments.part[i].mask);
    }
  }
};

// Adds the chunks of an image in order and divides.
template <typename T>
void finish(const SumKernel<T>& sums, int64_t b, T* iou, T* union_) {
  const PartialSums& at = sums.layout;
  const int64_t used_pred = sums.num_pred ? std::clamp<int64_t>(sums.num_pred[b], 0, at.P) : at.P;
  const int64_t used_target = sums.num_target ? std::clamp<int64_t>(sums.num_target[b], 0, at.G) : at.G;
  double* total = sums.partial + b * sums.chunks.count * at.size();
  for (int64_t chunk = 1; chunk < sums.chunks.count; ++chunk) {
    for (int64_t i = 0; i < at.size(); ++i) total[i] += total[chunk * at.size() + i];
  }
  for (int64_t p = 0; p < at.P; ++p) {
    for (int64_t g = 0; g < at.G; ++g) {
      const double both = total[at.pair(p, g)];
      const double either = total[at.pred(p)] + total[at.target(g)] - both;
      const bool counts = p < used_pred && g < used_target && either > 0;
      iou[(b * at.P + p) * at.G + g] = counts ? static_cast<T>(both / either) : T(0);
      union_[(b * at.P + p) * at.G + g] = counts ? static_cast<T>(either) : T(0);
    }
  }
}

struct Call {
  Tensor pred, target;
  std::optional<Tensor> num_pred, num_target;
  int64_t B, P, G, N;

  Call(
      const Tensor& pred_,
      const Tensor& target_,
      const std::optional<Tensor>& num_pred_,
      const std::optional<Tensor>& num_target_,
      int64_t num_labels)
      : pred(pred_), target(target_) {
    check_masks(pred, "soft_iou: pred");
    const bool labels = target.dim() == 3;
    labels ? check_labels(target) : check_masks(target, "soft_iou: target");
    const int64_t height = target.dim() - 2;
    FASTRIS_CHECK(
        target.size(0) == pred.size(0) && target.size(height) == pred.size(2) &&
            target.size(height + 1) == pred.size(3),
        "soft_iou: target must match pred in B, H and W");
    B = pred.size(0);
    P = pred.size(1);
    G = labels ? num_labels : target.size(1);
    N = pred.size(2) * pred.size(3);
    FASTRIS_CHECK(G >= 0, "soft_iou: num_labels must not be negative, got ", G);
    num_pred = check_counts(num_pred_);
    num_target = check_counts(num_target_);
  }

  std::optional<Tensor> check_counts(const std::optional<Tensor>& counts) const {
    if (!counts) return std::nullopt;
    FASTRIS_CHECK(
        counts->scalar_type() == ScalarType::Long && counts->dim() == 1 && counts->size(0) == B,
        "soft_iou: num_pred and num_target must be int64 (B,)");
    return torch::stable::contiguous(*counts);
  }
};

template <typename T>
void soft_iou_of(const Call& call, Tensor& iou, Tensor& union_) {
  const Masks pred(call.pred);
  const bool with_labels = call.target.dim() == 3;
  const std::optional<Masks> masks = with_labels ? std::nullopt : std::optional<Masks>(call.target);
  const std::optional<LabelMap> labels = with_labels ? std::optional<LabelMap>(call.target) : std::nullopt;
  SumKernel<T> kernel{
      pred,
      masks ? &*masks : nullptr,
      labels ? &*labels : nullptr,
      call.num_pred ? call.num_pred->const_data_ptr<int64_t>() : nullptr,
      call.num_target ? call.num_target->const_data_ptr<int64_t>() : nullptr,
      {call.P, call.G},
      Chunks(call.N),
      nullptr,
      0,
      0};
  std::vector<double> partial(static_cast<size_t>(call.B * kernel.chunks.count * kernel.layout.size()));
  kernel.partial = partial.data();
  const int64_t tasks = call.B * kernel.panels() * kernel.chunks.count;
  run_parallel(kernel, tasks, 1);
  T* iou_data = static_cast<T*>(iou.data_ptr());
  T* union_data = static_cast<T*>(union_.data_ptr());
  torch::stable::parallel_for(0, call.B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) finish(kernel, b, iou_data, union_data);
  });
}

std::tuple<Tensor, Tensor> soft_iou(
    Tensor pred,
    Tensor target,
    std::optional<Tensor> num_pred,
    std::optional<Tensor> num_target,
    int64_t num_labels) {
  const Call call(pred, target, num_pred, num_target, num_labels);
  const bool is_double = pred.scalar_type() == ScalarType::Double;
  const ScalarType type = is_double ? ScalarType::Double : ScalarType::Float;
  Tensor iou = empty_on(pred, {call.B, call.P, call.G}, type);
  Tensor union_ = empty_on(pred, {call.B, call.P, call.G}, type);
  is_double ? soft_iou_of<double>(call, iou, union_) : soft_iou_of<float>(call, iou, union_);
  return {iou, union_};
}

}  // namespace
}  // namespace fastris

STABLE_TORCH_LIBRARY_IMPL(fastris, CPU, m) { m.impl("soft_iou", TORCH_BOX(&fastris::soft_iou)); }
