// The items of the largest inner products with each user, exact, without ever holding all products.
//
//  * Items are taken a panel at a time: kWidth of them, transposed, in L1. Every group of kGroup users
//    meets the panel while it is there; their products with it stay in registers.
//  * A product is compared in its register with the user's k-th best so far. Few are larger; those go
//    the slow way, into a heap of the k best whose root is the worst of them.
//  * Items come in the catalogue's order. So of equal scores the first stays, and a user's excluded
//    items, ascending too, are walked along with them: only products that are large enough are looked
//    up at all.
//  * Every product is one sum in one order, whatever the panel, the group or the thread: items with
//    equal vectors have equal scores.
#include <cmath>

#include "simd.h"

extern "C" struct RankProductsArgs {
  int64_t size;  // sizeof(RankProductsArgs): tells a library and a caller of different versions apart
  int64_t threads, users, items, dim, k;
  int64_t query_row, item_row;      // strides in elements; a row's elements are adjacent
  const float *query, *item;        // (users, dim), (items, dim)
  const int64_t* excluded_offsets;  // (users + 1), of each user's part of `excluded`; null: nothing is
  const int64_t* excluded;          // ascending for a user, without repetition or with
  // (users, k), filled with -1 by the caller: places that no item is left for stay so. Of all items
  // and of those not excluded; either may be null. A user whose scores are NaN has kNan in the first.
  int64_t *everything, *others;
};

namespace {

using Args = RankProductsArgs;

// What fits the registers beside the sums: a panel's vectors and one number of a user's.
#if defined(RECSYS_ISA_AVX512) || defined(RECSYS_NEON)
constexpr int kGroup = 8, kVectors = 3;  // of 32 registers
#else
constexpr int kGroup = 4, kVectors = 3;  // of 16
#endif
constexpr int kWidth = kVectors * Vec::size;
constexpr int64_t kChunkBytes = 256 << 10;  // users of a task: their vectors stay in L2
constexpr int64_t kHeapBytes = 4 << 20;
constexpr int64_t kNan = -2;
constexpr float kLowest = -3.402823466e38f;  // what -infinity counts as: it is not "no item"

RECSYS_INLINE int lowest_bit(uint64_t bits) {
#if !defined(_MSC_VER) || defined(__clang__)
  return __builtin_ctzll(bits);
#else
  unsigned long at;
  _BitScanForward64(&at, bits);
  return static_cast<int>(at);
#endif
}

// Into the first of Vec::size / K vectors, lane i: the sum of the i-th one's lanes.
template <int K>
RECSYS_INLINE void fold_all(Vec* v) {
  for (int i = 0; i < Vec::size / (2 * K); ++i) v[i] = Vec::fold<K>(v[2 * i], v[2 * i + 1]);
  if constexpr (2 * K < Vec::size) fold_all<2 * K>(v);
}

// The k best of what one user was offered: a heap, the worst in front; the items are in their place of
// the result already.
struct Best {
  float* score;
  int64_t* item;
  int64_t* count;
  int64_t k;

  static bool worse(float a, int64_t i, float b, int64_t j) { return a < b || (a == b && i > j); }

  // Products that are not above this need not be offered; NaN, which nothing is at most, while places
  // are left.
  float bar() const { return *count < k ? NAN : score[0]; }

  void put(int64_t at, float s, int64_t i) const {
    score[at] = s;
    item[at] = i;
  }

  void sink(int64_t at, int64_t end, float s, int64_t i) const {
    for (int64_t child; (child = 2 * at + 1) < end; at = child) {
      if (child + 1 < end && worse(score[child + 1], item[child + 1], score[child], item[child]))
        ++child;
      if (!worse(score[child], item[child], s, i)) break;
      put(at, score[child], item[child]);
    }
    put(at, s, i);
  }

  void offer(float s, int64_t i) const {
    if (*count == k) {
      if (s > score[0]) sink(0, k, s, i);  // of equal ones the earlier item stays
      return;
    }
    int64_t at = (*count)++;
    for (int64_t parent; at > 0; at = parent) {
      parent = (at - 1) / 2;
      if (!worse(s, i, score[parent], item[parent])) break;
      put(at, score[parent], item[parent]);
    }
    put(at, s, i);
  }

