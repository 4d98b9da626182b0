// From Python arguments to the structs of params.h. A tensor comes as (address, stride, stride,
// ...): no torch type crosses the border, so one build serves every version of torch.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "params.h"

namespace fastattn {

namespace py = pybind11;

template <size_t N>
inline void int_tuple(const py::tuple& t, const char* name, int64_t (&out)[N]) {
  if (t.size() != N)
    throw py::value_error(std::string(name) + ": expected " + std::to_string(N) + " numbers, got " +
                          std::to_string(t.size()));
  for (size_t i = 0; i < N; ++i) {
    out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(t.ptr(), Py_ssize_t(i)));
    if (out[i] == -1 && PyErr_Occurred()) throw py::error_already_set();
  }
}

inline void* address(const py::handle& h) {
  void* p = PyLong_AsVoidPtr(h.ptr());
  if (!p && PyErr_Occurred()) throw py::error_already_set();
  return p;
}

inline void* pointer(int64_t address) { return reinterpret_cast<void*>(intptr_t(address)); }

// (address, strides...), up to four strides, or None.
inline View view(const py::object& o) {
  View v;
  if (o.is_none()) return v;
  const auto t = py::reinterpret_borrow<py::tuple>(o);
  if (!PyTuple_Check(o.ptr()) || t.size() < 1 || t.size() > 5)
    throw py::value_error("view: expected (address, up to 4 strides)");
  v.data = address(t[0]);
  for (size_t i = 1; i < t.size(); ++i) {
    v.stride[i - 1] = PyLong_AsLongLong(PyTuple_GET_ITEM(t.ptr(), Py_ssize_t(i)));
    if (v.stride[i - 1] == -1 && PyErr_Occurred()) throw py::error_already_set();
  }
  return v;
}

// (p, seed), or None.
inline Dropout dropout(const py::object& o) {
  Dropout d;
  if (o.is_none()) return d;
  const auto t = o.cast<py::tuple>();
  d.p = t[0].cast<double>();
  d.seed = PyLong_AsUnsignedLongLongMask(PyTuple_GET_ITEM(t.ptr(), 1));
  if (d.seed == uint64_t(-1) && PyErr_Occurred()) throw py::error_already_set();
  return d;
}

// The tuple that fastattn/backends/cpu.py makes of an AttentionCall.
inline AttentionParams attention_params(const py::tuple& t) {
  if (t.size() != 16) throw py::value_error("attention: expected 16 fields");
  AttentionParams p;
  p.dtype = static_cast<DType>(t[0].cast<int>());
  int64_t n[7], mask[3];
  int_tuple(t[1].cast<py::tuple>(), "shape", n);
  p.shape = {n[0], n[1], n[2], n[3], n[4], n[5], n[6]};
  p.q = view(t[2]);
  p.k = view(t[3]);
  p.v = view(t[4]);
  p.out = view(t[5]);
  p.lse = address(t[6]);
  p.lse_low = address(t[7]);
  p.bias = view(t[8]);
  p.bias_dtype = static_cast<DType>(t[9].cast<int>());
  p.alibi_slopes = view(t[10]);
  p.sinks = address(t[11]);
  const auto score = t[12].cast<py::tuple>();
  p.scale = score[0].cast<double>();
  p.softcap = score[1].cast<double>();
  int_tuple(t[13].cast<py::tuple>(), "mask", mask);
  p.mask.left = mask[0];
  p.mask.right = mask[1];
  p.mask.shift = mask[2];
  p.dropout = dropout(t[14]);
  p.threads = t[15].cast<int>();
  return p;
}

// (dout, dlse, delta, dq, dk, dv, dbias): views, but for the addresses dlse and delta.
inline AttentionGrads attention_grads(const py::tuple& t) {
  if (t.size() != 7) throw py::value_error("attention: expected 7 gradients");
  return {view(t[0]), address(t[1]), address(t[2]), view(t[3]), view(t[4]), view(t[5]), view(t[6])};
}

}  // namespace fastattn
