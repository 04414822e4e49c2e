// What follows a decode step on the GPU. `select_tokens` chooses the next token of each row by the rules of
// runtime/sampling.py, with the same random numbers; `advance_rows` makes it the input of the next step. One block of
// threads has one row.
//
// All threads of a block give the same answer in whatever order they run, because everything that they add up or
// compare is a whole number: probabilities are weights of fixed-point arithmetic, scores are compared as keys whose
// order is theirs. There are no atomic operations. The same file is compiled by g++ for tests, where each thread is a
// coroutine; compile without contracted multiply-adds, so that both give the same bits.
#ifdef HOST_COMPILED
#include "cuda_on_host.h"
#endif

typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned __int128 u128;

const int MAX_THREADS = 1024;  // of a block; a power of two
const u32 IN_HISTORY = 0x80000000u;  // in `counts`: the token is in the history; below it, how often it was chosen
enum Status { CHOSEN = 0, NOT_FINITE = 1, NOTHING_ALLOWED = 2, INACTIVE = 3 };

// What `selection.py` packs for a row: the fields of SamplingOptions, the start of the random numbers, and arrays.
struct Rules {
  double temperature, top_p, min_p, repetition, frequency, presence;
  u64 state_low, state_high, increment_low, increment_high;  // of PCG64, before the first number
  u32* counts;         // (V), or null where no rule reads them; advanced by each choice
  const u32* allowed;  // bits, the lowest first, one for each id; null: all
  const int* bias_ids;
  const double* bias;
  int bias_count, top_k;
  int choices;  // only ids below it are chosen
  int index;    // of the next choice; advanced by each
};

struct Choice {
  int token;      // -1 where none was chosen
  int status;
  float logprob;  // of the token, by the model's own logits
  int unused;
};

// Where a row is. A row that is not active runs the same step again and again, which changes nothing.
struct Place {
  int length;  // tokens that have been run
  int limit;   // no token is run beyond so many
  int active, unused;
};

// What a step has done to a row, for the host.
struct Record {
  int token, status;  // as in Choice
  int length;         // tokens that have been run
  float logprob;
};

// An embedding table, and where the rows of the next tokens go (B, columns).
struct Table {
  const void* values;
  float* rows;
  int columns, type;  // 0: float, 1: half, 2: bfloat16
};

// Results of a pass over a row: a sum, and the smallest and largest of some keys.
struct Pass {
  u64 sum, low, high;
};

const u64 NO_KEY_BELOW = 0, NO_KEY_ABOVE = ~0ull;

__device__ inline Pass nothing() {
  Pass pass;
  pass.sum = 0;
  pass.low = NO_KEY_ABOVE;
  pass.high = NO_KEY_BELOW;
  return pass;
}

// The results of all threads together, given to each of them.
__device__ inline Pass together(Pass mine, Pass* parts) {
  parts[threadIdx.x] = mine;
  __syncthreads();
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      const Pass& other = parts[threadIdx.x + half];
      Pass& part = parts[threadIdx.x];
      part.sum += other.sum;
      if (other.low < part.low) part.low = other.low;
      if (other.high > part.high) part.high = other.high;
    }
    __syncthreads();
  }
  Pass all = parts[0];
  __syncthreads();
  return all;
}

// Whole numbers in the order of the numbers that they stand for; -0 is 0. None is NO_KEY_BELOW or NO_KEY_ABOVE.
__device__ inline u64 key_of(float value) {
  u32 bits = __float_as_uint(value + 0.0f);
  return bits & 0x80000000u ? (u32)~bits : bits | 0x80000000u;
}
__device__ inline u64 key_of(double value) {
  u64 bits = (u64)__double_as_longlong(value + 0.0);
  return bits >> 63 ? ~bits : bits | 1ull << 63;
}

// The scores of a row: its logits as they are, or changed by penalties, bias and mask, which takes out by -infinity.
struct Logits {
  const float* values;
  __device__ bool present(int) const { return true; }
  __device__ u64 key(int id) const { return key_of(values[id]); }
  __device__ double score(int id) const { return (double)values[id]; }
};
struct Changed {
  const double* values;
  __device__ bool present(int id) const { return values[id] > -1e308 * 10; }
  __device__ u64 key(int id) const { return key_of(values[id]); }
  __device__ double score(int id) const { return values[id]; }
};

