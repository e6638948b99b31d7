// Multi-tensor LAMB on the CPU: one parallel region, two passes over a batch of tensors at a time.
//
// Traffic per fp32 parameter: the first pass reads p, g, m, v and writes m, v (24 bytes), the second reads p and the
// direction and writes p. The directions stay in a buffer that is used again for every tensor, so in the L3 cache at
// least. p is in a core's L2 still where its share of the tensor is small, as are all small tensors' (a batch is as
// small as the tensors allow, each thread keeps to its own part of it in both passes and walks the second one
// backwards); else it comes from memory again, as L3 does not keep what was read once. Reads are what costs: a core
// that takes 0.24 ns for a float from memory, 0.14 from L3 and 0.06 from L2 needs for AdamW's 4 from memory two thirds
// of what LAMB's 5 and 2 from L3 take, so with L2's help 1.4 times is near the floor. What a thread has beyond its
// buffer, of tensors too large for any cache, is computed again from p, m and v.
//
// Norms are summed in the order that math/lamb.h fixes: the bits do not depend on how blocks are shared out.
#include "cpu/lamb.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <type_traits>
#include <vector>

#include "core/parallel_for.h"
#include "cpu/memory.h"
#include "cpu/moments.h"
#include "cpu/staging.h"

namespace superfine::cpu::SF_ISA {
namespace {

constexpr std::int64_t kBlock = kLambBlock;
constexpr int kLanes = kLambLanes;
// Elements of a batch of small tensors: enough to pay for a barrier, few enough for 12 bytes of each to
// stay in a core's L2.
constexpr std::int64_t kBatch = 64 * kBlock;
// What a thread keeps directions in: two threads keep those of 4096 x 1024 fp32 elements.
constexpr std::int64_t kKept = std::int64_t{8} << 20;

// A block of one tensor.
struct Block {
  std::int32_t tensor, batch;
  std::int64_t begin, end;
};

// Of a block. (Vectors hold types of this namespace only: their code must not be shared between instruction sets.)
struct Norms {
  LambNorms sums;
};

// Directions of the last blocks of a thread's share. Every thread keeps its buffer from step to step, as the first
// touch of its pages would cost more than all else. Where memory is short, no direction is kept.
class Directions {
 public:
  Directions() = default;
  ~Directions() { std::free(data_); }
  Directions(const Directions&) = delete;
  Directions& operator=(const Directions&) = delete;

  // Makes room for the last ones of `blocks`, of elements of up to `element_bytes`. Places lie side by side: with gaps
  // between them a part of the cache's sets would hold them all.
  void reserve(std::int64_t blocks, std::int64_t element_bytes) {
    place_ = kBlock * element_bytes;
    const std::int64_t bytes = std::min(blocks * place_, kKept);
    if (bytes <= bytes_) return;
    std::free(data_);
    data_ = static_cast<char*>(std::malloc(bytes));
    bytes_ = data_ == nullptr ? 0 : bytes;
    advise_huge_pages(data_, bytes_);
  }

  // Where those of the `n`-th block from the end are kept; null if they are not.
  template <class T>
  const T* find(std::int64_t n) const {
    return (n + 1) * place_ <= bytes_ ? reinterpret_cast<const T*>(data_ + n * place_) : nullptr;
  }

  // Where to write them, kept or not.
  template <class T>
  T* place(std::int64_t n) {
    return reinterpret_cast<T*>((n + 1) * place_ <= bytes_ ? data_ + n * place_ : forgotten_);
  }

