"""The config with which a converted checkpoint computes what its authors' model computed."""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections.abc import Mapping

from mmdet.registry import MODELS
from mmengine.config import Config
from torch import Tensor

from .official import Conversion

_DINO = 'mmdet::dino/dino-4scale_r50_8xb2-36e_coco.py'
_DEFORMABLE_DETR = 'mmdet::deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py'


def official_config(
    conversion: Conversion, args: Namespace | None = None, num_queries: int | None = None
) -> str:
    """Text of a config file for the ``state_dict`` of :func:`from_official`.

    Everything that the weights show is read off them. What they do not show comes from the
    arguments of the run where the checkpoint holds them. Otherwise it is what the original
    repositories published: 8 attention heads, and 300 queries of two-stage models, 1500 of
    H-Deformable-DETR's being one-to-many ones.

    Args:
        conversion (Conversion): Result of :func:`from_official`.
        args (Namespace, optional): Arguments of the run, from :func:`unpack`.
        num_queries (int, optional): Queries at inference, where neither weights nor ``args`` tell.

    Returns:
        str: A config that inherits from MMDetection's.

    Raises:
        ValueError: If an H-Deformable-DETR's queries can be split in more than one way.
    """
    layout, state = conversion.layout, conversion.state_dict
    embed_dims, levels = state['level_embed'].shape[1], layout.num_levels
    heads = getattr(args, 'nheads', 8)
    shape = dict(embed_dims=embed_dims, num_heads=heads)

    def layers(part: str, number: int, attention: str) -> dict:
        name = f'{part}.layers.0.{attention}'
        rows = len(state[f'{name}.sampling_offsets.weight']) // (2 * heads)
        points = getattr(args, f'{part[:3]}_n_points', 4)
        sampled: dict = dict(num_levels=levels, num_points=rows // levels)
        if f'{name}.query_proj.weight' in state and levels > 1 and rows == points:
            sampled.update(num_points=points, same_loc=True)
        if f'{name}.key_proj.weight' in state:
            sampled.update(proj_key=True)
        channels = len(state[f'{part}.layers.0.ffn.layers.0.0.weight'])
        return dict(
            num_layers=number,
            layer_cfg={
                'self_attn_cfg': dict(shape),
                f'{attention}_cfg': dict(shape, **sampled),
                'ffn_cfg': dict(embed_dims=embed_dims, feedforward_channels=channels),
            },
        )

    encoder = layers('encoder', layout.encoder_layers, 'self_attn')
    decoder = layers('decoder', layout.decoder_layers, 'cross_attn')
    embedded = len(state.get('query_embedding.weight', ()))
    if layout.family == 'h-deformable-detr':
        num_queries = num_queries or getattr(args, 'num_queries_one2one', None)
        if not num_queries and embedded not in (300, 1800):
            raise ValueError(
                f'the file has {embedded} queries and does not say how many are one-to-one; give '
                'the number of queries at inference: --num-queries'
            )
        num_queries = num_queries or 300
    else:
        num_queries = embedded or num_queries or getattr(args, 'num_queries', 300)
    model = dict(
        num_queries=num_queries,
        num_feature_levels=levels,
        backbone=_backbone(state, layout.backbone),
        neck=dict(
            in_channels=[
                state[f'neck.convs.{i}.conv.weight'].shape[1] for i in range(layout.num_maps)
            ],
            out_channels=embed_dims,
            num_outs=levels,
            bias=True,
        ),
        encoder=encoder,
        decoder=decoder,
        positional_encoding=dict(num_feats=embed_dims // 2),
        bbox_head=dict(
            num_classes=len(state['bbox_head.cls_branches.0.weight']), embed_dims=embed_dims
        ),
    )
    base = _DINO if 'dino' in layout.family else _DEFORMABLE_DETR
    most = num_queries * model['bbox_head']['num_classes']
    if most < Config.fromstring(f'_base_ = {base!r}', '.py').model.test_cfg.max_per_img:
        model['test_cfg'] = dict(max_per_img=most)
    if layout.family == 'deformable-detr':
        model.update(with_box_refine=layout.refines, as_two_stage=layout.two_stage)
    elif layout.family == 'h-deformable-detr':
        model.update(type='HDeformableDETR', num_one2many_queries=embedded - num_queries)
        model['bbox_head']['type'] = 'HDeformableDETRHead'
        for part in (encoder['layer_cfg'], decoder['layer_cfg']):
            part['ffn_cfg']['ffn_drop'] = 0.0
            for name in part.keys() - {'ffn_cfg'}:
                part[name]['dropout'] = 0.0
    elif layout.family == 'lite-dino':
        model['type'] = 'LiteDINO'
        encoder.update(
            schedule=str(conversion.schedule),
            key_aware='encoder.layers.0.self_attn.query_proj.weight' in state,
            small_ffn=any('.small_norm.' in name for name in state),
        )
        decoder['key_aware'] = 'decoder.layers.0.cross_attn.query_proj.weight' in state
    return (
        '# Written by `mmlite convert` for the checkpoint beside it.\n'
        f'_base_ = {base!r}\n'
        "custom_imports = dict(imports=['mmlite'])\n" + Config(dict(model=model)).pretty_text
    )


def check_conversion(conversion: Conversion, config: str) -> None:
    """Build the model and load the converted weights strictly.

    Raises:
        ValueError: If entries are missing, left over or of another shape; the message names them.
    """
    model = MODELS.build(Config.fromstring(config, '.py').model)
    # BatchNorm adds its counter by itself where a state dict has none.
    try:
        model.load_state_dict(conversion.state_dict, strict=True)
    except RuntimeError as error:
        problem = str(error).partition('\n\t')[2].replace('\n\t', ' ').rstrip()
        raise ValueError(
            f'the converted file does not fit the {type(model).__name__} that its names speak of: '
            f'{problem}'
        ) from error


def _backbone(state: Mapping[str, Tensor], kind: str) -> dict:
    """The backbone's own arguments; its weights are in the checkpoint, so it needs no others."""

    def numbers(pattern: str) -> list[int]:
        return sorted({int(m[1]) for m in (re.match(pattern, name) for name in state) if m})

    if kind == 'swin':
        stages = numbers(r'backbone\.stages\.(\d+)\.blocks')
        tables = [
            state[f'backbone.stages.{i}.blocks.0.attn.w_msa.relative_position_bias_table']
            for i in stages
        ]
        return dict(
            _delete_=True,
            type='SwinTransformer',
            embed_dims=len(state['backbone.patch_embed.norm.weight']),
            depths=[len(numbers(rf'backbone\.stages\.{i}\.blocks\.(\d+)\.')) for i in stages],
            num_heads=[table.shape[1] for table in tables],
            window_size=(math.isqrt(len(tables[0])) + 1) // 2,
            drop_path_rate=0.2,
            out_indices=numbers(r'backbone\.norm(\d+)\.weight'),
        )
    blocks = len(numbers(r'backbone\.layer3\.(\d+)\.'))
    is_bottleneck = 'backbone.layer3.0.conv3.weight' in state
    depth = {2: 18, 6: 50 if is_bottleneck else 34, 23: 101, 36: 152}.get(blocks, 50)
    return dict(depth=depth, init_cfg=None)
