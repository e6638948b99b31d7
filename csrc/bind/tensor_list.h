// Reads torch tensors from Python lists without torch's headers.
//
// Since 2.10 torch offers DLPack's C exchange API: a table of functions behind
// `torch.Tensor.__dlpack_c_exchange_api__`, one of which describes a tensor in place (about 50 ns, no
// ownership taken). Older torch is asked through the tensor's Python attributes.
// Source: DLPack specification 1.3, "C Exchange API".
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/dtype.h"

namespace superfine {
namespace py = pybind11;

struct TensorView {
  enum class Device : int { cpu = 1, cuda = 2, other = 0 };

  void* data = nullptr;
  std::unique_ptr<std::int64_t[]> owned;  // shape and strides, where torch's own are out of reach
  const std::int64_t* shape = nullptr;
  const std::int64_t* strides = nullptr;
  int ndim = 0;
  std::int64_t numel = 1;
  std::optional<DType> dtype;  // none for types without a kernel (integers, complex, ...)
  Device device = Device::other;
  int device_index = 0;
};

inline std::int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

inline bool same_shape(const TensorView& a, const TensorView& b) {
  return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape);
}

// The elements of both tensors lie in the same order (strides of dimensions of size 1 do not count).
inline bool same_order(const TensorView& a, const TensorView& b) {
  for (int d = 0; d < a.ndim; ++d) {
    if (a.shape[d] != 1 && a.strides[d] != b.strides[d]) return false;
  }
  return true;
}

// The elements fill one stretch of memory without gaps or overlap, in any order of dimensions.
inline bool is_dense(const TensorView& t) {
  std::int64_t expected = 1;
  bool contiguous = true;
  for (int d = t.ndim - 1; d >= 0; --d) {
    if (t.shape[d] == 0) return true;
    contiguous = contiguous && (t.shape[d] == 1 || t.strides[d] == expected);
    expected *= t.shape[d];
  }
  if (contiguous) return true;
  std::vector<std::pair<std::int64_t, std::int64_t>> dims;  // (stride, size), innermost first
  for (int d = 0; d < t.ndim; ++d) {
    if (t.shape[d] != 1) dims.emplace_back(t.strides[d], t.shape[d]);
  }
  std::sort(dims.begin(), dims.end());
  expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

namespace dlpack {  // the layouts that the specification fixes

struct Tensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t ndim;
  std::uint8_t code, bits;
  std::uint16_t lanes;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct ExchangeApi {
  std::uint32_t major, minor;
  ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_object;
  void* managed_tensor_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);
  void* current_stream;
};

inline std::optional<DType> dtype(const Tensor& t) {
  constexpr int kFloat = 2, kBfloat = 4;
  if (t.lanes != 1) return std::nullopt;
  if (t.code == kBfloat && t.bits == 16) return DType::bf16;
  if (t.code != kFloat) return std::nullopt;
  if (t.bits == 32) return DType::f32;
  if (t.bits == 16) return DType::f16;
  if (t.bits == 64) return DType::f64;
  return std::nullopt;
}

}  // namespace dlpack

// Made once by Python (`_library.py`) from torch itself; immutable.
class TensorReader {
 public:
  explicit TensorReader(const py::module_& torch)
      : tensor_(torch.attr("Tensor")),
        parameter_(torch.attr("nn").attr("Parameter")),
        increment_version_(torch.attr("autograd").attr("graph").attr("increment_version")) {
    const char* names[] = {"float32", "bfloat16", "float16", "float64"};
    for (const char* name : names) dtypes_.push_back(torch.attr(name));
    if (py::hasattr(tensor_, "__dlpack_c_exchange_api__")) {
      const py::object capsule = tensor_.attr("__dlpack_c_exchange_api__");
      void* table = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
      if (table == nullptr) throw py::error_already_set();
      const auto* api = static_cast<const dlpack::ExchangeApi*>(table);
      if (api->major == 1) api_ = api;
    }
  }

