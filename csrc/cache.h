// The expert cache: experts in a fixed amount of memory, compressed unless tiers are asked for.
//
// A record is read whole, or where one of its planes is there the other alone. Every checksum of
// what was read is verified, and only then is its slot resident: nothing is ever decoded from other
// bytes. One mutex guards all bookkeeping; reading, verifying and decoding happen outside it. Every
// wait is for a read, or for a slot that a read or another caller is using, and each of those ends,
// well or with an error.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <variant>
#include <vector>

#include "arena.h"
#include "codec.h"
#include "error.h"
#include "expert_table.h"
#include "isa.h"
#include "reader.h"
#include "slot_layout.h"
#include "tiers.h"

namespace zipmoe {

struct CacheOptions {
  std::uint64_t capacity_bytes = 0;  // all that the cache may ever allocate
  std::uint64_t limit_bytes = 0;     // see `limit`: to begin with; 0: the capacity
  std::string reader;                // see reader_choice; empty: the best that works
  std::string isa;                   // empty: the best of this machine
  ReadShape shape;
  std::string policy;               // see make_policy; empty: kDefaultPolicy
  std::optional<TierCounts> tiers;  // none: all compressed
};

struct CacheCounters {
  // Visits (see Residency) by what of the expert they found, or its read under way.
  std::array<std::uint64_t, kNumTiers> visits{};
  std::uint64_t bytes_read = 0;   // of reads that were completed, padding included
  std::uint64_t evictions = 0;    // experts dropped for others
  std::uint64_t demotions = 0;    // those of which a part was kept
  std::uint64_t promotions = 0;   // decoded to stay so
  std::uint64_t read_errors = 0;  // failed requests and wrong checksums, those cured by a retry too
  std::uint64_t wait_ns = 0;      // that callers spent waiting
  std::uint64_t decode_ns = 0;    // that callers spent decoding
  std::uint64_t ahead_reads = 0;  // experts read because `look_ahead` named them
  std::uint64_t ahead_used = 0;   // of these, visited before they were dropped
  std::uint64_t ahead_wasted = 0;  // of these, dropped or failed before any visit

  [[nodiscard]] std::uint64_t found(Tier tier) const {
    return visits[static_cast<std::size_t>(tier)];
  }
};

class Lease;

// Calls may come from several threads at once. Forking is not supported: in a forked child every
// call throws, close() does nothing, and the object must not be destroyed (its threads are not
// there).
class ExpertCache final : private ReadSink {
 public:
  // `table`: kTableColumns numbers per matrix (expert_table.h).
  // Throws std::invalid_argument for unknown names and tiers that the codec does not have,
  // BudgetError below floor_bytes and where the tiers do not fit, FetchError where a shard
  // cannot be opened, FormatError and CorruptError where table and shards do not fit the format.
  ExpertCache(std::vector<std::string> paths, std::span<const std::uint64_t> table,
              const CacheOptions& options);
  ExpertCache(const ExpertCache&) = delete;
  ExpertCache& operator=(const ExpertCache&) = delete;
  ~ExpertCache();

  // The least capacity: two slots (one to decode from, one to read into) and all that is not slots.
  static std::uint64_t floor_bytes(std::span<const std::uint64_t> table);

  // Starts reading those that are absent and goes on with them in the background as slots become
  // free. Never waits for a read; what goes wrong surfaces when the expert is asked for. `tokens`:
  // how many of the pass's `num_tokens` chose each; empty: one each.
  void prefetch(std::uint64_t layer, std::span<const std::uint64_t> experts,
                std::span<const std::uint32_t> tokens = {}, std::uint64_t num_tokens = 1);
  // A pass that is suspended wants these no more for now, and goes on with them: they are as after
  // `prefetch`, but their visits have been counted.
  void pause(std::uint64_t layer, std::span<const std::uint64_t> experts);
  void resume(std::uint64_t layer, std::span<const std::uint64_t> experts);
  // A request begins, which will have this part of the tokens to come: 1 where it runs alone. What
  // could not be read for those before it is tried again.
  void begin_request(double share);

  // What may be wanted after that. It is read while the drive would be idle: when nothing of the
  // latest `prefetch` waits for a read. Forgotten at the next `prefetch`. Those that are there are
  // kept rather than others.
  void look_ahead(std::uint64_t layer, std::span<const std::uint64_t> experts);
  // True where all experts are there or on their way: nothing needs to be looked ahead for.
  [[nodiscard]] bool holds_all() const;

