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
from mmengine.config import Config
from torch import Tensor, nn

from .. import __version__, fuse, optimize
from ..export.detector import DESCRIPTION, load
from ..export.int8 import import_nncf, quantize
from ..export.operators import attention_as
from ..export.program import Traced, trace
from ..export.runtimes import import_runtime, library
from ..export.write import write
from ..openmmlab.build import DetectorSpec, build_detector, load_config
from ..openmmlab.layers import LiteEncoder
from ..openmmlab.lite_config import stock_config
from ..ops import reference
from .compare import Contestant
from .complexity import Complexity, called_with, count_detector, find_encoder
from .inputs import encoder_inputs, image_batch, pyramid_sizes
from .published import preset as published_rows
from .report import size
from .timing import Call, Setting, Start

# As it is; encoder compiled; standard attention on our operators; optimised for prediction.
EAGER, COMPILED, FUSED, OPTIMIZED = MODES = ('eager', 'compiled', 'fused', 'optimized')
# How it is exported: with attention as MMCV writes it, portable, with our operators; and for
# OpenVINO, for images of one size, in 8 bits.
FORMS = PLAIN, PORTABLE, OURS = 'plain', 'portable', 'our operators'
INT8 = '8 bits'
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

    def arguments(self, image_size: tuple[int, int], batch_size: int, device: str) -> dict:
        """Keyword arguments of a prediction."""
        raise NotImplementedError

    def loss(self, arguments: dict) -> Tensor:
        """What a training step minimises, of the arguments of a prediction."""
        raise NotImplementedError

    def count(self, setting: Setting) -> Complexity | None:
        """What one image costs."""
        arguments = self.arguments(setting.image_size, 1, setting.device)
        return count_detector(self.model, setting.image_size, arguments, self.encoder_at)

    def call(self, part: str, setting: Setting, batch_size: int) -> Call | None:
        """Of ``'inference'``, ``'encoder'`` in it, or ``'training'``: forward and backward."""
        module = self.model
        arguments = self.arguments(setting.image_size, batch_size, setting.device)
        if part == 'encoder':
            if self.encoder_at is None or self.mode == OPTIMIZED:  # that runs it in pieces
                return None
            module = self.model.get_submodule(self.encoder_at)
            with called_with(module) as caught:
                self.call('inference', setting, batch_size)(0)
            arguments = caught

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

    def arguments(self, image_size, batch_size, device) -> dict:
        images, samples = image_batch(batch_size, image_size, device=device)
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

    def arguments(self, image_size, batch_size, device) -> dict:
        return encoder_inputs(pyramid_sizes(image_size), EMBED_DIMS, batch_size, device)

    def loss(self, arguments) -> Tensor:
        query = arguments['query'].detach().requires_grad_()  # the backbone learns, too
        memory = self.model(**{**arguments, 'query': query})
        return (memory * memory.detach()).sum()


@dataclass(eq=False)
class Exported(Model):
    """A folder that ``mmlite export`` or ``mmlite quantize`` wrote, in its runtime."""

    folder: Path | None = None

    def count(self, setting) -> None:
        return None

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
        image = np.random.default_rng(0).uniform(0, 255, (3, *setting.image_size))
        arguments = exported.arguments([image], 1)
        return lambda index: exported.session(*arguments)


def detectors(
    names: Sequence[str], preset: str | None, changes: dict | None, device: str, start: Start
) -> Iterator[list[Model]]:
    """Detectors of configs, and exports; or of a table of the paper: groups, baselines first.

    A Lite config that is the only one gets its stock one as baseline.
    """
    if bool(names) == bool(preset):
        raise ValueError('give either configs, the baseline first, or a --preset')
    step = start('building', len(names) or sum(map(len, published_rows(preset))))

    def build(name: str, config: Config, checkpoint: str | None = None, **facts) -> Model:
        torch.manual_seed(0)
        model = build_detector(config, checkpoint, device)
        step()
        return Detector(name, model, find_encoder(model), checkpoint, **facts)

    for rows in published_rows(preset) if preset else ():
        configs = [load_config(row.config, changes) for row in rows]
        titles = [f'{row.model}, {row.backbone}' for row in rows]
        yield [build(*pair, published=vars(row)) for *pair, row in zip(titles, configs, rows)]
    exports = [Exported(name, folder=Path(name)) for name in names if Path(name).is_dir()]
    if exports and exports[0].name == names[0]:
        raise ValueError('give the config of the baseline first; exports are compared with it')
    specs = [DetectorSpec.parse(name) for name in names if not Path(name).is_dir()]
    wanted = [(spec.name, load_config(spec.config, changes), spec.checkpoint) for spec in specs]
    if len(wanted) == 1:
        stock = copy.deepcopy(wanted[0][1])
        with suppress(ValueError):  # it is stock itself
            stock.model = stock_config(stock.model)
            wanted.insert(0, ('stock', stock, None))
    if wanted:
        yield [*(build(*each) for each in wanted), *exports]


def exported(
    group: Sequence[Model], runtimes: Sequence[str], int8: bool, size: tuple[int, int], start: Start
) -> list[Exported]:
    """Export detectors for runtimes in every form, or find what was exported before."""
    for runtime in runtimes:  # asked before minutes go into exports
        for package in ('onnx', 'onnxscript', runtime):
            import_runtime(package)
        library(runtime)
    forms = [(runtime, form) for runtime in runtimes for form in FORMS]
    if int8:
        import_nncf()
        forms.append(('openvino', INT8))
    wanted = [(each, *form) for each in group if each.model is not None for form in forms]
    step, found = start('exporting', len(wanted)), []
    for each, runtime, form in wanted:
        weights = [Path(file).stat().st_mtime for file in [each.checkpoint] if file]
        told = repr((each.model.cfg.to_dict(), each.checkpoint, weights, __version__, size))
        key = hashlib.sha256(told.encode()).hexdigest()[:12]
        path = Path('work_dirs/exports', f'{key}-{runtime}-{form.replace(" ", "-")}')
        if not (path / DESCRIPTION).is_file():
            _export(each.model, path, 'onnx' if runtime == 'onnxruntime' else runtime, form, size)
        found.append(Exported(f'{each.name}, {runtime}, {form}', folder=path))
        step()
    return found


def _export(model: nn.Module, folder: Path, format: str, form: str, size: tuple[int, int]) -> None:
    if form == INT8:
        image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
        with TemporaryDirectory() as source:
            write(trace(model, size=size), source, format)
            quantize(source, folder, [image])
        return
    traced = trace(model, portable=form == PORTABLE)
    if form == PLAIN:
        from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

        def standard(value, shapes, *sampling):
            sizes = list(zip(shapes[::2], shapes[1::2]))
            return multi_scale_deformable_attn_pytorch(value, sizes, *sampling)

        def key_aware(query, key, value, shapes, locations):
            sizes = list(zip(shapes[::2], shapes[1::2]))
            return reference.key_aware_deform_attn(query, key, value, sizes, locations)

        program = traced.program.run_decompositions(attention_as(standard, key_aware))
        traced = Traced(program, {**traced.description, 'portable': True})
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
