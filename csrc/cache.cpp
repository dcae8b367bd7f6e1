#include "cache.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "xxh3.h"

namespace zipmoe {
namespace {

// What is neither slots nor tables: the ring, the stacks of the reader's threads as far as they are
// used, requests under way, messages of errors.
constexpr std::uint64_t kOverheadBytes = std::uint64_t{1} << 20;
constexpr std::uint64_t kLeastSlots = 2;

std::uint64_t slot_stride(const ExpertTable& table) {
  return table.largest_record_bytes();  // records are multiples of kReadAlignment; decoding reads
                                        // no further
}

// All that a cache of so many slots allocates.
std::uint64_t needed_bytes(const ExpertTable& table, std::uint64_t num_slots) {
  const std::uint64_t num_records = table.records().size();
  constexpr std::uint64_t kPerWanted = sizeof(std::uint32_t);
  constexpr std::uint64_t kPerSlot = 128;  // its share of reads_, and the read under way
  return kOverheadBytes + table.bytes() + table.decode_scratch() + num_records * kPerWanted +
         Residency::bytes(num_records, table.num_layers(), num_slots) +
         num_slots * (kPerSlot + slot_stride(table));
}

std::uint32_t slots_within(const ExpertTable& table, std::uint64_t capacity_bytes) {
  const std::uint64_t floor = needed_bytes(table, kLeastSlots);
  if (capacity_bytes < floor) {
    throw BudgetError("the expert cache needs " + std::to_string(floor) + " bytes, " +
                          std::to_string(capacity_bytes) + " are given: two slots of " +
                          std::to_string(slot_stride(table)) + " bytes and its own tables",
                      floor);
  }
  const std::uint64_t base = needed_bytes(table, 0);
  const std::uint64_t each = needed_bytes(table, 1) - base;
  const std::uint64_t fitting = (capacity_bytes - base) / each;
  return static_cast<std::uint32_t>(std::min<std::uint64_t>(fitting, table.records().size()));
}

std::uint64_t now_ns() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<std::uint64_t>(std::chrono::nanoseconds(now).count());
}

// The end of the reader, as the error that it is to callers.
[[noreturn]] void throw_reader_failure(const std::exception_ptr& cause) {
  try {
    std::rethrow_exception(cause);
  } catch (const std::system_error& error) {
    throw FetchError(std::string("the reader failed: ") + error.what(), "", 0,
                     error.code().value());
  } catch (const std::exception& error) {
    throw FetchError(std::string("the reader failed: ") + error.what(), "", 0, 0);
  }
}

std::string expert_name(const ExpertRecord& record) {
  return "expert " + std::to_string(record.expert) + " of layer " + std::to_string(record.layer);
}

}  // namespace

ExpertCache::ExpertCache(std::vector<std::string> paths, std::span<const std::uint64_t> table,
                         const CacheOptions& options)
    : paths_(std::move(paths)),
      table_(table, paths_),
      isa_(options.isa.empty() ? best_isa() : isa_from_name(options.isa)),
      slot_stride_(slot_stride(table_)),
      num_slots_(slots_within(table_, options.capacity_bytes)),
      allocated_bytes_(needed_bytes(table_, num_slots_)),
      policy_name_(options.policy.empty() ? kDefaultPolicy : options.policy),
      owner_(getpid()),
      residency_(make_policy(policy_name_, {table_.layers()}),
                 static_cast<std::uint32_t>(table_.records().size()), num_slots_),
      reads_(num_slots_),
      is_ahead_(num_slots_) {
  const ReaderChoice choice = reader_choice(options.reader);
  shards_.reserve(paths_.size());
  for (const std::string& path : paths_) shards_.emplace_back(path, choice.buffering);
  table_.check_inside(shards_);
  arena_ = Arena(slot_stride_ * num_slots_);
  reader_ = make_reader(choice, options.shape, *this);
  const bool direct = std::all_of(shards_.begin(), shards_.end(),
                                  [](const ShardFile& shard) { return shard.direct(); });
  reader_name_ = std::string(reader_->method()) + (direct ? "+direct" : "");
}

