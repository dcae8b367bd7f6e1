#include "cache.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace zipmoe {
namespace {

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

}  // namespace

ExpertCache::ExpertCache(std::vector<std::string> paths, std::span<const std::uint64_t> table,
                         const CacheOptions& options)
    : paths_(std::move(paths)),
      table_(table, paths_),
      isa_(options.isa.empty() ? best_isa() : isa_from_name(options.isa)),
      layout_(table_, options.capacity_bytes, options.tiers),
      policy_name_(options.policy.empty() ? kDefaultPolicy : options.policy),
      owner_(getpid()),
      tiers_([this] { return make_policy(policy_name_, {table_.layers()}); },
             static_cast<std::uint32_t>(table_.records().size()), layout_),
      is_ahead_(table_.records().size()),
      num_usable_(static_cast<std::uint32_t>(layout_.tiers().compressed)),
      allocated_bytes_(layout_.allocated_bytes()) {
  const ReaderChoice choice = reader_choice(options.reader);
  shards_.reserve(paths_.size());
  for (const std::string& path : paths_) shards_.emplace_back(path, choice.buffering);
  table_.check_inside(shards_);
  arena_ = Arena(layout_.arena_bytes());
  for (const SlotPool& pool : layout_.planes()) {
    usable_.push_back(pool.num_slots);
    filled_.push_back(pool.num_slots);
  }
  if (options.limit_bytes != 0) set_limit(options.limit_bytes);
  for (std::size_t i = 0; i < filled_.size(); ++i)
    arena_.touch(layout_.planes()[i].begin, filled_[i] * layout_.planes()[i].stride);
  arena_.touch(layout_.full().begin, layout_.full().num_slots * layout_.full().stride);
  reader_ = make_reader(choice, options.shape, *this);
  const bool direct = std::all_of(shards_.begin(), shards_.end(),
                                  [](const ShardFile& shard) { return shard.direct(); });
  reader_name_ = std::string(reader_->method()) + (direct ? "+direct" : "");
}

ExpertCache::~ExpertCache() { close(); }

std::uint64_t ExpertCache::floor_bytes(std::span<const std::uint64_t> table) {
  return SlotLayout::floor_bytes(ExpertTable(table, {}));
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
  tiers_.list({static_cast<std::uint32_t>(layer), records, static_cast<std::uint32_t>(num_tokens)});
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
  tiers_.begin_request(share);
  failed_.clear();
  for (const auto& [expert, read] : reads_) read->is_of_before = true;
}

Lease ExpertCache::acquire(std::uint64_t layer, std::uint64_t expert) {
  const std::uint32_t record = table_.find(layer, expert);
  if (is_forked()) check_usable();
  Lock lock(mutex_);
  check_usable();
  count_visit(record);
  ++num_users_;
  try {
    Holding holding = hold(lock, record);
    tiers_.promote(record, holding);
    return Lease(*this, record, holding);
  } catch (...) {
    tiers_.end_visit(record);
    --num_users_;
    changed_.notify_all();
    throw;
  }
}

std::optional<Lease> ExpertCache::try_acquire(std::uint64_t layer, std::uint64_t expert,
                                              bool decoded) {
  const std::uint32_t record = table_.find(layer, expert);
  if (is_forked()) check_usable();
  const Lock lock(mutex_);
  check_usable();
  if (!(decoded ? tiers_.is_decoded(record) : tiers_.is_ready(record))) return std::nullopt;
  count_visit(record);
  Holding holding = tiers_.hold(record);
  tiers_.promote(record, holding);
  ++num_users_;
  return Lease(*this, record, holding);
}

// The slots of the expert, resident and pinned.
Holding ExpertCache::hold(Lock& lock, std::uint32_t expert) {
  for (;;) {
    check_usable();
    if (const auto failure = failed_.extract(expert)) {
      std::visit([](const auto& error) { throw error; }, failure.mapped());
    }
    if (tiers_.is_ready(expert)) return tiers_.hold(expert);
    if (tiers_.is_whole(expert)) return wait_for_read(lock, expert);
    if (start_read(expert, Victim::any)) continue;
    ++num_slot_waiters_;
    wait(lock);
    --num_slot_waiters_;
  }
}

