// A program that runs every kernel on small problems and compares with the definition in float64:
// for ThreadSanitizer, under which torch would be all noise, and for kernels with mistakes in them.
// Arguments: lazy, eager or random:SEED. Says what is wrong, and returns 1.
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

void expect_close(const std::string& what, const std::vector<double>& got,
                  const std::vector<double>& want, double tolerance) {
  double scale = 1e-3, worst = 0;
  for (double x : want) scale = std::max(scale, std::fabs(x));
  for (size_t i = 0; i < want.size(); ++i) {
    const double error = std::fabs(got[i] - want[i]) / scale;
    worst = error > worst || error != error ? error : worst;
    if (worst != worst) break;
  }
  if (worst <= tolerance) return;
  std::printf("%s: off by %.3g of the largest\n", what.c_str(), worst);
  ++failures;
}

std::mt19937 chance(7);

// Memory of exactly the size, with NaNs in it, for AddressSanitizer and for what is not written.
template <typename T>
struct Array {
  size_t size;
  T* data;

  explicit Array(size_t n) : size(n), data(static_cast<T*>(std::malloc(n * sizeof(T)))) {
    std::fill_n(reinterpret_cast<unsigned char*>(data), n * sizeof(T), 0xFF);
  }
  Array(const Array&) = delete;
  ~Array() { std::free(data); }
  void draw(float width = 1) {
    std::normal_distribution<float> normal(0, width);
    for (size_t i = 0; i < size; ++i) data[i] = from_float<T>(normal(chance));
  }
  double operator[](size_t i) const { return to_float(data[i]); }
  std::vector<double> numbers() const {
    std::vector<double> out(size);
    for (size_t i = 0; i < size; ++i) out[i] = to_float(data[i]);
    return out;
  }
};

View rows_view(void* data, int64_t width) {
  View v;
  v.data = data;
  v.stride[2] = width;
  return v;
}

// ---- layer norm and softmax --------------------------------------------------------------------

template <typename T>
void check_layer_norm(DType dtype, int rows, int width, bool rms, bool residual,
                      const Device& device) {
  if (failures) return;  // one is enough to know
  const std::string name = "layer norm of " + std::to_string(width);
  const size_t n = size_t(rows) * width;
  Array<T> x(n), add(n), weight(width), bias(width), y(n), sum(n), dy(n), dnew(n), dx(n), dadd(n),
      dweight(width), dbias(width);
  Array<float> mean(rows), rstd(rows), partials(size_t(12) * 2 * width);
  x.draw();
  add.draw();
  weight.draw();
  bias.draw();
  dy.draw();
  dnew.draw();
  LayerNormParams p{};
  p.dtype = p.weight_dtype = p.bias_dtype = dtype;
  p.rows = {1, 1, rows};
  p.width = width;
  p.x = rows_view(x.data, width);
  if (residual) p.residual = rows_view(add.data, width);
  p.weight = weight.data;
  p.bias = rms ? nullptr : bias.data;
  p.y = y.data;
  p.new_residual = residual ? sum.data : nullptr;
  p.mean = rms ? nullptr : mean.data;
  p.rstd = rstd.data;
  p.eps = 1e-5;
  p.rms = rms;
  layer_norm_forward(p, device);

  std::vector<double> want(n), want_dx(n), want_dweight(width), want_dbias(width);
  for (int r = 0; r < rows; ++r) {
    const auto h = [&](int j) { return residual ? sum[r * width + j] : x[r * width + j]; };
    double m = 0, var = 0, mean_g = 0, mean_gx = 0;
    if (!rms)
      for (int j = 0; j < width; ++j) m += h(j) / width;
    for (int j = 0; j < width; ++j) var += (h(j) - m) * (h(j) - m) / width;
    const double factor = 1 / std::sqrt(var + 1e-5);
    for (int j = 0; j < width; ++j) {
      const double hat = (h(j) - m) * factor, g = dy[r * width + j] * weight[j];
      want[r * width + j] = hat * weight[j] + (rms ? 0 : bias[j]);
      want_dweight[j] += dy[r * width + j] * hat;
      want_dbias[j] += dy[r * width + j];
      mean_g += rms ? 0 : g / width;
      mean_gx += g * hat / width;
    }
    for (int j = 0; j < width; ++j) {
      const double hat = (h(j) - m) * factor, g = dy[r * width + j] * weight[j];
      want_dx[r * width + j] =
          factor * (g - mean_g - hat * mean_gx) + (residual ? dnew[r * width + j] : 0);
    }
  }
  const double tolerance = dtype == DType::kFloat32 ? 1e-5 : 1e-2;
  expect_close(name + ", y", y.numbers(), want, tolerance);

  p.x = rows_view(residual ? sum.data : x.data, width);
  p.residual = View{};
  LayerNormGrads g{};
  g.dy = rows_view(dy.data, width);
  if (residual) g.dnew_residual = rows_view(dnew.data, width);
  g.dx = dx.data;
  g.dresidual = residual ? dadd.data : nullptr;
  g.dweight = dweight.data;
  g.dbias = rms ? nullptr : dbias.data;
  layer_norm_backward(p, g, partials.data, 12, device);
  expect_close(name + ", dx", dx.numbers(), want_dx, tolerance);
  if (residual) expect_close(name + ", dresidual", dadd.numbers(), want_dx, tolerance);
  expect_close(name + ", dweight", dweight.numbers(), want_dweight, tolerance);
  if (!rms) expect_close(name + ", dbias", dbias.numbers(), want_dbias, tolerance);
}

