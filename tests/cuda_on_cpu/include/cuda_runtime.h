// CUDA's device language for an ordinary C++ compiler and CPU: with this in place of CUDA's own headers,
// csrc/*/cuda_kernel.cu is plain C++ and its kernels run where there is no GPU.
//
// Blocks run one by one. The threads of a block are fibers: each runs until it waits for others, at a barrier, a
// shuffle or a vote, and who goes next is drawn anew every time, so that what a barrier should order comes in the wrong
// order where it is missing. Shared memory is full of NaN when a block begins. Blocks are one-dimensional.
//
// What has no meaning here, like matrix instructions and asynchronous copies, belongs in a struct that has a body for
// the device and one for the host.
#pragma once

#include <dlfcn.h>
#include <link.h>
#include <math.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) (void)(size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size) (void)(size)
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// Static within a function, as CUDA's are; and all that is thread_local in a library lies together, to be filled.
#define __shared__ thread_local

#define EFFK_VECTOR(name, type, count, ...) \
  struct alignas(sizeof(type) * count) name { \
    type __VA_ARGS__; \
  };
EFFK_VECTOR(int2, int, 2, x, y)
EFFK_VECTOR(int4, int, 4, x, y, z, w)
EFFK_VECTOR(uint2, unsigned, 2, x, y)
EFFK_VECTOR(uint4, unsigned, 4, x, y, z, w)
EFFK_VECTOR(float2, float, 2, x, y)
EFFK_VECTOR(float4, float, 4, x, y, z, w)
#undef EFFK_VECTOR

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// --- fibers -----------------------------------------------------------------------------------------------------------

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32, kMaxThreads = 1024;
constexpr size_t kMaxShared = 99 * 1024, kStack = 64 * 1024;

enum class State { kReady, kAtBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
  unsigned mask;  // at a warp barrier: the lanes that meet there
};

struct Block {
  Fiber fibers[kMaxThreads];
  unsigned threads = 0, current = 0;
  void (*kernel)(void*) = nullptr;
  void* arguments = nullptr;
  uint64_t slots[kMaxThreads];  // what each thread shows the others of its warp
  ucontext_t scheduler;
  const void* scheduler_stack;
  size_t scheduler_stack_size;
  std::mt19937 order;
};

inline Block block;

}  // namespace cuda_on_cpu

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace effk {
// What csrc calls dynamic shared memory; defined in ../runtime.cpp.
extern __shared__ __align__(16) unsigned char dynamic_shared[];
}  // namespace effk

namespace cuda_on_cpu {

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "cuda_on_cpu: block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, message);
  std::abort();
}

inline void wait(State state, unsigned mask = 0) {
  Fiber& self = block.fibers[block.current];
  self.state = state;
  self.mask = mask;
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, block.scheduler_stack, block.scheduler_stack_size);
  swapcontext(&self.context, &block.scheduler);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

// A fiber serves one thread of every block.
inline void serve() {
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_size);
  while (true) {
    block.kernel(block.arguments);
    wait(State::kDone);
  }
}

inline void resume(unsigned thread) {
  Fiber& fiber = block.fibers[thread];
  block.current = thread;
  threadIdx = {thread};
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), kStack);
  swapcontext(&block.scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

// Lets those go on for whom everybody is there. A thread that has returned is not waited for.
inline bool release() {
  bool any = false, all = true;
  for (unsigned first = 0; first < block.threads; first += kWarp) {
    const unsigned lanes = std::min(kWarp, block.threads - first);
    for (unsigned lane = 0; lane < lanes; ++lane) {
      Fiber* warp = &block.fibers[first];
      all = all && (warp[lane].state == State::kAtBarrier || warp[lane].state == State::kDone);
      if (warp[lane].state != State::kAtWarpBarrier) continue;
      const unsigned mask = warp[lane].mask;
      bool complete = mask >> lane & 1;
      for (unsigned other = 0; other < lanes; ++other)
        if (mask >> other & 1)
          complete = complete && (warp[other].state == State::kDone ||
                                  (warp[other].state == State::kAtWarpBarrier && warp[other].mask == mask));
      if (!complete) continue;
      for (unsigned other = 0; other < lanes; ++other)
        if (mask >> other & 1 && warp[other].state != State::kDone) warp[other].state = State::kReady;
      any = true;
    }
  }
  if (!all) return any;
  for (unsigned i = 0; i < block.threads; ++i)
    if (block.fibers[i].state == State::kAtBarrier) {
      block.fibers[i].state = State::kReady;
      any = true;
    }
  return any;
}

// All shared memory of this library: what it has of thread_local.
inline void poison_shared_memory(size_t dynamic_bytes) {
  ASAN_UNPOISON_MEMORY_REGION(effk::dynamic_shared, kMaxShared);
  dl_iterate_phdr(
      [](dl_phdr_info* library, size_t, void*) {
        for (int i = 0; i < library->dlpi_phnum; ++i) {
          const auto& part = library->dlpi_phdr[i];
          auto* data = static_cast<unsigned char*>(library->dlpi_tls_data);
          if (part.p_type != PT_TLS || effk::dynamic_shared < data || effk::dynamic_shared >= data + part.p_memsz) continue;
          std::memset(data, 0xFF, part.p_memsz);
        }
        return 0;
      },
      nullptr);
  ASAN_POISON_MEMORY_REGION(effk::dynamic_shared + dynamic_bytes, kMaxShared - dynamic_bytes);
}

inline void run_block(size_t shared_bytes) {
  poison_shared_memory(shared_bytes);
  std::vector<unsigned> ready(block.threads);
  std::iota(ready.begin(), ready.end(), 0u);
  for (unsigned thread : ready) {
    Fiber& fiber = block.fibers[thread];
    if (fiber.stack) continue;
    fiber.stack = std::make_unique<char[]>(kStack);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, serve, 0);
  }
  while (!ready.empty()) {
    std::shuffle(ready.begin(), ready.end(), block.order);
    for (unsigned thread : ready) resume(thread);
    ready.clear();
    bool finished = true;
    for (unsigned i = 0; i < block.threads; ++i) finished = finished && block.fibers[i].state == State::kDone;
    if (!finished && !release()) fail("this thread and others wait at different barriers");
    for (unsigned i = 0; i < block.threads; ++i)
      if (block.fibers[i].state == State::kReady) ready.push_back(i);
  }
}

