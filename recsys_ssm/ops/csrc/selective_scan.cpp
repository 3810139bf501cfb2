// Selective scan, forward and backward. The formula and the meaning of the arguments stand in
// selective_scan.py; this file says how it is made fast.
//
// The cost is the exponential, one for each (step, channel, state) in either direction, so nothing
// else may get in its way:
//  * Channels lie along the vectors. What a step needs of B and C is then one scalar for a whole
//    vector, and y sums over states without leaving its lane.
//  * A row's steps are cut into chunks of at most kChunk, its channels into blocks of kBlock. All that
//    a block needs of a chunk is copied to buffers in L1 first (converted, with softplus and gate
//    applied): rows of a tensor lie a power of two apart more often than not, and would compete for
//    the same few cache lines.
//  * Within a block a tile of one vector of channels by N states walks over the whole chunk with its
//    states in registers.
//  * Forward keeps the state at the start of each chunk ("checkpoint"), no other. Backward takes the
//    chunks in reverse: a tile computes its decays and states of the chunk again, into L1, and walks
//    back over them.
//  * dB and dC sum over channels, that is over lanes. A tile folds its states' vectors of a step into
//    one, which is what a later tile of the same states adds to; its lanes are summed when all blocks
//    of a chunk are done. Unfolded, these sums would not fit L1, and be half of all stores.
//  * Sequences packed into a row, and padding: positions that hold padding are left out of the chunks
//    altogether; where a sequence starts the state is set to 0.
//
// Work is cut by batch row and, when rows are few, by groups of blocks. Sums over tasks are made in a
// fixed order afterwards: the same bits on every run with the same number of threads.
//
// Legend: b row, t step, e channel, n state.

#include <cstdlib>

#include "simd.h"

namespace {

constexpr int64_t kChunk = 32;
constexpr int64_t kBlock = 64;
constexpr float kLn2 = 0.693147181f;
constexpr int64_t kLane = Vec::size;
// Longest row whose decays are taken from the parabola of Vec::exp2. Its bias adds up along a row;
// docs/kernels.md has the errors. Longer rows take the cubic, which is slower.
constexpr int64_t kParabola = 256;

struct Strided {  // (batch, length, width), the last stride 1; strides count elements
  void* data;
  int64_t batch, time, bf16;
};

struct Arguments {
  int64_t size;  // sizeof(Arguments): tells a library and a caller of different versions apart
  int64_t threads, batch, length, channels, states, softplus;
  Strided u, dt, z, B, C;                            // z may be null
  const float *A, *D, *dt_bias, *initial_state;      // (E, N), (E), (E), (B, E, N); all but A or null
  const int64_t* seq_idx;                            // (B, L) or null
  Strided y, ungated;                                // ungated: y before the gate; or null
  float *final_state, *checkpoints;                  // (B, E, N), checkpoint layout; or null
  Strided dy, du, ddt, dz, dB, dC;                   // backward only; dz or null
  const float* dfinal_state;                         // (B, E, N) or null
  float *dA, *dD, *ddt_bias, *dinitial_state;        // as the arguments; all but dA or null
};

// 64-byte aligned pieces of one allocation, some lines apart: most sizes are multiples of 4 KiB, and
// a load that agrees with an earlier store in its last 12 bits waits for it in vain.
struct Arena {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* piece = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64) + 320);
    return piece;
  }
};

// ---- rows of tensors to and from float buffers ---------------------------------------------------

RECSYS_INLINE int64_t offset_of(const Strided& x, int64_t b, int64_t t) {
  return b * x.batch + t * x.time;
}

// `count` values from position `at` on; the buffer is filled up to `padded` with zeros.
RECSYS_INLINE void load_row(const Strided& x, int64_t at, int64_t count, int64_t padded, float* out) {
  int64_t i = 0;
  if (x.bf16) {
    const uint16_t* p = static_cast<const uint16_t*>(x.data) + at;
    for (; i + kLane <= count; i += kLane) Vec::load_bf16(p + i).store(out + i);
    for (; i < count; ++i) out[i] = bf16_to_float(p[i]);
  } else {
    const float* p = static_cast<const float*>(x.data) + at;
    for (; i + kLane <= count; i += kLane) Vec::load(p + i).store(out + i);
    for (; i < count; ++i) out[i] = p[i];
  }
  for (; i < padded; ++i) out[i] = 0;
}

RECSYS_INLINE void store_row(const Strided& x, int64_t at, int64_t count, const float* in) {
  int64_t i = 0;
  if (x.bf16) {
    uint16_t* p = static_cast<uint16_t*>(x.data) + at;
    for (; i + kLane <= count; i += kLane) Vec::load(in + i).store_bf16(p + i);
    for (; i < count; ++i) p[i] = float_to_bf16(in[i]);
  } else {
    float* p = static_cast<float*>(x.data) + at;
    for (; i + kLane <= count; i += kLane) Vec::load(in + i).store(p + i);
    for (; i < count; ++i) p[i] = in[i];
  }
}

// One vector of a row, of whose values `left` remain from position `at` on; zeros beyond them.
// Plain: all tensors are float32 and all vectors whole, which saves two branches a vector.
template <bool Plain>
RECSYS_INLINE Vec load_vec(const Strided& x, int64_t at, int64_t left) {
  if (Plain) return Vec::load(static_cast<const float*>(x.data) + at);
  if (left < kLane) {
    float part[kLane];
    load_row(x, at, left, kLane, part);
    return Vec::load(part);
  }
  return x.bf16 ? Vec::load_bf16(static_cast<const uint16_t*>(x.data) + at)
                : Vec::load(static_cast<const float*>(x.data) + at);
}

