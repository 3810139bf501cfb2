// State space duality (Mamba-2), forward and backward.
//
// A task takes one group of heads of one batch row: C heads times headdim channels that share B and C.
// Every packed sequence in the row is computed by itself, in chunks; a chunk in blocks of kT positions.
// With u = dt x, the log-decays summed to cs, and r(I) the sum up to block I,
//
//   y(i) = sum over j <= i in the chunk  (C(i) . B(j)) exp(cs(i) - cs(j)) u(j)  +  exp(cs(i)) C(i) S
//
// For j in a block before i's the exponential factors into exp(cs(i) - r(I)) exp(r(I) - cs(j)), two
// numbers at most 1 that depend on one position each. So no (i, j) matrix is needed for each head: the
// history W(j) = exp(r(I) - cs(j)) u(j) is kept scaled to the present block, and all channels share one
// matrix product (C . B) W. Only pairs within a block are decayed one by one. What is carried from
// chunk to chunk is the state S; a short sequence is one chunk and has none. The backward pass is the
// same thing backwards: V(i) = exp(cs(i) - r) dy(i) is the history, and dS the state.
//
// The gradient of the log-decay at t is the sum over i >= t > j of all terms. Terms of a block with
// itself are summed as they stand. Of those with other blocks, the ones that end in t's block are a sum
// over its outputs yh from before the block, the ones that begin in it a sum over the gradients duh from
// after it. What passes over the whole block is carried from block to block: it gains what ends in the
// block after and loses what begins in this one. (The shorter way, one sum of dy . y - u . du over all
// positions from t on, loses the digits that it cancels.)
#include "matrix.h"

extern "C" struct SsdArgs {
  int64_t threads, batch, length, groups, heads, headdim, states;  // heads a group
  int64_t chunk;                  // positions, a multiple of kT
  int64_t sharing;                // groups side by side that have one B and C between them
  int64_t bf16;                   // x, B, C, y and their gradients are bfloat16, else float32
  int64_t x_batch, x_time;        // strides in elements; a position's channels are adjacent
  int64_t b_batch, b_time, c_batch, c_time, dy_batch, dy_time;
  const void *x, *b, *c;  // (batch, length, groups * heads * headdim), (…, groups / sharing * states)
  const float* dt;                // (batch, length, groups * heads), after bias and softplus
  const float* a;                 // (groups * heads)
  const float* d;                 // (groups * heads) or null
  const int64_t* seq_idx;         // (batch, length) or null
  const float* state;             // (batch, groups * heads * headdim, states) or null
  void* y;                        // (batch, length, channels)
  float* yh;                      // the same: what y takes from before its block; may be null
  float* final_state;             // as state, may be null
  const void* dy;
  const float* dfinal;            // as state, or null
  void *dx, *db, *dc;             // without gaps; db and dc (batch, length, groups * states)
  float* ddt;                     // as dt
  float *da, *dd;                 // (batch, groups * heads), (batch, channels)
  float* dstate;                  // as state, or null
};

