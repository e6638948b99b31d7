// Cross-entropy row by row; the formula is in math/cross_entropy.h.
//
// A row is read from memory once, block by block: maximum, then sum of exponentials. The exponentials
// stay in a buffer of the thread's own, in the L2 cache, and scaling them gives the gradient: C *
// sizeof(x) bytes in, the same out and one exponential an element, against two passes in, two out and
// two exponentials for log_softmax and its backward. What smoothing, probabilities of all classes and
// statistics need is read from the caches after that.
#include "cpu/cross_entropy.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "core/parallel_for.h"
#include "cpu/logits.h"
#include "cpu/stream.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace superfine::cpu::SF_ISA {
namespace {

// What one thread keeps of a row between the passes: exponentials relative to the maximum up to their
// block, and those maxima.
template <class T>
class Scratch {
 public:
  explicit Scratch(std::int64_t vocab)
      : exponentials_(allocate(vocab + kLanes)), maxima_(allocate(vocab / kBlock + 1)), block_(allocate(kBlock)) {}
  ~Scratch() {
    std::free(exponentials_);
    std::free(maxima_);
    std::free(block_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* exponentials() const { return exponentials_; }
  T& maximum(std::int64_t element) const { return maxima_[element / kBlock]; }
  T* block() const { return block_; }  // the values of a block

 private:
  static T* allocate(std::int64_t count) {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (memory == nullptr) std::abort();  // out of memory inside a parallel region
    return static_cast<T*>(memory);
  }

  T *exponentials_, *maxima_, *block_;
};

template <class T>
struct RowSums {
  T maximum;
  T sum;               // sum_c exp(y_c - maximum)
  std::int64_t block;  // where the first of the largest begins

  T shift() const { return maximum == -std::numeric_limits<T>::infinity() ? T(0) : maximum; }
};

// Meanwhile the logits from `ahead` on come from memory, to the L2 cache: the L1 cache has few misses under way.
template <class E, bool kKeep>
void sum_block(const Opmath<E>* y, std::int64_t count, Opmath<E> shift, std::uintptr_t ahead, Opmath<E>* exponentials,
               Opmath<E>* sums) {
  using T = Opmath<E>;
  T buffer[kLanes];
  for_each_group(y, count, -std::numeric_limits<T>::infinity(), [&](const T* group, std::int64_t offset) {
    for (std::uintptr_t line = 0; line < kLanes * sizeof(E); line += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(ahead + offset * sizeof(E) + line), 0, 2);
    }
    T* kept = kKeep ? exponentials + offset : buffer;
    for (int l = 0; l < kLanes; ++l) kept[l] = exp_nonpositive(group[l] - shift);
    for (int l = 0; l < kLanes; ++l) sums[l] += kept[l];
  });
}

template <class T>
T max_of_block(const T* y, std::int64_t count, T running) {
  T maxima[kLanes];
  for (int l = 0; l < kLanes; ++l) maxima[l] = running;
  for_each_group(y, count, running, [&](const T* group, std::int64_t) {
    for (int l = 0; l < kLanes; ++l) maxima[l] = group[l] > maxima[l] ? group[l] : maxima[l];
  });
  return tree(maxima, true);
}

// The same, of a block that it turns into floats on the way: a pass less through the L1 cache.
float max_of_block(const bf16* x, std::int64_t count, float running, float* values) {
  float maxima[kLanes];
  for (int l = 0; l < kLanes; ++l) maxima[l] = running;
  std::int64_t i = 0;
#if defined(__AVX512F__)  // the compiler would keep the maxima in memory
  constexpr int kWidth = 16;
  __m512 registers[kLanes / kWidth];
  for (__m512& maximum : registers) maximum = _mm512_set1_ps(running);
  for (; i + kLanes <= count; i += kLanes) {
    for (int k = 0; k < kLanes / kWidth; ++k) {
      const __m256i upper = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i + k * kWidth));
      const __m512 y = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(upper), 16));
      _mm512_storeu_ps(values + i + k * kWidth, y);
      registers[k] = _mm512_max_ps(y, registers[k]);  // a NaN leaves it as it is
    }
  }
  for (int k = 0; k < kLanes / kWidth; ++k) _mm512_storeu_ps(maxima + k * kWidth, registers[k]);
