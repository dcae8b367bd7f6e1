// What of which expert is in memory, and what goes when something else needs the room. Pure
// bookkeeping, as Residency, of which there is one for each pool of slots.
//
// All pools follow one order of worth. Whoever is worth least in the pool of exponents loses its
// exponents and keeps its sign-mantissas as long as it is worth a slot there: it is demoted, not
// dropped. Each pool does what a cache of one tier with as many slots would do (replay.h).
//
// Decoded experts hold no planes. An expert becomes one when it is used and worth more than the
// least of them; that one is dropped, for coding it again would take longer than reading it.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "policy.h"
#include "residency.h"
#include "slot_layout.h"

namespace zipmoe {

// What of an expert is in memory. Where planes are not held apart, there is compressed and absent.
enum class Tier : std::uint8_t { full, compressed, sign_mantissa, exponents, absent };
inline constexpr std::size_t kNumTiers = 5;

// The slots of an expert in use.
struct Holding {
  std::array<std::uint32_t, kMaxPlanePools> planes{};  // by pool of the expert's; meaningless if
                                                       // it is decoded
  std::optional<std::uint32_t> full;  // where it is decoded, or will be, as `is_decoded` says
  bool is_decoded = false;
};

class Tiers {
 public:
  using MakePolicy = std::function<std::unique_ptr<Policy>()>;
  // The layout must stay where it is.
  Tiers(const MakePolicy& make_policy, std::uint32_t num_experts, const SlotLayout& layout);

  // See Residency.
  void begin_request(double share);
  bool begin_visit(std::uint32_t expert, std::uint32_t num_tokens);
  void end_visit(std::uint32_t expert);
  void list(const LayerList& wanted);
  void resume(std::uint32_t layer, std::span<const std::uint32_t> experts);
  void expect(std::span<const std::uint32_t> experts);
  [[nodiscard]] bool is_awaited(std::uint32_t expert) const {
    return planes_.front().is_awaited(expert);
  }

  // What is there, or will be when the read under way is over.
  [[nodiscard]] Tier tier(std::uint32_t expert) const;
  // Whether there is nothing to read.
  [[nodiscard]] bool is_whole(std::uint32_t expert) const {
    return tier(expert) <= Tier::compressed;
  }
  // Whether it can be used now.
  [[nodiscard]] bool is_ready(std::uint32_t expert) const {
    return is_decoded(expert) || are_planes_resident(expert);
  }
  [[nodiscard]] bool is_decoded(std::uint32_t expert) const;

  // A read: gives what is missing its slots and holds on to what is there. All or nothing.
  bool begin_read(std::uint32_t expert, Victim victim);
  // By pool of the expert's: the slot, if it is being read into.
  [[nodiscard]] std::array<std::optional<std::uint32_t>, kMaxPlanePools> slots_to_read(
      std::uint32_t expert) const;
  // The read has ended well: the expert can be used, and is held for each of those who wait.
  void end_read(std::uint32_t expert, std::uint32_t num_waiters);
  // It has not: what was to be read is not there.
  void fail_read(std::uint32_t expert);

  // See Residency; of a pool of a layout that can shrink.
  void set_limit(std::size_t pool, std::uint32_t num_slots) { planes_[pool].set_limit(num_slots); }
  [[nodiscard]] bool is_full() const {
    return std::all_of(planes_.begin(), planes_.end(),
                       [](const Residency& pool) { return pool.is_full(); });
  }
  [[nodiscard]] bool is_slot_empty(std::size_t pool, std::uint32_t slot) const {
    return planes_[pool].state(slot) == SlotState::empty;
  }
  std::optional<Residency::Departure> depart(std::size_t pool);

  // Holds an expert that can be used.
  Holding hold(std::uint32_t expert);
  // The same, after `end_read` has held it: whoever waited has the planes, even if another of them
  // has decoded it since.
  [[nodiscard]] Holding held_planes(std::uint32_t expert) const;
  // Gives an expert whose planes are held a slot for its decoded weights, if it is worth one.
  void promote(std::uint32_t expert, Holding& holding);
  // They are there: from now on they are what is held.
  void end_promotion(std::uint32_t expert, Holding& holding);
  void let_go(std::uint32_t expert, const Holding& holding);

  [[nodiscard]] std::uint64_t num_evictions() const { return num_evictions_; }
  [[nodiscard]] std::uint64_t num_demotions() const { return num_demotions_; }
  [[nodiscard]] std::uint64_t num_promotions() const { return num_promotions_; }

 private:
  template <class Do>
  void for_each_pool(const Do& act);
  // The pools that the expert has its planes in.
  [[nodiscard]] std::span<Residency> own(std::uint32_t expert);
  [[nodiscard]] std::span<const Residency> own(std::uint32_t expert) const;
  [[nodiscard]] bool are_planes_resident(std::uint32_t expert) const;
  [[nodiscard]] bool holds_plane(std::uint32_t expert) const;
  void count_leaving(const Taken& taken);
  void drop_planes(std::uint32_t expert);

  const SlotLayout& layout_;
  std::vector<Residency> planes_;  // by pool
  std::optional<Residency> full_;
  std::uint64_t num_evictions_ = 0;   // experts of which nothing is left
  std::uint64_t num_demotions_ = 0;   // those that lost a part and kept another
  std::uint64_t num_promotions_ = 0;  // those that were decoded to stay so
};

}  // namespace zipmoe
