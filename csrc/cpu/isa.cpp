// The instruction set that this module was compiled for: its name, and what it does at most.
#include <chrono>

#include "kernels.h"
#include "parallel.h"
#include "tile_matmul.h"

namespace fastattn {
namespace {

// Operations that one thread does in `steps` multiply-adds of each of 16 vectors, which hide its
// latency; nothing is loaded.
template <class Compute>
FASTATTN_NOINLINE double multiply_adds(int64_t steps, typename Compute::Acc* result) {
  using A = typename Compute::Acc;
  constexpr int kChains = 16;
  alignas(64) typename Compute::Elem ones[Vec<A>::kWidth] = {};
  const auto operand = Compute::load_b(ones);
  Vec<A> sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = set1(*result + A(i));
  for (int64_t step = 0; step < steps; ++step)
    unroll<kChains>([&](auto i) { sum[i] = Compute::step(operand, operand, sum[i]); });
  for (int i = 1; i < kChains; ++i) sum[0] = sum[0] + sum[i];
  *result = hsum(sum[0]);
  return 2.0 * double(steps) * kChains * Vec<A>::kWidth * Compute::kDepth;
}

template <class Compute>
double rate(int threads) {
  using Clock = std::chrono::steady_clock;
  double best = 0;
  for (int run = 0; run < 20; ++run) {  // 1 ms each
    std::vector<double> operations(static_cast<size_t>(threads));
    const Clock::time_point start = Clock::now();
    parallel(threads, [&](int thread) {
      typename Compute::Acc result = 0;
      operations[size_t(thread)] = multiply_adds<Compute>(100000, &result);
    });
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    double total = 0;
    for (double n : operations) total += n;
    best = std::max(best, total / seconds);
  }
  return best;
}

}  // namespace

const char* const isa = FASTATTN_ISA;

double multiply_add_rate(DType dtype, int threads) {
  switch (dtype) {
    case DType::kFloat64:
      return rate<ComputeOf<double>::type>(threads);
    case DType::kBFloat16:
      return rate<ComputeOf<bf16>::type>(threads);
    default:  // float16 is widened
      return rate<ComputeOf<float>::type>(threads);
  }
}

}  // namespace fastattn
