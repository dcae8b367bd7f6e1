#include "turnstile.h"

#include <algorithm>
#include <utility>

namespace zipmoe {

Turnstile::Urgent::Urgent(Turnstile& turnstile) : turnstile_(turnstile) {
  const std::lock_guard lock(turnstile_.mutex_);
  turnstile_.urgent_.push_back(thread_);
  turnstile_.wanted_since_ = Clock::now();
  turnstile_.num_urgent_ = turnstile_.urgent_.size();
}

Turnstile::Urgent::~Urgent() {
  std::vector<std::thread::id>& urgent = turnstile_.urgent_;
  const std::lock_guard lock(turnstile_.mutex_);
  urgent.erase(std::find(urgent.begin(), urgent.end(), thread_));
  turnstile_.num_urgent_ = urgent.size();
  turnstile_.is_owed_ = turnstile_.waits_;
  turnstile_.changed_.notify_all();
}

void Turnstile::enter() {
  {
    Lock lock(mutex_);
    if (std::find(urgent_.begin(), urgent_.end(), std::this_thread::get_id()) != urgent_.end()) {
      while (true) {
        changed_.wait(lock, [this] { return !inside_ && !is_owed_; });
        const Clock::time_point until = owed_until_;
        if (Clock::now() >= until) break;
        changed_.wait_until(lock, until);
      }
      inside_ = is_urgent_ = true;
      return;
    }
  }
  ordinary_.lock();
  Lock lock(mutex_);
  await_turn(lock, {});
}

void Turnstile::leave() noexcept {
  bool was_urgent = false;
  {
    const std::lock_guard lock(mutex_);
    inside_ = false;
    was_urgent = std::exchange(is_urgent_, false);
  }
  changed_.notify_all();
  if (!was_urgent) ordinary_.unlock();
}

void Turnstile::give_way() {
  Lock lock(mutex_);
  inside_ = false;
  changed_.notify_all();
  await_turn(lock, Clock::now() - std::max(owed_until_, wanted_since_));
}

// `late`: by how much it took longer than it was owed.
void Turnstile::await_turn(Lock& lock, Clock::duration late) {
  const Clock::time_point begin = Clock::now();
  const auto has_turn = [this] {
    return !inside_ && (urgent_.empty() || is_owed_ || Clock::now() < owed_until_);
  };
  if (!has_turn()) {
    waits_ = true;
    changed_.wait(lock, has_turn);
    const Clock::time_point end = Clock::now();
    owed_until_ =
        end + std::chrono::duration_cast<Clock::duration>(kOwedTimes * (end - begin)) - late;
  }
  waits_ = is_owed_ = false;
  inside_ = true;
}

}  // namespace zipmoe
