"""Checkpoints in the layout of the original repositories, to MMDetection's layout and back.

Deformable DETR, DINO, Lite-DINO and H-Deformable-DETR were released by code bases that descend from
one another, so one table of names serves them all. It is read in both directions. Values are copied
as they are, except for two things: rows of class layers are COCO category ids there and class
indices here, and Swin's patch merging concatenates its four neighbours in another order.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layers import EncoderSchedule
from .encoder import ENCODER_NAMES

# The 80 categories of COCO among the 91 slots of the original class layers.
COCO_IDS = tuple(i for i in range(91) if i not in (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
# Where a LiteEncoder carries its schedule.
_SCHEDULE = 'encoder.schedule_code'
FAMILIES = {
    'deformable-detr': 'Deformable DETR',
    'h-deformable-detr': 'H-Deformable-DETR',
    'dino': 'DINO',
    'lite-dino': 'Lite-DINO',
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
    """A converted state dict and what became of every entry of the file.

    Attributes:
        layout (Layout): What was read off the file.
        state_dict (dict[str, Tensor]): The converted entries.
        mapped (dict[str, str]): Name in the file -> name in ``state_dict``.
        left (dict[str, Tensor]): Entries, or rows of them, that have no place in the new layout.
            Given to the conversion back, they make it exact.
        reasons (dict[str, str]): Why, for every name in ``left`` and for duplicates that were
            dropped.
        filled (dict[str, str]): Names in ``state_dict`` whose values, or some rows of them, are not
            in the file, and what they hold.
        schedule (EncoderSchedule | None): Schedule of a Lite model.
    """

    layout: Layout
    state_dict: dict[str, Tensor]
    mapped: dict[str, str] = field(default_factory=dict)
    left: dict[str, Tensor] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    filled: dict[str, str] = field(default_factory=dict)
    schedule: EncoderSchedule | None = None


class _Rule(NamedTuple):
    """Names in both layouts; ``{i}`` and ``{j}`` stand for numbers, ``*`` for the rest."""

    official: str
    mmdet: str
    rows: str = ''  # which rows of a class layer: 'classes', 'objectness' or 'labels'
    forward: Callable[[Tensor], Tensor] | None = None
    backward: Callable[[Tensor], Tensor] | None = None


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
    args = None
    state = checkpoint
    if isinstance(checkpoint, Mapping):
        args = checkpoint.get('args')
        keys = ('ema_model',) if ema else ('model', 'state_dict')
        found = [key for key in keys if isinstance(checkpoint.get(key), Mapping)]
        if ema and not found:
            raise ValueError('the checkpoint has no ema_model; leave out --ema')
        state = checkpoint[found[0]] if found else checkpoint
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            'the checkpoint has no state dict: expected one under model or state_dict, or a bare '
            'one'
        )
    state = dict(state)
    if state and all(name.startswith('module.') for name in state):
        state = {name[len('module.') :]: value for name, value in state.items()}
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
    layout = read_official(state)
    _check_family(layout, family)
    schedule = _find_schedule(state, layout, args, schedule)
    select = coco_classes and layout.num_classes == 91
    conversion = Conversion(layout, {}, schedule=schedule)
    renames = _Renames(layout, 'official')
    unknown = []
    for name, tensor in state.items():
        original = _duplicated(name)
        if original is not None:
            if original not in state or not torch.equal(tensor, state[original]):
                raise ValueError(
                    f'{name} should repeat {original} but does not; the file was not written by '
                    f"the authors' {FAMILIES[layout.family]}"
                )
            conversion.reasons[name] = f'repeats {original}'
            continue
        if _is_unused_projection(name, state):
            conversion.left[name] = tensor
            conversion.reasons[name] = 'not used by standard attention'
            continue
        rule, new_name = renames(name)
        if rule is None:
            unknown.append(name)
            continue
        value = rule.forward(tensor) if rule.forward else tensor
        if rule.rows:
            kept, dropped = _rows(rule.rows, len(tensor), select)
            value = tensor[kept]
            if dropped:
                conversion.left[name] = tensor[dropped]
                conversion.reasons[name] = _why_rows(rule.rows, dropped)
        conversion.state_dict[new_name] = value
        conversion.mapped[name] = new_name
    _refuse_unknown(unknown, layout)
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
    layout = read_mmdet(state)
    _check_family(layout, family)
    expand = coco_classes and layout.num_classes == 80
    schedule = _carried_schedule(state)
    conversion = Conversion(layout, {}, schedule=schedule)
    renames = _Renames(layout, 'mmdet')
    official, filled = conversion.state_dict, conversion.filled
    unknown = []
    for name, tensor in state.items():
        if name.endswith('num_batches_tracked'):
            conversion.left[name] = tensor
            conversion.reasons[name] = "the authors' frozen BatchNorm does not count batches"
            continue
        if name == _SCHEDULE:
            conversion.left[name] = tensor
            conversion.reasons[name] = 'is among the arguments of the run there'
            continue
        rule, new_name = renames(name)
        if rule is None:
            unknown.append(name)
            continue
        value = rule.backward(tensor) if rule.backward else tensor
        if rule.rows:
            total = 91 if expand else layout.num_classes
            total += rule.rows == 'labels'
            kept, dropped = _rows(rule.rows, total, expand)
            value = tensor.new_zeros(total, *tensor.shape[1:])
            value[kept] = tensor
            if dropped:
                if new_name in left:
                    value[dropped] = left[new_name].to(value)
                else:
                    value[dropped] = -20.0 if new_name.endswith('bias') else 0.0
                    filled[new_name] = f'{len(dropped)} rows without a class'
        official[new_name] = value
        conversion.mapped[name] = new_name
    _refuse_unknown(unknown, layout)

    # What MMDetection's models may do without and the authors' code insists on.
    for level in range(layout.num_levels):
        weight, bias = f'input_proj.{level}.0.weight', f'input_proj.{level}.0.bias'
        if weight in official and bias not in official:
            official[bias] = official[weight].new_zeros(len(official[weight]))
            filled[bias] = 'zeros: the neck has no bias'
    if layout.family == 'lite-dino':
        for name in list(official):
            attention, found, _ = name.rpartition('.attention_weights.weight')
            if not found:
                continue
            for end in ('weight', 'bias'):
                unused = f'{attention}.query_proj.{end}'
                value = left.get(unused)
                if value is None:
                    value = torch.zeros_like(official[f'{attention}.output_proj.{end}'])
                    filled[unused] = 'zeros: not used by standard attention'
                official[unused] = value
    for name in list(official):
        for duplicate in _duplicates(name, layout):
            official[duplicate] = official[name]
    return conversion


# --- What a file is ---------------------------------------------------------------------------


# Of MMDetection's models: all DETRs have the first, Mask2Former the others (instances, video).
_MMDET_NAMES = (
    'level_embed',
    *(f'{head}_head.pixel_decoder.mask_feature.weight' for head in ('panoptic', 'track')),
)
# What DDQ-DETR and Grounding DINO have and DINO, which they are made of, has not.
_OTHER_FAMILIES = ('query_map.weight', 'text_feat_map.weight')


def read_official(state: Mapping[str, Tensor]) -> Layout:
    """Layout of a state dict with the authors' names.

    Raises:
        ValueError: If it is none of the known families.
    """
    if 'transformer.level_embed' not in state:
        if any(name in state for name in _MMDET_NAMES):
            raise ValueError(
                "the file is in MMDetection's layout already; use --to-official for the way back "
                'or --from-stock for a warm start'
            )
        raise ValueError(
            'the file is none of ' + ', '.join(FAMILIES.values()) + ' in the original layout: it '
            'has no transformer.level_embed'
        )
    attention = 'transformer.encoder.layers.0.self_attn.'
    if 'label_enc.weight' in state:
        is_lite = f'{attention}query_proj.weight' in state
        family = 'lite-dino' if is_lite else 'dino'
    elif 'query_embed.weight' in state and 'transformer.pos_trans.weight' in state:
        family = 'h-deformable-detr'
    else:
        family = 'deformable-detr'
    num_levels = _count(state, r'input_proj\.(\d+)\.0\.weight')
    maps = [state[f'input_proj.{i}.0.weight'].shape[-1] == 1 for i in range(num_levels)]
    return Layout(
        family=family,
        backbone='swin' if any('patch_embed' in name for name in state) else 'resnet',
        encoder_layers=_count(state, r'transformer\.encoder\.layers\.(\d+)\.norm1\.weight'),
        decoder_layers=_count(state, r'transformer\.decoder\.layers\.(\d+)\.norm1\.weight'),
        num_levels=num_levels,
        num_maps=sum(maps),
        refines=any(name.startswith('transformer.decoder.bbox_embed.') for name in state),
        two_stage='transformer.enc_output.weight' in state,
        num_classes=len(state.get('class_embed.0.weight', ())),
    )


def read_mmdet(state: Mapping[str, Tensor]) -> Layout:
    """Layout of a state dict with MMDetection's names.

    Raises:
        ValueError: If the authors of none of the known families released such a model.
    """
    is_other = any(name in state for name in _OTHER_FAMILIES)
    if is_other or 'level_embed' not in state or 'bbox_head.cls_branches.0.weight' not in state:
        raise ValueError(
            "the file is no Deformable DETR, H-Deformable-DETR, DINO or Lite-DINO in MMDetection's "
            'layout'
        )
    is_lite = any(
        re.fullmatch(r'encoder\.layers\.\d+\.(small_norm|self_attn\.query_proj)\.weight', name)
        for name in state
    )
    two_stage = 'memory_trans_fc.weight' in state
    if any(name.startswith('dn_query_generator.') for name in state):
        family = 'lite-dino' if is_lite else 'dino'
    elif is_lite:
        raise ValueError(
            'only Lite-DINO was released by its authors; there is no original layout for another '
            'Lite detector'
        )
    else:
        mixed = two_stage and 'query_embedding.weight' in state
        family = 'h-deformable-detr' if mixed else 'deformable-detr'
    decoder_layers = _count(state, r'decoder\.layers\.(\d+)\.norms\.0\.weight')
    num_maps = _count(state, r'neck\.convs\.(\d+)\.conv\.weight')
    heads = [state[f'bbox_head.reg_branches.{i}.4.bias'] for i in range(decoder_layers)]
    return Layout(
        family=family,
        backbone='swin' if 'backbone.patch_embed.projection.weight' in state else 'resnet',
        encoder_layers=_count(state, r'encoder\.layers\.(\d+)\.norms\.0\.weight'),
        decoder_layers=decoder_layers,
        num_levels=num_maps + _count(state, r'neck\.extra_convs\.(\d+)\.conv\.weight'),
        num_maps=num_maps,
        refines=two_stage or any(not torch.equal(head, heads[0]) for head in heads),
        two_stage=two_stage,
        num_classes=len(state['bbox_head.cls_branches.0.weight']),
    )


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in state)


def _check_family(layout: Layout, family: str | None) -> None:
    if family is None:
        return
    if family not in FAMILIES:
        raise ValueError(f'{family!r} is none of {", ".join(FAMILIES)}')
    if family != layout.family:
        raise ValueError(
            f'the file is no {FAMILIES[family]}: its names are those of '
            f'{FAMILIES[layout.family]}; use --model {layout.family}'
        )


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
    layers = layout.encoder_layers
    joint = [i for i in range(layers) if f'transformer.encoder.layers.{i}.linear12.weight' in state]
    blocks = len(joint) or getattr(args, 'num_expansion', None)
    if joint and joint != [i for i in range(layers) if (i + 1) % (layers // blocks) == 0]:
        raise ValueError(
            f'the small FFNs are in layers {[i + 1 for i in joint]} of {layers}, which is no '
            'schedule of equal blocks'
        )
    stored = getattr(args, 'enc_scale', None)

    def named(high: int) -> EncoderSchedule:
        return EncoderSchedule(high, layout.num_levels - high, layers // blocks, blocks)

    fitting = (
        ''
        if blocks is None
        else ' or '.join(str(named(high)) for high in range(layout.num_levels - 1, 0, -1))
    )
    if wanted is None:
        if stored is None or blocks is None:
            raise ValueError(
                'the file does not say how many maps are high-level, and its weights cannot tell; '
                'give the schedule it was trained with: --schedule ' + (fitting or 'HxLy-(A+1)xB')
            )
        return named(stored)
    wanted = EncoderSchedule.parse(wanted)
    fits = wanted.num_levels == layout.num_levels and wanted.num_layers == layers
    if not fits or (blocks is not None and wanted.num_blocks != blocks):
        raise ValueError(
            f'schedule {wanted} does not fit the file: it has {layout.num_levels} levels, '
            f'{layers} encoder layers'
            + (f' and small FFNs in {blocks} of them, which fits {fitting}' if joint else '')
        )
    if stored is not None and stored != wanted.num_high_levels:
        raise ValueError(
            f'schedule {wanted} does not fit the file: its run was started with '
            f'enc_scale={stored}, which is {named(stored)}'
        )
    return wanted


def _carried_schedule(state: Mapping[str, Tensor]) -> EncoderSchedule | None:
    if _SCHEDULE not in state:
        return None
    schedule, update = EncoderSchedule.decode(state[_SCHEDULE])
    if update != 'joint':
        raise ValueError(
            f"the authors' Lite-DINO updates high- and low-level tokens jointly; there is no "
            f'original layout for {update} updates'
        )
    return schedule


# --- The table of names -----------------------------------------------------------------------


def _rules(layout: Layout) -> Iterator[_Rule]:
    is_dino = layout.family in ('dino', 'lite-dino')
    if layout.backbone == 'resnet':
        yield _Rule('backbone.0.body.*', 'backbone.*')
    else:
        yield from _swin_rules('backbone.0.' if is_dino else 'backbone.0.body.')
    for level in range(layout.num_levels):
        extra = level - layout.num_maps
        neck = f'neck.convs.{level}' if extra < 0 else f'neck.extra_convs.{extra}'
        yield _Rule(f'input_proj.{level}.0.*', f'{neck}.conv.*')
        yield _Rule(f'input_proj.{level}.1.*', f'{neck}.gn.*')
    yield _Rule('transformer.level_embed', 'level_embed')

    encoder = 'transformer.encoder.layers.{i}.', 'encoder.layers.{i}.'
    for official, mmdet in ENCODER_NAMES.items():
        yield _Rule(f'{encoder[0]}{official}.*', f'{encoder[1]}{mmdet}.*')
    decoder = 'transformer.decoder.layers.{i}.', 'decoder.layers.{i}.'
    for official, mmdet in {
        'self_attn': 'self_attn.attn',
        'cross_attn': 'cross_attn',
        # Norms are numbered by the module they follow there, by the order they run in here.
        'norm2': 'norms.0',
        'norm1': 'norms.1',
        'norm3': 'norms.2',
        'linear1': 'ffn.layers.0.0',
        'linear2': 'ffn.layers.1',
    }.items():
        yield _Rule(f'{decoder[0]}{official}.*', f'{decoder[1]}{mmdet}.*')

    encoder_head = layout.decoder_layers
    if is_dino:
        yield _Rule('transformer.tgt_embed.weight', 'query_embedding.weight')
        yield _Rule('label_enc.weight', 'dn_query_generator.label_embedding.weight', 'labels')
        yield _Rule('transformer.decoder.norm.*', 'decoder.norm.*')
        yield _Rule('transformer.decoder.ref_point_head.*', 'decoder.ref_point_head.*')
        heads = [('transformer.enc_out_KIND_embed', encoder_head, 'classes')]
    else:
        yield _Rule('query_embed.weight', 'query_embedding.weight')
        yield _Rule('transformer.reference_points.*', 'reference_points_fc.*')
        yield _Rule('transformer.pos_trans.*', 'pos_trans_fc.*')
        yield _Rule('transformer.pos_trans_norm.*', 'pos_trans_norm.*')
        # These encoders are trained and ranked by channel 0 alone, whatever the classes.
        heads = [(f'KIND_embed.{encoder_head}', encoder_head, 'objectness')]
    yield _Rule('transformer.enc_output.*', 'memory_trans_fc.*')
    yield _Rule('transformer.enc_output_norm.*', 'memory_trans_norm.*')
    heads.append(('KIND_embed.{i}', '{i}', 'classes'))
    for official, index, rows in heads:
        cls, reg = official.replace('KIND', 'class'), official.replace('KIND', 'bbox')
        yield _Rule(f'{cls}.*', f'bbox_head.cls_branches.{index}.*', rows)
        for layer in range(3):
            yield _Rule(
                f'{reg}.layers.{layer}.*',
                f'bbox_head.reg_branches.{index}.{2 * layer}.*',
            )


def _swin_rules(official: str) -> Iterator[_Rule]:
    for name in ('norm', 'proj'):
        mmdet = 'projection' if name == 'proj' else name
        yield _Rule(f'{official}patch_embed.{name}.*', f'backbone.patch_embed.{mmdet}.*')
    for name, mmdet in {
        'norm1': 'norm1',
        'norm2': 'norm2',
        'attn': 'attn.w_msa',
        'mlp.fc1': 'ffn.layers.0.0',
        'mlp.fc2': 'ffn.layers.1',
    }.items():
        yield _Rule(
            f'{official}layers.{{i}}.blocks.{{j}}.{name}.*',
            f'backbone.stages.{{i}}.blocks.{{j}}.{mmdet}.*',
        )
    # Patch merging: the four neighbours are concatenated block by block there, and by column first;
    # channel by channel here (nn.Unfold), and by row first.
    yield _Rule(
        f'{official}layers.{{i}}.downsample.*',
        'backbone.stages.{i}.downsample.*',
        forward=lambda x: x.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].mT.flatten(-2),
        backward=lambda x: x.unflatten(-1, (-1, 4)).mT[..., [0, 2, 1, 3], :].flatten(-2),
    )
    yield _Rule(f'{official}norm{{i}}.*', 'backbone.norm{i}.*')


class _Renames:
    """Finds the rule of a name and its name on the other side."""

    def __init__(self, layout: Layout, side: str) -> None:
        self.rules = []
        for rule in _rules(layout):
            source, target = rule.official, rule.mmdet
            if side == 'mmdet':
                source, target = target, source
            pattern = re.escape(source).replace(r'\*', '(?P<rest>.+)')
            pattern = re.sub(r'\\{(\w)\\}', r'(?P<\1>\\d+)', pattern)
            self.rules.append((re.compile(pattern), target.replace('*', '{rest}'), rule))

    def __call__(self, name: str) -> tuple[_Rule | None, str]:
        for pattern, target, rule in self.rules:
            match = pattern.fullmatch(name)
            if match:
                return rule, target.format(**match.groupdict())
        return None, ''


def _duplicated(name: str) -> str | None:
    """The entry that an entry of the authors' decoder is another name of."""
    match = re.fullmatch(r'transformer\.decoder\.((class|bbox)_embed\..+)', name)
    return match and match[1]


