// The argument lists of `adamw_`, read and checked once for every backend. Nothing is written before
// all checks have passed.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bind/tensor_list.h"
#include "math/adamw.h"

namespace superfine {

struct AdamWArguments {
  std::vector<AdamWTensor> tensors;
  std::vector<float*> steps;      // one per tensor: the count of steps taken, in host memory
  std::vector<std::size_t> rest;  // positions that no kernel takes: other dtypes, strides that differ
  std::vector<py::object> grads;  // held: another thread may set .grad to None while the kernel runs
};

// One parameter and what belongs to it, borrowed.
struct AdamWObjects {
  PyObject* param;
  PyObject* grad;
  PyObject* exp_avg;
  PyObject* exp_avg_sq;
  PyObject* max_exp_avg_sq;  // null without amsgrad
  PyObject* step;
};

inline std::string describe(py::handle tensor) {
  const std::string dtype = py::str(tensor.attr("dtype"));
  const std::string shape = py::str(py::tuple(py::list(tensor.attr("shape"))));
  const std::string device = py::str(tensor.attr("device"));
  return dtype.substr(dtype.find('.') + 1) + " " + shape + " on " + device;
}

[[noreturn]] inline void reject_adamw(const char* list, std::size_t i, const std::string& is,
                                      const std::string& expected) {
  throw py::value_error("adamw_: " + std::string(list) + "[" + std::to_string(i) + "] is " + is + "; expected " +
                        expected);
}

namespace detail {

inline bool kernel_takes(DType param, DType state) {
  return state == param || (state == DType::f32 && (param == DType::bf16 || param == DType::f16));
}

using Ranges = std::vector<std::pair<const char*, const char*>>;

// The ranges that passed last time, as a hash: sorting them costs more than half of a step over small
// tensors, and from step to step they stay the same.
inline std::uint64_t hash(const Ranges& ranges) {
  std::uint64_t h = ranges.size();
  for (const auto& [begin, end] : ranges) {
    h = (h ^ reinterpret_cast<std::uintptr_t>(begin)) * 0x9e3779b97f4a7c15u;
    h = (h ^ (h >> 32) ^ reinterpret_cast<std::uintptr_t>(end)) * 0xd6e8feb86659fd93u;
  }
  return (h ^ (h >> 32)) | 1;  // never 0, which marks an empty slot
}

// Every byte may be written through one tensor only.
inline void reject_overlap(Ranges& ranges) {
  constexpr std::size_t kRemembered = 64;  // parameter groups that take turns
  static std::array<std::uint64_t, kRemembered> passed = {};
  const std::uint64_t key = hash(ranges);
  std::uint64_t& slot = passed[(key >> 1) % kRemembered];
  if (slot == key) return;
  std::sort(ranges.begin(), ranges.end());
  for (std::size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) {
      throw py::value_error(
          "adamw_: params and optimizer state overlap in memory; expected every tensor to have memory of its own "
          "(is a parameter, or a view of it, given twice?)");
    }
  }
  slot = key;
}

}  // namespace detail

// Collects checked arguments one parameter at a time. Shapes and devices must agree, and steps be
// float32 scalars on the CPU, or it throws.
class AdamWReader {
 public:
  AdamWReader(const TensorReader& reader, TensorView::Device device, std::size_t expected, bool may_span_devices)
      : reader_(reader), device_(device), may_span_devices_(may_span_devices) {
    result_.tensors.reserve(expected);
    result_.steps.reserve(expected);
    written_.reserve(4 * expected);
  }

