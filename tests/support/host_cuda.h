// CUDA's words, as far as csrc/flat_update.cu uses them, on the threads of a CPU: to run a kernel where there is no
// GPU. Blocks run one after another, the threads of a block at once; shared memory is static, and shuffles and
// __syncthreads are barriers.
#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __CUDACC_RTC__
#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
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
std::unique_ptr<std::barrier<>> block_barrier;
std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
std::vector<double> lanes;

void __syncthreads() { block_barrier->arrive_and_wait(); }

double __shfl_down_sync(unsigned, double value, int offset) {
  const int thread = threadIdx.x, lane = thread % kWarp;
  lanes[thread] = value;
  warp_barriers[thread / kWarp]->arrive_and_wait();
  const double below = lane + offset < kWarp ? lanes[thread + offset] : value;
  warp_barriers[thread / kWarp]->arrive_and_wait();
  return below;
}

template <class Arguments>
void run_blocks(void (*kernel)(Arguments), const Arguments& arguments, int grid, int threads) {
  lanes.assign(threads, 0);
  for (int block = 0; block < grid; ++block) {
    block_barrier = std::make_unique<std::barrier<>>(threads);
    warp_barriers.clear();
    for (int warp = 0; warp < threads / kWarp; ++warp) warp_barriers.push_back(std::make_unique<std::barrier<>>(kWarp));
    std::vector<std::thread> running;
    for (int thread = 0; thread < threads; ++thread) {
      running.emplace_back([=, &arguments] {
        threadIdx.x = thread, blockIdx.x = block, gridDim.x = grid;
        kernel(arguments);
      });
    }
    for (auto& one : running) one.join();
  }
}
