// What a decode step is asked of, checked before anything is launched.
#include "kernels/cuda/decode_step_check.h"

#include <cstdint>
#include <sstream>

#include "kernels/common/check.h"
#include "kernels/cuda/linear_layout.h"

namespace moq::kernels::cuda::step {
namespace {

const char* description_of(NormKind kind) {
  switch (kind) {
    case NormKind::kLayerNorm:
      return "a LayerNorm";
    case NormKind::kRmsNorm:
      return "an RMSNorm";
    default:
      return "no norm";
  }
}

struct Extent {
  const char* name;
  const void* begin;
  std::size_t bytes;
};

void check_apart(const Extent& a, const Extent& b) {
  const auto first = reinterpret_cast<std::uintptr_t>(a.begin);
  const auto second = reinterpret_cast<std::uintptr_t>(b.begin);
  MOQ_CHECK(first + a.bytes <= second || second + b.bytes <= first, "decode_step: ", a.name,
            " must not overlap ", b.name, ", got ", a.bytes, " bytes at ", a.begin, " and ",
            b.bytes, " at ", b.begin);
}

}  // namespace

std::string obstacle_in(const DecodeStepShape& shape, const DecodeStepLayer& layer) {
  std::ostringstream found;
  for (const DeviceNorm* norm : {&layer.attention_norm, &layer.ffn_norm}) {
    if (norm->kind != NormKind::kLayerNorm || norm->epsilon != shape.norm_epsilon) {
      found << description_of(norm->kind) << " with epsilon " << norm->epsilon
            << " instead of a LayerNorm with " << shape.norm_epsilon;
      return found.str();
    }
  }
  const std::int64_t hidden = shape.hidden_size;
  const std::int64_t inner = shape.intermediate_size;
  const struct {
    const char* name;
    const LinearShape& given;
    std::int64_t n;
    std::int64_t k;
  } projections[] = {{"qkv", layer.qkv.shape, 3 * hidden, hidden},
                     {"attention_out", layer.attention_out.shape, hidden, hidden},
                     {"up", layer.up.shape, inner, hidden},
                     {"down", layer.down.shape, hidden, inner}};
  for (const auto& [name, given, n, k] : projections) {
    if (given != LinearShape{.n = n, .k = k, .format = WeightFormat::kInt8, .group_size = k}) {
      found << name << " of " << given.n << " x " << given.k << " in " << name_of(given.format)
            << (given.asymmetric ? " with zero points" : "") << ", a scale for " << given.group_size
            << " columns, instead of " << n << " x " << k << " in int8, a scale for " << k;
      return found.str();
    }
  }
  return {};
}

void check_args(const DecodeStepArgs& args, std::size_t state_bytes) {
  const auto check = [](const char* name, const void* pointer, std::uintptr_t alignment) {
    MOQ_CHECK(pointer != nullptr && reinterpret_cast<std::uintptr_t>(pointer) % alignment == 0,
              "decode_step: ", name, " must be aligned to ", alignment, " bytes and not null, got ",
              pointer);
  };
  check("state", args.state, kPackedAlignment);
  check("input", args.input, 4);
  check("output", args.output, 2);
  check("pages.keys", args.pages.keys, 16);
  check("pages.values", args.pages.values, 16);
  check("page_table", args.page_table, alignof(std::int32_t));
  check("sequence", args.sequence, alignof(DeviceSequence));
  check("cache_row", args.cache_row, alignof(std::int32_t));
  MOQ_CHECK(args.layer_stride % 8 == 0,
            "decode_step: layer_stride must be a multiple of 8 elements, got ", args.layer_stride);
  MOQ_CHECK(args.pages.dtype == args.shape.dtype, "decode_step: pages must be of ",
            name_of(args.shape.dtype), ", got ", name_of(args.pages.dtype));
  const std::size_t row =
      static_cast<std::size_t>(args.shape.hidden_size) * size_of(args.shape.dtype);
  const Extent state{"state", args.state, state_bytes};
  const Extent input{"input", args.input, row};
  const Extent output{"output", args.output, row};
  check_apart(output, input);
  check_apart(output, state);
  check_apart(input, state);
}

}  // namespace moq::kernels::cuda::step