  bool uses_dlpack() const { return api_ != nullptr; }
  void use_attributes() { api_ = nullptr; }  // for the tests: the way of torch < 2.10

  // Tells autograd that kernels write these tensors, so that a graph that saved them complains.
  void increment_version(const py::list& tensors) const { increment_version_(tensors); }

  // Asks for the memory behind an object that will be read soon. A step streams so much through the
  // caches that torch's own records of its tensors are cold when the next step begins; asking ahead lets
  // the misses overlap. Only hints: what a word after the object's header points to is never read.
  static void prefetch_object(PyObject* object) { __builtin_prefetch(object); }
  static void prefetch_record(PyObject* object) {
    constexpr int kHeader = sizeof(PyObject) / sizeof(void*), kLine = 64, kLines = 4;
    const char* record = reinterpret_cast<const char* const*>(object)[kHeader];
    for (int line = 0; line < kLines; ++line) __builtin_prefetch(record + line * kLine);
  }

  // Neither a subclass, which may hold no memory of its own, nor something else.
  bool is_plain(PyObject* object) const {
    return Py_TYPE(object) == as_type(tensor_) || Py_TYPE(object) == as_type(parameter_);
  }

  TensorView read(py::handle object) const {
    if (api_ != nullptr && is_plain(object.ptr())) {
      dlpack::Tensor t;
      if (api_->tensor_from_object(object.ptr(), &t) != 0) throw py::error_already_set();
      TensorView view;
      view.data = static_cast<char*>(t.data) + t.byte_offset;
      view.shape = t.shape;
      view.strides = t.strides;
      view.ndim = t.ndim;
      for (int d = 0; d < t.ndim; ++d) view.numel *= t.shape[d];
      view.dtype = dlpack::dtype(t);
      view.device = t.device_type == 1   ? TensorView::Device::cpu
                    : t.device_type == 2 ? TensorView::Device::cuda
                                         : TensorView::Device::other;
      view.device_index = t.device_id;
      return view;
    }
    return read_attributes(object);
  }

 private:
  static PyTypeObject* as_type(const py::object& type) { return reinterpret_cast<PyTypeObject*>(type.ptr()); }

  TensorView read_attributes(py::handle object) const {
    if (!py::isinstance(object, tensor_)) {
      throw py::type_error(std::string("expected a torch.Tensor, got ") + Py_TYPE(object.ptr())->tp_name);
    }
    TensorView view;
    view.data = reinterpret_cast<void*>(object.attr("data_ptr")().cast<std::uintptr_t>());
    const auto shape = py::cast<std::vector<std::int64_t>>(py::tuple(object.attr("shape")));
    const auto strides = py::cast<std::vector<std::int64_t>>(object.attr("stride")());
    view.ndim = static_cast<int>(shape.size());
    view.owned = std::make_unique<std::int64_t[]>(2 * shape.size());
    std::copy(shape.begin(), shape.end(), view.owned.get());
    std::copy(strides.begin(), strides.end(), view.owned.get() + view.ndim);
    view.shape = view.owned.get();
    view.strides = view.shape + view.ndim;
    for (int d = 0; d < view.ndim; ++d) view.numel *= view.shape[d];
    const py::object dtype = object.attr("dtype");
    for (std::size_t i = 0; i < dtypes_.size(); ++i) {
      if (dtype.is(dtypes_[i])) view.dtype = static_cast<DType>(i);
    }
    const py::object device = object.attr("device");
    const std::string type = py::str(device.attr("type"));
    view.device = type == "cpu"    ? TensorView::Device::cpu
                  : type == "cuda" ? TensorView::Device::cuda
                                   : TensorView::Device::other;
    const py::object index = device.attr("index");
    view.device_index = index.is_none() ? 0 : index.cast<int>();
    return view;
  }

  const dlpack::ExchangeApi* api_ = nullptr;
  py::object tensor_, parameter_, increment_version_;
  std::vector<py::object> dtypes_;
};

}  // namespace superfine
