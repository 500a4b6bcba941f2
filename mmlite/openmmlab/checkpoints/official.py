"""Checkpoints in the layout of the original repositories, to MMDetection's layout and back.

Deformable DETR, DINO, Lite-DINO and H-Deformable-DETR were released by code bases that descend from
one another, so one table of names serves them all. It is read in both directions. Values are copied
as they are, except for two things: rows of class layers are COCO category ids there and class
indices here, and Swin's patch merging concatenates its four neighbours in another order.
"""

from __future__ import annotations

import re
import warnings
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ...nn.schedule import decode_schedules
from ..layers import EncoderSchedule

# The 80 categories of COCO among the 91 slots of the original class layers.
COCO_IDS = tuple(i for i in range(91) if i not in (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
FAMILIES = {
    'deformable-detr': 'Deformable DETR',
    'h-deformable-detr': 'H-Deformable-DETR',
    'dino': 'DINO',
    'lite-dino': 'Lite-DINO',
}
_KINDS = ', '.join(FAMILIES.values())
_SCHEDULE = 'encoder.schedule_code'
_COUNTER = 'num_batches_tracked'
# Of either layout.
_LEVEL = r'(input_proj\.\d+\.0|neck\.\w+\.\d+\.conv)\.weight'
_DECODER_LAYER = r'(transformer\.)?decoder\.layers\.\d+\.norms?\.?1\.weight'

# The authors' names and MMDetection's. {i} and {j} stand for numbers, * for the rest of a name,
# LAST for the number of decoder layers. The first line that fits a name is the one that counts. The
# decoder's norms are numbered by the module they follow there, by their order here.
_TEXTS = {
    # Comes first: what DINO calls otherwise.
    'dino': """
        transformer.tgt_embed.weight                query_embedding.weight
        label_enc.*                                 dn_query_generator.label_embedding.*
        transformer.decoder.norm.*                  decoder.norm.*
        transformer.decoder.ref_point_head.*        decoder.ref_point_head.*
        transformer.enc_out_class_embed.*           bbox_head.cls_branches.LAST.*
        transformer.enc_out_bbox_embed.layers.0.*   bbox_head.reg_branches.LAST.0.*
        transformer.enc_out_bbox_embed.layers.1.*   bbox_head.reg_branches.LAST.2.*
        transformer.enc_out_bbox_embed.layers.2.*   bbox_head.reg_branches.LAST.4.*
    """,
    'detr': """
        transformer.encoder.layers.{i}.self_attn.*  encoder.layers.{i}.self_attn.*
        transformer.encoder.layers.{i}.norm1.*      encoder.layers.{i}.norms.0.*
        transformer.encoder.layers.{i}.norm2.*      encoder.layers.{i}.norms.1.*
        transformer.encoder.layers.{i}.linear1.*    encoder.layers.{i}.ffn.layers.0.0.*
        transformer.encoder.layers.{i}.linear2.*    encoder.layers.{i}.ffn.layers.1.*
        transformer.encoder.layers.{i}.linear12.*   encoder.layers.{i}.small_ffn.layers.0.0.*
        transformer.encoder.layers.{i}.linear22.*   encoder.layers.{i}.small_ffn.layers.1.*
        transformer.encoder.layers.{i}.norm22.*     encoder.layers.{i}.small_norm.*
        transformer.level_embed                     level_embed
        transformer.decoder.layers.{i}.self_attn.*  decoder.layers.{i}.self_attn.attn.*
        transformer.decoder.layers.{i}.cross_attn.* decoder.layers.{i}.cross_attn.*
        transformer.decoder.layers.{i}.norm2.*      decoder.layers.{i}.norms.0.*
        transformer.decoder.layers.{i}.norm1.*      decoder.layers.{i}.norms.1.*
        transformer.decoder.layers.{i}.norm3.*      decoder.layers.{i}.norms.2.*
        transformer.decoder.layers.{i}.linear1.*    decoder.layers.{i}.ffn.layers.0.0.*
        transformer.decoder.layers.{i}.linear2.*    decoder.layers.{i}.ffn.layers.1.*
        transformer.enc_output.*                    memory_trans_fc.*
        transformer.enc_output_norm.*               memory_trans_norm.*
        query_embed.weight                          query_embedding.weight
        transformer.reference_points.*              reference_points_fc.*
        transformer.pos_trans.*                     pos_trans_fc.*
        transformer.pos_trans_norm.*                pos_trans_norm.*
        class_embed.{i}.*                           bbox_head.cls_branches.{i}.*
        bbox_embed.{i}.layers.0.*                   bbox_head.reg_branches.{i}.0.*
        bbox_embed.{i}.layers.1.*                   bbox_head.reg_branches.{i}.2.*
        bbox_embed.{i}.layers.2.*                   bbox_head.reg_branches.{i}.4.*
    """,
    'resnet': 'backbone.0.body.* backbone.*',
    'swin': """
        SWIN.patch_embed.norm.*                     backbone.patch_embed.norm.*
        SWIN.patch_embed.proj.*                     backbone.patch_embed.projection.*
        SWIN.layers.{i}.blocks.{j}.norm{k}.*        backbone.stages.{i}.blocks.{j}.norm{k}.*
        SWIN.layers.{i}.blocks.{j}.attn.*           backbone.stages.{i}.blocks.{j}.attn.w_msa.*
        SWIN.layers.{i}.blocks.{j}.mlp.fc1.*        backbone.stages.{i}.blocks.{j}.ffn.layers.0.0.*
        SWIN.layers.{i}.blocks.{j}.mlp.fc2.*        backbone.stages.{i}.blocks.{j}.ffn.layers.1.*
        SWIN.layers.{i}.downsample.*                backbone.stages.{i}.downsample.*
        SWIN.norm{i}.*                              backbone.norm{i}.*
    """,
}
_TABLES = {
    name: [tuple(line.split()) for line in text.strip().splitlines()]
    for name, text in _TEXTS.items()
}


@dataclass(frozen=True)
class Conversion:
    """A converted state dict and what became of every entry of the file."""

    layout: SimpleNamespace  # what names and shapes say about the model, family first
    state_dict: dict[str, Tensor]
    mapped: dict[str, str]  # name in the file -> in state_dict
    # Entries, or rows of them, without a place in the new layout. They make the way back exact.
    left: dict[str, Tensor]
    reasons: dict[str, str]  # of those and of dropped duplicates
    filled: dict[str, str]  # names in state_dict that the file does not have, and their values
    schedule: EncoderSchedule | None = None  # of a Lite model


def unpack(checkpoint: Any, ema: bool = False) -> tuple[dict[str, Tensor], Namespace | None]:
    """State dict and run arguments of a checkpoint in one of the original formats.

    Args:
        checkpoint: Content of the file: a dict with ``model`` (and ``args``, ``ema_model``) or
            ``state_dict``, or a bare state dict.
        ema (bool): Take the averaged weights, ``ema_model``.

    Returns:
        tuple: The state dict without ``module.`` before its names, and ``args`` or None.

    Raises:
        ValueError: If there is no state dict in it.
    """
    content = checkpoint if isinstance(checkpoint, Mapping) else {}
    if ema and 'ema_model' not in content:
        raise ValueError('the checkpoint has no ema_model; leave out --ema')
    keys = ('ema_model',) if ema else ('model', 'state_dict')
    state = next((content[key] for key in keys if key in content), checkpoint)
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            'the checkpoint has no state dict under model or state_dict, nor is it one'
        )
    args = content.get('args')
    state = {name.removeprefix('module.'): value for name, value in state.items()}
    return state, args if isinstance(args, Namespace) else None


def from_official(
    checkpoint: Any,
    family: str | None = None,
    schedule: str | EncoderSchedule | None = None,
    coco_classes: bool = True,
    ema: bool = False,
) -> Conversion:
    """Convert a checkpoint of the original authors to MMDetection's names and conventions.

    Args:
        checkpoint: Content of the file, as :func:`unpack` takes it.
        family (str, optional): One of ``FAMILIES``; by default it is read off the names.
        schedule (str | EncoderSchedule, optional): Schedule of a Lite-DINO, needed where the
            checkpoint does not hold the arguments of its run. Weights do not show it in full.
        coco_classes (bool): Make MMDetection's 80 COCO classes of 91 category slots. Another
            number of rows is kept.
        ema (bool): Take the averaged weights.

    Returns:
        Conversion: Its ``state_dict`` is for ``DeformableDETR``, ``HDeformableDETR``, ``DINO`` or
        ``LiteDINO`` with ``neck.bias=True``.

    Raises:
        ValueError: If the file does not fit the family or the schedule; the message says what does.
    """
    state, args = unpack(checkpoint, ema)
    if not {'transformer.level_embed', 'class_embed.0.weight'} <= state.keys():
        raise ValueError(
            f"the file is none of {_KINDS} in the original layout; for one in MMDetection's use "
            '--to-official (the way back) or --from-stock (a warm start)'
        )
    layout = _read_layout(state, family)
    if layout.family == 'lite-dino':
        schedule = _find_schedule(state, layout, args, schedule)
    elif schedule is not None:
        raise ValueError(
            f'{FAMILIES[layout.family]} has no schedule; leave it out, or start a Lite model from '
            'it by --from-stock'
        )
    left, reasons, converted = {}, {}, {}
    for name, value in state.items():
        original = name.removeprefix('transformer.decoder.')
        if original != name and original.startswith(('class_embed.', 'bbox_embed.')):
            if original not in state or not torch.equal(value, state[original]):
                raise ValueError(
                    f'{name} should repeat {original}, as in {FAMILIES[layout.family]}; it does not'
                )
            reasons[name] = 'repeats the entry without transformer.decoder'
        elif _is_unused_projection(name, state) or name.endswith(_COUNTER):
            left[name], reasons[name] = value, 'not used here'
    own = [name for name in state if name not in reasons]
    mapped = _rename(own, _table(state), FAMILIES[layout.family])
    select = coco_classes and layout.num_classes == 91
    for name, new_name in mapped.items():
        value = state[name]
        if '.downsample.' in name and layout.backbone == 'swin':
            # The four neighbours are concatenated block by block there, and by column first;
            # channel by channel here (nn.Unfold), and by row first.
            value = value.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].mT.flatten(-2)
        kept, dropped = _class_rows(name, layout, len(value), select)
        if dropped:
            left[name] = value[dropped]
            reasons[name] = f'rows {", ".join(map(str, dropped))}: not used here'
        converted[new_name] = value[kept] if kept else value
    if schedule is not None:
        converted[_SCHEDULE] = schedule.encode()
    return Conversion(layout, converted, mapped, left, reasons, {}, schedule)


