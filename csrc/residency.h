// Which expert lies in which slot, and which slot may be given to another. Who goes, of those that
// may, is for the policy to say (policy.h). Pure bookkeeping: no memory, reads, threads or locks.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "policy.h"

namespace zipmoe {

// What a slot holds may be all of an expert or a part of it; `reading`: it is being filled.
enum class SlotState : std::uint8_t { empty, reading, resident };

// What may be taken for a new expert, beyond empty slots: never one that is pinned or being read.
enum class Victim {
  worth_less,  // only experts that nobody is known to want and that are worth less than the new one
  idle,        // only experts that nobody is known to want, and as long as what has been read
               // beforehand does not crowd the slots
  any,         // if nothing else is left, those of the latest list and those expected after it too
};

// A slot, and who had to leave it.
struct Taken {
  std::uint32_t slot = 0;
  std::optional<std::uint32_t> evicted;
};

// What a pass wants of a layer.
struct LayerList {
  std::uint32_t layer = 0;
  std::span<const std::uint32_t> experts;
  std::uint32_t num_tokens = 1;
};

// An expert is *awaited* from the moment a list names it until its visit ends: so reading the last
// experts of a layer does not drop the first ones before their use.
//
// A *visit* is one use of an expert, matrix by matrix. It begins when a list names the expert or
// when it is first asked for, and ends with its last matrix. Hits and misses count visits, and
// policies are told of them.
class Residency {
 public:
  Residency(std::unique_ptr<Policy> policy, std::uint32_t num_experts, std::uint32_t num_slots);

  // See Policy.
  void begin_request(double share) { policy_->begin_request(share); }
  // False where a visit is under way already.
  bool begin_visit(std::uint32_t expert, std::uint32_t num_tokens = 1);
  void end_visit(std::uint32_t expert);
  // The experts wanted next; their visits do not begin by this. Forgets the list before; visits
  // under way stay so.
  void list(const LayerList& wanted);
  // The same of experts whose visits had begun and were ended before their time: they go on, and
  // nobody is told once more.
  void resume(std::uint32_t layer, std::span<const std::uint32_t> experts);
  [[nodiscard]] bool is_awaited(std::uint32_t expert) const;
  // Those that the list after this one may name. They are kept until it comes, unless nothing else
  // is left to go.
  void expect(std::span<const std::uint32_t> experts);

  [[nodiscard]] std::optional<std::uint32_t> slot_of(std::uint32_t expert) const;
  [[nodiscard]] std::uint32_t expert_in(std::uint32_t slot) const { return slots_[slot].expert; }
  [[nodiscard]] SlotState state(std::uint32_t slot) const { return slots_[slot].state; }

  // Whether there is no slot that could be had without anybody's leaving.
  [[nodiscard]] bool is_full() const { return empty_.empty(); }
  // Whether the expert is in a slot that nobody is using.
  [[nodiscard]] bool may_go(std::uint32_t expert) const;
  // Whether `take` would give the expert a slot.
  [[nodiscard]] bool can_take(std::uint32_t expert, Victim victim) const;
  // Gives the expert a slot, in state `reading`. Nothing where none may be taken.
  std::optional<Taken> take(std::uint32_t expert, Victim victim);
  void set_resident(std::uint32_t slot);
  // Empties the slot; its pins are void.
  void vacate(std::uint32_t slot);
  // From now on only the first so many slots may be taken. Experts in others are to leave.
  void set_limit(std::uint32_t num_slots);
  struct Departure {
    std::uint32_t from = 0;           // a slot beyond the limit, empty now
    std::optional<std::uint32_t> to;  // where its record is to be copied to, if it is kept
  };
  // One of those, if one is neither pinned nor being read. Of all that may go, the least worthy
  // does, and one beyond the limit comes to its place.
  std::optional<Departure> depart();
  void pin(std::uint32_t slot, std::uint32_t times = 1);
  void unpin(std::uint32_t slot);

  [[nodiscard]] std::uint64_t num_evictions() const { return num_evictions_; }
  // What an instance takes.
  static std::uint64_t bytes(std::uint64_t num_experts, std::uint64_t num_layers,
                             std::uint64_t num_slots);

 private:
  struct Expert {
    std::uint32_t slot;
    std::uint32_t listed = 0;  // number of the latest list that names it
    bool visiting = false;
    bool expected = false;  // in the list after this one
  };
  struct Slot {
    std::uint32_t expert = 0;  // meaningless while empty
    std::uint32_t num_pins = 0;
    SlotState state = SlotState::empty;
    bool is_fresh = false;  // no visit has ended since it was read
  };

  void await(std::span<const std::uint32_t> experts);
  void tell_policy(std::uint32_t expert);
  void evict(std::uint32_t expert);
  [[nodiscard]] static bool may_go(const Slot& slot) {
    return slot.state == SlotState::resident && slot.num_pins == 0;
  }
  [[nodiscard]] bool is_crowded() const;
  [[nodiscard]] std::optional<std::uint32_t> find_victim(std::uint32_t expert, Victim victim) const;
  [[nodiscard]] std::optional<std::uint32_t> last_to_go(
      std::span<const std::uint32_t> experts) const;

  std::unique_ptr<Policy> policy_;
  std::vector<Expert> experts_;
  std::vector<Slot> slots_;
  std::vector<std::uint32_t> empty_;     // slots that may be taken
  std::vector<std::uint32_t> listed_;    // experts of the latest list
  std::vector<std::uint32_t> expected_;  // experts of the next one, perhaps
  std::uint32_t list_number_ = 0;
  std::uint64_t num_evictions_ = 0;
  std::uint32_t limit_;
  std::uint32_t num_beyond_ = 0;  // slots that are not empty, though beyond the limit
};

}  // namespace zipmoe
