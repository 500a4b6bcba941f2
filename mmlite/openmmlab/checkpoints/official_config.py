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

    Everything that the weights show is read off them. The rest comes from the arguments of the run
    where the checkpoint holds them, else it is what the original repositories published: 8 heads,
    and 300 queries of two-stage models; H-Deformable-DETR has 1500 one-to-many queries beside them.

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
    is_hybrid = layout.family == 'h-deformable-detr'
    drop = 0.1 if layout.family == 'deformable-detr' else 0.0
    shape = dict(embed_dims=embed_dims, num_heads=getattr(args, 'nheads', 8), dropout=drop)

    def layers(part: str, attention: str) -> dict:
        name = f'{part}.layers.0.{attention}'
        rows = len(state[f'{name}.sampling_offsets.weight']) // (2 * shape['num_heads'])
        points = getattr(args, f'{part[:3]}_n_points', 4)
        sampled: dict = dict(num_levels=levels, num_points=rows // levels)
        if f'{name}.query_proj.weight' in state and levels > 1 and rows == points:
            sampled.update(num_points=points, same_loc=True)
        if f'{name}.key_proj.weight' in state:
            sampled.update(proj_key=True)
        channels = len(state[f'{part}.layers.0.ffn.layers.0.0.weight'])
        ffn = dict(embed_dims=embed_dims, feedforward_channels=channels, ffn_drop=drop)
        attentions = {'self_attn_cfg': shape, f'{attention}_cfg': {**shape, **sampled}}
        return dict(
            num_layers=getattr(layout, f'{part}_layers'), layer_cfg=dict(attentions, ffn_cfg=ffn)
        )

    embedded = len(state.get('query_embedding.weight', ()))
    stored = getattr(args, 'num_queries_one2one' if is_hybrid else 'num_queries', None)
    queries = num_queries or stored or 300
    if not is_hybrid:
        queries = embedded or queries
    elif not (num_queries or stored or embedded in (300, 1800)):
        raise ValueError(
            f'the file has {embedded} queries and does not say how many are one-to-one; give the '
            'number of queries at inference: --num-queries'
        )
    base = _DINO if 'dino' in layout.family else _DEFORMABLE_DETR
    classes = len(state['bbox_head.cls_branches.0.weight'])
    most = 300 if base == _DINO else 100  # detections that the base keeps
    model = dict(
        num_queries=queries,
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
        encoder=layers('encoder', 'self_attn'),
        decoder=layers('decoder', 'cross_attn'),
        positional_encoding=dict(num_feats=embed_dims // 2),
        bbox_head=dict(num_classes=classes, embed_dims=embed_dims),
        test_cfg=dict(max_per_img=min(most, queries * classes)),
    )
    if layout.family == 'deformable-detr':
        model.update(with_box_refine=layout.refines, as_two_stage=layout.two_stage)
    elif is_hybrid:
        model.update(type='HDeformableDETR', num_one2many_queries=embedded - queries)
        model['bbox_head']['type'] = 'HDeformableDETRHead'
    elif layout.family == 'lite-dino':
        model['type'] = 'LiteDINO'
        model['encoder'].update(
            schedule=str(conversion.schedule),
            key_aware='encoder.layers.0.self_attn.query_proj.weight' in state,
            small_ffn=any('.small_norm.' in name for name in state),
        )
        model['decoder']['key_aware'] = 'decoder.layers.0.cross_attn.query_proj.weight' in state
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
    try:
        model.load_state_dict(conversion.state_dict)
    except RuntimeError as error:
        problem = ' '.join(str(error).split()[1:])
        raise ValueError(
            f'the converted file does not fit the model that its names speak of: {problem}'
        ) from error


def _backbone(state: Mapping[str, Tensor], kind: str) -> dict:
    """The backbone's own arguments; its weights are in the checkpoint, so it needs no others."""

    def numbers(pattern: str) -> list[int]:
        return sorted({int(m[1]) for m in (re.match(pattern, name) for name in state) if m})

    if kind == 'resnet':
        blocks = len(numbers(r'backbone\.layer3\.(\d+)\.'))
        shallow = 'backbone.layer3.0.conv3.weight' not in state
        depths = {2: 18, 6: 34 if shallow else 50, 23: 101, 36: 152}
        return dict(depth=depths.get(blocks, 50), init_cfg=None)
    stages = numbers(r'backbone\.stages\.(\d+)\.blocks')
    table = 'backbone.stages.{}.blocks.0.attn.w_msa.relative_position_bias_table'
    tables = [state[table.format(stage)] for stage in stages]
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
