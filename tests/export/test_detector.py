import re
import warnings

import cv2
import mmcv
import numpy as np
import pytest
from PIL import Image

from mmlite.export import Detector, load, read_image
from mmlite.export.detector import in_another_size

INPUT = {'batch': 1, 'height': None, 'width': None, 'padded': False, 'divisor': 1}
RATIO = {'scale': [200, 90], 'keep_ratio': True}
PAD = {'value': 7, 'size_divisor': 32}


def detector(box=(0, 0, 1, 1), maps=(), resize=None, pad=None, **inputs) -> Detector:
    """One that finds a box, in pixels of what the model gets, and writes down what that is."""
    seen = []

    def session(images, sizes=None):
        seen.append((images, None if sizes is None else sizes.tolist()))
        count = len(images)
        boxes = np.tile(np.float32(box), (count, 2, 1)) + images[:, :1, :1, :1].mean(3)
        scores = np.tile(np.float32([0.9, -1.0]), (count, 1))
        return [boxes, scores, np.zeros((count, 2), np.int64), *(one[None] for one in maps)]

    description = {
        'classes': ['thing'],
        'input': {**INPUT, 'levels': [(8, 7), (16, 15)], 'least_tokens': 5, **inputs},
        'preprocessing': {'resize': resize, 'pad': pad},
    }
    made = Detector(session, description)
    made.seen = seen
    return made


@pytest.mark.parametrize(
    'resize, pad, shape, factors',
    [
        (None, None, (60, 100), (1, 1)),
        (RATIO, None, (90, 150), (1.5, 1.5)),
        ({**RATIO, 'keep_ratio': False}, None, (90, 200), (2, 1.5)),
        ({'canvas': [120, 80]}, None, (48, 80), (0.8, 0.8)),
        (RATIO, PAD, (96, 160), 1.5),
        (None, {'value': 7, 'size': [64, 128]}, (64, 128), 1),
    ],
)
def test_boxes_are_in_pixels_of_the_image(resize, pad, shape, factors):
    x, y = np.broadcast_to(factors, 2)
    found = detector(np.array([20 * x, 10 * y, 40 * x, 50 * y]) - 50, resize=resize, pad=pad)
    boxes, scores, labels = found.detect(np.full((60, 100, 3), 50, np.uint8))
    np.testing.assert_allclose(boxes, [[20, 10, 40, 50]], rtol=1e-6)
    assert scores.tolist() == [np.float32(0.9)] and len(labels) == 1
    ((images, _),) = found.seen
    assert images.shape == (1, 3, *shape)
    assert images[0, :, 0, 0].tolist() == [50] * 3
    assert images[0, :, -1, -1].tolist() == ([50] * 3 if pad is None else [7] * 3)


def test_masks_are_in_pixels_of_the_image():
    mask = np.zeros((2, 96, 160), bool)  # padded below 90 and right of 150
    mask[:, 45:, 75:] = True
    made = detector([75, 45, 150, 90], [mask, np.where(mask[0], 1000, 3)], RATIO, PAD)
    found = made.detect(np.zeros((60, 100, 3), np.uint8))
    expected = np.zeros((60, 100), bool)
    expected[30:, 50:] = True
    np.testing.assert_allclose(found.boxes, [[50, 30, 100, 60]], rtol=1e-6)
    np.testing.assert_array_equal(found.masks, [expected])
    np.testing.assert_array_equal(found.panoptic == 1000, expected)
    for row, resized in (
        # Of three pixels of which the last is in the mask, the second of two is; the first is not.
        ([0, 0, 1], [False, True]),
        # Half of what is enlarged twice, a quarter of the next pixel beyond it is below one half.
        ([0, 1], [False, False, True, True]),
    ):
        found = found._replace(masks=np.bool_([[row]]))
        assert in_another_size(found, (1, len(row)), (1, len(resized))).masks.tolist() == [
            [resized]
        ]


