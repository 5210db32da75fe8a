#include "speculate/draft_tree.h"

namespace edge {

void DraftTree::reset(int32_t root, const Limits& limits) {
  limits_ = limits;
  tokens_.assign(1, root);
  parents_.assign(1, -1);
  depths_.assign(1, 0);
  sources_.assign(1, 0);
  pinned_.assign(1, true);
  moved_.clear();
  drawn_.clear();
}

int32_t DraftTree::add(int32_t parent, int32_t token, uint8_t source) {
  if (parent < 0 || parent >= size() || token < 0 || token >= limits_.vocab_size) return -1;
  const int32_t found = child(parent, token);
  if (found >= 0) return found;
  if (full() || depth(parent) >= limits_.max_depth) return -1;
  tokens_.push_back(token);
  parents_.push_back(parent);
  depths_.push_back(depth(parent) + 1);
  sources_.push_back(source);
  pinned_.push_back(false);
  return static_cast<int32_t>(size()) - 1;
}

void DraftTree::set_distribution(int32_t parent, std::vector<TokenProbability> q) {
  drawn_.push_back({parent, std::move(q), {}});
}

int32_t DraftTree::add_drawn(int32_t parent, int32_t token, uint8_t source) {
  const int32_t node = add(parent, token, source);
  if (node < 0) return node;
  for (Drawn& drawn : drawn_) {
    if (drawn.parent == parent) drawn.children.push_back(node);
  }
  return node;
}

const DraftTree::Drawn* DraftTree::drawn(int32_t parent) const {
  for (const Drawn& drawn : drawn_) {
    if (drawn.parent == parent) return &drawn;
  }
  return nullptr;
}

int32_t DraftTree::child(int32_t parent, int32_t token) const {
  for (size_t i = static_cast<size_t>(parent) + 1; i < tokens_.size(); ++i) {
    if (parents_[i] == parent && tokens_[i] == token) return static_cast<int32_t>(i);
  }
  return -1;
}

void DraftTree::keep(std::vector<bool> kept) {
  // What was drawn after one that goes was drawn without it: it goes too.
  for (const Drawn& drawn : drawn_) {
    bool gone = false;
    for (const int32_t child : drawn.children) {
      gone = gone || !kept[static_cast<size_t>(child)];
      if (gone) kept[static_cast<size_t>(child)] = false;
    }
  }
  std::vector<int32_t>& moved = moved_;
  moved.assign(tokens_.size(), -1);
  size_t n = 0;
  for (size_t i = 0; i < tokens_.size(); ++i) {
    const bool stays = i == 0 || ((kept[i] || pinned_[i]) && moved[static_cast<size_t>(parents_[i])] >= 0);
    if (!stays) continue;
    moved[i] = static_cast<int32_t>(n);
    tokens_[n] = tokens_[i];
    parents_[n] = i == 0 ? -1 : moved[static_cast<size_t>(parents_[i])];
    depths_[n] = depths_[i];
    sources_[n] = sources_[i];
    pinned_[n] = pinned_[i];
    ++n;
  }
  tokens_.resize(n);
  parents_.resize(n);
  depths_.resize(n);
  sources_.resize(n);
  pinned_.resize(n);
  for (Drawn& drawn : drawn_) {
    drawn.parent = moved[static_cast<size_t>(drawn.parent)];
    for (int32_t& child : drawn.children) child = moved[static_cast<size_t>(child)];
    std::erase(drawn.children, -1);
  }
}

}  // namespace edge
