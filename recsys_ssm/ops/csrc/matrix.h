// Small dense matrices of floats, and the products that the kernels of state space duality need.
#pragma once

#include "rows.h"

namespace {

constexpr int64_t kT = 16;  // rows and columns are multiples of it; positions a block

// A matrix with rows `stride` apart. Columns are a multiple of kT, the stride is that and kT more:
// a stride that is a power of two would put a whole column into a few sets of the cache.
struct Matrix {
  float* at = nullptr;
  int64_t columns = 0, stride = 0;

  RECSYS_INLINE float* row(int64_t i) const { return at + i * stride; }
};

// Hands out scratch memory; a first pass without memory counts it.
struct Arena {
  float* memory;
  int64_t used = 0;

  float* floats(int64_t count) {
    float* at = memory == nullptr ? nullptr : memory + used;
    used += round_up(count, kT);
    return at;
  }
  Matrix matrix(int64_t rows, int64_t columns) {
    const int64_t stride = columns + kT;
    return {floats(rows * stride), columns, stride};
  }
};

#if defined(RECSYS_ISA_AVX2) || !(defined(RECSYS_ISA_AVX512) || defined(RECSYS_NEON))
constexpr int kRows = 4;  // sixteen registers
#else
constexpr int kRows = 8;
#endif
constexpr int kCols = 2;

// One tile of the product below: kRows rows, `Cols` vectors.
template <bool kAdd, int Cols>
RECSYS_INLINE void multiply_tile(const float* left, int64_t left_row, int64_t left_col,
                                 const float* right, int64_t right_stride, int64_t depth, float* out,
                                 int64_t out_stride) {
  Vec sum[kRows][Cols];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < Cols; ++j)
      sum[i][j] = kAdd ? Vec::load(out + i * out_stride + j * Vec::size) : Vec::zero();
  for (int64_t k = 0; k < depth; ++k) {
    Vec from[Cols];
    for (int j = 0; j < Cols; ++j) from[j] = Vec::load(right + k * right_stride + j * Vec::size);
    for (int i = 0; i < kRows; ++i) {
      const Vec factor = Vec::all(left[i * left_row + k * left_col]);
      for (int j = 0; j < Cols; ++j) sum[i][j] = Vec::fma(factor, from[j], sum[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < Cols; ++j) sum[i][j].store(out + i * out_stride + j * Vec::size);
}

// out (rows, columns) = or += left (rows, depth) right (depth, columns); left may lie transposed:
// element (i, k) is at left[i * left_row + k * left_col]. Rows and columns are multiples of kT.
template <bool kAdd>
void multiply(const float* left, int64_t left_row, int64_t left_col, const float* right,
              int64_t right_stride, float* out, int64_t out_stride, int64_t rows, int64_t depth,
              int64_t columns) {
  int64_t c = 0;
  for (; c + kCols * Vec::size <= columns; c += kCols * Vec::size)
    for (int64_t i = 0; i < rows; i += kRows)
      multiply_tile<kAdd, kCols>(left + i * left_row, left_row, left_col, right + c, right_stride,
                                 depth, out + i * out_stride + c, out_stride);
  for (; c < columns; c += Vec::size)
    for (int64_t i = 0; i < rows; i += kRows)
      multiply_tile<kAdd, 1>(left + i * left_row, left_row, left_col, right + c, right_stride, depth,
                             out + i * out_stride + c, out_stride);
}

// to (columns, rows) = the transpose of from (rows, columns), in squares that stay in registers.
void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows,
               int64_t columns) {
  constexpr int64_t kSquare = 4;
  for (int64_t i = 0; i < rows; i += kSquare)
    for (int64_t j = 0; j < columns; j += kSquare) {
      float square[kSquare][kSquare];
      for (int64_t p = 0; p < kSquare; ++p)
        for (int64_t q = 0; q < kSquare; ++q) square[q][p] = from[(i + p) * from_stride + j + q];
      for (int64_t q = 0; q < kSquare; ++q)
        std::memcpy(to + (j + q) * to_stride + i, square[q], sizeof square[q]);
    }
}

// out (rows, columns) = or += left right, of blocks of matrices.
template <bool kAdd>
void multiply(const Matrix& left, int64_t left_row, int64_t left_col, const Matrix& right,
              int64_t right_row, const Matrix& out, int64_t rows, int64_t depth) {
  multiply<kAdd>(left.row(left_row) + left_col, left.stride, 1, right.row(right_row), right.stride,
                 out.at, out.stride, rows, depth, out.columns);
}

}  // namespace