template <typename T>
void check_softmax(DType dtype, int rows, int width, int inner, bool log, const Device& device) {
  if (failures) return;  // one is enough to know
  const std::string name = "softmax of " + std::to_string(width) + " x " + std::to_string(inner);
  const size_t n = size_t(rows) * width * inner;
  Array<T> x(n), y(n), dy(n), dx(n);
  x.draw(2);
  dy.draw();
  View view = rows_view(x.data, int64_t(width) * inner);
  view.stride[3] = inner;
  SoftmaxParams p{};
  p.x_dtype = p.y_dtype = dtype;
  p.rows = {1, 1, rows};
  p.width = width;
  p.inner = inner;
  p.x = view;
  p.y = y.data;
  p.scale = 0.5;
  p.log = log;
  softmax_forward(p, device);
  SoftmaxGrads g{};
  g.x_dtype = g.y_dtype = dtype;
  g.rows = p.rows;
  g.width = width;
  g.inner = inner;
  g.y = g.dy = view;
  g.y.data = y.data;
  g.dy.data = dy.data;
  g.dx = dx.data;
  g.scale = 0.5;
  g.log = log;
  softmax_backward(g, device);

  std::vector<double> want(n), want_dx(n);
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < inner; ++c) {
      const auto at = [&](int j) { return (size_t(r) * width + j) * inner + c; };
      double top = -1e30, total = 0, dot = 0;
      for (int j = 0; j < width; ++j) top = std::max(top, 0.5 * x[at(j)]);
      for (int j = 0; j < width; ++j) total += std::exp(0.5 * x[at(j)] - top);
      for (int j = 0; j < width; ++j) {
        const double s = 0.5 * x[at(j)] - top - std::log(total);
        want[at(j)] = log ? s : std::exp(s);
        dot += (log ? 1 : y[at(j)]) * dy[at(j)];
      }
      for (int j = 0; j < width; ++j)
        want_dx[at(j)] =
            0.5 * (log ? dy[at(j)] - std::exp(y[at(j)]) * dot : y[at(j)] * (dy[at(j)] - dot));
    }
  const double tolerance = dtype == DType::kFloat32 ? 1e-5 : 1e-2;
  expect_close(name + ", y", y.numbers(), want, tolerance);
  expect_close(name + ", dx", dx.numbers(), want_dx, tolerance);
}