// exp(x) for x <= 0 to 1e-15, by plain double arithmetic; 0 where no weight is left of it.
__device__ inline double exp_down(double x) {
  if (x < -45.0) return 0.0;
  double n = floor(x * 1.4426950408889634 + 0.5);
  double r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  double p = 1.0 / 6227020800.0;
  const double taylor[13] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                             1.0 / 5040,      1.0 / 720,      1.0 / 120,     1.0 / 24,     1.0 / 6,
                             0.5,             1.0,            1.0};
#pragma unroll
  for (int i = 0; i < 13; i++) p = p * r + taylor[i];
  return p * __longlong_as_double((long long)((int)n + 1023) << 52);
}

// The same to 1e-7 in float.
__device__ inline float exp_down(float x) {
  if (x < -27.0f) return 0.0f;
  float n = floorf(x * 1.44269504f + 0.5f);
  float r = (x - n * 0.693145751953125f) - n * 1.42860682030941723212e-6f;
  float p = 1.0f / 5040;
  const float taylor[7] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
#pragma unroll
  for (int i = 0; i < 7; i++) p = p * r + taylor[i];
  return p * __uint_as_float((u32)((int)n + 127) << 23);
}

// Number `index` of a PCG64 stream, from 0 to below 1, as numpy.random.Generator.random gives it.
__device__ inline double random_number(const Rules& rules, int index) {
  const u128 multiplier = (u128)0x2360ED051FC65DA4ull << 64 | 0x4385DF649FCCF645ull;
  u128 increment = (u128)rules.increment_high << 64 | rules.increment_low;
  u128 state = (u128)rules.state_high << 64 | rules.state_low;
  u128 factor = multiplier, term = increment, all_factors = 1, all_terms = 0;
  for (u32 left = (u32)index + 1; left; left >>= 1) {  // that many steps of the generator at once
    if (left & 1) {
      all_factors *= factor;
      all_terms = all_terms * factor + term;
    }
    term *= factor + 1;
    factor *= factor;
  }
  state = all_factors * state + all_terms;
  u64 mixed = (u64)(state >> 64) ^ (u64)state;
  int turn = (int)(state >> 122);
  u64 bits = mixed >> turn | mixed << (-turn & 63);
  return (double)(bits >> 11) * (1.0 / 9007199254740992.0);
}

// The largest key such that the weights of ids with this key or a larger one come to `want`, and what those with a
// larger key come to. Some weights must come to `want`. Halves the range of keys, of which it skips the empty parts.
struct Cut {
  u64 key, above;
};
template <class Scores, class Weigh>
__device__ Cut cut_at(const Scores& scores, int count, u64 want, Weigh weigh, Pass* parts) {
  Pass mine = nothing();
  for (int id = threadIdx.x; id < count; id += blockDim.x) {
    if (!weigh(id)) continue;
    u64 key = scores.key(id);
    if (key < mine.low) mine.low = key;
    if (key > mine.high) mine.high = key;
  }
  Pass all = together(mine, parts);
  u64 low = all.low, high = all.high;
  Cut cut;
  cut.above = 0;
  while (low < high) {
    u64 middle = low + (high - low) / 2;
    mine = nothing();
    for (int id = threadIdx.x; id < count; id += blockDim.x) {
      u64 key = scores.key(id);
      if (key < low || key > high) continue;
      u64 weight = weigh(id);
      if (!weight) continue;
      if (key > middle) {
        mine.sum += weight;
        if (key < mine.low) mine.low = key;
      } else if (key > mine.high) {
        mine.high = key;
      }
    }
    all = together(mine, parts);
    if (cut.above + all.sum >= want) {
      low = all.low;
    } else {
      cut.above += all.sum;
      high = all.high;
    }
  }
  cut.key = low;
  return cut;
}

// The smallest id such that the weights of all ids up to it come to more than `goal`. Halves the range of ids.
template <class Weigh>
__device__ int locate(int count, u64 goal, Weigh weigh, Pass* parts) {
  int first = 0, last = count;
  while (last - first > 1) {
    int middle = first + (last - first) / 2;
    Pass mine = nothing();
    for (int id = first + threadIdx.x; id < middle; id += blockDim.x) mine.sum += weigh(id);
    u64 sum = together(mine, parts).sum;
    if (goal < sum) {
      last = middle;
    } else {
      goal -= sum;
      first = middle;
    }
  }
  return first;
}

