"""Small models of transformers, built from configs with random weights, and inputs for them."""

from functools import partial

import torch
import transformers as hf
from torch import nn

RESNET = dict(
    **dict(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 32, 64], embedding_size=8),
    **dict(layer_type='basic', out_features=['stage2', 'stage3', 'stage4']),
)
TEXT = dict(vocab_size=2000, hidden_size=16, intermediate_size=16)
TEXT |= dict(num_hidden_layers=1, num_attention_heads=2)
HEADS = dict(encoder_attention_heads=4, decoder_attention_heads=4)
THIN = dict(d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, num_queries=12, dropout=0.0)


DETR = dict(encoder_layers=4, decoder_layers=2, **HEADS, **THIN)


def deformable_detr(**changes) -> nn.Module:
    config = hf.DeformableDetrConfig(backbone_config=hf.ResNetConfig(**RESNET), **DETR, **changes)
    return _build(hf.DeformableDetrForObjectDetection, config)


def grounding_dino(family: str = 'GroundingDino', **changes) -> nn.Module:
    config = getattr(hf, f'{family}Config')(
        backbone_config=hf.ResNetConfig(**RESNET),
        text_config=hf.BertConfig(**TEXT),
        fusion_droppath=0.0,
        **DETR,
        **changes,
    )
    return _build(getattr(hf, f'{family}ForObjectDetection'), config)


def _swin() -> hf.SwinConfig:
    layers = dict(depths=[1] * 4, num_heads=[1] * 4)
    maps = [f'stage{number}' for number in range(1, 5)]
    return hf.SwinConfig(embed_dim=8, window_size=4, image_size=64, out_features=maps, **layers)


MASKS = dict(encoder_feedforward_dim=48, dim_feedforward=48, hidden_dim=32, num_queries=12)
MASKS |= dict(num_attention_heads=4, encoder_layers=4, decoder_layers=3)


def mask2former() -> nn.Module:
    config = hf.Mask2FormerConfig(
        backbone_config=_swin(), feature_size=32, mask_feature_size=32, **MASKS
    )
    return _build(hf.Mask2FormerForUniversalSegmentation, config)


def oneformer() -> nn.Module:
    text = dict(width=16, num_layers=1, n_ctx=4, vocab_size=50)
    config = hf.OneFormerConfig(
        backbone_config=_swin(),
        conv_dim=32,
        mask_dim=32,
        **MASKS,
        **{f'text_encoder_{name}': value for name, value in text.items()},
    )
    return _build(hf.OneFormerForUniversalSegmentation, config)


def rt_detr(family: str = 'RTDetr', **changes) -> nn.Module:
    config = dict(
        backbone_config=hf.RTDetrResNetConfig(**RESNET),
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 32, 64],
        decoder_in_channels=[32, 32, 32],
        num_denoising=0,
        decoder_layers=2,
        **HEADS,
        **THIN,
    )
    config = getattr(hf, f'{family}Config')(**{**config, **changes})
    return _build(getattr(hf, f'{family}ForObjectDetection'), config)


MODELS = {
    'deformable_detr': deformable_detr,
    'grounding_dino': grounding_dino,
    'mm_grounding_dino': partial(grounding_dino, 'MMGroundingDino'),
    'mask2former': mask2former,
    'oneformer': oneformer,
    'rt_detr': rt_detr,
    'rt_detr_v2': partial(rt_detr, 'RTDetrV2'),
    'd_fine': partial(rt_detr, 'DFine', decoder_n_points=[3, 4, 2]),
}


def _build(model_class: type, config) -> nn.Module:
    torch.manual_seed(0)
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        # Offsets and weights that do not depend on the query would hide mistakes.
        if 'sampling_offsets' in name or 'attention_weights' in name:
            nn.init.normal_(parameter, std=0.3)
        elif parameter.dim() == 1 or not parameter.any():  # such as the last layer of a box head
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Two images, one of them padded, and two texts where the model reads text."""
    torch.manual_seed(1)
    pixel_mask = torch.ones(2, 96, 128, dtype=torch.long)
    pixel_mask[1, 70:] = 0
    pixel_mask[1, :, 90:] = 0
    pixel_values = (torch.randn(2, 3, 96, 128) * pixel_mask[:, None]).to(model.dtype)
    batch = dict(pixel_values=pixel_values, pixel_mask=pixel_mask)
    if hasattr(model.config, 'text_config'):
        # "[CLS] a . b b . [SEP]", the numbers of BERT's special tokens
        batch['input_ids'] = torch.tensor(
            [[101, 1037, 1012, 1038, 1039, 1012, 102], [101, 1040, 1012, 102, 0, 0, 0]]
        )
        batch['attention_mask'] = batch['input_ids'].ne(0).long()
    if hasattr(model.config, 'task_seq_len'):
        batch['task_inputs'] = torch.randint(50, (2, model.config.task_seq_len))
    return batch


def outputs(model: nn.Module, **options) -> list[torch.Tensor]:
    """What the model predicts."""
    result = model(**inputs(model), **options)
    names = ('logits', 'pred_boxes', 'class_queries_logits', 'masks_queries_logits')
    return [result[name] for name in names if name in result]


def gradients(model: nn.Module) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """What a model predicts, and the gradients of its parameters."""
    found = outputs(model)
    # Behind the padded text the logits are infinite.
    sum(output[output.isfinite()].square().mean() for output in found).backward()
    return found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected, tolerance: float = 1e-5) -> None:
    """Sums of many terms: what is lost to rounding grows with the largest of a tensor."""
    for ours, theirs in zip(actual, expected):
        scale = max(1.0, theirs[theirs.isfinite()].detach().abs().max().item())
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * scale)
