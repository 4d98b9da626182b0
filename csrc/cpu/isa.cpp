#include "kernels.h"

namespace fastattn {
const char* const isa = FASTATTN_ISA;
}
