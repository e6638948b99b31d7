// Cross-entropy, one block per row; the formula is in math/cross_entropy.h.
//
// Traffic per logit: the forward pass reads it once, and writes the gradient once where that is
// wanted: 8 bytes in fp32, 4 in bf16. The row waits in shared memory between the two; one that does
// not fit is read again, mostly from the L2 cache. The floor is those bytes over the memory bandwidth.
// Sums follow a fixed tree: the same bits on every run.
#include "cuda/cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "core/cuda_check.h"
#include "cuda/block_reduce.h"
#include "cuda/online_softmax.h"
#include "cuda/row.h"

namespace superfine::cuda {
namespace {

// Doubles take twice the registers.
template <class E>
constexpr int kThreadLimit = sizeof(E) == 8 ? kMaxThreads / 2 : kMaxThreads;

// One row's arguments, as its block sees them.
template <class E>
struct Row {
  using T = Opmath<E>;
  const E* x;
  E* dx;
  int vocab;
  std::int64_t target;
  bool ignored, valid;
  const T* weight;

  __device__ Row(const CrossEntropy& args, std::int64_t i, void* dlogits)
      : x(static_cast<const E*>(args.input) + i * args.row_stride),
        dx(static_cast<E*>(dlogits) + i * (dlogits == args.input ? args.row_stride : args.vocab)),
        vocab(static_cast<int>(args.vocab)),
        weight(static_cast<const T*>(args.weight)) {
    const std::int64_t at = i * args.target_stride;
    target = args.target_is_int64 ? static_cast<const std::int64_t*>(args.target)[at]
                                  : static_cast<const std::int32_t*>(args.target)[at];
    ignored = target == args.ignore_index;
    valid = !ignored && target >= 0 && target < vocab;
  }
  __device__ T weight_of(std::int64_t c) const { return weight ? weight[c] : T(1); }

  // Without reading the logits: an ignored row may hold anything, NaN too.
  __device__ void fill(T value) const {
    const Layout<E> layout(dx, vocab);
    RowPack<E> pack;
#pragma unroll
    for (int j = 0; j < Layout<E>::kPack; ++j) pack.at[j] = narrow<E>(value);
    auto* packs = reinterpret_cast<RowPack<E>*>(dx + layout.head);
    for (int p = threadIdx.x; p < layout.packs; p += blockDim.x) packs[p] = pack;
    for (int e = threadIdx.x; e < layout.edges; e += blockDim.x) dx[layout.edge(e)] = pack.at[0];
  }
};

// dx_c = softmax * exp(x_c - shift) - smooth * w_c - [c = t] * at_target
template <class T>
struct Gradient {
  T shift, softmax, smooth, at_target;

  __device__ Gradient(T shift_, T normalizer, T scale, T smoothing, T weight_of_target, T weights, T vocab) {
    const T hard = (T(1) - smoothing) * weight_of_target;
    shift = shift_;
    softmax = scale * (hard + smoothing / vocab * weights) * normalizer;
    smooth = scale * (smoothing / vocab);
    at_target = scale * hard;
  }
};

// The gradient of one row. Every element is read and written by one thread, so dx may be x.
template <class E, bool kSmooth>
class GradientWriter {
 public:
  using T = Opmath<E>;
  static constexpr int kPack = Layout<E>::kPack;

  __device__ GradientWriter(const Row<E>& row, const Layout<E>& layout, const Gradient<T>& k)
      : row_(row), layout_(layout), k_(k), target_(static_cast<int>(row.target)) {
    const auto distance = reinterpret_cast<std::uintptr_t>(row.dx) - reinterpret_cast<std::uintptr_t>(row.x);
    same_alignment_ = distance % 16 == 0;
  }

  __device__ __forceinline__ void operator()(int p, const RowPack<E>& pack) const {
    const int first = layout_.head + p * kPack;
    T value[kPack];
#pragma unroll
    for (int j = 0; j < kPack; ++j) value[j] = gradient(widen(pack.at[j]), first + j);
    if (target_ >= first && target_ < first + kPack) {
#pragma unroll
      for (int j = 0; j < kPack; ++j) value[j] -= first + j == target_ ? k_.at_target : T(0);
    }
    RowPack<E> out;
#pragma unroll
    for (int j = 0; j < kPack; ++j) out.at[j] = narrow<E>(value[j]);
    if (same_alignment_) {
      *reinterpret_cast<RowPack<E>*>(row_.dx + first) = out;
    } else {
#pragma unroll
      for (int j = 0; j < kPack; ++j) row_.dx[first + j] = out.at[j];
    }
  }

