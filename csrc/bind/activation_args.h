// Defines `activation`: its arguments from Python's integers.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "bind/cpu_steps.h"
#include "bind/cross_entropy_args.h"
#include "cpu/dispatch.h"
#include "math/activation.h"

namespace superfine {

inline void define_activation(pybind11::module_& m) {
  namespace py = pybind11;
  m.def(
      "activation",
      [](int function, std::int64_t rows, std::int64_t columns, int dtype, std::uintptr_t gate,
         std::int64_t gate_stride, std::uintptr_t up, std::int64_t up_stride, std::uintptr_t grad,
         std::int64_t grad_stride, std::uintptr_t out, std::uintptr_t dup, int threads, const std::string& isa) {
        const Activation args{static_cast<Function>(function),
                              rows,
                              columns,
                              static_cast<DType>(dtype),
                              {pointer(gate), gate_stride},
                              {pointer(up), up_stride},
                              {pointer(grad), grad_stride},
                              pointer(out),
                              pointer(dup)};
        const cpu::Kernels& kernels = kernels_for(isa);
        const py::gil_scoped_release release;
        kernels.activation(args, threads);
      },
      "f(gate) * up to `out`; with `grad` the gradients of gate and up to `out` and `dup`, unless these are 0.",
      py::arg("function"), py::arg("rows"), py::arg("columns"), py::arg("dtype"), py::arg("gate"),
      py::arg("gate_stride"), py::arg("up"), py::arg("up_stride"), py::arg("grad"), py::arg("grad_stride"),
      py::arg("out"), py::arg("dup"), py::arg("threads"), py::arg("isa"));
}

}  // namespace superfine
