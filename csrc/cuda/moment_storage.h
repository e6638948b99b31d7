// Parameters and moments in the optimizers' kernels: how a tile of them is stored, read, rounded and written. Each
// class stands for a tensor from its `begin`-th element on and holds the tile that was read last. `key` is the random
// one of the step.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/dtype.h"
#include "cuda/block_reduce.h"
#include "cuda/moment_table.h"
#include "cuda/pack.h"
#include "cuda/tile.h"
#include "math/moments.h"
#include "math/quantized.h"
#include "math/random.h"

namespace superfine::cuda {

// float32, bfloat16 or float16, as the tensor says. A kernel branches on it where it reads and where it writes: one of
// its own for every type would double this module.
struct AnyFloat {};

// What is computed in.
template <class E>
using Math = std::conditional_t<std::is_same<E, AnyFloat>::value, float, Opmath<E>>;

// Calls f(E{}), or f of the type that `dtype` says.
template <class E, class F>
__device__ __forceinline__ void with_type(DType dtype, const F& f) {
  if constexpr (std::is_same<E, AnyFloat>::value) {
    switch (dtype) {
      case DType::bf16: return f(bf16{});
      case DType::f16: return f(f16{});
      default: return f(float{});
    }
  } else {
    f(E{});
  }
}

// `AnyTile` is `Tile` or its variant that moves packs.
template <class Tile, class P>
class Params {
 public:
  using T = Opmath<P>;

  __device__ __forceinline__ Params(const MomentEntry& t, std::uint32_t key, std::int64_t begin)
      : param_(static_cast<P*>(t.param) + begin),
        remainder_(kNarrow && t.remainder != nullptr ? t.remainder + begin : nullptr),
        key_(random_key_at(~key, begin)),  // the moments have the other half of the keys
        master_(t.master) {}

  template <class AnyTile>
  __device__ __forceinline__ void read(const AnyTile& tile) {
    high_ = tile.read(param_);
    low_ = tile.read(remainder_, remainder_ != nullptr);
  }
  template <class AnyTile>
  __device__ __forceinline__ void write(const AnyTile& tile) const {
    tile.write(param_, high_);
    if (remainder_ != nullptr) tile.write(remainder_, low_);
  }

  __device__ __forceinline__ T get(int k) const {
    if constexpr (kNarrow) {
      if (master_ == Master::kahan) return widen(high_[k]) + widen(P{low_[k]});
    }
    if constexpr (kBf16) {
      return join(high_[k], low_[k]);  // for low = 0 that is `high`
    } else {
      return widen(high_[k]);
    }
  }

  // All at once, with a loop for each kind: a branch for each element would cost more than its work.
  __device__ __forceinline__ void set(const Tile& tile, const T (&x)[Tile::kElements]) {
    if constexpr (kBf16) {
      if (master_ == Master::split) {
        return for_each([&](int k, bf16& high, std::uint16_t& low) { split(x[k], &high, &low); });
      }
      if (master_ == Master::stochastic) {
        return for_each([&](int k, bf16& high, std::uint16_t&) {
          store_stochastic(&high, x[k], random_bits(key_, tile.place(k), x[k]));
        });
      }
    }
    if constexpr (kNarrow) {
      if (master_ == Master::kahan) {
        return for_each([&](int k, P& high, std::uint16_t& low) {  // as `store_compensated`
          high = narrow<P>(x[k]);
          const float rest = x[k] - widen(high);
          low = narrow<P>(rest - rest == 0 ? rest : 0.0f).bits;
        });
      }
    }
    for_each([&](int k, P& high, std::uint16_t&) { high = narrow<P>(x[k]); });
  }

 private:
  static constexpr bool kNarrow = sizeof(P) == 2;  // may have a remainder
  static constexpr bool kBf16 = std::is_same<P, bf16>::value;

  template <class F>
  __device__ __forceinline__ void for_each(const F& f) {
#pragma unroll
    for (int k = 0; k < Tile::kElements; ++k) {
      P high;
      std::uint16_t low = 0;
      f(k, high, low);
      high_.set(k, high);
      low_.set(k, low);
    }
  }

