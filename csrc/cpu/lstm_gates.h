// Tiles of an LSTM's gates, whatever their dtype and layout.
//
// B = batch, C = channels, N = pixels. Both layouts are rows: NCHW has B rows of C·N elements a gate, channels_last B·N
// rows of C. A row of gates holds its four gates one after the other; a row of the state is as long as one gate, so that
// the state of neighbouring rows is one piece of memory.
#pragma once

#include "../stable_abi.h"
#include "activations.h"
#include "layout.h"
#include "parallel.h"
#include "simd.h"

#include <algorithm>
#include <numeric>
#include <type_traits>

namespace fastris {

constexpr int64_t kGates = 4;  // i, f, o, g
constexpr int64_t kPeepholes = 3;  // i, f, o

// Elements of a tile: the dozen buffers of one stay in the first two levels of cache.
constexpr int64_t kGateTile = 512;
constexpr int64_t kLongestTile = 1024;  // of rows that are whole vectors only together
constexpr int64_t kMostLanes = 16;

template <typename T>
struct alignas(64) GateBuffer {
  T at[kLongestTile];
};

// How the memory of the gates is cut.
struct GateRows {
  int64_t rows, length;  // of one gate
  int64_t channels, run;  // `run` neighbouring elements of a row share a channel
  int64_t tile_rows, tile_length, tiles_of_row;

  // Throws unless the gates are dense in one of the two layouts.
  explicit GateRows(const Tensor& gates);

  int64_t tiles() const { return (rows + tile_rows - 1) / tile_rows * tiles_of_row; }
};

inline GateRows::GateRows(const Tensor& gates) {
  FASTRIS_CHECK(gates.dim() == 4 && gates.size(1) % kGates == 0, "lstm_gates: gates must be (B,4C,H,W)");
  const bool channels_last = !is_dense(gates, false);
  FASTRIS_CHECK(!channels_last || is_dense(gates, true), "lstm_gates: gates must be dense, NCHW or channels_last");
  const int64_t pixels = gates.size(2) * gates.size(3);
  channels = gates.size(1) / kGates;
  rows = channels_last ? gates.size(0) * pixels : gates.size(0);
  length = channels_last ? channels : channels * pixels;
  run = channels_last ? 1 : pixels;
  tile_length = std::max<int64_t>(1, std::min(length, kGateTile));
  tiles_of_row = (length + tile_length - 1) / tile_length;
  tile_rows = std::max<int64_t>(1, kGateTile / tile_length);
  const int64_t together = kMostLanes / std::gcd(kMostLanes, tile_length);  // as many rows are whole vectors
  if (tiles_of_row == 1 && together * tile_length <= kLongestTile) {
    tile_rows = std::max(together, tile_rows / together * together);
  }
}

// One tile: some columns of one row, or some whole rows.
struct GateTile {
  int64_t row, rows, column, columns;
  int64_t size;  // elements of one gate
  int64_t gate_at, state_at;  // the first element of i, and of the state
  int64_t length;  // of a row

  GateTile(const GateRows& all, int64_t tile)
      : row(tile / all.tiles_of_row * all.tile_rows),
        rows(std::min(all.tile_rows, all.rows - row)),
        column(tile % all.tiles_of_row * all.tile_length),
        columns(std::min(all.tile_length, all.length - column)),
        size(rows * columns),
        gate_at(row * kGates * all.length + column),
        state_at(row * all.length + column),
        length(all.length) {}
};

// Copies whole vectors, the last one ending where the row ends.
template <int Bytes, typename T, typename Step>
FASTRIS_INLINE void for_vectors(int64_t n, const Step& step) {
  constexpr int64_t lanes = VectorOf<T, Bytes>::lanes;
  for (int64_t i = 0; i + lanes <= n; i += lanes) step(i);
  if (n % lanes != 0) step(n - lanes);
}

// to = from (+ addend), widened.
template <int Bytes, typename T, typename From, typename Addend = From>
FASTRIS_INLINE void load_row(const From* from, const Addend* addend, int64_t n, T* to) {
  if constexpr (std::is_same_v<T, From> && std::is_same_v<T, Addend>) {
    if (n >= VectorOf<T, Bytes>::lanes) {
      if (addend == nullptr) {
        for_vectors<Bytes, T>(n, [&](int64_t i) FASTRIS_INLINE_LAMBDA {
          unaligned_at<Bytes>(to + i) = unaligned_at<Bytes>(from + i);
        });
      } else {
        for_vectors<Bytes, T>(n, [&](int64_t i) FASTRIS_INLINE_LAMBDA {
          unaligned_at<Bytes>(to + i) = unaligned_at<Bytes>(from + i) + unaligned_at<Bytes>(addend + i);
        });
      }
      return;
    }
  }
  if (addend == nullptr) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i]) + static_cast<T>(addend[i]);
  }
}

