// Cross-entropy, one block or one cluster of blocks per row; the formula is in math/cross_entropy.h.
//
// Traffic per logit: the forward pass reads it once, and writes the gradient once where that is wanted: 8 bytes in
// fp32, 4 in bf16. The row waits in shared memory between the two; one that does not fit is read again, mostly from
// the L2 cache. The floor is those bytes over the memory bandwidth. Sums follow a fixed tree: the same bits on every
// run.
#include "cuda/cross_entropy.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "core/cuda_check.h"
#include "cuda/cross_entropy_general.h"
#include "cuda/cross_entropy_plain.h"

namespace superfine::cuda {
namespace {

// Of any kernel here, at most; the rest of what a block may have is for its row.
constexpr int kStaticShared = 2048;
// Two blocks with rows of this size, one reading while the other writes, fit into the 228 KB of a multiprocessor
// (sm_90, sm_100). A longer row is better spread over several, or has the multiprocessor for itself.
constexpr int kShareBytes = 112 << 10;
constexpr int kMostBlocks = 8;  // of a cluster, on every GPU that has clusters

__device__ double real_at(const void* values, std::int64_t i, bool is_double) {
  return is_double ? static_cast<const double*>(values)[i] : static_cast<const float*>(values)[i];
}
__device__ void set_real(void* values, std::int64_t i, bool is_double, double value) {
  if (is_double) {
    static_cast<double*>(values)[i] = value;
  } else {
    static_cast<float*>(values)[i] = static_cast<float>(value);
  }
}

__global__ void __launch_bounds__(kMaxThreads) denominator_kernel(const CrossEntropy args, void* out) {
  const bool is_double = args.dtype == DType::f64;
  const bool labels = args.targets == 1 && args.probabilities == nullptr;
  Sum<double> part;
  for (std::int64_t i = threadIdx.x; i < args.rows; i += blockDim.x) {
    bool counts = args.target == nullptr;
    std::int64_t c = 0;
    for (std::int64_t slot = 0; slot < args.targets && !counts; ++slot) {
      c = class_at(args, i * args.target_stride + slot);
      counts = c != args.ignore_index;
    }
    // Where a label is no class, the loss is NaN anyway.
    const bool weighted = labels && args.weight != nullptr && is_class(args, c);
    if (counts) part.value += weighted ? real_at(args.weight, c, is_double) : 1.0;
  }
  part = block_reduce(part);
  if (threadIdx.x == 0) {
    set_real(out, 0, is_double, part.value);
    set_real(out, 1, is_double, 1.0 / part.value);
  }
}

__global__ void __launch_bounds__(kMaxThreads)
    reduce_kernel(const void* losses, std::int64_t rows, bool is_double, const void* denominator, void* out) {
  Sum<double> part;
  for (std::int64_t i = threadIdx.x; i < rows; i += blockDim.x) part.value += real_at(losses, i, is_double);
  part = block_reduce(part);
  if (threadIdx.x == 0) {
    set_real(out, 0, is_double, denominator ? part.value / real_at(denominator, 0, is_double) : part.value);
  }
}

template <class T>
Settings<T> settings_of(const CrossEntropy& args) {
  const double s = args.label_smoothing;
  return {static_cast<T>(1 - s),        static_cast<T>(s / static_cast<double>(args.classes)),
          static_cast<T>(args.z_loss),  static_cast<T>(args.scale),
          static_cast<T>(args.softcap), static_cast<T>(args.softcap > 0 ? args.scale / args.softcap : 0)};
}

bool is_plain(const CrossEntropy& args, bool statistics) {
  return args.target != nullptr && args.targets == 1 && args.probabilities == nullptr && args.label_smoothing == 0 &&
         args.softcap == 0 && args.scale == 1 && !statistics && args.dtype != DType::f64;
}

// How a row is spread over threads and memory.
struct Shape {
  int threads, blocks = 1, shared_bytes = 0;
};

// About four packs a thread, in whole warps. The number depends on the shape alone, and so do the bits of the result.
template <class E>
int threads_for(std::int64_t bytes) {
  const int limit = bytes > kShareBytes ? kThreadLimit<E> : std::min(512, kThreadLimit<E>);
  return static_cast<int>(std::min<std::int64_t>(limit, bytes / (4 * 16) / kWarp * kWarp + kWarp));
}

// One kernel for all rows.
template <class E>
class Launch {
 public:
  using T = Opmath<E>;
  using Kernel = void (*)(CrossEntropy, Work<T>, Settings<T>, std::int64_t);
  static constexpr int kPack = PackedRow<E>::kPack, kPackBytes = kPack * sizeof(E);

