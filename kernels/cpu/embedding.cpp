#include "kernels/embedding.h"

#include <algorithm>

#include "kernels/common/check.h"
#include "kernels/common/half.h"
#include "kernels/common/parallel.h"

namespace moq::kernels::cpu {
namespace {

void check(const EmbeddingArgs& args) {
  MOQ_CHECK(args.num_tokens >= 0, "embedding: num_tokens must be >= 0, got ", args.num_tokens);
  MOQ_CHECK(args.hidden_size >= 1, "embedding: hidden_size must be >= 1, got ", args.hidden_size);
  MOQ_CHECK(!args.lookups.empty(), "embedding: at least one lookup must be given, got none");
  for (const EmbeddingLookup& lookup : args.lookups) {
    const EmbeddingTable& table = lookup.table;
    switch (table.dtype) {
      case DType::kFloat32:
      case DType::kFloat16:
      case DType::kBFloat16:
        break;
      case DType::kInt8:
        MOQ_CHECK(table.scales != nullptr, "embedding: an int8 table must have scales, got null");
        MOQ_CHECK(table.group_size >= 1 && args.hidden_size % table.group_size == 0,
                  "embedding: group_size must divide hidden_size, got ", table.group_size, " and ",
                  args.hidden_size);
        break;
      default:
        MOQ_CHECK(false, "embedding: table must be float32, float16, bfloat16 or int8, got ",
                  name_of(table.dtype));
    }
    for (std::int64_t t = 0; t < args.num_tokens; ++t) {
      MOQ_CHECK(lookup.rows[t] >= 0 && lookup.rows[t] < table.num_rows,
                "embedding: rows must be in [0, ", table.num_rows, "), got ", lookup.rows[t],
                " for token ", t);
    }
  }
}

/// output[j] (+)= value(j): the first table of a sum writes, the others add.
template <typename Value>
void write_or_add(float* output, std::int64_t hidden_size, bool first, const Value& value) {
  if (first) {
    for (std::int64_t j = 0; j < hidden_size; ++j) {
      output[j] = value(j);
    }
  } else {
    for (std::int64_t j = 0; j < hidden_size; ++j) {
      output[j] += value(j);
    }
  }
}

void add_int8_row(const EmbeddingTable& table, std::int64_t row, float* output,
                  std::int64_t hidden_size, bool first) {
  const std::int64_t num_groups = hidden_size / table.group_size;
  for (std::int64_t g = 0; g < num_groups; ++g) {
    const std::int64_t group = row * num_groups + g;
    const float scale = table.scales[group];
    const std::int32_t zero_point = table.zero_points != nullptr ? table.zero_points[group] : 0;
    const auto* codes = static_cast<const std::int8_t*>(table.data) + group * table.group_size;
    write_or_add(output + g * table.group_size, table.group_size, first,
                 [&](std::int64_t j) { return scale * static_cast<float>(codes[j] - zero_point); });
  }
}

void add_row(const EmbeddingTable& table, std::int64_t row, float* output, std::int64_t hidden_size,
             bool first) {
  const std::int64_t offset = row * hidden_size;
  switch (table.dtype) {
    case DType::kFloat16: {
      const auto* data = static_cast<const std::uint16_t*>(table.data) + offset;
      write_or_add(output, hidden_size, first,
                   [&](std::int64_t j) { return float16_to_float(data[j]); });
      break;
    }
    case DType::kBFloat16: {
      const auto* data = static_cast<const std::uint16_t*>(table.data) + offset;
      write_or_add(output, hidden_size, first,
                   [&](std::int64_t j) { return bfloat16_to_float(data[j]); });
      break;
    }
    case DType::kInt8:
      add_int8_row(table, row, output, hidden_size, first);
      break;
    default: {
      const auto* data = static_cast<const float*>(table.data) + offset;
      write_or_add(output, hidden_size, first, [&](std::int64_t j) { return data[j]; });
    }
  }
}

}  // namespace

void embedding(const EmbeddingArgs& args) {
  check(args);
  const std::int64_t grain = std::max<std::int64_t>(1, 4096 / args.hidden_size);
  parallel_for(args.num_tokens, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      float* output = args.output + t * args.hidden_size;
      bool first = true;
      for (const EmbeddingLookup& lookup : args.lookups) {
        add_row(lookup.table, lookup.rows[t], output, args.hidden_size, first);
        first = false;
      }
    }
  });
}

}  // namespace moq::kernels::cpu
