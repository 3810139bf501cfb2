// Depthwise convolution along time, forward and backward.
//
// A task takes a block of kBlock channels of one batch row (backward: of a group of rows) and treats
// every packed sequence in it as a row of its own: the sequence is copied into scratch memory as
// float, with width - 1 rows of zeros (or the initial state) before and of zeros after it, so that no
// loop below has an edge to look at. The copies stay in the second-level cache for the usual lengths.
#include "rows.h"

namespace {

constexpr int64_t kBlock = 128;  // channels a task; a multiple of every Vec::size

}  // namespace

extern "C" struct CausalConv1dArgs {
  int64_t threads, batch, length, channels, width;
  int64_t ahead;   // how many of the taps look into the future
  int64_t groups;  // tasks a block: rows are summed group by group, whatever the number of threads
  int64_t bf16;    // x, y, dy and dx are bfloat16, else float32
  int64_t silu;
  int64_t x_batch, x_time, dy_batch, dy_time;  // strides in elements; channels are adjacent
  const void* x;
  const float* weight;     // (width, channels)
  const float* bias;       // (channels) or null
  const int32_t* seq_idx;  // (batch, length) or null
  const float* state;      // (batch, width - 1, channels) or null; only where ahead is 0
  void* y;                 // (batch, length, channels), forward only
  const void* dy;
  void* dx;        // (batch, length, channels)
  float* dweight;  // (groups, width + 1, channels), the bias's gradient last
  float* dstate;   // as state, or null
};

namespace {

using Args = CausalConv1dArgs;

// Rows of kBlock floats: out(t) = start + sum_k taps(k) * in(t + k), t = 0 … length - 1, for `count`
// channels; `step` floats lie between two taps. finish(t, c, out) stores the vector at channel c. All
// channels of a few positions come before the next positions: what is written is then adjacent.
template <class F>
RECSYS_INLINE void convolve(const float* in, const float* taps, int64_t step, int64_t width,
                            const float* start, int64_t length, int64_t count, const F& finish) {
  constexpr int kTile = 8;
  int64_t t = 0;
  for (; t + kTile <= length; t += kTile) {
    for (int64_t c = 0; c < count; c += Vec::size) {
      Vec sum[kTile];
      const Vec first = start == nullptr ? Vec::zero() : Vec::load(start + c);
      for (int j = 0; j < kTile; ++j) sum[j] = first;
      const float* at = in + t * kBlock + c;
      for (int64_t k = 0; k < width; ++k) {
        const Vec tap = Vec::load(taps + k * step + c);
        for (int j = 0; j < kTile; ++j)
          sum[j] = Vec::fma(tap, Vec::load(at + (j + k) * kBlock), sum[j]);
      }
      for (int j = 0; j < kTile; ++j) finish(t + j, c, sum[j]);
    }
  }
  for (; t < length; ++t) {
    for (int64_t c = 0; c < count; c += Vec::size) {
      Vec sum = start == nullptr ? Vec::zero() : Vec::load(start + c);
      for (int64_t k = 0; k < width; ++k)
        sum = Vec::fma(Vec::load(taps + k * step + c), Vec::load(in + (t + k) * kBlock + c), sum);
      finish(t, c, sum);
    }
  }
}

// sums(k) += sum_t a(t) * b(t + k), t = 0 … count - 1, one vector of channels, kTaps taps.
template <int kTaps>
RECSYS_INLINE void correlate(const float* a, const float* b, int64_t count, float* sums) {
  Vec sum[kTaps];
  for (int j = 0; j < kTaps; ++j) sum[j] = Vec::load(sums + j * kBlock);
  for (int64_t t = 0; t < count; ++t) {
    const Vec at = Vec::load(a + t * kBlock);
    for (int j = 0; j < kTaps; ++j) sum[j] = Vec::fma(at, Vec::load(b + (t + j) * kBlock), sum[j]);
  }
  for (int j = 0; j < kTaps; ++j) sum[j].store(sums + j * kBlock);
}

// What one task works on: the channels [first, first + count) with their taps, rows of kBlock.
struct Block {
  const Args& args;
  int64_t first, count;  // channels
  int64_t width, back;   // taps, those of them that look back
  float *taps, *bias;
  float* in;   // width - 1 rows, the sequence, width - 1 rows
  float* out;  // the same; the gradient of the convolution's result
  float* sums; // width + 1 rows: the gradients of taps and bias

