// lstm_gates on the CPU: c = σ(f)·c_prev + σ(i)·tanh(g) and h = σ(o)·tanh(c), written into the caller's memory.
#include "lstm_gates.h"

namespace fastris {
namespace {

template <typename T>
struct Updated {
  T *hidden, *cell;
};

// The cell and the hidden state of a tile, in two passes of two vectors at once, so that a processor has something to do
// while it waits.
template <typename T, bool Sum, bool Peephole>
struct UpdateTile {
  using Outputs = Updated<T>;

  template <int Bytes>
  FASTRIS_INLINE static void run(const TileInputs<T>& in, const Updated<T>& out) {
    using Real = Vector<T, Bytes>;
    constexpr int64_t lanes = VectorOf<T, Bytes>::lanes;
    by_two_vectors<lanes>(in.n, [&](int64_t first, auto vectors) FASTRIS_INLINE_LAMBDA {
      Activations<T, Bytes, vectors.value, Curve::sigmoid, Curve::sigmoid, Curve::tangent> ifg;
      Real c_prev[vectors.value];
      for (int v = 0; v < vectors.value; ++v) {
        c_prev[v] = in.template set_ifg<Bytes, Sum, Peephole>(ifg, v, first + v * lanes);
      }
      ifg.find();
      for (int v = 0; v < vectors.value; ++v) {
        unaligned_at<Bytes>(out.cell + first + v * lanes) =
            c_prev[v] * ifg.template value<1>(v) + ifg.template product<0, 2>(v);
      }
    });
    by_two_vectors<lanes>(in.n, [&](int64_t first, auto vectors) FASTRIS_INLINE_LAMBDA {
      if (vectors.value == 2) in.next.prefetch(first);
      Activations<T, Bytes, vectors.value, Curve::sigmoid, Curve::tangent> o_and_c;
      for (int v = 0; v < vectors.value; ++v) {
        const int64_t x = first + v * lanes;
        const Real c = unaligned_at<Bytes>(out.cell + x);  // a reference would count on its alignment
        in.template set_o_and_c<Bytes, Sum, Peephole>(o_and_c, v, x, c);
      }
      o_and_c.find();
      for (int v = 0; v < vectors.value; ++v) {
        unaligned_at<Bytes>(out.hidden + first + v * lanes) = o_and_c.template product<0, 1>(v);
      }
    });
  }
};

template <typename Types>
struct GatesKernel {
  using T = typename Types::Compute;
  using G = typename Types::Gate;
  using S = typename Types::Cell;
  using A = typename Types::Addend;

  GateRows all;
  const G* gates;
  const S* cell_prev;  // or nullptr: zeros
  const A* addend;  // or nullptr
  const T* bias;  // or nullptr
  const T* peephole;  // or nullptr
  G* hidden;
  S* cell;
  int64_t begin, end;  // tiles

  template <int Bytes>
  FASTRIS_INLINE void run() const {
    constexpr int64_t lanes = VectorOf<T, Bytes>::lanes;
    GateBuffer<T> gate[kGates], weight[kPeepholes], before, h, c;
    for (int64_t t = begin; t < end; ++t) {
      const GateTile tile(all, t);
      const NextGates next(GateTile(all, t + 1 < end ? t + 1 : t), gates, addend, 2 * lanes);
      const PreActivations<T> pre = load_gates<Bytes>(all, tile, gates, addend, bias, h.at, gate);
      if (peephole != nullptr) load_peepholes(all, tile, peephole, weight);
      const T* previous = nullptr;
      if (cell_prev != nullptr) previous = load_state<Bytes>(cell_prev + tile.state_at, tile.size, before.at);
      const bool whole = tile.size % lanes == 0;
      T* to_hidden = in_place<T>(hidden + tile.state_at, whole, h.at);
      T* to_cell = in_place<T>(cell + tile.state_at, whole, c.at);
      const TileInputs<T> in{tile.size, next, pre, weight, previous};
      run_tile<Bytes, UpdateTile>(in, peephole != nullptr, Updated<T>{to_hidden, to_cell});
      if (to_hidden == h.at) store_row<Bytes>(h.at, tile.size, hidden + tile.state_at);
      if (to_cell == c.at) store_row<Bytes>(c.at, tile.size, cell + tile.state_at);
    }
  }
};

void lstm_gates_out(
    Tensor gates,
    std::optional<Tensor> cell_prev,
    std::optional<Tensor> addend,
    std::optional<Tensor> bias,
    std::optional<Tensor> peephole,
    Tensor hidden,
    Tensor cell) {
  const GateRows all(gates);
  const GateChecks checks("lstm_gates", gates);
  const ScalarType type = gates.scalar_type(), compute = compute_type(type);
  if (addend) checks.like_gates(addend, "addend", addend->scalar_type());
  checks.like_state(cell_prev, "cell_prev", cell.scalar_type());
  checks.like_state(hidden, "hidden", type);
  checks.like_state(cell, "cell", cell.scalar_type());
  checks.per_channel(bias, "bias", kGates, compute);
  checks.per_channel(peephole, "peephole", kPeepholes, compute);
  with_gate_types("lstm_gates", type, cell.scalar_type(), addend, [&](auto types) {
    using Types = decltype(types);
    using T = typename Types::Compute;
    using S = typename Types::Cell;
    run_over_tiles(GatesKernel<Types>{
        all,
        static_cast<const typename Types::Gate*>(gates.const_data_ptr()),
        data_or_null<S>(cell_prev),
        data_or_null<typename Types::Addend>(addend),
        data_or_null<T>(bias),
        data_or_null<T>(peephole),
        static_cast<typename Types::Gate*>(hidden.data_ptr()),
        static_cast<S*>(cell.data_ptr()),
        0,
        0});
  });
}

}  // namespace
}  // namespace fastris

STABLE_TORCH_LIBRARY_IMPL(fastris, CPU, m) { m.impl("lstm_gates_out", TORCH_BOX(&fastris::lstm_gates_out)); }
