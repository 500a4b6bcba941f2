"""A study that trains in seconds: tiny drawn images, a tiny detector, two epochs."""

from __future__ import annotations

from pathlib import Path

import yaml

from benchmarks.study.plan import SHIPPED

THIN = {'embed_dims': 32}
LAYER = {'self_attn_cfg': THIN, 'ffn_cfg': {**THIN, 'feedforward_channels': 32}}
MODEL = {
    'num_queries': 20,
    'backbone': {'base_channels': 8},
    'neck': {'in_channels': [16, 32, 64], 'out_channels': 32},
    'positional_encoding': {'num_feats': 16},
    'encoder': {'num_layers': 2, 'layer_cfg': LAYER},
    'decoder': {'num_layers': 1, 'layer_cfg': {**LAYER, 'cross_attn_cfg': THIN}},
    'bbox_head': THIN,
    'dn_cfg': {'group_cfg': {'num_dn_queries': 4}},
    'test_cfg': {'max_per_img': 20},
}
LITE = {'model': {'type': 'LiteNarrowDINO', 'encoder': {'schedule': 'H3L1-(2+1)x1'}}}


def content(**changes) -> dict:
    """A plan that can be run."""
    return {
        'baseline': 'stock',
        'seeds': [0],
        'data': {
            'drawn': {
                'draw': {'style': 'details', 'train': 8, 'val': 2, 'image_size': 96, 'seed': 0},
                'config': str(SHIPPED / 'dino-4scale_r18_1xb8-8e_details.py'),
            }
        },
        'set': {
            'model': MODEL,
            'train_dataloader': {'batch_size': 4},
            'train_cfg': {'max_epochs': 2, 'val_interval': 1},
        },
        'rows': {
            'stock': None,
            'lite': {'set': LITE},
            'warm': {'set': LITE, 'warm_start': 'stock'},
        },
        **changes,
    }


def write(folder: Path, **changes) -> Path:
    path = folder / 'tiny.yaml'
    path.write_text(yaml.safe_dump(content(**changes), sort_keys=False))
    return path
