#include "slot_classes.h"

#include <algorithm>
#include <numeric>

namespace zipmoe {
namespace {

// A record shorter than this part of a class's longest begins the next class. Records of one codec
// lie closer together; experts of 16 bits packed and of 8, 4 and 2 lie further apart.
constexpr std::uint64_t kPart = 7, kOf = 8;
// Each has bookkeeping of its own: the last one takes whatever is shorter still.
constexpr std::size_t kMostClasses = 4;

}  // namespace

SlotClasses::SlotClasses(const ExpertTable& table) : of_(table.records().size()) {
  std::vector<std::uint32_t> longest_first(of_.size());
  std::iota(longest_first.begin(), longest_first.end(), std::uint32_t{0});
  const auto length = [&](std::uint32_t record) { return table.records()[record].length; };
  std::stable_sort(longest_first.begin(), longest_first.end(),
                   [&](std::uint32_t a, std::uint32_t b) { return length(a) > length(b); });
  for (const std::uint32_t record : longest_first) {
    const bool fits = !classes_.empty() && length(record) * kOf >= classes_.back().stride * kPart;
    if (!fits && classes_.size() < kMostClasses) classes_.push_back({.stride = length(record)});
    ++classes_.back().num_experts;
    of_[record] = static_cast<std::uint8_t>(classes_.size() - 1);
  }
}

std::vector<std::uint32_t> SlotClasses::slots(std::uint64_t num_experts,
                                              std::uint64_t least) const {
  const std::uint64_t held = std::min<std::uint64_t>(num_experts, of_.size());
  std::vector<std::uint32_t> slots;
  for (const Class& one : classes_) {
    const std::uint64_t share = held * one.num_experts / of_.size();
    slots.push_back(static_cast<std::uint32_t>(std::min(std::max(share, least), one.num_experts)));
  }
  return slots;
}

}  // namespace zipmoe
