"""Models as contestants: of MMDetection, and their exports."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from mmdet.models.layers import DeformableDetrTransformerEncoder
from torch import Tensor, nn

from .. import __version__, fuse, optimize
from ..export.detector import DESCRIPTION, load
from ..export.detector import Detector as ExportedDetector
from ..export.int8 import import_nncf, quantize
from ..export.operators import attention_as
from ..export.program import Traced, trace
from ..export.runtimes import import_runtime, library
from ..export.write import write
from ..openmmlab.build import DetectorSpec, build_detector, load_config
from ..openmmlab.layers import LiteEncoder
from ..openmmlab.lite_config import stock_config
from ..ops import reference
from .complexity import Complexity, called_with, count_detector, find_encoder
from .inputs import encoder_inputs, image_batch, pyramid_sizes
from .published import preset as published_rows
from .report import size
from .timing import Call, Contestant, Setting, Start

# As it is; encoder compiled; standard attention on our operators; optimised for prediction.
EAGER, COMPILED, FUSED, OPTIMIZED = MODES = ('eager', 'compiled', 'fused', 'optimized')
# How it is exported: with attention as MMCV writes it, portable, with our operators; and for
# OpenVINO, for images of one size, in 8 bits.
FORMS = PLAIN, PORTABLE, OURS = 'plain', 'portable', 'our operators'
INT8 = '8 bits'
# Runtime -> what a model is exported as.
FORMATS = {'onnxruntime': 'onnx', 'openvino': 'openvino'}
STOCK, STOCK_FUSED = 'stock (mmcv)', 'stock (ms_deform_attn)'
EMBED_DIMS = 256


@dataclass(eq=False)
class Model(Contestant):
    """A model as it runs somewhere."""

    name: str  # what tables call it
    model: nn.Module | None = None
    encoder_at: str | None = None  # name of its multi-scale encoder, '' where it is one itself
    checkpoint: str | None = None  # the file of its weights, if they are trained
    published: dict | None = None  # what the paper reports of it
    mode: str = EAGER
    cost: Complexity | None = None  # none of an export
    accuracy: dict[str, float] | None = None  # COCO's metrics in percent
    baseline: Model | None = None

    def label(self) -> dict[str, str]:
        return {'model': self.name}

    def as_json(self) -> dict:
        facts = {'complexity': self.cost, 'published': self.published, 'accuracy': self.accuracy}
        return {'name': self.name, **facts, 'timings': self.timings}

    def arguments(self, setting: Setting, batch_size: int = 1) -> dict:
        """Keyword arguments of a prediction."""
        raise NotImplementedError

    def loss(self, arguments: dict) -> Tensor:
        """What a training step minimises, of the arguments of a prediction."""
        raise NotImplementedError

    def count(self, setting: Setting) -> Complexity | None:
        """What one image costs."""
        arguments = self.arguments(setting)
        return count_detector(self.model, setting.image_size, arguments, self.encoder_at)

    def call(self, part: str, setting: Setting, batch_size: int) -> Call | None:
        """Of ``'inference'``, ``'encoder'`` in it, or ``'training'``: forward and backward."""
        module, arguments = self.model, self.arguments(setting, batch_size)
        if part == 'encoder':
            if self.encoder_at is None or self.mode == OPTIMIZED:  # that runs it in pieces
                return None
            module = self.model.get_submodule(self.encoder_at)
            with called_with(module) as arguments:
                self.call('inference', setting, batch_size)(0)

        def predict(index: int) -> object:
            module.eval()
            with torch.no_grad(), setting.autocast():
                return module(**arguments)

        def train(index: int) -> None:
            module.train()
            with setting.autocast():
                loss = self.loss(arguments)
            loss.backward()
            module.zero_grad(set_to_none=True)

        if part != 'training':
            return predict
        return train if self.mode in (EAGER, COMPILED) else None

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


class Detector(Model):
    """A detector of MMDetection or mmlite."""

    def arguments(self, setting, batch_size=1) -> dict:
        images, samples = image_batch(batch_size, setting.image_size, setting.device)
        return {'inputs': images, 'data_samples': samples, 'mode': 'predict'}

    def count(self, setting) -> Complexity:
        try:
            return count_detector(self.model, setting.image_size)
        except (RuntimeError, AttributeError, TypeError) as error:
            what = f'{self.name} does not run on an image of {size(setting.image_size)}'
            raise ValueError(f'{what}: {str(error).splitlines()[0]}') from error

    def loss(self, arguments) -> Tensor:
        return self.model.parse_losses(self.model(**{**arguments, 'mode': 'loss'}))[0]


class Encoder(Model):
    """An encoder alone, over four levels."""

    def arguments(self, setting, batch_size=1) -> dict:
        sizes = pyramid_sizes(setting.image_size)
        return encoder_inputs(sizes, EMBED_DIMS, batch_size, setting.device)

    def loss(self, arguments) -> Tensor:
        query = arguments['query'].detach().requires_grad_()  # the backbone learns, too
        memory = self.model(**{**arguments, 'query': query})
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


def detectors(
    names: Sequence[str], preset: str | None, changes: dict | None, device: str, start: Start
) -> Iterator[list[Model]]:
    """Detectors of configs, and exports; or of a table of the paper: groups, baselines first.

    A Lite config that is the only one gets its stock one as baseline.
    """
    if bool(names) == bool(preset):
        raise ValueError('give either configs, the baseline first, or a --preset')
    exports = [name for name in names if Path(name).is_dir()]
    if exports and exports[0] == names[0]:
        raise ValueError('give the config of the baseline first; exports are compared with it')
    if preset:
        groups = [
            [(f'{row.model}, {row.backbone}', row.config, {'published': vars(row)}) for row in rows]
            for rows in published_rows(preset)
        ]
    else:
        specs = [DetectorSpec.parse(name) for name in names if name not in exports]
        groups = [[(spec.name, spec.config, {'checkpoint': spec.checkpoint}) for spec in specs]]
    step = start('building', sum(map(len, groups)))
    for group in groups:
        wanted = [(name, load_config(config, changes), facts) for name, config, facts in group]
        if len(wanted) == 1:
            stock = copy.deepcopy(wanted[0][1])
            with suppress(ValueError):  # it is stock itself
                stock.model = stock_config(stock.model)
                wanted.insert(0, ('stock', stock, {}))
        found: list[Model] = []
        for name, config, facts in wanted:
            torch.manual_seed(0)
            model = build_detector(config, facts.get('checkpoint'), device)
            found.append(Detector(name, model, find_encoder(model), **facts))
            step()
        yield found + [Exported(name, folder=Path(name)) for name in exports]


def exported(
    group: Sequence[Model], runtimes: Sequence[str], int8: bool, size: tuple[int, int], start: Start
) -> list[Exported]:
    """Export detectors for runtimes in every form, or find what was exported before."""
    for runtime in runtimes:
        need_runtime(runtime, int8)
        library(runtime)
    forms = [(runtime, form) for runtime in runtimes for form in FORMS]
    forms += [('openvino', INT8)] if int8 else []
    wanted = [(each, *form) for each in group if each.model is not None for form in forms]
    step, found = start('exporting', len(wanted)), []
    for each, runtime, form in wanted:
        weights = [Path(file).stat().st_mtime for file in [each.checkpoint] if file]
        told = repr((each.model.cfg.to_dict(), each.checkpoint, weights, __version__, size))
        key = hashlib.sha256(told.encode()).hexdigest()[:12]
        path = Path('work_dirs/exports', f'{key}-{runtime}-{form.replace(" ", "-")}')
        if not (path / DESCRIPTION).is_file():
            _export(each.model, path, FORMATS[runtime], form, size)
        found.append(Exported(f'{each.name}, {runtime}, {form}', folder=path))
        step()
    return found


def need_runtime(runtime: str, int8: bool = False) -> None:
    """Import what exporting for a runtime takes, before minutes go into it."""
    for package in ('onnx', 'onnxscript', runtime):
        import_runtime(package)
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
    found = {name: DeformableDetrTransformerEncoder(**options) for name in (STOCK, STOCK_FUSED)}
    fuse(found[STOCK_FUSED])
    for schedule in schedules:
        found[f'Lite {schedule}'] = LiteEncoder(schedule, **options)
        found[f'Lite {schedule}, no KDA'] = LiteEncoder(schedule, **options, key_aware=False)
    return [Encoder(name, encoder.to(device), '') for name, encoder in found.items()]
