// The binding, compiled once for any processor of the architecture and linked into every module:
// _cpu_baseline, _cpu_avx2, ... (setup.py). The callers have checked everything, and allocated what
// is written.
#include <pybind11/pybind11.h>

#include "bind.h"
#include "kernels.h"

#if defined(_MSC_VER)
#include <intrin.h>
#endif

namespace py = pybind11;
using namespace fastattn;

namespace {

// The instruction sets that this processor and its operating system run, best last. Ask it of a
// module that surely runs (baseline or neon) before importing another.
py::list usable_isas() {
  py::list names;
#if defined(__aarch64__) || defined(_M_ARM64)
  names.append("neon");
#else
  names.append("baseline");
  bool avx2 = false, avx512 = false, bf16 = false;
#if defined(_MSC_VER)
  int a[4], b[4], c[4];
  __cpuid(a, 1);
  __cpuidex(b, 7, 0);
  __cpuidex(c, 7, 1);
  const unsigned long long os = (a[2] >> 27 & 1) ? _xgetbv(0) : 0;  // state that the OS saves
  avx2 =
      (os & 6) == 6 && (a[2] >> 12 & 1) && (a[2] >> 29 & 1) && (b[1] >> 5 & 1) && (b[1] >> 8 & 1);
  avx512 = avx2 && (os & 0xe6) == 0xe6 && (b[1] >> 16 & 1) && (b[1] >> 17 & 1) &&
           (b[1] >> 30 & 1) && (b[1] >> 31 & 1);
  bf16 = avx512 && (c[0] >> 5 & 1);
#elif defined(__x86_64__)
  __builtin_cpu_init();
  avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  if (avx2) names.append("avx2");
  if (avx512) names.append("avx512");
  if (bf16) names.append("avx512bf16");
#endif
  return names;
}

// ---- one function for each direction of each family --------------------------------------------

void bind_attention_forward(const py::handle& call, const py::handle& out, const py::handle& lse,
                            const py::handle& lse_low, int threads) {
  const AttentionParams p = attention_params(call, out, lse, lse_low, threads);
  const py::gil_scoped_release unlocked;
  attention_forward(p);
}

// results: out, lse, lse_low of the forward.
void bind_attention_backward(const py::handle& call, const py::handle& results,
                             const py::handle& dout, const py::handle& dlse,
                             const py::handle& outputs, int threads) {
  expect_tuple(results, 3, "results");
  const AttentionParams p =
      attention_params(call, field(results, 0), field(results, 1), field(results, 2), threads);
  const AttentionGrads grads = attention_grads(dout, dlse, outputs);
  const py::gil_scoped_release unlocked;
  attention_backward(p, grads);
}

void bind_layer_norm_forward(const py::handle& call, const py::handle& walk,
                             const py::handle& outputs, int threads) {
  const LayerNormParams p = layer_norm_forward_params(call, walk, outputs, threads);
  const py::gil_scoped_release unlocked;
  layer_norm_forward(p);
}

void bind_layer_norm_backward(const py::handle& call, const py::handle& walk_,
                              const py::handle& mean, const py::handle& rstd,
                              const py::handle& outputs, int threads) {
  const Walk walk(walk_, 3, 3);
  const LayerNormParams p = layer_norm_params(call, walk, mean, rstd, threads);
  const LayerNormGrads grads = layer_norm_grads(walk, outputs);
  const py::gil_scoped_release unlocked;
  layer_norm_backward(p, grads);
}

void bind_softmax_forward(const py::handle& call, const py::handle& walk, const py::handle& y,
                          int threads) {
  const SoftmaxParams p = softmax_params(call, walk, y, threads);
  const py::gil_scoped_release unlocked;
  softmax_forward(p);
}

void bind_softmax_backward(const py::handle& walk, double scale, bool log, const py::handle& dx,
                           int threads) {
  const SoftmaxGrads p = softmax_grads(walk, scale, log, dx, threads);
  const py::gil_scoped_release unlocked;
  softmax_backward(p);
}

void bind(py::module_& m) {
  m.doc() = "fastattn CPU kernels for one instruction set.";
  m.attr("isa") = isa;
  m.def("usable_isas", &usable_isas);
  m.def("use_exchange", &use_exchange);
  m.def("multiply_add_rate", [](const py::handle& like, int threads) {
    const DType dtype = dtype_of(tensor(like));
    const py::gil_scoped_release unlocked;
    return multiply_add_rate(dtype, threads);
  });
  m.def("attention_forward", &bind_attention_forward);
  m.def("attention_backward", &bind_attention_backward);
  m.def("layer_norm_forward", &bind_layer_norm_forward);
  m.def("layer_norm_backward", &bind_layer_norm_backward);
  m.def("softmax_forward", &bind_softmax_forward);
  m.def("softmax_backward", &bind_softmax_backward);
}

}  // namespace

PYBIND11_MODULE(_cpu_baseline, m) { bind(m); }
PYBIND11_MODULE(_cpu_avx2, m) { bind(m); }
PYBIND11_MODULE(_cpu_avx512, m) { bind(m); }
PYBIND11_MODULE(_cpu_avx512bf16, m) { bind(m); }
PYBIND11_MODULE(_cpu_neon, m) { bind(m); }