namespace {

using Args = SsdArgs;

// row(i) *= factor, for the rows [first, last).
void scale_rows(const Matrix& m, int64_t first, int64_t last, const float* factor) {
  for (int64_t i = first; i < last; ++i) {
    float* row = m.row(i);
    for (int64_t c = 0; c < m.columns; c += Vec::size)
      (Vec::load(row + c) * Vec::load(factor + c)).store(row + c);
  }
}

void fill(float* to, int64_t count, float value) {
  for (int64_t c = 0; c < count; ++c) to[c] = value;
}

// One group of heads of one batch row.
class Group {
 public:
  // Where arena.memory is null it only counts what it needs.
  Group(const Args& args, bool backward, Arena& arena)
      : a_(args),
        channels_(args.heads * args.headdim),
        wide_(round_up(args.heads * args.headdim, kT)),
        states_(round_up(args.states, kT)),
        chunk_(args.chunk) {
    b_ = arena.matrix(chunk_, states_);
    c_ = arena.matrix(chunk_, states_);
    transposed_ = arena.matrix(states_, chunk_);
    u_ = arena.matrix(chunk_, wide_);
    decay_ = arena.matrix(chunk_, wide_);
    weights_ = arena.matrix(kT, chunk_);
    x_ = arena.matrix(kT, wide_);
    block_ = arena.matrix(kT, wide_);
    out_ = arena.matrix(kT, wide_);
    state_ = arena.matrix(states_, wide_);
    block_decay_ = arena.floats(wide_);
    factor_ = arena.floats(wide_);
    skip_ = arena.floats(wide_);
    if (backward) {
      v_ = arena.matrix(chunk_, wide_);
      v_transposed_ = arena.matrix(wide_, chunk_);
      dc_ = arena.matrix(chunk_, states_);
      db_ = arena.matrix(kT, states_);
      dweights_ = arena.matrix(kT, chunk_);
      to_end_ = arena.matrix(kT, wide_);
      w_ = arena.matrix(kT, wide_);
      yh_ = arena.matrix(kT, wide_);
      dt_ = arena.matrix(kT, wide_);
      dlog_ = arena.matrix(kT, wide_);
      ddt_ = arena.matrix(kT, wide_);
      dstate_ = arena.matrix(states_, wide_);
      square_ = arena.matrix(wide_, states_);
      pairs_ = arena.floats(kT * kT * Vec::size);
      dskip_ = arena.floats(wide_);
      ended_ = arena.floats(wide_);
      begun_ = arena.floats(wide_);
      passing_ = reinterpret_cast<double*>(arena.floats(2 * args.heads));
      da_ = reinterpret_cast<double*>(arena.floats(2 * args.heads));
      const bool kept = args.length > chunk_ || args.dfinal != nullptr;
      starts_ = arena.floats(kept ? ceil_div(args.length, chunk_) * states_ * state_.stride : 0);
    }
    if (arena.memory == nullptr) return;
    // Columns beyond the last are computed with like the others: zeros, and decays of 1.
    if (channels_ < wide_ || args.states < states_) {
      fill_zero(arena.memory, arena.used);
      fill(decay_.at, chunk_ * decay_.stride, 1.f);
    }
  }

  void choose(int64_t row, int64_t group) {
    batch_ = row;
    group_ = group;
    for (int64_t h = 0; h < a_.heads; ++h)
      fill(skip_ + h * a_.headdim, a_.headdim, a_.d == nullptr ? 0.f : a_.d[group_ * a_.heads + h]);
  }

  template <class T>
  void forward() {
    const float* initial = part_of_state(a_.state);
    float* final_state = part_of_state(a_.final_state);
    bool any = false;
    each_sequence(
        [&](int64_t count, bool first, bool last) {
          any = true;
          bool has_state = first && initial != nullptr;
          if (has_state) read_state(initial, state_);
          for (int64_t start = 0; start < count; start += chunk_) {
            const int64_t size = min64(chunk_, count - start);
            const bool carry = start + size < count || (last && final_state != nullptr);
            load_u<T>(start, size);
            load_states<T>(a_.b, a_.b_batch, a_.b_time, start, size, b_);
            load_states<T>(a_.c, a_.c_batch, a_.c_time, start, size, c_);
            forward_chunk<T>(start, size, has_state, carry);
            if (carry) add_to_state(b_, u_, round_up(size, kT), has_state, state_);
            has_state = true;
          }
          if (last && final_state != nullptr) write_state(state_, final_state);
        },
        [&](int64_t t) { std::memset(channel_row<T>(a_.y, t), 0, sizeof(T) * channels_); });
    if (!any && final_state != nullptr) copy_state(initial, final_state);
  }

