// assignment on CUDA: a warp or a block per matrix, the very solver that the CPU runs in SIMD lanes. Scratch is in
// shared memory where it fits, and otherwise from torch's allocator. Nothing synchronises with the host or reads the
// counts there, so the call can be captured in a graph.
#include "../assignment_call.h"

namespace fastris {
namespace {

constexpr int kWarp = 32, kBlock = 128;
constexpr int kWarpsPerBlock = 4;
constexpr int64_t kMostColumnsOfWarp = 128;  // a block solves larger matrices

template <typename T>
struct Launch {
  const T* cost;
  int64_t batch_stride, row_stride, col_stride;
  bool maximize;
  const int64_t* num_rows;
  const int64_t* num_cols;
  int64_t B, P, G;
  int64_t work_bytes, cost_bytes;  // of one matrix
  char* work;                      // global scratch of all matrices, or null for shared memory
  char* packed;                    // the same for the packed costs
  int64_t* col_of_row;
  int32_t* status;
};

template <int Threads>
using Lanes = ThreadLanes<Threads>;

// Copies the matrix as solved; true if NaN or -inf is among the costs.
template <int Threads, typename T>
__device__ bool pack(const CostView<T>& cost, T* packed, int32_t row_length, int32_t n, int32_t m) {
  int32_t invalid = 0;
  for (int32_t row = 0; row < n; ++row) {
    for (int32_t col = Lanes<Threads>::lane(); col < row_length; col += Threads) {
      const T value = col < m ? cost(row, col) : static_cast<T>(INFINITY);
      if (!(value > static_cast<T>(-INFINITY))) invalid = 1;
      packed[static_cast<int64_t>(row) * row_length + col] = value;
    }
  }
  return Lanes<Threads>::greatest(invalid) != 0;
}

// Puts the worst finite cost, or 0 where there is none, in place of NaN and -inf. Each thread sees what it packed.
template <int Threads, typename T>
__device__ void replace_invalid(T* packed, int32_t row_length, int32_t n) {
  double negated = INFINITY;
  for (int64_t row = 0; row < n; ++row) {
    for (int32_t col = Lanes<Threads>::lane(); col < row_length; col += Threads) {
      const double value = packed[row * row_length + col];
      if (value > -INFINITY && value < INFINITY && -value < negated) negated = -value;
    }
  }
  negated = Lanes<Threads>::least(negated);
  const T worst = negated < INFINITY ? static_cast<T>(-negated) : T(0);
  for (int64_t row = 0; row < n; ++row) {
    for (int32_t col = Lanes<Threads>::lane(); col < row_length; col += Threads) {
      T& value = packed[row * row_length + col];
      if (!(value > static_cast<T>(-INFINITY))) value = worst;
    }
  }
}

__device__ int64_t clamped(int64_t value, int64_t most) { return value < 0 ? 0 : value > most ? most : value; }

// blockDim = (Threads, matrices per block).
template <int Threads, typename T>
__global__ void __launch_bounds__(128, 4) assignment_kernel(Launch<T> launch) {
  extern __shared__ __align__(16) char shared[];
  const int64_t b = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (b >= launch.B) return;  // a whole warp, or a whole block
  const int64_t shared_bytes = (launch.work ? 0 : launch.work_bytes) + (launch.packed ? 0 : launch.cost_bytes);
  char* own = shared + threadIdx.y * shared_bytes;
  char* work_memory = launch.work ? launch.work + b * launch.work_bytes : own;
  char* own_costs = own + (launch.work ? 0 : launch.work_bytes);
  char* cost_memory = launch.packed ? launch.packed + b * launch.cost_bytes : own_costs;

  int64_t* col_of_row = launch.col_of_row + b * launch.P;
  for (int64_t row = Lanes<Threads>::lane(); row < launch.P; row += Threads) col_of_row[row] = -1;
  const int64_t rows = launch.num_rows ? clamped(launch.num_rows[b], launch.P) : launch.P;
  const int64_t cols = launch.num_cols ? clamped(launch.num_cols[b], launch.G) : launch.G;
  int32_t status = 0;
  if (rows > 0 && cols > 0) {
    const CostView<T> cost{
        launch.cost + b * launch.batch_stride, launch.row_stride, launch.col_stride, launch.maximize};
    const bool transposed = cols < rows;
    const int32_t n = static_cast<int32_t>(transposed ? cols : rows);
    const int32_t m = static_cast<int32_t>(transposed ? rows : cols);
    const int32_t row_length = static_cast<int32_t>(round_up(m, Threads));
    T* packed = reinterpret_cast<T*>(cost_memory);
    if (pack<Threads>(transposed ? cost.transposed() : cost, packed, row_length, n, m)) {
      replace_invalid<Threads>(packed, row_length, n);
      status |= kAssignmentInvalid;
    }
    const AssignmentWorkspace<int32_t> work(work_memory, round_up(n, Threads), row_length);
    AssignmentSolver<Lanes<Threads>, PackedCost<T>> solver({packed, row_length}, work, n, m);
    if (!solver.solve()) status |= kAssignmentInfeasible;
    for (int32_t row = Lanes<Threads>::lane(); row < n; row += Threads) {
      const int32_t col = work.col_of_row[row];
      if (col >= 0) col_of_row[transposed ? col : row] = transposed ? row : col;
    }
  }
  if (Lanes<Threads>::leader()) launch.status[b] = status;
}

template <int Threads, typename T>
void run(const AssignmentCall& call, bool maximize, const CudaScope& scope) {
  const int64_t padded_m = round_up(call.m(), Threads);
  Launch<T> launch{
      call.cost.const_data_ptr<T>(),
      call.cost.stride(0),
      call.cost.stride(1),
      call.cost.stride(2),
      maximize,
      call.rows(),
      call.cols(),
      call.B,
      call.P,
      call.G,
      AssignmentWorkspace<int32_t>::bytes(round_up(call.n(), Threads), padded_m),
      round_up(call.n() * padded_m * static_cast<int64_t>(sizeof(T)), 16),
      nullptr,
      nullptr,
      static_cast<int64_t*>(call.col_of_row.data_ptr()),
      static_cast<int32_t*>(call.status.data_ptr())};

  const int64_t most = scope.shared_memory_per_block() - 1024;  // the kernel's own arrays are smaller than that
  std::optional<Tensor> work, packed;  // alive until the kernel is queued, as torch's allocator wants
  int64_t bytes = launch.work_bytes + launch.cost_bytes;  // of shared memory, for one matrix
  if (bytes > most) {
    packed = empty_on(call.cost, {call.B * launch.cost_bytes}, ScalarType::Byte);
    launch.packed = static_cast<char*>(packed->data_ptr());
    bytes = launch.work_bytes;
  }
  if (bytes > most) {
    work = empty_on(call.cost, {call.B * launch.work_bytes}, ScalarType::Byte);
    launch.work = static_cast<char*>(work->data_ptr());
    bytes = 0;
  }
  int64_t matrices = Threads == kWarp ? kWarpsPerBlock : 1;  // in a block
  while (matrices > 1 && matrices * bytes > most) matrices /= 2;
  // The same limit in every call, as it belongs to the kernel and not to this launch of it.
  FASTRIS_CUDA_CHECK(cudaFuncSetAttribute(
      assignment_kernel<Threads, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most)));
  const dim3 block(Threads, static_cast<unsigned>(matrices));
  const unsigned blocks = static_cast<unsigned>((call.B + matrices - 1) / matrices);
  assignment_kernel<Threads, T><<<blocks, block, static_cast<size_t>(matrices * bytes), scope.stream()>>>(launch);
  FASTRIS_CUDA_CHECK(cudaGetLastError());
}

template <typename T>
void run_by_size(const AssignmentCall& call, bool maximize, const CudaScope& scope) {
  call.m() <= kMostColumnsOfWarp ? run<kWarp, T>(call, maximize, scope) : run<kBlock, T>(call, maximize, scope);
}

std::tuple<Tensor, Tensor> assignment(
    Tensor cost, std::optional<Tensor> num_rows, std::optional<Tensor> num_cols, bool maximize) {
  const CudaScope scope(cost);
  const AssignmentCall call(cost, num_rows, num_cols);
  if (call.B > 0) {
    call.is_double() ? run_by_size<double>(call, maximize, scope) : run_by_size<float>(call, maximize, scope);
  }
  return {call.col_of_row, call.status};
}

}  // namespace
}  // namespace fastris

STABLE_TORCH_LIBRARY_IMPL(fastris, CUDA, m) { m.impl("assignment", TORCH_BOX(&fastris::assignment)); }
