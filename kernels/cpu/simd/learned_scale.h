#pragma once

#include "kernels/common/learned_scale_pieces.h"
#include "kernels/cpu/isa.h"

/// What kernels/cpu/learned_scale.cpp asks of each instruction set: rows [begin, end) of a call
/// whose width is not 0, on this thread. past_caches: outputs may be stored past the caches.
namespace moq::kernels::cpu {

MOQ_FOR_EACH_ISA(void learned_scale_rows(const LearnedScaleCall& call, Derivative derivative,
                                         std::int64_t begin, std::int64_t end, bool past_caches);)

}  // namespace moq::kernels::cpu
