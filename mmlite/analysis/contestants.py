"""Models as contestants: of MMDetection, and their exports."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Union

import numpy as np
import torch
from mmdet.models.layers import DeformableDetrTransformerEncoder
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .. import __version__, fuse, optimize
from ..export.detector import DESCRIPTION, load
from ..export.detector import Detector as ExportedDetector
from ..export.int8 import import_nncf, quantize
from ..export.operators import attention_as
from ..export.program import Traced, trace
from ..export.runtimes import library
from ..export.write import need_packages, to_openvino, write
from ..openmmlab.build import DetectorSpec, build_detector, load_config
from ..openmmlab.layers import LiteEncoder
from ..openmmlab.lite_config import stock_config
from ..ops import reference
from .complexity import (
    Complexity,
    call_with,
    count_detector,
    detector_arguments,
    find_encoder,
)
from .inputs import encoder_inputs, pyramid_sizes
from .published import preset as published_rows
from .report import size
from .timing import Call, Contestant, Setting, Start

# As it is; encoder compiled; standard attention on our operators; optimised for prediction.
EAGER, COMPILED, FUSED, OPTIMIZED = MODES = ('eager', 'compiled', 'fused', 'optimized')
# How it is exported: with attention as MMCV writes it, portable, with our operators; and for
# OpenVINO, for images of one size, in 8 bits.
FORMS = PLAIN, PORTABLE, OURS = 'plain', 'portable', 'ours'
INT8 = '8 bits'
# Runtime -> what a model is exported as.
FORMATS = {'onnxruntime': 'onnx', 'openvino': 'openvino'}
STOCK, STOCK_FUSED = 'stock (mmcv)', 'stock (ms_deform_attn)'
EMBED_DIMS = 256


# Arguments of a model, by position or by name; or what makes them of an image size (h, w) and a
# number of images. None: drawn images for a detector of mmdet.
Inputs = Union[tuple, dict, Callable[[tuple[int, int], int], 'tuple | dict'], None]


@dataclass(eq=False)
class Model(Contestant):
    """A model as it runs somewhere."""

    name: str  # what tables call it
    model: nn.Module | None = None
    encoder_at: str | None = None  # name of its multi-scale encoder, '' where it is one itself
    inputs: Inputs = None
    loss: Callable[[nn.Module, Any], Tensor] | None = None  # of a model and its arguments
    checkpoint: str | None = None  # the file of its weights, if they are trained
    published: dict | None = None  # what the paper reports of it
    mode: str = EAGER
    note: str = ''  # for below the tables
    cost: Complexity | None = None  # none of an export
    accuracy: dict[str, float] | None = None  # COCO's metrics in percent
    baseline: Model | None = None

    def label(self) -> dict[str, str]:
        return {'model': self.name}

    def as_json(self) -> dict:
        facts = {'complexity': self.cost, 'published': self.published, 'accuracy': self.accuracy}
        return {'name': self.name, **facts, 'timings': self.timings}

    def arguments(self, setting: Setting, batch_size: int = 1) -> tuple | dict:
        """What a prediction takes, by position or by name."""
        given = self.inputs
        if given is None:
            drawn = detector_arguments(self.model, setting.image_size, batch_size)
            return {**drawn, 'mode': 'predict'}
        given = given(setting.image_size, batch_size) if callable(given) else given
        return tree_map_only(Tensor, lambda tensor: tensor.to(setting.device), given)

    def count(self, setting: Setting) -> Complexity | None:
        """What one image costs; ValueError where the model does not run on it."""
        arguments = None if self.inputs is None else self.arguments(setting)
        for compute in (False, True):  # a model may look at values, which the first leaves at zero
            try:
                given = self.model, setting.image_size, arguments, self.encoder_at
                return count_detector(*given, compute=compute)
            except Exception as error:  # of a stranger's code
                reason = str(error).partition('\n')[0]
        what = f'an image of {size(setting.image_size)}' if setting.image_size else 'its inputs'
        raise ValueError(f'{self.name} does not run on {what}: {reason}')

    def call(self, part: str, setting: Setting, batch_size: int) -> Call | None:
        """Of ``'inference'``, ``'encoder'`` in it, or ``'training'``: forward and backward."""
        module, arguments = self.model, self.arguments(setting, batch_size)
        run = partial(call_with, module, arguments)

        def predict(index: int) -> object:
            module.eval()
            with torch.no_grad(), setting.autocast():
                return run()

        def train(index: int) -> None:
            module.train()
            with setting.autocast():
                loss = self.loss(module, arguments)
            loss.backward()
            module.zero_grad(set_to_none=True)

        if part == 'inference':
            return predict
        if self.mode == OPTIMIZED or (part == 'encoder' and self.encoder_at is None):
            return None  # what is optimised runs its encoder in pieces
        if part == 'training':
            return train
        module, seen = module.get_submodule(self.encoder_at), []
        with module.register_forward_pre_hook(lambda _, *call: seen.append(call), with_kwargs=True):
            predict(0)
        args, kwargs = seen[-1]
        run = partial(module, *args, **kwargs)
        return predict

    def in_mode(self, mode: str) -> Model:
        """The same in another of :data:`MODES`, or itself; ValueError where it does not run so."""
        if mode == EAGER or self.model is None:
            return self
        model = copy.deepcopy(self.model)
        other = replace(self, name=f'{self.name}, {mode}', model=model, mode=mode)
        if mode != COMPILED:
            (fuse if mode == FUSED else optimize)(model)
        elif self.encoder_at is None:
            raise ValueError('it has no multi-scale encoder')
        else:
            encoder = model.get_submodule(self.encoder_at)
            encoder.forward = torch.compile(encoder.forward)
        return other


def detector_loss(model: nn.Module, arguments: dict) -> Tensor:
    """What a training step of a detector of mmdet minimises."""
    return model.parse_losses(model(**{**arguments, 'mode': 'loss'}))[0]


def encoder_loss(model: nn.Module, arguments: dict) -> Tensor:
    """A loss of an encoder alone, for which the backbone learns, too."""
    query = arguments['query'].detach().requires_grad_()
    memory = model(**{**arguments, 'query': query})
    return (memory * memory.detach()).sum()


@dataclass(eq=False)
class Exported(Model):
    """A folder that ``mmlite export`` or ``mmlite quantize`` wrote, in its runtime."""

    folder: Path | None = None

    def count(self, setting) -> None:
        """Nothing: no module is called."""

    def call(self, part, setting, batch_size) -> Call | None:
        if part != 'inference':
            return None
        exported = load(self.folder, torch.get_num_threads())
        sizes = [exported.description['input'][name] for name in ('batch', 'height', 'width')]
        fits = all(a in (None, b) for a, b in zip(sizes, (1, *setting.image_size)))
        if not fits or (setting.device, setting.dtype, batch_size) != ('cpu', 'float32', 1):
            raise ValueError(
                f'{self.name} runs on the CPU with one image: leave out --device, --dtype and '
                '--batch-size; an export for images of one size needs that --image-size'
            )
        return session_call(exported, setting.image_size)


def session_call(exported: ExportedDetector, size: tuple[int, int]) -> Call:
    """A run of an exported detector alone, on a drawn image of size (h, w)."""
    arguments = exported.arguments([np.random.default_rng(0).uniform(0, 255, (3, *size))], 1)
    return lambda index: exported.session(*arguments)


def detectors(names: Sequence[str], changes: dict | None, device: str, start: Start) -> list[Model]:
    """Detectors of configs, the baseline first, and folders of exports.

    A Lite config that is the only one gets its stock one as baseline.
    """
    exports = [name for name in names if Path(name).is_dir()]
    if not names or names[0] in exports:
        raise ValueError('give the config of the baseline first; others are compared with it')
    specs = [DetectorSpec.parse(name) for name in names if name not in exports]
    wanted = [(spec.name, load_config(spec.config, changes), spec.checkpoint) for spec in specs]
    if len(wanted) == 1:
        stock = copy.deepcopy(wanted[0][1])
        with suppress(ValueError):  # it is stock itself
            stock.model = stock_config(stock.model)
            wanted.insert(0, ('stock', stock, None))
    step, found = start('building', len(wanted)), []
    for name, config, checkpoint in wanted:
        torch.manual_seed(0)
        model = build_detector(config, checkpoint, device)
        at = find_encoder(model)
        found.append(Model(name, model, at, loss=detector_loss, checkpoint=checkpoint))
        step()
    return found + [Exported(name, folder=Path(name)) for name in exports]


def published(
    preset: str, changes: dict | None, device: str, start: Start
) -> Iterator[list[Model]]:
    """The detectors of a table of the paper, in groups, with what it reports of them."""
    for rows in published_rows(preset):
        group = detectors([row.config for row in rows], changes, device, start)
        for each, row in zip(group, rows):
            each.name, each.published = f'{row.model}, {row.backbone}', vars(row)
        yield group


def exported(
    group: Sequence[Model],
    runtimes: Sequence[str],
    forms: Sequence[str],
    int8: bool,
    size: tuple[int, int],
    start: Start,
) -> list[Exported]:
    """Export detectors for runtimes, or find what was exported before.

    Without ``forms`` the first detector is exported plainly, the others with our operators.
    """
    for runtime in runtimes:
        need_runtime(runtime, int8)
        library(runtime)
    wanted: list[tuple[Model, str, str]] = []
    for each in group:
        own = forms or ([PLAIN] if each is group[0] else [OURS])
        every = [(runtime, form) for runtime in sorted(runtimes) for form in own]
        every += [('openvino', INT8)] if int8 else []
        wanted += [(each, *one) for one in every if each.model is not None]
    step, found = start('exporting', len(wanted)), []
    for each, runtime, form in wanted:
        weights = [Path(file).stat().st_mtime for file in [each.checkpoint] if file]
        told = repr((each.model.cfg.to_dict(), each.checkpoint, weights, __version__, size))
        key = hashlib.sha256(told.encode()).hexdigest()[:12]
        path = Path('work_dirs/exports', f'{key}-{runtime}-{form.replace(" ", "-")}')
        as_onnx = Path(str(path).replace('-openvino-', '-onnxruntime-', 1))
        if not (path / DESCRIPTION).is_file():
            if as_onnx != path and (as_onnx / DESCRIPTION).is_file():
                to_openvino(as_onnx, path)
            else:
                _export(each.model, path, FORMATS[runtime], form, size)
        found.append(Exported(f'{each.name}, {runtime}, {form}', folder=path))
        step()
    return found


def need_runtime(runtime: str, int8: bool = False) -> None:
    """Import what exporting for a runtime takes, before minutes go into it."""
    need_packages(FORMATS[runtime])
    if int8:
        import_nncf()


def _export(model: nn.Module, folder: Path, format: str, form: str, size: tuple[int, int]) -> None:
    if form == INT8:
        image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
        with TemporaryDirectory() as source:
            write(trace(model, size=size), source, format)
            quantize(source, folder, [image])
        return
    traced = trace(model, portable='gridsample' if form == PORTABLE else None)
    if form == PLAIN:
        from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

        def standard(value, shapes, *sampling):
            return multi_scale_deformable_attn_pytorch(value, sizes(shapes), *sampling)

        def key_aware(query, key, value, shapes, locations):
            return reference.key_aware_deform_attn(query, key, value, sizes(shapes), locations)

        def sizes(shapes):
            return list(zip(shapes[::2], shapes[1::2]))

        program = traced.program.run_decompositions(attention_as(standard, key_aware))
        traced = Traced(program, {**traced.description, 'portable': 'gridsample'})
    write(traced, folder, format)


def encoders(schedules: Sequence[str], ffn_channels: int, device: str = 'cpu') -> list[Model]:
    """The stock encoder with mmcv's operator and ours, and each schedule with both attentions."""
    dims = {'embed_dims': EMBED_DIMS}
    layer_cfg = {
        'self_attn_cfg': {**dims, 'num_levels': 4, 'dropout': 0.0, 'batch_first': True},
        'ffn_cfg': {**dims, 'feedforward_channels': ffn_channels, 'ffn_drop': 0.0},
    }
    options = {'num_layers': 6, 'layer_cfg': layer_cfg}
    found = {STOCK: DeformableDetrTransformerEncoder(**options)}
    for schedule in schedules:
        found[f'Lite {schedule}'] = LiteEncoder(schedule, **options)
        found[f'Lite {schedule}, no KDA'] = LiteEncoder(schedule, **options, key_aware=False)

    def inputs(image_size: tuple[int, int], batch_size: int) -> dict:
        return encoder_inputs(pyramid_sizes(image_size), EMBED_DIMS, batch_size)

    stock, *lite = (Model(n, e.to(device), '', inputs, encoder_loss) for n, e in found.items())
    return [stock, replace(stock.in_mode(FUSED), name=STOCK_FUSED), *lite]