@pytest.mark.parametrize(
    'image, got',
    [
        (None, 'NoneType'),
        (np.zeros((8, 8, 3), np.uint16), 'uint16 of shape (8, 8, 3)'),
        (np.zeros((8, 8, 3)), 'float64 of shape (8, 8, 3)'),
        (np.zeros((8, 8, 4), np.uint8), 'uint8 of shape (8, 8, 4)'),
        (np.zeros((8, 8), np.uint8), 'uint8 of shape (8, 8)'),
        (np.zeros((8, 0, 3), np.uint8), 'uint8 of shape (8, 0, 3)'),
    ],
)
def test_what_is_no_image_is_told(image, got):
    with pytest.raises(ValueError) as refused:
        detector().detect(image)
    assert str(refused.value).endswith(f'got {got}')


@pytest.mark.parametrize(
    'levels, enough, too_few, tokens',
    [
        (((8, 7), (16, 15)), (9, 16), (8, 16), 3),  # rounding up: 2 * 2 + 1 * 1 tokens
        (((8, 0), (16, 0)), (16, 23), (15, 23), 2),  # rounding down: 2 * 2 + 1 * 1
    ],
)
def test_the_smallest_image(levels, enough, too_few, tokens):
    image = np.zeros((*enough, 3), np.uint8)
    found = detector(levels=levels)
    found.detect(image)
    with pytest.raises(ValueError, match=f'it gives {tokens} tokens, and 5 queries'):
        found.detect(image[: too_few[0], : too_few[1]])
    detector(levels=levels, least_side=min(enough)).detect(image)
    with pytest.raises(ValueError, match=f'takes no side below {min(enough) + 1}'):
        detector(levels=levels, least_side=min(enough) + 1).detect(image)


@pytest.mark.parametrize('threshold, count', [(-2, 1), (np.float32(0.9), 1), (0.91, 0)])
def test_scores_from_the_threshold_on(threshold, count):
    """What the graph leaves out, with a score of -1, is no detection in any case."""
    found = detector().detect(np.zeros((30, 30, 3), np.uint8), threshold)
    assert [len(part) for part in found] == [count] * 3


@pytest.mark.parametrize('threshold', [float('nan'), 30, '0.3', None])
def test_no_threshold(threshold):
    with pytest.raises(ValueError, match='score_threshold must be a number of at most 1; got'):
        detector().detect(np.zeros((30, 30, 3), np.uint8), threshold)
    with pytest.raises(ValueError, match=r"takes a list of images; got 'x\.png'"):
        detector().detect_batch('x.png')


def test_batches_are_in_order_and_filled_up():
    made = detector([0] * 4, batch=2, padded=True)
    found = made.detect_batch([np.full((20 + n, 30, 3), n, np.uint8) for n in (1, 2, 3)])
    assert [one.boxes.tolist() for one in found] == [[[n] * 4] for n in (1, 2, 3)]
    assert [images.shape for images, _ in made.seen] == [(2, 3, 22, 30), (2, 3, 23, 30)]
    assert [sizes for _, sizes in made.seen] == [[[21, 30], [22, 30]], [[23, 30], [23, 30]]]
    made = detector([0] * 4, batch=None)
    found = made.detect_batch([np.full((20 + n, 30, 3), n, np.uint8) for n in (1, 2, 3)])
    assert len(found) == 3 and [images.shape for images, _ in made.seen] == [(3, 3, 23, 30)]


@pytest.mark.parametrize(
    'written, error, sentence',
    [
        (None, FileNotFoundError, 'holds no exported detector'),
        ('{"version": 0}', ValueError, 'another version of mmlite'),
        ('{"version": 3, "format": "onnx"}', ValueError, "'bfloat16' cannot be had from onnx"),
        ('{"version": 3, "format": ["onnx"]}', ValueError, 'which mmlite does not run'),
        ('{"version": 3, "format": "openvino"}', ValueError, 'damaged: model is missing; export'),
        (
            '{"version": 3, "format": "openvino", "model": "x", "portable": null, "classes": 3}',
            ValueError,
            'damaged: classes is 3; export again',
        ),
        (
            '{"version": 3, "format": "openvino", "model": "x", "portable": null, "classes": [],'
            ' "input": {}, "preprocessing": {}, "outputs": []}',
            FileNotFoundError,
            'lacks its model x; export again',
        ),
        ('{"version": 3, "form', ValueError, r'json is damaged: .*; export again'),
        ('[3]', ValueError, r'json is damaged: .*; export again'),
    ],
)
def test_what_is_no_export_is_refused(written, error, sentence, tmp_path):
    if written:
        (tmp_path / 'detector.json').write_text(written)
    with pytest.raises(error, match=sentence):
        load(tmp_path, precision='bfloat16')


