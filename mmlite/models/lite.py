"""The Lite encoder in models of any repository, in the place of an encoder that it understands.

An encoder is found by its layers and by the names of what its ``forward`` takes. Before anything is
changed, the Lite encoder with the stock schedule is compared with it on small random inputs: what
does not give the same numbers is refused.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import EncoderSchedule, InterleavedEncoder
from .attention import as_wide, is_deformable_attention, level_sizes
from .changes import LOG, Change, changing, reasons
from .encoder import EncoderLayerParts, StockLiteEncoder, encode_with_text
from .trial import Call, is_same, not_tried, run, trial_copy

# What the layers take from elsewhere, and an encoder whose layers attend to themselves does not.
_UNKNOWN = ('value', 'identity', 'key', 'key_pos', 'attn_mask', 'query_sine_embed')
_TEXT = ('memory_text', 'text_attention_mask', 'pos_text', 'text_self_attention_masks')
_TEXT += ('position_ids',)
_NORMS = ('norm', 'post_norm', 'post_norm_layer')
_CHANCE = {'bernoulli', 'rand', 'random', 'training'}


def to_lite(model: nn.Module, schedule: str | EncoderSchedule, **options: Any) -> nn.Module:
    """Give a model the Lite encoder in place of its own; see :func:`mmlite.to_lite`.

    With a schedule that updates every level in every layer, such as ``'H3L1-(1+1)x6'``, and
    ``key_aware`` and ``small_ffn`` off, the model computes exactly what it did. Options are those
    of :class:`mmlite.models.StockLiteEncoder`.

    Returns:
        nn.Module: The same model. The log names encoders that were left as they were, and why.

    Raises:
        ValueError: No encoder can be replaced; the message says why. Nothing is changed then.
    """
    with changing(model, 'to_lite') as change:
        replace_encoders(change, model, schedule, options, _replacement)
    return model


def replace_encoders(
    change: Change,
    model: nn.Module,
    schedule: str | EncoderSchedule,
    options: dict[str, Any],
    replacement: Callable[[nn.Module, EncoderSchedule, dict], nn.Module | None],
    none: str = 'none of its modules has layers of deformable attention',
) -> None:
    """Give every encoder of a model that can be replaced its Lite one, and log it.

    ``replacement`` makes the Lite encoder of a module, or gives None where that is no encoder; a
    ValueError says why it cannot. ``none`` is what to say where there is no encoder. Raises as
    :func:`to_lite`.
    """
    schedule, kind = EncoderSchedule.parse(schedule), type(model).__name__
    lite, left = {}, {}
    for name, part in model.named_modules():
        try:
            made = replacement(part, schedule, options)
            if made is not None and not name:
                raise ValueError('it is the model itself; give to_lite the model that holds it')
            if made is not None and name.endswith('_orig_mod'):
                raise ValueError('torch.compile would go on calling it; compile after to_lite')
            if made is not None:
                lite[name] = made
        except ValueError as error:
            left[name or 'the model'] = str(error)
    if not lite:
        if any(isinstance(part, InterleavedEncoder) for part in model.modules()):
            raise ValueError(f'{kind} has a Lite encoder already')
        why = reasons(left) or none
        raise ValueError(f'{kind} has no encoder that the Lite encoder can replace: {why}')
    for name, made in lite.items():
        change.replace(model, model.get_submodule(name), made)
    LOG.info('to_lite: %s has schedule %s; train what is new', ', '.join(lite), schedule)
    if left:
        LOG.warning('to_lite: left as it is: %s', reasons(left))


class AnyLiteEncoder(StockLiteEncoder):
    """In the place of an encoder of any repository, whose call and result it keeps."""

    def __init__(self, stock: nn.Module, schedule: EncoderSchedule, **options: Any) -> None:
        if getattr(stock, 'use_checkpoint', False) or getattr(stock, 'use_transformer_ckpt', False):
            options = {'num_cp': 2 * len(stock.layers), **options}
        super().__init__(stock, schedule, **options)
        for name, value in vars(stock).items():  # such as num_layers, which others may look at
            if isinstance(value, (bool, float, int, str)) and not hasattr(self, name):
                setattr(self, name, value)
            if name.startswith(('_forward', '_backward', '_is_full')):  # hooks and their handles
                self.__dict__[name] = value
        self.call = Call.of(type(stock).forward, _UNKNOWN)
        attention = EncoderLayerParts.of(stock.layers[0]).attention
        self.swaps = not getattr(attention, 'batch_first', True)
        norms = [getattr(stock, name) for name in _NORMS if getattr(stock, name, None) is not None]
        self.norm = copy.deepcopy(norms[0]) if norms else None
        self.behind: list[None] | None = None  # what the stock encoder returns beside the memory
        self.has_text = 'memory_text' in self.call.names
        for name in ('fusion_layers', 'text_layers'):
            layers = getattr(stock, name, ())
            copies = [copy.deepcopy(layers[index]) for index in self.stock_layers if layers]
            setattr(self, name, nn.ModuleList(copies))
        # A function of the file that the encoder is in.
        code = inspect.unwrap(type(stock).forward)
        self.embed = code.__globals__['get_sine_pos_embed'] if self.text_layers else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock encoder's; a ValueError if an argument is given that is not known here."""
        kwargs.update(zip(self.call.names, args))
        text = [kwargs.pop(name, None) for name in _TEXT] if self.has_text else []
        known, unknown = self.call.read((), kwargs)
        if unknown:
            raise ValueError(f'the Lite encoder does not know what to do with {", ".join(unknown)}')
        tokens, pos = known['query'], known.get('pos')
        if self.swaps:
            tokens, pos = tokens.transpose(0, 1), None if pos is None else pos.transpose(0, 1)
        arguments = dict(
            tokens=tokens,
            pos=pos,
            level_sizes=level_sizes(known['sizes']),
            padding_mask=known.get('mask'),
        )
        for role, name in (('ratios', 'valid_ratios'), ('points', 'reference_points')):
            given = known.get(role)
            arguments[name] = given if given is None else as_wide(given, tokens)
        if self.has_text:
            return self._with_text(arguments, *text)
        memory = super().forward(**arguments)
        memory = memory if self.norm is None else self.norm(memory)
        memory = memory.transpose(0, 1) if self.swaps else memory
        return memory if self.behind is None else (memory, *self.behind)

    def _with_text(self, known, text, text_mask, text_pos, may_attend, numbers):
        if not self.text_layers:
            return encode_with_text(self, known, text, text_mask, lambda index, text: text)
        if numbers is None and text_pos is None:
            numbers = torch.arange(text.shape[1], device=text.device).float()
            numbers = numbers.expand(text.shape[0], -1)
        if numbers is not None:
            width = self.embed_dims
            text_pos = self.embed(numbers[..., None], num_pos_feats=width, exchange_xy=False)

        def enhance(index: int, text: Tensor) -> Tensor:
            masks = {'src_mask': ~may_attend, 'src_key_padding_mask': text_mask}
            layer, pos = self.text_layers[index], text_pos.transpose(0, 1)
            return layer(src=text.transpose(0, 1), **masks, pos=pos).transpose(0, 1)

        return encode_with_text(self, known, text, text_mask, enhance)


