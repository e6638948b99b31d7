// Cross-entropy of logits x against class t, row by row, with class weights w and smoothing s:
//
//   lse    = log sum_c exp(x_c)
//   loss   = (1 - s) w_t (lse - x_t) + s/C sum_c w_c (lse - x_c)
//   dx_c   = [(1 - s) w_t + s/C sum_c w_c] exp(x_c - lse) - (1 - s) w_t [c = t] - s/C w_c
//
// A row is read from memory once (maximum and sum, block by block), and again from the L2 cache for
// the gradient: C * sizeof(x) bytes in, the same out, against two passes in and two out for the
// separate log_softmax and its backward. Sums run over kLanes fixed lanes and a fixed tree, whatever
// the vector width, so every instruction set and thread count gives the same bits.
#include "cpu/cross_entropy.h"

#include <cmath>
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

template <class T>
struct RowSums {
  T lse;
  T smooth;  // sum_c w_c x_c, where smoothing asks for it
};

template <class E>
RowSums<Opmath<E>> reduce_row(const E* x, std::int64_t vocab, const Opmath<E>* weight, bool smoothing) {
  using T = Opmath<E>;
  const T inf = std::numeric_limits<T>::infinity();
  E minus_inf, zero;
  store(&minus_inf, -inf);
  store(&zero, T(0));
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
    for_each_group(x, begin, end, minus_inf, [&](const E* group, std::int64_t) {
      for (int l = 0; l < kLanes; ++l) sums[l] += exp_nonpositive(load(group[l]) - shift);
    });
    if (smoothing) {
      for_each_group(x, begin, end, zero, [&](const E* group, std::int64_t offset) {
        for (int l = 0; l < kLanes; ++l) weights[l] = weight && offset + l < end ? weight[offset + l] : T(1);
        for (int l = 0; l < kLanes; ++l) smooths[l] += weights[l] * T(load(group[l]));
      });
    }
  }
  return {running + std::log(tree(sums, false)), smoothing ? tree(smooths, false) : T(0)};
}

// Copies `count` finished gradients; `stream` keeps them out of the caches.
template <class E>
inline void copy_out(E* out, const E* staged, std::int64_t count, bool stream) {
#if defined(__SSE2__)
  if (stream && reinterpret_cast<std::uintptr_t>(out) % 16 == 0) {
    const std::int64_t vectors = count * static_cast<std::int64_t>(sizeof(E)) / 16;
    const __m128i* from = reinterpret_cast<const __m128i*>(staged);
    __m128i* to = reinterpret_cast<__m128i*>(out);
    for (std::int64_t i = 0; i < vectors; ++i) _mm_stream_si128(to + i, _mm_load_si128(from + i));
    const std::int64_t done = vectors * 16 / static_cast<std::int64_t>(sizeof(E));
    std::memcpy(out + done, staged + done, static_cast<std::size_t>(count - done) * sizeof(E));
    return;
  }
#endif
  std::memcpy(out, staged, static_cast<std::size_t>(count) * sizeof(E));
}

template <class E>
struct RowGradient {  // dx_c = softmax * p_c - smooth * w_c - [c = target] * at_target
  Opmath<E> softmax, smooth, at_target;
};

