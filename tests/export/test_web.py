"""The page in a real browser: what it shows is what Python finds."""

import functools
import http.server
import shutil
import threading
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from mmlite.export import export_detector
from mmlite.export.web import check_web

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
OPTIONS = ('--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-sync')
pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def page(tmp_path):
    """Open the site of a folder in Chromium; requests that leave the machine end the test."""
    if CHROMIUM is None or shutil.which('npm') is None:
        pytest.skip('needs Chromium and npm')
    api = pytest.importorskip('playwright.sync_api')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = lambda *args: None
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'http://127.0.0.1:{server.server_port}/'
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*OPTIONS])
        page, asked = browser.new_page(), []
        page.on('request', lambda request: asked.append(request.url))

        def open_page():
            page.goto(address)
            return page

        yield SimpleNamespace(open=open_page, asked=asked, address=address)
        browser.close()
    server.shutdown()
    server.server_close()


def test_the_page_finds_what_python_finds(detector, images, page, tmp_path):
    model = detector('LiteDINO')
    exported = export_detector(model, tmp_path, 'web', size=(160, 192))
    cv2.imwrite(str(tmp_path / 'picture.png'), images[0])
    (tmp_path / 'text.png').write_text('no picture')
    shown = page.open()
    shown.locator('#title', has_text='LiteDINO').wait_for(timeout=120_000)
    shown.evaluate("document.getElementById('threshold').value = 0")
    shown.set_input_files('#file', tmp_path / 'picture.png')
    shown.wait_for_selector('#found tr', timeout=120_000)
    rows = shown.locator('#found tr').all_inner_texts()
    cells = [row.split('\t') for row in rows]
    found = exported.detect(images[0])
    assert len(cells) == len(found.scores) > 10
    assert [row[0] for row in cells] == [exported.classes[label] for label in found.labels]
    numbers = np.array([row[1:] for row in cells], float)
    # The browser resizes to within a step of a channel.
    np.testing.assert_allclose(numbers[:, 0], found.scores, atol=2e-3)
    np.testing.assert_allclose(numbers[:, 1:], found.boxes, atol=0.5)

    middle = float(np.median(found.scores))
    shown.evaluate(f"threshold.value = {middle}; threshold.dispatchEvent(new Event('input'))")
    value = float(shown.input_value('#threshold'))
    assert shown.locator('#found tr').count() == (found.scores >= value).sum()
    shown.set_input_files('#file', tmp_path / 'text.png')
    shown.locator('#problem', has_text='text.png cannot be read as a picture.').wait_for()
    assert all(url.startswith((page.address, 'blob:', 'data:')) for url in page.asked)
    names = {url.rpartition('/')[2] for url in page.asked}
    assert 'ort-wasm-simd-threaded.wasm' in names and not any('asyncify' in name for name in names)


def test_refuses_before_it_is_traced(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='leave out --batch-size'):
        check_web({'resize': None}, 2)
    with pytest.raises(ValueError, match="leave out backend='pillow'"):
        check_web({'resize': {'backend': 'pillow'}}, 1)
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    with pytest.raises(ImportError, match=r'install Node\.js with npm'):
        export_detector(None, tmp_path, 'web')
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
