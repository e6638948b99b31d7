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

#include "bind/cross_entropy_args.h"
#include "bind/moment_lists.h"
#include "bind/tensor_list.h"
#include "cpu/dispatch.h"
#include "cpu/memory.h"

namespace py = pybind11;
using namespace superfine;

namespace {

const cpu::Kernels& kernels_for(const std::string& isa) {
  if (isa.empty()) {
    static const cpu::Kernels& best = cpu::kernels(cpu::best_isa());
    return best;
  }
  for (const auto candidate : {cpu::Isa::baseline, cpu::Isa::avx2, cpu::Isa::avx512}) {
    if (cpu::has_isa(candidate) && isa == cpu::kernels(candidate).isa) return cpu::kernels(candidate);
  }
  throw py::value_error("isa is '" + isa + "'; expected one that this processor has");
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const auto isa : {cpu::Isa::baseline, cpu::Isa::avx2, cpu::Isa::avx512}) {
    if (cpu::has_isa(isa)) names.emplace_back(cpu::kernels(isa).isa);
  }
  return names;
}

std::vector<std::size_t> adamw(const TensorReader& reader, const py::list& params, const py::list& grads,
                               const py::list& exp_avgs, const py::list& exp_avg_sqs, const py::list& max_exp_avg_sqs,
                               const py::list& steps, double lr, double beta1, double beta2, double eps,
                               double weight_decay, bool maximize, int threads, const std::string& isa) {
  const cpu::Kernels& kernels = kernels_for(isa);
  MomentArguments arguments = read_moment_lists("adamw_", reader, TensorView::Device::cpu, params, grads, exp_avgs,
                                                exp_avg_sqs, max_exp_avg_sqs, steps, threads);
  const auto tensors = advance<AdamWTensor>(arguments, adamw_scalars_of(lr, beta1, beta2, eps, weight_decay, maximize));
  reader.increment_version(params);
  const py::gil_scoped_release release;
  kernels.adamw(tensors.data(), static_cast<std::int64_t>(tensors.size()), threads);
  return arguments.rest;
}

std::optional<std::pair<py::list, std::vector<std::size_t>>> adamw_group(
    const TensorReader& reader, const py::list& params, const py::dict& state, bool amsgrad, double lr, double beta1,
    double beta2, double eps, double weight_decay, bool maximize, int threads, const std::string& isa) {
  const cpu::Kernels& kernels = kernels_for(isa);
  py::list used;
  auto arguments = read_moment_group("adamw_", reader, TensorView::Device::cpu, params, state, amsgrad, used, threads);
  if (!arguments) return std::nullopt;
  const auto tensors =
      advance<AdamWTensor>(*arguments, adamw_scalars_of(lr, beta1, beta2, eps, weight_decay, maximize));
  reader.increment_version(used);
  {
    const py::gil_scoped_release release;
    kernels.adamw(tensors.data(), static_cast<std::int64_t>(tensors.size()), threads);
  }
  return std::make_pair(std::move(used), std::move(arguments->rest));
}

std::vector<std::size_t> lamb(const TensorReader& reader, const py::list& params, const py::list& grads,
                              const py::list& exp_avgs, const py::list& exp_avg_sqs, const py::list& steps, double lr,
                              double beta1, double beta2, double eps, double weight_decay, bool bias_correction,
                              bool grad_averaging, bool adapt, bool trust_clip, double gradient_scale, int threads,
                              const std::string& isa) {
  const cpu::Kernels& kernels = kernels_for(isa);
  MomentArguments arguments = read_moment_lists("lamb_", reader, TensorView::Device::cpu, params, grads, exp_avgs,
                                                exp_avg_sqs, py::list(), steps, threads);
  const auto tensors =
      advance<LambTensor>(arguments, lamb_scalars_of({lr, beta1, beta2, eps, weight_decay, bias_correction,
                                                      grad_averaging, adapt, trust_clip, gradient_scale}));
  reader.increment_version(params);
  const py::gil_scoped_release release;
  kernels.lamb(tensors.data(), static_cast<std::int64_t>(tensors.size()), threads);
  return arguments.rest;
}

template <class Label>
std::pair<std::int64_t, double> scan_labels(const Label* target, std::int64_t stride, std::int64_t rows,
                                            std::int64_t vocab, const void* weight, bool weight_is_f64,
                                            std::int64_t ignore_index) {
  double weight_sum = 0;
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int64_t label = target[i * stride];
    if (label == ignore_index) continue;
    if (label < 0 || label >= vocab) return {i, weight_sum};
    weight_sum += weight == nullptr ? 1.0
                  : weight_is_f64   ? static_cast<const double*>(weight)[label]
                                    : static_cast<const float*>(weight)[label];
  }
  return {-1, weight_sum};
}