template <int Bytes, typename T, typename To>
FASTRIS_INLINE void store_row(const T* from, int64_t n, To* to) {
  if constexpr (std::is_same_v<T, To>) {
    if (n >= VectorOf<T, Bytes>::lanes) {
      for_vectors<Bytes, T>(n, [&](int64_t i) FASTRIS_INLINE_LAMBDA {
        unaligned_at<Bytes>(to + i) = unaligned_at<Bytes>(from + i);
      });
      return;
    }
  }
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(from[i]);
}

// to += from
template <int Bytes, typename T>
FASTRIS_INLINE void add_row(const T* from, int64_t n, T* to) {
  constexpr int64_t lanes = VectorOf<T, Bytes>::lanes;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) unaligned_at<Bytes>(to + i) += unaligned_at<Bytes>(from + i);
  for (; i < n; ++i) to[i] += from[i];
}

// Whether each gate of a tile is one piece of memory, of whole vectors of the type computed with.
template <int Bytes, typename T, typename G>
FASTRIS_INLINE bool whole_vectors(const GateTile& tile) {
  return std::is_same_v<T, G> && tile.rows == 1 && tile.columns % VectorOf<T, Bytes>::lanes == 0;
}

// The tile's pre-activations of one gate, in the type that is computed with.
template <int Bytes, typename T, typename G, typename A>
FASTRIS_INLINE void load_gate(const GateTile& tile, int64_t gate, const G* gates, const A* addend, T* to) {
  int64_t at = tile.gate_at + gate * tile.length;
  for (int64_t r = 0; r < tile.rows; ++r, at += kGates * tile.length) {
    load_row<Bytes>(gates + at, addend ? addend + at : nullptr, tile.columns, to + r * tile.columns);
  }
}

// What the next tile reads, which is asked for while this one is computed.
class NextGates {
 public:
  // prefetch() is to be called for every `together`-th element.
  template <typename G, typename A>
  NextGates(const GateTile& tile, const G* gates_, const A* addend_, int64_t together)
      : gates(reinterpret_cast<const char*>(gates_ + tile.gate_at)),
        addend(addend_ == nullptr ? nullptr : reinterpret_cast<const char*>(addend_ + tile.gate_at)),
        size_of_gate(sizeof(G)),
        size_of_addend(sizeof(A)) {
    const bool whole_rows = tile.columns == tile.length;  // then the four gates are one piece of memory
    step = whole_rows ? kGates : 1;
    stride = whole_rows ? together : tile.length;
  }

  FASTRIS_INLINE void prefetch(int64_t x) const {
    for (int64_t k = 0; k < kGates; ++k) {
      const int64_t at = step * x + k * stride;
      __builtin_prefetch(gates + at * size_of_gate, 0, 2);
      if (addend != nullptr) __builtin_prefetch(addend + at * size_of_addend, 0, 2);
    }
  }

 private:
  const char *gates, *addend;
  int64_t size_of_gate, size_of_addend;
  int64_t step, stride;  // from element to element, and from gate to gate
};

// What belongs to channels, for every element of the tile.
template <typename T>
FASTRIS_INLINE void spread_over(const GateRows& all, const GateTile& tile, const T* of_channel, T* to) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    for (int64_t i = 0; i < tile.columns;) {
      const int64_t channel = (tile.column + i) / all.run;
      const int64_t end = std::min(tile.columns, (channel + 1) * all.run - tile.column);
      for (; i < end; ++i) to[r * tile.columns + i] = of_channel[channel];
    }
  }
}

// The four gates of a tile.
template <typename T>
struct FourGates {
  T* at[kGates];

  FourGates(const GateTile& tile, T* all) {
    for (int64_t k = 0; k < kGates; ++k) at[k] = all + tile.gate_at + k * tile.length;
  }
  explicit FourGates(GateBuffer<std::remove_const_t<T>>* buffers) {
    for (int64_t k = 0; k < kGates; ++k) at[k] = buffers[k].at;
  }
};

// The pre-activations of a tile, in the type that is computed with: sums, or such that have their addend still to come.
template <typename T>
struct PreActivations {
  FourGates<const T> gates, addend;
  bool to_be_added;

  template <int Bytes, bool Sum>
  FASTRIS_INLINE Vector<T, Bytes> at(int64_t k, int64_t x) const {
    const Vector<T, Bytes> gate = unaligned_at<Bytes>(gates.at[k] + x);
    if constexpr (Sum) return gate + unaligned_at<Bytes>(addend.at[k] + x);
    return gate;
  }
};

