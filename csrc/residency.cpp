#include "residency.h"

#include <iterator>
#include <limits>

namespace zipmoe {
namespace {

constexpr std::uint32_t kNoSlot = std::numeric_limits<std::uint32_t>::max();
// A node of the list: the value, two pointers, and what the allocator adds.
constexpr std::uint64_t kNodeBytes = 48;

}  // namespace

Residency::Residency(std::uint32_t num_experts, std::uint32_t num_slots)
    : experts_(num_experts, Expert{.slot = kNoSlot}), slots_(num_slots) {
  for (std::uint32_t slot = 0; slot < num_slots; ++slot) {
    slots_[slot].place = by_use_.insert(by_use_.end(), slot);
  }
}

bool Residency::begin_visit(std::uint32_t expert) {
  if (experts_[expert].visiting) return false;
  experts_[expert].visiting = true;
  return true;
}

void Residency::end_visit(std::uint32_t expert) { experts_[expert].visiting = false; }

void Residency::list(std::span<const std::uint32_t> experts) {
  ++list_number_;
  for (const std::uint32_t expert : experts) experts_[expert].listed = list_number_;
}

bool Residency::is_awaited(std::uint32_t expert) const {
  return experts_[expert].visiting && experts_[expert].listed == list_number_ && list_number_ > 0;
}

std::optional<std::uint32_t> Residency::slot_of(std::uint32_t expert) const {
  const std::uint32_t slot = experts_[expert].slot;
  return slot == kNoSlot ? std::nullopt : std::optional(slot);
}

std::optional<std::uint32_t> Residency::take(std::uint32_t expert, Victim victim) {
  const auto slot = find_victim(victim);
  if (!slot) return std::nullopt;
  if (slots_[*slot].state == SlotState::resident) {
    experts_[slots_[*slot].expert].slot = kNoSlot;
    ++num_evictions_;
  }
  slots_[*slot].expert = expert;
  slots_[*slot].state = SlotState::reading;
  slots_[*slot].num_pins = 0;
  experts_[expert].slot = *slot;
  touch(*slot);
  return slot;
}

std::optional<std::uint32_t> Residency::find_victim(Victim victim) const {
  std::optional<std::uint32_t> awaited;
  for (const std::uint32_t slot : by_use_) {
    const Slot& candidate = slots_[slot];
    if (candidate.state == SlotState::empty) return slot;
    if (candidate.state == SlotState::reading || candidate.num_pins > 0) continue;
    if (!is_awaited(candidate.expert)) return slot;
    if (!awaited) awaited = slot;
  }
  return victim == Victim::any ? awaited : std::nullopt;
}

void Residency::vacate(std::uint32_t slot) {
  experts_[slots_[slot].expert].slot = kNoSlot;
  slots_[slot].state = SlotState::empty;
  slots_[slot].num_pins = 0;
  by_use_.splice(by_use_.begin(), by_use_, slots_[slot].place);
}

void Residency::touch(std::uint32_t slot) {
  by_use_.splice(by_use_.end(), by_use_, slots_[slot].place);
}

std::uint64_t Residency::bytes(std::uint64_t num_experts, std::uint64_t num_slots) {
  return num_experts * sizeof(Expert) + num_slots * (sizeof(Slot) + kNodeBytes);
}

}  // namespace zipmoe
