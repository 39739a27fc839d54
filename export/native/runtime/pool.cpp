#include "runtime/pool.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <new>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "runtime/errors.h"

namespace {

constexpr auto kSpin = std::chrono::microseconds(10);  // longer, and beside busy processes it spends slices waiting
constexpr int kLooks = 64;  // between two looks at the clock
constexpr int kLines = 8;            // between two looks whether the wait is over

// Bytes that a waiting thread prefetches: a quarter of its second cache, where they stay.
size_t prefetched_bytes() {
  constexpr size_t kLeast = 64 << 10, kMost = 512 << 10;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const long cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (cache > 0) return std::min(std::max(size_t(cache) / 4, kLeast), kMost);
#endif
  return kLeast;
}

int checked(int threads) {
  constexpr int kMaxThreads = 1024;
  if (threads < 1 || threads > kMaxThreads) throw_error(JAXGPT_BAD_ARGUMENT, "%d threads are none", threads);
  return threads;
}

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

}  // namespace

// Whether `ready` came true while prefetching what the thread reads next and then spinning.
template <typename Ready>
bool Pool::spin(int thread, const Ready& ready) const {
  if (const uint8_t* start = prefetch_start_.load(std::memory_order_relaxed)) {
    static const size_t most = prefetched_bytes();
    const size_t piece = prefetch_piece_.load(std::memory_order_relaxed);
    const int pieces = prefetch_pieces_.load(std::memory_order_relaxed), own = first(thread, pieces);
    start += size_t(own) * piece;
    const size_t bytes = std::min(most, size_t(first(thread + 1, pieces) - own) * piece);
    for (size_t ahead = 0; ahead < bytes; ahead += kLines * 64) {
      if (ready()) return true;
      for (int line = 0; line < kLines; line++) __builtin_prefetch(start + ahead + line * 64, 0, 2);
    }
  }
  const auto until = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < kLooks; i++) {
      if (ready()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < until);
  return ready();
}

Pool::Pool(int threads) : ranges_(size_t(checked(threads))) {
  others_.reserve(size_t(threads));
  try {
    for (int t = 1; t < threads; t++) others_.emplace_back([this, t] { serve(t); });
  } catch (...) {  // the system lends no more threads
    finish();
    throw;
  }
}

Pool::~Pool() { finish(); }

void Pool::finish() {
  ends_ = true;
  loop_++;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  for (auto& thread : others_) thread.join();
}

void Pool::run_pieces(int n, Call call, const void* context) {
  if (n <= 0) return;
  const int T = threads();
  if (T == 1 || n == 1 || alone_) {
    for (int i = 0; i < n; i++) call(context, i);
    return;
  }
  call_ = call;
  context_ = context;
  pieces_ = n;
  done_.store(0, std::memory_order_relaxed);
  for (int t = 0; t < T; t++) {
    ranges_[size_t(t)].next_and_end.store(uint64_t(first(t + 1, n)) << 32 | uint64_t(first(t, n)),
                                          std::memory_order_release);
  }
  loop_++;
  if (sleepers_ > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  int own = 0;  // told at the end, as every telling costs both threads a cache line
  for (Taken taken; (taken = take(0)).count; own += taken.count)
    for (int i = 0; i < taken.count; i++) run_piece(taken.first + i);
  done_.fetch_add(own, std::memory_order_acq_rel);
  const auto all_done = [this, n] { return done_ == n; };
  if (!spin(0, all_done)) {
    std::unique_lock<std::mutex> lock(mutex_);
    caller_sleeps_ = true;
    all_done_.wait(lock, all_done);
    caller_sleeps_ = false;
  }
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

// Keeps what a piece throws: the others still use what the loop was given.
void Pool::run_piece(int piece) {
  try {
    call_(context_, piece);
  } catch (...) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::current_exception();
  }
}

// A quarter of what is left of the thread's own range or, when that is empty, a piece of another's; none when all is
// taken. Not each piece by itself, as the processor reads nothing ahead over an atomic addition.
Pool::Taken Pool::take(int thread) {
  const int T = threads();
  for (int i = 0; i < T; i++) {
    auto& range = ranges_[size_t((thread + i) % T)].next_and_end;
    const uint64_t seen = range.load(std::memory_order_acquire);
    const uint32_t left = uint32_t(seen >> 32) - uint32_t(seen);
    if (uint32_t(seen) >= seen >> 32) continue;
    const uint32_t wanted = i == 0 && left > 4 ? left / 4 : 1;
    const uint64_t before = range.fetch_add(wanted, std::memory_order_acq_rel);
    const uint32_t first = uint32_t(before), end = uint32_t(before >> 32);
    if (first < end) return {int(first), int(end - first < wanted ? end - first : wanted)};
  }
  return {0, 0};
}

void Pool::serve(int thread) {
  uint32_t seen = 0;
  while (await_loop(thread, seen)) {
    seen = loop_.load();
    int own = 0, n = 0;
    for (Taken taken; (taken = take(thread)).count; own += taken.count) {
      n = pieces_;  // of the running loop, which the pieces that were not told yet keep from ending
      for (int i = 0; i < taken.count; i++) run_piece(taken.first + i);
    }
    if (own && done_.fetch_add(own) + own == n && caller_sleeps_) {
      std::lock_guard<std::mutex> lock(mutex_);
      all_done_.notify_all();
    }
  }
}

// Waits for a loop after number `seen`; false when the pool ends.
bool Pool::await_loop(int thread, uint32_t seen) {
  const auto came = [this, seen] { return loop_ != seen; };
  if (!spin(thread, came)) {
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_++;
    wake_.wait(lock, came);
    sleepers_--;
  }
  return !ends_;
}

namespace {

struct Registry {
  std::mutex mutex;
  std::map<std::pair<pid_t, int>, std::weak_ptr<SharedPool>> pools;
  std::vector<std::shared_ptr<SharedPool>> held;  // while the process forks, their turns too
};

Registry& registry() {
  static Registry& only = *new Registry;  // a process may fork until its very end
  return only;
}

void before_fork() {
  Registry& all = registry();
  all.mutex.lock();
  for (auto& [key, known] : all.pools)
    if (std::shared_ptr<SharedPool> found = known.lock()) {
      found->turn.lock();
      all.held.push_back(std::move(found));
    }
}

void after_fork() {
  Registry& all = registry();
  const auto held = std::move(all.held);  // let go after the locks: it may end a pool
  for (const auto& one : held) one->turn.unlock();
  all.mutex.unlock();
}

void in_forked_process() {
  for (const auto& one : registry().held) one->pool.lose_threads();
  after_fork();
}

}  // namespace

std::shared_ptr<SharedPool> shared_pool(int threads) {
  static const int handlers = pthread_atfork(before_fork, after_fork, in_forked_process);
  if (handlers) throw std::bad_alloc();
  Registry& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  // A forked process has none of these threads.
  std::weak_ptr<SharedPool>& known = all.pools[{getpid(), threads}];
  std::shared_ptr<SharedPool> found = known.lock();
  if (!found) {
    // A forked process inherits no threads: it would wait for them for ever, so it keeps what is left of the pool.
    const auto end = [owner = getpid()](SharedPool* pool) {
      if (getpid() == owner) delete pool;
    };
    known = found = std::shared_ptr<SharedPool>(new SharedPool(threads), end);
  }
  return found;
}
