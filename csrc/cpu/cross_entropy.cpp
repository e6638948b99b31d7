// Cross-entropy row by row; the formula is in math/cross_entropy.h.
//
// A row is read from memory once, block by block: maximum, then sum of exponentials. The exponentials
// stay in a buffer of the thread's own, in the L2 cache, and scaling them gives the gradient: C *
// sizeof(x) bytes in, the same out and one exponential an element, against two passes in, two out and
// two exponentials for log_softmax and its backward. Sums run over kLanes fixed lanes and a fixed tree,
// whatever the vector width, so every instruction set and thread count gives the same bits.
#include "cpu/cross_entropy.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "core/parallel_for.h"
#include "math/softmax.h"

namespace superfine::cpu::SF_ISA {
namespace {

constexpr int kLanes = 64;                    // four AVX-512 vectors: enough to hide the latency of a sum
constexpr std::int64_t kBlock = 64 * kLanes;  // 16 KiB of floats: maximum, then sum, from the L1 cache
constexpr std::int64_t kStage = 8 * kLanes;   // gradients staged for non-temporal stores
// Gradients larger than this pass the caches by: they would push out the rows still to come.
constexpr std::int64_t kStreamBytes = std::int64_t{4} << 20;

std::int64_t label(const CrossEntropy& args, std::int64_t row) {
  const std::int64_t i = row * args.target_stride;
  return args.target_is_int64 ? static_cast<const std::int64_t*>(args.target)[i]
                              : static_cast<const std::int32_t*>(args.target)[i];
}

template <class T>
T tree(const T* lanes, bool maximum) {
  T x[kLanes];
  std::memcpy(x, lanes, sizeof x);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) {
      x[l] = maximum ? (x[l + width] > x[l] ? x[l + width] : x[l]) : x[l] + x[l + width];
    }
  }
  return x[0];
}

// Calls body(pointer, offset) for every kLanes elements; a last partial group is padded with `pad`.
template <class E, class Body>
inline void for_each_group(const E* x, std::int64_t begin, std::int64_t end, E pad, const Body& body) {
  std::int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) body(x + i, i);
  if (i < end) {
    E padded[kLanes];
    for (int l = 0; l < kLanes; ++l) padded[l] = i + l < end ? x[i + l] : pad;
    body(padded, i);
  }
}

// What one thread keeps of a row between the passes: exponentials relative to the maximum up to their
// block, and those maxima.
template <class T>
class Scratch {
 public:
  explicit Scratch(std::int64_t vocab)
      : exponentials_(static_cast<T*>(allocate((vocab + kLanes) * sizeof(T)))),
        maxima_(static_cast<T*>(allocate((vocab / kBlock + 1) * sizeof(T)))) {}
  ~Scratch() {
    std::free(exponentials_);
    std::free(maxima_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* exponentials() const { return exponentials_; }
  T& maximum(std::int64_t element) const { return maxima_[element / kBlock]; }

 private:
  static void* allocate(std::size_t bytes) {
    void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (memory == nullptr) std::abort();  // out of memory inside a parallel region
    return memory;
  }

  T* exponentials_;
  T* maxima_;
};

template <class T>
struct RowSums {
  T maximum;
  T sum;     // sum_c exp(x_c - maximum)
  T smooth;  // sum_c w_c (x_c - reference), where smoothing asks for it
};

template <class E, bool kKeep>
RowSums<Opmath<E>> reduce_row(const E* x, std::int64_t vocab, const Opmath<E>* weight, bool smoothing,
                              Opmath<E> reference, const Scratch<Opmath<E>>* scratch) {
  using T = Opmath<E>;
  const T inf = std::numeric_limits<T>::infinity();
  E minus_inf, pad;
  store(&minus_inf, -inf);
  store(&pad, reference);
  T sums[kLanes] = {}, smooths[kLanes] = {}, weights[kLanes];
  T running = -inf;
  for (std::int64_t begin = 0; begin < vocab; begin += kBlock) {
    const std::int64_t end = begin + kBlock < vocab ? begin + kBlock : vocab;
    T maxima[kLanes];
    for (int l = 0; l < kLanes; ++l) maxima[l] = running;
    for_each_group(x, begin, end, minus_inf, [&](const E* group, std::int64_t) {
      for (int l = 0; l < kLanes; ++l) {
        const T value = load(group[l]);
        maxima[l] = value > maxima[l] ? value : maxima[l];
      }
    });
    const T maximum = tree(maxima, true);
    if (maximum > running) {
      const T rescale = running == -inf ? T(0) : exp_nonpositive(running - maximum);
      for (int l = 0; l < kLanes; ++l) sums[l] *= rescale;
      running = maximum;
    }
    const T shift = running == -inf ? T(0) : running;  // a block of -inf only adds exp(-inf) = 0
    if (kKeep) scratch->maximum(begin) = running;
    for_each_group(x, begin, end, minus_inf, [&](const E* group, std::int64_t offset) {
      T* kept = kKeep ? scratch->exponentials() + offset : weights;
      for (int l = 0; l < kLanes; ++l) kept[l] = exp_nonpositive(load(group[l]) - shift);
      for (int l = 0; l < kLanes; ++l) sums[l] += kept[l];
    });
    if (smoothing) {
      for_each_group(x, begin, end, pad, [&](const E* group, std::int64_t offset) {
        for (int l = 0; l < kLanes; ++l) weights[l] = weight && offset + l < end ? weight[offset + l] : T(1);
        for (int l = 0; l < kLanes; ++l) smooths[l] += weights[l] * (T(load(group[l])) - reference);
      });
    }
  }
  return {running, tree(sums, false), smoothing ? tree(smooths, false) : T(0)};
}

// Copies `count` finished gradients past the caches; what does not fill 16 aligned bytes goes the usual way.
template <class E>
inline void stream_out(E* out, const E* staged, std::int64_t count) {
#if defined(__SSE2__)
  constexpr std::int64_t kPack = 16 / sizeof(E);
  const auto misaligned = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(out) % 16 / sizeof(E));
  std::int64_t i = misaligned == 0 ? 0 : kPack - misaligned < count ? kPack - misaligned : count;
  std::memcpy(out, staged, static_cast<std::size_t>(i) * sizeof(E));
  for (; i + kPack <= count; i += kPack) {
    const __m128i pack = _mm_loadu_si128(reinterpret_cast<const __m128i*>(staged + i));
    _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), pack);
  }
  std::memcpy(out + i, staged + i, static_cast<std::size_t>(count - i) * sizeof(E));
