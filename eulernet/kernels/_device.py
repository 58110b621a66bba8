"""What runs on the GPU. All arithmetic is in T: float32, or float64 where an operand is.

A program handles a tile of BR rows and BC columns of the walk that `_layout` describes: a row is an inner axis of C
neighbours in memory, R = outer * M of them (SPLIT: the bits that a row's number is divided with, 0 where the outer axis
is 1). Offsets are 64-bit. What the kernels write is dense: its offset is row * C + column.
"""

import triton
import triton.language as tl

NONE, RELU, SILU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # ACT; 3 is GELU


@triton.jit
def _rows(tile, M, R, SPLIT: tl.constexpr, BR: tl.constexpr):
    """The rows of a tile, their positions on the outer and the middle axis, and which of them exist."""
    row = tl.cast(tile, tl.int64) * BR + tl.arange(0, BR)
    if SPLIT == 0:
        outer = tl.zeros_like(row)
    elif SPLIT == 32:  # a division of 64 bits takes many times as long
        outer = tl.cast(tl.cast(row, tl.uint32) // tl.cast(M, tl.uint32), tl.int64)
    else:
        outer = row // M
    return row, outer, row - outer * M, row < R


@triton.jit
def _blocks(C, BC: tl.constexpr):
    """Those of BC columns in a row. `tl.cdiv` would add to C first, which can go beyond 32 bits."""
    return (C - 1) // BC + 1


@triton.jit
def _columns(block, C, BC: tl.constexpr):
    column = tl.cast(block, tl.int64) * BC + tl.arange(0, BC)
    return column, column < C


@triton.jit
def _load(p, mask, T: tl.constexpr):
    x = tl.load(p, mask=mask, other=0)
    if x.dtype == tl.bfloat16:
        x = x.to(tl.float32)  # from which the interpreter gets to float64
    return x.to(T)


@triton.jit
def _store(p, x, mask):
    if p.dtype.element_ty != tl.float64:
        x = x.to(tl.float32)
    tl.store(p, x.to(p.dtype.element_ty), mask=mask)


@triton.jit
def _operand(p, outer, middle, column, outer_stride, middle_stride, inside, T: tl.constexpr):
    return _load(p + (outer * outer_stride + middle * middle_stride)[:, None] + column[None, :], inside, T)


@triton.jit
def _small(p, AXIS: tl.constexpr, outer, middle, column, rows, columns, T: tl.constexpr):
    """A small operand, spread over a tile; 1 where it is absent.

    One along the columns is read for each row, as the tile is: else it would have to change threads.
    """
    if AXIS == -1:
        return tl.full([1, 1], 1, T)
    elif AXIS == -2:
        return tl.load(p).to(T)
    elif AXIS == 2:
        return _load(p + (tl.zeros([rows.shape[0], 1], tl.int64) + column[None, :]), columns[None, :], T)
    elif AXIS == 1:
        return _load(p + middle, rows, T)[:, None]
    else:
        return _load(p + outer, rows, T)[:, None]


@triton.jit
def _normal(z):
    """The distribution function of the normal distribution.

    In fp32 the logarithm of its lower tail is a polynomial, fitted so that GELU is at least as close to the true one as
    0.5 * (1 + erf(z / sqrt(2))) is, which takes twice as many instructions, and has no digits left in the tail.
    """
    if z.dtype == tl.float64:
        return 0.5 * (1 + tl.erf(z * 0.7071067811865476))
    else:
        u = tl.abs(z)
        p = 2.4553060939069837e-05 - 1.4978472790971864e-06 * u
        p = p * u - 0.0001213054420077242
        p = p * u - 0.0002803878451231867
        p = p * u + 0.007233578246086836
        p = p * u - 0.05260174348950386
        p = p * u - 0.45917776226997375
        p = p * u - 1.1511081457138062
        tail = tl.exp2(p * u - 1)
        return tl.where(z > 0, 1 - tail, tail)


@triton.jit
def _activation(z, ACT: tl.constexpr):
    if ACT == NONE:
        return z
    elif ACT == RELU:
        return tl.where(z <= 0, 0, z)  # a NaN stays one
    elif ACT == SILU:
        return z / (1 + tl.exp(-z))
    else:
        return z * _normal(z)


@triton.jit
def _slope(z, ACT: tl.constexpr):
    """The derivative of a smooth activation."""
    if ACT == SILU:
        s = 1 / (1 + tl.exp(-z))
        return s * (1 + z * (1 - s))
    else:
        return _normal(z) + z * tl.exp(z * z * -0.5) * 0.3989422804014327


@triton.jit
def step_forward(
    skip, branch, scale, mask, state, out, alpha, M, C, R, skip_outer, skip_middle, branch_outer, branch_middle,
    SCALE: tl.constexpr, MASK: tl.constexpr, ACT: tl.constexpr, SPLIT: tl.constexpr, T: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """state = skip + alpha * scale * mask * branch, kept if it is asked for (not None); out = act(state)"""
    pid, blocks = tl.program_id(0), _blocks(C, BC)
    row, outer, middle, rows = _rows(pid // blocks, M, R, SPLIT, BR)
    column, columns = _columns(pid % blocks, C, BC)
    inside = rows[:, None] & columns[None, :]
    s = _operand(skip, outer, middle, column, skip_outer, skip_middle, inside, T)
    b = _operand(branch, outer, middle, column, branch_outer, branch_middle, inside, T)
    factor = alpha * _small(scale, SCALE, outer, middle, column, rows, columns, T)
    factor = factor * _small(mask, MASK, outer, middle, column, rows, columns, T)
    here = (row * C)[:, None] + column[None, :]
    z = s + factor * b
    if state is not None:
        _store(state + here, z, inside)
    _store(out + here, _activation(z, ACT), inside)


@triton.jit
def step_backward(
    grad, branch, state, out, scale, mask, skip_grad, branch_grad, scale_parts, alpha,
    M, C, R, branch_outer, branch_middle, tiles,
    SCALE: tl.constexpr, MASK: tl.constexpr, ACT: tl.constexpr, SPLIT: tl.constexpr, T: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients that are asked for (not None); that of scale in parts, for `sum_parts`.

    A program goes over `tiles` tiles of the same columns. The parts are one for each program and column where scale
    varies along the columns, one for each row and block of columns where it varies along rows, else one a program.
    """
    pid, blocks = tl.program_id(0), _blocks(C, BC)
    block, lane, lanes = pid % blocks, pid // blocks, tl.num_programs(0) // blocks
    column, columns = _columns(block, C, BC)
    total = tl.zeros([BR, BC], T)
    row, outer, middle, rows = _rows(lane, M, R, SPLIT, BR)
    factor = _small(scale, SCALE, outer, middle, column, rows, columns, T)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        row, outer, middle, rows = _rows(lane + tile * lanes, M, R, SPLIT, BR)
        inside = rows[:, None] & columns[None, :]
        here = (row * C)[:, None] + column[None, :]
        g = _load(grad + here, inside, T)
        if scale_parts is not None:
            b = _operand(branch, outer, middle, column, branch_outer, branch_middle, inside, T)
        if ACT == RELU:
            g = tl.where(_load(out + here, inside, T) <= 0, 0, g)
        elif ACT != NONE:
            g = g * _slope(_load(state + here, inside, T), ACT)
        if skip_grad is not None:
            _store(skip_grad + here, g, inside)
        if MASK != -1:
            g = g * _small(mask, MASK, outer, middle, column, rows, columns, T)
        if branch_grad is not None:
            if SCALE == 0 or SCALE == 1:  # another one for each tile
                factor = _small(scale, SCALE, outer, middle, column, rows, columns, T)
            _store(branch_grad + here, alpha * factor * g, inside)
        if scale_parts is not None:
            if SCALE == 0 or SCALE == 1:
                tl.store(scale_parts + row * blocks + block, tl.sum(g * b, 1), mask=rows)
            else:
                total += g * b
    if scale_parts is not None:
        if SCALE == 2:
            tl.store(scale_parts + tl.cast(lane, tl.int64) * C + column, tl.sum(total, 0), mask=columns)
        elif SCALE == -2:
            tl.store(scale_parts + pid, tl.sum(total))


@triton.jit
def norm_forward(
    skip, branch, scale, mask, weight, bias, stream, normed, mean, rstd, alpha, M, C, R,
    skip_outer, skip_middle, branch_outer, branch_middle, normed_outer, normed_middle,
    SCALE: tl.constexpr, MASK: tl.constexpr, EPS: tl.constexpr, CENTRED: tl.constexpr, SPLIT: tl.constexpr,
    T: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """stream = skip + alpha * scale * mask * branch, and its norm over the columns, which fit into one tile.

    What was subtracted (CENTRED) and divided is kept if it is asked for (not None).
    """
    row, outer, middle, rows = _rows(tl.program_id(0), M, R, SPLIT, BR)
    column, columns = _columns(0, C, BC)
    inside = rows[:, None] & columns[None, :]
    here = (row * C)[:, None] + column[None, :]
    s = _operand(skip, outer, middle, column, skip_outer, skip_middle, inside, T)
    b = _operand(branch, outer, middle, column, branch_outer, branch_middle, inside, T)
    factor = alpha * _small(scale, SCALE, outer, middle, column, rows, columns, T)
    z = s + factor * _small(mask, MASK, outer, middle, column, rows, columns, T) * b
    _store(stream + here, z, inside)
    if stream.dtype.element_ty != tl.float64:  # the norm sees the state as it is kept
        z = z.to(stream.dtype.element_ty).to(tl.float32)
    if CENTRED:
        average = tl.sum(z, 1) / C
        if mean is not None:
            tl.store(mean + row, average, mask=rows)
        z = tl.where(inside, z - average[:, None], 0)
    r = 1 / tl.sqrt(tl.sum(z * z, 1) / C + EPS)
    if rstd is not None:
        tl.store(rstd + row, r, mask=rows)
    y = z * r[:, None]
    if weight is not None:
        y = y * _small(weight, 2, outer, middle, column, rows, columns, T)
    if bias is not None:
        y = y + _small(bias, 2, outer, middle, column, rows, columns, T)
    there = (outer * normed_outer + middle * normed_middle)[:, None] + column[None, :]
    _store(normed + there, y, inside)


@triton.jit
def norm_backward(
    stream_grad, normed_grad, stream, branch, scale, mask, weight, mean, rstd,
    skip_grad, branch_grad, scale_parts, weight_parts, bias_parts, alpha,
    M, C, R, branch_outer, branch_middle, normed_outer, normed_middle, tiles,
    SCALE: tl.constexpr, MASK: tl.constexpr, SPLIT: tl.constexpr, T: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients that are asked for; those of scale, weight and bias in parts, for `sum_parts`.

    The parts are one for each program and column, for a scale that is one number one a program. In the loop threads
    wait for one another once, for both sums over a row; all that is read is asked for before.
    """
    pid = tl.program_id(0)
    column, columns = _columns(0, C, BC)
    scale_total = tl.zeros([BR, BC], T)
    weight_total = tl.zeros([BR, BC], T)
    bias_total = tl.zeros([BR, BC], T)
    row, outer, middle, rows = _rows(pid, M, R, SPLIT, BR)
    gamma = _small(scale, SCALE, outer, middle, column, rows, columns, T)
    if weight is not None:
        factor = _small(weight, 2, outer, middle, column, rows, columns, T)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        row, outer, middle, rows = _rows(pid + tile * tl.num_programs(0), M, R, SPLIT, BR)
        inside = rows[:, None] & columns[None, :]
        here = (row * C)[:, None] + column[None, :]
        g = _operand(normed_grad, outer, middle, column, normed_outer, normed_middle, inside, T)
        z = _load(stream + here, inside, T)
        if stream_grad is not None:
            s = _load(stream_grad + here, inside, T)
        if scale_parts is not None:
            b = _operand(branch, outer, middle, column, branch_outer, branch_middle, inside, T)
        r = _load(rstd + row, rows, T)[:, None]
        if mean is not None:
            z = tl.where(inside, z - _load(mean + row, rows, T)[:, None], 0)
        z = z * r
        if weight_parts is not None:
            weight_total += g * z
        if bias_parts is not None:
            bias_total += g
        if weight is not None:
            g = g * factor
        if mean is not None:
            along, average = tl.split(tl.sum(tl.join(g * z, g), 1))
            d = g - z * (along / C)[:, None] - (average / C)[:, None]
        else:
            d = g - z * (tl.sum(g * z, 1) / C)[:, None]
        d = d * r
        if stream_grad is not None:
            d += s
        if skip_grad is not None:
            _store(skip_grad + here, d, inside)
        if MASK != -1:
            d = d * _small(mask, MASK, outer, middle, column, rows, columns, T)
        if branch_grad is not None:
            _store(branch_grad + here, alpha * gamma * d, inside)
        if scale_parts is not None:
            scale_total += d * b
    part = tl.cast(pid, tl.int64) * C + column
    if scale_parts is not None:
        if SCALE == -2:
            tl.store(scale_parts + pid, tl.sum(scale_total))
        else:
            tl.store(scale_parts + part, tl.sum(scale_total, 0), mask=columns)
    if weight_parts is not None:
        tl.store(weight_parts + part, tl.sum(weight_total, 0), mask=columns)
    if bias_parts is not None:
        tl.store(bias_parts + part, tl.sum(bias_total, 0), mask=columns)


@triton.jit
def _sum(parts, result, factor, block, P, C, B, BR: tl.constexpr, BC: tl.constexpr):
    column, columns = _columns(block, C, BC)
    total = tl.zeros([BR, BC], parts.dtype.element_ty)
    for first in range(0, P * B, BR):
        row = tl.cast(first, tl.int64) + tl.arange(0, BR)
        here = ((row // B) * C * B + row % B)[:, None] + (column * B)[None, :]
        total += tl.load(parts + here, mask=(row < P * B)[:, None] & columns[None, :], other=0)
    _store(result + column, factor * tl.sum(total, 0), columns)


@triton.jit
def sum_parts(
    scale_parts, weight_parts, bias_parts, scale_grad, weight_grad, bias_grad, alpha, P, C, B,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradients that are asked for, of parts of shape (P, C, B): their sums over P and B, that of scale * alpha.

    A program makes BC elements of one of them.
    """
    blocks = _blocks(C, BC)
    which, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if scale_parts is not None:
        if which == 0:
            _sum(scale_parts, scale_grad, alpha, block, P, C, B, BR, BC)
        which -= 1
    if weight_parts is not None:
        if which == 0:
            _sum(weight_parts, weight_grad, 1, block, P, C, B, BR, BC)
        which -= 1
    if bias_parts is not None:  # noqa: SIM102  # the compiler knows of this condition, not of the next one
        if which == 0:
            _sum(bias_parts, bias_grad, 1, block, P, C, B, BR, BC)


@triton.jit
def bn_forward(
    skip, branch, mean, var, weight, bias, out, alpha, M, C, R, skip_outer, skip_middle, branch_outer, branch_middle,
    CHANNEL: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr,
    SPLIT: tl.constexpr, T: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out = act(skip + alpha * ((branch - mean) / sqrt(var + EPS) * weight + bias)), these four along CHANNEL.

    Without CHANNEL the walk is one row of images, each of CHANNELS * PIXELS neighbours.
    """
    pid, blocks = tl.program_id(0), _blocks(C, BC)
    row, outer, middle, rows = _rows(pid // blocks, M, R, SPLIT, BR)
    column, columns = _columns(pid % blocks, C, BC)
    inside = rows[:, None] & columns[None, :]
    z = _operand(skip, outer, middle, column, skip_outer, skip_middle, inside, T)
    b = _operand(branch, outer, middle, column, branch_outer, branch_middle, inside, T)
    there = column
    if CHANNEL == -1:
        there = tl.cast(column, tl.int32) // PIXELS % CHANNELS
        AXIS: tl.constexpr = 2
    else:
        AXIS: tl.constexpr = CHANNEL
    factor = alpha / tl.sqrt(_small(var, AXIS, outer, middle, there, rows, columns, T) + EPS)
    if weight is not None:
        factor = factor * _small(weight, AXIS, outer, middle, there, rows, columns, T)
    z += factor * (b - _small(mean, AXIS, outer, middle, there, rows, columns, T))
    if bias is not None:
        z += alpha * _small(bias, AXIS, outer, middle, there, rows, columns, T)
    _store(out + (row * C)[:, None] + column[None, :], _activation(z, ACT), inside)
