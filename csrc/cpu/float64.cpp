// The kernels in float64, an object of their own: a third of what there is to compile, it serves
// all instruction sets from AVX2 on (setup.py).
#define FASTATTN_FLOAT64
#include "attention_backward.cpp"
#include "attention_forward.cpp"
#include "isa.cpp"
#include "layer_norm.cpp"
#include "softmax.cpp"