  P* param_;
  std::uint16_t* remainder_;
  std::uint32_t key_;
  Master master_;
  typename Tile::template Elements<P> high_;
  typename Tile::template Elements<std::uint16_t> low_;  // zeros without a remainder
};

// Both moments. Numbers are rounded where they are set, as they would fill twice the registers otherwise.
template <class Tile, class S>
class Moments {
 public:
  using T = Opmath<S>;

  __device__ __forceinline__ Moments(const MomentEntry& t, std::uint32_t, std::int64_t begin)
      : exp_avg_(static_cast<S*>(t.exp_avg) + begin), exp_avg_sq_(static_cast<S*>(t.exp_avg_sq) + begin) {}

  template <class AnyTile>
  __device__ __forceinline__ void read(const AnyTile& tile, bool once = false) {
    m_ = tile.read(exp_avg_, true, once);
    v_ = tile.read(exp_avg_sq_, true, once);
  }
  template <class AnyTile>
  __device__ __forceinline__ void write(const AnyTile& tile) const {
    tile.write(exp_avg_, m_);
    tile.write(exp_avg_sq_, v_);
  }

  __device__ __forceinline__ T m(int k) const { return widen(m_[k]); }
  __device__ __forceinline__ T v(int k) const { return widen(v_[k]); }
  template <class M>
  __device__ __forceinline__ void set(int k, M m, M v) {
    m_.set(k, narrow<S>(m));
    v_.set(k, narrow<S>(v));
  }
  __device__ __forceinline__ void finish(const Tile&) {}

 private:
  S* exp_avg_;
  S* exp_avg_sq_;
  typename Tile::template Elements<S> m_, v_;
};

// In 8 bits: the tiles of a warp are one block, so what is set is not stored before all lanes `finish`.
template <class Tile>
class Moments<Tile, std::uint8_t> {
 public:
  __device__ __forceinline__ Moments(const MomentEntry& t, std::uint32_t key, std::int64_t begin)
      : exp_avg_(static_cast<std::uint8_t*>(t.exp_avg) + begin),
        exp_avg_sq_(static_cast<std::uint8_t*>(t.exp_avg_sq) + begin),
        m_scales_(static_cast<float*>(t.max_or_scales) + begin / kQuantBlock),
        v_scales_(m_scales_ + quant_blocks(t.numel)),
        key_(random_key_at(key, begin)) {}

  template <class AnyTile>
  __device__ __forceinline__ void read(const AnyTile& tile, bool once = false) {
    m_ = tile.read(exp_avg_, true, once);
    v_ = tile.read(exp_avg_sq_, true, once);
    m_scale_ = m_scales_[block_of(tile)];
    v_scale_ = v_scales_[block_of(tile)];
  }
  template <class AnyTile>
  __device__ __forceinline__ void write(const AnyTile& tile) const {
    tile.write(exp_avg_, m_);
    tile.write(exp_avg_sq_, v_);
    if (threadIdx.x % kWarp != 0) return;
    m_scales_[block_of(tile)] = m_scale_;
    v_scales_[block_of(tile)] = v_scale_;
  }

  __device__ __forceinline__ float m(int k) const { return dequantize_first(m_[k], m_scale_); }
  __device__ __forceinline__ float v(int k) const { return dequantize_second(v_[k], v_scale_); }
  __device__ __forceinline__ void set(int k, float m, float v) {
    new_m_[k] = m;
    new_v_[k] = v;
  }
  __device__ __forceinline__ void finish(const Tile& tile) {
    static_assert(Tile::kElements * kWarp == kQuantBlock);
    const QuantScale m_new = scale_of<FirstMoment>(tile, new_m_), v_new = scale_of<SecondMoment>(tile, new_v_);
    m_scale_ = m_new.scale;
    v_scale_ = v_new.scale;
#pragma unroll
    for (int k = 0; k < Tile::kElements; ++k) {
      m_.set(k, quantize_first(new_m_[k], m_new));
      v_.set(k, quantize_second(new_v_[k], v_new, random_bits(key_, tile.place(k), new_v_[k])));
    }
  }

