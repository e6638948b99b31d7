// Module superfine_kernels._cpu: pointers, sizes and scalars in, nothing of torch. The Python op files
// check shapes and dtypes; what needs a loop over many tensors is checked in moment_lists.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bind/activation_args.h"
#include "bind/cpu_steps.h"
#include "bind/cross_entropy_args.h"
#include "bind/elementwise_loss_args.h"
#include "bind/layer_norm_args.h"
#include "bind/moment_plan.h"
#include "bind/tensor_list.h"
#include "cpu/dispatch.h"
#include "cpu/memory.h"

namespace py = pybind11;
using namespace superfine;

namespace {

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const auto isa : {cpu::Isa::baseline, cpu::Isa::avx2, cpu::Isa::avx512}) {
    if (cpu::has_isa(isa)) names.emplace_back(cpu::kernels(isa).isa);
  }
  return names;
}

struct Labels {
  std::int64_t first_bad;  // its place among rows x targets, or -1
  double denominator;
};

// Only real labels have weights: with probabilities rows are counted, as torch does.
template <class Label>
Labels scan_labels(const CrossEntropy& args) {
  const auto* weights = static_cast<const char*>(args.weight);
  double denominator = 0;
  for (std::int64_t i = 0; i < args.rows; ++i) {
    const Label* target = static_cast<const Label*>(args.target) + i * args.target_stride;
    double counts = 0;
    for (std::int64_t k = 0; k < args.targets; ++k) {
      const std::int64_t label = target[k];
      if (label == args.ignore_index) continue;
      if (label < 0 || label >= args.classes) return {i * args.targets + k, denominator};
      counts = args.probabilities || !weights ? 1.0
               : args.dtype == DType::f64     ? reinterpret_cast<const double*>(weights)[label]
                                              : reinterpret_cast<const float*>(weights)[label];
    }
    denominator += counts;
  }
  return {-1, denominator};
}

std::pair<std::int64_t, double> check_labels(const CrossEntropy& args) {
  const py::gil_scoped_release release;
  if (args.target == nullptr) return {-1, static_cast<double>(args.rows)};
  const Labels labels = args.target_is_int64 ? scan_labels<std::int64_t>(args) : scan_labels<std::int32_t>(args);
  return {labels.first_bad, labels.denominator};
}

