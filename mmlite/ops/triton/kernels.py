"""The device code: one forward, one backward, and the ordered sum of the deterministic backward.

A program takes ``BLOCK_Q`` neighbouring queries of one head and goes through the levels. Of each
level it holds a tile, the points of the block's queries with their channels, as registers of shape
(POINTS, BLOCK_Q, DIM); ``POINTS`` and ``DIM`` are P and D rounded up to powers of two. A sampled
feature exists only as such a tile, so nothing of size Q*L*P*D touches memory.

Points come first in a tile because Triton then gives a thread all points of a query and some of
its channels, a few threads a query: sums over points need no communication, sums over channels
stay within the few.

Where the points lie comes in two forms. ``REF_DIM`` 0: ``sampling`` holds normalised locations.
``REF_DIM`` 2 or 4: it holds offsets from ``reference`` (x, y) or (cx, cy, w, h), in pixels of the
level or in halves of the box over P; with ``SAME_LOC`` one set of them for all levels.

Names in capitals are compile-time constants, and so is which tensors are None. All tensors are
contiguous, arithmetic is float32.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# Numbers that differ from image to image must not compile the kernels anew.
_NUMBERS = ['num_queries', 'num_tokens', 'num_heads', 'num_rows', 'reference_stride']
_SIZES = [f'size{level}' for level in range(8)]


@triton.jit
def _tile(
    num_queries, num_tokens, num_heads, reference_stride,
    L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, POINTS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, REF_DIM: tl.constexpr, SAME_LOC: tl.constexpr,
):  # fmt: skip
    """What a program works on, and where in memory that lies.

    Neighbouring programs take neighbouring queries, then the next head, then the next image, so
    that those running at the same time share few maps in the second-level cache.

    Returns image and head; number of each query in the block, and whether there is one; of a tile
    which channels are there, the points' numbers, and which of them are there. Then the places of
    the features of the image, of its first query and head, of the queries with a mask, of the
    points among weights and in ``sampling``, and of the reference points.
    """
    blocks = tl.cdiv(num_queries, BLOCK_Q)
    program = tl.program_id(0)
    batch = (program // blocks // num_heads).to(tl.int64)
    head = (program // blocks) % num_heads
    first = (program % blocks) * BLOCK_Q
    line = tl.arange(0, BLOCK_Q)
    is_line = first + line < num_queries
    channel = tl.arange(0, DIM)
    is_channel = channel < D
    point = tl.arange(0, POINTS)[:, None]
    valid = is_line[None, :] & (point < P)

    image = batch * num_tokens * num_heads * D + head * D + channel[None, None, :]
    pair = (batch * num_queries + first) * num_heads + head
    vector = pair * D + line[:, None] * num_heads * D + channel[None, :]
    vector_mask = is_line[:, None] & is_channel[None, :]
    location = pair * (L * P) + line[None, :] * num_heads * (L * P) + point
    place = location
    if SAME_LOC:
        place = pair * P + line[None, :] * num_heads * P + point
    centre = batch * reference_stride + (first + line[None, :]) * (L * REF_DIM)
    return (
        batch, head, line, is_line, is_channel, point, valid,
        image, pair, vector, vector_mask, location, place, centre,
    )  # fmt: skip


@triton.jit
def _finite_below(maximum):
    """What logits are taken relative to: zero as long as all of them are minus infinity."""
    return tl.where(maximum == float('-inf'), 0.0, maximum)


@triton.jit
def _weigh(logits, maximum, total, is_point):
    """One step of the softmax that is built up level by level.

    Returns the new maximum, what all sums so far are to be multiplied by, the weights of the new
    points relative to the maximum, and their new total.
    """
    logits = tl.where(is_point, logits, float('-inf'))
    new_maximum = tl.maximum(maximum, tl.max(logits, axis=0))
    base = _finite_below(new_maximum)
    correction = tl.exp2(maximum - base)
    weights = tl.exp2(logits - base[None, :])
    return new_maximum, correction, weights, total * correction + tl.sum(weights, axis=0)


@triton.jit
def _size(level, L: tl.constexpr, s0, s1, s2, s3, s4, s5, s6, s7):
    """Height and width of a level, which are arguments of the kernel: no tensor holds them."""
    size = tl.where(level == 1, s1, s0)
    if L > 2:
        size = tl.where(level == 2, s2, size)
        size = tl.where(level == 3, s3, size)
    if L > 4:
        size = tl.where(level == 4, s4, size)
        size = tl.where(level == 5, s5, size)
        size = tl.where(level == 6, s6, size)
        size = tl.where(level == 7, s7, size)
    return (size >> 32).to(tl.int32), size.to(tl.int32)


@triton.jit
def _locate(
    sampling, place, valid, reference, centre, is_query, height, width, start,
    REF_DIM: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Where the points fall in their map.

    Returns the token of each point's north-west pixel; the fractions of a pixel that the point
    lies to the east and to the south of it; whether the north-west, north-east, south-west and
    south-east pixel is in the map; x and y as ``sampling`` has them, and how many pixels one of
    them is. Comparisons are false for NaN, so that a location that is not finite is outside.
    """
    x = tl.load(sampling + 2 * place, mask=valid, other=0.0).to(tl.float32)
    y = tl.load(sampling + 2 * place + 1, mask=valid, other=0.0).to(tl.float32)
    unit_x = width.to(tl.float32)
    unit_y = height.to(tl.float32)
    east = x * unit_x - 0.5
    south = y * unit_y - 0.5
    if REF_DIM > 0:
        centre_x = tl.load(reference + centre, mask=is_query, other=0.0).to(tl.float32)
        centre_y = tl.load(reference + centre + 1, mask=is_query, other=0.0).to(tl.float32)
        if REF_DIM == 4:
            box_w = tl.load(reference + centre + 2, mask=is_query, other=0.0)
            box_h = tl.load(reference + centre + 3, mask=is_query, other=0.0)
            unit_x *= box_w.to(tl.float32) * (0.5 / P)
            unit_y *= box_h.to(tl.float32) * (0.5 / P)
        else:
            unit_x = 1.0
            unit_y = 1.0
        east = centre_x * width - 0.5 + x * unit_x
        south = centre_y * height - 0.5 + y * unit_y
    inside = valid & (east >= -1) & (east < width) & (south >= -1) & (south < height)
    east = tl.where(inside, east, 0.0)
    south = tl.where(inside, south, 0.0)
    column = tl.floor(east)
    row = tl.floor(south)
    east -= column
    south -= row
    column = column.to(tl.int32)
    row = row.to(tl.int32)
    # A point inside has -1 <= column < width, and -1 <= row < height.
    north_row = inside & (row >= 0)
    south_row = inside & (row < height - 1)
    west_column = column >= 0
    east_column = column < width - 1
    token = start + row * width + column
    nw = north_row & west_column
    ne = north_row & east_column
    sw = south_row & west_column
    se = south_row & east_column
    return token, east, south, nw, ne, sw, se, x, y, unit_x, unit_y


