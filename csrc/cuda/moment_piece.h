// A piece of a tensor in an optimizer's kernel: how its parameters and moments become numbers, and how they are stored.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/dtype.h"
#include "cuda/block_reduce.h"
#include "cuda/moment_table.h"
#include "cuda/pack.h"
#include "math/moments.h"
#include "math/quantized.h"
#include "math/random.h"

namespace superfine::cuda {

// Both moments of a tile as they are stored.
template <class Tile, class S>
struct StoredMoments {
  using T = Opmath<S>;
  static constexpr int kElements = Tile::kElements;

  __device__ T exp_avg(int k) const { return widen(m[k]); }
  __device__ T exp_avg_sq(int k) const { return widen(v[k]); }

  template <class M>
  __device__ void round(const Tile&, const M (&exp_avg)[kElements], const M (&exp_avg_sq)[kElements], std::uint32_t,
                        std::int64_t) {
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      m[k] = narrow<S>(exp_avg[k]);
      v[k] = narrow<S>(exp_avg_sq[k]);
    }
  }

  typename Tile::template Elements<S> m, v;
};

// The same in 8 bits. The tiles of a warp make one block.
template <class Tile>
struct StoredMoments<Tile, std::uint8_t> {
  static constexpr int kElements = Tile::kElements;
  static_assert(kElements * kWarp == kQuantBlock);

  __device__ float exp_avg(int k) const { return dequantize_first(m[k], m_scale); }
  __device__ float exp_avg_sq(int k) const { return dequantize_second(v[k], v_scale); }

  // The first element of the tensor that `tile` counts from is its `begin`-th.
  __device__ void round(const Tile& tile, const float (&exp_avg)[kElements], const float (&exp_avg_sq)[kElements],
                        std::uint32_t key, std::int64_t begin) {
    const QuantScale m_new = scale_of(tile, exp_avg), v_new = scale_of(tile, exp_avg_sq);
    m_scale = m_new.scale;
    v_scale = v_new.scale;
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      const float vk = exp_avg_sq[k];
      m[k] = quantize_first(exp_avg[k], m_new.inverse);
      v[k] = quantize_second(vk, v_new.inverse, random_bits(key, begin + tile.place(k), vk));
    }
  }

  typename Tile::template Elements<std::uint8_t> m, v;
  float m_scale, v_scale;

 private:
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
  using T = Opmath<P>;
  static constexpr bool kQuantized = std::is_same<S, std::uint8_t>::value;
  static constexpr bool kNarrow = sizeof(P) == 2;  // may have a remainder
  static constexpr bool kBf16 = std::is_same<P, bf16>::value;

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
    } else if (this->max_exp_avg_sq() != nullptr) {
      this->max_or_scales = this->max_exp_avg_sq() + begin;
    }
    this->numel -= begin;
  }

  __device__ bool has_remainder() const { return kNarrow && this->remainder != nullptr; }

  __device__ T widen_param(P high, std::uint16_t low) const {
    if constexpr (kNarrow) {
      if (this->master == Master::kahan) return widen(high) + widen(P{low});
    }
    if constexpr (kBf16) {
      return join(high, low);  // for low = 0 that is `high`
    } else {
      return widen(high);
    }
  }

  template <class Tile>
  __device__ void write_params(const Tile& tile, const T (&x)[Tile::kElements]) const {
    typename Tile::template Elements<P> high;
    typename Tile::template Elements<std::uint16_t> low = {};
    const auto for_each = [](const auto& f) {
#pragma unroll
      for (int k = 0; k < Tile::kElements; ++k) f(k);
    };
    const auto round = [&](int k) { high[k] = narrow<P>(x[k]); };
    if constexpr (kNarrow) {
      // A loop for each, as a branch for each element would cost more than its work.
      switch (this->master) {
        case Master::none: for_each(round); break;
        case Master::split:
          for_each([&](int k) {
            if constexpr (kBf16) split(x[k], &high[k], &low[k]);
          });
          break;
        case Master::kahan:
          for_each([&](int k) {  // as `store_compensated`
            round(k);
            const float rest = x[k] - widen(high[k]);
            low[k] = narrow<P>(rest == rest ? rest : 0.0f).bits;
          });
          break;
        case Master::stochastic:
          for_each([&, key = ~this->random_key](int k) {  // the moments have the other half of the keys
            if constexpr (kBf16) store_stochastic(&high[k], x[k], random_bits(key, begin + tile.place(k), x[k]));
          });
          break;
      }
      if (has_remainder()) tile.write(this->remainder, low);
    } else {
      for_each(round);
    }
    tile.write(this->param, high);
  }

  // `read` is that of the tile, or its `read_once`.
  template <class Tile, class Read>
  __device__ StoredMoments<Tile, S> read_moments(const Tile& tile, const Read& read) const {
    StoredMoments<Tile, S> moments;
    moments.m = read(this->exp_avg);
    moments.v = read(this->exp_avg_sq);
    if constexpr (kQuantized) {
      const int block = tile.first / static_cast<int>(kQuantBlock);
      moments.m_scale = m_scales[block];
      moments.v_scale = v_scales[block];
    }
    return moments;
  }

  template <class Tile>
  __device__ void write_moments(const Tile& tile, const StoredMoments<Tile, S>& moments) const {
    tile.write(this->exp_avg, moments.m);
    tile.write(this->exp_avg_sq, moments.v);
    if constexpr (kQuantized) {
      const int block = tile.first / static_cast<int>(kQuantBlock);
      if (threadIdx.x % kWarp == 0) {
        m_scales[block] = moments.m_scale;
        v_scales[block] = moments.v_scale;
      }
    }
  }

  std::int64_t begin;
  float *m_scales, *v_scales;  // of its blocks
};

}  // namespace superfine::cuda