  template <class T>
  void backward() {
    const float* initial = part_of_state(a_.state);
    const float* dfinal = part_of_state(a_.dfinal);
    float* dinitial = part_of_state(a_.dstate);
    fill_zero(dskip_, wide_);
    for (int64_t h = 0; h < a_.heads; ++h) da_[h] = 0;
    bool any = false;
    each_sequence(
        [&](int64_t count, bool first, bool last) {
          any = true;
          backward_sequence<T>(count, first ? initial : nullptr, last ? dfinal : nullptr,
                               first ? dinitial : nullptr);
        },
        [&](int64_t t) {
          std::memset(channel_row<T>(a_.dx, t), 0, sizeof(T) * channels_);
          std::memset(states_row<T>(a_.db, t), 0, sizeof(T) * a_.states);
          std::memset(states_row<T>(a_.dc, t), 0, sizeof(T) * a_.states);
          fill_zero(a_.ddt + head_at(t), a_.heads);
        });
    if (!any && dinitial != nullptr) copy_state(dfinal, dinitial);
    const int64_t group = batch_ * a_.groups + group_;
    for (int64_t h = 0; h < a_.heads; ++h)
      a_.da[group * a_.heads + h] = static_cast<float>(da_[h]);
    std::memcpy(a_.dd + group * channels_, dskip_, sizeof(float) * channels_);
  }

 private:
  // ---- where things lie ------------------------------------------------------------------------

  int64_t position(int64_t t) const { return (batch_ * a_.length + t) * a_.groups + group_; }
  int64_t head_at(int64_t t) const { return position(t) * a_.heads; }
  template <class T>
  T* channel_row(void* base, int64_t t) const {
    return static_cast<T*>(base) + position(t) * channels_;
  }
  template <class T>
  T* states_row(void* base, int64_t t) const {
    return static_cast<T*>(base) + position(t) * a_.states;
  }
  template <class P>
  P* part_of_state(P* base) const {
    return base == nullptr ? nullptr
                           : base + (batch_ * a_.groups + group_) * channels_ * a_.states;
  }

  // Calls body(count, first, last) for every sequence of the row, which begins at begin_, and gap(t) for
  // padding.
  template <class F, class G>
  void each_sequence(const F& body, const G& gap) {
    const int64_t* ids = a_.seq_idx == nullptr ? nullptr : a_.seq_idx + batch_ * a_.length;
    int64_t last = a_.length - 1;
    while (ids != nullptr && last >= 0 && ids[last] < 0) --last;
    bool first = true;
    for (int64_t t = 0; t < a_.length;) {
      if (ids != nullptr && ids[t] < 0) {
        gap(t++);
        continue;
      }
      int64_t end = ids == nullptr ? a_.length : t + 1;
      while (end < a_.length && ids[end] == ids[t]) ++end;
      begin_ = t;
      body(end - t, first, end - 1 == last);
      first = false;
      t = end;
    }
  }

  // A state is (channels, states) outside and (states, channels) here.
  void read_state(const float* from, const Matrix& to) const {
    for (int64_t e = 0; e < channels_; ++e)
      for (int64_t n = 0; n < a_.states; ++n) to.row(n)[e] = from[e * a_.states + n];
  }
  void write_state(const Matrix& from, float* to) const {
    for (int64_t e = 0; e < channels_; ++e)
      for (int64_t n = 0; n < a_.states; ++n) to[e * a_.states + n] = from.row(n)[e];
  }
  void copy_state(const float* from, float* to) const {
    if (from == nullptr)
      fill_zero(to, channels_ * a_.states);
    else
      std::memcpy(to, from, sizeof(float) * channels_ * a_.states);
  }

  template <class T>
  void load_x(int64_t t, float* to) const {
    const T* x = static_cast<const T*>(a_.x) + batch_ * a_.x_batch + t * a_.x_time;
    read_row(x + group_ * channels_, channels_, to);
  }

  // u and the decays of `size` positions from `start` on; the last block is filled up with zeros and
  // decays of 1.
  template <class T>
  void load_u(int64_t start, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
      const int64_t t = begin_ + start + i;
      const float* dt = a_.dt + head_at(t);
      float *u = u_.row(i), *decay = decay_.row(i);
      load_x<T>(t, u);
      for (int64_t h = 0; h < a_.heads; ++h) {
        const float step = dt[h];
        // The products of many decays would add up the error of the vectorised exponential.
        const float keep = expf(step * a_.a[group_ * a_.heads + h]);
        for (int64_t p = h * a_.headdim; p < (h + 1) * a_.headdim; ++p) {
          u[p] *= step;
          decay[p] = keep;
        }
      }
    }
    for (int64_t i = size; i < round_up(size, kT); ++i) {
      fill_zero(u_.row(i), wide_);
      fill(decay_.row(i), wide_, 1.f);
    }
  }