#endif
  const auto element = [&](std::int64_t i, int l) __attribute__((always_inline)) {
    values[i] = load(x[i]);
    maxima[l] = values[i] > maxima[l] ? values[i] : maxima[l];
  };
  for (; i + kLanes <= count; i += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) element(i + l, l);
  }
  for (int l = 0; i < count; ++i, ++l) element(i, l);
  return tree(maxima, true);
}

template <class E, bool kKeep>
RowSums<Opmath<E>> reduce_row(const Logits<E>& logits, const E* x, std::int64_t vocab,
                              const Scratch<Opmath<E>>& scratch) {
  using T = Opmath<E>;
  RowSums<T> row{-std::numeric_limits<T>::infinity(), T(0), 0};
  T sums[kLanes] = {};
  for (std::int64_t begin = 0; begin < vocab; begin += kBlock) {
    const std::int64_t count = least(kBlock, vocab - begin);
    T* const exponentials = kKeep ? scratch.exponentials() + begin : scratch.block();
    const T* y = exponentials;
    T maximum;
    if constexpr (std::is_same_v<E, bf16>) {
      if (logits.plain()) maximum = max_of_block(x + begin, count, row.maximum, exponentials);
    }
    if (!std::is_same_v<E, bf16> || !logits.plain()) {
      y = logits.values(x + begin, count, exponentials);
      maximum = max_of_block(y, count, row.maximum);
    }
    if (maximum > row.maximum) {
      const T rescale = exp_nonpositive(row.maximum - maximum);
      for (int l = 0; l < kLanes; ++l) sums[l] *= rescale;
      row.maximum = maximum;
      row.block = begin;
    }
    if (kKeep) scratch.maximum(begin) = row.maximum;
    // A block of -inf only adds exp(-inf) = 0.
    sum_block<E, kKeep>(y, count, row.shift(), reinterpret_cast<std::uintptr_t>(x + begin) + kBlock * sizeof(E),
                        exponentials, sums);
  }
  row.sum = tree(sums, false);
  return row;
}

// The v_c of math/cross_entropy.h.
template <class T>
class Wanted {
 public:
  explicit Wanted(const CrossEntropy& args)
      : args_(args),
        weight_(static_cast<const T*>(args.weight)),
        probabilities_(static_cast<const T*>(args.probabilities)),
        smoothing_(static_cast<T>(args.label_smoothing)),
        per_class_(smoothing_ / static_cast<T>(args.classes)),
        smooth_mass_(smoothing_ > T(0) && !dense() ? per_class_ * sum_of_weights() : T(0)) {}

  bool dense() const { return args_.target == nullptr; }
  bool in_every_class() const { return dense() || smoothing_ > T(0); }
  T smooth_mass() const { return smooth_mass_; }  // of the input's classes

  bool ignored(std::int64_t i) const {
    if (dense()) return false;
    for (std::int64_t k = 0; k < args_.targets; ++k) {
      if (label(i, k) != args_.ignore_index) return false;
    }
    return true;
  }

  // The column of a row's first label; not in [0, vocab) where the label is another part's.
  std::int64_t column(std::int64_t i) const { return label(i, 0) - args_.first_class; }

  // Calls body(column, v) for the targets by index that the input holds.
  template <class Body>
  void for_each_target(std::int64_t i, const Body& body) const {
    if (dense()) return;
    for (std::int64_t k = 0; k < args_.targets; ++k) {
      const std::int64_t c = label(i, k);
      if (c == args_.ignore_index) continue;
      const std::int64_t column = c - args_.first_class;
      if (column < 0 || column >= args_.vocab) continue;
      const T q = probabilities_ ? probabilities_[i * args_.probabilities_stride + k] : T(1);
      body(column, (T(1) - smoothing_) * (weight_ ? weight_[c] : T(1)) * q);
    }
  }

  // Whether one of the targets by index is among `count` columns from `begin` on.
  bool has_target(std::int64_t i, std::int64_t begin, std::int64_t count) const {
    bool found = false;
    for_each_target(i, [&](std::int64_t column, T) { found = found || (begin <= column && column < begin + count); });
    return found;
  }

  // What every class of the input wants, without targets by index, for `count` columns from `begin` on.
  void fill(std::int64_t i, std::int64_t begin, std::int64_t count, T* v) const {
    const std::int64_t first = args_.first_class + begin;
    if (dense()) {
      const T* q = probabilities_ + i * args_.probabilities_stride + first;
      for (std::int64_t j = 0; j < count; ++j) v[j] = (T(1) - smoothing_) * q[j] + per_class_;
    } else {
      for (std::int64_t j = 0; j < count; ++j) v[j] = per_class_;
    }
    if (weight_ == nullptr) return;
    for (std::int64_t j = 0; j < count; ++j) v[j] *= weight_[first + j];
  }

