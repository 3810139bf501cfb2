// Depthwise convolution along time, forward and backward.
//
// It is a matter of memory: a few multiplications for each number read. So the kernel reads and writes
// every tensor once, in order, and keeps what lies between in L1:
//  * A task takes a block of channels of some batch rows. A row's packed sequences are rows of their
//    own: what stands before and after one is zero (or the initial state).
//  * A sequence is taken some positions at a time. Those that they look at are copied to scratch memory
//    as float32 ("window"): then no loop has an edge to look at, rows are a constant apart, and rows
//    that lie a power of two apart do not compete for the same few cache lines.
//  * What comes next is fetched ahead, because a tile's rows fill a page and processors do not look over
//    its end. Large results are written past the caches, which would read them first.
//  * Backward computes the convolution's result again where SiLU needs it, and takes the gradients of
//    taps and input in one walk over the tiles.
#include <cstdlib>

#include "rows.h"

namespace {

constexpr int64_t kTile = 8;   // positions whose sums are in registers at a time
constexpr int64_t kBlock = 64;  // channels a task; a multiple of every Vec::size
constexpr int64_t kSpan = 24;  // positions whose window is in L1 at a time

}  // namespace

extern "C" struct CausalConv1dArgs {
  int64_t size;  // sizeof(CausalConv1dArgs): tells a library and a caller of different versions apart
  int64_t threads, batch, length, channels, width;
  int64_t ahead;  // how many of the taps look into the future
  int64_t bf16;   // x, y, dy and dx are bfloat16, else float32
  int64_t silu;
  int64_t x_batch, x_time, dy_batch, dy_time;  // strides in elements; channels are adjacent
  const void* x;
  const float* weight;     // (channels, width)
  const float* bias;       // (channels) or null
  const int64_t* seq_idx;  // (batch, length) or null
  const float* state;      // (batch, channels, width - 1) or null; only where ahead is 0
  void* y;                 // (batch, length, channels), forward only
  const void* dy;
  void* dx;                            // (batch, length, channels)
  float *dweight, *dbias, *dstate;     // as weight, bias and state; the last two may be null
};

namespace {

using Args = CausalConv1dArgs;

// Rows of kBlock floats, of which those outside [first, last) are zero.
struct Window {
  const float* at;
  int64_t first, last;