#else
  std::memcpy(out, staged, static_cast<std::size_t>(count) * sizeof(E));
#endif
}

// By rows: the maximum of a part's logits, the sum of the exponentials relative to it, the logit of the target or 0
// where that is another part's, and sum_c w_c x_c where smoothing asks for it.
template <class T>
struct CrossEntropyPart {
  T *maximum, *sum, *at_target, *smooth;
};

template <class E>
struct RowGradient {  // dx_c = softmax * p_c - smooth * w_c - [c = target] * at_target
  Opmath<E> softmax, smooth, at_target;
};

// Writes a row's gradient, block by block, from `probabilities(begin, count, p)`, which fills p with
// softmax * p_c for count <= kStage classes from `begin` on.
template <class E, class Probabilities>
inline void write_gradient(std::int64_t vocab, std::int64_t target, const Opmath<E>* weight, const RowGradient<E>& k,
                           E* out, bool stream, const Probabilities& probabilities) {
  using T = Opmath<E>;
  alignas(64) E staged[kStage];
  alignas(64) T p[kStage];
  for (std::int64_t begin = 0; begin < vocab; begin += kStage) {
    const std::int64_t count = begin + kStage < vocab ? kStage : vocab - begin;
    probabilities(begin, count, p);
    if (k.smooth != T(0)) {
      for (std::int64_t i = 0; i < count; ++i) p[i] -= k.smooth * (weight ? weight[begin + i] : T(1));
    }
    if (begin <= target && target < begin + count) p[target - begin] -= k.at_target;
    E* to = stream ? staged : out + begin;
    for (std::int64_t i = 0; i < count; ++i) store(&to[i], p[i]);
    if (stream) stream_out(out + begin, staged, count);
  }
}

template <class T>
T sum_of_weights(const T* weight, std::int64_t vocab) {
  if (weight == nullptr) return static_cast<T>(vocab);
  double sum = 0;
  for (std::int64_t c = 0; c < vocab; ++c) sum += weight[c];
  return static_cast<T>(sum);
}

template <class E>
class Rows {
 public:
  using T = Opmath<E>;

  explicit Rows(const CrossEntropy& args)
      : args_(args),
        weight_(static_cast<const T*>(args.weight)),
        part_weight_(weight_ ? weight_ + args.first_class : nullptr),
        smoothing_(static_cast<T>(args.label_smoothing)),
        weight_sum_(args.label_smoothing > 0 ? sum_of_weights(weight_, args.classes) : T(0)),
        stream_(args.rows * args.vocab * static_cast<std::int64_t>(sizeof(E)) >= kStreamBytes) {}

