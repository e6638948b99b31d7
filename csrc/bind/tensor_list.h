// Reads torch tensors from Python lists without torch's headers: through the C functions of torch_shim.h
// (about 20 ns a tensor) where they are found, else through the tensor's Python attributes (2 us).
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bind/torch_record.h"
#include "bind/torch_shim.h"
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
  std::optional<DType> dtype;  // none for types without a kernel (complex, other integers, ...)
  bool is_negated = false;     // minus what memory holds; kernels do not take it
  Device device = Device::other;
  int device_index = 0;
};

inline std::int64_t element_size(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : dtype == DType::u8 ? 1 : 2;
}

// All that a TensorView tells but the address, in the words of torch's record.
struct TensorLayout {
  TorchRecord::Words words;
  std::int64_t item_size;
};

// Of numbers, as opposed to bits.
inline bool is_floating(const std::optional<DType>& dtype) { return dtype && *dtype <= DType::f64; }

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

inline bool is_contiguous(const TensorView& t) {
  if (t.numel == 0) return true;
  std::int64_t expected = 1;
  for (int d = t.ndim - 1; d >= 0; expected *= t.shape[d--]) {
    if (t.shape[d] != 1 && t.strides[d] != expected) return false;
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

// Made once by Python (`_library.py`) from torch itself; immutable.
class TensorReader {
 public:
  explicit TensorReader(const py::module_& torch)
      : tensor_(torch.attr("Tensor")),
        parameter_(torch.attr("nn").attr("Parameter")),
        grad_(tensor_.attr("grad")),
        strided_(torch.attr("strided")),
        increment_version_(torch.attr("autograd").attr("graph").attr("increment_version")) {
    const char* names[] = {"float32", "bfloat16", "float16", "float64", "int16", "uint8"};
    for (const char* name : names) dtypes_.push_back(torch.attr(name));
    py::list tensors, negated;
    for (const char* dtype : names) {
      const py::object tensor = torch.attr("zeros")(2, tensors.size(), py::arg("dtype") = torch.attr(dtype));
      tensors.append(tensor);
      negated.append(torch.attr("_neg_view")(tensor));
    }
    shim_ = TorchShim::find(tensors, negated, parameter_(tensors[0]));
    if (shim_) {
      const TorchShim::Dtypes& d = shim_->dtypes;
      codes_ = {{{d.f32, DType::f32},
                 {d.bf16, DType::bf16},
                 {d.f16, DType::f16},
                 {d.f64, DType::f64},
                 {d.i16, DType::i16},
                 {d.u8, DType::u8}}};
      record_ = TorchRecord::find(torch, shim_->impl_word());
    }
  }

  bool uses_shim() const { return shim_.has_value(); }
  void use_attributes() {  // for the tests
    shim_.reset();
    record_.reset();
  }
  bool compares_records() const { return record_.has_value(); }

  // Tells autograd that kernels write tensors, so that a graph that saved them complains.
  void increment_version(const py::list& tensors) const {
    py::list others;
    for (const py::handle tensor : tensors) {
      if (!bump_version(record(tensor.ptr()))) others.append(tensor);
    }
    increment_other_versions(others);
  }
  // False where torch has to count: for one that is not plain, and one that was made in inference mode.
  bool bump_version(TorchRecord::Record tensor) const { return tensor != nullptr && record_->bump_version(tensor); }
  void increment_other_versions(const py::list& tensors) const {
    if (!tensors.empty()) increment_version_(tensors);
  }

  // What torch keeps of a plain tensor; null for others, and where records are not compared.
  TorchRecord::Record record(PyObject* object) const {
    return record_ && object != nullptr && is_plain(object) ? record_->of(object) : nullptr;
  }
  // The same of a tensor's gradient; null where it has none.
  TorchRecord::Record grad(TorchRecord::Record tensor) const { return record_->grad(tensor); }
  // Keeps a gradient that has a record where its tensor is given another one.
  TorchShim::Shared share_grad(TorchRecord::Record tensor) const { return shim_->share(record_->grad_place(tensor)); }

  // Only hints, for what will be read soon: the Python object, torch's record behind it, and what that points at.
  static void prefetch_object(PyObject* object) { __builtin_prefetch(object); }
  static void prefetch_record(TorchRecord::Record tensor) {
    if (tensor != nullptr) TorchRecord::prefetch(tensor);
  }
  void prefetch_autograd(TorchRecord::Record tensor) const {
    if (tensor != nullptr) record_->prefetch_autograd(tensor);
  }
  void prefetch_grad(TorchRecord::Record tensor) const {
    if (tensor != nullptr) record_->prefetch_grad(tensor);
  }
  void prefetch_storage(TorchRecord::Record tensor) const {
    if (tensor != nullptr) record_->prefetch_storage(tensor);
  }

  // Of a tensor that read_fast reads; nothing where records are not compared.
  std::optional<TensorLayout> layout(PyObject* object) const {
    TensorView view;
    if (!record_ || !read_fast(object, view) || !view.dtype) return std::nullopt;
    const auto words = record_->layout(record_->of(object));
    return words ? std::optional(TensorLayout{*words, element_size(*view.dtype)}) : std::nullopt;
  }

  // The address of a tensor of this layout; null for others, and where reading takes more. Needs no lock.
  void* data_if(TorchRecord::Record tensor, const TensorLayout& layout) const {
    return tensor != nullptr ? record_->data_if(tensor, layout.words, layout.item_size) : nullptr;
  }

  // Neither a subclass, which may hold no memory of its own, nor something else.
  bool is_plain(PyObject* object) const {
    return Py_TYPE(object) == as_type(tensor_) || Py_TYPE(object) == as_type(parameter_);
  }

  bool is_tensor(py::handle object) const { return is_plain(object.ptr()) || py::isinstance(object, tensor_); }

  // The gradient of a plain tensor, or None: `tensor.grad` without the search for the attribute.
  py::object grad(PyObject* tensor) const {
    PyObject* const descriptor = grad_.ptr();
    PyObject* grad =
        Py_TYPE(descriptor)->tp_descr_get(descriptor, tensor, reinterpret_cast<PyObject*>(Py_TYPE(tensor)));
    if (grad == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(grad);
  }

  TensorView read(py::handle object) const {
    TensorView view;
    return read_fast(object.ptr(), view) ? std::move(view) : read_attributes(object);
  }

  // False for what only its attributes can tell about. Needs no lock of the interpreter.
  bool read_fast(PyObject* object, TensorView& view) const {
    TorchShim::Tensor t;
    if (shim_ && is_plain(object) && shim_->read(object, t)) {
      view.data = t.data;
      view.shape = t.shape;
      view.strides = t.strides;
      view.ndim = static_cast<int>(t.ndim);
      for (int d = 0; d < view.ndim; ++d) view.numel *= t.shape[d];
      if ((t.storage_bytes == 0 || view.data == nullptr) && view.numel > 0)
        return false;  // torch's efficient zeros, and freed storages
      for (const auto& [code, dtype] : codes_) {
        if (t.dtype == code) view.dtype = dtype;
      }
      view.device = t.on_cuda ? TensorView::Device::cuda : TensorView::Device::cpu;
      view.device_index = t.device_index;
      return true;
    }
    return false;
  }

  // The same, and through attributes where no tensor is read fast.
  bool read_strided(PyObject* object, TensorView& view) const {
    if (shim_) return read_fast(object, view);
    const py::handle tensor = object;
    if (!is_plain(object) || !py::object(tensor.attr("layout")).is(strided_)) return false;
    view = read_attributes(tensor);
    return view.data != nullptr || view.numel == 0;
  }

 private:
  static PyTypeObject* as_type(const py::object& type) { return reinterpret_cast<PyTypeObject*>(type.ptr()); }

  TensorView read_attributes(py::handle object) const {
    if (!py::isinstance(object, tensor_)) {
      throw py::type_error(std::string("expected a torch.Tensor, got ") + Py_TYPE(object.ptr())->tp_name);
    }
    TensorView view;
    const py::object storage = object.attr("untyped_storage")();
    if (storage.attr("data_ptr")().cast<std::uintptr_t>() != 0) {
      view.data = reinterpret_cast<void*>(object.attr("data_ptr")().cast<std::uintptr_t>());
    }
    const auto shape = py::cast<std::vector<std::int64_t>>(py::tuple(object.attr("shape")));
    const auto strides = py::cast<std::vector<std::int64_t>>(object.attr("stride")());
    view.ndim = static_cast<int>(shape.size());
    view.owned = std::make_unique<std::int64_t[]>(2 * shape.size());
    std::copy(shape.begin(), shape.end(), view.owned.get());
    std::copy(strides.begin(), strides.end(), view.owned.get() + view.ndim);
    view.shape = view.owned.get();
    view.strides = view.shape + view.ndim;
    for (int d = 0; d < view.ndim; ++d) view.numel *= view.shape[d];
    view.is_negated = object.attr("is_neg")().cast<bool>();
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

  std::optional<TorchShim> shim_;
  std::optional<TorchRecord> record_;
  std::array<std::pair<std::int32_t, DType>, 6> codes_{};
  py::object tensor_, parameter_, grad_, strided_, increment_version_;
  std::vector<py::object> dtypes_;
};

}  // namespace superfine
