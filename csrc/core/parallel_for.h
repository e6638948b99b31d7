// Splits [0, count) among threads. The runtime is OpenMP's, which torch has already started, so the
// threads are torch's own. Callers keep results independent of who computes what.
#pragma once

#include <atomic>
#include <cstdint>

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

}  // namespace
}  // namespace superfine