def to_official(
    state: Mapping[str, Tensor],
    family: str | None = None,
    coco_classes: bool = True,
    left: Mapping[str, Tensor] | None = None,
) -> Conversion:
    """The way back: a state dict in MMDetection's layout to the authors' names and conventions.

    Args:
        state (Mapping[str, Tensor]): State dict of one of the detectors of :func:`from_official`.
        family (str, optional): One of ``FAMILIES``; by default it is read off the names.
        coco_classes (bool): Make 91 category slots of 80 classes.
        left (Mapping[str, Tensor], optional): ``left`` of the conversion that ``state`` came from.
            What it lacks becomes zero, and the bias of slots that are no COCO category -20.

    Returns:
        Conversion: Its ``state_dict`` is what the authors' code loads strictly.

    Raises:
        ValueError: If ``state`` is of another detector.
    """
    left = left or {}
    known = f"{_KINDS} in MMDetection's layout"
    if not {'level_embed', 'bbox_head.cls_branches.0.weight'} <= state.keys():
        raise ValueError(f'the file is none of {known}')
    schedule = None
    reasons = {name: "the authors' norms count no batches" for name in state if _COUNTER in name}
    if _SCHEDULE in state:
        reasons[_SCHEDULE] = 'is among the arguments of the run there'
        (schedule, *others), update = decode_schedules(state[_SCHEDULE])
        if update != 'joint':
            raise ValueError(f'there is no original layout for {update} updates')
        if others or schedule.layers:
            names = ' and '.join(map(str, (schedule, *others)))
            raise ValueError(
                f'the original layout has one schedule of the form HxLy-(A+1)xB, not {names}'
            )
    backwards = [(mmdet, authors) for authors, mmdet in _table(state)]
    mapped = _rename([name for name in state if name not in reasons], backwards, known)
    official = {new_name: state[name] for name, new_name in mapped.items()}
    official.update({name: value for name, value in left.items() if name not in official})
    layout = _read_layout(official, family)
    filled: dict[str, str] = {}
    expand = coco_classes and layout.num_classes == 80
    for name in list(official):
        value = official[name]
        if '.downsample.' in name and layout.backbone == 'swin':
            official[name] = value.unflatten(-1, (-1, 4)).mT[..., [0, 2, 1, 3], :].flatten(-2)
        total = (91 if expand else layout.num_classes) + name.startswith('label_enc.')
        kept, dropped = _class_rows(name, layout, total, expand)
        if dropped:
            official[name] = value.new_zeros(total, *value.shape[1:])
            official[name][kept] = value
            if name in left:
                official[name][dropped] = left[name].to(value)
            else:
                official[name][dropped] = -20.0 if name.endswith('bias') else 0.0
                filled[name] = f'{len(dropped)} rows without a class'
        is_class = name.startswith('class_embed.') and layout.two_stage
        if is_class or (name.startswith('bbox_embed.') and layout.refines):
            official[f'transformer.decoder.{name}'] = official[name]
    # What MMDetection's models may do without and the authors' code insists on, and its shape.
    like = {f'input_proj.{i}.0.bias': f'input_proj.{i}.1.bias' for i in range(layout.num_levels)}
    for name in official if layout.family == 'lite-dino' else ():
        attention, found, end = name.rpartition('.attention_weights.')
        if found:
            like[f'{attention}.query_proj.{end}'] = f'{attention}.output_proj.{end}'
    for name, other in like.items():
        if name not in official:
            official[name] = torch.zeros_like(official[other])
            filled[name] = 'zeros: without effect'
    left_here = {name: state[name] for name in reasons}
    return Conversion(layout, official, mapped, left_here, reasons, filled, schedule)


