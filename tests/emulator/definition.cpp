#include "definition.h"

#include <cmath>

namespace fastattn {

double DefinedRow::define(double* logit, double* dp, double* out, double* dq, double* dk,
                          double* dv) const {
  const auto kept = [&](int64_t j) { return keep ? keep[j] : 1; };
  double total = sink_weight, dot = 0;
  for (int64_t j = seen.begin; j < seen.end; ++j) {
    logit[j] = dp[j] = 0;
    for (int c = 0; c < d; ++c) {
      logit[j] += scale * q[c] * k[j * d + c];
      dp[j] += kept(j) * dout[c] * v[j * d + c];
    }
    if (softcap != 0) logit[j] = softcap * std::tanh(logit[j] / softcap);
    total += std::exp(logit[j] + (add ? add[j] : 0));
  }
  const auto probability = [&](int64_t j) {
    return std::exp(logit[j] + (add ? add[j] : 0)) / total;
  };
  for (int64_t j = seen.begin; j < seen.end; ++j) dot += probability(j) * dp[j];
  for (int64_t j = seen.begin; j < seen.end; ++j) {
    const double p = probability(j), dlogit = p * (dp[j] - dot + dlse);
    const double tanh = softcap != 0 ? logit[j] / softcap : 0;
    const double ds = scale * dlogit * (1 - tanh * tanh);
    if (dbias) dbias[j] += dlogit;
    for (int c = 0; c < d; ++c) {
      out[c] += p * kept(j) * v[j * d + c];
      dq[c] += ds * k[j * d + c];
      dk[j * d + c] += ds * q[c];
      dv[j * d + c] += p * kept(j) * dout[c];
    }
  }
  return std::log(total);
}

}  // namespace fastattn