@pytest.mark.parametrize(
    ('flags', 'precision', 'int8', 'warned'),
    [
        ('avx2 avx512_bf16', 'bfloat16', False, 'in bfloat16 .* slower than float32 without AMX'),
        ('avx2', 'bfloat16', False, 'in bfloat16 .* no faster than float32 without AMX'),
        ('avx512_bf16 amx_bf16', 'bfloat16', False, None),
        ('avx2', 'float32', True, 'in int8 .* for images of one size alone'),
        ('avx2 avx512_vnni', 'float32', True, None),
        ('avx2', 'float32', False, None),
        ('', 'bfloat16', True, None),  # another kind of processor
    ],
)
def test_a_slower_choice_is_told(flags, precision, int8, warned, tmp_path, monkeypatch):
    import mmlite.export.detector as module

    file = tmp_path / 'cpuinfo'
    file.write_text(f'flags\t\t: {flags}\n' if flags else 'Features: asimd\n')
    monkeypatch.setattr('mmlite.export.runtimes.Path', lambda path: file)
    monkeypatch.setitem(module.OPEN, 'openvino', lambda *_: None)
    content = {'version': 3, 'format': 'openvino', 'model': '', 'portable': None, 'outputs': []}
    content |= {'preprocessing': {}, 'classes': [], 'input': {'height': None}}
    content['int8'] = {'calibration_images': 1} if int8 else None
    module.write_description(tmp_path, content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        load(tmp_path, precision=precision)
    assert len(caught) == (warned is not None)
    if warned:
        assert re.search(warned, str(caught[0].message))
    content['input'] = {'height': 800}  # of one size 8 bits are faster everywhere
    module.write_description(tmp_path, content)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load(tmp_path)


def write_pictures(folder) -> None:
    """One of each kind."""
    random = np.random.default_rng(0)
    color = random.integers(0, 256, (30, 50, 3), np.uint8)
    deep = random.integers(0, 2**16, (30, 50), np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(color).save(folder / 'turned.png', exif=exif)
    Image.fromarray(color).save(folder / 'turned.jpg', exif=exif)
    cv2.imwrite(str(folder / 'deep.png'), deep)
    for mode in ('L', 'LA', 'RGBA', 'P', '1'):
        Image.fromarray(color).convert(mode).save(folder / f'{mode}.png')
    with_alpha = np.dstack([color, deep.astype(np.uint8)])
    Image.fromarray(with_alpha).save(folder / 'clear.png')
    Image.fromarray(color).convert('CMYK').save(folder / 'CMYK.jpg')


@pytest.mark.parametrize('decoder', ['cv2', 'pillow'])
def test_images_are_read_as_for_training(decoder, tmp_path):
    write_pictures(tmp_path)
    for path in tmp_path.iterdir():
        expected = mmcv.imread(path, backend=decoder)
        np.testing.assert_array_equal(read_image(path, decoder), expected, err_msg=path.name)
    made = detector()
    made.description['preprocessing']['decoder'] = decoder
    np.testing.assert_array_equal(
        made.read(tmp_path / 'CMYK.jpg'), mmcv.imread(tmp_path / 'CMYK.jpg', backend=decoder)
    )


@pytest.mark.parametrize('decoder', ['cv2', 'pillow'])
@pytest.mark.parametrize('content', [b'', b'text', b'\x89PNG\r\n\x1a\n'])
def test_a_file_that_is_no_image_is_refused(decoder, content, tmp_path):
    (tmp_path / 'x.png').write_bytes(content)
    with pytest.raises(ValueError, match=r'x\.png cannot be read as an image'):
        read_image(tmp_path / 'x.png', decoder)
