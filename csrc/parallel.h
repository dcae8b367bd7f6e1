// Work split over threads; the first failure reaches the caller.
#pragma once
#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace zipmoe {

// Calls work(part, begin, end) for `threads` contiguous, even parts of 0..count, the last part on
// the calling thread. Waits for all, then rethrows the failure of the lowest part.
template <class Work>
void parallel_ranges(std::uint64_t count, unsigned threads, const Work& work) {
  const std::uint64_t parts =
      std::clamp<std::uint64_t>(threads, 1, std::max<std::uint64_t>(count, 1));
  std::vector<std::exception_ptr> failures(parts);
  auto run = [&](std::uint64_t part) noexcept {
    try {
      work(part, count * part / parts, count * (part + 1) / parts);
    } catch (...) {
      failures[part] = std::current_exception();
    }
  };
  {
    std::vector<std::jthread> others;
    others.reserve(parts - 1);
    for (std::uint64_t part = 0; part + 1 < parts; ++part) others.emplace_back(run, part);
    run(parts - 1);
  }
  for (const std::exception_ptr& failure : failures)
    if (failure) std::rethrow_exception(failure);
}

}  // namespace zipmoe
