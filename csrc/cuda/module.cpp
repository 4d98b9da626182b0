// The binding of the CUDA kernels; with FASTATTN_EMULATE, of the same kernels in the emulator of
// the tests. Addresses in; the callers have checked everything.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind.h"
#include "kernels.h"

namespace py = pybind11;
using namespace fastattn;

namespace {

// (shared memory of a block, stream, compute capability as 80, multiprocessors)
Device device_of(const py::tuple& t) {
  Device d;
  d.shared_bytes = t[0].cast<size_t>();
  d.stream.handle = address(t[1]);
  d.capability = t[2].cast<int>();
  d.multiprocessors = t[3].cast<int>();
  return d;
}

// (p, address of the seed), or None.
Dropout device_dropout(const py::object& o) {
  Dropout d;
  if (o.is_none()) return d;
  const auto t = o.cast<py::tuple>();
  d.p = t[0].cast<double>();
  d.seed_at = static_cast<const uint64_t*>(address(t[1]));
  return d;
}

AttentionParams attention_call(py::tuple problem) {
  const py::object dropped = problem[14];
  py::list fields(problem);
  fields[14] = py::none();
  AttentionParams p = attention_params(py::tuple(fields));
  p.dropout = device_dropout(dropped);
  return p;
}

// (parts, floats of workspace)
py::tuple bind_forward_plan(const py::tuple& problem, int multiprocessors, int capability) {
  const ForwardPlan plan =
      attention_forward_plan(attention_call(problem), multiprocessors, capability);
  return py::make_tuple(plan.parts, plan.workspace_floats);
}

void bind_attention_forward(const py::tuple& problem, int parts, const py::object& workspace,
                            const py::tuple& device) {
  const AttentionParams p = attention_call(problem);
  ForwardPlan plan;
  plan.parts = parts;
  auto* floats = static_cast<float*>(address(workspace));
  const Device d = device_of(device);
  const py::gil_scoped_release release;
  attention_forward(p, plan, floats, d);
}

int64_t bind_backward_floats(const py::tuple& problem) {
  return attention_backward_floats(attention_call(problem));
}

void bind_attention_backward(const py::tuple& problem, const py::tuple& grads,
                             const py::object& workspace, const py::tuple& device) {
  const AttentionParams p = attention_call(problem);
  const AttentionGrads g = attention_grads(grads);
  auto* floats = static_cast<float*>(address(workspace));
  const Device d = device_of(device);
  const py::gil_scoped_release release;
  attention_backward(p, g, floats, d);
}

// sizes: n0, n1, n2 (the rows), width, dtype, weight_dtype, bias_dtype, rms.
// addresses: weight, bias, mean, rstd; 0 for none.
LayerNormParams layer_norm_call(const py::tuple& sizes, const py::object& x,
                                const py::object& residual, const py::tuple& addresses, double eps,
                                const py::object& dropped) {
  int64_t n[8], a[4];
  int_tuple(sizes, "sizes", n);
  int_tuple(addresses, "addresses", a);
  LayerNormParams p{};
  p.rows = {n[0], n[1], n[2]};
  p.width = n[3];
  p.dtype = DType(n[4]);
  p.weight_dtype = DType(n[5]);
  p.bias_dtype = DType(n[6]);
  p.rms = n[7] != 0;
  p.x = view(x);
  p.residual = view(residual);
  p.weight = pointer(a[0]);
  p.bias = pointer(a[1]);
  p.mean = pointer(a[2]);
  p.rstd = pointer(a[3]);
  p.eps = eps;
  p.dropout = device_dropout(dropped);
  return p;
}

void bind_layer_norm_forward(const py::tuple& sizes, const py::object& x,
                             const py::object& residual, const py::tuple& addresses, double eps,
                             const py::object& dropped, const py::tuple& outputs,
                             const py::tuple& device) {
  LayerNormParams p = layer_norm_call(sizes, x, residual, addresses, eps, dropped);
  int64_t out[2];
  int_tuple(outputs, "outputs", out);
  p.y = pointer(out[0]);
  p.new_residual = pointer(out[1]);
  const Device d = device_of(device);
  const py::gil_scoped_release release;
  layer_norm_forward(p, d);
}

// outputs: dx, dresidual, dweight, dbias; 0 where not asked for. partials: address, rows.
void bind_layer_norm_backward(const py::tuple& sizes, const py::object& x,
                              const py::tuple& addresses, double eps, const py::object& dropped,
                              const py::object& dy, const py::object& dnew_residual,
                              const py::tuple& outputs, const py::tuple& partials,
                              const py::tuple& device) {
  const LayerNormParams p = layer_norm_call(sizes, x, py::none(), addresses, eps, dropped);
  int64_t out[4], sums[2];
  int_tuple(outputs, "outputs", out);
  int_tuple(partials, "partials", sums);
  LayerNormGrads grads{};
  grads.dy = view(dy);
  grads.dnew_residual = view(dnew_residual);
  grads.dx = pointer(out[0]);
  grads.dresidual = pointer(out[1]);
  grads.dweight = pointer(out[2]);
  grads.dbias = pointer(out[3]);
  const Device d = device_of(device);
  const py::gil_scoped_release release;
  layer_norm_backward(p, grads, static_cast<float*>(pointer(sums[0])), sums[1], d);
}

// sizes: n0, n1, n2, width, inner, x_dtype, y_dtype, log. mask: (view, dtype, inner stride) or
// None.
void bind_softmax_forward(const py::tuple& sizes, const py::object& x, const py::object& mask,
                          double scale, int64_t y, const py::tuple& device) {
  int64_t n[8];
  int_tuple(sizes, "sizes", n);
  SoftmaxParams p{};
  p.rows = {n[0], n[1], n[2]};
  p.width = n[3];
  p.inner = n[4];
  p.x_dtype = DType(n[5]);
  p.y_dtype = DType(n[6]);
  p.log = n[7] != 0;
  p.x = view(x);
  if (!mask.is_none()) {
    const auto t = mask.cast<py::tuple>();
    p.mask = view(t[0]);
    p.mask_dtype = DType(t[1].cast<int>());
    p.mask_inner = t[2].cast<int64_t>();
  }
  p.scale = scale;
  p.y = pointer(y);
  const Device d = device_of(device);
  const py::gil_scoped_release release;
  softmax_forward(p, d);
}

void bind_softmax_backward(const py::tuple& sizes, const py::object& y, const py::object& dy,
                           double scale, int64_t dx, const py::tuple& device) {
  int64_t n[8];
  int_tuple(sizes, "sizes", n);
  SoftmaxGrads g{};
  g.rows = {n[0], n[1], n[2]};
  g.width = n[3];
  g.inner = n[4];
  g.x_dtype = DType(n[5]);
  g.y_dtype = DType(n[6]);
  g.log = n[7] != 0;
  g.y = view(y);
  g.dy = view(dy);
  g.scale = scale;
  g.dx = pointer(dx);
  const Device d = device_of(device);
  const py::gil_scoped_release release;
  softmax_backward(g, d);
}

}  // namespace

