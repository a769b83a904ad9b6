#include "flat_update.h"

#ifndef __CUDACC_RTC__
#include <cuda_runtime.h>
#endif

namespace {

constexpr int kThreads = 512;
constexpr int kTensorBlock = 1024;  // every tensor starts at a multiple of it
constexpr int kStats = FASTRL_FLAT_STATS;

enum Mode { kInterpolate, kGradients, kDisplacements };

// elements of a thread and iteration; four inputs of eight would spill
template <Mode mode>
constexpr int kVector = mode == kGradients ? 4 : 8;

struct Arguments {
  float* theta;
  const float* anchor;
  const float* x0;
  const float* x1;
  uint16_t* out_bf16;
  const float* threshold;
  const int32_t* segment;
  int64_t n;
  int lookahead;
  float alpha, lr, weight_decay, ratio_min, ratio_max, scale_max;
  double* partials;
};

// sums over the elements of one iteration, in the order of FlatStats.NAMES after `elements`
struct Sums {
  float before_sq = 0, after_sq = 0, active = 0, ratio = 0, ratio_sq = 0, scale = 0, clamped = 0, nonfinite = 0;
};

// two forms, as torch.lerp has it: start + w (end - start) alone is an ulp or two off at w = 1
__device__ float lerp(float start, float end, float w) {
  const float delta = end - start;
  return fabsf(w) < 0.5f ? start + w * delta : end - delta * (1.0f - w);
}

// round to nearest even; NaN stays NaN
__device__ uint16_t to_bf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

__device__ float direction(float start, float step, float lr, float weight_decay) {
  return lr == 0.0f ? 0.0f : -__fdiv_rn(step + lr * weight_decay * start, lr);
}

// S_K(r) / S_2(r) by Horner's rule: the closed form is 0 / 0 near r = 1
__device__ float series(float r, int lookahead) {
  float total = 1.0f;
  for (int k = 1; k < lookahead; ++k) total = total * r + 1.0f;
  return __fdiv_rn(total, 1.0f + r);
}

template <Mode mode>
__device__ float update(const Arguments& a, float theta, float start, float x0, float x1, float least, Sums& sums) {
  const float before = theta - start;
  float scale = 1.0f;
  if constexpr (mode != kInterpolate) {
    float first = x0, second = x1;
    if constexpr (mode == kDisplacements) {
      const float theta_1 = start + x0;
      first = direction(start, x0, a.lr, a.weight_decay);
      second = direction(theta_1, theta - theta_1, a.lr, a.weight_decay);
    }
    const float r = __fdiv_rn(second, first);
    const float inside = fminf(fmaxf(r, a.ratio_min), a.ratio_max);
    const bool finite = isfinite(first) && isfinite(second);
    const bool active = finite && fabsf(first) > least && fabsf(inside + 1.0f) > 1e-8f;
    if (active) {
      scale = fminf(fmaxf(series(inside, a.lookahead), 1.0f), a.scale_max);
      sums.active += 1.0f;
      sums.ratio += inside;
      sums.ratio_sq += inside * inside;
      sums.clamped += inside != r ? 1.0f : 0.0f;
    }
    sums.scale += scale;
    sums.nonfinite += finite ? 0.0f : 1.0f;
  }
  const float moved = lerp(start, theta, a.alpha * scale);
  const float after = moved - start;
  sums.before_sq += before * before;
  sums.after_sq += after * after;
  return moved;
}

// 16 bytes at a time, first to leave the cache: nothing is read twice
template <int count>
__device__ void load(const float* from, float (&to)[count]) {
#pragma unroll
  for (int j = 0; j < count; j += 4) {
    const float4 four = __ldcs(reinterpret_cast<const float4*>(from + j));
    to[j] = four.x, to[j + 1] = four.y, to[j + 2] = four.z, to[j + 3] = four.w;
  }
}

template <int count>
__device__ void store(float* to, uint16_t* to_half, const float (&from)[count]) {
#pragma unroll
  for (int j = 0; j < count; j += 4) {
    __stcs(reinterpret_cast<float4*>(to + j), make_float4(from[j], from[j + 1], from[j + 2], from[j + 3]));
  }
  if (to_half == nullptr) return;
  uint32_t pairs[count / 2];
#pragma unroll
  for (int j = 0; j < count / 2; ++j) {
    pairs[j] = to_bf16(from[2 * j]) | static_cast<uint32_t>(to_bf16(from[2 * j + 1])) << 16;
  }
  if constexpr (count == 8) {
    __stcs(reinterpret_cast<uint4*>(to_half), make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
  } else {
    __stcs(reinterpret_cast<uint2*>(to_half), make_uint2(pairs[0], pairs[1]));
  }
}

// each thread's own doubles: in shared memory, for registers the nine would spill
using Totals = double[kStats][kThreads];

__device__ void flush(const Sums& sums, int elements, Totals& totals) {
  const float values[kStats] = {static_cast<float>(elements),
                                sums.before_sq,
                                sums.after_sq,
                                sums.active,
                                sums.ratio,
                                sums.ratio_sq,
                                sums.scale,
                                sums.clamped,
                                sums.nonfinite};
#pragma unroll
  for (int k = 0; k < kStats; ++k) totals[k][threadIdx.x] += values[k];
}

// over the threads of a block, in a fixed order: the same shard gives the same bits. One warp takes one statistic.
__device__ void reduce(const Totals& totals, double* row) {
  __syncthreads();
  const int k = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (k >= kStats) return;
  double value = 0;
  for (int thread = lane; thread < kThreads; thread += 32) value += totals[k][thread];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  if (lane == 0) row[k] = value;
}

template <Mode mode>
__device__ void flat_update(const Arguments& a) {
  static_assert(kStats <= kThreads / 32, "a warp per statistic");
  __shared__ Totals totals;
  for (int k = 0; k < kStats; ++k) totals[k][threadIdx.x] = 0;
  constexpr int count = kVector<mode>;
  const int64_t first = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) * count;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * count;
  for (int64_t i = first; i < a.n; i += stride) {
    Sums sums;
    const float least = a.threshold == nullptr ? 1e-8f : a.threshold[a.segment[i / kTensorBlock]];
    if (i + count <= a.n) {
      float theta[count], start[count], x0[count] = {}, x1[count] = {};
      load(a.theta + i, theta);
      load(a.anchor + i, start);
      if constexpr (mode != kInterpolate) load(a.x0 + i, x0);
      if constexpr (mode == kGradients) load(a.x1 + i, x1);
#pragma unroll
      for (int j = 0; j < count; ++j) theta[j] = update<mode>(a, theta[j], start[j], x0[j], x1[j], least, sums);
      store(a.theta + i, a.out_bf16 == nullptr ? nullptr : a.out_bf16 + i, theta);
    } else {
      for (int64_t k = i; k < a.n; ++k) {
        const float x0 = mode == kInterpolate ? 0.0f : a.x0[k], x1 = mode == kGradients ? a.x1[k] : 0.0f;
        a.theta[k] = update<mode>(a, a.theta[k], a.anchor[k], x0, x1, least, sums);
        if (a.out_bf16 != nullptr) a.out_bf16[k] = to_bf16(a.theta[k]);
      }
    }
    flush(sums, i + count <= a.n ? count : static_cast<int>(a.n - i), totals);
  }
  reduce(totals, a.partials + static_cast<int64_t>(blockIdx.x) * kStats);
}

}  // namespace

