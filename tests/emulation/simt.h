// A GPU played on the host, as far as the kernels of csrc/ need one: included before a .cu file
// (g++ -include) it takes the place of csrc/ptx.cuh. Each thread of a block is a fiber; one OS thread runs
// the fibers of a block and switches only at barriers and warp collectives. What it checks beyond arithmetic:
//  * order: between two __syncthreads a warp runs until it waits before the next warp starts, in ascending or
//    descending order (the environment's EMU_ORDER, 0 or 1), the schedules furthest from lockstep: a missing
//    barrier gives wrong numbers in one of them;
//  * races: built with -fsanitize=thread every fiber is a thread to ThreadSanitizer, and only barriers order
//    them;
//  * bounds: shared memory is a heap block of exactly the size of the launch, for AddressSanitizer;
//  * initialisation: shared memory starts as NaN, and an asynchronous copy lands when it is waited for and
//    not before;
//  * convergence: a barrier or a collective that some threads do not reach aborts with one line.
// It says nothing about PTX text, speed or bank conflicts.
#pragma once
#define SAE_PTX                                               // csrc/ptx.cuh is not wanted
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <list>
#include <memory>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define EMU_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#else
#define EMU_UNSEEN
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

struct bf16_t { uint16_t bits; };
struct fp16_t { uint16_t bits; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };

namespace emu {
struct Index { unsigned x = 0; };                             // the kernels use one dimension
struct Copy { void* to; const void* from; bool valid; };
constexpr size_t kStack = 64 * 1024;

struct Fiber {
  ucontext_t context{};
  char* stack = nullptr;
  Index index;
  enum { kRuns, kWaitsForBlock, kWaitsForWarp, kDone } state = kRuns;
  int collectives = 0;                                        // that it has passed: two mailboxes take turns
  uint64_t mail[2][2]{};
  std::vector<Copy> copies;
  void *asan = nullptr, *tsan = nullptr;
};
struct Block {
  std::vector<Fiber> fibers;
  size_t size;                                                // of shared memory, rounded up
  unsigned char* shared;
  Fiber* current = nullptr;
  Index index, threads;
  const std::function<void()>* body = nullptr;
  ucontext_t main{};
  void *asan_main = nullptr, *tsan_main = nullptr;
  const void* main_stack = nullptr;
  size_t main_size = 0;
  char barrier = 0, *start = nullptr, *end = nullptr;

  Block(int n, size_t bytes)
      : fibers(n),
        size((bytes + 127) / 128 * 128 + 128),
        shared(static_cast<unsigned char*>(std::aligned_alloc(128, size))) {
    std::memset(shared, 0xff, size);                          // NaN in every format
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(shared + bytes, size - bytes);
#elif defined(__SANITIZE_THREAD__)
    tsan_main = __tsan_get_current_fiber();
    for (auto& f : fibers) f.tsan = __tsan_create_fiber(0);
#endif
  }
  Block(const Block&) = delete;
  ~Block() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(shared, size);
#elif defined(__SANITIZE_THREAD__)
    for (auto& f : fibers) __tsan_destroy_fiber(f.tsan);
#endif
    std::free(shared);
  }
};
inline std::vector<std::unique_ptr<char[]>> stacks;
inline Block* block = nullptr;
inline int order = 0;

// A switch orders nothing (no_sync): only barriers do, through acquire and release.
EMU_UNSEEN inline void swap(Fiber& f, bool enter) {
#if defined(__SANITIZE_ADDRESS__)
  if (enter)
    __sanitizer_start_switch_fiber(&block->asan_main, f.stack, kStack);
  else
    __sanitizer_start_switch_fiber(f.state == Fiber::kDone ? nullptr : &f.asan, block->main_stack,
                                   block->main_size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(enter ? f.tsan : block->tsan_main, __tsan_switch_to_fiber_no_sync);
#endif
  if (enter)
    swapcontext(&block->main, &f.context);
  else
    swapcontext(&f.context, &block->main);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(enter ? block->asan_main : f.asan, nullptr, nullptr);
#endif
}
inline void release(char* at) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(at);
#else
  (void)at;
#endif
}
inline void acquire(char* at) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(at);
#else
  (void)at;
