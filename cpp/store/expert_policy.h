// Which experts to keep in memory: an estimate, from the choices so far, of how soon each is chosen again.
//
// A pass visits the layers in order, so an expert of the layer just passed is one whole pass away. Among experts, three
// things tell what comes: how often it is chosen (recently, and over some dozens of tokens), and what followed when the
// layers before chose as they do now (a text repeats its subjects, and the choices of one token depend on each other).
// flashload/expert_policy.py is the same policy for simulations; bench/experts.py has its figures.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace edge {

// An expert of a layer and how many rows of a batch chose it.
struct ExpertUse {
  int32_t expert = 0;
  int32_t n_rows = 1;
};

class ExpertPolicy {
 public:
  // Layers are counted among those that have experts, in the order of a pass.
  ExpertPolicy(int n_layers, int n_experts);

  // What one batch of `n_rows` tokens chose in one layer: each expert once, at least one.
  void visit(int layer, std::span<const ExpertUse> chosen, int64_t n_rows);
  // The expert with the least worth is the one to drop; always negative.
  double worth(int layer, int expert) const;

  // Batches of choices remembered per layer.
  static constexpr int kHistory = 128;

  int n_layers() const { return static_cast<int>(layers_.size()); }

 private:
  struct Layer {
    std::vector<double> recent, rate;  // [n_experts], decayed shares of tokens
    std::vector<float> chance;         // [n_experts], how likely the next batches choose it; any scale
    std::vector<uint64_t> choices;     // [kHistory][words_], ring of bit sets
    std::vector<int32_t> n_chosen;     // [kHistory]
    int64_t n_visits = 0, n_tokens = 0;
  };

  bool follow(Layer& layer, size_t n_chosen);

  int n_experts_, words_;
  int here_ = 0;  // the layer visited last
  double mean_chance_ = 0;  // of its experts: what is thought of layers that were never visited
  std::vector<Layer> layers_;
  // alike_[lag]: how much the choices of the layers just visited resemble those `lag` batches before, decayed by layer.
  std::vector<double> alike_;
  double alike_norm_ = 0;
  std::vector<double> follows_;  // [n_experts], scratch of follow()
};

}  // namespace edge
