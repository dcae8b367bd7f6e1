#include "tiers.h"

#include <algorithm>
#include <utility>

namespace zipmoe {

Tiers::Tiers(const MakePolicy& make_policy, std::uint32_t num_experts, const SlotLayout& layout)
    : layout_(layout) {
  for (const SlotPool& pool : layout.planes())
    planes_.emplace_back(make_policy(), num_experts, pool.num_slots);
  if (layout.full().num_slots > 0)
    full_.emplace(make_policy(), num_experts, layout.full().num_slots);
}

template <class Do>
void Tiers::for_each_pool(const Do& act) {
  for (Residency& pool : planes_) act(pool);
  if (full_) act(*full_);
}

std::span<Residency> Tiers::own(std::uint32_t expert) {
  const PoolRange range = layout_.pools_of(expert);
  return std::span(planes_).subspan(range.first, range.count);
}

std::span<const Residency> Tiers::own(std::uint32_t expert) const {
  const PoolRange range = layout_.pools_of(expert);
  return std::span(planes_).subspan(range.first, range.count);
}

void Tiers::begin_request(double share) {
  for_each_pool([&](Residency& pool) { pool.begin_request(share); });
}

bool Tiers::begin_visit(std::uint32_t expert, std::uint32_t num_tokens) {
  bool begins = false;
  for_each_pool([&](Residency& pool) { begins = pool.begin_visit(expert, num_tokens); });
  return begins;
}

void Tiers::end_visit(std::uint32_t expert) {
  for_each_pool([&](Residency& pool) { pool.end_visit(expert); });
}

void Tiers::list(const LayerList& wanted) {
  for_each_pool([&](Residency& pool) { pool.list(wanted); });
}

void Tiers::resume(std::uint32_t layer, std::span<const std::uint32_t> experts) {
  for_each_pool([&](Residency& pool) { pool.resume(layer, experts); });
}

std::optional<Residency::Departure> Tiers::depart(std::size_t which) {
  Residency& pool = planes_[which];
  const std::uint64_t before = pool.num_evictions();
  const auto departure = pool.depart();
  num_evictions_ += pool.num_evictions() - before;
  return departure;
}

void Tiers::expect(std::span<const std::uint32_t> experts) {
  for_each_pool([&](Residency& pool) { pool.expect(experts); });
}

Tier Tiers::tier(std::uint32_t expert) const {
  if (is_decoded(expert)) return Tier::full;
  const auto pools = own(expert);
  const bool first = pools.front().slot_of(expert).has_value();
  const bool last = pools.back().slot_of(expert).has_value();
  if (first && last) return Tier::compressed;
  if (first) return Tier::sign_mantissa;
  return last ? Tier::exponents : Tier::absent;
}

bool Tiers::is_decoded(std::uint32_t expert) const {
  const auto slot = full_ ? full_->slot_of(expert) : std::nullopt;
  return slot && full_->state(*slot) == SlotState::resident;
}

bool Tiers::are_planes_resident(std::uint32_t expert) const {
  const auto pools = own(expert);
  return std::all_of(pools.begin(), pools.end(), [&](const Residency& pool) {
    const auto slot = pool.slot_of(expert);
    return slot && pool.state(*slot) == SlotState::resident;
  });
}

bool Tiers::holds_plane(std::uint32_t expert) const {
  const auto pools = own(expert);
  return std::any_of(pools.begin(), pools.end(),
                     [&](const Residency& pool) { return pool.slot_of(expert).has_value(); });
}

bool Tiers::begin_read(std::uint32_t expert, Victim victim) {
  const auto misses = [&](const Residency& pool) { return !pool.slot_of(expert); };
  // Who has to leave one pool must not leave in vain because another has no room.
  const auto pools = own(expert);
  if (pools.size() > 1 && !std::all_of(pools.begin(), pools.end(), [&](const Residency& pool) {
        return !misses(pool) || pool.can_take(expert, victim);
      }))
    return false;
  for (Residency& pool : pools) {
    if (!misses(pool)) {
      pool.pin(*pool.slot_of(expert));
      continue;
    }
    const auto taken = pool.take(expert, victim);
    if (!taken) return false;  // the only pool
    count_leaving(*taken);
  }
  return true;
}

void Tiers::count_leaving(const Taken& taken) {
  if (!taken.evicted) return;
  const bool keeps = is_decoded(*taken.evicted) || holds_plane(*taken.evicted);
  ++(keeps ? num_demotions_ : num_evictions_);
}

std::array<std::optional<std::uint32_t>, kMaxPlanePools> Tiers::slots_to_read(
    std::uint32_t expert) const {
  std::array<std::optional<std::uint32_t>, kMaxPlanePools> slots;
  const auto pools = own(expert);
  for (std::size_t i = 0; i < pools.size(); ++i) {
    const auto slot = pools[i].slot_of(expert);
    if (slot && pools[i].state(*slot) == SlotState::reading) slots[i] = slot;
  }
  return slots;
}

void Tiers::end_read(std::uint32_t expert, std::uint32_t num_waiters) {
  for (Residency& pool : own(expert)) {
    const std::uint32_t slot = *pool.slot_of(expert);
    const bool was_read = pool.state(slot) == SlotState::reading;
    if (was_read) pool.set_resident(slot);
    if (num_waiters > 0) pool.pin(slot, num_waiters);
    if (!was_read) pool.unpin(slot);
  }
}

void Tiers::fail_read(std::uint32_t expert) {
  for (Residency& pool : own(expert)) {
    const std::uint32_t slot = *pool.slot_of(expert);
    if (pool.state(slot) == SlotState::reading)
      pool.vacate(slot);
    else
      pool.unpin(slot);
  }
}

Holding Tiers::hold(std::uint32_t expert) {
  if (is_decoded(expert)) {
    Holding holding;
    holding.full = full_->slot_of(expert);
    holding.is_decoded = true;
    full_->pin(*holding.full);
    return holding;
  }
  const Holding holding = held_planes(expert);
  const auto pools = own(expert);
  for (std::size_t i = 0; i < pools.size(); ++i) pools[i].pin(holding.planes[i]);
  return holding;
}

Holding Tiers::held_planes(std::uint32_t expert) const {
  Holding holding;
  const auto pools = own(expert);
  for (std::size_t i = 0; i < pools.size(); ++i) holding.planes[i] = *pools[i].slot_of(expert);
  return holding;
}

void Tiers::promote(std::uint32_t expert, Holding& holding) {
  if (!full_ || holding.is_decoded || full_->slot_of(expert)) return;
  const auto taken = full_->take(expert, Victim::worth_less);
  if (!taken) return;
  count_leaving(*taken);
  holding.full = taken->slot;
}

void Tiers::end_promotion(std::uint32_t expert, Holding& holding) {
  full_->set_resident(*holding.full);
  full_->pin(*holding.full);
  holding.is_decoded = true;
  ++num_promotions_;
  const auto pools = own(expert);
  for (std::size_t i = 0; i < pools.size(); ++i) pools[i].unpin(holding.planes[i]);
  drop_planes(expert);
}

void Tiers::let_go(std::uint32_t expert, const Holding& holding) {
  if (holding.is_decoded) {
    full_->unpin(*holding.full);
    return;
  }
  const auto pools = own(expert);
  for (std::size_t i = 0; i < pools.size(); ++i) pools[i].unpin(holding.planes[i]);
  if (holding.full) full_->vacate(*holding.full);
  if (is_decoded(expert)) drop_planes(expert);
}

// Those that nobody else is using; who does will drop them.
void Tiers::drop_planes(std::uint32_t expert) {
  for (Residency& pool : own(expert))
    if (pool.may_go(expert)) pool.vacate(*pool.slot_of(expert));
}

}  // namespace zipmoe
