import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which

import cv2
import numpy as np
import pytest
import torch
from commands import mmlite, refused
from exported import (
    DETECTORS,
    LITE,
    SCHEDULE,
    TEXT,
    assert_runs_alone,
    batch_of,
    export_for_all,
    needs,
)
from mmdet.models import DINO
from small_detectors import SMALL, STOCK

from mmlite.export import export_detector, library, load
from mmlite.export.compare import compare, difference, predict
from mmlite.export.detector import FORMAT_VERSION, read_description, write_description
from mmlite.export.operators import translation_table
from mmlite.export.program import Traced, check_config
from mmlite.export.write import _quotient, to_openvino, write
from mmlite.openmmlab.build import build_detector

pytest.importorskip('onnxscript')
# Tracing takes half a minute on a quiet machine, and several on a busy one.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(params=['onnx', 'openvino', 'torch'])
def format_(request):
    needs(request.param)
    return request.param


def assert_agrees(model, detector, images) -> None:
    report = compare(model, detector, images, repeats=1)
    assert max(report['boxes'], report['scores'], report['masks']) < 1e-4, report


def test_any_size(format_, exported_lite_dino, images, tmp_path):
    model, folder = exported_lite_dino
    exported = load(folder / format_)
    assert_agrees(model, exported, images[:2])
    assert exported.description['schedule'] == 'H3L1-(2+1)x1'
    outputs = exported.session(*exported.arguments_of(images[0]))
    kept = [array.copy() for array in outputs]
    exported.detect(images[1])  # writes into no memory that a caller still holds
    assert all(map(np.array_equal, outputs, kept))
    assert_runs_alone(exported, folder / format_, images[0], tmp_path)


def test_a_schedule_that_names_its_layers(detector, images, tmp_path, monkeypatch):
    for format_ in ('onnx', 'openvino'):
        needs(format_)
    lite = LITE | dict(encoder=dict(schedule='H4L0-12:12+1234', recalibrate=True))
    monkeypatch.setitem(DETECTORS, 'named layers', ('DINO', lite))
    model = detector('named layers')
    export_for_all(model, tmp_path)
    for format_ in ('onnx', 'openvino'):
        exported = load(tmp_path / format_)
        assert_agrees(model, exported, images[:2])
        assert exported.description['schedule'] == 'H4L0-12:12+1234'


def test_threads_share_a_detector(format_, exported_lite_dino, images):
    for threads in (-1, 0, '2', 99999):
        with pytest.raises(ValueError, match=f'whole number from 1 to .*; got {threads!r}'):
            load(exported_lite_dino[1] / format_, threads)
    exported = load(exported_lite_dino[1] / format_, threads=1)
    images = [image[:140, :150] for image in images]
    expected = [exported.detect(image) for image in images]

    def run(number: int) -> bool:
        which = number % 3
        alone = number % 2
        found = exported.detect(images[which]) if alone else exported.detect_batch(images)[which]
        return np.allclose(found.scores, expected[which].scores, atol=1e-6)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(24)))


def test_thin_images(format_, exported_lite_dino):
    """The smallest that gives 30 tokens is detected in; what is smaller is a sentence."""
    exported = load(exported_lite_dino[1] / format_)
    assert exported.description['input']['levels'] == [[8, 7], [16, 15], [32, 31], [64, 63]]
    # 16 + 8 + 4 + 2 tokens. torch.export traces maps of two pixels a side or more.
    is_torch = format_ == 'torch'
    for size in [(65, 65)] if is_torch else [(8, 121), (121, 8)]:
        assert len(exported.detect(np.zeros((*size, 3), np.uint8)).scores) == 30
    for size in ((8, 120), (120, 8), (1, 1), *[(64, 65)] * is_torch):
        with pytest.raises(ValueError, match='too small for the model'):
            exported.detect(np.zeros((*size, 3), np.uint8))


