// The instruction sets that every file of this folder is compiled for, each in its own namespace.
//
// A kernel file defines its functions in namespace superfine::cpu::SF_ISA and keeps everything else
// in an anonymous namespace: an inline function with external linkage would be merged by the linker,
// and an AVX-512 copy could then be called on a processor without it (tests/test_build.py looks).
#pragma once

#define SF_FOR_EACH_ISA(declare) declare(baseline) declare(avx2) declare(avx512)

namespace superfine::cpu {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

}  // namespace superfine::cpu
