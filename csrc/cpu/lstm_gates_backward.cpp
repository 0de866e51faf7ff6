// lstm_gates_backward on the CPU: activations and cell are computed again from the pre-activations.
#include "lstm_gates.h"

namespace fastris {
namespace {

template <typename T, typename G, typename S, typename A>
struct GatesBackwardKernel {
  GateRows all;
  const G* gates;  // may be d_gates: a tile is read before it is written
  const S* cell_prev;  // or nullptr: zeros
  const A* addend;  // or nullptr
  const T* bias;  // or nullptr
  const T* peephole;  // or nullptr
  const G* d_hidden;  // or nullptr: zeros
  const S* d_cell;  // or nullptr: zeros; may be d_cell_prev
  G* d_gates;
  S* d_cell_prev;  // or nullptr
  T* d_sum;  // or nullptr; d_gates is added to it
  int64_t begin, end;  // tiles

  template <int Bytes>
  FASTRIS_INLINE void run() const {
    GateBuffer<T> gate[kGates], weight[kPeepholes], buffer[kBuffers], forget, d_before;
    for (int64_t t = begin; t < end; ++t) {
      const GateTile tile(all, t);
      const int64_t n = tile.size;
      load_gates<Bytes>(all, tile, gates, addend, bias, peephole, d_before.at, gate, weight);
      const T *c_prev = nullptr, *d_h = nullptr, *d_c = nullptr;
      if (cell_prev != nullptr) c_prev = load_state<Bytes>(cell_prev + tile.state_at, n, buffer[0].at);
      if (d_hidden != nullptr) d_h = load_state<Bytes>(d_hidden + tile.state_at, n, buffer[1].at);
      if (d_cell != nullptr) d_c = load_state<Bytes>(d_cell + tile.state_at, n, buffer[2].at);
      const GateTile next(all, t + 1 < end ? t + 1 : t);
      peephole == nullptr ? differentiate<Bytes, false>(n, next, gate, weight, c_prev, d_h, d_c, forget.at, d_before.at)
                          : differentiate<Bytes, true>(n, next, gate, weight, c_prev, d_h, d_c, forget.at, d_before.at);
      for (int64_t k = 0; k < kGates; ++k) {
        int64_t at = tile.gate_at + k * tile.length;
        for (int64_t r = 0; r < tile.rows; ++r, at += kGates * tile.length) {
          const T* row = gate[k].at + r * tile.columns;
          store_row<Bytes>(row, tile.columns, d_gates + at);
          if (d_sum != nullptr) add_row<Bytes>(row, tile.columns, d_sum + at);
        }
      }
      if (d_cell_prev != nullptr) store_row<Bytes>(d_before.at, n, d_cell_prev + tile.state_at);
    }
  }

 private:
  static constexpr int kBuffers = 3;  // c_prev, d_hidden, d_cell