template <bool Plain>
RECSYS_INLINE void store_vec(const Strided& x, int64_t at, int64_t left, Vec v) {
  if (Plain) {
    v.store(static_cast<float*>(x.data) + at);
  } else if (left < kLane) {
    float part[kLane];
    v.store(part);
    store_row(x, at, left, part);
  } else if (x.bf16) {
    v.store_bf16(static_cast<uint16_t*>(x.data) + at);
  } else {
    v.store(static_cast<float*>(x.data) + at);
  }
}

bool plain(const Arguments& a, int64_t channels) {
  return channels % kLane == 0 && !(a.u.bf16 || a.dt.bf16 || a.z.bf16 || a.y.bf16 || a.ungated.bf16 ||
                                    a.dy.bf16 || a.du.bf16 || a.ddt.bf16 || a.dz.bf16);
}

void clear_row(const Strided& x, int64_t at, int64_t count) {
  const size_t bytes = x.bf16 ? 2 : 4;
  std::memset(static_cast<char*>(x.data) + static_cast<size_t>(at) * bytes, 0,
              static_cast<size_t>(count) * bytes);
}

// (channels, states) in the tensor <-> (states, kBlock) in a block's buffer, zeros beyond the channels.
void to_block(const float* from, int64_t channels, int64_t states, float scale, float* to) {
  for (int64_t n = 0; n < states; ++n) {
    for (int64_t e = 0; e < channels; ++e) to[n * kBlock + e] = scale * from[e * states + n];
    for (int64_t e = channels; e < kBlock; ++e) to[n * kBlock + e] = 0;
  }
}
void from_block(const float* from, int64_t channels, int64_t states, float* to) {
  for (int64_t e = 0; e < channels; ++e)
    for (int64_t n = 0; n < states; ++n) to[e * states + n] = from[n * kBlock + e];
}

// ---- the steps of a row --------------------------------------------------------------------------

struct Row {
  int64_t b, steps, chunks, chunk;  // steps that are not padding, and how they are cut
  const int64_t* position;          // of each step in the row; null: step t stands at t
  const uint8_t* starts;            // 1 where a sequence starts (not the first); null: nowhere

  int64_t at(int64_t t) const { return position == nullptr ? t : position[t]; }
};

Row row_of(const Arguments& a, int64_t b, int64_t* position, uint8_t* starts) {
  Row row{b, a.length, 0, 0, nullptr, nullptr};
  if (a.seq_idx != nullptr) {
    const int64_t* seq = a.seq_idx + b * a.length;
    int64_t steps = 0;
    bool packed = false;
    for (int64_t t = 0; t < a.length; ++t) {
      if (seq[t] < 0) continue;
      starts[steps] = steps > 0 && seq[t] != seq[t - 1];  // after padding too
      packed |= starts[steps] != 0;
      position[steps++] = t;
    }
    row.steps = steps;
    row.position = position;
    row.starts = packed ? starts : nullptr;
  }
  // Chunks of equal length rather than full ones and a rest.
  row.chunks = ceil_div(row.steps, kChunk);
  row.chunk = row.chunks == 0 ? 0 : ceil_div(row.steps, row.chunks);
  if (row.chunk > 0) row.chunks = ceil_div(row.steps, row.chunk);
  return row;
}

void clear_padding(const Arguments& a, const Row& row, const Strided& x, int64_t first, int64_t count) {
  if (row.position == nullptr || x.data == nullptr) return;
  int64_t step = 0;
  for (int64_t t = 0; t < a.length; ++t) {
    if (step < row.steps && row.position[step] == t) {
      ++step;
    } else {
      clear_row(x, offset_of(x, row.b, t) + first, count);
    }
  }
}

// Fetches a block of channels of the tensors' next chunk while tiles walk over this one: its rows lie
// too far apart for the processor to see the pattern, and waiting for them costs as much as a third
// of the scan. Each tile takes its share of a row's cache lines, and a row at each of its steps:
// many lines at once would have to wait for each other.
struct Prefetch {
  struct Line {
    const char* at;  // at position 0
    int64_t stride;
  };
  static constexpr int64_t kTensors = 9, kLines = kTensors * kBlock * 4 / 64;
  Line lines[kLines];
  int64_t count, tiles, first, steps;  // lines, tiles that share them; the chunk's steps
  const int64_t* position;             // as in Row
  const float* state;                  // the checkpoint the chunk starts from, or null

  RECSYS_INLINE void step(int64_t t, int64_t tile) const {
    if (t >= steps) return;
    const int64_t at = position == nullptr ? first + t : position[first + t];
    for (int64_t i = tile; i < count; i += tiles) prefetch(lines[i].at + at * lines[i].stride, 64);
  }
};

Prefetch prefetch_chunk(const Arguments& a, const Row& row, int64_t c, int64_t e, int64_t channels,
                        int64_t tiles) {
  Prefetch ahead;
  ahead.count = ahead.steps = ahead.first = 0;
  ahead.tiles = tiles;
  ahead.position = row.position;
  ahead.state = nullptr;
  int64_t b = row.b;
  if (c < 0 || c >= row.chunks) {  // goes on in the next row, whose padding is not known yet
    if (row.position != nullptr || b + 1 >= a.batch) return ahead;
    b += 1;
    c = c < 0 ? row.chunks - 1 : 0;
  }
  ahead.first = c * row.chunk;
  ahead.steps = min64(row.chunk, row.steps - ahead.first);
  const Strided* const tensors[Prefetch::kTensors] = {&a.u,  &a.dt, &a.z,   &a.ungated, &a.y,
                                                      &a.dy, &a.du, &a.ddt, &a.dz};
  for (const Strided* x : tensors) {
    if (x->data == nullptr) continue;
    const int64_t size = x->bf16 ? 2 : 4;
    const char* from = static_cast<const char*>(x->data) + (b * x->batch + e) * size;
    for (int64_t i = 0; i < channels * size; i += 64) ahead.lines[ahead.count++] = {from + i, x->time * size};
  }
  return ahead;
}

