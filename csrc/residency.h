// Which expert lies in which slot, and which slot may be given to another: the policy of the cache.
// Pure bookkeeping: no memory, reads, threads or locks. Other policies go here.
#pragma once
#include <cstdint>
#include <list>
#include <optional>
#include <span>
#include <vector>

namespace zipmoe {

enum class SlotState : std::uint8_t { empty, reading, resident };

// What may be taken for a new expert, beyond empty slots: never one that is pinned or being read.
enum class Victim {
  idle,  // only experts that nobody is known to want
  any,   // those of the latest list too, if nothing else is left
};

// Least recently used goes first. An expert is *awaited* from the moment a list names it until its
// visit ends: so reading the last experts of a layer does not drop the first ones before their use.
//
// A *visit* is one use of an expert, matrix by matrix. It begins when a list names the expert or
// when it is first asked for, and ends with its last matrix. Hits and misses count visits.
class Residency {
 public:
  Residency(std::uint32_t num_experts, std::uint32_t num_slots);

  // False where a visit is under way already.
  bool begin_visit(std::uint32_t expert);
  void end_visit(std::uint32_t expert);
  // The experts wanted next. Forgets the list before; visits under way stay so.
  void list(std::span<const std::uint32_t> experts);
  [[nodiscard]] bool is_awaited(std::uint32_t expert) const;

  [[nodiscard]] std::optional<std::uint32_t> slot_of(std::uint32_t expert) const;
  [[nodiscard]] std::uint32_t expert_in(std::uint32_t slot) const { return slots_[slot].expert; }
  [[nodiscard]] SlotState state(std::uint32_t slot) const { return slots_[slot].state; }

  // Gives the expert a slot, in state `reading`, most recently used. Nothing where none may be
  // taken.
  std::optional<std::uint32_t> take(std::uint32_t expert, Victim victim);
  void set_resident(std::uint32_t slot) { slots_[slot].state = SlotState::resident; }
  // Empties the slot; its pins are void.
  void vacate(std::uint32_t slot);
  void touch(std::uint32_t slot);
  void pin(std::uint32_t slot) { ++slots_[slot].num_pins; }
  void unpin(std::uint32_t slot) { --slots_[slot].num_pins; }

  [[nodiscard]] std::uint64_t num_evictions() const { return num_evictions_; }
  // What an instance takes.
  static std::uint64_t bytes(std::uint64_t num_experts, std::uint64_t num_slots);

 private:
  struct Expert {
    std::uint32_t slot;
    std::uint32_t listed = 0;  // number of the latest list that names it
    bool visiting = false;
  };
  struct Slot {
    std::uint32_t expert = 0;  // meaningless while empty
    std::uint32_t num_pins = 0;
    SlotState state = SlotState::empty;
    std::list<std::uint32_t>::iterator place;  // in by_use_
  };

  [[nodiscard]] std::optional<std::uint32_t> find_victim(Victim victim) const;

  std::vector<Expert> experts_;
  std::vector<Slot> slots_;
  std::list<std::uint32_t> by_use_;  // slots, the one used longest ago first
  std::uint32_t list_number_ = 0;
  std::uint64_t num_evictions_ = 0;
};

}  // namespace zipmoe
