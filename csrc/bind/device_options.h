// The hyperparameters of a group for a GPU's kernels, some of which may lie on the device.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "bind/moment_lists.h"
#include "bind/tensor_list.h"
#include "cuda/step.h"

namespace superfine {

// `lr`, `beta1`, `beta2` and `gradient_scale` may each be a tensor of one element on the device, which is not read
// here; `options_of` takes all others.
inline cuda::GroupOptions device_options(const std::string& op, const TensorReader& reader, int device_index,
                                         const py::dict& hyper, cuda::GroupOptions (*options_of)(const py::dict&)) {
  const py::dict numbers = hyper.attr("copy")();
  std::array<TensorView, cuda::kDeviceNumbers> views;
  for (int i = 0; i < cuda::kDeviceNumbers; ++i) {
    const char* const name = cuda::kDeviceNumberNames[i];
    const py::object value = hyper[name];
    if (!reader.is_tensor(value)) continue;
    TensorView& view = views[i];
    view = reader.read(value);
    if (view.numel != 1 || (view.dtype != DType::f32 && view.dtype != DType::f64) || view.is_negated ||
        view.device != TensorView::Device::cuda || view.device_index != device_index) {
      throw py::value_error(
          op + ": " + name + " is " + describe(value) +
          "; expected a number, or a float32 or float64 tensor of one element on cuda:" + std::to_string(device_index));
    }
    numbers[name] = 0.0;
  }
  cuda::GroupOptions group = options_of(numbers);
  for (int i = 0; i < cuda::kDeviceNumbers; ++i) {
    group.address[i] = views[i].data;
    group.is_double[i] = views[i].dtype == DType::f64;
  }
  group.seed = hyper["seed"].cast<std::uint32_t>();
  return group;
}

}  // namespace superfine
