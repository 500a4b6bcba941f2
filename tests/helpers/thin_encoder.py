import torch
from torch import nn

SIZES = [(8, 11), (4, 6), (2, 3), (1, 2)]
THIN = dict(embed_dims=32, num_heads=4, feedforward_channels=64)


def randomised(encoder: nn.Module) -> nn.Module:
    """Every parameter gets an influence on the output, zero-initialised ones too."""
    torch.manual_seed(0)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    return encoder


def inputs(sizes=SIZES, batch=2) -> dict:
    torch.manual_seed(1)
    num_tokens = sum(h * w for h, w in sizes)
    return dict(
        tokens=torch.randn(batch, num_tokens, 32),
        pos=torch.randn(batch, num_tokens, 32),
        level_sizes=sizes,
        padding_mask=torch.rand(batch, num_tokens) < 0.2,
        valid_ratios=torch.rand(batch, len(sizes), 2) * 0.5 + 0.5,
    )