def convert_encoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the parameters of the authors' encoder to :class:`mmlite.nn.LiteEncoder`'s.

    Their standard attention carries a ``query_proj`` that it never uses; it is left out.

    Args:
        state (Mapping[str, Tensor]): ``layers.<i>.self_attn.*``, ``norm1``, ``linear1``, ...

    Returns:
        dict[str, Tensor]: The same tensors under the names of ``LiteEncoder.state_dict()``.

    Raises:
        ValueError: A name is none of the authors' encoder.
    """
    prefix = 'transformer.encoder.'
    used = [prefix + name for name in state if not _is_unused_projection(name, state)]
    names = _rename(used, _TABLES['detr'], "the authors' Lite DETR encoder")
    return {
        new_name.removeprefix('encoder.'): state[name.removeprefix(prefix)]
        for name, new_name in names.items()
    }


def _read_layout(state: Mapping[str, Tensor], wanted: str | None) -> SimpleNamespace:
    """Layout of a state dict with the authors' names, which is to be of the family wanted."""
    if wanted not in (None, *FAMILIES):
        raise ValueError(f'{wanted!r} is none of {", ".join(FAMILIES)}')
    is_lite = _count(state, r'transformer\.encoder\.layers\.\d+\.(norm22|.+query_proj)\.weight')
    two_stage = 'transformer.enc_output.weight' in state
    if 'label_enc.weight' in state:
        family = 'lite-dino' if is_lite else 'dino'
    elif is_lite:
        raise ValueError('Lite-DINO is the only Lite detector that has an original layout')
    else:
        mixed = two_stage and 'query_embed.weight' in state
        family = 'h-deformable-detr' if mixed else 'deformable-detr'
    if wanted not in (None, family):
        raise ValueError(
            f'the file is no {FAMILIES[wanted]}: its names are those of {FAMILIES[family]}; use '
            f'--model {family}'
        )
    (num_levels, num_maps), decoder_layers = _levels(state), _count(state, _DECODER_LAYER)
    heads = [state[f'bbox_embed.{i}.layers.2.bias'] for i in range(decoder_layers)]
    return SimpleNamespace(
        family=family,
        backbone='swin' if any('patch_embed' in name for name in state) else 'resnet',
        encoder_layers=_count(state, r'transformer\.encoder\.layers\.\d+\.norm1\.weight'),
        decoder_layers=decoder_layers,
        num_levels=num_levels,
        num_maps=num_maps,  # of the backbone; strided convolutions make the further levels
        # Without refinement all layers share a head.
        refines=two_stage or any(not torch.equal(head, heads[0]) for head in heads),
        two_stage=two_stage,
        num_classes=len(state['class_embed.0.weight']),
    )