  Launch(const char* op, Kernel kernel, const CrossEntropy& args) : op_(op), kernel_(kernel), args_(args) {}

  Shape shape() const { return {threads_for<E>(args_.vocab * static_cast<std::int64_t>(sizeof(E)))}; }

  // Shared memory for a row, or for its part in each of `blocks`: packs that it may touch, also where it begins
  // within one. 0 where that is too much.
  int room(int device, int blocks) const {
    const std::int64_t bytes = ((args_.vocab / kPack + 2 * (kPack - 1)) / blocks + 1) * kPackBytes;
    return bytes + kStaticShared <= attribute(device, cudaDevAttrMaxSharedMemoryPerBlockOptin) ? static_cast<int>(bytes)
                                                                                               : 0;
  }

  bool in_block(int device, Shape& shape) const {
    shape = this->shape();
    shape.shared_bytes = room(device, 1);
    return shape.shared_bytes > 0;
  }

  // In the fewest blocks that leave room for a second cluster's beside them.
  bool in_cluster(int device, Shape& shape) const {
    if (!takes_clusters(device)) return false;
    for (int blocks = 2; blocks <= kMostBlocks; blocks *= 2) {
      const int bytes = room(device, blocks);
      if (bytes == 0 || (bytes > kShareBytes && blocks < kMostBlocks)) continue;
      shape = {threads_for<E>(bytes), blocks, bytes};
      return clusters(shape) > 0;
    }
    return false;
  }

  // `rows` at most in a grid.
  void operator()(const Work<T>& work, const Shape& shape, cudaStream_t stream) const {
    reserve(shape);
    const std::int64_t rows = std::numeric_limits<int>::max() / shape.blocks;
    for (std::int64_t first = 0; first < args_.rows; first += rows) {
      Config config(shape, std::min(rows, args_.rows - first), stream);
      cuda_check(cudaLaunchKernelEx(&config, kernel_, args_, work, settings_of<T>(args_), first), op_);
    }
  }

 private:
  struct Config : cudaLaunchConfig_t {
    cudaLaunchAttribute cluster = {};

    Config(const Shape& shape, std::int64_t rows, cudaStream_t on) : cudaLaunchConfig_t{} {
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {static_cast<unsigned>(shape.blocks), 1, 1};
      gridDim = dim3(static_cast<unsigned>(rows * shape.blocks));
      blockDim = dim3(static_cast<unsigned>(shape.threads));
      dynamicSmemBytes = static_cast<std::size_t>(shape.shared_bytes);
      stream = on;
      attrs = &cluster;
      numAttrs = shape.blocks > 1 ? 1 : 0;
    }
    Config(const Config&) = delete;
  };

  int attribute(int device, cudaDeviceAttr which) const {
    int value = 0;
    cuda_check(cudaDeviceGetAttribute(&value, which, device), op_);
    return value;
  }

  // Above 48 KB a kernel must ask first.
  void reserve(const Shape& shape) const {
    if (shape.shared_bytes == 0) return;
    cuda_check(cudaFuncSetAttribute(kernel_, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes), op_);
  }

  // The device, and the code: what was compiled for sm_80 does not know its cluster, wherever it runs.
  bool takes_clusters(int device) const {
    cudaFuncAttributes code = {};
    cuda_check(cudaFuncGetAttributes(&code, kernel_), op_);
    return code.ptxVersion >= 90 && attribute(device, cudaDevAttrClusterLaunch) != 0;
  }

  // How many the device can hold; 0 where it refuses the shape.
  int clusters(const Shape& shape) const {
    reserve(shape);
    Config config(shape, 1, nullptr);
    int count = 0;
    if (cudaOccupancyMaxActiveClusters(&count, kernel_, &config) == cudaSuccess) return count;
    cudaGetLastError();  // or the next launch would report it
    return 0;
  }