  // The expert, read if need be, held in its slots until the lease ends. A thread that holds leases
  // on all slots must not ask for one more: nobody would ever free one. Throws FetchError or
  // CorruptError where the read failed; the cache stays usable.
  Lease acquire(std::uint64_t layer, std::uint64_t expert);
  // The same if the expert is there; never waits for a read. `decoded`: only if it is so.
  std::optional<Lease> try_acquire(std::uint64_t layer, std::uint64_t expert, bool decoded = false);

  // What is asked for by (layer, expert, matrix); throws std::invalid_argument where there is none.
  [[nodiscard]] const MatrixSpec& spec(std::uint64_t layer, std::uint64_t expert,
                                       std::uint64_t matrix) const;
  // Decodes one matrix of spec(...) into the target. Throws as acquire.
  void decode(std::uint64_t layer, std::uint64_t expert, std::uint64_t matrix,
              const Target& target);

  // The same error with file, layer, expert and offset of the matrix filled in.
  [[nodiscard]] CorruptError located(const CorruptError& error, std::uint64_t layer,
                                     std::uint64_t expert, std::uint64_t matrix) const;
  // How many matrices an expert has; throws std::invalid_argument where there is no such expert.
  [[nodiscard]] std::size_t num_matrices(std::uint64_t layer, std::uint64_t expert) const;

  [[nodiscard]] CacheCounters counters() const;
  // How many experts are there of each tier, or will be when the reads under way are over.
  [[nodiscard]] std::array<std::uint64_t, kNumTiers> held() const;
  // Waits for calls and leases of others, which end with an error where they still wait for a read;
  // frees threads, files and memory. Any later call throws std::invalid_argument. Idempotent.
  void close();

  // From now on it takes no more bytes than `most`, but at least floor_bytes and at most its
  // capacity; what it will come to is returned. Experts that have no place any more are dropped,
  // the least worthy first, and their memory goes back to the system: at once, or as soon as nobody
  // uses them. Tiers that were asked for stay as they are.
  std::uint64_t limit(std::uint64_t most);

  // True in a child of the process that made it.
  [[nodiscard]] bool is_forked() const;

  // "io_uring+direct", "io_uring", "pread+direct" or "pread": what engaged.
  [[nodiscard]] const std::string& reader_name() const { return reader_name_; }
  [[nodiscard]] Isa isa() const { return isa_; }
  [[nodiscard]] const std::string& policy_name() const { return policy_name_; }
  // How many experts can be there whole.
  [[nodiscard]] std::uint64_t num_slots() const { return tiers().full + tiers().compressed; }
  [[nodiscard]] TierCounts tiers() const;
  // Within the limit; 0 once closed.
  [[nodiscard]] std::uint64_t allocated_bytes() const;
  // Of these, the memory that slots have really taken, those that were touched at any time.
  [[nodiscard]] std::uint64_t filled_bytes() const;

 private:
  friend class Lease;
  using Failure = std::variant<CorruptError, FetchError>;
  using Lock = std::unique_lock<std::mutex>;
  // A read under way; whoever waits for it holds a share.
  struct Read {
    std::array<std::optional<std::uint32_t>, kMaxPlanePools> slots;  // by pool: those read into
    std::vector<Stretch> stretches;
    std::uint64_t bytes = 0;
    std::optional<Failure> failure;
    unsigned num_waiters = 0;
    bool done = false;
    bool repeated = false;
    bool is_of_before = false;  // begun for an earlier request
  };

  void read_done(std::uint64_t tag, const ReadResult& result) noexcept override;
  void reader_failed(std::exception_ptr cause) noexcept override;

  // All of these with the lock held.
  void check_usable() const;
  void count_visit(std::uint32_t expert, std::uint32_t num_tokens = 1);
  bool start_read(std::uint32_t expert, Victim victim);
  void submit(std::uint32_t expert, const Read& read);
  void want(std::span<const std::uint32_t> records);
  void start_wanted();
  void start_ahead();
  void finish_read(std::uint32_t expert, std::optional<Failure> failure);
  void set_limit(std::uint64_t most);
  void clear_beyond_limit();
  void give_back(std::size_t pool, std::uint32_t slot);
  void note_filled(std::size_t pool, std::uint32_t slot);
  void wait(Lock& lock);
  Holding hold(Lock& lock, std::uint32_t expert);
  Holding wait_for_read(Lock& lock, std::uint32_t expert);