// Nobody may take its slots between the read's end and this thread's waking: `finish_read` pins
// them for all who wait.
Holding ExpertCache::wait_for_read(Lock& lock, std::uint32_t expert) {
  const std::shared_ptr<Read> read = reads_.at(expert);
  ++read->num_waiters;
  while (!read->done) {
    check_usable();
    wait(lock);
  }
  if (read->failure) std::visit([](const auto& error) { throw error; }, *read->failure);
  return tiers_.held_planes(expert);
}

void ExpertCache::wait(Lock& lock) {
  const std::uint64_t begin = now_ns();
  changed_.wait(lock);
  counters_.wait_ns += now_ns() - begin;
}

void ExpertCache::release(std::uint32_t expert, const Holding& holding, bool ends_visit) noexcept {
  const Lock lock(mutex_);
  tiers_.let_go(expert, holding);
  if (ends_visit) tiers_.end_visit(expert);
  --num_users_;
  try {
    start_wanted();
  } catch (...) {
    broken_ = std::current_exception();
  }
  changed_.notify_all();
}

void ExpertCache::end_promotion(std::uint32_t expert, Holding& holding) {
  const Lock lock(mutex_);
  tiers_.end_promotion(expert, holding);
  start_wanted();  // its planes have left their slots
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
  if (!tiers_.begin_visit(expert, num_tokens)) return;
  const Tier tier = tiers_.tier(expert);
  ++counters_.visits[static_cast<std::size_t>(tier)];
  if (is_ahead_[expert]) {
    is_ahead_[expert] = false;
    if (tier <= Tier::compressed) ++counters_.ahead_used;
  }
}

// Those of the latest list, in its order, as long as slots can be had without harm. A caller that
// waits for a slot comes first.
void ExpertCache::start_wanted() {
  if (closed_) return;
  clear_beyond_limit();
  while (!wanted_.empty() && num_slot_waiters_ == 0) {
    const std::uint32_t expert = wanted_.front();
    const bool to_read = tiers_.is_awaited(expert) && !tiers_.is_whole(expert);
    if (to_read && !start_read(expert, Victim::idle)) return;
    wanted_.pop_front();
  }
  start_ahead();
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
  lease.decode_if_promoted();
  try {
    zipmoe::decode(lease.spec(matrix), lease.extents(matrix), target, isa_);
  } catch (const CorruptError& error) {
    throw located(error, layer, expert, matrix);
  }
  decode_ns_ += now_ns() - begin;
}

CorruptError ExpertCache::located(const CorruptError& error, std::uint64_t layer,
                                  std::uint64_t expert, std::uint64_t matrix) const {
  const ExpertRecord& record = table_.records()[table_.find(layer, expert)];
  const bool second = error.plane == kExponentPlane || error.plane == kScalesPlane;
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
  counters.evictions = tiers_.num_evictions();
  counters.demotions = tiers_.num_demotions();
  counters.promotions = tiers_.num_promotions();
  counters.decode_ns = decode_ns_;
  std::uint64_t waiting = 0;
  for (std::uint32_t expert = 0; expert < is_ahead_.size(); ++expert)
    waiting += is_ahead_[expert] && tiers_.is_whole(expert);
  counters.ahead_wasted = counters.ahead_reads - counters.ahead_used - waiting;
  return counters;
}

std::array<std::uint64_t, kNumTiers> ExpertCache::held() const {
  if (is_forked()) check_usable();
  const Lock lock(mutex_);
  if (closed_) check_usable();
  std::array<std::uint64_t, kNumTiers> held{};
  for (std::uint32_t expert = 0; expert < table_.records().size(); ++expert)
    ++held[static_cast<std::size_t>(tiers_.tier(expert))];
  return held;
}

}  // namespace zipmoe