  const char* op_;
  Kernel kernel_;
  const CrossEntropy& args_;
};

template <class E>
void run(const char* op, const CrossEntropy& args, Work<Opmath<E>> work, bool plain, cudaStream_t stream) {
  if (args.rows == 0) return;
  int device = 0;
  cuda_check(cudaGetDevice(&device), op);
  const bool twice = work.dlogits != nullptr && work.sums == nullptr;
  Shape shape;
  if constexpr (sizeof(E) < sizeof(double)) {
    const Launch<E> held(op, plain_kernel<E, true>, args), streamed(op, plain_kernel<E, false>, args);
    if (plain && twice && (held.in_block(device, shape) || held.in_cluster(device, shape))) {
      return held(work, shape, stream);
    }
    if (plain) return streamed(work, streamed.shape(), stream);
  }
  const Launch<E> general(op, general_kernel<E>, args);
  work.hold = twice && general.in_block(device, shape);
  general(work, work.hold ? shape : general.shape(), stream);
}

// Calls f with a value of the element type.
template <class F>
void dispatch(const CrossEntropy& args, const char* op, const F& f) {
  if (args.vocab < 1 || args.vocab > (std::int64_t{1} << 30)) {  // columns are counted in int
    throw std::invalid_argument(std::string(op) + ": vocab is " + std::to_string(args.vocab) + "; expected 1 to 2^30");
  }
  switch (args.dtype) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
    case DType::f64: return f(double{});
    default: throw std::invalid_argument(std::string(op) + ": dtype is not one of logits");
  }
}

}  // namespace

void cross_entropy_forward(const CrossEntropy& args, void* out, bool statistics, void* dlogits, const void* scale,
                           std::int64_t scale_stride, cudaStream_t stream) {
  constexpr auto kOp = "cross_entropy_forward";
  dispatch(args, kOp, [&](auto element) {
    using T = Opmath<decltype(element)>;
    Work<T> work = {};
    work.out = static_cast<T*>(out);
    work.results = statistics ? kRowStatistics : kRowResults;
    work.dlogits = dlogits;
    work.scale = static_cast<const T*>(scale);
    work.scale_stride = scale_stride;
    run<decltype(element)>(kOp, args, work, is_plain(args, statistics), stream);
  });
}

void cross_entropy_backward(const CrossEntropy& args, const void* sums, const void* scale, std::int64_t scale_stride,
                            void* dlogits, cudaStream_t stream) {
  constexpr auto kOp = "cross_entropy_backward";
  dispatch(args, kOp, [&](auto element) {
    using T = Opmath<decltype(element)>;
    Work<T> work = {};
    work.sums = static_cast<const T*>(sums);
    work.dlogits = dlogits;
    work.scale = static_cast<const T*>(scale);
    work.scale_stride = scale_stride;
    run<decltype(element)>(kOp, args, work, is_plain(args, false), stream);
  });
}

void cross_entropy_part(const CrossEntropy& args, void* out, bool statistics, cudaStream_t stream) {
  constexpr auto kOp = "cross_entropy_part";
  dispatch(args, kOp, [&](auto element) {
    using T = Opmath<decltype(element)>;
    Work<T> work = {};
    work.out = static_cast<T*>(out);
    work.results = statistics ? kPartStatistics : kPartResults;
    work.part = true;
    run<decltype(element)>(kOp, args, work, is_plain(args, statistics), stream);
  });
}

void cross_entropy_denominator(const CrossEntropy& args, void* out, cudaStream_t stream) {
  denominator_kernel<<<1, kMaxThreads, 0, stream>>>(args, out);
  cuda_check(cudaGetLastError(), "cross_entropy_denominator");
}

void cross_entropy_reduce(const void* losses, std::int64_t rows, DType dtype, const void* denominator, void* out,
                          cudaStream_t stream) {
  reduce_kernel<<<1, kMaxThreads, 0, stream>>>(losses, rows, dtype == DType::f64, denominator, out);
  cuda_check(cudaGetLastError(), "cross_entropy_reduce");
}

}  // namespace superfine::cuda
