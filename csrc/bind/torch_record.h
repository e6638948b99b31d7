// Compares torch's record of a tensor, word by word, with what it held when the tensor was last read in full: where
// nothing has changed, only its address is read anew. That takes a few nanoseconds where torch_shim.h takes 25.
//
// The words that tell shape, strides, type, device and flags follow each other from the number of dimensions to the
// record's end, the offset into the storage among them. Where those and the storage's address are is no part of any
// interface, so it is looked up once, in tensors that differ in one thing each. If anything is elsewhere, or a
// difference does not show, records are not compared.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace superfine {

class TorchRecord {
 public:
  static constexpr int kRecordWords = 22;

  // What tells shape, strides, type, device and flags.
  using Words = std::array<std::uint64_t, 15>;

  // `impl_word` is the word of a tensor's Python object that holds its record's address.
  static std::optional<TorchRecord> find(const pybind11::module_& torch, int impl_word) {
    TorchRecord record;
    record.impl_word_ = impl_word;
    if (!record.find_storage(torch) || !record.find_offset(torch) || !record.tells_apart(torch)) return std::nullopt;
    return record;
  }

  // Nothing for more dimensions than a record has room for: their sizes lie elsewhere.
  std::optional<Words> layout(PyObject* tensor) const {
    constexpr std::uint64_t kInlineDims = 5;
    const std::uint64_t* const from = words(tensor) + kFirst;
    if (*from > kInlineDims) return std::nullopt;
    Words layout;
    for (std::size_t w = 0; w < layout.size(); ++w) layout[w] = from[w] & mask(w);
    return layout;
  }

  // Where the elements of a tensor of this layout begin; null if its layout is another, and where memory is not simply
  // its storage's own: shared copy-on-write, borrowed from another library, or none.
  void* data_if(PyObject* tensor, const Words& layout, std::int64_t item_size) const {
    const std::uint64_t* const record = words(tensor);
    std::uint64_t difference = 0;
    for (std::size_t w = 0; w < layout.size(); ++w) difference |= (record[kFirst + w] & mask(w)) ^ layout[w];
    if (difference != 0) return nullptr;
    const auto* const storage = reinterpret_cast<const std::uint64_t*>(record[storage_word_]);
    const std::uint64_t data = storage[data_word_];
    if (storage[owner_word_] != data || data == 0) return nullptr;
    return reinterpret_cast<char*>(data) + static_cast<std::int64_t>(record[kOffset]) * item_size;
  }

  // Asks for the storage's record, when the tensor's has arrived.
  void prefetch_storage(PyObject* tensor) const {
    __builtin_prefetch(reinterpret_cast<const void*>(words(tensor)[storage_word_]));
  }

 private:
  static constexpr int kFirst = kRecordWords - static_cast<int>(std::tuple_size<Words>::value);
  static constexpr int kOffset = kFirst + 11;  // behind the number of dimensions, five sizes and five strides

  static constexpr std::uint64_t mask(std::size_t w) { return kFirst + w == kOffset ? 0 : ~std::uint64_t{0}; }

  const std::uint64_t* words(PyObject* tensor) const {
    return reinterpret_cast<const std::uint64_t* const*>(tensor)[impl_word_];
  }

  // Whatever torch's default device and dtype are now.
  template <class... Sizes>
  static pybind11::object zeros(const pybind11::module_& torch, const char* device, const char* dtype, Sizes... sizes) {
    return torch.attr("zeros")(sizes..., pybind11::arg("device") = device, pybind11::arg("dtype") = torch.attr(dtype));
  }

  // The storage of a tensor, and the two words in it that hold its memory's address: one owns the memory, and holds
  // something else where it is shared copy-on-write.
  bool find_storage(const pybind11::module_& torch) {
    constexpr int kStorageWords = 8;
    const pybind11::object tensor = zeros(torch, "cpu", "float32", 3);
    const auto storage_of = [](const pybind11::object& t) {
      return t.attr("untyped_storage")().attr("_cdata").cast<std::uint64_t>();
    };
    const std::uint64_t storage = storage_of(tensor), data = tensor.attr("data_ptr")().cast<std::uint64_t>();
    for (storage_word_ = 0; words(tensor.ptr())[storage_word_] != storage; ++storage_word_) {
      if (storage_word_ + 1 == kFirst) return false;
    }
    const auto* const fields = reinterpret_cast<const std::uint64_t*>(storage);
    std::vector<int> places;
    for (int w = 0; w < kStorageWords; ++w) {
      if (fields[w] == data) places.push_back(w);
    }
    if (places.size() != 2) return false;
    data_word_ = places[0];
    owner_word_ = places[1];
    if (!pybind11::hasattr(torch, "_lazy_clone")) return false;
    const pybind11::object clone = torch.attr("_lazy_clone")(tensor);
    return storage_of(tensor) == storage && fields[data_word_] == data && fields[owner_word_] != data;
  }

  // Two views that differ in their offset alone differ in its word alone.
  bool find_offset(const pybind11::module_& torch) const {
    const pybind11::object base = zeros(torch, "cpu", "float32", 8);
    const auto view = [&](int begin) { return base.attr("narrow")(0, begin, 2); };
    const pybind11::object one = view(1), two = view(2);
    if (words(one.ptr())[kOffset] != 1 || words(two.ptr())[kOffset] != 2) return false;
    return layout(one.ptr()) == layout(two.ptr());
  }

  // Tensors that differ in one thing each have different layouts, and equal ones the same.
  bool tells_apart(const pybind11::module_& torch) const {
    const auto of_shape = [&](auto... sizes) { return zeros(torch, "cpu", "float32", sizes...); };
    const pybind11::object plain = of_shape(2, 2);
    std::vector<pybind11::object> others = {of_shape(4),
                                            of_shape(2, 3),
                                            of_shape(1, 2, 2),
                                            plain.attr("t")(),
                                            plain.attr("to_sparse")(),
                                            torch.attr("_neg_view")(plain),
                                            zeros(torch, "meta", "float32", 2, 2)};
    for (const char* dtype : {"float16", "bfloat16", "float64", "int16", "uint8", "complex64"}) {
      others.push_back(zeros(torch, "cpu", dtype, 2, 2));
    }
    for (std::size_t i = 0; i < others.size(); ++i) {
      const auto own = layout(others[i].ptr());
      if (own == layout(plain.ptr())) return false;
      for (std::size_t j = 0; j < i; ++j) {
        if (own == layout(others[j].ptr())) return false;
      }
    }
    const pybind11::object same = of_shape(2, 2);
    return words(plain.ptr())[kFirst] == 2 && layout(same.ptr()) == layout(plain.ptr());
  }

  int impl_word_ = 0, storage_word_ = 0, data_word_ = 0, owner_word_ = 0;
};

}  // namespace superfine
