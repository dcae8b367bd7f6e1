#include <utility>

#include "cache.h"

namespace zipmoe {

Lease::Lease(Lease&& other) noexcept
    : cache_(std::exchange(other.cache_, nullptr)),
      expert_(other.expert_),
      slot_(other.slot_),
      ends_visit_(other.ends_visit_) {}

Lease::~Lease() {
  if (cache_ != nullptr) cache_->release(expert_, slot_, ends_visit_);
}

std::size_t Lease::num_matrices() const { return cache_->table_.records()[expert_].num_matrices; }

const ExpertMatrix& Lease::matrix(std::size_t matrix) const {
  return cache_->table_.matrices(cache_->table_.records()[expert_])[matrix];
}

const MatrixSpec& Lease::spec(std::size_t which) const { return matrix(which).spec; }

Extents Lease::extents(std::size_t which) const {
  const ExpertRecord& record = cache_->table_.records()[expert_];
  const std::span<const std::byte> bytes = cache_->slot_bytes(slot_, record);
  const auto part = [&](const ExtentPlace& extent) {
    const auto* data = reinterpret_cast<const std::uint8_t*>(bytes.data());
    return std::span(data + (extent.offset - record.offset), extent.length);
  };
  const auto& extents = matrix(which).extents;
  return {.sign_mantissa = part(extents[0]), .exponent = part(extents[1])};
}

}  // namespace zipmoe
