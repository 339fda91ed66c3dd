"""A run of a corpus from the command to its report, with a judge and a moving picture."""

import json

import pytest

from common import config as configs
from common import runner

pytestmark = pytest.mark.xdist_group("masked-actions")


def test_texts_are_judged_and_shown(tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat and the dog sat too. " * 60)
    config = configs.load("configs/masked_diffusion.py:test")
    configs.apply(config, dict(language=dict(kind=""), length=16))
    configs.apply(config, dict(data=dict(path=str(path), holdout=0.3)))
    configs.apply(config, dict(eval=dict(texts=32, steps=(2,)), sampler=dict(steps=4)))
    config.mesh.data = 1
    with config.unlocked():
        config.runs = dict(ar=dict(kind="ar"), mdm=dict(kind="mdm"))
    assert runner.main(config, str(tmp_path / "w"), "", "", ()) == 0
    assert "Report:" in capsys.readouterr().out
    summary = json.loads((tmp_path / "w" / "summary.json").read_text())
    (point,) = summary["groups"]["mdm"]["points"]
    assert 3 < point["judged"] < 9
    assert point["entropy_1"] > 0
    assert summary["groups"]["ar"]["points"][0]["judged"] > 3
    text = (tmp_path / "w" / "report.md").read_text()
    assert "Judged by ar-seed0" in text
    assert (tmp_path / "w" / "figures" / "writing.gif").read_bytes().startswith(b"GIF8")
    assert (tmp_path / "w" / "figures" / "text.png").exists()
