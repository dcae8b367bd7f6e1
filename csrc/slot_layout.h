// How the memory of the expert cache is cut: pools of equal slots, each for one part of an expert.
// So any expert fits any slot of its pool, and nothing is ever moved. Records have a pool for each
// class of lengths (slot_classes.h), planes one for all. Pure arithmetic.
#pragma once
#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "expert_table.h"
#include "slot_classes.h"

namespace zipmoe {

// What a slot holds of an expert.
enum class Part : std::uint8_t {
  record,         // both planes of all matrices, as they lie in the shard
  sign_mantissa,  // that plane of all matrices, one after the other
  exponents,
  decoded,  // the weights themselves, one matrix after the other
};

// How many experts each tier holds.
struct TierCounts {
  std::uint64_t full = 0;  // decoded
  std::uint64_t compressed = 0;
  std::uint64_t sign_mantissa = 0;  // without their exponents
  std::uint64_t exponents = 0;      // without their sign-mantissas
};

struct SlotPool {
  Part part = Part::record;
  std::uint32_t num_slots = 0;
  std::uint64_t stride = 0;
  std::uint64_t begin = 0;  // in the arena
};

inline constexpr std::size_t kMaxPlanePools = 2;

// The pools that one expert has its slots in.
struct PoolRange {
  std::size_t first = 0, count = 1;
};

class SlotLayout {
 public:
  // Without `tiers` all slots are for records, as many as fit. With them the pools hold just these
  // (but kLeastSlots each, and no more than there are experts).
  //
  // One order of worth decides which experts keep a plane, so the pools of planes are nested: where
  // both planes are to be held alone, the common part of both holds whole experts. That takes the
  // same memory, and never reads more (docs/decisions/0013-tiers.md).
  //
  // Throws BudgetError where they do not fit, std::invalid_argument for tiers that need two planes
  // where all is stored raw, and for any but compressed where experts are integers: decoded ones
  // would be multiplied in another order, and bits must not depend on the cache.
  SlotLayout(const ExpertTable& table, std::uint64_t capacity_bytes,
             const std::optional<TierCounts>& tiers);

  static constexpr std::uint64_t kLeastSlots = 2;  // one to compute from, one to read into
  static std::uint64_t floor_bytes(const ExpertTable& table);
  // What a cache takes without a slot, then what an expert of each tier adds.
  static std::array<std::uint64_t, 5> tier_bytes(const ExpertTable& table);

  // Those that make up a whole expert: of records, or of each plane.
  [[nodiscard]] std::span<const SlotPool> planes() const { return planes_; }
  // That of decoded experts; it may have no slots.
  [[nodiscard]] const SlotPool& full() const { return full_; }
  // Those of a record: of its class, or of each plane.
  [[nodiscard]] PoolRange pools_of(std::uint32_t record) const {
    return has_records() ? PoolRange{classes_.of(record), 1} : PoolRange{0, planes_.size()};
  }
  // The pool of an extent, counted from the first of its record.
  [[nodiscard]] std::size_t pool_of(std::size_t extent) const { return has_records() ? 0 : extent; }
  // What is held when all slots are taken.
  [[nodiscard]] TierCounts tiers() const;
  [[nodiscard]] std::uint64_t arena_bytes() const;
  // All that a cache of these pools allocates.
  [[nodiscard]] std::uint64_t allocated_bytes() const { return allocated_bytes_; }

  // Whether fewer slots than there are may be used for a while: those of records, if there are no
  // others.
  [[nodiscard]] bool can_shrink() const { return has_records() && full_.num_slots == 0; }
  // Of such a layout, by pool: what a cache of its first slots takes, and how many fit into so much
  // (at least kLeastSlots, at most all).
  [[nodiscard]] std::uint64_t allocated_bytes(std::span<const std::uint32_t> num_slots) const;
  [[nodiscard]] std::vector<std::uint32_t> slots_within(std::uint64_t bytes) const;

 private:
  [[nodiscard]] bool has_records() const { return planes_.front().part == Part::record; }
  [[nodiscard]] std::uint64_t needed_bytes(const ExpertTable& table) const;
  [[nodiscard]] std::uint64_t most_experts(std::uint64_t bytes) const;

  SlotClasses classes_;
  std::vector<std::uint64_t> record_bytes_;  // by class: that a slot for a record adds
  std::uint64_t empty_bytes_ = 0;            // what a cache of records without a slot takes
  std::vector<SlotPool> planes_;
  SlotPool full_{.part = Part::decoded};
  std::uint64_t allocated_bytes_ = 0;
};

// Where an extent lies in a slot of a pool of planes or records.
std::uint64_t offset_in_slot(Part part, std::span<const ExpertMatrix> matrices, std::size_t matrix,
                             std::size_t extent);
// Where a decoded matrix lies in its slot.
std::uint64_t decoded_offset(std::span<const ExpertMatrix> matrices, std::size_t matrix);
std::uint64_t decoded_bytes(const MatrixSpec& spec);

}  // namespace zipmoe
