// The hyperparameters of the optimizers' ops, from Python's dicts of them (superfine_kernels/_moments.py).
#pragma once

#include <pybind11/pybind11.h>

#include "math/adamw.h"
#include "math/lamb.h"

namespace superfine {

inline RuleOptions rule_options(const pybind11::dict& hyper) {
  return {hyper["lr"].cast<double>(),  hyper["beta1"].cast<double>(),        hyper["beta2"].cast<double>(),
          hyper["eps"].cast<double>(), hyper["weight_decay"].cast<double>(), hyper["gradient_scale"].cast<double>()};
}

inline AdamWOptions adamw_options(const pybind11::dict& hyper) {
  return {rule_options(hyper), hyper["decoupled"].cast<bool>()};
}

inline LambOptions lamb_options(const pybind11::dict& hyper) {
  return {rule_options(hyper), hyper["bias_correction"].cast<bool>(), hyper["grad_averaging"].cast<bool>(),
          hyper["adapt"].cast<bool>(), hyper["trust_clip"].cast<bool>()};
}

}  // namespace superfine
