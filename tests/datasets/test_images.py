import io
from pathlib import Path

import numpy as np
import pytest
from mmcv.transforms import LoadImageFromFile
from PIL import Image

from mmlite.datasets.images import image_problems, quiet_decoders

SIZE = (48, 32)  # width, height


def encoded(format='JPEG', size=SIZE, **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format, **options)
    return stream.getvalue()


@pytest.fixture
def check(tmp_path):
    """The kinds of what is wrong with a file of this content, and its entry afterwards."""

    def check(content=None, listed=SIZE, **options):
        image = {'path': str(tmp_path / 'image'), 'size': listed}
        if content is not None:
            (tmp_path / 'image').write_bytes(content)
        return [kind for kind, _ in image_problems(image, **options)], image

    return check


@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'BMP', 'WEBP', 'TIFF'])
def test_image(check, format):
    content = encoded(format)
    assert check(content)[0] == []
    assert check(content, backend_args={'backend': 'local'})[0] == []
    kinds, image = check(content, listed=SIZE[::-1])
    assert kinds == ['image of another size'] and image['size'] == SIZE
    if format != 'TIFF':
        assert check(content[: len(content) * 2 // 3])[0] == ['truncated image']


@pytest.mark.parametrize(
    ('content', 'problem'),
    [
        (None, 'missing image'),
        (b'', 'unreadable image'),
        (b'<html>no image</html>', 'unreadable image'),
        (b'II*\0', 'unreadable image'),  # the start of a TIFF, on which OpenCV has much to say
        # What OpenCV 4 reads without a word, its missing rows grey.
        (encoded()[:-10], 'truncated image'),
    ],
)
def test_no_image(check, content, problem, capfd):
    with quiet_decoders():
        kinds, image = check(content)
    assert capfd.readouterr().err == ''
    assert kinds == [problem] and image['size'] == SIZE
    folder = {**image, 'path': str(Path(image['path']).parent)}
    assert [*image_problems(folder)] == [('unreadable image', '')]


@pytest.mark.parametrize('ignored', [False, True])
@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('size', [SIZE, SIZE[::-1], (32, 32)])
def test_orientation_as_mmdetection_loads_it(check, size, orientation, ignored):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(exif=exif, size=size)
    load = LoadImageFromFile(color_type='color_ignore_orientation' if ignored else 'color')
    kinds, image = check(content, listed=size, turns=not ignored)
    height, width = load({'img_path': image['path']})['img_shape']
    assert image['size'] == (width, height)
    # By hand: 5 to 8 exchange width and height.
    assert image['size'] == (size[::-1] if orientation >= 5 and not ignored else size)
    assert kinds == ['image turned by EXIF'] * (orientation > 1 and not ignored)
    if size[0] != size[1] and not ignored:
        # Listed the other way round, the boxes are for the turned image.
        kinds, _ = check(content, listed=size[::-1])
        expected = {1: ['image of another size'], **{turned: [] for turned in range(5, 9)}}
        assert kinds == expected.get(orientation, ['image turned by EXIF'])
