// CUDA's words, as far as the sources of csrc/ use them, to run a kernel where there is no GPU.
// Clusters of blocks run one after another. The threads of a cluster take turns on one thread of the CPU: each runs until
// it waits for others, so a barrier that is missing is seen in every run. Shared memory is static, so the blocks of a
// cluster have one between them: a source that uses both writes the same words into that of every block.
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __CUDACC_RTC__
#define FASTRL_ON_HOST
#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
// the source makes its own, as it does for NVRTC; these have other names in a host's headers
#define int16_t source_int16_t
#define int32_t source_int32_t
#define int64_t source_int64_t
#define uint16_t source_uint16_t
#define uint32_t source_uint32_t

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct Index {
  int x;
};
using std::isfinite;

float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, T value) {
  *to = value;
}
float __fdiv_rn(float x, float y) { return x / y; }
float __fdividef(float x, float y) { return x / y; }

template <class To, class From>
To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
unsigned __float_as_uint(float x) { return bits_of<unsigned>(x); }
float __uint_as_float(unsigned x) { return bits_of<float>(x); }

constexpr int kWarp = 32;
constexpr int kStackBytes = 1 << 17;

struct Barrier {
  int size = 0, arrived = 0, phase = 0;
};
struct Thread {
  Index thread, block;
  int place;     // in its cluster
  int in_block;  // which block of the cluster
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Barrier* waits_for = nullptr;
  int phase = 0;          // that it waits for the end of
  int cluster_phase = 0;  // in which it arrived last
  bool done = false;
};
Index threadIdx, blockIdx, gridDim;
Thread* now;  // whose turn it is
ucontext_t turns;
std::function<void()> body;
Barrier cluster_barrier;
std::vector<Barrier> block_barriers, warp_barriers;
std::vector<double> lanes;  // of every thread of the cluster

int arrive(Barrier& at) {
  const int phase = at.phase;
  if (++at.arrived == at.size) at.arrived = 0, ++at.phase;
  return phase;
}
void wait(Barrier& at, int phase) {
  now->waits_for = &at, now->phase = phase;
  swapcontext(&now->context, &turns);
}
void meet(Barrier& at) { wait(at, arrive(at)); }

void __syncthreads() { meet(block_barriers[now->in_block]); }

// what the thread `other` of the same warp gives, or where there is none the thread's own
template <class T>
T exchanged(T value, int other) {
  Barrier& warp = warp_barriers[now->place / kWarp];
  lanes[now->place] = value;
  meet(warp);
  const T found = other / kWarp == now->place / kWarp ? static_cast<T>(lanes[other]) : value;
  meet(warp);
  return found;
}
double __shfl_down_sync(unsigned, double value, int offset) { return exchanged(value, now->place + offset); }
float __shfl_xor_sync(unsigned, float value, int mask) { return exchanged(value, now->place ^ mask); }

// the words of csrc/row_once.cu for what has no name in CUDA
float infinity() { return INFINITY; }
float not_a_number() { return NAN; }
float exp2_approx(float x) { return std::exp2(x); }
unsigned bf16(float x) {
  const unsigned bits = __float_as_uint(x);
  return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
unsigned bf16_pair(float first, float second) { return bf16(first) | bf16(second) << 16; }
void cluster_arrive() { now->cluster_phase = arrive(cluster_barrier); }
void cluster_wait() { wait(cluster_barrier, now->cluster_phase); }
void put(float* to, int block, float value) {
  if (block == 0) *to = value;
}

void run_thread() {
  body();
  now->done = true;
  swapcontext(&now->context, &turns);
}

template <class Arguments>
void run_clusters(void (*kernel)(Arguments), const Arguments& arguments, int clusters, int blocks, int threads) {
  const int all = blocks * threads;
  lanes.assign(all, 0);
  gridDim.x = clusters * blocks;
  body = [&] { kernel(arguments); };
  for (int cluster = 0; cluster < clusters; ++cluster) {
    cluster_barrier = {all};
    block_barriers.assign(blocks, {threads});
    warp_barriers.assign(all / kWarp, {kWarp});
    std::vector<Thread> running(all);
    for (int place = 0; place < all; ++place) {
      Thread& one = running[place];
      one.thread.x = place % threads, one.in_block = place / threads, one.place = place;
      one.block.x = cluster * blocks + one.in_block;
      one.stack.reset(new char[kStackBytes]);
      getcontext(&one.context);
      one.context.uc_stack.ss_sp = one.stack.get(), one.context.uc_stack.ss_size = kStackBytes;
      makecontext(&one.context, run_thread, 0);
    }
    for (int left = all; left > 0;) {
      bool moved = false;
      for (Thread& one : running) {
        if (one.done || (one.waits_for != nullptr && one.waits_for->phase == one.phase)) continue;
        now = &one, threadIdx = one.thread, blockIdx = one.block, moved = true;
        swapcontext(&turns, &one.context);
        left -= one.done;
      }
      if (!moved) {
        std::fprintf(stderr, "threads wait for others that have ended\n");
        std::abort();
      }
    }
  }
}

template <class Arguments>
void run_blocks(void (*kernel)(Arguments), const Arguments& arguments, int grid, int threads) {
  run_clusters(kernel, arguments, grid, 1, threads);
}
