"""MMDetection's own detectors in small: every stock config shrunk so that it runs in a moment."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.hub import get_config
from torch import nn

from mmlite.openmmlab.detectors.grounding_dino import adapt_bert
from mmlite.openmmlab.families import find_holder, reads_text
from mmlite.openmmlab.lite_config import lite_change, main_schedule

STOCK = {
    'plain': 'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    'refine': 'deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco.py',
    'two-stage': 'deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py',
    'DINO': 'dino/dino-4scale_r50_8xb2-12e_coco.py',
    'DDQ': 'ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py',
    'GroundingDINO': 'grounding_dino/grounding_dino_r50_scratch_8xb2_1x_coco.py',
    'MM-GroundingDINO': 'mm_grounding_dino/grounding_dino_swin-t_pretrain_obj365.py',
    'Mask2Former': 'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
    'panoptic': 'mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py',
    'Mask2Former Swin': 'mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py',
}
# MMDetection ties two-stage models to 256 channels, so the channels stay.
_ATTENTION = dict(dropout=0.0)
_LAYER = dict(self_attn_cfg=_ATTENTION, ffn_cfg=dict(feedforward_channels=64, ffn_drop=0.0))
SMALL = dict(
    num_queries=30,
    backbone=dict(depth=18, init_cfg=None, frozen_stages=-1),
    neck=dict(in_channels=[128, 256, 512]),
    encoder=dict(num_layers=2, layer_cfg=_LAYER),
    decoder=dict(num_layers=2, layer_cfg=dict(**_LAYER, cross_attn_cfg=_ATTENTION)),
    bbox_head=dict(num_classes=5),
    test_cfg=dict(max_per_img=30),
)
_SWIN = dict(depths=[1, 1, 1, 1], with_cp=False, init_cfg=None)
SMALL_TEXT = dict(
    num_cp=-1,  # recomputing activations takes fairscale in the stock encoder
    fusion_layer_cfg=dict(dropout=0.0, embed_dim=64, init_values=0.5),
    text_layer_cfg=dict(ffn_cfg=dict(feedforward_channels=64)),
)
_FFN = dict(num_layers=2, layer_cfg=dict(ffn_cfg=dict(feedforward_channels=64)))
SMALL_MASK2FORMER = dict(
    data_preprocessor=dict(batch_augments=None),  # they pad to 1024x1024
    backbone=SMALL['backbone'],
    panoptic_head=dict(
        in_channels=[64, 128, 256, 512],
        num_queries=20,
        pixel_decoder=dict(encoder=_FFN),
        transformer_decoder=_FFN,
    ),
    train_cfg=dict(num_points=512),
    test_cfg=dict(max_per_image=10),
)
PHRASES = ('red circle', 'green square', 'square', 'blue circle', 'circle')

# What a config can say of the Lite encoder and its decoder beside the defaults.
ENCODERS = {
    'standard': dict(key_aware=False),
    'proj_key': dict(layer_cfg=dict(self_attn_cfg=dict(proj_key=True))),
    'same_loc': dict(layer_cfg=dict(self_attn_cfg=dict(same_loc=True))),
    'one_ffn': dict(small_ffn=False),
    'sequential': dict(update='sequential'),
    'recomputed': dict(num_cp=2),
}
DECODERS = {
    'proj_key': dict(layer_cfg=dict(cross_attn_cfg=dict(proj_key=True))),
    'same_loc': dict(layer_cfg=dict(cross_attn_cfg=dict(same_loc=True))),
}


def small_config(name: str, bert: str = '') -> Config:
    """A config of :data:`STOCK`, shrunk; ``bert`` is the folder of Grounding DINO's BERT."""
    register_all_modules()
    config = get_config(f'mmdet::{STOCK[name]}')
    is_mask2former = 'panoptic_head' in config.model
    small = copy.deepcopy(SMALL_MASK2FORMER if is_mask2former else SMALL)
    if config.model.backbone.type == 'SwinTransformer':
        small['backbone'] = _SWIN
        where = small['panoptic_head'] if is_mask2former else small['neck']
        where['in_channels'] = [96, 192, 384, 768][-3 - is_mask2former :]
    if bert:
        small['encoder'].update(SMALL_TEXT, layer_cfg=small['encoder']['layer_cfg'])
        small['language_model'] = dict(name=bert)
    config.merge_from_dict(dict(model=small))
    return config


