// Defines `layer_norm` and `layer_norm_gradient`: their arguments from Python's integers.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "bind/cpu_steps.h"
#include "bind/cross_entropy_args.h"
#include "cpu/dispatch.h"
#include "math/layer_norm.h"

namespace superfine {

inline void define_layer_norm(pybind11::module_& m) {
  namespace py = pybind11;
  m.def(
      "layer_norm",
      [](bool rms, std::int64_t rows, std::int64_t size, double eps, double weight_offset, bool cast_before_weight,
         std::uintptr_t input, int dtype, std::uintptr_t residual, std::uintptr_t weight, int weight_dtype,
         std::uintptr_t bias, int bias_dtype, std::uintptr_t sum, std::uintptr_t output, int output_dtype,
         std::uintptr_t mean, std::uintptr_t rstd, int threads, const std::string& isa) {
        const LayerNorm args{rms,
                             rows,
                             size,
                             eps,
                             weight_offset,
                             cast_before_weight,
                             pointer(input),
                             static_cast<DType>(dtype),
                             pointer(residual),
                             pointer(weight),
                             static_cast<DType>(weight_dtype),
                             pointer(bias),
                             static_cast<DType>(bias_dtype),
                             pointer(sum),
                             pointer(output),
                             static_cast<DType>(output_dtype),
                             pointer(mean),
                             pointer(rstd)};
        const cpu::Kernels& kernels = kernels_for(isa);
        const py::gil_scoped_release release;
        kernels.layer_norm(args, threads);
      },
      "Rows normalised, and unless their addresses are 0 the sum of input and residual, mean and rstd of every row; "
      "see csrc/math/layer_norm.h.",
      py::arg("rms"), py::arg("rows"), py::arg("size"), py::arg("eps"), py::arg("weight_offset"),
      py::arg("cast_before_weight"), py::arg("input"), py::arg("dtype"), py::arg("residual"), py::arg("weight"),
      py::arg("weight_dtype"), py::arg("bias"), py::arg("bias_dtype"), py::arg("sum"), py::arg("output"),
      py::arg("output_dtype"), py::arg("mean"), py::arg("rstd"), py::arg("threads"), py::arg("isa"));

  m.def(
      "layer_norm_gradient",
      [](bool rms, std::int64_t rows, std::int64_t size, double weight_offset, std::uintptr_t grad, int grad_dtype,
         std::uintptr_t grad_sum, std::uintptr_t input, int dtype, std::uintptr_t weight, int weight_dtype,
         std::uintptr_t mean, std::uintptr_t rstd, std::uintptr_t dinput, std::uintptr_t dweight, std::uintptr_t dbias,
         int threads, const std::string& isa) {
        const LayerNormGradient args{rms,
                                     rows,
                                     size,
                                     weight_offset,
                                     pointer(grad),
                                     static_cast<DType>(grad_dtype),
                                     pointer(grad_sum),
                                     pointer(input),
                                     static_cast<DType>(dtype),
                                     pointer(weight),
                                     static_cast<DType>(weight_dtype),
                                     pointer(mean),
                                     pointer(rstd),
                                     pointer(dinput),
                                     pointer(dweight),
                                     pointer(dbias)};
        const cpu::Kernels& kernels = kernels_for(isa);
        const py::gil_scoped_release release;
        kernels.layer_norm_gradient(args, threads);
      },
      "Unless their addresses are 0, the gradients of input, weight and bias.", py::arg("rms"), py::arg("rows"),
      py::arg("size"), py::arg("weight_offset"), py::arg("grad"), py::arg("grad_dtype"), py::arg("grad_sum"),
      py::arg("input"), py::arg("dtype"), py::arg("weight"), py::arg("weight_dtype"), py::arg("mean"), py::arg("rstd"),
      py::arg("dinput"), py::arg("dweight"), py::arg("dbias"), py::arg("threads"), py::arg("isa"));
}

}  // namespace superfine