  Window from(int64_t row) const { return {at + row * kBlock, first - row, last - row}; }
};

// out(t) = start + sum_k taps(k) in(t + k), t = t0 … t0 + kRows - 1, for `count` channels; kStep floats
// lie between two taps. finish(t, c, out) stores the vector at channel c. All channels of a few
// positions come before the next positions: what is written is then adjacent.
template <int kRows, int64_t kStep, class F>
RECSYS_INLINE void convolve_rows(const Window& in, const float* taps, int64_t width,
                                 const float* start, int64_t t0, int64_t count, const F& finish) {
  const int64_t first = max64(0, in.first - (kRows - 1)), last = min64(width, in.last);
  for (int64_t c = 0; c < count; c += Vec::size) {
    Vec sum[kRows];
    const Vec before = start == nullptr ? Vec::zero() : Vec::load(start + c);
    for (int j = 0; j < kRows; ++j) sum[j] = before;
    const float *at = in.at + first * kBlock + c, *tap = taps + first * kStep + c;
    for (int64_t k = first; k < last; ++k, at += kBlock, tap += kStep) {
      const Vec by = Vec::load(tap);
      for (int j = 0; j < kRows; ++j) sum[j] = Vec::fma(by, Vec::load(at + j * kBlock), sum[j]);
    }
    for (int j = 0; j < kRows; ++j) finish(t0 + j, c, sum[j]);
  }
}

template <int64_t kStep, class F>
RECSYS_INLINE void convolve(const Window& in, const float* taps, int64_t width, const float* start,
                            int64_t length, int64_t count, const F& finish) {
  int64_t t = 0;
  for (; t + kTile <= length; t += kTile)
    convolve_rows<kTile, kStep>(in.from(t), taps, width, start, t, count, finish);
  for (; t + 2 <= length; t += 2)
    convolve_rows<2, kStep>(in.from(t), taps, width, start, t, count, finish);
  if (t < length) convolve_rows<1, kStep>(in.from(t), taps, width, start, t, count, finish);
}

// sums(k) += sum_t a(t) b(t + k), t = 0 … count - 1, one vector of channels, kTaps taps.
template <int kTaps>
RECSYS_INLINE void correlate(const float* a, const Window& b, int64_t count, float* sums) {
  Vec sum[kTaps];
  for (int j = 0; j < kTaps; ++j) sum[j] = Vec::load(sums + j * kBlock);
  for (int64_t t = max64(0, b.first - (kTaps - 1)); t < min64(count, b.last); ++t) {
    const Vec at = Vec::load(a + t * kBlock);
    for (int j = 0; j < kTaps; ++j) sum[j] = Vec::fma(at, Vec::load(b.at + (t + j) * kBlock), sum[j]);
  }
  for (int j = 0; j < kTaps; ++j) sum[j].store(sums + j * kBlock);
}

// What one task works on: the channels [first, first + count) with their taps.
template <class T>
class Block {
 public:
  // Where memory is null it only counts what it needs, in floats.
  Block(const Args& a, bool backward, int64_t number, float* memory)
      : a_(a),
        first_(number * kBlock),
        count_(min64(kBlock, a.channels - first_)),
        width_(a.width),
        back_(a.width - 1 - a.ahead),
        stream_(large(a, backward ? a.dx : a.y)) {
    const auto take = [&](int64_t rows) {
      float* at = memory == nullptr ? nullptr : memory + used_;
      used_ += rows * kBlock;
      return at;
    };
    taps_ = take(width_);
    bias_ = take(1);
    window_ = take(kSpan + width_ - 1);
    if (backward) {
      dwindow_ = take(kSpan + width_ - 1);
      sums_ = take(width_ + 1);
      totals_ = reinterpret_cast<double*>(take(2 * (width_ + 1)));
    }
    const int64_t to_clear = used_;
    if (backward && a.silu) dsum_ = take(a.length + 2 * (width_ - 1));
    if (memory == nullptr) return;
    // Channels beyond the last stay zero all through.
    fill_zero(memory, to_clear);
    for (int64_t k = 0; k < width_; ++k)
      for (int64_t c = 0; c < count_; ++c)
        taps_[k * kBlock + c] = a.weight[(first_ + c) * width_ + k];
    if (a.bias != nullptr) read_row(a.bias + first_, count_, bias_);
  }

  int64_t floats() const { return used_; }

  void forward(int64_t b) {
    const T* x = static_cast<const T*>(a_.x) + b * a_.x_batch + first_;
    T* y = static_cast<T*>(a_.y) + b * a_.length * a_.channels + first_;
    each_sequence(
        b,
        [&](int64_t start, int64_t length, const float* state, float*) {
          results(x + start * a_.x_time, length, state, [&](int64_t t, int64_t c, Vec sum) {
            if (a_.silu) sum = sum * sigmoid(sum);
            write(sum, c, y + (start + t) * a_.channels);
          });
        },
        [&](int64_t t) { std::memset(y + t * a_.channels, 0, sizeof(T) * count_); });
  }

  void backward(int64_t b) {
    const T* x = static_cast<const T*>(a_.x) + b * a_.x_batch + first_;
    const T* dy = static_cast<const T*>(a_.dy) + b * a_.dy_batch + first_;
    T* dx = static_cast<T*>(a_.dx) + b * a_.length * a_.channels + first_;
    float* const dstate = part_of_state(a_.dstate, b);
    if (dstate != nullptr) fill_zero(dstate, count_ * (width_ - 1));
    each_sequence(
        b,
        [&](int64_t start, int64_t length, const float* state, float* dstate) {
          backward_sequence(x + start * a_.x_time, dy + start * a_.dy_time, dx + start * a_.channels,
                            length, state, dstate);
        },
        [&](int64_t t) { std::memset(dx + t * a_.channels, 0, sizeof(T) * count_); });
    // A row's sums are float32, those of all rows float64: the error does not grow with the batch.
    for (int64_t i = 0; i < (width_ + 1) * kBlock; ++i) totals_[i] += sums_[i];
    fill_zero(sums_, (width_ + 1) * kBlock);
  }

