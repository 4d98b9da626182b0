// From the calls of fastattn/backends/base.py, which are named tuples, to the structs of params.h.
#pragma once
#include <pybind11/pybind11.h>

#include "params.h"
#include "tensor.h"

namespace fastattn {

// A field of a tuple whose length has been checked.
inline py::handle field(const py::handle& t, Py_ssize_t i) { return PyTuple_GET_ITEM(t.ptr(), i); }

inline void expect_tuple(const py::handle& t, Py_ssize_t size, const char* name) {
  if (!PyTuple_Check(t.ptr()) || PyTuple_GET_SIZE(t.ptr()) != size)
    throw py::value_error(std::string(name) + ": expected a tuple of " + std::to_string(size));
}

inline int64_t integer(const py::handle& h) {
  const long long i = PyLong_AsLongLong(h.ptr());
  if (i == -1 && PyErr_Occurred()) throw py::error_already_set();
  return i;
}

inline double number(const py::handle& h) {
  const double x = PyFloat_AsDouble(h.ptr());
  if (x == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return x;
}

inline bool flag(const py::handle& h) { return h.ptr() == Py_True; }

// The probability, and the int64 scalar that is its seed; None: off. A seed on a device is read
// when the kernel runs: the host never waits for it.
inline Dropout dropout(const py::handle& p, const py::handle& seed) {
  Dropout d;
  if (seed.is_none()) return d;
  d.p = number(p);
  const DLTensor t = tensor(seed);
  d.seed_at = reinterpret_cast<const uint64_t*>(t.address());
  if (t.device_type == kCpu) d.seed = *d.seed_at;
  return d;
}

// An AttentionCall, with the results of the forward.
inline AttentionParams attention_params(const py::handle& call, const py::handle& out,
                                        const py::handle& lse, const py::handle& lse_low,
                                        int threads) {
  expect_tuple(call, 14, "AttentionCall");
  const DLTensor q = tensor(field(call, 0)), k = tensor(field(call, 1)), v = tensor(field(call, 2));
  if (q.ndim != 4 || k.ndim != 4 || v.ndim != 4)
    throw py::value_error("q, k, v: expected 4 dimensions");
  AttentionParams p;
  p.dtype = dtype_of(q);
  p.shape = {q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]};
  p.q = view(q);
  p.k = view(k);
  p.v = view(v);
  p.out = view(out);
  p.lse = address(lse);
  p.lse_low = address(lse_low);
  const py::handle bias = field(call, 3);
  p.bias = view(bias);
  p.bias_dtype = bias.is_none() ? DType::kBool : dtype_of(tensor(bias));
  p.alibi_slopes = view(field(call, 4));
  p.sinks = address(field(call, 5));
  p.dropout = dropout(field(call, 12), field(call, 6));
  p.scale = number(field(call, 7));
  p.softcap = number(field(call, 8));
  p.mask = {integer(field(call, 9)), integer(field(call, 10)), integer(field(call, 11))};
  p.threads = threads;
  return p;
}

// dbias is as large as the bias, but for the dimensions along which that was broadcast: there it
// has one, which all of them share.
inline View shared_view(const py::handle& dbias) {
  View v = view(dbias);
  if (v) {
    const DLTensor t = tensor(dbias);
    for (int i = 0; i < t.ndim; ++i)
      if (t.shape[i] == 1) v.stride[i] = 0;
  }
  return v;
}

// outputs: delta, dq, dk, dv, dbias; None where not asked for.
inline AttentionGrads attention_grads(const py::handle& dout, const py::handle& dlse,
                                      const py::handle& outputs) {
  expect_tuple(outputs, 5, "outputs");
  AttentionGrads grads{};
  grads.dout = view(dout);
  grads.dlse = address(dlse);
  grads.delta = address(field(outputs, 0));
  grads.dq = view(field(outputs, 1));
  grads.dk = view(field(outputs, 2));
  grads.dv = view(field(outputs, 3));
  grads.dbias = shared_view(field(outputs, 4));
  return grads;
}

// What rows_of() and columns_of() of fastattn/backends/rows.py give: (sizes, tensors, strides,
// ...).
class Walk {
 public:
  // `sizes` counts rows along three dimensions, and for columns their width and inner size.
  Walk(const py::handle& walk, Py_ssize_t fields, Py_ssize_t sizes) {
    expect_tuple(walk, fields, "walk");
    sizes_ = field(walk, 0);
    tensors_ = field(walk, 1);
    strides_ = field(walk, 2);
    expect_tuple(sizes_, sizes, "sizes");
    expect_tuple(tensors_, PyObject_Size(tensors_.ptr()), "tensors");
    expect_tuple(strides_, PyTuple_GET_SIZE(tensors_.ptr()), "strides");
  }
  int64_t size(Py_ssize_t i) const { return integer(field(sizes_, i)); }
  RowShape rows() const { return {size(0), size(1), size(2)}; }
  // The i-th tensor with the strides it is walked by, or no data where there is none.
  View view(Py_ssize_t i) const {
    View v;
    if (i >= PyTuple_GET_SIZE(tensors_.ptr()) || field(tensors_, i).is_none()) return v;
    const py::handle strides = field(strides_, i);
    if (!PyTuple_Check(strides.ptr()) || PyTuple_GET_SIZE(strides.ptr()) > 4)
      throw py::value_error("strides: expected at most 4");
    v.data = address(field(tensors_, i));
    for (Py_ssize_t d = 0; d < PyTuple_GET_SIZE(strides.ptr()); ++d)
      v.stride[d] = integer(field(strides, d));
    return v;
  }
  DType dtype(Py_ssize_t i) const { return dtype_of(tensor(field(tensors_, i))); }

