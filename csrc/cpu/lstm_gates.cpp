// lstm_gates on the CPU: c = σ(f)·c_prev + σ(i)·tanh(g) and h = σ(o)·tanh(c), written into the caller's memory.
#include "lstm_gates.h"

namespace fastris {
namespace {

template <typename T, typename G, typename S, typename A>
struct GatesKernel {
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
    GateBuffer<T> gate[kGates], weight[kPeepholes], before, h, c;
    for (int64_t t = begin; t < end; ++t) {
      const GateTile tile(all, t);
      load_gates<Bytes>(all, tile, gates, addend, bias, peephole, h.at, gate, weight);
      const T* previous = nullptr;
      if (cell_prev != nullptr) previous = load_state<Bytes>(cell_prev + tile.state_at, tile.size, before.at);
      constexpr int lanes = VectorOf<T, Bytes>::lanes;
      const bool whole = tile.size % lanes == 0;
      T* to_hidden = in_place<T>(hidden + tile.state_at, whole, h.at);
      T* to_cell = in_place<T>(cell + tile.state_at, whole, c.at);
      const GateTile next(all, t + 1 < end ? t + 1 : t);
      peephole == nullptr ? update<Bytes, false>(tile.size, next, gate, weight, previous, to_hidden, to_cell)
                          : update<Bytes, true>(tile.size, next, gate, weight, previous, to_hidden, to_cell);
      if (to_hidden == h.at) store_row<Bytes>(h.at, tile.size, hidden + tile.state_at);
      if (to_cell == c.at) store_row<Bytes>(c.at, tile.size, cell + tile.state_at);
    }
  }

 private:
  // In two passes, so that a processor has several vectors to compute while it waits for one.
  template <int Bytes, bool Peephole>
  FASTRIS_INLINE void update(
      int64_t n,
      const GateTile& next,
      const GateBuffer<T>* gate,
      const GateBuffer<T>* weight,
      const T* previous,
      T* to_hidden,
      T* to_cell) const {
    using Real = Vector<T, Bytes>;
    constexpr int lanes = VectorOf<T, Bytes>::lanes;
    const auto pre = [&](int64_t k, int64_t x) FASTRIS_INLINE_LAMBDA -> Real { return vector_at<Bytes>(gate[k].at + x); };
    const auto w = [&](int64_t k, int64_t x) FASTRIS_INLINE_LAMBDA -> Real { return vector_at<Bytes>(weight[k].at + x); };
    for (int64_t x = 0; x < n; x += lanes) {
      prefetch_gates<Bytes>(next, x, gates, addend);
      Real c_prev{};
      if (previous != nullptr) c_prev = unaligned_at<Bytes>(previous + x);
      Real pre_i = pre(0, x), pre_f = pre(1, x);
      if constexpr (Peephole) {
        pre_i += w(0, x) * c_prev;
        pre_f += w(1, x) * c_prev;
      }
      unaligned_at<Bytes>(to_cell + x) =
          times_sigmoid<Bytes>(c_prev, pre_f) + sigmoid_tanh<Bytes>(pre_i, pre(3, x));
    }
    for (int64_t x = 0; x < n; x += lanes) {
      const Real c = unaligned_at<Bytes>(to_cell + x);
      Real pre_o = pre(2, x);
      if constexpr (Peephole) pre_o += w(2, x) * c;
      unaligned_at<Bytes>(to_hidden + x) = sigmoid_tanh<Bytes>(pre_o, c);
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
    using T = typename decltype(types)::Compute;
    using G = typename decltype(types)::Gate;
    using S = typename decltype(types)::Cell;
    using A = typename decltype(types)::Addend;
    const GatesKernel<T, G, S, A> kernel{
        all,
        static_cast<const G*>(gates.const_data_ptr()),
        data_or_null<S>(cell_prev),
        data_or_null<A>(addend),
        data_or_null<T>(bias),
        data_or_null<T>(peephole),
        static_cast<G*>(hidden.data_ptr()),
        static_cast<S*>(cell.data_ptr()),
        0,
        0};
    run_over_tiles(kernel);
  });
}

}  // namespace
}  // namespace fastris

STABLE_TORCH_LIBRARY_IMPL(fastris, CPU, m) { m.impl("lstm_gates_out", TORCH_BOX(&fastris::lstm_gates_out)); }