@pytest.mark.skipif(not which('cmake') or not which('c++'), reason='needs CMake and a C++ compiler')
def test_cpp(exported_lite_dino, images, tmp_path):
    """The program of the documentation, compiled as it stands there: Python's detections."""
    needs('openvino')
    from openvino.utils import get_cmake_path

    page = Path(__file__).parents[2] / 'docs/deploy-cpp.md'
    for language, name in (('cpp', 'detect.cpp'), ('cmake', 'CMakeLists.txt')):
        block = re.search(rf'^```{language}\n(.*?)^```', page.read_text(), re.M | re.S)
        (tmp_path / name).write_text(block[1])
    configure = ['cmake', '-S', tmp_path, '-B', tmp_path, f'-DOpenVINO_DIR={get_cmake_path()}']
    for command in (configure, ['cmake', '--build', tmp_path]):
        subprocess.run(command, check=True, capture_output=True)
    image = images[0]
    header = f'P6 {image.shape[1]} {image.shape[0]} 255\n'.encode()
    (tmp_path / 'image.ppm').write_bytes(header + image[:, :, ::-1].tobytes())

    def run(*arguments: Path) -> subprocess.CompletedProcess:
        return subprocess.run([tmp_path / 'detect', *arguments], capture_output=True, text=True)

    folder = exported_lite_dino[1] / 'openvino'
    arguments = folder / 'model.xml', library('openvino')
    result = run(*arguments, tmp_path / 'image.ppm')
    assert result.returncode == 0, result.stderr
    printed = np.array([line.split() for line in result.stdout.splitlines()], np.float32)
    found = load(folder).detect(image, 0.3)
    assert len(found.scores) > 2
    columns = [found.labels, found.scores, *found.boxes.T]
    np.testing.assert_allclose(printed, np.stack(columns, 1), rtol=1e-4, atol=1e-2)
    assert run(*arguments, page).stderr == 'no PPM of 8 bits\n'
    assert run(arguments[0]).stderr.startswith('usage: detect MODEL.xml')


@pytest.fixture(
    scope='module',
    params=[
        'LiteDDQDETR with a key-aware decoder',
        pytest.param('DINO', marks=pytest.mark.slow),
        pytest.param('LiteGroundingDINO', marks=pytest.mark.slow),
    ],
)
def family(request, detector, tmp_path_factory):
    """A detector, and a folder with its export for each runtime, for padded batches."""
    text = TEXT if 'Grounding' in request.param else None
    model = detector(request.param)
    folder = tmp_path_factory.mktemp('family') / 'exported'
    export_for_all(model, folder, batch=None, text=text)
    return model, folder, text


def test_padded_batches(family, format_, images):
    model, folder, text = family
    exported = load(folder / format_)
    assert_agrees(model, exported, images[:1])
    canvas, sizes = batch_of(images)
    expected, actual = predict(model, canvas, sizes, text), exported.detect_batch(images)
    assert len(actual) == len(images)
    for one, other in zip(expected, actual):
        assert max(difference(one, other, canvas.shape[-2:])) < 1e-4
    assert exported.detect_batch([]) == []
    if text:
        assert exported.classes == list(text)
        assert exported.description['text']['prompt'].startswith('red circle. green square.')


@pytest.fixture
def traced_again(monkeypatch) -> list:
    """Grows by one whenever the exporter traces a graph once more."""
    kind, again = torch.export.ExportedProgram, []
    decompose = kind.run_decompositions
    monkeypatch.setattr(
        kind, 'run_decompositions', lambda *inputs: again.append(1) or decompose(*inputs)
    )
    return again


OTHERS = [name for name in DETECTORS if name not in ('LiteDINO', 'LiteMask2Former panoptic')]


@pytest.mark.parametrize(
    'name', ['LiteDINO', *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_without_grid_sample(name, traced_again, detector, images, tmp_path):
    """By gathers: padded batches of any size, in the runtimes that are there."""
    model, text = detector(name), TEXT if 'Grounding' in name else None
    needs('onnx')
    needs('openvino')
    options = dict(batch=None, portable='gather', text=text)
    exported = [export_detector(model, tmp_path / 'onnx', 'onnx', **options)]
    exported.append(to_openvino(tmp_path / 'onnx', tmp_path / 'openvino'))
    assert not traced_again or text  # of a language model there is more to decompose
    canvas, sizes = batch_of(images[:2], getattr(model.data_preprocessor, 'pad_size_divisor', 1))
    for each in exported:
        expected, actual = predict(model, canvas, sizes, text), each.detect_batch(images[:2])
        for one, other in zip(expected, actual):
            assert max(difference(one, other, canvas.shape[-2:])) < 1e-4
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / 'onnx/model.onnx'))
    kinds = {(node.domain, node.op_type) for node in model.graph.node}
    assert ('', 'GridSample') not in kinds and {domain for domain, _ in kinds} == {''}
    shapes = [value.type.tensor_type.shape.dim for value in model.graph.value_info]
    assert max(map(len, shapes)) <= 5


