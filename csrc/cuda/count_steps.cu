#include "cuda/count_steps.h"

#include <cmath>

#include "core/cuda_check.h"
#include "cuda/block_reduce.h"
#include "cuda/moment_table.h"
#include "math/power.h"
#include "math/random.h"

namespace superfine::cuda {
namespace {

// The tensors of a launch, passed by value: most models fit into one, and it stays small enough not to delay it.
struct CountTable {
  static constexpr int kTensors = 512, kGroups = 64;

  GroupOptions groups[kGroups];
  float* counts[kTensors];
  std::uint8_t group[kTensors];
  bool is_double[kTensors];
  std::int32_t count;
};
static_assert(sizeof(CountTable) + sizeof(void*) <= kArgumentBytes && CountTable::kGroups <= 256);

__device__ double number(const GroupOptions& group, DeviceNumber which, double otherwise) {
  const void* const address = group.address[which];
  if (address == nullptr) return otherwise;
  return group.is_double[which] ? *static_cast<const double*>(address) : *static_cast<const float*>(address);
}

template <class T, class Exact>
__device__ void fill(StepSlot& slot, const Exact& exact, std::uint32_t key, bool is_taken) {
  auto rule = round_scalars<T>(exact);
  slot.as<decltype(rule)>() = {rule, key, is_taken, 0};
}

// One thread a tensor. A block is one warp: arithmetic in double, of which a multiprocessor may have two units only, is
// then shared out to as many of them as there can be.
__global__ void __launch_bounds__(kWarp) count_kernel(const __grid_constant__ CountTable table, StepSlot* slots) {
  const int i = blockIdx.x * kWarp + threadIdx.x;
  if (i >= table.count) return;
  const GroupOptions& group = table.groups[table.group[i]];
  RuleOptions numbers = group.numbers;
  numbers.lr = number(group, kLr, numbers.lr);
  numbers.beta1 = number(group, kBeta1, numbers.beta1);
  numbers.beta2 = number(group, kBeta2, numbers.beta2);
  numbers.gradient_scale = number(group, kGradientScale, numbers.gradient_scale);

  const double scale = numbers.gradient_scale;
  const bool is_taken = group.address[kGradientScale] == nullptr || scale - scale == 0;
  const float step = *table.counts[i] + 1;
  if (is_taken) *table.counts[i] = step;

  // x / (1 - beta1^t), and x / sqrt(1 - beta2^t) beside its denominator; x is 1 or, for AdamW's first one, lr.
  double first = 0, second = 0, root = 0;
#pragma unroll 1  // one copy of the code for both
  for (int k = 0; k < 2; ++k) {
    const double bias = 1.0 - power(k == 0 ? numbers.beta1 : numbers.beta2, step);
    root = std::sqrt(bias);
    first = second;
    second = (k == 0 && !group.is_lamb ? numbers.lr : 1.0) / (k == 0 ? bias : root);
  }
  slots[i] = {};  // padding is copied, too
  const std::uint32_t key = random_key(group.seed, step);
  const auto fill_with = [&](const auto& exact) {
    if (table.is_double[i]) {
      fill<double>(slots[i], exact, key, is_taken);
    } else {
      fill<float>(slots[i], exact, key, is_taken);
    }
  };
  const bool* const on = group.switches;
  if (group.is_lamb) {
    fill_with(scalars(LambOptions{numbers, on[0], on[1], on[2], on[3]}, first, second));
  } else {
    fill_with(scalars(AdamWOptions{numbers, on[0]}, first, root));
  }
}

}  // namespace

void count_steps(const Step& step, StepSlot* slots, cudaStream_t stream, const char* op) {
  CountTable table;
  int groups = 0;
  table.count = 0;
  const auto flush = [&] {
    const int blocks = (table.count + kWarp - 1) / kWarp;
    count_kernel<<<blocks, kWarp, 0, stream>>>(table, slots);
    cuda_check(cudaGetLastError(), op);
    slots += table.count;
    table.count = groups = 0;
  };
  for (std::int64_t i = 0; i < step.count; ++i) {
    const bool is_new = i == 0 || step.groups[i] != step.groups[i - 1];  // those of a group follow each other
    if (table.count == CountTable::kTensors || (is_new && groups == CountTable::kGroups)) flush();
    if (is_new || groups == 0) table.groups[groups++] = step.options[step.groups[i]];
    table.counts[table.count] = step.counts[i];
    table.group[table.count] = static_cast<std::uint8_t>(groups - 1);
    table.is_double[table.count++] = step.tensors[i].param_dtype == DType::f64;
  }
  if (table.count > 0) flush();
}

}  // namespace superfine::cuda