  // Floats of scratch memory: the pointers above in this order.
  static int64_t scratch(const Args& a) {
    return kBlock * ((a.width + 1) * 2 + 2 * (a.length + 2 * (a.width - 1)));
  }

  Block(const Args& a, int64_t block, float* memory)
      : args(a),
        first(block * kBlock),
        count(min64(kBlock, a.channels - first)),
        width(a.width),
        back(a.width - 1 - a.ahead) {
    taps = memory;
    bias = taps + kBlock * width;
    in = bias + kBlock;
    out = in + kBlock * (a.length + 2 * (width - 1));
    sums = out + kBlock * (a.length + 2 * (width - 1));
    // Channels beyond the last stay zero all through.
    fill_zero(memory, scratch(a));
    for (int64_t k = 0; k < width; ++k)
      read_row(a.weight + k * a.channels + first, count, taps + k * kBlock);
    if (a.bias != nullptr) read_row(a.bias + first, count, bias);
  }

  // Calls body(start, length, state, dstate) for every sequence of row b and gap(t) for padding. The
  // state and its gradient are given to the first sequence only.
  template <class F, class G>
  void each_sequence(int64_t b, const F& body, const G& gap) const {
    const int64_t state_at = b * (width - 1) * args.channels + first;
    const float* state = args.state == nullptr ? nullptr : args.state + state_at;
    float* dstate = args.dstate == nullptr ? nullptr : args.dstate + state_at;
    const int32_t* ids = args.seq_idx == nullptr ? nullptr : args.seq_idx + b * args.length;
    for (int64_t t = 0; t < args.length;) {
      if (ids != nullptr && ids[t] < 0) {
        gap(t++);
        continue;
      }
      int64_t end = ids == nullptr ? args.length : t + 1;
      while (end < args.length && ids[end] == ids[t]) ++end;
      body(t, end - t, state, dstate);
      state = nullptr;
      dstate = nullptr;
      t = end;
    }
  }

  // The sequence of `length` positions at x into `in`, with what comes before and zeros after.
  template <class T>
  void read(const T* x, int64_t length, const float* state) {
    if (state == nullptr) {
      fill_zero(in, kBlock * (width - 1));
    } else {
      for (int64_t k = 0; k < width - 1; ++k)
        read_row(state + k * args.channels, count, in + k * kBlock);
    }
    float* at = in + kBlock * (width - 1);
    for (int64_t t = 0; t < length; ++t) read_row(x + t * args.x_time, count, at + t * kBlock);
    fill_zero(at + length * kBlock, kBlock * (width - 1));
  }

  // Where the window of the first position begins in `in`.
  const float* window() const { return in + kBlock * args.ahead; }

  // A vector of channels from c on into a row of the block's channels.
  template <class T>
  RECSYS_INLINE void write(Vec v, int64_t c, T* row) const {
    if (c + Vec::size <= count) {
      store(v, row + c);
    } else {
      float lanes[Vec::size];
      v.store(lanes);
      write_row(lanes, count - c, row + c);
    }
  }

  template <class T>
  void forward(int64_t b) {
    const T* x = static_cast<const T*>(args.x) + b * args.x_batch + first;
    T* y = static_cast<T*>(args.y) + b * args.length * args.channels + first;
    each_sequence(
        b,
        [&](int64_t start, int64_t length, const float* state, float*) {
          read(x + start * args.x_time, length, state);
          T* to = y + start * args.channels;
          convolve(window(), taps, kBlock, width, bias, length, count,
                   [&](int64_t t, int64_t c, Vec sum) {
                     if (args.silu) sum = sum * sigmoid(sum);
                     write(sum, c, to + t * args.channels);
                   });
        },
        [&](int64_t t) { std::memset(y + t * args.channels, 0, sizeof(T) * count); });
  }

