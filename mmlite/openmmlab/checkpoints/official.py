"""Checkpoints in the layout of the original repositories, to MMDetection's layout and back.

Deformable DETR, DINO, Lite-DINO and H-Deformable-DETR were released by code bases that descend from
one another, so one table of names serves them all. It is read in both directions. Values are copied
as they are, except for two things: rows of class layers are COCO category ids there and class
indices here, and Swin's patch merging concatenates its four neighbours in another order.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layers import EncoderSchedule

# The 80 categories of COCO among the 91 slots of the original class layers.
COCO_IDS = tuple(i for i in range(91) if i not in (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
FAMILIES = {
    'deformable-detr': 'Deformable DETR',
    'h-deformable-detr': 'H-Deformable-DETR',
    'dino': 'DINO',
    'lite-dino': 'Lite-DINO',
}
# Where a LiteEncoder carries its schedule.
_SCHEDULE = 'encoder.schedule_code'
_COUNTER = 'num_batches_tracked'
# Last names that the original layout has no place for.
_UNUSED = {
    'schedule_code': 'is among the arguments of the run there',
    _COUNTER: "the authors' frozen BatchNorm does not count batches",
}
_LABELS = 'dn_query_generator.label_embedding'
# Of either layout.
_LEVEL = r'(input_proj\.\d+\.0|neck\.\w+\.\d+\.conv)\.weight'
_DECODER_LAYER = r'(transformer\.)?decoder\.layers\.\d+\.norms?\.?1\.weight'

# The authors' names and MMDetection's. {i} and {j} stand for numbers, * for the rest of a name,
# LAST for the number of decoder layers. The first line that fits a name is the one that counts.
_TABLES = {
    'encoder': """
        transformer.encoder.layers.{i}.self_attn.*  encoder.layers.{i}.self_attn.*
        transformer.encoder.layers.{i}.norm1.*      encoder.layers.{i}.norms.0.*
        transformer.encoder.layers.{i}.norm2.*      encoder.layers.{i}.norms.1.*
        transformer.encoder.layers.{i}.linear1.*    encoder.layers.{i}.ffn.layers.0.0.*
        transformer.encoder.layers.{i}.linear2.*    encoder.layers.{i}.ffn.layers.1.*
        transformer.encoder.layers.{i}.linear12.*   encoder.layers.{i}.small_ffn.layers.0.0.*
        transformer.encoder.layers.{i}.linear22.*   encoder.layers.{i}.small_ffn.layers.1.*
        transformer.encoder.layers.{i}.norm22.*     encoder.layers.{i}.small_norm.*
    """,
    # The decoder's norms are numbered by the module they follow there, by their order here.
    'decoder': """
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
    """,
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
    'deformable': """
        query_embed.weight                          query_embedding.weight
        transformer.reference_points.*              reference_points_fc.*
        transformer.pos_trans.*                     pos_trans_fc.*
        transformer.pos_trans_norm.*                pos_trans_norm.*
    """,
    'head': """
        class_embed.{i}.*                           bbox_head.cls_branches.{i}.*
        bbox_embed.{i}.layers.0.*                   bbox_head.reg_branches.{i}.0.*
        bbox_embed.{i}.layers.1.*                   bbox_head.reg_branches.{i}.2.*
        bbox_embed.{i}.layers.2.*                   bbox_head.reg_branches.{i}.4.*
    """,
    'resnet': 'backbone.0.body.* backbone.*',
    'swin': """
        SWIN.patch_embed.norm.*                     backbone.patch_embed.norm.*
        SWIN.patch_embed.proj.*                     backbone.patch_embed.projection.*
        SWIN.layers.{i}.blocks.{j}.norm1.*          backbone.stages.{i}.blocks.{j}.norm1.*
        SWIN.layers.{i}.blocks.{j}.norm2.*          backbone.stages.{i}.blocks.{j}.norm2.*
        SWIN.layers.{i}.blocks.{j}.attn.*           backbone.stages.{i}.blocks.{j}.attn.w_msa.*
        SWIN.layers.{i}.blocks.{j}.mlp.fc1.*        backbone.stages.{i}.blocks.{j}.ffn.layers.0.0.*
        SWIN.layers.{i}.blocks.{j}.mlp.fc2.*        backbone.stages.{i}.blocks.{j}.ffn.layers.1.*
        SWIN.layers.{i}.downsample.*                backbone.stages.{i}.downsample.*
        SWIN.norm{i}.*                              backbone.norm{i}.*
    """,
}


class Layout(NamedTuple):
    """What the names and shapes of a state dict say about its model."""

    family: str
    backbone: str  # 'resnet' or 'swin'
    encoder_layers: int
    decoder_layers: int
    num_levels: int
    num_maps: int  # maps of the backbone; the further levels are made by strided convolutions
    refines: bool
    two_stage: bool
    num_classes: int


@dataclass(frozen=True)
class Conversion:
    """A converted state dict and what became of every entry of the file."""

    layout: Layout
    state_dict: dict[str, Tensor] = field(default_factory=dict)
    mapped: dict[str, str] = field(default_factory=dict)  # name in the file -> in state_dict
    # Entries, or rows of them, without a place in the new layout. They make the way back exact.
    left: dict[str, Tensor] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)  # of those and of dropped duplicates
    # Names in state_dict with values that are not in the file, and what these are.
    filled: dict[str, str] = field(default_factory=dict)
    schedule: EncoderSchedule | None = None  # of a Lite model


def unpack(checkpoint: Any, ema: bool = False) -> tuple[dict[str, Tensor], Namespace | None]:
    """State dict and run arguments of a checkpoint in one of the original formats.

    Args:
        checkpoint: The content of the file: a dict with ``model`` (and ``args``, ``ema_model``),
            with ``state_dict``, or a bare state dict. A ``module.`` before every name is removed.
        ema (bool): Take the averaged weights, ``ema_model``.

    Returns:
        tuple: The state dict, and ``args`` or None.

    Raises:
        ValueError: If there is no state dict in it.
    """
    content = checkpoint if isinstance(checkpoint, Mapping) else {}
    keys = ('ema_model',) if ema else ('model', 'state_dict')
    found = [content[key] for key in keys if isinstance(content.get(key), Mapping)]
    if ema and not found:
        raise ValueError('the checkpoint has no ema_model; leave out --ema')
    state = found[0] if found else checkpoint
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            'the checkpoint has no state dict: expected one under model or state_dict, or a bare '
            'one'
        )
    prefix = 'module.' if all(name.startswith('module.') for name in state) else ''
    args = content.get('args')
    return (
        {name.removeprefix(prefix): value for name, value in state.items()},
        args if isinstance(args, Namespace) else None,
    )


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
        schedule (str | EncoderSchedule, optional): Schedule of a Lite-DINO. Needed where the
            checkpoint does not hold the arguments of its run, because the number of high-level
            maps leaves no trace in the weights.
        coco_classes (bool): Make MMDetection's 80 COCO classes of 91 category slots. Class layers
            with another number of rows are kept as they are.
        ema (bool): Take the averaged weights.

    Returns:
        Conversion: Its ``state_dict`` is for ``DeformableDETR``, ``HDeformableDETR``, ``DINO`` or
        ``LiteDINO`` with ``neck.bias=True``.

    Raises:
        ValueError: If the file does not fit the family or the schedule; the message says what does.
    """
    state, args = unpack(checkpoint, ema)
    if 'transformer.level_embed' not in state:
        raise ValueError(_foreign(state))
    layout = _read_layout(state, family)
    schedule = _find_schedule(state, layout, args, schedule)
    conversion = Conversion(layout, schedule=schedule)
    left, reasons = conversion.left, conversion.reasons
    for name, value in state.items():
        copied = re.fullmatch(r'transformer\.decoder\.((class|bbox)_embed\..+)', name)
        if copied is not None:
            if copied[1] not in state or not torch.equal(value, state[copied[1]]):
                raise ValueError(
                    f'{name} should repeat {copied[1]} but does not; the file was not written by '
                    f"the authors' {FAMILIES[layout.family]}"
                )
            reasons[name] = f'repeats {copied[1]}'
        elif _is_unused_projection(name, state):
            left[name], reasons[name] = value, 'not used by standard attention'
        elif name.endswith(_COUNTER):
            left[name], reasons[name] = value, 'BatchNorm starts its count of batches anew'
    own = [name for name in state if name not in reasons]
    conversion.mapped.update(_rename(own, _table(state), FAMILIES[layout.family]))
    select = coco_classes and layout.num_classes == 91
    for name, new_name in conversion.mapped.items():
        value = state[name]
        if '.downsample.' in name and layout.backbone == 'swin':
            # The four neighbours are concatenated block by block there, and by column first;
            # channel by channel here (nn.Unfold), and by row first.
            value = value.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].mT.flatten(-2)
        kept, dropped, why = _class_rows(name, layout, len(value), select)
        if dropped:
            left[name], reasons[name] = value[dropped], why
        conversion.state_dict[new_name] = value[kept] if kept else value
    if schedule is not None:
        conversion.state_dict[_SCHEDULE] = schedule.encode()
    return conversion


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
            Without it, slots that are no COCO category get zero weights and a bias of -20, and
            other entries that MMDetection does not have get zeros.

    Returns:
        Conversion: Its ``state_dict`` is what the authors' code loads strictly.

    Raises:
        ValueError: If ``state`` is of another detector.
    """
    left = left or {}
    # What DDQ-DETR and Grounding DINO have and DINO, which they are made of, has not.
    is_other = any(name in state for name in ('query_map.weight', 'text_feat_map.weight'))
    if is_other or 'level_embed' not in state or 'bbox_head.cls_branches.0.weight' not in state:
        raise ValueError(
            "the file is no Deformable DETR, H-Deformable-DETR, DINO or Lite-DINO in MMDetection's "
            'layout'
        )
    reasons = {
        name: _UNUSED[name.rpartition('.')[2]]
        for name in state
        if name.rpartition('.')[2] in _UNUSED
    }
    backwards = [(mmdet, authors) for authors, mmdet in _table(state)]
    mapped = _rename(
        [name for name in state if name not in reasons], backwards, 'the original layout'
    )
    official = {new_name: state[name] for name, new_name in mapped.items()}
    official.update({name: value for name, value in left.items() if name.endswith(_COUNTER)})
    layout = _read_layout(official, family)
    left_here = {name: state[name] for name in reasons}
    filled: dict[str, str] = {}
    expand = coco_classes and layout.num_classes == 80
    for name in list(official):
        value = official[name]
        if '.downsample.' in name and layout.backbone == 'swin':
            official[name] = value.unflatten(-1, (-1, 4)).mT[..., [0, 2, 1, 3], :].flatten(-2)
        total = (91 if expand else layout.num_classes) + name.startswith('label_enc.')
        kept, dropped, _ = _class_rows(name, layout, total, expand)
        if dropped:
            official[name] = value.new_zeros(total, *value.shape[1:])
            official[name][kept] = value
            if name in left:
                official[name][dropped] = left[name].to(value)
            else:
                official[name][dropped] = -20.0 if name.endswith('bias') else 0.0
                filled[name] = f'{len(dropped)} rows without a class'

    def fill(name: str, like: str, why: str) -> None:
        if name not in left:
            filled[name] = f'zeros: {why}'
        official[name] = left.get(name, torch.zeros_like(official[like]))

    # What MMDetection's models may do without and the authors' code insists on.
    for level in range(layout.num_levels):
        if f'input_proj.{level}.0.bias' not in official:
            norm = f'input_proj.{level}.1.bias'
            fill(f'input_proj.{level}.0.bias', norm, 'the neck has no bias')
    for name in list(official):
        attention, found, end = name.rpartition('.attention_weights.')
        if found and layout.family == 'lite-dino':
            like = f'{attention}.output_proj.{end}'
            fill(f'{attention}.query_proj.{end}', like, 'not used by standard attention')
        is_class = name.startswith('class_embed.') and layout.two_stage
        if is_class or (name.startswith('bbox_embed.') and layout.refines):
            official[f'transformer.decoder.{name}'] = official[name]
    return Conversion(layout, official, mapped, left_here, reasons, filled, _carried(state))


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
    rows = [
        (authors.removeprefix('transformer.encoder.'), mmdet.removeprefix('encoder.'))
        for authors, mmdet in _rows('encoder')
    ]
    used = [name for name in state if not _is_unused_projection(name, state)]
    names = _rename(used, rows, "the authors' Lite DETR encoder")
    return {new_name: state[name] for name, new_name in names.items()}


# --- What a file is ---------------------------------------------------------------------------


def _foreign(state: Mapping[str, Tensor]) -> str:
    # All of MMDetection's DETRs have the first, Mask2Former the others (instances, video).
    masks = [f'{part}_head.pixel_decoder.mask_feature.weight' for part in ('panoptic', 'track')]
    if any(name in state for name in ('level_embed', *masks)):
        return (
            "the file is in MMDetection's layout already; use --to-official for the way back or "
            '--from-stock for a warm start'
        )
    return (
        f'the file is none of {", ".join(FAMILIES.values())} in the original layout: it has no '
        'transformer.level_embed'
    )


def _read_layout(state: Mapping[str, Tensor], wanted: str | None) -> Layout:
    """Layout of a state dict with the authors' names, which is to be of the family wanted."""
    if wanted not in (None, *FAMILIES):
        raise ValueError(f'{wanted!r} is none of {", ".join(FAMILIES)}')
    is_lite = _count(state, r'transformer\.encoder\.layers\.\d+\.(norm22|.+query_proj)\.weight')
    two_stage = 'transformer.enc_output.weight' in state
    if 'label_enc.weight' in state:
        family = 'lite-dino' if is_lite else 'dino'
    elif is_lite:
        raise ValueError(
            'only Lite-DINO was released by its authors; there is no original layout for another '
            'Lite detector'
        )
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
    return Layout(
        family=family,
        backbone='swin' if any('patch_embed' in name for name in state) else 'resnet',
        encoder_layers=_count(state, r'transformer\.encoder\.layers\.\d+\.norm1\.weight'),
        decoder_layers=decoder_layers,
        num_levels=num_levels,
        num_maps=num_maps,
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
    layout: Layout,
    args: Namespace | None,
    wanted: str | EncoderSchedule | None,
) -> EncoderSchedule | None:
    """The schedule of a Lite-DINO: its blocks from the weights, its levels from args or the user.

    H3L1 and H2L2 have the same names and shapes, and the wrong one loads without complaint into a
    model that computes something else, so the number of high-level maps is never guessed.
    """
    if layout.family != 'lite-dino':
        if wanted is not None:
            raise ValueError(
                f'{FAMILIES[layout.family]} has no schedule; leave it out, or use --from-stock to '
                'start a Lite model from it'
            )
        return None
    layers, levels = layout.encoder_layers, layout.num_levels
    joint = [i for i in range(layers) if f'transformer.encoder.layers.{i}.linear12.weight' in state]
    blocks = len(joint) or getattr(args, 'num_expansion', None)
    if joint and joint != [i for i in range(layers) if (i + 1) % (layers // blocks) == 0]:
        raise ValueError(
            f'the small FFNs are in layers {[i + 1 for i in joint]} of {layers}, which is no '
            'schedule of equal blocks'
        )
    fitting = {
        high: EncoderSchedule(high, levels - high, layers // blocks, blocks)
        for high in (range(levels - 1, 0, -1) if blocks else ())
    }
    listed = ' or '.join(map(str, fitting.values()))
    stored = getattr(args, 'enc_scale', None)
    if wanted is None:
        if stored in fitting:
            return fitting[stored]
        raise ValueError(
            'the file does not say how many maps are high-level, and its weights cannot tell; '
            f'give the schedule it was trained with: --schedule {listed or "HxLy-(A+1)xB"}'
        )
    wanted = EncoderSchedule.parse(wanted)
    fits = (wanted.num_levels, wanted.num_layers) == (levels, layers)
    if not (wanted in fitting.values() if fitting else fits):
        raise ValueError(
            f'schedule {wanted} does not fit the file: it has {levels} levels, {layers} encoder '
            f'layers' + (f' in {blocks} blocks, which fits {listed}' if fitting else '')
        )
    if stored not in (None, wanted.num_high_levels):
        raise ValueError(
            f'schedule {wanted} does not fit the file: its run was started with '
            f'enc_scale={stored}, which is {fitting.get(stored, "none that fits")}'
        )
    return wanted


def _carried(state: Mapping[str, Tensor]) -> EncoderSchedule | None:
    if _SCHEDULE not in state:
        return None
    schedule, update = EncoderSchedule.decode(state[_SCHEDULE])
    if update != 'joint':
        raise ValueError(
            f"the authors' Lite-DINO updates high- and low-level tokens jointly; there is no "
            f'original layout for {update} updates'
        )
    return schedule


# --- Names and values -------------------------------------------------------------------------


def _table(state: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """The authors' names and MMDetection's for a state dict with names of either."""
    is_dino = 'label_enc.weight' in state or f'{_LABELS}.weight' in state
    is_swin = any('patch_embed' in name for name in state)
    rows = _rows('encoder', 'decoder', 'dino' if is_dino else 'deformable', 'head')
    rows += _rows('swin' if is_swin else 'resnet')
    swin = 'backbone.0' if is_dino else 'backbone.0.body'
    last = str(_count(state, _DECODER_LAYER))
    rows = [(a.replace('SWIN', swin), m.replace('LAST', last)) for a, m in rows]
    levels, maps = _levels(state)
    for level in range(levels):
        neck = f'convs.{level}' if level < maps else f'extra_convs.{level - maps}'
        rows.append((f'input_proj.{level}.0.*', f'neck.{neck}.conv.*'))
        rows.append((f'input_proj.{level}.1.*', f'neck.{neck}.gn.*'))
    return rows


def _rows(*tables: str) -> list[tuple[str, str]]:
    words = ' '.join(_TABLES[name] for name in tables).split()
    return list(zip(words[::2], words[1::2]))


def _rename(names: Iterable[str], rows: list[tuple[str, str]], where: str) -> dict[str, str]:
    """Name -> new name by the first of the rows that fits. Raises ValueError if none does."""
    patterns = []
    for source, target in rows:
        pattern = re.escape(source).replace(r'\*', '(?P<rest>.+)')
        pattern = re.sub(r'\\{(\w)\\}', r'(?P<\1>\\d+)', pattern)
        patterns.append((re.compile(pattern), target.replace('*', '{rest}')))

    def renamed(name: str) -> str | None:
        matches = ((pattern.fullmatch(name), target) for pattern, target in patterns)
        return next(
            (target.format(**found.groupdict()) for found, target in matches if found), None
        )

    result = {name: renamed(name) for name in names}
    unknown = [name for name, new_name in result.items() if new_name is None]
    if unknown:
        more = f' and {len(unknown) - 3} more' if len(unknown) > 3 else ''
        raise ValueError(f'{", ".join(unknown[:3])}{more} have no place in {where}')
    return result


def _is_unused_projection(name: str, state: Mapping[str, Tensor]) -> bool:
    attention, found, _ = name.partition('.query_proj.')
    return bool(found) and f'{attention}.attention_weights.weight' in state


def _class_rows(
    name: str, layout: Layout, total: int, select: bool
) -> tuple[list[int], list[int], str]:
    """Rows of a class layer that MMDetection keeps, in its order, the others, and why they go.

    All are empty for an entry of another kind. ``name`` is the authors'.
    """
    is_label = name.startswith('label_enc.')
    if not is_label and 'class_embed.' not in name:
        return [], [], ''
    why = 'no COCO categories'
    kept = list(COCO_IDS) if select else list(range(total - is_label))
    if select and name.startswith(f'class_embed.{layout.decoder_layers}.'):
        # These encoders are trained and ranked by channel 0 alone, whatever the classes.
        # MMDetection reads it from its first channel, too; its second is COCO's second category.
        kept[0] = 0
        why += ', and the class of the first, which is not used here'
    dropped = sorted(set(range(total)) - set(kept))
    if len(dropped) == 1:
        return kept, dropped, f'row {dropped[0]}: never read'
    return kept, dropped, f'rows {", ".join(map(str, dropped))}: {why}'
