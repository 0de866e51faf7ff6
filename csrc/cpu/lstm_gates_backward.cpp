// lstm_gates_backward on the CPU: activations and cell are computed again from the pre-activations.
#include "lstm_gates.h"

namespace fastris {
namespace {

template <typename T>
struct Differentiated {
  const T *d_hidden, *d_cell;  // or nullptr: zeros
  FourGates<T> d_gates;  // may be the pre-activations
  T* d_cell_prev;  // may be d_cell
  T *forget, *cell;  // buffers
};

// The gradients of a tile's pre-activations and of the cell before, in two passes as in lstm_gates.
template <typename T, bool Sum, bool Peephole>
struct DifferentiateTile {
  using Outputs = Differentiated<T>;

  template <int Bytes>
  FASTRIS_INLINE static void run(const TileInputs<T>& in, const Differentiated<T>& out) {
    using Real = Vector<T, Bytes>;
    constexpr int64_t lanes = VectorOf<T, Bytes>::lanes;
    const auto d_gate = [&](int64_t k, int64_t x) FASTRIS_INLINE_LAMBDA -> auto& {
      return unaligned_at<Bytes>(out.d_gates.at[k] + x);
    };
    by_two_vectors<lanes>(in.n, [&](int64_t first, auto vectors) FASTRIS_INLINE_LAMBDA {
      Activations<T, Bytes, vectors.value, Curve::sigmoid, Curve::sigmoid, Curve::tangent_with_slope> ifg;
      Real c_prev[vectors.value];
      for (int v = 0; v < vectors.value; ++v) {
        c_prev[v] = in.template set_ifg<Bytes, Sum, Peephole>(ifg, v, first + v * lanes);
      }
      ifg.find();
      for (int v = 0; v < vectors.value; ++v) {  // the cell, f, and what i, f and g do to the cell
        const int64_t x = first + v * lanes;
        const Activated<T, Bytes> i = ifg.template value_and_slope<0>(v), f = ifg.template value_and_slope<1>(v);
        const Activated<T, Bytes> g = ifg.template value_and_slope<2>(v);
        d_gate(0, x) = g.value * i.slope;
        d_gate(1, x) = c_prev[v] * f.slope;
        d_gate(3, x) = i.value * g.slope;
        vector_at<Bytes>(out.forget + x) = f.value;
        vector_at<Bytes>(out.cell + x) = f.value * c_prev[v] + rounded_product(i.value, g.value);
      }
    });
    by_two_vectors<lanes>(in.n, [&](int64_t first, auto vectors) FASTRIS_INLINE_LAMBDA {
      if (vectors.value == 2) in.next.prefetch(first);
      Activations<T, Bytes, vectors.value, Curve::sigmoid, Curve::tangent_with_slope> o_and_c;
      for (int v = 0; v < vectors.value; ++v) {
        const int64_t x = first + v * lanes;
        in.template set_o_and_c<Bytes, Sum, Peephole>(o_and_c, v, x, vector_at<Bytes>(out.cell + x));
      }
      o_and_c.find();
      for (int v = 0; v < vectors.value; ++v) {
        const int64_t x = first + v * lanes;
        const Activated<T, Bytes> o = o_and_c.template value_and_slope<0>(v);
        const Activated<T, Bytes> tanh_c = o_and_c.template value_and_slope<1>(v);
        Real d_h{}, d_c{};
        if (out.d_hidden != nullptr) d_h = unaligned_at<Bytes>(out.d_hidden + x);
        if (out.d_cell != nullptr) d_c = unaligned_at<Bytes>(out.d_cell + x);
        const Real d_o = d_h * tanh_c.value * o.slope;
        d_c += d_h * o.value * tanh_c.slope;
        if constexpr (Peephole) d_c += d_o * in.template w<Bytes>(2, x);
        const Real d_i = d_c * d_gate(0, x), d_f = d_c * d_gate(1, x);
        Real d_before = d_c * vector_at<Bytes>(out.forget + x);
        if constexpr (Peephole) {
          d_before += d_i * in.template w<Bytes>(0, x) + rounded_product(d_f, in.template w<Bytes>(1, x));
        }
        d_gate(0, x) = d_i;
        d_gate(1, x) = d_f;
        d_gate(2, x) = d_o;
        d_gate(3, x) *= d_c;
        unaligned_at<Bytes>(out.d_cell_prev + x) = d_before;
      }
    });
  }
};

template <typename Types>
struct GatesBackwardKernel {
  using T = typename Types::Compute;
  using G = typename Types::Gate;
  using S = typename Types::Cell;
  using A = typename Types::Addend;

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
    constexpr int64_t lanes = VectorOf<T, Bytes>::lanes;
    GateBuffer<T> gate[kGates], weight[kPeepholes], before, d_h, d_c, forget, c, d_before;
    for (int64_t t = begin; t < end; ++t) {
      const GateTile tile(all, t);
      const NextGates next(GateTile(all, t + 1 < end ? t + 1 : t), gates, addend, 2 * lanes);
      const int64_t n = tile.size;
      const PreActivations<T> pre = load_gates<Bytes>(all, tile, gates, addend, bias, c.at, gate);
      if (peephole != nullptr) load_peepholes(all, tile, peephole, weight);
      const T *from_cell = nullptr, *from_d_hidden = nullptr, *from_d_cell = nullptr;
      if (cell_prev != nullptr) from_cell = load_state<Bytes>(cell_prev + tile.state_at, n, before.at);
      if (d_hidden != nullptr) from_d_hidden = load_state<Bytes>(d_hidden + tile.state_at, n, d_h.at);
      if (d_cell != nullptr) from_d_cell = load_state<Bytes>(d_cell + tile.state_at, n, d_c.at);
      FourGates<T> to_gates(gate);
      const bool gates_in_place = whole_vectors<Bytes, T, G>(tile);
      if constexpr (std::is_same_v<T, G>) {
        if (gates_in_place) to_gates = FourGates<T>(tile, d_gates);
      }
      T* to_cell = d_before.at;
      if (d_cell_prev != nullptr) to_cell = in_place<T>(d_cell_prev + tile.state_at, n % lanes == 0, d_before.at);
      const TileInputs<T> in{n, next, pre, weight, from_cell};
      const Differentiated<T> out{from_d_hidden, from_d_cell, to_gates, to_cell, forget.at, c.at};
      run_tile<Bytes, DifferentiateTile>(in, peephole != nullptr, out);
      for (int64_t k = 0; k < kGates; ++k) {
        int64_t at = tile.gate_at + k * tile.length;
        for (int64_t r = 0; r < tile.rows; ++r, at += kGates * tile.length) {
          const T* row = to_gates.at[k] + r * tile.columns;
          if (!gates_in_place) store_row<Bytes>(row, tile.columns, d_gates + at);
          if (d_sum != nullptr) add_row<Bytes>(row, tile.columns, d_sum + at);
        }
      }
      if (d_cell_prev != nullptr && to_cell == d_before.at) store_row<Bytes>(to_cell, n, d_cell_prev + tile.state_at);
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
    using Types = decltype(types);
    using T = typename Types::Compute;
    using G = typename Types::Gate;
    using S = typename Types::Cell;
    run_over_tiles(GatesBackwardKernel<Types>{
        all,
        static_cast<const G*>(gates.const_data_ptr()),
        data_or_null<S>(cell_prev),
        data_or_null<typename Types::Addend>(addend),
        data_or_null<T>(bias),
        data_or_null<T>(peephole),
        data_or_null<G>(d_hidden),
        data_or_null<S>(d_cell),
        static_cast<G*>(d_gates.data_ptr()),
        mutable_data_or_null<S>(d_cell_prev),
        mutable_data_or_null<T>(d_sum),
        0,
        0});
  });
}

}  // namespace
}  // namespace fastris

STABLE_TORCH_LIBRARY_IMPL(fastris, CPU, m) {
  m.impl("lstm_gates_backward_out", TORCH_BOX(&fastris::lstm_gates_backward_out));
}
