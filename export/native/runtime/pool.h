// Threads that share the pieces of one loop at a time.
//
// run(n, work) calls work(0..n-1), each once, on this thread and the pool's, and returns when all are done. Each
// thread has a range of its own, which it takes from front to back, a quarter of the rest at a time, and then helps the
// others piece by piece: so a thread that loses its core, or has a slow one, holds them up until it has done what it
// took, at most a quarter of its range. Threads wait for work by spinning for some microseconds, as the next loop of a
// step is near, and then sleep, so that a machine that others use as well stays usable; and so does the caller while it
// waits for the last pieces. What a piece throws, run throws when all pieces are done, the first of several. Threads
// that wait first prefetch what they read in the loop after the running one, where prefetch_later() told that: memory
// does not stand still while threads meet.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return int(ranges_.size()); }
  // In a forked process, where none of them are: from now on the caller does all pieces.
  void lose_threads() { alone_ = true; }

  // Tells what the loop after the next reads: its pieces from start on, each piece_bytes long.
  void prefetch_later(const uint8_t* start, size_t piece_bytes, int pieces) {
    prefetch_start_.store(start, std::memory_order_relaxed);
    prefetch_piece_.store(piece_bytes, std::memory_order_relaxed);
    prefetch_pieces_.store(pieces, std::memory_order_relaxed);
  }

  template <typename Work>
  void run(int n, const Work& work) {
    run_pieces(n, [](const void* context, int piece) { (*static_cast<const Work*>(context))(piece); }, &work);
  }

 private:
  using Call = void (*)(const void* context, int piece);
  // Next piece in the lower half, end in the upper: one atomic, so that a piece that was taken belongs to the loop
  // that is running, which cannot end before the piece is done.
  struct alignas(64) Range {
    std::atomic<uint64_t> next_and_end{0};
  };

  void run_pieces(int n, Call call, const void* context);
  void run_piece(int piece);
  void finish();
  struct Taken {
    int first, count;
  };
  Taken take(int thread);
  void serve(int thread);
  // The first piece of n in a thread's own range.
  int first(int thread, int n) const { return int(int64_t(n) * thread / threads()); }
  bool await_loop(int thread, uint32_t seen);
  template <typename Ready>
  bool spin(int thread, const Ready& ready) const;

  std::vector<Range> ranges_;
  std::vector<std::thread> others_;
  Call call_ = nullptr;
  const void* context_ = nullptr;
  bool alone_ = false;
  alignas(64) std::atomic<uint32_t> loop_{0};  // counts the loops
  alignas(64) std::atomic<int> done_{0};
  int pieces_ = 0;
  std::atomic<const uint8_t*> prefetch_start_{nullptr};
  std::atomic<size_t> prefetch_piece_{0};
  std::atomic<int> prefetch_pieces_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::atomic<bool> ends_{false};
  std::exception_ptr error_;  // of the running loop; under the mutex, as long as pieces run
  std::mutex mutex_;
  std::condition_variable wake_, all_done_;
};

// The threads of all models of a process that take so many: two models do not fight for the cores, their steps take
// turns.
struct SharedPool {
  explicit SharedPool(int threads) : pool(threads) {}
  Pool pool;
  std::mutex turn;  // held by the step that runs
};

// Made where no model has it yet in this process, ended with the last model. A fork waits for the steps that run:
// the models that the forked process inherits are between two steps, and go on with its one thread.
std::shared_ptr<SharedPool> shared_pool(int threads);
