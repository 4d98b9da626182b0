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
  avx2 = (os & 6) == 6 && (a[2] >> 12 & 1) && (a[2] >> 29 & 1) && (b[1] >> 5 & 1) && (b[1] >> 8 & 1);
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

void bind(py::module_& m) {
  m.doc() = "fastattn CPU kernels for one instruction set.";
  m.attr("isa") = isa;
  m.def("usable_isas", &usable_isas);
  m.def("attention_forward", [](const py::tuple& problem) {
    const AttentionParams p = attention_params(problem);
    const py::gil_scoped_release unlocked;
    attention_forward(p);
  });
}

}  // namespace

PYBIND11_MODULE(_cpu_baseline, m) { bind(m); }
PYBIND11_MODULE(_cpu_avx2, m) { bind(m); }
PYBIND11_MODULE(_cpu_avx512, m) { bind(m); }
PYBIND11_MODULE(_cpu_avx512bf16, m) { bind(m); }
PYBIND11_MODULE(_cpu_neon, m) { bind(m); }