#ifdef FASTATTN_EMULATE
#define FASTATTN_MODULE _cuda_emulated
#else
#define FASTATTN_MODULE _cuda
#endif

PYBIND11_MODULE(FASTATTN_MODULE, m) {
  m.def("attention_shared_bytes", &attention_shared_bytes);
  m.def("attention_forward_plan", &bind_forward_plan);
  m.def("attention_forward", &bind_attention_forward);
  m.def("attention_backward_floats", &bind_backward_floats);
  m.def("attention_backward", &bind_attention_backward);
  m.def("layer_norm_forward", &bind_layer_norm_forward);
  m.def("layer_norm_backward", &bind_layer_norm_backward);
  m.def("softmax_forward", &bind_softmax_forward);
  m.def("softmax_backward", &bind_softmax_backward);
#ifdef FASTATTN_EMULATE
  m.attr("EMULATED") = true;
  m.def("set_options", [](const std::string& completion, uint64_t seed) {
    using emulator::Completion;
    emulator::set_options({completion == "eager"    ? Completion::kEager
                           : completion == "random" ? Completion::kRandom
                                                    : Completion::kLazy,
                           seed});
  });
  m.def("take_bank_conflicts", &emulator::take_bank_conflicts);
  m.def("take_rare", &emulator::take_rare);
  m.def("take_launches", &emulator::take_launches);
#else
  m.attr("EMULATED") = false;
#endif
}
