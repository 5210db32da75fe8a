// The thread pool by itself, for ThreadSanitizer above all: what jobs share is plain memory, so that every order the pool
// promises is one that the sanitizer must see. Usage: pool_selftest [n_jobs]; exit 0 when every test holds.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#include "core/thread_pool.h"

namespace {

using edge::ThreadPool;

constexpr int kSizes[] = {1, 2, 3, 8};
constexpr int64_t kItems = 257;

// Jobs that each read what other threads wrote in the job before. Not locked, on purpose.
class Chain {
 public:
  explicit Chain(ThreadPool& pool) : pool_(pool), items_of_thread_(static_cast<size_t>(pool.size())) {}

  void job(int64_t grain) {
    const std::vector<int64_t>& before = values_[n_jobs_ % 2];
    std::vector<int64_t>& after = values_[(n_jobs_ + 1) % 2];
    const auto work = [&](int64_t begin, int64_t end, int thread) {
      items_of_thread_[static_cast<size_t>(thread)] += end - begin;
      for (int64_t i = begin; i < end; ++i) after[static_cast<size_t>(i)] = before[static_cast<size_t>(kItems - 1 - i)] + 1;
    };
    pool_.parallel(kItems, grain, work);
    ++n_jobs_;
  }

  bool holds() const {
    int64_t n_items = 0;
    for (const int64_t n : items_of_thread_) n_items += n;
    bool right = n_items == n_jobs_ * kItems;
    for (const int64_t value : values_[n_jobs_ % 2]) right = right && value == n_jobs_;
    return right;
  }

 private:
  ThreadPool& pool_;
  std::vector<int64_t> values_[2] = {std::vector<int64_t>(kItems), std::vector<int64_t>(kItems)};
  std::vector<int64_t> items_of_thread_;
  int64_t n_jobs_ = 0;
};

bool test_jobs_follow_each_other(int n_jobs) {
  for (const int size : kSizes) {
    for (const int64_t grain : {1, 16, 100, 257}) {
      ThreadPool pool(size);
      Chain chain(pool);
      for (int i = 0; i < n_jobs; ++i) chain.job(grain);
      if (!chain.holds()) return false;
    }
  }
  return true;
}

bool test_sleepers_wake(int n_jobs) {
  ThreadPool pool(4);
  Chain chain(pool);
  for (int i = 0; i < n_jobs / 20 + 1; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(i % 3));  // spinning, about to sleep, asleep
    chain.job(8);
  }
  return chain.holds();
}

bool test_made_and_gone(int n_jobs) {
  for (int i = 0; i < n_jobs / 10 + 1; ++i) {
    ThreadPool pool(1 + i % 5);
    Chain chain(pool);
    for (int n = 0; n < i % 4; ++n) chain.job(4);
    if (!chain.holds()) return false;
  }
  return true;
}

// As engines that share a pool use it: never at the same time, from whatever thread.
bool test_callers_in_turn(int n_jobs) {
  ThreadPool pool(3);
  Chain chain(pool);
  std::mutex turn;
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&] {
      for (int i = 0; i < n_jobs; ++i) {
        std::lock_guard lock(turn);
        chain.job(16);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  return chain.holds();
}

// Processes that want every core, until this one has done its jobs.
class BusyNeighbours {
 public:
  BusyNeighbours() {
    const unsigned n = std::max(2u, std::thread::hardware_concurrency());
    for (unsigned i = 0; i < n; ++i) {
      const pid_t child = fork();
      if (child == 0) {
        alarm(60);  // should nobody be left to end it
        for (volatile bool busy = true; busy;) {}
      }
      if (child > 0) children_.push_back(child);
    }
  }
  ~BusyNeighbours() {
    for (const pid_t child : children_) kill(child, SIGKILL);
    for (const pid_t child : children_) waitpid(child, nullptr, 0);
  }

 private:
  std::vector<pid_t> children_;
};

#if defined(__linux__)
// Moves the caller from core to core, so that workers meet it on theirs and have to leave.
class Wandering {
 public:
  Wandering() { known_ = sched_getaffinity(0, sizeof allowed_, &allowed_) == 0; }
  ~Wandering() {
    if (known_) (void)sched_setaffinity(0, sizeof allowed_, &allowed_);
  }
  void step() {
    if (!known_) return;
    do cpu_ = (cpu_ + 1) % CPU_SETSIZE;
    while (!CPU_ISSET(cpu_, &allowed_));
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu_, &one);
    (void)sched_setaffinity(0, sizeof one, &one);
  }

 private:
  cpu_set_t allowed_;
  bool known_ = false;
  int cpu_ = 0;
};
#else
struct Wandering {
  void step() {}
};
#endif

// Workers give way between two jobs, and leave the caller's core.
bool test_beside_busy_processes(int n_jobs) {
  const BusyNeighbours neighbours;  // forked before this process has threads
  ThreadPool pool(3);
  Chain chain(pool);
  Wandering caller;
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < n_jobs; ++i) {
    if (i % 16 == 0) caller.step();
    chain.job(8);
    // Long enough between some of them that a worker's turn is over.
    while (i % 16 == 15 && std::chrono::steady_clock::now() - begin < std::chrono::milliseconds(i / 8)) {}
  }
  return chain.holds();
}

}  // namespace

int main(int argc, char** argv) {
  const int n_jobs = argc > 1 ? std::atoi(argv[1]) : 1000;
  const struct {
    const char* name;
    bool (*run)(int);
  } tests[] = {
      {"beside busy processes", test_beside_busy_processes},
      {"jobs follow each other", test_jobs_follow_each_other},
      {"sleepers wake", test_sleepers_wake},
      {"made and gone", test_made_and_gone},
      {"callers in turn", test_callers_in_turn},
  };
  bool all = true;
  for (const auto& test : tests) {
    const bool holds = test.run(n_jobs);
    std::printf("%s: %s\n", test.name, holds ? "ok" : "FAILED");
    std::fflush(stdout);
    all = all && holds;
  }
  return all ? 0 : 1;
}