def test_for_tensorrt(detector, images, tmp_path):
    """Its plugin gets what NVIDIA documents; with our operator in its place all is PyTorch's."""
    import onnx

    needs('onnx')
    model = detector('LiteDINO')
    assert export_detector(model, tmp_path, 'tensorrt', size=(192, 256)) is None
    with pytest.raises(ValueError, match='is for tensorrt, which mmlite does not run'):
        load(tmp_path)
    graph = (written := onnx.load(tmp_path / 'model.onnx')).graph
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    shapes = {
        value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in graph.value_info
    }
    sizes = np.array([[24, 32], [12, 16], [6, 8], [3, 4]], np.int32)
    graph.initializer.append(onnx.numpy_helper.from_array(sizes.flatten().astype(int), 'sizes'))
    plugins = [node for node in graph.node if node.domain]
    assert len(plugins) == model.decoder.num_layers
    for node in plugins:
        assert node.op_type == 'MultiscaleDeformableAttnPlugin_TRT'
        value, spatial_shapes, starts, locations, weights = node.input
        assert [shapes[name] for name in (value, locations, weights)] == [
            [1, 1020, 8, 32],
            [1, 30, 8, 4, 4, 2],
            [1, 30, 8, 4, 4],
        ]
        for name, expected in ((spatial_shapes, sizes), (starts, [0, 768, 960, 1008])):
            assert constants[name].dtype == np.int32
            np.testing.assert_array_equal(constants[name], expected)
        del node.input[:]
        node.input.extend([value, 'sizes', locations, weights])
        node.domain, node.op_type = 'mmlite', 'MSDeformAttn'
    written.opset_import.add(domain='mmlite', version=1)
    onnx.save(written, tmp_path / 'model.onnx')
    description = read_description(tmp_path)
    write_description(tmp_path, description | {'format': 'onnx', 'portable': None})
    assert_agrees(model, load(tmp_path), images)


class Doubling(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return 2 * images, images.long()


def test_executorch_writes_and_runs_a_program(tmp_path):
    pytest.importorskip('executorch.exir')
    images = np.random.default_rng(0).uniform(0, 9, (1, 3, 4, 5)).astype(np.float32)
    program = torch.export.export(Doubling(), (torch.from_numpy(images),))
    described = {'version': FORMAT_VERSION, 'portable': 'gather', 'classes': [], 'input': {}}
    session = write(Traced(program, described), tmp_path, 'executorch').session
    first, doubled = session(images), session(2 * images)
    for outputs, factor in ((first, 1), (doubled, 2)):
        np.testing.assert_allclose(outputs[0], 2 * factor * images)
        np.testing.assert_array_equal(outputs[1], (factor * images).astype(int))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['LiteDINO', 'LiteMask2Former panoptic'])
def test_executorch(name, detector, images, tmp_path):
    pytest.importorskip('executorch.exir')
    model = detector(name)
    assert_agrees(model, export_detector(model, tmp_path, 'executorch', size=(192, 256)), images)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['LiteDINO', 'LiteMask2Former panoptic'])
def test_for_coreml(name, detector, tmp_path):
    """Written in CoreML's own operators; only macOS runs it."""
    coremltools = pytest.importorskip('coremltools')
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

    assert export_detector(detector(name), tmp_path, 'coreml', size=(128, 160)) is None
    with pytest.raises(ValueError, match='is for coreml, which mmlite does not run'):
        load(tmp_path)
    written = coremltools.models.MLModel(str(tmp_path / 'model.mlpackage'), skip_model_load=True)
    spec = written.get_spec()
    assert [value.name for value in spec.description.input] == ['images', 'image_sizes']
    outputs = [value.name for value in spec.description.output]
    assert outputs == read_description(tmp_path)['outputs']
    (block,) = spec.mlProgram.functions['main'].block_specializations.values()
    kinds = {operation.type for operation in block.operations}
    assert {'gather', 'topk'} < kinds <= set(SSAOpRegistry.core_ops)


