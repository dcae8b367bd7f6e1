// Whose turn it is to compute. One call is inside at a time, and one ordinary call is under way at
// a time. What a thread does while it is urgent goes before that: an ordinary call inside is asked
// to give way, where it can; it waits there until nobody is urgent any more, and goes on.
//
// Urgent blocks that follow each other closely must not stop ordinary calls: these have, after they
// have waited, kOwedTimes as long before urgent ones come in again, less what they took too long
// the last time to get to such a place. So beside urgent blocks without a pause what is ordinary
// takes 1 + 1 / kOwedTimes times as long as alone, and those take 1 + kOwedTimes times as long.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <thread>
#include <vector>

namespace zipmoe {

class Turnstile {
 public:
  // Calls of the thread that made it are urgent while it lives. That thread must not wait for an
  // ordinary call meanwhile.
  class Urgent {
   public:
    explicit Urgent(Turnstile& turnstile);
    ~Urgent();
    Urgent(const Urgent&) = delete;
    Urgent& operator=(const Urgent&) = delete;

   private:
    Turnstile& turnstile_;
    std::thread::id thread_ = std::this_thread::get_id();
  };

  // Wait for the turn of a call; end it, in the same thread.
  void enter();
  void leave() noexcept;

  // For the call inside: whether it has to give way; does so, until its turn comes again.
  [[nodiscard]] bool is_wanted() const {
    return !is_urgent_ && num_urgent_ != 0 && Clock::now() >= owed_until_;
  }
  void give_way();

 private:
  using Lock = std::unique_lock<std::mutex>;
  using Clock = std::chrono::steady_clock;
  static constexpr double kOwedTimes = 1.3;
  void await_turn(Lock& lock, Clock::duration late);

  std::mutex ordinary_;  // held by the ordinary call that is under way
  std::mutex mutex_;     // guards all that follows
  std::condition_variable changed_;
  std::vector<std::thread::id> urgent_;      // threads
  std::atomic<std::size_t> num_urgent_ = 0;  // of them; read without the lock too
  bool inside_ = false;
  bool is_urgent_ = false;  // the call inside
  bool waits_ = false;      // the ordinary call under way
  bool is_owed_ = false;    // to it: a turn
  // Until then ordinary calls have their turns. Read without the lock by the one inside, who set
  // it.
  Clock::time_point owed_until_;
  Clock::time_point wanted_since_;  // when the last urgent block began
};

}  // namespace zipmoe