  // Best first.
  void sort() const {
    for (int64_t end = *count - 1; end > 0; --end) {
      const float s = score[end];
      const int64_t i = item[end];
      put(end, score[0], item[0]);
      sink(0, end, s, i);
    }
  }
};

// A task: some users against the whole catalogue.
class Chunk {
 public:
  // Where memory is null it only counts what it needs, in bytes.
  Chunk(const Args& a, int64_t first, int64_t users, char* memory)
      : a_(a), first_(first), users_(users), groups_(ceil_div(users, kGroup)) {
    const auto take = [&](int64_t bytes) {
      char* at = memory == nullptr ? nullptr : memory + used_;
      used_ += round_up(bytes, 64);
      return at;
    };
    query_ = reinterpret_cast<float*>(take(4 * groups_ * kGroup * a.dim));
    panel_ = reinterpret_cast<float*>(take(4 * kWidth * a.dim));
    bar_ = reinterpret_cast<float*>(take(4 * groups_ * kGroup));
    seen_ = reinterpret_cast<int64_t*>(take(8 * users));
    for (int which = 0; which < 2; ++which) {
      counts_[which] = reinterpret_cast<int64_t*>(take(8 * users));
      if ((which == 0 ? a.everything : a.others) != nullptr)
        scores_[which] = reinterpret_cast<float*>(take(4 * users * a.k));
    }
  }

  int64_t bytes() const { return used_; }

  void run() {
    begin();
    // Not of this chunk: a user's sums are not to depend on how many threads there are.
    const bool few = a_.users < kGroup;
    const int64_t step = few ? Vec::size : kWidth;
    for (int64_t item = 0; item < a_.items; item += step) {
      const int64_t width = min64(step, a_.items - item);
      const uint64_t valid = ~uint64_t{0} >> (64 - width);
      if (few) {
        for (int64_t u = 0; u < users_; ++u) compare_one(u, item, width, valid);
      } else {
        fill_panel(item, width);
        for (int64_t group = 0; group < groups_; ++group) compare(group, item, valid);
      }
    }
    for (int64_t u = 0; u < users_; ++u)
      for (int which = 0; which < 2; ++which) {
        if (scores_[which] == nullptr) continue;
        if (counts_[which][u] < 0) best(which, u).item[0] = kNan;
        best(which, u).sort();
      }
  }

 private:
  Best best(int which, int64_t u) const {
    int64_t* items = (which == 0 ? a_.everything : a_.others) + (first_ + u) * a_.k;
    return {scores_[which] + u * a_.k, items, counts_[which] + u, a_.k};
  }

  // Users of a group lie interleaved, as they are read; those beyond the last are zeros.
  void begin() {
    for (int64_t group = 0; group < groups_; ++group)
      for (int64_t u = 0; u < kGroup; ++u) {
        float* to = query_ + group * kGroup * a_.dim + u;
        const int64_t at = group * kGroup + u;
        const float* from = a_.query + (first_ + at) * a_.query_row;
        for (int64_t d = 0; d < a_.dim; ++d) to[d * kGroup] = at < users_ ? from[d] : 0.f;
        bar_[at] = at < users_ ? NAN : INFINITY;
      }
    for (int64_t u = 0; u < users_; ++u) {
      counts_[0][u] = counts_[1][u] = 0;
      seen_[u] = a_.excluded_offsets == nullptr ? 0 : a_.excluded_offsets[first_ + u];
    }
  }

  void fill_panel(int64_t item, int64_t width) {
    if (width < kWidth) std::memset(panel_, 0, sizeof(float) * kWidth * a_.dim);
    for (int64_t i = 0; i + 4 <= width; i += 4) {
      const float* from = a_.item + (item + i) * a_.item_row;
      for (int64_t d = 0; d < a_.dim; ++d)
        for (int64_t j = 0; j < 4; ++j) panel_[d * kWidth + i + j] = from[j * a_.item_row + d];
    }
    for (int64_t i = width / 4 * 4; i < width; ++i)
      for (int64_t d = 0; d < a_.dim; ++d)
        panel_[d * kWidth + i] = a_.item[(item + i) * a_.item_row + d];
  }

  void compare(int64_t group, int64_t item, uint64_t valid) {
    Vec sum[kGroup][kVectors];
    for (int u = 0; u < kGroup; ++u)
      for (int v = 0; v < kVectors; ++v) sum[u][v] = Vec::zero();
    const float *query = query_ + group * kGroup * a_.dim, *panel = panel_;
    for (int64_t d = 0; d < a_.dim; ++d, query += kGroup, panel += kWidth) {
      Vec at[kVectors];
      for (int v = 0; v < kVectors; ++v) at[v] = Vec::load(panel + v * Vec::size);
      for (int u = 0; u < kGroup; ++u) {
        const Vec by = Vec::all(query[u]);
        for (int v = 0; v < kVectors; ++v) sum[u][v] = Vec::fma(at[v], by, sum[u][v]);
      }
    }
    for (int u = 0; u < kGroup; ++u) {
      const Vec bar = Vec::all(bar_[group * kGroup + u]);
      uint64_t larger = 0;
      for (int v = 0; v < kVectors; ++v)
        larger |= uint64_t{Vec::not_at_most(sum[u][v], bar)} << (v * Vec::size);
      if ((larger & valid) == 0) continue;
      alignas(64) float scores[kWidth];
      for (int v = 0; v < kVectors; ++v) sum[u][v].store(scores + v * Vec::size);
      offer(group * kGroup + u, item, larger & valid, scores);
    }
  }

