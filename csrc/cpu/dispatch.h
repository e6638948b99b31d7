// The table of CPU kernels: one row per instruction set, one column per op.
#pragma once

#include "cpu/activation.h"
#include "cpu/adamw.h"
#include "cpu/cross_entropy.h"
#include "cpu/elementwise_loss.h"
#include "cpu/isa.h"
#include "cpu/lamb.h"
#include "cpu/layer_norm.h"
#include "cpu/norm.h"
#include "cpu/split_sum.h"

namespace superfine::cpu {

struct Kernels {
  const char* isa;
  decltype(&baseline::activation) activation;
  decltype(&baseline::adamw) adamw;
  decltype(&baseline::add_to_split) add_to_split;
  decltype(&baseline::cross_entropy_forward) cross_entropy_forward;
  decltype(&baseline::cross_entropy_backward) cross_entropy_backward;
  decltype(&baseline::cross_entropy_part) cross_entropy_part;
  decltype(&baseline::elementwise_loss) elementwise_loss;
  decltype(&baseline::lamb) lamb;
  decltype(&baseline::layer_norm) layer_norm;
  decltype(&baseline::layer_norm_gradient) layer_norm_gradient;
  decltype(&baseline::round_split) round_split;
  decltype(&baseline::sums_of_squares) sums_of_squares;
};

// The best instruction set that this build holds and this processor runs.
Isa best_isa();
bool has_isa(Isa isa);
const Kernels& kernels(Isa isa);

}  // namespace superfine::cpu