// B or C of a chunk, (chunk, states).
void load_chunk(const Row& row, const Strided& x, int64_t t0, int64_t steps, int64_t states, float* out) {
  for (int64_t t = 0; t < steps; ++t)
    load_row(x, offset_of(x, row.b, row.at(t0 + t)), states, states, out + t * states);
}

// ---- how the work is cut -------------------------------------------------------------------------

struct Plan {
  int64_t blocks, groups, ranges, block_state;  // block_state: floats of a block's state

  explicit Plan(const Arguments& a) {
    blocks = ceil_div(a.channels, kBlock);
    block_state = a.states * kBlock;
    groups = 1;
    ranges = 1;
    if (a.threads > 1) {
      // Several tasks a thread, so that one that is held up does not hold up all.
      groups = max64(1, min64(blocks, ceil_div(2 * a.threads, max64(a.batch, 1))));
      ranges = max64(1, min64(a.batch, 8 * a.threads));
    }
  }
  int64_t first_block(int64_t group) const { return group * blocks / groups; }
  int64_t first_row(int64_t range, int64_t batch) const { return range * batch / ranges; }
};

int64_t checkpoints_a_row(int64_t length) { return max64(0, ceil_div(length, kChunk) - 1); }

// What stays the same for all rows of a call.
struct Shared {
  Plan plan;
  float* A;     // (blocks, N, kBlock), times log2(e): decays are powers of two
  float* D;     // (blocks, kBlock), zeros for none
  float* bias;  // (blocks, kBlock), zeros for none

  Shared(const Arguments& a, Arena* arena) : plan(a) {
    A = arena->take<float>(plan.blocks * plan.block_state);
    D = arena->take<float>(plan.blocks * kBlock);
    bias = arena->take<float>(plan.blocks * kBlock);
    if (A == nullptr) return;
    for (int64_t k = 0; k < plan.blocks; ++k) {
      const int64_t e = k * kBlock, channels = min64(kBlock, a.channels - e);
      to_block(a.A + e * a.states, channels, a.states, kLog2e, A + k * plan.block_state);
      for (int64_t i = 0; i < kBlock; ++i) {
        D[e + i] = a.D != nullptr && i < channels ? a.D[e + i] : 0;
        bias[e + i] = a.dt_bias != nullptr && i < channels ? a.dt_bias[e + i] : 0;
      }
    }
  }
};

template <class Block>
Block choose(const Row& row, bool cubic, Block one, Block packed, Block one_cubic, Block packed_cubic) {
  if (cubic) return row.starts == nullptr ? one_cubic : packed_cubic;
  return row.starts == nullptr ? one : packed;
}

// ---- forward -------------------------------------------------------------------------------------

struct ForwardChunk {  // of one block, (chunk, kBlock) each
  const float *dt, *dtu;
  float* y;                    // starts as D u
  const float *B, *C;          // (chunk, N)
  const uint8_t* starts;       // or null
  int64_t steps, states;
};

// One vector of channels from `e` on, N states from `n0` on. Packed: `starts` is given. Cubic: as exp2.
// (Known when compiled, because a compiler moves work behind the branch and runs out of registers.)
template <int N, bool Packed, bool Cubic>
RECSYS_INLINE void forward_tile(ForwardChunk c, const float* A, const float* h_in, float* h_out, int64_t e,
                                int64_t n0, const Prefetch& ahead, int64_t tile) {
  Vec h[N], rate[N];
  for (int n = 0; n < N; ++n) {
    h[n] = Vec::load(h_in + (n0 + n) * kBlock + e);
    rate[n] = Vec::load(A + (n0 + n) * kBlock + e);
  }
  for (int64_t t = 0; t < c.steps; ++t) {
    ahead.step(t, tile);
    if (Packed && c.starts[t])
      for (int n = 0; n < N; ++n) h[n] = Vec::zero();
    const float *B = c.B + t * c.states + n0, *C = c.C + t * c.states + n0;
    const int64_t i = t * kBlock + e;
    const Vec dt = Vec::load(c.dt + i), dtu = Vec::load(c.dtu + i);
    Vec y = Vec::load(c.y + i), decay[N];
    for (int n = 0; n < N; ++n) decay[n] = dt * rate[n];
    exp2<Cubic>(decay);
    for (int n = 0; n < N; ++n) {
      h[n] = Vec::fma(decay[n], h[n], dtu * Vec::all(B[n]));
      y = Vec::fma(h[n], Vec::all(C[n]), y);
    }
    y.store(c.y + i);
  }
  for (int n = 0; n < N; ++n) h[n].store(h_out + (n0 + n) * kBlock + e);
}

// States a tile: as many as keep their own in registers, of which AVX2 has sixteen, and backward as
// many as fold into one vector.
#if defined(RECSYS_ISA_AVX512)
constexpr int kForwardN = 4, kBackwardN = 4;
#else
constexpr int kForwardN = 4, kBackwardN = 2;
#endif

// Of n states each; those left over are tiles of one.
RECSYS_INLINE int64_t tiles_of(int64_t states, int64_t n) { return states / n + states % n; }

template <bool Packed, bool Cubic>
void forward_block(const ForwardChunk& c, const float* A, const float* h_in, float* h_out,
                   int64_t channels, const Prefetch& ahead) {
  int64_t tile = 0;
  for (int64_t e = 0; e < channels; e += kLane) {
    int64_t n = 0;
    for (; n + kForwardN <= c.states; n += kForwardN)
      forward_tile<kForwardN, Packed, Cubic>(c, A, h_in, h_out, e, n, ahead, tile++);
    for (; n < c.states; ++n) forward_tile<1, Packed, Cubic>(c, A, h_in, h_out, e, n, ahead, tile++);
  }
}

