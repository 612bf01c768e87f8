// tanh-GELU and SiLU with their derivatives.
#pragma once

namespace layersync {

// exp(−2z) for the z of gelu(u) = u·(1 + tanh z)/2 = u/(1 + exp(−2z)), z = √(2/π)·(u + 0.044715·u³): with expf this form
// is exact to a few ulp also where 1 + tanh z cancels. The square is cut where both tails are flat long since, so that
// no magnitude of u overflows on the way; infinities and NaN go the way that they go in PyTorch.
constexpr float kGeluCubic = 0.044715f, kGeluTwiceBeta = 1.5957691216057308f;

__device__ inline float gelu_square(float u) { return fminf(u * u, 400.f); }

__device__ inline float gelu_exponential(float u, float square) {
  return expf(-kGeluTwiceBeta * u * fmaf(kGeluCubic, square, 1.f));
}

__device__ inline float gelu(float u) { return __fdividef(u, 1.f + gelu_exponential(u, gelu_square(u))); }

struct Activated {
  float value, slope;
};

// 1 − σ, without cancellation.
__device__ inline float rest_of_sigmoid(float u, float exponential, float sigmoid) {
  return u < 0 ? 1.f - sigmoid : exponential * sigmoid;
}

__device__ inline Activated gelu_and_slope(float u) {
  const float square = gelu_square(u), exponential = gelu_exponential(u, square);
  const float sigmoid = __fdividef(1.f, 1.f + exponential);
  const float rest = rest_of_sigmoid(u, exponential, sigmoid);
  const float inner = kGeluTwiceBeta * fmaf(3 * kGeluCubic, square, 1.f);
  return {u * sigmoid, fmaf(u * sigmoid * rest, inner, sigmoid)};
}

__device__ inline float silu(float u) { return __fdividef(u, 1.f + expf(-u)); }

__device__ inline Activated silu_and_slope(float u) {
  const float exponential = expf(-u), sigmoid = __fdividef(1.f, 1.f + exponential);
  return {u * sigmoid, fmaf(u * sigmoid, rest_of_sigmoid(u, exponential, sigmoid), sigmoid)};
}

}  // namespace layersync
