// The Python objects of an optimizer's parameters by what they are for, and the options that a step has for them.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <cstdint>

#include "bind/tensor_list.h"

namespace superfine {

// What a step takes part in, for one group of parameters. In lists, amsgrad and anchors are there or are not.
struct MomentOptions {
  std::size_t group;
  bool amsgrad, anchored, zero_grads, stochastic_rounding;
  std::uint32_t seed;

  // From the hyperparameters of an op, by name.
  static MomentOptions of(std::size_t group, const py::dict& hyper) {
    return {group,
            hyper.contains("amsgrad") && hyper["amsgrad"].cast<bool>(),
            hyper.contains("anchored") && hyper["anchored"].cast<bool>(),
            hyper["zero_grads"].cast<bool>(),
            hyper["stochastic_rounding"].cast<bool>(),
            hyper["seed"].cast<std::uint32_t>()};
  }
};

// A parameter and what belongs to it.
enum Role : std::size_t {
  kParam,
  kGrad,
  kExpAvg,
  kExpAvgSq,
  kMaxExpAvgSq,
  kAnchor,
  kRemainder,
  kScales,
  kStep,
  kRoles
};
constexpr const char* kLists[kRoles] = {"params",  "grads",      "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs",
                                        "anchors", "remainders", "scales",   "steps"};
constexpr bool is_optional(std::size_t role) { return role >= kMaxExpAvgSq && role <= kScales; }

// The Python objects of a parameter by their roles: borrowed; null where an optional one is absent. That of a gradient
// may be null while torch's record of it is known, as to make one costs more than all else.
struct MomentObjects : std::array<PyObject*, kRoles> {
  const MomentOptions* options;
  std::array<TorchRecord::Record, kRoles> records;  // null where only the object tells

  // Where torch keeps what the objects stand for.
  void locate(const TensorReader& reader) {
    for (std::size_t role = 0; role < kRoles; ++role) {
      if (role != kGrad || records[role] == nullptr) records[role] = reader.record((*this)[role]);
      TensorReader::prefetch_record(records[role]);
    }
  }
  void prefetch_storages(const TensorReader& reader) const {
    for (const TorchRecord::Record record : records) reader.prefetch_storage(record);
  }
};

}  // namespace superfine