struct ForwardBuffers {
  float *dt, *dtu, *y, *B, *C, *states;  // states: (2, blocks of a group, N, kBlock)
  int64_t* position;
  uint8_t* starts;

  ForwardBuffers(const Arguments& a, const Plan& plan, Arena* arena) {
    dt = arena->take<float>(kChunk * kBlock);
    dtu = arena->take<float>(kChunk * kBlock);
    y = arena->take<float>(kChunk * kBlock);
    B = arena->take<float>(kChunk * a.states);
    C = arena->take<float>(kChunk * a.states);
    states = arena->take<float>(ceil_div(plan.blocks, plan.groups) * plan.block_state);
    position = arena->take<int64_t>(a.seq_idx != nullptr ? a.length : 0);
    starts = arena->take<uint8_t>(a.seq_idx != nullptr ? a.length : 0);
  }
};

// Fills a block's buffers from the tensors.
template <bool Plain>
void forward_in(const Arguments& a, const Shared& s, const ForwardBuffers& f, const Row& row, int64_t t0,
                int64_t steps, int64_t e, int64_t channels) {
  const int64_t b = row.b;
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t at = row.at(t0 + t), i0 = t * kBlock;
    const int64_t u_at = offset_of(a.u, b, at) + e, dt_at = offset_of(a.dt, b, at) + e;
    for (int64_t i = 0; i < channels; i += kLane) {
      const Vec u = load_vec<Plain>(a.u, u_at + i, channels - i);
      Vec step = load_vec<Plain>(a.dt, dt_at + i, channels - i) + Vec::load(s.bias + e + i), slope;
      if (a.softplus) step = softplus(step, &slope);
      step.store(f.dt + i0 + i);
      (step * u).store(f.dtu + i0 + i);
      (u * Vec::load(s.D + e + i)).store(f.y + i0 + i);
    }
  }
}

// Applies the gate and writes a block's outputs to the tensors.
template <bool Plain>
void forward_out(const Arguments& a, const ForwardBuffers& f, const Row& row, int64_t t0, int64_t steps,
                 int64_t e, int64_t channels) {
  const int64_t b = row.b;
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t at = row.at(t0 + t);
    const int64_t y_at = offset_of(a.y, b, at) + e, z_at = offset_of(a.z, b, at) + e;
    const int64_t ungated_at = offset_of(a.ungated, b, at) + e;
    for (int64_t i = 0; i < channels; i += kLane) {
      Vec y = Vec::load(f.y + t * kBlock + i);
      if (a.z.data != nullptr) {
        if (a.ungated.data != nullptr) store_vec<Plain>(a.ungated, ungated_at + i, channels - i, y);
        const Vec z = load_vec<Plain>(a.z, z_at + i, channels - i);
        y = y * z * sigmoid(z);
      }
      store_vec<Plain>(a.y, y_at + i, channels - i, y);
    }
  }
}

void forward_row(const Arguments& a, const Shared& s, const ForwardBuffers& f, int64_t b, int64_t group) {
  const Plan& plan = s.plan;
  const int64_t k0 = plan.first_block(group), k1 = plan.first_block(group + 1);
  const int64_t state_size = a.channels * a.states;
  const Row row = row_of(a, b, f.position, f.starts);
  const bool cubic = a.length > kParabola;

  for (int64_t k = k0; k < k1; ++k) {
    const int64_t e = k * kBlock, channels = min64(kBlock, a.channels - e);
    float* state = f.states + (k - k0) * plan.block_state;
    if (a.initial_state != nullptr) {
      to_block(a.initial_state + b * state_size + e * a.states, channels, a.states, 1, state);
    } else {
      std::memset(state, 0, sizeof(float) * static_cast<size_t>(plan.block_state));
    }
  }
  for (int64_t c = 0; c < row.chunks; ++c) {
    const int64_t t0 = c * row.chunk, steps = min64(row.chunk, row.steps - t0);
    load_chunk(row, a.B, t0, steps, a.states, f.B);
    load_chunk(row, a.C, t0, steps, a.states, f.C);
    for (int64_t k = k0; k < k1; ++k) {
      const int64_t e = k * kBlock, channels = min64(kBlock, a.channels - e);
      const bool fast = plain(a, channels);
      const auto in = fast ? &forward_in<true> : &forward_in<false>;
      const auto out = fast ? &forward_out<true> : &forward_out<false>;
      in(a, s, f, row, t0, steps, e, channels);
      const ForwardChunk chunk{f.dt, f.dtu, f.y, f.B, f.C,
                               row.starts == nullptr ? nullptr : row.starts + t0, steps, a.states};
      // The state goes from checkpoint to checkpoint, each being one chunk's result.
      float* state = f.states + (k - k0) * plan.block_state;
      float *from = state, *to = state;
      if (a.checkpoints != nullptr) {
        const int64_t row_size = plan.blocks * plan.block_state;
        float* kept = a.checkpoints + b * checkpoints_a_row(a.length) * row_size + k * plan.block_state;
        if (c > 0) from = kept + (c - 1) * row_size;
        if (c + 1 < row.chunks) to = kept + c * row_size;
      }
      const int64_t tiles = ceil_div(channels, kLane) * tiles_of(a.states, kForwardN);
      const Prefetch ahead = prefetch_chunk(a, row, c + 1, e, channels, tiles);
      const auto scan = choose(row, cubic, &forward_block<false, false>, &forward_block<true, false>,
                               &forward_block<false, kHasCubic>, &forward_block<true, kHasCubic>);
      scan(chunk, s.A + k * plan.block_state, from, to, channels, ahead);
      out(a, f, row, t0, steps, e, channels);
    }
  }
  const int64_t first = k0 * kBlock, count = min64(k1 * kBlock, a.channels) - first;
  clear_padding(a, row, a.y, first, count);
  if (a.final_state != nullptr)
    for (int64_t k = k0; k < k1; ++k) {
      const int64_t e = k * kBlock;
      from_block(f.states + (k - k0) * plan.block_state, min64(kBlock, a.channels - e), a.states,
                 a.final_state + b * state_size + e * a.states);
    }
}

