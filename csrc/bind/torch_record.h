// Compares torch's record of a tensor, word by word, with what it held when the tensor was last read in full: where
// nothing has changed, only its address is read anew. That takes a few nanoseconds where torch_shim.h takes 25.
//
// The words that tell shape, strides, type, device and flags follow each other from the number of dimensions to the
// record's end, the offset into the storage among them. Where those, the storage's address and the version are is no
// part of any interface and differs between versions of torch, so it is looked up once, in tensors that differ in one
// thing each. If anything is elsewhere, or a difference does not show, records are not used.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace superfine {

class TorchRecord {
 public:
  // Where torch's record of a tensor begins.
  using Record = const std::uint64_t*;

  // What tells shape, strides, type, device and flags.
  using Words = std::array<std::uint64_t, 15>;

  // `impl_word` is the word of a tensor's Python object that holds its record's address.
  static std::optional<TorchRecord> find(const pybind11::module_& torch, int impl_word) {
    TorchRecord record;
    record.impl_word_ = impl_word;
    const auto first = first_word(record.of(zeros(torch, "cpu", "float32", 2, 3)));
    if (!first) return std::nullopt;
    record.first_ = *first;
    if (!record.find_storage(torch) || !record.find_offset(torch) || !record.tells_apart(torch) ||
        !record.find_version(torch) || !record.find_grad(torch)) {
      return std::nullopt;
    }
    return record;
  }

  // Where in the record of a contiguous tensor of shape (2, 3) the number of dimensions is, with room for five sizes
  // and five strides behind it. Before torch 2.13 one more word stands before it. Reads nothing beyond the shorter.
  static std::optional<int> first_word(Record tensor) {
    for (const int first : {7, 8}) {
      const Record sizes = tensor + first + 1, strides = sizes + kInlineDims;
      if (tensor[first] == 2 && sizes[0] == 2 && sizes[1] == 3 && strides[0] == 3 && strides[1] == 1) return first;
    }
    return std::nullopt;
  }
  static int words(int first) { return first + static_cast<int>(std::tuple_size<Words>::value); }

  Record of(PyObject* tensor) const { return reinterpret_cast<const Record*>(tensor)[impl_word_]; }

  // Of a tensor's gradient; null where it has none. Costs a Python object less than `tensor.grad`.
  Record grad(Record tensor) const {
    const Record* const place = grad_place(tensor);
    return place == nullptr || *place == undefined_ ? nullptr : *place;
  }

  // Where the at::Tensor of the gradient is, which consists of its record's address; null where autograd keeps nothing.
  const Record* grad_place(Record tensor) const {
    const auto* const autograd = reinterpret_cast<const Record*>(tensor[autograd_word_]);
    return autograd == nullptr ? nullptr : autograd + grad_word_;
  }

  // Nothing for more dimensions than a record has room for: their sizes lie elsewhere.
  std::optional<Words> layout(Record tensor) const {
    const Record from = tensor + first_;
    if (*from > kInlineDims) return std::nullopt;
    const Words& mask = masks()[*from];
    Words layout;
    for (std::size_t w = 0; w < layout.size(); ++w) layout[w] = from[w] & mask[w];
    return layout;
  }

  // Where the elements of a tensor of this layout begin; null if its layout is another, and where memory is not simply
  // its storage's own: shared copy-on-write, borrowed from another library, or none.
  void* data_if(Record record, const Words& layout, std::int64_t item_size) const {
    const Words& mask = masks()[layout[0]];
    std::uint64_t difference = 0;
    for (std::size_t w = 0; w < layout.size(); ++w) difference |= (record[first_ + w] & mask[w]) ^ layout[w];
    if (difference != 0) return nullptr;
    const auto storage = reinterpret_cast<Record>(record[storage_word_]);
    const std::uint64_t data = storage[data_word_];
    if (storage[owner_word_] != data || data == 0) return nullptr;
    return reinterpret_cast<char*>(data) + static_cast<std::int64_t>(record[first_ + kOffset]) * item_size;
  }

  // Counts the tensor's version up, as `torch.autograd.graph.increment_version` does; false for a tensor without one,
  // which is made in inference mode.
  bool bump_version(Record tensor) const {
    auto* const counter = reinterpret_cast<std::uint64_t*>(tensor[version_word_]);
    if (counter == nullptr) return false;
    __atomic_fetch_add(reinterpret_cast<std::uint32_t*>(&counter[kVersion]), 1, __ATOMIC_RELAXED);
    return true;
  }

  // Ask for what a step reads of a tensor, one after the other as the addresses arrive: what autograd keeps of it, the
  // record of its gradient, and its storage.
  void prefetch_autograd(Record tensor) const {
    __builtin_prefetch(reinterpret_cast<Record>(tensor[autograd_word_]) + grad_word_);
  }
  void prefetch_grad(Record tensor) const {
    if (const Record found = grad(tensor)) prefetch(found);
  }
  void prefetch_storage(Record tensor) const { __builtin_prefetch(reinterpret_cast<Record>(tensor[storage_word_])); }