#endif
}
EMU_UNSEEN inline void wait(decltype(Fiber::state) state) {
  Fiber& f = *block->current;
  f.state = state;
  swap(f, false);
}
EMU_UNSEEN inline void die(const char* what) {
  std::fprintf(stderr, "emulation: %s in block %u\n", what, block->index.x);
  std::abort();
}
EMU_UNSEEN inline void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block->main_stack, &block->main_size);
#endif
  acquire(block->start);
  (*block->body)();
  release(block->end);
  block->current->state = Fiber::kDone;
  swap(*block->current, false);
}
// Until every lane waits at __syncthreads or has returned.
EMU_UNSEEN inline void run_warp(int first, int last) {
  for (int waiting = 1; waiting;) {
    for (int k = first; k < last; ++k) {
      Fiber& f = block->fibers[order ? first + last - 1 - k : k];
      if (f.state == Fiber::kRuns) {
        block->current = &f;
        swap(f, true);
      }
    }
    waiting = 0;
    for (int i = first; i < last; ++i) waiting += block->fibers[i].state == Fiber::kWaitsForWarp;
    if (waiting && waiting != last - first) die("a warp collective that some lanes do not reach");
    for (int i = first; waiting && i < last; ++i) block->fibers[i].state = Fiber::kRuns;
  }
}
EMU_UNSEEN inline void run_block() {
  const int n = int(block->fibers.size()), warps = (n + 31) / 32;
  for (int done = 0; done != n;) {
    for (int k = 0; k < warps; ++k) {
      const int w = order ? warps - 1 - k : k;
      run_warp(32 * w, std::min(n, 32 * w + 32));
    }
    int at_barrier = done = 0;
    for (auto& f : block->fibers) {
      done += f.state == Fiber::kDone;
      at_barrier += f.state == Fiber::kWaitsForBlock;
    }
    if (done + at_barrier != n || (done && at_barrier)) die("a __syncthreads that some threads do not reach");
    for (auto& f : block->fibers)
      if (!done) f.state = Fiber::kRuns;
  }
}
EMU_UNSEEN inline void launch(int64_t blocks, int threads, size_t shared, const std::function<void()>& body) {
  const char* wanted = std::getenv("EMU_ORDER");
  order = wanted ? std::atoi(wanted) : 0;
  std::list<Block> memory;
  stacks.clear();
  char start = 0, end = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    size_t first_stack = 0;
#if defined(__SANITIZE_THREAD__)  // must not see memory used again, or it would order the blocks
    first_stack = stacks.size();
#else
    memory.clear();
#endif
    while (stacks.size() < first_stack + threads) stacks.emplace_back(new char[kStack]);
    block = &memory.emplace_back(threads, shared);
    block->index.x = unsigned(b);
    block->threads.x = threads;
    block->body = &body;
    block->start = &start;
    block->end = &end;
    for (int i = 0; i < threads; ++i) {
      Fiber& f = block->fibers[i];
      f.index.x = i;
      f.stack = stacks[first_stack + i].get();
#if defined(__SANITIZE_ADDRESS__)
      __asan_unpoison_memory_region(f.stack, kStack);         // of what the last fiber left
#endif
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack;
      f.context.uc_stack.ss_size = kStack;
      f.context.uc_link = nullptr;
      makecontext(&f.context, entry, 0);
    }
    release(&start);
    run_block();
  }
  acquire(&end);
  block = nullptr;
}

inline int lane() { return block->current->index.x & 31; }
// Every lane posts v; then lane l's v is at<T>(l).
struct Mail {
  int warp, box;
  template <class T>
  EMU_UNSEEN T at(int lane) const {
    T v{};
    if (size_t(warp + lane) < block->fibers.size())
      std::memcpy(&v, block->fibers[warp + lane].mail[box], sizeof v);
    return v;
  }
};
template <class T>
EMU_UNSEEN Mail post(T v) {
  static_assert(sizeof(T) <= 16, "");
  Fiber& me = *block->current;
  const int box = me.collectives++ & 1;
  std::memcpy(me.mail[box], &v, sizeof v);
  wait(Fiber::kWaitsForWarp);
  return {int(me.index.x & ~31u), box};
}
}  // namespace emu

#define threadIdx (emu::block->current->index)
#define blockIdx (emu::block->index)
#define blockDim (emu::block->threads)

inline void __syncthreads() {
  emu::release(&emu::block->barrier);
  emu::wait(emu::Fiber::kWaitsForBlock);
  emu::acquire(&emu::block->barrier);
}
template <class T>
inline T __shfl_xor_sync(unsigned, T v, int mask) { return emu::post(v).template at<T>(emu::lane() ^ mask); }
inline bool __any_sync(unsigned, bool v) {
  const emu::Mail mail = emu::post(v);
  bool any = false;
  for (int i = 0; i < 32; ++i) any |= mail.at<bool>(i);
  return any;
}