ExpertCache::~ExpertCache() { close(); }

std::uint64_t ExpertCache::floor_bytes(std::span<const std::uint64_t> table) {
  return needed_bytes(ExpertTable(table, {}), kLeastSlots);
}

void ExpertCache::close() {
  if (is_forked()) return;
  Lock lock(mutex_);
  if (std::exchange(closed_, true)) {
    changed_.wait(lock, [this] { return freed_; });
    return;
  }
  changed_.notify_all();
  changed_.wait(lock, [this] { return num_users_ == 0; });
  lock.unlock();
  reader_.reset();  // its threads may still be reporting reads: they need the lock for that
  shards_.clear();
  arena_ = {};
  lock.lock();
  allocated_bytes_ = 0;
  freed_ = true;
  changed_.notify_all();
}

void ExpertCache::prefetch(std::uint64_t layer, std::span<const std::uint64_t> experts,
                           std::span<const std::uint32_t> tokens, std::uint64_t num_tokens) {
  const std::vector<std::uint32_t> records = records_of(layer, experts);
  if (is_forked()) check_usable();
  const Lock lock(mutex_);
  check_usable();
  residency_.list(
      {static_cast<std::uint32_t>(layer), records, static_cast<std::uint32_t>(num_tokens)});
  for (std::size_t i = 0; i < records.size(); ++i)
    count_visit(records[i], tokens.empty() ? 1 : tokens[i]);
  want(records);
}

std::vector<std::uint32_t> ExpertCache::records_of(std::uint64_t layer,
                                                   std::span<const std::uint64_t> experts) const {
  std::vector<std::uint32_t> records;
  records.reserve(experts.size());
  for (const std::uint64_t expert : experts) records.push_back(table_.find(layer, expert));
  return records;
}

void ExpertCache::begin_request(double share) {
  if (is_forked()) check_usable();
  const Lock lock(mutex_);
  check_usable();
  residency_.begin_request(share);
}

Lease ExpertCache::acquire(std::uint64_t layer, std::uint64_t expert) {
  const std::uint32_t record = table_.find(layer, expert);
  if (is_forked()) check_usable();
  Lock lock(mutex_);
  check_usable();
  count_visit(record);
  ++num_users_;
  try {
    return Lease(*this, record, pin_resident(lock, record));
  } catch (...) {
    residency_.end_visit(record);
    --num_users_;
    changed_.notify_all();
    throw;
  }
}

std::optional<Lease> ExpertCache::try_acquire(std::uint64_t layer, std::uint64_t expert) {
  const std::uint32_t record = table_.find(layer, expert);
  if (is_forked()) check_usable();
  const Lock lock(mutex_);
  check_usable();
  const auto slot = residency_.slot_of(record);
  if (!slot || residency_.state(*slot) != SlotState::resident) return std::nullopt;
  count_visit(record);
  residency_.pin(*slot);
  ++num_users_;
  return Lease(*this, record, *slot);
}

// The slot of the expert's record, resident and pinned.
std::uint32_t ExpertCache::pin_resident(Lock& lock, std::uint32_t expert) {
  for (;;) {
    check_usable();
    if (const auto failure = failed_.extract(expert)) {
      std::visit([](const auto& error) { throw error; }, failure.mapped());
    }
    const auto slot = residency_.slot_of(expert);
    if (slot && residency_.state(*slot) == SlotState::resident) {
      residency_.pin(*slot);
      return *slot;
    }
    if (slot) return wait_for_read(lock, *slot);
    if (start_read(expert, Victim::any)) continue;
    ++num_slot_waiters_;
    wait(lock);
    --num_slot_waiters_;
  }
}