 private:
  std::int64_t label(std::int64_t i, std::int64_t k) const {
    const std::int64_t at = i * args_.target_stride + k;
    return args_.target_is_int64 ? static_cast<const std::int64_t*>(args_.target)[at]
                                 : static_cast<const std::int32_t*>(args_.target)[at];
  }

  T sum_of_weights() const {
    if (weight_ == nullptr) return static_cast<T>(args_.vocab);
    double sum = 0;
    for (std::int64_t c = 0; c < args_.vocab; ++c) sum += weight_[args_.first_class + c];
    return static_cast<T>(sum);
  }

  const CrossEntropy& args_;
  const T *weight_, *probabilities_;
  T smoothing_, per_class_, smooth_mass_;
};

template <class E>
class Rows {
 public:
  using T = Opmath<E>;

  explicit Rows(const CrossEntropy& args)
      : args_(args),
        logits_(args),
        wanted_(args),
        z_loss_(static_cast<T>(args.z_loss)),
        slope_(static_cast<T>(args.scale)),
        stream_(args.rows * args.vocab * static_cast<std::int64_t>(sizeof(E)) >= kStreamBytes) {}

  // Results, and with dlogits the gradient. Its buffer is dense; in place it is the input and keeps the row stride.
  void forward(std::int64_t i, T* out, bool statistics, E* dlogits, T scale, const Scratch<T>& scratch) const {
    if (wanted_.ignored(i)) {
      for (int k = 0; k < (statistics ? kRowStatistics : kRowResults); ++k) out[k * args_.rows + i] = T(0);
      if (dlogits) no_gradient(i, dlogits);
      return;
    }
    const RowSums<T> sums = dlogits ? reduce_row<E, true>(logits_, logits_.row(i), args_.vocab, scratch)
                                    : reduce_row<E, false>(logits_, logits_.row(i), args_.vocab, scratch);
    const Mass mass = this->mass(i, sums.shift());
    const T log_sum = std::log(sums.sum), lse = sums.maximum + log_sum;
    // Relative to the maximum, so that an offset common to a row costs no digits; no term is negative.
    out[kLoss * args_.rows + i] = (mass.sum * log_sum - mass.dot) + z_loss_ * lse * lse;
    out[kLse * args_.rows + i] = lse;
    out[kMass * args_.rows + i] = mass.sum;
    if (statistics) {
      out[kLogprob * args_.rows + i] = (at_target(i) - sums.shift()) - log_sum;
      out[kEntropy * args_.rows + i] = log_sum - weighted(i, sums.shift()) / sums.sum;
      const bool known = !std::isnan(sums.sum);
      out[kCorrect * args_.rows + i] = known && first_best(i, sums) == wanted_.column(i) ? T(1) : T(0);
    }
    if (!dlogits) return;
    const T normalizer = scale * slope_ * (mass.sum + T(2) * z_loss_ * lse) / sums.sum;
    write_gradient(i, scale * slope_, dlogits, [&](std::int64_t begin, std::int64_t, T*) {
      const T factor = normalizer * exp_nonpositive(scratch.maximum(begin) - sums.maximum);
      const T* e = scratch.exponentials() + begin;
      // Where their sum is a number, so are they, and are at most 1.
      return std::pair([=](std::int64_t j) { return factor * e[j]; }, factor - factor == T(0));
    });
  }

  void backward(std::int64_t i, T lse, T mass, T scale, E* dlogits) const {
    if (wanted_.ignored(i)) return no_gradient(i, dlogits);
    const T factor = scale * slope_ * (mass + T(2) * z_loss_ * lse);
    const E* x = logits_.row(i);
    write_gradient(i, scale * slope_, dlogits, [&](std::int64_t begin, std::int64_t count, T* buffer) {
      const T* y = logits_.values(x + begin, count, buffer);
      return std::pair([=](std::int64_t j) { return factor * exp_nonpositive(y[j] - lse); }, false);
    });
  }

