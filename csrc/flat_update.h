// In-place updates of a flat float32 shard: raw device pointers, int64 counts, the caller's stream, a cudaError_t back.
// The definitions are interpolate_ref_ and extrapolate_ref_ of fastrl/ops.py; the statistics are FlatStats.NAMES there,
// one row of FASTRL_FLAT_STATS doubles per block of threads, to be summed over blocks by the caller.
#pragma once
#include <stdint.h>

#define FASTRL_FLAT_STATS 9

#ifdef __cplusplus
extern "C" {
#endif

// theta <- anchor + alpha (theta - anchor), exactly either of them at 0 and 1. out_bf16 may be null.
int fastrl_interpolate(float* theta, const float* anchor, void* out_bf16, int64_t n, float alpha, double* partials,
                       int grid, void* stream);

// theta <- anchor + alpha scale (theta - anchor), scale = clamp(S_K(r) / S_2(r), 1, scale_max) per coordinate.
// x1 given: r = x1 / x0, the gradients of the two steps. x1 null: x0 is the first displacement, and r that of the
// directions of decoupled AdamW. threshold [tensors] and segment [n / 1024, rounded up] are both given or both null.
int fastrl_extrapolate(float* theta, const float* anchor, const float* x0, const float* x1, void* out_bf16,
                       const float* threshold, const int32_t* segment, int64_t n, int lookahead, float alpha, float lr,
                       float weight_decay, float ratio_min, float ratio_max, float scale_max, double* partials,
                       int grid, void* stream);

#ifdef __cplusplus
}
#endif