  // The gradients of taps and bias, (width + 1, channels).
  void write_totals(double* to) const {
    for (int64_t k = 0; k <= width_; ++k)
      std::memcpy(to + k * a_.channels + first_, totals_ + k * kBlock, sizeof(double) * count_);
  }

 private:
  // Whether a result is better written past the caches: float32, in whole aligned vectors, and too large
  // to be still there when it is read.
  static bool large(const Args& a, const void* result) {
    return sizeof(T) == sizeof(float) && a.channels % Vec::size == 0 &&
           reinterpret_cast<uintptr_t>(result) % 64 == 0 &&
           a.batch * a.length * a.channels >= (int64_t{1} << 21);
  }

  template <class P>
  P* part_of_state(P* base, int64_t b) const {
    return base == nullptr ? nullptr : base + (b * a_.channels + first_) * (width_ - 1);
  }

  // Calls body(start, length, state, dstate) for every sequence of row b and gap(t) for padding. The
  // state and its gradient are given to the first sequence only.
  template <class F, class G>
  void each_sequence(int64_t b, const F& body, const G& gap) const {
    const float* state = part_of_state(a_.state, b);
    float* dstate = part_of_state(a_.dstate, b);
    const int64_t* ids = a_.seq_idx == nullptr ? nullptr : a_.seq_idx + b * a_.length;
    for (int64_t t = 0; t < a_.length;) {
      if (ids != nullptr && ids[t] < 0) {
        gap(t++);
        continue;
      }
      int64_t end = ids == nullptr ? a_.length : t + 1;
      while (end < a_.length && ids[end] == ids[t]) ++end;
      body(t, end - t, state, dstate);
      state = nullptr;
      dstate = nullptr;
      t = end;
    }
  }

  // The positions from `start` on that `rows` positions look at, of a sequence of `length` positions
  // `stride` apart; before it stands the state, or zeros.
  template <class S>
  Window window(const S* from, int64_t stride, int64_t start, int64_t rows, int64_t length,
                        const float* state, float* copy) const {
    const int64_t size = rows + width_ - 1;
    const int64_t first = max64(0, -start), last = max64(first, min64(size, length - start));
    if (state == nullptr) {
      fill_zero(copy, first * kBlock);
    } else {
      for (int64_t i = 0; i < first; ++i)
        for (int64_t c = 0; c < count_; ++c)
          copy[i * kBlock + c] = state[c * (width_ - 1) + width_ - 1 + start + i];
    }
    for (int64_t i = first; i < last; ++i) {
      prefetch(from + (start + i + kSpan) * stride, count_ * static_cast<int64_t>(sizeof(S)));
      read_row(from + (start + i) * stride, count_, copy + i * kBlock);
    }
    fill_zero(copy + last * kBlock, (size - last) * kBlock);
    return {copy, state == nullptr ? first : 0, last};
  }

  // The convolution of a sequence, a vector of channels at a time: finish(t, c, sum).
  template <class F>
  RECSYS_INLINE void results(const T* x, int64_t length, const float* state, const F& finish) const {
    for (int64_t t = 0; t < length; t += kSpan) {
      const int64_t rows = min64(kSpan, length - t);
      convolve<kBlock>(window(x, a_.x_time, t - back_, rows, length, state, window_), taps_, width_, bias_,
                       rows, count_, [&](int64_t i, int64_t c, Vec sum) { finish(t + i, c, sum); });
    }
  }

