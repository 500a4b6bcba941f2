"""Any backbone of timm in MMDetection's registry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .checkpoints.loading import load_checkpoint


@MODELS.register_module()
class TimmBackbone(BaseModule):
    """The feature maps of a network of timm, for any detector of MMDetection.

    Args:
        model_name (str): As in ``timm.list_models()``.
        out_indices (Sequence[int]): Which maps, as timm counts them; ``feature_info`` of
            ``timm.create_model(model_name, features_only=True)`` names their strides.
        checkpoint (str, optional): File of weights, in timm's names; or in others, where every
            tensor has the shape of timm's, in timm's order.
        frozen_stages (int): Neither weights nor statistics of the network up to the map with this
            index change in training; -1 freezes nothing.
        norm_eval (bool): Whether no batch norm changes its statistics in training.
        **options: For ``timm.create_model``, such as ``img_size``.

    Raises:
        ImportError: timm cannot be imported.
        ValueError: timm has no such network or map, or the checkpoint is of another one.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] = (1, 2, 3),
        checkpoint: str | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        timm = import_timm()
        if checkpoint is not None:
            state = load_checkpoint(checkpoint, 'cpu')
            state = state.get('state_dict', state.get('model', state))
            whole = timm.create_model(model_name, **options).state_dict()
            weights = dict(state_dict=_in_names_of(whole, state, checkpoint, model_name))
            options.update(pretrained=True, pretrained_cfg_overlay=weights)
        indices = tuple(out_indices)
        try:
            self.model = timm.create_model(
                model_name, features_only=True, out_indices=indices, **options
            )
        except (IndexError, AssertionError, RuntimeError) as error:
            raise ValueError(f'timm makes no {model_name} with maps {indices}: {error}') from error
        self.channels = self.model.feature_info.channels()
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        for module in self._frozen():
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad = False

    def init_weights(self) -> None:
        """Keep the weights: timm initialises a network, or loads it, when it is made."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W), normalised -> one map (B, C, H', W') for each index."""
        last = getattr(self.model, 'output_fmt', None) == 'NHWC'
        return tuple(x.permute(0, 3, 1, 2) if last else x for x in self.model(images))

    def train(self, mode: bool = True) -> TimmBackbone:
        """Frozen stages, and with ``norm_eval`` all batch norms, stay as in evaluation."""
        super().train(mode)
        for module in self._frozen():
            module.training = False
        for module in self.modules():
            if self.norm_eval and isinstance(module, _BatchNorm):
                module.training = False
        return self

    def _frozen(self) -> Iterator[nn.Module]:
        """The modules up to the end of the last frozen map; timm has them in this order."""
        if self.frozen_stages < 0:
            return
        end = self.model.feature_info.info[self.frozen_stages]['module']
        ends = (end, end.replace('.', '_'), f'model.{end}')  # where timm's wrappers keep it
        reached = False
        for name, module in self.model.named_modules():
            here = any(f'{name}.'.startswith(f'{each}.') for each in ends)
            if reached and not here:
                return
            reached = reached or here
            yield module


def import_timm() -> Any:
    """The module timm.

    Raises:
        ImportError: It is not there, or cannot be imported; the text says what to do.
    """
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision for another PyTorch
        how = 'pip install timm, and a torchvision made for this PyTorch'
        raise ImportError(f'backbones of timm need timm ({error}); {how}') from error
    return timm


def _in_names_of(
    whole: dict[str, Tensor], state: dict[str, Tensor], path: str, model_name: str
) -> dict[str, Tensor]:
    """A state dict in timm's names: its own, or by order where all shapes are timm's in order."""
    missing = whole.keys() - state.keys()
    if len(missing) < len(whole) / 2:  # timm says what is missing or unknown, but for the head
        return state
    shapes, expected = ([tensor.shape for tensor in each.values()] for each in (state, whole))
    if shapes != expected:
        raise ValueError(f'the weights in {path} are not those of {model_name}, by names or shapes')
    return dict(zip(whole, state.values()))
