// Recorded routing through a policy and a number of slots, as the cache would do it if every read
// were over at once.
#pragma once
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "policy.h"

namespace zipmoe {

// What every token of every pass chose: [tokens, layers, k], pass after pass.
struct RecordedRouting {
  std::span<const std::uint32_t> experts;  // within a layer
  std::uint32_t num_experts = 0;           // of a layer
  std::uint32_t num_layers = 0;
  std::uint32_t k = 0;
  std::span<const std::uint32_t> tokens;  // of each pass
  // What part of each pass's requests begins with it. None: 0.
  std::span<const double> begins;
};

struct ReplayCounts {
  std::vector<std::uint32_t> hits, misses;  // of each pass, each layer
  std::uint64_t evictions = 0;
};

// `popularity` of each expert of each layer, for the policy that needs it. Throws
// std::invalid_argument for numbers that do not fit each other, and as make_policy.
ReplayCounts replay(const RecordedRouting& routing, std::string_view policy,
                    std::uint32_t num_slots, std::span<const double> popularity);

}  // namespace zipmoe
