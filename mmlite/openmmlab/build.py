"""Detectors from configs, built to be looked at: nothing is downloaded."""

from __future__ import annotations

import copy
import logging
import re
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mmdet.datasets import CocoDataset
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from torch import nn

from .checkpoints.loading import load_checkpoint
from .detectors.grounding_dino import adapt_bert
from .families import parts_of, reads_text, type_name

# mmengine's initialisation from a checkpoint: its registered name and its class.
_PRETRAINED = ('Pretrained', 'PretrainedInit')


def load_config(reference: str, changes: dict | None = None) -> Config:
    """Read a config, and do its custom imports.

    Args:
        reference (str): A path, ``mmdet::folder/config.py`` or ``mmlite::folder/config.py``.
        changes (dict, optional): Key -> value, such as ``{'model.num_queries': 300}``.

    Raises:
        FileNotFoundError: There is no such config.
        ValueError: It cannot be read, or has no model.
    """
    package, found, name = reference.partition('::')
    if reference.endswith(('.pth', '.pt')):
        separate = 'a space, not a comma, goes between config and checkpoint'
        how = separate if ',' in reference else 'give its config before it'
        raise ValueError(f'{reference} is a checkpoint: {how}')
    try:
        if found and package != 'mmlite':
            config = get_config(reference)
        else:
            # mmengine finds packaged configs of pip's packages alone; a source tree has its own.
            path = Path(__file__).parents[1] / '.mim/configs' / name if found else Path(reference)
            if not path.is_file():
                raise FileNotFoundError(f'config file {reference} does not exist')
            config = Config.fromfile(path)
        config.merge_from_dict(changes or {})
    except FileNotFoundError:
        raise
    except Exception as error:  # a config is a program and may fail in any way
        raise ValueError(f'config {reference} cannot be read: {_one_line(error)}') from error
    if 'model' not in config:
        raise ValueError(f'config {reference} has no model')
    return config


def build_detector(
    config: Config, checkpoint: str | None = None, device: torch.device | str = 'cpu'
) -> nn.Module:
    """Build the detector of a config, with random weights or those of a checkpoint.

    The config is not changed, the weights are loaded strictly. The detector is in eval mode, with
    the ``cfg`` and ``dataset_meta`` that MMDetection's ``inference_detector`` wants.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The detector cannot be built or the checkpoint does not fit it.
    """
    name = Path(config.filename).name if config.filename else 'this config'
    init_default_scope(config.get('default_scope') or 'mmdet')
    try:
        with tempfile.TemporaryDirectory() as folder:
            model_config = copy.deepcopy(config.model)
            if 'language_model' in model_config:
                _need_no_text_weights(model_config, checkpoint, Path(folder))
            model = build_initialised(model_config)
    except Exception as error:
        raise ValueError(f'the model of {name} cannot be built: {_one_line(error)}') from error
    if reads_text(model):
        adapt_bert(model.language_model)
    if checkpoint is not None:
        _load(model, checkpoint, name)
    dataset = (config.get('test_dataloader') or {}).get('dataset', {})
    classes = (dataset.get('metainfo') or {}).get('classes', CocoDataset.METAINFO['classes'])
    model.cfg, model.dataset_meta = config, {'classes': classes}
    return model.to(device).eval()


def build_initialised(model_config: ConfigDict) -> nn.Module:
    """Build a model in training mode with random weights, without a log line a parameter.

    The config is not changed, and what it would download is not downloaded.
    """
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    model_config = copy.deepcopy(model_config)
    _forget_pretraining(model_config)
    try:
        model = MODELS.build(model_config)
        model.init_weights()
    finally:
        logger.setLevel(level)
    return model


def _load(model: nn.Module, checkpoint: str, config_name: str) -> None:
    content = load_checkpoint(checkpoint)
    state = content.get('state_dict', content) if isinstance(content, dict) else {}
    # DDQ in training writes these of its head a second time.
    state = {k: v for k, v in state.items() if not k.startswith('decoder.aux_reg_branches.')}
    wanted = model.state_dict()
    common = wanted.keys() & state.keys()
    problems = {
        'missing': wanted.keys() - common,
        'unknown to the model': state.keys() - common,
        'of another shape': {k for k in common if wanted[k].shape != state[k].shape},
    }
    found = [f'{len(k)} are {problem} (such as {min(k)})' for problem, k in problems.items() if k]
    if found:
        raise ValueError(
            f'checkpoint {checkpoint} does not fit {config_name}; give it the config of its '
            f'training. Of parameters {", ".join(found)}'
        )
    model.load_state_dict(state)


def _need_no_text_weights(model_config: ConfigDict, checkpoint: str | None, folder: Path) -> None:
    """Change Grounding DINO's config, in place, so that it needs nothing of other packages.

    Without a checkpoint a BERT of the same size is made, with the words of COCO's classes. Where
    fairscale is missing the stock encoder cannot recompute activations; the Lite one then does not
    either, to compare equals.
    """
    if find_spec('fairscale') is None:
        model_config.encoder.num_cp = 0
    if checkpoint is not None or Path(model_config.language_model.name).is_dir():
        return
    from safetensors.torch import save_file
    from transformers import BertConfig
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()  # it would list every weight that is not there
    words = dict.fromkeys(' '.join(CocoDataset.METAINFO['classes']).split())
    vocabulary = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '.', '?', *words]
    (folder / 'vocab.txt').write_text('\n'.join(vocabulary) + '\n')
    (folder / 'tokenizer_config.json').write_text('{"tokenizer_class": "BertTokenizer"}')
    BertConfig().save_pretrained(folder)
    save_file({}, folder / 'model.safetensors', {'format': 'pt'})
    model_config.language_model.name = str(folder)


def _forget_pretraining(config: Any) -> None:
    """Remove from a config, in place, all that would fetch weights from somewhere."""
    for _, part in parts_of(config):
        for name, value in list(part.items()):
            kind = type_name(value.get('type')) if isinstance(value, dict) else None
            if name == 'pretrained' or kind in _PRETRAINED:
                del part[name]


def _one_line(error: Exception) -> str:
    return ' '.join(str(error).split()) or type(error).__name__


@dataclass(frozen=True)
class DetectorSpec:
    """A config, and where its weights are."""

    config: str  # as for load_config
    checkpoint: str | None = None  # random weights otherwise

    @classmethod
    def parse(cls, text: str) -> DetectorSpec:
        """From ``config`` or ``config,checkpoint``, as on the command line."""
        config, _, checkpoint = text.partition(',')
        return cls(config, checkpoint or None)

    @property
    def name(self) -> str:
        """The config's name without what it says about training, which does not matter here."""
        stem = Path(self.config.partition('::')[2] or self.config).stem
        return re.sub(r'(_\d+xb\d+-\d+e)?(_coco)?$', '', stem)
