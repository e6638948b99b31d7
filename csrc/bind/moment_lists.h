// The argument lists of the optimizers' ops (parameters, gradients, moments), read and checked once for
// every op and backend. Nothing is written before all checks have passed.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bind/moment_objects.h"
#include "bind/moment_plan.h"
#include "bind/tensor_list.h"
#include "core/parallel_for.h"
#include "math/moments.h"
#include "math/quantized.h"
#include "math/random.h"

namespace superfine {

// Parameters that kernels take, in their order, and the positions of the others.
struct MomentArguments {
  std::vector<MomentTensor> tensors;
  std::vector<float*> steps;  // one per tensor: the count of steps taken, on the tensor's device
  std::vector<const MomentOptions*> options;
  std::vector<std::size_t> rest;  // that no kernel takes: other dtypes, strides that differ
  int device_index = 0;           // of all of them
};

inline std::string describe(py::handle tensor) {
  const std::string dtype = py::str(tensor.attr("dtype"));
  const std::string shape = py::str(py::tuple(py::list(tensor.attr("shape"))));
  const std::string device = py::str(tensor.attr("device"));
  return dtype.substr(dtype.find('.') + 1) + " " + shape + " on " + device;
}

[[noreturn]] inline void reject_tensor(const std::string& op, Role role, std::size_t i, const std::string& is,
                                       const std::string& expected) {
  throw py::value_error(op + ": " + std::string(kLists[role]) + "[" + std::to_string(i) + "] is " + is + "; expected " +
                        expected);
}

namespace detail {

inline bool kernel_takes(const std::optional<DType>& param, const std::optional<DType>& state) {
  if (!is_floating(param) || !state) return false;
  if (*state == *param) return true;
  if (*param == DType::f64) return false;
  if (*param == DType::f32) return *state == DType::bf16 || *state == DType::u8;
  return *state == DType::f32 || *state == DType::u8;
}

// Every byte may be written through one tensor only.
inline void reject_overlap(const std::string& op, const MomentArguments& arguments) {
  const std::vector<MomentTensor>& tensors = arguments.tensors;
  std::vector<std::pair<const char*, const char*>> ranges;
  ranges.reserve(6 * tensors.size());
  for (const float* step : arguments.steps) {
    ranges.emplace_back(reinterpret_cast<const char*>(step), reinterpret_cast<const char*>(step + 1));
  }
  for (const MomentTensor& t : tensors) {
    const auto writes = [&](const void* data, DType dtype) {
      const char* begin = static_cast<const char*>(data);
      if (data != nullptr && t.numel > 0) ranges.emplace_back(begin, begin + t.numel * element_size(dtype));
    };
    writes(t.param, t.param_dtype);
    for (const void* state : {t.exp_avg, t.exp_avg_sq, t.max_exp_avg_sq}) writes(state, t.state_dtype);
    if (t.remainder != nullptr) writes(t.remainder, DType::i16);
    if (t.scales != nullptr) {
      const char* scales = reinterpret_cast<const char*>(t.scales);
      ranges.emplace_back(scales, scales + 2 * quant_blocks(t.numel) * element_size(DType::f32));
    }
    if (t.zero_grad) writes(t.grad, t.param_dtype);
  }
  std::sort(ranges.begin(), ranges.end());
  for (std::size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) {
      throw py::value_error(
          op +
          ": params and optimizer state overlap in memory; expected every tensor to have memory of its own "
          "(is a parameter, or a view of it, given twice?)");
    }
  }
}

// The memory that a tensor's step writes, as a number; those of several tensors may be added in any order.
inline std::uint64_t hash(const MomentTensor& t) {
  std::uint64_t h = static_cast<std::uint64_t>(t.numel) << 8 | static_cast<std::uint64_t>(t.param_dtype) << 4 |
                    static_cast<std::uint64_t>(t.state_dtype);
  const auto mix = [&h](const void* data) {
    h = (h ^ (h >> 32) ^ reinterpret_cast<std::uintptr_t>(data)) * 0x9e3779b97f4a7c15u;
  };
  for (const void* data : {t.param, t.exp_avg, t.exp_avg_sq, t.max_exp_avg_sq}) mix(data);
  if (t.remainder != nullptr) mix(t.remainder);
  if (t.scales != nullptr) mix(t.scales);
  if (t.zero_grad) mix(t.grad);
  return (h ^ (h >> 32)) * 0xd6e8feb86659fd93u;
}

// As reject_overlap, once: from step to step the memory stays the same, and to sort it costs more than
// half of a step over small tensors.
inline void reject_new_overlap(const std::string& op, const MomentArguments& arguments, std::uint64_t hashes) {
  constexpr std::size_t kRemembered = 64;  // optimizers that take turns
  static std::array<std::uint64_t, kRemembered> passed = {};
  const std::uint64_t key = hashes | 1;  // never 0, which marks an empty slot
  std::uint64_t& slot = passed[(key >> 1) % kRemembered];
  if (slot == key) return;
  reject_overlap(op, arguments);
  slot = key;
}

}  // namespace detail

