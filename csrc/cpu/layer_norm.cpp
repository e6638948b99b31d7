// Layer norm and RMS norm of rows; the formulas are in math/layer_norm.h.
//
// Least traffic: forward 8 bytes an element in float32 and 4 in bf16, 16 and 8 with a residual and its sum; backward 12
// and 6. A row is read once from memory; the passes over it, two of them, run in the L1 cache. What is not dense Reals
// in whole blocks of lanes is turned into them there, so one loop serves all dtypes and lengths. Lanes, and the rows
// whose gradients of the weights are added up together, depend on the sizes alone: so the bits are the same for every
// vector width and thread count.
#include "cpu/layer_norm.h"

#include <cstdint>
#include <cstring>
#include <memory>

#include "core/parallel_for.h"

namespace superfine::cpu::SF_ISA {
namespace {

constexpr int kLanes = 64;                     // of a sum, and what rows are filled up to: four AVX-512 vectors
constexpr int kGradientLanes = 32;             // of three sums at once: more would not fit AVX2's registers
constexpr std::int64_t kParallel = 16 * 1024;  // elements that are worth waking a thread for: some 5 us

// One copy for all rows that are read and written: few bytes, and a call costs nothing beside a row.
#ifdef __GNUC__
#define SF_NOINLINE __attribute__((noinline))
#else
#define SF_NOINLINE
#endif

std::int64_t whole(std::int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

// Rows of Reals, each at a cache line, not set.
template <class T>
class Rows {
 public:
  Rows(std::int64_t count, std::int64_t size) : size_(size), memory_(new T[count * size + kLanes]) {
    const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(memory_.get());
    first_ = memory_.get() + (-address % 64) / sizeof(T);
  }
  T* operator[](std::int64_t i) const { return first_ + i * size_; }

 private:
  std::int64_t size_;
  std::unique_ptr<T[]> memory_;
  T* first_;
};

template <class E>
void widen(const void* from, std::int64_t begin, std::int64_t size, float* __restrict buffer) {
  const E* const x = static_cast<const E*>(from) + begin;
  for (std::int64_t j = 0; j < size; ++j) buffer[j] = load(x[j]);
}

template <class E>
void narrow(const float* __restrict values, std::int64_t begin, std::int64_t size, void* to) {
  E* const out = static_cast<E*>(to) + begin;
  for (std::int64_t j = 0; j < size; ++j) store(&out[j], values[j]);
}

// A row as Reals in whole blocks: where it lies, or its copy in `buffer`, filled up with zeros.
template <class T>
SF_NOINLINE const T* read(const void* from, DType dtype, std::int64_t begin, std::int64_t size, T* buffer) {
  if (sizeof(T) == 4 && dtype == DType::bf16) {
    widen<bf16>(from, begin, size, reinterpret_cast<float*>(buffer));
  } else if (sizeof(T) == 4 && dtype == DType::f16) {
    widen<f16>(from, begin, size, reinterpret_cast<float*>(buffer));
  } else {
    const T* const x = static_cast<const T*>(from) + begin;
    if (size % kLanes == 0) return x;
    std::memcpy(buffer, x, static_cast<std::size_t>(size) * sizeof(T));
  }
  for (std::int64_t j = size; j < whole(size); ++j) buffer[j] = T(0);
  return buffer;
}

bool is_narrow(DType dtype) { return dtype == DType::bf16 || dtype == DType::f16; }

// Where a row of results is computed: where it goes, if it goes there as it is, else in `buffer`.
template <class T>
T* place(void* to, DType dtype, std::int64_t begin, std::int64_t size, T* buffer) {
  return is_narrow(dtype) || size % kLanes != 0 ? buffer : static_cast<T*>(to) + begin;
}

// And from there to where it goes.
template <class T>
SF_NOINLINE void write(const T* values, void* to, DType dtype, std::int64_t begin, std::int64_t size) {
  if (sizeof(T) == 4 && dtype == DType::bf16) {
    narrow<bf16>(reinterpret_cast<const float*>(values), begin, size, to);
  } else if (sizeof(T) == 4 && dtype == DType::f16) {
    narrow<f16>(reinterpret_cast<const float*>(values), begin, size, to);
  } else if (T* const out = static_cast<T*>(to) + begin; out != values) {
    std::memcpy(out, values, static_cast<std::size_t>(size) * sizeof(T));
  }
}

// offset + values, in whole blocks; without values ones, or zeros.
template <class T>
SF_NOINLINE const T* parameter(const void* values, DType dtype, std::int64_t size, T offset, T without, T* buffer) {
  if (values != nullptr && offset == T(0)) return read(values, dtype, 0, size, buffer);
  if (values == nullptr) {
    for (std::int64_t j = 0; j < whole(size); ++j) buffer[j] = without;
  } else {
    const T* const x = read(values, dtype, 0, size, buffer);
    for (std::int64_t j = 0; j < whole(size); ++j) buffer[j] = offset + x[j];
  }
  return buffer;
}

// The sum of the lanes, halves upon halves. In T: a row waits for it, and double's would take three times as long.
template <int kCount, class T>
SF_HD T tree(T* lanes) {
  if constexpr (kCount == 1) {
    return lanes[0];
  } else {
    for (int l = 0; l < kCount / 2; ++l) lanes[l] += lanes[l + kCount / 2];
    return tree<kCount / 2>(lanes);
  }
}

template <class T>
T sum_of_squares(const T* x, std::int64_t n) {
  T lanes[kLanes] = {};
  for (std::int64_t j = 0; j < n; j += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] = std::fma(x[j + l], x[j + l], lanes[l]);
  }
  return tree<kLanes>(lanes);
}

// About the mean of a row: that of its first block, or of all there is. Divided before they are added, so that the sum
// does not overflow where the elements do not.
template <class T>
T near_mean(const T* x, std::int64_t size) {
  const T share = T(1) / static_cast<T>(size < kLanes ? size : kLanes);
  T lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = share * x[l];
  return tree<kLanes>(lanes);
}

// The statistics of a row, in one pass: sums of x and x^2 less a shift, with which the row is filled up to whole
// blocks. The variance keeps its digits where the shift is within half a deviation of the mean; else a second pass
// takes the mean. A first element as the shift, one deviation off, doubles the error of the output.
template <bool kRms, class T>
RowStatistics<T> statistics(const T* x, T* buffer, std::int64_t size, double eps) {
  const T n = static_cast<T>(size);
  if (kRms) return {T(0), T(0), reciprocal_root<T>(sum_of_squares(x, whole(size)) / n, eps)};
  T shift = near_mean(x, size);
  for (bool again = false;; again = true) {
    for (std::int64_t j = size; j < whole(size); ++j) buffer[j] = shift;
    T sums[kLanes] = {}, squares[kLanes] = {};
    for (std::int64_t j = 0; j < whole(size); j += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        const T difference = x[j + l] - shift;
        sums[l] += difference;
        squares[l] = std::fma(difference, difference, squares[l]);
      }
    }
    const T rest = tree<kLanes>(sums) / n, variance = tree<kLanes>(squares) / n - rest * rest;
    const T mean = shift + rest;
    if (again || 4 * rest * rest <= variance) return {mean, (shift - mean) + rest, reciprocal_root<T>(variance, eps)};
    shift = mean;
  }
}

template <class T>
void add(const T* a, const T* b, std::int64_t n, T* __restrict sums) {
  for (std::int64_t j = 0; j < n; ++j) sums[j] = a[j] + b[j];
}

// With a `narrow_row` n is rounded to its type first.
template <bool kRms, class T>
void output(const T* x, const RowStatistics<T>& row, void* narrow_row, DType dtype, const T* w, const T* b,
            std::int64_t n, T* __restrict y) {
  if (!kRms || narrow_row == nullptr) {
    for (std::int64_t j = 0; j < n; ++j) {
      const T value = normalized<kRms>(x[j], row);
      y[j] = kRms ? value * w[j] : std::fma(value, w[j], b[j]);
    }
    return;
  }
  for (std::int64_t j = 0; j < n; ++j) y[j] = normalized<kRms>(x[j], row);
  write(y, narrow_row, dtype, 0, n);
  read(narrow_row, dtype, 0, n, y);
  for (std::int64_t j = 0; j < n; ++j) y[j] = y[j] * w[j];
}

// float64 is rare enough for a layer norm's loops to serve an RMS norm: mean and rest are 0 there, the bias is -0.
template <bool kRms, class T>
void forward(const LayerNorm& args, int threads) {
  const bool rms = kRms || args.rms;
  const std::int64_t size = args.size, n = whole(size);
  const Rows<T> parameters(2, n);
  const T* const w =
      parameter(args.weight, args.weight_dtype, size, static_cast<T>(args.weight_offset), T(1), parameters[0]);
  const T* const b =
      kRms ? nullptr : parameter(args.bias, args.bias_dtype, size, T(0), rms ? -T(0) : T(0), parameters[1]);
  const bool cast = args.cast_before_weight && is_narrow(args.dtype);
  const std::int64_t grain = kParallel / n > 0 ? kParallel / n : 1;
  parallel_for(args.rows, grain, threads, [&](Ranges& ranges) {
    const Rows<T> buffers(3, n);
    std::int64_t first = 0, last = 0;
    while (ranges.next(first, last))
      for (std::int64_t i = first; i < last; ++i) {
        const std::int64_t begin = i * size;
        const T* x = read(args.input, args.dtype, begin, size, buffers[0]);
        if (args.residual != nullptr) {
          const T* const residual = read(args.residual, args.dtype, begin, size, buffers[1]);
          T* const sums = place(args.sum, args.dtype, begin, size, buffers[2]);
          add(x, residual, n, sums);
          write(sums, args.sum, args.dtype, begin, size);
          x = read(args.sum, args.dtype, begin, size, buffers[0]);  // as it was rounded
        }
        const RowStatistics<T> row =
            rms ? statistics<true>(x, buffers[0], size, args.eps) : statistics<false>(x, buffers[0], size, args.eps);
        T* const y = place(args.output, args.output_dtype, begin, size, buffers[2]);
        output<kRms>(x, row, cast ? buffers[1] : nullptr, args.dtype, w, b, n, y);
        write(y, args.output, args.output_dtype, begin, size);
        if (args.mean != nullptr) static_cast<T*>(args.mean)[i] = row.mean;
        if (args.rstd != nullptr) static_cast<T*>(args.rstd)[i] = row.rstd;
      }
  });
}

// n in `normal`, without the rest of the mean, which comes with the row's means.
template <class T>
struct RowMeans {
  T rest, gw, gwn;  // of n, gw and gw n
};

template <bool kRms, class T>
RowMeans<T> gradient_means(bool rms, const T* x, const T* g, const T* w, const RowStatistics<T>& row, std::int64_t size,
                           T* __restrict normal) {
  T rests[kGradientLanes] = {}, gws[kGradientLanes] = {}, gwns[kGradientLanes] = {};
  for (std::int64_t j = 0; j < whole(size); j += kGradientLanes) {
    for (int l = 0; l < kGradientLanes; ++l) {
      const T value = normalized<kRms>(x[j + l], row), gw = g[j + l] * w[j + l];
      normal[j + l] = value;
      if (!kRms) rests[l] += value;
      if (!kRms) gws[l] += gw;
      gwns[l] = std::fma(gw, value, gwns[l]);
    }
  }
  const T n = static_cast<T>(size);
  const T rest = rms ? T(0) : tree<kGradientLanes>(rests) / n, gw = rms ? T(0) : tree<kGradientLanes>(gws) / n;
  return {rest, gw, tree<kGradientLanes>(gwns) / n - rest * gw};
}

template <bool kRms, class T>
void input_gradient(const T* g, const T* w, const T* normal, T rstd, const RowMeans<T>& means, std::int64_t n,
                    T* __restrict dx) {
  for (std::int64_t j = 0; j < n; ++j) {
    dx[j] = norm_gradient<kRms>(kRms ? normal[j] : normal[j] - means.rest, g[j] * w[j], rstd, means.gw, means.gwn);
  }
}

template <class T>
void add_weight_gradient(const T* g, const T* normal, T rest, std::int64_t n, T* __restrict dw) {
  for (std::int64_t j = 0; j < n; ++j) dw[j] = std::fma(g[j], normal[j] - rest, dw[j]);
}

template <class T>
void add_to(T* __restrict sums, const T* values, std::int64_t n) {
  for (std::int64_t j = 0; j < n; ++j) sums[j] += values[j];
}

// Rows whose gradients of the weights are added up one after the other: few enough for many threads to have some, and
// for float32 to add them.
std::int64_t rows_of_block(std::int64_t rows) {
  const std::int64_t of_64 = (rows + 63) / 64;
  return of_64 < 32 ? 32 : of_64 > 128 ? 128 : of_64;
}

template <class T>
SF_NOINLINE void add_up(const Rows<T>& sums, std::int64_t first, std::int64_t count, std::int64_t step,
                        std::int64_t size, T* out) {
  for (std::int64_t begin = 0; begin < size; begin += kLanes) {
    double lanes[kLanes] = {};
    for (std::int64_t i = first; i < count; i += step) {
      for (int l = 0; l < kLanes; ++l) lanes[l] += sums[i][begin + l];
    }
    for (std::int64_t l = 0; l < kLanes && begin + l < size; ++l) out[begin + l] = static_cast<T>(lanes[l]);
  }
}

template <bool kRms, class T>
void gradient(const LayerNormGradient& args, int threads) {
  const bool rms = kRms || args.rms;
  const std::int64_t size = args.size, n = whole(size), rows = args.rows;
  const std::int64_t block = rows_of_block(rows), blocks = (rows + block - 1) / block;
  const bool sums = args.dweight != nullptr || args.dbias != nullptr;
  const Rows<T> parameters(1, n), partial(sums ? 2 * blocks : 0, n);
  const T* const w =
      parameter(args.weight, args.weight_dtype, size, static_cast<T>(args.weight_offset), T(1), parameters[0]);
  const std::int64_t grain = kParallel / (block * n) > 0 ? kParallel / (block * n) : 1;
  parallel_for(blocks, grain, threads, [&](Ranges& ranges) {
    const Rows<T> buffers(4, n);
    T* const normal = buffers[2];
    std::int64_t first = 0, last = 0;
    while (ranges.next(first, last))
      for (std::int64_t k = first; k < last; ++k) {
        T* const dw = args.dweight != nullptr ? partial[2 * k] : nullptr;
        T* const db = args.dbias != nullptr ? partial[2 * k + 1] : nullptr;
        if (dw != nullptr) std::memset(dw, 0, static_cast<std::size_t>(n) * sizeof(T));
        if (db != nullptr) std::memset(db, 0, static_cast<std::size_t>(n) * sizeof(T));
        const std::int64_t end = (k + 1) * block < rows ? (k + 1) * block : rows;
        for (std::int64_t i = k * block; i < end; ++i) {
          const std::int64_t begin = i * size;
          const T* const g = read(args.grad, args.grad_dtype, begin, size, buffers[0]);
          RowStatistics<T> row{};
          RowMeans<T> means{};
          if (args.input != nullptr) {
            const T* const x = read(args.input, args.dtype, begin, size, buffers[1]);
            row = {rms ? T(0) : static_cast<const T*>(args.mean)[i], T(0), static_cast<const T*>(args.rstd)[i]};
            for (std::int64_t j = size; j < n; ++j) buffers[1][j] = row.mean;
            means = gradient_means<kRms>(rms, x, g, w, row, size, normal);
          }
          if (dw != nullptr) add_weight_gradient(g, normal, means.rest, n, dw);
          if (db != nullptr) add_to(db, g, n);
          if (args.dinput != nullptr) {
            T* const dx = place(args.dinput, args.dtype, begin, size, buffers[1]);
            input_gradient<kRms>(g, w, normal, row.rstd, means, n, dx);
            if (args.grad_sum != nullptr) {
              const T* const more = read(args.grad_sum, args.dtype, begin, size, buffers[3]);
              add_to(dx, more, n);
            }
            write(dx, args.dinput, args.dtype, begin, size);
          }
        }
      }
  });
  if (args.dweight != nullptr) add_up(partial, 0, 2 * blocks, 2, size, static_cast<T*>(args.dweight));
  if (args.dbias != nullptr) add_up(partial, 1, 2 * blocks, 2, size, static_cast<T*>(args.dbias));
}

}  // namespace

void layer_norm(const LayerNorm& args, int threads) {
  args.dtype == DType::f64 ? forward<false, double>(args, threads)
  : args.rms               ? forward<true, float>(args, threads)
                           : forward<false, float>(args, threads);
}

void layer_norm_gradient(const LayerNormGradient& args, int threads) {
  args.dtype == DType::f64 ? gradient<false, double>(args, threads)
  : args.rms               ? gradient<true, float>(args, threads)
                           : gradient<false, float>(args, threads);
}

}  // namespace superfine::cpu::SF_ISA