  // For a few users a panel is not worth filling: the rows as they are, a sum's parts side by side.
  void compare_one(int64_t u, int64_t item, int64_t width, uint64_t valid) {
    const float *query = a_.query + (first_ + u) * a_.query_row, *row = a_.item + item * a_.item_row;
    const int64_t even = a_.dim / Vec::size * Vec::size, left = a_.dim - even;
    alignas(64) float scores[Vec::size], end[Vec::size] = {};
    if (left > 0) std::memcpy(end, query + even, sizeof(float) * static_cast<size_t>(left));
    const Vec query_end = Vec::load(end);
    Vec parts[Vec::size];
    for (int64_t i = 0; i < Vec::size; ++i, row += i < width ? a_.item_row : 0) {
      Vec sum = Vec::zero();
      for (int64_t d = 0; d < even; d += Vec::size)
        sum = Vec::fma(Vec::load(query + d), Vec::load(row + d), sum);
      if (left > 0) {
        std::memcpy(end, row + even, sizeof(float) * static_cast<size_t>(left));
        sum = Vec::fma(query_end, Vec::load(end), sum);
      }
      parts[i] = sum;
    }
    fold_all<1>(parts);
    const uint64_t larger = uint64_t{Vec::not_at_most(parts[0], Vec::all(bar_[u]))} & valid;
    if (larger == 0) return;
    parts[0].store(scores);
    offer(u, item, larger, scores);
  }

  // Not worth being inlined: of a catalogue in no particular order k log(items / k) products come here.
#if !defined(_MSC_VER) || defined(__clang__)
  __attribute__((noinline))
#else
  __declspec(noinline)
#endif
  void offer(int64_t u, int64_t first_item, uint64_t larger, const float* scores) {
    if (u >= users_ || counts_[0][u] < 0) return;
    for (; larger != 0; larger &= larger - 1) {
      const int i = lowest_bit(larger);
      const int64_t item = first_item + i;
      const bool out = is_excluded(u, item);
      if (out && a_.everything == nullptr) continue;
      if (scores[i] != scores[i]) {
        counts_[0][u] = counts_[1][u] = -1;
        bar_[u] = INFINITY;
        return;
      }
      const float score = scores[i] < kLowest ? kLowest : scores[i];
      if (a_.everything != nullptr) best(0, u).offer(score, item);
      if (a_.others != nullptr && !out) best(1, u).offer(score, item);
    }
    // The k-th best of some of the items is not above that of all.
    bar_[u] = best(a_.others != nullptr ? 1 : 0, u).bar();
  }

  // Asked with ascending items.
  bool is_excluded(int64_t u, int64_t item) {
    if (a_.excluded_offsets == nullptr) return false;
    const int64_t end = a_.excluded_offsets[first_ + u + 1];
    int64_t& at = seen_[u];
    while (at < end && a_.excluded[at] < item) ++at;
    return at < end && a_.excluded[at] == item;
  }

  const Args& a_;
  const int64_t first_, users_, groups_;
  int64_t used_ = 0;
  float *query_, *panel_, *bar_;
  int64_t* seen_;
  int64_t* counts_[2];
  float* scores_[2] = {nullptr, nullptr};
};

bool valid(const Args* a) {
  return a != nullptr && a->size == static_cast<int64_t>(sizeof(Args)) && a->threads >= 1 &&
         a->users >= 0 && a->items >= 0 && a->dim >= 0 && a->k >= 1 &&
         (a->everything != nullptr || a->others != nullptr);
}

}  // namespace

RECSYS_KERNEL(recsys_rank_products)(const RankProductsArgs* args) {
  if (!valid(args)) return RECSYS_BAD_ARGUMENTS;
  const Args& a = *args;
  const int64_t fit = max64(1, min64(kChunkBytes / (4 * max64(1, a.dim)), kHeapBytes / (4 * a.k)));
  const int64_t share = ceil_div(a.users, a.threads);
  const int64_t users = round_up(max64(1, min64(fit, share)), kGroup);
  int failed = 0;  // tasks only ever set it
  parallel_for(a.threads, ceil_div(a.users, users), [&](int64_t task) {
    const int64_t first = task * users, here = min64(users, a.users - first);
    const int64_t bytes = Chunk(a, first, here, nullptr).bytes();
    auto* memory = static_cast<char*>(recsys_scratch(static_cast<size_t>(bytes)));
    if (memory == nullptr) {
      failed = 1;
      return;
    }
    Chunk(a, first, here, memory).run();
  });
  return failed ? RECSYS_NO_MEMORY : RECSYS_OK;
}
