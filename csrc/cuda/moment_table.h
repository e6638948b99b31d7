// What the multi-tensor kernels of the optimizers share on the host: the table of a launch's tensors and the loop that
// fills it; and the search of a block for its tensor.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/dtype.h"
#include "math/moments.h"

namespace superfine::cuda {

__host__ __device__ constexpr int size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : dtype == DType::u8 ? 1 : 2;
}

// A MomentTensor in fewer bytes, with the place of its step's scalars.
struct MomentEntry {
  void* param;
  void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_or_scales;  // the scales of 8-bit moments, which have no maximum
  const void* anchor;
  std::uint16_t* remainder;
  std::int64_t numel;
  std::uint32_t slot;
  Master master;
  bool zero_grad;
  std::uint8_t dtypes;  // four bits for each of both, so that the entry fills whole words

  __device__ DType param_dtype() const { return static_cast<DType>(dtypes & 15); }
  __device__ DType state_dtype() const { return static_cast<DType>(dtypes >> 4); }

  static MomentEntry of(const MomentTensor& t, std::int64_t slot) {
    return {t.param,
            t.grad,
            t.exp_avg,
            t.exp_avg_sq,
            t.scales != nullptr ? t.scales : t.max_exp_avg_sq,
            t.anchor,
            static_cast<std::uint16_t*>(t.remainder),
            t.numel,
            static_cast<std::uint32_t>(slot),
            t.master,
            t.zero_grad,
            static_cast<std::uint8_t>(static_cast<int>(t.param_dtype) | static_cast<int>(t.state_dtype) << 4)};
  }
};

// Bytes of a kernel's arguments, which an older nvcc would end at 4 KiB (cmake/optional_cuda.cmake takes none).
constexpr std::size_t kArgumentBytes = 32764;

// A launch's tensors, passed by value.
struct MomentTable {
  static constexpr std::size_t kReserved = 32;  // for other arguments and `count`
  static constexpr int kTensors = (kArgumentBytes - kReserved) / (sizeof(MomentEntry) + sizeof(std::int32_t));

  MomentEntry tensors[kTensors];
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

// Fills a table.
class TableBuilder {
 public:
  explicit TableBuilder(std::int64_t chunk) : chunk_(chunk) { clear(); }

  // False where the table has no room left for it; an empty one has.
  bool add(const MomentTensor& t, std::int64_t slot) {
    const std::int64_t chunks = (t.numel + chunk_ - 1) / chunk_;
    const bool too_long = chunks_ > 0 && chunks_ + chunks > std::numeric_limits<std::int32_t>::max();
    if (table_.count == MomentTable::kTensors || too_long) return false;
    const int i = table_.count++;
    table_.tensors[i] = MomentEntry::of(t, slot);
    table_.first_chunk[i] = static_cast<std::int32_t>(chunks_);
    chunks_ += chunks;
    return true;
  }

  void clear() {
    table_.count = 0;
    chunks_ = 0;
  }

  const MomentTable& table() const { return table_; }
  unsigned chunks() const { return static_cast<unsigned>(chunks_); }

 private:
  std::int64_t chunk_;
  MomentTable table_;
  std::int64_t chunks_;
};

// Calls launch(table, chunks) for the selected tensors, in their order, with at most `batch` elements in a table of
// several tensors. The i-th tensor has the i-th slot.
template <class Select, class Launch>
void fill_tables(const MomentTensor* tensors, std::int64_t count, const Select& select, std::int64_t chunk,
                 std::int64_t batch, const Launch& launch) {
  TableBuilder builder(chunk);
  std::int64_t elements = 0;
  const auto flush = [&] {
    if (builder.chunks() > 0) launch(builder.table(), builder.chunks());
    builder.clear();
    elements = 0;
  };
  for (std::int64_t i = 0; i < count; ++i) {
    const MomentTensor& t = tensors[i];
    if (t.numel == 0 || !select(t)) continue;
    if (t.numel > batch - elements) flush();
    if (!builder.add(t, i)) {
      flush();
      builder.add(t, i);
    }
    elements += t.numel;
  }
  flush();
}

}  // namespace superfine::cuda
