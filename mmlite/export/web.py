"""A folder that any static server serves: a page that detects objects in the browser."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

# The runtime, an npm package, and what the page loads of it: for WebAssembly, and for WebGPU.
RUNTIME = 'onnxruntime-web@1.30.0'
_BINARIES = ('ort-wasm-simd-threaded', 'ort-wasm-simd-threaded.asyncify')
_FILES = [f'ort.{kind}.min.mjs' for kind in ('wasm', 'webgpu')]
_FILES += [f'{name}.{kind}' for name in _BINARIES for kind in ('mjs', 'wasm')]
_PAGE = Path(__file__).with_name('page')


def check_web(preprocessing: dict, batch: int | None) -> None:
    """Refuse a detector that the page would run wrongly, before it is traced.

    Raises:
        ImportError: npm, which brings the runtime, is not installed.
        ValueError: The page cannot do what the test pipeline does.
    """
    if shutil.which('npm') is None:
        raise ImportError(f'a page needs {RUNTIME} from npm; install Node.js with npm')
    if (preprocessing['resize'] or {}).get('backend', 'cv2') != 'cv2':
        raise ValueError("the page resizes as OpenCV does; leave out backend='pillow' of Resize")
    if batch != 1:
        raise ValueError('the page takes one image at a time; leave out --batch-size')


def write_page(folder: Path) -> None:
    """Put the page and its runtime beside ``model.onnx`` and ``detector.json``.

    Raises:
        OSError: npm could not fetch the runtime.
    """
    shutil.copytree(_PAGE, folder, dirs_exist_ok=True)
    with TemporaryDirectory() as place:
        command = [shutil.which('npm'), 'pack', RUNTIME, '--silent', '--pack-destination', place]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or 'no reason given').splitlines()[-1]
            raise OSError(f'npm could not fetch {RUNTIME}: {reason}')
        (archive,) = Path(place).glob('*.tgz')
        (folder / 'ort').mkdir(exist_ok=True)
        with tarfile.open(archive) as package:
            for name in _FILES:
                content = package.extractfile(f'package/dist/{name}')
                (folder / 'ort' / name).write_bytes(content.read())
