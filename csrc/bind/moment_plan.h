// What a step learned about an optimizer's tensors, so that the next one only has to see that it still holds.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <utility>
#include <vector>

#include "bind/moment_objects.h"
#include "bind/tensor_list.h"
#include "math/moments.h"

namespace superfine {

// Kept from step to step by Python. Holds no reference and no address: those are read at every step.
class MomentPlan {
 public:
  // Before a step over `count` parameters on this device.
  void begin(std::size_t count, TensorView::Device device, int device_index) {
    constexpr std::size_t kMostLayouts = 4096;  // of parameters that come and go in ever new shapes
    if (std::pair(device, device_index) != device_ || layouts_.size() > kMostLayouts) {
      layouts_.clear();
      numbers_.clear();
      entries_.clear();
    }
    device_ = {device, device_index};
    entries_.resize(count);
  }

  // Whether the i-th parameter and what belongs to it are as they were when it was learned; then `tensor` and `step`
  // are theirs. Needs no lock of the interpreter.
  bool recall(const TensorReader& reader, std::size_t i, const MomentObjects& objects, MomentTensor& tensor,
              float*& step) const {
    const Entry& entry = entries_[i];
    if (entry.stochastic_rounding != objects.options->stochastic_rounding) return false;
    std::array<void*, kRoles> data{};
    for (std::size_t role = 0; role < kRoles; ++role) {
      const std::uint16_t number = entry.layouts[role];
      if (number == kNone) {
        if (objects[role] != nullptr) return false;
        continue;
      }
      data[role] = reader.data_if(objects.records[role], layouts_[number]);
      if (data[role] == nullptr) return false;
    }
    tensor = entry.tensor;
    tensor.param = data[kParam];
    tensor.grad = data[kGrad];
    tensor.exp_avg = data[kExpAvg];
    tensor.exp_avg_sq = data[kExpAvgSq];
    tensor.max_exp_avg_sq = data[kMaxExpAvgSq];
    tensor.anchor = data[kAnchor];
    tensor.remainder = data[kRemainder];
    tensor.scales = static_cast<float*>(data[kScales]);
    tensor.zero_grad = objects.options->zero_grads;
    step = static_cast<float*>(data[kStep]);
    return true;
  }

  // That the i-th parameter is this one, which a kernel takes. All its objects are known.
  void learn(const TensorReader& reader, std::size_t i, const MomentObjects& objects, const MomentTensor& tensor) {
    Entry entry;
    for (std::size_t role = 0; role < kRoles; ++role) {
      if (objects[role] == nullptr) continue;
      const auto layout = reader.layout(objects[role]);
      if (!layout || layouts_.size() == kNone) return;
      const auto [found, is_new] = numbers_.try_emplace(layout->words, static_cast<std::uint16_t>(layouts_.size()));
      if (is_new) layouts_.push_back(*layout);
      entry.layouts[role] = found->second;
    }
    entry.tensor = tensor;
    entry.stochastic_rounding = objects.options->stochastic_rounding;
    entries_[i] = entry;
  }

 private:
  static constexpr std::uint16_t kNone = std::numeric_limits<std::uint16_t>::max();

  struct Entry {
    Entry() { layouts.fill(kNone); }
    std::array<std::uint16_t, kRoles> layouts;
    MomentTensor tensor{};
    bool stochastic_rounding = false;
  };

  std::pair<TensorView::Device, int> device_{TensorView::Device::other, 0};
  std::vector<TensorLayout> layouts_;  // distinct ones: most tensors of a model are alike
  std::map<TorchRecord::Words, std::uint16_t> numbers_;
  std::vector<Entry> entries_;
};

}  // namespace superfine
