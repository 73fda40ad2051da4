"""docs/cluster.md: its site files pass every check, and ask Slurm for what they say."""

import re
from collections.abc import Callable
from pathlib import Path

import hydra
import pytest
from hydra.core.config_store import ConfigStore

from conf.resolve import resolve
from conf.schema import Config
from launcher.check import localize, rules
from launcher.check.observe import Facts
from launcher.estimate import auto_settings
from launcher.plan import plan
from launcher.submit import preview
from tests.conftest import ROOT, RUN_DIR

Site = Callable[..., Config]
TEXT = (ROOT / "docs/cluster.md").read_text()
FILES = {match[2]: match[1] for match in re.finditer(r"```yaml\n(name: (\w+)\n.*?)```", TEXT, re.DOTALL)}
"""The YAML files of the page by their names."""


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """`site("campus", "model=llama8b")`: the config with a site file of the page as its cluster."""

    def composed(name: str, *words: str) -> Config:
        (tmp_path / "cluster").mkdir(exist_ok=True)
        (tmp_path / f"cluster/{name}.yaml").write_text(FILES[name])
        ConfigStore.instance().store(name="schema", node=Config)
        given = [f"hydra.searchpath=[file://{tmp_path}]", f"run_dir={RUN_DIR}", f"cluster={name}", *words]
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
            config = resolve(hydra.compose("config", overrides=given))
        localize.localize(config, 0)
        return config

    return composed


def test_the_page_has_the_site_files_that_are_tested() -> None:
    assert list(FILES) == ["mine", "slingshot", "booster", "campus"]


EXPECTED = {
    "mine": ["#SBATCH --gpus-per-node=8", "#SBATCH --mem=0", "module load cuda/12.8"],
    "slingshot": [
        "#SBATCH --hint=nomultithread", "#SBATCH --mem=480G", "export FI_MR_CACHE_MONITOR=userfaultfd",
        "/appl/images/pytorch-rocm.sif python3 -u", "--bind /opt/cray:/opt/cray",
        "--bind /scratch/project_465000001/hf:/scratch/project_465000001/hf", "IFNAME=<hsn0>",
    ],
    "booster": [
        "#SBATCH --gres=gpu:4", "#SBATCH --account=proj42-cpu", "MASTER_ADDR={host}i", "HF_HUB_OFFLINE=1", "--cpu-bind=none",
    ],
    "campus": [
        "#SBATCH --gpus-per-node=a100:4", "#SBATCH --mem-per-cpu=8G", "#SBATCH --comment='my thesis'", "#SBATCH --no-requeue",
        "#SBATCH --oversubscribe", "#SBATCH --constraint='a100&80g'",
    ],
}  # fmt: skip
ABSENT = {
    "mine": "--gres",
    "slingshot": "HF_HUB_OFFLINE",
    "booster": "#SBATCH --gpus-per-node",
    "campus": "#SBATCH --mem=0",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.site(
    case="three whole site files", before="written from memory", after="run by a test and given to a real sbatch"
)
def test_a_site_file_of_the_page_works(site: Site, name: str) -> None:
    config = site(
        name,
        "model=llama8b",
        "adapter=lora",
        "train=smoke",
        "train.global_batch=32",
        "pipeline=checked",
        "generate.prompts=examples/prompts.jsonl",
    )
    assert [str(problem) for problem in rules.problems(config, Facts())] == []
    text = preview.text(auto_settings.choose(config)[0], plan(config))
    for line in EXPECTED[name]:
        assert line in text
    assert ABSENT[name] not in text


def test_every_key_of_the_page_exists(site: Site) -> None:
    for name in FILES:
        assert site(name).cluster.name == name
