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

// A MomentTensor with its types, and the place of its scalars in the table.
template <class P_, class S_>
struct MomentPointers {
  using P = P_;
  using S = S_;

  P* param;
  P* grad;
  S* exp_avg;
  S* exp_avg_sq;
  void* max_or_scales;  // 8-bit moments have scales and no maximum, others may have a maximum
  const P* anchor;      // null, or what weight decay pulls toward
  std::uint16_t* remainder;
  std::int64_t numel;
  std::uint32_t random_key;
  Master master;
  bool zero_grad;
  std::uint8_t scalars;

  static MomentPointers of(const MomentTensor& t, int scalars) {
    return {static_cast<P*>(t.param),
            static_cast<P*>(t.grad),
            static_cast<S*>(t.exp_avg),
            static_cast<S*>(t.exp_avg_sq),
            t.scales != nullptr ? t.scales : t.max_exp_avg_sq,
            static_cast<const P*>(t.anchor),
            static_cast<std::uint16_t*>(t.remainder),
            t.numel,
            t.random_key,
            t.master,
            t.zero_grad,
            static_cast<std::uint8_t>(scalars)};
  }

  __device__ S* max_exp_avg_sq() const { return static_cast<S*>(max_or_scales); }
  __device__ float* scales() const { return static_cast<float*>(max_or_scales); }
};

#if CUDART_VERSION < 12010
#error "Kernel arguments of more than 4 KiB need nvcc 12.1 or later (cmake/optional_cuda.cmake asks for it)"
#endif
constexpr std::size_t kArgumentBytes = 32764;  // a kernel's, all of them

// A launch's tensors, passed by value, with as many distinct scalars as there is still room for beside `kReserved`
// bytes of other arguments.
template <class P_, class S_, class Scalars_, std::size_t kReserved = 0>
struct MomentTable {
  using P = P_;
  using S = S_;
  using Scalars = Scalars_;
  using Tensor = MomentPointers<P, S>;
  static constexpr int kTensors = 400;
  static constexpr int kScalars =
      (kArgumentBytes - kReserved - 16 - kTensors * (sizeof(Tensor) + sizeof(std::int32_t))) / sizeof(Scalars);

  Tensor tensors[kTensors];
  Scalars scalars[kScalars];  // distinct ones: usually one per parameter group
  std::int32_t first_chunk[kTensors];
  std::int32_t count;

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
  static_assert(sizeof(Table) <= kArgumentBytes && Table::kScalars <= 256);

  explicit TableBuilder(std::int64_t chunk) : chunk_(chunk) { clear(); }

  // False where the table has no room left for it; an empty one has.
  bool add(const Step& t) {
    const std::int64_t chunks = (t.numel + chunk_ - 1) / chunk_;
    const bool too_long = chunks_ > 0 && chunks_ + chunks > std::numeric_limits<std::int32_t>::max();
    const int scalars = find(t.scalars);
    if (table_.count == Table::kTensors || scalars == Table::kScalars || too_long) return false;
    if (scalars == scalars_) {
      distinct_[scalars_] = t.scalars;
      table_.scalars[scalars_++] = round_scalars<Opmath<typename Table::P>>(t.scalars);
    }
    const int i = table_.count++;
    table_.tensors[i] = Table::Tensor::of(t, scalars);
    table_.first_chunk[i] = static_cast<std::int32_t>(chunks_);
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

// Calls f(P{}, S{}, selects) for every pair of parameter and state types that kernels take;
// selects(tensor) says whether a tensor has them.
template <class F>
void for_each_dtypes(const F& f) {
  const auto pair = [&](auto p, auto s, DType param, DType state) {
    f(p, s, [=](const MomentTensor& t) { return t.param_dtype == param && t.state_dtype == state; });
  };
  const auto pairs = [&](auto p, DType param) {  // of 32 bits and less
    pair(p, float{}, param, DType::f32);
    pair(p, std::uint8_t{}, param, DType::u8);
  };
  pairs(float{}, DType::f32);
  pairs(bf16{}, DType::bf16);
  pairs(f16{}, DType::f16);
  pair(float{}, bf16{}, DType::f32, DType::bf16);
  pair(bf16{}, bf16{}, DType::bf16, DType::bf16);
  pair(f16{}, f16{}, DType::f16, DType::f16);
  pair(double{}, double{}, DType::f64, DType::f64);
}

}  // namespace superfine::cuda