 private:
  char* data_ = nullptr;
  std::int64_t bytes_ = 0, place_ = 0;
  alignas(64) char forgotten_[kBlock * sizeof(double)];
};
thread_local Directions directions_of_thread;

// Adds halves, as the shuffles of a warp do. `n` is a power of two.
template <class T>
T tree_sum(T* x, int n) {
  for (int half = n / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
}

template <class T>
double sum_lanes(const T* lanes) {
  double wide[kLanes];
  for (int i = 0; i < kLanes; ++i) wide[i] = lanes[i];
  return tree_sum(wide, kLanes);
}

// Of a tensor whose `count` blocks have these norms.
LambNorms sum_blocks(const Norms* blocks, std::int64_t count) {
  const auto chunk = [&](std::int64_t first) {
    LambNorms norms[kLambWarps];
    for (std::int64_t i = first; i < std::min(first + kLambWarps, count); ++i) norms[i - first] = blocks[i].sums;
    return tree_sum(norms, kLambWarps);
  };
  constexpr std::int64_t kPass = kLambWarps * kLambLanes;  // chunks, one for each thread of a GPU's block
  const std::int64_t chunks = (count + kLambWarps - 1) / kLambWarps;
  LambNorms warps[kLambWarps];
  for (std::int64_t w = 0; w < kLambWarps && w * kLanes < chunks; ++w) {
    LambNorms lanes[kLanes];
    for (std::int64_t pass = w * kLanes; pass < chunks; pass += kPass) {
      for (std::int64_t c = pass; c < std::min(pass + kLanes, chunks); ++c) lanes[c - pass] += chunk(c * kLambWarps);
    }
    warps[w] = tree_sum(lanes, kLanes);
  }
  return tree_sum(warps, kLambWarps);
}

void find_directions(const LambTensor& t, const LambScalars<float>& s, std::int64_t n, const Stage& stage,
                     float* __restrict out) {
  const bool anchored = t.anchor != nullptr;
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const float distance = anchored ? stage.param[i] - stage.anchor[i] : stage.param[i];
    out[i] = lamb_direction(s, distance, stage.exp_avg[i], stage.exp_avg_sq[i]);
  }
}

template <bool kAnchor, class Param, class S>
LambNorms update_moments(const LambTensor& t, const Param param, S, std::int64_t begin, std::int64_t end,
                         typename Param::Math* __restrict place) {
  using T = typename Param::Math;
  using E = typename Param::Element;
  const LambScalars<T> s = round_scalars<T>(t.scalars);
  E* __restrict g = static_cast<E*>(t.grad);
  S* __restrict m = static_cast<S*>(t.exp_avg);
  S* __restrict v = static_cast<S*>(t.exp_avg_sq);
  const E* __restrict anchor = static_cast<const E*>(t.anchor);
  T params[kLanes] = {}, directions[kLanes] = {};
  const auto element = [&](std::int64_t i, int lane) __attribute__((always_inline)) {
    T mi = load(m[i]), vi = load(v[i]);
    const T pi = param.get(i);
    lamb_moments(s, T(load(g[i])), mi, vi);
    S stored_m, stored_v;
    store(&stored_m, mi);
    store(&stored_v, vi);
    m[i] = stored_m;
    v[i] = stored_v;
    const T distance = kAnchor ? pi - T(load(anchor[i])) : pi;
    const T u = lamb_direction(s, distance, T(load(stored_m)), T(load(stored_v)));
    place[i - begin] = u;
    params[lane] = std::fma(pi, pi, params[lane]);
    directions[lane] = std::fma(u, u, directions[lane]);
  };
  std::int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    if ((i - begin) % kPageElements == 0) {
      param.prefetch_next_page(i);
      prefetch_next_page(g + i);
      prefetch_next_page(m + i);
      prefetch_next_page(v + i);
      if (kAnchor) prefetch_next_page(anchor + i);
    }
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) element(i + lane, lane);
  }
  for (int lane = 0; i < end; ++i, ++lane) element(i, lane);
  if (t.zero_grad) zero(g, begin, end);
  return {sum_lanes(params), sum_lanes(directions)};
}

// Both for a block that has to be staged. Moments are stored before they make the direction, as above.
LambNorms update_moments_staged(const LambTensor& t, std::int64_t begin, std::int64_t end, float* __restrict place) {
  const LambScalars<float> s = round_scalars<float>(t.scalars);
  Stage stage;
  float params[kLanes] = {}, directions[kLanes] = {};
  for (std::int64_t strip = begin; strip < end; strip += kStage) {
    const std::int64_t n = std::min(kStage, end - strip);
    load_stage(t, strip, n, stage);
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) lamb_moments(s, stage.grad[i], stage.exp_avg[i], stage.exp_avg_sq[i]);
    store_moments(t, strip, n, stage);
    load_moments(t, strip, n, stage);
    float* __restrict out = place + (strip - begin);
    find_directions(t, s, n, stage, out);
    std::int64_t i = 0;
    const auto add = [&](std::int64_t i, int lane) __attribute__((always_inline)) {
      params[lane] = std::fma(stage.param[i], stage.param[i], params[lane]);
      directions[lane] = std::fma(out[i], out[i], directions[lane]);
    };
    for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
      for (int lane = 0; lane < kLanes; ++lane) add(i + lane, lane);
    }
    for (int lane = 0; i < n; ++i, ++lane) add(i, lane);
    if (t.zero_grad) zero_grad(t, strip, n);
  }
  return {sum_lanes(params), sum_lanes(directions)};
}

void update_param_staged(const LambTensor& t, double negative_step_size, std::int64_t begin, std::int64_t end,
                         const float* __restrict kept) {
  const LambScalars<float> s = round_scalars<float>(t.scalars);
  const float step_size = static_cast<float>(negative_step_size);
  Stage stage;
  for (std::int64_t strip = begin; strip < end; strip += kStage) {
    const std::int64_t n = std::min(kStage, end - strip);
    const float* __restrict u = kept != nullptr ? kept + (strip - begin) : stage.grad;
    if (kept != nullptr) {
      load_param(t, strip, n, stage);
    } else {
      load_stage(t, strip, n, stage);
      find_directions(t, s, n, stage, stage.grad);
    }
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) stage.param[i] = std::fma(step_size, u[i], stage.param[i]);
    store_param(t, strip, n, stage);
  }
}

