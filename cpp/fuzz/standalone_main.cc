// main() for compilers without libFuzzer: runs the files named, or so many random inputs (always the same).
// Usage: fuzz_x FILE... | fuzz_x --random COUNT
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

int run_random(long count) {
  std::mt19937_64 random(20240229);
  for (long i = 0; i < count; ++i) {
    std::vector<uint8_t> input(random() % 512);
    // Half of the inputs are mostly zero: small numbers and long runs reach further than noise.
    const bool sparse = random() % 2 == 0;
    for (uint8_t& byte : input) byte = sparse && random() % 8 != 0 ? 0 : static_cast<uint8_t>(random());
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("%ld random inputs\n", count);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && std::strcmp(argv[1], "--random") == 0) return run_random(std::atol(argv[2]));
  for (int i = 1; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    if (!file) {
      std::fprintf(stderr, "%s: expected a readable file\n", argv[i]);
      return 1;
    }
    const std::vector<uint8_t> input{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("%d inputs\n", argc - 1);
  return 0;
}
