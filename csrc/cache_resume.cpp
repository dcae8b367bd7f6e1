// What a suspended pass wanted of the expert cache, and wants again when it goes on.
#include "cache.h"

namespace zipmoe {

void ExpertCache::pause(std::uint64_t layer, std::span<const std::uint64_t> experts) {
  const std::vector<std::uint32_t> records = records_of(layer, experts);
  if (is_forked()) check_usable();
  const Lock lock(mutex_);
  check_usable();
  for (const std::uint32_t record : records) tiers_.end_visit(record);
}

void ExpertCache::resume(std::uint64_t layer, std::span<const std::uint64_t> experts) {
  const std::vector<std::uint32_t> records = records_of(layer, experts);
  if (is_forked()) check_usable();
  const Lock lock(mutex_);
  check_usable();
  tiers_.resume(static_cast<std::uint32_t>(layer), records);
  want(records);
}

void ExpertCache::want(std::span<const std::uint32_t> records) {
  wanted_.assign(records.begin(), records.end());
  ahead_.clear();
  start_wanted();
}

}  // namespace zipmoe