// Reads and checks the arguments of every parameter, or throws.
class MomentReader {
 public:
  // `objects` of gradients that are missing are added, and `held`.
  MomentReader(std::string op, const TensorReader& reader, TensorView::Device device,
               std::vector<MomentObjects>& objects, std::vector<py::object>& held)
      : op_(std::move(op)), reader_(reader), device_(device), objects_(objects), held_(held) {}

  // Nothing for parameters on another device, where those are allowed. `plan`, which may be null, is that of the steps
  // before over the same parameters.
  std::optional<MomentArguments> read(MomentPlan* plan, bool may_span_devices, int threads) {
    MomentArguments result;
    std::uint64_t hashes = 0;
    if (!objects_.empty()) device_index_ = careful_view(kParam, 0).device_index;
    if (!read_usual(plan, result, hashes, threads)) {
      result = {};
      hashes = 0;
      for (std::size_t i = 0; i < objects_.size(); ++i) {
        add_grad(i);
        const Views views = careful_views(i);
        if (!is_here(views[kParam]) && may_span_devices) return std::nullopt;
        MomentTensor tensor;
        if (takes(views, *objects_[i].options, tensor)) {
          hashes += detail::hash(tensor);
          result.tensors.push_back(tensor);
          result.steps.push_back(static_cast<float*>(views[kStep].data));
          result.options.push_back(objects_[i].options);
        } else {
          reject_wrong(i, views);
          result.rest.push_back(i);
        }
      }
    }
    detail::reject_new_overlap(op_, result, hashes);
    result.device_index = device_index_;
    return result;
  }

 private:
  using Views = std::array<TensorView, kRoles>;

  // The usual case, in which a kernel takes every parameter; by several threads, as torch's records of
  // tensors are mostly cold in the caches, and to wait for them takes longer than to step small tensors.
  bool read_usual(MomentPlan* plan, MomentArguments& result, std::uint64_t& hashes, int threads) {
    constexpr std::int64_t kGrain = 16, kAhead = 3;
    const std::int64_t n = static_cast<std::int64_t>(objects_.size());
    if (plan != nullptr) plan->begin(objects_.size(), device_, device_index_);
    result.tensors.resize(n);
    result.steps.resize(n);
    result.options.resize(n);
    std::vector<char> is_new(n);  // to the plan, or to be read with the lock
    std::atomic<std::uint64_t> sum{0};
    parallel_for(n, kGrain, threads, [&](Ranges& ranges) {
      std::int64_t begin, end;
      std::uint64_t local = 0;
      while (ranges.next(begin, end)) {
        for (std::int64_t i = begin; i < end; ++i) {
          if (i + kAhead < n) objects_[i + kAhead].prefetch_storages(reader_);
          result.options[i] = objects_[i].options;
          if (plan != nullptr ? plan->recall(reader_, i, objects_[i], result.tensors[i], result.steps[i])
                              : read_fast(i, result)) {
            local += detail::hash(result.tensors[i]);
          } else {
            is_new[i] = true;
          }
        }
      }
      sum += local;
    });
    hashes = sum;
    for (std::int64_t i = 0; i < n; ++i) {
      if (!is_new[i]) continue;
      add_grad(i);
      if (!read_fast(i, result)) return false;
      hashes += detail::hash(result.tensors[i]);
      if (plan != nullptr) plan->learn(reader_, i, objects_[i], result.tensors[i]);
    }
    return true;
  }

  void add_grad(std::size_t i) {
    if (objects_[i][kGrad] != nullptr) return;
    held_.push_back(reader_.grad(objects_[i][kParam]));
    objects_[i][kGrad] = held_.back().ptr();
  }

  // False where a kernel does not take the i-th parameter, or only attributes tell.
  bool read_fast(std::int64_t i, MomentArguments& result) const {
    Views views;
    for (std::size_t role = 0; role < kRoles; ++role) {
      PyObject* object = objects_[i][role];
      if (object != nullptr && !reader_.read_fast(object, views[role])) return false;
    }
    result.steps[i] = static_cast<float*>(views[kStep].data);
    return takes(views, *objects_[i].options, result.tensors[i]);
  }

