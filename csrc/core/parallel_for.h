// Splits [0, count) into one contiguous range per thread. The runtime is OpenMP's, which torch has
// already started, so the threads are torch's own. Callers keep results independent of the split.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace superfine {

template <class Body>  // body(begin, end)
inline void parallel_for(std::int64_t count, int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && count > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(threads)
    {
      const std::int64_t team = omp_get_num_threads(), rank = omp_get_thread_num();
      const std::int64_t begin = count / team * rank + (rank < count % team ? rank : count % team);
      const std::int64_t end = begin + count / team + (rank < count % team ? 1 : 0);
      if (begin < end) body(begin, end);
    }
    return;
  }
#endif
  if (count > 0) body(std::int64_t{0}, count);
}

}  // namespace superfine
