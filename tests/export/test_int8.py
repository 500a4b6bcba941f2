import json

import cv2
import numpy as np
import pytest
from commands import mmlite
from exported import needs

from mmlite.analysis.accuracy import Dataset
from mmlite.export import load, openvino_core, quantize
from mmlite.export.int8 import as_convolutions

openvino = pytest.importorskip('openvino')
pytest.importorskip('nncf')
pytest.importorskip('onnxscript')
pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def folder(exported_lite_dino):
    needs('openvino')
    return exported_lite_dino[1] / 'openvino'


def names_of(model, kind: str) -> list[str]:
    """Modules of the nodes of a kind."""
    nodes = (node for node in model.get_ops() if node.get_type_name() == kind)
    return [node.get_friendly_name().partition('/')[0] for node in nodes]


def test_quantized(folder, images, tmp_path):
    exported = load(folder)
    for number, image in enumerate(images):
        cv2.imwrite(str(tmp_path / f'{number}.png'), image)
    # What the float detector finds is the truth.
    found = exported.detect(images[0], 0.0)
    objects = []
    for number, (box, label) in enumerate(zip(found.boxes.tolist(), found.labels)):
        width, height = box[2] - box[0], box[3] - box[1]
        one = {'id': number + 1, 'image_id': 1, 'category_id': 7 + int(label), 'iscrowd': 0}
        objects.append({**one, 'bbox': [*box[:2], width, height], 'area': width * height})
    truth = {
        'images': [{'id': 1, 'file_name': '0.png', 'height': 200, 'width': 260}],
        'categories': [{'id': 7 + i, 'name': name} for i, name in enumerate(exported.classes)],
        'annotations': objects,
    }
    (tmp_path / 'truth.json').write_text(json.dumps(truth))
    assert Dataset(tmp_path / 'truth.json', tmp_path).evaluate(exported)['mAP'] > 50

    options = ['--images', tmp_path / '0.png', '--images', tmp_path / '1.png']
    options += ['--annotations', tmp_path / 'truth.json', '--annotated-images', tmp_path]
    assert 'before' in mmlite('quantize', folder, '-o', tmp_path / 'int8', *options)

    model = openvino_core(with_operators=True).read_model(str(tmp_path / 'int8/model.xml'))
    assert len(names_of(model, 'FakeQuantize')) > 20
    assert len(names_of(model, 'KeyAwareDeformAttn')) == 4  # of the encoder and of the decoder
    for node in model.get_ops():
        name = node.get_friendly_name()
        if node.get_type_name() == 'MatMul' and ('bbox_head' in name or 'sampling_off' in name):
            sources = [port.get_source_output().get_node() for port in node.inputs()]
            assert 'FakeQuantize' not in [source.get_type_name() for source in sources], name
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


def test_convolutions_are_the_products(folder, images):
    core = openvino_core(with_operators=True)
    model = core.read_model(str(folder / 'model.xml'))
    model.reshape([1, 3, *images[0].shape[:2]])
    image = np.ascontiguousarray(images[0].transpose(2, 0, 1)[None], np.float32)

    def outputs():
        compiled = core.compile_model(model, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
        return list(compiled([image]).values())

    expected, products = outputs(), names_of(model, 'MatMul')
    as_convolutions(model)
    # Rounding may exchange two queries with nearly the same score.
    for actual, wanted in zip(outputs(), expected):
        np.testing.assert_allclose(np.sort(actual, 1), np.sort(wanted, 1), rtol=1e-3, atol=1e-3)
    moved = {*names_of(model, 'Convolution')} & {*products}
    assert {'encoder.layers.0.self_attn.value_proj', 'encoder.layers.0.ffn.layers.1'} <= moved
    assert 'encoder.layers.0.self_attn.sampling_offsets' in {*names_of(model, 'MatMul')} - moved