template <class T>
void check_alignment(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) fail("a misaligned access");
}

// In a warp, every lane's value is shown and `read(values of the warp)` is what this one makes of it.
template <class T, class Read>
auto exchange(unsigned mask, T value, Read read) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const unsigned first = threadIdx.x / kWarp * kWarp;
  std::memcpy(&block.slots[threadIdx.x], &value, sizeof(T));
  wait(State::kAtWarpBarrier, mask);
  const auto at = [&](unsigned lane) {
    if (!(mask >> lane & 1)) fail("a shuffle reads from a lane outside its mask");
    const unsigned from = first + lane < block.threads ? first + lane : threadIdx.x;
    if (block.fibers[from].state == State::kDone) fail("a shuffle reads from a thread that has returned");
    T other;
    std::memcpy(&other, &block.slots[from], sizeof(T));
    return other;
  };
  const auto result = read(at);
  wait(State::kAtWarpBarrier, mask);
  return result;
}

// Takes a launch in the place of the CPU: the kernel's C++ name, its launch and its only argument.
using Launcher = void (*)(const char* kernel, unsigned grid, unsigned block, size_t shared, const void* params,
                          size_t size);
inline Launcher launcher = nullptr;

// What the emulated GPU says that it has.
inline int multiprocessors = 108;

}  // namespace cuda_on_cpu

// --- what kernels call ------------------------------------------------------------------------------------------------

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::State::kAtBarrier); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_on_cpu::wait(cuda_on_cpu::State::kAtWarpBarrier, mask); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return cuda_on_cpu::exchange(mask, value, [&](auto at) { return at(source % cuda_on_cpu::kWarp); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return __shfl_sync(mask, value, threadIdx.x % cuda_on_cpu::kWarp ^ lanes);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  const unsigned lane = threadIdx.x % cuda_on_cpu::kWarp;
  return __shfl_sync(mask, value, lane + by < cuda_on_cpu::kWarp ? lane + by : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  const unsigned lane = threadIdx.x % cuda_on_cpu::kWarp;
  return __shfl_sync(mask, value, lane < by ? lane : lane - by);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return cuda_on_cpu::exchange(mask, predicate, [&](auto at) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < cuda_on_cpu::kWarp; ++lane)
      if (mask >> lane & 1) votes |= unsigned{at(lane) != 0} << lane;
    return votes;
  });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

template <class T>
T __ldg(const T* from) {
  cuda_on_cpu::check_alignment(from);
  return *from;
}
template <class T>
void __stwb(T* to, T value) {
  cuda_on_cpu::check_alignment(to);
  *to = value;
}

inline float __frcp_rn(float x) { return 1.0f / x; }

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}

// --- half precision, rounded to nearest even --------------------------------------------------------------------------

struct __half {
  uint16_t bits;
};
inline float __half2float(__half x) {
  _Float16 value;
  std::memcpy(&value, &x, sizeof(x));
  return value;
}
inline __half __float2half_rn(float x) {
  const auto value = static_cast<_Float16>(x);
  __half bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (x != x) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// --- what launches them -----------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
inline const char* cudaGetErrorString(cudaError_t) { return "invalid launch configuration"; }

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor
};
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int values[] = {cuda_on_cpu::multiprocessors, cuda_on_cpu::kMaxShared, 100 * 1024};
  *value = values[attribute];
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <class Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 grid, dim3 threads, void** arguments, size_t shared_bytes,
                             cudaStream_t) {
  using namespace cuda_on_cpu;
  if (!grid.x || !threads.x || threads.x > kMaxThreads || shared_bytes > kMaxShared)
    return cudaErrorInvalidConfiguration;
  if (launcher) {
    Dl_info symbol;
    const bool named = dladdr(reinterpret_cast<void*>(kernel), &symbol) && symbol.dli_sname;
    launcher(named ? symbol.dli_sname : "", grid.x, threads.x, shared_bytes, arguments[0], sizeof(Params));
    return cudaSuccess;
  }
  std::pair<void (*)(Params), void*> call(kernel, arguments[0]);
  block.kernel = [](void* given) {
    const auto& [function, params] = *static_cast<decltype(call)*>(given);
    function(*static_cast<std::remove_const_t<Params>*>(params));
  };
  block.arguments = &call;
  block.threads = threads.x;
  gridDim = grid;
  blockDim = threads;
  for (unsigned i = 0; i < grid.x; ++i) {
    blockIdx = {i};
    run_block(shared_bytes);
    for (unsigned thread = 0; thread < threads.x; ++thread) block.fibers[thread].state = State::kReady;
  }
  return cudaSuccess;
}
