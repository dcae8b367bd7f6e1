// Which keys a query row may see: runs of neighbours, and the numbers they get when the others are
// left out.
#pragma once
#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "attention.h"

namespace zipmoe {

struct KeyRun {
  std::uint32_t begin, end;
};

// Appends the runs of `keys` keys that query `row` of a head may see, in ascending order.
void append_runs(const AttentionRule& rule, std::uint64_t keys, std::uint64_t batch,
                 std::uint64_t head, std::uint64_t row, std::vector<KeyRun>& runs);

// Adds the mask's value for each key of `runs`, in order, to out[0], out[1], ...
void add_bias(const AttentionMask& mask, std::uint64_t batch, std::uint64_t head, std::uint64_t row,
              std::span<const KeyRun> runs, float* out);

// Walks through a row's keys in blocks; blocks must come in ascending order.
class KeyCursor {
 public:
  KeyCursor() = default;
  explicit KeyCursor(std::span<const KeyRun> runs)
      : run_(runs.data()), end_(runs.data() + runs.size()) {}

  // Calls use(first key, one after the last, number of the first) for each run within [begin, end).
  template <class Use>
  void within(std::uint32_t begin, std::uint32_t end, const Use& use) {
    for (; run_ != end_ && run_->begin < end; ++run_) {
      const std::uint32_t first = std::max(run_->begin, begin), last = std::min(run_->end, end);
      if (first < last) use(first, last, number_ + (first - run_->begin));
      if (run_->end > end) return;
      number_ += run_->end - run_->begin;
    }
  }

 private:
  const KeyRun* run_ = nullptr;
  const KeyRun* end_ = nullptr;
  std::uint32_t number_ = 0;  // of the run's first key
};

}  // namespace zipmoe
