// Blocks of work over torch's threads. Blocks are dealt out as threads come free, so a thread that the machine has
// stopped holds nobody up for long; results depend on the block alone, never on who did it.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

namespace piece::cpu {

constexpr int64_t kBlock = 1 << 15;  // elements: two fp32 sums of a block and what is found in them fit in 1 MiB

inline int64_t num_blocks(int64_t n, int64_t block = kBlock) { return n / block + (n % block != 0); }

// From the binding, which knows torch: its number of threads, and task(i, context) for every i < n on them.
int64_t num_threads();
void run_tasks(int64_t n, void (*task)(int64_t, void*), void* context);

// work(next) once per thread; next() gives the thread its next block, in ascending order, or -1.
template <typename Work>
void on_each_thread(int64_t blocks, const Work& work) {
  struct Shared {
    const Work& work;
    int64_t blocks;
    std::atomic<int64_t> next{0};
    int64_t take() {
      const int64_t block = next.fetch_add(1, std::memory_order_relaxed);
      return block < blocks ? block : -1;
    }
  } shared{work, blocks};
  const int64_t threads = std::min(num_threads(), blocks);
  auto task = [](int64_t, void* context) {
    Shared& s = *static_cast<Shared*>(context);
    s.work([&s] { return s.take(); });
  };
  if (threads == 1) task(0, &shared);
  if (threads > 1) run_tasks(threads, task, &shared);
}

// body(block) for every block, in any order.
template <typename Body>
void for_blocks(int64_t blocks, const Body& body) {
  on_each_thread(blocks, [&](auto next) {
    for (int64_t block = next(); block >= 0; block = next()) body(block);
  });
}

// check(block) for every block; then, if all were true, work(next) once per thread, as on_each_thread does. One go of
// the threads for both: starting them takes as long as thousands of elements. Returns whether all were true.
template <typename Check, typename Work>
bool on_each_thread_if(int64_t blocks, const Check& check, const Work& work) {
  std::atomic<int64_t> num_checked{0}, taken{0};
  std::atomic<bool> all{true};
  on_each_thread(blocks, [&](auto next) {
    for (int64_t block = next(); block >= 0; block = next()) {
      if (!check(block)) all = false;
      num_checked.fetch_add(1, std::memory_order_release);
    }
    while (num_checked.load(std::memory_order_acquire) < blocks) sched_yield();  // those left are in others' hands
    if (!all) return;
    work([&] {
      const int64_t block = taken.fetch_add(1, std::memory_order_relaxed);
      return block < blocks ? block : -1;
    });
  });
  return all;
}

// work(block, local) in any order, then append(block, local) in ascending order of blocks, one at a time. Each thread
// has its own local = make_local(). No thread can wait for a block that nobody has begun.
template <typename MakeLocal, typename Work, typename Append>
void for_blocks_in_order(int64_t blocks, const MakeLocal& make_local, const Work& work, const Append& append) {
  std::atomic<int64_t> turn{0};
  std::atomic<bool> failed{false};
  on_each_thread(blocks, [&](auto next) {
    try {
      auto local = make_local();
      for (int64_t block = next(); block >= 0; block = next()) {
        work(block, local);
        while (turn.load(std::memory_order_acquire) != block) {
          if (failed.load(std::memory_order_relaxed)) return;
          sched_yield();
        }
        append(block, local);
        turn.store(block + 1, std::memory_order_release);
      }
    } catch (...) {  // out of memory: let the others go before torch passes it on
      failed.store(true, std::memory_order_relaxed);
      throw;
    }
  });
}

}  // namespace piece::cpu
