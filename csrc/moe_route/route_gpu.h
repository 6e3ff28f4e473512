// What routing forward and backward share on a GPU: a warp takes a token.
#pragma once

#include "common/device.h"
#include "common/warp.h"
#include "moe_route/moe_route.h"

namespace madkernels::device::route {

// The warp's token: its logits, lane by lane, and what softmax and sigmoid sum to.
template <class T>
struct Token {
  const T* logits;  // [experts]
  int experts;
  float highest, lse, inverse;  // softmax_e = e^(logit - highest) inverse
  float share;                  // 1 / sum of what scores are before they are shares: e^(logit - highest), or sigmoid

  __device__ Token(const MoeRoute& p, int64_t token)
      : logits(p.logits_of<T>(token)), experts(static_cast<int>(p.experts)), highest(-INFINITY) {
    for (int e = lane(); e < experts; e += 32) highest = logit(e) > highest ? logit(e) : highest;
    highest = warp_max(highest);
    float powers = 0, sigmoids = 0;
    for (int e = lane(); e < experts; e += 32) {
      powers += expf(logit(e) - highest);
      if (p.sigmoid) sigmoids += sigmoid(logit(e));
    }
    powers = warp_sum(powers);
    lse = highest + logf(powers), inverse = 1.f / powers;
    share = p.sigmoid ? 1.f / warp_sum(sigmoids) : inverse;
  }
  __device__ float logit(int e) const { return to_float(logits[e]); }
  __device__ float softmax(int e) const { return expf(logit(e) - highest) * inverse; }
  __device__ float score(const MoeRoute& p, int e) const { return p.sigmoid ? sigmoid(logit(e)) : softmax(e); }
  // Score over the sum of scores.
  __device__ float share_of(const MoeRoute& p, int e) const {
    return (p.sigmoid ? sigmoid(logit(e)) : expf(logit(e) - highest)) * share;
  }
};

}  // namespace madkernels::device::route
