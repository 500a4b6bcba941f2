"""``mmlite detect``: what it reads, and what it writes, by value."""

import csv
import json
import re
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import cv2
import numpy as np
import pytest
from click.testing import CliRunner
from pycocotools.mask import decode

import mmlite
from mmlite.cli import main
from mmlite.export import Detector

CLASSES = ['disc', 'ring']


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Images of one colour each, a video of them, and a detector that tells their colours."""
    monkeypatch.chdir(tmp_path)
    for path, level in (('a/1.png', 10), ('a/2.jpg', 20), ('b/1.png', 30)):
        Path(path).parent.mkdir(exist_ok=True)
        cv2.imwrite(path, np.full((60, 90, 3), level, np.uint8))
    Path('a/notes.txt').write_text('no image')
    writer = cv2.VideoWriter('v.avi', cv2.VideoWriter.fourcc(*'MJPG'), 12.0, (96, 64))
    for level in (40, 80, 120):
        writer.write(np.full((64, 96, 3), level, np.uint8))
    writer.release()
    fake(monkeypatch)
    return tmp_path


def fake(monkeypatch, *maps: np.ndarray) -> list[dict]:
    """Let every model find a ring at (4, 6, 14, 36), scored by the colour, and two others."""
    asked = []

    def session(images, sizes):
        if sizes.min() < 9:
            raise ValueError('an image is too small')
        count, scores = len(images), images[:, 0, :1, 0] / 100
        boxes = np.tile(np.float32([(4, 6, 14, 36), (0, 0, 9, 9), (1, 1, 2, 2)]), (count, 1, 1))
        scores = np.column_stack([scores, np.full(count, 0.04), np.full(count, -1)])
        labels = np.tile([1, 0, 0], (count, 1))
        stacked = [np.tile(one, (count, 1, 1, 1)) for one in maps]
        return [boxes, scores.astype(np.float32), labels, *stacked]

    def load(model, **options):
        asked.append({'model': model, **options})
        inputs = {'batch': None, 'height': None, 'width': None, 'divisor': 1, 'padded': True}
        inputs |= {'levels': [], 'least_tokens': 0}
        preprocessing = {'resize': None, 'pad': None}
        description = {'classes': CLASSES, 'input': inputs, 'preprocessing': preprocessing}
        return Detector(session, description)

    monkeypatch.setattr(mmlite, 'load', load)
    return asked


def run(*arguments: str):
    return CliRunner().invoke(main, ['detect', 'model.py,model.pth', *arguments, '-o', 'out'])


def coco() -> list[dict]:
    return json.loads(Path('out/results.json').read_text())


def test_images_folders_and_patterns(folder):
    result = run('b', 'a/*.jpg', 'a/1.png', 'b/1.png', '--threshold', '0.05', '--batch-size', '2')
    assert result.exit_code == 0, result.output
    assert re.search(r'out: 3 detections in 3 images; [\d.]+ images a second', result.output)
    box = {'category_id': 2, 'class': 'ring', 'bbox': [4, 6, 10, 30]}
    names = enumerate(['b/1.png', 'a/2.jpg', 'a/1.png'])
    assert coco() == [
        {'image_id': n + 1, 'score': (3 - n) / 10, 'file_name': name, **box} for n, name in names
    ]
    # Both are called 1.png, and neither is lost; small pictures are enlarged five times.
    assert {path.name for path in Path('out').iterdir()} == {
        *('1.png', '1-3.png', '2.jpg', 'results.json', 'results.csv')
    }
    picture = cv2.imread('out/1-3.png')
    assert picture.shape == (300, 450, 3) and (picture[-5:] == 10).all()
    assert (picture[150, 20] != 10).any()  # the left side of the box


def test_a_video_and_its_table(folder):
    result = run('v.avi', '--threshold', '0.5', '--batch-size', '2')
    assert result.exit_code == 0, result.output
    with Path('out/results.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [row['frame'] for row in rows] == ['1', '2']  # the first is too dark
    assert rows[0]['file_name'] == 'v.avi' and rows[0]['class'] == 'ring'
    assert float(rows[0]['score']) == pytest.approx(0.8, abs=0.03)
    assert [float(rows[0][name]) for name in ('x', 'y', 'width', 'height')] == [4, 6, 10, 30]
    video = cv2.VideoCapture('out/v.mp4')
    assert video.get(cv2.CAP_PROP_FPS) == 12
    frames = []
    while (read := video.read())[0]:
        frames.append(read[1])
    assert [frame.shape for frame in frames] == [(320, 480, 3)] * 3
    assert [round(float(frame[-5:].mean()), -1) for frame in frames] == [40, 80, 120]


def test_a_file_of_an_export_is_not_its_folder(tmp_path):
    for name in ('detector.json', 'model.onnx'):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=f'{name} is a file of an export: give its folder'):
            mmlite.load(tmp_path / name)
    (tmp_path / 'config.py').touch()  # beside an export is a place for a config
    with pytest.raises(ValueError, match='has no model'):
        mmlite.load(tmp_path / 'config.py')


def test_a_video_that_breaks_off_is_told(folder):
    """What could be read is written, and no library adds words of its own."""
    code, size = cv2.VideoWriter.fourcc(*'MJPG'), (96, 64)
    writer = cv2.VideoWriter('v.avi', code, 12, size)
    for _ in range(60):
        writer.write(np.full((64, 96, 3), 80, np.uint8))
    writer.release()
    content = Path('v.avi').read_bytes()
    Path('v.avi').write_bytes(content[: len(content) // 2])
    result = run('v.avi')
    assert result.exit_code == 1 and coco()
    assert re.search(r'cut short: v.avi ends after \d\d of its 60 frames$', result.output.strip())


def test_a_stream_and_a_camera(folder, monkeypatch):
    """A server of files stands for the stream."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(('127.0.0.1', 0), Quiet) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        result = run(f'http://127.0.0.1:{server.server_port}/v.avi?key=1', '--threshold', '0')
        server.shutdown()
    assert result.exit_code == 0, result.output
    assert [entry['frame'] for entry in coco()] == [0, 0, 1, 1, 2, 2] and Path('out/v.mp4').exists()

    class Camera:
        """Number 3, which tells no frame rate and is stopped at its third picture."""

        def __init__(self, source):
            self.source, self.pictures = source, iter([40, 80])

        def isOpened(self):
            return self.source == 3

        def get(self, what):
            return 0.0

        def read(self):
            level = next(self.pictures, None)
            if level is None:
                raise KeyboardInterrupt
            return True, np.full((64, 96, 3), level, np.uint8)

    monkeypatch.setattr(cv2, 'VideoCapture', Camera)
    result = run('3', '--threshold', '0')
    assert result.exit_code == 0 and 'Stopped' in result.output
    found = [(entry['file_name'], entry['frame'], entry['score']) for entry in coco()]
    assert found == [('3', 0, 0.4), ('3', 0, 0.04), ('3', 1, 0.8), ('3', 1, 0.04)]
    assert Path('out/3.mp4').stat().st_size


