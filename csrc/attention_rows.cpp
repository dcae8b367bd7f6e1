#include "attention_rows.h"

#include <cstring>

#include "scalar.h"

namespace zipmoe {
namespace {

using u32 = std::uint32_t;
using u64 = std::uint64_t;

template <class T>
const T* mask_row(const AttentionMask& mask, u64 batch, u64 head, u64 row) {
  return static_cast<const T*>(mask.data) + static_cast<std::ptrdiff_t>(batch) * mask.batch +
         static_cast<std::ptrdiff_t>(head) * mask.head +
         static_cast<std::ptrdiff_t>(row) * mask.row;
}

// The first of [from, to) that is not 0, eight at once where it can.
u32 next_set(const std::uint8_t* flags, u32 from, u32 to) {
  u64 eight;
  for (; from + sizeof eight <= to; from += sizeof eight) {
    std::memcpy(&eight, flags + from, sizeof eight);
    if (eight != 0) break;
  }
  while (from < to && flags[from] == 0) ++from;
  return from;
}

void runs_of_flags(const std::uint8_t* flags, u32 from, u32 to, std::vector<KeyRun>& runs) {
  while ((from = next_set(flags, from, to)) < to) {
    const void* zero = std::memchr(flags + from, 0, to - from);
    const u32 end =
        zero == nullptr ? to : static_cast<u32>(static_cast<const std::uint8_t*>(zero) - flags);
    runs.push_back({from, end});
    from = end;
  }
}

template <class Allowed>
void runs_where(const Allowed& allowed, u32 from, u32 to, std::vector<KeyRun>& runs) {
  while (true) {
    while (from < to && !allowed(from)) ++from;
    if (from == to) return;
    const u32 begin = from;
    while (from < to && allowed(from)) ++from;
    runs.push_back({begin, from});
  }
}

// NaN is added like any other number, and makes the row NaN.
constexpr float kLowestBf16 = -3.3895313892515355e38F;
constexpr float kLowestFloat = -3.4028234663852886e38F;

KeyRun visible(const AttentionRule& rule, u64 keys, u64 row) {
  if (!rule.causal) return {0, static_cast<u32>(keys)};
  const std::int64_t number = rule.offset + static_cast<std::int64_t>(row);
  const auto clamped = [&](std::int64_t key) {
    return static_cast<u32>(std::clamp<std::int64_t>(key, 0, static_cast<std::int64_t>(keys)));
  };
  const u32 end = clamped(number + 1);
  const u32 begin =
      rule.window == 0 ? 0 : clamped(number + 1 - static_cast<std::int64_t>(rule.window));
  return {std::min(begin, end), end};
}

}  // namespace

AttentionMask AttentionMask::from_row(u64 first) const {
  if (data == nullptr) return *this;
  const std::ptrdiff_t bytes = type == MaskType::boolean    ? 1
                               : type == MaskType::bfloat16 ? sizeof(std::uint16_t)
                                                            : sizeof(float);
  AttentionMask rest = *this;
  rest.data =
      static_cast<const std::uint8_t*>(data) + static_cast<std::ptrdiff_t>(first) * row * bytes;
  return rest;
}

void append_runs(const AttentionRule& rule, u64 keys, u64 batch, u64 head, u64 row,
                 std::vector<KeyRun>& runs) {
  const auto [from, to] = visible(rule, keys, row);
  if (from == to) return;
  const AttentionMask& mask = rule.mask;
  if (mask.data == nullptr) {
    runs.push_back({from, to});
    return;
  }
  switch (mask.type) {
    case MaskType::boolean: {
      const auto* flags = mask_row<std::uint8_t>(mask, batch, head, row);
      if (mask.key == 1) return runs_of_flags(flags, from, to, runs);
      return runs_where([&](u32 key) { return flags[key * mask.key] != 0; }, from, to, runs);
    }
    case MaskType::bfloat16: {
      const auto* values = mask_row<std::uint16_t>(mask, batch, head, row);
      return runs_where(
          [&](u32 key) { return !(from_bf16(values[key * mask.key]) <= kLowestBf16); }, from, to,
          runs);
    }
    case MaskType::float32: {
      const auto* values = mask_row<float>(mask, batch, head, row);
      return runs_where([&](u32 key) { return !(values[key * mask.key] <= kLowestFloat); }, from,
                        to, runs);
    }
  }
}

void add_bias(const AttentionMask& mask, u64 batch, u64 head, u64 row, std::span<const KeyRun> runs,
              float* out) {
  const auto add = [&](const auto& value) {
    for (const KeyRun& run : runs)
      for (u32 key = run.begin; key < run.end; ++key) *out++ += value(key);
  };
  if (mask.type == MaskType::bfloat16) {
    const auto* values = mask_row<std::uint16_t>(mask, batch, head, row);
    add([&](u32 key) { return from_bf16(values[key * mask.key]); });
  } else {
    const auto* values = mask_row<float>(mask, batch, head, row);
    add([&](u32 key) { return values[key * mask.key]; });
  }
}

}  // namespace zipmoe