 private:
  template <class Kind>
  __device__ __forceinline__ static QuantScale scale_of(const Tile& tile, const float (&x)[Tile::kElements]) {
    std::uint32_t largest = 0;
#pragma unroll
    for (int k = 0; k < Tile::kElements; ++k) {
      if (tile.has(k)) largest = max(largest, float_bits(x[k]) & 0x7fffffffu);
    }
    return quant_scale<Kind>(__reduce_max_sync(0xffffffffu, largest));
  }
  template <class AnyTile>
  __device__ __forceinline__ static int block_of(const AnyTile& tile) {
    return tile.first / static_cast<int>(kQuantBlock);
  }

  std::uint8_t* exp_avg_;
  std::uint8_t* exp_avg_sq_;
  float* m_scales_;
  float* v_scales_;
  std::uint32_t key_;
  typename Tile::template Elements<std::uint8_t> m_, v_;
  float m_scale_, v_scale_;
  float new_m_[Tile::kElements], new_v_[Tile::kElements];
};

// Where elements are read one by one.
template <class Tile>
class Moments<Tile, AnyFloat> {
 public:
  __device__ __forceinline__ Moments(const MomentEntry& t, std::uint32_t, std::int64_t begin)
      : dtype_(t.state_dtype()) {
    const std::int64_t bytes = begin * (dtype_ == DType::f32 ? 4 : 2);
    exp_avg_ = static_cast<char*>(t.exp_avg) + bytes;
    exp_avg_sq_ = static_cast<char*>(t.exp_avg_sq) + bytes;
  }

  __device__ __forceinline__ void read(const Tile& tile, bool once = false) {
    const auto read = [&](auto bits) {
      using Bits = decltype(bits);
      const auto m = tile.read(static_cast<const Bits*>(exp_avg_), true, once);
      const auto v = tile.read(static_cast<const Bits*>(exp_avg_sq_), true, once);
#pragma unroll
      for (int k = 0; k < Tile::kElements; ++k) {
        m_[k] = m[k];
        v_[k] = v[k];
      }
    };
    dtype_ == DType::f32 ? read(std::uint32_t{}) : read(std::uint16_t{});
  }
  __device__ __forceinline__ void write(const Tile& tile) const {
    const auto write = [&](auto bits) {
      using Bits = decltype(bits);
#pragma unroll
      for (int k = 0; k < Tile::kElements; ++k) {
        if (!tile.has(k)) continue;
        static_cast<Bits*>(exp_avg_)[tile.place(k)] = static_cast<Bits>(m_[k]);
        static_cast<Bits*>(exp_avg_sq_)[tile.place(k)] = static_cast<Bits>(v_[k]);
      }
    };
    dtype_ == DType::f32 ? write(std::uint32_t{}) : write(std::uint16_t{});
  }

  __device__ __forceinline__ float m(int k) const { return widened(m_[k]); }
  __device__ __forceinline__ float v(int k) const { return widened(v_[k]); }
  __device__ __forceinline__ void set(int k, float m, float v) {
    m_[k] = narrowed(m);
    v_[k] = narrowed(v);
  }
  __device__ __forceinline__ void finish(const Tile&) {}

 private:
  __device__ __forceinline__ float widened(std::uint32_t bits) const {
    const auto half = static_cast<std::uint16_t>(bits);
    const float x = dtype_ == DType::bf16 ? widen(bf16{half}) : widen(f16{half});
    return dtype_ == DType::f32 ? bits_float(bits) : x;
  }
  __device__ __forceinline__ std::uint32_t narrowed(float x) const {
    const std::uint32_t half = dtype_ == DType::bf16 ? narrow<bf16>(x).bits : narrow<f16>(x).bits;
    return dtype_ == DType::f32 ? float_bits(x) : half;
  }

  void* exp_avg_;
  void* exp_avg_sq_;
  DType dtype_;
  std::uint32_t m_[Tile::kElements], v_[Tile::kElements];
};

}  // namespace superfine::cuda
