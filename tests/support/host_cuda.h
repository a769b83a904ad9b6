// CUDA's words, as far as the sources of csrc/ use them, on the threads of a CPU: to run a kernel where there is no GPU.
// Clusters of blocks run one after another, the threads of a cluster at once; shuffles and __syncthreads are barriers.
// Shared memory is static, so the blocks of a cluster have one between them: a source that uses both writes the same
// words into that of every block.
#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <thread>
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
thread_local Index threadIdx, blockIdx, gridDim;
thread_local int place;        // of the thread in its cluster
thread_local int block_place;  // of its block
thread_local std::optional<std::barrier<>::arrival_token> arrived;
std::unique_ptr<std::barrier<>> cluster_barrier;
std::vector<std::unique_ptr<std::barrier<>>> block_barriers, warp_barriers;
std::vector<double> lanes;  // of every thread of the cluster

void __syncthreads() { block_barriers[block_place]->arrive_and_wait(); }

// what the thread `other` of the same warp gives, or where there is none the thread's own
template <class T>
T exchanged(T value, int other) {
  lanes[place] = value;
  warp_barriers[place / kWarp]->arrive_and_wait();
  const T found = other / kWarp == place / kWarp ? static_cast<T>(lanes[other]) : value;
  warp_barriers[place / kWarp]->arrive_and_wait();
  return found;
}
double __shfl_down_sync(unsigned, double value, int offset) { return exchanged(value, place + offset); }
float __shfl_xor_sync(unsigned, float value, int mask) { return exchanged(value, place ^ mask); }

// the words of csrc/row_once.cu for what has no name in CUDA
float infinity() { return INFINITY; }
float not_a_number() { return NAN; }
float exp2_approx(float x) { return std::exp2(x); }
unsigned bf16(float x) {
  const unsigned bits = __float_as_uint(x);
  return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
unsigned bf16_pair(float first, float second) { return bf16(first) | bf16(second) << 16; }
void cluster_arrive() { arrived = cluster_barrier->arrive(); }
void cluster_wait() {
  cluster_barrier->wait(std::move(*arrived));
  arrived.reset();
}
void put(float* to, int block, float value) {
  if (block == 0) *to = value;
}

template <class Arguments>
void run_clusters(void (*kernel)(Arguments), const Arguments& arguments, int clusters, int blocks, int threads) {
  const int all = blocks * threads;
  lanes.assign(all, 0);
  const auto barriers = [](auto& made, int count, int size) {
    made.clear();
    for (int at = 0; at < count; ++at) made.push_back(std::make_unique<std::barrier<>>(size));
  };
  for (int cluster = 0; cluster < clusters; ++cluster) {
    cluster_barrier = std::make_unique<std::barrier<>>(all);
    barriers(block_barriers, blocks, threads);
    barriers(warp_barriers, all / kWarp, kWarp);
    std::vector<std::thread> running;
    for (int thread = 0; thread < all; ++thread) {
      running.emplace_back([=, &arguments] {
        place = thread, block_place = thread / threads;
        threadIdx.x = thread % threads, blockIdx.x = cluster * blocks + block_place, gridDim.x = clusters * blocks;
        kernel(arguments);
      });
    }
    for (auto& one : running) one.join();
  }
}

template <class Arguments>
void run_blocks(void (*kernel)(Arguments), const Arguments& arguments, int grid, int threads) {
  run_clusters(kernel, arguments, grid, 1, threads);
}
