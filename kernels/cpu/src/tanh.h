// The hyperbolic tangent, for soft-caps.
#pragma once
#include "simd.h"

namespace EK_TIER {

// A ratio of polynomials (those of Eigen's generic_fast_tanh_float), relative error below 5e-7.
static inline vf tanh_of(vf x) {
  x = vf_max(vf_all(-7.90531110763549805f), vf_min(vf_all(7.90531110763549805f), x));  // x last: x86 keeps its NaN
  const vf x2 = vf_mul(x, x);
  vf p = vf_all(-2.76076847742355e-16f);
  p = vf_fma(p, x2, vf_all(2.00018790482477e-13f));
  p = vf_fma(p, x2, vf_all(-8.60467152213735e-11f));
  p = vf_fma(p, x2, vf_all(5.12229709037114e-08f));
  p = vf_fma(p, x2, vf_all(1.48572235717979e-05f));
  p = vf_fma(p, x2, vf_all(6.37261928875436e-04f));
  p = vf_fma(p, x2, vf_all(4.89352455891786e-03f));
  vf q = vf_all(1.19825839466702e-06f);
  q = vf_fma(q, x2, vf_all(1.18534705686654e-04f));
  q = vf_fma(q, x2, vf_all(2.26843463243900e-03f));
  q = vf_fma(q, x2, vf_all(4.89352518554385e-03f));
  return vf_div(vf_mul(p, x), q);
}

}  // namespace EK_TIER
