// What a step over tensors is given, for every optimizer on the GPU.
#pragma once

#include <cstdint>

#include "math/adamw.h"
#include "math/lamb.h"
#include "math/moments.h"

namespace superfine::cuda {

// The hyperparameters that may lie on the device.
enum DeviceNumber : int { kLr, kBeta1, kBeta2, kGradientScale, kDeviceNumbers };
constexpr const char* kDeviceNumberNames[kDeviceNumbers] = {"lr", "beta1", "beta2", "gradient_scale"};

// The hyperparameters of a group, for any optimizer. Those that have an address are read there when the step runs.
struct GroupOptions {
  RuleOptions numbers;
  bool switches[4];  // those of AdamWOptions or LambOptions, in their order
  bool is_lamb;
  std::uint32_t seed;
  bool is_double[kDeviceNumbers];  // else float
  const void* address[kDeviceNumbers];

  static GroupOptions of(const AdamWOptions& o) { return {o, {o.decoupled}, false, 0, {}, {}}; }
  static GroupOptions of(const LambOptions& o) {
    return {o, {o.bias_correction, o.grad_averaging, o.adapt, o.trust_clip}, true, 0, {}, {}};
  }
};

// One entry for each tensor in all arrays but `options`.
struct Step {
  std::int64_t count;
  const MomentTensor* tensors;
  float* const* counts;         // of the steps taken, on the device; each grows by one
  const std::uint32_t* groups;  // numbers in `options`
  const GroupOptions* options;
};

}  // namespace superfine::cuda
