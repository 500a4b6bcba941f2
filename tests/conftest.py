"""Fixtures that several test modules share."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before
# anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')

GOLDEN = Path(__file__).parent / 'data/golden'


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
