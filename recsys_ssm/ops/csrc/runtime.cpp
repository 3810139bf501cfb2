#include "runtime.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(_WIN32)
#include <malloc.h>
#include <process.h>
#else
#include <unistd.h>
#endif
#if defined(_MSC_VER) && defined(_M_X64)
#include <immintrin.h>
#include <intrin.h>
#endif

namespace {

int64_t process_id() {
#if defined(_WIN32)
  return _getpid();
#else
  return getpid();
#endif
}

void aligned_release(void* memory) {
#if defined(_WIN32)
  _aligned_free(memory);
#else
  std::free(memory);
#endif
}

void* aligned_acquire(size_t bytes) {
#if defined(_WIN32)
  return _aligned_malloc(bytes, 64);
#else
  void* memory = nullptr;
  return posix_memalign(&memory, 64, bytes) == 0 ? memory : nullptr;
#endif
}

struct Scratch {
  void* memory = nullptr;
  size_t bytes = 0;
  ~Scratch() { aligned_release(memory); }
};
thread_local Scratch scratch;
thread_local bool inside_task = false;

// One call of recsys_parallel: every thread that takes part claims tasks until none is left.
struct Job {
  void (*task)(void*, int64_t);
  void* context;
  int64_t count;
  std::atomic<int64_t> next{0};

  void work() {
    inside_task = true;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(context, i);
    inside_task = false;
  }
};

// Threads of our own, for where PyTorch's OpenMP threads cannot be borrowed. They sleep between
// calls: a spinning thread would take a core from the next PyTorch operator.
class Pool {
 public:
  // Runs the job on at most `threads` threads, fewer if the system gives no more.
  void run(Job& job, int64_t threads) {
    grow(threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      wanted_ = threads - 1;
      ++generation_;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;  // who has not woken up by now need not
    done_.wait(lock, [&] { return active_ == 0; });
  }

 private:
  void grow(int64_t workers) {
    try {
      while (static_cast<int64_t>(workers_.size()) < workers) {
        workers_.emplace_back(&Pool::loop, this, static_cast<int64_t>(workers_.size()));
        workers_.back().detach();
      }
    } catch (const std::system_error&) {  // no more threads to be had: go on with those there are
    }
  }

  void loop(int64_t index) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      Job* job = job_;
      if (job == nullptr || index >= wanted_) continue;
      ++active_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  int64_t wanted_ = 0, active_ = 0;
  uint64_t generation_ = 0;
};

struct Shared {
  explicit Shared(int64_t process) : process(process) {}
  const int64_t process;
  std::mutex busy;  // one caller at a time; another runs serially
  Pool pool;
};
std::atomic<Shared*> shared{nullptr};  // never destroyed: its threads may outlive static destructors

// libgomp's entry point. PyTorch's Linux builds run their operators on libgomp's threads; running
// there too means that no second set of threads competes with it.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<GompParallel> gomp_parallel{nullptr};
std::atomic<int64_t> gomp_process{0};

void run_on_pool(Job& job, int64_t threads) {
  Shared* mine = shared.load();
  const int64_t process = process_id();
  if (mine == nullptr || mine->process != process) {
    // First call, or first call after a fork: the child has none of the threads, and a mutex may have
    // been held at that moment. It starts anew and leaves what it inherited where it is.
    Shared* fresh = new (std::nothrow) Shared(process);
    if (fresh != nullptr && shared.compare_exchange_strong(mine, fresh)) {
      mine = fresh;
    } else {
      delete fresh;
    }
  }
  if (mine == nullptr || mine->process != process || !mine->busy.try_lock()) {
    job.work();
    return;
  }
  mine->pool.run(job, threads);
  mine->busy.unlock();
}

}  // namespace

RECSYS_API void recsys_use_gomp(void* entry) {
  gomp_process.store(process_id());
  gomp_parallel.store(reinterpret_cast<GompParallel>(entry));
}

void recsys_parallel(int64_t threads, int64_t count, void (*task)(void*, int64_t), void* context) {
  if (threads > count) threads = count;
  Job job{task, context, count};
  if (threads <= 1 || inside_task) {
    const bool before = inside_task;
    job.work();
    inside_task = before;
    return;
  }
  const GompParallel gomp = gomp_parallel.load();
  // libgomp does not survive a fork: its threads are gone and it waits for them for ever.
  if (gomp != nullptr && gomp_process.load() == process_id()) {
    gomp([](void* data) { static_cast<Job*>(data)->work(); }, &job, static_cast<unsigned>(threads),
         0);
  } else {
    run_on_pool(job, threads);
  }
}

void* recsys_scratch(size_t bytes) {
  if (bytes > scratch.bytes) {
    aligned_release(scratch.memory);
    scratch.bytes = 0;
    scratch.memory = aligned_acquire(bytes);
    if (scratch.memory == nullptr) return nullptr;
    scratch.bytes = bytes;
  }
  return scratch.memory;
}

// 0 baseline, 1 AVX2 and FMA, 2 AVX-512 (F, VL, DQ, BW); what the operating system saves counts too.
RECSYS_API int recsys_isa() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")
             ? 2
             : 1;
#elif defined(_MSC_VER) && defined(_M_X64)
  int leaf[4];
  __cpuid(leaf, 0);
  if (leaf[0] < 7) return 0;
  __cpuid(leaf, 1);
  const bool fma = leaf[2] & (1 << 12), osxsave = leaf[2] & (1 << 27);
  if (!osxsave) return 0;
  const unsigned long long saved = _xgetbv(0);
  __cpuidex(leaf, 7, 0);
  const bool avx2 = leaf[1] & (1 << 5);
  const bool avx512 = (leaf[1] & (1 << 16)) && (leaf[1] & (1 << 17)) && (leaf[1] & (1 << 30)) &&
                      (leaf[1] & (1u << 31));
  if (!fma || !avx2 || (saved & 0x6) != 0x6) return 0;
  return avx512 && (saved & 0xE6) == 0xE6 ? 2 : 1;
#else
  return 0;
#endif
}

RECSYS_API int recsys_abi() { return RECSYS_ABI; }