std::uint32_t ExpertCache::wait_for_read(Lock& lock, std::uint32_t slot) {
  // Pinned from here on: nobody may take the slot between the read's end and this thread's waking.
  residency_.pin(slot);
  const std::shared_ptr<Read> read = reads_[slot];
  ++read->num_waiters;
  while (!read->done) {
    check_usable();
    wait(lock);
  }
  if (read->failure) std::visit([](const auto& error) { throw error; }, *read->failure);
  return slot;
}

void ExpertCache::wait(Lock& lock) {
  const std::uint64_t begin = now_ns();
  changed_.wait(lock);
  counters_.wait_ns += now_ns() - begin;
}

void ExpertCache::release(std::uint32_t expert, std::uint32_t slot, bool ends_visit) noexcept {
  const Lock lock(mutex_);
  residency_.unpin(slot);
  if (ends_visit) residency_.end_visit(expert);
  --num_users_;
  try {
    start_wanted();
  } catch (...) {
    broken_ = std::current_exception();
  }
  changed_.notify_all();
}

void ExpertCache::check_usable() const {
  if (is_forked()) throw std::invalid_argument("an expert cache cannot be used after a fork");
  if (closed_) throw std::invalid_argument("the expert cache is closed");
  if (broken_) throw_reader_failure(broken_);
}

std::uint64_t ExpertCache::allocated_bytes() const {
  const Lock lock(mutex_);
  return allocated_bytes_;
}

bool ExpertCache::is_forked() const { return getpid() != owner_; }

void ExpertCache::count_visit(std::uint32_t expert, std::uint32_t num_tokens) {
  if (!residency_.begin_visit(expert, num_tokens)) return;
  const auto slot = residency_.slot_of(expert);
  ++(slot ? counters_.hits : counters_.misses);
  if (slot && is_ahead_[*slot]) {
    is_ahead_[*slot] = false;
    ++counters_.ahead_used;
  }
}

// Those of the latest list, in its order, as long as slots can be had without harm. A caller that
// waits for a slot comes first.
void ExpertCache::start_wanted() {
  if (closed_) return;
  while (!wanted_.empty() && num_slot_waiters_ == 0) {
    const std::uint32_t expert = wanted_.front();
    const bool to_read = residency_.is_awaited(expert) && !residency_.slot_of(expert);
    if (to_read && !start_read(expert, Victim::idle)) return;
    wanted_.pop_front();
  }
  start_ahead();
}

bool ExpertCache::start_read(std::uint32_t expert, Victim victim) {
  auto read = std::make_shared<Read>();
  const auto slot = residency_.take(expert, victim);
  if (!slot) return false;
  reads_[*slot] = std::move(read);
  is_ahead_[*slot] = false;
  ++num_reading_;
  failed_.erase(expert);  // what went wrong before is tried again
  try {
    submit(*slot);
  } catch (...) {
    residency_.vacate(*slot);
    --num_reading_;
    throw;
  }
  return true;
}

void ExpertCache::submit(std::uint32_t slot) {
  const ExpertRecord& record = table_.records()[residency_.expert_in(slot)];
  if (record.length == 0) {  // all its matrices are empty
    finish_read(slot, std::nullopt);
    return;
  }
  reader_->submit({.tag = slot,
                   .file = &shards_[record.shard],
                   .offset = record.offset,
                   .into = slot_bytes(slot, record)});
}

