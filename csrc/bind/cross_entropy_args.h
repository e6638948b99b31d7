// The arguments of `cross_entropy` from Python's integers, for every backend.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "math/cross_entropy.h"

namespace superfine {

template <class T = void>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline void define_cross_entropy_arguments(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<CrossEntropy>(m, "CrossEntropy", py::module_local(),
                           "Logits, targets and settings; see csrc/math/cross_entropy.h. Addresses may be 0 for none.")
      .def(py::init([](std::uintptr_t input, std::int64_t rows, std::int64_t vocab, std::int64_t row_stride, int dtype,
                       std::uintptr_t target, bool target_is_int64, std::int64_t target_stride, std::int64_t targets,
                       std::uintptr_t probabilities, std::int64_t probabilities_stride, std::uintptr_t weight,
                       std::int64_t ignore_index, double label_smoothing, double z_loss, double softcap, double scale,
                       std::int64_t first_class, std::int64_t classes) {
             return CrossEntropy{pointer(input),
                                 rows,
                                 vocab,
                                 row_stride,
                                 static_cast<DType>(dtype),
                                 pointer(target),
                                 target_is_int64,
                                 target_stride,
                                 targets,
                                 pointer(probabilities),
                                 probabilities_stride,
                                 pointer(weight),
                                 ignore_index,
                                 label_smoothing,
                                 z_loss,
                                 softcap,
                                 scale,
                                 first_class,
                                 classes};
           }),
           py::arg("input"), py::arg("rows"), py::arg("vocab"), py::arg("row_stride"), py::arg("dtype"),
           py::arg("target"), py::arg("target_is_int64"), py::arg("target_stride"), py::arg("targets"),
           py::arg("probabilities"), py::arg("probabilities_stride"), py::arg("weight"), py::arg("ignore_index"),
           py::arg("label_smoothing"), py::arg("z_loss"), py::arg("softcap"), py::arg("scale"), py::arg("first_class"),
           py::arg("classes"));
}

}  // namespace superfine