template <class E>
void write_gradient(const E* x, std::int64_t vocab, Opmath<E> lse, std::int64_t target,
                    const Opmath<E>* weight, const RowGradient<E>& k, E* out, bool stream) {
  using T = Opmath<E>;
  const T x_target = load(x[target]);  // read before an in-place write overwrites it
  alignas(64) E staged[kStage];
  for (std::int64_t begin = 0; begin < vocab; begin += kStage) {
    const std::int64_t count = begin + kStage < vocab ? kStage : vocab - begin;
    const E* from = x + begin;
    if (k.smooth == T(0)) {
      for (std::int64_t i = 0; i < count; ++i) store(&staged[i], k.softmax * exp_nonpositive(load(from[i]) - lse));
    } else if (weight == nullptr) {
      for (std::int64_t i = 0; i < count; ++i) {
        store(&staged[i], k.softmax * exp_nonpositive(load(from[i]) - lse) - k.smooth);
      }
    } else {
      for (std::int64_t i = 0; i < count; ++i) {
        store(&staged[i], k.softmax * exp_nonpositive(load(from[i]) - lse) - k.smooth * weight[begin + i]);
      }
    }
    copy_out(out + begin, staged, count, stream);
  }
  T value = k.softmax * exp_nonpositive(x_target - lse);
  value -= k.smooth == T(0) ? T(0) : k.smooth * (weight ? weight[target] : T(1));
  store(&out[target], value - k.at_target);
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
        smoothing_(static_cast<T>(args.label_smoothing)),
        weight_sum_(args.label_smoothing > 0 ? sum_of_weights(weight_, args.vocab) : T(0)),
        stream_(args.rows * args.vocab * static_cast<std::int64_t>(sizeof(E)) >= kStreamBytes) {}

  const E* row(std::int64_t i) const { return static_cast<const E*>(args_.input) + i * args_.row_stride; }
  bool ignored(std::int64_t i) const { return label(args_, i) == args_.ignore_index; }

  T forward(std::int64_t i, T* lse) const {
    const std::int64_t t = label(args_, i);
    const RowSums<T> sums = reduce_row(row(i), args_.vocab, weight_, smoothing_ > T(0));
    *lse = sums.lse;
    T loss = (T(1) - smoothing_) * weight(t) * (sums.lse - T(load(row(i)[t])));
    if (smoothing_ > T(0)) {
      loss += smoothing_ / static_cast<T>(args_.vocab) * (weight_sum_ * sums.lse - sums.smooth);
    }
    return loss;
  }

  // The gradient buffer is dense; in place it is the input and keeps the input's row stride.
  void gradient(std::int64_t i, T lse, T scale, E* dlogits) const {
    const bool in_place = dlogits == args_.input;
    E* out = dlogits + i * (in_place ? args_.row_stride : args_.vocab);
    if (ignored(i)) {
      std::memset(static_cast<void*>(out), 0, static_cast<std::size_t>(args_.vocab) * sizeof(E));
      return;
    }
    const std::int64_t t = label(args_, i);
    const T per_class = smoothing_ / static_cast<T>(args_.vocab);
    const T hard = (T(1) - smoothing_) * weight(t);
    const RowGradient<E> k = {scale * (hard + per_class * weight_sum_), scale * per_class, scale * hard};
    write_gradient(row(i), args_.vocab, lse, t, weight_, k, out, stream_ && !in_place);
  }

 private:
  T weight(std::int64_t c) const { return weight_ ? weight_[c] : T(1); }

  const CrossEntropy& args_;
  const T* weight_;
  T smoothing_;
  T weight_sum_;
  bool stream_;
};

template <class E>
void forward(const CrossEntropy& args, void* losses, void* lse, void* dlogits, double scale, int threads) {
  using T = Opmath<E>;
  const Rows<E> rows(args);
  parallel_for(args.rows, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      T loss = 0, row_lse = 0;
      if (!rows.ignored(i)) loss = rows.forward(i, &row_lse);
      static_cast<T*>(losses)[i] = loss;
      static_cast<T*>(lse)[i] = row_lse;
      if (dlogits) rows.gradient(i, row_lse, static_cast<T>(scale), static_cast<E*>(dlogits));
    }
  });
}

template <class E>
void backward(const CrossEntropy& args, const void* lse, const void* scale, std::int64_t scale_stride,
              void* dlogits, int threads) {
  using T = Opmath<E>;
  const Rows<E> rows(args);
  parallel_for(args.rows, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      rows.gradient(i, static_cast<const T*>(lse)[i], static_cast<const T*>(scale)[i * scale_stride],
                    static_cast<E*>(dlogits));
    }
  });
}

}  // namespace

void cross_entropy_forward(const CrossEntropy& args, void* losses, void* lse, void* dlogits, double scale,
                           int threads) {
  switch (args.dtype) {
    case DType::f32: return forward<float>(args, losses, lse, dlogits, scale, threads);
    case DType::f64: return forward<double>(args, losses, lse, dlogits, scale, threads);
    case DType::bf16: return forward<bf16>(args, losses, lse, dlogits, scale, threads);
    case DType::f16: return forward<f16>(args, losses, lse, dlogits, scale, threads);
  }
}

void cross_entropy_backward(const CrossEntropy& args, const void* lse, const void* scale,
                            std::int64_t scale_stride, void* dlogits, int threads) {
  switch (args.dtype) {
    case DType::f32: return backward<float>(args, lse, scale, scale_stride, dlogits, threads);
    case DType::f64: return backward<double>(args, lse, scale, scale_stride, dlogits, threads);
    case DType::bf16: return backward<bf16>(args, lse, scale, scale_stride, dlogits, threads);
    case DType::f16: return backward<f16>(args, lse, scale, scale_stride, dlogits, threads);
  }
}

}  // namespace superfine::cpu::SF_ISA
