// What an optimizer's kernel works on: a piece of a tensor, and its parameters and moments as they are stored.
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

// The parameters of a tile, which counts from the tensor's `begin`-th element on.
template <class Tile, class P>
struct StoredParams {
  using T = Opmath<P>;
  static constexpr int kElements = Tile::kElements;
  static constexpr bool kNarrow = sizeof(P) == 2;  // may have a remainder
  static constexpr bool kBf16 = std::is_same<P, bf16>::value;

  typename Tile::template Elements<P> high;
  typename Tile::template Elements<std::uint16_t> low;  // zeros without a remainder

  __device__ __forceinline__ T at(int k, Master master) const {
    if constexpr (kNarrow) {
      if (master == Master::kahan) return widen(high[k]) + widen(P{low[k]});
    }
    if constexpr (kBf16) {
      return join(high[k], low[k]);  // for low = 0 that is `high`
    } else {
      return widen(high[k]);
    }
  }

  // A loop for each kind, as a branch for each element would cost more than its work.
  __device__ __forceinline__ void round(const Tile& tile, const T (&x)[kElements], Master master, std::uint32_t key,
                                        std::int64_t begin) {
    if constexpr (kBf16) {
      if (master == Master::split) {
        return for_each([&](int k, bf16& upper, std::uint16_t& lower) { split(x[k], &upper, &lower); });
      }
      if (master == Master::stochastic) {
        return for_each([&](int k, bf16& rounded, std::uint16_t&) {  // the moments have the other half of the keys
          store_stochastic(&rounded, x[k], random_bits(~key, begin + tile.place(k), x[k]));
        });
      }
    }
    if constexpr (kNarrow) {
      if (master == Master::kahan) {
        return for_each([&](int k, P& rounded, std::uint16_t& lost) {  // as `store_compensated`
          rounded = narrow<P>(x[k]);
          const float rest = x[k] - widen(rounded);
          lost = narrow<P>(rest == rest ? rest : 0.0f).bits;
        });
      }
    }
    for_each([&](int k, P& rounded, std::uint16_t&) { rounded = narrow<P>(x[k]); });
  }

 private:
  // Sets what f makes of each element.
  template <class F>
  __device__ __forceinline__ void for_each(const F& f) {
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      P rounded;
      std::uint16_t rest = 0;
      f(k, rounded, rest);
      high.set(k, rounded);
      low.set(k, rest);
    }
  }
};

// Both moments of a tile. Numbers are rounded where they are set, as they would fill twice the registers otherwise.
template <class Tile, class S>
struct StoredMoments {
  using T = Opmath<S>;

  typename Tile::template Elements<S> m, v;

  __device__ __forceinline__ T exp_avg(int k) const { return widen(m[k]); }
  __device__ __forceinline__ T exp_avg_sq(int k) const { return widen(v[k]); }
  template <class M>
  __device__ __forceinline__ void set(int k, M exp_avg, M exp_avg_sq) {
    m.set(k, narrow<S>(exp_avg));
    v.set(k, narrow<S>(exp_avg_sq));
  }
  __device__ __forceinline__ void round(const Tile&, std::uint32_t, std::int64_t) {}
};

// The same in 8 bits: the tiles of a warp are one block, which is rounded when all of it is set.
template <class Tile>
struct StoredMoments<Tile, std::uint8_t> {
  static constexpr int kElements = Tile::kElements;

  typename Tile::template Elements<std::uint8_t> m, v;
  float m_scale, v_scale;

