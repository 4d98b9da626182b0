// The binding of the CUDA kernels; with FASTATTN_EMULATE, of the same kernels in the emulator of
// the tests. The callers have checked everything, and allocated what is written.
#include <pybind11/pybind11.h>

#include "bind.h"
#include "kernels.h"

#ifdef FASTATTN_EMULATE
#include <pybind11/stl.h>

#include "emulator.h"
#else
#include "status.h"
#endif

namespace py = pybind11;
using namespace fastattn;

namespace {

#ifdef FASTATTN_EMULATE

// Few multiprocessors and blocks, so that the small problems of the tests make blocks walk.
Device small_device() {
  Device d;
  d.shared_bytes = 227 << 10;
  d.multiprocessors = 3;
  d.max_blocks = 24;
  return d;
}
Device emulated = small_device();

Device limits_of(int) { return emulated; }

struct On {
  explicit On(const DLTensor&) {}
  Device device = limits_of(0);
};

#else

Device limits_of(int device) {
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    return value;
  };
  Device d;
  d.shared_bytes = size_t(ask(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  d.multiprocessors = ask(cudaDevAttrMultiProcessorCount);
  d.capability =
      10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor);
  return d;
}

// The device of a tensor, current for as long as this lives, and torch's stream of it.
class On {
 public:
  explicit On(const DLTensor& t) : device(limits_of(t.device_id)), here_(t.device_id) {
    if (exchange->current_stream(t.device_type, here_, &device.stream.handle) != 0)
      throw py::error_already_set();
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (here_ != before_) check(cudaSetDevice(here_), "cudaSetDevice");
  }
  ~On() {
    if (here_ != before_) cudaSetDevice(before_);
  }
  On(const On&) = delete;

  Device device;

 private:
  int here_, before_ = 0;
};

#endif

On device_of(const py::handle& call) { return On(tensor(field(call, 0))); }

float* floats(const py::handle& workspace) { return static_cast<float*>(address(workspace)); }

// ---- attention ---------------------------------------------------------------------------------

// (parts, floats of workspace)
py::tuple bind_forward_plan(const py::handle& call, const py::handle& out, const py::handle& lse) {
  const On on = device_of(call);
  const AttentionParams p = attention_params(call, out, lse, py::none(), 1);
  const ForwardPlan plan = attention_forward_plan(p, on.device);
  return py::make_tuple(plan.parts, plan.workspace_floats);
}

void bind_attention_forward(const py::handle& call, const py::handle& out, const py::handle& lse,
                            int parts, const py::handle& workspace) {
  const On on = device_of(call);
  const AttentionParams p = attention_params(call, out, lse, py::none(), 1);
  ForwardPlan plan;
  plan.parts = parts;
  float* space = floats(workspace);
  const py::gil_scoped_release unlocked;
  attention_forward(p, plan, space, on.device);
}

// results: out, lse of the forward. workspace: (4, batch, q_heads, q_len) float32.
void bind_attention_backward(const py::handle& call, const py::handle& results,
                             const py::handle& dout, const py::handle& dlse,
                             const py::handle& outputs, const py::handle& workspace) {
  expect_tuple(results, 2, "results");
  const On on = device_of(call);
  const AttentionParams p =
      attention_params(call, field(results, 0), field(results, 1), py::none(), 1);
  const AttentionGrads grads = attention_grads(dout, dlse, outputs);
  float* space = floats(workspace);
  const py::gil_scoped_release unlocked;
  attention_backward(p, grads, space, on.device);
}

// ---- layer norm and softmax --------------------------------------------------------------------

void bind_layer_norm_forward(const py::handle& call, const py::handle& walk,
                             const py::handle& outputs) {
  const On on = device_of(call);
  const LayerNormParams p = layer_norm_forward_params(call, walk, outputs, 1);
  const py::gil_scoped_release unlocked;
  layer_norm_forward(p, on.device);
}

// partials: (partial rows, 2, width) float32.
void bind_layer_norm_backward(const py::handle& call, const py::handle& walk_,
                              const py::handle& mean, const py::handle& rstd,
                              const py::handle& outputs, const py::handle& partials) {
  const On on = device_of(call);
  const Walk walk(walk_, 3, 3);
  const LayerNormParams p = layer_norm_params(call, walk, mean, rstd, 1);
  const LayerNormGrads grads = layer_norm_grads(walk, outputs);
  const DLTensor sums = tensor(partials);
  const int64_t partial_rows = sums.shape[0];
  auto* space = reinterpret_cast<float*>(sums.address());
  const py::gil_scoped_release unlocked;
  layer_norm_backward(p, grads, space, partial_rows, on.device);
}

void bind_softmax_forward(const py::handle& call, const py::handle& walk, const py::handle& y) {
  const On on = device_of(call);
  const SoftmaxParams p = softmax_params(call, walk, y, 1);
  const py::gil_scoped_release unlocked;
  softmax_forward(p, on.device);
}

void bind_softmax_backward(const py::handle& walk, double scale, bool log, const py::handle& dx) {
  const On on(tensor(dx));
  const SoftmaxGrads p = softmax_grads(walk, scale, log, dx, 1);
  const py::gil_scoped_release unlocked;
  softmax_backward(p, on.device);
}

void bind(py::module_& m) {
  m.doc() = "fastattn CUDA kernels.";
  m.def("use_exchange", &use_exchange);
  // (shared memory that a block may have, multiprocessors, compute capability as 90)
  m.def("limits", [](int device) {
    const Device d = limits_of(device);
    return py::make_tuple(d.shared_bytes, d.multiprocessors, d.capability);
  });
  m.def("attention_shared_bytes", &attention_shared_bytes);
  m.def("attention_forward_plan", &bind_forward_plan);
  m.def("attention_forward", &bind_attention_forward);
  m.def("attention_backward", &bind_attention_backward);
  m.def("layer_norm_forward", &bind_layer_norm_forward);
  m.def("layer_norm_backward", &bind_layer_norm_backward);
  m.def("softmax_forward", &bind_softmax_forward);
  m.def("softmax_backward", &bind_softmax_backward);
}

}  // namespace

#ifdef FASTATTN_EMULATE
PYBIND11_MODULE(_cuda_emulated, m) {
  bind(m);
  m.def(
      "emulate",
      [](int capability, size_t shared_bytes) {
        emulated.capability = capability;
        emulated.shared_bytes = shared_bytes;
      },
      py::arg("capability"), py::arg("shared_bytes") = 227 << 10);
  m.def("take_bank_conflicts", &emulator::take_bank_conflicts);
  m.def("take_rare", &emulator::take_rare);
  m.def("take_launches", &emulator::take_launches);
}
#else
PYBIND11_MODULE(_cuda, m) { bind(m); }
#endif