def write_pair(folder: Path, name: str, bert: str = '', **changes) -> tuple[str, str]:
    """Write a small detector without and with the Lite encoder; the paths of both configs."""
    config = small_config(name, bert)
    config.merge_from_dict(changes)
    paths = folder / 'stock.py', folder / 'lite.py'
    lite = {'model': lite_change(config.model, main_schedule(config.model))}
    for path, change in zip(paths, ({}, lite)):
        config.merge_from_dict(change)
        entries = config.to_dict().items()
        path.write_text('\n'.join(f'{entry} = {value!r}' for entry, value in entries))
    return str(paths[0]), str(paths[1])


def small_model(
    name: str, encoder: dict | None = None, bert: str = '', std: float = 0.0, **changes
) -> nn.Module:
    """Build a detector of :data:`STOCK`, with the same weights every time.

    With ``encoder`` it has a Lite encoder of these arguments; a schedule such as ``'-(2+1)x1'``
    gets the levels that fit, one of them low. ``bert`` is the folder of Grounding DINO's BERT.
    With ``std`` the transformer's parameters, those that start at zero too, are drawn that wide.
    """
    config = small_config(name, bert)
    if encoder is not None:
        _, part, family = find_holder(config.model)
        part.type = family.lite
        encoder = dict(encoder)
        if str(encoder.get('schedule', '')).startswith('-'):
            levels = part.encoder.layer_cfg.self_attn_cfg.get('num_levels', 4)
            encoder['schedule'] = f'H{levels - 1}L1{encoder["schedule"]}'
        part.encoder.merge(encoder)
    config.merge_from_dict(dict(model=changes))
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    if bert:
        adapt_bert(model.language_model)
    if hasattr(model, 'level_embed'):
        nn.init.normal_(model.level_embed)  # MMDetection leaves it as the memory was
    if std:
        torch.manual_seed(3)
        names = ('encoder', 'decoder', 'bbox_head', 'panoptic_head')
        for part in (getattr(model, name) for name in names if hasattr(model, name)):
            for parameter in part.parameters():
                nn.init.normal_(parameter, std=std)
    return model


def batch(model: nn.Module, padded: bool = True, texts: tuple = (PHRASES, PHRASES)) -> dict:
    """A preprocessed training batch of two images; ``padded`` gives them different sizes."""
    has_masks = hasattr(model, 'panoptic_head')
    sizes = [(3, 96, 128), (3, 128, 80)] if padded else [(3, 96, 128)] * 2
    packed = demo_mm_inputs(
        2,
        sizes,
        num_items=[3, 2],
        num_classes=3 if reads_text(model) else 5,
        with_mask=has_masks,
        with_semantic=has_masks and model.num_stuff_classes > 0,
    )
    if reads_text(model):
        for sample, text in zip(packed['data_samples'], texts):
            sample.set_metainfo(dict(text=text, custom_entities=True))
    return model.data_preprocessor(packed, training=True)


def losses(model: nn.Module, data: dict) -> dict[str, torch.Tensor]:
    """The losses of a training step, with their sum as ``loss``."""
    torch.manual_seed(0)  # denoising queries and the points of masks are random
    model.zero_grad()
    return model.parse_losses(model.train()(**data, mode='loss'))[1]


def without_gradient(model: nn.Module, data: dict) -> list[str]:
    """Names of the parameters that a training step gives no finite gradient: DDP waits for all."""
    losses(model, data)['loss'].backward()
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and (parameter.grad is None or not parameter.grad.isfinite().all())
    ]
