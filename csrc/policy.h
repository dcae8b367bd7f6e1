// Which expert goes when a slot is needed. Pure bookkeeping: no slots, memory, reads or locks.
//
// A policy gives every expert a *worth*, held or not, and the least worthy of those on offer goes.
// Worths change only with use, or all at once when a request begins. What differs between layers
// and changes with every one of them, how far ahead a layer is, is a factor for all of a layer's
// experts together. So each layer keeps its experts on offer in a heap, and a victim is the least
// of the heaps' tops: O(log experts of a layer) for an event, O(layers) for a choice.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace zipmoe {

// What a policy may know beforehand. Spans need to live only while a policy is made.
struct PolicySetup {
  std::span<const std::uint32_t> layers;  // by expert: its layer, counted from 0
  std::span<const double> popularity{};   // by expert; "static" needs it
  std::span<const std::uint32_t> uses{};  // all that will come, in order; "belady" needs it
};

class Policy {
 public:
  explicit Policy(const PolicySetup& setup);
  Policy(const Policy&) = delete;
  Policy& operator=(const Policy&) = delete;
  virtual ~Policy() = default;

  // A request begins. `share`: the part that it will have in the tokens to come, 1 where it runs
  // alone.
  virtual void begin_request(double /*share*/) {}
  // A pass with so many tokens has come to a layer.
  virtual void begin_layer(std::uint32_t layer, std::uint32_t num_tokens);
  // A pass that has been there before goes on in it, after others.
  void return_to(std::uint32_t layer) { current_ = layer; }
  // A visit of an expert by so many of these tokens. Comes once for each visit, hit or miss.
  virtual void use(std::uint32_t expert, std::uint32_t num_tokens) = 0;
  // It has been given a slot.
  virtual void admit(std::uint32_t /*expert*/) {}
  // It has lost its slot to another.
  virtual void evict(std::uint32_t /*expert*/) {}

  // Whether its slot may be taken; both may be repeated.
  void offer(std::uint32_t expert);
  void withdraw(std::uint32_t expert);
  // Of those on offer, the one to go first.
  [[nodiscard]] std::optional<std::uint32_t> victim() const;
  // Whether an expert is worth more than another; later use alone does not count.
  [[nodiscard]] bool is_worth_more(std::uint32_t expert, std::uint32_t other) const {
    return compared(worth(expert), layer_of(expert)) > compared(worth(other), layer_of(other));
  }

  // What an instance takes, at most.
  static std::uint64_t bytes(std::uint64_t num_experts, std::uint64_t num_layers);

 protected:
  static constexpr std::uint32_t kNowhere = ~std::uint32_t{0};

  // Also notes that it was used now, which decides between equals: the one used longest ago goes.
  void set_worth_used(std::uint32_t expert, double worth);
  void set_worth(std::uint32_t expert, double worth);
  // Of all experts, where their order may change.
  template <class Change>
  void change_worths(const Change& change);
  // What an expert of this layer, worth so much, is worth where layers are compared.
  [[nodiscard]] virtual double compared(double worth, std::uint32_t /*layer*/) const {
    return worth;
  }

  [[nodiscard]] double worth(std::uint32_t expert) const { return keys_[expert].worth; }
  [[nodiscard]] std::uint32_t num_experts() const {
    return static_cast<std::uint32_t>(keys_.size());
  }
  [[nodiscard]] std::uint32_t num_layers() const {
    return static_cast<std::uint32_t>(heaps_.size());
  }
  [[nodiscard]] std::uint32_t layer_of(std::uint32_t expert) const { return layers_[expert]; }
  [[nodiscard]] std::uint32_t current_layer() const { return current_; }
  // How many layers a pass goes on before it comes to this one; all of them for the current one.
  [[nodiscard]] std::uint32_t distance(std::uint32_t layer) const {
    return layer > current_ ? layer - current_ : layer + num_layers() - current_;
  }

 private:
  struct Key {
    double worth = 0;
    std::uint64_t used = 0;
    auto operator<=>(const Key&) const = default;
  };
  struct Heap {
    std::uint32_t begin = 0, size = 0;  // in places_
    Key least;                          // what its top is worth: choices look nowhere else
  };

  [[nodiscard]] bool before(std::uint32_t a, std::uint32_t b) const { return keys_[a] < keys_[b]; }
  void put(Heap& heap, std::uint32_t place, std::uint32_t expert);
  void rise(Heap& heap, std::uint32_t place);
  void sink(Heap& heap, std::uint32_t place);
  void settle(std::uint32_t expert);

  std::vector<std::uint32_t> layers_;
  std::vector<Key> keys_;
  std::vector<std::uint32_t> places_;  // experts on offer, a heap for each layer
  std::vector<std::uint32_t> at_;      // by expert: its place in its heap, or kNowhere
  std::vector<Heap> heaps_;
  std::uint64_t clock_ = 0;
  std::uint32_t current_ = 0;
};

template <class Change>
void Policy::change_worths(const Change& change) {
  for (std::uint32_t expert = 0; expert < num_experts(); ++expert)
    keys_[expert].worth = change(expert, keys_[expert].worth);
  for (Heap& heap : heaps_)
    for (std::uint32_t place = (heap.size + 1) / 2; place-- > 0;) sink(heap, place);
}

// The default.
inline constexpr std::string_view kDefaultPolicy = "request";

// "request", "lru", "lfu", "fifo", "marking", "edgemoe", "static", "belady" (policies.cpp says what
// they are). Throws std::invalid_argument for an unknown name, and where what it needs is missing.
std::unique_ptr<Policy> make_policy(std::string_view name, const PolicySetup& setup);
// All of them; those that need to be told something beforehand come last.
std::vector<std::string> policy_names();

}  // namespace zipmoe
