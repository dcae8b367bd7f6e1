// Giving memory back while running, and taking it again: which part of its slots a cache may use.
//
// The slots in use are always the first ones, so what is given back is one stretch: huge pages go
// whole, and no page half in use is there for the system to fill up again. An expert that stays but
// lies behind them is copied to the place of one that goes.
#include <algorithm>
#include <cstring>

#include "cache.h"

namespace zipmoe {

std::uint64_t ExpertCache::limit(std::uint64_t most) {
  if (is_forked()) check_usable();
  const Lock lock(mutex_);
  check_usable();
  if (!layout_.can_shrink()) return allocated_bytes_;
  const std::uint32_t before = num_usable_;
  const std::uint64_t filled = filled_bytes_;
  set_limit(most);
  filled_bytes_ = std::min(filled, filled_bytes_);
  for (std::uint32_t slot = num_usable_; slot < before; ++slot)
    if (tiers_.is_slot_empty(slot)) give_back(slot);
  start_wanted();
  changed_.notify_all();
  return allocated_bytes_;
}

void ExpertCache::set_limit(std::uint64_t most) {
  if (!layout_.can_shrink()) return;
  num_usable_ = layout_.slots_within(most);
  allocated_bytes_ = layout_.allocated_bytes(num_usable_);
  filled_bytes_ = layout_.slots_end(num_usable_);
  tiers_.set_limit(num_usable_);
}

TierCounts ExpertCache::tiers() const {
  TierCounts tiers = layout_.tiers();
  tiers.compressed = num_usable_;
  return tiers;
}

std::uint64_t ExpertCache::filled_bytes() const {
  const Lock lock(mutex_);
  return filled_bytes_;
}

// As far as nobody uses them; the others follow when that ends.
void ExpertCache::clear_beyond_limit() {
  while (const auto departure = tiers_.depart()) {
    const std::uint32_t from = departure->from;
    if (const auto to = departure->to) {
      const SlotPool& pool = layout_.planes().front();
      std::memcpy(in_slot(pool, *to, 0), in_slot(pool, from, 0), pool.stride);
    }
    give_back(from);
  }
}

void ExpertCache::give_back(std::uint32_t slot) {
  const SlotPool& pool = layout_.planes().front();
  arena_.give_back(slot * pool.stride, pool.stride);
}

}  // namespace zipmoe
