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
  explicit StateWalk(PyObject* state) : state_(state) {
    for (int i = 0; i < kAhead; ++i) prefetch_next();
  }

  PyObject* find(PyObject* param) {  // borrowed; null if there is none
    prefetch_next();
    PyObject *key = nullptr, *value = nullptr;
    Py_ssize_t position = position_;
    for (int i = 0; i < kAhead && PyDict_Next(state_, &position, &key, &value) != 0; ++i) {
      if (key == param) {
        position_ = position;
        return value;
      }
    }
    value = PyDict_GetItemWithError(state_, param);
    if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

 private:
  static constexpr int kAhead = 8;  // parameters in a row that are left out, or whose dicts are asked for early

  // Asks for the dict that comes kAhead later, and for the keys of the one half as far, which has arrived.
  void prefetch_next() {
    PyObject *key = nullptr, *value = nullptr;
    if (PyDict_Next(state_, &ahead_, &key, &value) == 0) value = nullptr;
    PyObject*& slot = coming_[count_++ % kAhead];
    slot = value;
    if (value != nullptr) {
      __builtin_prefetch(value);
      __builtin_prefetch(&reinterpret_cast<PyDictObject*>(value)->ma_keys);
    }
    PyObject* const near = coming_[(count_ + kAhead / 2) % kAhead];
    if (near == nullptr || !PyDict_CheckExact(near)) return;
    constexpr int kLine = 64, kLines = 3;  // of a dict of a few entries
    const char* const keys = reinterpret_cast<const char*>(reinterpret_cast<PyDictObject*>(near)->ma_keys);
    for (int line = 0; line < kLines; ++line) __builtin_prefetch(keys + line * kLine);
  }

  PyObject* state_;
  Py_ssize_t position_ = 0, ahead_ = 0;
  unsigned count_ = 0;
  PyObject* coming_[kAhead] = {};
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
    locate(objects_.size());
  }

  // Nothing for tensor subclasses, whose ops have to go through torch's dispatcher, and for groups that span devices.
  std::optional<MomentArguments> read(const std::string& op, TensorView::Device device, MomentPlan& plan, int threads) {
    if (!plain_) return std::nullopt;
    return MomentReader(op, reader_, device, objects_, held_).read(&plan, true, threads);
  }

  std::size_t size() const { return objects_.size(); }
  std::size_t group(std::size_t position) const { return objects_[position].options->group; }

  // Pairs of a group and a parameter.
  std::vector<std::pair<std::size_t, py::object>> at(const std::vector<std::size_t>& positions) const {
    std::vector<std::pair<std::size_t, py::object>> found;
    for (const std::size_t i : positions) {
      found.emplace_back(group(i), py::reinterpret_borrow<py::object>(objects_[i][kParam]));
    }
    return found;
  }

  // Tells autograd that the parameters are written, and the gradients that are zeroed.
  void increment_versions() const {
    py::list others;
    for (const MomentObjects& each : objects_) {
      if (!reader_.bump_version(each.records[kParam])) others.append(py::handle(each[kParam]));
      if (each.options->zero_grads && !reader_.bump_version(each.records[kGrad])) {
        others.append(reader_.grad(each[kParam]));
      }
    }
    reader_.increment_other_versions(others);
  }

  // Keeps the gradients that were read where another thread, given the interpreter's lock, may set `.grad` to None.
  void hold_grads() {
    shared_.reserve(objects_.size());
    for (const MomentObjects& each : objects_) {
      if (each[kGrad] == nullptr) shared_.push_back(reader_.share_grad(each.records[kParam]));
    }
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
      if (i + kRecord < n) reader_.prefetch_record(reader_.record(item(i + kRecord)));
      if (i + kAutograd < n) reader_.prefetch_autograd(reader_.record(item(i + kAutograd)));
      if (i + kGradient < n) reader_.prefetch_grad(reader_.record(item(i + kGradient)));
      PyObject* param = item(i);
      plain_ = plain_ && reader_.is_plain(param);
      if (!plain_) return;
      MomentObjects values{{param}, &options, {}};
      if (const TorchRecord::Record record = reader_.record(param)) {
        values.records[kGrad] = reader_.grad(record);
        if (values.records[kGrad] == nullptr) continue;
      } else {
        py::object grad = reader_.grad(param);
        if (grad.is_none()) continue;
        values[kGrad] = grad.ptr();
        held_.push_back(std::move(grad));
      }
      PyObject* entries = walk.find(param);
      if (entries == nullptr) {
        PyErr_SetObject(PyExc_KeyError, param);
        throw py::error_already_set();
      }
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
      if (objects_.size() > kBehind) locate(objects_.size() - kBehind);
    }
  }

  void locate(std::size_t end) {
    for (; located_ < end; ++located_) objects_[located_].locate(reader_);
  }

  const TensorReader& reader_;
  bool plain_ = true;
  std::vector<MomentOptions> options_;
  std::vector<MomentObjects> objects_;
  std::size_t located_ = 0;
  std::vector<py::object> held_;  // gradients
  std::vector<TorchShim::Shared> shared_;
};

}  // namespace superfine