  // B or C of the same positions.
  template <class T>
  void load_states(const void* from, int64_t batch_stride, int64_t time_stride, int64_t start,
                   int64_t size, const Matrix& to) const {
    const T* rows =
        static_cast<const T*>(from) + batch_ * batch_stride + group_ / a_.sharing * a_.states;
    for (int64_t i = 0; i < size; ++i)
      read_row(rows + (begin_ + start + i) * time_stride, a_.states, to.row(i));
    for (int64_t i = size; i < round_up(size, kT); ++i) fill_zero(to.row(i), states_);
  }

  // state = factor_ state + rows^T history, for a history that is scaled to where the state stands.
  void add_to_state(const Matrix& rows, const Matrix& history, int64_t count, bool has_state,
                    const Matrix& state) const {
    if (has_state) {
      scale_rows(state, 0, states_, factor_);
      multiply<true>(rows.at, 1, rows.stride, history.at, history.stride, state.at, state.stride,
                     states_, count, wide_);
    } else {
      multiply<false>(rows.at, 1, rows.stride, history.at, history.stride, state.at, state.stride,
                      states_, count, wide_);
    }
  }

  // ---- forward ---------------------------------------------------------------------------------

  // The outputs of a chunk. With `carry`, leaves u_ scaled to the chunk's end and its decay in factor_.
  template <class T>
  void forward_chunk(int64_t start, int64_t size, bool has_state, bool carry) {
    const int64_t end = round_up(size, kT);
    transpose(b_.at, b_.stride, transposed_.at, transposed_.stride, end, states_);
    fill(factor_, wide_, 1.f);
    for (int64_t past = 0; past < end; past += kT) {
      multiply<false>(c_.row(past), c_.stride, 1, transposed_.at, transposed_.stride, weights_.at,
                      weights_.stride, kT, states_, past + kT);
      if (has_state) {
        multiply<false>(c_, past, 0, state_, 0, block_, kT, states_);
        scale_rows(block_, 0, kT, factor_);
        multiply<true>(weights_, 0, 0, u_, 0, block_, kT, past);
      } else {
        multiply<false>(weights_, 0, 0, u_, 0, block_, kT, past);
      }
      forward_block(past);
      for (int64_t i = past; i < min64(past + kT, size); ++i)
        write_output<T>(begin_ + start + i, i - past);
      if (past + kT < end || carry) {
        scale_rows(u_, 0, past, block_decay_);
        for (int64_t c = 0; c < wide_; c += Vec::size)
          (Vec::load(factor_ + c) * Vec::load(block_decay_ + c)).store(factor_ + c);
      }
    }
  }

  // The pairs within a block; block_ has what its outputs take from before, scaled to the block's
  // start. Leaves yh in block_, y without the skip in out_, the block's rows of u_ scaled to its end.
  void forward_block(int64_t past) {
    for (int64_t c = 0; c < wide_; c += Vec::size) {
      Vec history[kT];
      Vec since = Vec::all(1.f);
      for (int i = 0; i < kT; ++i) {
        const Vec decay = Vec::load(decay_.row(past + i) + c);
        const float* weights = weights_.row(i) + past;
        since = since * decay;
        Vec sum = since * Vec::load(block_.row(i) + c);
        sum.store(block_.row(i) + c);
        for (int j = 0; j < i; ++j) {
          history[j] = history[j] * decay;
          sum = Vec::fma(Vec::all(weights[j]), history[j], sum);
        }
        history[i] = Vec::load(u_.row(past + i) + c);
        Vec::fma(Vec::all(weights[i]), history[i], sum).store(out_.row(i) + c);
      }
      for (int i = 0; i < kT; ++i) history[i].store(u_.row(past + i) + c);
      since.store(block_decay_ + c);
    }
  }

