// Splits [0, count) among threads. The runtime is OpenMP's, which torch has already started, so the
// threads are torch's own. Callers keep results independent of who computes what.
#pragma once

#include <atomic>
#include <cstdint>
#include <utility>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace superfine {
namespace {  // compiled once per instruction set: see cpu/isa.h

// Hands out [0, count) in pieces of `grain`, first come, first served: a thread whose core is busy with
// something else takes fewer, instead of keeping all others waiting at the end.
class Ranges {
 public:
  Ranges(std::int64_t count, std::int64_t grain) : count_(count), grain_(grain) {}

  bool next(std::int64_t& begin, std::int64_t& end) {
    begin = taken_.fetch_add(grain_, std::memory_order_relaxed);
    end = begin + grain_ < count_ ? begin + grain_ : count_;
    return begin < count_;
  }

 private:
  std::int64_t count_, grain_;
  std::atomic<std::int64_t> taken_{0};
};

// Every thread calls worker(ranges) once.
template <class Worker>
inline void parallel_for(std::int64_t count, std::int64_t grain, int threads, const Worker& worker) {
  Ranges ranges(count, grain);
#ifdef _OPENMP
  if (threads > 1 && count > grain && !omp_in_parallel()) {
#pragma omp parallel num_threads(threads)
    worker(ranges);
    return;
  }
#endif
  if (count > 0) worker(ranges);
}

// One of the threads that work through several steps together.
class Team {
 public:
  Team(int rank, int size) : rank_(rank), size_(size) {}

  // This thread's part of [first, last); the same one for the same range, so that its cache serves again.
  std::pair<std::int64_t, std::int64_t> share(std::int64_t first, std::int64_t last) const {
    const std::int64_t count = last - first;
    return {first + count * rank_ / size_, first + count * (rank_ + 1) / size_};
  }

  // Returns when all threads have called it.
  void wait() const {
#ifdef _OPENMP
    if (size_ > 1) {
#pragma omp barrier
    }
#endif
  }

 private:
  int rank_, size_;
};

// Every thread calls worker(team) once.
template <class Worker>
inline void parallel_team(int threads, const Worker& worker) {
#ifdef _OPENMP
  if (threads > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(threads)
    {
      Team team(omp_get_thread_num(), omp_get_num_threads());
      worker(team);
    }
    return;
  }
#endif
  Team team(0, 1);
  worker(team);
}

}  // namespace
}  // namespace superfine
