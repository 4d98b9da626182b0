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

// The sum of the threads' best: on a busy machine they do not run side by side all the time.
template <class Compute>
double rate(int threads) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> best(size_t(threads), 0.0);
  parallel(threads, [&](int thread) {
    for (int run = 0; run < 50; ++run) {  // 0.2 ms each
      typename Compute::Acc result = 0;
      const Clock::time_point start = Clock::now();
      const double operations = multiply_adds<Compute>(50000, &result);
      const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
      best[size_t(thread)] = std::max(best[size_t(thread)], operations / seconds);
    }
  });
  double sum = 0;
  for (double one : best) sum += one;
  return sum;
}

}  // namespace

#if defined(FASTATTN_FLOAT64)
double multiply_add_rate_float64(int threads) { return rate<ComputeOf<double>::type>(threads); }
#else
const char* const isa = FASTATTN_ISA;

double multiply_add_rate(DType dtype, int threads) {
  switch (dtype) {
    case DType::kFloat64:
      return multiply_add_rate_float64(threads);
    case DType::kBFloat16:
      return rate<ComputeOf<bf16>::type>(threads);
    default:  // float16 is widened
      return rate<ComputeOf<float>::type>(threads);
  }
}
#endif

}  // namespace fastattn
