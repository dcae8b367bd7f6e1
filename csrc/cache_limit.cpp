// Giving memory back while running, and taking it again: which part of its slots a cache may use.
//
// The slots in use are always the first ones of their pool, so what is given back is one stretch of
// each: huge pages go whole, and no page half in use is there for the system to fill up again. An
// expert that stays but lies behind them is copied to the place of one that goes.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "cache.h"

namespace zipmoe {

std::uint64_t ExpertCache::limit(std::uint64_t most) {
  if (is_forked()) check_usable();
  const Lock lock(mutex_);
  check_usable();
  if (!layout_.can_shrink()) return allocated_bytes_;
  const std::vector<std::uint32_t> usable = usable_, filled = filled_;
  set_limit(most);
  for (std::size_t pool = 0; pool < usable.size(); ++pool) {
    filled_[pool] = std::min(filled[pool], filled_[pool]);
    for (std::uint32_t slot = usable_[pool]; slot < usable[pool]; ++slot)
      if (tiers_.is_slot_empty(pool, slot)) give_back(pool, slot);
  }
  start_wanted();
  changed_.notify_all();
  return allocated_bytes_;
}

void ExpertCache::set_limit(std::uint64_t most) {
  if (!layout_.can_shrink()) return;
  usable_ = filled_ = layout_.slots_within(most);
  num_usable_ = std::accumulate(usable_.begin(), usable_.end(), std::uint32_t{0});
  allocated_bytes_ = layout_.allocated_bytes(usable_);
  for (std::size_t pool = 0; pool < usable_.size(); ++pool) tiers_.set_limit(pool, usable_[pool]);
}

TierCounts ExpertCache::tiers() const {
  TierCounts tiers = layout_.tiers();
  tiers.compressed = num_usable_;
  return tiers;
}

std::uint64_t ExpertCache::filled_bytes() const {
  const Lock lock(mutex_);
  std::uint64_t bytes = layout_.full().num_slots * layout_.full().stride;
  for (std::size_t pool = 0; pool < filled_.size(); ++pool)
    bytes += filled_[pool] * layout_.planes()[pool].stride;
  return bytes;
}

void ExpertCache::note_filled(std::size_t pool, std::uint32_t slot) {
  filled_[pool] = std::max(filled_[pool], slot + 1);
}

// As far as nobody uses them; the others follow when that ends.
void ExpertCache::clear_beyond_limit() {
  for (std::size_t which = 0; which < usable_.size(); ++which)
    while (const auto departure = tiers_.depart(which)) {
      const std::uint32_t from = departure->from;
      if (const auto to = departure->to) {
        const SlotPool& pool = layout_.planes()[which];
        std::memcpy(in_slot(pool, *to, 0), in_slot(pool, from, 0), pool.stride);
      }
      give_back(which, from);
    }
}

void ExpertCache::give_back(std::size_t which, std::uint32_t slot) {
  const SlotPool& pool = layout_.planes()[which];
  arena_.give_back(pool.begin + slot * pool.stride, pool.stride);
}

}  // namespace zipmoe
