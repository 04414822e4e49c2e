// CUDA's words for g++: a block's threads are coroutines on one thread of the host.
//
// Between two barriers each of them runs alone, in an order drawn at random: a barrier that is missing shows as a wrong
// result. A thread that does not come to a barrier that others wait at ends the program.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(threads)
#define __shared__ static

struct Index {
  int x;
};
static Index threadIdx, blockIdx, blockDim;

using std::ceil;
using std::floor;
using std::log;

static inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, 4);
  return bits;
}
static inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static inline long long __double_as_longlong(double value) {
  long long bits;
  memcpy(&bits, &value, 8);
  return bits;
}
static inline double __longlong_as_double(long long bits) {
  double value;
  memcpy(&value, &bits, 8);
  return value;
}

namespace host {
const size_t STACK = 64 * 1024;
struct Thread {
  ucontext_t context;  // for its first entry
  jmp_buf place;       // where it waits
  bool begun = false, ended = false;
  std::vector<char> stack;
};
static std::vector<Thread> threads;
static jmp_buf scheduler;
static Thread* running = nullptr;
static std::function<void()>* body = nullptr;

static void enter() {
  (*body)();
  running->ended = true;
  _longjmp(scheduler, 1);
}

static void resume(Thread& thread, int index) {
  running = &thread;
  threadIdx.x = index;
  if (_setjmp(scheduler)) return;
  if (thread.begun) _longjmp(thread.place, 1);
  thread.begun = true;
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.data();
  thread.context.uc_stack.ss_size = STACK;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, enter, 0);
  setcontext(&thread.context);
}

// Run `blocks` blocks of `count` threads, a power of two; `seed` decides in which order threads run.
static void launch(int blocks, int count, unsigned seed, std::function<void()> kernel) {
  std::mt19937 random(seed);
  blockDim.x = count;
  body = &kernel;
  while ((int)threads.size() < count) {
    threads.emplace_back();
    threads.back().stack.resize(STACK);
  }
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  for (int block = 0; block < blocks; block++) {
    blockIdx.x = block;
    for (int index = 0; index < count; index++) threads[index].begun = threads[index].ended = false;
    for (int ended = 0; ended < count;) {
      std::shuffle(order.begin(), order.end(), random);
      ended = 0;
      for (int index : order) {
        resume(threads[index], index);
        ended += threads[index].ended;
      }
      if (ended && ended < count) {
        fprintf(stderr, "%d of %d threads ended while the others wait at a barrier\n", ended, count);
        abort();
      }
    }
  }
}
}  // namespace host

static inline void __syncthreads() {
  if (!_setjmp(host::running->place)) _longjmp(host::scheduler, 1);
}
