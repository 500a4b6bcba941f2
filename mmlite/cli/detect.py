"""``mmlite detect``: images, videos and cameras through a detector of any format."""

from __future__ import annotations

import csv
import glob
import json
import math
import os
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import chain, groupby, islice
from pathlib import Path

import click
import numpy as np

from . import shared

_COLUMNS = ('file_name', 'frame', 'class', 'score')


@click.command()
@click.argument('model')
@click.argument('sources', nargs=-1, required=True, metavar='SOURCE...')
@shared.out_option('The folder to write.', required=True)
@shared.option('--threshold', type=click.FloatRange(0, 1), default=0.3, help='The lowest score.')
@shared.count_option('--batch-size', default=1)
@shared.count_option('--max-frames', help='Of a video or camera. Default: to its end, or Ctrl-C.')
@shared.count_option('--threads', help='CPU threads. Default: all cores.')
@shared.device_option
@shared.cfg_options
def detect(model, sources, out: Path, threshold, batch_size, max_frames, **options) -> None:
    """Detect objects in images and videos, draw them, and write down what was found.

    MODEL is CONFIG,CHECKPOINT, or the folder of an export, which needs neither torch nor
    MMDetection. A SOURCE is an image, a folder of them, a pattern such as 'val/*.jpg', a video, a
    camera's number or a stream's address. OUT gets pictures, videos, and results.json, a list of
    COCO's results with file names, and the same as results.csv.

    \b
    Example:
      mmlite detect config.py,epoch_12.pth photos/ -o detected
      mmlite detect exported/ street.mp4 --threshold 0.5 --batch-size 4 -o detected
    """
    if math.isnan(threshold):
        raise ValueError('--threshold must be a number from 0 to 1')
    warnings.filterwarnings('ignore')  # those of the stack about itself bury the progress
    for name, level in (('OPENCV_LOG_LEVEL', 'SILENT'), ('OPENCV_FFMPEG_LOGLEVEL', '-8')):
        os.environ.setdefault(name, level)  # what cannot be read is told below
    sources = list(dict.fromkeys(chain.from_iterable(map(_expanded, sources))))
    targets = _targets(sources, out)
    from .. import load
    from ..export import draw

    detector = load(model, changes=options.pop('cfg_options'), **options)
    out.mkdir(parents=True, exist_ok=True)
    unread, entries, writers = {}, [], {}
    frames = chain.from_iterable(_frames(one, detector, max_frames, unread) for one in sources)
    began, busy, count = time.perf_counter(), 0.0, 0
    try:
        with shared.progress() as start:
            step = start('Detecting', None if any(map(_is_video, sources)) else len(sources))
            for batch in _batches(frames, batch_size):
                before = time.perf_counter()
                results = _detected(detector, batch, threshold, unread)
                busy += time.perf_counter() - before
                for (image, source, *place), found in results:
                    count += 1
                    picture = draw(image, found, detector.classes)
                    _write(targets[source], picture, place, writers)
                    entries += _entries(found, detector.classes, count, source, *place)
                    step(f'{count / (time.perf_counter() - began):.1f} a second')
    except KeyboardInterrupt:
        click.echo('Stopped', err=True)
    finally:
        for writer in writers.values():
            writer.release()
        if count:  # else those of an earlier run stay
            (out / 'results.json').write_text(json.dumps(entries))
            rows = [[*map(entry.get, _COLUMNS), *entry['bbox']] for entry in entries]
            with (out / 'results.csv').open('w', newline='') as file:
                csv.writer(file).writerows([[*_COLUMNS, 'x', 'y', 'width', 'height'], *rows])
    click.echo(
        f'{out}: {len(entries)} detections in {count} images; {count / max(busy, 1e-9):.1f} images '
        f'a second, {count / (time.perf_counter() - began):.1f} with reading, drawing and writing'
    )
    if unread:
        why = '; '.join([*[*unread.values()][:3], *[*unread][3:]])  # of the others the names alone
        raise ValueError(
            f'{len(unread)} of {len(sources)} sources were left out or cut short: {why}'
        )


def _is_video(source: str) -> bool:
    """Or a camera, or a stream."""
    kinds = r'\.(3gp|avi|flv|m2?ts|m4v|mkv|mov|mpe?g|mp4|ogv|ts|webm|wmv)$'
    return bool(re.search(rf'^\d+$|://|{kinds}', source.lower()))


