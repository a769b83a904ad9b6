// A row of logits by a cluster of blocks that reads it once: log-probability, entropy, the loss of its token, and the
// gradient over the logits. The definition is kernels/linear_policy_loss.py's.
//
// A thread keeps its logits in registers. Its sums, over its own maximum, go through a warp and from there into the
// shared memory of every block, so the cluster waits for itself once between the reads and the writes. What `load` has
// left of a logit is x: z, or with a softcap tanh(inner z); z' = outer x, and y = log2(e) outer (x - top).
//
// A configuration is an instance, FASTRL_ROW_ONCE(groups, softcap, half): fastrl/models/row_once.py appends one.

#ifndef FASTRL_ROW_THREADS
#define FASTRL_ROW_THREADS 256
#define FASTRL_ROW_BLOCKS 8  // of a cluster; more are not portable
#endif

namespace {

constexpr int kThreads = FASTRL_ROW_THREADS, kBlocks = FASTRL_ROW_BLOCKS;
constexpr int kVector = 8;                            // logits of a thread in a group, 16 bytes of bfloat16
constexpr int kGroup = kThreads * kBlocks * kVector;  // logits of the cluster in a group
constexpr int kParts = kThreads / 32 * kBlocks;       // warps of the cluster
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr int kStats = 7;

enum Kl { kNone, kK1, kK2, kK3, kK3Plus };

// kernels/row_once.py has the same fields
struct Arguments {
  float* z;  // [rows, stride]; the gradient is written over it, float or bfloat16 by `half`
  const long long* target;
  const float* inv_temperature;  // [rows], times softcap or scale; null: `outer` for all
  const float* old_logprobs;     // [rows], like those below; null: on-policy
  const float* ref_logprobs;     // null: no KL
  const float* advantage;
  const float* w;
  float* logprobs;
  float* entropy;
  float* stats;      // [rows, kStats], in the order of policy_loss.STATS
  long long stride;  // in floats, a multiple of kVector
  int words;
  int cispo, kl_type;
  float outer, inner, entropy_coef, kl_coef, low_edge, high_edge, dual_clip, cap, kl_cap;
};

#ifndef FASTRL_ON_HOST
__device__ float infinity() { return __int_as_float(0x7f800000); }
__device__ float not_a_number() { return __int_as_float(0x7fc00000); }
__device__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// two bfloat16 values in a word, the first in its lower half; round to nearest even
__device__ unsigned bf16_pair(float first, float second) {
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}
__device__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// a word of this block's shared memory -> into the same place of another block of the cluster
__device__ void put(float* place, int block, float value) {
  const unsigned own = static_cast<unsigned>(__cvta_generic_to_shared(place));
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; st.shared::cluster.f32 [there], %2; }" ::"r"(own),
      "r"(block), "f"(value)
      : "memory");
}
#endif

// of some logits: the largest x, and over all of them sums of exp2(y) and of exp2(y) y
struct Sums {
  float top, total, moment;
};

// the same bits whichever comes first; scale: log2(e) outer
__device__ Sums both(Sums a, Sums b, float scale) {
  if (a.top < b.top) {
    const Sums swapped = a;
    a = b, b = swapped;
  }
  if (!(b.top > -infinity())) {  // nothing but -inf or NaN, which has no top: its total is 0 or NaN
    return {a.top, a.total + b.total, a.moment + b.moment};
  }
  const float gap = (b.top - a.top) * scale, keep = exp2_approx(gap);
  return {a.top, fmaf(keep, b.total, a.total), fmaf(keep, fmaf(gap, b.total, b.moment), a.moment)};
}

__device__ Sums over_warp(Sums own, float scale) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    const Sums other = {__shfl_xor_sync(0xffffffffu, own.top, lane), __shfl_xor_sync(0xffffffffu, own.total, lane),
                        __shfl_xor_sync(0xffffffffu, own.moment, lane)};
    own = both(own, other, scale);
  }
  return own;
}

// exp overflows to inf, and 2 / inf is 0; NaN stays NaN
__device__ float soft(float x) { return 1.0f - __fdividef(2.0f, exp2_approx(2.0f * kLog2e * x) + 1.0f); }

__device__ float clamp(float x, float least, float most) { return fminf(fmaxf(x, least), most); }

// what the loss reads of a token beside its log-probability
struct Token {
  float w, advantage, old_logprob, ref_logprob;
};

__device__ Token token_of(const Arguments& a, long long n) {
  return {a.w[n], a.advantage[n], a.old_logprobs == nullptr ? 0.0f : a.old_logprobs[n],
          a.ref_logprobs == nullptr ? 0.0f : a.ref_logprobs[n]};
}