// In memory, where that is whole vectors and there is no bias, or in the buffers. `spread` may hold anything.
template <int Bytes, typename T, typename G, typename A>
FASTRIS_INLINE PreActivations<T> load_gates(
    const GateRows& all, const GateTile& tile, const G* gates, const A* addend, const T* bias, T* spread,
    GateBuffer<T>* buffers) {
  if constexpr (std::is_same_v<T, float> && std::is_same_v<T, G> && std::is_same_v<T, A>) {
    if (bias == nullptr && whole_vectors<Bytes, T, G>(tile)) {
      const FourGates<const T> in_memory(tile, gates);
      return {in_memory, addend == nullptr ? in_memory : FourGates<const T>(tile, addend), addend != nullptr};
    }
  }
  for (int64_t k = 0; k < kGates; ++k) {
    load_gate<Bytes>(tile, k, gates, addend, buffers[k].at);
    if (bias == nullptr) continue;
    spread_over(all, tile, bias + k * all.channels, spread);
    add_row<Bytes>(spread, tile.size, buffers[k].at);
  }
  const FourGates<const T> sums(buffers);
  return {sums, sums, false};
}

template <typename T>
FASTRIS_INLINE void load_peepholes(
    const GateRows& all, const GateTile& tile, const T* peephole, GateBuffer<T>* weight) {
  for (int64_t k = 0; k < kPeepholes; ++k) spread_over(all, tile, peephole + k * all.channels, weight[k].at);
}

// Steps over n elements by two vectors and, where there are no two, by one: step(x, how many, as a type).
template <int64_t lanes, typename Step>
FASTRIS_INLINE void by_two_vectors(int64_t n, const Step& step) {
  int64_t x = 0;
  for (; x + 2 * lanes <= n; x += 2 * lanes) step(x, std::integral_constant<int, 2>());
  for (; x < n; x += lanes) step(x, std::integral_constant<int, 1>());
}

// What the activations of a tile are of.
template <typename T>
struct TileInputs {
  int64_t n;
  NextGates next;
  PreActivations<T> pre;
  const GateBuffer<T>* weight;  // peepholes
  const T* cell_prev;  // or nullptr: zeros

  // Sets vector v of i, f and g to what they are of at x, and gives the cell before.
  template <int Bytes, bool Sum, bool Peephole, typename Ifg>
  FASTRIS_INLINE Vector<T, Bytes> set_ifg(Ifg& ifg, int v, int64_t x) const {
    using Real = Vector<T, Bytes>;
    const Real c_prev = cell_prev == nullptr ? Real{} : unaligned_at<Bytes>(cell_prev + x);
    Real i = pre.template at<Bytes, Sum>(0, x), f = pre.template at<Bytes, Sum>(1, x);
    if constexpr (Peephole) {
      i += w<Bytes>(0, x) * c_prev;
      f += w<Bytes>(1, x) * c_prev;
    }
    ifg.set(v, i, f, pre.template at<Bytes, Sum>(3, x));
    return c_prev;
  }

  // Likewise of o and of the tangent of the cell.
  template <int Bytes, bool Sum, bool Peephole, typename OAndC>
  FASTRIS_INLINE void set_o_and_c(OAndC& o_and_c, int v, int64_t x, const Vector<T, Bytes>& c) const {
    Vector<T, Bytes> o = pre.template at<Bytes, Sum>(2, x);
    if constexpr (Peephole) o += w<Bytes>(2, x) * c;
    o_and_c.set(v, o, c);
  }

  template <int Bytes>
  FASTRIS_INLINE Vector<T, Bytes> w(int64_t k, int64_t x) const {
    return vector_at<Bytes>(weight[k].at + x);
  }
};

// A Part<T, whether addends are to be added, whether there are peepholes> of a kernel is run<Bytes>(inputs, outputs).
// It runs as a function of its own, on copies: for all that a compiler knows what is stored may change what is not one.
template <template <typename, bool, bool> class Part, typename T, bool Sum, bool Peephole>
struct TileRun {
  const TileInputs<T>& inputs;
  const typename Part<T, Sum, Peephole>::Outputs& outputs;

  template <int Bytes>
  FASTRIS_INLINE void run() const {
    const TileInputs<T> in = inputs;
    const typename Part<T, Sum, Peephole>::Outputs out = outputs;
    Part<T, Sum, Peephole>::template run<Bytes>(in, out);
  }
};

template <int Bytes, template <typename, bool, bool> class Part, typename T, typename Outputs>
void run_tile(const TileInputs<T>& in, bool peephole, const Outputs& out) {
  if constexpr (std::is_same_v<T, float>) {
    if (in.pre.to_be_added) {
      return peephole ? run_part<Bytes>(TileRun<Part, T, true, true>{in, out})
                      : run_part<Bytes>(TileRun<Part, T, true, false>{in, out});
    }
  }
  peephole ? run_part<Bytes>(TileRun<Part, T, false, true>{in, out})
           : run_part<Bytes>(TileRun<Part, T, false, false>{in, out});
}