// ---- attention ---------------------------------------------------------------------------------

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
  for (int h = 0; h < kHeads; ++h)
    for (int i = 0; i < m; ++i) {
      const size_t row = size_t(h) * m + i, head = size_t(h / kGroup) * n;
      const KeyRange seen = p.mask.keys_of(i, n);
      std::vector<double> logit(n), slope(n, 1), keep(n, 1);
      double total = variant.modified ? std::exp(sinks[h]) : 0, dot = 0;
      for (int64_t j = seen.begin; j < seen.end; ++j) {
        double s = 0;
        for (int c = 0; c < d; ++c) s += q[row * d + c] * k[(head + j) * d + c];
        s *= p.scale;
        if (variant.modified) {
          const double t = std::tanh(s / 3);
          slope[j] = 1 - t * t;
          s = 3 * t - slopes[h] * std::fabs(double(i + n - m - j)) + bias[size_t(i) * n + j];
          const Philox word = Philox::at(12345, uint32_t(j) / 4, uint32_t(i), uint32_t(h), 0);
          keep[j] = word.word[j & 3] >= dropout_threshold(0.25) ? 1 / 0.75 : 0;
        }
        logit[j] = s;
        total += std::exp(s);
      }
      want_lse[row] = std::log(total);
      for (int64_t j = seen.begin; j < seen.end; ++j)
        for (int c = 0; c < d; ++c)
          want[row * d + c] += std::exp(logit[j]) / total * keep[j] * v[(head + j) * d + c];
      for (int c = 0; c < d; ++c) dot += dout[row * d + c] * want[row * d + c];
      for (int64_t j = seen.begin; j < seen.end; ++j) {
        double dp = 0;
        for (int c = 0; c < d; ++c) dp += dout[row * d + c] * v[(head + j) * d + c];
        const double prob = std::exp(logit[j]) / total;
        const double dlogit = prob * (keep[j] * dp - dot + dlse[row]);
        want_dbias[size_t(i) * n + j] += dlogit;
        for (int c = 0; c < d; ++c) {
          want_dq[row * d + c] += p.scale * dlogit * slope[j] * k[(head + j) * d + c];
          want_dk[(head + j) * d + c] += p.scale * dlogit * slope[j] * q[row * d + c];
          want_dv[(head + j) * d + c] += prob * keep[j] * dout[row * d + c];
        }
      }
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
  const std::string mode = count > 1 ? arguments[1] : "lazy";
  using emulator::Completion;
  if (mode == "eager") emulator::set_options({Completion::kEager, 0});
  if (mode.rfind("random:", 0) == 0)
    emulator::set_options({Completion::kRandom, std::strtoull(mode.c_str() + 7, nullptr, 10)});
  Device device, roomy;
  device.shared_bytes = 16 << 10;  // so that rows of a few thousand are too wide for it
  roomy.shared_bytes = 200 << 10;
  device.multiprocessors = roomy.multiprocessors = 3;
  try {
    check_layer_norm<float>(DType::kFloat32, 9, 70, false, true, device);
    check_layer_norm<bf16>(DType::kBFloat16, 13, 1000, false, false, device);
    check_layer_norm<bf16>(DType::kBFloat16, 5, 4096, true, true, device);
    check_layer_norm<float>(DType::kFloat32, 3, 10001, false, false, device);
    check_layer_norm<float>(DType::kFloat32, 3, 10001, false, true, roomy);
    check_softmax<float>(DType::kFloat32, 9, 70, 1, false, device);
    check_softmax<bf16>(DType::kBFloat16, 5, 3000, 1, true, device);
    check_softmax<float>(DType::kFloat32, 3, 9001, 1, false, device);
    check_softmax<float>(DType::kFloat32, 3, 9001, 1, true, roomy);
    check_softmax<f16>(DType::kFloat16, 2, 45, 37, false, device);
    check_attention<bf16>(DType::kBFloat16, {"plain", 150, 200, 64, false, false}, device);
    check_attention<f16>(DType::kFloat16, {"causal", 150, 150, 64, true, false}, device);
    check_attention<bf16>(DType::kBFloat16, {"modified", 70, 150, 64, true, true}, device);
    check_attention<f16>(DType::kFloat16, {"narrow", 70, 80, 59, true, false}, device);
    check_attention<bf16>(DType::kBFloat16, {"decode", 1, 1500, 64, false, false, false}, device);
    check_attention<bf16>(DType::kBFloat16, {"blind", 150, 40, 64, true, true}, device);
    for (const std::string& what : emulator::take_rare()) {
      std::printf("a kernel found its own result broken: %s\n", what.c_str());
      ++failures;
    }
    const auto conflicts = emulator::take_bank_conflicts();
    for (const std::string& line : conflicts) std::printf("bank conflict: %s\n", line.c_str());
    failures += int(conflicts.size());
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  return failures ? 1 : 0;
}
