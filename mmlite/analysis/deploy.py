"""A detector where it is deployed: in PyTorch, ONNX Runtime and OpenVINO, in one run."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from ..export.compare import predict
from ..export.detector import DESCRIPTION, open_session
from ..export.graph import Pyramid, encode
from ..export.operators import attention_as
from ..export.optimize import optimize
from ..export.program import Traced, trace, trace_encoder
from ..export.runtimes import library
from ..export.write import FILES, to_onnx, to_openvino, write
from ..openmmlab.build import build_detector, load_config
from ..openmmlab.families import find_holder, is_lite
from ..openmmlab.layers import fuse_attention
from ..openmmlab.lite_config import stock_config
from ..ops import reference
from .complexity import STAGES, stage_of
from .encoder_cost import strides
from .inputs import encoder_inputs, level_sizes
from .latency import Call, Ratio, Timing, speedup
from .profile import profile_stages
from .report import Report, Start, Table, milliseconds, size
from .setting import Setting

PYTORCH, ONNX, OPENVINO = RUNTIMES = ('PyTorch', 'ONNX Runtime', 'OpenVINO')
DETECTOR, ENCODER = PARTS = ('detector', 'encoder')
STOCK = 'stock'
# How a model runs. In PyTorch the Lite one has our operator in any case.
AS_IT_IS, OUR_OPERATOR, OPTIMIZED = "MMDetection's way", 'our operator', 'optimised'
# Exported without our operators: attention as MMCV writes it, or in our portable form.
PLAIN, PORTABLE = 'plain', 'portable'
PORTABLE_INT8, OUR_INT8 = 'portable, 8 bits', 'our operator, 8 bits'
_FORMATS = {ONNX: 'onnx', OPENVINO: 'openvino'}


@dataclass(frozen=True)
class Contestant:
    """Who is measured."""

    part: str  # of PARTS
    runtime: str  # of RUNTIMES
    model: str  # stock, or Lite and its schedule
    form: str  # how it runs there

    @property
    def portable(self) -> bool:
        """Whether the export does without our operators."""
        return self.form in (PLAIN, PORTABLE, PORTABLE_INT8)

    @property
    def folder(self) -> str:
        """Name of the folder of its export."""
        words = (self.part, self.model.split()[0], self.form, self.runtime)
        return '-'.join(words).replace(',', '').replace(' ', '-').lower()


@dataclass(frozen=True)
class Result:
    """What was found of a contestant."""

    contestant: Contestant
    timing: Timing
    over_stock: Ratio | None  # against the stock one in PyTorch, in MMDetection's way
    over_plain: Ratio | None  # against the stock one, exported plainly, in the same runtime
    stages: dict[str, float] | None  # seconds of each of STAGES, where they can be had


def report(
    config: str,
    setting: Setting,
    runtimes: Sequence[str],
    parts: Sequence[str],
    int8: bool,
    folder: Path | None,
    start: Start,
) -> Report:
    """All that ``mmlite benchmark deploy`` measures.

    Args:
        config (str): A Lite config, as for :func:`~mmlite.openmmlab.build.load_config`.
        setting (Setting): What to run: one image, on the CPU, in float32.
        runtimes (Sequence[str]): Of :data:`RUNTIMES`.
        parts (Sequence[str]): Of :data:`PARTS`.
        int8 (bool): Also measure detectors in 8 bits in OpenVINO.
        folder (Path, optional): Where exports are kept; those that lie there are used again.
        start (Start): Shows progress.

    Raises:
        ValueError: The config is not of a Lite detector that can be exported, or the setting is of
            another kind.
        ImportError: A runtime is missing.
        FileNotFoundError: Our operators were not built for a runtime.
    """
    if (setting.device, setting.dtype, setting.batch_size) != ('cpu', 'float32', 1):
        raise ValueError(
            'mmlite benchmark deploy measures one image on the CPU, in float32 and in 8 bits: '
            'leave out --device, --dtype and --batch-size'
        )
    _check_runtimes(runtimes, int8)
    models = _models(config)
    results: list[Result] = []
    with ExitStack() as stack:
        folder = folder or Path(stack.enter_context(TemporaryDirectory()))
        for part in parts:
            everyone = _contestants(part, list(models), runtimes, int8)
            step = start(f'exporting, {part}', len(everyone))
            for who in everyone:
                if who.runtime != PYTORCH:
                    _export(who, models[who.model], setting, folder)
                step()
            results += _measure(everyone, models, setting, folder, start)
    settings = {**asdict(setting), 'config': config, 'runtimes': runtimes, 'parts': parts}
    tables = [_table(part, results, setting) for part in parts]
    if DETECTOR in parts:
        tables.append(_stage_table(results))
    return Report(settings, results, tables, [], {'versions': _versions(runtimes)})


def _check_runtimes(runtimes: Sequence[str], int8: bool) -> None:
    """Ask for what is missing before minutes go into exports."""
    for runtime, package in ((ONNX, 'onnxruntime'), (OPENVINO, 'openvino')):
        if runtime in runtimes:
            for name in ('onnx', 'onnxscript', package):
                if find_spec(name) is None:
                    raise ImportError(f"{name} is missing; pip install 'mmlite-detr[deploy]'")
            library(package)
    if int8 and OPENVINO in runtimes:
        from ..export.int8 import import_nncf

        import_nncf()


def _versions(runtimes: Sequence[str]) -> dict[str, str]:
    packages = {PYTORCH: 'torch', ONNX: 'onnxruntime', OPENVINO: 'openvino'}
    return {name: __import__(packages[name]).__version__ for name in runtimes}


def _models(config: str) -> dict[str, nn.Module]:
    """The stock detector and the Lite one, with random weights."""
    cfg = load_config(config)
    _, holder, _ = find_holder(cfg.model)
    if not is_lite(holder['type']):
        raise ValueError(
            f'{config} is of a stock detector; give a Lite config, which is measured against its '
            'stock one: mmlite lite-config writes it'
        )
    stock = copy.deepcopy(cfg)
    stock.model = stock_config(cfg.model)
    models = {}
    for name, one in ((STOCK, stock), (f'Lite {holder["encoder"]["schedule"]}', cfg)):
        torch.manual_seed(0)
        models[name] = build_detector(one)
    return models


def _contestants(
    part: str, models: Sequence[str], runtimes: Sequence[str], int8: bool
) -> list[Contestant]:
    stock, lite = models
    forms = {
        PYTORCH: [(stock, AS_IT_IS), (stock, OUR_OPERATOR), (lite, AS_IT_IS)],
        ONNX: [(name, form) for name in models for form in (PLAIN, PORTABLE, OUR_OPERATOR)],
        OPENVINO: [(name, form) for name in models for form in (PLAIN, PORTABLE, OUR_OPERATOR)],
    }
    if part == DETECTOR:
        forms[PYTORCH] += [(stock, OPTIMIZED), (lite, OPTIMIZED)]
        forms[OPENVINO] += [(stock, PORTABLE_INT8), (lite, OUR_INT8)] if int8 else []
    return [
        Contestant(part, runtime, *who)
        for runtime in RUNTIMES
        if runtime in runtimes
        for who in forms[runtime]
    ]


# ---------------------------------------------------------------- exports


class _Encoder(nn.Module):
    """The encoder of a detector, from tokens and their positions to the memory."""

    def __init__(self, model: nn.Module, sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.model = model
        self.sizes = list(sizes)

    def forward(self, tokens: Tensor, pos: Tensor) -> Tensor:
        return encode(self.model.encoder, Pyramid(tokens, pos, self.sizes))


def _export(who: Contestant, model: nn.Module, setting: Setting, folder: Path) -> None:
    """Write an export, unless it lies there."""
    target = folder / who.folder
    if (target / DESCRIPTION).is_file():
        found = json.loads((target / DESCRIPTION).read_text(encoding='utf-8'))
        fixed = found.get('input') or {}
        size = found.get('image_size') or [fixed.get('height'), fixed.get('width')]
        if found['detector'] != type(model).__name__ or (
            size != [None, None] and size != list(setting.image_size)
        ):
            raise ValueError(f'{target} is of another detector or size; choose other --exports')
        return
    if who.form in (PORTABLE_INT8, OUR_INT8):
        from ..export.int8 import quantize

        # A model in 8 bits is for one size: mmlite export --image-size, then mmlite quantize.
        traced = trace(model, size=setting.image_size, portable=who.portable)
        with TemporaryDirectory() as source:
            write(traced, source, _FORMATS[who.runtime])
            quantize(source, target, [_image(setting)])
    elif who.part == DETECTOR:
        program, description = trace(model, portable=who.form == PORTABLE)
        traced = Traced(_decomposed(program, who), {**description, 'portable': who.portable})
        write(traced, target, _FORMATS[who.runtime])
    else:
        _export_encoder(who, model, setting, target)


def _decomposed(program: torch.export.ExportedProgram, who: Contestant):
    """The program with attention in the obvious operators, where it is to be exported plainly."""
    if who.form != PLAIN:
        return program
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    def sizes(flat: Sequence[int]) -> list[tuple[int, int]]:
        return list(zip(flat[::2], flat[1::2]))

    def ms_deform_attn(value, spatial_shapes, locations, weights):
        return multi_scale_deformable_attn_pytorch(value, sizes(spatial_shapes), locations, weights)

    def key_aware_deform_attn(query, key, value, spatial_shapes, locations):
        return reference.key_aware_deform_attn(query, key, value, sizes(spatial_shapes), locations)

    return program.run_decompositions(attention_as(ms_deform_attn, key_aware_deform_attn))


def _export_encoder(who: Contestant, model: nn.Module, setting: Setting, target: Path) -> None:
    inputs = _encoder_inputs(model, setting)
    module = _Encoder(model, inputs['spatial_shapes'].tolist())
    arguments = (inputs['query'], inputs['query_pos'])
    program = trace_encoder(model, module, *arguments, portable=who.form == PORTABLE)
    program = _decomposed(program, who)
    target.mkdir(parents=True, exist_ok=True)
    format_ = _FORMATS[who.runtime]
    path = target / FILES[format_]
    if who.runtime == ONNX:
        to_onnx(program, path)
    else:
        to_openvino(program, path, who.portable)
    description = {
        'detector': type(model).__name__,
        'model': path.name,
        'format': format_,
        'portable': who.portable,
        'image_size': list(setting.image_size),
    }
    (target / DESCRIPTION).write_text(json.dumps(description), encoding='utf-8')


def _encoder_inputs(model: nn.Module, setting: Setting) -> dict:
    """Keyword arguments of the encoder; exported it takes ``query`` and ``query_pos`` of them."""
    encoder = model.encoder
    wanted = strides(model.cfg.model, encoder.layers[0].self_attn.num_levels)
    return encoder_inputs(level_sizes(setting.image_size, wanted), encoder.embed_dims)


def _image(setting: Setting) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*setting.image_size, 3), np.uint8)


# ---------------------------------------------------------------- measurements


def _measure(
    everyone: Sequence[Contestant],
    models: dict[str, nn.Module],
    setting: Setting,
    folder: Path,
    start: Start,
) -> list[Result]:
    part = everyone[0].part
    image = np.ascontiguousarray(_image(setting).transpose(2, 0, 1)[None], np.float32)

    def arrays(who: Contestant) -> list[np.ndarray]:
        """What an exported model takes."""
        if part == ENCODER:
            inputs = _encoder_inputs(models[who.model], setting)
            return [inputs['query'].numpy(), inputs['query_pos'].numpy()]
        if who.form in (PORTABLE_INT8, OUR_INT8):
            return [image, np.array([setting.image_size])]
        return [image]

    runs: dict[Contestant, Call] = {}
    in_pytorch: dict[Contestant, nn.Module] = {}
    for who in everyone:
        if who.runtime == PYTORCH:
            model = in_pytorch[who] = _in_form(models[who.model], who.form)
            runs[who] = (
                _predicts(model, image)
                if part == DETECTOR
                else _encodes(model, _encoder_inputs(model, setting))
            )
        else:
            runs[who] = _session(folder / who.folder, arrays(who))
    timings = setting.measure(runs, start, part)
    # A session holds gigabytes, and the next step opens one after the other anew.
    runs = {who: run for who, run in runs.items() if who.runtime == PYTORCH}
    stages: dict[Contestant, dict[str, float]] = {}
    if part == DETECTOR:
        step = start('stages', len(everyone))
        repeats = min(3, setting.rounds)
        for who in everyone:
            if who.runtime == PYTORCH:
                stages[who] = profile_stages(in_pytorch[who], runs[who], repeats=repeats)
            elif who.runtime == OPENVINO:
                stages[who] = _openvino_stages(folder / who.folder, arrays(who), repeats)
            step()

    def over(who: Contestant, *baseline: str) -> Ratio | None:
        other = Contestant(part, *baseline)
        return speedup(timings[other], timings[who]) if other in timings else None

    return [
        Result(
            who,
            timings[who],
            over(who, PYTORCH, STOCK, AS_IT_IS),
            over(who, who.runtime, STOCK, PLAIN),
            stages.get(who),
        )
        for who in everyone
    ]


def _in_form(model: nn.Module, form: str) -> nn.Module:
    model = copy.deepcopy(model).eval()
    if form == OPTIMIZED:
        optimize(model)
    elif form == OUR_OPERATOR:
        fuse_attention(model)
    return model


def _predicts(model: nn.Module, image: np.ndarray) -> Call:
    return lambda index: predict(model, image, [image.shape[-2:]])


def _encodes(model: nn.Module, inputs: dict) -> Call:
    def call(index: int) -> Tensor:
        with torch.inference_mode():
            return model.encoder(**inputs)

    return call


def _session(folder: Path, arrays: Sequence[np.ndarray]) -> Call:
    session = open_session(folder, torch.get_num_threads())
    return lambda index: session(*arrays)


def _openvino_stages(folder: Path, arrays: Sequence[np.ndarray], repeats: int) -> dict[str, float]:
    """Medians of OpenVINO's own counters; nodes are named by their module."""
    session = open_session(folder, torch.get_num_threads(), profile=True)
    session(*arrays)
    runs = []
    for _ in range(repeats):
        session(*arrays)
        seconds = dict.fromkeys(STAGES, 0.0)
        for node in session.request.get_profiling_info():
            module = node.node_name.partition('/')[0]
            seconds[stage_of(module)] += node.real_time.total_seconds()
        runs.append(seconds)
    return {stage: float(np.median([run[stage] for run in runs])) for stage in STAGES}


# ---------------------------------------------------------------- tables


def _table(part: str, results: Sequence[Result], setting: Setting) -> Table:
    what = 'images to boxes' if part == DETECTOR else 'tokens to memory'
    columns = {
        'runtime': lambda r: r.contestant.runtime,
        'model': lambda r: r.contestant.model,
        'form': lambda r: r.contestant.form,
        'median ms': lambda r: milliseconds(r.timing.median),
        'over stock MMDetection': lambda r: r.over_stock or '-',
        'over stock, plain, same runtime': lambda r: r.over_plain or '-',
    }
    title = f'{part.capitalize()}, {what}, {size(setting.image_size)}, batch 1'
    return Table.of(title, [r for r in results if r.contestant.part == part], columns)


def _stage_table(results: Sequence[Result]) -> Table:
    columns = {
        'runtime': lambda r: r.contestant.runtime,
        'model': lambda r: r.contestant.model,
        'form': lambda r: r.contestant.form,
        **{f'{stage} ms': lambda r, stage=stage: milliseconds(r.stages[stage]) for stage in STAGES},
    }
    title = (
        "By stage, from torch's profiler and OpenVINO's counters (ONNX Runtime names no modules)"
    )
    return Table.of(title, [r for r in results if r.stages], columns)