def _levels(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Number of levels, and of those whose convolution is of one pixel: the backbone's maps."""
    sizes = [value.shape[-1] for name, value in state.items() if re.fullmatch(_LEVEL, name)]
    return len(sizes), sizes.count(1)


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in state)


def _find_schedule(
    state: Mapping[str, Tensor],
    layout: SimpleNamespace,
    args: Namespace | None,
    wanted: str | EncoderSchedule | None,
) -> EncoderSchedule:
    """The schedule of a Lite-DINO: its blocks from the weights, its levels from args or the user.

    H3L1 and H2L2 have the same names and shapes, and the wrong one loads without complaint into a
    model that computes something else, so the number of high-level maps is never guessed.
    """
    layers, levels = layout.encoder_layers, layout.num_levels
    # A small FFN ends each block. Models without tell their blocks in the arguments at best.
    ends = [i for i in range(layers) if f'transformer.encoder.layers.{i}.linear12.weight' in state]
    high, blocks = (getattr(args, name, None) for name in ('enc_scale', 'num_expansion'))
    if high == 1:
        warnings.warn(
            "the file's enc_scale=1 means H1: one high-level map. The authors' README calls it "
            'H2L2, which is enc_scale=2 in their code; evaluate both if H2L2 is what you expect',
            stacklevel=2,
        )
    fitting = [
        s
        for s in EncoderSchedule.fitting(levels, layers)
        if high in (None, s.num_high_levels)
        and (ends or blocks in (None, s.num_blocks))
        and ends in ([], [*range(s.high_updates - 1, layers, s.high_updates)])
    ]
    listed = ' or '.join(map(str, fitting)) or 'no schedule'
    if wanted is None and len(fitting) > 1:
        raise ValueError(
            'the file does not say how many maps are high-level, and its weights cannot tell; '
            f'give the schedule it was trained with: --schedule {listed}'
        )
    wanted = EncoderSchedule.parse(wanted) if wanted else next(iter(fitting), None)
    if wanted not in fitting:
        raise ValueError(
            f'the schedule does not fit the file: it has {levels} levels, {layers} encoder layers, '
            f'small FFNs in layers {[i + 1 for i in ends]} and enc_scale={high}, which is {listed}'
        )
    return wanted


