#include "replay.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "residency.h"

namespace zipmoe {
namespace {

void check(const RecordedRouting& routing, std::uint32_t num_slots) {
  const std::uint64_t tokens =
      std::accumulate(routing.tokens.begin(), routing.tokens.end(), std::uint64_t{0});
  if (routing.experts.size() != tokens * routing.num_layers * routing.k ||
      routing.begins.size() != routing.tokens.size())
    throw std::invalid_argument("the parts of a recorded routing do not fit each other");
  if (std::any_of(routing.experts.begin(), routing.experts.end(),
                  [&](std::uint32_t expert) { return expert >= routing.num_experts; }))
    throw std::invalid_argument("an expert that the model does not have");
  if (num_slots == 0) throw std::invalid_argument("no slots");
}

// Goes through passes and layers; gives what each wants: its experts in ascending order, numbered
// through all layers, and how many tokens chose each.
template <class Visit>
void for_each_layer(const RecordedRouting& routing, const Visit& visit) {
  std::vector<std::uint32_t> chosen(routing.num_experts), experts, tokens;
  const std::uint32_t* choices = routing.experts.data();
  for (std::size_t pass = 0; pass < routing.tokens.size(); ++pass) {
    for (std::uint32_t layer = 0; layer < routing.num_layers; ++layer) {
      std::fill(chosen.begin(), chosen.end(), 0);
      for (std::size_t t = 0; t < routing.tokens[pass]; ++t)
        for (std::size_t i = 0; i < routing.k; ++i)
          ++chosen[choices[(t * routing.num_layers + layer) * routing.k + i]];
      experts.clear();
      tokens.clear();
      for (std::uint32_t expert = 0; expert < routing.num_experts; ++expert) {
        if (chosen[expert] == 0) continue;
        experts.push_back(layer * routing.num_experts + expert);
        tokens.push_back(chosen[expert]);
      }
      visit(pass, layer, experts, tokens);
    }
    choices += std::size_t{routing.tokens[pass]} * routing.num_layers * routing.k;
  }
}

std::unique_ptr<Policy> policy_for(const RecordedRouting& routing, std::string_view name,
                                   std::span<const double> popularity) {
  std::vector<std::uint32_t> layers, uses;
  for (std::uint32_t layer = 0; layer < routing.num_layers; ++layer)
    layers.insert(layers.end(), routing.num_experts, layer);
  if (name == "belady")
    for_each_layer(routing, [&](auto, auto, const auto& experts, const auto&) {
      uses.insert(uses.end(), experts.begin(), experts.end());
    });
  return make_policy(name, {layers, popularity, uses});
}

// What ExpertCache does with a list, and then with one expert of it after the other.
void run_layer(Residency& residency, std::span<const std::uint32_t> experts) {
  std::size_t wanted = 0;
  const auto start = [&](std::uint32_t expert, Victim victim) {
    const auto taken = residency.take(expert, victim);
    if (taken) residency.set_resident(taken->slot);
    return taken.has_value();
  };
  const auto start_wanted = [&] {
    for (; wanted < experts.size(); ++wanted) {
      const std::uint32_t expert = experts[wanted];
      const bool to_read = residency.is_awaited(expert) && !residency.slot_of(expert);
      if (to_read && !start(expert, Victim::idle)) return;
    }
  };
  start_wanted();
  for (const std::uint32_t expert : experts) {
    if (!residency.slot_of(expert)) start(expert, Victim::any);
    residency.end_visit(expert);
    start_wanted();
  }
}

}  // namespace

ReplayCounts replay(const RecordedRouting& routing, std::string_view policy,
                    std::uint32_t num_slots, std::span<const double> popularity) {
  check(routing, num_slots);
  Residency residency(policy_for(routing, policy, popularity),
                      routing.num_experts * routing.num_layers, num_slots);
  ReplayCounts counts;
  for_each_layer(
      routing, [&](std::size_t pass, std::uint32_t layer, const auto& experts, const auto& tokens) {
        if (layer == 0 && routing.begins[pass] > 0) residency.begin_request(routing.begins[pass]);
        residency.list({layer, experts, routing.tokens[pass]});
        std::uint32_t hits = 0;
        for (std::size_t i = 0; i < experts.size(); ++i) {
          hits += residency.slot_of(experts[i]).has_value() ? 1 : 0;
          residency.begin_visit(experts[i], tokens[i]);
        }
        counts.hits.push_back(hits);
        counts.misses.push_back(static_cast<std::uint32_t>(experts.size()) - hits);
        run_layer(residency, experts);
      });
  counts.evictions = residency.num_evictions();
  return counts;
}

}  // namespace zipmoe
