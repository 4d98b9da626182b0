#include "kernels.h"
namespace fastattn {
void attention_backward(const AttentionParams&, const AttentionGrads&) {}
}