def test_quotients_for_coreml_are_exact():
    for divisor in (1, 3, 80, 133):
        number = torch.cat([torch.arange(-500, 2000), torch.arange(2**23 - 500, 2**23)])
        assert torch.equal(_quotient(number, divisor), number // divisor)
    assert _quotient(number.float(), 2) is _quotient(number, 2, 'trunc') is NotImplemented


@pytest.mark.slow
def test_masks(detector, images, tmp_path):
    """Of the right shapes. Their pixels are compared in test_graph.py: where a query attends is cut
    at one half, layer after layer, and with random weights many pixels are near it."""
    needs('openvino')
    model = detector('LiteMask2Former panoptic')
    export_for_all(model, tmp_path, batch=None)
    assert_agrees(model, load(tmp_path / 'torch'), images)
    found = load(tmp_path / 'openvino').detect(images[0])
    assert found.masks.shape[1:] == found.panoptic.shape == images[0].shape[:2]
    assert found.masks.dtype == bool and len(found.scores) == len(found.masks) == len(found.boxes)


def test_a_graph_is_traced_once(traced_again, detector, images, tmp_path, monkeypatch):
    """What the exporter would trace again is translated; what is not known is still exported."""
    model = detector('LiteDINO')
    export_detector(model, tmp_path / 'once')
    assert not traced_again
    known = translation_table()
    del known[torch.ops.aten.relu_.default]
    monkeypatch.setattr('mmlite.export.write.translation_table', lambda *_: known)
    exported = export_detector(model, tmp_path / 'again')
    assert traced_again
    assert_agrees(model, exported, images[:1])


def test_a_fixed_canvas_and_batch(detector, images, tmp_path):
    model = detector('LiteDeformableDETR')
    exported = export_detector(model, tmp_path, 'torch', size=(192, 256), batch=2)
    assert_agrees(model, exported, images)
    shapes = [exported.preprocess(image).shape[1:] for image in images]
    assert shapes == [(192, 250), (192, 154), (192, 192)]
    # The third image makes a batch of its own, filled up.
    assert len(exported.detect_batch(images)) == 3
    with pytest.raises(ValueError, match='too small for the model'):
        export_detector(model, tmp_path, 'torch', size=(16, 16))


def test_command(images, tmp_path, monkeypatch):
    """Of a portable model, for which no library is looked for."""
    monkeypatch.setattr('mmlite.export.runtimes._SUFFIX', 'no library')
    model = {**SMALL, 'type': 'LiteDINO', 'encoder': {**SMALL['encoder'], **SCHEDULE}}
    config = tmp_path / 'config.py'
    config.write_text(
        f'_base_ = "mmdet::{STOCK["DINO"]}"\nmodel = {model!r}\n'
        "test_pipeline = [dict(type='LoadImageFromFile'),\n"
        "    dict(type='mmdet.FixScaleResize', scale=(240, 160), keep_ratio=True),\n"
        "    dict(type='mmdet.datasets.transforms.Pad', size_divisor=32),\n"
        "    dict(type='PackDetInputs', meta_keys=('img_shape', 'scale_factor'))]\n"
        "metainfo = dict(classes=('a', 'b', 'c', 'd', 'e'))\n"
        'test_dataloader = dict(dataset=dict(metainfo=metainfo, pipeline=test_pipeline))\n'
    )
    cv2.imwrite(str(tmp_path / 'image.png'), images[1])
    arguments = ['export', config, '-o', tmp_path / 'exported', '--format', 'torch']
    arguments += ['--portable', '--images', tmp_path / 'image.png']
    arguments += ['--cfg-options', 'model.test_cfg.max_per_img=20']
    mmlite(*arguments)
    report = json.loads((tmp_path / 'exported/report.json').read_text())
    assert report['boxes'] < 1e-4 and set(report['latency_ms']) == {'pytorch', 'torch'}
    exported = load(tmp_path / 'exported')
    assert exported.classes == ['a', 'b', 'c', 'd', 'e']
    assert exported.preprocess(images[1]).shape == (3, 224, 160)
    assert exported.description['num_predictions'] == 20

    for options, sentence in (
        (['--batch-size', 'many'], "--batch-size must be a number of images or 'any'; got 'many'"),
        (['--images', config], 'cannot be read as an image'),
        (['--opset', '9', '--format', 'onnx'], 'opset 9 is not supported'),
        (['--cfg-options', 'model.type=SoftTeacher'], 'deformable encoder'),
    ):
        refused(sentence, *arguments, *options)

    monkeypatch.setattr('mmlite.export.write.export_detector', lambda *_, **__: exported)
    monkeypatch.setattr('mmlite.cli.export.TOLERANCE', -1.0)
    told = ' '.join(mmlite(*arguments).split())
    assert 'differs from PyTorch' in told and 'Random weights' in told
    name = 'mmlite.openmmlab.build.build_detector'
    monkeypatch.setattr(name, lambda cfg, _, build=build_detector: build(cfg))
    refused('differs from PyTorch', *arguments[:2], 'weights.pth', *arguments[2:])


def test_missing_packages_are_told_before_the_detector_is_built(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'executorch', None)
    monkeypatch.setattr('mmlite.openmmlab.build.build_detector', None)
    arguments = (f'mmdet::{STOCK["DINO"]}', '-o', tmp_path / 'out', '--format', 'executorch')
    refused('pip install executorch', 'export', *arguments)


def test_what_cannot_be_exported_is_refused_before_it_is_built(tmp_path):
    with pytest.raises(ValueError, match='format must be one of onnx, openvino, torch'):
        export_detector(None, tmp_path, 'tflite')
    for device in ('executorch', 'coreml'):
        with pytest.raises(ValueError, match=f'{device} takes images of one size'):
            export_detector(None, tmp_path, device)
    inside = dict(type='DINO', encoder=dict(num_layers=6))
    with pytest.raises(ValueError, match=r'SoftTeacher .*export the detector inside'):
        check_config(dict(type='SoftTeacher', detector=inside))
    check_config(dict(type=type('Own', (DINO,), {})))
