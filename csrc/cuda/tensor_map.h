// Tensor maps: how q, k and v lie in memory, for the unit that copies tiles of them.
#pragma once
#include "launch.h"
#include "params.h"
#include "ptx_sm90.h"

namespace fastattn {

// (columns, rows, heads, batch), of 16-bit numbers.
struct TensorShape {
  int64_t size[4];
};

// Whether a map can describe it: rows of whole 16 bytes, at multiples of 16 bytes.
inline bool has_tensor_map(const View& v, const TensorShape& shape) {
  if ((reinterpret_cast<uintptr_t>(v.data) & 15) != 0 || v.stride[3] != 1 || shape.size[0] % 8)
    return false;
  for (int i = 0; i < 3; ++i) {
    const int64_t step = v.stride[2 - i] * 2, size = shape.size[i + 1];
    if (size > 1 && (step <= 0 || step % 16 || step >= int64_t(1) << 40)) return false;
  }
  return true;
}

// Boxes of `rows` rows of one panel.
inline TensorMap tensor_map_of(const char* name, const View& v, const TensorShape& shape,
                               DType dtype, int rows) {
  uint64_t size[4], step[3];
  for (int i = 0; i < 4; ++i) size[i] = uint64_t(shape.size[i]);
  for (int i = 0; i < 3; ++i)  // the step of a dimension of one is never taken, but has rules
    step[i] = shape.size[i + 1] > 1 ? uint64_t(v.stride[2 - i]) * 2 : 16;
  const uint32_t box[4] = {uint32_t(kPanelColumns), uint32_t(rows), 1, 1};
#ifdef FASTATTN_EMULATE
  (void)dtype;
  return emulator::make_tensor_map(name, v.data, size, step, box);
#else
  // The driver's library is not linked, so that the module imports where there is none.
  using Encode =
      CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                   const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                   CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                           cudaEnableDefault, &status),
          "cuTensorMapEncodeTiled");
    if (status != cudaDriverEntryPointSuccess || !found)
      throw std::runtime_error("cuTensorMapEncodeTiled: the driver has none (12.0 or newer does)");
    return reinterpret_cast<Encode>(found);
  }();
  const uint32_t every[4] = {1, 1, 1, 1};
  cuuint64_t sizes[4], steps[3];
  for (int i = 0; i < 4; ++i) sizes[i] = size[i];
  for (int i = 0; i < 3; ++i) steps[i] = step[i];
  CUtensorMap map;
  const CUresult done = encode(&map,
                               dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                         : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                               4, v.data, sizes, steps, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (done != CUDA_SUCCESS)
    throw std::runtime_error(std::string(name) + ": no tensor map, driver error " +
                             std::to_string(int(done)));
  return map;
#endif
}

}  // namespace fastattn
