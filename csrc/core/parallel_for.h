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

// Hands out [0, count) in pieces of `grain`. Each thread has a share of its own, the same one from call to call, so
// that its cache serves again; one whose core is busy with something else keeps nobody waiting, as the others take from
// its share when theirs are done.
class Shares {
 public:
  static constexpr int kMost = 64;  // shares; further threads begin with those of others

  Shares(std::int64_t count, std::int64_t grain, int threads)
      : grain_(grain), shares_(threads < kMost ? threads : kMost) {
    const std::int64_t pieces = (count + grain - 1) / grain;
    for (int i = 0; i < shares_; ++i) {
      share_[i].next.store(pieces * i / shares_ * grain, std::memory_order_relaxed);
      share_[i].end = i + 1 < shares_ ? pieces * (i + 1) / shares_ * grain : count;
    }
  }

 private:
  friend class Ranges;
  struct alignas(64) Share {
    std::atomic<std::int64_t> next;
    std::int64_t end;
  };

  std::int64_t grain_;
  int shares_;
  Share share_[kMost];
};

// One thread's view of the shares.
class Ranges {
 public:
  Ranges(Shares& shares, int rank) : shares_(shares), share_(rank % shares.shares_) {}

  // The next range for this thread; they come in order, but for the times that it turns to another share.
  bool next(std::int64_t& begin, std::int64_t& end) {
    for (; tried_ < shares_.shares_; ++tried_, share_ = (share_ + 1) % shares_.shares_) {
      Shares::Share& share = shares_.share_[share_];
      if (share.next.load(std::memory_order_relaxed) >= share.end) continue;
      begin = share.next.fetch_add(shares_.grain_, std::memory_order_relaxed);
      end = begin + shares_.grain_ < share.end ? begin + shares_.grain_ : share.end;
      if (begin < share.end) return true;
    }
    return false;
  }

 private:
  Shares& shares_;
  int share_, tried_ = 0;
};

// One copy of a worker, however many places call it.
template <class Worker, class Part>
#ifdef __GNUC__
__attribute__((noinline))
#endif
void run_worker(const Worker& worker, Part& part) {
  worker(part);
}

// Every thread calls worker(ranges) once.
template <class Worker>
inline void parallel_for(std::int64_t count, std::int64_t grain, int threads, const Worker& worker) {
#ifdef _OPENMP
  if (threads > 1 && count > grain && !omp_in_parallel()) {
    Shares shares(count, grain, threads);
#pragma omp parallel num_threads(threads)
    {
      Ranges ranges(shares, omp_get_thread_num());
      run_worker(worker, ranges);
    }
    return;
  }
#endif
  Shares shares(count, grain, 1);
  Ranges ranges(shares, 0);
  if (count > 0) run_worker(worker, ranges);
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
      run_worker(worker, team);
    }
    return;
  }
#endif
  Team team(0, 1);
  run_worker(worker, team);
}

}  // namespace
}  // namespace superfine
