// Gaussian filtering of values at scattered points, on the permutohedral lattice, in time linear in their number. fp32.
//
// A. Adams, J. Baek & M. A. Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice", Eurographics 2010.
// The lattice tiles the hyperplane Σx = 0 of D + 1 dimensions with simplices. Features are laid on it, scaled so that the
// blur below has unit variance; every point then lies in one simplex, between D + 1 vertices, with barycentric weights.
// Filtering splats values onto the vertices, blurs these by (½, 1, ½) along each of the D + 1 directions, and slices the
// result at the points. Only vertices of a point's simplex exist; beyond them the blur sees zeros.
//
// N = points, D = dimensions of the features, C = channels of the values, M = vertices.
#include "../stable_abi.h"
#include "aligned.h"
#include "parallel.h"
#include "simd.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

namespace fastris {
namespace {

constexpr int kMostDimensions = 8;
constexpr float kLargest = 1 << 20;  // of a coordinate on the lattice: below, fp32 still resolves a sixteenth
constexpr int64_t kRow = kCacheLine / sizeof(float);  // the channels of a vertex are padded to a multiple of this
constexpr int64_t kGrain = 2048;  // points or vertices that are worth a thread

template <int D>
using Key = std::array<int32_t, D>;  // the coordinates of a vertex; their sum is 0, so that one is left out

// Vertices by key: open addressing, numbered in order of arrival.
template <int D>
class VertexTable {
 public:
  VertexTable() : slots_(1 << 12, Slot{0, -1}) {}

  int32_t size() const { return static_cast<int32_t>(keys_.size()); }
  const Key<D>& key(int32_t vertex) const { return keys_[vertex]; }

  // The number of a vertex, or -1.
  int32_t find(const Key<D>& key) const { return slots_[place(key, hash(key))].vertex; }

  // The number of a vertex, a new one if need be.
  int32_t add(const Key<D>& key) {
    const uint32_t code = hash(key);
    Slot& slot = slots_[place(key, code)];
    if (slot.vertex >= 0) return slot.vertex;
    const int32_t vertex = size();
    slot = {code, vertex};
    keys_.push_back(key);
    if (2 * keys_.size() > slots_.size()) grow();
    return vertex;
  }

 private:
  struct Slot {
    uint32_t code;
    int32_t vertex;  // -1: free
  };

  static uint32_t hash(const Key<D>& key) {
    uint64_t code = 0;
    for (int32_t coordinate : key) code = (code + static_cast<uint32_t>(coordinate)) * 0x9e3779b97f4a7c15u;
    return static_cast<uint32_t>(code >> 32);
  }

  // The slot of a vertex, or the free one where it would go.
  size_t place(const Key<D>& key, uint32_t code) const {
    size_t slot = code & (slots_.size() - 1);
    while (slots_[slot].vertex >= 0 && !(slots_[slot].code == code && keys_[slots_[slot].vertex] == key)) {
      slot = (slot + 1) & (slots_.size() - 1);
    }
    return slot;
  }

  void grow() {
    std::vector<Slot> before(2 * slots_.size(), Slot{0, -1});
    before.swap(slots_);
    for (const Slot& moved : before) {
      if (moved.vertex >= 0) slots_[place(keys_[moved.vertex], moved.code)] = moved;
    }
  }

  std::vector<Slot> slots_;
  std::vector<Key<D>> keys_;
};

// The D + 1 vertices around a point and its barycentric coordinates, by the vertices' remainder modulo D + 1.
template <int D>
struct Simplex {
  Key<D> keys[D + 1];
  float weights[D + 1];

