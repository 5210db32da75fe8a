// Where the end of a text occurred before, and what followed it there (suffix automaton: Blumer et al. 1985; for
// drafting: Hu et al. 2024, arXiv 2411.10666).
//
// A state stands for all substrings that end at the same places; its link leads to the longest shorter ones that also
// end elsewhere. A token makes at most two states and three edges, in constant time on average, so memory for a
// number of tokens is known beforehand. The latest end of a state is kept for the longest contexts of each place.
#pragma once

#include <cstdint>

#include "core/budget.h"

namespace edge {

class SuffixAutomaton {
 public:
  static uint64_t bytes(int64_t max_tokens);
  // memory: of bytes(max_tokens).
  SuffixAutomaton(int64_t max_tokens, Block memory);

  void clear();
  // May not be called when full.
  void append(int32_t token);
  bool full() const { return n_tokens_ == max_tokens_; }
  int64_t n_tokens() const { return n_tokens_; }

  // The longest end of the text that occurred before, as a state; 0: none did.
  int32_t longest() const { return states()[last_].link; }
  // The same with less of the text; 0: nothing is left.
  int32_t shorter(int32_t state) const { return states()[state].link; }
  int64_t length(int32_t state) const { return states()[state].length; }

  // Tokens that followed a state's strings, until visit(token, end) is false. end: where the token stood, the latest
  // place (or nearly).
  template <typename Visit>
  void continuations(int32_t state, const Visit& visit) const {
    for (int32_t at = states()[state].first_edge; at >= 0; at = edges()[at].next) {
      const Edge& edge = edges()[at];
      if (!visit(edge.token, static_cast<int64_t>(states()[edge.target].end))) return;
    }
  }

 private:
  struct State {
    int32_t length;
    int32_t link;
    int32_t end;
    int32_t first_edge;
  };
  struct Edge {
    int32_t from;
    int32_t token;
    int32_t target;
    int32_t next;  // of the same state
  };

  State* states() const { return memory_.as<State>(); }
  Edge* edges() const { return reinterpret_cast<Edge*>(states() + 2 * max_tokens_ + 1); }
  int32_t* slots() const { return reinterpret_cast<int32_t*>(edges() + 3 * max_tokens_ + 1); }
  int32_t add_state(int32_t length, int32_t link, int32_t end);
  // The slot of an edge, or the one where it would be.
  int32_t* slot(int32_t from, int32_t token) const;
  void add_edge(int32_t* slot, int32_t from, int32_t token, int32_t target);
  int32_t split(int32_t from, int32_t token, int32_t target);

  int64_t max_tokens_;
  uint64_t slot_mask_;
  Block memory_;  // states, edges, and the edges' places by hash of (from, token)
  int64_t n_tokens_ = 0;
  int32_t n_states_ = 0, n_edges_ = 0;
  int32_t last_ = 0;  // the whole text
};

}  // namespace edge