def _duplicates(name: str, layout: Layout) -> list[str]:
    held = (name.startswith('class_embed.') and layout.two_stage) or (
        name.startswith('bbox_embed.') and layout.refines
    )
    return [f'transformer.decoder.{name}'] if held else []


def _is_unused_projection(name: str, state: Mapping[str, Tensor]) -> bool:
    attention, found, _ = name.partition('.query_proj.')
    return bool(found) and f'{attention}.attention_weights.weight' in state


def _rows(kind: str, total: int, select: bool) -> tuple[list[int], list[int]]:
    """Rows of an original class layer that MMDetection keeps, in its order, and the others."""
    if select:
        # MMDetection reads the objectness from its first channel too, but its second channel is
        # COCO's second category.
        kept = [0, *COCO_IDS[1:]] if kind == 'objectness' else list(COCO_IDS)
    else:
        kept = list(range(total - (kind == 'labels')))
    return kept, sorted(set(range(total)) - set(kept))


def _why_rows(kind: str, dropped: list[int]) -> str:
    if len(dropped) == 1:
        return f'row {dropped[0]}: never read'
    reason = 'no COCO categories'
    if kind == 'objectness':
        reason += ', and the class of the first, which is not used here'
    return f'rows {", ".join(map(str, dropped))}: {reason}'


def _refuse_unknown(unknown: list[str], layout: Layout) -> None:
    if unknown:
        more = f' and {len(unknown) - 3} more' if len(unknown) > 3 else ''
        raise ValueError(
            f'{", ".join(unknown[:3])}{more} have no place in {FAMILIES[layout.family]}'
        )