  // `scale`: of each feature. False if the point is not finite or too far out.
  bool enclose(const float* feature, const float* scale) {
    float x[D + 1];  // the point in the hyperplane
    float sum = 0;
    for (int i = D; i > 0; --i) {
      const float step = feature[i - 1] * scale[i - 1];
      x[i] = sum - static_cast<float>(i) * step;
      sum += step;
    }
    x[0] = sum;

    int32_t nearest[D + 1], rank[D + 1] = {}, excess = 0;  // the nearest vertex of remainder 0, once the sum is put right
    float rest[D + 1];
    for (int i = 0; i <= D; ++i) {
      if (!(std::fabs(x[i]) < kLargest)) return false;
      const float steps = std::nearbyint(x[i] * (1.0f / (D + 1)));
      nearest[i] = static_cast<int32_t>(steps) * (D + 1);
      excess += static_cast<int32_t>(steps);
      rest[i] = x[i] - static_cast<float>(nearest[i]);
    }
    for (int i = 0; i < D; ++i) {
      for (int j = i + 1; j <= D; ++j) rest[i] < rest[j] ? ++rank[i] : ++rank[j];
    }
    for (int i = 0; i <= D; ++i) {
      rank[i] += excess;
      const int32_t turn = rank[i] < 0 ? D + 1 : rank[i] > D ? -(D + 1) : 0;
      rank[i] += turn;
      nearest[i] += turn;
    }

    float barycentric[D + 2] = {};
    for (int i = 0; i <= D; ++i) {
      const float delta = (x[i] - static_cast<float>(nearest[i])) * (1.0f / (D + 1));
      barycentric[D - rank[i]] += delta;
      barycentric[D + 1 - rank[i]] -= delta;
    }
    barycentric[0] += 1.0f + barycentric[D + 1];
    for (int remainder = 0; remainder <= D; ++remainder) {
      weights[remainder] = barycentric[remainder];
      for (int i = 0; i < D; ++i) {
        keys[remainder][i] = nearest[i] + remainder - (rank[i] > D - remainder ? D + 1 : 0);
      }
    }
    return true;
  }
};

template <int D>
Tensor build_lattice(const Tensor& features, int64_t N, int32_t* vertices, float* weights) {
  float scale[D];  // of the orthogonal basis of the hyperplane, and (D + 1) √⅔ for unit variance
  for (int i = 0; i < D; ++i) {
    scale[i] = static_cast<float>((D + 1) * std::sqrt(2.0 / 3.0) / std::sqrt((i + 1.0) * (i + 2.0)));
  }
  const float* feature = static_cast<const float*>(features.const_data_ptr());
  VertexTable<D> table;
  Simplex<D> simplex;
  for (int64_t n = 0; n < N; ++n) {
    FASTRIS_CHECK(
        simplex.enclose(feature + n * D, scale),
        "permutohedral_lattice: features must be finite and, in standard deviations, below 32768; point ", n,
        " is not");
    for (int k = 0; k <= D; ++k) {
      vertices[n * (D + 1) + k] = table.add(simplex.keys[k]);
      weights[n * (D + 1) + k] = simplex.weights[k];
    }
  }

  const int64_t M = table.size();
  Tensor neighbours = empty_on(features, {D + 1, M, 2}, ScalarType::Int);
  int32_t* pairs = static_cast<int32_t*>(neighbours.data_ptr());
  std::fill(pairs, pairs + (D + 1) * M * 2, -1);
  for (int direction = 0; direction <= D; ++direction, pairs += M * 2) {
    for (int32_t vertex = 0; vertex < M; ++vertex) {
      Key<D> key = table.key(vertex);
      for (int i = 0; i < D; ++i) key[i] += i == direction ? -D : 1;
      const int32_t next = table.find(key);
      if (next < 0) continue;
      pairs[2 * vertex + 1] = next;
      pairs[2 * next] = vertex;
    }
  }
  return neighbours;
}

template <int D>
Tensor build_lattice(int64_t dimensions, const Tensor& features, int64_t N, int32_t* vertices, float* weights) {
  if constexpr (D > 1) {
    if (dimensions < D) return build_lattice<D - 1>(dimensions, features, N, vertices, weights);
  }
  return build_lattice<D>(features, N, vertices, weights);
}

std::tuple<Tensor, Tensor, Tensor> permutohedral_lattice(Tensor features) {
  FASTRIS_CHECK(
      features.dim() == 2 && features.scalar_type() == ScalarType::Float && features.size(1) >= 1 &&
          features.size(1) <= kMostDimensions,
      "permutohedral_lattice: features must be float32 (N,D) with D from 1 to ", kMostDimensions);
  const int64_t N = features.size(0), D = features.size(1);
  FASTRIS_CHECK(N <= INT32_MAX / (D + 1), "permutohedral_lattice: too many features for 32 bits");
  features = torch::stable::contiguous(features);
  Tensor vertices = empty_on(features, {N, D + 1}, ScalarType::Int);
  Tensor weights = empty_on(features, {N, D + 1}, ScalarType::Float);
  Tensor neighbours = build_lattice<kMostDimensions>(
      D, features, N, static_cast<int32_t*>(vertices.data_ptr()), static_cast<float*>(weights.data_ptr()));
  return {vertices, weights, neighbours};
}

// One pass of a filter over the points or the vertices from `begin` to `end`.
struct Pass {
  int64_t corners, C, row;  // of a point, of a value, and C padded
  const int32_t* vertices;  // (N, corners)
  const float* weights;     // (N, corners)
  int64_t begin, end;
};

// Adds each value to the vertices around it, by weight.
struct Splat : Pass {
  const float* values;  // (N, C)
  float* blurred;       // (M, row)

