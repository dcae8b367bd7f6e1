// The expert cache's reads: from slots that were taken to bytes that are what they should be.
#include <algorithm>
#include <cstring>
#include <system_error>
#include <utility>

#include "cache.h"
#include "xxh3.h"

namespace zipmoe {
namespace {

std::string expert_name(const ExpertRecord& record) {
  return "expert " + std::to_string(record.expert) + " of layer " + std::to_string(record.layer);
}

}  // namespace

bool ExpertCache::start_read(std::uint32_t expert, Victim victim) {
  if (!tiers_.begin_read(expert, victim)) return false;
  is_ahead_[expert] = false;
  failed_.erase(expert);  // what went wrong before is tried again
  try {
    const auto read = std::make_shared<Read>(plan_read(expert));
    reads_.insert_or_assign(expert, read);
    if (const auto slot = read->slots[0]; slot && layout_.can_shrink())
      note_filled(layout_.pools_of(expert).first, *slot);
    submit(expert, *read);
  } catch (...) {
    tiers_.fail_read(expert);
    reads_.erase(expert);
    throw;
  }
  return true;
}

// Calls act(number of the matrix, extent, its bytes in memory) for each extent that a read brings,
// in the order of the file.
template <class Act>
void ExpertCache::for_each_extent(std::uint32_t expert, const Read& read, const Act& act) const {
  const auto matrices = table_.matrices(table_.records()[expert]);
  for (std::size_t m = 0; m < matrices.size(); ++m) {
    for (std::size_t i = 0; i < kExtentsPerMatrix; ++i) {
      const ExtentPlace& extent = matrices[m].extents[i];
      const std::size_t which = layout_.pool_of(i);
      if (!read.slots[which] || extent.length == 0) continue;
      const SlotPool& pool = layout_.planes()[layout_.pools_of(expert).first + which];
      std::byte* begin =
          in_slot(pool, *read.slots[which], offset_in_slot(pool.part, matrices, m, i));
      act(m, extent, std::span(begin, extent.padded()));
    }
  }
}

// A record that is missing whole is one stretch where its planes lie in one slot.
ExpertCache::Read ExpertCache::plan_read(std::uint32_t expert) const {
  Read read;
  read.slots = tiers_.slots_to_read(expert);
  for_each_extent(expert, read, [&](std::size_t, const ExtentPlace& extent, auto into) {
    read.bytes += into.size();
    if (!read.stretches.empty()) {
      Stretch& last = read.stretches.back();
      if (last.offset + last.into.size() == extent.offset &&
          last.into.data() + last.into.size() == into.data()) {
        last.into = {last.into.data(), last.into.size() + into.size()};
        return;
      }
    }
    read.stretches.push_back({extent.offset, into});
  });
  return read;
}

void ExpertCache::submit(std::uint32_t expert, const Read& read) {
  if (read.stretches.empty()) {  // all its matrices are empty
    finish_read(expert, std::nullopt);
    return;
  }
  reader_->submit({.tag = expert,
                   .file = &shards_[table_.records()[expert].shard],
                   .stretches = read.stretches});
}

void ExpertCache::read_done(std::uint64_t tag, const ReadResult& result) noexcept {
  try {
    const auto expert = static_cast<std::uint32_t>(tag);
    Lock lock(mutex_);
    const std::shared_ptr<Read> read = reads_.at(expert);
    lock.unlock();
    // Until the read is finished its slots are the reader's alone.
    std::optional<Failure> failure = result.ok() ? verify(expert, *read) : describe(expert, result);
    lock.lock();
    counters_.read_errors += result.retried + (failure ? 1 : 0);
    if (result.ok()) counters_.bytes_read += read->bytes;
    // Perhaps only the transfer was bad, or the drive was while another request ran.
    const bool may_pass = result.ok() || read->is_of_before;
    if (failure && may_pass && !closed_ && !std::exchange(read->repeated, true)) {
      submit(expert, *read);
      return;
    }
    finish_read(expert, std::move(failure));
    start_wanted();
  } catch (...) {
    reader_failed(std::current_exception());
  }
}

void ExpertCache::reader_failed(std::exception_ptr cause) noexcept {
  const Lock lock(mutex_);
  if (!broken_) broken_ = std::move(cause);
  changed_.notify_all();
}

void ExpertCache::finish_read(std::uint32_t expert, std::optional<Failure> failure) {
  const std::shared_ptr<Read> read = reads_.extract(expert).mapped();
  if (failure) {
    if (read->num_waiters == 0) failed_.insert_or_assign(expert, *failure);
    tiers_.fail_read(expert);
    // Lowered while it was being read.
    const std::size_t pool = layout_.pools_of(expert).first;
    if (const auto slot = read->slots[0]; slot && layout_.can_shrink() && *slot >= usable_[pool])
      give_back(pool, *slot);
    read->failure = std::move(failure);
  } else {
    tiers_.end_read(expert, read->num_waiters);
  }
  read->done = true;
  changed_.notify_all();
}

std::optional<ExpertCache::Failure> ExpertCache::verify(std::uint32_t expert,
                                                        const Read& read) const {
  const ExpertRecord& record = table_.records()[expert];
  std::optional<Failure> failure;
  for_each_extent(expert, read, [&](std::size_t matrix, const ExtentPlace& extent, auto bytes) {
    if (failure) return;
    if (xxh3({reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()}) != extent.xxh3)
      failure = corrupt(record, "wrong checksum in " + matrix_name(matrix, record.num_matrices),
                        extent.offset);
  });
  return failure;
}

ExpertCache::Failure ExpertCache::describe(std::uint32_t expert, const ReadResult& result) const {
  const ExpertRecord& record = table_.records()[expert];
  if (result.end_of_file) {
    return corrupt(record, "the file ends inside the record: it was truncated", result.offset);
  }
  const std::string& path = paths_[record.shard];
  return FetchError("cannot read " + expert_name(record) + " from " + path + " at offset " +
                        std::to_string(result.offset) + ": " +
                        std::generic_category().message(result.error),
                    path, result.offset, result.error);
}

CorruptError ExpertCache::corrupt(const ExpertRecord& record, const std::string& why,
                                  std::uint64_t offset) const {
  CorruptError error(why);
  error.file = paths_[record.shard];
  error.layer = record.layer;
  error.expert = record.expert;
  error.offset = offset;
  for (const ExpertMatrix& matrix : table_.matrices(record)) {
    for (std::size_t i = 0; i < matrix.extents.size(); ++i) {
      const ExtentPlace& extent = matrix.extents[i];
      if (offset >= extent.offset && offset - extent.offset < extent.padded()) {
        error.plane = plane_name(matrix.spec.codec, i);
      }
    }
  }
  return error;
}

std::byte* ExpertCache::in_slot(const SlotPool& pool, std::uint32_t slot,
                                std::uint64_t offset) const {
  return arena_.at(pool.begin + slot * pool.stride, pool.stride).data() + offset;
}

}  // namespace zipmoe