  // Replaces the pre-activations by their gradients, in two passes as the forward kernel.
  template <int Bytes, bool Peephole>
  FASTRIS_INLINE void differentiate(
      int64_t n,
      const GateTile& next,
      GateBuffer<T>* gate,
      const GateBuffer<T>* weight,
      const T* before,
      const T* d_after_hidden,
      const T* d_after,
      T* forget,
      T* d_before_cell) const {
    using Real = Vector<T, Bytes>;
    constexpr int lanes = VectorOf<T, Bytes>::lanes;
    const auto pre = [&](int64_t k, int64_t x) FASTRIS_INLINE_LAMBDA -> Real& { return vector_at<Bytes>(gate[k].at + x); };
    const auto w = [&](int64_t k, int64_t x) FASTRIS_INLINE_LAMBDA -> Real { return vector_at<Bytes>(weight[k].at + x); };
    for (int64_t x = 0; x < n; x += lanes) {  // the cell, f, and what i, f and g do to the cell
      prefetch_gates<Bytes>(next, x, gates, addend);
      Real c_prev{};
      if (before != nullptr) c_prev = unaligned_at<Bytes>(before + x);
      Real pre_i = pre(0, x), pre_f = pre(1, x);
      if constexpr (Peephole) {
        pre_i += w(0, x) * c_prev;
        pre_f += w(1, x) * c_prev;
      }
      const Activated<T, Bytes> i = sigmoid<Bytes>(pre_i), f = sigmoid<Bytes>(pre_f);
      const Activated<T, Bytes> g = hyperbolic_tangent<Bytes>(pre(3, x));
      pre(0, x) = g.value * i.slope;
      pre(1, x) = c_prev * f.slope;
      pre(3, x) = i.value * g.slope;
      vector_at<Bytes>(forget + x) = f.value;
      vector_at<Bytes>(d_before_cell + x) = f.value * c_prev + i.value * g.value;
    }
    for (int64_t x = 0; x < n; x += lanes) {
      const Real c = vector_at<Bytes>(d_before_cell + x);
      Real pre_o = pre(2, x), d_h{}, d_c{};
      if (d_after_hidden != nullptr) d_h = unaligned_at<Bytes>(d_after_hidden + x);
      if (d_after != nullptr) d_c = unaligned_at<Bytes>(d_after + x);
      if constexpr (Peephole) pre_o += w(2, x) * c;
      const Activated<T, Bytes> o = sigmoid<Bytes>(pre_o), tanh_c = hyperbolic_tangent<Bytes>(c);
      const Real d_o = d_h * tanh_c.value * o.slope;
      d_c += d_h * o.value * tanh_c.slope;
      if constexpr (Peephole) d_c += d_o * w(2, x);
      const Real d_i = d_c * pre(0, x), d_f = d_c * pre(1, x);
      Real d_before = d_c * vector_at<Bytes>(forget + x);
      if constexpr (Peephole) d_before += d_i * w(0, x) + d_f * w(1, x);
      pre(0, x) = d_i;
      pre(1, x) = d_f;
      pre(2, x) = d_o;
      pre(3, x) *= d_c;
      vector_at<Bytes>(d_before_cell + x) = d_before;
    }
  }
};

void lstm_gates_backward_out(
    Tensor gates,
    std::optional<Tensor> cell_prev,
    std::optional<Tensor> addend,
    std::optional<Tensor> bias,
    std::optional<Tensor> peephole,
    std::optional<Tensor> d_hidden,
    std::optional<Tensor> d_cell,
    Tensor d_gates,
    std::optional<Tensor> d_cell_prev,
    std::optional<Tensor> d_sum) {
  const char* operation = "lstm_gates_backward";
  const GateRows all(gates);
  const GateChecks checks(operation, gates);
  const ScalarType type = gates.scalar_type(), compute = compute_type(type);
  ScalarType cell = type;
  for (const std::optional<Tensor>& state : {cell_prev, d_cell, d_cell_prev}) {
    if (state) cell = state->scalar_type();
  }
  if (addend) checks.like_gates(addend, "addend", addend->scalar_type());
  checks.like_gates(d_gates, "d_gates", type);
  checks.like_gates(d_sum, "d_sum", compute);
  checks.like_state(cell_prev, "cell_prev", cell);
  checks.like_state(d_hidden, "d_hidden", type);
  checks.like_state(d_cell, "d_cell", cell);
  checks.like_state(d_cell_prev, "d_cell_prev", cell);
  checks.per_channel(bias, "bias", kGates, compute);
  checks.per_channel(peephole, "peephole", kPeepholes, compute);
  with_gate_types(operation, type, cell, addend, [&](auto types) {
    using T = typename decltype(types)::Compute;
    using G = typename decltype(types)::Gate;
    using S = typename decltype(types)::Cell;
    using A = typename decltype(types)::Addend;
    const GatesBackwardKernel<T, G, S, A> kernel{
        all,
        static_cast<const G*>(gates.const_data_ptr()),
        data_or_null<S>(cell_prev),
        data_or_null<A>(addend),
        data_or_null<T>(bias),
        data_or_null<T>(peephole),
        data_or_null<G>(d_hidden),
        data_or_null<S>(d_cell),
        static_cast<G*>(d_gates.data_ptr()),
        mutable_data_or_null<S>(d_cell_prev),
        mutable_data_or_null<T>(d_sum),
        0,
        0};
    run_over_tiles(kernel);
  });
}

}  // namespace
}  // namespace fastris

STABLE_TORCH_LIBRARY_IMPL(fastris, CPU, m) {
  m.impl("lstm_gates_backward_out", TORCH_BOX(&fastris::lstm_gates_backward_out));
}
