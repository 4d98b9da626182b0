// A program that runs the attention of sm_90a, both directions, on small problems and compares with
// the definition in float64: for ThreadSanitizer, and for kernels with mistakes in them. Arguments:
// lazy, eager or random:SEED. Says what is wrong, and returns 1.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "launch.h"

using namespace fastattn;

namespace {

int failures = 0;
std::mt19937 chance(7);

// Memory of exactly the size, with NaNs in it, for AddressSanitizer and for what is not written.
template <typename T>
struct Array {
  size_t size;
  T* data;

  explicit Array(size_t n)
      : size(n), data(static_cast<T*>(std::aligned_alloc(16, (n * sizeof(T) + 15) / 16 * 16))) {
    std::fill_n(reinterpret_cast<unsigned char*>(data), n * sizeof(T), 0xFF);
  }
  Array(const Array&) = delete;
  ~Array() { std::free(data); }
  void draw() {
    std::normal_distribution<float> normal(0, 1);
    for (size_t i = 0; i < size; ++i) data[i] = from_float<T>(normal(chance));
  }
  double operator[](size_t i) const { return to_float(data[i]); }
};

struct Problem {
  const char* name;
  int q_len, k_len, head_dim;
  int left, right;
  int multiprocessors;
};

template <typename T>
void check(DType dtype, const Problem& problem) {
  if (failures) return;  // one is enough to know
  constexpr int kBatch = 2, kHeads = 4, kGroup = 2;
  const int m = problem.q_len, n = problem.k_len, d = problem.head_dim;
  const size_t rows = size_t(kBatch) * kHeads * m, keys = size_t(kBatch) * kHeads / kGroup * n;
  Array<T> q(rows * d), k(keys * d), v(keys * d), out(rows * d), dout(rows * d), dq(rows * d),
      dk(keys * d), dv(keys * d);
  Array<float> lse(rows), dlse(rows), space(4 * rows);
  for (auto* a : {&q, &k, &v, &dout}) a->draw();
  dlse.draw();
  const auto view = [&](void* data, int heads, int length) {
    return View{data, {int64_t(heads) * length * d, int64_t(length) * d, d, 1}};
  };
  AttentionParams p{};
  p.dtype = dtype;
  p.shape = {kBatch, kHeads, kHeads / kGroup, m, n, d, d};
  p.q = view(q.data, kHeads, m);
  p.k = view(k.data, kHeads / kGroup, n);
  p.v = view(v.data, kHeads / kGroup, n);
  p.out = view(out.data, kHeads, m);
  p.lse = lse.data;
  p.scale = 1 / std::sqrt(double(d));
  p.mask = {problem.left, problem.right, n - m};
  Device device;
  device.shared_bytes = 227 << 10;
  device.capability = 90;
  device.multiprocessors = problem.multiprocessors;
  attention_forward(p, ForwardPlan{}, nullptr, device);
  AttentionGrads g{};
  g.dout = view(dout.data, kHeads, m);
  g.dlse = dlse.data;
  g.dq = view(dq.data, kHeads, m);
  g.dk = view(dk.data, kHeads / kGroup, n);
  g.dv = view(dv.data, kHeads / kGroup, n);
  attention_backward(p, g, space.data, device);

  std::vector<double> want_dk(keys * d), want_dv(keys * d);
  double worst = 0, worst_lse = 0, worst_gradient = 0;
  const auto note = [](double& most, double error) {
    if (error > most || error != error) most = error != error ? 1e30 : error;
  };
  for (size_t row = 0; row < rows; ++row) {
    const size_t head = row / m / kGroup * n;
    const KeyRange seen = p.mask.keys_of(int64_t(row % m), n);
    std::vector<double> want(d), want_dq(d), logit(n), dp(n);
    double total = 0, dot = 0;
    for (int64_t j = seen.begin; j < seen.end; ++j) {
      for (int c = 0; c < d; ++c) {
        logit[j] += p.scale * q[row * d + c] * k[(head + j) * d + c];
        dp[j] += dout[row * d + c] * v[(head + j) * d + c];
      }
      total += std::exp(logit[j]);
    }
    for (int64_t j = seen.begin; j < seen.end; ++j) dot += std::exp(logit[j]) / total * dp[j];
    for (int64_t j = seen.begin; j < seen.end; ++j) {
      const double prob = std::exp(logit[j]) / total;
      const double ds = p.scale * prob * (dp[j] - dot + dlse[row]);
      for (int c = 0; c < d; ++c) {
        want[c] += prob * v[(head + j) * d + c];
        want_dq[c] += ds * k[(head + j) * d + c];
        want_dk[(head + j) * d + c] += ds * q[row * d + c];
        want_dv[(head + j) * d + c] += prob * dout[row * d + c];
      }
    }
    for (int c = 0; c < d; ++c) {
      note(worst, std::fabs(out[row * d + c] - want[c]));
      note(worst_gradient, std::fabs(dq[row * d + c] - want_dq[c]));
    }
    if (seen.begin < seen.end)
      note(worst_lse, std::fabs(lse[row] - std::log(total)));
    else if (lse[row] != -HUGE_VAL)
      worst_lse = 1e30;
  }
  for (size_t i = 0; i < keys * d; ++i) {
    note(worst_gradient, std::fabs(dk[i] - want_dk[i]));
    note(worst_gradient, std::fabs(dv[i] - want_dv[i]));
  }
  if (worst > 2e-2 || worst_lse > 1e-3 || worst_gradient > 3e-2) {
    std::printf("%s: out off by %.3g, lse by %.3g, a gradient by %.3g\n", problem.name, worst,
                worst_lse, worst_gradient);
    ++failures;
  }
}

}  // namespace

int main(int count, char** arguments) {
  const std::string mode = count > 1 ? arguments[1] : "lazy";
  using emulator::Completion;
  if (mode == "eager") emulator::set_options({Completion::kEager, 0});
  if (mode.rfind("random:", 0) == 0)
    emulator::set_options({Completion::kRandom, std::strtoull(mode.c_str() + 7, nullptr, 10)});
  try {
    check<bf16>(DType::kBFloat16, {"full", 200, 400, 64, -1, -1, 3});
    check<f16>(DType::kFloat16, {"causal", 300, 300, 64, -1, 0, 3});
    check<bf16>(DType::kBFloat16, {"window", 200, 700, 64, 150, 20, 2});
    check<bf16>(DType::kBFloat16, {"blind", 260, 70, 64, -1, 0, 2});
    for (const std::string& kernel : emulator::take_launches()) {
      if (kernel.find("sm_90a") != std::string::npos || kernel == "attention_backward, rows")
        continue;
      std::printf("%s: not the kernel of sm_90a\n", kernel.c_str());
      ++failures;
    }
    for (const std::string& what : emulator::take_rare()) {
      std::printf("a kernel found its own result broken: %s\n", what.c_str());
      ++failures;
    }
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  return failures ? 1 : 0;
}
