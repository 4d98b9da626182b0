// From Python arguments to the structs of params.h. A tensor comes as (address, stride, stride, ...):
// no torch type crosses the border, so one build serves every version of torch.
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

}  // namespace fastattn
