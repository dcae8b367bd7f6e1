#include "attention.h"

#include <array>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "attention_rows.h"
#include "buffer.h"

namespace zipmoe {
namespace {

using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

// Query rows that go through the keys of a head together, if their scores fit.
constexpr u32 kMostRows = 32;
constexpr u64 kScoreBytes = u64{1} << 20;
// Turning keys pays from so many rows on.
constexpr u32 kTurnFrom = 4;

// Rows of a key/value head in one piece, counted as (query, head of the group), heads first.
u32 rows_per_piece(const AttentionInput& input, unsigned threads) {
  const AttentionShape& shape = input.shape;
  const u64 rows = shape.queries * (shape.heads / shape.kv_heads);
  u64 most = 1;
  for (const CachedTokens& cached : input.cached) most = std::max(most, cached.count);
  const u64 fitting = std::max<u64>(kScoreBytes / (sizeof(float) * most), kTurnFrom);
  const u64 pairs = shape.batch * shape.kv_heads;
  // Few heads: smaller pieces rather than idle threads.
  const u64 wanted = (rows * pairs + threads - 1) / threads;
  return static_cast<u32>(std::clamp<u64>(std::min(fitting, wanted), 1, kMostRows));
}

void check(const AttentionInput& input, const AttentionRule& rule) {
  const AttentionShape& shape = input.shape;
  if (shape.kv_heads == 0 || shape.heads % shape.kv_heads != 0)
    throw std::invalid_argument("the query heads are no multiple of the key heads");
  if (input.cached.size() != shape.batch)
    throw std::invalid_argument("sequences without keys of their own");
  for (const CachedTokens& cached : input.cached)
    if (cached.count >= std::numeric_limits<u32>::max())
      throw std::invalid_argument("too many keys");
  if (rule.bias.data != nullptr && rule.bias.type == MaskType::boolean)
    throw std::invalid_argument("a bias is not boolean");
  if (rule.window != 0 && !rule.causal) throw std::invalid_argument("a window without causal");
}

}  // namespace

// A few query rows of one key/value head, and the room for them.
class Attention::Tile {
 public:
  explicit Tile(const AttentionKernels& kernels) : kernels_(kernels) {}

  void run(const AttentionInput& input, const AttentionRule& rule, u64 batch, u64 kv_head,
           u64 first_row, u32 count, const HeadTensor<u16>& out) {
    input_ = &input;
    cached_ = &input.cached[batch];
    rule_ = &rule;
    batch_ = batch;
    kv_head_ = kv_head;
    count_ = count;
    collect_rows(first_row);
    copy_queries();
    compute_scores();
    compute_weights();
    add_values();
    for (u32 r = 0; r < count_; ++r) {
      u16* to = out.at(batch_, rows_[r].head, rows_[r].query);
      const u32 width = input.shape.value_width;
      if (rows_[r].keys == 0)
        std::memset(to, 0, width * sizeof(u16));
      else
        kernels_.finish(totals_ + r * total_stride(), rows_[r].factor, width, to);
    }
  }

 private:
  struct Row {
    u64 query, head;
    u32 first_run, num_runs, keys;
    float* scores;
    float factor;  // 1 / the sum of the weights
  };
  struct Piece {
    u32 begin, end, number;
  };

  std::span<const KeyRun> runs(const Row& row) const {
    return {runs_.data() + row.first_run, row.num_runs};
  }
  u32 query_stride() const { return padded_words(input_->shape.key_width); }
  u32 total_stride() const { return padded_words(input_->shape.value_width); }
  HeadRows keys(u32 begin, u32 end) const {
    return rows_of(cached_->keys, cached_->key_head, cached_->key_row, begin, end,
                   input_->shape.key_width);
  }
  HeadRows values(u32 begin, u32 end) const {
    return rows_of(cached_->values, cached_->value_head, cached_->value_row, begin, end,
                   input_->shape.value_width);
  }
  HeadRows rows_of(const u16* data, std::ptrdiff_t head, std::ptrdiff_t row, u32 begin, u32 end,
                   u32 width) const {
    return {data + static_cast<std::ptrdiff_t>(kv_head_) * head + begin * row, row, end - begin,
            width};
  }

  void collect_rows(u64 first_row);
  void copy_queries();
  void compute_scores();
  void compute_weights();
  void add_values();
  void add_block(u32 first, u32 count, u32 begin, u32 end);
  void restart();