// ---- backward ------------------------------------------------------------------------------------

struct BackwardChunk {  // of one block, (chunk, kBlock) each
  const float *dt, *dtu, *dy;
  float *ddtu, *rate;          // out: gradient of dt u by way of B; sum over n of g A, see below
  const float *B, *C;          // (chunk, N)
  float* folded;               // (chunk, tiles over N, kLane): dB and dC, summed into unless `first`
  const uint8_t* starts;       // or null
  int64_t steps, states;
  bool first;                  // the chunk's first tile of its states
};

// The vectors of N states in one: sums of dB's lanes in the lower half, state n's in the lanes i = n
// mod N, sums of dC's in the upper.
template <int N>
RECSYS_INLINE Vec fold_states(const Vec (&dB)[N], const Vec (&dC)[N]) {
  static_assert(N == 1 || N == 2 || N == 4, "");
  constexpr int half = kLane / 2;
  if constexpr (N == 1) {
    return Vec::fold<half>(dB[0], dC[0]);
  } else if constexpr (N == 2) {
    return Vec::fold<half>(Vec::fold<1>(dB[0], dB[1]), Vec::fold<1>(dC[0], dC[1]));
  } else {
    return Vec::fold<half>(Vec::fold<2>(Vec::fold<1>(dB[0], dB[1]), Vec::fold<1>(dB[2], dB[3])),
                           Vec::fold<2>(Vec::fold<1>(dC[0], dC[1]), Vec::fold<1>(dC[2], dC[3])));
  }
}
template <int N>
RECSYS_INLINE void unfold_states(const float* folded, float* dB, float* dC) {
  for (int n = 0; n < N; ++n) {
    float b = 0, c = 0;
    for (int i = n; i < kLane / 2; i += N) {
      b += folded[i];
      c += folded[kLane / 2 + i];
    }
    dB[n] = b;
    dC[n] = c;
  }
}

// With x = decay h_before the step is h = x + dt u B, and with g = dh x (the gradient of dt A)
//   dB = dh dt u,  dC = dy h,  d(dt u) = dh B,  d(dt) = g A,  dA = g dt,  dh_before = dh decay + dy C.
// dC is left as dy x; the rest of it, B dy dt u, is the same for all states and added at the end.
template <int N, bool Packed, bool Cubic>
RECSYS_INLINE void backward_tile(BackwardChunk c, const float* A, const float* h_in, float* dh_inout,
                                 float* dA, float* kept, int64_t e, int64_t n0, const Prefetch& ahead,
                                 int64_t tile) {
  Vec h[N], rate[N];
  for (int n = 0; n < N; ++n) {
    h[n] = Vec::load(h_in + (n0 + n) * kBlock + e);
    rate[n] = Vec::load(A + (n0 + n) * kBlock + e);
  }
  if (ahead.state != nullptr)
    for (int n = 0; n < N; ++n) prefetch(ahead.state + (n0 + n) * kBlock + e, sizeof(Vec));
  float* keep = kept;
  for (int64_t t = 0; t < c.steps; ++t) {
    ahead.step(t, tile);
    if (Packed && c.starts[t])
      for (int n = 0; n < N; ++n) h[n] = Vec::zero();
    const float* B = c.B + t * c.states + n0;
    const Vec dt = Vec::load(c.dt + t * kBlock + e), dtu = Vec::load(c.dtu + t * kBlock + e);
    Vec decay[N];
    for (int n = 0; n < N; ++n) decay[n] = dt * rate[n];
    exp2<Cubic>(decay);
    for (int n = 0; n < N; ++n, keep += 2 * kLane) {
      const Vec x = decay[n] * h[n];
      decay[n].store(keep);
      x.store(keep + kLane);
      h[n] = Vec::fma(dtu, Vec::all(B[n]), x);
    }
  }

  const int64_t tiles = tiles_of(c.states, kBackwardN);
  Vec dh[N], sum_dA[N];
  for (int n = 0; n < N; ++n) {
    dh[n] = Vec::load(dh_inout + (n0 + n) * kBlock + e);
    sum_dA[n] = Vec::load(dA + (n0 + n) * kBlock + e);
  }
  for (int64_t t = c.steps; t-- > 0;) {
    keep -= 2 * kLane * N;
    const float *B = c.B + t * c.states + n0, *C = c.C + t * c.states + n0;
    float* folded = c.folded + (t * tiles + tile % tiles) * kLane;
    const int64_t i = t * kBlock + e;
    const Vec dt = Vec::load(c.dt + i), dtu = Vec::load(c.dtu + i), dy = Vec::load(c.dy + i);
    Vec ddtu = n0 == 0 ? Vec::zero() : Vec::load(c.ddtu + i);
    Vec sum_rate = n0 == 0 ? Vec::zero() : Vec::load(c.rate + i);
    Vec dB[N], dC[N];
    for (int n = 0; n < N; ++n) {
      const Vec decay = Vec::load(keep + n * 2 * kLane), x = Vec::load(keep + n * 2 * kLane + kLane);
      const Vec d = Vec::fma(dy, Vec::all(C[n]), dh[n]);
      dB[n] = d * dtu;
      dC[n] = dy * x;
      ddtu = Vec::fma(d, Vec::all(B[n]), ddtu);
      const Vec g = d * x;
      sum_rate = Vec::fma(g, rate[n], sum_rate);
      sum_dA[n] = Vec::fma(g, dt, sum_dA[n]);
      dh[n] = d * decay;
    }
    ddtu.store(c.ddtu + i);
    sum_rate.store(c.rate + i);
    const Vec sums = fold_states<N>(dB, dC);
    (c.first ? sums : sums + Vec::load(folded)).store(folded);
    if (Packed && c.starts[t])
      for (int n = 0; n < N; ++n) dh[n] = Vec::zero();
  }
  for (int n = 0; n < N; ++n) {
    dh[n].store(dh_inout + (n0 + n) * kBlock + e);
    sum_dA[n].store(dA + (n0 + n) * kBlock + e);
  }
}

