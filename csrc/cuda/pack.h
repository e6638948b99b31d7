// Packs of elements that move in one memory access, and conversions in one instruction.
//
// `widen` and `narrow` round as `load` and `store` of core/dtype.h do, bit for bit; only the quiet
// NaN that they write differs (0x7fff here).
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace superfine::cuda {

template <class E, int N>
struct alignas(sizeof(E) * N) Pack {
  E at[N];
};

template <int N, class E>
__device__ __forceinline__ Pack<E, N> load_pack(const E* p) {
  return *reinterpret_cast<const Pack<E, N>*>(p);
}
template <int N, class E>
__device__ __forceinline__ void store_pack(E* p, const Pack<E, N>& pack) {
  *reinterpret_cast<Pack<E, N>*>(p) = pack;
}

__device__ __forceinline__ float load_once(const float* p) { return __ldcs(p); }
__device__ __forceinline__ double load_once(const double* p) { return __ldcs(p); }
__device__ __forceinline__ std::uint8_t load_once(const std::uint8_t* p) { return __ldcs(p); }
template <class E>
__device__ __forceinline__ E load_once(const E* p) {
  return {__ldcs(&p->bits)};
}

// Zeros that nobody reads soon.
__device__ __forceinline__ void store_zero(float* p) { __stcs(p, 0.0f); }
__device__ __forceinline__ void store_zero(double* p) { __stcs(p, 0.0); }
template <class E>
__device__ __forceinline__ void store_zero(E* p) {
  __stcs(&p->bits, static_cast<unsigned short>(0));
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return load(x); }
__device__ __forceinline__ float widen(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

template <class E>
__device__ __forceinline__ E narrow(Opmath<E> x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
__device__ __forceinline__ f16 narrow<f16>(float x) {
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// The elements that a thread holds at a time: R packs of N, kStride apart, the first one at `first`. Packs from `end`
// on do not exist; they are zeros where they are read, and not written.
template <int N, int R, int kStride>
struct Tile {
  static constexpr int kElements = N * R;

  template <class E>
  struct Elements {
    Pack<E, N> packs[R];

    __device__ __forceinline__ E& operator[](int k) { return packs[k / N].at[k % N]; }
    __device__ __forceinline__ const E& operator[](int k) const { return packs[k / N].at[k % N]; }
  };

  // Where the k-th element lies, and whether it exists.
  __device__ __forceinline__ int place(int k) const { return first + k / N * kStride + k % N; }
  __device__ __forceinline__ bool has(int k) const { return first + k / N * kStride < end; }

  template <class E>
  __device__ __forceinline__ Elements<E> read(const E* x, bool present = true) const {
    Elements<E> elements = {};
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (present && has(r * N)) elements.packs[r] = load_pack<N>(x + place(r * N));
    }
    return elements;
  }
  // Of what nobody reads again: it leaves the L2 cache first.
  template <class E>
  __device__ __forceinline__ Elements<E> read_once(const E* x, bool present = true) const {
    static_assert(N == 1);
    Elements<E> elements = {};
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (present && has(r)) elements[r] = load_once(x + place(r));
    }
    return elements;
  }
  template <class E>
  __device__ __forceinline__ void write(E* x, const Elements<E>& elements) const {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (has(r * N)) store_pack(x + place(r * N), elements.packs[r]);
    }
  }

  int first, end;
};

}  // namespace superfine::cuda
