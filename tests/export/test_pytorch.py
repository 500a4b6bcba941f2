import time
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
from mmengine.dataset import Compose, pseudo_collate
from PIL import Image
from small_detectors import write_pair

import mmlite
from mmlite.export import pytorch
from mmlite.export.detector import Detections, detections_of
from mmlite.openmmlab.build import build_detector, load_config

PAD = dict(type='Pad', size_divisor=32, pad_val=dict(img=114))


@pytest.fixture(params=['two-stage', 'Mask2Former'])
def trained(request, tmp_path) -> str:
    """A config and weights that find something, for images that are resized and padded."""
    _, config = write_pair(tmp_path, request.param, **{'model.test_cfg.max_per_img': 30})
    cfg = load_config(config)
    steps = cfg.test_dataloader.dataset.pipeline
    steps[1].scale = (150, 120)
    steps.insert(2, PAD)
    cfg.dump(config)
    torch.manual_seed(0)
    model = build_detector(cfg)
    for name in ('encoder', 'decoder', 'bbox_head', 'panoptic_head'):
        for parameter in getattr(model, name, torch.nn.Module()).parameters():
            torch.nn.init.normal_(parameter, std=0.08)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'weights.pth')
    return f'{config},{tmp_path / "weights.pth"}'


def test_finds_what_mmdetection_finds(trained, tmp_path):
    """In images of different sizes at once, one of which its EXIF data turn."""
    random, files = np.random.default_rng(0), [str(tmp_path / name) for name in ('a.jpg', 'b.jpg')]
    for file, size, orientation in zip(files, ((90, 140), (101, 77)), (6, 1)):
        pixels = cv2.resize(random.integers(0, 256, (9, 12, 3), np.uint8), size[::-1])
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(file, exif=exif)
    detector = mmlite.load(trained)
    config, checkpoint = trained.split(',')
    cfg = load_config(config)
    model = build_detector(cfg, checkpoint)
    steps = [step for step in cfg.test_dataloader.dataset.pipeline if 'Annot' not in step['type']]
    prepare = Compose(steps)
    batch = pseudo_collate([prepare({'img_path': file, 'img_id': 0}) for file in files])
    with torch.no_grad():
        wanted = model.test_step(batch)
    for expected, found in zip(wanted, detector.detect_batch(files)):
        expected = expected.pred_instances.numpy()
        order = np.argsort(-expected.scores, kind='stable')
        assert len(order) == len(found.scores) > 3
        np.testing.assert_allclose(found.scores, expected.scores[order], atol=1e-4)
        if hasattr(found, 'masks'):
            assert found.masks.shape == expected.masks.shape
            assert (found.masks != expected.masks[order]).mean() < 0.02
        else:
            np.testing.assert_allclose(found.boxes, expected.bboxes[order], atol=0.05)
            np.testing.assert_array_equal(found.labels, expected.labels[order])


def test_what_is_no_detector_is_refused(tmp_path):
    name = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'
    with pytest.raises(ValueError, match='comes without weights; add its checkpoint'):
        mmlite.load(name)
    with pytest.raises(ValueError, match=r'bfloat16.* is for exports'):
        mmlite.load(name, 'x.pth', precision='bfloat16')
    with pytest.raises(FileNotFoundError, match=r'nowhere\.py does not exist'):
        mmlite.load('nowhere.py,x.pth')
    with pytest.raises(ValueError, match=r"device 'gpu' cannot be used here: .*; 'cpu' can"):
        mmlite.load(name, 'x.pth', device='gpu')
    for threads in (-1, 0, '2', True, 99999):
        with pytest.raises(ValueError, match=f'whole number from 1 to .*; got {threads!r}'):
            mmlite.load(name, 'x.pth', threads=threads)
    with pytest.raises(FileNotFoundError, match='holds no exported detector'):
        mmlite.load(tmp_path)
    with pytest.raises(ValueError, match='takes no checkpoint'):
        mmlite.load(tmp_path, 'x.pth')


def test_threads_take_turns(monkeypatch):
    """Parts of a detector may speak through it while it predicts."""
    inside, seen = [], []

    def predict(model, images, sizes, text):
        inside.append(model)
        time.sleep(0.01)
        seen.append(len(inside))
        inside.pop()
        return [Detections(np.zeros((1, 4)), np.zeros(1), np.zeros(1, int))]

    monkeypatch.setattr(pytorch, 'predict', predict)
    session = pytorch.PyTorchSession(torch.nn.Identity(), None, None)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: session(np.zeros((1, 3, 8, 8)), np.array([[8, 8]])), range(8)))
    assert seen == [1] * 8


def test_images_keep_their_own_number_of_detections(monkeypatch):
    def predict(model, images, sizes, text):
        return [Detections(np.ones((n, 4)), np.full(n, 0.5), np.ones(n, int)) for n in (1, 3, 0)]

    monkeypatch.setattr(pytorch, 'predict', predict)
    outputs = pytorch.PyTorchSession(torch.nn.Identity(), None, None)(
        np.zeros((3, 3, 8, 8)), [[8, 8]] * 3
    )
    found = [detections_of(outputs, number, (8, 8)) for number in range(3)]
    assert [len(each.scores) for each in found] == [1, 3, 0]


def test_too_few_tokens_for_the_queries(monkeypatch):
    def predict(*arguments):
        torch.zeros(3).topk(4)

    monkeypatch.setattr(pytorch, 'predict', predict)
    session = pytorch.PyTorchSession(torch.nn.Identity(), None, None)
    with pytest.raises(ValueError, match='an image of 1 x 300 pixels is too small for the model'):
        session(np.zeros((1, 3, 1, 300)), np.array([[1, 300]]))
