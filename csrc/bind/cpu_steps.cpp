#include "bind/cpu_steps.h"

#include <cstdint>
#include <numeric>

#include "bind/moment_groups.h"
#include "bind/moment_lists.h"
#include "bind/moment_options.h"

namespace superfine {

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

namespace {

// A step of fewer elements, half a millisecond or less, keeps the interpreter's lock.
constexpr std::int64_t kLong = 1 << 20;

bool is_long(const MomentArguments& arguments) {
  std::int64_t elements = 0;
  for (const MomentTensor& tensor : arguments.tensors) elements += tensor.numel;
  return elements >= kLong;
}

// An optimizer's op: `Kernel` says which kernel, and how scalars follow from the hyperparameters and the step.
template <class Kernel>
std::vector<std::size_t> step_lists(const TensorReader& reader, const std::vector<py::list>& lists,
                                    const py::dict& hyper, int threads, const std::string& isa) {
  const MomentOptions options = MomentOptions::of(0, hyper);
  const auto rule = Kernel::options(hyper);
  MomentArguments arguments =
      read_moment_lists(Kernel::kName, reader, TensorView::Device::cpu, lists, options, threads);
  const auto tensors =
      advance<typename Kernel::Tensor>(arguments, [&](std::size_t, double count) { return scalars(rule, count); });
  reader.increment_version(lists[kParam]);
  if (options.zero_grads) reader.increment_version(lists[kGrad]);
  const py::gil_scoped_release release;
  (kernels_for(isa).*Kernel::kKernel)(tensors.data(), static_cast<std::int64_t>(tensors.size()), threads);
  return arguments.rest;
}

template <class Kernel>
Rest step_groups(const TensorReader& reader, const py::list& groups, const py::dict& state, MomentPlan& plan,
                 int threads, const std::string& isa) {
  MomentGroups read(reader, groups, state);
  auto arguments = read.read(Kernel::kName, TensorView::Device::cpu, plan, threads);
  if (!arguments) return std::nullopt;
  const bool unlocks = is_long(*arguments);
  if (unlocks) read.hold_grads();
  std::vector<decltype(Kernel::options(py::dict()))> rules;
  rules.reserve(groups.size());
  for (const py::handle group : groups)
    rules.push_back(Kernel::options(group.cast<std::pair<py::list, py::dict>>().second));
  const auto tensors = advance<typename Kernel::Tensor>(
      *arguments, [&](std::size_t group, double count) { return scalars(rules[group], count); });
  read.increment_versions();
  std::optional<py::gil_scoped_release> release;
  if (unlocks) release.emplace();
  (kernels_for(isa).*Kernel::kKernel)(tensors.data(), static_cast<std::int64_t>(tensors.size()), threads);
  release.reset();
  return read.at(arguments->rest);
}

struct AdamW {
  using Tensor = AdamWTensor;
  static constexpr const char* kName = "adamw_";
  static constexpr auto kKernel = &cpu::Kernels::adamw;
  static AdamWOptions options(const py::dict& hyper) { return adamw_options(hyper); }
};
struct Lamb {
  using Tensor = LambTensor;
  static constexpr const char* kName = "lamb_";
  static constexpr auto kKernel = &cpu::Kernels::lamb;
  static LambOptions options(const py::dict& hyper) { return lamb_options(hyper); }
};

}  // namespace

std::vector<std::size_t> adamw_lists(const TensorReader& reader, const std::vector<py::list>& lists,
                                     const py::dict& hyper, int threads, const std::string& isa) {
  return step_lists<AdamW>(reader, lists, hyper, threads, isa);
}
std::vector<std::size_t> lamb_lists(const TensorReader& reader, const std::vector<py::list>& lists,
                                    const py::dict& hyper, int threads, const std::string& isa) {
  return step_lists<Lamb>(reader, lists, hyper, threads, isa);
}

Rest adamw_groups(const TensorReader& reader, const py::list& groups, const py::dict& state, MomentPlan& plan,
                  int threads, const std::string& isa) {
  return step_groups<AdamW>(reader, groups, state, plan, threads, isa);
}
Rest lamb_groups(const TensorReader& reader, const py::list& groups, const py::dict& state, MomentPlan& plan,
                 int threads, const std::string& isa) {
  return step_groups<Lamb>(reader, groups, state, plan, threads, isa);
}

std::optional<double> sum_of_squares(const TensorReader& reader, const py::list& list, int threads,
                                     const std::string& isa) {
  const cpu::Kernels& kernels = kernels_for(isa);
  std::vector<DenseTensor> tensors;
  tensors.reserve(list.size());
  std::int64_t pieces = 0;
  for (const py::handle object : list) {
    TensorView view;
    if (!reader.read_strided(object.ptr(), view) || view.device != TensorView::Device::cpu || view.is_negated ||
        !is_floating(view.dtype) || !is_dense(view)) {
      return std::nullopt;
    }
    tensors.push_back({view.data, view.numel, *view.dtype});
    pieces += norm_pieces(tensors.back());
  }
  std::vector<double> sums(pieces);
  const py::gil_scoped_release release;
  kernels.sums_of_squares(tensors.data(), static_cast<std::int64_t>(tensors.size()), sums.data(), threads);
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

}  // namespace superfine
