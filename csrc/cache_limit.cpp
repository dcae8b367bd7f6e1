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
  const std::uint32_t before = num_usable_;
  set_limit(most);
  num_filled_ = std::min<std::uint32_t>(num_filled_, num_usable_);
  for (std::uint32_t slot = num_usable_; slot < before; ++slot)
    if (residency_.state(slot) == SlotState::empty) give_back(slot);
  start_wanted();
  changed_.notify_all();
  return allocated_bytes_;
}

void ExpertCache::set_limit(std::uint64_t most) {
  const std::uint64_t least = needed_bytes(table_, kLeastSlots);
  num_usable_ = std::min(slots_within(table_, std::max(most, least)), num_slots_);
  allocated_bytes_ = needed_bytes(table_, num_usable_);
  residency_.set_limit(num_usable_);
}

std::uint64_t ExpertCache::filled_bytes() const {
  const Lock lock(mutex_);
  return num_filled_ * slot_stride_;
}

// As far as nobody uses them; the others follow when that ends.
void ExpertCache::clear_beyond_limit() {
  while (const auto departure = residency_.depart()) {
    const std::uint32_t from = departure->from;
    if (const auto to = departure->to) {
      const ExpertRecord& record = table_.records()[residency_.expert_in(*to)];
      std::memcpy(slot_bytes(*to, record).data(), slot_bytes(from, record).data(), record.length);
      is_ahead_[*to] = is_ahead_[from];
    }
    give_back(from);
  }
}

void ExpertCache::give_back(std::uint32_t slot) {
  arena_.give_back(slot * slot_stride_, slot_stride_);
}

}  // namespace zipmoe
