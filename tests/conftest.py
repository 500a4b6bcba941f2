"""Fixtures that several test modules share."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before
# anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')

# Beside each other, the processes of pytest-xdist share the cores; so do those that tests start.
WORKERS = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', '1'))
if WORKERS > 1:
    threads = max(1, (os.cpu_count() or 1) // WORKERS)
    os.environ.setdefault('OMP_NUM_THREADS', str(threads))
    torch.set_num_threads(threads)

GOLDEN = Path(__file__).parent / 'data/golden'


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--slow', action='store_true', help='also run what is slow and rare')


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption('--slow'):
        skip = pytest.mark.skip(reason='slow: run with --slow')
        for item in items:
            if 'slow' in item.keywords:
                item.add_marker(skip)


def _managers() -> list[type]:
    """What MMEngine keeps instances of by name: loggers, scopes, visualizers, ..."""
    module = sys.modules.get('mmengine.utils.manager')
    kinds = [module.ManagerMixin] if module else []
    for kind in kinds:
        kinds += kind.__subclasses__()
    return kinds


@pytest.fixture(autouse=True)
def mmengine_as_it_was():
    """A runner leaves nothing: the next would find its scope, and a visualizer of its folder."""
    before = {kind: dict(kind._instance_dict) for kind in _managers()}
    yield
    for kind in _managers():
        kind._instance_dict.clear()
        kind._instance_dict.update(before.get(kind, {}))


@pytest.fixture(scope='session')
def golden():
    """Load a file of the golden vectors as tensors, with its meta data as a dict."""

    def load(name: str) -> tuple[dict[str, torch.Tensor], dict]:
        with np.load(GOLDEN / name) as arrays:
            meta = json.loads(str(arrays['meta']))
            return {k: torch.from_numpy(arrays[k]) for k in arrays.files if k != 'meta'}, meta

    return load


@pytest.fixture(scope='session')
def tiny_bert(tmp_path_factory) -> str:
    """A folder with a BERT of one layer and a vocabulary of twelve words."""
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    folder = tmp_path_factory.mktemp('bert')
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '.', '?', 'red', 'green', 'blue']
    words += ['circle', 'square']
    (folder / 'vocab.txt').write_text('\n'.join(words) + '\n')
    (folder / 'tokenizer_config.json').write_text(json.dumps({'tokenizer_class': 'BertTokenizer'}))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


class ConvNeXt(torch.nn.Module):
    """Takes what MMPretrain's does, and builds nothing."""

    def __init__(self, arch, out_indices, drop_path_rate, layer_scale_init_value, **_) -> None:
        super().__init__()


@pytest.fixture
def mmpretrain(monkeypatch):
    """MMPretrain, or where it cannot be imported a stand-in for its ConvNeXt."""
    try:
        import mmpretrain.models  # noqa: F401
    except ImportError:
        from mmengine.registry import MODELS, Registry

        for name in ('mmpretrain', 'mmpretrain.models'):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setattr(MODELS, '_children', {**MODELS.children})
        Registry('model', parent=MODELS, scope='mmpretrain').register_module(module=ConvNeXt)