  __device__ __forceinline__ float exp_avg(int k) const { return dequantize_first(m[k], m_scale); }
  __device__ __forceinline__ float exp_avg_sq(int k) const { return dequantize_second(v[k], v_scale); }
  __device__ __forceinline__ void set(int k, float exp_avg, float exp_avg_sq) {
    new_m[k] = exp_avg;
    new_v[k] = exp_avg_sq;
  }
  // The tile counts from the tensor's `begin`-th element on.
  __device__ __forceinline__ void round(const Tile& tile, std::uint32_t key, std::int64_t begin) {
    static_assert(kElements * kWarp == kQuantBlock);
    const QuantScale m_new = scale_of(tile, new_m), v_new = scale_of(tile, new_v);
    m_scale = m_new.scale;
    v_scale = v_new.scale;
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      m.set(k, quantize_first(new_m[k], m_new.inverse));
      v.set(k, quantize_second(new_v[k], v_new.inverse, random_bits(key, begin + tile.place(k), new_v[k])));
    }
  }

 private:
  float new_m[kElements], new_v[kElements];

  __device__ static QuantScale scale_of(const Tile& tile, const float (&x)[kElements]) {
    std::uint32_t largest = 0;
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      if (tile.has(k)) largest = max(largest, float_bits(x[k]) & 0x7fffffffu);
    }
    return quant_scale(__reduce_max_sync(0xffffffffu, largest));
  }
};

// A tensor from its `begin`-th element on.
template <class P, class S>
struct MomentPiece : MomentPointers<P, S> {
  static constexpr bool kQuantized = std::is_same<S, std::uint8_t>::value;

  std::int64_t begin;
  float *m_scales, *v_scales;  // of its blocks

  __device__ MomentPiece(const MomentPointers<P, S>& tensor, std::int64_t begin)
      : MomentPointers<P, S>(tensor), begin(begin) {
    this->param += begin;
    this->grad += begin;
    this->exp_avg += begin;
    this->exp_avg_sq += begin;
    if (this->anchor != nullptr) this->anchor += begin;
    if (this->remainder != nullptr) this->remainder += begin;
    if constexpr (kQuantized) {
      m_scales = this->scales() + begin / kQuantBlock;
      v_scales = m_scales + quant_blocks(this->numel);
    } else if (this->max_or_scales != nullptr) {
      this->max_or_scales = this->max_exp_avg_sq() + begin;
    }
    this->numel -= begin;
  }

  __device__ bool anchored() const { return this->anchor != nullptr; }
  __device__ bool has_remainder() const { return sizeof(P) == 2 && this->remainder != nullptr; }

  template <class AnyTile, class Tile>
  __device__ __forceinline__ void read(const AnyTile& tile, StoredParams<Tile, P>& params) const {
    params.high = tile.read(this->param);
    params.low = tile.read(this->remainder, has_remainder());
  }
  template <class AnyTile, class Tile>
  __device__ __forceinline__ void write(const AnyTile& tile, const StoredParams<Tile, P>& params) const {
    tile.write(this->param, params.high);
    if (has_remainder()) tile.write(this->remainder, params.low);
  }

  template <class AnyTile, class Tile>
  __device__ __forceinline__ void read(const AnyTile& tile, StoredMoments<Tile, S>& moments) const {
    moments.m = tile.read(this->exp_avg);
    moments.v = tile.read(this->exp_avg_sq);
    read_scales(tile, moments);
  }
  template <class Tile>
  __device__ __forceinline__ void read_once(const Tile& tile, StoredMoments<Tile, S>& moments) const {
    moments.m = tile.read_once(this->exp_avg);
    moments.v = tile.read_once(this->exp_avg_sq);
    read_scales(tile, moments);
  }
  template <class AnyTile, class Tile>
  __device__ __forceinline__ void write(const AnyTile& tile, const StoredMoments<Tile, S>& moments) const {
    tile.write(this->exp_avg, moments.m);
    tile.write(this->exp_avg_sq, moments.v);
    if constexpr (kQuantized) {
      if (threadIdx.x % kWarp != 0) return;
      m_scales[block_of(tile)] = moments.m_scale;
      v_scales[block_of(tile)] = moments.v_scale;
    }
  }

 private:
  template <class Tile>
  __device__ static int block_of(const Tile& tile) {
    return tile.first / static_cast<int>(kQuantBlock);
  }
  template <class AnyTile, class Tile>
  __device__ __forceinline__ void read_scales(const AnyTile& tile, StoredMoments<Tile, S>& moments) const {
    if constexpr (kQuantized) {
      moments.m_scale = m_scales[block_of(tile)];
      moments.v_scale = v_scales[block_of(tile)];
    }
  }
};

}  // namespace superfine::cuda