def _is_encoder(module: nn.Module) -> bool:
    """Whether a module looks like a deformable encoder: every layer attends to its own tokens."""
    layers = getattr(module, 'layers', None)
    if not isinstance(layers, nn.ModuleList) or isinstance(module, InterleavedEncoder):
        return False
    first = [getattr(x, 'self_attn', [*getattr(x, 'attentions', ()), None][0]) for x in layers]
    return bool(first) and all(each is not None and is_deformable_attention(each) for each in first)


@torch.inference_mode(False)
def _replacement(
    stock: nn.Module, schedule: EncoderSchedule, options: dict
) -> AnyLiteEncoder | None:
    """The Lite encoder for a stock one; a ValueError if that is another than those known here."""
    if not _is_encoder(stock):
        return None
    if unknown := _unknown_parts(stock):
        raise ValueError(f'its parts {", ".join(unknown)} have no counterpart in the Lite encoder')
    if len(set(stock.layers)) < len(stock.layers):
        raise ValueError('its layers share their weights, which those of the Lite encoder do not')
    dropped = getattr(stock, 'enc_layer_dropout_prob', 0)
    names = {name for part in (stock, *stock.layers) for name in _code_names(part)}
    if (dropped and any(dropped)) or (dropped == 0 and names & _CHANCE):
        raise ValueError('it leaves out layers at random or computes something else in training')
    try:
        behind = _compare(trial_copy(stock))
    except ValueError:
        raise
    except Exception as error:  # whatever a stranger's code raises
        raise ValueError(not_tried(error)) from error
    lite = AnyLiteEncoder(stock, schedule, **options)
    lite.behind = behind
    return lite


def _compare(stock: nn.Module) -> list[None] | None:
    """Compare an encoder with the Lite one of its schedule; what it returns behind the memory."""
    shape = EncoderLayerParts.of(stock.layers[0]).shape
    all_levels = EncoderSchedule(shape[2] - 1, 1, 1, len(stock.layers))
    ours = AnyLiteEncoder(stock, all_levels, key_aware=False, small_ffn=False)
    arguments = ours.call.draw(stock, shape, ours.swaps)
    if ours.has_text:
        device = arguments['spatial_shapes'].device
        is_end = torch.tensor([[False, False, False, each] for each in (False, True)])
        may_attend = torch.eye(4, dtype=torch.bool).expand(2, 4, 4)
        text = torch.rand(2, 4, shape[0], dtype=torch.float64), is_end, None, may_attend, None
        arguments.update(zip(_TEXT, (each if each is None else each.to(device) for each in text)))
    theirs = run(stock, arguments)
    ours.behind = None if isinstance(theirs[0], Tensor) else [None] * (len(theirs[0]) - 1)
    if not is_same(run(ours, arguments), theirs):
        raise ValueError('it computes something else than an encoder of standard attention')
    return ours.behind


def _code_names(module: nn.Module) -> tuple[str, ...]:
    if 'forward' in vars(module):
        raise ValueError('its forward or that of a layer was replaced in this instance alone')
    return inspect.unwrap(type(module).forward).__code__.co_names


def _unknown_parts(stock: nn.Module) -> list[str]:
    """Names of modules in an encoder that compute something that is not known here."""
    parts = [EncoderLayerParts.of(layer) for layer in stock.layers]
    whole = [module for part in parts for module in part.modules]
    whole += [getattr(stock, name, None) for name in (*_NORMS, 'fusion_layers', 'text_layers')]
    known = {id(m) for each in whole if isinstance(each, nn.Module) for m in each.modules()}
    harmless = (nn.Identity, nn.ModuleList, nn.Sequential)
    return [
        name
        for name, part in stock.named_modules()
        if id(part) not in known
        and (part._parameters or not (part._modules or isinstance(part, harmless)))
        and getattr(part, 'p', None) != 0  # a dropout that does nothing
    ]
