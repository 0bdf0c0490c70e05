// Just enough of CUDA to run a kernel's source on a CPU, every thread of a block a thread of the host. For tests: slow.
#pragma once
#include <atomic>
#include <barrier>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define EMULATED
#define DEVICE inline
#define __device__
#define __forceinline__ inline
#define __global__
#define __constant__ static const
#define __shared__
#define __align__(n)
#define __launch_bounds__(...)
#define min(a, b) ((a) < (b) ? (a) : (b))

struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
struct Index { int x; };
static thread_local Index threadIdx, blockIdx;

alignas(65536) static char emulated_memory[65536 * 4];
static const uint32_t EMULATED_BASE = 1024;
#define memory (emulated_memory + EMULATED_BASE)

static std::unique_ptr<std::barrier<>> of_block;
static std::vector<std::unique_ptr<std::barrier<>>> of_warp;
static uint32_t lent[64][32][6];

inline void __syncthreads() { of_block->arrive_and_wait(); }
inline void __syncwarp() { of_warp[threadIdx.x / 32]->arrive_and_wait(); }
struct Named {
  std::mutex lock;
  std::condition_variable changed;
  int count = 0, phase = 0;
  void come(bool wait) {
    std::unique_lock<std::mutex> held(lock);
    int mine = phase;
    if (++count == (WARPS + 1) * 32) {
      count = 0;
      phase++;
      changed.notify_all();
    } else if (wait) {
      changed.wait(held, [&] { return phase != mine; });
    }
  }
};
static Named named[16];
inline void arrive(int number) { named[number].come(false); }
inline void meet(int number) { named[number].come(true); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline int atomicAdd(int* to, int value) { return std::atomic_ref<int>(*to).fetch_add(value); }
inline float __ldcg(const float* from) { return *from; }
inline void __stcg(float* to, float value) { *to = value; }
inline uint32_t __shfl_sync(unsigned, uint32_t value, int from) {
  int warp = threadIdx.x / 32;
  lent[warp][threadIdx.x % 32][0] = value;
  __syncwarp();
  uint32_t got = lent[warp][from][0];
  __syncwarp();
  return got;
}
inline float fmaf_(float a, float b, float c) { return std::fma(a, b, c); }
#define fmaf fmaf_

inline uint32_t shared_address(const void* p) { return (uint32_t)((const char*)p - emulated_memory); }
inline uint32_t load_shared(uint32_t at) { uint32_t v; std::memcpy(&v, emulated_memory + at, 4); return v; }
inline void store_shared(uint32_t at, uint32_t v) { std::memcpy(emulated_memory + at, &v, 4); }
inline float __uint_as_float(uint32_t bits) { float v; std::memcpy(&v, &bits, 4); return v; }
inline void copy16(void* to, const void* from) { std::memcpy(to, from, 16); }
inline void copy4(void* to, const void* from) { std::memcpy(to, from, 4); }
inline void close_group() {}
template <int N> inline void wait_groups() {}
inline void start_next() {}
inline void wait_for_previous() {}

inline float widened(uint16_t bits) { uint32_t wide = (uint32_t)bits << 16; float v; std::memcpy(&v, &wide, 4); return v; }
inline uint16_t rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
// The tensor core's m16n8k16 in bf16, as the PTX manual lays its fragments out.
inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = 0; i < 4; i++) lent[warp][lane][i] = a[i];
  lent[warp][lane][4] = b0;
  lent[warp][lane][5] = b1;
  __syncwarp();
  auto A = [&](int row, int k) {
    uint32_t pair = lent[warp][row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
    return widened(k % 2 ? pair >> 16 : pair & 0xffff);
  };
  auto B = [&](int k, int n) {
    uint32_t pair = lent[warp][n * 4 + k % 8 / 2][4 + k / 8];
    return widened(k % 2 ? pair >> 16 : pair & 0xffff);
  };
  for (int i = 0; i < 4; i++)
    for (int k = 0; k < 16; k++) c[i] += A(lane / 4 + i / 2 * 8, k) * B(k, lane % 4 * 2 + i % 2);
  __syncwarp();
}

// Runs ``kernel(arguments...)`` over blocks of ``threads``.
template <class Kernel, class... Arguments> void launch(int blocks, int threads, Kernel kernel, Arguments... arguments) {
  for (int block = 0; block < blocks; block++) {
    of_block = std::make_unique<std::barrier<>>(threads);
    of_warp.clear();
    for (int warp = 0; warp < threads / 32; warp++) of_warp.push_back(std::make_unique<std::barrier<>>(32));
    std::vector<std::thread> all;
    for (int thread = 0; thread < threads; thread++)
      all.emplace_back([=] {
        threadIdx.x = thread;
        blockIdx.x = block;
        kernel(arguments...);
      });
    for (auto& thread : all) thread.join();
  }
}
