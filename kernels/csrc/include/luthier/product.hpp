#pragma once

#include <cstdint>

#include "luthier/cpuid.hpp"
#include "luthier/dtype.hpp"

namespace luthier {

// A matrix of 8 or 4 bits, as Dequantise has them: `codes` are dense, and a block's elements follow one another, row
// after row. Without codes there is none.
struct Codes {
  const void* codes = nullptr;
  const float* levels = nullptr;
  const float* scales = nullptr;
  int64_t block = 0;
};

// rows[num_rows][contracted] times matrix[contracted][num_columns], or, transposed, times the transpose of
// matrix[num_columns][contracted]. Strides are in elements, from row to row; elements of a row are adjacent.
// A term may belong to some rows alone, [first_row, end_row), and its matrix may have fewer columns than the result.
// With `quantised` the elements of the matrix, whose rows are `matrix_stride` long, are what dequantise makes of the
// codes, to the bit; they are made piece by piece where they are multiplied, and `matrix` is null.
struct Term {
  const void* rows;
  int64_t rows_stride;
  const void* matrix;
  int64_t matrix_stride;
  int64_t contracted;
  bool transposed;
  int64_t first_row = 0, end_row = INT64_MAX, num_columns = INT64_MAX;
  Codes quantised = {};
};

// out[num_rows][num_columns] = sum of the terms + bias[num_columns] + addend[num_rows][num_columns], the last two where
// given. Everything has `dtype`; sums are float32, rounded once at the end, or with `float_out` not at all: out is
// float.
struct Product {
  const Term* terms;
  int num_terms;
  int64_t num_rows, num_columns;
  const void* bias;
  const void* addend;
  int64_t addend_stride;
  void* out;
  int64_t out_stride;
  Dtype dtype;
  bool float_out = false;
};

// An element's bits depend neither on the number of threads nor on the other rows.
void product(const Product& problem, Isa isa, int num_threads);

// out[rank][num_columns] (float32, dense) = scale * transpose of left[num_rows][rank] times
// right[num_rows][num_columns]; transposed, out[num_columns][rank] is the transpose of that.
struct Gram {
  const void* left;
  int64_t left_stride;
  const void* right;
  int64_t right_stride;
  int64_t num_rows, rank, num_columns;
  float scale;
  float* out;
  bool transposed;
  Dtype dtype;
};

// All problems have the type of the first. The bits of a result depend neither on the number of threads nor on the
// other problems.
void gram(const Gram* problems, int num_problems, Isa isa, int num_threads);

}  // namespace luthier
