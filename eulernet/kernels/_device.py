"""What runs on the GPU. All arithmetic is in T: float32, or float64 where an operand is.

A program handles a tile of BR rows and BC columns of the walk that `_layout` describes: a row is an inner axis of C
neighbours in memory, R = outer * M of them. Offsets are 64-bit from the row on; what the kernels write is dense, so
that its offset is row * C + column. SPLIT: the outer axis is larger than 1.
"""

import triton
import triton.language as tl

NONE, RELU, SILU, GELU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # ACT


@triton.jit
def _rows(tile, M, R, SPLIT: tl.constexpr, BR: tl.constexpr):
    """The rows of a tile, their positions on the outer and the middle axis, and which of them exist."""
    row = tl.cast(tile, tl.int64) * BR + tl.arange(0, BR)
    if SPLIT:
        outer = row // M
        middle = row - outer * M
    else:
        outer = tl.zeros_like(row)
        middle = row
    return row, outer, middle, row < R


@triton.jit
def _small(p, AXIS: tl.constexpr, outer, middle, column, rows, columns, T: tl.constexpr):
    """A small operand, spread over a tile."""
    if AXIS == -2:
        return tl.load(p).to(T)
    elif AXIS == 2:
        return tl.load(p + column, mask=columns, other=0)[None, :].to(T)
    elif AXIS == 1:
        return tl.load(p + middle, mask=rows, other=0)[:, None].to(T)
    else:
        return tl.load(p + outer, mask=rows, other=0)[:, None].to(T)


@triton.jit
def _activation(z, ACT: tl.constexpr):
    if ACT == RELU:
        return tl.where(z <= 0, 0, z)  # a NaN stays one
    elif ACT == SILU:
        return z / (1 + tl.exp(-z))
    elif ACT == GELU:
        return z * 0.5 * (1 + tl.erf(z * 0.7071067811865476))
    else:
        return z


@triton.jit
def _slope(z, ACT: tl.constexpr):
    """The derivative of the activation."""
    if ACT == SILU:
        s = 1 / (1 + tl.exp(-z))
        return s * (1 + z * (1 - s))
    else:
        return 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(z * z * -0.5) * 0.3989422804014327