  // False for a parameter on another device, where that is not an error.
  bool add(const AdamWObjects& objects) {
    const std::size_t i = position_++;
    const TensorView param = read(objects.param, "params", i);
    if (param.device != device_) {
      if (may_span_devices_) return false;
      reject_adamw("params", i, describe(objects.param),
                   device_ == TensorView::Device::cpu ? "a tensor on cpu" : "a tensor on cuda");
    }
    if (!param.dtype && !py::handle(objects.param).attr("is_complex")().cast<bool>()) {
      reject_adamw("params", i, describe(objects.param), "a float32, bfloat16, float16, float64 or complex tensor");
    }
    const TensorView grad = read_like(objects.grad, "grads", i, param, objects.param);
    const TensorView exp_avg = read_like(objects.exp_avg, "exp_avgs", i, param, objects.param, false);
    if (param.dtype.has_value() != exp_avg.dtype.has_value() ||
        (param.dtype && !detail::kernel_takes(*param.dtype, *exp_avg.dtype))) {
      reject_adamw("exp_avgs", i, describe(objects.exp_avg), describe(objects.param));
    }
    const TensorView exp_avg_sq = read_like(objects.exp_avg_sq, "exp_avg_sqs", i, exp_avg, objects.exp_avg);
    const bool amsgrad = objects.max_exp_avg_sq != nullptr;
    TensorView max_exp_avg_sq;
    if (amsgrad) max_exp_avg_sq = read_like(objects.max_exp_avg_sq, "max_exp_avg_sqs", i, exp_avg, objects.exp_avg);
    const TensorView step = read(objects.step, "steps", i);
    if (step.numel != 1 || step.dtype != DType::f32 || step.device != TensorView::Device::cpu) {
      reject_adamw("steps", i, describe(objects.step), "float32 () on cpu");
    }
    const bool takes = param.dtype && is_dense(param) && same_order(grad, param) && same_order(exp_avg, param) &&
                       same_order(exp_avg_sq, param) && (!amsgrad || same_order(max_exp_avg_sq, param));
    if (!takes) {
      result_.rest.push_back(i);
      return true;
    }
    const std::int64_t state_bytes = param.numel * element_size(*exp_avg.dtype);
    writes(param.data, param.numel * element_size(*param.dtype));
    writes(exp_avg.data, state_bytes);
    writes(exp_avg_sq.data, state_bytes);
    if (amsgrad) writes(max_exp_avg_sq.data, state_bytes);
    result_.tensors.push_back({param.data,
                               grad.data,
                               exp_avg.data,
                               exp_avg_sq.data,
                               max_exp_avg_sq.data,
                               param.numel,
                               *param.dtype,
                               *exp_avg.dtype,
                               {}});
    result_.steps.push_back(static_cast<float*>(step.data));
    return true;
  }

  AdamWArguments finish() {
    detail::reject_overlap(written_);
    return std::move(result_);
  }

 private:
  TensorView read(PyObject* object, const char* list, std::size_t i) const {
    std::optional<TensorView> view;
    try {
      view = reader_.read(object);
    } catch (const py::error_already_set&) {  // sparse layouts, and devices that DLPack does not know
      const std::string device = py::str(py::handle(object).attr("device").attr("type"));
      if (device != "cpu" && device != "cuda") view.emplace();
    }
    if (view && (view->data != nullptr || view->numel == 0 || view->device == TensorView::Device::other)) {
      return std::move(*view);
    }
    const std::string layout = py::str(py::handle(object).attr("layout"));
    reject_adamw(list, i,
                 "a " + std::string(Py_TYPE(object)->tp_name) + " of layout " + layout + ", " + describe(object),
                 "a tensor with memory of its own (strided)");
  }

  // A tensor of the shape, device and (unless told otherwise) dtype of `like`.
  TensorView read_like(PyObject* object, const char* list, std::size_t i, const TensorView& like, PyObject* like_object,
                       bool same_dtype = true) {
    TensorView view = read(object, list, i);
    if (view.device != like.device || view.device_index != like.device_index || !same_shape(view, like) ||
        (same_dtype && view.dtype != like.dtype)) {
      reject_adamw(list, i, describe(object), describe(like_object));
    }
    return view;
  }

  void writes(const void* data, std::int64_t bytes) {
    if (bytes > 0) written_.emplace_back(static_cast<const char*>(data), static_cast<const char*>(data) + bytes);
  }

  const TensorReader& reader_;
  TensorView::Device device_;
  bool may_span_devices_;
  std::size_t position_ = 0;
  AdamWArguments result_;
  detail::Ranges written_;
};

// Nothing is returned where parameters may span devices, and do.
inline std::optional<AdamWArguments> read_adamw_objects(const TensorReader& reader, TensorView::Device device,
                                                        const std::vector<AdamWObjects>& objects,
                                                        bool may_span_devices) {
  AdamWReader arguments(reader, device, objects.size(), may_span_devices);
  for (std::size_t i = 0; i < objects.size(); ++i) {
    constexpr std::size_t kAhead = 6;
    if (i + kAhead < objects.size()) {
      const AdamWObjects& next = objects[i + kAhead];
      for (PyObject* object : {next.param, next.grad, next.exp_avg, next.exp_avg_sq, next.step}) {
        TensorReader::prefetch_record(object);
      }
    }
    if (!arguments.add(objects[i])) return std::nullopt;
  }
  return arguments.finish();
}

