import pytest
import torch

from mmlite.analysis.inputs import image_batch, operator_inputs, pyramid_sizes


def test_levels_of_the_paper():
    assert pyramid_sizes((800, 1333)) == [(100, 167), (50, 84), (25, 42), (13, 21)]
    assert sum(h * w for h, w in pyramid_sizes((850, 1040))) == 18549


@pytest.mark.parametrize('locations', ['grid', 'uniform'])
@pytest.mark.parametrize('queries', [None, 7])
def test_operator_inputs(queries, locations):
    shape = dict(num_heads=4, head_dim=8, num_points=3, locations=locations)
    x, count = operator_inputs((48, 72), 2, queries, **shape), queries or 77
    is_inside = (x.sampling_locations - 0.5).abs().max() <= 0.5  # which noise and offsets leave
    assert bool(is_inside) == (locations == 'uniform')
    assert x.query.shape == (2, count, 4, 8)
    assert x.value.shape == (2, 77, 4, 8)
    assert x.sampling_locations.shape == (2, count, 4, 4, 3, 2)
    torch.testing.assert_close(x.attention_weights.flatten(-2).sum(-1), torch.ones(2, count, 4))


def test_locations_surround_their_query():
    x = operator_inputs((320, 480))
    y, x_ = torch.meshgrid(torch.arange(40), torch.arange(60), indexing='ij')
    centres = torch.stack([(x_ + 0.5) / 60, (y + 0.5) / 40], -1).flatten(0, 1)
    offsets = x.sampling_locations[0, :2400, :, 0] - centres[:, None, None]
    mean = (offsets * torch.tensor([60, 40])).mean(0)  # over queries: the noise is gone
    torch.testing.assert_close(mean[0, :, 0], torch.tensor([1.0, 2.0, 3.0, 4.0]), atol=0.2, rtol=0)
    torch.testing.assert_close(mean[0, :, 1], torch.zeros(4), atol=0.2, rtol=0)


def test_images_with_boxes():
    images, samples = image_batch(2, (64, 96))
    assert images.shape == (2, 3, 64, 96)
    assert abs(images.mean()) < 0.1 and abs(images.std() - 1) < 0.1
    boxes = torch.cat([sample.gt_instances.bboxes for sample in samples])
    assert boxes.shape == (14, 4)
    assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.min() >= 0
    assert (boxes.amax(0) <= torch.tensor([96.0, 64.0, 96.0, 64.0])).all()
    assert all(len(sample.gt_instances.masks) == 7 for sample in samples)
    assert not any(sample.gt_instances.labels.any() for sample in samples)
    assert samples[0].batch_input_shape == (64, 96)
