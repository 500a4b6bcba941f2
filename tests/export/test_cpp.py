"""The C++ program of the documentation, compiled as it stands there: Python's detections."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from shutil import which

import numpy as np
import pytest

from mmlite.export import library, load

openvino = pytest.importorskip('openvino')
pytest.importorskip('onnxscript')
pytestmark = pytest.mark.timeout(900)

PAGE = Path(__file__).parents[2] / 'docs/deploy-cpp.md'


def block(language: str) -> str:
    """The first block of a language on the page."""
    return re.search(rf'^```{language}\n(.*?)^```', PAGE.read_text(), re.M | re.S)[1]


@pytest.mark.skipif(not which('cmake') or not which('c++'), reason='needs CMake and a C++ compiler')
def test_openvino(exported_lite_dino, images, tmp_path):
    from openvino.utils import get_cmake_path

    try:
        extension = library('openvino')
    except FileNotFoundError as error:
        pytest.skip(str(error))
    exported = load(exported_lite_dino[1] / 'openvino')
    (tmp_path / 'detect.cpp').write_text(block('cpp'))
    (tmp_path / 'CMakeLists.txt').write_text(block('cmake'))
    build = tmp_path / 'build'
    for command in (
        ['cmake', '-S', tmp_path, '-B', build, f'-DOpenVINO_DIR={get_cmake_path()}'],
        ['cmake', '--build', build],
    ):
        subprocess.run(command, check=True, capture_output=True)

    image = images[0]
    header = f'P6 {image.shape[1]} {image.shape[0]} 255\n'.encode()
    (tmp_path / 'image.ppm').write_bytes(header + image[:, :, ::-1].tobytes())

    def run(*arguments: Path) -> subprocess.CompletedProcess:
        return subprocess.run([build / 'detect', *arguments], capture_output=True, text=True)

    model = exported_lite_dino[1] / 'openvino/model.xml'
    result = run(model, extension, tmp_path / 'image.ppm')
    assert result.returncode == 0, result.stderr
    printed = np.array([line.split() for line in result.stdout.splitlines()], np.float32)
    found = exported.detect(image, 0.3)
    assert len(found.scores) > 2
    columns = [found.labels, found.scores, *found.boxes.T]
    np.testing.assert_allclose(printed, np.stack(columns, 1), rtol=1e-4, atol=1e-2)

    assert run(model, extension, PAGE).stderr == 'no PPM of 8 bits\n'
    assert run(model).stderr.startswith('usage: detect MODEL.xml')
