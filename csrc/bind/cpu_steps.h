// What module _cpu does with lists of tensors: optimizers' steps and norms. Apart from the module's glue, which is
// compiled for size.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bind/moment_plan.h"
#include "bind/tensor_list.h"
#include "cpu/dispatch.h"

namespace superfine {

// The kernels of an instruction set by its name; the best ones for an empty name.
const cpu::Kernels& kernels_for(const std::string& isa);

// Steps over lists in the order of kLists; the positions that no kernel takes.
std::vector<std::size_t> adamw_lists(const TensorReader& reader, const std::vector<py::list>& lists,
                                     const py::dict& hyper, int threads, const std::string& isa);
std::vector<std::size_t> lamb_lists(const TensorReader& reader, const std::vector<py::list>& lists,
                                    const py::dict& hyper, int threads, const std::string& isa);

// What a step over groups left alone: a group's number and a parameter.
using Rest = std::optional<std::vector<std::pair<std::size_t, py::object>>>;
Rest adamw_groups(const TensorReader& reader, const py::list& groups, const py::dict& state, MomentPlan& plan,
                  int threads, const std::string& isa);
Rest lamb_groups(const TensorReader& reader, const py::list& groups, const py::dict& state, MomentPlan& plan,
                 int threads, const std::string& isa);

// Nothing where a tensor is not dense, not on the CPU or of a type without a kernel.
std::optional<double> sum_of_squares(const TensorReader& reader, const py::list& list, int threads,
                                     const std::string& isa);

}  // namespace superfine