  template <int Bytes>
  FASTRIS_INLINE void run() const {
    constexpr int lanes = VectorOf<float, Bytes>::lanes;
    const Lanes<float> value = new_zeros<float>(row);
    for (int64_t n = begin; n < end; ++n) {
      std::memcpy(value.get(), values + n * C, C * sizeof(float));
      for (int64_t k = n * corners; k < (n + 1) * corners; ++k) {
        float* to = blurred + vertices[k] * row;
        for (int64_t c = 0; c < C; c += lanes) {
          vector_at<Bytes>(to + c) += weights[k] * vector_at<Bytes>(value.get() + c);
        }
      }
    }
  }
};

// Half of both neighbours along one direction, and all of the vertex itself.
struct Blur : Pass {
  const int32_t* neighbours;  // (M, 2)
  const float* zeros;         // (row)
  const float* from;          // (M, row)
  float* to;

  template <int Bytes>
  FASTRIS_INLINE void run() const {
    constexpr int lanes = VectorOf<float, Bytes>::lanes;
    for (int64_t m = begin; m < end; ++m) {
      const int32_t before = neighbours[2 * m], after = neighbours[2 * m + 1];
      const float* left = before < 0 ? zeros : from + before * row;
      const float* right = after < 0 ? zeros : from + after * row;
      for (int64_t c = 0; c < C; c += lanes) {
        vector_at<Bytes>(to + m * row + c) = vector_at<Bytes>(from + m * row + c) +
            0.5f * (vector_at<Bytes>(left + c) + vector_at<Bytes>(right + c));
      }
    }
  }
};

// The interpolation of the vertices around each point.
struct Slice : Pass {
  const float* blurred;  // (M, row)
  float gain;
  float* out;  // (N, C)

  template <int Bytes>
  FASTRIS_INLINE void run() const {
    constexpr int lanes = VectorOf<float, Bytes>::lanes;
    const Lanes<float> value = new_lanes<float>(row);
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t c = 0; c < C; c += lanes) {
        Vector<float, Bytes> sum = {};
        for (int64_t k = n * corners; k < (n + 1) * corners; ++k) {
          sum += weights[k] * vector_at<Bytes>(blurred + vertices[k] * row + c);
        }
        vector_at<Bytes>(value.get() + c) = gain * sum;
      }
      std::memcpy(out + n * C, value.get(), C * sizeof(float));
    }
  }
};