  const AttentionKernels& kernels_;
  const AttentionInput* input_ = nullptr;
  const CachedTokens* cached_ = nullptr;  // of the sequence
  const AttentionRule* rule_ = nullptr;
  u64 batch_ = 0, kv_head_ = 0;
  u32 count_ = 0;
  u32 begin_ = 0, end_ = 0;  // the keys that any row may see are within
  std::array<Row, kMostRows> rows_{};
  std::array<KeyCursor, kMostRows> cursors_;
  std::vector<KeyRun> runs_;
  std::vector<Piece> pieces_[kValueRows];
  Buffer query_room_, score_room_, bias_room_, turned_room_, block_room_, total_room_;
  u16* queries_ = nullptr;
  float* totals_ = nullptr;
};

// Rows that see the same keys share their runs: a mask is read once for the heads of a group.
void Attention::Tile::collect_rows(u64 first_row) {
  const AttentionShape& shape = input_->shape;
  const u64 group = shape.heads / shape.kv_heads;
  runs_.clear();
  begin_ = std::numeric_limits<u32>::max();
  end_ = 0;
  u64 scores = 0;
  for (u32 r = 0; r < count_; ++r) {
    Row& row = rows_[r];
    row.query = (first_row + r) / group;
    row.head = kv_head_ * group + (first_row + r) % group;
    const bool same = r != 0 && row.query == rows_[r - 1].query &&
                      (rule_->mask.data == nullptr || rule_->mask.head == 0);
    if (same) {
      row.first_run = rows_[r - 1].first_run;
    } else {
      row.first_run = static_cast<u32>(runs_.size());
      append_runs(*rule_, cached_->count, batch_, row.head, row.query, runs_);
    }
    row.num_runs = static_cast<u32>(runs_.size()) - row.first_run;
    row.keys = 0;
    for (const KeyRun& run : runs(row)) row.keys += run.end - run.begin;
    if (row.num_runs != 0) {
      begin_ = std::min(begin_, runs(row).front().begin);
      end_ = std::max(end_, runs(row).back().end);
    }
    scores += (row.keys + kScoreSums - 1) / kScoreSums * kScoreSums;
  }
  float* at = aligned_room<float>(score_room_, scores);
  for (u32 r = 0; r < count_; ++r) {
    rows_[r].scores = at;
    at += (rows_[r].keys + kScoreSums - 1) / kScoreSums * kScoreSums;
  }
}

void Attention::Tile::restart() {
  for (u32 r = 0; r < count_; ++r) cursors_[r] = KeyCursor(runs(rows_[r]));
}

void Attention::Tile::copy_queries() {
  const u32 width = input_->shape.key_width;
  queries_ = aligned_room<u16>(query_room_, u64{count_} * query_stride());
  for (u32 r = 0; r < count_; ++r) {
    u16* to = queries_ + r * query_stride();
    std::memcpy(to, input_->queries.at(batch_, rows_[r].head, rows_[r].query), width * sizeof(u16));
    std::memset(to + width, 0, (query_stride() - width) * sizeof(u16));
  }
}

void Attention::Tile::compute_scores() {
  restart();
  const bool turns = kernels_.turn != nullptr && count_ >= kTurnFrom;
  u32* turned = nullptr;
  float* block = nullptr;
  if (turns) {
    turned = aligned_room<u32>(turned_room_, u64{query_stride()} / 2 * kKeyBlock);
    block = aligned_room<float>(block_room_, u64{count_} * kKeyBlock);
  }
  for (u32 begin = begin_; begin < end_; begin += kKeyBlock) {
    const u32 end = std::min(end_, begin + kKeyBlock);
    if (turns) {
      kernels_.turn(keys(begin, end), turned);
      kernels_.turned_scores(queries_, query_stride(), count_, turned, input_->shape.key_width,
                             block);
    }
    for (u32 r = 0; r < count_; ++r)
      cursors_[r].within(begin, end, [&](u32 first, u32 last, u32 number) {
        float* to = rows_[r].scores + number;
        if (turns)
          std::memcpy(to, block + r * kKeyBlock + (first - begin), (last - first) * sizeof(float));
        else
          kernels_.scores(queries_ + r * query_stride(), keys(first, last), to);
      });
  }
}

void Attention::Tile::compute_weights() {
  const bool adds = rule_->mask.data != nullptr && rule_->mask.type != MaskType::boolean;
  const AttentionSinks& sinks = rule_->sinks;
  for (u32 r = 0; r < count_; ++r) {
    Row& row = rows_[r];
    if (row.keys == 0) continue;
    Softmax how{rule_->scaling, rule_->softcap, nullptr, nullptr};
    if (adds || rule_->bias.data != nullptr) {
      const u32 padded = (row.keys + kScoreSums - 1) / kScoreSums * kScoreSums;
      float* bias = aligned_room<float>(bias_room_, padded);
      std::memset(bias, 0, padded * sizeof(float));
      if (rule_->bias.data != nullptr)
        add_bias(rule_->bias, batch_, row.head, row.query, runs(row), bias);
      if (adds) add_bias(rule_->mask, batch_, row.head, row.query, runs(row), bias);
      std::fill(bias + row.keys, bias + padded, bias[row.keys - 1]);
      how.bias = bias;
    }
    if (sinks.data != nullptr)
      how.sink = sinks.data + static_cast<std::ptrdiff_t>(batch_) * sinks.batch +
                 static_cast<std::ptrdiff_t>(row.head) * sinks.head +
                 static_cast<std::ptrdiff_t>(row.query) * sinks.row;
    row.factor = kernels_.softmax(row.scores, row.keys, how);
  }
}

void Attention::Tile::add_values() {
  restart();
  totals_ = aligned_room<float>(total_room_, u64{count_} * total_stride());
  std::memset(totals_, 0, u64{count_} * total_stride() * sizeof(float));
  for (u32 begin = begin_; begin < end_; begin += kKeyBlock) {
    const u32 end = std::min(end_, begin + kKeyBlock);
    for (u32 first = 0; first < count_; first += kValueRows)
      add_block(first, std::min(kValueRows, count_ - first), begin, end);
  }
}

// Keys that all rows of a few may see go through them together, those before and after row by row:
// every row gets its own in ascending order.
void Attention::Tile::add_block(u32 first, u32 count, u32 begin, u32 end) {
  u32 common = begin, common_end = end;
  bool in_one_piece = true;
  for (u32 r = 0; r < count; ++r) {
    std::vector<Piece>& pieces = pieces_[r];
    pieces.clear();
    cursors_[first + r].within(
        begin, end, [&](u32 from, u32 to, u32 number) { pieces.push_back({from, to, number}); });
    in_one_piece = in_one_piece && pieces.size() == 1;
    if (!in_one_piece) continue;
    common = std::max(common, pieces[0].begin);
    common_end = std::min(common_end, pieces[0].end);
  }
  const auto add_alone = [&](u32 r, u32 from, u32 to, u32 number) {
    if (from >= to) return;
    const float* weights = rows_[first + r].scores + number;
    kernels_.add(&weights, 1, values(from, to), totals_ + (first + r) * total_stride(),
                 total_stride());
  };
  if (!in_one_piece || common >= common_end) {
    for (u32 r = 0; r < count; ++r)
      for (const Piece& piece : pieces_[r]) add_alone(r, piece.begin, piece.end, piece.number);
    return;
  }
  const float* weights[kValueRows];
  for (u32 r = 0; r < count; ++r) {
    const Piece& piece = pieces_[r][0];
    add_alone(r, piece.begin, common, piece.number);
    weights[r] = rows_[first + r].scores + piece.number + (common - piece.begin);
  }
  kernels_.add(weights, count, values(common, common_end), totals_ + first * total_stride(),
               total_stride());
  for (u32 r = 0; r < count; ++r) {
    const Piece& piece = pieces_[r][0];
    add_alone(r, common_end, piece.end, piece.number + (common_end - piece.begin));
  }
}

Attention::Attention(unsigned threads, Isa isa)
    : Attention(threads == 0 ? nullptr : std::make_shared<WorkerPool>(threads), isa) {}

Attention::Attention(std::shared_ptr<WorkerPool> pool, Isa isa)
    : own_pool_(std::move(pool)), isa_(isa), kernels_(attention_kernels(isa)) {}

Attention::~Attention() = default;

std::shared_ptr<WorkerPool> Attention::pool() const {
  return own_pool_ ? own_pool_ : shared_pool();
}

void Attention::run(const AttentionInput& input, const AttentionRule& rule,
                    const HeadTensor<u16>& out) {
  check(input, rule);
  const AttentionShape& shape = input.shape;
  const u64 rows = shape.queries * (shape.heads / shape.kv_heads);
  if (rows == 0) return;
  const std::lock_guard one(mutex_);
  const auto workers = pool();
  while (tiles_.size() < workers->num_threads()) tiles_.push_back(std::make_unique<Tile>(kernels_));
  const u32 per_piece = rows_per_piece(input, workers->num_threads());
  const u64 pieces = (rows + per_piece - 1) / per_piece;
  workers->run(pieces * shape.batch * shape.kv_heads, 1, [&](unsigned thread, u64 begin, u64 end) {
    for (u64 i = begin; i < end; ++i) {
      const u64 head = i / pieces;
      // With causal the last rows take longest: they come first.
      const u64 first = (pieces - 1 - i % pieces) * per_piece;
      const auto count = static_cast<u32>(std::min<u64>(per_piece, rows - first));
      tiles_[thread]->run(input, rule, head / shape.kv_heads, head % shape.kv_heads, first, count,
                          out);
    }
  });
}

}  // namespace zipmoe