void ExpertCache::read_done(std::uint64_t tag, const ReadResult& result) noexcept {
  try {
    const auto slot = static_cast<std::uint32_t>(tag);
    std::optional<Failure> failure = result.ok() ? verify(slot) : describe(slot, result);
    const Lock lock(mutex_);
    counters_.read_errors += result.retried + (failure ? 1 : 0);
    if (result.ok()) {
      counters_.bytes_read += table_.records()[residency_.expert_in(slot)].length;
      // Perhaps only the transfer was bad.
      if (failure && !closed_ && !std::exchange(reads_[slot]->repeated, true)) {
        submit(slot);
        return;
      }
    }
    finish_read(slot, std::move(failure));
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

void ExpertCache::finish_read(std::uint32_t slot, std::optional<Failure> failure) {
  const std::shared_ptr<Read> read = std::exchange(reads_[slot], nullptr);
  --num_reading_;
  if (failure) {
    if (read->num_waiters == 0) failed_.insert_or_assign(residency_.expert_in(slot), *failure);
    residency_.vacate(slot);
    read->failure = std::move(failure);
  } else {
    residency_.set_resident(slot);
  }
  read->done = true;
  changed_.notify_all();
}

// The reader's thread owns a slot that is being read, so this needs no lock.
std::optional<ExpertCache::Failure> ExpertCache::verify(std::uint32_t slot) const {
  const ExpertRecord& record = table_.records()[residency_.expert_in(slot)];
  const std::span<const std::byte> bytes = slot_bytes(slot, record);
  std::size_t number = 0;
  for (const ExpertMatrix& matrix : table_.matrices(record)) {
    for (const ExtentPlace& extent : matrix.extents) {
      if (extent.length == 0) continue;
      const auto part = bytes.subspan(extent.offset - record.offset, extent.padded());
      if (xxh3({reinterpret_cast<const std::uint8_t*>(part.data()), part.size()}) != extent.xxh3) {
        const std::string name = matrix_name(number, record.num_matrices);
        return corrupt(record, "wrong checksum in " + name, extent.offset);
      }
    }
    ++number;
  }
  return std::nullopt;
}

ExpertCache::Failure ExpertCache::describe(std::uint32_t slot, const ReadResult& result) const {
  const ExpertRecord& record = table_.records()[residency_.expert_in(slot)];
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
        error.plane = plane_name(i);
      }
    }
  }
  return error;
}

std::span<std::byte> ExpertCache::slot_bytes(std::uint32_t slot, const ExpertRecord& record) const {
  return arena_.at(slot * slot_stride_, record.length);
}

const MatrixSpec& ExpertCache::spec(std::uint64_t layer, std::uint64_t expert,
                                    std::uint64_t matrix) const {
  const auto matrices = table_.matrices(table_.records()[table_.find(layer, expert)]);
  if (matrix < matrices.size()) return matrices[matrix].spec;
  throw std::invalid_argument("expert " + std::to_string(expert) + " of layer " +
                              std::to_string(layer) + " has no matrix " + std::to_string(matrix));
}

void ExpertCache::decode(std::uint64_t layer, std::uint64_t expert, std::uint64_t matrix,
                         const Target& target) {
  const MatrixSpec& wanted = spec(layer, expert, matrix);
  Lease lease = acquire(layer, expert);
  if (matrix + 1 < lease.num_matrices()) lease.keep_visit();
  const bool needs_scratch = decode_scratch_bytes(wanted) > 0;
  const auto turn = needs_scratch ? Lock(scratch_) : Lock();
  const std::uint64_t begin = now_ns();
  try {
    zipmoe::decode(wanted, lease.extents(matrix), target, isa_);
  } catch (const CorruptError& error) {
    throw located(error, layer, expert, matrix);
  }
  decode_ns_ += now_ns() - begin;
}

CorruptError ExpertCache::located(const CorruptError& error, std::uint64_t layer,
                                  std::uint64_t expert, std::uint64_t matrix) const {
  const ExpertRecord& record = table_.records()[table_.find(layer, expert)];
  const bool second = error.plane == kExponentPlane;
  const ExpertMatrix& place = table_.matrices(record)[matrix];
  return corrupt(record, error.reason + " in " + matrix_name(matrix, record.num_matrices),
                 place.extents[second ? 1 : 0].offset);
}

std::size_t ExpertCache::num_matrices(std::uint64_t layer, std::uint64_t expert) const {
  return table_.records()[table_.find(layer, expert)].num_matrices;
}

CacheCounters ExpertCache::counters() const {
  if (is_forked()) check_usable();
  const Lock lock(mutex_);
  if (closed_) check_usable();
  CacheCounters counters = counters_;
  counters.evictions = residency_.num_evictions();
  counters.decode_ns = decode_ns_;
  return counters;
}

}  // namespace zipmoe