@triton.jit
def step_forward(
    skip, branch, scale, mask, out, alpha, M, C, R, skip_outer, skip_middle, branch_outer, branch_middle,
    SCALE: tl.constexpr, MASK: tl.constexpr, ACT: tl.constexpr, SPLIT: tl.constexpr, T: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out = act(skip + alpha * scale * mask * branch)"""
    blocks = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    row, outer, middle, rows = _rows(pid // blocks, M, R, SPLIT, BR)
    first = tl.cast(pid % blocks, tl.int64) * BC
    column = tl.arange(0, BC)
    columns = column < C - first
    inside = rows[:, None] & columns[None, :]
    s = tl.load(skip + first + (outer * skip_outer + middle * skip_middle)[:, None] + column[None, :], mask=inside)
    b = tl.load(
        branch + first + (outer * branch_outer + middle * branch_middle)[:, None] + column[None, :], mask=inside
    )
    factor = alpha
    if SCALE != -1:
        factor = factor * _small(scale, SCALE, outer, middle, first + column, rows, columns, T)
    if MASK != -1:
        factor = factor * _small(mask, MASK, outer, middle, first + column, rows, columns, T)
    y = _activation(s.to(T) + factor * b.to(T), ACT)
    tl.store(out + first + (row * C)[:, None] + column[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def step_backward(
    grad, skip, branch, out, scale, mask, skip_grad, branch_grad, scale_parts, alpha,
    M, C, R, skip_outer, skip_middle, branch_outer, branch_middle, tiles,
    SCALE: tl.constexpr, MASK: tl.constexpr, ACT: tl.constexpr, SPLIT: tl.constexpr, T: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradients that are asked for (not None); that of scale in parts, which are yet to be summed.

    A program goes over `tiles` tiles of the same columns. The parts are one for each program and column where scale
    varies along the columns, one for each row and block of columns where it varies along rows, else one a program.
    """
    blocks = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    lane = pid // blocks
    lanes = tl.num_programs(0) // blocks
    first = tl.cast(pid % blocks, tl.int64) * BC
    column = tl.arange(0, BC)
    columns = column < C - first
    total = tl.zeros([BR, BC], T)
    for tile in range(0, tiles):
        row, outer, middle, rows = _rows(lane + tile * lanes, M, R, SPLIT, BR)
        inside = rows[:, None] & columns[None, :]
        here = first + (row * C)[:, None] + column[None, :]
        g = tl.load(grad + here, mask=inside, other=0).to(T)
        factor = tl.full([1, 1], 1, T) * alpha
        if MASK != -1:
            factor = factor * _small(mask, MASK, outer, middle, first + column, rows, columns, T)
        unscaled = factor
        if SCALE != -1:
            factor = factor * _small(scale, SCALE, outer, middle, first + column, rows, columns, T)
        if branch is not None:
            there = first + (outer * branch_outer + middle * branch_middle)[:, None] + column[None, :]
            b = tl.load(branch + there, mask=inside, other=0).to(T)
        if ACT == RELU:
            g = tl.where(tl.load(out + here, mask=inside, other=0) <= 0, 0, g)
        elif ACT != NONE:
            there = first + (outer * skip_outer + middle * skip_middle)[:, None] + column[None, :]
            g = g * _slope(tl.load(skip + there, mask=inside, other=0).to(T) + factor * b, ACT)
        if skip_grad is not None:
            tl.store(skip_grad + here, g.to(skip_grad.dtype.element_ty), mask=inside)
        if branch_grad is not None:
            tl.store(branch_grad + here, (factor * g).to(branch_grad.dtype.element_ty), mask=inside)
        if scale_parts is not None:
            part = unscaled * g * b
            if SCALE == 0 or SCALE == 1:
                tl.store(scale_parts + row * blocks + pid % blocks, tl.sum(part, 1), mask=rows)
            else:
                total += part
    if scale_parts is not None:
        if SCALE == 2:
            tl.store(scale_parts + tl.cast(lane, tl.int64) * C + first + column, tl.sum(total, 0), mask=columns)
        elif SCALE == -2:
            tl.store(scale_parts + pid, tl.sum(total))


@triton.jit
def norm_forward(
    skip, branch, scale, weight, bias, stream, normed, mean, rstd, alpha, M, C, R,
    skip_outer, skip_middle, branch_outer, branch_middle,
    SCALE: tl.constexpr, CENTRED: tl.constexpr, EPS: tl.constexpr, SPLIT: tl.constexpr, T: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """stream = skip + alpha * scale * branch, and its norm over the columns, which fit into one tile."""
    row, outer, middle, rows = _rows(tl.program_id(0), M, R, SPLIT, BR)
    column = tl.arange(0, BC)
    columns = column < C
    inside = rows[:, None] & columns[None, :]
    here = (row * C)[:, None] + column[None, :]
    s = tl.load(skip + (outer * skip_outer + middle * skip_middle)[:, None] + column[None, :], mask=inside, other=0)
    b = tl.load(
        branch + (outer * branch_outer + middle * branch_middle)[:, None] + column[None, :], mask=inside, other=0
    )
    factor = alpha
    if SCALE != -1:
        factor = factor * _small(scale, SCALE, outer, middle, column, rows, columns, T)
    z = (s.to(T) + factor * b.to(T)).to(stream.dtype.element_ty)
    tl.store(stream + here, z, mask=inside)
    z = z.to(T)  # the norm sees the state as it is kept
    if CENTRED:
        average = tl.sum(z, 1) / C
        tl.store(mean + row, average, mask=rows)
        z = tl.where(inside, z - average[:, None], 0)
    r = 1 / tl.sqrt(tl.sum(z * z, 1) / C + EPS)
    tl.store(rstd + row, r, mask=rows)
    y = z * r[:, None]
    if weight is not None:
        y = y * tl.load(weight + column, mask=columns, other=0)[None, :].to(T)
    if bias is not None:
        y = y + tl.load(bias + column, mask=columns, other=0)[None, :].to(T)
    tl.store(normed + here, y.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward(
    stream_grad, normed_grad, stream, branch, scale, weight, mean, rstd,
    skip_grad, branch_grad, scale_parts, weight_parts, bias_parts, alpha, M, C, R, branch_outer, branch_middle, tiles,
    SCALE: tl.constexpr, SPLIT: tl.constexpr, T: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradients that are asked for; those of scale, weight and bias in parts, one for each program and column."""
    pid = tl.program_id(0)
    column = tl.arange(0, BC)
    columns = column < C
    scale_total = tl.zeros([BR, BC], T)
    weight_total = tl.zeros([BR, BC], T)
    bias_total = tl.zeros([BR, BC], T)
    for tile in range(0, tiles):
        row, outer, middle, rows = _rows(pid + tile * tl.num_programs(0), M, R, SPLIT, BR)
        inside = rows[:, None] & columns[None, :]
        here = (row * C)[:, None] + column[None, :]
        g = tl.load(normed_grad + here, mask=inside, other=0).to(T)
        z = tl.load(stream + here, mask=inside, other=0).to(T)
        r = tl.load(rstd + row, mask=rows, other=0)[:, None]
        if mean is not None:
            z = tl.where(inside, z - tl.load(mean + row, mask=rows, other=0)[:, None], 0)
        z = z * r
        if weight_parts is not None:
            weight_total += g * z
        if bias_parts is not None:
            bias_total += g
        if weight is not None:
            g = g * tl.load(weight + column, mask=columns, other=0)[None, :].to(T)
        d = g - z * (tl.sum(g * z, 1) / C)[:, None]
        if mean is not None:
            d = d - (tl.sum(g, 1) / C)[:, None]
        d = d * r + tl.load(stream_grad + here, mask=inside, other=0).to(T)
        if skip_grad is not None:
            tl.store(skip_grad + here, d.to(skip_grad.dtype.element_ty), mask=inside)
        if branch_grad is not None:
            factor = tl.full([1, 1], 1, T) * alpha
            if SCALE != -1:
                factor = factor * _small(scale, SCALE, outer, middle, column, rows, columns, T)
            tl.store(branch_grad + here, (factor * d).to(branch_grad.dtype.element_ty), mask=inside)
        if scale_parts is not None:
            there = (outer * branch_outer + middle * branch_middle)[:, None] + column[None, :]
            scale_total += alpha * d * tl.load(branch + there, mask=inside, other=0).to(T)
    part = tl.cast(pid, tl.int64) * C + column
    if scale_parts is not None:
        tl.store(scale_parts + part, tl.sum(scale_total, 0), mask=columns)
    if weight_parts is not None:
        tl.store(weight_parts + part, tl.sum(weight_total, 0), mask=columns)
    if bias_parts is not None:
        tl.store(bias_parts + part, tl.sum(bias_total, 0), mask=columns)


@triton.jit
def bn_forward(
    skip, branch, mean, var, weight, bias, out, alpha, M, C, R, skip_outer, skip_middle, branch_outer, branch_middle,
    CHANNEL: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, SPLIT: tl.constexpr, T: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out = act(skip + alpha * ((branch - mean) / sqrt(var + EPS) * weight + bias)), all four along the axis CHANNEL"""
    blocks = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    row, outer, middle, rows = _rows(pid // blocks, M, R, SPLIT, BR)
    first = tl.cast(pid % blocks, tl.int64) * BC
    column = tl.arange(0, BC)
    columns = column < C - first
    inside = rows[:, None] & columns[None, :]
    s = tl.load(skip + first + (outer * skip_outer + middle * skip_middle)[:, None] + column[None, :], mask=inside)
    b = tl.load(
        branch + first + (outer * branch_outer + middle * branch_middle)[:, None] + column[None, :], mask=inside
    )
    factor = alpha / tl.sqrt(_small(var, CHANNEL, outer, middle, first + column, rows, columns, T) + EPS)
    if weight is not None:
        factor = factor * _small(weight, CHANNEL, outer, middle, first + column, rows, columns, T)
    y = s.to(T) + factor * (b.to(T) - _small(mean, CHANNEL, outer, middle, first + column, rows, columns, T))
    if bias is not None:
        y = y + alpha * _small(bias, CHANNEL, outer, middle, first + column, rows, columns, T)
    tl.store(
        out + first + (row * C)[:, None] + column[None, :], _activation(y, ACT).to(out.dtype.element_ty), mask=inside
    )
