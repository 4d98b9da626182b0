// The binding, compiled once for any processor of the architecture and linked into every module:
// _cpu_baseline, _cpu_avx2, ... (setup.py). Raw addresses in; the callers have checked everything.
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

// ---- layer norm and softmax
// ----------------------------------------------------------------------

// sizes: n0, n1, n2 (the rows), width, dtype, weight_dtype, bias_dtype, rms, threads.
// addresses: weight, bias, mean, rstd; 0 for none.
LayerNormParams layer_norm_params(const py::tuple& sizes, const py::object& x,
                                  const py::object& residual, const py::tuple& addresses,
                                  double eps, const py::object& dropped) {
  int64_t n[9], a[4];
  int_tuple(sizes, "sizes", n);
  int_tuple(addresses, "addresses", a);
  LayerNormParams p{};
  p.rows = {n[0], n[1], n[2]};
  p.width = n[3];
  p.dtype = DType(n[4]);
  p.weight_dtype = DType(n[5]);
  p.bias_dtype = DType(n[6]);
  p.rms = n[7] != 0;
  p.threads = int(n[8]);
  p.x = view(x);
  p.residual = view(residual);
  p.weight = pointer(a[0]);
  p.bias = pointer(a[1]);
  p.mean = pointer(a[2]);
  p.rstd = pointer(a[3]);
  p.eps = eps;
  p.dropout = dropout(dropped);
  return p;
}

// outputs: y, new_residual.
void bind_layer_norm_forward(const py::tuple& sizes, const py::object& x,
                             const py::object& residual, const py::tuple& addresses, double eps,
                             const py::object& dropped, const py::tuple& outputs) {
  LayerNormParams p = layer_norm_params(sizes, x, residual, addresses, eps, dropped);
  int64_t out[2];
  int_tuple(outputs, "outputs", out);
  p.y = pointer(out[0]);
  p.new_residual = pointer(out[1]);
  const py::gil_scoped_release release;
  layer_norm_forward(p);
}

// outputs: dx, dresidual, dweight, dbias; 0 where not asked for.
void bind_layer_norm_backward(const py::tuple& sizes, const py::object& x,
                              const py::tuple& addresses, double eps, const py::object& dropped,
                              const py::object& dy, const py::object& dnew_residual,
                              const py::tuple& outputs) {
  const LayerNormParams p = layer_norm_params(sizes, x, py::none(), addresses, eps, dropped);
  int64_t out[4];
  int_tuple(outputs, "outputs", out);
  LayerNormGrads grads{};
  grads.dy = view(dy);
  grads.dnew_residual = view(dnew_residual);
  grads.dx = pointer(out[0]);
  grads.dresidual = pointer(out[1]);
  grads.dweight = pointer(out[2]);
  grads.dbias = pointer(out[3]);
  const py::gil_scoped_release release;
  layer_norm_backward(p, grads);
}

// sizes: n0, n1, n2 (the rows), width, inner, x dtype, y dtype, log, threads.
// mask: (view, dtype, inner stride), or None.
void bind_softmax_forward(const py::tuple& sizes, const py::object& x, const py::object& mask,
                          double scale, const py::object& y) {
  int64_t n[9];
  int_tuple(sizes, "sizes", n);
  SoftmaxParams p{};
  p.rows = {n[0], n[1], n[2]};
  p.width = n[3];
  p.inner = n[4];
  p.x_dtype = DType(n[5]);
  p.y_dtype = DType(n[6]);
  p.log = n[7] != 0;
  p.threads = int(n[8]);
  p.x = view(x);
  if (!mask.is_none()) {
    const auto t = mask.cast<py::tuple>();
    p.mask = view(t[0]);
    p.mask_dtype = DType(t[1].cast<int>());
    p.mask_inner = t[2].cast<int64_t>();
  }
  p.scale = scale;
  p.y = address(y);
  const py::gil_scoped_release release;
  softmax_forward(p);
}

// sizes as in the forward.
void bind_softmax_backward(const py::tuple& sizes, const py::object& y, const py::object& dy,
                           double scale, const py::object& dx) {
  int64_t n[9];
  int_tuple(sizes, "sizes", n);
  SoftmaxGrads p{};
  p.rows = {n[0], n[1], n[2]};
  p.width = n[3];
  p.inner = n[4];
  p.x_dtype = DType(n[5]);
  p.y_dtype = DType(n[6]);
  p.log = n[7] != 0;
  p.threads = int(n[8]);
  p.y = view(y);
  p.dy = view(dy);
  p.scale = scale;
  p.dx = address(dx);
  const py::gil_scoped_release release;
  softmax_backward(p);
}

void bind(py::module_& m) {
  m.doc() = "fastattn CPU kernels for one instruction set.";
  m.attr("isa") = isa;
  m.def("usable_isas", &usable_isas);
  m.def("attention_forward", [](const py::tuple& problem) {
    const AttentionParams p = attention_params(problem);
    const py::gil_scoped_release unlocked;
    attention_forward(p);
  });
  m.def("attention_backward", [](const py::tuple& problem, const py::tuple& gradients) {
    const AttentionParams p = attention_params(problem);
    const AttentionGrads g = attention_grads(gradients);
    const py::gil_scoped_release unlocked;
    attention_backward(p, g);
  });
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
