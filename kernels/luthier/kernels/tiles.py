"""What the Triton faces of the matmul operators share on the device: tiles of matrices and of random words."""

import triton
import triton.language as tl


@triton.jit
def tile(base, rows, columns, stride, row_limit, column_limit):
    """Elements [rows, columns] of a row-major matrix; zero beyond its limits."""
    mask = (rows[:, None] < row_limit) & (columns[None, :] < column_limit)
    return tl.load(base + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def turned_tile(base, rows, columns, stride, row_limit, column_limit):
    """The same elements as [columns, rows]."""
    mask = (rows[None, :] < row_limit) & (columns[:, None] < column_limit)
    return tl.load(base + rows[None, :].to(tl.int64) * stride + columns[:, None], mask=mask, other=0.0)


@triton.jit
def inner_tile(base, rows, columns, stride, column_limit, EVEN: tl.constexpr):
    """Elements [rows, columns] where all rows exist; zero beyond the columns' limit, which EVEN says is not met."""
    pointers = base + rows[:, None].to(tl.int64) * stride + columns[None, :]
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=columns[None, :] < column_limit, other=0.0)


@triton.jit
def outer_tile(base, rows, columns, stride, row_limit, EVEN: tl.constexpr):
    """Elements [rows, columns] where all columns exist; zero beyond the rows' limit, which EVEN says is not met."""
    pointers = base + rows[:, None].to(tl.int64) * stride + columns[None, :]
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=rows[:, None] < row_limit, other=0.0)


@triton.jit
def place(num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """The tile of this program, as `place_of` counts them."""
    return place_of(tl.program_id(0), num_rows, num_columns, ROWS, COLUMNS, GROUP)


@triton.jit
def place_of(index, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """The tile of this index: GROUP tiles of rows share their columns before the next columns come."""
    tiles_m = tl.cdiv(num_rows, ROWS)
    tiles_n = tl.cdiv(num_columns, COLUMNS)
    group = index // (GROUP * tiles_n)
    first = group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    inside = index % (GROUP * tiles_n)
    return first + inside % height, inside // height


@triton.jit
def kept_tile(
    first_row,
    first_column,
    row0,
    seed,
    stream,
    threshold,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Which elements of a tile dropout keeps, by the counters of `lora_linear.reference.dropout_mask`.

    COLUMNS and first_column are multiples of 4: one counter makes the words of four columns.
    """
    rows = (row0 + first_row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    groups = (first_column // 4 + tl.arange(0, COLUMNS // 4))[None, :]
    zeros = tl.zeros([ROWS, COLUMNS // 4], dtype=tl.uint32)
    low = (rows & 0xFFFFFFFF).to(tl.uint32) + zeros
    high = (rows >> 32).to(tl.uint32) + zeros
    w0, w1, w2, w3 = tl.philox(seed, groups.to(tl.uint32) + zeros, low, high, stream.to(tl.uint32) + zeros)
    # The last two dimensions are (first or second pair, first or second of the pair): columns in order.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(words, [ROWS, COLUMNS]) >= threshold.to(tl.uint32)
