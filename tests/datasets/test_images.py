from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from mmcv.transforms import LoadImageFromFile
from PIL import Image

from mmlite.datasets.images import DecodedImage, ImageFile, decode, decode_images

SIZE = (48, 32)  # width, height


def encoded(format='JPEG', **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (SIZE[1], SIZE[0], 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format, **options)
    return stream.getvalue()


@pytest.fixture
def write(tmp_path):
    def write(content, name='image'):
        (tmp_path / name).write_bytes(content)
        return ImageFile(str(tmp_path / name))

    return write


@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'BMP', 'WEBP', 'TIFF'])
def test_whole_image(write, format):
    assert decode(write(encoded(format))) == DecodedImage(SIZE)


@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'BMP', 'WEBP'])
def test_truncated_image(write, format):
    content = encoded(format)
    assert decode(write(content[: len(content) * 2 // 3])).problem == 'truncated image'


def test_jpeg_without_its_last_bytes(write):
    """What OpenCV 4 reads without a word, its missing rows grey."""
    assert decode(write(encoded()[:-10])).problem == 'truncated image'


@pytest.mark.parametrize('content', [b'', b'<html>no image</html>'])
def test_no_image(write, content):
    assert decode(write(content)).problem == 'unreadable image'


def test_missing_file(tmp_path):
    assert decode(ImageFile(str(tmp_path / 'a.jpg'))).problem == 'missing image'
    assert decode(ImageFile(str(tmp_path))).problem == 'unreadable image'


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('ignored', [False, True])
def test_orientation_as_mmdetection_loads_it(write, orientation, ignored):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = write(encoded(exif=exif))._replace(ignore_orientation=ignored)
    found = decode(file)
    load = LoadImageFromFile(color_type='color_ignore_orientation' if ignored else 'color')
    height, width = load({'img_path': file.path})['img_shape']
    assert found.size == (width, height)
    # By hand: 5 to 8 exchange width and height.
    assert found.size == (SIZE[::-1] if orientation >= 5 and not ignored else SIZE)
    assert found.orientation == (1 if ignored else orientation)


def test_storage_backend(write):
    file = write(encoded())
    assert decode(file._replace(backend_args={'backend': 'local'})) == DecodedImage(SIZE)


def test_several_processes_keep_the_order(write):
    files = [write(encoded(), f'{i}.jpg') for i in range(20)]
    files[7] = write(encoded()[:-10], '7.jpg')
    decoded = list(decode_images(files, workers=2))
    assert [image.problem for image in decoded] == [None] * 7 + ['truncated image'] + [None] * 12
    assert list(decode_images([], workers=2)) == []


def test_its_processes_start_without_the_stack():
    code = (
        'import mmlite.datasets.images, sys\n'
        "print({'torch', 'mmcv', 'mmengine', 'mmdet'} & set(sys.modules))\n"
    )
    assert subprocess.check_output([sys.executable, '-c', code], text=True) == 'set()\n'
