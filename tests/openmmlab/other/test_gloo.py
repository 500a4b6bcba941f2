from __future__ import annotations

from torch import distributed


def test_opens_nothing_in_a_process_that_no_launcher_started(monkeypatch):
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    import mmlite.openmmlab.gloo  # noqa: F401

    assert not distributed.is_initialized()
