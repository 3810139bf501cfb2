// State space duality by the trapezoidal rule (Mamba-3), forward and backward.
//
// A task takes one group of heads of one batch row. Head by head, every packed sequence in the row is
// computed by itself, in chunks. Step t has R positions, one for each rank. A head has its own keys and
// queries: rows of B and C plus the head's bias, rotated by the head's angles. Each pair of rotated
// states (k0, k1) lies at i and N/2 + i here, whatever the order outside, because inner products do not
// depend on it. With scale(j) = own(j) + past(j + 1), and L(i, j) the product of the decays after j up
// to i, the output is Y = M V + (decay since the start) Q S, where
//
//   M(i, j) = (Q(i) . K(j)) * { own + skip on the diagonal   at the same step;   L(i, j) scale(j)   before }
//
// L is a running product and at most 1, so nothing is a difference of large sums. Neither is the
// gradient of the log-decay at t, the sum over i >= t > j of all terms: with F(i, j) = dM Q.K L, it sums
// scale(j) (F(t, j) + F(t + 1, j) + …) over j < t, from the last step to the first.
#include "matrix.h"

extern "C" struct TrapezoidalSsdArgs {
  int64_t threads, batch, length, rank;    // the rank divides kT
  int64_t groups, heads, headdim, states;  // heads a group; an even number of states
  int64_t angles;                          // pairs that are rotated, at most states / 2
  int64_t halves;                          // pairs are (i, states / 2 + i), else (2 i, 2 i + 1)
  int64_t chunk;                           // positions, a multiple of kT
  int64_t sharing;                         // groups side by side that have one B and C between them
  int64_t x_batch, x_time, b_batch, b_time, c_batch, c_time, dy_batch, dy_time;  // strides
  const float* x;                          // (batch, length, rank, groups * heads, headdim)
  const float *b, *c;                      // (batch, length, rank, groups / sharing, states)
  const float *b_bias, *c_bias;            // (groups * heads, rank, states)
  const float *cos, *sin;                  // (batch, length, groups * heads, angles)
  const float *log_decay, *past, *own;     // (batch, length, groups * heads)
  const float* d;                          // (groups * heads) or null
  const int64_t* seq_idx;                  // (batch, length) or null
  float* y;                                // as x, without gaps
  const float* dy;
  float *dx, *db, *dc;                     // without gaps; db and dc (batch, length, rank, groups, states)
  float *db_bias, *dc_bias;                // (batch, groups * heads, rank, states)
  float *dangle, *dlog_decay, *dpast, *down;
  float* dd;                               // (batch, groups * heads)
};

namespace {

using Args = TrapezoidalSsdArgs;

// One group of heads of one batch row.
class Group {
 public:
  // Where arena.memory is null it only counts what it needs.
  Group(const Args& args, bool backward, Arena& arena)
      : a_(args),
        wide_(round_up(args.headdim, kT)),
        states_(round_up(args.states, kT)),
        half_(args.states / 2),
        steps_(args.chunk / args.rank) {
    const int64_t chunk = args.chunk;
    k_ = arena.matrix(chunk, states_);
    q_ = arena.matrix(chunk, states_);
    v_ = arena.matrix(chunk, wide_);
    k_transposed_ = arena.matrix(states_, chunk);
    scaled_ = arena.matrix(chunk, wide_);
    state_ = arena.matrix(states_, wide_);
    scale_ = arena.floats(chunk);
    history_ = arena.floats(chunk);
    decay_ = arena.floats(steps_);
    since_ = arena.floats(steps_);
    own_ = arena.floats(steps_);
    k_bias_ = arena.floats(args.rank * states_);
    q_bias_ = arena.floats(args.rank * states_);
    if (!backward) {
      m_ = arena.matrix(kT, chunk);
      out_ = arena.matrix(kT, wide_);
    } else {
      m_ = arena.matrix(chunk, chunk);
      dpairs_ = arena.matrix(chunk, chunk);
      terms_ = arena.matrix(chunk, chunk);
      dm_ = arena.matrix(kT, chunk);
      v_transposed_ = arena.matrix(wide_, chunk);
      dy_ = arena.matrix(chunk, wide_);
      out_ = arena.matrix(chunk, wide_);
      dk_ = arena.matrix(chunk, states_);
      dq_ = arena.matrix(chunk, states_);
      from_state_ = arena.matrix(chunk, states_);
      dstate_ = arena.matrix(states_, wide_);
      square_ = arena.matrix(wide_, states_);
      dk_bias_ = arena.floats(args.rank * states_);
      dq_bias_ = arena.floats(args.rank * states_);
      columns_ = arena.floats(chunk);
      ended_ = arena.floats(chunk);
      down_ = arena.floats(steps_);
      starts_ = arena.floats(args.length > steps_ ? ceil_div(args.length, steps_) * states_ * state_.stride : 0);
    }
    // Rows and columns beyond the last are computed with like the others.
    if (arena.memory != nullptr) fill_zero(arena.memory, arena.used);
  }

