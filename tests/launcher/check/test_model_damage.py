"""launcher/check/model_damage.py: a file of weights that a copy or a download has cut off is refused at launch."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from launcher.check import model_damage


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0, ["is empty"]), (0.001, ["is cut off"]), (0.3, ["is cut off"]), (0.999, ["is cut off"]), (1, [])],
)
def test_weights_that_are_not_whole_are_refused(tmp_path: Path, share: float, expected: list[str]) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones((64, 64), np.float32), "b": np.ones(8, np.float32)}, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert list(model_damage.of_weights(tmp_path, [path.name])) == [f"model.safetensors {why}" for why in expected]