// kernels/vectors.py, for one token -> d loss / d logprob; `stats` unless null
__device__ float token_loss(const Arguments& a, const Token& token, float logprob, float* stats) {
  const float inf = infinity(), w = token.w;
  const bool alive = w != 0.0f;  // whatever another token holds, it gives nothing
  float logp = logprob, advantage = token.advantage, x = 0.0f, d = 0.0f;
  bool used = alive && fabsf(logp) + fabsf(advantage) < inf;  // false for NaN too
  if (a.old_logprobs != nullptr) {
    used = used && token.old_logprob == token.old_logprob;
    x = logp - token.old_logprob;
  }
  if (a.ref_logprobs != nullptr) {
    d = logp - token.ref_logprob;
    used = used && fabsf(d) < inf;
  }
  if (!used) logp = advantage = x = d = 0.0f;
  const float ratio = exp2_approx(kLog2e * clamp(x, -a.cap, a.cap)), clipped = clamp(ratio, a.low_edge, a.high_edge);
  bool low = used && ratio < a.low_edge, high = used && ratio > a.high_edge;
  const bool capped = fabsf(x) > a.cap;
  float coef, loss;
  if (a.cispo) {
    coef = -advantage * clipped;
    loss = coef * logp;
  } else {
    low = low && advantage < 0.0f, high = high && advantage > 0.0f;
    loss = fmaxf(-advantage * ratio, -advantage * clipped);
    const bool bounded = advantage < 0.0f && loss > -advantage * a.dual_clip;
    if (bounded) loss = -advantage * a.dual_clip;
    coef = low || high || bounded || capped ? 0.0f : -advantage * ratio;
  }
  float kl = 0.0f;
  if (a.ref_logprobs != nullptr) {
    const bool inside = fabsf(d) <= a.kl_cap;
    d = clamp(d, -a.kl_cap, a.kl_cap);
    // exp(-d) - 1 + d cancels near 0 and would go negative: there its series
    const float series = d * d * (0.5f - d * (1.0f / 6 - d * (1.0f / 24 - d * (1.0f / 120))));
    const float k3 = fabsf(d) < 0.1f ? series : exp2_approx(-kLog2e * d) - 1.0f + d;
    kl = a.kl_type == kK1 ? d : a.kl_type == kK2 ? 0.5f * d * d : k3;
    const float slope = a.kl_type == kK1 ? 1.0f : a.kl_type == kK3 ? d - k3 : d;
    loss += a.kl_coef * kl;
    if (inside) coef += a.kl_coef * slope;
  }
  if (stats != nullptr) {
    stats[0] = used ? w * loss : 0.0f;
    stats[1] = -x, stats[2] = kl;
    stats[3] = low, stats[4] = high, stats[5] = capped, stats[6] = alive && !used;
  }
  return used ? w * coef : 0.0f;
}

struct Row {
  float* z;
  long long target;
  float outer, top, log2_total, entropy, dlogprob, dentropy;
};

template <int groups, bool softcap, bool half, bool entropy>
__device__ void write(const Arguments& a, const Row& row, const float (&x)[groups][kVector], int first) {
  const float scale = row.outer * kLog2e;
#pragma unroll
  for (int g = 0; g < groups; ++g) {
    const int v = first + g * kGroup;
    if (g == groups - 1 && v >= a.words) break;
    const int at = static_cast<int>(row.target - v);
    float dz[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float log2_p = fmaf(x[g][j] - row.top, scale, -row.log2_total), p = exp2_approx(log2_p);
      float weight = -row.dlogprob;
      if constexpr (entropy) weight -= row.dentropy * ((p > 0.0f ? log2_p * kLn2 : 0.0f) + row.entropy);
      const float slope = softcap ? row.outer * a.inner * (1.0f - x[g][j] * x[g][j]) : row.outer;
      dz[j] = (p * weight + (at == j ? row.dlogprob : 0.0f)) * slope;
    }
    // beyond the vocabulary, up to a multiple of kVector, the row has room that nobody reads
    if constexpr (half) {
      *reinterpret_cast<uint4*>(reinterpret_cast<unsigned short*>(row.z) + v) = make_uint4(
          bf16_pair(dz[0], dz[1]), bf16_pair(dz[2], dz[3]), bf16_pair(dz[4], dz[5]), bf16_pair(dz[6], dz[7]));
    } else {
      *reinterpret_cast<float4*>(row.z + v) = make_float4(dz[0], dz[1], dz[2], dz[3]);
      *reinterpret_cast<float4*>(row.z + v + 4) = make_float4(dz[4], dz[5], dz[6], dz[7]);
    }
  }
}