// Choose from scores of which some are present. `weights` (choices) is for working in.
template <class Scores>
__device__ int choose(const Scores& scores, const Rules& rules, u64* weights, Pass* parts) {
  const int count = rules.choices;
  Pass mine = nothing();
  int best = count;
  for (int id = threadIdx.x; id < count; id += blockDim.x) {
    if (!scores.present(id)) continue;
    mine.sum++;
    u64 key = scores.key(id);
    if (key > mine.high) {
      mine.high = key;
      best = id;
    }
  }
  Pass all = together(mine, parts);
  const u64 top_key = all.high, present = all.sum;
  mine = nothing();
  if (best < count && scores.key(best) == top_key) mine.low = best;
  best = (int)together(mine, parts).low;
  if (rules.temperature == 0) return best;

  // Top-k: what has a larger key than the cut stays, and of those with the same key the first ones.
  u64 cut_key = 0;
  int last_tie = count;
  if (rules.top_k > 0 && (u64)rules.top_k < present) {
    Cut cut = cut_at(scores, count, rules.top_k, [&](int id) { return (u64)scores.present(id); }, parts);
    cut_key = cut.key;
    last_tie = locate(count, rules.top_k - cut.above - 1, [&](int id) { return (u64)(scores.key(id) == cut_key); }, parts);
  }
  // Weights of what stays, the largest one 2^bits; their sum fits 63 bits.
  int bits = 50;
  while (bits > 0 && (u64)count >> (62 - bits)) bits--;
  const double top = scores.score(best), scale = (double)(1ull << bits);
  mine = nothing();
  for (int id = threadIdx.x; id < count; id += blockDim.x) {
    u64 key = scores.key(id), weight = 0;
    if (scores.present(id) && (key > cut_key || (key == cut_key && id <= last_tie)))
      weight = (u64)(exp_down((scores.score(id) - top) / rules.temperature) * scale);
    weights[id] = weight;
    mine.sum += weight;
  }
  u64 total = together(mine, parts).sum;

  if (rules.top_p < 1) {
    double share = ceil(rules.top_p * (double)total);
    u64 want = share < 1 ? 1 : share >= (double)total ? total : (u64)share;
    Cut cut = cut_at(scores, count, want, [&](int id) { return weights[id]; }, parts);
    const u64 key = cut.key;
    auto at_border = [&](int id) { return scores.key(id) == key ? weights[id] : (u64)0; };
    int last = locate(count, want - cut.above - 1, at_border, parts);
    for (int id = threadIdx.x; id < count; id += blockDim.x) {
      u64 other = scores.key(id);
      if (other < key || (other == key && id > last)) weights[id] = 0;
    }
  }
  const u64 least = rules.min_p > 0 ? (u64)ceil(rules.min_p * scale) : 0;
  mine = nothing();
  for (int id = threadIdx.x; id < count; id += blockDim.x) {
    if (weights[id] < least) weights[id] = 0;
    mine.sum += weights[id];
  }
  total = together(mine, parts).sum;
  double reached = random_number(rules, rules.index) * (double)total;
  u64 goal = reached >= (double)total ? total - 1 : (u64)reached;
  if (goal >= total) goal = total - 1;  // where the total was rounded up
  return locate(count, goal, [&](int id) { return weights[id]; }, parts);
}

// Scores after penalties, bias and mask, in the steps of `Sampler`.
__device__ inline void change(const float* logits, const Rules& rules, double* scores) {
  for (int id = threadIdx.x; id < rules.choices; id += blockDim.x) {
    double score = (double)logits[id];
    u32 found = rules.counts ? rules.counts[id] : 0;
    if (found & IN_HISTORY) {
      if (rules.repetition != 1) score = score > 0 ? score / rules.repetition : score * rules.repetition;
      u32 chosen = found & ~IN_HISTORY;
      if (chosen) score -= rules.frequency * (double)chosen + rules.presence;
    }
    scores[id] = score;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rules.bias_count; i += blockDim.x) {  // each id once
    int id = rules.bias_ids[i];
    if (id < rules.choices) scores[id] += rules.bias[i];
  }
  __syncthreads();
  if (rules.allowed) {
    for (int id = threadIdx.x; id < rules.choices; id += blockDim.x)
      if (!(rules.allowed[id / 32] >> (id % 32) & 1)) scores[id] = -1e308 * 10;
    __syncthreads();
  }
}

// The log of the sum of exp(logit - top) over a whole row; `top` is the largest logit.
__device__ inline double log_sum(const float* logits, int vocab, float top, Pass* parts) {
  Pass mine = nothing();
  for (int id = threadIdx.x; id < vocab; id += blockDim.x)
    mine.sum += (u64)(exp_down(logits[id] - top) * 1099511627776.0f);  // 2^40
  return log((double)together(mine, parts).sum / 1099511627776.0);
}

