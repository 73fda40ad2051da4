"""`muster save`: a checkpoint of the next step appears, and training goes on exactly as without it."""

from pathlib import Path

import pytest

from conf.files import read_json
from jobs import preprocess
from jobs.checkpoint import manifest
from tests.conftest import Compose
from tests.jobs.curves import SMALL, points, runs, train_each

pytestmark = [pytest.mark.filterwarnings("ignore")]
WORDS = [*SMALL, "parallel=fsdp", "cluster.train.ranks_per_node=2", "train.save_every=0", "train.fingerprint=true"]


def test_a_requested_checkpoint_changes_nothing(compose: Compose, tmp_path: Path) -> None:
    config = compose(f"run_dir={tmp_path}/data", *WORDS)
    preprocess.run(config)
    without, asked = runs(config, tmp_path / "data/data", tmp_path, {"without": {}, "asked": {}})
    request = tmp_path / "asked/jobs/train/save"
    request.parent.mkdir(parents=True)
    request.touch()
    train_each([without, asked], 2)
    assert not request.exists(), "the request is answered once"
    saved = {
        name: sorted(path.name for path in (tmp_path / name / "checkpoints").glob("step-*"))
        for name in ("without", "asked")
    }
    assert saved == {"without": ["step-00000006"], "asked": ["step-00000001", "step-00000006"]}
    assert not manifest.size_problems(tmp_path / "asked/checkpoints/step-00000001")
    assert len(points(tmp_path / "asked")) == 6
    assert points(tmp_path / "asked") == points(tmp_path / "without")
    last = "checkpoints/step-00000006/fingerprint.json"
    assert read_json(tmp_path / "asked" / last) == read_json(tmp_path / "without" / last)