  __device__ void edges() const {
    for (int e = threadIdx.x; e < layout_.edges; e += blockDim.x) {
      const int c = layout_.edge(e);
      T value = gradient(widen(row_.x[c]), c);
      value -= c == target_ ? k_.at_target : T(0);
      row_.dx[c] = narrow<E>(value);
    }
  }

 private:
  __device__ __forceinline__ T gradient(T x, int c) const {
    T value = k_.softmax * exponential(x - k_.shift);
    if (kSmooth) value -= k_.smooth * row_.weight_of(c);
    return value;
  }

  const Row<E>& row_;
  const Layout<E>& layout_;
  const Gradient<T>& k_;
  int target_;
  bool same_alignment_;
};

// kHold: the row waits in dynamic shared memory, which has room for its packs.
template <class E, bool kSmooth, bool kHold>
__global__ void __launch_bounds__(kThreadLimit<E>, 1)
    forward_kernel(const CrossEntropy args, std::int64_t first_row, Opmath<E>* losses, Opmath<E>* lses, void* dlogits,
                   const Opmath<E>* scales, std::int64_t scale_stride) {
  using T = Opmath<E>;
  constexpr int kPack = Layout<E>::kPack;
  extern __shared__ float4 shared[];
  RowPack<E>* held = reinterpret_cast<RowPack<E>*>(shared);

  const std::int64_t i = first_row + blockIdx.x;
  const Row<E> row(args, i, dlogits);
  if (!row.valid) {
    const T value = row.ignored ? T(0) : std::numeric_limits<T>::quiet_NaN();
    if (threadIdx.x == 0) losses[i] = lses[i] = value;
    if (dlogits != nullptr) row.fill(value);
    return;
  }
  const T x_target = widen(row.x[row.target]);
  // Sums for smoothing start from the target's logit: small terms, whatever the offset of the row.
  const T reference = isfinite(x_target) ? x_target : T(0);

  const Layout<E> layout(row.x, row.vocab);
  const RowPack<E>* packs = packs_of(row.x, layout);
  SmoothSoftmax<T> part;
  const auto add_smooth = [&](T x, int c) {
    const T w = row.weight_of(c);
    part.weights += w;
    part.weighted += w * (x - reference);
  };
  const auto add_pack = [&](int p, const RowPack<E>& pack) {
    T x[kPack];
#pragma unroll
    for (int j = 0; j < kPack; ++j) x[j] = widen(pack.at[j]);
    part.softmax.add(x);
    if (kSmooth) {
#pragma unroll
      for (int j = 0; j < kPack; ++j) add_smooth(x[j], layout.head + p * kPack + j);
    }
  };
  if (kHold) {
    hold_packs<E>(packs, layout.packs, held, add_pack);
  } else {
    stream_packs<E>(packs, layout.packs, add_pack);
  }
  for (int e = threadIdx.x; e < layout.edges; e += blockDim.x) {
    const T x[1] = {widen(row.x[layout.edge(e)])};
    part.softmax.add(x);
    if (kSmooth) add_smooth(x[0], layout.edge(e));
  }
  if constexpr (kSmooth) {
    part = block_reduce(part);
  } else {
    part.softmax = block_reduce(part.softmax);
  }

  const T maximum = part.softmax.maximum, log_sum = log(part.softmax.sum);
  const T smoothing = kSmooth ? static_cast<T>(args.label_smoothing) : T(0);
  const T vocab = static_cast<T>(args.vocab), w_target = row.weight_of(row.target);
  if (threadIdx.x == 0) {
    T loss = (T(1) - smoothing) * w_target * (log_sum - (x_target - maximum));
    if (kSmooth) {
      loss += smoothing / vocab * (part.weights * (log_sum - (reference - maximum)) - part.weighted);
    }
    losses[i] = loss;
    lses[i] = maximum + log_sum;
  }
  if (dlogits == nullptr) return;
  __syncwarp();  // a block of one warp has met no barrier yet, and x_target may now be overwritten
  const Gradient<T> k(maximum, T(1) / part.softmax.sum, scales[i * scale_stride], smoothing, w_target, part.weights,
                      vocab);
  const GradientWriter<E, kSmooth> write(row, layout, k);
  if (kHold) {
    for (int p = threadIdx.x; p < layout.packs; p += blockDim.x) write(p, held[p]);
  } else {
    stream_packs<E>(packs, layout.packs, write);
  }
  write.edges();
}

template <class E, bool kSmooth>
__global__ void __launch_bounds__(kThreadLimit<E>, 1)
    backward_kernel(const CrossEntropy args, std::int64_t first_row, const Opmath<E>* lses, const Opmath<E>* scales,
                    std::int64_t scale_stride, void* dlogits) {
  using T = Opmath<E>;
  const std::int64_t i = first_row + blockIdx.x;
  const Row<E> row(args, i, dlogits);
  if (!row.valid) {
    row.fill(row.ignored ? T(0) : std::numeric_limits<T>::quiet_NaN());
    return;
  }
  const T smoothing = kSmooth ? static_cast<T>(args.label_smoothing) : T(0);
  const T vocab = static_cast<T>(args.vocab);
  T weights = vocab;
  if (kSmooth && row.weight != nullptr) {
    Sum<T> part;
    for (int c = threadIdx.x; c < row.vocab; c += blockDim.x) part.value += row.weight[c];
    weights = block_reduce(part).value;
  }
  const Gradient<T> k(lses[i], T(1), scales[i * scale_stride], smoothing, row.weight_of(row.target), weights, vocab);
  const Layout<E> layout(row.x, row.vocab);
  const GradientWriter<E, kSmooth> write(row, layout, k);
  stream_packs<E>(packs_of(row.x, layout), layout.packs, write);
  write.edges();
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) denominator_kernel(const CrossEntropy args, T* out) {
  const T* weight = static_cast<const T*>(args.weight);
  Sum<double> part;
  for (std::int64_t i = threadIdx.x; i < args.rows; i += blockDim.x) {
    const std::int64_t at = i * args.target_stride;
    const std::int64_t target = args.target_is_int64 ? static_cast<const std::int64_t*>(args.target)[at]
                                                     : static_cast<const std::int32_t*>(args.target)[at];
    if (target == args.ignore_index) continue;
    const bool inside = target >= 0 && target < args.vocab;  // otherwise the loss is NaN anyway
    part.value += weight && inside ? static_cast<double>(weight[target]) : 1.0;
  }
  part = block_reduce(part);
  if (threadIdx.x == 0) {
    out[0] = static_cast<T>(part.value);
    out[1] = static_cast<T>(1.0 / part.value);
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    reduce_kernel(const T* losses, std::int64_t rows, const T* denominator, T* out) {
  Sum<double> part;
  for (std::int64_t i = threadIdx.x; i < rows; i += blockDim.x) part.value += losses[i];
  part = block_reduce(part);
  if (threadIdx.x == 0) *out = static_cast<T>(denominator ? part.value / denominator[0] : part.value);
}

// About four packs a thread, in whole warps. Blocks of 512 leave room for a second one, which reads
// while the first writes, as long as two rows fit in a multiprocessor's 228 KB (sm_90, sm_100). The
// number depends on the shape alone, and so do the bits of the result.
template <class E>
int threads_for(std::int64_t vocab) {
  const std::int64_t row_bytes = vocab * static_cast<std::int64_t>(sizeof(E));
  const int limit = row_bytes > (112 << 10) ? kThreadLimit<E> : 512;
  const std::int64_t warps = row_bytes / (4 * 16) / kWarp + 1;
  return static_cast<int>(std::min<std::int64_t>(limit, warps * kWarp));
}

// Rows in slices that fit a grid; launch(first row, blocks).
template <class Launch>
void for_each_slice(std::int64_t rows, const char* op, const Launch& launch) {
  constexpr std::int64_t kMaxBlocks = std::numeric_limits<int>::max();
  for (std::int64_t first = 0; first < rows; first += kMaxBlocks) {
    launch(first, static_cast<unsigned>(std::min(kMaxBlocks, rows - first)));
    cuda_check(cudaGetLastError(), op);
  }
}

template <class E, bool kSmooth, bool kHold>
void launch_forward(const CrossEntropy& args, void* losses, void* lse, void* dlogits, const void* scale,
                    std::int64_t scale_stride, int shared_bytes, cudaStream_t stream) {
  using T = Opmath<E>;
  const auto kernel = forward_kernel<E, kSmooth, kHold>;
  if (shared_bytes > 0) {  // above 48 KB a kernel must ask first
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
               "cross_entropy_forward");
  }
  for_each_slice(args.rows, "cross_entropy_forward", [&](std::int64_t first, unsigned blocks) {
    kernel<<<blocks, threads_for<E>(args.vocab), shared_bytes, stream>>>(args, first, static_cast<T*>(losses),
                                                                         static_cast<T*>(lse), dlogits,
                                                                         static_cast<const T*>(scale), scale_stride);
  });
}

template <class E, bool kSmooth>
void forward(const CrossEntropy& args, void* losses, void* lse, void* dlogits, const void* scale,
             std::int64_t scale_stride, cudaStream_t stream) {
  int device = 0, limit = 0;
  cuda_check(cudaGetDevice(&device), "cross_entropy_forward");
  cuda_check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cross_entropy_forward");
  constexpr int kScratch = kMaxThreads / kWarp * sizeof(SmoothSoftmax<Opmath<E>>);
  const std::int64_t row_bytes = args.vocab * static_cast<std::int64_t>(sizeof(E)) / 16 * 16;
  if (dlogits != nullptr && row_bytes + kScratch <= limit) {
    launch_forward<E, kSmooth, true>(args, losses, lse, dlogits, scale, scale_stride, static_cast<int>(row_bytes),
                                     stream);
  } else {
    launch_forward<E, kSmooth, false>(args, losses, lse, dlogits, scale, scale_stride, 0, stream);
  }
}

template <class E, bool kSmooth>
void backward(const CrossEntropy& args, const void* lse, const void* scale, std::int64_t scale_stride, void* dlogits,
              cudaStream_t stream) {
  using T = Opmath<E>;
  for_each_slice(args.rows, "cross_entropy_backward", [&](std::int64_t first, unsigned blocks) {
    backward_kernel<E, kSmooth><<<blocks, threads_for<E>(args.vocab), 0, stream>>>(
        args, first, static_cast<const T*>(lse), static_cast<const T*>(scale), scale_stride, dlogits);
  });
}

// Calls f(element, smoothing) with a value of the element type and a compile-time flag.
template <class F>
void dispatch(const CrossEntropy& args, const char* op, const F& f) {
  if (args.vocab < 1 || args.vocab > (std::int64_t{1} << 30)) {  // classes are counted in int
    throw std::invalid_argument(std::string(op) + ": vocab is " + std::to_string(args.vocab) + "; expected 1 to 2^30");
  }
  const auto with_element = [&](auto element) {
    args.label_smoothing > 0 ? f(element, std::true_type{}) : f(element, std::false_type{});
  };
  switch (args.dtype) {
    case DType::f32: return with_element(float{});
    case DType::bf16: return with_element(bf16{});
    case DType::f16: return with_element(f16{});
    case DType::f64: return with_element(double{});
  }
}

}  // namespace

void cross_entropy_forward(const CrossEntropy& args, void* losses, void* lse, void* dlogits, const void* scale,
                           std::int64_t scale_stride, cudaStream_t stream) {
  dispatch(args, "cross_entropy_forward", [&](auto element, auto smooth) {
    forward<decltype(element), smooth.value>(args, losses, lse, dlogits, scale, scale_stride, stream);
  });
}

void cross_entropy_backward(const CrossEntropy& args, const void* lse, const void* scale, std::int64_t scale_stride,
                            void* dlogits, cudaStream_t stream) {
  dispatch(args, "cross_entropy_backward", [&](auto element, auto smooth) {
    backward<decltype(element), smooth.value>(args, lse, scale, scale_stride, dlogits, stream);
  });
}

void cross_entropy_denominator(const CrossEntropy& args, void* out, cudaStream_t stream) {
  const auto launch = [&](auto real) {
    using T = decltype(real);
    denominator_kernel<T><<<1, kMaxThreads, 0, stream>>>(args, static_cast<T*>(out));
  };
  args.dtype == DType::f64 ? launch(double{}) : launch(float{});
  cuda_check(cudaGetLastError(), "cross_entropy_denominator");
}

void cross_entropy_reduce(const void* losses, std::int64_t rows, DType dtype, const void* denominator, void* out,
                          cudaStream_t stream) {
  const auto launch = [&](auto real) {
    using T = decltype(real);
    reduce_kernel<T><<<1, kMaxThreads, 0, stream>>>(static_cast<const T*>(losses), rows,
                                                    static_cast<const T*>(denominator), static_cast<T*>(out));
  };
  dtype == DType::f64 ? launch(double{}) : launch(float{});
  cuda_check(cudaGetLastError(), "cross_entropy_reduce");
}

}  // namespace superfine::cuda
