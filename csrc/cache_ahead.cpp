// The expert cache's second queue: what may be wanted next.
#include <deque>
#include <optional>

#include "cache.h"

namespace zipmoe {
namespace {

// Records under way while others are read ahead: the drive goes on with one while another is
// verified.
constexpr std::size_t kReadsAhead = 2;

}  // namespace

bool ExpertCache::holds_all() const {
  if (num_usable_ != table_.records().size()) return false;
  const Lock lock(mutex_);
  return tiers_.is_full();
}

void ExpertCache::look_ahead(std::uint64_t layer, std::span<const std::uint64_t> experts) {
  const std::vector<std::uint32_t> records = records_of(layer, experts);
  if (is_forked()) check_usable();
  const Lock lock(mutex_);
  check_usable();
  tiers_.expect(records);
  ahead_.assign(records.begin(), records.end());
  start_ahead();
}

// Few at a time, so that what is wanted next waits for few.
void ExpertCache::start_ahead() {
  while (!ahead_.empty() && wanted_.empty() && num_slot_waiters_ == 0 &&
         reads_.size() < kReadsAhead) {
    const std::uint32_t expert = ahead_.front();
    if (!tiers_.is_whole(expert)) {
      if (!start_read(expert, Victim::idle)) return;
      is_ahead_[expert] = true;
      ++counters_.ahead_reads;
    }
    ahead_.pop_front();
  }
}

}  // namespace zipmoe