  const E* row(std::int64_t i) const { return static_cast<const E*>(args_.input) + i * args_.row_stride; }
  bool ignored(std::int64_t i) const { return label(args_, i) == args_.ignore_index; }

  T forward(std::int64_t i, T* lse) const { return loss(i, reduce<false>(i, reference(i), nullptr), lse); }

  // What this part of a row adds to its loss.
  void part(std::int64_t i, const CrossEntropyPart<T>& out) const {
    const RowSums<T> sums = reduce<false>(i, T(0), nullptr);  // so that smooths can be added
    out.maximum[i] = sums.maximum;
    out.sum[i] = sums.sum;
    out.at_target[i] = 0 <= target(i) && target(i) < args_.vocab ? T(load(row(i)[target(i)])) : T(0);
    out.smooth[i] = sums.smooth;
  }

  // The gradient buffer is dense; in place it is the input and keeps the input's row stride.
  T forward_and_gradient(std::int64_t i, T* lse, T scale, E* dlogits, const Scratch<T>& scratch) const {
    const RowSums<T> sums = reduce<true>(i, reference(i), &scratch);
    const T row_loss = loss(i, sums, lse);  // reads the logit of the target before it may be overwritten
    const RowGradient<E> k = coefficients(i, scale);
    const T normalizer = k.softmax / sums.sum;
    write_gradient(args_.vocab, target(i), part_weight_, k, out(i, dlogits), streams_to(dlogits),
                   [&](std::int64_t begin, std::int64_t count, T* p) {
                     const T factor = normalizer * exp_nonpositive(scratch.maximum(begin) - sums.maximum);
                     const T* e = scratch.exponentials() + begin;
                     for (std::int64_t j = 0; j < count; ++j) p[j] = factor * e[j];
                   });
    return row_loss;
  }

  void gradient(std::int64_t i, T lse, T scale, E* dlogits) const {
    const RowGradient<E> k = coefficients(i, scale);
    write_gradient(args_.vocab, target(i), part_weight_, k, out(i, dlogits), streams_to(dlogits),
                   [&](std::int64_t begin, std::int64_t count, T* p) {
                     const E* x = row(i) + begin;
                     for (std::int64_t j = 0; j < count; ++j) p[j] = k.softmax * exp_nonpositive(load(x[j]) - lse);
                   });
  }

  void no_gradient(std::int64_t i, E* dlogits) const {
    std::memset(static_cast<void*>(out(i, dlogits)), 0, static_cast<std::size_t>(args_.vocab) * sizeof(E));
  }

 private:
  T weight(std::int64_t c) const { return weight_ ? weight_[c] : T(1); }
  bool streams_to(const E* dlogits) const { return stream_ && dlogits != args_.input; }
  E* out(std::int64_t i, E* dlogits) const {
    return dlogits + i * (dlogits == args_.input ? args_.row_stride : args_.vocab);
  }

  template <bool kKeep>
  RowSums<T> reduce(std::int64_t i, T reference, const Scratch<T>* scratch) const {
    return reduce_row<E, kKeep>(row(i), args_.vocab, part_weight_, smoothing_ > T(0), reference, scratch);
  }

  T loss(std::int64_t i, const RowSums<T>& sums, T* lse) const {
    const std::int64_t t = label(args_, i);
    const T log_sum = std::log(sums.sum);
    *lse = sums.maximum + log_sum;
    // Differences of logits, not of lse, so that an offset common to a row costs no digits.
    const T hard = (T(1) - smoothing_) * weight(t) * (log_sum + (sums.maximum - T(load(row(i)[t]))));
    if (!(smoothing_ > T(0))) return hard;
    const T soft = weight_sum_ * (log_sum + (sums.maximum - reference(i))) - sums.smooth;
    return hard + smoothing_ / static_cast<T>(args_.vocab) * soft;
  }

  // The column of a row's label; not in [0, vocab) where the label is another part's.
  std::int64_t target(std::int64_t i) const { return label(args_, i) - args_.first_class; }

  // Smoothing sums start from the target's logit: small terms, whatever the offset of the row.
  T reference(std::int64_t i) const {
    const T x = load(row(i)[label(args_, i)]);
    return std::isfinite(x) ? x : T(0);
  }

  RowGradient<E> coefficients(std::int64_t i, T scale) const {
    const T per_class = smoothing_ / static_cast<T>(args_.classes);
    const T hard = (T(1) - smoothing_) * weight(label(args_, i));
    return {scale * (hard + per_class * weight_sum_), scale * per_class, scale * hard};
  }