  void choose(int64_t row, int64_t group) {
    batch_ = row;
    group_ = group;
  }

  void forward() {
    for (int64_t h = 0; h < a_.heads; ++h) {
      choose_head(h);
      each_sequence(
          [&](int64_t count) {
            for (int64_t start = 0; start < count; start += steps_) {
              const int64_t size = min64(steps_, count - start);
              const bool carry = start + size < count;
              load(start, size, carry);
              load_rows(a_.b, a_.b_batch, a_.b_time, k_bias_, start, size, k_);
              load_rows(a_.c, a_.c_batch, a_.c_time, q_bias_, start, size, q_);
              forward_chunk(start, size, start > 0);
              if (carry) add_to_state(size, start > 0, state_);
            }
          },
          [&](int64_t t) {
            for (int64_t r = 0; r < a_.rank; ++r) fill_zero(channels_of(a_.y, t, r), a_.headdim);
          });
    }
  }

  void backward() {
    for (int64_t h = 0; h < a_.heads; ++h) {
      choose_head(h);
      dskip_ = 0;
      fill_zero(dk_bias_, a_.rank * states_);
      fill_zero(dq_bias_, a_.rank * states_);
      each_sequence([&](int64_t count) { backward_sequence(count); },
                    [&](int64_t t) {
                      for (int64_t r = 0; r < a_.rank; ++r) {
                        fill_zero(channels_of(a_.dx, t, r), a_.headdim);
                        if (head_ == 0) {
                          fill_zero(states_of(a_.db, t, r), a_.states);
                          fill_zero(states_of(a_.dc, t, r), a_.states);
                        }
                      }
                      fill_zero(a_.dangle + head_at(t) * a_.angles, a_.angles);
                      a_.dlog_decay[head_at(t)] = a_.dpast[head_at(t)] = a_.down[head_at(t)] = 0;
                    });
      const int64_t at = batch_ * a_.groups * a_.heads + group_ * a_.heads + head_;
      for (int64_t r = 0; r < a_.rank; ++r) {
        to_outside(dk_bias_ + r * states_, a_.db_bias + (at * a_.rank + r) * a_.states);
        to_outside(dq_bias_ + r * states_, a_.dc_bias + (at * a_.rank + r) * a_.states);
      }
      a_.dd[at] = static_cast<float>(dskip_);
    }
  }

 private:
  // ---- where things lie ------------------------------------------------------------------------

  int64_t head_at(int64_t t) const {
    return ((batch_ * a_.length + t) * a_.groups + group_) * a_.heads + head_;
  }
  float* channels_of(float* base, int64_t t, int64_t r) const {
    const int64_t position = (batch_ * a_.length + t) * a_.rank + r;
    return base + ((position * a_.groups + group_) * a_.heads + head_) * a_.headdim;
  }
  float* states_of(float* base, int64_t t, int64_t r) const {
    const int64_t position = (batch_ * a_.length + t) * a_.rank + r;
    return base + (position * a_.groups + group_) * a_.states;
  }
  const float* channels_of(const float* base, int64_t batch_stride, int64_t time_stride, int64_t t,
                           int64_t r) const {
    const int64_t heads = a_.groups * a_.heads;
    return base + batch_ * batch_stride + t * time_stride +
           (r * heads + group_ * a_.heads + head_) * a_.headdim;
  }

  void choose_head(int64_t head) {
    head_ = head;
    skip_ = a_.d == nullptr ? 0.f : a_.d[group_ * a_.heads + head];
    const int64_t at = (group_ * a_.heads + head) * a_.rank * a_.states;
    for (int64_t r = 0; r < a_.rank; ++r) {
      from_outside(a_.b_bias + at + r * a_.states, k_bias_ + r * states_);
      from_outside(a_.c_bias + at + r * a_.states, q_bias_ + r * states_);
    }
  }

