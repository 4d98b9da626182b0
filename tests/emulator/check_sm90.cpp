// A program that runs the attention of sm_90a, both directions, on small problems and compares with
// the definition in float64: for ThreadSanitizer, and for kernels with mistakes in them.
#include "check.h"
#include "definition.h"

using namespace fastattn;

namespace {

struct Problem {
  const char* name;
  int batch, q_len, k_len, head_dim;
  int left, right;
  int multiprocessors;
};

// The largest error; what is no number is off by 1e30.
double off(const std::vector<double>& got, const std::vector<double>& want) {
  double most = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double error = got[i] == want[i] ? 0 : std::fabs(got[i] - want[i]);
    if (error > most || error != error) most = error != error ? 1e30 : error;
  }
  return most;
}

template <typename T>
void check(DType dtype, const Problem& problem) {
  if (failures) return;  // one is enough to know
  constexpr int kHeads = 4, kGroup = 2;
  const int m = problem.q_len, n = problem.k_len, d = problem.head_dim;
  const size_t rows = size_t(problem.batch) * kHeads * m;
  const size_t keys = size_t(problem.batch) * kHeads / kGroup * n;
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
  p.shape = {problem.batch, kHeads, kHeads / kGroup, m, n, d, d};
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

  const auto queries = q.numbers(), key = k.numbers(), value = v.numbers(), up = dout.numbers(),
             up_lse = dlse.numbers();
  std::vector<double> want(rows * d), want_lse(rows), want_dq(rows * d), want_dk(keys * d),
      want_dv(keys * d), logit(n), dp(n);
  for (size_t row = 0; row < rows; ++row) {
    const size_t at = row * d, head = row / m / kGroup * n * d;
    const DefinedRow defined{&queries[at],
                             &key[head],
                             &value[head],
                             &up[at],
                             p.scale,
                             up_lse[row],
                             p.mask.keys_of(int64_t(row % m), n),
                             d};
    want_lse[row] = defined.define(logit.data(), dp.data(), &want[at], &want_dq[at], &want_dk[head],
                                   &want_dv[head]);
  }
  const double of_out = off(out.numbers(), want), of_lse = off(lse.numbers(), want_lse),
               of_gradients = std::max({off(dq.numbers(), want_dq), off(dk.numbers(), want_dk),
                                        off(dv.numbers(), want_dv)});
  if (of_out > 2e-2 || of_lse > 1e-3 || of_gradients > 3e-2) {
    std::printf("%s: out off by %.3g, lse by %.3g, a gradient by %.3g\n", problem.name, of_out,
                of_lse, of_gradients);
    ++failures;
  }
}

}  // namespace

int main(int count, char** arguments) {
  return run_program(count, arguments, [] {
    check<bf16>(DType::kBFloat16, {"full", 2, 200, 400, 64, -1, -1, 3});
    check<f16>(DType::kFloat16, {"causal", 1, 300, 300, 64, -1, 0, 3});
    check<bf16>(DType::kBFloat16, {"window", 1, 200, 700, 64, 150, 20, 2});
    check<bf16>(DType::kBFloat16, {"blind", 1, 260, 70, 64, -1, 0, 2});
    for (const std::string& kernel : emulator::take_launches()) {
      if (kernel.find("sm_90a") != std::string::npos || kernel == "attention_backward, rows")
        continue;
      std::printf("%s: not the kernel of sm_90a\n", kernel.c_str());
      ++failures;
    }
  });
}