inline float __uint_as_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline uint32_t __float_as_uint(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }
template <class T>
T __ldg(const T* p) { return *p; }
inline void store_16(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const uint32_t v[] = {a, b, c, d};
  std::memcpy(to, v, 16);
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float v) { return std::sqrt(v); }
inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_divide(float x, float y) { return x / y; }
inline float2 make_float2(float x, float y) { return {x, y}; }

template <class T>
inline T* shared_memory() { return reinterpret_cast<T*>(emu::block->shared); }

template <class T>
inline float2 unpack(uint32_t v);
template <>
inline float2 unpack<bf16_t>(uint32_t v) {
  return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)};
}
template <>
inline float2 unpack<fp16_t>(uint32_t v) {
  _Float16 h[2];
  std::memcpy(h, &v, 4);
  return {float(h[0]), float(h[1])};
}
template <class T>
inline uint32_t pack(float low, float high);
template <>
inline uint32_t pack<bf16_t>(float low, float high) {
  const auto round = [](float f) {
    const uint32_t u = __float_as_uint(f);
    return std::isnan(f) ? 0x7fffu : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  };
  return round(low) | round(high) << 16;
}
template <>
inline uint32_t pack<fp16_t>(float low, float high) {
  const _Float16 h[2] = {_Float16(low), _Float16(high)};
  uint32_t v;
  std::memcpy(&v, h, 4);
  return v;
}

// A lane reads its own values itself, so that ThreadSanitizer sees who reads what.
template <bool kTrans>
inline void emu_ldmatrix(uint32_t (&r)[4], const void* row) {
  const emu::Mail mail = emu::post(row);
  const int l = emu::lane();
  for (int m = 0; m < 4; ++m) {
    const auto at = [&](int i, int j) {
      return static_cast<const uint16_t*>(mail.at<const void*>(8 * m + i))[j];
    };
    const uint32_t low = kTrans ? at(l % 4 * 2, l / 4) : at(l / 4, l % 4 * 2);
    const uint32_t high = kTrans ? at(l % 4 * 2 + 1, l / 4) : at(l / 4, l % 4 * 2 + 1);
    r[m] = low | high << 16;
  }
}
inline void ldmatrix(uint32_t (&r)[4], const void* row) { emu_ldmatrix<false>(r, row); }
inline void ldmatrix_trans(uint32_t (&r)[4], const void* row) { emu_ldmatrix<true>(r, row); }

// csrc/attention_mma.cu draws the layout. Register i of lane l holds
//   a[l / 4 + 8 (i & 1)][l % 4 * 2 + 8 (i >> 1)] and the next column,
//   b[l % 4 * 2 + 8 i][l / 4] and the next row,
//   d[l / 4 + 8 (i >> 1)][l % 4 * 2 + (i & 1)].
template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct A { uint32_t v[4]; };
  struct B { uint32_t v[2]; };
  const int l = emu::lane();
  float rows[2][16], cols[2][16];
  const emu::Mail mail_a = emu::post(A{{a[0], a[1], a[2], a[3]}});
  for (int q = 0; q < 4; ++q) {
    const A v = mail_a.at<A>(l / 4 * 4 + q);
    for (int i = 0; i < 4; ++i) {
      const float2 f = unpack<T>(v.v[i]);
      rows[i & 1][q * 2 + (i >> 1) * 8] = f.x;
      rows[i & 1][q * 2 + (i >> 1) * 8 + 1] = f.y;
    }
  }
  const emu::Mail mail_b = emu::post(B{{b0, b1}});
  for (int c = 0; c < 2; ++c)
    for (int q = 0; q < 4; ++q) {
      const B v = mail_b.at<B>((l % 4 * 2 + c) * 4 + q);
      for (int i = 0; i < 2; ++i) {
        const float2 f = unpack<T>(v.v[i]);
        cols[c][q * 2 + i * 8] = f.x;
        cols[c][q * 2 + i * 8 + 1] = f.y;
      }
    }
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k) d[i] += rows[i >> 1][k] * cols[i & 1][k];
}

inline void copy_async(void* to, const void* from, bool valid) {
  emu::block->current->copies.push_back({to, from, valid});
}
inline void copy_async_wait() {
  std::vector<emu::Copy> copies;
  copies.swap(emu::block->current->copies);
  for (const emu::Copy& c : copies) {
    if (c.valid)
      std::memcpy(c.to, c.from, 16);
    else
      std::memset(c.to, 0, 16);
  }
}

template <class... P, class... A>
inline const char* launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared, void*,
                          A... args) {
  emu::launch(blocks, threads, shared, [=] { kernel(args...); });
  return nullptr;
}