@triton.jit
def _pixel(rows, token, stride, in_map, is_channel):
    """The features of one pixel of every point, zero outside the map; (POINTS, BLOCK_Q, DIM)."""
    mask = in_map[:, :, None] & is_channel[None, None, :]
    return tl.load(rows + (token * stride)[:, :, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _sample(rows, token, width, stride, east, south, nw, ne, sw, se, is_channel):
    """Bilinear interpolation of the four pixels of every point; (POINTS, BLOCK_Q, DIM)."""
    west = 1 - east
    north = 1 - south
    result = (north * west)[:, :, None] * _pixel(rows, token, stride, nw, is_channel)
    result += (north * east)[:, :, None] * _pixel(rows, token + 1, stride, ne, is_channel)
    token += width
    result += (south * west)[:, :, None] * _pixel(rows, token, stride, sw, is_channel)
    result += (south * east)[:, :, None] * _pixel(rows, token + 1, stride, se, is_channel)
    return result


@triton.jit
def _slopes(rows, token, width, stride, east, south, nw, ne, sw, se, is_channel):
    """Samples as :func:`_sample`, with their slopes to the east and south per pixel.

    Weighted sums rather than steps from pixel to pixel: one infinite feature makes the sample
    infinite, not NaN.
    """
    nw = _pixel(rows, token, stride, nw, is_channel)
    ne = _pixel(rows, token + 1, stride, ne, is_channel)
    sw = _pixel(rows, token + width, stride, sw, is_channel)
    se = _pixel(rows, token + width + 1, stride, se, is_channel)
    east = east[:, :, None]
    south = south[:, :, None]
    north_row = (1 - east) * nw + east * ne
    south_row = (1 - east) * sw + east * se
    sample = (1 - south) * north_row + south * south_row
    return sample, (1 - south) * (ne - nw) + south * (se - sw), south_row - north_row


@triton.jit
def _store_pair(target, x, y, mask):
    tl.store(target, x.to(target.dtype.element_ty), mask=mask)
    tl.store(target + 1, y.to(target.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_NUMBERS + _SIZES)
def forward(
    query, key, value, reference, sampling, attention_weights, output,
    scale,
    size0, size1, size2, size3, size4, size5, size6, size7,
    num_queries, num_tokens, num_heads, reference_stride,
    L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, POINTS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, INDEX: tl.constexpr, REF_DIM: tl.constexpr, SAME_LOC: tl.constexpr,
):  # fmt: skip
    """Sample, weigh, sum.

    With a ``query`` the weights are the softmax of its products with the keys, built up level by
    level with a running maximum. Otherwise ``attention_weights`` are given. Without a ``key`` one
    sample serves as both. ``INDEX`` is an integer type that can index the features of one image.
    """
    stride = (num_heads * D).to(INDEX)
    (
        _batch, _head, _line, is_line, is_channel, point, valid,
        image, _pair, vector, vector_mask, location, place, centre,
    ) = _tile(
        num_queries, num_tokens, num_heads, reference_stride,
        L, P, D, POINTS, DIM, BLOCK_Q, REF_DIM, SAME_LOC,
    )  # fmt: skip
    is_query = is_line[None, :]

    result = tl.zeros([BLOCK_Q, DIM], dtype=tl.float32)
    if query is not None:
        q = tl.load(query + vector, mask=vector_mask, other=0.0).to(tl.float32)
        q = (q * (scale * LOG2_E))[None, :, :]
        maximum = tl.full([BLOCK_Q], float('-inf'), dtype=tl.float32)
        total = tl.zeros([BLOCK_Q], dtype=tl.float32)
    start = 0
    for level in range(L):
        height, width = _size(level, L, size0, size1, size2, size3, size4, size5, size6, size7)
        token, east, south, nw, ne, sw, se, _, _, _, _ = _locate(
            sampling, place, valid, reference, centre, is_query, height, width, start, REF_DIM, P
        )
        sampled = _sample(
            value + image, token, width, stride, east, south, nw, ne, sw, se, is_channel
        )
        if query is not None:
            if key is None:
                logits = tl.sum(q * sampled, axis=2)
            else:
                sampled_key = _sample(
                    key + image, token, width, stride, east, south, nw, ne, sw, se, is_channel
                )
                logits = tl.sum(q * sampled_key, axis=2)
            maximum, correction, weights, total = _weigh(logits, maximum, total, point < P)
            result *= correction[:, None]
        else:
            weights = tl.load(attention_weights + location, mask=valid, other=0.0).to(tl.float32)
        result += tl.sum(weights[:, :, None] * sampled, axis=0)
        start += height * width
        location += P
        if not SAME_LOC:
            place += P
        centre += REF_DIM
    if query is not None:
        result /= total[:, None]
    tl.store(output + vector, result.to(output.dtype.element_ty), mask=vector_mask)


@triton.jit(do_not_specialize=_NUMBERS + _SIZES)
def backward(
    grad_output, query, key, value, reference, sampling, attention_weights,
    grad_query, grad_key, grad_value, grad_reference, grad_sampling, grad_weights,
    value_coefficients, query_coefficients, pixel_rows, pixel_weights,
    scale,
    size0, size1, size2, size3, size4, size5, size6, size7,
    num_queries, num_tokens, num_heads, num_rows, reference_stride,
    L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, POINTS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, INDEX: tl.constexpr, REF_DIM: tl.constexpr, SAME_LOC: tl.constexpr,
):  # fmt: skip
    """All gradients, the samples formed anew.

    Let g be the output's gradient, v and k a point's sampled value and key, w its weight, and
    c = scale * w * (g.v - mean), where mean is the sum of w * g.v over a query's points. Then the
    gradient of v is w*g, that of k is c*q, and that of q the sum of c*k. A first pass over the
    levels finds the maximum and the sum of the softmax, and mean; the second one the gradients.
    Samples are linear in their pixels, so the gradients of the locations need only the products of
    g and q with every pixel.

    The gradients of the features are added up in float32 by atomics. With ``pixel_rows`` the
    summands are written down for :func:`ordered_sum` instead: w, c, and the rows and bilinear
    weights of the four pixels. Rows are numbered (batch, head, token); ``num_rows`` stands for
    outside the map.
    """
    stride = (num_heads * D).to(INDEX)
    (
        batch, head, line, is_line, is_channel, point, valid,
        image, pair, vector, vector_mask, location, place, centre,
    ) = _tile(
        num_queries, num_tokens, num_heads, reference_stride,
        L, P, D, POINTS, DIM, BLOCK_Q, REF_DIM, SAME_LOC,
    )  # fmt: skip
    is_query = is_line[None, :]

    g = tl.load(grad_output + vector, mask=vector_mask, other=0.0).to(tl.float32)[None, :, :]
    if query is not None:
        q = tl.load(query + vector, mask=vector_mask, other=0.0).to(tl.float32)[None, :, :]
        maximum = tl.full([BLOCK_Q], float('-inf'), dtype=tl.float32)
        total = tl.zeros([BLOCK_Q], dtype=tl.float32)
        mean = tl.zeros([BLOCK_Q], dtype=tl.float32)
        start = 0
        for level in range(L):
            height, width = _size(level, L, size0, size1, size2, size3, size4, size5, size6, size7)
            spot = place if SAME_LOC else place + level * P
            middle = centre + level * REF_DIM
            token, east, south, nw, ne, sw, se, _, _, _, _ = _locate(
                sampling, spot, valid, reference, middle, is_query, height, width, start, REF_DIM, P
            )
            sampled = _sample(
                value + image, token, width, stride, east, south, nw, ne, sw, se, is_channel
            )
            g_v = tl.sum(g * sampled, axis=2)
            if key is not None:
                sampled = _sample(
                    key + image, token, width, stride, east, south, nw, ne, sw, se, is_channel
                )
            logits = tl.sum(q * sampled, axis=2) * (scale * LOG2_E)
            maximum, correction, weights, total = _weigh(logits, maximum, total, point < P)
            mean = mean * correction + tl.sum(weights * g_v, axis=0)
            start += height * width
        mean /= total
        base = _finite_below(maximum)
        result = tl.zeros([BLOCK_Q, DIM], dtype=tl.float32)

    if grad_sampling is not None and SAME_LOC:
        sum_x = tl.zeros([POINTS, BLOCK_Q], dtype=tl.float32)
        sum_y = tl.zeros([POINTS, BLOCK_Q], dtype=tl.float32)
    start = 0
    for level in range(L):
        height, width = _size(level, L, size0, size1, size2, size3, size4, size5, size6, size7)
        token, east, south, nw, ne, sw, se, x, y, unit_x, unit_y = _locate(
            sampling, place, valid, reference, centre, is_query, height, width, start, REF_DIM, P
        )
        v, v_x, v_y = _slopes(
            value + image, token, width, stride, east, south, nw, ne, sw, se, is_channel
        )
        g_v = tl.sum(g * v, axis=2)
        if query is not None:
            if key is None:
                k = v
            else:
                k, k_x, k_y = _slopes(
                    key + image, token, width, stride, east, south, nw, ne, sw, se, is_channel
                )
            logits = tl.sum(q * k, axis=2) * (scale * LOG2_E)
            logits = tl.where(point < P, logits, float('-inf'))
            weights = tl.exp2(logits - base[None, :]) / total[None, :]
            c = scale * weights * (g_v - mean[None, :])
            result += tl.sum(c[:, :, None] * k, axis=0)
        else:
            weights = tl.load(attention_weights + location, mask=valid, other=0.0).to(tl.float32)
            if grad_weights is not None:
                grad_weight = g_v.to(grad_weights.dtype.element_ty)
                tl.store(grad_weights + location, grad_weight, mask=valid)

        grad_v = weights[:, :, None] * g
        if query is not None:
            grad_k = c[:, :, None] * q
            if key is None:
                grad_v += grad_k
        if grad_sampling is not None or grad_reference is not None:
            slope_x = grad_v * v_x
            slope_y = grad_v * v_y
            if query is not None and key is not None:
                slope_x += grad_k * k_x
                slope_y += grad_k * k_y
            slope_x = tl.sum(slope_x, axis=2)
            slope_y = tl.sum(slope_y, axis=2)
            # A point outside has no slope, whatever else there is of it.
            inside = nw | ne | sw | se
            if grad_sampling is not None:
                grad_x = tl.where(inside, slope_x * unit_x, 0.0)
                grad_y = tl.where(inside, slope_y * unit_y, 0.0)
                if SAME_LOC:
                    sum_x += grad_x
                    sum_y += grad_y
                else:
                    _store_pair(grad_sampling + 2 * place, grad_x, grad_y, valid)
            if grad_reference is not None:
                # Of this head alone; the heads are added up afterwards, in a fixed order.
                grad_x = tl.where(inside, slope_x * width, 0.0)
                grad_y = tl.where(inside, slope_y * height, 0.0)
                target = (pair + line * num_heads) * (L * REF_DIM) + level * REF_DIM
                target = grad_reference + target
                _store_pair(target, tl.sum(grad_x, axis=0), tl.sum(grad_y, axis=0), is_line)
                if REF_DIM == 4:
                    grad_x = tl.where(inside, grad_x * x * (0.5 / P), 0.0)
                    grad_y = tl.where(inside, grad_y * y * (0.5 / P), 0.0)
                    sum_w, sum_h = tl.sum(grad_x, axis=0), tl.sum(grad_y, axis=0)
                    _store_pair(target + 2, sum_w, sum_h, is_line)

        if grad_value is not None or grad_key is not None:
            if pixel_rows is not None:
                tl.store(value_coefficients + location, weights, mask=valid)
                if query is not None:
                    tl.store(query_coefficients + location, c, mask=valid)
                first_row = (batch * num_heads + head) * num_tokens
            west = 1 - east
            north = 1 - south
            for i in range(4):
                is_east = i % 2 == 1
                is_south = i // 2 == 1
                pixel = token + i % 2 + tl.where(is_south, width, 0)
                in_map = tl.where(is_south, tl.where(is_east, se, sw), tl.where(is_east, ne, nw))
                bilinear = tl.where(is_east, east, west) * tl.where(is_south, south, north)
                if pixel_rows is not None:
                    row = tl.where(in_map, first_row + pixel, num_rows)
                    row = row.to(pixel_rows.dtype.element_ty)
                    tl.store(pixel_rows + 4 * location + i, row, mask=valid)
                    tl.store(pixel_weights + 4 * location + i, bilinear, mask=valid)
                else:
                    offset = image + (pixel * stride)[:, :, None]
                    mask = in_map[:, :, None] & is_channel[None, None, :]
                    if grad_value is not None:
                        add = bilinear[:, :, None] * grad_v
                        tl.atomic_add(grad_value + offset, add, mask=mask, sem='relaxed')
                    if grad_key is not None:
                        add = bilinear[:, :, None] * grad_k
                        tl.atomic_add(grad_key + offset, add, mask=mask, sem='relaxed')
        start += height * width
        location += P
        if not SAME_LOC:
            place += P
        centre += REF_DIM
    if grad_sampling is not None and SAME_LOC:
        _store_pair(grad_sampling + 2 * place, sum_x, sum_y, valid)
    if grad_query is not None:
        tl.store(grad_query + vector, result.to(grad_query.dtype.element_ty), mask=vector_mask)


@triton.jit(do_not_specialize=_NUMBERS)
def ordered_sum(
    grad_output, query, value_coefficients, query_coefficients, pixel_weights, order, row_starts,
    grad_key, grad_value,
    num_tokens, num_heads, num_rows,
    LP: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """The gradients of the features, each row's summands added in the order of ``order``.

    ``order`` lists the pixels that :func:`backward` wrote down, sorted by row; those of row r are
    from ``row_starts[r]`` up to ``row_starts[r + 1]``.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < num_rows
    channel = tl.arange(0, DIM)[None, :]
    start = tl.load(row_starts + row, mask=is_row, other=0)
    count = tl.load(row_starts + row + 1, mask=is_row, other=0) - start
    sum_value = tl.zeros([BLOCK_ROWS, DIM], dtype=tl.float32)
    sum_key = tl.zeros([BLOCK_ROWS, DIM], dtype=tl.float32)
    for i in range(tl.max(count, axis=0)):
        present = i < count
        pixel = tl.load(order + start + i, mask=present, other=0)
        weight = tl.load(pixel_weights + pixel, mask=present, other=0.0)
        point = pixel // 4
        source = (point // LP)[:, None] * D + channel
        readable = present[:, None] & (channel < D)
        coefficient = weight * tl.load(value_coefficients + point, mask=present, other=0.0)
        g = tl.load(grad_output + source, mask=readable, other=0.0).to(tl.float32)
        sum_value += coefficient[:, None] * g
        if query is not None:
            coefficient = weight * tl.load(query_coefficients + point, mask=present, other=0.0)
            q = tl.load(query + source, mask=readable, other=0.0).to(tl.float32)
            sum_key += coefficient[:, None] * q

    # Rows are numbered (batch, head, token) and stored (batch, token, head).
    batch = row // num_tokens // num_heads
    head = (row // num_tokens) % num_heads
    target = (batch * num_tokens + row % num_tokens) * num_heads + head
    target = target[:, None] * D + channel
    mask = is_row[:, None] & (channel < D)
    if query is not None:
        if grad_key is None:
            sum_value += sum_key
        else:
            tl.store(grad_key + target, sum_key.to(grad_key.dtype.element_ty), mask=mask)
    tl.store(grad_value + target, sum_value.to(grad_value.dtype.element_ty), mask=mask)