// Where a tile of the state is: in place where it is whole vectors of the type computed with, in a buffer otherwise.
template <int Bytes, typename T, typename S>
FASTRIS_INLINE const T* load_state(const S* state, int64_t n, T* buffer) {
  if constexpr (std::is_same_v<T, S>) {
    if (n % VectorOf<T, Bytes>::lanes == 0) return state;
  }
  load_row<Bytes>(state, static_cast<const S*>(nullptr), n, buffer);
  return buffer;
}

// Likewise for writing: the caller stores the buffer afterwards where it got that.
template <typename T, typename S>
FASTRIS_INLINE T* in_place(S* state, bool whole, T* buffer) {
  if constexpr (std::is_same_v<T, S>) {
    if (whole) return state;
  }
  return buffer;
}

// Spreads the tiles over the threads.
template <typename Kernel>
void run_over_tiles(const Kernel& kernel) {
  if (kernel.all.length == 0) return;
  run_parallel(kernel, kernel.all.tiles(), 8);
}

// Arguments

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <typename T>
T* mutable_data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

// Every tensor that goes with the gates, checked to be as they are: `channels` in all, dense in their layout.
struct GateChecks {
  const char* operation;
  const Tensor& gates;
  bool channels_last;

  GateChecks(const char* operation_, const Tensor& gates_)
      : operation(operation_), gates(gates_), channels_last(!is_dense(gates, false)) {}

  void like_gates(const std::optional<Tensor>& tensor, const char* name, ScalarType type) const {
    check(tensor, name, gates.size(1), type);
  }
  void like_state(const std::optional<Tensor>& tensor, const char* name, ScalarType type) const {
    check(tensor, name, gates.size(1) / kGates, type);
  }
  void per_channel(const std::optional<Tensor>& tensor, const char* name, int64_t count, ScalarType type) const {
    if (!tensor) return;
    const int64_t size = count * gates.size(1) / kGates;
    FASTRIS_CHECK(
        tensor->dim() == 1 && tensor->size(0) == size && tensor->scalar_type() == type &&
            (size <= 1 || tensor->stride(0) == 1),
        operation, ": ", name, " must be contiguous (", size, "), in the dtype computed with");
  }

 private:
  void check(const std::optional<Tensor>& tensor, const char* name, int64_t channels, ScalarType type) const {
    if (!tensor) return;
    FASTRIS_CHECK(
        tensor->dim() == 4 && tensor->size(0) == gates.size(0) && tensor->size(1) == channels &&
            tensor->size(2) == gates.size(2) && tensor->size(3) == gates.size(3),
        operation, ": ", name, " must have ", channels, " channels and the gates' other dimensions");
    FASTRIS_CHECK(tensor->scalar_type() == type, operation, ": ", name, " has the wrong dtype");
    FASTRIS_CHECK(is_dense(*tensor, channels_last), operation, ": ", name, " must be dense in the layout of the gates");
  }
};

inline ScalarType compute_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The types computed with, of the gates, of the cell, and of the addend.
template <typename T, typename G, typename S, typename A>
struct GateTypes {
  using Compute = T;
  using Gate = G;
  using Cell = S;
  using Addend = A;
};

template <typename H, typename Run>
void with_half_types(bool wide_cell, bool wide_addend, const Run& run) {
  if (wide_addend) return wide_cell ? run(GateTypes<float, H, float, float>()) : run(GateTypes<float, H, H, float>());
  return wide_cell ? run(GateTypes<float, H, float, H>()) : run(GateTypes<float, H, H, H>());
}

// Calls run with the GateTypes.
template <typename Run>
void with_gate_types(
    const char* operation, ScalarType gates, ScalarType cell, const std::optional<Tensor>& addend, const Run& run) {
  const auto fits = [&](ScalarType type) {
    return type == gates || (type == ScalarType::Float && gates != ScalarType::Double);
  };
  FASTRIS_CHECK(fits(cell), operation, ": the cell must be in the dtype of the gates, or float32");
  const ScalarType added = addend ? addend->scalar_type() : gates;
  FASTRIS_CHECK(fits(added), operation, ": addend must be in the dtype of the gates, or float32");
  switch (gates) {
    case ScalarType::Double: return run(GateTypes<double, double, double, double>());
    case ScalarType::Float: return run(GateTypes<float, float, float, float>());
    case ScalarType::BFloat16: return with_half_types<BFloat16>(cell != gates, added != gates, run);
    case ScalarType::Half: return with_half_types<Half>(cell != gates, added != gates, run);
    default: FASTRIS_CHECK(false, operation, ": gates must be floating");
  }
}

}  // namespace fastris
