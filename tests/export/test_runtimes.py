from __future__ import annotations

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from exported import needs
from operator_cases import VARIANTS, Case

from mmlite import ops
from mmlite.export import library, load, runtimes
from mmlite.export.detector import FORMAT_VERSION, write_description
from mmlite.export.operators import _INPUTS, DOMAIN, VERSION
from mmlite.export.runtimes import RUNTIMES

onnx = pytest.importorskip('onnx')

LEVELS = [(8, 10), (4, 5), (2, 3)]
RENAMED = {'locations': 'sampling_locations', 'weights': 'attention_weights'}


def example(variant: str, shapes=LEVELS, **sizes) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Inputs of a node by name, in their order, and PyTorch's output."""
    case = Case(variant, shapes, **{'queries': 50, 'heads': 4, 'dim': 16, **sizes})
    arrays = {RENAMED.get(name, name): tensor.numpy() for name, tensor in case.inputs.items()}
    arrays['spatial_shapes'] = np.array(shapes, np.int64).flatten()
    with ops.use_backend('reference'):
        expected = case.call(case.inputs).numpy()
    return {name: arrays[name] for name in _INPUTS[node_of(variant)] if name in arrays}, expected


def node_of(variant: str) -> str:
    return 'MSDeformAttn' if variant == 'standard' else 'KeyAwareDeformAttn'


def model(variant: str, node: str | None = None) -> bytes:
    """A model of one node, all sizes free."""
    arrays = example(variant)[0]
    inputs = [
        f'{"int64" if array.dtype == np.int64 else "float"}'
        f'[{", ".join(f"{name}_{axis}" for axis in range(array.ndim))}] {name}'
        for name, array in arrays.items()
    ]
    text = f"""<ir_version: 9, opset_import: ["": 18, "{DOMAIN}": {VERSION}]>
        one_node ({', '.join(inputs)}) => (float[b, q, c] output) {{
            output = {DOMAIN}.{node or node_of(variant)}({', '.join(arrays)})
        }}"""
    return onnx.parser.parse_model(text).SerializeToString()


FORMATS = pytest.mark.parametrize('format_', ['onnx', 'openvino'])


def exported(folder, format_: str, content: bytes):
    """An export of a model of one node, as far as loading looks."""
    needs(format_)
    (folder / 'model.onnx').write_bytes(content)
    description = {'version': FORMAT_VERSION, 'format': format_, 'model': 'model.onnx'}
    description |= {'portable': None, 'classes': [], 'input': {'height': None}}
    description |= {'outputs': [], 'preprocessing': {}}
    write_description(folder, description)
    return folder


@FORMATS
@pytest.mark.parametrize('variant', VARIANTS)
def test_agrees_with_pytorch(variant, format_, tmp_path):
    session = load(exported(tmp_path, format_, model(variant))).session
    other = dict(shapes=[(3, 2), (9, 7), (1, 1)], batch=1, queries=3)
    for sizes in ({}, other, dict(queries=0)):
        arrays, expected = example(variant, **sizes)
        (found,) = session(*arrays.values())
        # The next run leaves alone what this one gave.
        session(*{**arrays, 'value': 0 * arrays['value']}.values())
        np.testing.assert_allclose(found, expected, atol=2e-6, rtol=2e-5)


@FORMATS
@pytest.mark.parametrize(
    'variant, changes, sentence',
    [
        ('standard', {'spatial_shapes': [8, 10, 4, 5, 2, 4]}, 'does not stand for the 106 tokens'),
        ('standard', {'spatial_shapes': [8, 10, 4, 5]}, 'must be 3 pairs'),
        ('standard', {'spatial_shapes': [-8, -10, 4, 5, 2, 3]}, 'does not stand for'),
        ('standard', {'attention_weights': (2, 50, 4, 3, 3)}, 'attention_weights must have shape'),
        ('standard', {'sampling_locations': (2, 50, 4, 3, 4, 3)}, 'sampling_locations must be'),
        ('standard', {'value': (1, 106, 4, 16)}, 'but value has batch 1 and 4 heads'),
        ('shared key', {'query': (2, 50, 4, 8)}, 'query must have shape'),
        ('key apart', {'key': (2, 105, 4, 16)}, 'key must have shape'),
    ],
)
def test_refuses_inputs_that_do_not_fit(variant, changes, sentence, format_, tmp_path):
    session = load(exported(tmp_path, format_, model(variant))).session
    arrays, _ = example(variant)
    for name, change in changes.items():
        is_shape = isinstance(change, tuple)
        arrays[name] = np.zeros(change, np.float32) if is_shape else np.array(change)
    with pytest.raises(Exception, match=sentence):
        session(*arrays.values())