def _expanded(source: str) -> Sequence[str]:
    """The files that a source stands for; of a video, camera or stream itself."""
    if os.path.isdir(source):
        return list(map(str, shared.image_files([Path(source)])))
    # A name may look like a pattern.
    names = [source] if os.path.isfile(source) else glob.glob(source, recursive=True)
    found = sorted(filter(os.path.isfile, names))
    if not found and not re.search(r'^\d+$|://', source):
        raise FileNotFoundError(f'there is no image, folder or video {source}')
    return found or [source]


def _targets(sources: Sequence[str], out: Path) -> dict[str, Path]:
    """Where the picture or video of each source goes: names of their own, and no source's."""
    targets: dict[str, Path] = {}
    for source in sources:
        kind = '.mp4' if _is_video(source) else '.png' if source.endswith('.png') else '.jpg'
        target, number = out / f'{Path(source).stem}{kind}', len(targets) + 1
        while target in targets.values():
            target, number = out / f'{Path(source).stem}-{number}{kind}', number + 1
        targets[source] = target
        if target.exists() and any(Path(o).exists() and target.samefile(o) for o in sources):
            raise ValueError(f'{target} would be overwritten; choose another folder with --out')
    return targets


def _frames(source: str, detector, most: int | None, unread: dict[str, str]) -> Iterator[tuple]:
    """Images with their source, of videos also number and frames a second."""
    if not _is_video(source):
        try:
            yield detector.read(source), source
        except ValueError as error:
            unread[source] = str(error)
        return
    import cv2

    video = cv2.VideoCapture(int(source) if source.isdecimal() else source)
    if not video.isOpened():
        unread[source] = f'{source} cannot be opened as a video, camera or stream'
        return
    number, (is_there, image) = 0, video.read()
    while is_there and number != most:
        yield image, source, number, video.get(cv2.CAP_PROP_FPS) or 25.0
        number, (is_there, image) = number + 1, video.read()
    promised = int(video.get(cv2.CAP_PROP_FRAME_COUNT))  # not exact in every kind of file
    if not is_there and number < 0.95 * promised:
        unread[source] = f'{source} ends after {number} of its {promised} frames'


def _batches(frames: Iterator[tuple], most: int) -> Iterator[list[tuple]]:
    """Images of one size, which padding beside larger ones would make other images."""
    for _, alike in groupby(frames, key=lambda frame: frame[0].shape):
        while batch := list(islice(alike, most)):
            yield batch


def _detected(detector, batch: list[tuple], threshold, unread: dict[str, str]) -> list[tuple]:
    """Each of a batch with what was found; an image that is too small is left out."""
    try:
        return [*zip(batch, detector.detect_batch([image for image, *_ in batch], threshold))]
    except ValueError as error:
        if len(batch) > 1:  # some of it
            return [pair for one in batch for pair in _detected(detector, [one], threshold, unread)]
        unread[batch[0][1]] = f'{batch[0][1]}: {error}'
        return []


def _write(target: Path, picture: np.ndarray, place: Sequence, writers: dict) -> None:
    import cv2

    if not place:
        target.write_bytes(cv2.imencode(target.suffix, picture)[1].tobytes())
        return
    if target not in writers:
        code, size = cv2.VideoWriter.fourcc(*'mp4v'), picture.shape[1::-1]
        writers[target] = cv2.VideoWriter(str(target), code, place[1], size)
        if not writers[target].isOpened():
            raise ValueError(f'{target} cannot be written: this OpenCV writes no MPEG-4')
    writers[target].write(picture)


def _entries(found, classes, image_id: int, source: str, frame=None, rate=None) -> Iterator[dict]:
    """COCO's results of an image, with the names of file and class."""
    from ..export.drawing import class_name

    for index, label in enumerate(found.labels.tolist()):
        x1, y1, x2, y2 = found.boxes[index].tolist()
        bbox = [round(side, 2) for side in (x1, y1, x2 - x1, y2 - y1)]
        entry = {'image_id': image_id, 'category_id': label + 1, 'bbox': bbox}
        score = round(float(found.scores[index]), 5)
        entry |= {'score': score, 'class': class_name(classes, label)}
        entry |= {'file_name': source} | ({} if frame is None else {'frame': frame})
        if hasattr(found, 'masks'):
            from pycocotools.mask import encode

            mask = encode(np.asfortranarray(found.masks[index], np.uint8))
            entry['segmentation'] = {**mask, 'counts': mask['counts'].decode()}
        yield entry