  // What this part of the classes adds to a row.
  void part(std::int64_t i, T* out, bool statistics, const Scratch<T>& scratch) const {
    const auto result = [&](int k) -> T& { return out[k * args_.rows + i]; };
    if (wanted_.ignored(i)) {
      for (int k = 0; k < (statistics ? kPartStatistics : kPartResults); ++k) result(k) = T(k == kSum);
      return;
    }
    const RowSums<T> sums = reduce_row<E, false>(logits_, logits_.row(i), args_.vocab, scratch);
    const Mass mass = this->mass(i, sums.shift());
    result(kMaximum) = sums.maximum;
    result(kSum) = sums.sum;
    result(kPartMass) = mass.sum;
    result(kDot) = mass.dot;
    if (!statistics) return;
    result(kWeighted) = weighted(i, sums.shift());
    result(kAtTarget) = at_target(i);
    result(kBest) = static_cast<T>(args_.first_class + first_best(i, sums));
  }

 private:
  struct Mass {
    T sum, dot;  // sum_c v_c, sum_c v_c (y_c - shift)
  };

  E* out(std::int64_t i, E* dlogits) const {
    return dlogits + i * (dlogits == args_.input ? args_.row_stride : args_.vocab);
  }

  void no_gradient(std::int64_t i, E* dlogits) const {
    std::memset(static_cast<void*>(out(i, dlogits)), 0, static_cast<std::size_t>(args_.vocab) * sizeof(E));
  }

  T at_target(std::int64_t i) const {
    const std::int64_t c = wanted_.column(i);
    return 0 <= c && c < args_.vocab ? logits_.value(logits_.row(i)[c]) : T(0);
  }

  Mass mass(std::int64_t i, T shift) const {
    Mass mass{wanted_.smooth_mass(), T(0)};
    if (wanted_.in_every_class()) {
      const Mass all = mass_of_all(i, shift);
      if (wanted_.dense()) mass.sum = all.sum;
      mass.dot = all.dot;
    }
    const E* x = logits_.row(i);
    wanted_.for_each_target(i, [&](std::int64_t column, T v) {
      mass.sum += v;
      mass.dot += v * (logits_.value(x[column]) - shift);
    });
    return mass;
  }

  Mass mass_of_all(std::int64_t i, T shift) const {
    T v[kStage], buffer[kStage], sums[kLanes] = {}, dots[kLanes] = {};
    for (std::int64_t begin = 0; begin < args_.vocab; begin += kStage) {
      const std::int64_t count = least(kStage, args_.vocab - begin);
      const T* y = logits_.values(logits_.row(i) + begin, count, buffer);
      wanted_.fill(i, begin, count, v);
      for (std::int64_t j = count; j % kLanes != 0; ++j) v[j] = T(0);
      for_each_group(y, count, shift, [&](const T* group, std::int64_t offset) {
        for (int l = 0; l < kLanes; ++l) sums[l] += v[offset + l];
        for (int l = 0; l < kLanes; ++l) dots[l] += v[offset + l] * (group[l] - shift);
      });
    }
    return {tree(sums, false), tree(dots, false)};
  }

  // sum_c exp(y_c - shift) (y_c - shift)
  T weighted(std::int64_t i, T shift) const {
    T buffer[kStage], sums[kLanes] = {};
    for (std::int64_t begin = 0; begin < args_.vocab; begin += kStage) {
      const std::int64_t count = least(kStage, args_.vocab - begin);
      const T* y = logits_.values(logits_.row(i) + begin, count, buffer);
      for_each_group(y, count, -std::numeric_limits<T>::infinity(), [&](const T* group, std::int64_t) {
        for (int l = 0; l < kLanes; ++l) {
          const T d = group[l] - shift, finite = d < T(-1000) ? T(-1000) : d;  // where exp is 0
          sums[l] += exp_nonpositive(d) * finite;
        }
      });
    }
    return tree(sums, false);
  }

  std::int64_t first_best(std::int64_t i, const RowSums<T>& sums) const {
    const E* x = logits_.row(i);
    for (std::int64_t c = sums.block; c < args_.vocab; ++c) {
      if (logits_.value(x[c]) == sums.maximum) return c;
    }
    return 0;  // a row of NaN has no maximum
  }

