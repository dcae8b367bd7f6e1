#include "residency.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace zipmoe {
namespace {

constexpr std::uint32_t kNoSlot = std::numeric_limits<std::uint32_t>::max();

// A full cache gives this part of its slots to what is read beforehand, and so many at least: a
// long prompt, which wants every expert of a layer and of the next, gets along with the slots of
// those that it has used, and others keep theirs.
constexpr std::size_t kCrowdedPart = 4, kLeastCrowd = 8;

}  // namespace

Residency::Residency(std::unique_ptr<Policy> policy, std::uint32_t num_experts,
                     std::uint32_t num_slots)
    : policy_(std::move(policy)),
      experts_(num_experts, Expert{.slot = kNoSlot}),
      slots_(num_slots) {
  empty_.reserve(num_slots);
  set_limit(num_slots);
  listed_.reserve(num_experts);
  expected_.reserve(num_experts);
}

bool Residency::begin_visit(std::uint32_t expert, std::uint32_t num_tokens) {
  if (experts_[expert].visiting) return false;
  experts_[expert].visiting = true;
  policy_->use(expert, num_tokens);
  tell_policy(expert);
  return true;
}

void Residency::end_visit(std::uint32_t expert) {
  experts_[expert].visiting = false;
  if (const auto slot = slot_of(expert)) slots_[*slot].is_fresh = false;
  tell_policy(expert);
}

void Residency::list(const LayerList& wanted) {
  policy_->begin_layer(wanted.layer, wanted.num_tokens);
  await(wanted.experts);
}

void Residency::resume(std::uint32_t layer, std::span<const std::uint32_t> experts) {
  policy_->return_to(layer);
  for (const std::uint32_t expert : experts) experts_[expert].visiting = true;
  await(experts);
}

void Residency::await(std::span<const std::uint32_t> experts) {
  ++list_number_;
  for (const std::uint32_t expert : listed_) tell_policy(expert);
  expect({});
  listed_.assign(experts.begin(), experts.end());
  for (const std::uint32_t expert : listed_) {
    experts_[expert].listed = list_number_;
    tell_policy(expert);
  }
}

bool Residency::is_awaited(std::uint32_t expert) const {
  return experts_[expert].visiting && experts_[expert].listed == list_number_ && list_number_ > 0;
}

void Residency::expect(std::span<const std::uint32_t> experts) {
  for (const std::uint32_t expert : expected_) {
    experts_[expert].expected = false;
    tell_policy(expert);
  }
  expected_.assign(experts.begin(), experts.end());
  for (const std::uint32_t expert : expected_) {
    experts_[expert].expected = true;
    tell_policy(expert);
  }
}

std::optional<std::uint32_t> Residency::slot_of(std::uint32_t expert) const {
  const std::uint32_t slot = experts_[expert].slot;
  return slot == kNoSlot ? std::nullopt : std::optional(slot);
}

bool Residency::can_take(std::uint32_t expert, Victim victim) const {
  return !empty_.empty() || find_victim(expert, victim);
}

std::optional<Taken> Residency::take(std::uint32_t expert, Victim victim) {
  Taken taken;
  if (!empty_.empty()) {
    taken.slot = empty_.back();
    empty_.pop_back();
  } else if ((taken.evicted = find_victim(expert, victim))) {
    taken.slot = experts_[*taken.evicted].slot;
    evict(*taken.evicted);
  } else {
    return std::nullopt;
  }
  slots_[taken.slot] = {.expert = expert, .state = SlotState::reading, .is_fresh = true};
  experts_[expert].slot = taken.slot;
  policy_->admit(expert);
  return taken;
}

void Residency::evict(std::uint32_t expert) {
  experts_[expert].slot = kNoSlot;
  policy_->withdraw(expert);
  policy_->evict(expert);
  ++num_evictions_;
}

std::optional<std::uint32_t> Residency::find_victim(std::uint32_t expert, Victim victim) const {
  if (victim == Victim::idle && is_crowded()) return std::nullopt;
  const std::optional<std::uint32_t> idle = policy_->victim();
  if (victim == Victim::worth_less)
    return idle && policy_->is_worth_more(expert, *idle) ? idle : std::nullopt;
  if (idle || victim == Victim::idle) return idle;
  const std::optional<std::uint32_t> guess = last_to_go(expected_);
  return guess ? guess : last_to_go(listed_);
}