def test_max_frames_and_what_the_model_is_given(folder, monkeypatch):
    asked = fake(monkeypatch)
    options = ('--max-frames', '2', '--threads', '3', '--cfg-options', 'model.a=1')
    assert run('v.avi', *options, '--threshold', '0').exit_code == 0
    assert [entry['frame'] for entry in coco()] == [0, 0, 1, 1]
    expected = {'threads': 3, 'device': 'cpu', 'changes': {'model.a': 1}}
    assert asked == [{'model': 'model.py,model.pth', **expected}]


def test_masks(folder, monkeypatch):
    mask = np.zeros((3, 60, 90), bool)
    mask[0, 6:36, 4:14] = True
    fake(monkeypatch, mask)
    assert run('a/1.png', '--threshold', '0.05').exit_code == 0
    np.testing.assert_array_equal(decode(coco()[0]['segmentation']), mask[0])


def test_what_cannot_be_read_is_left_out_and_told(folder):
    Path('a/0.png').write_bytes(b'no image')
    cv2.imwrite('a/3.png', np.zeros((8, 90, 3), np.uint8))
    for name in ('c.mp4', 'd.jpg'):
        Path(name).write_bytes(b'neither')
    result = run('a', 'c.mp4', 'b', 'd.jpg', '--threshold', '0.05', '--batch-size', '3')
    assert result.exit_code == 1
    why = 'a/0.png cannot be read as an image; c.mp4 cannot be opened as a video, camera or '
    why += 'stream; a/3.png: an image is too small; d.jpg'
    told = f'4 of 7 sources were left out or cut short: {why}'
    assert told in ' '.join(result.output.split())
    assert [entry['file_name'] for entry in coco()] == ['a/1.png', 'a/2.jpg', 'b/1.png']