// With directions computed again.
template <bool kAnchor, class Param, class S>
void update_param(const LambTensor& t, const Param param, S, double negative_step_size, std::int64_t begin,
                  std::int64_t end) {
  using T = typename Param::Math;
  using E = typename Param::Element;
  const LambScalars<T> s = round_scalars<T>(t.scalars);
  const T step_size = static_cast<T>(negative_step_size);
  const S* __restrict m = static_cast<const S*>(t.exp_avg);
  const S* __restrict v = static_cast<const S*>(t.exp_avg_sq);
  const E* __restrict anchor = static_cast<const E*>(t.anchor);
#pragma omp simd
  for (std::int64_t i = begin; i < end; ++i) {
    const T pi = param.get(i);
    const T distance = kAnchor ? pi - T(load(anchor[i])) : pi;
    const T u = lamb_direction(s, distance, T(load(m[i])), T(load(v[i])));
    param.set(i, std::fma(step_size, u, pi));
  }
}

// With the directions of the first pass.
template <class Param>
void update_param(const Param param, double negative_step_size, std::int64_t begin, std::int64_t end,
                  const typename Param::Math* __restrict directions) {
  const auto step_size = static_cast<typename Param::Math>(negative_step_size);
#pragma omp simd
  for (std::int64_t i = begin; i < end; ++i) param.set(i, std::fma(step_size, directions[i - begin], param.get(i)));
}

std::vector<Block> plan(const LambTensor* tensors, std::int64_t count) {
  std::vector<Block> blocks;
  std::int32_t batch = 0;
  std::int64_t pending = 0;  // elements of the batch so far
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t numel = tensors[i].numel;
    if (pending > 0 && pending + numel > kBatch) {
      ++batch;
      pending = 0;
    }
    for (std::int64_t begin = 0; begin < numel; begin += kBlock) {
      blocks.push_back({static_cast<std::int32_t>(i), batch, begin, begin + kBlock < numel ? begin + kBlock : numel});
    }
    pending += numel;
  }
  return blocks;
}

}  // namespace

void lamb(const LambTensor* tensors, std::int64_t count, int threads) {
  const std::vector<Block> blocks = plan(tensors, count);
  std::vector<Norms> norms(blocks.size());
  const bool wide = std::any_of(tensors, tensors + count, [](const auto& t) { return t.param_dtype == DType::f64; });

  // Of the tensor that block `b` belongs to.
  const auto negative_step_size = [&](std::int64_t b) {
    const LambTensor& t = tensors[blocks[b].tensor];
    const Norms* first = norms.data() + b - blocks[b].begin / kBlock;
    return lamb_negative_step_size(t.scalars, sum_blocks(first, (t.numel + kBlock - 1) / kBlock));
  };

  const std::int64_t total = static_cast<std::int64_t>(blocks.size());
  parallel_team(threads, [&](Team& team) {
    Directions& directions = directions_of_thread;
    directions.reserve(total, wide ? sizeof(double) : sizeof(float));
    for (std::int64_t first = 0, last; first < total; first = last) {
      last = first + 1;
      while (last < total && blocks[last].batch == blocks[first].batch) ++last;
      const auto [begin, end] = team.share(first, last);
      for (std::int64_t b = begin; b < end; ++b) {
        const LambTensor& t = tensors[blocks[b].tensor];
        if (is_staged(t)) {
          float* place = directions.place<float>(end - 1 - b);
          norms[b].sums = update_moments_staged(t, blocks[b].begin, blocks[b].end, place);
          continue;
        }
        norms[b].sums = with_types(t, [&, n = end - 1 - b](const auto& param, auto s) {
          const auto place = directions.place<typename std::decay_t<decltype(param)>::Math>(n);
          return t.anchor != nullptr ? update_moments<true>(t, param, s, blocks[b].begin, blocks[b].end, place)
                                     : update_moments<false>(t, param, s, blocks[b].begin, blocks[b].end, place);
        });
      }
      team.wait();
      std::int32_t tensor = -1;
      double step_size = 0;
      for (std::int64_t b = end; b-- > begin;) {
        const LambTensor& t = tensors[blocks[b].tensor];
        if (blocks[b].tensor != tensor) {
          tensor = blocks[b].tensor;
          step_size = negative_step_size(b);
        }
        if (is_staged(t)) {
          const float* kept = directions.find<float>(end - 1 - b);
          update_param_staged(t, step_size, blocks[b].begin, blocks[b].end, kept);
          continue;
        }
        with_types(t, [&, n = end - 1 - b](const auto& param, auto s) {
          const auto kept = directions.find<typename std::decay_t<decltype(param)>::Math>(n);
          if (kept != nullptr) {
            update_param(param, step_size, blocks[b].begin, blocks[b].end, kept);
          } else if (t.anchor != nullptr) {
            update_param<true>(t, param, s, step_size, blocks[b].begin, blocks[b].end);
          } else {
            update_param<false>(t, param, s, step_size, blocks[b].begin, blocks[b].end);
          }
        });
      }
    }
  });
}

}  // namespace superfine::cpu::SF_ISA