  // Whether a kernel takes this parameter; then `tensor` is what it takes.
  bool takes(const Views& views, const MomentOptions& options, MomentTensor& tensor) const {
    const TensorView &param = views[kParam], &exp_avg = views[kExpAvg], &step = views[kStep];
    if (!is_here(param) || !detail::kernel_takes(param.dtype, exp_avg.dtype) || !is_dense(param)) return false;
    if (param.is_negated || !is_count(step)) return false;
    if (!scales_fit(views) || (is_quantized(views) && is_present(views, kMaxExpAvgSq))) return false;
    for (const Role role : {kGrad, kExpAvg, kExpAvgSq, kMaxExpAvgSq, kAnchor, kRemainder}) {
      if (is_optional(role) && !is_present(views, role)) continue;
      const TensorView& view = views[role];
      if (view.is_negated || !fits(view, param) || !same_order(view, param) || !has_dtype(role, views)) return false;
    }
    tensor = {param.data,
              views[kGrad].data,
              exp_avg.data,
              views[kExpAvgSq].data,
              views[kMaxExpAvgSq].data,
              views[kAnchor].data,
              views[kRemainder].data,
              static_cast<float*>(views[kScales].data),
              param.numel,
              *param.dtype,
              *exp_avg.dtype,
              master(views, options),
              options.zero_grads,
              0};
    return true;
  }

  // On the device of all parameters.
  bool is_here(const TensorView& view) const { return view.device == device_ && view.device_index == device_index_; }
  bool is_count(const TensorView& step) const {
    return step.numel == 1 && step.dtype == DType::f32 && !step.is_negated && is_here(step);
  }

  static bool is_present(const Views& views, Role role) { return views[role].device != TensorView::Device::other; }
  static bool is_quantized(const Views& views) { return views[kExpAvg].dtype == DType::u8; }

  static Master master(const Views& views, const MomentOptions& options) {
    if (!is_present(views, kRemainder)) {
      return options.stochastic_rounding && views[kParam].dtype == DType::bf16 ? Master::stochastic : Master::none;
    }
    return views[kRemainder].dtype == DType::i16 ? Master::split : Master::kahan;
  }

  // 8-bit moments have scales, and no others.
  static bool scales_fit(const Views& views) {
    const TensorView& scales = views[kScales];
    if (!is_present(views, kScales) || !is_quantized(views)) return is_present(views, kScales) == is_quantized(views);
    return scales.dtype == DType::f32 && scales.device == views[kParam].device &&
           scales.device_index == views[kParam].device_index && scales.ndim == 2 && scales.shape[0] == 2 &&
           scales.shape[1] == quant_blocks(views[kParam].numel) && is_contiguous(scales);
  }

  // That the tensor of a role is of the dtype which belongs to its parameter's, or its moments'.
  static bool has_dtype(Role role, const Views& views) {
    if (role == kRemainder) {
      const auto param = views[kParam].dtype, remainder = views[kRemainder].dtype;
      if (param == DType::bf16 && remainder == DType::i16) return true;
      return (param == DType::bf16 || param == DType::f16) && remainder == param;
    }
    const Role like = role == kGrad || role == kAnchor ? kParam : kExpAvg;
    return views[role].dtype == views[like].dtype;
  }

  static bool fits(const TensorView& view, const TensorView& like) {
    return view.device == like.device && view.device_index == like.device_index && same_shape(view, like);
  }

  Views careful_views(std::size_t i) const {
    Views views;
    for (std::size_t role = 0; role < kRoles; ++role) {
      if (objects_[i][role] != nullptr) views[role] = careful_view(static_cast<Role>(role), i);
    }
    return views;
  }

  TensorView careful_view(Role role, std::size_t i) const {
    PyObject* object = objects_[i][role];
    std::optional<TensorView> view;
    try {
      view = reader_.read(object);
    } catch (const py::error_already_set&) {  // sparse layouts, and devices without memory of their own
      const std::string device = py::str(py::handle(object).attr("device").attr("type"));
      if (device != "cpu" && device != "cuda") view.emplace();
    }
    if (view && (view->data != nullptr || view->numel == 0 || view->device == TensorView::Device::other)) {
      return std::move(*view);
    }
    const std::string layout = py::str(py::handle(object).attr("layout"));
    reject_tensor(op_, role, i,
                  "a " + std::string(Py_TYPE(object)->tp_name) + " of layout " + layout + ", " + describe(object),
                  "a tensor with memory of its own (strided)");
  }