def test_a_missing_library_is_a_sentence(monkeypatch):
    monkeypatch.setattr(runtimes, '_SUFFIX', 'nothing')
    with pytest.raises(FileNotFoundError, match=r'not built .* is missing.*--portable'):
        library('onnxruntime')
    with pytest.raises(ValueError, match='runtime must be one of onnxruntime, openvino'):
        library('tensorrt')


DETECTORS_COME_AND_GO = """
import signal, subprocess, sys
from mmlite.export import load

signal.signal(signal.SIGCHLD, lambda *arguments: None)
first, second = load(sys.argv[1]), load(sys.argv[1])
del first
del second
subprocess.run([sys.executable, '-c', ''])
"""


REFUSED_ON_ONE_CORE = """
import os, sys
import numpy as np

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from mmlite.export import load

session = load(sys.argv[1]).session
value, locations = np.zeros((2, 106, 4, 16), 'f'), np.zeros((2, 50, 4, 3, 4, 2), 'f')
for _ in range(3):
    try:
        session(value, np.array([8, 10, 4, 5]), locations, locations[..., 0])
    except Exception as error:
        print('must be 3 pairs' in str(error))
"""


@pytest.mark.skipif(not hasattr(os, 'sched_setaffinity'), reason='processes choose no cores here')
@FORMATS
def test_refuses_on_one_core(format_, tmp_path):
    """OpenVINO's own `infer` says nothing there, and the next one reads what is not its own."""
    folder = exported(tmp_path, format_, model('standard'))
    command = [sys.executable, '-c', REFUSED_ON_ONE_CORE, str(folder)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert told.split() == ['True'] * 3


@pytest.mark.skipif(sys.platform == 'win32', reason='Windows has no such signals')
@FORMATS
def test_signals_arrive_after_detectors_were_freed(format_, tmp_path):
    folder = exported(tmp_path, format_, model('standard'))
    subprocess.run([sys.executable, '-c', DETECTORS_COME_AND_GO, str(folder)], check=True)


@FORMATS
def test_what_a_runtime_does_not_load_is_a_sentence(format_, tmp_path, monkeypatch):
    folder = exported(tmp_path, format_, model('standard', 'MSDeformAttnOfTomorrow'))
    with pytest.raises(ValueError, match=r'^[^\n]*does not take .*MSDeformAttnOfTomorrow[^\n]*$'):
        load(folder)
    other = {'onnx': 'openvino', 'openvino': 'onnx'}[format_]
    needs(other)
    (tmp_path / 'no_library.so').write_bytes(b'nothing')
    for path in (tmp_path / 'no_library.so', library(RUNTIMES[other])):
        monkeypatch.setattr('mmlite.export.runtimes.library', lambda runtime, path=path: path)
        told = rf'^[^\n]*does not load the operators in [^\n]*{path.name}[^\n]*$'
        with pytest.raises(ValueError, match=told):
            load(folder)


def test_onnxruntime_keeps_the_norm_behind_an_addition(tmp_path, monkeypatch):
    """Fused, the two are slower than apart."""
    folder, told = exported(tmp_path, 'onnx', model('standard')), {}
    session = SimpleNamespace(get_inputs=list)
    monkeypatch.setattr('onnxruntime.InferenceSession', lambda *_, **k: told.update(k) or session)
    load(folder)
    assert told == {'disabled_optimizers': ['SkipLayerNormFusion']}


def test_openvino_keeps_what_it_compiled(tmp_path, monkeypatch):
    """Of the model's present files; what is kept of others goes. It need not be writable."""
    folder, caches = exported(tmp_path, 'openvino', model('standard')), tmp_path / '.openvino'
    arrays, expected = example('standard')
    compile_model, compiled = pytest.importorskip('openvino').Core.compile_model, []

    def spy(*args):
        compiled.append(compile_model(*args))
        return compiled[-1]

    monkeypatch.setattr('openvino.Core.compile_model', spy)

    def is_kept() -> bool:
        session = load(folder).session
        np.testing.assert_allclose(session(*arrays.values())[0], expected, atol=2e-6, rtol=2e-5)
        return compiled[-1].get_property('LOADED_FROM_CACHE')

    assert [is_kept(), is_kept()] == [False, True]
    arrays, expected = example('shared key')
    exported(tmp_path, 'openvino', model('shared key'))
    assert [is_kept(), is_kept()] == [False, True] and len(list(caches.iterdir())) == 1
    shutil.rmtree(caches)
    caches.write_text('in the way')
    assert [is_kept(), is_kept()] == [False, False]