template <int groups, bool softcap>
__device__ void load(const Arguments& a, const float* z, float (&x)[groups][kVector], int first) {
#pragma unroll
  for (int g = 0; g < groups; ++g) {
    const int v = first + g * kGroup;
    const bool last = g == groups - 1;  // the one that the vocabulary ends in
    if (!last || v < a.words) {
      const float4 low = __ldcs(reinterpret_cast<const float4*>(z + v));
      const float4 high = __ldcs(reinterpret_cast<const float4*>(z + v + 4));
      x[g][0] = low.x, x[g][1] = low.y, x[g][2] = low.z, x[g][3] = low.w;
      x[g][4] = high.x, x[g][5] = high.y, x[g][6] = high.z, x[g][7] = high.w;
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      if constexpr (softcap) x[g][j] = soft(x[g][j] * a.inner);
      if (last && v + j >= a.words) x[g][j] = -infinity();
    }
  }
}

template <int groups, bool softcap, bool half>
__device__ void row_once(const Arguments& a) {
  __shared__ float parts[3][kParts];  // of every warp of the cluster, in each of its blocks
  __shared__ Token token;             // read early: what a load after the barrier takes, the whole row waits for
  cluster_arrive();                   // shared memory of this block may be written to; waited for below
  const int block = blockIdx.x % kBlocks, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = (block * kThreads + threadIdx.x) * kVector;
  const long long n = blockIdx.x / kBlocks;
  Row row = {a.z + n * a.stride, a.target[n], a.inv_temperature == nullptr ? a.outer : a.inv_temperature[n]};
  float target = not_a_number();  // an id that is no word has none
  if (row.target >= 0 && row.target < a.words) target = row.z[row.target];
  if constexpr (softcap) target = soft(target * a.inner);
  float x[groups][kVector];
  load<groups, softcap>(a, row.z, x, first);
  if (threadIdx.x == 0) token = token_of(a, n);

  const float scale = row.outer * kLog2e;
  float top = -infinity();
#pragma unroll
  for (int g = 0; g < groups; ++g) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) top = fmaxf(top, x[g][j]);
  }
  Sums sums = {top, 0.0f, 0.0f};
  if (!(top > -infinity())) top = 0.0f;
#pragma unroll
  for (int g = 0; g < groups; ++g) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float y = (x[g][j] - top) * scale, e = exp2_approx(y);
      sums.total += e;
      sums.moment = fmaf(e, fmaxf(y, -1e30f), sums.moment);  // 0 * -inf is NaN
    }
  }
  sums = over_warp(sums, scale);
  cluster_wait();
  if (lane < kBlocks) {
    const int part = block * (kThreads / 32) + warp;
    put(&parts[0][part], lane, sums.top);
    put(&parts[1][part], lane, sums.total);
    put(&parts[2][part], lane, sums.moment);
  }
  cluster_arrive();  // all logits of the row have been read, and all sums are where they are read
  cluster_wait();
  sums = {-infinity(), 0.0f, 0.0f};
  for (int part = lane; part < kParts; part += 32) {
    sums = both(sums, {parts[0][part], parts[1][part], parts[2][part]}, scale);
  }
  sums = over_warp(sums, scale);

  row.top = sums.top, row.log2_total = log2f(sums.total);
  row.entropy = kLn2 * (row.log2_total - sums.moment / sums.total);
  float logprob = (target - row.top) * row.outer - kLn2 * row.log2_total;
  if (logprob > 0.0f) logprob = 0.0f;
  const bool speaks = block == 0 && threadIdx.x == 0;
  if (speaks) a.logprobs[n] = logprob, a.entropy[n] = row.entropy;
  row.dlogprob = token_loss(a, token, logprob, speaks ? a.stats + n * kStats : nullptr);
  row.dentropy = -a.entropy_coef * token.w;
  if (a.entropy_coef != 0.0f) {
    write<groups, softcap, half, true>(a, row, x, first);
  } else {
    write<groups, softcap, half, false>(a, row, x, first);
  }
}

}  // namespace

// with up to 80 registers of logits two blocks share a multiprocessor: one reads while the other waits for its cluster
#define FASTRL_ROW_ONCE(groups, softcap, half)                                                                         \
  extern "C" __global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kThreads, groups <= 10 && half ? 2 : 1) \
      fastrl_row_once_##groups##_##softcap##_##half(const __grid_constant__ Arguments a) {                             \
    row_once<groups, softcap, half>(a);                                                                                \
  }