  // The states of a row, in pairs apart, and back.
  void from_outside(const float* from, float* to) const {
    if (a_.halves)
      std::memcpy(to, from, sizeof(float) * a_.states);
    else
      for (int64_t i = 0; i < half_; ++i) {
        to[i] = from[2 * i];
        to[half_ + i] = from[2 * i + 1];
      }
  }
  void to_outside(const float* from, float* to) const {
    if (a_.halves)
      std::memcpy(to, from, sizeof(float) * a_.states);
    else
      for (int64_t i = 0; i < half_; ++i) {
        to[2 * i] = from[i];
        to[2 * i + 1] = from[half_ + i];
      }
  }

  // Calls body(count) for every sequence of the row, which begins at begin_, and gap(t) for padding.
  template <class F, class G>
  void each_sequence(const F& body, const G& gap) {
    const int64_t* ids = a_.seq_idx == nullptr ? nullptr : a_.seq_idx + batch_ * a_.length;
    for (int64_t t = 0; t < a_.length;) {
      if (ids != nullptr && ids[t] < 0) {
        gap(t++);
        continue;
      }
      int64_t end = ids == nullptr ? a_.length : t + 1;
      while (end < a_.length && ids[end] == ids[t]) ++end;
      begin_ = t;
      body(end - t);
      t = end;
    }
  }

  // ---- a chunk's inputs --------------------------------------------------------------------------

  // Values, decays and scales of `size` steps; `more`: the sequence goes on behind them. Positions
  // that fill up the last block are zeros.
  void load(int64_t start, int64_t size, bool more) {
    const int64_t count = size * a_.rank;
    float since = 1;
    for (int64_t i = 0; i < size; ++i) {
      const int64_t t = begin_ + start + i, at = head_at(t);
      decay_[i] = expf(a_.log_decay[at]);
      own_[i] = a_.own[at];
      since_[i] = since *= decay_[i];
      const bool last = i + 1 == size && !more;
      const float scale = last ? 0.f : a_.own[at] + a_.past[head_at(t + 1)];
      for (int64_t r = 0; r < a_.rank; ++r) {
        scale_[i * a_.rank + r] = scale;
        std::memcpy(v_.row(i * a_.rank + r), channels_of(a_.x, a_.x_batch, a_.x_time, t, r),
                    sizeof(float) * a_.headdim);
      }
    }
    for (int64_t i = count; i < round_up(count, kT); ++i) {
      scale_[i] = 0;
      fill_zero(v_.row(i), wide_);
    }
  }

  // Keys or queries of the same steps.
  void load_rows(const float* from, int64_t batch_stride, int64_t time_stride, const float* bias,
                 int64_t start, int64_t size, const Matrix& to) const {
    const int64_t count = size * a_.rank, groups = a_.groups / a_.sharing;
    for (int64_t i = 0; i < size; ++i) {
      const int64_t t = begin_ + start + i;
      const float* rows = from + batch_ * batch_stride + t * time_stride + group_ / a_.sharing * a_.states;
      const float* cos = a_.cos + head_at(t) * a_.angles;
      const float* sin = a_.sin + head_at(t) * a_.angles;
      for (int64_t r = 0; r < a_.rank; ++r) {
        float* row = to.row(i * a_.rank + r);
        from_outside(rows + r * groups * a_.states, row);
        for (int64_t n = 0; n < states_; n += Vec::size)
          (Vec::load(row + n) + Vec::load(bias + r * states_ + n)).store(row + n);
        rotate(row, row + half_, cos, sin);
        for (int64_t n = a_.states; n < states_; ++n) row[n] = 0;
      }
    }
    for (int64_t i = count; i < round_up(count, kT); ++i) fill_zero(to.row(i), states_);
  }

  void rotate(float* k0, float* k1, const float* cos, const float* sin) const {
    int64_t i = 0;
    for (; i + Vec::size <= a_.angles; i += Vec::size) {
      const Vec c = Vec::load(cos + i), s = Vec::load(sin + i);
      const Vec x = Vec::load(k0 + i), y = Vec::load(k1 + i);
      (x * c - y * s).store(k0 + i);
      Vec::fma(x, s, y * c).store(k1 + i);
    }
    for (; i < a_.angles; ++i) {
      const float x = k0[i], y = k1[i];
      k0[i] = x * cos[i] - y * sin[i];
      k1[i] = x * sin[i] + y * cos[i];
    }
  }

