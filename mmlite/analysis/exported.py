"""Detectors in ONNX Runtime and OpenVINO, exported in the forms that can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from ..export.detector import DESCRIPTION, FORMAT_VERSION, load, open_session
from ..export.graph import Pyramid, encode
from ..export.operators import attention_as
from ..export.program import Traced, trace, trace_encoder
from ..export.runtimes import import_runtime, library
from ..export.write import write
from ..ops import reference
from .compare import ONNX, OPENVINO, Contestant
from .complexity import STAGES, called_with, stage_of
from .timing import Call, Setting, Start

# Without our operators: attention as MMCV writes it, or in our portable form.
PLAIN, PORTABLE, OURS = FORMS = ('plain', 'portable', 'our operator')
_FORMATS = {ONNX: 'onnx', OPENVINO: 'openvino'}


class Exported(Contestant):
    """A detector, exported for a runtime in one of :data:`FORMS`, for OpenVINO also in 8 bits.

    Exports are kept in ``folder``; one that lies there is used again.
    """

    def __init__(
        self, detector: Contestant, runtime: str, form: str, folder: Path, int8: bool = False
    ) -> None:
        # There is no encoder alone in 8 bits.
        super().__init__(detector.name, detector.model, None if int8 else detector.encoder_at)
        self.runtime = runtime
        self.form = f'{form}, 8 bits' if int8 else form
        self.costs, self.published = detector.costs, detector.published
        self._detector, self._traced_form, self._int8 = detector, form, int8
        self._folder = folder

    def inference(self, setting: Setting, batch_size: int) -> Call:
        exported = load(self.export(setting, 'detector'), torch.get_num_threads())
        arguments = exported.arguments_of(_image(setting))
        return lambda index: exported.session(*arguments)

    def encoder(self, setting: Setting) -> Call:
        folder = self.export(setting, 'encoder')
        arguments = [tensor.numpy() for tensor in self._encoder_arguments(setting)[:2]]
        session = open_session(folder, torch.get_num_threads())
        return lambda index: session(*arguments)

    def stages(self, call: Call, setting: Setting) -> dict[str, float]:
        """Medians of OpenVINO's own counters, whose nodes are named by their module."""
        if self.runtime != OPENVINO:
            return {}
        folder = self.export(setting, 'detector')
        session = open_session(folder, torch.get_num_threads(), profile=True)
        arguments = load(folder).arguments_of(_image(setting))
        runs = []
        for _ in range(1 + min(3, setting.rounds)):
            session(*arguments)
            runs.append(dict.fromkeys(STAGES, 0.0))
            for node in session.request.get_profiling_info():
                module = node.node_name.partition('/')[0]
                runs[-1][stage_of(module, self.encoder_at)] += node.real_time.total_seconds()
        return {stage: float(np.median([run[stage] for run in runs[1:]])) for stage in STAGES}

    def export(self, setting: Setting, part: str) -> Path:
        """The folder of the export of the detector or its encoder, written unless it lies there."""
        words = [part, type(self.model).__name__, self.name, self.form, self.runtime]
        name = '-'.join([*words, *map(str, setting.image_size)])
        folder = self._folder / ''.join(c if c.isalnum() else '-' for c in name)
        if (folder / DESCRIPTION).is_file():
            return folder
        if part == 'encoder':
            self._write_encoder(setting, folder)
        elif self._int8:
            from ..export.int8 import quantize

            # A model in 8 bits is for one size: mmlite export --image-size, then mmlite quantize.
            traced = trace(
                self.model, size=setting.image_size, portable=self._traced_form == PORTABLE
            )
            with TemporaryDirectory() as source:
                write(traced, source, _FORMATS[self.runtime])
                quantize(source, folder, [_image(setting)])
        else:
            program, description = trace(self.model, portable=self._traced_form == PORTABLE)
            description = {**description, 'portable': self._traced_form != OURS}
            write(Traced(self._in_form(program), description), folder, _FORMATS[self.runtime])
        return folder

    def _in_form(self, program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
        """The program with attention in the obvious operators, where it is to be plain."""
        if self._traced_form != PLAIN:
            return program
        from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

        def sizes(flat: Sequence[int]) -> list[tuple[int, int]]:
            return list(zip(flat[::2], flat[1::2]))

        def standard(value, shapes, locations, weights):
            return multi_scale_deformable_attn_pytorch(value, sizes(shapes), locations, weights)

        def key_aware(query, key, value, shapes, locations):
            return reference.key_aware_deform_attn(query, key, value, sizes(shapes), locations)

        return program.run_decompositions(attention_as(standard, key_aware))

    def _encoder_arguments(self, setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, their positions and the sizes of the levels."""
        with called_with(self.model.get_submodule(self.encoder_at)) as call:
            self._detector.inference(setting, 1)(0)
        return call['query'], call['query_pos'], call['spatial_shapes']

    def _write_encoder(self, setting: Setting, folder: Path) -> None:
        tokens, pos, shapes = self._encoder_arguments(setting)
        graph = _Encoder(self.model, self.encoder_at, shapes.tolist())
        portable = self._traced_form == PORTABLE
        program = self._in_form(trace_encoder(self.model, graph, tokens, pos, portable))
        description = {'version': FORMAT_VERSION, 'classes': []}
        description['portable'] = self._traced_form != OURS
        write(Traced(program, description), folder, _FORMATS[self.runtime])


def _image(setting: Setting) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*setting.image_size, 3), np.uint8)


class _Encoder(nn.Module):
    """The encoder of a detector, from tokens and their positions to the memory."""

    def __init__(self, model: nn.Module, name: str, sizes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.sizes = [tuple(size) for size in sizes]

    def forward(self, tokens: Tensor, pos: Tensor) -> Tensor:
        encoder = self.model.get_submodule(self.name)
        return encode(encoder, Pyramid(tokens, pos, self.sizes))


def export_all(
    detectors: Sequence[Contestant],
    runtimes: Sequence[str],
    setting: Setting,
    folder: Path,
    int8: bool,
    parts: Sequence[str],
    start: Start,
) -> list[Exported]:
    """Export detectors in every form for the runtimes.

    Raises:
        ValueError: The setting is not for these runtimes, or a detector cannot be exported.
        ImportError: A runtime is missing.
        FileNotFoundError: Our operators were not built for a runtime.
    """
    if (setting.device, setting.dtype, setting.batch_sizes) != ('cpu', 'float32', (1,)):
        raise ValueError(
            'exported models are measured on the CPU with one image, in float32 and in 8 bits: '
            'leave out --device, --dtype and --batch-size'
        )
    everyone = []
    for runtime in runtimes:  # asked before minutes go into exports
        for package in ('onnx', 'onnxscript', runtime):
            import_runtime(package)
        library(runtime)
        everyone += [Exported(d, runtime, form, folder) for d in detectors for form in FORMS]
        if int8 and runtime == OPENVINO:
            from ..export.int8 import import_nncf

            import_nncf()
            for detector in detectors:
                form = PORTABLE if detector is detectors[0] else OURS
                everyone.append(Exported(detector, runtime, form, folder, int8=True))
    step = start('exporting', len(everyone))
    for contestant in everyone:
        for part in parts:
            if part == 'detector' or contestant.encoder_at is not None:
                contestant.export(setting, part)
        step()
    return everyone
