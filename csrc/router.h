// Which experts a token goes to, and with what weights: the rules of the common families, in FP32.
// Stock rounds logits to BF16; where it finds two experts equal, the better one is taken here.
#pragma once
#include <cstdint>
#include <vector>

namespace zipmoe {

enum class RouterScore : std::uint8_t { softmax, sigmoid };  // of the logits
enum class GroupScore : std::uint8_t { best, two_best };     // a group's experts, added

struct RouterRule {
  std::uint32_t num_experts = 0, k = 0;
  RouterScore score = RouterScore::softmax;
  bool normalises = false;            // the chosen weights add up to 1
  float least_sum = 0.0F;             // added to their sum before it divides
  float scaling = 1.0F;               // of the weights
  const float* correction = nullptr;  // [num_experts], added to the scores for the choice alone
  std::uint32_t num_groups = 1, kept_groups = 1;  // only experts of the best groups are chosen
  GroupScore group_score = GroupScore::best;
};

// Throws std::invalid_argument for a rule that cannot be followed.
void check(const RouterRule& rule);

// Chooses for one token after the other. One per thread.
class Router {
 public:
  // From logits[num_experts]: k experts, the best first and of equals the lower number, and their
  // weights. NaN counts as the best.
  void choose(const RouterRule& rule, const float* logits, std::int64_t* experts, float* weights);

 private:
  void score(const RouterRule& rule, const float* logits);
  void drop_groups(const RouterRule& rule);

  std::vector<float> scores_, choice_, groups_;
  std::vector<bool> kept_;
};

}  // namespace zipmoe