  static void prefetch(Record tensor) {
    constexpr int kWords = 22, kWordsPerLine = 8;
    for (int word = 0; word < kWords; word += kWordsPerLine) __builtin_prefetch(tensor + word);
  }

 private:
  static constexpr int kVersion = 2;  // of its counter, behind a virtual table and a count of references
  static constexpr std::size_t kInlineDims = 5;
  static constexpr std::size_t kOffset = 1 + 2 * kInlineDims;  // behind the number of dimensions, sizes and strides

  // What counts of the words, by the number of dimensions: not the offset, and of five sizes and five strides only
  // those that there are. The others were never written.
  static const std::array<Words, kInlineDims + 1>& masks() {
    static const auto made = [] {
      std::array<Words, kInlineDims + 1> masks;
      for (std::size_t dims = 0; dims <= kInlineDims; ++dims) {
        masks[dims].fill(~std::uint64_t{0});
        masks[dims][kOffset] = 0;
        for (std::size_t d = dims; d < kInlineDims; ++d) masks[dims][1 + d] = masks[dims][1 + kInlineDims + d] = 0;
      }
      return masks;
    }();
    return made;
  }

  Record of(const pybind11::object& tensor) const { return of(tensor.ptr()); }

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
    for (storage_word_ = 0; of(tensor)[storage_word_] != storage; ++storage_word_) {
      if (storage_word_ + 1 == first_) return false;
    }
    const auto fields = reinterpret_cast<Record>(storage);
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

  // The counter that in-place operations count up, behind a word of a tensor's record.
  bool find_version(const pybind11::module_& torch) {
    const pybind11::object tensor = zeros(torch, "cpu", "float32", 3);
    const auto version = [&] { return tensor.attr("_version").cast<std::uint32_t>(); };
    const auto shown = [&](int w) {
      const auto fields = reinterpret_cast<Record>(of(tensor)[w]);
      return fields != nullptr && static_cast<std::uint32_t>(fields[kVersion]) == version();
    };
    std::vector<int> places;
    for (int w = storage_word_ + 1; w < first_; ++w) {
      if (shown(w)) places.push_back(w);
    }
    constexpr int kTimes = 5;
    for (int i = 0; i < kTimes; ++i) {
      tensor.attr("zero_")();
      places.erase(std::remove_if(places.begin(), places.end(), [&](int w) { return !shown(w); }), places.end());
    }
    if (places.size() != 1) return false;
    version_word_ = places[0];
    const std::uint32_t before = version();
    return bump_version(of(tensor)) && version() == before + 1;
  }

  // What autograd keeps of a tensor that requires gradients, in there the gradient's record, and what stands there
  // without one.
  bool find_grad(const pybind11::module_& torch) {
    constexpr int kAutogradWords = 8;
    const pybind11::object plain = zeros(torch, "cpu", "float32", 3), leaf = zeros(torch, "cpu", "float32", 3);
    leaf.attr("requires_grad_")();
    for (autograd_word_ = storage_word_ + 1; of(plain)[autograd_word_] != 0 || of(leaf)[autograd_word_] == 0;) {
      if (++autograd_word_ == first_) return false;
    }
    const auto* const autograd = reinterpret_cast<const Record*>(of(leaf)[autograd_word_]);
    std::array<Record, kAutogradWords> without{};
    std::copy_n(autograd, kAutogradWords, without.begin());
    const pybind11::object grad = zeros(torch, "cpu", "float32", 3), other = zeros(torch, "cpu", "float32", 3);
    leaf.attr("grad") = grad;
    for (grad_word_ = 0; autograd[grad_word_] != of(grad);) {
      if (++grad_word_ == kAutogradWords) return false;
    }
    undefined_ = without[grad_word_];
    leaf.attr("grad") = other;
    if (this->grad(of(leaf)) != of(other)) return false;
    leaf.attr("grad") = pybind11::none();
    return this->grad(of(leaf)) == nullptr && this->grad(of(plain)) == nullptr;
  }

  // Two views that differ in their offset alone differ in its word.
  bool find_offset(const pybind11::module_& torch) const {
    const pybind11::object base = zeros(torch, "cpu", "float32", 8);
    const auto view = [&](int begin) { return base.attr("narrow")(0, begin, 2); };
    const pybind11::object one = view(1), two = view(2);
    return of(one)[first_ + kOffset] == 1 && of(two)[first_ + kOffset] == 2;
  }

  // Tensors that differ in one thing each have different layouts. (Equal ones have equal layouts but for padding that
  // nobody wrote, and then are read in full.)
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
      const auto own = layout(of(others[i]));
      if (own == layout(of(plain))) return false;
      for (std::size_t j = 0; j < i; ++j) {
        if (own == layout(of(others[j]))) return false;
      }
    }
    return of(plain)[first_] == 2 && of(others[2])[first_] == 3;
  }

  int impl_word_ = 0, first_ = 0, storage_word_ = 0, data_word_ = 0, owner_word_ = 0;
  int version_word_ = 0, autograd_word_ = 0, grad_word_ = 0;
  Record undefined_ = nullptr;  // that of all tensors which are none
};

}  // namespace superfine