  template <class T>
  void write_output(int64_t t, int64_t i) {
    if (a_.yh != nullptr) write_row(block_.row(i), channels_, channel_row<float>(a_.yh, t));
    float* out = out_.row(i);
    if (a_.d != nullptr) {
      float* x = x_.row(i);
      load_x<T>(t, x);
      for (int64_t c = 0; c < wide_; c += Vec::size)
        Vec::fma(Vec::load(skip_ + c), Vec::load(x + c), Vec::load(out + c)).store(out + c);
    }
    write_row(out, channels_, channel_row<T>(a_.y, t));
  }

  // ---- backward --------------------------------------------------------------------------------

  Matrix start_of(int64_t chunk) const {  // the state before a chunk, the first excepted
    return {starts_ + (chunk - 1) * states_ * state_.stride, state_.columns, state_.stride};
  }

  template <class T>
  void backward_sequence(int64_t count, const float* initial, const float* dfinal, float* dinitial) {
    const int64_t chunks = ceil_div(count, chunk_);
    if (initial != nullptr) read_state(initial, state_);
    bool has_state = initial != nullptr;
    for (int64_t k = 0; k + 1 < chunks || (k < chunks && dfinal != nullptr); ++k) {
      const int64_t size = min64(chunk_, count - k * chunk_);
      load_u<T>(k * chunk_, size);
      load_states<T>(a_.b, a_.b_batch, a_.b_time, k * chunk_, size, b_);
      scale_to_end(size);
      const Matrix next = start_of(k + 1);
      if (has_state) {
        const Matrix before = k == 0 ? state_ : start_of(k);
        std::memcpy(next.at, before.at, sizeof(float) * states_ * next.stride);
      }
      add_to_state(b_, u_, round_up(size, kT), has_state, next);
      has_state = true;
    }
    for (int64_t h = 0; h < a_.heads; ++h) passing_[h] = 0;
    if (dfinal != nullptr) read_state(dfinal, dstate_);
    bool has_dstate = dfinal != nullptr;
    for (int64_t k = chunks - 1; k >= 0; --k) {
      const Matrix* state = nullptr;
      Matrix before;
      if (k > 0 || initial != nullptr) {
        before = k == 0 ? state_ : start_of(k);
        state = &before;
      }
      const int64_t size = min64(chunk_, count - k * chunk_);
      const bool carry = k > 0 || dinitial != nullptr;
      if (has_dstate) meet_state(start_of(k + 1));
      backward_chunk<T>(k * chunk_, size, state, has_dstate, carry);
      if (carry) add_to_state(c_, v_, round_up(size, kT), has_dstate, dstate_);
      has_dstate = true;
    }
    if (dinitial != nullptr) write_state(dstate_, dinitial);
  }

  // All terms that pass over the end of a chunk, from the state there and its gradient.
  void meet_state(const Matrix& state) {
    for (int64_t c = 0; c < wide_; c += Vec::size) {
      Vec sum = Vec::zero();
      for (int64_t n = 0; n < states_; ++n)
        sum = Vec::fma(Vec::load(dstate_.row(n) + c), Vec::load(state.row(n) + c), sum);
      sum.store(ended_ + c);
    }
    for (int64_t h = 0; h < a_.heads; ++h) passing_[h] = head_sum(ended_, h);
  }

  // u_ scaled to the end of a chunk, the chunk's decay in factor_.
  void scale_to_end(int64_t size) {
    for (int64_t c = 0; c < wide_; c += Vec::size) {
      Vec after = Vec::all(1.f);
      for (int64_t i = size - 1; i >= 0; --i) {
        (Vec::load(u_.row(i) + c) * after).store(u_.row(i) + c);
        after = after * Vec::load(decay_.row(i) + c);
      }
      after.store(factor_ + c);
    }
  }