 private:
  py::handle sizes_, tensors_, strides_;
};

// A LayerNormCall; of what is walked, the first, which is normalised.
inline LayerNormParams layer_norm_params(const py::handle& call, const Walk& walk,
                                         const py::handle& mean, const py::handle& rstd,
                                         int threads) {
  expect_tuple(call, 10, "LayerNormCall");
  const py::handle weight = field(call, 2), bias = field(call, 3);
  LayerNormParams p{};
  p.dtype = walk.dtype(0);
  p.rows = walk.rows();
  p.x = walk.view(0);
  p.width = integer(field(call, 5));
  p.weight = address(weight);
  p.bias = address(bias);
  if (p.weight) p.weight_dtype = dtype_of(tensor(weight));
  if (p.bias) p.bias_dtype = dtype_of(tensor(bias));
  p.mean = address(mean);
  p.rstd = address(rstd);
  p.eps = number(field(call, 6));
  p.rms = flag(field(call, 7));
  p.dropout = dropout(field(call, 8), field(call, 4));
  p.threads = threads;
  return p;
}

// walk: x, residual. outputs: y, new_residual, mean, rstd.
inline LayerNormParams layer_norm_forward_params(const py::handle& call, const py::handle& walk_,
                                                 const py::handle& outputs, int threads) {
  expect_tuple(outputs, 4, "outputs");
  const Walk walk(walk_, 3, 3);
  LayerNormParams p = layer_norm_params(call, walk, field(outputs, 2), field(outputs, 3), threads);
  p.residual = walk.view(1);
  p.y = address(field(outputs, 0));
  p.new_residual = address(field(outputs, 1));
  return p;
}

// walk: source, dy, dnew_residual. outputs: dx, dresidual, dweight, dbias; None where not asked
// for.
inline LayerNormGrads layer_norm_grads(const Walk& walk, const py::handle& outputs) {
  expect_tuple(outputs, 4, "outputs");
  LayerNormGrads grads{};
  grads.dy = walk.view(1);
  grads.dnew_residual = walk.view(2);
  grads.dx = address(field(outputs, 0));
  grads.dresidual = address(field(outputs, 1));
  grads.dweight = address(field(outputs, 2));
  grads.dbias = address(field(outputs, 3));
  return grads;
}

// walk: x, and the mask where there is one, whose inner stride is the walk's last field.
inline SoftmaxParams softmax_params(const py::handle& call, const py::handle& walk_,
                                    const py::handle& y, int threads) {
  expect_tuple(call, 6, "SoftmaxCall");
  const Walk walk(walk_, 4, 5);
  SoftmaxParams p{};
  p.rows = walk.rows();
  p.width = walk.size(3);
  p.inner = walk.size(4);
  p.x = walk.view(0);
  p.x_dtype = walk.dtype(0);
  p.mask = walk.view(1);
  if (p.mask) {
    p.mask_dtype = walk.dtype(1);
    p.mask_inner = integer(field(walk_, 3));
  }
  const DLTensor out = tensor(y);
  p.y = out.address();
  p.y_dtype = dtype_of(out);
  p.scale = number(field(call, 3));
  p.log = flag(field(call, 4));
  p.threads = threads;
  return p;
}

// walk: y, dy.
inline SoftmaxGrads softmax_grads(const py::handle& walk_, double scale, bool log,
                                  const py::handle& dx, int threads) {
  const Walk walk(walk_, 4, 5);
  SoftmaxGrads p{};
  p.rows = walk.rows();
  p.width = walk.size(3);
  p.inner = walk.size(4);
  p.y = walk.view(0);
  p.y_dtype = walk.dtype(0);
  p.dy = walk.view(1);
  const DLTensor out = tensor(dx);
  p.dx = out.address();
  p.x_dtype = dtype_of(out);
  p.scale = scale;
  p.log = log;
  p.threads = threads;
  return p;
}

}  // namespace fastattn
