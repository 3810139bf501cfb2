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
//  * Within a block a tile of V vectors of channels by N states walks over the whole chunk with its
//    states in registers.
//  * Forward keeps the state at the start of each chunk ("checkpoint"), no other. Backward takes the
//    chunks in reverse: a tile computes its decays and states of the chunk again, into L1, and walks
//    back over them.
//  * dB and dC sum over channels, that is over lanes. Each lane's part is kept apart until all blocks
//    of a chunk are done, then the lanes are summed once.
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

constexpr int64_t kChunk = 16;
constexpr int64_t kBlock = 64;
constexpr float kLn2 = 0.693147181f;
constexpr int64_t kLane = Vec::size;

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

// 64-byte aligned pieces of one allocation.
struct Arena {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* piece = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
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
    int64_t steps = 0, current = 0;
    bool packed = false;
    for (int64_t t = 0; t < a.length; ++t) {
      if (seq[t] < 0) continue;
      starts[steps] = steps > 0 && seq[t] != current;
      packed |= starts[steps] != 0;
      current = seq[t];
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
      groups = min64(blocks, max64(1, ceil_div(2 * a.threads, max64(a.batch, 1))));
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

// ---- forward -------------------------------------------------------------------------------------

struct ForwardChunk {  // of one block, (chunk, kBlock) each
  const float *dt, *dtu;
  float* y;                    // starts as D u
  const float *B, *C;          // (chunk, N)
  const uint8_t* starts;       // or null
  int64_t steps, states;
};

// V vectors of channels from `e` on, N states from `n0` on.
template <int V, int N>
RECSYS_INLINE void forward_tile(const ForwardChunk& c, const float* A, const float* h_in, float* h_out,
                                int64_t e, int64_t n0) {
  Vec h[N][V], decay_rate[N][V];
  for (int n = 0; n < N; ++n)
    for (int v = 0; v < V; ++v) {
      const int64_t i = (n0 + n) * kBlock + e + v * kLane;
      h[n][v] = Vec::load(h_in + i);
      decay_rate[n][v] = Vec::load(A + i);
    }
  for (int64_t t = 0; t < c.steps; ++t) {
    if (c.starts != nullptr && c.starts[t])
      for (int n = 0; n < N; ++n)
        for (int v = 0; v < V; ++v) h[n][v] = Vec::zero();
    const float *B = c.B + t * c.states + n0, *C = c.C + t * c.states + n0;
    for (int v = 0; v < V; ++v) {
      const int64_t i = t * kBlock + e + v * kLane;
      const Vec dt = Vec::load(c.dt + i), dtu = Vec::load(c.dtu + i);
      Vec y = Vec::load(c.y + i);
      for (int n = 0; n < N; ++n) {
        const Vec decay = (dt * decay_rate[n][v]).exp2();
        h[n][v] = Vec::fma(decay, h[n][v], dtu * Vec::all(B[n]));
        y = Vec::fma(h[n][v], Vec::all(C[n]), y);
      }
      y.store(c.y + i);
    }
  }
  for (int n = 0; n < N; ++n)
    for (int v = 0; v < V; ++v) h[n][v].store(h_out + (n0 + n) * kBlock + e + v * kLane);
}

#if defined(RECSYS_ISA_AVX512)
constexpr int kForwardV = 4, kForwardN = 2, kBackwardV = 4, kBackwardN = 2;
#else
constexpr int kForwardV = 2, kForwardN = 2, kBackwardV = 2, kBackwardN = 2;
#endif

void forward_block(const ForwardChunk& c, const float* A, const float* h_in, float* h_out,
                   int64_t channels) {
  int64_t e = 0;
  for (; e + (kForwardV - 1) * kLane < channels; e += kForwardV * kLane) {
    int64_t n = 0;
    for (; n + kForwardN <= c.states; n += kForwardN)
      forward_tile<kForwardV, kForwardN>(c, A, h_in, h_out, e, n);
    for (; n < c.states; ++n) forward_tile<kForwardV, 1>(c, A, h_in, h_out, e, n);
  }
  for (; e < channels; e += kLane) {
    int64_t n = 0;
    for (; n + kForwardN <= c.states; n += kForwardN)
      forward_tile<1, kForwardN>(c, A, h_in, h_out, e, n);
    for (; n < c.states; ++n) forward_tile<1, 1>(c, A, h_in, h_out, e, n);
  }
}

struct ForwardBuffers {
  float *dt, *dtu, *y, *B, *C, *row, *states;  // states: (2, blocks of a group, N, kBlock)
  int64_t* position;
  uint8_t* starts;

  ForwardBuffers(const Arguments& a, const Plan& plan, Arena* arena) {
    dt = arena->take<float>(kChunk * kBlock);
    dtu = arena->take<float>(kChunk * kBlock);
    y = arena->take<float>(kChunk * kBlock);
    row = arena->take<float>(kBlock);
    B = arena->take<float>(kChunk * a.states);
    C = arena->take<float>(kChunk * a.states);
    states = arena->take<float>(ceil_div(plan.blocks, plan.groups) * plan.block_state);
    position = arena->take<int64_t>(a.seq_idx != nullptr ? a.length : 0);
    starts = arena->take<uint8_t>(a.seq_idx != nullptr ? a.length : 0);
  }
};

void forward_row(const Arguments& a, const Shared& s, const ForwardBuffers& f, int64_t b, int64_t group) {
  const Plan& plan = s.plan;
  const int64_t k0 = plan.first_block(group), k1 = plan.first_block(group + 1);
  const int64_t state_size = a.channels * a.states;
  const Row row = row_of(a, b, f.position, f.starts);

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
      const int64_t padded = round_up(channels, kLane);
      for (int64_t t = 0; t < steps; ++t) {
        const int64_t at = row.at(t0 + t);
        float *dt = f.dt + t * kBlock, *dtu = f.dtu + t * kBlock, *y = f.y + t * kBlock;
        load_row(a.dt, offset_of(a.dt, b, at) + e, channels, padded, dt);
        load_row(a.u, offset_of(a.u, b, at) + e, channels, padded, y);
        for (int64_t i = 0; i < padded; i += kLane) {
          const Vec u = Vec::load(y + i);
          Vec step = Vec::load(dt + i) + Vec::load(s.bias + e + i), derivative;
          if (a.softplus) step = softplus(step, &derivative);
          step.store(dt + i);
          (step * u).store(dtu + i);
          (u * Vec::load(s.D + e + i)).store(y + i);
        }
      }
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
      forward_block(chunk, s.A + k * plan.block_state, from, to, channels);
      for (int64_t t = 0; t < steps; ++t) {
        const int64_t at = row.at(t0 + t);
        float* y = f.y + t * kBlock;
        if (a.z.data != nullptr) {
          if (a.ungated.data != nullptr)
            store_row(a.ungated, offset_of(a.ungated, b, at) + e, channels, y);
          load_row(a.z, offset_of(a.z, b, at) + e, channels, padded, f.row);
          for (int64_t i = 0; i < padded; i += kLane) {
            const Vec z = Vec::load(f.row + i);
            (Vec::load(y + i) * z * sigmoid(z)).store(y + i);
          }
        }
        store_row(a.y, offset_of(a.y, b, at) + e, channels, y);
      }
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
  float *lanes_dB, *lanes_dC;  // (chunk, N, kLane), summed into unless `first`
  const uint8_t* starts;       // or null
  int64_t steps, states;
  bool first;                  // the chunk's first tile to write lanes
};

// With x = decay h_before the step is h = x + dt u B, and with g = dh x (the gradient of dt A)
//   dB = dh dt u,  dC = dy h,  d(dt u) = dh B,  d(dt) = g A,  dA = g dt,  dh_before = dh decay + dy C.
// dC is left as dy x; the rest of it, B dy dt u, is the same for all states and added at the end.
template <int V, int N>
RECSYS_INLINE void backward_tile(const BackwardChunk& c, const float* A, const float* h_in, float* dh_inout,
                                 float* dA, float* kept, int64_t e, int64_t n0, bool first_states) {
  Vec h[N][V], rate[N][V];
  for (int n = 0; n < N; ++n)
    for (int v = 0; v < V; ++v) {
      const int64_t i = (n0 + n) * kBlock + e + v * kLane;
      h[n][v] = Vec::load(h_in + i);
      rate[n][v] = Vec::load(A + i);
    }
  float* keep = kept;
  for (int64_t t = 0; t < c.steps; ++t) {
    if (c.starts != nullptr && c.starts[t])
      for (int n = 0; n < N; ++n)
        for (int v = 0; v < V; ++v) h[n][v] = Vec::zero();
    const float* B = c.B + t * c.states + n0;
    for (int v = 0; v < V; ++v) {
      const int64_t i = t * kBlock + e + v * kLane;
      const Vec dt = Vec::load(c.dt + i), dtu = Vec::load(c.dtu + i);
      for (int n = 0; n < N; ++n, keep += 2 * kLane) {
        const Vec decay = (dt * rate[n][v]).exp2();
        const Vec x = decay * h[n][v];
        decay.store(keep);
        x.store(keep + kLane);
        h[n][v] = Vec::fma(dtu, Vec::all(B[n]), x);
      }
    }
  }

  Vec dh[N][V], sum_dA[N][V];
  for (int n = 0; n < N; ++n)
    for (int v = 0; v < V; ++v) {
      const int64_t i = (n0 + n) * kBlock + e + v * kLane;
      dh[n][v] = Vec::load(dh_inout + i);
      sum_dA[n][v] = Vec::load(dA + i);
    }
  for (int64_t t = c.steps; t-- > 0;) {
    keep -= 2 * kLane * N * V;
    const float *B = c.B + t * c.states + n0, *C = c.C + t * c.states + n0;
    float* lanes_dB = c.lanes_dB + (t * c.states + n0) * kLane;
    float* lanes_dC = c.lanes_dC + (t * c.states + n0) * kLane;
    Vec dB[N], dC[N];
    for (int n = 0; n < N; ++n) {
      dB[n] = c.first ? Vec::zero() : Vec::load(lanes_dB + n * kLane);
      dC[n] = c.first ? Vec::zero() : Vec::load(lanes_dC + n * kLane);
    }
    for (int v = 0; v < V; ++v) {
      const int64_t i = t * kBlock + e + v * kLane;
      const Vec dt = Vec::load(c.dt + i), dtu = Vec::load(c.dtu + i), dy = Vec::load(c.dy + i);
      Vec ddtu = first_states ? Vec::zero() : Vec::load(c.ddtu + i);
      Vec sum_rate = first_states ? Vec::zero() : Vec::load(c.rate + i);
      for (int n = 0; n < N; ++n) {
        const Vec decay = Vec::load(keep + (v * N + n) * 2 * kLane);
        const Vec x = Vec::load(keep + (v * N + n) * 2 * kLane + kLane);
        const Vec d = Vec::fma(dy, Vec::all(C[n]), dh[n][v]);
        dC[n] = Vec::fma(dy, x, dC[n]);
        dB[n] = Vec::fma(d, dtu, dB[n]);
        ddtu = Vec::fma(d, Vec::all(B[n]), ddtu);
        const Vec g = d * x;
        sum_rate = Vec::fma(g, Vec::load(A + (n0 + n) * kBlock + e + v * kLane), sum_rate);
        sum_dA[n][v] = Vec::fma(g, dt, sum_dA[n][v]);
        dh[n][v] = d * decay;
      }
      ddtu.store(c.ddtu + i);
      sum_rate.store(c.rate + i);
    }
    for (int n = 0; n < N; ++n) {
      dB[n].store(lanes_dB + n * kLane);
      dC[n].store(lanes_dC + n * kLane);
    }
    if (c.starts != nullptr && c.starts[t])
      for (int n = 0; n < N; ++n)
        for (int v = 0; v < V; ++v) dh[n][v] = Vec::zero();
  }
  for (int n = 0; n < N; ++n)
    for (int v = 0; v < V; ++v) {
      const int64_t i = (n0 + n) * kBlock + e + v * kLane;
      dh[n][v].store(dh_inout + i);
      sum_dA[n][v].store(dA + i);
    }
}

void backward_block(BackwardChunk c, const float* A, const float* h_in, float* dh, float* dA, float* kept,
                    int64_t channels) {
  int64_t e = 0;
  for (; e + (kBackwardV - 1) * kLane < channels; e += kBackwardV * kLane) {
    int64_t n = 0;
    for (; n + kBackwardN <= c.states; n += kBackwardN)
      backward_tile<kBackwardV, kBackwardN>(c, A, h_in, dh, dA, kept, e, n, n == 0);
    for (; n < c.states; ++n) backward_tile<kBackwardV, 1>(c, A, h_in, dh, dA, kept, e, n, n == 0);
    c.first = false;
  }
  for (; e < channels; e += kLane) {
    int64_t n = 0;
    for (; n + kBackwardN <= c.states; n += kBackwardN)
      backward_tile<1, kBackwardN>(c, A, h_in, dh, dA, kept, e, n, n == 0);
    for (; n < c.states; ++n) backward_tile<1, 1>(c, A, h_in, dh, dA, kept, e, n, n == 0);
    c.first = false;
  }
}

struct BackwardBuffers {
  float *dt, *slope, *u, *dtu, *dy, *ddtu, *rate, *row, *row2;  // slope: softplus's derivative
  float *B, *C, *dB, *dC, *lanes_dB, *lanes_dC, *lanes_dydtu, *kept, *initial, *dh;
  int64_t* position;
  uint8_t* starts;

  BackwardBuffers(const Arguments& a, const Plan& plan, Arena* arena) {
    float** const of_block[] = {&dt, &slope, &u, &dtu, &dy, &ddtu, &rate};
    for (float** buffer : of_block) *buffer = arena->take<float>(kChunk * kBlock);
    row = arena->take<float>(kBlock);
    row2 = arena->take<float>(kBlock);
    float** const of_states[] = {&B, &C, &dB, &dC};
    for (float** buffer : of_states) *buffer = arena->take<float>(kChunk * a.states);
    lanes_dB = arena->take<float>(kChunk * a.states * kLane);
    lanes_dC = arena->take<float>(kChunk * a.states * kLane);
    lanes_dydtu = arena->take<float>(kChunk * kLane);
    kept = arena->take<float>(kChunk * kBackwardV * kBackwardN * 2 * kLane);
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

void backward_row(const Arguments& a, const Shared& s, const BackwardBuffers& f, const Sums& sums,
                  const Strided& dB, const Strided& dC, int64_t b, int64_t group) {
  const Plan& plan = s.plan;
  const int64_t k0 = plan.first_block(group), k1 = plan.first_block(group + 1);
  const int64_t state_size = a.channels * a.states, row_size = plan.blocks * plan.block_state;
  const Row row = row_of(a, b, f.position, f.starts);

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
      const int64_t padded = round_up(channels, kLane);
      for (int64_t t = 0; t < steps; ++t) {
        const int64_t at = row.at(t0 + t), i0 = t * kBlock;
        load_row(a.dt, offset_of(a.dt, b, at) + e, channels, padded, f.dt + i0);
        load_row(a.u, offset_of(a.u, b, at) + e, channels, padded, f.u + i0);
        if (a.dy.data != nullptr) {
          load_row(a.dy, offset_of(a.dy, b, at) + e, channels, padded, f.dy + i0);
        } else {
          std::memset(f.dy + i0, 0, sizeof(float) * kBlock);
        }
        if (a.z.data != nullptr) {
          load_row(a.z, offset_of(a.z, b, at) + e, channels, padded, f.row);
          load_row(a.ungated, offset_of(a.ungated, b, at) + e, channels, padded, f.row2);
          for (int64_t i = 0; i < padded; i += kLane) {
            const Vec z = Vec::load(f.row + i), dy = Vec::load(f.dy + i0 + i), sig = sigmoid(z);
            const Vec silu = z * sig;
            (dy * Vec::load(f.row2 + i) * (sig + silu - silu * sig)).store(f.row2 + i);
            (dy * silu).store(f.dy + i0 + i);
          }
          store_row(a.dz, offset_of(a.dz, b, at) + e, channels, f.row2);
        }
        Vec dydtu = Vec::load(f.lanes_dydtu + t * kLane);
        for (int64_t i = 0; i < padded; i += kLane) {
          const Vec u = Vec::load(f.u + i0 + i), dy = Vec::load(f.dy + i0 + i);
          Vec step = Vec::load(f.dt + i0 + i) + Vec::load(s.bias + e + i), slope = Vec::all(1);
          if (a.softplus) step = softplus(step, &slope);
          const Vec dtu = step * u;
          step.store(f.dt + i0 + i);
          slope.store(f.slope + i0 + i);
          dtu.store(f.dtu + i0 + i);
          dydtu = Vec::fma(dy, dtu, dydtu);
          Vec::fma(dy, u, Vec::load(sums.dD + e + i)).store(sums.dD + e + i);
        }
        dydtu.store(f.lanes_dydtu + t * kLane);
      }
      const float* from = f.initial;
      if (c > 0) {
        from = a.checkpoints + (b * checkpoints_a_row(a.length) + c - 1) * row_size + k * plan.block_state;
      } else if (a.initial_state != nullptr) {
        to_block(a.initial_state + b * state_size + e * a.states, channels, a.states, 1, f.initial);
      } else {
        std::memset(f.initial, 0, sizeof(float) * static_cast<size_t>(plan.block_state));
      }
      const BackwardChunk chunk{
          f.dt, f.dtu,      f.dy,       f.ddtu, f.rate,
          f.B,  f.C,        f.lanes_dB, f.lanes_dC, row.starts == nullptr ? nullptr : row.starts + t0,
          steps, a.states, k == k0};
      backward_block(chunk, s.A + k * plan.block_state, from, f.dh + (k - k0) * plan.block_state,
                     sums.dA + k * plan.block_state, f.kept, channels);
      for (int64_t t = 0; t < steps; ++t) {
        const int64_t at = row.at(t0 + t), i0 = t * kBlock;
        for (int64_t i = 0; i < padded; i += kLane) {
          const Vec ddtu = Vec::load(f.ddtu + i0 + i), u = Vec::load(f.u + i0 + i);
          const Vec du = Vec::fma(ddtu, Vec::load(f.dt + i0 + i),
                                  Vec::load(f.dy + i0 + i) * Vec::load(s.D + e + i));
          const Vec rate = Vec::load(f.rate + i0 + i) * Vec::all(kLn2);  // A was in powers of two
          const Vec ddt = Vec::fma(ddtu, u, rate) * Vec::load(f.slope + i0 + i);
          du.store(f.row + i);
          ddt.store(f.row2 + i);
          (Vec::load(sums.ddt_bias + e + i) + ddt).store(sums.ddt_bias + e + i);
        }
        store_row(a.du, offset_of(a.du, b, at) + e, channels, f.row);
        store_row(a.ddt, offset_of(a.ddt, b, at) + e, channels, f.row2);
      }
    }
    for (int64_t t = 0; t < steps; ++t) {
      const float dydtu = Vec::load(f.lanes_dydtu + t * kLane).sum();
      for (int64_t n = 0; n < a.states; ++n) {
        const int64_t i = t * a.states + n;
        f.dB[i] = Vec::load(f.lanes_dB + i * kLane).sum();
        f.dC[i] = Vec::load(f.lanes_dC + i * kLane).sum() + f.B[i] * dydtu;
      }
      const int64_t at = row.at(t0 + t);
      store_row(dB, offset_of(dB, b, at), a.states, f.dB + t * a.states);
      store_row(dC, offset_of(dC, b, at), a.states, f.dC + t * a.states);
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
  Arena measure{nullptr};
  const Plan plan = Shared(a, &measure).plan;
  const int64_t shared_size = static_cast<int64_t>(measure.used);
  Arena one_range{nullptr};
  Sums(plan, &one_range);
  const int64_t sums_size = static_cast<int64_t>(one_range.used);
  // dB and dC sum over all channels: with several groups each writes its own, summed afterwards.
  const int64_t matrix = a.batch * a.length * a.states;
  const int64_t partial_size = plan.groups > 1 ? 2 * plan.groups * matrix * 4 : 0;
  void* memory = std::malloc(static_cast<size_t>(shared_size + plan.ranges * sums_size + partial_size + 64));
  if (memory == nullptr) return RECSYS_NO_MEMORY;
  Arena arena{reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(memory), 64))};
  const Shared shared(a, &arena);
  char* all_sums = arena.take<char>(plan.ranges * sums_size);
  std::memset(all_sums, 0, static_cast<size_t>(plan.ranges * sums_size));
  float* partial = arena.take<float>(partial_size / 4);
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
