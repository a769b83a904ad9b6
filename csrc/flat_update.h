// In-place updates of a flat shard: raw device pointers, int64 counts, the caller's stream, a cudaError_t back.
// The definitions are interpolate_ref_ and extrapolate_ref_ of fastrl/weights/moves_ref.py; the statistics are
// FlatStats.NAMES there, one row of FASTRL_FLAT_STATS doubles per block of threads, to be summed over blocks by the
// caller.
//
// theta is float32 where `low` is null. Else it is bfloat16, `low` the 16 bits that each value lacks (both as
// fastrl/weights/halves.py says), and out_bf16 must be null. Pointers to shards are multiples of 16 bytes.
#pragma once

#define FASTRL_FLAT_STATS 9
#define FASTRL_FLAT_ABI 2  // one more whenever a signature below changes

#ifdef __CUDACC_RTC__  // a compiler of device code alone, without the host's headers
typedef short int16_t;
typedef int int32_t;
typedef long long int64_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
#else
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// FASTRL_FLAT_ABI of the build
int fastrl_flat_abi(void);

// theta <- anchor + alpha (theta - anchor), exactly either of them at 0 and 1. out_bf16 may be null.
int fastrl_interpolate(void* theta, int16_t* low, const float* anchor, void* out_bf16, int64_t n, float alpha,
                       double* partials, int grid, void* stream);

// theta <- anchor + alpha scale (theta - anchor), scale = clamp(S_K(r) / S_2(r), 1, scale_max) per coordinate.
// x1 given: r = x1 / x0, the gradients of the two steps. x1 null: x0 is the first displacement, and r that of the
// directions of decoupled AdamW. threshold [tensors] and segment [n / 1024, rounded up] are both given or both null.
int fastrl_extrapolate(void* theta, int16_t* low, const float* anchor, const float* x0, const float* x1, void* out_bf16,
                       const float* threshold, const int32_t* segment, int64_t n, int lookahead, float alpha, float lr,
                       float weight_decay, float ratio_min, float ratio_max, float scale_max, double* partials,
                       int grid, void* stream);

#ifdef __cplusplus
}
#endif
#endif
