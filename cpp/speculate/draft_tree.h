// What drafters propose: tokens that may follow the text, as a tree, because one pass verifies any of them.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

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

  // A probability after every filter of the draft's sampler.
  struct Candidate {
    int32_t token;
    double probability;
  };

  void reset(int32_t root, const Limits& limits);

  // The child of `parent` that carries `token`, made where there is none. -1: no such parent, no such token, or the
  // tree is full; a proposal may be anything. `source` names the estimate its acceptance belongs to.
  int32_t add(int32_t parent, int32_t token, uint8_t source);
  // Says that the children of `parent` made from now on are drawn without replacement from `q` [normalised], in order.
  // Only rejection sampling looks at it.
  void set_distribution(int32_t parent, std::vector<Candidate> q);
  const std::vector<Candidate>* distribution(int32_t parent) const;

  // -1 when no child carries it.
  int32_t child(int32_t parent, int32_t token) const;
  // Keeps the nodes whose flag is set, and the root. A node whose parent goes must go too.
  void keep(const std::vector<bool>& kept);

  int64_t size() const { return static_cast<int64_t>(tokens_.size()); }
  bool full() const { return size() >= limits_.max_nodes; }
  const Limits& limits() const { return limits_; }
  std::span<const int32_t> tokens() const { return tokens_; }
  std::span<const int32_t> parents() const { return parents_; }
  int32_t depth(int32_t node) const { return depths_[static_cast<size_t>(node)]; }
  uint8_t source(int32_t node) const { return sources_[static_cast<size_t>(node)]; }

 private:
  struct Drawn {
    int32_t parent;
    std::vector<Candidate> q;
  };

  Limits limits_;
  std::vector<int32_t> tokens_;
  std::vector<int32_t> parents_;
  std::vector<int32_t> depths_;
  std::vector<uint8_t> sources_;
  std::vector<Drawn> drawn_;
};

}  // namespace edge