// Whether all of an int32 tensor is in [least, end).
bool all_within(const Tensor& numbers, int32_t least, int64_t end) {
  const int32_t* number = static_cast<const int32_t*>(numbers.const_data_ptr());
  bool within = true;
  for (int64_t i = 0; i < numbers.numel(); ++i) within &= number[i] >= least && number[i] < end;
  return within;
}

Tensor permutohedral_filter(Tensor values, Tensor vertices, Tensor weights, Tensor neighbours, bool reverse) {
  FASTRIS_CHECK(
      values.dim() == 2 && values.scalar_type() == ScalarType::Float,
      "permutohedral_filter: values must be float32 (N,C)");
  const int64_t N = values.size(0), C = values.size(1);
  FASTRIS_CHECK(
      neighbours.dim() == 3 && neighbours.size(0) >= 2 && neighbours.size(2) == 2 &&
          neighbours.scalar_type() == ScalarType::Int,
      "permutohedral_filter: neighbours must be int32 (D+1,M,2)");
  const int64_t corners = neighbours.size(0), M = neighbours.size(1);
  FASTRIS_CHECK(
      vertices.dim() == 2 && vertices.size(0) == N && vertices.size(1) == corners &&
          vertices.scalar_type() == ScalarType::Int,
      "permutohedral_filter: vertices must be int32 (N,D+1), like values in N and neighbours in D");
  FASTRIS_CHECK(
      weights.dim() == 2 && weights.size(0) == N && weights.size(1) == corners &&
          weights.scalar_type() == ScalarType::Float,
      "permutohedral_filter: weights must be float32 (N,D+1) like vertices");
  values = torch::stable::contiguous(values);
  vertices = torch::stable::contiguous(vertices);
  weights = torch::stable::contiguous(weights);
  neighbours = torch::stable::contiguous(neighbours);
  FASTRIS_CHECK(all_within(vertices, 0, M), "permutohedral_filter: vertices must be from 0 to M-1");
  FASTRIS_CHECK(all_within(neighbours, -1, M), "permutohedral_filter: neighbours must be from -1 to M-1");

  Tensor out = empty_on(values, {N, C}, ScalarType::Float);
  if (N * C == 0) return out;
  const int64_t row = (C + kRow - 1) / kRow * kRow;
  Lanes<float> blurred = new_zeros<float>(M * row), other = new_lanes<float>(M * row);
  const Lanes<float> zeros = new_zeros<float>(row);
  const Pass pass{
      corners, C, row, static_cast<const int32_t*>(vertices.const_data_ptr()),
      static_cast<const float*>(weights.const_data_ptr()), 0, N};
  run_simd(Splat{pass, static_cast<const float*>(values.const_data_ptr()), blurred.get()});
  for (int64_t i = 0; i < corners; ++i) {
    const int64_t direction = reverse ? corners - 1 - i : i;
    const int32_t* pairs = static_cast<const int32_t*>(neighbours.const_data_ptr()) + direction * M * 2;
    run_parallel(Blur{pass, pairs, zeros.get(), blurred.get(), other.get()}, M, kGrain);
    blurred.swap(other);
  }
  // A blur multiplies the sum of all vertices by 2, and there are √(D+1) (2/3)^(D/2) vertices in a unit of volume, where
  // the Gaussian has (2π)^(D/2).
  const double D = static_cast<double>(corners - 1);
  const double gain = std::pow(4.0 / 3.0 * 3.14159265358979323846, D / 2) * std::sqrt(D + 1) / std::pow(2.0, D + 1);
  run_parallel(Slice{pass, blurred.get(), static_cast<float>(gain), static_cast<float*>(out.data_ptr())}, N, kGrain);
  return out;
}

}  // namespace
}  // namespace fastris

STABLE_TORCH_LIBRARY_IMPL(fastris, CPU, m) {
  m.impl("permutohedral_lattice", TORCH_BOX(&fastris::permutohedral_lattice));
  m.impl("permutohedral_filter", TORCH_BOX(&fastris::permutohedral_filter));
}