template <class T>
double sum_in_order(const T* values, std::int64_t count) {
  double sum = 0;
  for (std::int64_t i = 0; i < count; ++i) sum += values[i];
  return sum;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels. Addresses are integers from Tensor.data_ptr(); an empty `isa` means the best one.";
  m.attr("__version__") = SF_VERSION;
  m.def("isas", &isas, "The instruction sets that this build holds and this processor runs, best last.");

  py::class_<TensorReader>(m, "TensorReader", "Reads torch tensors natively; made once from the torch module.")
      .def(py::init<const py::module_&>(), py::arg("torch"))
      .def("use_attributes", &TensorReader::use_attributes, "Read through Python attributes from now on.")
      .def_property_readonly("uses_shim", &TensorReader::uses_shim)
      .def_property_readonly("compares_records", &TensorReader::compares_records);

  py::class_<MomentPlan>(m, "MomentPlan", "What a step over groups learned about its tensors, for the next one.")
      .def(py::init<>());

  static constexpr const char* kListsDoc =
      "lists: params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, anchors, remainders, scales, steps. Returns the "
      "positions that it left alone.";
  static constexpr const char* kGroupsDoc =
      "One step over an optimizer's groups, pairs of parameters and hyperparameters. Returns what it left alone: pairs "
      "of a group's number and a parameter. None, and nothing done, where a parameter is a tensor subclass or lies "
      "elsewhere.";
  const auto def_step = [&](const char* name, auto lists, const char* groups_name, auto groups) {
    m.def(name, lists, kListsDoc, py::arg("reader"), py::arg("lists"), py::arg("hyper"), py::kw_only(),
          py::arg("threads"), py::arg("isa"));
    m.def(groups_name, groups, kGroupsDoc, py::arg("reader"), py::arg("groups"), py::arg("state"), py::arg("plan"),
          py::kw_only(), py::arg("threads"), py::arg("isa"));
  };
  def_step("adamw", &adamw_lists, "adamw_groups", &adamw_groups);
  def_step("lamb", &lamb_lists, "lamb_groups", &lamb_groups);

  m.def("sum_of_squares", &sum_of_squares,
        "Of all elements of all tensors; None where one of them is not dense on the CPU, or has no kernel.",
        py::arg("reader"), py::arg("tensors"), py::kw_only(), py::arg("threads"), py::arg("isa"));

  define_activation(m);

  define_cross_entropy_arguments(m);
  m.def("check_labels", &check_labels,
        "(place among rows x targets of the first label outside [0, classes) or -1, what a mean divides by).",
        py::arg("args"));

  m.def(
      "cross_entropy_forward",
      [](const CrossEntropy& args, std::uintptr_t out, bool statistics, std::uintptr_t dlogits, double scale,
         int threads, const std::string& isa) {
        const cpu::Kernels& kernels = kernels_for(isa);
        const py::gil_scoped_release release;
        kernels.cross_entropy_forward(args, pointer(out), statistics, pointer(dlogits), scale, threads);
        return args.dtype == DType::f64 ? sum_in_order(pointer<const double>(out), args.rows)
                                        : sum_in_order(pointer<const float>(out), args.rows);
      },
      "Results of every row to `out`; with `dlogits` also scale * dloss/dinput. Returns the sum of the losses.",
      py::arg("args"), py::arg("out"), py::arg("statistics"), py::arg("dlogits"), py::arg("scale"), py::arg("threads"),
      py::arg("isa"));

  m.def(
      "cross_entropy_backward",
      [](const CrossEntropy& args, std::uintptr_t sums, std::uintptr_t scale, std::int64_t scale_stride,
         std::uintptr_t dlogits, int threads, const std::string& isa) {
        const cpu::Kernels& kernels = kernels_for(isa);
        const py::gil_scoped_release release;
        kernels.cross_entropy_backward(args, pointer<const void>(sums), pointer<const void>(scale), scale_stride,
                                       pointer(dlogits), threads);
      },
      "dlogits, which may be the input, from lse and mass of all classes and one scale a row.", py::arg("args"),
      py::arg("sums"), py::arg("scale"), py::arg("scale_stride"), py::arg("dlogits"), py::arg("threads"),
      py::arg("isa"));

  m.def(
      "cross_entropy_part",
      [](const CrossEntropy& args, std::uintptr_t out, bool statistics, int threads, const std::string& isa) {
        const cpu::Kernels& kernels = kernels_for(isa);
        const py::gil_scoped_release release;
        kernels.cross_entropy_part(args, pointer(out), statistics, threads);
      },
      "What a part of the classes adds to the results of every row, to `out`.", py::arg("args"), py::arg("out"),
      py::arg("statistics"), py::arg("threads"), py::arg("isa"));

  m.def(
      "add_to_split",
      [](std::uintptr_t high, std::uintptr_t low, std::uintptr_t x, std::int64_t count, int threads,
         const std::string& isa) {
        const cpu::Kernels& kernels = kernels_for(isa);
        const py::gil_scoped_release release;
        kernels.add_to_split(pointer<bf16>(high), pointer<std::uint16_t>(low), pointer<const bf16>(x), count, threads);
      },
      "Adds `count` bf16 numbers to fp32 ones, whose halves are `high` and `low`.", py::arg("high"), py::arg("low"),
      py::arg("x"), py::arg("count"), py::arg("threads"), py::arg("isa"));

  m.def(
      "round_split",
      [](std::uintptr_t high, std::uintptr_t low, std::int64_t count, int threads, const std::string& isa) {
        const cpu::Kernels& kernels = kernels_for(isa);
        const py::gil_scoped_release release;
        kernels.round_split(pointer<bf16>(high), pointer<const std::uint16_t>(low), count, threads);
      },
      "Rounds the fp32 numbers of `high` and `low` to bf16, in `high`.", py::arg("high"), py::arg("low"),
      py::arg("count"), py::arg("threads"), py::arg("isa"));

  m.def(
      "elementwise_loss",
      [](int loss, std::int64_t count, std::uintptr_t input, int dtype, std::uintptr_t target, int target_dtype,
         std::uintptr_t weight, std::int64_t weight_length, std::int64_t weight_repeat, std::uintptr_t pos_weight,
         std::int64_t pos_weight_length, std::int64_t pos_weight_repeat, std::uintptr_t scale,
         std::int64_t scale_stride, double denominator, std::uintptr_t losses, std::uintptr_t gradient, bool sum,
         int threads, const std::string& isa) {
        auto args = elementwise_loss_args(loss, count, input, dtype, target, target_dtype, weight, weight_length,
                                          weight_repeat, pos_weight, pos_weight_length, pos_weight_repeat, scale,
                                          scale_stride, denominator, losses, gradient);
        const cpu::Kernels& kernels = kernels_for(isa);
        const py::gil_scoped_release release;
        std::vector<double> sums(sum ? (count + cpu::kElementsPerSum - 1) / cpu::kElementsPerSum : 0);
        if (sum) args.sums = sums.data();
        kernels.elementwise_loss(args, threads);
        return sum_in_order(sums.data(), static_cast<std::int64_t>(sums.size()));
      },
      "Unless the addresses are 0, the losses of all elements, and what the gradient is: scale[i * scale_stride] / "
      "denominator * dloss_i/dinput_i. Returns the sum of the losses if that is asked for.",
      py::arg("loss"), py::arg("count"), py::arg("input"), py::arg("dtype"), py::arg("target"), py::arg("target_dtype"),
      py::arg("weight"), py::arg("weight_length"), py::arg("weight_repeat"), py::arg("pos_weight"),
      py::arg("pos_weight_length"), py::arg("pos_weight_repeat"), py::arg("scale"), py::arg("scale_stride"),
      py::arg("denominator"), py::arg("losses"), py::arg("gradient"), py::arg("sum"), py::arg("threads"),
      py::arg("isa"));

  define_layer_norm(m);

  m.def(
      "advise_huge_pages",
      [](std::uintptr_t address, std::int64_t bytes) { return cpu::advise_huge_pages(pointer(address), bytes); },
      "Asks for huge pages behind a fresh buffer. False where the system has none.", py::arg("address"),
      py::arg("bytes"));
}