template <bool Packed, bool Cubic>
void backward_block(BackwardChunk c, const float* A, const float* h_in, float* dh, float* dA,
                    float* kept, int64_t channels, const Prefetch& ahead) {
  int64_t tile = 0;
  for (int64_t e = 0; e < channels; e += kLane) {
    int64_t n = 0;
    for (; n + kBackwardN <= c.states; n += kBackwardN)
      backward_tile<kBackwardN, Packed, Cubic>(c, A, h_in, dh, dA, kept, e, n, ahead, tile++);
    for (; n < c.states; ++n) backward_tile<1, Packed, Cubic>(c, A, h_in, dh, dA, kept, e, n, ahead, tile++);
    c.first = false;
  }
}

struct BackwardBuffers {
  float *dt, *slope, *u, *dtu, *dy, *ddtu, *rate;  // slope: softplus's derivative
  float *B, *C, *dB, *dC, *folded, *lanes_dydtu, *kept, *initial, *dh;
  int64_t* position;
  uint8_t* starts;

  BackwardBuffers(const Arguments& a, const Plan& plan, Arena* arena) {
    float** const of_block[] = {&dt, &slope, &u, &dtu, &dy, &ddtu, &rate};
    for (float** buffer : of_block) *buffer = arena->take<float>(kChunk * kBlock);
    float** const of_states[] = {&B, &C, &dB, &dC};
    for (float** buffer : of_states) *buffer = arena->take<float>(kChunk * a.states);
    folded = arena->take<float>(kChunk * tiles_of(a.states, kBackwardN) * kLane);
    lanes_dydtu = arena->take<float>(kChunk * kLane);
    kept = arena->take<float>(kChunk * kBackwardN * 2 * kLane);
    initial = arena->take<float>(plan.block_state);
    dh = arena->take<float>(ceil_div(plan.blocks, plan.groups) * plan.block_state);
    position = arena->take<int64_t>(a.seq_idx != nullptr ? a.length : 0);
    starts = arena->take<uint8_t>(a.seq_idx != nullptr ? a.length : 0);
  }
};

// Sums over rows, of one range of rows; blocks as in Shared.
struct Sums {
  float *dA, *dD, *ddt_bias;
  Sums(const Plan& plan, Arena* arena) {
    dA = arena->take<float>(plan.blocks * plan.block_state);
    dD = arena->take<float>(plan.blocks * kBlock);
    ddt_bias = arena->take<float>(plan.blocks * kBlock);
  }
};

// Fills a block's buffers from the tensors, and takes the gradient through gate and skip.
template <bool Plain>
void backward_in(const Arguments& a, const Shared& s, const BackwardBuffers& f, const Sums& sums,
                 const Row& row, int64_t t0, int64_t steps, int64_t e, int64_t channels) {
  const int64_t b = row.b;
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t at = row.at(t0 + t), i0 = t * kBlock;
    const int64_t u_at = offset_of(a.u, b, at) + e, dt_at = offset_of(a.dt, b, at) + e;
    const int64_t dy_at = offset_of(a.dy, b, at) + e, z_at = offset_of(a.z, b, at) + e;
    const int64_t dz_at = offset_of(a.dz, b, at) + e;
    const int64_t ungated_at = offset_of(a.ungated, b, at) + e;
    Vec dydtu = Vec::load(f.lanes_dydtu + t * kLane);
    for (int64_t i = 0; i < channels; i += kLane) {
      const int64_t left = channels - i;
      const Vec u = load_vec<Plain>(a.u, u_at + i, left);
      Vec dy = a.dy.data == nullptr ? Vec::zero() : load_vec<Plain>(a.dy, dy_at + i, left);
      if (a.z.data != nullptr) {
        const Vec z = load_vec<Plain>(a.z, z_at + i, left), sig = sigmoid(z), silu = z * sig;
        const Vec ungated = load_vec<Plain>(a.ungated, ungated_at + i, left);
        store_vec<Plain>(a.dz, dz_at + i, left, dy * ungated * (sig + silu - silu * sig));
        dy = dy * silu;
      }
      Vec step = load_vec<Plain>(a.dt, dt_at + i, left) + Vec::load(s.bias + e + i);
      if (a.softplus) {
        Vec slope;
        step = softplus(step, &slope);
        slope.store(f.slope + i0 + i);
      }
      const Vec dtu = step * u;
      step.store(f.dt + i0 + i);
      u.store(f.u + i0 + i);
      dtu.store(f.dtu + i0 + i);
      dy.store(f.dy + i0 + i);
      dydtu = Vec::fma(dy, dtu, dydtu);
      Vec::fma(dy, u, Vec::load(sums.dD + e + i)).store(sums.dD + e + i);
    }
    dydtu.store(f.lanes_dydtu + t * kLane);
  }
}