def test_a_file_may_be_named_like_a_pattern(folder):
    Path('a/1.png').rename('a/[1].png')
    assert run('a/[1].png', '--threshold', '0.05').exit_code == 0
    assert [entry['file_name'] for entry in coco()] == ['a/[1].png']


def test_a_folder_that_cannot_be_made_is_told_first(folder):
    result = CliRunner().invoke(main, ['detect', 'model', 'a', '-o', 'a/1.png/out'])
    assert result.exit_code == 2 and 'a/1.png cannot be written' in result.output


def test_a_label_without_a_name_is_a_number(folder, monkeypatch):
    monkeypatch.setitem(globals(), 'CLASSES', ['disc'])
    assert run('b', '--threshold', '0.05').exit_code == 0
    assert [entry['class'] for entry in coco()] == ['1']


def test_results_stay_where_nothing_can_be_read(folder):
    assert run('b', '--threshold', '0.05').exit_code == 0
    before = coco()
    Path('b/1.png').write_bytes(b'no image')
    assert run('b').exit_code == 1 and coco() == before


def test_a_batch_has_images_of_one_size(folder, monkeypatch):
    """Others would be padded, and what is found would depend on what they are read with."""
    sizes, detect = [], Detector.detect_batch
    cv2.imwrite('a/0.png', np.full((80, 90, 3), 5, np.uint8))

    def spy(self, images, *options):
        sizes.append([image.shape[0] for image in images])
        return detect(self, images, *options)

    monkeypatch.setattr(Detector, 'detect_batch', spy)
    assert run('a', 'b', 'v.avi', '--batch-size', '2').exit_code == 0
    assert sizes == [[80], [60, 60], [60], [64, 64], [64]]


def test_no_picture_takes_the_place_of_another(folder):
    Path('b/1.png').rename('b/1-3.png')
    Path('c').mkdir()
    cv2.imwrite('c/1.png', np.full((60, 90, 3), 40, np.uint8))
    assert run('b/1-3.png', 'a/1.png', 'c/1.png').exit_code == 0
    pictures = {path.name: cv2.imread(str(path))[-1, -1, 0] for path in Path('out').glob('*.png')}
    assert pictures == {'1-3.png': 30, '1.png': 10, '1-4.png': 40}


@pytest.mark.parametrize(
    ('sources', 'problem'),
    [
        (['nowhere.png'], 'there is no image, folder or video nowhere.png'),
        (['*.bmp'], 'there is no image, folder or video *.bmp'),
        (['out/1.png'], 'would be overwritten; choose another folder'),
        (['9999'], '9999 cannot be opened as a video, camera'),
        (['broken.mp4'], 'broken.mp4 cannot be opened as a video'),
        (['.'], 'there are no images in .'),
        (['a', '--threshold', 'nan'], '--threshold must be a number from 0 to 1'),
    ],
)
def test_bad_sources_are_refused(folder, sources, problem):
    Path('out').mkdir()
    Path('broken.mp4').write_text('no video')
    Path('a/1.png').rename('out/1.png')
    result = run(*sources)
    assert result.exit_code and problem in ' '.join(result.output.split()), result.output
    assert 'Traceback' not in result.output