  // Gradients of a chunk's inputs. `state` is that before the chunk, or null; dstate_, if there is
  // one, the gradient of that after it. With `carry` or a state, leaves v_ scaled to the chunk's start
  // and the chunk's decay in factor_.
  template <class T>
  void backward_chunk(int64_t start, int64_t size, const Matrix* state, bool has_dstate, bool carry) {
    const int64_t end = round_up(size, kT);
    load_u<T>(start, size);
    load_states<T>(a_.b, a_.b_batch, a_.b_time, start, size, b_);
    load_states<T>(a_.c, a_.c_batch, a_.c_time, start, size, c_);
    transpose(c_.at, c_.stride, transposed_.at, transposed_.stride, end, states_);
    fill_zero(dc_.at, end * dc_.stride);
    if (has_dstate)
      transpose(dstate_.at, dstate_.stride, square_.at, square_.stride, states_, wide_);
    fill(factor_, wide_, 1.f);
    for (int64_t past = end - kT; past >= 0; past -= kT) {
      const int64_t next = past + kT, rows = min64(kT, size - past);
      load_block<T>(start + past, past, rows);
      // weights_(j, i) = B(j) . C(i), for i in this block and all later ones
      multiply<false>(b_.row(past), b_.stride, 1, transposed_.at + past, transposed_.stride,
                      weights_.at + past, weights_.stride, kT, states_, end - past);
      scale_block(past);
      if (has_dstate) {
        multiply<false>(b_, past, 0, dstate_, 0, block_, kT, states_);
        scale_rows(block_, 0, kT, factor_);
        multiply<true>(weights_, 0, next, v_, next, block_, kT, end - next);
      } else {
        multiply<false>(weights_, 0, next, v_, next, block_, kT, end - next);
      }
      multiply<false>(w_.at, w_.stride, 1, v_transposed_.at + next, v_transposed_.stride,
                      dweights_.at + next, dweights_.stride, kT, wide_, end - next);
      backward_block(past);
      multiply<false>(dweights_, 0, past, c_, past, db_, kT, end - past);
      multiply<true>(dweights_.at + past, 1, dweights_.stride, b_.row(past), b_.stride,
                     dc_.row(past), dc_.stride, end - past, kT, states_);
      if (has_dstate) {
        scale_rows(w_, 0, kT, factor_);
        multiply<true>(w_, 0, 0, square_, 0, db_, kT, wide_);
      }
      write_block<T>(start + past, rows, past > 0 || state != nullptr);
      if (past == 0 && !carry && state == nullptr) break;
      scale_rows(v_, next, end, block_decay_);
      for (int64_t c = 0; c < wide_; c += Vec::size)
        (Vec::load(factor_ + c) * Vec::load(block_decay_ + c)).store(factor_ + c);
      if (past == 0) break;
      for (int64_t e = 0; e < wide_; ++e) {
        float* row = v_transposed_.row(e);
        const Vec by = Vec::all(block_decay_[e]);
        for (int64_t i = next; i < end; i += Vec::size) (Vec::load(row + i) * by).store(row + i);
      }
      transpose(v_.row(past), v_.stride, v_transposed_.at + past, v_transposed_.stride, kT, wide_);
    }
    if (state != nullptr) {
      transpose(state->at, state->stride, square_.at, square_.stride, states_, wide_);
      multiply<true>(v_.at, v_.stride, 1, square_.at, square_.stride, dc_.at, dc_.stride, end, wide_,
                     states_);
    }
    for (int64_t i = 0; i < size; ++i)
      write_row(dc_.row(i), a_.states, states_row<T>(a_.dc, begin_ + start + i));
  }

