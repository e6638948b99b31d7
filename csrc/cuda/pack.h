// Packs of elements that move in one memory access, and conversions in one instruction.
//
// `widen` and `narrow` round as `load` and `store` of core/dtype.h do, bit for bit; only the quiet
// NaN that they write differs (0x7fff here).
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace superfine::cuda {

template <class E, int N>
struct alignas(sizeof(E) * N < 16 ? sizeof(E) * N : 16) Pack {
  E at[N];
};

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

}  // namespace superfine::cuda
