// Module superfine_kernels._cuda: as _cpu, with device addresses, a stream and a device. Launches
// return at once. Importing it needs no driver; a call without one says so.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bind/cross_entropy_args.h"
#include "bind/device_options.h"
#include "bind/elementwise_loss_args.h"
#include "bind/moment_groups.h"
#include "bind/moment_lists.h"
#include "bind/moment_options.h"
#include "bind/tensor_list.h"
#include "core/cuda_check.h"
#include "cuda/adamw.h"
#include "cuda/cross_entropy.h"
#include "cuda/elementwise_loss.h"
#include "cuda/lamb.h"

namespace py = pybind11;
using namespace superfine;

namespace {

constexpr int kOldestCapability = 80;  // the oldest architecture in CMakeLists.txt, times ten
constexpr int kOldestDriver = 12010;   // takes kernel arguments of more than 4 KiB: see cuda/moment_table.h

cudaStream_t as_stream(std::uintptr_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // no driver is an answer, not an error to keep
  return 0;
}

std::optional<std::string> why_unavailable() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();
    return std::string("no usable NVIDIA driver or GPU (") + cudaGetErrorString(status) + ")";
  }
  if (count == 0) return "no NVIDIA GPU";
  int driver = 0;
  cuda_check(cudaDriverGetVersion(&driver), "why_unavailable");
  if (driver < kOldestDriver) return "the NVIDIA driver is older than CUDA 12.1, whose long kernel arguments are used";
  int newest = 0;
  for (int device = 0; device < count; ++device) {
    int major = 0, minor = 0;
    cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "why_unavailable");
    cuda_check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "why_unavailable");
    newest = std::max(newest, 10 * major + minor);
  }
  if (newest >= kOldestCapability) return std::nullopt;
  return "the GPU has compute capability " + std::to_string(newest / 10) + "." + std::to_string(newest % 10) +
         "; the kernels need " + std::to_string(kOldestCapability / 10) + "." + std::to_string(kOldestCapability % 10);
}

// Makes `device` current, and the previous one again at the end.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* op) {
    if (const auto reason = why_unavailable_once()) throw std::runtime_error(std::string(op) + ": " + *reason);
    cuda_check(cudaGetDevice(&previous_), op);
    changed_ = device != previous_;
    if (changed_) cuda_check(cudaSetDevice(device), op);
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  static const std::optional<std::string>& why_unavailable_once() {
    static const std::optional<std::string> reason = why_unavailable();
    return reason;
  }
  int previous_ = 0;
  bool changed_ = false;
};

// An optimizer's op.
struct Kernel {
  const char* name;
  cuda::GroupOptions (*options)(const py::dict& hyper);
  std::size_t (*workspace_bytes)(const cuda::Step& step);
  void (*run)(const cuda::Step& step, void* workspace, cudaStream_t stream);
};
constexpr Kernel kAdamW{"adamw_", [](const py::dict& hyper) { return cuda::GroupOptions::of(adamw_options(hyper)); },
                        &cuda::adamw_workspace_bytes, &cuda::adamw};
constexpr Kernel kLamb{"lamb_", [](const py::dict& hyper) { return cuda::GroupOptions::of(lamb_options(hyper)); },
                       &cuda::lamb_workspace_bytes, &cuda::lamb};

// Steps what `arguments` hold, all groups at once; increment_versions() says in torch's way what is written. Gives up
// the interpreter's lock: allocate() is Python, and a launch waits where a stream is full, perhaps of kernels that wait
// for those of another thread.
void step(const Kernel& kernel, const MomentArguments& arguments, const std::vector<cuda::GroupOptions>& options,
          const std::function<void()>& increment_versions, const py::function& allocate, std::uintptr_t stream) {
  if (arguments.tensors.empty()) return;
  const DeviceGuard guard(arguments.device_index, kernel.name);
  std::vector<std::uint32_t> groups;
  groups.reserve(arguments.options.size());
  for (const MomentOptions* each : arguments.options) groups.push_back(static_cast<std::uint32_t>(each->group));
  const cuda::Step step{static_cast<std::int64_t>(arguments.tensors.size()), arguments.tensors.data(),
                        arguments.steps.data(), groups.data(), options.data()};
  void* const workspace = pointer(allocate(kernel.workspace_bytes(step)).cast<std::uintptr_t>());
  increment_versions();
  const py::gil_scoped_release release;
  kernel.run(step, workspace, as_stream(stream));
}

