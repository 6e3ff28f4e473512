// Routing on the GPU, backward: a warp takes a token. With g the gradient of weights, w the weights, m the gradient of mean
// and c that of z, both over the tokens, and n = s / sum s:
//
//   of all experts     softmax: s_e (m_e - sum n m), and - s_e sum w g where weights are not renormalised
//                      sigmoid: s_e (1 - s_e) (m_e - sum n m) / sum s;   of both, 2 c lse softmax_e
//   of the chosen      softmax: w_k (g_k - sum w g), or w_k g_k
//                      sigmoid: s_k (1 - s_k) (g_k - sum w g) / sum s_k, or s_k (1 - s_k) g_k
//
// Gradients of all are written first, and those of the chosen anew with both.
#include "moe_route/route_gpu.h"

namespace madkernels::gpu {
namespace {

using namespace device;
using namespace device::route;

constexpr int kWarps = 8;

// What the gradient of every expert takes.
struct OfAll {
  const float* daux;         // [experts + 1] or null
  float mean, of_z, spread;  // sum n daux; 2 c lse; sum w g where it is of all
  float each;                // 1 / tokens

  template <class T>
  __device__ float gradient(const MoeRoute& p, const Token<T>& token, int e) const {
    const float softmax = token.softmax(e);
    if (daux == nullptr) return -softmax * spread;
    const float score = p.sigmoid ? sigmoid(token.logit(e)) : softmax;
    const float slope = p.sigmoid ? score * (1.f - score) * token.share : softmax;
    return slope * (daux[e] - mean) * each + softmax * (of_z - spread);
  }
};

template <class T>
__device__ OfAll of_all(const MoeRouteBackward& q, const Token<T>& token, float sum_wg) {
  const MoeRoute& p = q.forward;
  OfAll all{.daux = static_cast<const float*>(q.daux),
            .mean = 0,
            .of_z = 0,
            .spread = p.sigmoid || p.renormalize ? 0.f : sum_wg,
            .each = 1.f / static_cast<float>(p.tokens)};
  if (all.daux == nullptr) return all;
  for (int e = lane(); e < token.experts; e += 32) all.mean += token.share_of(p, e) * all.daux[e];
  all.mean = warp_sum(all.mean);
  all.of_z = 2.f * token.lse * all.daux[p.experts] * all.each;
  return all;
}

// The derivative of a chosen expert's weight in its logit, but for what renormalising takes off.
template <class T>
__device__ __forceinline__ float slope_of(const MoeRoute& p, const Token<T>& token, int e, float weight) {
  if (!p.sigmoid) return weight;
  const float score = sigmoid(token.logit(e));
  return score * (1.f - score);
}

template <class T>
__global__ void __launch_bounds__(kWarps * 32) route_backward(MoeRouteBackward q) {
  const MoeRoute& p = q.forward;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + warp_index();
  if (t >= p.tokens) return;
  const int top_k = static_cast<int>(p.top_k);
  const Token<T> token(p, t);
  const int32_t* chosen = p.chosen + t * top_k;
  const float *weights = static_cast<const float*>(p.weights) + t * top_k,
              *dweights = static_cast<const float*>(q.dweights) + t * top_k;
  T* dlogits = static_cast<T*>(q.dlogits) + t * p.experts;
  float sum_wg = 0, sum = 0;
  for (int k = lane(); k < top_k; k += 32) {
    sum_wg += weights[k] * dweights[k];
    if (p.sigmoid) sum += sigmoid(token.logit(chosen[k]));
  }
  sum_wg = warp_sum(sum_wg);
  sum = p.sigmoid && p.renormalize ? warp_sum(sum) : 1.f;
  const OfAll all = of_all(q, token, sum_wg);
  for (int e = lane(); e < token.experts; e += 32) dlogits[e] = from_float<T>(all.gradient(p, token, e));
  warp_sync();
  for (int k = lane(); k < top_k; k += 32) {
    const int e = chosen[k];
    const float dweight = dweights[k] - (p.renormalize ? sum_wg : 0.f);
    dlogits[e] = from_float<T>(all.gradient(p, token, e) + slope_of(p, token, e, weights[k]) * dweight / sum);
  }
}

}  // namespace

void moe_route_backward(const MoeRouteBackward& q, Stream stream) {
  dispatch_gpu(q.forward.dtype, [&]<class T>() {
    launch("moe_route backward", route_backward<T>, ceil_div(q.forward.tokens, kWarps), kWarps * 32, 0, stream, q);
  });
}

}  // namespace madkernels::gpu