  // What a block's gradients need beside u and the decays: x, dt, dy (into v_) and yh.
  template <class T>
  void load_block(int64_t start, int64_t past, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t t = begin_ + start + i;
      load_x<T>(t, x_.row(i));
      const T* dy = static_cast<const T*>(a_.dy) + batch_ * a_.dy_batch + t * a_.dy_time;
      read_row(dy + group_ * channels_, channels_, v_.row(past + i));
      read_row(channel_row<float>(a_.yh, t), channels_, yh_.row(i));
      for (int64_t h = 0; h < a_.heads; ++h)
        fill(dt_.row(i) + h * a_.headdim, a_.headdim, a_.dt[head_at(t) + h]);
    }
    for (int64_t i = rows; i < kT; ++i) {
      fill_zero(x_.row(i), wide_);
      fill_zero(v_.row(past + i), wide_);
      fill_zero(yh_.row(i), wide_);
      fill_zero(dt_.row(i), wide_);
    }
  }

  // w_ = u scaled to the block's end, by to_end_; the block's decay in block_decay_.
  void scale_block(int64_t past) {
    for (int64_t c = 0; c < wide_; c += Vec::size) {
      Vec after = Vec::all(1.f);
      for (int64_t j = kT - 1; j >= 0; --j) {
        after.store(to_end_.row(j) + c);
        (Vec::load(u_.row(past + j) + c) * after).store(w_.row(j) + c);
        after = after * Vec::load(decay_.row(past + j) + c);
      }
      after.store(block_decay_ + c);
    }
  }

  // The pairs within a block; block_ has what its inputs gave to later ones, scaled to the block's
  // end. Leaves in out_ the gradient of x, in dlog_ and ddt_ each channel's share of those of the
  // log-decay and of dt, in dweights_ those of the pairs, in the block's rows of v_ dy scaled to the
  // block's start, in ended_ and begun_ the terms that end here from before and begin here for later.
  void backward_block(int64_t past) {
    for (int64_t k = 0; k < kT * kT; ++k) Vec::zero().store(pairs_ + k * Vec::size);
    for (int64_t c = 0; c < wide_; c += Vec::size) {
      Vec history[kT], dlog[kT];
      const Vec skip = Vec::load(skip_ + c);
      Vec dskip = Vec::load(dskip_ + c), ended = Vec::zero();
      for (int j = kT - 1; j >= 0; --j) {
        const Vec decay = Vec::load(decay_.row(past + j) + c);
        const Vec u = Vec::load(u_.row(past + j) + c);
        const Vec dy = Vec::load(v_.row(past + j) + c);
        const Vec x = Vec::load(x_.row(j) + c);
        const float* weights = weights_.row(j) + past;
        float* pairs = pairs_ + j * kT * Vec::size;
        Vec du = Vec::zero();
        for (int i = kT - 1; i > j; --i) {
          du = Vec::fma(Vec::all(weights[i]), history[i], du);
          dlog[i] = Vec::fma(u, du, dlog[i]);
          float* pair = pairs + i * Vec::size;
          Vec::fma(history[i], u, Vec::load(pair)).store(pair);
          history[i] = history[i] * decay;
        }
        history[j] = dy * decay;
        float* own = pairs + j * Vec::size;
        Vec::fma(dy, u, Vec::load(own)).store(own);
        ended = Vec::fma(dy, Vec::load(yh_.row(j) + c), ended);
        dlog[j] = ended;
        const Vec duh = Vec::load(to_end_.row(j) + c) * Vec::load(block_.row(j) + c);
        (u * duh).store(block_.row(j) + c);
        du = Vec::fma(Vec::all(weights[j]), dy, du + duh);
        (du * x).store(ddt_.row(j) + c);
        Vec::fma(skip, dy, Vec::load(dt_.row(j) + c) * du).store(out_.row(j) + c);
        dskip = Vec::fma(dy, x, dskip);
      }
      Vec begun = Vec::zero();
      for (int i = 0; i < kT; ++i) {
        (dlog[i] + begun).store(dlog_.row(i) + c);
        begun = begun + Vec::load(block_.row(i) + c);
        history[i].store(v_.row(past + i) + c);
      }
      ended.store(ended_ + c);
      begun.store(begun_ + c);
      dskip.store(dskip_ + c);
    }
    for (int64_t j = 0; j < kT; ++j)
      for (int64_t i = 0; i < kT; ++i)
        dweights_.row(j)[past + i] =
            i < j ? 0.f : Vec::load(pairs_ + (j * kT + i) * Vec::size).sum();
  }

  // The sum over a head's channels.
  RECSYS_INLINE float head_sum(const float* row, int64_t head) const {
    const float* at = row + head * a_.headdim;
    float sum = 0;
    int64_t p = 0;
    if (a_.headdim >= Vec::size) {
      Vec sums = Vec::zero();
      for (; p + Vec::size <= a_.headdim; p += Vec::size) sums = sums + Vec::load(at + p);
      sum = sums.sum();
    }
    for (; p < a_.headdim; ++p) sum += at[p];
    return sum;
  }

  // The rows of a block, whose first position is `start` of the sequence; `before`: something is.
  template <class T>
  void write_block(int64_t start, int64_t rows, bool before) {
    for (int64_t h = 0; h < a_.heads; ++h) {
      passing_[h] -= head_sum(begun_, h);
      // What passes over has decayed by this much; what is left beyond that is rounding, and would be
      // counted at every earlier position.
      if (!before || block_decay_[h * a_.headdim] < 1e-7f) passing_[h] = 0;
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t t = begin_ + start + i;
      write_row(out_.row(i), channels_, channel_row<T>(a_.dx, t));
      write_row(db_.row(i), a_.states, states_row<T>(a_.db, t));
      for (int64_t h = 0; h < a_.heads; ++h) {
        const double dlog = passing_[h] + head_sum(dlog_.row(i), h);
        a_.ddt[head_at(t) + h] =
            head_sum(ddt_.row(i), h) + a_.a[group_ * a_.heads + h] * static_cast<float>(dlog);
        da_[h] += dlog * a_.dt[head_at(t) + h];
      }
    }
    for (int64_t h = 0; h < a_.heads; ++h) passing_[h] += head_sum(ended_, h);
  }

  const Args& a_;
  const int64_t channels_, wide_, states_, chunk_;  // wide_ and states_ in whole kT
  int64_t batch_ = 0, group_ = 0;
  int64_t begin_ = 0;                           // of the present sequence, in the row
  Matrix b_, c_, transposed_;                   // transposed_: B's (forward) or C's (backward)
  Matrix u_, decay_, v_, v_transposed_, dc_;    // a chunk's
  Matrix weights_, dweights_;                   // a block's positions against a chunk's
  Matrix x_, yh_, dt_, block_, out_, w_, to_end_, dlog_, ddt_, db_;  // a block's
  Matrix state_, dstate_, square_;              // square_: the transpose of a state
  float *block_decay_ = nullptr, *factor_ = nullptr;  // decay of a block, and since the chunk's edge
  float *skip_ = nullptr, *dskip_ = nullptr, *ended_ = nullptr, *begun_ = nullptr;  // of channels
  float *pairs_ = nullptr, *starts_ = nullptr;
  double *passing_ = nullptr, *da_ = nullptr;  // of heads
};