// Writes a block's gradients to the tensors.
template <bool Plain>
void backward_out(const Arguments& a, const Shared& s, const BackwardBuffers& f, const Sums& sums,
                  const Row& row, int64_t t0, int64_t steps, int64_t e, int64_t channels) {
  const int64_t b = row.b;
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t at = row.at(t0 + t), i0 = t * kBlock;
    const int64_t du_at = offset_of(a.du, b, at) + e, ddt_at = offset_of(a.ddt, b, at) + e;
    for (int64_t i = 0; i < channels; i += kLane) {
      const Vec ddtu = Vec::load(f.ddtu + i0 + i), u = Vec::load(f.u + i0 + i);
      const Vec du = Vec::fma(ddtu, Vec::load(f.dt + i0 + i),
                              Vec::load(f.dy + i0 + i) * Vec::load(s.D + e + i));
      const Vec rate = Vec::load(f.rate + i0 + i) * Vec::all(kLn2);  // A was in powers of two
      Vec ddt = Vec::fma(ddtu, u, rate);
      if (a.softplus) ddt = ddt * Vec::load(f.slope + i0 + i);
      store_vec<Plain>(a.du, du_at + i, channels - i, du);
      store_vec<Plain>(a.ddt, ddt_at + i, channels - i, ddt);
      (Vec::load(sums.ddt_bias + e + i) + ddt).store(sums.ddt_bias + e + i);
    }
  }
}

void backward_row(const Arguments& a, const Shared& s, const BackwardBuffers& f, const Sums& sums,
                  const Strided& dB, const Strided& dC, int64_t b, int64_t group) {
  const Plan& plan = s.plan;
  const int64_t k0 = plan.first_block(group), k1 = plan.first_block(group + 1);
  const int64_t state_size = a.channels * a.states, row_size = plan.blocks * plan.block_state;
  const Row row = row_of(a, b, f.position, f.starts);
  const bool cubic = a.length > kParabola;

  for (int64_t k = k0; k < k1; ++k) {
    const int64_t e = k * kBlock, channels = min64(kBlock, a.channels - e);
    float* dh = f.dh + (k - k0) * plan.block_state;
    if (a.dfinal_state != nullptr) {
      to_block(a.dfinal_state + b * state_size + e * a.states, channels, a.states, 1, dh);
    } else {
      std::memset(dh, 0, sizeof(float) * static_cast<size_t>(plan.block_state));
    }
  }
  for (int64_t c = row.chunks; c-- > 0;) {
    const int64_t t0 = c * row.chunk, steps = min64(row.chunk, row.steps - t0);
    load_chunk(row, a.B, t0, steps, a.states, f.B);
    load_chunk(row, a.C, t0, steps, a.states, f.C);
    std::memset(f.lanes_dydtu, 0, sizeof(float) * kChunk * kLane);
    for (int64_t k = k0; k < k1; ++k) {
      const int64_t e = k * kBlock, channels = min64(kBlock, a.channels - e);
      const bool fast = plain(a, channels);
      const auto in = fast ? &backward_in<true> : &backward_in<false>;
      const auto out = fast ? &backward_out<true> : &backward_out<false>;
      in(a, s, f, sums, row, t0, steps, e, channels);
      const float* from = f.initial;
      if (c > 0) {
        from = a.checkpoints + (b * checkpoints_a_row(a.length) + c - 1) * row_size + k * plan.block_state;
      } else if (a.initial_state != nullptr) {
        to_block(a.initial_state + b * state_size + e * a.states, channels, a.states, 1, f.initial);
      } else {
        std::memset(f.initial, 0, sizeof(float) * static_cast<size_t>(plan.block_state));
      }
      const BackwardChunk chunk{
          f.dt, f.dtu, f.dy, f.ddtu, f.rate, f.B, f.C, f.folded,
          row.starts == nullptr ? nullptr : row.starts + t0, steps, a.states, k == k0};
      const int64_t tiles = ceil_div(channels, kLane) * tiles_of(a.states, kBackwardN);
      Prefetch ahead = prefetch_chunk(a, row, c - 1, e, channels, tiles);
      if (c > 1) ahead.state = from - row_size;
      const auto scan = choose(row, cubic, &backward_block<false, false>, &backward_block<true, false>,
                               &backward_block<false, kHasCubic>, &backward_block<true, kHasCubic>);
      scan(chunk, s.A + k * plan.block_state, from, f.dh + (k - k0) * plan.block_state,
           sums.dA + k * plan.block_state, f.kept, channels, ahead);
      out(a, s, f, sums, row, t0, steps, e, channels);
    }
    const float* folded = f.folded;
    for (int64_t t = 0; t < steps; ++t) {
      float *dB_t = f.dB + t * a.states, *dC_t = f.dC + t * a.states;
      int64_t n = 0;
      for (; n + kBackwardN <= a.states; n += kBackwardN, folded += kLane)
        unfold_states<kBackwardN>(folded, dB_t + n, dC_t + n);
      for (; n < a.states; ++n, folded += kLane) unfold_states<1>(folded, dB_t + n, dC_t + n);
      const float dydtu = Vec::load(f.lanes_dydtu + t * kLane).sum();
      for (n = 0; n < a.states; ++n) dC_t[n] += f.B[t * a.states + n] * dydtu;
      const int64_t at = row.at(t0 + t);
      store_row(dB, offset_of(dB, b, at), a.states, dB_t);
      store_row(dC, offset_of(dC, b, at), a.states, dC_t);
    }
  }
  if (a.dinitial_state != nullptr)
    for (int64_t k = k0; k < k1; ++k) {
      const int64_t e = k * kBlock;
      from_block(f.dh + (k - k0) * plan.block_state, min64(kBlock, a.channels - e), a.states,
                 a.dinitial_state + b * state_size + e * a.states);
    }
  const int64_t first = k0 * kBlock, count = min64(k1 * kBlock, a.channels) - first;
  clear_padding(a, row, a.du, first, count);
  clear_padding(a, row, a.ddt, first, count);
  clear_padding(a, row, a.dz, first, count);
  clear_padding(a, row, dB, 0, a.states);
  clear_padding(a, row, dC, 0, a.states);
}

