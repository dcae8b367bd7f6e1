// The policies. Except for "request", which is ours, they are there to compare with.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "policy.h"

namespace zipmoe {
namespace {

class Lru final : public Policy {
 public:
  using Policy::Policy;
  void use(std::uint32_t expert, std::uint32_t) override { set_worth_used(expert, 0); }
};

// By visits since the beginning, of experts that were dropped in between too.
class Lfu final : public Policy {
 public:
  using Policy::Policy;
  void use(std::uint32_t expert, std::uint32_t) override {
    set_worth_used(expert, worth(expert) + 1);
  }
};

class Fifo final : public Policy {
 public:
  using Policy::Policy;
  void use(std::uint32_t, std::uint32_t) override {}
  void admit(std::uint32_t expert) override { set_worth_used(expert, 0); }
};

// Whoever is used is marked; one of those without a mark goes, at random; when all are marked, a
// new phase begins and no one is. An expert marked in phase p is worth p and a random fraction.
class Marking final : public Policy {
 public:
  using Policy::Policy;
  void use(std::uint32_t expert, std::uint32_t) override { mark(expert); }
  void evict(std::uint32_t expert) override {
    if (worth(expert) >= phase_) ++phase_;
  }
  void admit(std::uint32_t expert) override { mark(expert); }  // perhaps the first of a phase

 private:
  void mark(std::uint32_t expert) { set_worth_used(expert, phase_ + draw()); }
  double draw() {  // in [0, 1), the same in every run: splitmix64
    std::uint64_t z = (state_ += 0x9E3779B97F4A7C15U);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
    return static_cast<double>((z ^ (z >> 31)) >> 12) * 0x1p-52;
  }

  double phase_ = 1;
  std::uint64_t state_ = 0;
};

// EdgeMoE (arXiv 2308.14352): seldom used and far ahead goes first. The distance is the corrected
// one: as printed, the layer just finished would count as the next one.
class EdgeMoe final : public Policy {
 public:
  using Policy::Policy;
  void use(std::uint32_t expert, std::uint32_t) override {
    set_worth_used(expert, worth(expert) + 1);
  }

 private:
  [[nodiscard]] double compared(double worth, std::uint32_t layer) const override {
    if (layer == current_layer()) return std::numeric_limits<double>::infinity();
    return worth / distance(layer);
  }
};

// The most popular stay; in the slots that are left, the others take turns.
class Static final : public Policy {
 public:
  explicit Static(const PolicySetup& setup) : Policy(setup) {
    for (std::uint32_t expert = 0; expert < num_experts(); ++expert)
      set_worth(expert, setup.popularity[expert]);
  }
  void use(std::uint32_t, std::uint32_t) override {}
};

// Whoever is used again last goes: no policy misses less. It knows the future.
class Belady final : public Policy {
 public:
  explicit Belady(const PolicySetup& setup) : Policy(setup), next_(setup.uses.size()) {
    std::vector<double> coming(num_experts(), std::numeric_limits<double>::infinity());
    for (std::size_t i = next_.size(); i-- > 0;) {
      double& next = coming[setup.uses[i]];
      next_[i] = next;
      next = static_cast<double>(i);
    }
  }
  void use(std::uint32_t expert, std::uint32_t) override {
    if (at_ == next_.size()) throw std::invalid_argument("more uses than belady was told of");
    set_worth_used(expert, -next_[at_++]);
  }

 private:
  std::vector<double> next_;  // by use: the number of the same expert's next one
  std::size_t at_ = 0;
};

// Ours. An expert is worth the part of a request's tokens that can be expected to choose it. That
// is estimated from the tokens seen so far and, as long as they are few, from what earlier requests
// chose, which counts as much as kPriorTokens tokens. A prompt tells as much about the tokens that
// follow as they do of each other; what few of its tokens chose is worth little, so that it cannot
// flush what many want. The layer just computed is the last to be needed again: of two experts that
// are worth the same, the one that has to wait longer goes.
//
// docs/planning.md ("Replacement") says how the constants were found.
class ByRequest final : public Policy {
 public:
  explicit ByRequest(const PolicySetup& setup)
      : Policy(setup), before_(num_experts()), seen_(num_layers()) {
    for (std::uint32_t d = 1; d <= num_layers(); ++d)
      discount_.push_back(std::exp(-kDiscount * d / num_layers()));
  }