  // Writes scale * dx. `probabilities(begin, count, buffer)` gives a function of j < count, what the softmax adds to
  // it, and whether none of its values is NaN.
  template <class Probabilities>
  void write_gradient(std::int64_t i, T scale, E* dlogits, const Probabilities& probabilities) const {
    alignas(64) T p[kStage];
    alignas(64) E staged[kStage];
    E* const row = this->out(i, dlogits);
    const bool stream = stream_ && dlogits != args_.input,
               in_every_class = wanted_.in_every_class() || logits_.capped();
    LineStream lines(row);
    for (std::int64_t begin = 0; begin < args_.vocab; begin += kStage) {
      const std::int64_t count = least(kStage, args_.vocab - begin);
      const auto [probability, numbers] = probabilities(begin, count, p);
      E* const to = stream ? staged : row + begin;
      if (in_every_class || wanted_.has_target(i, begin, count)) {
        for (std::int64_t j = 0; j < count; ++j) p[j] = probability(j);
        finish_gradient(i, begin, count, scale, p);
        for (std::int64_t j = 0; j < count; ++j) store(&to[j], p[j]);
      } else if (std::is_same_v<E, bf16> && numbers) {
        for (std::int64_t j = 0; j < count; ++j) store_number(&to[j], probability(j));
      } else {
        for (std::int64_t j = 0; j < count; ++j) store(&to[j], probability(j));
      }
      if (stream) lines.write(staged, count * sizeof(E));
    }
  }

  void finish_gradient(std::int64_t i, std::int64_t begin, std::int64_t count, T scale, T* p) const {
    if (wanted_.in_every_class()) {
      T v[kStage];
      wanted_.fill(i, begin, count, v);
      for (std::int64_t j = 0; j < count; ++j) p[j] -= scale * v[j];
    }
    wanted_.for_each_target(i, [&](std::int64_t column, T v) {
      if (begin <= column && column < begin + count) p[column - begin] -= scale * v;
    });
    if (logits_.capped()) logits_.times_slope(logits_.row(i) + begin, count, p);
  }

  const CrossEntropy& args_;
  Logits<E> logits_;
  Wanted<T> wanted_;
  T z_loss_, slope_;
  bool stream_;
};

// Rows that a thread takes at a time: some 32,000 logits, which one core needs 30 us for, several times
// what it costs to wake a second thread.
std::int64_t grain(const CrossEntropy& args) { return 32768 / (args.vocab > 0 ? args.vocab : 1) + 1; }

template <class Body>
void for_each_row(const CrossEntropy& args, int threads, const Body& body) {
  parallel_for(args.rows, grain(args), threads, [&](Ranges& ranges) {
    body([&](const auto& row) {
      std::int64_t begin, end;
      while (ranges.next(begin, end)) {
        for (std::int64_t i = begin; i < end; ++i) row(i);
      }
    });
  });
}

// Calls f with a value of the element type.
template <class F>
void dispatch(const CrossEntropy& args, const F& f) {
  switch (args.dtype) {
    case DType::f32: return f(float{});
    case DType::f64: return f(double{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
  }
}

}  // namespace

void cross_entropy_part(const CrossEntropy& args, void* out, bool statistics, int threads) {
  dispatch(args, [&](auto element) {
    using T = Opmath<decltype(element)>;
    const Rows<decltype(element)> rows(args);
    for_each_row(args, threads, [&](const auto& each) {
      const Scratch<T> scratch(0);
      each([&](std::int64_t i) { rows.part(i, static_cast<T*>(out), statistics, scratch); });
    });
  });
}

void cross_entropy_forward(const CrossEntropy& args, void* out, bool statistics, void* dlogits, double scale,
                           int threads) {
  dispatch(args, [&](auto element) {
    using E = decltype(element);
    using T = Opmath<E>;
    const Rows<E> rows(args);
    for_each_row(args, threads, [&](const auto& each) {
      const Scratch<T> scratch(dlogits ? args.vocab : 0);
      each([&](std::int64_t i) {
        rows.forward(i, static_cast<T*>(out), statistics, static_cast<E*>(dlogits), static_cast<T>(scale), scratch);
      });
    });
  });
}

void cross_entropy_backward(const CrossEntropy& args, const void* sums, const void* scale, std::int64_t scale_stride,
                            void* dlogits, int threads) {
  dispatch(args, [&](auto element) {
    using E = decltype(element);
    using T = Opmath<E>;
    const Rows<E> rows(args);
    const T *lse = static_cast<const T*>(sums), *mass = lse + args.rows, *scales = static_cast<const T*>(scale);
    for_each_row(args, threads, [&](const auto& each) {
      each([&](std::int64_t i) {
        rows.backward(i, lse[i], mass[i], scales[i * scale_stride], static_cast<E*>(dlogits));
      });
    });
  });
}

}  // namespace superfine::cpu::SF_ISA
