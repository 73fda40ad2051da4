"""launcher/hostlist.py: lists of nodes as Slurm writes them, compared with scontrol where it is installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

from launcher import hostlist

LISTS = {
    "n1": ["n1"],
    "n[1-3]": ["n1", "n2", "n3"],
    "n[10,2,1]": ["n10", "n2", "n1"],
    "n[08-11]": ["n08", "n09", "n10", "n11"],
    "n[1-2,05],login": ["n1", "n2", "n05", "login"],
    "r[1-2]c[0-1]": ["r1c0", "r1c1", "r2c0", "r2c1"],
    "gpu-a[001-002]-ib": ["gpu-a001-ib", "gpu-a002-ib"],
    "jwb[0001-0002].juwels,x-y_z": ["jwb0001.juwels", "jwb0002.juwels", "x-y_z"],
}


@pytest.mark.parametrize("text", LISTS)
@pytest.mark.site(
    case="nodes without scontrol",
    before="a multi-node job failed at its start",
    after="runs; docs/runs.md says what is lost",
)
def test_a_list_of_nodes_is_expanded_in_order(text: str) -> None:
    assert hostlist.expand(text) == LISTS[text]


@pytest.mark.parametrize(
    "text", [text for text in LISTS if text[-1] != "z" and text[-1] != "b"]
)  # which 22.05 cannot read
def test_scontrol_expands_it_in_the_same_way(text: str, tmp_path: Path) -> None:
    if not (scontrol := shutil.which("scontrol")):
        pytest.skip("no scontrol")
    conf = tmp_path / "slurm.conf"
    conf.write_text("ClusterName=x\nSlurmctldHost=localhost\nNodeName=n1\nPartitionName=a Nodes=n1\n")
    command = [scontrol, "show", "hostnames", text]
    done = subprocess.run(command, env={"SLURM_CONF": str(conf)}, capture_output=True, text=True, timeout=20)
    assert done.stdout.split() == hostlist.expand(text)


@pytest.mark.parametrize("text", ["", ",", "n[1-", "n[a-b]", "n[]", "n]1[", "n[1-999999999]"])
def test_what_is_no_list_of_nodes_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a list|too many"):
        hostlist.expand(text)
