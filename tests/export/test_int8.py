"""Detectors in 8 bits: nearly the same boxes, our operators still there, heads in float."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from click.testing import CliRunner
from exported import needs

from mmlite.cli import main
from mmlite.export import load, openvino_core, quantize
from mmlite.export.int8 import KEPT_IN_FLOAT, as_convolutions, coco_ap

openvino = pytest.importorskip('openvino')
pytest.importorskip('nncf')
pytest.importorskip('onnxscript')
pytestmark = pytest.mark.timeout(900)


def test_quantized(exported_lite_dino, images, tmp_path):
    needs('openvino')
    folder = exported_lite_dino[1] / 'openvino'
    exported = load(folder)
    for number, image in enumerate(images):
        cv2.imwrite(str(tmp_path / f'{number}.png'), image)
    # What the float detector finds is the truth.
    found = exported.detect(images[0], 0.0)
    objects = []
    for number, (box, label) in enumerate(zip(found.boxes, found.labels)):
        sides = (box[2:] - box[:2]).tolist()
        one = {'id': number + 1, 'image_id': 1, 'category_id': 7 + int(label), 'iscrowd': 0}
        objects.append({**one, 'bbox': [*box[:2].tolist(), *sides], 'area': sides[0] * sides[1]})
    truth = {
        'images': [{'id': 1, 'file_name': '0.png', 'height': 200, 'width': 260}],
        'categories': [{'id': 7 + i, 'name': name} for i, name in enumerate(exported.classes)],
        'annotations': objects,
    }
    (tmp_path / 'truth.json').write_text(json.dumps(truth))
    assert coco_ap(exported, tmp_path / 'truth.json', tmp_path) > 50

    arguments = ['quantize', str(folder), '-o', str(tmp_path / 'int8')]
    options = ['--images', str(tmp_path / '0.png'), '--images', str(tmp_path / '1.png')]
    annotated = ['--annotations', str(tmp_path / 'truth.json'), '--annotated-images', str(tmp_path)]
    result = CliRunner().invoke(main, [*arguments, *options, *annotated])
    assert result.exit_code == 0, result.output
    assert 'before' in result.output

    core = openvino_core(with_operators=True)
    model = core.read_model(str(tmp_path / 'int8/model.xml'))
    types = [node.get_type_name() for node in model.get_ops()]
    assert types.count('FakeQuantize') > 20
    assert types.count('KeyAwareDeformAttn') == 4  # of the encoder and of the decoder
    for node in model.get_ops():
        if node.get_type_name() == 'MatMul':
            name = node.get_friendly_name()
            inputs = [port.get_source_output().get_node() for port in node.inputs()]
            quantized = any(source.get_type_name() == 'FakeQuantize' for source in inputs)
            if name.startswith('bbox_head') or 'sampling_offsets' in name:
                assert not quantized, name
    quantized = load(tmp_path / 'int8')
    assert quantized.description['int8'] == {'calibration_images': 2}
    assert np.abs(quantized.detect(images[0]).scores - found.scores).max() < 0.1

    again = tmp_path / 'again'
    for arguments, sentence in (
        ((tmp_path / 'int8', again, images), 'quantised already'),
        ((folder, again, []), 'needs images'),
        ((folder, folder, images), 'a folder of its own'),
        ((folder.parent / 'torch', again, images), '8 bits are for OpenVINO alone'),
    ):
        with pytest.raises(ValueError, match=sentence):
            quantize(*arguments)


def test_convolutions_are_the_products(exported_lite_dino, images):
    needs('openvino')
    core = openvino_core(with_operators=True)
    model = core.read_model(str(exported_lite_dino[1] / 'openvino/model.xml'))
    height, width = images[0].shape[:2]
    model.reshape([1, 3, height, width])
    image = np.ascontiguousarray(images[0].transpose(2, 0, 1)[None], np.float32)

    def outputs():
        compiled = core.compile_model(model, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
        return list(compiled([image]).values())

    def names(kind: str) -> set[str]:
        nodes = (node for node in model.get_ops() if node.get_type_name() == kind)
        return {node.get_friendly_name().partition('/')[0] for node in nodes}

    expected, products = outputs(), names('MatMul')
    as_convolutions(model, KEPT_IN_FLOAT)
    # Rounding may exchange two queries with nearly the same score.
    for actual, wanted in zip(outputs(), expected):
        np.testing.assert_allclose(np.sort(actual, 1), np.sort(wanted, 1), rtol=1e-3, atol=1e-3)
    moved = names('Convolution') & products
    assert {'encoder.layers.0.self_attn.value_proj', 'encoder.layers.0.ffn.layers.1'} <= moved
    assert 'encoder.layers.0.self_attn.sampling_offsets' in names('MatMul') - moved