  template <class T>
  void backward(int64_t b) {
    const T* x = static_cast<const T*>(args.x) + b * args.x_batch + first;
    const T* dy = static_cast<const T*>(args.dy) + b * args.dy_batch + first;
    T* dx = static_cast<T*>(args.dx) + b * args.length * args.channels + first;
    if (args.dstate != nullptr) {
      for (int64_t k = 0; k < width - 1; ++k)
        std::memset(args.dstate + (b * (width - 1) + k) * args.channels + first, 0,
                    sizeof(float) * count);
    }
    each_sequence(
        b,
        [&](int64_t start, int64_t length, const float* state, float* dstate) {
          read(x + start * args.x_time, length, state);
          float* dsum = out + kBlock * (width - 1);
          fill_zero(out, kBlock * (width - 1));
          for (int64_t t = 0; t < length; ++t)
            read_row(dy + (start + t) * args.dy_time, count, dsum + t * kBlock);
          fill_zero(dsum + length * kBlock, kBlock * (width - 1));
          if (args.silu) {
            const Vec one = Vec::all(1.f);
            convolve(window(), taps, kBlock, width, bias, length, count,
                     [&](int64_t t, int64_t c, Vec sum) {
                       float* here = dsum + t * kBlock + c;
                       const Vec s = sigmoid(sum);
                       (Vec::load(here) * s * Vec::fma(sum, one - s, one)).store(here);
                     });
          }
          for (int64_t c = 0; c < count; c += Vec::size) {
            float* sum = sums + c;
            const float* b_at = window() + c;
            int64_t k = 0;
            for (; k + 8 <= width; k += 8)
              correlate<8>(dsum + c, b_at + k * kBlock, length, sum + k * kBlock);
            for (; k + 4 <= width; k += 4)
              correlate<4>(dsum + c, b_at + k * kBlock, length, sum + k * kBlock);
            for (; k < width; ++k)
              correlate<1>(dsum + c, b_at + k * kBlock, length, sum + k * kBlock);
            Vec dbias = Vec::load(sum + width * kBlock);
            for (int64_t t = 0; t < length; ++t) dbias = dbias + Vec::load(dsum + t * kBlock + c);
            dbias.store(sum + width * kBlock);
          }
          // The input at t is met by the last tap at t - ahead and by the first at t + back.
          const float* before = dsum - args.ahead * kBlock;
          const float* last_tap = taps + (width - 1) * kBlock;
          T* to = dx + start * args.channels;
          convolve(before, last_tap, -kBlock, width, nullptr, length, count,
                   [&](int64_t t, int64_t c, Vec sum) { write(sum, c, to + t * args.channels); });
          if (dstate != nullptr) {
            convolve(before - (width - 1) * kBlock, last_tap, -kBlock, width, nullptr, width - 1,
                     count, [&](int64_t t, int64_t c, Vec sum) {
                       write(sum, c, dstate + t * args.channels);
                     });
          }
        },
        [&](int64_t t) { std::memset(dx + t * args.channels, 0, sizeof(T) * count); });
  }
};

bool sensible(const Args& a) {
  return a.batch >= 0 && a.length >= 0 && a.channels >= 0 && a.width >= 1 && a.ahead >= 0 &&
         a.ahead < a.width && a.groups >= 1 && (a.state == nullptr || a.ahead == 0);
}

// Calls body(block, b) for all rows of a task's group, a task for every block of channels and group,
// and end(block, group) after them.
template <class F, class E>
int for_all_rows(const Args& a, const F& body, const E& end) {
  if (!sensible(a)) return RECSYS_BAD_ARGUMENTS;
  const int64_t blocks = ceil_div(a.channels, kBlock), rows = ceil_div(a.batch, a.groups);
  RecsysStatus status = RECSYS_OK;
  parallel_for(a.threads, a.groups * blocks, [&](int64_t task) {
    auto* memory = static_cast<float*>(recsys_scratch(sizeof(float) * Block::scratch(a)));
    if (memory == nullptr) {
      status = RECSYS_NO_MEMORY;
      return;
    }
    Block block(a, task % blocks, memory);
    const int64_t group = task / blocks;
    for (int64_t b = group * rows; b < min64(a.batch, (group + 1) * rows); ++b) body(block, b);
    end(block, group);
  });
  return status;
}

}  // namespace

RECSYS_KERNEL(recsys_causal_conv1d_forward)(const CausalConv1dArgs* args) {
  return for_all_rows(
      *args,
      [&](Block& block, int64_t b) {
        args->bf16 ? block.forward<uint16_t>(b) : block.forward<float>(b);
      },
      [](Block&, int64_t) {});
}

RECSYS_KERNEL(recsys_causal_conv1d_backward)(const CausalConv1dArgs* args) {
  return for_all_rows(
      *args,
      [&](Block& block, int64_t b) {
        args->bf16 ? block.backward<uint16_t>(b) : block.backward<float>(b);
      },
      [&](Block& block, int64_t group) {
        float* to = args->dweight + group * (args->width + 1) * args->channels + block.first;
        for (int64_t k = 0; k <= args->width; ++k)
          write_row(block.sums + k * kBlock, block.count, to + k * args->channels);
      });
}