  void begin_request(double share) override {
    change_worths([&](std::uint32_t expert, double now) {
      const Seen& seen = seen_[layer_of(expert)];
      const double prior = before_[expert] / std::max(1.0, seen.before) * kPriorTokens;
      return (1 - share) * now / seen.weight + share * prior;
    });
    for (Seen& seen : seen_) {
      seen.tokens = (1 - share) * seen.tokens / seen.weight + share * kPriorTokens;
      seen.weight = 1;
    }
  }

  void begin_layer(std::uint32_t layer, std::uint32_t num_tokens) override {
    Policy::begin_layer(layer, num_tokens);
    Seen& seen = seen_[layer];
    const double counted = std::min<double>(num_tokens, kPassTokens);
    seen.weight *= std::exp2(counted / kHalfLife);
    if (seen.weight > kLargestWeight) begin_request(0);
    if (seen.before > kTokensBefore) forget();
    each_ = counted / num_tokens;
    seen.tokens += seen.weight * counted;
    seen.before += counted;
  }

  void use(std::uint32_t expert, std::uint32_t num_tokens) override {
    const double counted = each_ * num_tokens;
    before_[expert] += static_cast<float>(counted);
    set_worth_used(expert, worth(expert) + seen_[layer_of(expert)].weight * counted);
  }

 private:
  static constexpr double kPriorTokens = 16;
  static constexpr double kDiscount = 1;  // exp(-this) is the factor of a layer a whole pass away
  static constexpr double kPassTokens = 64;         // a longer prompt counts no more than that
  static constexpr double kHalfLife = 128;          // tokens after which a use counts half
  static constexpr double kTokensBefore = 1 << 16;  // after which earlier ones count half
  static constexpr double kLargestWeight = 1e100;

  // Of a layer. Newer tokens weigh more, instead of older ones less: so no worth changes without
  // use.
  struct Seen {
    double tokens = kPriorTokens;  // that its experts' worths are of, weighed as they are
    double weight = 1;
    double before = 0;  // tokens of all requests
  };

  [[nodiscard]] double compared(double worth, std::uint32_t layer) const override {
    return worth / seen_[layer].tokens * discount_[distance(layer) - 1];
  }

  void forget() {
    for (float& chosen : before_) chosen /= 2;
    for (Seen& seen : seen_) seen.before /= 2;
  }

  std::vector<float> before_;  // by expert: tokens of all requests that chose it
  std::vector<Seen> seen_;
  std::vector<double> discount_;  // by distance
  double each_ = 1;               // how much a token of this pass counts
};

template <class Kind>
std::unique_ptr<Policy> make(const PolicySetup& setup) {
  return std::make_unique<Kind>(setup);
}

struct Entry {
  std::string_view name;
  std::unique_ptr<Policy> (*make)(const PolicySetup&);
};

constexpr std::array kPolicies{
    Entry{"request", make<ByRequest>}, Entry{"lru", make<Lru>},
    Entry{"lfu", make<Lfu>},           Entry{"fifo", make<Fifo>},
    Entry{"marking", make<Marking>},   Entry{"edgemoe", make<EdgeMoe>},
    Entry{"static", make<Static>},     Entry{"belady", make<Belady>},
};

}  // namespace

std::unique_ptr<Policy> make_policy(std::string_view name, const PolicySetup& setup) {
  const auto* found = std::find_if(kPolicies.begin(), kPolicies.end(),
                                   [&](const Entry& entry) { return entry.name == name; });
  if (found == kPolicies.end())
    throw std::invalid_argument("unknown policy '" + std::string(name) + "'");
  if (name == "static" && setup.popularity.size() != setup.layers.size())
    throw std::invalid_argument("the policy 'static' needs a popularity for each expert");
  if (name == "belady" && setup.uses.empty())
    throw std::invalid_argument("the policy 'belady' needs to be told the future");
  return found->make(setup);
}

std::vector<std::string> policy_names() {
  std::vector<std::string> names;
  for (const Entry& entry : kPolicies) names.emplace_back(entry.name);
  return names;
}

}  // namespace zipmoe
