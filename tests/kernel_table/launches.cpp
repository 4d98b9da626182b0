// Prints what the sources know of each kernel's launch and its code does not say: threads of a
// block and bytes of dynamic shared memory. Compiled by the host's compiler.
#include <cstdio>

#include "attention_backward_sm90.h"
#include "attention_forward_sm90.h"
#include "head_dims.h"
#include "softmax.h"

using namespace fastattn;

namespace {

void print(const char* kernel, int head_dim, const char* more, int threads, size_t bytes) {
  std::printf("%s/%d%s %d %zu\n", kernel, head_dim, more, threads, bytes);
}

template <int kHeadDim>
void print_attention() {
  print("attention_forward", kHeadDim, "", kAttentionThreads,
        ForwardShape<kHeadDim, false>::kBytes);
  print("attention_forward", kHeadDim, "/modified", kAttentionThreads,
        ForwardShape<kHeadDim, true>::kBytes);
  using Backward = BackwardShape<kHeadDim>;
  print("attention_rows", kHeadDim, "", kAttentionThreads, Backward::kRowBytes);
  for (const char* name : {"attention_dq", "attention_dkdv"}) {
    print(name, kHeadDim, "", kAttentionThreads, Backward::kBytes);
    print(name, kHeadDim, "/modified", kAttentionThreads, Backward::kBytes);
  }
  print("attention_dbias", kHeadDim, "", kAttentionThreads, Backward::kBiasBytes);
}

template <int kHeadDim, int kKeys>
void print_sm90() {
  using Shape = Sm90Shape<kHeadDim, kKeys>;
  std::printf("attention_forward_sm90/%d/%d %d %zu\n", kHeadDim, kKeys, Shape::kThreads,
              Shape::kBytes);
}

template <int kHeadDim, bool kOfKeys>
void print_sm90_backward() {
  using Shape = Sm90BackwardShape<kHeadDim, kOfKeys>;
  print(kOfKeys ? "attention_dkdv_sm90" : "attention_dq_sm90", kHeadDim, "", Shape::kThreads,
        Shape::kBytes);
}

template <typename T>
void print_rows(const char* kernel, const char* type, int pack_bytes, int max_threads) {
  constexpr size_t kShared = 227 << 10;
  for (int64_t width : {32 * kPack<T>, 4 * max_threads * kPack<T>, 6 * max_threads * kPack<T>}) {
    const RowPlan plan = row_plan(width, kPack<T>, pack_bytes, kShared, max_threads, 1);
    std::printf("%s/%s/%d %d %zu\n", kernel, type, plan.held, plan.threads * plan.groups,
                plan.bytes);
  }
}

template <typename T>
void print_rows(const char* type) {
  print_rows<T>("layer_norm_forward", type, 16, 512);
  print_rows<T>("layer_norm_backward", type, 32, 256);
  print_rows<T>("softmax_forward", type, 4 * kPack<T>, 256);
  print_rows<T>("softmax_backward", type, 32, 256);
  const RowPlan with_sums =
      row_plan(6 * 256 * kPack<T>, kPack<T>, 32 + 8 * kPack<T>, 227 << 10, 256, 1);
  std::printf("layer_norm_backward/%s/0/sums %d %zu\n", type, with_sums.threads, with_sums.bytes);
}

}  // namespace

int main() {
#define FASTATTN_PRINT(n) print_attention<n>();
  FASTATTN_HEAD_DIMS(FASTATTN_PRINT)
  print_sm90<64, Sm90Keys<64>::kFull>();
  print_sm90<128, Sm90Keys<128>::kFull>();
  print_sm90<128, Sm90Keys<128>::kMasked>();
  print_sm90<256, Sm90Keys<256>::kFull>();
  print_sm90_backward<64, false>();
  print_sm90_backward<64, true>();
  print_sm90_backward<128, false>();
  print_sm90_backward<128, true>();
  print_rows<bf16>("bf16");
  print_rows<f16>("f16");
  print_rows<float>("f32");
  // Of one size, whatever the call.
  std::printf("attention_merge %d 0\n", kAttentionThreads);
  std::printf("layer_norm_weights 128 0\n");
  std::printf("layer_norm_reduce 256 2048\n");
  for (const char* name : {"softmax_forward", "softmax_backward"})
    std::printf("%s_columns %d %zu\n", name, kColumns * kLines, kColumnBytes);
}
