"""Fixtures that several test modules share."""

from __future__ import annotations

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


def _mmengine_instances(manager: type | None = None) -> dict[type, dict]:
    """What MMEngine keeps by name, of each of its kinds: loggers, scopes, visualizers, ..."""
    if manager is None:
        module = sys.modules.get('mmengine.utils.manager')
        return _mmengine_instances(module.ManagerMixin) if module else {}
    found = {manager: dict(manager._instance_dict)}
    for kind in manager.__subclasses__():
        found |= _mmengine_instances(kind)
    return found


@pytest.fixture(autouse=True)
def mmengine_as_it_was():
    """A runner leaves nothing: the next would find its scope, and a visualizer of its folder."""
    before = _mmengine_instances()
    yield
    for manager in _mmengine_instances():
        manager._instance_dict.clear()
        manager._instance_dict.update(before.get(manager, {}))


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


@pytest.fixture
def mmpretrain(monkeypatch):
    """MMPretrain, or where it cannot be imported a ConvNeXt of transformers in its place."""
    try:
        import mmpretrain.models  # noqa: F401
    except ImportError:
        pass
    else:
        yield
        return
    from mmengine.registry import MODELS, Registry

    hf = pytest.importorskip('transformers', reason='neither mmpretrain nor transformers is there')
    tiny = dict(depths=[3, 3, 9, 3], channels=[96, 192, 384, 768])

    class ConvNeXt(torch.nn.Module):
        """What MMPretrain's takes and returns."""

        def __init__(
            self,
            arch: str | dict,
            out_indices: list[int],
            drop_path_rate: float,
            layer_scale_init_value: float,
            gap_before_final_norm: bool,
            init_cfg: dict | None = None,
        ) -> None:
            super().__init__()
            assert not gap_before_final_norm  # or there would be no maps
            arch = {'tiny': tiny}[arch] if isinstance(arch, str) else arch
            config = hf.ConvNextConfig(
                depths=arch['depths'],
                hidden_sizes=arch['channels'],
                drop_path_rate=drop_path_rate,
                layer_scale_init_value=layer_scale_init_value,
                out_features=[f'stage{index + 1}' for index in out_indices],
            )
            self.backbone = hf.ConvNextBackbone(config)

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(self.backbone(images).feature_maps)

    package, models = ModuleType('mmpretrain'), ModuleType('mmpretrain.models')
    package.models = models
    monkeypatch.setitem(sys.modules, 'mmpretrain', package)
    monkeypatch.setitem(sys.modules, 'mmpretrain.models', models)
    Registry('model', parent=MODELS, scope='mmpretrain').register_module(module=ConvNeXt)
    yield
    del MODELS.children['mmpretrain']
