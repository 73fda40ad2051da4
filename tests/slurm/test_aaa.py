import os, subprocess


def test_session(slurm):
    assert os.environ["SLURM_CONF"] == str(slurm.conf)
    assert len(slurm.nodes) == 4
    print(subprocess.run("srun -N4 hostname; sacct", shell=True, capture_output=True, text=True))


def test_two(slurm):
    assert not slurm.problems()