  // Without it.
  [[nodiscard]] std::vector<std::uint32_t> records_of(std::uint64_t layer,
                                                      std::span<const std::uint64_t> experts) const;
  void release(std::uint32_t expert, const Holding& holding, bool ends_visit) noexcept;
  void end_promotion(std::uint32_t expert, Holding& holding);
  template <class Act>
  void for_each_extent(std::uint32_t expert, const Read& read, const Act& act) const;
  [[nodiscard]] Read plan_read(std::uint32_t expert) const;
  [[nodiscard]] std::optional<Failure> verify(std::uint32_t expert, const Read& read) const;
  [[nodiscard]] Failure describe(std::uint32_t expert, const ReadResult& result) const;
  [[nodiscard]] CorruptError corrupt(const ExpertRecord& record, const std::string& why,
                                     std::uint64_t offset) const;
  [[nodiscard]] std::byte* in_slot(const SlotPool& pool, std::uint32_t slot,
                                   std::uint64_t offset) const;

  // Fixed once constructed.
  std::vector<std::string> paths_;
  ExpertTable table_;
  Isa isa_;
  SlotLayout layout_;
  std::string policy_name_;
  std::string reader_name_;
  std::int64_t owner_;  // the process
  std::vector<ShardFile> shards_;
  Arena arena_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  Tiers tiers_;
  std::unordered_map<std::uint32_t, std::shared_ptr<Read>> reads_;  // by expert
  std::unordered_map<std::uint32_t, Failure> failed_;  // by expert: reads that nobody waited for
  std::deque<std::uint32_t> wanted_;                   // of the latest list, not yet started
  std::deque<std::uint32_t> ahead_;                    // of what may come after it
  std::vector<bool> is_ahead_;                         // by expert: read ahead, not visited yet
  std::atomic<std::uint32_t> num_usable_;              // whole experts within the limit
  std::vector<std::uint32_t> usable_;  // by pool, where the layout can shrink: slots within it
  std::uint64_t allocated_bytes_ = 0;
  std::vector<std::uint32_t> filled_;  // by pool: its first slots, that have been touched
  CacheCounters counters_;
  std::uint64_t num_users_ = 0;         // calls and leases under way
  std::uint64_t num_slot_waiters_ = 0;  // callers for whom no slot was left
  std::exception_ptr broken_;           // the reader's end
  bool closed_ = false;
  bool freed_ = false;

  std::atomic<std::uint64_t> decode_ns_ = 0;
  std::mutex scratch_;  // one at a time, of codecs that need room of their own to decode
  std::unique_ptr<Reader> reader_;
};

// An expert that stays where it is while this lives: kernels compute straight from its extents.
class Lease {
 public:
  Lease(Lease&& other) noexcept;
  Lease& operator=(Lease&&) = delete;
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  ~Lease();

  [[nodiscard]] std::size_t num_matrices() const;
  // As it lies in memory: raw if it is decoded.
  [[nodiscard]] MatrixSpec spec(std::size_t matrix) const;
  // Exact bytes, without padding.
  [[nodiscard]] Extents extents(std::size_t matrix) const;
  // Decodes all of it into memory that was set aside for that, if there is such; from then on it is
  // decoded for this lease and all later ones. Throws CorruptError, with the place filled in.
  void decode_if_promoted(unsigned threads = 1);
  // The visit goes on after this lease: more matrices will be asked for.
  void keep_visit() { ends_visit_ = false; }

 private:
  friend class ExpertCache;
  Lease(ExpertCache& cache, std::uint32_t expert, const Holding& holding)
      : cache_(&cache), expert_(expert), holding_(holding) {}
  [[nodiscard]] std::span<const ExpertMatrix> matrices() const;
  [[nodiscard]] std::byte* decoded(std::size_t matrix) const;

  ExpertCache* cache_;
  std::uint32_t expert_;
  Holding holding_;
  bool ends_visit_ = true;
};

}  // namespace zipmoe
