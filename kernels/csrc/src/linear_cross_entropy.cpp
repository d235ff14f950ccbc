#include "luthier/linear_cross_entropy.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#include "linear_cross_entropy_block.hpp"

namespace luthier {
namespace {

constexpr int64_t kMaxBlock = 128;

struct Free {
  void operator()(char* p) const { std::free(p); }
};

class Arena {
 public:
  Arena(int64_t lanes, int64_t dim, int64_t vocab, int panel) {
    const int64_t sizes[] = {lanes * (dim + 1),
                             detail::kVocabChunk * (dim + 1),
                             lanes * vocab,
                             panel * detail::kVocabChunk,
                             lanes * dim,
                             lanes,
                             lanes};
    int64_t total = 0, offsets[7];
    for (int i = 0; i < 7; ++i) {
      offsets[i] = total;
      total += (sizes[i] * 4 + 63) / 64 * 64;
    }
    memory_.reset(static_cast<char*>(std::aligned_alloc(64, std::max<int64_t>(total, 64))));
    if (!memory_) throw std::bad_alloc();
    char* at = memory_.get();
    auto floats = [&](int i) { return reinterpret_cast<float*>(at + offsets[i]); };
    scratch = {at + offsets[0], at + offsets[1], floats(2), at + offsets[3], floats(4), floats(5), floats(6)};
  }
  detail::Scratch scratch;

 private:
  std::unique_ptr<char, Free> memory_;
};

const detail::Kernel& kernel_of(Isa isa) {
  if (!supports(isa)) throw std::invalid_argument("this processor lacks the instruction set asked for");
#if defined(__x86_64__)
  if (isa == Isa::avx512_bf16) return detail::kernel_avx512_bf16;
  if (isa == Isa::avx2) return detail::kernel_avx2;
#endif
  return detail::kernel_plain;
}

}  // namespace

void linear_cross_entropy(const LinearCrossEntropy& problem, Isa isa, int num_threads) {
  if (num_threads < 1) throw std::invalid_argument("num_threads must be at least 1");
  const detail::Kernel& kernel = kernel_of(isa);
  if (problem.num_rows == 0) return;
  const int64_t share = (problem.num_rows + num_threads - 1) / num_threads;
  const int64_t block = std::min(kMaxBlock, (share + kernel.panel - 1) / kernel.panel * kernel.panel);
  const int64_t num_blocks = (problem.num_rows + block - 1) / block;
  const int workers = static_cast<int>(std::min<int64_t>(num_threads, num_blocks));
  std::vector<Arena> arenas;
  for (int i = 0; i < workers; ++i) arenas.emplace_back(block, problem.dim, problem.vocab, kernel.panel);
  const detail::Block compute = problem.dtype == Dtype::bfloat16 ? kernel.bfloat16 : kernel.float32;
  std::atomic<int64_t> next{0};
  auto work = [&](int worker) {
    for (int64_t i; (i = next.fetch_add(1)) < num_blocks;) {
      compute(problem, i * block, std::min(problem.num_rows, (i + 1) * block), arenas[worker].scratch);
    }
  };
  std::vector<std::thread> threads;
  try {
    for (int i = 1; i < workers; ++i) threads.emplace_back(work, i);
  } catch (...) {
    for (auto& thread : threads) thread.join();
    throw;
  }
  work(0);
  for (auto& thread : threads) thread.join();
}

}  // namespace luthier
