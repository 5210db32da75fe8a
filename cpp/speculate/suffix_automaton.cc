#include "speculate/suffix_automaton.h"

#include <algorithm>
#include <bit>

namespace edge {
namespace {

// Contexts of a place whose latest end is kept. A text of one repeated token has as many as it has tokens.
constexpr int kFreshContexts = 24;

uint64_t n_slots(int64_t max_tokens) { return std::bit_ceil(static_cast<uint64_t>(4 * max_tokens)); }

}  // namespace

uint64_t SuffixAutomaton::bytes(int64_t max_tokens) {
  const auto n = static_cast<uint64_t>(max_tokens);
  return (2 * n + 1) * sizeof(State) + (3 * n + 1) * sizeof(Edge) + n_slots(max_tokens) * sizeof(int32_t);
}

SuffixAutomaton::SuffixAutomaton(int64_t max_tokens, Block memory)
    : max_tokens_(max_tokens), slot_mask_(n_slots(max_tokens) - 1), memory_(std::move(memory)) {
  clear();
}

void SuffixAutomaton::clear() {
  n_tokens_ = 0;
  n_states_ = n_edges_ = 0;
  std::fill_n(slots(), slot_mask_ + 1, -1);
  last_ = add_state(0, -1, -1);
}

int32_t SuffixAutomaton::add_state(int32_t length, int32_t link, int32_t end) {
  states()[n_states_] = {length, link, end, -1};
  return n_states_++;
}

int32_t* SuffixAutomaton::slot(int32_t from, int32_t token) const {
  const uint64_t key = static_cast<uint64_t>(static_cast<uint32_t>(from)) << 32 | static_cast<uint32_t>(token);
  for (uint64_t at = (key * 0x9E3779B97F4A7C15) >> 32;; ++at) {
    int32_t* const found = slots() + (at & slot_mask_);
    if (*found < 0 || (edges()[*found].from == from && edges()[*found].token == token)) return found;
  }
}

void SuffixAutomaton::add_edge(int32_t* slot, int32_t from, int32_t token, int32_t target) {
  edges()[n_edges_] = {from, token, target, states()[from].first_edge};
  states()[from].first_edge = n_edges_;
  *slot = n_edges_++;
}

// Parts the strings of a state that follow `from` from its longer ones, which do not end at the new place.
int32_t SuffixAutomaton::split(int32_t from, int32_t token, int32_t target) {
  const State whole = states()[target];
  const int32_t part = add_state(states()[from].length + 1, whole.link, whole.end);
  for (int32_t at = whole.first_edge; at >= 0; at = edges()[at].next) {
    add_edge(slot(part, edges()[at].token), part, edges()[at].token, edges()[at].target);
  }
  states()[target].link = part;
  for (; from >= 0; from = states()[from].link) {
    const int32_t* const found = slot(from, token);
    if (*found < 0 || edges()[*found].target != target) break;
    edges()[*found].target = part;
  }
  return part;
}

void SuffixAutomaton::append(int32_t token) {
  const auto end = static_cast<int32_t>(n_tokens_++);
  // Only now: until here their latest end was one before the end of the text.
  int32_t context = states()[last_].link;
  for (int i = 0; i < kFreshContexts && context > 0; ++i, context = states()[context].link) {
    states()[context].end = end - 1;
  }
  const int32_t whole = add_state(end + 1, 0, end);
  int32_t from = last_;
  last_ = whole;
  for (; from >= 0; from = states()[from].link) {
    int32_t* const place = slot(from, token);
    if (*place >= 0) {
      const int32_t target = edges()[*place].target;
      const bool same = states()[target].length == states()[from].length + 1;
      states()[whole].link = same ? target : split(from, token, target);
      return;
    }
    add_edge(place, from, token, whole);
  }
}

}  // namespace edge