  // Throws unless it is only its dtype or strides for which no kernel takes this parameter.
  void reject_wrong(std::size_t i, const Views& views) const {
    const auto reject = [&](Role role, const std::string& expected) {
      reject_tensor(op_, role, i, describe(objects_[i][role]), expected);
    };
    const TensorView &param = views[kParam], &exp_avg = views[kExpAvg], &step = views[kStep];
    const std::string here = device_ == TensorView::Device::cpu ? "cpu" : "cuda:" + std::to_string(device_index_);
    if (!is_here(param)) reject(kParam, "a tensor on " + here + (i == 0 ? "" : ", as params[0]"));
    if (!is_floating(param.dtype) && !py::handle(objects_[i][kParam]).attr("is_complex")().cast<bool>()) {
      reject(kParam, "a float32, bfloat16, float16, float64 or complex tensor");
    }
    const bool state_dtype_fits = param.dtype.has_value() == exp_avg.dtype.has_value() &&
                                  (!param.dtype || detail::kernel_takes(param.dtype, exp_avg.dtype));
    if (!fits(exp_avg, param) || !state_dtype_fits) reject(kExpAvg, describe(objects_[i][kParam]));
    for (const Role role : {kGrad, kExpAvgSq, kMaxExpAvgSq, kAnchor, kRemainder}) {
      if (objects_[i][role] == nullptr || (fits(views[role], param) && has_dtype(role, views))) continue;
      if (role == kRemainder) {
        const std::string like = describe(objects_[i][kParam]);
        reject(role, "int16" + like.substr(like.find(' ')) +
                         " beside a bfloat16 parameter, or the dtype of a bfloat16 or float16 one");
      }
      reject(role, describe(objects_[i][role == kGrad || role == kAnchor ? kParam : kExpAvg]));
    }
    if (!scales_fit(views)) {
      const std::string blocks = std::to_string(quant_blocks(param.numel));
      const std::string expected = is_quantized(views) ? "a contiguous float32 (2, " + blocks +
                                                             ") on the device of the "
                                                             "parameter, for uint8 moments"
                                                       : "none beside moments that are not uint8";
      if (objects_[i][kScales] != nullptr) reject(kScales, expected);
      reject_tensor(op_, kScales, i, "missing", expected);
    }
    if (is_quantized(views) && objects_[i][kMaxExpAvgSq] != nullptr) {
      reject(kMaxExpAvgSq, "none beside uint8 moments, which AMSGrad does not have");
    }
    if (!is_count(step)) reject(kStep, "float32 () on " + here);
  }

  std::string op_;
  const TensorReader& reader_;
  TensorView::Device device_;
  int device_index_ = 0;
  std::vector<MomentObjects>& objects_;
  std::vector<py::object>& held_;
};

// Arguments from parallel lists, one for each role, in that order; optional ones are empty. They refer to `options`.
inline MomentArguments read_moment_lists(const std::string& op, const TensorReader& reader, TensorView::Device device,
                                         const std::vector<py::list>& lists, const MomentOptions& options,
                                         int threads) {
  const std::size_t n = lists.at(kParam).size();
  std::vector<MomentObjects> objects(n);
  for (std::size_t role = 0; role < kRoles; ++role) {
    const py::list& list = lists.at(role);
    if (is_optional(role) && list.empty()) continue;
    if (list.size() != n) {
      throw py::value_error(op + ": " + std::string(kLists[role]) + " has " + std::to_string(list.size()) +
                            " tensors; expected " + std::to_string(n) + ", one for each of params");
    }
    for (std::size_t i = 0; i < n; ++i) objects[i][role] = PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i));
  }
  for (MomentObjects& each : objects) {
    each.options = &options;
    each.locate(reader);
  }
  std::vector<py::object> held;
  return *MomentReader(op, reader, device, objects, held).read(nullptr, false, threads);
}

// Counts one step more for every tensor; what a kernel takes is the tensor with the scalars of its step, which
// scalars_of(group, step) makes.
template <class Tensor, class ScalarsOf>
std::vector<Tensor> advance(MomentArguments& arguments, const ScalarsOf& scalars_of) {
  std::vector<Tensor> tensors;
  tensors.reserve(arguments.tensors.size());
  float last = -1;
  const MomentOptions* last_options = nullptr;
  for (std::size_t i = 0; i < arguments.tensors.size(); ++i) {
    const float step = *arguments.steps[i] += 1;
    const MomentOptions* const options = arguments.options[i];
    const bool as_before = step == last && options == last_options;
    Tensor tensor{};
    static_cast<MomentTensor&>(tensor) = arguments.tensors[i];
    tensor.scalars = as_before ? tensors.back().scalars : scalars_of(options->group, step);
    tensor.random_key = as_before ? tensors.back().random_key : random_key(options->seed, step);
    tensors.push_back(tensor);
    last = step;
    last_options = options;
  }
  return tensors;
}

}  // namespace superfine