std::vector<std::size_t> step_lists(const Kernel& kernel, const TensorReader& reader,
                                    const std::vector<py::list>& lists, const py::dict& hyper,
                                    const py::function& allocate, std::uintptr_t stream) {
  const MomentOptions options = MomentOptions::of(0, hyper);
  const MomentArguments arguments = read_moment_lists(kernel.name, reader, TensorView::Device::cuda, lists, options, 1);
  if (lists[kParam].empty()) return {};
  const auto rule = device_options(kernel.name, reader, arguments.device_index, hyper, kernel.options);
  const auto increment_versions = [&] {
    reader.increment_version(lists[kParam]);
    if (options.zero_grads) reader.increment_version(lists[kGrad]);
  };
  step(kernel, arguments, {rule}, increment_versions, allocate, stream);
  return arguments.rest;
}

std::optional<std::vector<std::pair<std::size_t, py::object>>> step_groups(
    const Kernel& kernel, const TensorReader& reader, const py::list& groups, const py::dict& state, MomentPlan& plan,
    const py::function& allocate, std::uintptr_t stream) {
  MomentGroups read(reader, groups, state);
  const auto arguments = read.read(kernel.name, TensorView::Device::cuda, plan, 1);
  if (!arguments) return std::nullopt;
  read.hold_grads();  // until the kernels wait in the stream
  std::vector<cuda::GroupOptions> rules(groups.size());
  std::optional<std::size_t> last;  // a group without a gradient may have hyperparameters on another device
  for (std::size_t i = 0; i < read.size(); ++i) {
    const std::size_t group = read.group(i);
    if (group == last) continue;
    const auto hyper = groups[group].cast<std::pair<py::list, py::dict>>().second;
    rules[group] = device_options(kernel.name, reader, arguments->device_index, hyper, kernel.options);
    last = group;
  }
  step(kernel, *arguments, rules, [&] { read.increment_versions(); }, allocate, stream);
  return read.at(arguments->rest);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels. Addresses are integers from Tensor.data_ptr(), `stream` is a cudaStream_t as integer.";
  m.attr("__version__") = SF_VERSION;
  m.attr("runtime_version") = CUDART_VERSION;
  m.def("device_count", &device_count, "The number of GPUs; 0 without a driver.");
  m.def("why_unavailable", &why_unavailable, "Why no kernel can run on this machine, or None where one can.");

  static constexpr const char* kListsDoc =
      "lists: params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, anchors, remainders, scales, steps. lr, beta1, "
      "beta2 and gradient_scale may be tensors of one element on the device, float32 or float64, which the kernels "
      "read; where such a gradient_scale is not finite, the step is not taken, but gradients are zeroed if that is "
      "asked for. `allocate` takes bytes and returns the address of that much memory on the device, which stays until "
      "the stream is done with it. Returns the positions that were left alone.";
  static constexpr const char* kGroupsDoc =
      "One step over an optimizer's groups, pairs of parameters and hyperparameters, which are as those of lists. "
      "Returns what it left alone: pairs of a group's number and a parameter. None, and nothing done, where a "
      "parameter is a tensor subclass or does not lie on the one device.";
  const auto def_step = [&](const char* name, const char* groups_name, const Kernel& kernel) {
    m.def(
        name,
        [&kernel](const TensorReader& reader, const std::vector<py::list>& lists, const py::dict& hyper,
                  const py::function& allocate,
                  std::uintptr_t stream) { return step_lists(kernel, reader, lists, hyper, allocate, stream); },
        kListsDoc, py::arg("reader"), py::arg("lists"), py::arg("hyper"), py::kw_only(), py::arg("allocate"),
        py::arg("stream"));
    m.def(
        groups_name,
        [&kernel](const TensorReader& reader, const py::list& groups, const py::dict& state, MomentPlan& plan,
                  const py::function& allocate,
                  std::uintptr_t stream) { return step_groups(kernel, reader, groups, state, plan, allocate, stream); },
        kGroupsDoc, py::arg("reader"), py::arg("groups"), py::arg("state"), py::arg("plan"), py::kw_only(),
        py::arg("allocate"), py::arg("stream"));
  };
  def_step("adamw", "adamw_groups", kAdamW);
  def_step("lamb", "lamb_groups", kLamb);

  define_cross_entropy_arguments(m);
  m.def(
      "cross_entropy_forward",
      [](const CrossEntropy& args, std::uintptr_t out, bool statistics, std::uintptr_t dlogits, std::uintptr_t scale,
         std::int64_t scale_stride, std::uintptr_t stream, int device) {
        const DeviceGuard guard(device, "cross_entropy_forward");
        const py::gil_scoped_release release;
        cuda::cross_entropy_forward(args, pointer(out), statistics, pointer(dlogits), pointer<const void>(scale),
                                    scale_stride, as_stream(stream));
      },
      "RowResult of every row, 3 x rows, or 6 x rows with statistics; unless `dlogits` is 0 also "
      "scale[i * scale_stride] * dloss_i/dinput_i.",
      py::arg("args"), py::arg("out"), py::arg("statistics"), py::arg("dlogits"), py::arg("scale"),
      py::arg("scale_stride"), py::arg("stream"), py::arg("device"));

  m.def(
      "cross_entropy_backward",
      [](const CrossEntropy& args, std::uintptr_t sums, std::uintptr_t scale, std::int64_t scale_stride,
         std::uintptr_t dlogits, std::uintptr_t stream, int device) {
        const DeviceGuard guard(device, "cross_entropy_backward");
        const py::gil_scoped_release release;
        cuda::cross_entropy_backward(args, pointer<const void>(sums), pointer<const void>(scale), scale_stride,
                                     pointer(dlogits), as_stream(stream));
      },
      "dlogits from `sums`, the lse and mass of rows with all their classes, and one scale, or one scale a row.",
      py::arg("args"), py::arg("sums"), py::arg("scale"), py::arg("scale_stride"), py::arg("dlogits"),
      py::arg("stream"), py::arg("device"));

  m.def(
      "cross_entropy_part",
      [](const CrossEntropy& args, std::uintptr_t out, bool statistics, std::uintptr_t stream, int device) {
        const DeviceGuard guard(device, "cross_entropy_part");
        const py::gil_scoped_release release;
        cuda::cross_entropy_part(args, pointer(out), statistics, as_stream(stream));
      },
      "PartResult of every row, 4 x rows, or 7 x rows with statistics.", py::arg("args"), py::arg("out"),
      py::arg("statistics"), py::arg("stream"), py::arg("device"));

  m.def(
      "cross_entropy_denominator",
      [](const CrossEntropy& args, std::uintptr_t out, std::uintptr_t stream, int device) {
        const DeviceGuard guard(device, "cross_entropy_denominator");
        const py::gil_scoped_release release;
        cuda::cross_entropy_denominator(args, pointer(out), as_stream(stream));
      },
      "out[0] = sum of the weights of the labels that are not ignored (their number without weights), or the number of "
      "rows that count where there are probabilities; out[1] = 1 / out[0].",
      py::arg("args"), py::arg("out"), py::arg("stream"), py::arg("device"));

  m.def(
      "cross_entropy_reduce",
      [](std::uintptr_t losses, std::int64_t rows, int dtype, std::uintptr_t denominator, std::uintptr_t out,
         std::uintptr_t stream, int device) {
        const DeviceGuard guard(device, "cross_entropy_reduce");
        const py::gil_scoped_release release;
        cuda::cross_entropy_reduce(pointer<const void>(losses), rows, static_cast<DType>(dtype),
                                   pointer<const void>(denominator), pointer(out), as_stream(stream));
      },
      "out[0] = sum of the losses, divided by denominator[0] unless that address is 0.", py::arg("losses"),
      py::arg("rows"), py::arg("dtype"), py::arg("denominator"), py::arg("out"), py::arg("stream"), py::arg("device"));

  m.attr("ELEMENTS_PER_SUM") = cuda::kElementsPerSum;
  m.attr("MOST_ELEMENTS") = cuda::kMostElements;
  m.def(
      "elementwise_loss",
      [](int loss, std::int64_t count, std::uintptr_t input, int dtype, std::uintptr_t target, int target_dtype,
         std::uintptr_t weight, std::int64_t weight_length, std::int64_t weight_repeat, std::uintptr_t pos_weight,
         std::int64_t pos_weight_length, std::int64_t pos_weight_repeat, std::uintptr_t scale,
         std::int64_t scale_stride, double denominator, std::uintptr_t losses, std::uintptr_t gradient,
         std::uintptr_t sums, std::uintptr_t out, std::uintptr_t stream, int device) {
        auto args = elementwise_loss_args(loss, count, input, dtype, target, target_dtype, weight, weight_length,
                                          weight_repeat, pos_weight, pos_weight_length, pos_weight_repeat, scale,
                                          scale_stride, denominator, losses, gradient);
        args.sums = pointer(sums);
        const DeviceGuard guard(device, "elementwise_loss");
        const py::gil_scoped_release release;
        cuda::elementwise_loss(args, pointer(out), as_stream(stream));
      },
      "Unless the addresses are 0: the losses of all elements; scale[i * scale_stride] / denominator * "
      "dloss_i/dinput_i "
      "as gradient; in out[0] the sum of the losses over the denominator, for which `sums` holds a float32 for every "
      "ELEMENTS_PER_SUM elements. Takes 1 to MOST_ELEMENTS elements, not of float64.",
      py::arg("loss"), py::arg("count"), py::arg("input"), py::arg("dtype"), py::arg("target"), py::arg("target_dtype"),
      py::arg("weight"), py::arg("weight_length"), py::arg("weight_repeat"), py::arg("pos_weight"),
      py::arg("pos_weight_length"), py::arg("pos_weight_repeat"), py::arg("scale"), py::arg("scale_stride"),
      py::arg("denominator"), py::arg("losses"), py::arg("gradient"), py::arg("sums"), py::arg("out"),
      py::arg("stream"), py::arg("device"));
}
