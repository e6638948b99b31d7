// What the multi-tensor kernels of the optimizers share: a tensor's pointers, the table of a launch's tensors, the
// search of a block for its tensor, and the loops over dtypes and tables on the host.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "core/dtype.h"
#include "cuda/pack.h"
#include "math/moments.h"

namespace superfine::cuda {

// A MomentTensor with its types.
template <class P_, class S_>
struct MomentPointers {
  using P = P_;
  using S = S_;

  P* param;
  P* grad;
  S* exp_avg;
  S* exp_avg_sq;
  const P* anchor;            // null, or what weight decay pulls toward
  std::uint16_t* remainders;  // null, or the lower bits of param
  std::int64_t numel;

  static MomentPointers of(const MomentTensor& t) {
    return {static_cast<P*>(t.param),
            static_cast<P*>(t.grad),
            static_cast<S*>(t.exp_avg),
            static_cast<S*>(t.exp_avg_sq),
            static_cast<const P*>(t.anchor),
            t.remainders,
            t.numel};
  }

  __device__ bool anchored() const { return anchor != nullptr; }
  __device__ bool splits() const { return kMaySplit<P> && remainders != nullptr; }

  // Leaves the first n elements out.
  __device__ void skip(std::int64_t n) {
    param += n;
    grad += n;
    exp_avg += n;
    exp_avg_sq += n;
    if (anchored()) anchor += n;
    if (splits()) remainders += n;
    numel -= n;
  }
};

// A launch's tensors, passed by value. Kernel arguments end at 4 KiB, or at 32,764 bytes from CUDA
// 12.1 on (nvcc and driver); a table is as large as fits and still holds any mix of scalars.
// `Tensor::of` makes an entry of a MomentTensor.
template <class Tensor_, class Scalars_, int kTensors_, int kScalars_>
struct MomentTable {
  using Tensor = Tensor_;
  using Scalars = Scalars_;
  static constexpr int kTensors = kTensors_, kScalars = kScalars_;

  Tensor tensors[kTensors];
  Scalars scalars[kScalars];  // distinct ones: usually one per parameter group
  std::int32_t first_chunk[kTensors];
  std::uint8_t scalars_of[kTensors];
  bool zero_grad[kTensors];
  std::int32_t count;
  static_assert(kScalars <= 256);

  // The last tensor whose first chunk is not after this one.
  __device__ int find(int chunk) const {
    int index = 0;
    for (int end = count; end - index > 1;) {
      const int middle = (index + end) / 2;
      (first_chunk[middle] <= chunk ? index : end) = middle;
    }
    return index;
  }
};

// Fills a table with tensors of type `Step`, which brings scalars in double.
template <class Table, class Step>
class TableBuilder {
 public:
  explicit TableBuilder(std::int64_t chunk) : chunk_(chunk) { clear(); }

  // False where the table has no room left for it; an empty one has.
  bool add(const Step& t) {
    const std::int64_t chunks = (t.numel + chunk_ - 1) / chunk_;
    const bool too_long = chunks_ > 0 && chunks_ + chunks > std::numeric_limits<std::int32_t>::max();
    const int scalars = find(t.scalars);
    if (table_.count == Table::kTensors || scalars == Table::kScalars || too_long) return false;
    if (scalars == scalars_) {
      distinct_[scalars_] = t.scalars;
      table_.scalars[scalars_++] = round_scalars<Opmath<typename Table::Tensor::P>>(t.scalars);
    }
    const int i = table_.count++;
    table_.tensors[i] = Table::Tensor::of(t);
    table_.first_chunk[i] = static_cast<std::int32_t>(chunks_);
    table_.scalars_of[i] = static_cast<std::uint8_t>(scalars);
    table_.zero_grad[i] = t.zero_grad;
    chunks_ += chunks;
    return true;
  }

  void clear() {
    table_.count = 0;
    chunks_ = 0;
    scalars_ = 0;
  }

  const Table& table() const { return table_; }
  unsigned chunks() const { return static_cast<unsigned>(chunks_); }

 private:
  using HostScalars = decltype(Step::scalars);

  // The newest first: parameters of one group follow each other.
  int find(const HostScalars& scalars) const {
    for (int i = scalars_ - 1; i >= 0; --i) {
      if (std::memcmp(&distinct_[i], &scalars, sizeof scalars) == 0) return i;
    }
    return scalars_;
  }

  std::int64_t chunk_;
  Table table_;
  HostScalars distinct_[Table::kScalars];
  std::int64_t chunks_;
  int scalars_;
};

inline bool large_arguments() {
#if CUDART_VERSION >= 12010
  static const bool supported = [] {
    int driver = 0;
    return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12010;
  }();
  return supported;
#else
  return false;
#endif
}

// Calls launch(table, chunks) for the selected tensors, in their order, with at most `batch` elements in a
// table of several tensors.
template <class Table, class Step, class Select, class Launch>
void fill_tables(const Step* tensors, std::int64_t count, const Select& select, std::int64_t chunk, std::int64_t batch,
                 const Launch& launch) {
  TableBuilder<Table, Step> builder(chunk);
  std::int64_t elements = 0;
  const auto flush = [&] {
    if (builder.chunks() > 0) launch(builder.table(), builder.chunks());
    builder.clear();
    elements = 0;
  };
  for (std::int64_t i = 0; i < count; ++i) {
    const Step& t = tensors[i];
    if (t.numel == 0 || !select(t)) continue;
    if (t.numel > batch - elements) flush();
    if (!builder.add(t)) {
      flush();
      builder.add(t);
    }
    elements += t.numel;
  }
  flush();
}

// The same with the smaller table where that is enough, or where the driver takes no other.
template <class Small, class Large, class Step, class Select, class Launch>
void fill_small_or_large_tables(const Step* tensors, std::int64_t count, const Select& select, std::int64_t chunk,
                                std::int64_t batch, const Launch& launch) {
  if (std::count_if(tensors, tensors + count, select) > Small::kTensors && large_arguments()) {
    fill_tables<Large>(tensors, count, select, chunk, batch, launch);
  } else {
    fill_tables<Small>(tensors, count, select, chunk, batch, launch);
  }
}

// Calls f(P{}, S{}, selects) for every pair of parameter and state types that kernels take;
// selects(tensor) says whether a tensor has them.
template <class F>
void for_each_dtypes(const F& f) {
  const auto pair = [&](auto p, auto s, DType param, DType state) {
    f(p, s, [=](const MomentTensor& t) { return t.param_dtype == param && t.state_dtype == state; });
  };
  pair(float{}, float{}, DType::f32, DType::f32);
  pair(bf16{}, bf16{}, DType::bf16, DType::bf16);
  pair(bf16{}, float{}, DType::bf16, DType::f32);
  pair(f16{}, f16{}, DType::f16, DType::f16);
  pair(f16{}, float{}, DType::f16, DType::f32);
  pair(double{}, double{}, DType::f64, DType::f64);
}

}  // namespace superfine::cuda
