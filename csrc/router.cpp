#include "router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <stdexcept>

#include "scalar.h"

namespace zipmoe {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

bool is_better(float one, float other) {
  return one > other || (std::isnan(one) && !std::isnan(other));
}

// Takes the best out of `values`.
std::size_t take_best(std::span<float> values) {
  std::size_t best = 0;
  for (std::size_t i = 1; i < values.size(); ++i)
    if (is_better(values[i], values[best])) best = i;
  values[best] = kNever;
  return best;
}

}  // namespace

void check(const RouterRule& rule) {
  const std::uint32_t groups = rule.num_groups;
  if (groups == 0 || rule.num_experts % groups != 0 || rule.kept_groups == 0 ||
      rule.kept_groups > groups || rule.k == 0 ||
      rule.k > rule.num_experts / groups * rule.kept_groups)
    throw std::invalid_argument("a router that chooses more experts than there are to choose from");
}

void Router::score(const RouterRule& rule, const float* logits) {
  scores_.resize(rule.num_experts);
  std::copy_n(logits, rule.num_experts, scores_.begin());
  if (rule.score == RouterScore::sigmoid) {
    for (float& value : scores_) value = 1.0F / (1.0F + exp_of(-value));
    return;
  }
  const float largest = *std::max_element(scores_.begin(), scores_.end());
  float sum = 0.0F;
  for (float& value : scores_) sum += value = exp_of(value - largest);
  for (float& value : scores_) value /= sum;
}

// Experts outside the best groups are not to be chosen.
void Router::drop_groups(const RouterRule& rule) {
  groups_.resize(rule.num_groups);
  const std::size_t size = choice_.size() / groups_.size();
  for (std::size_t g = 0; g < groups_.size(); ++g) {
    float best = kNever, second = kNever;
    for (const float value : std::span(choice_).subspan(g * size, size)) {
      if (is_better(value, best)) {
        second = best;
        best = value;
      } else if (is_better(value, second)) {
        second = value;
      }
    }
    groups_[g] = rule.group_score == GroupScore::best ? best : best + second;
  }
  kept_.assign(rule.num_groups, false);
  for (std::uint32_t i = 0; i < rule.kept_groups; ++i) kept_[take_best(groups_)] = true;
  for (std::size_t g = 0; g < groups_.size(); ++g)
    if (!kept_[g])
      std::fill_n(choice_.begin() + static_cast<std::ptrdiff_t>(g * size), size, kNever);
}

void Router::choose(const RouterRule& rule, const float* logits, std::int64_t* experts,
                    float* weights) {
  score(rule, logits);
  choice_.resize(rule.num_experts);
  for (std::uint32_t e = 0; e < rule.num_experts; ++e)
    choice_[e] = rule.correction == nullptr ? scores_[e] : scores_[e] + rule.correction[e];
  if (rule.kept_groups < rule.num_groups) drop_groups(rule);
  float sum = 0.0F;
  for (std::uint32_t i = 0; i < rule.k; ++i) {
    const std::size_t best = take_best(choice_);
    experts[i] = static_cast<std::int64_t>(best);
    sum += weights[i] = scores_[best];
  }
  for (std::uint32_t i = 0; i < rule.k; ++i) {
    if (rule.normalises) weights[i] /= sum + rule.least_sum;
    weights[i] *= rule.scaling;
  }
}

}  // namespace zipmoe