  const CrossEntropy& args_;
  const T *weight_, *part_weight_;  // of all classes, and of those in the input
  T smoothing_;
  T weight_sum_;
  bool stream_;
};

// Rows that a thread takes at a time: some 32,000 logits, which one core needs 30 us for, several times
// what it costs to wake a second thread.
std::int64_t grain(const CrossEntropy& args) { return 32768 / (args.vocab > 0 ? args.vocab : 1) + 1; }

template <class E>
void forward(const CrossEntropy& args, void* losses, void* lse, void* dlogits, double scale, int threads) {
  using T = Opmath<E>;
  const Rows<E> rows(args);
  T* losses_out = static_cast<T*>(losses);
  T* lse_out = static_cast<T*>(lse);
  E* gradients = static_cast<E*>(dlogits);
  parallel_for(args.rows, grain(args), threads, [&](Ranges& ranges) {
    const Scratch<T> scratch(gradients ? args.vocab : 0);
    std::int64_t begin, end;
    while (ranges.next(begin, end))
      for (std::int64_t i = begin; i < end; ++i) {
        if (rows.ignored(i)) {
          losses_out[i] = lse_out[i] = T(0);
          if (gradients) rows.no_gradient(i, gradients);
        } else if (gradients) {
          losses_out[i] = rows.forward_and_gradient(i, &lse_out[i], static_cast<T>(scale), gradients, scratch);
        } else {
          losses_out[i] = rows.forward(i, &lse_out[i]);
        }
      }
  });
}

template <class E>
void backward(const CrossEntropy& args, const void* lse, const void* scale, std::int64_t scale_stride, void* dlogits,
              int threads) {
  using T = Opmath<E>;
  const Rows<E> rows(args);
  parallel_for(args.rows, grain(args), threads, [&](Ranges& ranges) {
    std::int64_t begin, end;
    while (ranges.next(begin, end))
      for (std::int64_t i = begin; i < end; ++i) {
        if (rows.ignored(i)) {
          rows.no_gradient(i, static_cast<E*>(dlogits));
        } else {
          const T row_scale = static_cast<const T*>(scale)[i * scale_stride];
          rows.gradient(i, static_cast<const T*>(lse)[i], row_scale, static_cast<E*>(dlogits));
        }
      }
  });
}

template <class E>
void part(const CrossEntropy& args, void* out, int threads) {
  using T = Opmath<E>;
  const Rows<E> rows(args);
  T* const first = static_cast<T*>(out);
  const CrossEntropyPart<T> parts{first, first + args.rows, first + 2 * args.rows, first + 3 * args.rows};
  parallel_for(args.rows, grain(args), threads, [&](Ranges& ranges) {
    std::int64_t begin, end;
    while (ranges.next(begin, end))
      for (std::int64_t i = begin; i < end; ++i) rows.part(i, parts);
  });
}

}  // namespace

void cross_entropy_part(const CrossEntropy& args, void* out, int threads) {
  switch (args.dtype) {
    case DType::f32: return part<float>(args, out, threads);
    case DType::f64: return part<double>(args, out, threads);
    case DType::bf16: return part<bf16>(args, out, threads);
    case DType::f16: return part<f16>(args, out, threads);
    default: return;
  }
}

void cross_entropy_forward(const CrossEntropy& args, void* losses, void* lse, void* dlogits, double scale,
                           int threads) {
  switch (args.dtype) {
    case DType::f32: return forward<float>(args, losses, lse, dlogits, scale, threads);
    case DType::f64: return forward<double>(args, losses, lse, dlogits, scale, threads);
    case DType::bf16: return forward<bf16>(args, losses, lse, dlogits, scale, threads);
    case DType::f16: return forward<f16>(args, losses, lse, dlogits, scale, threads);
  }
}

void cross_entropy_backward(const CrossEntropy& args, const void* lse, const void* scale, std::int64_t scale_stride,
                            void* dlogits, int threads) {
  switch (args.dtype) {
    case DType::f32: return backward<float>(args, lse, scale, scale_stride, dlogits, threads);
    case DType::f64: return backward<double>(args, lse, scale, scale_stride, dlogits, threads);
    case DType::bf16: return backward<bf16>(args, lse, scale, scale_stride, dlogits, threads);
    case DType::f16: return backward<f16>(args, lse, scale, scale_stride, dlogits, threads);
  }
}

}  // namespace superfine::cpu::SF_ISA