  // ---- both directions -------------------------------------------------------------------------

  // history_ = the decay from every position before a step up to it; 0 for those that are not before.
  void pass(int64_t step) {
    const Vec decay = Vec::all(decay_[step]);
    const int64_t before = step * a_.rank;
    for (int64_t j = 0; j < before; j += Vec::size)
      (Vec::load(history_ + j) * decay).store(history_ + j);
    for (int64_t j = max64(0, before - a_.rank); j < before; ++j) history_[j] = decay_[step];
  }

  void end_of_history(int64_t size) {  // up to the end of the chunk
    for (int64_t j = (size - 1) * a_.rank; j < size * a_.rank; ++j) history_[j] = 1;
  }

  // state = its decay over the chunk times state + keys^T values, all decayed to the chunk's end.
  void add_to_state(int64_t size, bool has_state, const Matrix& state) const {
    const int64_t end = round_up(size * a_.rank, kT);
    for (int64_t j = 0; j < end; ++j)
      scale_row(v_.row(j), scaled_.row(j), wide_, history_[j] * scale_[j]);
    add_product(k_, scaled_, end, since_[size - 1], has_state, state);
  }

  // to = by to + rows^T columns
  void add_product(const Matrix& rows, const Matrix& columns, int64_t depth, float by, bool has_before,
                   const Matrix& to) const {
    if (has_before) {
      for (int64_t n = 0; n < states_; ++n) scale_row(to.row(n), to.row(n), wide_, by);
      multiply<true>(rows.at, 1, rows.stride, columns.at, columns.stride, to.at, to.stride, states_,
                     depth, wide_);
    } else {
      multiply<false>(rows.at, 1, rows.stride, columns.at, columns.stride, to.at, to.stride, states_,
                      depth, wide_);
    }
  }

  static void scale_row(const float* from, float* to, int64_t count, float by) {
    const Vec factor = Vec::all(by);
    for (int64_t c = 0; c < count; c += Vec::size) (Vec::load(from + c) * factor).store(to + c);
  }

  static void add_row(const float* from, float* to, int64_t count, float by) {
    const Vec factor = Vec::all(by);
    for (int64_t c = 0; c < count; c += Vec::size)
      Vec::fma(Vec::load(from + c), factor, Vec::load(to + c)).store(to + c);
  }

  static float dot(const float* a, const float* b, int64_t count) {
    Vec sum = Vec::zero();
    for (int64_t c = 0; c < count; c += Vec::size)
      sum = Vec::fma(Vec::load(a + c), Vec::load(b + c), sum);
    return sum.sum();
  }

  // ---- forward ---------------------------------------------------------------------------------

  void forward_chunk(int64_t start, int64_t size, bool has_state) {
    const int64_t count = size * a_.rank, end = round_up(count, kT);
    transpose(k_.at, k_.stride, k_transposed_.at, k_transposed_.stride, end, states_);
    fill_zero(history_, end);
    for (int64_t past = 0; past < end; past += kT) {
      const int64_t next = past + kT, last = min64(next, count);
      multiply<false>(q_.row(past), q_.stride, 1, k_transposed_.at, k_transposed_.stride, m_.at,
                      m_.stride, kT, states_, next);
      for (int64_t i = past; i < last; ++i) {
        const int64_t step = i / a_.rank, first = step * a_.rank;
        if (i == first) pass(step);
        float *row = m_.row(i - past), same[kT];
        for (int64_t j = 0; j < a_.rank; ++j) same[j] = row[first + j] * own_[step];
        for (int64_t j = 0; j < next; j += Vec::size)
          (Vec::load(row + j) * Vec::load(history_ + j) * Vec::load(scale_ + j)).store(row + j);
        for (int64_t j = 0; j < a_.rank; ++j) row[first + j] = same[j];
        row[i] += skip_;
      }
      if (has_state) {
        multiply<false>(q_, past, 0, state_, 0, out_, kT, states_);
        for (int64_t i = past; i < last; ++i)
          scale_row(out_.row(i - past), out_.row(i - past), wide_, since_[i / a_.rank]);
        multiply<true>(m_, 0, 0, v_, 0, out_, kT, next);
      } else {
        multiply<false>(m_, 0, 0, v_, 0, out_, kT, next);
      }
      for (int64_t i = past; i < last; ++i)
        std::memcpy(channels_of(a_.y, begin_ + start + i / a_.rank, i % a_.rank), out_.row(i - past),
                    sizeof(float) * a_.headdim);
    }
    end_of_history(size);
  }

