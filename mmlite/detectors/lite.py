"""What makes a detector of MMDetection a Lite one."""

from __future__ import annotations

from torch import Tensor

from ..layers import KeyAwareDeformableAttention, LiteEncoder, remember_level_sizes

# Arguments of the attention that mmcv's standard one does not know.
_KEY_AWARE_ARGUMENTS = ('proj_key', 'same_loc')


class LiteDetectorMixin:
    """Builds :class:`LiteEncoder` where a detector builds its multi-scale encoder.

    Put before any MMDetection detector with a deformable encoder::

        @MODELS.register_module()
        class LiteDINO(LiteDetectorMixin, DINO):
            ...

    The config's ``encoder`` then takes the arguments of ``LiteEncoder`` beside the stock ones;
    ``schedule`` is the one that has to be given. ``decoder=dict(key_aware=True)`` makes the
    decoder's cross-attention key-aware, with ``proj_key`` and ``same_loc`` read from its
    ``cross_attn_cfg``.

    Raises:
        ValueError: The schedule is missing or does not fit, or the config asks for more
            predictions than the queries give.
    """

    def _init_layers(self) -> None:
        encoder, decoder = dict(self.encoder), dict(self.decoder)
        self._check_config(encoder)
        key_aware_decoder = decoder.pop('key_aware', False)
        # The stock detector builds its own layers around one plain encoder layer, which the Lite
        # encoder then replaces: so nothing here depends on what else a family builds.
        self.encoder = {
            'num_layers': 1,
            'layer_cfg': _standard(encoder['layer_cfg'], 'self_attn_cfg'),
        }
        self.decoder = {**decoder, 'layer_cfg': _standard(decoder['layer_cfg'], 'cross_attn_cfg')}
        super()._init_layers()
        self.encoder = LiteEncoder(**encoder)
        if key_aware_decoder:
            cross_attn_cfg = {**decoder['layer_cfg']['cross_attn_cfg'], 'batch_first': True}
            for layer in self.decoder.layers:
                layer.cross_attn = KeyAwareDeformableAttention(**cross_attn_cfg)

    def _check_config(self, encoder: dict) -> None:
        name = type(self).__name__
        if 'schedule' not in encoder:
            raise ValueError(
                f"{name} needs a schedule in its config: encoder=dict(schedule='H3L1-(2+1)x3')"
            )
        num_levels = (encoder['layer_cfg'].get('self_attn_cfg') or {}).get('num_levels', 4)
        if num_levels != self.num_feature_levels:
            raise ValueError(
                f'{name} has num_feature_levels={self.num_feature_levels}, but its encoder has '
                f'num_levels={num_levels}; set both to the number of maps the neck gives'
            )
        most = self.num_queries * self.bbox_head.num_classes
        asked = (self.test_cfg or {}).get('max_per_img', 0)
        if asked > most:
            raise ValueError(
                f'test_cfg.max_per_img={asked} asks for more predictions than {self.num_queries} '
                f'queries of {self.bbox_head.num_classes} classes give; lower it to {most} or '
                'raise num_queries'
            )

    def pre_transformer(self, mlvl_feats: tuple[Tensor, ...], *args, **kwargs):
        """As the stock detector's; the level sizes are known from the feature maps."""
        inputs = super().pre_transformer(mlvl_feats, *args, **kwargs)
        sizes = [tuple(feat.shape[-2:]) for feat in mlvl_feats]
        for part in inputs:  # those of the encoder and those of the decoder
            remember_level_sizes(part['spatial_shapes'], sizes)
        return inputs

    def pre_decoder(self, memory: Tensor, *args, **kwargs):
        """As the stock detector's; refuses images with fewer tokens than queries to choose."""
        if self.as_two_stage and memory.shape[1] < self.num_queries:
            raise ValueError(
                f'num_queries={self.num_queries} proposals cannot be chosen from the '
                f'{memory.shape[1]} tokens of these images; use larger images or fewer queries'
            )
        return super().pre_decoder(memory, *args, **kwargs)


def _standard(layer_cfg: dict, attention: str) -> dict:
    """``layer_cfg`` with only the arguments that mmcv's standard attention knows."""
    cfg = dict(layer_cfg.get(attention) or {})
    cfg = {name: value for name, value in cfg.items() if name not in _KEY_AWARE_ARGUMENTS}
    return {**layer_cfg, attention: cfg}