template <class F>
int for_all_groups(const Args& a, bool backward, const F& body) {
  if (a.batch < 0 || a.length < 0 || a.groups < 1 || a.heads < 1 || a.headdim < 1 || a.states < 1 ||
      a.sharing < 1 || a.groups % a.sharing != 0 || a.chunk < kT || a.chunk % kT != 0)
    return RECSYS_BAD_ARGUMENTS;
  Arena count{nullptr};
  Group(a, backward, count);
  RecsysStatus status = RECSYS_OK;
  parallel_for(a.threads, a.batch * a.groups, [&](int64_t task) {
    const FlushTiny flush;
    Arena arena{static_cast<float*>(recsys_scratch(sizeof(float) * count.used))};
    if (arena.memory == nullptr) {
      status = RECSYS_NO_MEMORY;
      return;
    }
    Group group(a, backward, arena);
    group.choose(task / a.groups, task % a.groups);
    body(group);
  });
  return status;
}

}  // namespace

RECSYS_KERNEL(recsys_ssd_forward)(const SsdArgs* args) {
  return for_all_groups(*args, false, [&](Group& group) {
    args->bf16 ? group.forward<uint16_t>() : group.forward<float>();
  });
}

RECSYS_KERNEL(recsys_ssd_backward)(const SsdArgs* args) {
  return for_all_groups(*args, true, [&](Group& group) {
    args->bf16 ? group.backward<uint16_t>() : group.backward<float>();
  });
}