// Choose the token of row blockIdx.x of logits (B, vocab); `scores` and `weights` (B, vocab) are for working in.
__device__ inline Choice choose_for(const float* logits, int vocab, Rules& rules, double* scores, u64* weights,
                                    Pass* parts) {
  Choice choice;
  choice.token = -1;
  choice.status = NOT_FINITE;
  choice.logprob = 0;
  choice.unused = 0;
  Pass mine = nothing();
  float top = -3.4e38f;
  for (int id = threadIdx.x; id < vocab; id += blockDim.x) {
    float logit = logits[id];
    mine.sum += !(logit - logit == 0.0f);
    if (logit > top) top = logit;
  }
  mine.high = key_of(top);
  Pass all = together(mine, parts);
  if (all.sum) return choice;
  u32 key = (u32)all.high;
  top = __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
  const bool counted = rules.counts != 0, changed = counted || rules.bias_count || rules.allowed;
  choice.status = CHOSEN;
  if (changed) {
    change(logits, rules, scores);
    Changed values;
    values.values = scores;
    mine = nothing();
    for (int id = threadIdx.x; id < rules.choices; id += blockDim.x) mine.sum += values.present(id);
    if (together(mine, parts).sum == 0) {
      choice.status = NOTHING_ALLOWED;
      return choice;
    }
    choice.token = choose(values, rules, weights, parts);
  } else {
    Logits values;
    values.values = logits;
    choice.token = choose(values, rules, weights, parts);
  }
  choice.logprob = (float)((double)logits[choice.token] - (double)top - log_sum(logits, vocab, top, parts));
  if (threadIdx.x == 0) {
    rules.index++;
    if (counted) rules.counts[choice.token] = (rules.counts[choice.token] + 1) | IN_HISTORY;
  }
  return choice;
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS)
    select_tokens(const float* logits, int vocab, Rules* rules, const Place* places, Choice* choices, double* scores,
                  u64* weights) {
  __shared__ Pass parts[MAX_THREADS];
  const size_t row = blockIdx.x, start = row * vocab;
  if (places && !places[row].active) return;
  Choice choice = choose_for(logits + start, vocab, rules[row], scores + start, weights + start, parts);
  if (threadIdx.x == 0) choices[row] = choice;
}

__device__ inline float entry(const Table& table, size_t index) {
  if (table.type == 0) return ((const float*)table.values)[index];
  u32 bits = ((const unsigned short*)table.values)[index];
  if (table.type == 2) return __uint_as_float(bits << 16);
  u32 sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  float value = rest < 0x7c00u ? __uint_as_float(rest << 13) * 5.192296858534828e33f  // 2^112
                               : __uint_as_float(0x7f800000u | rest << 13);
  return __uint_as_float(__float_as_uint(value) | sign);
}

// After select_tokens: keep the latent that the step has computed, and make the choice the next input. The integer
// inputs of the graph lie one after the other, `stride` apart: ids, positions, write index. Latents are of `words`
// whole words of 4 bytes; `history` (B, capacity, words) has one for each token.
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
    advance_rows(const Choice* choices, Place* places, Record* records, long long* inputs, int stride, const u32* present,
                 u32* past, u32* history, int words, int capacity, const Table* tables, int table_count) {
  const size_t row = blockIdx.x;
  const Place place = places[row];
  const Choice choice = choices[row];
  Record record;
  record.token = -1;
  record.status = INACTIVE;
  record.length = place.length;
  record.logprob = 0;
  if (place.active) {
    record.token = choice.token;
    record.status = choice.status;
    record.length = place.length + 1;
    record.logprob = choice.logprob;
    const bool goes_on = choice.status == CHOSEN && record.length < place.limit;
    for (int i = threadIdx.x; i < words; i += blockDim.x) {
      u32 word = present[row * words + i];
      history[(row * capacity + place.length) * words + i] = word;
      if (goes_on) past[row * words + i] = word;
    }
    for (int t = 0; goes_on && t < table_count; t++) {
      const Table table = tables[t];
      for (int i = threadIdx.x; i < table.columns; i += blockDim.x)
        table.rows[row * table.columns + i] = entry(table, (size_t)choice.token * table.columns + i);
    }
    __syncthreads();  // all have read the place
    if (threadIdx.x == 0) {
      places[row].length = record.length;
      places[row].active = goes_on;
      if (goes_on) {
        inputs[row] = choice.token;
        inputs[stride + row] = record.length;
        inputs[2 * stride + row] = record.length;
      }
    }
  }
  if (threadIdx.x == 0) records[row] = record;
}