  // A vector of channels from c on of a row of the block's channels.
  RECSYS_INLINE Vec read(const T* row, int64_t c) const {
    if (c + Vec::size <= count_) return load(row + c);
    float lanes[Vec::size] = {};
    read_row(row + c, count_ - c, lanes);
    return Vec::load(lanes);
  }
  RECSYS_INLINE void write(Vec v, int64_t c, T* row) const {
    if (stream_) {
      v.stream(reinterpret_cast<float*>(row + c));
    } else if (c + Vec::size <= count_) {
      store(v, row + c);
    } else {
      float lanes[Vec::size];
      v.store(lanes);
      write_row(lanes, count_ - c, row + c);
    }
  }

  void backward_sequence(const T* x, const T* dy, T* dx, int64_t length, const float* state,
                         float* dstate) {
    if (!a_.silu) {
      backward_walk(x, dx, length, state, dstate, [&](int64_t start, int64_t rows) {
        return window(dy, a_.dy_time, start, rows, length, nullptr, dwindow_);
      });
      return;
    }
    float* dsum = dsum_ + (width_ - 1) * kBlock;
    fill_zero(dsum_, (width_ - 1) * kBlock);
    fill_zero(dsum + length * kBlock, (width_ - 1) * kBlock);
    const Vec one = Vec::all(1.f);
    results(x, length, state, [&](int64_t t, int64_t c, Vec sum) {
      const Vec s = sigmoid(sum);
      (read(dy + t * a_.dy_time, c) * s * Vec::fma(sum, one - s, one)).store(dsum + t * kBlock + c);
    });
    backward_walk(x, dx, length, state, dstate, [&](int64_t start, int64_t rows) {
      const int64_t first = max64(0, -start);
      const int64_t last = max64(first, min64(rows + width_ - 1, length - start));
      return Window{dsum + start * kBlock, first, last};
    });
  }

  // Gradients of taps, bias, input and state; dsum(start, rows) gives a window of those of the
  // convolution's results.
  template <class F>
  void backward_walk(const T* x, T* dx, int64_t length, const float* state, float* dstate,
                     const F& dsum) {
    const float* last_tap = taps_ + (width_ - 1) * kBlock;
    for (int64_t t = 0; t < length; t += kSpan) {
      const int64_t rows = min64(kSpan, length - t);
      // An input at t is met by the last tap at t - ahead and by the first at t + back.
      const Window after = dsum(t - a_.ahead, rows);
      sum_taps(after.at + a_.ahead * kBlock,
               window(x, a_.x_time, t - back_, rows, length, state, window_), rows);
      T* out = dx + t * a_.channels;
      convolve<-kBlock>(after, last_tap, width_, nullptr, rows, count_,
                        [&](int64_t i, int64_t c, Vec sum) { write(sum, c, out + i * a_.channels); });
    }
    if (dstate == nullptr) return;
    const int64_t kept = width_ - 1;  // positions of the state; ahead is 0
    for (int64_t t = 0; t < kept; t += kSpan) {
      const int64_t rows = min64(kSpan, kept - t);
      convolve<-kBlock>(dsum(t - kept, rows), last_tap, width_, nullptr, rows, count_,
                        [&](int64_t i, int64_t c, Vec sum) {
                          float lanes[Vec::size];
                          sum.store(lanes);
                          for (int64_t e = c; e < min64(count_, c + Vec::size); ++e)
                            dstate[e * kept + t + i] = lanes[e - c];
                        });
    }
  }

  void sum_taps(const float* dsum, const Window& in, int64_t rows) {
    for (int64_t c = 0; c < count_; c += Vec::size) {
      const float* d = dsum + c;
      float* sum = sums_ + c;
      const Window at{in.at + c, in.first, in.last};
      int64_t k = 0;
      for (; k + 8 <= width_; k += 8) correlate<8>(d, at.from(k), rows, sum + k * kBlock);
      for (; k + 4 <= width_; k += 4) correlate<4>(d, at.from(k), rows, sum + k * kBlock);
      for (; k < width_; ++k) correlate<1>(d, at.from(k), rows, sum + k * kBlock);
      Vec dbias = Vec::load(sum + width_ * kBlock);
      for (int64_t t = 0; t < rows; ++t) dbias = dbias + Vec::load(d + t * kBlock);
      dbias.store(sum + width_ * kBlock);
    }
  }

