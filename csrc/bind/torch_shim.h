// Reads what torch knows of a tensor through the C functions that libtorch exports for compiled models
// ("AOTInductor C shim", torch/csrc/inductor/aoti_torch/c/shim.h, whose ABI torch keeps stable).
//
// The shim takes a pointer to an at::Tensor, and torch's Python object holds one. Where in the object is
// no part of any interface, so it is looked up once: `Tensor._cdata` is the word that an at::Tensor
// consists of. If the word is not found, or a function is missing, the shim is not used.
//
// No function tells of torch's negative bit: that the tensor is minus what its memory holds (`torch._neg_view`). It is
// one bit of torch's record, which is looked up in the same way, by comparing tensors with such views of them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <new>
#include <optional>

#ifdef __unix__
#include <dlfcn.h>
#endif

#include "bind/torch_record.h"

namespace superfine {

class TorchShim {
 public:
  // `negated` are views with the negative bit of `tensors`, which differ in all else and of which the i-th is (2, i).
  static std::optional<TorchShim> find(const pybind11::list& tensors, const pybind11::list& negated,
                                       pybind11::handle parameter) {
    TorchShim shim;
    const auto word = word_of(tensors[0]);
    if (!word || word_of(parameter) != word || !shim.load()) return std::nullopt;
    shim.word_ = *word;
    return shim.find_negative(tensors, negated) ? std::optional(shim) : std::nullopt;
  }

  struct Dtypes {
    std::int32_t f32, bf16, f16, f64, i16, u8;
  };

  struct Tensor {
    void* data;
    std::int64_t *shape, *strides;
    std::int64_t ndim, storage_bytes;
    std::int32_t dtype;  // one of `dtypes`, or another
    bool on_cuda;        // else on the CPU
    std::int32_t device_index;
  };

  // False for what is neither strided nor on the CPU or a GPU, what has the negative bit, and where torch reports an
  // error.
  bool read(PyObject* object, Tensor& t) const {
    if ((record(object)[negative_word_] & negative_bit_) != 0) return false;
    void* const handle = reinterpret_cast<void**>(object) + word_;
    std::int32_t layout, device;
    if (layout_(handle, &layout) != 0 || layout != strided_ || device_type_(handle, &device) != 0) return false;
    t.on_cuda = device == cuda_;
    if (device != cpu_ && !t.on_cuda) return false;
    t.device_index = 0;
    if (t.on_cuda && device_index_(handle, &t.device_index) != 0) return false;
    return dtype_(handle, &t.dtype) == 0 && dim_(handle, &t.ndim) == 0 && sizes_(handle, &t.shape) == 0 &&
           strides_(handle, &t.strides) == 0 && data_(handle, &t.data) == 0 &&
           storage_size_(handle, &t.storage_bytes) == 0;
  }

  // Another reference to the at::Tensor at this address. Costs a Python object less than one that Python holds.
  using Shared = std::unique_ptr<void, std::int32_t (*)(void*)>;
  Shared share(const void* tensor) const {
    void* made = nullptr;
    if (share_(const_cast<void*>(tensor), &made) != 0) throw std::bad_alloc();
    return {made, delete_};
  }

  int impl_word() const { return word_; }

  Dtypes dtypes{};

 private:
  template <class T>
  using Get = std::int32_t (*)(void* handle, T* value);

  static std::optional<int> word_of(pybind11::handle tensor) {
    const auto impl = tensor.attr("_cdata").cast<std::uintptr_t>();
    const auto* words = reinterpret_cast<const std::uintptr_t*>(tensor.ptr());
    const int count = static_cast<int>(Py_TYPE(tensor.ptr())->tp_basicsize / sizeof(void*));
    for (int i = sizeof(PyObject) / sizeof(void*); i < count; ++i) {
      if (words[i] == impl) return i;
    }
    return std::nullopt;
  }

  const std::uint64_t* record(PyObject* object) const {
    return reinterpret_cast<const std::uint64_t* const*>(object)[word_];
  }

  // The bit that every one of `negated` has and its tensor has not, in a word that differs in nothing else. Addresses
  // in a record may differ in one bit by chance, but not in the same one for every pair.
  bool find_negative(const pybind11::list& tensors, const pybind11::list& negated) {
    constexpr int kTwoByThree = 3;
    const auto first = TorchRecord::first_word(record(tensors[kTwoByThree].ptr()));
    if (!first) return false;
    int found = 0;
    for (int word = 0; word < TorchRecord::words(*first); ++word) {
      std::uint64_t bits = ~std::uint64_t{0};
      for (std::size_t i = 0; i < tensors.size(); ++i) {
        const std::uint64_t before = record(tensors[i].ptr())[word], after = record(negated[i].ptr())[word];
        const std::uint64_t bit = before ^ after;
        bits &= (bit & (bit - 1)) == 0 ? bit & after : 0;
      }
      if (bits == 0) continue;
      ++found;
      negative_word_ = word;
      negative_bit_ = bits;
    }
    return found == 1;
  }

  bool load() {
#ifdef __unix__
    void* const torch = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);
    if (torch == nullptr) return false;
    bool found = true;
    const auto get = [&](const char* name, auto& function) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(torch, name));
      found = found && function != nullptr;
    };
    const auto code = [&](const char* name, std::int32_t& value) {
      std::int32_t (*function)() = nullptr;
      get(name, function);
      if (function != nullptr) value = function();
    };
    get("aoti_torch_get_data_ptr", data_);
    get("aoti_torch_get_storage_size", storage_size_);
    get("aoti_torch_get_sizes", sizes_);
    get("aoti_torch_get_strides", strides_);
    get("aoti_torch_get_dim", dim_);
    get("aoti_torch_get_dtype", dtype_);
    get("aoti_torch_get_layout", layout_);
    get("aoti_torch_get_device_type", device_type_);
    get("aoti_torch_get_device_index", device_index_);
    get("aoti_torch_new_tensor_handle", share_);
    get("aoti_torch_delete_tensor_object", delete_);
    code("aoti_torch_layout_strided", strided_);
    code("aoti_torch_device_type_cpu", cpu_);
    code("aoti_torch_device_type_cuda", cuda_);
    code("aoti_torch_dtype_float32", dtypes.f32);
    code("aoti_torch_dtype_bfloat16", dtypes.bf16);
    code("aoti_torch_dtype_float16", dtypes.f16);
    code("aoti_torch_dtype_float64", dtypes.f64);
    code("aoti_torch_dtype_int16", dtypes.i16);
    code("aoti_torch_dtype_uint8", dtypes.u8);
    return found;
#else
    return false;
#endif
  }

  int word_ = 0;
  int negative_word_ = 0;
  std::uint64_t negative_bit_ = 0;
  Get<void*> data_ = nullptr;
  Get<std::int64_t*> sizes_ = nullptr, strides_ = nullptr;
  Get<std::int64_t> dim_ = nullptr, storage_size_ = nullptr;
  Get<void*> share_ = nullptr;
  std::int32_t (*delete_)(void*) = nullptr;
  Get<std::int32_t> dtype_ = nullptr, layout_ = nullptr, device_type_ = nullptr, device_index_ = nullptr;
  std::int32_t strided_ = 0, cpu_ = 0, cuda_ = 0;
};

}  // namespace superfine