std::pair<std::int64_t, double> check_labels(std::uintptr_t target, bool target_is_int64, std::int64_t target_stride,
                                             std::int64_t rows, std::int64_t vocab, std::uintptr_t weight,
                                             bool weight_is_f64, std::int64_t ignore_index) {
  const py::gil_scoped_release release;
  const void* w = pointer(weight);
  if (target_is_int64) {
    return scan_labels(pointer<const std::int64_t>(target), target_stride, rows, vocab, w, weight_is_f64, ignore_index);
  }
  return scan_labels(pointer<const std::int32_t>(target), target_stride, rows, vocab, w, weight_is_f64, ignore_index);
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
      .def_property_readonly("uses_shim", &TensorReader::uses_shim);

  m.def("adamw", &adamw, "One AdamW step over lists of tensors. Returns the positions that it left alone.",
        py::arg("reader"), py::arg("params"), py::arg("grads"), py::arg("exp_avgs"), py::arg("exp_avg_sqs"),
        py::arg("max_exp_avg_sqs"), py::arg("steps"), py::kw_only(), py::arg("lr"), py::arg("beta1"), py::arg("beta2"),
        py::arg("eps"), py::arg("weight_decay"), py::arg("maximize"), py::arg("threads"), py::arg("isa"));

  m.def("adamw_group", &adamw_group,
        "One AdamW step over an optimizer's group. Returns the parameters with a gradient and the positions among "
        "them that it left alone; None where a parameter is a tensor subclass or lies elsewhere.",
        py::arg("reader"), py::arg("params"), py::arg("state"), py::arg("amsgrad"), py::kw_only(), py::arg("lr"),
        py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"), py::arg("maximize"),
        py::arg("threads"), py::arg("isa"));

  m.def("lamb", &lamb, "One LAMB step over lists of tensors. Returns the positions that it left alone.",
        py::arg("reader"), py::arg("params"), py::arg("grads"), py::arg("exp_avgs"), py::arg("exp_avg_sqs"),
        py::arg("steps"), py::kw_only(), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
        py::arg("weight_decay"), py::arg("bias_correction"), py::arg("grad_averaging"), py::arg("adapt"),
        py::arg("trust_clip"), py::arg("gradient_scale"), py::arg("threads"), py::arg("isa"));

  m.def("check_labels", &check_labels,
        "(first position with a label outside [0, vocab) or -1, sum of the weights of the labels not ignored).",
        py::arg("target"), py::arg("target_is_int64"), py::arg("target_stride"), py::arg("rows"), py::arg("vocab"),
        py::arg("weight"), py::arg("weight_is_f64"), py::arg("ignore_index"));

  m.def(
      "cross_entropy_forward",
      [](std::uintptr_t input, std::int64_t rows, std::int64_t vocab, std::int64_t row_stride, int dtype,
         std::uintptr_t target, bool target_is_int64, std::int64_t target_stride, std::uintptr_t weight,
         std::int64_t ignore_index, double label_smoothing, std::uintptr_t losses, std::uintptr_t lse,
         std::uintptr_t dlogits, double scale, int threads, const std::string& isa) {
        const auto args = cross_entropy_args(input, rows, vocab, row_stride, dtype, target, target_is_int64,
                                             target_stride, weight, ignore_index, label_smoothing);
        const cpu::Kernels& kernels = kernels_for(isa);
        const py::gil_scoped_release release;
        kernels.cross_entropy_forward(args, pointer(losses), pointer(lse), pointer(dlogits), scale, threads);
        return args.dtype == DType::f64 ? sum_in_order(pointer<const double>(losses), rows)
                                        : sum_in_order(pointer<const float>(losses), rows);
      },
      "Losses and lse of every row; with `dlogits` also scale * dloss/dinput. Returns the sum of the losses.",
      py::arg("input"), py::arg("rows"), py::arg("vocab"), py::arg("row_stride"), py::arg("dtype"), py::arg("target"),
      py::arg("target_is_int64"), py::arg("target_stride"), py::arg("weight"), py::arg("ignore_index"),
      py::arg("label_smoothing"), py::arg("losses"), py::arg("lse"), py::arg("dlogits"), py::arg("scale"),
      py::arg("threads"), py::arg("isa"));

  m.def(
      "cross_entropy_backward",
      [](std::uintptr_t input, std::int64_t rows, std::int64_t vocab, std::int64_t row_stride, int dtype,
         std::uintptr_t target, bool target_is_int64, std::int64_t target_stride, std::uintptr_t weight,
         std::int64_t ignore_index, double label_smoothing, std::uintptr_t lse, std::uintptr_t scale,
         std::int64_t scale_stride, std::uintptr_t dlogits, int threads, const std::string& isa) {
        const auto args = cross_entropy_args(input, rows, vocab, row_stride, dtype, target, target_is_int64,
                                             target_stride, weight, ignore_index, label_smoothing);
        const cpu::Kernels& kernels = kernels_for(isa);
        const py::gil_scoped_release release;
        kernels.cross_entropy_backward(args, pointer<const void>(lse), pointer<const void>(scale), scale_stride,
                                       pointer(dlogits), threads);
      },
      "dlogits from the lse of the forward pass and one scale a row.", py::arg("input"), py::arg("rows"),
      py::arg("vocab"), py::arg("row_stride"), py::arg("dtype"), py::arg("target"), py::arg("target_is_int64"),
      py::arg("target_stride"), py::arg("weight"), py::arg("ignore_index"), py::arg("label_smoothing"), py::arg("lse"),
      py::arg("scale"), py::arg("scale_stride"), py::arg("dlogits"), py::arg("threads"), py::arg("isa"));

  m.def(
      "advise_huge_pages",
      [](std::uintptr_t address, std::int64_t bytes) { return cpu::advise_huge_pages(pointer(address), bytes); },
      "Asks for huge pages behind a fresh buffer. False where the system has none.", py::arg("address"),
      py::arg("bytes"));
}
