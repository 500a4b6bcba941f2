"""The device code: one forward, one backward, and the ordered sum of the deterministic backward.

A program takes ``BLOCK_Q`` neighbouring queries of one head and goes through the levels. Of each
level it holds a tile, the points of the block's queries with their channels, as registers of shape
(POINTS, BLOCK_Q, DIM); ``POINTS`` and ``DIM`` are P and D rounded up to powers of two. A sampled
feature exists only as such a tile, so nothing of size Q*L*P*D touches memory.

Points come first in a tile because Triton then gives a thread all points of a query and some of
its channels, a few threads a query: sums over points need no communication, sums over channels
stay within the few.

Where the points lie comes in two forms. ``REF_DIM`` 0: ``sampling`` holds normalised locations.
``REF_DIM`` 2 or 4: it holds offsets from ``reference_points`` (x, y) or (cx, cy, w, h), in pixels
of the level or in halves of the box over P; with ``SAME_LOC`` one set of them for all levels.

Names in capitals are compile-time constants. All tensors are contiguous, arithmetic is float32.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# Sizes that differ from image to image must not compile the kernels anew.
_SIZES = ['num_queries', 'num_tokens', 'num_heads', 'num_rows', 'reference_stride']
_LEVEL_SIZES = [f'{side}{level}' for level in range(8) for side in 'hw']


@triton.jit
def _block(num_queries, num_heads, BLOCK_Q: tl.constexpr):
    """Image, head and first query of this program.

    Neighbouring programs take neighbouring queries, then the next head, then the next image, so
    that those running at the same time share few maps in the second-level cache.
    """
    blocks = tl.cdiv(num_queries, BLOCK_Q)
    program = tl.program_id(0)
    batch = (program // blocks // num_heads).to(tl.int64)
    return batch, (program // blocks) % num_heads, (program % blocks) * BLOCK_Q


@triton.jit
def _finite_below(maximum):
    """What logits are taken relative to: zero as long as all of them are minus infinity."""
    return tl.where(maximum == float('-inf'), 0.0, maximum)


@triton.jit
def _of_level(level, L: tl.constexpr, s0, s1, s2, s3, s4, s5, s6, s7):
    """The size of a level: sizes are arguments of the kernel, so that no tensor holds them."""
    size = tl.where(level == 1, s1, s0)
    if L > 2:
        size = tl.where(level == 2, s2, size)
        size = tl.where(level == 3, s3, size)
    if L > 4:
        size = tl.where(level == 4, s4, size)
        size = tl.where(level == 5, s5, size)
        size = tl.where(level == 6, s6, size)
        size = tl.where(level == 7, s7, size)
    return size.to(tl.int32)


@triton.jit
def _read(sampling, place, exists, reference_points, centre, is_query, REF_DIM: tl.constexpr):
    """What says where the points lie, as it is stored: nothing here waits for what it loads.

    x and y of every point, (POINTS, BLOCK_Q); x and y of the reference points, and the sizes w and
    h of their boxes, (1, BLOCK_Q). Where those do not exist, x and y stand in their place.
    """
    x = tl.load(sampling + 2 * place, mask=exists, other=0.0)
    y = tl.load(sampling + 2 * place + 1, mask=exists, other=0.0)
    if REF_DIM == 0:
        return x, y, x, y, x, y
    else:
        centre_x = tl.load(reference_points + centre, mask=is_query, other=0.0)
        centre_y = tl.load(reference_points + centre + 1, mask=is_query, other=0.0)
        if REF_DIM == 2:
            return x, y, centre_x, centre_y, x, y
        else:
            box_w = tl.load(reference_points + centre + 2, mask=is_query, other=0.0)
            box_h = tl.load(reference_points + centre + 3, mask=is_query, other=0.0)
            return x, y, centre_x, centre_y, box_w, box_h


@triton.jit
def _in_pixels(position, centre, box, side, REF_DIM: tl.constexpr, P: tl.constexpr):
    """Pixel coordinates along one side of a map, whole at pixel centres."""
    position = position.to(tl.float32)
    if REF_DIM == 0:
        return position * side - 0.5
    elif REF_DIM == 2:
        return centre.to(tl.float32) * side - 0.5 + position
    else:
        return (centre.to(tl.float32) + position * _box_unit(box, P)) * side - 0.5


@triton.jit
def _box_unit(box, P: tl.constexpr):
    """What an offset of one is, as a part of the map."""
    return box.to(tl.float32) * (0.5 / P)


@triton.jit
def _locate(
    x,
    y,
    centre_x,
    centre_y,
    box_w,
    box_h,
    exists,
    height,
    width,
    start,
    INDEX: tl.constexpr,
    REF_DIM: tl.constexpr,
    P: tl.constexpr,
):
    """Where the points fall in their map.

    Returns the token of each point's north-west pixel; the fractions of a pixel that the point
    lies to the east and to the south of it; and whether the north-west, north-east, south-west and
    south-east pixel is in the map. Comparisons are false for NaN, so that a location that is not
    finite is outside.
    """
    x = _in_pixels(x, centre_x, box_w, width, REF_DIM, P)
    y = _in_pixels(y, centre_y, box_h, height, REF_DIM, P)
    inside = exists & (x >= -1) & (x < width) & (y >= -1) & (y < height)
    x = tl.where(inside, x, 0.0)
    y = tl.where(inside, y, 0.0)
    column = tl.floor(x)
    row = tl.floor(y)
    east = x - column
    south = y - row
    column = column.to(tl.int32)
    row = row.to(tl.int32)
    # A point inside has -1 <= column < width, and -1 <= row < height.
    north_row = inside & (row >= 0)
    south_row = inside & (row < height - 1)
    west_column = column >= 0
    east_column = column < width - 1
    token = (start + row * width + column).to(INDEX)
    nw = north_row & west_column
    ne = north_row & east_column
    sw = south_row & west_column
    se = south_row & east_column
    return token, east, south, nw, ne, sw, se


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


@triton.jit(do_not_specialize=_SIZES + _LEVEL_SIZES)
def forward(
    query,
    key,
    value,
    sampling,
    reference_points,
    attention_weights,
    output,
    scale,
    h0,
    w0,
    h1,
    w1,
    h2,
    w2,
    h3,
    w3,
    h4,
    w4,
    h5,
    w5,
    h6,
    w6,
    h7,
    w7,
    num_queries,
    num_tokens,
    num_heads,
    reference_stride,
    KEY_AWARE: tl.constexpr,
    KEY_IS_VALUE: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    POINTS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    INDEX: tl.constexpr,
    REF_DIM: tl.constexpr,
    SAME_LOC: tl.constexpr,
):
    """Sample, weigh, sum.

    ``KEY_AWARE``: the weights are the softmax of the query-key products, built up level by level
    with a running maximum; ``attention_weights`` is not read. Otherwise the weights are given, and
    ``query`` and ``key`` are not read. ``KEY_IS_VALUE``: one sample serves as both. ``INDEX`` is
    an integer type that can index the features of one image.
    """
    batch, head, first = _block(num_queries, num_heads, BLOCK_Q)
    line = tl.arange(0, BLOCK_Q)
    is_query = first + line < num_queries
    channel = tl.arange(0, DIM)
    is_channel = channel < D
    point = tl.arange(0, POINTS)[:, None]
    exists = is_query[None, :] & (point < P)

    stride = (num_heads * D).to(INDEX)
    image = batch * num_tokens * num_heads * D + head * D + channel[None, None, :]
    pair = (batch * num_queries + first) * num_heads + head
    vector = pair * D + line[:, None] * num_heads * D + channel[None, :]
    vector_mask = is_query[:, None] & is_channel[None, :]
    location = pair * (L * P) + line[None, :] * num_heads * (L * P) + point
    place = location
    if SAME_LOC:
        place = pair * P + line[None, :] * num_heads * P + point
    # Of the reference points: by image, query and level.
    centre = batch * reference_stride + (first + line[None, :]) * (L * REF_DIM)
    has_centre = is_query[None, :]

    result = tl.zeros([BLOCK_Q, DIM], dtype=tl.float32)
    if KEY_AWARE:
        q = tl.load(query + vector, mask=vector_mask, other=0.0).to(tl.float32)
        q = (q * (scale * LOG2_E))[None, :, :]
        maximum = tl.full([BLOCK_Q], float('-inf'), dtype=tl.float32)
        total = tl.zeros([BLOCK_Q], dtype=tl.float32)
    start = 0
    for level in range(L):
        height = _of_level(level, L, h0, h1, h2, h3, h4, h5, h6, h7)
        width = _of_level(level, L, w0, w1, w2, w3, w4, w5, w6, w7)
        x, y, centre_x, centre_y, box_w, box_h = _read(
            sampling, place, exists, reference_points, centre, has_centre, REF_DIM
        )
        token, east, south, nw, ne, sw, se = _locate(
            x, y, centre_x, centre_y, box_w, box_h, exists, height, width, start, INDEX, REF_DIM, P
        )
        sampled = _sample(
            value + image, token, width, stride, east, south, nw, ne, sw, se, is_channel
        )
        if KEY_AWARE:
            if KEY_IS_VALUE:
                logits = tl.sum(q * sampled, axis=2)
            else:
                sampled_key = _sample(
                    key + image, token, width, stride, east, south, nw, ne, sw, se, is_channel
                )
                logits = tl.sum(q * sampled_key, axis=2)
            logits = tl.where(point < P, logits, float('-inf'))
            new_maximum = tl.maximum(maximum, tl.max(logits, axis=0))
            base = _finite_below(new_maximum)
            correction = tl.exp2(maximum - base)
            weights = tl.exp2(logits - base[None, :])
            total = total * correction + tl.sum(weights, axis=0)
            result *= correction[:, None]
            maximum = new_maximum
        else:
            weights = tl.load(attention_weights + location, mask=exists, other=0.0).to(tl.float32)
        result += tl.sum(weights[:, :, None] * sampled, axis=0)
        start += height * width
        location += P
        if not SAME_LOC:
            place += P
        centre += REF_DIM
    if KEY_AWARE:
        result /= total[:, None]
    tl.store(output + vector, result.to(output.dtype.element_ty), mask=vector_mask)


@triton.jit(do_not_specialize=_SIZES + _LEVEL_SIZES)
def backward(
    grad_output,
    query,
    key,
    value,
    sampling,
    reference_points,
    attention_weights,
    grad_query,
    grad_key,
    grad_value,
    grad_sampling,
    grad_reference,
    grad_weights,
    value_coefficients,
    query_coefficients,
    pixel_rows,
    pixel_weights,
    scale,
    h0,
    w0,
    h1,
    w1,
    h2,
    w2,
    h3,
    w3,
    h4,
    w4,
    h5,
    w5,
    h6,
    w6,
    h7,
    w7,
    num_queries,
    num_tokens,
    num_heads,
    num_rows,
    reference_stride,
    KEY_AWARE: tl.constexpr,
    KEY_IS_VALUE: tl.constexpr,
    ORDERED: tl.constexpr,
    GRAD_QUERY: tl.constexpr,
    GRAD_KEY: tl.constexpr,
    GRAD_VALUE: tl.constexpr,
    GRAD_SAMPLING: tl.constexpr,
    GRAD_REFERENCE: tl.constexpr,
    GRAD_WEIGHTS: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    POINTS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    INDEX: tl.constexpr,
    REF_DIM: tl.constexpr,
    SAME_LOC: tl.constexpr,
):
    """All gradients, the samples formed anew.

    Let g be the output's gradient, v and k a point's sampled value and key, w its weight, and
    c = scale * w * (g.v - mean), where mean is the sum of w * g.v over a query's points. Then the
    gradient of v is w*g, that of k is c*q, and that of q the sum of c*k. A first pass over the
    levels finds the maximum and the sum of the softmax, and mean; the second one the gradients.
    Samples are linear in their pixels, so the gradients of the locations need only the products of
    g and q with every pixel.

    The gradients of the features are added up in float32 by atomics. With ``ORDERED`` the summands
    are written down for :func:`ordered_sum` instead: w, c, and the rows and bilinear weights of the
    four pixels. Rows are numbered (batch, head, token); ``num_rows`` stands for outside the map.
    """
    batch, head, first = _block(num_queries, num_heads, BLOCK_Q)
    line = tl.arange(0, BLOCK_Q)
    is_query = first + line < num_queries
    channel = tl.arange(0, DIM)
    is_channel = channel < D
    point = tl.arange(0, POINTS)[:, None]
    exists = is_query[None, :] & (point < P)

    stride = (num_heads * D).to(INDEX)
    image = batch * num_tokens * num_heads * D + head * D + channel[None, None, :]
    pair = (batch * num_queries + first) * num_heads + head
    vector = pair * D + line[:, None] * num_heads * D + channel[None, :]
    vector_mask = is_query[:, None] & is_channel[None, :]
    location = pair * (L * P) + line[None, :] * num_heads * (L * P) + point
    place = location
    if SAME_LOC:
        place = pair * P + line[None, :] * num_heads * P + point
    # Of the reference points: by image, query and level.
    centre = batch * reference_stride + (first + line[None, :]) * (L * REF_DIM)
    has_centre = is_query[None, :]

    g = tl.load(grad_output + vector, mask=vector_mask, other=0.0).to(tl.float32)[None, :, :]
    if KEY_AWARE:
        q = tl.load(query + vector, mask=vector_mask, other=0.0).to(tl.float32)[None, :, :]
        maximum = tl.full([BLOCK_Q], float('-inf'), dtype=tl.float32)
        total = tl.zeros([BLOCK_Q], dtype=tl.float32)
        mean = tl.zeros([BLOCK_Q], dtype=tl.float32)
        start = 0
        for level in range(L):
            height = _of_level(level, L, h0, h1, h2, h3, h4, h5, h6, h7)
            width = _of_level(level, L, w0, w1, w2, w3, w4, w5, w6, w7)
            places = place if SAME_LOC else place + level * P
            centres = centre + level * REF_DIM
            x, y, centre_x, centre_y, box_w, box_h = _read(
                sampling, places, exists, reference_points, centres, has_centre, REF_DIM
            )
            token, east, south, nw, ne, sw, se = _locate(
                x,
                y,
                centre_x,
                centre_y,
                box_w,
                box_h,
                exists,
                height,
                width,
                start,
                INDEX,
                REF_DIM,
                P,
            )
            sampled = _sample(
                value + image, token, width, stride, east, south, nw, ne, sw, se, is_channel
            )
            g_v = tl.sum(g * sampled, axis=2)
            if not KEY_IS_VALUE:
                sampled = _sample(
                    key + image, token, width, stride, east, south, nw, ne, sw, se, is_channel
                )
            logits = tl.sum(q * sampled, axis=2) * (scale * LOG2_E)
            logits = tl.where(point < P, logits, float('-inf'))
            new_maximum = tl.maximum(maximum, tl.max(logits, axis=0))
            base = _finite_below(new_maximum)
            correction = tl.exp2(maximum - base)
            weights = tl.exp2(logits - base[None, :])
            total = total * correction + tl.sum(weights, axis=0)
            mean = mean * correction + tl.sum(weights * g_v, axis=0)
            maximum = new_maximum
            start += height * width
        mean /= total
        base = _finite_below(maximum)
        result = tl.zeros([BLOCK_Q, DIM], dtype=tl.float32)

    if GRAD_SAMPLING and SAME_LOC:
        sum_x = tl.zeros([POINTS, BLOCK_Q], dtype=tl.float32)
        sum_y = tl.zeros([POINTS, BLOCK_Q], dtype=tl.float32)
    start = 0
    for level in range(L):
        height = _of_level(level, L, h0, h1, h2, h3, h4, h5, h6, h7)
        width = _of_level(level, L, w0, w1, w2, w3, w4, w5, w6, w7)
        x, y, centre_x, centre_y, box_w, box_h = _read(
            sampling, place, exists, reference_points, centre, has_centre, REF_DIM
        )
        token, east, south, nw, ne, sw, se = _locate(
            x, y, centre_x, centre_y, box_w, box_h, exists, height, width, start, INDEX, REF_DIM, P
        )
        v, v_x, v_y = _slopes(
            value + image, token, width, stride, east, south, nw, ne, sw, se, is_channel
        )
        g_v = tl.sum(g * v, axis=2)
        if KEY_AWARE:
            if KEY_IS_VALUE:
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
            weights = tl.load(attention_weights + location, mask=exists, other=0.0).to(tl.float32)
            if GRAD_WEIGHTS:
                grad_weight = g_v.to(grad_weights.dtype.element_ty)
                tl.store(grad_weights + location, grad_weight, mask=exists)

        grad_v = weights[:, :, None] * g
        if KEY_AWARE:
            grad_k = c[:, :, None] * q
            if KEY_IS_VALUE:
                grad_v += grad_k
        if GRAD_SAMPLING or GRAD_REFERENCE:
            slope_x = grad_v * v_x
            slope_y = grad_v * v_y
            if KEY_AWARE and not KEY_IS_VALUE:
                slope_x += grad_k * k_x
                slope_y += grad_k * k_y
            slope_x = tl.sum(slope_x, axis=2)
            slope_y = tl.sum(slope_y, axis=2)
            # A point outside has no slope, whatever else there is of it.
            inside = nw | ne | sw | se
            if GRAD_SAMPLING:
                grad_x = slope_x
                grad_y = slope_y
                if REF_DIM == 0:
                    grad_x *= width
                    grad_y *= height
                if REF_DIM == 4:
                    grad_x *= width * _box_unit(box_w, P)
                    grad_y *= height * _box_unit(box_h, P)
                grad_x = tl.where(inside, grad_x, 0.0)
                grad_y = tl.where(inside, grad_y, 0.0)
                if SAME_LOC:
                    sum_x += grad_x
                    sum_y += grad_y
                else:
                    _store_pair(grad_sampling + 2 * place, grad_x, grad_y, exists)
            if GRAD_REFERENCE:
                # Of this head alone; the heads are added up afterwards, in a fixed order.
                grad_x = tl.where(inside, slope_x * width, 0.0)
                grad_y = tl.where(inside, slope_y * height, 0.0)
                target = (pair + line * num_heads) * (L * REF_DIM) + level * REF_DIM
                _store_pair(
                    grad_reference + target,
                    tl.sum(grad_x, axis=0),
                    tl.sum(grad_y, axis=0),
                    is_query,
                )
                if REF_DIM == 4:
                    grad_x = tl.where(inside, grad_x * x.to(tl.float32) * (0.5 / P), 0.0)
                    grad_y = tl.where(inside, grad_y * y.to(tl.float32) * (0.5 / P), 0.0)
                    _store_pair(
                        grad_reference + target + 2,
                        tl.sum(grad_x, axis=0),
                        tl.sum(grad_y, axis=0),
                        is_query,
                    )

        if GRAD_VALUE or GRAD_KEY:
            if ORDERED:
                tl.store(value_coefficients + location, weights, mask=exists)
                if KEY_AWARE:
                    tl.store(query_coefficients + location, c, mask=exists)
                first_row = (batch * num_heads + head) * num_tokens
            west = 1 - east
            north = 1 - south
            for i in range(4):
                is_east = i % 2 == 1
                is_south = i // 2 == 1
                pixel = token + i % 2 + tl.where(is_south, width, 0)
                in_map = tl.where(is_south, tl.where(is_east, se, sw), tl.where(is_east, ne, nw))
                bilinear = tl.where(is_east, east, west) * tl.where(is_south, south, north)
                if ORDERED:
                    row = tl.where(in_map, first_row + pixel, num_rows)
                    row = row.to(pixel_rows.dtype.element_ty)
                    tl.store(pixel_rows + 4 * location + i, row, mask=exists)
                    tl.store(pixel_weights + 4 * location + i, bilinear, mask=exists)
                else:
                    offset = image + (pixel * stride)[:, :, None]
                    mask = in_map[:, :, None] & is_channel[None, None, :]
                    if GRAD_VALUE:
                        add = bilinear[:, :, None] * grad_v
                        tl.atomic_add(grad_value + offset, add, mask=mask, sem='relaxed')
                    if GRAD_KEY:
                        add = bilinear[:, :, None] * grad_k
                        tl.atomic_add(grad_key + offset, add, mask=mask, sem='relaxed')
        start += height * width
        location += P
        if not SAME_LOC:
            place += P
        centre += REF_DIM
    if GRAD_SAMPLING and SAME_LOC:
        _store_pair(grad_sampling + 2 * place, sum_x, sum_y, exists)
    if GRAD_QUERY:
        tl.store(grad_query + vector, result.to(grad_query.dtype.element_ty), mask=vector_mask)


@triton.jit(do_not_specialize=_SIZES)
def ordered_sum(
    grad_output,
    query,
    value_coefficients,
    query_coefficients,
    pixel_weights,
    order,
    row_starts,
    grad_key,
    grad_value,
    num_tokens,
    num_heads,
    num_rows,
    KEY_AWARE: tl.constexpr,
    KEY_IS_VALUE: tl.constexpr,
    LP: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
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
        if KEY_AWARE:
            coefficient = weight * tl.load(query_coefficients + point, mask=present, other=0.0)
            q = tl.load(query + source, mask=readable, other=0.0).to(tl.float32)
            sum_key += coefficient[:, None] * q

    # Rows are numbered (batch, head, token) and stored (batch, token, head).
    batch = row // num_tokens // num_heads
    head = (row // num_tokens) % num_heads
    target = (batch * num_tokens + row % num_tokens) * num_heads + head
    target = target[:, None] * D + channel
    mask = is_row[:, None] & (channel < D)
    if KEY_AWARE:
        if KEY_IS_VALUE:
            sum_value += sum_key
        else:
            tl.store(grad_key + target, sum_key.to(grad_key.dtype.element_ty), mask=mask)
    tl.store(grad_value + target, sum_value.to(grad_value.dtype.element_ty), mask=mask)
