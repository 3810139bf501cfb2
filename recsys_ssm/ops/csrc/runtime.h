// What the kernels share: threads, scratch memory, the processor's instruction sets.
//
// The functions below are compiled once, for every processor of the architecture. The kernels are
// compiled once for each instruction set, so nothing in a header they include may have external
// linkage: were an inline function or a template emitted twice, the linker would keep one copy, and a
// processor without AVX-512 could meet the AVX-512 one. Hence everything is in an anonymous namespace
// and the standard library's templates stay out of the kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define RECSYS_API extern "C" __declspec(dllexport)
#else
#define RECSYS_API extern "C" __attribute__((visibility("default")))
#endif

#if defined(RECSYS_ISA_AVX512)
#define RECSYS_KERNEL(name) RECSYS_API int name##_avx512
#elif defined(RECSYS_ISA_AVX2)
#define RECSYS_KERNEL(name) RECSYS_API int name##_avx2
#else
#define RECSYS_KERNEL(name) RECSYS_API int name##_baseline
#endif

// What a kernel returns; the Python side raises on anything but RECSYS_OK.
enum RecsysStatus : int { RECSYS_OK = 0, RECSYS_BAD_ARGUMENTS = 1, RECSYS_NO_MEMORY = 2 };

extern "C" {
// Calls task(context, i) for every i in [0, count), on at most `threads` threads of which the caller
// is one. Tasks are handed out in order, each to the thread that is free first; returns when all are
// done. Called from inside a task, or when the threads are busy for another caller, it runs serially.
void recsys_parallel(int64_t threads, int64_t count, void (*task)(void*, int64_t), void* context);

// `bytes` of 64-byte aligned memory that belongs to the calling thread until its next call: kept and
// grown, never shrunk, because mapping fresh pages on every call costs more than a short scan.
// Contents are undefined. Null when there is no memory.
void* recsys_scratch(size_t bytes);
}

namespace {

// parallel_for(threads, count, [&](int64_t i) { ... });
template <class F>
inline void parallel_for(int64_t threads, int64_t count, const F& body) {
  recsys_parallel(
      threads, count, [](void* f, int64_t i) { (*static_cast<const F*>(f))(i); },
      const_cast<F*>(&body));
}

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace
