// Guesses of what layers to come will want: read while nothing that is wanted waits for the drive, into the places of
// what is worth least, and given up as soon as they prove wrong too often.
#include <algorithm>

#include "store/demand_cache.h"

namespace edge {
namespace {

// Guesses are made while so many of those read are wanted: a wrong one takes a place in memory and some of the drive's
// time, and with three right in four no more is gained than lost. Now and then all are, to see whether they still fail.
constexpr float kGoodGuesses = 0.8f, kGuessFade = 1.0f / 16;
constexpr uint64_t kTryAgain = 64;

}  // namespace

bool DemandCache::guesses(WeightId weight, int distance) {
  const bool known = weight >= 0 && static_cast<size_t>(weight) < directory_.entries().size();
  if (!known || policy_layer(weight) < 0 || distance < 1 || distance > guess_layers_) return false;
  GuessWorth& worth = guess_worth_[static_cast<size_t>(distance - 1)];
  const auto is_good = [](float right) { return right >= kGoodGuesses; };
  const bool good = std::any_of(worth.right.begin(), worth.right.begin() + worth.n_ranks, is_good);
  worth.trying = worth.n_asked++ % kTryAgain == 0;
  return good || worth.trying;
}

void DemandCache::guess(std::span<const WeightId> weights, int distance) {
  if (distance < 1 || distance > guess_layers_) return;
  GuessWorth& worth = guess_worth_[static_cast<size_t>(distance - 1)];
  WeightId last = kNoWeight;
  int rank = -1;
  for (const WeightId weight : weights) {
    if (weight < 0 || static_cast<size_t>(weight) >= directory_.entries().size()) continue;
    const Record record = record_of(weight);
    if (record.first == last) continue;
    last = record.first;
    const Guess guess{record, distance, std::min(++rank, kGuessRanks - 1)};
    worth.n_ranks = std::max(worth.n_ranks, static_cast<size_t>(guess.rank) + 1);
    if (!worth.trying && right(guess) < kGoodGuesses) continue;
    if (const auto known = by_first_.find(record.first); known != by_first_.end()) {
      known->second->guess = expectation_ + static_cast<uint64_t>(distance);
    }
    guesses_.push_back(guess);
  }
  if (!pump().ok()) return;  // told by the acquire that follows
}

// As many in flight, whatever is wanted of them, that one will be wrong: a wanted read then waits for one request in
// vain. Sure guesses keep the drive's queue full, which is what it takes to be read at its rate.
size_t DemandCache::most_flights(const Guess& guess) {
  const float wrong = 1 - right(guess);
  return wrong * static_cast<float>(flights_.size()) <= 1 ? flights_.size() : static_cast<size_t>(1 / wrong);
}

DemandCache::Load* DemandCache::next_guess() {
  while (!guesses_.empty() && n_flying() < most_flights(guesses_.front())) {
    const Guess next = guesses_.front();
    if (const auto known = by_first_.find(next.record.first); known != by_first_.end()) {
      Load& load = known->second->load;
      if (load.parked && !load.waiting.empty()) return &load;
      guesses_.pop_front();
      continue;
    }
    const auto started = start(next.record, Need::kGuessed);
    if (!started.ok()) {
      guesses_.clear();  // no room before the next layer is expected
      return nullptr;
    }
    (*started)->guess = expectation_ + static_cast<uint64_t>(next.distance);
    guesses_read_.push_back(next);
    ++n_guessed_;
  }
  return nullptr;
}

void DemandCache::want(Entries::iterator cached) {
  cached->expectation = expectation_;
  if (!cached->load.parked) return;
  cached->load.parked = false;
  if (!cached->load.waiting.empty()) queue_.push_back(&cached->load);
}

void DemandCache::judge_guesses(int pack_layer, std::span<const ExpectedWeight> weights) {
  std::erase_if(guesses_read_, [&](const Guess& guess) {
    const Record& record = guess.record;
    if (directory_.entry(record.first).layer != pack_layer) return false;
    const bool is_right = std::any_of(weights.begin(), weights.end(), [&](const ExpectedWeight& one) {
      return one.weight >= record.first && one.weight < record.first + record.n_weights;
    });
    n_guessed_right_ += is_right;
    right(guess) += kGuessFade * (static_cast<float>(is_right) - right(guess));
    return true;
  });
}

}  // namespace edge