def _table(state: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """The authors' names and MMDetection's for a state dict with names of either."""
    is_dino = 'label_enc.weight' in state or 'dn_query_generator.label_embedding.weight' in state
    is_swin = any('patch_embed' in name for name in state)
    swin = 'backbone.0' if is_dino else 'backbone.0.body'
    last = str(_count(state, _DECODER_LAYER))
    rows = _TABLES['detr'] + _TABLES['swin' if is_swin else 'resnet']
    rows = _TABLES['dino'] + rows if is_dino else rows
    rows = [(a.replace('SWIN', swin), m.replace('LAST', last)) for a, m in rows]
    levels, maps = _levels(state)
    for level in range(levels):
        neck = f'convs.{level}' if level < maps else f'extra_convs.{level - maps}'
        rows.append((f'input_proj.{level}.0.*', f'neck.{neck}.conv.*'))
        rows.append((f'input_proj.{level}.1.*', f'neck.{neck}.gn.*'))
    return rows


def _rename(names: Iterable[str], rows: list[tuple[str, str]], where: str) -> dict[str, str]:
    """Name -> new name by the first of the rows that fits. Raises ValueError if none does."""
    result = {}
    for name in names:
        matches = ((_pattern(source).fullmatch(name), target) for source, target in rows)
        found, target = next((match for match in matches if match[0]), (None, ''))
        if found is None:
            raise ValueError(f'{name} has no place in {where}')
        result[name] = target.replace('*', '{rest}').format(**found.groupdict())
    return result


@cache
def _pattern(source: str) -> re.Pattern:
    pattern = re.escape(source).replace(r'\*', '(?P<rest>.+)')
    return re.compile(re.sub(r'\\{(\w)\\}', r'(?P<\1>\\d+)', pattern))


def _is_unused_projection(name: str, state: Mapping[str, Tensor]) -> bool:
    attention, found, _ = name.partition('.query_proj.')
    return bool(found) and f'{attention}.attention_weights.weight' in state


def _class_rows(
    name: str, layout: SimpleNamespace, total: int, select: bool
) -> tuple[list[int], list[int]]:
    """Rows of a class layer that MMDetection keeps, in its order, and the others.

    Both are empty for an entry of another kind. ``name`` is the authors'.
    """
    is_label = name.startswith('label_enc.')
    if not is_label and 'class_embed.' not in name:
        return [], []
    kept = list(COCO_IDS) if select else list(range(total - is_label))
    if select and name.startswith(f'class_embed.{layout.decoder_layers}.'):
        # These encoders are trained and ranked by channel 0 alone, whatever the classes.
        # MMDetection reads it from its first channel, too; its second is COCO's second category.
        kept[0] = 0
    return kept, sorted(set(range(total)) - set(kept))
