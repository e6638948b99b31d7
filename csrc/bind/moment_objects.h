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

// The Python objects of a parameter by their roles: borrowed; null where an optional one is absent.
struct MomentObjects : std::array<PyObject*, kRoles> {
  const MomentOptions* options;
};

inline void prefetch_records(const TensorReader& reader, const MomentObjects& objects) {
  for (PyObject* object : objects) reader.prefetch_record(object);
}
inline void prefetch_storages(const TensorReader& reader, const MomentObjects& objects) {
  for (PyObject* object : objects) reader.prefetch_storage(object);
}

}  // namespace superfine
