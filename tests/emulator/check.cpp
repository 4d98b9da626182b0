// A program that runs attention on small problems and compares with the definition in float64: for
// ThreadSanitizer, under which torch would be all noise, and for kernels with mistakes in them.
#include "check.h"
#include "definition.h"

using namespace fastattn;

namespace {

struct Variant {
  const char* name;
  int q_len, k_len, head_dim;
  bool causal, modified;
  bool backward = true;
};

template <typename T>
void check_attention(DType dtype, const Variant& variant, const Device& device) {
  if (failures) return;  // one is enough to know
  constexpr int kHeads = 4, kGroup = 2;
  const int m = variant.q_len, n = variant.k_len, d = variant.head_dim;
  const std::string name = std::string("attention, ") + variant.name;
  const size_t rows = size_t(kHeads) * m, keys = size_t(kHeads / kGroup) * n;
  Array<T> q(rows * d), k(keys * d), v(keys * d), out(rows * d), dout(rows * d), dq(rows * d),
      dk(keys * d), dv(keys * d);
  Array<float> lse(rows), dlse(rows), delta(rows), bias(size_t(m) * n), dbias(size_t(m) * n),
      slopes(kHeads), sinks(kHeads);
  for (auto* a : {&q, &k, &v, &dout}) a->draw();
  for (auto* a : {&dlse, &bias, &sinks}) a->draw();
  for (int h = 0; h < kHeads; ++h) slopes.data[h] = 0.1f * float(h + 1);
  const auto view = [&](void* data, int length) {
    return View{data, {0, int64_t(length) * d, d, 1}};
  };
  AttentionParams p{};
  p.dtype = dtype;
  p.shape = {1, kHeads, kHeads / kGroup, m, n, d, d};
  p.q = view(q.data, m);
  p.k = view(k.data, n);
  p.v = view(v.data, n);
  p.out = view(out.data, m);
  p.lse = lse.data;
  p.scale = 1 / std::sqrt(double(d));
  p.mask.shift = n - m;
  if (variant.causal) p.mask.right = 0;
  if (variant.modified) {
    p.mask.left = 60;
    p.softcap = 3;
    p.bias = View{bias.data, {0, 0, n, 1}};
    p.bias_dtype = DType::kFloat32;
    p.alibi_slopes = View{slopes.data, {0, 1, 0, 0}};
    p.sinks = sinks.data;
    p.dropout.p = 0.25;
    p.dropout.seed = 12345;
  }
  const ForwardPlan plan = attention_forward_plan(p, device);
  Array<float> workspace(size_t(plan.workspace_floats) + 1);
  attention_forward(p, plan, workspace.data, device);

  std::vector<double> want(rows * d), want_lse(rows), want_dq(rows * d), want_dk(keys * d),
      want_dv(keys * d), want_dbias(size_t(m) * n);
  const auto queries = q.numbers(), key = k.numbers(), value = v.numbers(), up = dout.numbers();
  std::vector<double> logit(n), dp(n), add(n), keep(n);
  for (int h = 0; h < kHeads; ++h)
    for (int i = 0; i < m; ++i) {
      const size_t row = size_t(h) * m + i, at = row * d, head = size_t(h / kGroup) * n * d;
      DefinedRow defined{&queries[at], &key[head], &value[head],         &up[at],
                         p.scale,      dlse[row],  p.mask.keys_of(i, n), d};
      if (variant.modified) {
        for (int j = 0; j < n; ++j) {
          const Philox word = Philox::at(12345, uint32_t(j) / 4, uint32_t(i), uint32_t(h), 0);
          keep[j] = word.word[j & 3] >= dropout_threshold(0.25) ? 1 / 0.75 : 0;
          add[j] = bias[size_t(i) * n + j] - slopes[h] * std::fabs(double(i + n - m - j));
        }
        defined.softcap = 3;
        defined.sink_weight = std::exp(sinks[h]);
        defined.add = add.data();
        defined.keep = keep.data();
        defined.dbias = &want_dbias[size_t(i) * n];
      }
      want_lse[row] = defined.define(logit.data(), dp.data(), &want[at], &want_dq[at],
                                     &want_dk[head], &want_dv[head]);
    }
  expect_close(name + ", out", out.numbers(), want, 2e-2);
  expect_close(name + ", lse", lse.numbers(), want_lse, 1e-3);
  if (!variant.backward) return;

  AttentionGrads g{};
  g.dout = view(dout.data, m);
  g.dlse = dlse.data;
  g.delta = delta.data;
  g.dq = view(dq.data, m);
  g.dk = view(dk.data, n);
  g.dv = view(dv.data, n);
  if (variant.modified) g.dbias = View{dbias.data, {0, 0, n, 1}};
  Array<float> space(4 * rows);
  attention_backward(p, g, space.data, device);
  expect_close(name + ", dq", dq.numbers(), want_dq, 3e-2);
  expect_close(name + ", dk", dk.numbers(), want_dk, 3e-2);
  expect_close(name + ", dv", dv.numbers(), want_dv, 3e-2);
  if (variant.modified) expect_close(name + ", dbias", dbias.numbers(), want_dbias, 3e-2);
}

}  // namespace

int main(int count, char** arguments) {
  Device device;
  device.multiprocessors = 3;
  return run_program(count, arguments, [&] {
    check_attention<bf16>(DType::kBFloat16, {"plain", 150, 200, 64, false, false}, device);
    check_attention<f16>(DType::kFloat16, {"causal", 150, 150, 64, true, false}, device);
    check_attention<bf16>(DType::kBFloat16, {"modified", 70, 150, 64, true, true}, device);
    check_attention<f16>(DType::kFloat16, {"narrow", 70, 80, 59, true, false}, device);
    check_attention<bf16>(DType::kBFloat16, {"decode", 1, 1500, 64, false, false, false}, device);
    check_attention<bf16>(DType::kBFloat16, {"blind", 150, 40, 64, true, true}, device);
  });
}
