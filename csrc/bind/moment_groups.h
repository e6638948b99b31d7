// The arguments of a step, read from an optimizer's parameter groups and state. For some hundred small tensors,
// collecting lists in Python would cost more than the step.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bind/moment_lists.h"
#include "bind/tensor_list.h"

namespace superfine {

// A walk through an optimizer's state in the order of its parameters, which is the order in which the
// state was made: one of the next entries is nearly always the one looked for, and no hash is computed.
class StateWalk {
 public:
  explicit StateWalk(PyObject* state) : state_(state) {}

  PyObject* find(PyObject* param) {  // borrowed; null if there is none
    constexpr int kAhead = 8;        // parameters in a row that are left out
    PyObject *key = nullptr, *value = nullptr;
    Py_ssize_t position = position_;
    for (int i = 0; i < kAhead && PyDict_Next(state_, &position, &key, &value) != 0; ++i) {
      if (key == param) {
        position_ = position;
        __builtin_prefetch(value);
        return value;
      }
    }
    value = PyDict_GetItemWithError(state_, param);
    if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

 private:
  PyObject* state_;
  Py_ssize_t position_ = 0;
};

// Sets `values[role]` to the entry called `names[role]`, where there is one. The few entries are walked
// through: their names are the very objects in `names`, unless a checkpoint brought names of its own.
inline void look_up(PyObject* entries, PyObject* const names[kRoles], MomentObjects& values) {
  PyObject *key = nullptr, *value = nullptr;
  Py_ssize_t position = 0;
  std::size_t unknown = 0;
  while (PyDict_Next(entries, &position, &key, &value) != 0) {
    std::size_t role = kExpAvg;
    while (role < kRoles && key != names[role]) ++role;
    if (role < kRoles) {
      values[role] = value;
      TensorReader::prefetch_object(value);
    } else {
      ++unknown;
    }
  }
  if (unknown == 0) return;
  for (std::size_t role = kExpAvg; role < kRoles; ++role) {
    if (values[role] == nullptr) values[role] = PyDict_GetItemWithError(entries, names[role]);
    if (values[role] == nullptr && PyErr_Occurred()) throw py::error_already_set();
  }
}

// The parameters of all groups that have a gradient, in order.
class MomentGroups {
 public:
  // `groups` are pairs of a list of parameters and a dict of hyperparameters. Raises KeyError for a parameter without
  // state.
  MomentGroups(const TensorReader& reader, const py::list& groups, const py::dict& state) : reader_(reader) {
    options_.reserve(groups.size());  // objects refer to them
    StateWalk walk(state.ptr());
    for (const py::handle group : groups) {
      const auto [params, hyper] = group.cast<std::pair<py::list, py::dict>>();
      options_.push_back(MomentOptions::of(options_.size(), hyper));
      gather(params, walk, options_.back());
      if (!plain_) return;
    }
  }

  // Nothing for tensor subclasses, whose ops have to go through torch's dispatcher, and for groups that span devices.
  std::optional<MomentArguments> read(const std::string& op, TensorView::Device device, MomentPlan& plan,
                                      int threads) const {
    if (!plain_) return std::nullopt;
    return MomentReader(op, reader_, device, objects_).read(&plan, true, threads);
  }

  const py::list& params() const { return used_; }
  std::size_t group(std::size_t position) const { return objects_[position].options->group; }

  // The gradients that are zeroed.
  py::list zeroed() const {
    py::list zeroed;
    for (std::size_t i = 0; i < grads_.size(); ++i) {
      if (objects_[i].options->zero_grads) zeroed.append(grads_[i]);
    }
    return zeroed;
  }

 private:
  void gather(const py::list& params, StateWalk& walk, const MomentOptions& options) {
    static PyObject* const names[kRoles] = {nullptr,
                                            nullptr,
                                            PyUnicode_InternFromString("exp_avg"),
                                            PyUnicode_InternFromString("exp_avg_sq"),
                                            PyUnicode_InternFromString("max_exp_avg_sq"),
                                            PyUnicode_InternFromString("anchor"),
                                            PyUnicode_InternFromString("remainder"),
                                            PyUnicode_InternFromString("scales"),
                                            PyUnicode_InternFromString("step")};
    const std::size_t n = params.size();
    for (std::size_t i = 0; i < n; ++i) {
      const auto item = [&](std::size_t at) { return PyList_GET_ITEM(params.ptr(), static_cast<Py_ssize_t>(at)); };
      constexpr std::size_t kObject = 16, kRecord = 12, kAutograd = 8, kGradient = 4;  // so far ahead
      if (i + kObject < n) reader_.prefetch_object(item(i + kObject));
      if (i + kRecord < n) reader_.prefetch_record(item(i + kRecord));
      if (i + kAutograd < n) reader_.prefetch_autograd(item(i + kAutograd));
      if (i + kGradient < n) reader_.prefetch_grad(item(i + kGradient));
      PyObject* param = item(i);
      plain_ = plain_ && reader_.is_plain(param);
      if (!plain_) return;
      py::object grad = reader_.grad(param);
      if (grad.is_none()) continue;
      PyObject* entries = walk.find(param);
      if (entries == nullptr) {
        PyErr_SetObject(PyExc_KeyError, param);
        throw py::error_already_set();
      }
      MomentObjects values{{param, grad.ptr()}, &options};
      look_up(entries, names, values);
      if (!options.amsgrad) values[kMaxExpAvgSq] = nullptr;
      if (!options.anchored) values[kAnchor] = nullptr;
      for (const auto& [role, wanted] :
           {std::pair{kExpAvg, true}, std::pair{kExpAvgSq, true}, std::pair{kStep, true},
            std::pair{kMaxExpAvgSq, options.amsgrad}, std::pair{kAnchor, options.anchored}}) {
        if (wanted && values[role] == nullptr) {
          PyErr_SetObject(PyExc_KeyError, names[role]);
          throw py::error_already_set();
        }
      }
      objects_.push_back(values);
      constexpr std::size_t kBehind = 3;  // by now the Python objects have arrived
      if (objects_.size() >= kBehind) prefetch_records(reader_, objects_[objects_.size() - kBehind]);
      grads_.push_back(std::move(grad));
      used_.append(params[i]);
    }
  }

  const TensorReader& reader_;
  bool plain_ = true;
  std::vector<MomentOptions> options_;
  std::vector<MomentObjects> objects_;
  std::vector<py::object> grads_;  // held: another thread may set .grad to None while the kernel runs
  py::list used_;
};

}  // namespace superfine
