// How long something takes that happens again and again.
#pragma once

#include <algorithm>

namespace edge {

// Another process may take the core in the middle of it, so a measurement can be too long, never too short: lower figures
// are believed sooner, and one far above what is known only in part.
class Steady {
 public:
  bool known() const { return ms_ > 0; }
  double ms() const { return ms_; }
  void forget() { ms_ = 0; }
  void record(double ms) {
    if (!(ms > 0)) return;
    const double weight = ms < ms_ ? kFreshLower : kFresh;
    ms_ = known() ? ms_ + weight * (std::min(ms, kOutlier * ms_) - ms_) : ms;
  }

 private:
  static constexpr double kFresh = 0.12, kFreshLower = 0.35;  // weights of a new measurement
  static constexpr double kOutlier = 2.5;

  double ms_ = 0;
};

// What the machine did in between is not held against guesses: of `ms` as much as is likely where `usual` is known.
inline double likely_ms(double ms, double usual) {
  constexpr double kRestless = 1.3;
  return usual > 0 ? std::min(ms, kRestless * usual) : ms;
}

}  // namespace edge