// Arguments from parallel lists; `max_exp_avg_sqs` is empty without amsgrad.
inline AdamWArguments read_adamw_lists(const TensorReader& reader, TensorView::Device device, const py::list& params,
                                       const py::list& grads, const py::list& exp_avgs, const py::list& exp_avg_sqs,
                                       const py::list& max_exp_avg_sqs, const py::list& steps) {
  const std::size_t n = params.size();
  const bool amsgrad = !max_exp_avg_sqs.empty();
  const std::pair<const char*, const py::list*> lists[] = {{"grads", &grads},
                                                           {"exp_avgs", &exp_avgs},
                                                           {"exp_avg_sqs", &exp_avg_sqs},
                                                           {"max_exp_avg_sqs", amsgrad ? &max_exp_avg_sqs : &params},
                                                           {"steps", &steps}};
  for (const auto& [name, list] : lists) {
    if (list->size() != n) {
      throw py::value_error("adamw_: " + std::string(name) + " has " + std::to_string(list->size()) +
                            " tensors; expected " + std::to_string(n) + ", one for each of params");
    }
  }
  std::vector<AdamWObjects> objects;
  objects.reserve(n);
  for (std::size_t i = 0; i < n; ++i) {
    const auto at = [i](const py::list& list) { return PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i)); };
    objects.push_back(
        {at(params), at(grads), at(exp_avgs), at(exp_avg_sqs), amsgrad ? at(max_exp_avg_sqs) : nullptr, at(steps)});
  }
  return *read_adamw_objects(reader, device, objects, false);
}

// A walk through an optimizer's state in the order of its parameters, which is the order in which the
// state was made: the next entry is nearly always the one looked for, and no hash is computed.
class StateWalk {
 public:
  explicit StateWalk(PyObject* state) : state_(state) {}

  PyObject* find(PyObject* param) {  // borrowed; null if there is none
    PyObject *key = nullptr, *value = nullptr;
    Py_ssize_t position = position_;
    if (PyDict_Next(state_, &position, &key, &value) != 0 && key == param) {
      position_ = position;
      __builtin_prefetch(value);
      return value;
    }
    position_ = position = 0;
    while (PyDict_Next(state_, &position, &key, &value) != 0) {
      if (key == param) {
        position_ = position;
        return value;
      }
    }
    return nullptr;
  }

 private:
  PyObject* state_;
  Py_ssize_t position_ = 0;
};

// Arguments from an optimizer's parameter group and state. For some hundred small tensors, collecting
// lists in Python would cost more than the step. `used` receives the parameters that have a gradient.
// Nothing is returned for tensor subclasses, whose ops have to go through torch's dispatcher, and for
// groups that span devices.
inline std::optional<AdamWArguments> read_adamw_group(const TensorReader& reader, TensorView::Device device,
                                                      const py::list& params, const py::dict& state, bool amsgrad,
                                                      py::list& used) {
  static PyObject* const grad_name = PyUnicode_InternFromString("grad");
  static PyObject* const names[] = {PyUnicode_InternFromString("exp_avg"), PyUnicode_InternFromString("exp_avg_sq"),
                                    PyUnicode_InternFromString("step"), PyUnicode_InternFromString("max_exp_avg_sq")};
  const std::size_t n = params.size();
  std::vector<AdamWObjects> objects;
  std::vector<py::object> grads;  // a gradient's Python object may exist only as long as it is held
  objects.reserve(n);
  grads.reserve(n);
  StateWalk walk(state.ptr());
  for (std::size_t i = 0; i < n; ++i) {
    constexpr std::size_t kAhead = 6;
    if (i + kAhead < n)
      TensorReader::prefetch_record(PyList_GET_ITEM(params.ptr(), static_cast<Py_ssize_t>(i + kAhead)));
    PyObject* param = PyList_GET_ITEM(params.ptr(), static_cast<Py_ssize_t>(i));
    if (!reader.is_plain(param)) return std::nullopt;
    auto grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(param, grad_name));
    if (!grad) throw py::error_already_set();
    if (grad.is_none()) continue;
    PyObject* entries = walk.find(param);
    if (entries == nullptr) {
      PyErr_SetObject(PyExc_KeyError, param);
      throw py::error_already_set();
    }
    PyObject* values[4] = {};
    for (int k = 0; k < (amsgrad ? 4 : 3); ++k) {
      values[k] = PyDict_GetItemWithError(entries, names[k]);
      if (values[k] == nullptr) {
        if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, names[k]);
        throw py::error_already_set();
      }
      TensorReader::prefetch_object(values[k]);
    }
    objects.push_back({param, grad.ptr(), values[0], values[1], values[3], values[2]});
    grads.push_back(std::move(grad));
    used.append(params[i]);
  }
  auto arguments = read_adamw_objects(reader, device, objects, true);
  if (arguments) arguments->grads = std::move(grads);
  return arguments;
}

// Counts one step more for every tensor and sets the scalars that follow from it.
inline void advance(AdamWArguments& arguments, double lr, double beta1, double beta2, double eps, double weight_decay,
                    bool maximize) {
  float last = -1;
  for (std::size_t i = 0; i < arguments.tensors.size(); ++i) {
    const float step = *arguments.steps[i] += 1;
    if (i > 0 && step == last) {
      arguments.tensors[i].scalars = arguments.tensors[i - 1].scalars;
    } else {
      arguments.tensors[i].scalars = adamw_scalars(lr, beta1, beta2, eps, weight_decay, maximize, step);
    }
    last = step;
  }
}

}  // namespace superfine
