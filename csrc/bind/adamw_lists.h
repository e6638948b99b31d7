// The argument lists of `adamw_`, read and checked once for every backend. Nothing is written before
// all checks have passed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "bind/tensor_list.h"
#include "math/adamw.h"

namespace superfine {

struct AdamWLists {
  std::vector<AdamWTensor> tensors;
  std::vector<float*> steps;      // one per tensor: the count of steps taken, in host memory
  std::vector<std::size_t> rest;  // positions that no kernel takes: other dtypes, strides that differ
};

inline std::string describe(py::handle tensor) {
  const std::string dtype = py::str(tensor.attr("dtype"));
  const std::string shape = py::str(py::tuple(tensor.attr("shape")));
  const std::string device = py::str(tensor.attr("device"));
  return dtype.substr(dtype.find('.') + 1) + " " + shape + " on " + device;
}

[[noreturn]] inline void reject_adamw(const char* list, std::size_t i, const std::string& is, const std::string& expected) {
  throw py::value_error("adamw_: " + std::string(list) + "[" + std::to_string(i) + "] is " + is + "; expected " + expected);
}

namespace detail {

inline bool kernel_takes(DType param, DType state) {
  return state == param || (state == DType::f32 && (param == DType::bf16 || param == DType::f16));
}

// Every byte may be written through one tensor only.
inline void reject_overlap(std::vector<std::pair<const char*, const char*>>& ranges) {
  std::sort(ranges.begin(), ranges.end());
  for (std::size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) {
      throw py::value_error(
          "adamw_: params and optimizer state overlap in memory; expected every tensor to have memory of its own "
          "(is a parameter, or a view of it, given twice?)");
    }
  }
}

}  // namespace detail

// `max_exp_avg_sqs` is empty without amsgrad. Shapes and devices must agree, and steps be float32
// scalars on the CPU, or it throws.
inline AdamWLists read_adamw_lists(const TensorReader& reader, const py::list& params, const py::list& grads,
                                   const py::list& exp_avgs, const py::list& exp_avg_sqs,
                                   const py::list& max_exp_avg_sqs, const py::list& steps,
                                   TensorView::Device device) {
  const std::size_t n = params.size();
  const bool amsgrad = !max_exp_avg_sqs.empty();
  const std::pair<const char*, const py::list*> lists[] = {{"grads", &grads},
                                                           {"exp_avgs", &exp_avgs},
                                                           {"exp_avg_sqs", &exp_avg_sqs},
                                                           {"max_exp_avg_sqs", &max_exp_avg_sqs},
                                                           {"steps", &steps}};
  for (const auto& [name, list] : lists) {
    if (list->size() != n && (list != &max_exp_avg_sqs || amsgrad)) {
      throw py::value_error("adamw_: " + std::string(name) + " has " + std::to_string(list->size()) +
                            " tensors; expected " + std::to_string(n) + ", one for each of params");
    }
  }

  AdamWLists result;
  result.tensors.reserve(n);
  result.steps.reserve(n);
  std::vector<std::pair<const char*, const char*>> written;
  written.reserve(4 * n);
  for (std::size_t i = 0; i < n; ++i) {
    const TensorView param = reader.read(params[i]);
    if (param.device != device) {
      reject_adamw("params", i, describe(params[i]), device == TensorView::Device::cpu ? "a tensor on cpu" : "a tensor on cuda");
    }
    const TensorView step = reader.read(steps[i]);
    if (step.numel != 1 || step.dtype != DType::f32 || step.device != TensorView::Device::cpu) {
      reject_adamw("steps", i, describe(steps[i]), "float32 () on cpu");
    }
    TensorView others[4];
    const int count = amsgrad ? 4 : 3;
    bool takes = param.dtype.has_value() && is_dense(param);
    for (int k = 0; k < count; ++k) {
      const py::handle object = (*lists[k].second)[i];
      TensorView& view = others[k] = reader.read(object);
      const bool dtype_agrees = k == 0 ? view.dtype == param.dtype : view.dtype == others[1].dtype;
      if (view.device != param.device || view.device_index != param.device_index || !same_shape(view, param) || !dtype_agrees) {
        const std::string wanted = describe(k < 2 ? params[i] : exp_avgs[i]);
        reject_adamw(lists[k].first, i, describe(object), wanted);
      }
      takes = takes && same_order(view, param);
    }
    takes = takes && others[1].dtype.has_value() && detail::kernel_takes(*param.dtype, *others[1].dtype);
    if (!takes) {
      result.rest.push_back(i);
      continue;
    }
    const auto writes = [&](const TensorView& view) {
      const char* begin = static_cast<const char*>(view.data);
      if (view.numel > 0) written.emplace_back(begin, begin + view.numel * element_size(*view.dtype));
    };
    writes(param);
    for (int k = 1; k < count; ++k) writes(others[k]);
    result.tensors.push_back({param.data, others[0].data, others[1].data, others[2].data,
                              amsgrad ? others[3].data : nullptr, param.numel, *param.dtype, *others[1].dtype, {}});
    result.steps.push_back(static_cast<float*>(step.data));
  }
  detail::reject_overlap(written);
  return result;
}

// Counts one step more for every tensor and sets the scalars that follow from it.
inline void advance(AdamWLists& lists, double lr, double beta1, double beta2, double eps, double weight_decay,
                    bool maximize) {
  float last = -1;
  for (std::size_t i = 0; i < lists.tensors.size(); ++i) {
    const float step = *lists.steps[i] += 1;
    if (i > 0 && step == last) {
      lists.tensors[i].scalars = lists.tensors[i - 1].scalars;
    } else {
      lists.tensors[i].scalars = adamw_scalars(lr, beta1, beta2, eps, weight_decay, maximize, step);
    }
    last = step;
  }
}

}  // namespace superfine
