#include "sample/filters.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace edge {
namespace {

// Moves to the front the shortest run, in the order `before`, whose weights reach `mass`; returns its length.
// A quickselect by mass: linear on average, and with its own partition, so that sums have the same order everywhere.
template <class Before, class Weight>
size_t keep_mass(std::span<Candidate> candidates, double mass, Before before, Weight weight) {
  size_t low = 0, high = candidates.size();
  // Pivots of a hostile order could make it quadratic: what 64 rounds leave is sorted.
  for (int round = 0; round < 64 && high - low > 32; ++round) {
    Candidate& first = candidates[low];
    Candidate& last = candidates[high - 1];
    Candidate& middle = candidates[low + (high - low) / 2];
    if (before(middle, first)) std::swap(middle, first);
    if (before(last, first)) std::swap(last, first);
    if (before(middle, last)) std::swap(middle, last);
    const Candidate pivot = last;  // the median of the three
    size_t end = low;
    double sum = 0;
    for (size_t i = low; i + 1 < high; ++i) {
      if (!before(candidates[i], pivot)) continue;
      sum += weight(candidates[i]);
      std::swap(candidates[i], candidates[end++]);
    }
    std::swap(candidates[end], last);
    if (sum >= mass) {
      high = end;
      continue;
    }
    sum += weight(pivot);
    if (sum >= mass) return end + 1;
    mass -= sum;
    low = end + 1;
  }
  std::sort(candidates.data() + low, candidates.data() + high, before);
  for (double sum = 0; low < high; ++low) {
    sum += weight(candidates[low]);
    if (sum >= mass) return low + 1;
  }
  return low;
}

}  // namespace

int64_t top_k_room(int64_t k, int64_t vocab_size) {
  return k >= vocab_size / 2 ? vocab_size : std::min(vocab_size, 2 * k + 1024);
}

size_t keep_top_k(std::span<const float> logits, int64_t k, Candidate* room) {
  const size_t wanted = static_cast<size_t>(std::min<int64_t>(k, static_cast<int64_t>(logits.size())));
  const size_t n_room = static_cast<size_t>(top_k_room(k, static_cast<int64_t>(logits.size())));
  size_t n = 0;
  // Once k tokens of lower id reach the threshold, an equal logit comes too late.
  float threshold = -std::numeric_limits<float>::infinity();
  for (size_t id = 0; id < logits.size(); ++id) {
    if (!(logits[id] > threshold)) continue;
    if (n == n_room) {
      std::nth_element(room, room + wanted - 1, room + n, more_likely);
      n = wanted;
      threshold = room[wanted - 1].logit;
      if (!(logits[id] > threshold)) continue;
    }
    room[n++] = {logits[id], static_cast<int32_t>(id)};
  }
  const size_t kept = std::min(n, wanted);
  if (kept < n) std::nth_element(room, room + kept, room + n, more_likely);
  std::sort(room, room + kept, more_likely);
  return kept;
}

double total_weight(std::span<const Candidate> candidates, const Weighting& weight) {
  double total = 0;
  for (const Candidate& candidate : candidates) total += weight(candidate.logit);
  return total;
}

size_t keep_typical(std::span<Candidate> candidates, const Weighting& weight, double typical_p) {
  const double total = total_weight(candidates, weight);
  // With p = w / total: entropy = ln(total) - sum(w ln w) / total, and ln p + entropy = ln w - sum(w ln w) / total.
  double w_log_w = 0;
  for (const Candidate& candidate : candidates) {
    const double w = weight(candidate.logit);
    if (w > 0) w_log_w += w * weight.log_weight(candidate.logit);
  }
  const double expected = w_log_w / total;
  const auto deviation = [&](const Candidate& c) { return std::fabs(weight.log_weight(c.logit) - expected); };
  return keep_mass(
      candidates, typical_p * total,
      [&](const Candidate& a, const Candidate& b) {
        const double x = deviation(a), y = deviation(b);
        return x != y ? x < y : a.id < b.id;
      },
      [&](const Candidate& c) { return weight(c.logit); });
}

size_t keep_top_p(std::span<Candidate> candidates, const Weighting& weight, double total, double top_p) {
  return keep_mass(candidates, top_p * total, more_likely, [&](const Candidate& c) { return weight(c.logit); });
}

size_t keep_min_p(std::span<Candidate> candidates, const Weighting& weight, double min_p) {
  const Candidate best = *std::min_element(candidates.begin(), candidates.end(), more_likely);
  const double least = weight(best.logit) * min_p;
  const auto end = std::remove_if(candidates.begin(), candidates.end(), [&](const Candidate& c) {
    return c.id != best.id && weight(c.logit) < least;
  });
  return static_cast<size_t>(end - candidates.begin());
}

}  // namespace edge
