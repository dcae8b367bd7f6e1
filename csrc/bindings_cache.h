// The expert cache as the bindings hold it.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cache.h"

namespace zipmoe {

// The cache as Python owns it: a forked child must leave it alone when it collects its garbage.
class CacheHandle {
 public:
  CacheHandle(std::vector<std::string> paths, std::span<const std::uint64_t> numbers,
              const CacheOptions& options) {
    nanobind::gil_scoped_release release;
    cache_ = std::make_unique<ExpertCache>(std::move(paths), numbers, options);
  }
  CacheHandle(const CacheHandle&) = delete;
  CacheHandle& operator=(const CacheHandle&) = delete;
  ~CacheHandle() {
    if (cache_->is_forked()) (void)cache_.release();
  }
  ExpertCache* operator->() const { return cache_.get(); }
  [[nodiscard]] ExpertCache* get() const { return cache_.get(); }

 private:
  std::unique_ptr<ExpertCache> cache_;
};

}  // namespace zipmoe
