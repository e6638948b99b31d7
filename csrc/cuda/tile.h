// The elements of a tensor that a thread of an optimizer's kernel holds at a time, and how they come and go.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/pack.h"

namespace superfine::cuda {

// A load of what nobody reads again: it leaves the L2 cache first.
template <class E>
__device__ __forceinline__ E load_once(const E* p) {
  if constexpr (std::is_class<E>::value) {
    return {__ldcs(&p->bits)};
  } else {
    return __ldcs(p);
  }
}

// Zeros that nobody reads soon.
template <class E>
__device__ __forceinline__ void store_zero(E* p) {
  if constexpr (std::is_class<E>::value) {
    __stcs(&p->bits, decltype(p->bits){0});
  } else {
    __stcs(p, E{0});
  }
}

// R packs of N elements in registers: narrow ones share a register, also where they were loaded one by one.
template <class E, int N, int R>
struct Elements {
  using Word = std::conditional_t<sizeof(E) < 4 && sizeof(E) * N % 4 == 0, std::uint32_t, E>;
  static constexpr int kInWord = sizeof(Word) / sizeof(E), kWords = N / kInWord;

  Pack<Word, kWords> packs[R];

  __device__ __forceinline__ E operator[](int k) const {
    const Word& word = packs[k / N].at[k % N / kInWord];
    if constexpr (kInWord == 1) {
      return word;
    } else {
      const auto bits = static_cast<Bits>(word >> shift(k));
      E element;
      std::memcpy(&element, &bits, sizeof bits);
      return element;
    }
  }
  __device__ __forceinline__ void set(int k, E element) {
    Word& word = packs[k / N].at[k % N / kInWord];
    if constexpr (kInWord == 1) {
      word = element;
    } else {
      Bits bits;
      std::memcpy(&bits, &element, sizeof bits);
      const Word mask = static_cast<Word>(static_cast<Bits>(-1)) << shift(k);
      word = (word & ~mask) | static_cast<Word>(bits) << shift(k);
    }
  }

 private:
  using Bits = std::conditional_t<sizeof(E) == 1, std::uint8_t, std::uint16_t>;
  __device__ static constexpr int shift(int k) { return k % kInWord * 8 * static_cast<int>(sizeof(E)); }
};

// Which elements a thread holds at a time: R packs of N, kStride apart, the first one at `first`. Those from `end` on
// do not exist: they are zeros where they are read, and not written. kPacked says that all exist and packs are aligned.
template <int N, int R, int kStride, bool kPacked = false>
struct Tile {
  static constexpr int kElements = N * R;
  template <class E>
  using Elements = cuda::Elements<E, N, R>;
  template <class E>
  using Packed = std::remove_reference_t<decltype(Elements<E>::packs[0])>;

  int first, end;
  bool packed;

  // Where the k-th element lies, and whether it exists.
  __device__ __forceinline__ int place(int k) const { return first + k / N * kStride + k % N; }
  __device__ __forceinline__ bool has(int k) const { return kPacked || place(k) < end; }

  // Calls f with this tile, or with the one that moves packs. Arithmetic stays outside, as f is compiled for both.
  template <class F>
  __device__ __forceinline__ void access(const F& f) const {
    packed ? f(Tile<N, R, kStride, true>{first, end, packed}) : f(*this);
  }

  // `once` says that nobody reads these elements again soon; packs do not listen to it.
  template <class E>
  __device__ __forceinline__ Elements<E> read(const E* x, bool present = true, bool once = false) const {
    Elements<E> elements = {};
    if (!present) return elements;
    if constexpr (kPacked) {
#pragma unroll
      for (int r = 0; r < R; ++r) elements.packs[r] = *reinterpret_cast<const Packed<E>*>(x + place(r * N));
    } else {
#pragma unroll
      for (int k = 0; k < kElements; ++k) {
        if (has(k)) elements.set(k, once ? load_once(x + place(k)) : x[place(k)]);
      }
    }
    return elements;
  }

  template <class E>
  __device__ __forceinline__ void write(E* x, const Elements<E>& elements) const {
    if constexpr (kPacked) {
#pragma unroll
      for (int r = 0; r < R; ++r) *reinterpret_cast<Packed<E>*>(x + place(r * N)) = elements.packs[r];
    } else {
#pragma unroll
      for (int k = 0; k < kElements; ++k) {
        if (has(k)) x[place(k)] = elements[k];
      }
    }
  }
};

}  // namespace superfine::cuda
