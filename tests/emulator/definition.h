// Attention as it is defined, in float64, a row of queries at a time. Compiled without sanitizers,
// which have nothing to watch there and take long.
#pragma once
#include "mask.h"

namespace fastattn {

struct DefinedRow {
  const double *q, *k, *v, *dout;  // k and v of its head
  double scale, dlse;
  KeyRange seen;
  int d;
  // Of a row with variants; what is null or 0 there is not.
  double softcap = 0, sink_weight = 0;  // exp(sink)
  const double *add = nullptr, *keep = nullptr;
  double* dbias = nullptr;

  // Returns lse and adds to the results, of which dk and dv are those of the head; logit and dp are
  // room for a number of each key.
  double define(double* logit, double* dp, double* out, double* dq, double* dk, double* dv) const;
};

}  // namespace fastattn
