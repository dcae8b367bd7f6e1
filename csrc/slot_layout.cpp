#include "slot_layout.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "error.h"
#include "residency.h"

namespace zipmoe {
namespace {

// What is neither slots nor tables: the ring, the stacks of the reader's threads as far as they are
// used, requests under way, messages of errors.
constexpr std::uint64_t kOverheadBytes = std::uint64_t{1} << 20;
constexpr std::uint64_t kPerRecord = sizeof(std::uint32_t) + 1;  // wanted; read ahead
constexpr std::uint64_t kPerSlot = 192;                          // the read under way
constexpr std::uint64_t kDecodedAlignment = 64;

std::uint64_t part_bytes(Part part, std::span<const ExpertMatrix> matrices) {
  if (part == Part::decoded)
    return ceil_to(decoded_offset(matrices, matrices.size()), kReadAlignment);
  std::uint64_t bytes = 0;
  for (const ExpertMatrix& matrix : matrices) {
    if (part != Part::exponents) bytes += matrix.extents[0].padded();
    if (part != Part::sign_mantissa) bytes += matrix.extents[1].padded();
  }
  return bytes;
}

// Of the largest expert: decoding and multiplying read no further.
std::uint64_t stride_of(const ExpertTable& table, Part part) {
  std::uint64_t most = 0;
  for (const ExpertRecord& record : table.records())
    most = std::max(most, part_bytes(part, table.matrices(record)));
  return most;
}

SlotPool pool_of_part(const ExpertTable& table, Part part, std::uint64_t wanted) {
  const std::uint64_t most = table.records().size();
  return {.part = part,
          .num_slots =
              static_cast<std::uint32_t>(std::min(std::max(wanted, SlotLayout::kLeastSlots), most)),
          .stride = stride_of(table, part)};
}

std::uint64_t bytes_without_pools(const ExpertTable& table) {
  return kOverheadBytes + table.bytes() + table.decode_scratch() +
         table.records().size() * kPerRecord;
}

std::uint64_t pool_bytes(const ExpertTable& table, std::uint64_t num_slots, std::uint64_t stride) {
  return Residency::bytes(table.records().size(), table.num_layers(), num_slots) +
         num_slots * (kPerSlot + stride);
}

// What one slot more adds.
std::uint64_t slot_bytes(const ExpertTable& table, Part part) {
  const std::uint64_t stride = stride_of(table, part);
  return pool_bytes(table, 1, stride) - pool_bytes(table, 0, stride);
}

std::uint64_t least_bytes(const ExpertTable& table) {
  return bytes_without_pools(table) +
         pool_bytes(table, SlotLayout::kLeastSlots, table.largest_record_bytes());
}

void check_two_planes(const ExpertTable& table, const TierCounts& tiers) {
  if (tiers.full == 0 && tiers.sign_mantissa == 0 && tiers.exponents == 0) return;
  if (stride_of(table, Part::exponents) == 0)
    throw std::invalid_argument(
        "the experts are stored raw: they have one plane, and no tier but compressed");
}

}  // namespace

SlotLayout::SlotLayout(const ExpertTable& table, std::uint64_t capacity_bytes,
                       const std::optional<TierCounts>& tiers) {
  record_bytes_ = slot_bytes(table, Part::record);
  const std::uint64_t floor = least_bytes(table);
  if (capacity_bytes < floor)
    throw BudgetError("the expert cache needs " + std::to_string(floor) + " bytes, " +
                          std::to_string(capacity_bytes) + " are given: two slots of " +
                          std::to_string(table.largest_record_bytes()) +
                          " bytes and its own tables",
                      floor);
  if (!tiers) {
    const std::uint64_t base =
        bytes_without_pools(table) + pool_bytes(table, 0, stride_of(table, Part::record));
    planes_ = {pool_of_part(table, Part::record, (capacity_bytes - base) / record_bytes_)};
  } else {
    check_two_planes(table, *tiers);
    if (tiers->sign_mantissa == 0 && tiers->exponents == 0)
      planes_ = {pool_of_part(table, Part::record, tiers->compressed)};
    else
      planes_ = {pool_of_part(table, Part::sign_mantissa, tiers->compressed + tiers->sign_mantissa),
                 pool_of_part(table, Part::exponents, tiers->compressed + tiers->exponents)};
    if (tiers->full > 0) {
      full_ = pool_of_part(table, Part::decoded, tiers->full);
      full_.num_slots =
          static_cast<std::uint32_t>(std::min<std::uint64_t>(tiers->full, table.records().size()));
    }
  }
  std::uint64_t begin = 0;
  for (SlotPool& pool : planes_) {
    pool.begin = begin;
    begin += pool.num_slots * pool.stride;
  }
  full_.begin = begin;
  allocated_bytes_ = needed_bytes(table);
  if (allocated_bytes_ > capacity_bytes)
    throw BudgetError("these tiers need an expert cache of " + std::to_string(allocated_bytes_) +
                          " bytes, " + std::to_string(capacity_bytes) + " are given",
                      allocated_bytes_);
}

std::uint64_t SlotLayout::allocated_bytes(std::uint32_t num_slots) const {
  return allocated_bytes_ - (planes_.front().num_slots - num_slots) * record_bytes_;
}

std::uint32_t SlotLayout::slots_within(std::uint64_t bytes) const {
  const std::uint32_t all = planes_.front().num_slots;
  const std::uint64_t missing = allocated_bytes_ - std::min(bytes, allocated_bytes_);
  const std::uint64_t fewer = (missing + record_bytes_ - 1) / record_bytes_;
  const std::uint64_t left = all - std::min<std::uint64_t>(fewer, all);
  return static_cast<std::uint32_t>(
      std::max<std::uint64_t>(left, std::min<std::uint64_t>(kLeastSlots, all)));
}

std::uint64_t SlotLayout::floor_bytes(const ExpertTable& table) { return least_bytes(table); }

std::array<std::uint64_t, 5> SlotLayout::tier_bytes(const ExpertTable& table) {
  const auto part = [&](Part which) { return slot_bytes(table, which); };
  const std::uint64_t tables = pool_bytes(table, 0, 0);
  return {bytes_without_pools(table) + 3 * tables, part(Part::decoded),
          part(Part::sign_mantissa) + part(Part::exponents), part(Part::sign_mantissa),
          part(Part::exponents)};
}

TierCounts SlotLayout::tiers() const {
  const std::uint64_t first = planes_.front().num_slots, last = planes_.back().num_slots;
  const std::uint64_t whole = std::min(first, last);
  return {full_.num_slots, whole, first - whole, last - whole};
}

std::uint64_t SlotLayout::arena_bytes() const {
  return full_.begin + full_.num_slots * full_.stride;
}

std::uint64_t SlotLayout::needed_bytes(const ExpertTable& table) const {
  std::uint64_t bytes = bytes_without_pools(table);
  for (const SlotPool& pool : planes_) bytes += pool_bytes(table, pool.num_slots, pool.stride);
  if (full_.num_slots > 0) bytes += pool_bytes(table, full_.num_slots, full_.stride);
  return bytes;
}

std::uint64_t offset_in_slot(Part part, std::span<const ExpertMatrix> matrices, std::size_t matrix,
                             std::size_t extent) {
  if (part == Part::record)
    return matrices[matrix].extents[extent].offset - matrices.front().extents[0].offset;
  return part_bytes(part, matrices.first(matrix));
}

std::uint64_t decoded_offset(std::span<const ExpertMatrix> matrices, std::size_t matrix) {
  std::uint64_t offset = 0;
  for (const ExpertMatrix& before : matrices.first(matrix))
    offset += ceil_to(decoded_bytes(before.spec), kDecodedAlignment);
  return offset;
}

std::uint64_t decoded_bytes(const MatrixSpec& spec) {
  return spec.rows * spec.columns * spec.element_bytes;
}

}  // namespace zipmoe