  // ---- backward --------------------------------------------------------------------------------

  Matrix start_of(int64_t chunk) const {  // the state before a chunk, the first excepted
    return {starts_ + (chunk - 1) * states_ * state_.stride, state_.columns, state_.stride};
  }

  void backward_sequence(int64_t count) {
    const int64_t chunks = ceil_div(count, steps_);
    for (int64_t k = 0; k + 1 < chunks; ++k) {
      load(k * steps_, steps_, true);
      load_rows(a_.b, a_.b_batch, a_.b_time, k_bias_, k * steps_, steps_, k_);
      fill_zero(history_, steps_ * a_.rank);
      for (int64_t step = 0; step < steps_; ++step) pass(step);
      end_of_history(steps_);
      const Matrix next = start_of(k + 1);
      if (k > 0) std::memcpy(next.at, start_of(k).at, sizeof(float) * states_ * next.stride);
      add_to_state(steps_, k > 0, next);
    }
    for (int64_t k = chunks - 1; k >= 0; --k) {
      const int64_t size = min64(steps_, count - k * steps_);
      const bool more = k + 1 < chunks;
      backward_chunk(k, size, more);
      if (k > 0) add_product(q_, scaled_, round_up(size * a_.rank, kT), since_[size - 1], more, dstate_);
    }
    a_.dpast[head_at(begin_)] = 0;
  }

  // Gradients of a chunk's inputs; dstate_ is that of the state after it, if there is `more`. After the
  // first chunk, leaves in scaled_ dy decayed to the chunk's start.
  void backward_chunk(int64_t k, int64_t size, bool more) {
    const int64_t start = k * steps_, count = size * a_.rank, end = round_up(count, kT);
    load(start, size, more);
    load_rows(a_.b, a_.b_batch, a_.b_time, k_bias_, start, size, k_);
    load_rows(a_.c, a_.c_batch, a_.c_time, q_bias_, start, size, q_);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = begin_ + start + i / a_.rank;
      std::memcpy(dy_.row(i), channels_of(a_.dy, a_.dy_batch, a_.dy_time, t, i % a_.rank),
                  sizeof(float) * a_.headdim);
    }
    for (int64_t i = count; i < end; ++i) fill_zero(dy_.row(i), wide_);

