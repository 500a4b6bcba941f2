import json

import pytest
from click.testing import CliRunner

from benchmarks.coco_flops import main


def test_the_mean_over_images_is_their_count(tmp_path):
    """Of the lowest numbers, whatever their order in the file; the count grows with the tokens."""
    file = tmp_path / 'instances.json'
    images = [dict(id=id, height=850, width=1040) for id in (3, 1)]
    file.write_text(json.dumps({'images': [dict(id=9, height=9, width=9), *images]}))
    result = CliRunner().invoke(main, [str(file), '--images', '2'])
    found = dict(line.split(': ') for line in result.output.splitlines()[1:])
    assert '2 images' in result.output
    # GFLOPs of 18,549 tokens, which test_complexity.py holds.
    known = {'stock': 144.337, 'H3L1-(2+1)x3': 58.654}
    for name, flops in known.items():
        share = int(result.output.split(' tokens')[0].split()[-1]) / 18549
        assert float(found[name].split()[0]) == pytest.approx(flops * share, rel=2e-3)
