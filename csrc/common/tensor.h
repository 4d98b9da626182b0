// What a torch tensor is, seen from C++: DLPack's C exchange interface (dmlc/dlpack 1.3), which
// torch offers as torch.Tensor.__dlpack_c_exchange_api__. It is a stable C ABI, so that one build
// serves every version of torch, and it costs 50 ns a tensor, where Python takes that for each of
// data_ptr(), shape and stride().
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "params.h"

namespace fastattn {

namespace py = pybind11;

// The layout of DLPack's structs, as far as they are used here.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t *shape, *strides;  // of the tensor: to be read before anything else happens to it
  uint64_t byte_offset;

  char* address() const { return static_cast<char*>(data) + byte_offset; }
};

constexpr int32_t kCpu = 1;  // of device_type

struct DLExchange {
  uint32_t major_version, minor_version;
  void* previous;
  void* unused[3];  // allocate; export with ownership; import
  int (*view)(void* object, DLTensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

inline const DLExchange* exchange = nullptr;

// To be called with torch.Tensor.__dlpack_c_exchange_api__ before anything else.
inline void use_exchange(const py::capsule& capsule) {
  const auto* offered =
      static_cast<const DLExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!offered) throw py::error_already_set();
  if (offered->major_version != 1 || !offered->view)
    throw py::import_error("torch offers another version of DLPack's exchange interface than 1");
  exchange = offered;
}

inline DLTensor tensor(PyObject* object) {
  DLTensor t;
  if (exchange->view(object, &t) != 0) throw py::error_already_set();
  return t;
}
inline DLTensor tensor(const py::handle& object) { return tensor(object.ptr()); }

inline DType dtype_of(const DLTensor& t) {
  switch (t.type_code << 8 | t.type_bits) {
    case 2 << 8 | 32:
      return DType::kFloat32;
    case 2 << 8 | 64:
      return DType::kFloat64;
    case 4 << 8 | 16:
      return DType::kBFloat16;
    case 2 << 8 | 16:
      return DType::kFloat16;
    case 6 << 8 | 8:
      return DType::kBool;
    default:
      throw py::type_error("expected a tensor of a floating dtype or bool");
  }
}

// The address of a tensor's first number, or null for None.
inline void* address(const py::handle& object) {
  return object.is_none() ? nullptr : tensor(object).address();
}

// A tensor of at most four dimensions with its strides; None is a View without data.
inline View view(const DLTensor& t) {
  if (t.ndim > 4) throw py::value_error("expected a tensor of at most 4 dimensions");
  View v;
  v.data = t.address();
  for (int i = 0; i < t.ndim; ++i) v.stride[i] = t.strides[i];
  return v;
}
inline View view(const py::handle& object) {
  return object.is_none() ? View() : view(tensor(object));
}

}  // namespace fastattn