  const Args& a_;
  const int64_t first_, count_, width_, back_;
  const bool stream_;
  int64_t used_ = 0;
  float *taps_, *bias_, *window_;
  float *dwindow_ = nullptr, *sums_ = nullptr, *dsum_ = nullptr;  // dsum: a sequence's, where SiLU is
  double* totals_ = nullptr;
};

// Enough tasks for many threads, of at least some 10 microseconds each. Nothing here depends on the
// number of threads, so neither does any sum.
int64_t groups_of(const Args& a, int64_t blocks) {
  const int64_t work = a.batch * a.length * a.channels * a.width;
  return max64(1, min64(min64(a.batch, ceil_div(32, max64(1, blocks))), work >> 17));
}

// Calls body(block, b) for all rows of a task's group, a task for every block of channels and group,
// and end(block, group) after them.
template <class B, class F, class E>
int for_all_rows(const Args& a, bool backward, const F& body, const E& end) {
  const int64_t blocks = ceil_div(a.channels, kBlock), groups = groups_of(a, blocks);
  const int64_t rows = ceil_div(a.batch, groups), floats = B(a, backward, 0, nullptr).floats();
  int failed = 0;  // tasks only ever set it
  parallel_for(a.threads, groups * blocks, [&](int64_t task) {
    auto* memory = static_cast<float*>(recsys_scratch(sizeof(float) * floats));
    if (memory == nullptr) {
      failed = 1;
      return;
    }
    B block(a, backward, task % blocks, memory);
    const int64_t group = task / blocks;
    for (int64_t b = group * rows; b < min64(a.batch, (group + 1) * rows); ++b) body(block, b);
    end(block, group);
    Vec::end_of_stream();
  });
  return failed ? RECSYS_NO_MEMORY : RECSYS_OK;
}

template <class T>
int forward(const Args& a) {
  using B = Block<T>;
  return for_all_rows<B>(
      a, false, [](B& block, int64_t b) { block.forward(b); }, [](B&, int64_t) {});
}

template <class T>
int backward(const Args& a) {
  using B = Block<T>;
  const int64_t groups = groups_of(a, ceil_div(a.channels, kBlock));
  const int64_t size = (a.width + 1) * a.channels;
  auto* partial = static_cast<double*>(std::malloc(sizeof(double) * max64(1, groups * size)));
  if (partial == nullptr) return RECSYS_NO_MEMORY;
  const int status = for_all_rows<B>(
      a, true, [](B& block, int64_t b) { block.backward(b); },
      [&](B& block, int64_t group) { block.write_totals(partial + group * size); });
  if (status == RECSYS_OK) {
    for (int64_t group = 1; group < groups; ++group)
      for (int64_t i = 0; i < size; ++i) partial[i] += partial[group * size + i];
    for (int64_t e = 0; e < a.channels; ++e) {
      for (int64_t k = 0; k < a.width; ++k)
        a.dweight[e * a.width + k] = static_cast<float>(partial[k * a.channels + e]);
      if (a.dbias != nullptr) a.dbias[e] = static_cast<float>(partial[a.width * a.channels + e]);
    }
  }
  std::free(partial);
  return status;
}

bool valid(const Args* a) {
  return a != nullptr && a->size == static_cast<int64_t>(sizeof(Args)) && a->threads >= 1 &&
         a->batch >= 0 && a->length >= 0 && a->channels >= 0 && a->width >= 1 && a->ahead >= 0 &&
         a->ahead < a->width && (a->state == nullptr || a->ahead == 0);
}

}  // namespace

RECSYS_KERNEL(recsys_causal_conv1d_forward)(const CausalConv1dArgs* args) {
  if (!valid(args)) return RECSYS_BAD_ARGUMENTS;
  return args->bf16 ? forward<uint16_t>(*args) : forward<float>(*args);
}

RECSYS_KERNEL(recsys_causal_conv1d_backward)(const CausalConv1dArgs* args) {
  if (!valid(args)) return RECSYS_BAD_ARGUMENTS;
  return args->bf16 ? backward<uint16_t>(*args) : backward<float>(*args);
}
