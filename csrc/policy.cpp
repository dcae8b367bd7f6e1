#include "policy.h"

#include <algorithm>
#include <stdexcept>

namespace zipmoe {

Policy::Policy(const PolicySetup& setup)
    : layers_(setup.layers.begin(), setup.layers.end()),
      keys_(layers_.size()),
      places_(layers_.size(), kNowhere),
      at_(layers_.size(), kNowhere) {
  std::uint32_t num_layers = 0;
  for (const std::uint32_t layer : layers_) num_layers = std::max(num_layers, layer + 1);
  heaps_.resize(num_layers);
  for (const std::uint32_t layer : layers_) ++heaps_[layer].size;
  std::uint32_t begin = 0;
  for (Heap& heap : heaps_) {
    heap.begin = begin;
    begin += heap.size;
    heap.size = 0;
  }
}

std::uint64_t Policy::bytes(std::uint64_t num_experts, std::uint64_t num_layers) {
  // The vectors of the base, and those of the policy that has most.
  return num_experts * (sizeof(Key) + 3 * sizeof(std::uint32_t) + sizeof(float)) +
         num_layers * (sizeof(Heap) + 4 * sizeof(double));
}

void Policy::begin_layer(std::uint32_t layer, std::uint32_t /*num_tokens*/) { current_ = layer; }

void Policy::offer(std::uint32_t expert) {
  if (at_[expert] != kNowhere) return;
  Heap& heap = heaps_[layers_[expert]];
  put(heap, heap.size++, expert);
  rise(heap, at_[expert]);
}

void Policy::withdraw(std::uint32_t expert) {
  const std::uint32_t place = at_[expert];
  if (place == kNowhere) return;
  Heap& heap = heaps_[layers_[expert]];
  at_[expert] = kNowhere;
  if (place == --heap.size) return;
  const std::uint32_t last = places_[heap.begin + heap.size];
  put(heap, place, last);
  settle(last);
}

std::optional<std::uint32_t> Policy::victim() const {
  const Heap* found = nullptr;
  Key least;
  for (std::uint32_t layer = 0; layer < heaps_.size(); ++layer) {
    const Heap& heap = heaps_[layer];
    if (heap.size == 0) continue;
    const Key key{compared(heap.least.worth, layer), heap.least.used};
    if (found != nullptr && !(key < least)) continue;
    found = &heap;
    least = key;
  }
  return found == nullptr ? std::nullopt : std::optional(places_[found->begin]);
}

void Policy::set_worth_used(std::uint32_t expert, double worth) {
  current_ = layers_[expert];
  keys_[expert].used = ++clock_;
  set_worth(expert, worth);
}

void Policy::set_worth(std::uint32_t expert, double worth) {
  keys_[expert].worth = worth;
  if (at_[expert] != kNowhere) settle(expert);
}

void Policy::put(Heap& heap, std::uint32_t place, std::uint32_t expert) {
  places_[heap.begin + place] = expert;
  at_[expert] = place;
  if (place == 0) heap.least = keys_[expert];
}

void Policy::rise(Heap& heap, std::uint32_t place) {
  const std::uint32_t expert = places_[heap.begin + place];
  while (place > 0) {
    const std::uint32_t parent = (place - 1) / 2;
    if (!before(expert, places_[heap.begin + parent])) break;
    put(heap, place, places_[heap.begin + parent]);
    place = parent;
  }
  put(heap, place, expert);
}

void Policy::sink(Heap& heap, std::uint32_t place) {
  const std::uint32_t expert = places_[heap.begin + place];
  for (;;) {
    std::uint32_t child = 2 * place + 1;
    if (child >= heap.size) break;
    if (child + 1 < heap.size &&
        before(places_[heap.begin + child + 1], places_[heap.begin + child]))
      ++child;
    if (!before(places_[heap.begin + child], expert)) break;
    put(heap, place, places_[heap.begin + child]);
    place = child;
  }
  put(heap, place, expert);
}

void Policy::settle(std::uint32_t expert) {
  Heap& heap = heaps_[layers_[expert]];
  rise(heap, at_[expert]);
  sink(heap, at_[expert]);
}

}  // namespace zipmoe