    weigh_pairs(count, end);
    for (int64_t b = 0; b < end; b += kT) {
      const int64_t next = b + kT, left = end - b;
      multiply<false>(m_.row(b) + b, 1, m_.stride, dy_.row(b), dy_.stride, out_.row(b), out_.stride,
                      kT, left, wide_);
      multiply<false>(dpairs_.row(b) + b, 1, dpairs_.stride, q_.row(b), q_.stride, dk_.row(b),
                      dk_.stride, kT, left, states_);
      multiply<false>(dpairs_.row(b), dpairs_.stride, 1, k_.at, k_.stride, dq_.row(b), dq_.stride, kT,
                      next, states_);
    }
    fill_zero(columns_, end);
    fill_zero(ended_, end);
    float through = 0;
    if (more) {
      end_of_history(size);
      give_to_state(end);
      if (k > 0)
        for (int64_t n = 0; n < states_; ++n)
          through += dot(start_of(k).row(n), dstate_.row(n), wide_);
      through *= since_[size - 1];
    }
    if (k > 0) take_from_state(start_of(k), count, end);
    write_steps(start, size, through, more);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = begin_ + start + i / a_.rank, r = i % a_.rank;
      float* dangle = a_.dangle + head_at(t) * a_.angles;
      if (r == 0) fill_zero(dangle, a_.angles);
      std::memcpy(channels_of(a_.dx, t, r), out_.row(i), sizeof(float) * a_.headdim);
      write_states(k_.row(i), dk_.row(i), t, r, dangle, dk_bias_, a_.db);
      write_states(q_.row(i), dq_.row(i), t, r, dangle, dq_bias_, a_.dc);
    }
  }

  // m_ as in the forward pass; dpairs_, the gradients of the products Q.K; terms_, those of the weights'
  // decays but for the scale; those of own and skip.
  void weigh_pairs(int64_t count, int64_t end) {
    transpose(k_.at, k_.stride, k_transposed_.at, k_transposed_.stride, end, states_);
    transpose(v_.at, v_.stride, v_transposed_.at, v_transposed_.stride, end, wide_);
    fill_zero(history_, end);
    for (int64_t past = 0; past < end; past += kT) {
      const int64_t next = past + kT, last = min64(next, count);
      multiply<false>(q_.row(past), q_.stride, 1, k_transposed_.at, k_transposed_.stride, m_.row(past),
                      m_.stride, kT, states_, next);
      multiply<false>(dy_.row(past), dy_.stride, 1, v_transposed_.at, v_transposed_.stride, dm_.at,
                      dm_.stride, kT, wide_, next);
      for (int64_t i = past; i < last; ++i) {
        const int64_t step = i / a_.rank, first = step * a_.rank;
        if (i == first) {
          pass(step);
          down_[step] = 0;
        }
        float *m = m_.row(i), *dpairs = dpairs_.row(i), *terms = terms_.row(i), same[kT];
        const float* dm = dm_.row(i - past);
        for (int64_t j = 0; j < a_.rank; ++j) same[j] = m[first + j];
        for (int64_t j = 0; j < next; j += Vec::size) {
          const Vec decay = Vec::load(history_ + j), weight = decay * Vec::load(scale_ + j);
          const Vec product = Vec::load(m + j), d = Vec::load(dm + j);
          (product * decay * d).store(terms + j);
          (product * weight).store(m + j);
          (d * weight).store(dpairs + j);
        }
        for (int64_t j = 0; j < a_.rank; ++j) {
          down_[step] += same[j] * dm[first + j];
          m[first + j] = same[j] * own_[step];
          dpairs[first + j] = dm[first + j] * own_[step];
        }
        m[i] += skip_;
        dskip_ += dm[i];
      }
      for (int64_t i = last; i < next; ++i) {
        fill_zero(m_.row(i), next);
        fill_zero(dpairs_.row(i), next);
      }
    }
  }

  // What keys and values get from the state after the chunk.
  void give_to_state(int64_t end) {
    transpose(dstate_.at, dstate_.stride, square_.at, square_.stride, states_, wide_);
    multiply<false>(v_, 0, 0, square_, 0, from_state_, end, wide_);
    multiply<false>(k_, 0, 0, dstate_, 0, scaled_, end, states_);
    for (int64_t j = 0; j < end; ++j) {
      const float weight = history_[j] * scale_[j];
      add_row(from_state_.row(j), dk_.row(j), states_, weight);
      add_row(scaled_.row(j), out_.row(j), wide_, weight);
      columns_[j] = history_[j] * dot(from_state_.row(j), k_.row(j), states_);
    }
  }

  // What queries get from the state before the chunk.
  void take_from_state(const Matrix& state, int64_t count, int64_t end) {
    transpose(state.at, state.stride, square_.at, square_.stride, states_, wide_);
    for (int64_t i = 0; i < end; ++i)
      scale_row(dy_.row(i), scaled_.row(i), wide_, i < count ? since_[i / a_.rank] : 0.f);
    multiply<false>(scaled_, 0, 0, square_, 0, from_state_, end, wide_);
    for (int64_t i = 0; i < count; ++i) {
      add_row(from_state_.row(i), dq_.row(i), states_, 1.f);
      ended_[i] = dot(from_state_.row(i), q_.row(i), states_);
    }
  }

  // Gradients of decays and scales. columns_ sums the terms of each position with all later steps.
  void write_steps(int64_t start, int64_t size, float through, bool more) {
    for (int64_t step = size - 1; step >= 0; --step) {
      const int64_t t = begin_ + start + step, at = head_at(t), first = step * a_.rank;
      float dscale = 0;
      for (int64_t j = first; j < first + a_.rank; ++j) {
        dscale += columns_[j];
        columns_[j] = 0;
        through += ended_[j];
      }
      for (int64_t i = first; i < first + a_.rank; ++i)
        add_row(terms_.row(i), columns_, round_up(first, Vec::size), 1.f);
      a_.down[at] = down_[step] + dscale;
      if (step + 1 < size || more) a_.dpast[head_at(t + 1)] = dscale;
      a_.dlog_decay[at] = through + dot(scale_, columns_, round_up(first, Vec::size));
    }
  }

  // A row of B's or C's gradient, from that of the rotated row.
  void write_states(const float* rotated, float* d, int64_t t, int64_t r, float* dangle, float* dbias,
                    float* to) const {
    const float* cos = a_.cos + head_at(t) * a_.angles;
    const float* sin = a_.sin + head_at(t) * a_.angles;
    int64_t i = 0;
    for (; i + Vec::size <= a_.angles; i += Vec::size) {
      const Vec c = Vec::load(cos + i), s = Vec::load(sin + i);
      const Vec x = Vec::load(d + i), y = Vec::load(d + half_ + i);
      const Vec turned = y * Vec::load(rotated + i) - x * Vec::load(rotated + half_ + i);
      (Vec::load(dangle + i) + turned).store(dangle + i);
      Vec::fma(x, c, y * s).store(d + i);
      (y * c - x * s).store(d + half_ + i);
    }
    for (; i < a_.angles; ++i) {
      const float x = d[i], y = d[half_ + i];
      dangle[i] += y * rotated[i] - x * rotated[half_ + i];
      d[i] = x * cos[i] + y * sin[i];
      d[half_ + i] = y * cos[i] - x * sin[i];
    }
    add_row(d, dbias + r * states_, states_, 1.f);
    float* row = states_of(to, t, r);
    if (head_ == 0) {
      to_outside(d, row);
    } else if (a_.halves) {
      for (int64_t n = 0; n < a_.states; ++n) row[n] += d[n];
    } else {
      for (int64_t n = 0; n < half_; ++n) {
        row[2 * n] += d[n];
        row[2 * n + 1] += d[half_ + n];
      }
    }
  }

  const Args& a_;
  const int64_t wide_, states_;  // headdim and states in whole kT
  const int64_t half_, steps_;   // pairs of states, steps of a chunk
  int64_t batch_ = 0, group_ = 0, head_ = 0;
  int64_t begin_ = 0;  // of the present sequence, in the row
  float skip_ = 0;
  double dskip_ = 0;
  Matrix k_, q_, v_, k_transposed_, v_transposed_, dy_, dk_, dq_;
  Matrix m_, dm_, dpairs_, terms_;  // positions against positions
  Matrix out_, scaled_, from_state_, state_, dstate_, square_;
  float *decay_ = nullptr, *since_ = nullptr, *own_ = nullptr, *down_ = nullptr;        // of steps
  float *scale_ = nullptr, *history_ = nullptr, *columns_ = nullptr, *ended_ = nullptr;  // of positions
  float *k_bias_ = nullptr, *q_bias_ = nullptr, *dk_bias_ = nullptr, *dq_bias_ = nullptr;
  float* starts_ = nullptr;
};

