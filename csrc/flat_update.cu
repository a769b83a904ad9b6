#include "flat_update.h"

#ifndef __CUDACC_RTC__
#include <cuda_runtime.h>
#endif

namespace {

constexpr int kThreads = 512;
constexpr int kTensorBlock = 1024;  // every tensor starts at a multiple of it
constexpr int kStats = FASTRL_FLAT_STATS;

enum Mode { kInterpolate, kGradients, kDisplacements };

// elements of a thread and iteration; four float inputs of eight would spill
template <Mode mode, bool split>
constexpr int kVector = mode == kGradients && !split ? 4 : 8;

// fastrl/weights/library.py has the same fields
struct Arguments {
  void* theta;   // float, or with `low` the upper halves
  int16_t* low;  // null: theta is float
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

// two forms, as torch.lerp has it: start + w (end - start) alone is an ulp or two off at w = 1. The ends themselves are
// taken whatever the other is: 0 * inf is NaN, and -0 + 0 is 0.
__device__ float lerp(float start, float end, float w) {
  if (w == 0.0f) return start;
  if (w == 1.0f) return end;
  const float delta = end - start;
  return fabsf(w) < 0.5f ? start + w * delta : end - delta * (1.0f - w);
}

// round to nearest even; NaN stays NaN
__device__ uint16_t to_bf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// float32 as bfloat16 and the signed 16 bits that it lacks: fastrl/weights/halves.py
__device__ float join(uint32_t high, int32_t low) { return __uint_as_float((high << 16) + static_cast<uint32_t>(low)); }

// bits of which the lower half is `low` and the upper, once 0x8000 is added, `high`; NaN loses its payload
__device__ uint32_t to_split(float x) {
  const uint32_t bits = __float_as_uint(x);
  return (bits & 0x7fffffffu) > 0x7f800000u ? (bits & 0x80000000u) | 0x7fc00000u : bits;
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

// two 16-bit values in each word, the first in its lower half
template <int count>
__device__ void load_pairs(const void* from, uint32_t (&to)[count / 2]) {
  static_assert(count == 8, "16 bytes");
  const uint4 four = __ldcs(static_cast<const uint4*>(from));
  to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}

template <int count>
__device__ void store_pairs(void* to, const uint32_t (&from)[count / 2]) {
  if constexpr (count == 8) {
    __stcs(static_cast<uint4*>(to), make_uint4(from[0], from[1], from[2], from[3]));
  } else {
    __stcs(static_cast<uint2*>(to), make_uint2(from[0], from[1]));
  }
}

template <int count>
__device__ void load_split(const uint16_t* high, const int16_t* low, float (&to)[count]) {
  uint32_t highs[count / 2], lows[count / 2];
  load_pairs<count>(high, highs);
  load_pairs<count>(low, lows);
#pragma unroll
  for (int j = 0; j < count; j += 2) {
    to[j] = join(highs[j / 2], static_cast<int16_t>(lows[j / 2]));
    to[j + 1] = join(highs[j / 2] >> 16, static_cast<int32_t>(lows[j / 2]) >> 16);
  }
}

template <int count>
__device__ void store_split(uint16_t* high, int16_t* low, const float (&from)[count]) {
  uint32_t highs[count / 2], lows[count / 2];
#pragma unroll
  for (int j = 0; j < count; j += 2) {
    const uint32_t first = to_split(from[j]), second = to_split(from[j + 1]);
    highs[j / 2] = (first + 0x8000u) >> 16 | ((second + 0x8000u) & 0xffff0000u);
    lows[j / 2] = (first & 0xffffu) | second << 16;
  }
  store_pairs<count>(high, highs);
  store_pairs<count>(low, lows);
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
  store_pairs<count>(to_half, pairs);
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

template <Mode mode, bool split>
__device__ void flat_update(const Arguments& a) {
  static_assert(kStats <= kThreads / 32, "a warp per statistic");
  __shared__ Totals totals;
  for (int k = 0; k < kStats; ++k) totals[k][threadIdx.x] = 0;
  float* const whole = static_cast<float*>(a.theta);
  uint16_t* const high = static_cast<uint16_t*>(a.theta);
  constexpr int count = kVector<mode, split>;
  const int64_t first = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) * count;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * count;
  for (int64_t i = first; i < a.n; i += stride) {
    Sums sums;
    const float least = a.threshold == nullptr ? 1e-8f : a.threshold[a.segment[i / kTensorBlock]];
    if (i + count <= a.n) {
      float theta[count], start[count], x0[count] = {}, x1[count] = {};
      if constexpr (split) {
        load_split(high + i, a.low + i, theta);
      } else {
        load(whole + i, theta);
      }
      load(a.anchor + i, start);
      if constexpr (mode != kInterpolate) load(a.x0 + i, x0);
      if constexpr (mode == kGradients) load(a.x1 + i, x1);
#pragma unroll
      for (int j = 0; j < count; ++j) theta[j] = update<mode>(a, theta[j], start[j], x0[j], x1[j], least, sums);
      if constexpr (split) {
        store_split(high + i, a.low + i, theta);
      } else {
        store(whole + i, a.out_bf16 == nullptr ? nullptr : a.out_bf16 + i, theta);
      }
    } else {
      for (int64_t k = i; k < a.n; ++k) {
        const float x0 = mode == kInterpolate ? 0.0f : a.x0[k], x1 = mode == kGradients ? a.x1[k] : 0.0f;
        const float theta = split ? join(high[k], a.low[k]) : whole[k];
        const float moved = update<mode>(a, theta, a.anchor[k], x0, x1, least, sums);
        if constexpr (split) {
          const uint32_t bits = to_split(moved);
          high[k] = static_cast<uint16_t>((bits + 0x8000u) >> 16);
          a.low[k] = static_cast<int16_t>(bits);
        } else {
          whole[k] = moved;
          if (a.out_bf16 != nullptr) a.out_bf16[k] = to_bf16(moved);
        }
      }
    }
    flush(sums, i + count <= a.n ? count : static_cast<int>(a.n - i), totals);
  }
  reduce(totals, a.partials + static_cast<int64_t>(blockIdx.x) * kStats);
}

}  // namespace

// entry points with C names, so that a source compiled at run time is found too
#define FASTRL_KERNEL(name, mode, split) \
  extern "C" __global__ void __launch_bounds__(kThreads, 2) name(Arguments a) { flat_update<mode, split>(a); }
FASTRL_KERNEL(fastrl_interpolate_kernel, kInterpolate, false)
FASTRL_KERNEL(fastrl_gradients_kernel, kGradients, false)
FASTRL_KERNEL(fastrl_displacements_kernel, kDisplacements, false)
FASTRL_KERNEL(fastrl_interpolate_split_kernel, kInterpolate, true)
FASTRL_KERNEL(fastrl_gradients_split_kernel, kGradients, true)
FASTRL_KERNEL(fastrl_displacements_split_kernel, kDisplacements, true)

#ifndef __CUDACC_RTC__
namespace {

uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

using Kernel = void (*)(Arguments);

int launch(Kernel kernel, const Arguments& a, int grid, void* stream) {
  if (a.n == 0) return cudaSuccess;
  if (a.n < 0 || grid < 1 || a.partials == nullptr || (a.threshold == nullptr) != (a.segment == nullptr) ||
      (a.low != nullptr && a.out_bf16 != nullptr)) {
    return cudaErrorInvalidValue;
  }
  const uintptr_t vectors =
      address(a.theta) | address(a.low) | address(a.anchor) | address(a.x0) | address(a.x1) | address(a.out_bf16);
  if (vectors % 16 != 0) return cudaErrorMisalignedAddress;
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}

}  // namespace

int fastrl_flat_abi(void) { return FASTRL_FLAT_ABI; }

int fastrl_interpolate(void* theta, int16_t* low, const float* anchor, void* out_bf16, int64_t n, float alpha,
                       double* partials, int grid, void* stream) {
  Arguments a = {theta, low, anchor};
  a.out_bf16 = static_cast<uint16_t*>(out_bf16), a.n = n, a.alpha = alpha, a.partials = partials;
  return launch(low == nullptr ? fastrl_interpolate_kernel : fastrl_interpolate_split_kernel, a, grid, stream);
}

int fastrl_extrapolate(void* theta, int16_t* low, const float* anchor, const float* x0, const float* x1, void* out_bf16,
                       const float* threshold, const int32_t* segment, int64_t n, int lookahead, float alpha, float lr,
                       float weight_decay, float ratio_min, float ratio_max, float scale_max, double* partials,
                       int grid, void* stream) {
  if (lookahead < 2 || x0 == nullptr) return cudaErrorInvalidValue;
  const Arguments a = {theta,        low,       anchor,    x0,        x1,      static_cast<uint16_t*>(out_bf16),
                       threshold,    segment,   n,         lookahead, alpha,   lr,
                       weight_decay, ratio_min, ratio_max, scale_max, partials};
  const Kernel kernels[] = {fastrl_gradients_kernel, fastrl_gradients_split_kernel, fastrl_displacements_kernel,
                            fastrl_displacements_split_kernel};
  return launch(kernels[2 * (x1 == nullptr) + (low != nullptr)], a, grid, stream);
}
#endif