// entry points with C names, so that a source compiled at run time is found too
extern "C" __global__ void __launch_bounds__(kThreads, 2) fastrl_interpolate_kernel(Arguments a) {
  flat_update<kInterpolate>(a);
}
extern "C" __global__ void __launch_bounds__(kThreads, 2) fastrl_gradients_kernel(Arguments a) {
  flat_update<kGradients>(a);
}
extern "C" __global__ void __launch_bounds__(kThreads, 2) fastrl_displacements_kernel(Arguments a) {
  flat_update<kDisplacements>(a);
}

#ifndef __CUDACC_RTC__
namespace {

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

using Kernel = void (*)(Arguments);

int launch(Kernel kernel, const Arguments& a, int grid, void* stream) {
  if (a.n == 0) return cudaSuccess;
  if (a.n < 0 || grid < 1 || a.partials == nullptr || (a.threshold == nullptr) != (a.segment == nullptr)) {
    return cudaErrorInvalidValue;
  }
  if (!aligned(a.theta) || !aligned(a.anchor) || !aligned(a.x0) || !aligned(a.x1) || !aligned(a.out_bf16)) {
    return cudaErrorMisalignedAddress;
  }
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}

}  // namespace

int fastrl_interpolate(float* theta, const float* anchor, void* out_bf16, int64_t n, float alpha, double* partials,
                       int grid, void* stream) {
  Arguments a = {};
  a.theta = theta, a.anchor = anchor, a.out_bf16 = static_cast<uint16_t*>(out_bf16), a.n = n, a.alpha = alpha;
  a.partials = partials;
  return launch(fastrl_interpolate_kernel, a, grid, stream);
}

int fastrl_extrapolate(float* theta, const float* anchor, const float* x0, const float* x1, void* out_bf16,
                       const float* threshold, const int32_t* segment, int64_t n, int lookahead, float alpha, float lr,
                       float weight_decay, float ratio_min, float ratio_max, float scale_max, double* partials,
                       int grid, void* stream) {
  if (lookahead < 2 || x0 == nullptr) return cudaErrorInvalidValue;
  const Arguments a = {theta,     anchor,       x0,        x1,        static_cast<uint16_t*>(out_bf16),
                       threshold, segment,      n,         lookahead, alpha,
                       lr,        weight_decay, ratio_min, ratio_max, scale_max,
                       partials};
  return launch(x1 == nullptr ? fastrl_displacements_kernel : fastrl_gradients_kernel, a, grid, stream);
}
#endif