int for_all_groups(const Args& a, bool backward) {
  if (a.batch < 0 || a.length < 0 || a.groups < 1 || a.heads < 1 || a.headdim < 1 || a.states < 2 ||
      a.states % 2 != 0 || a.angles < 0 || a.angles > a.states / 2 || a.rank < 1 || kT % a.rank != 0 ||
      a.sharing < 1 || a.groups % a.sharing != 0 || a.chunk < kT || a.chunk % kT != 0)
    return RECSYS_BAD_ARGUMENTS;
  Arena count{nullptr};
  Group(a, backward, count);
  RecsysStatus status = RECSYS_OK;
  parallel_for(a.threads, a.batch * a.groups, [&](int64_t task) {
    Arena arena{static_cast<float*>(recsys_scratch(sizeof(float) * count.used))};
    if (arena.memory == nullptr) {
      status = RECSYS_NO_MEMORY;
      return;
    }
    Group group(a, backward, arena);
    group.choose(task / a.groups, task % a.groups);
    backward ? group.backward() : group.forward();
  });
  return status;
}

}  // namespace

RECSYS_KERNEL(recsys_trapezoidal_ssd_forward)(const TrapezoidalSsdArgs* args) {
  return for_all_groups(*args, false);
}

RECSYS_KERNEL(recsys_trapezoidal_ssd_backward)(const TrapezoidalSsdArgs* args) {
  return for_all_groups(*args, true);
}