// The one whose turn comes last.
std::optional<std::uint32_t> Residency::last_to_go(std::span<const std::uint32_t> experts) const {
  const auto last = std::find_if(experts.rbegin(), experts.rend(),
                                 [this](std::uint32_t expert) { return may_go(expert); });
  return last == experts.rend() ? std::nullopt : std::optional(*last);
}

bool Residency::may_go(std::uint32_t expert) const {
  const std::uint32_t slot = experts_[expert].slot;
  return slot != kNoSlot && may_go(slots_[slot]);
}

// Whether those that are kept for a visit to come take as many slots as they may.
bool Residency::is_crowded() const {
  std::size_t count = 0;
  const auto is_fresh = [this](std::uint32_t expert) {
    const std::uint32_t slot = experts_[expert].slot;
    return slot != kNoSlot && slots_[slot].is_fresh;
  };
  for (const std::uint32_t expert : listed_) count += is_awaited(expert) && is_fresh(expert);
  for (const std::uint32_t expert : expected_) count += is_fresh(expert);
  return count >= std::max<std::size_t>(limit_ / kCrowdedPart, kLeastCrowd);
}

void Residency::tell_policy(std::uint32_t expert) {
  if (may_go(expert) && !is_awaited(expert) && !experts_[expert].expected)
    policy_->offer(expert);
  else
    policy_->withdraw(expert);
}

void Residency::set_resident(std::uint32_t slot) {
  slots_[slot].state = SlotState::resident;
  tell_policy(slots_[slot].expert);
}

void Residency::vacate(std::uint32_t slot) {
  const std::uint32_t expert = slots_[slot].expert;
  experts_[expert].slot = kNoSlot;
  policy_->withdraw(expert);
  slots_[slot] = {};
  if (slot < limit_)
    empty_.push_back(slot);
  else
    --num_beyond_;
}

void Residency::set_limit(std::uint32_t num_slots) {
  limit_ = num_slots;
  num_beyond_ = 0;
  empty_.clear();
  for (auto slot = static_cast<std::uint32_t>(slots_.size()); slot-- > 0;) {
    const bool is_empty = slots_[slot].state == SlotState::empty;
    if (is_empty && slot < limit_) empty_.push_back(slot);
    if (!is_empty && slot >= limit_) ++num_beyond_;
  }
}

std::optional<Residency::Departure> Residency::depart() {
  if (num_beyond_ == 0) return std::nullopt;
  std::uint32_t from = limit_;
  while (from < slots_.size() && !may_go(slots_[from])) ++from;
  if (from == slots_.size()) return std::nullopt;
  if (empty_.empty()) {
    const std::uint32_t goes = policy_->victim().value_or(slots_[from].expert);
    const std::uint32_t freed = experts_[goes].slot;
    evict(goes);
    vacate(freed);
    if (freed >= limit_) return Departure{.from = freed, .to = std::nullopt};
  }
  const std::uint32_t to = empty_.back();
  empty_.pop_back();
  slots_[to] = std::exchange(slots_[from], {});
  experts_[slots_[to].expert].slot = to;
  --num_beyond_;
  return Departure{.from = from, .to = to};
}

void Residency::pin(std::uint32_t slot, std::uint32_t times) {
  slots_[slot].num_pins += times;
  tell_policy(slots_[slot].expert);
}

void Residency::unpin(std::uint32_t slot) {
  --slots_[slot].num_pins;
  tell_policy(slots_[slot].expert);
}

std::uint64_t Residency::bytes(std::uint64_t num_experts, std::uint64_t num_layers,
                               std::uint64_t num_slots) {
  return Policy::bytes(num_experts, num_layers) +
         num_experts * (sizeof(Expert) + 2 * sizeof(std::uint32_t)) +
         num_slots * (sizeof(Slot) + sizeof(std::uint32_t));
}

}  // namespace zipmoe
