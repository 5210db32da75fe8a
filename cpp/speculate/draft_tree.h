// What drafters propose: tokens that may follow the text, as a tree, because one pass verifies any of them.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "sample/sampler.h"

namespace edge {

// Node 0 is the root: the last token of the text, whose pass is due anyway. Nodes are in topological order
// (parents[i] < i), so a tree is a Batch of the decoder as it stands. Siblings differ in their tokens.
class DraftTree {
 public:
  struct Limits {
    int64_t max_nodes = 1;  // the root included
    int64_t max_depth = 0;  // of the deepest node; the root's is 0
    int32_t vocab_size = 0;
  };

  // Children of one node in the order they were drawn from a draft's distribution, each without those before it.
  struct Drawn {
    int32_t parent;
    std::vector<TokenProbability> q;  // normalised, by ascending token
    std::vector<int32_t> children;
  };

  void reset(int32_t root, const Limits& limits);

  // The child of `parent` that carries `token`, made where there is none. -1: no such parent, no such token, or the
  // tree is full; a proposal may be anything. `source` names the estimate its acceptance belongs to.
  int32_t add(int32_t parent, int32_t token, uint8_t source);
  // Says how children of `parent` are drawn; rejection sampling needs to know. Their tokens follow by add_drawn().
  void set_distribution(int32_t parent, std::vector<TokenProbability> q);
  // After one that could not be added none may follow: it would have been drawn without the missing one.
  int32_t add_drawn(int32_t parent, int32_t token, uint8_t source);
  // Null for a node whose children are mere guesses.
  const Drawn* drawn(int32_t parent) const;

  // Says that a node is worth its row whatever becomes of it, and so is its parent (which is pinned, or the root).
  void pin(int32_t node) { pinned_[static_cast<size_t>(node)] = true; }
  bool pinned(int32_t node) const { return pinned_[static_cast<size_t>(node)]; }

  // -1 when no child carries it.
  int32_t child(int32_t parent, int32_t token) const;
  // Keeps the root, pinned nodes, and of the others those whose flag is set and whose parents stay.
  void keep(std::vector<bool> kept);
  // What became of a node numbered before the last keep(); -1: it went.
  int32_t moved(int32_t node) const { return moved_.empty() ? node : moved_[static_cast<size_t>(node)]; }

  int64_t size() const { return static_cast<int64_t>(tokens_.size()); }
  bool full() const { return size() >= limits_.max_nodes; }
  const Limits& limits() const { return limits_; }
  std::span<const int32_t> tokens() const { return tokens_; }
  std::span<const int32_t> parents() const { return parents_; }
  int32_t depth(int32_t node) const { return depths_[static_cast<size_t>(node)]; }
  uint8_t source(int32_t node) const { return sources_[static_cast<size_t>(node)]; }

 private:
  Limits limits_;
  std::vector<int32_t> tokens_;
  std::vector<int32_t> parents_;
  std::vector<int32_t> depths_;
  std::vector<uint8_t> sources_;
  std::vector<bool> pinned_;
  std::vector<int32_t> moved_;  // by keep()
  std::vector<Drawn> drawn_;
};

}  // namespace edge