bool valid(const Arguments* a) {
  return a != nullptr && a->size == static_cast<int64_t>(sizeof(Arguments)) && a->batch >= 0 &&
         a->length >= 0 && a->channels >= 0 && a->states >= 0 && a->threads >= 1;
}

}  // namespace

RECSYS_KERNEL(recsys_selective_scan_forward)(const Arguments* arguments) {
  if (!valid(arguments)) return RECSYS_BAD_ARGUMENTS;
  const Arguments& a = *arguments;
  Arena measure{nullptr};
  const Plan plan = Shared(a, &measure).plan;
  void* memory = std::malloc(measure.used + 64);
  if (memory == nullptr) return RECSYS_NO_MEMORY;
  Arena arena{reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(memory), 64))};
  const Shared shared(a, &arena);

  Arena each{nullptr};
  ForwardBuffers(a, plan, &each);
  int failed = 0;  // tasks only ever set it
  parallel_for(a.threads, a.batch * plan.groups, [&](int64_t task) {
    Arena mine{static_cast<char*>(recsys_scratch(each.used))};
    if (mine.base == nullptr) {
      failed = 1;
      return;
    }
    const ForwardBuffers buffers(a, plan, &mine);
    forward_row(a, shared, buffers, task / plan.groups, task % plan.groups);
  });
  std::free(memory);
  return failed ? RECSYS_NO_MEMORY : RECSYS_OK;
}

RECSYS_KERNEL(recsys_selective_scan_backward)(const Arguments* arguments) {
  if (!valid(arguments)) return RECSYS_BAD_ARGUMENTS;
  const Arguments& a = *arguments;
  Arena one_range{nullptr};
  Sums(Plan(a), &one_range);
  const int64_t sums_size = round_up(static_cast<int64_t>(one_range.used), 64);
  // dB and dC sum over all channels: with several groups each writes its own, summed afterwards.
  const int64_t matrix = a.batch * a.length * a.states;
  char* all_sums = nullptr;
  float* partial = nullptr;
  const auto lay_out = [&](Arena* arena) {
    const Shared shared(a, arena);
    all_sums = arena->take<char>(shared.plan.ranges * sums_size);
    partial = arena->take<float>(shared.plan.groups > 1 ? 2 * shared.plan.groups * matrix : 0);
    return shared;
  };
  Arena measure{nullptr};
  lay_out(&measure);
  void* memory = std::malloc(measure.used + 64);
  if (memory == nullptr) return RECSYS_NO_MEMORY;
  Arena arena{reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(memory), 64))};
  const Shared shared = lay_out(&arena);
  const Plan& plan = shared.plan;
  std::memset(all_sums, 0, static_cast<size_t>(plan.ranges * sums_size));
  const auto sums_of = [&](int64_t range) {
    Arena at{all_sums + range * sums_size};
    return Sums(plan, &at);
  };
  const auto partial_of = [&](int64_t group, bool is_dC) {
    return Strided{partial + (2 * group + is_dC) * matrix, a.length * a.states, a.states, 0};
  };

  Arena each{nullptr};
  BackwardBuffers(a, plan, &each);
  int failed = 0;  // tasks only ever set it
  parallel_for(a.threads, plan.ranges * plan.groups, [&](int64_t task) {
    Arena mine{static_cast<char*>(recsys_scratch(each.used))};
    if (mine.base == nullptr) {
      failed = 1;
      return;
    }
    const BackwardBuffers buffers(a, plan, &mine);
    const int64_t range = task / plan.groups, group = task % plan.groups;
    const Strided dB = plan.groups > 1 ? partial_of(group, false) : a.dB;
    const Strided dC = plan.groups > 1 ? partial_of(group, true) : a.dC;
    const int64_t end = plan.first_row(range + 1, a.batch);
    for (int64_t b = plan.first_row(range, a.batch); b < end; ++b)
      backward_row(a, shared, buffers, sums_of(range), dB, dC, b, group);
  });

  if (!failed) {
    parallel_for(a.threads, plan.blocks, [&](int64_t k) {
      const int64_t e = k * kBlock, channels = min64(kBlock, a.channels - e);
      const Sums total = sums_of(0);
      for (int64_t r = 1; r < plan.ranges; ++r) {
        const Sums more = sums_of(r);
        for (int64_t i = k * plan.block_state; i < (k + 1) * plan.block_state; ++i) total.dA[i] += more.dA[i];
        for (int64_t i = e; i < e + kBlock; ++i) {
          total.dD[i] += more.dD[i];
          total.ddt_bias[i] += more.ddt_bias[i];
        }
      }
      from_block(total.dA + k * plan.block_state, channels, a.states, a.dA + e * a.states);
      const size_t bytes = sizeof(float) * static_cast<size_t>(channels);
      if (a.dD != nullptr) std::memcpy(a.dD + e, total.dD + e, bytes);
      if (a.ddt_bias != nullptr) std::memcpy(a.ddt_bias + e, total.ddt_bias + e, bytes);
    });
    if (plan.groups > 1) {
      parallel_for(a.threads, 2 * a.batch, [&](int64_t task) {
        const bool is_dC = task % 2;
        const int64_t b = task / 2;
        const Strided &out = is_dC ? a.dC : a.dB, total = partial_of(0, is_dC);
        for (int64_t t = 0; t < a.length; ++t) {
          float* sum = static_cast<float*>(total.data) + offset_of(total, b, t);
          for (int64_t g = 1; g < plan.groups; ++g) {
            const float* more = sum + 2 * g * matrix;
            for (int64_t n = 0; n < a.states; ++n) sum[n] += more[n];
          }
          store_row(out, offset_of(out, b, t), a.states, sum);
        }
      });
    }
  }
  std::free(memory);
  return failed ? RECSYS_NO_MEMORY : RECSYS_OK;
}
