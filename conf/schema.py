"""Defines every config key: one dataclass per section, and under each field what it means, its unit and why it has its default.

Values that belong to one choice (a model, a layout, a cluster) are in the YAML files of this folder. Values that nearly
everybody wants are defaults here. No value is in both places.

The larger sections have files of their own: `conf.schema_model`, `conf.schema_training`, `conf.schema_cluster`.
"""

from dataclasses import dataclass, field

from omegaconf import MISSING

from conf.choices import Fault, MergeBase, OutputDtype, ProgramLauncher, Submit, SweepMerge, Verify, Where
from conf.schema_cluster import Cluster
from conf.schema_fields import SEEDS, at_least, free_text
from conf.schema_model import Data, Model
from conf.schema_training import Adapter, Parallel, Train


@dataclass
class Consolidate:
    step: int | str | None = None
    """Step of the checkpoint to consolidate. `best`: the one with the lowest held-out loss. Null: the newest."""
    dtype: OutputDtype = OutputDtype.auto
    """Precision of the consolidated weights. `auto`: the compute precision of training. `original`: that of each weight in
    `model.source`."""
    shard_gib: float = at_least(0.001, 5.0, at_most=100_000)
    """Largest safetensors file, in GiB."""
    adapter_only: bool = False
    """Write only the adapter, as a PEFT folder, instead of merging it into the base."""
    base: MergeBase = MergeBase.original
    """Weights that an adapter with a quantized base is merged into. `original`: the stored weights. `dequantised`: the
    quantized weights that it was trained on, converted back."""
    verify: Verify = Verify.auto
    """Check before the model folder counts as complete. `weights`: read every byte back. `logits`: also load the model, and
    compare its logits with those of training, for a validation row, or a training row if nothing is held out. Set it before
    training, which then stores them with its last checkpoint. Needs memory for the whole model. `auto`: a full fine-tune
    stores them too, and they are compared if the model takes at most 8 GiB; of a larger model, its first blocks are compared."""


@dataclass
class Generate:
    prompts: str = MISSING
    """JSONL file with a `prompt`, or `messages` of several turns, in each row, and maybe a `reference` answer."""
    system: str | None = free_text(None)
    """System prompt of rows that have none."""
    max_new_tokens: int = at_least(1, 128, at_most=10_000_000)
    """Longest answer, in tokens."""
    temperature: float = at_least(0, 0.0, at_most=100)
    """0: always the most likely token, so that two runs can be compared."""
    top_p: float = at_least(0.001, 1.0, at_most=1)
    """With a temperature above 0: choose among the most likely tokens whose probabilities reach this sum. 1: among all."""
    seed: int = at_least(0, 0, at_most=SEEDS)
    """Seed of the choice, with a temperature above 0."""
    compare_base: bool = False
    """Also write the answers of `model.source`, beside those of the trained model."""
    fail_on: list[Fault] = field(default_factory=list)
    """Fail the job if an answer is `empty`, ends in a loop (`looping`), `repeats` the question, has tokens of the chat template
    inside (`template`), or has not ended (`endless`). Empty: only count them."""


@dataclass
class Tracker:
    """Where metrics go in addition to metrics.jsonl. `tracker=wandb`, or several: `tracker=[wandb,tensorboard]`."""

    wandb: bool = False
    """Weights & Biases. WANDB_API_KEY comes from `wandb login` or `cluster.secrets`."""
    tensorboard: bool = False
    """Event files in RUN/tensorboard."""
    mlflow: bool = False
    """MLflow, at `uri`."""
    comet: bool = False
    """Comet. COMET_API_KEY comes from `cluster.secrets`."""
    project: str = "muster"
    """Project of W&B and Comet, experiment of MLflow."""
    entity: str | None = None
    """Team of W&B, workspace of Comet. Null: your own."""
    run_name: str | None = None
    """Name of the run there. Null: the name of the run folder."""
    group: str | None = None
    """Group of runs in W&B, a tag `group` elsewhere."""
    tags: list[str] = field(default_factory=list)
    notes: str | None = free_text(None)
    """A text about the run."""
    uri: str | None = None
    """Address of the MLflow server, or a folder for it. Null: MLFLOW_TRACKING_URI, else the folder RUN/mlruns."""


@dataclass
class Hub:
    """The Hugging Face Hub around a run. docs/hub.md has the steps."""

    push: str | None = None
    """Repository `owner/name` that gets RUN/model, with its card, once it is consolidated and verified. With
    `consolidate.adapter_only` that is the adapter. Null: nothing leaves the cluster."""
    private: bool = True
    """Create that repository as a private one. A repository that is public already is refused, unless this is false."""
    revision: str | None = None
    """Branch to push to. It is created if there is none. Null: main."""
    tag: str | None = None
    """Tag for the commit that was pushed."""
    token: str | None = None
    """Name of the environment variable with the token that may write there; its value comes from the environment of
    `launch.py` or from `cluster.secrets_file`. Null: HF_TOKEN, else the token of `hf auth login`."""
    where: Where = Where.here
    """Where `pipeline=fetch` and `muster push` work. `here`: on this machine, for example a login node. `job`: in a job with
    the resources of `cluster.cpu`, for which `cluster.cpu.partition` may name a partition with network."""
    check: bool = True
    """Before anything is queued, ask the Hub whether the token may read and write there. With `cluster.offline`, look instead
    whether the cache has the files."""


@dataclass
class Custom:
    """A training program of your own: `pipeline=custom custom.command="python train.py"`. See docs/own-trainer.md."""

    command: str | None = None
    """The program and its arguments, as one line, not run by a shell. Variables such as `$MUSTER_CHECKPOINTS` are replaced on the
    compute node. `python` is `cluster.python`."""
    launcher: ProgramLauncher = ProgramLauncher.srun
    """What starts the ranks. `srun`: Slurm starts the program once for each rank. `torchrun`, `accelerate`: Slurm starts one
    torchrun or `accelerate launch` on each node, which starts the ranks of the node. `ray`: Slurm starts Ray on all nodes, and the
    program once, on the first."""
    folder: str | None = None
    """Folder in which the program starts. Null: the one in which launch.py was started."""


@dataclass
class Sweep:
    """Several runs from one command: `muster sweep KEY=a,b`. See docs/sweeps.md."""

    at_once: int | None = at_least(1, None, at_most=100_000)
    """Trainings of the sweep that Slurm runs at the same time. Null: as many as there is room for. With `cluster=local` it is
    always one."""
    stop_worst: str | None = None
    """`0.5@25%`: after 25 % of its steps, a training ends if its loss is not among the better half of those that have come as
    far. Null: all train to the end."""
    merge: SweepMerge = SweepMerge.best
    """Which runs are consolidated, evaluated and so on. `best`: when all trainings have ended, the one with the lowest loss of
    those that were trained to the end. `all`: each, as soon as it is trained. The loss is the held-out one; the training loss
    where nothing is held out."""


@dataclass
class Config:
    """The whole config of a run, as stored in RUN/config.yaml."""

    name: str = MISSING
    """Name of the run. Slurm jobs are named after it."""
    run_dir: str = MISSING
    """Folder of the run. Created once. A relative path starts at the folder in which launch.py is started."""
    jobs: list[str] = field(default_factory=list)
    """Jobs that this command runs, in order. The pipeline group sets it."""
    resume: str | None = None
    """Continue the run in this folder. Completed jobs are skipped; training continues at its newest checkpoint."""
    dry_run: bool = False
    """Print the sbatch script and environment of every job. Write and submit nothing."""
    submit: Submit = Submit.submitit
    """`submitit`: submit the jobs. `script`: write RUN/jobs/<job>.sbatch files for `sbatch`, and submit nothing."""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    parallel: Parallel = field(default_factory=Parallel)
    adapter: Adapter = field(default_factory=Adapter)
    train: Train = field(default_factory=Train)
    consolidate: Consolidate = field(default_factory=Consolidate)
    generate: Generate = field(default_factory=Generate)
    tracker: Tracker = field(default_factory=Tracker)
    hub: Hub = field(default_factory=Hub)
    custom: Custom = field(default_factory=Custom)
    sweep: Sweep = field(default_factory=Sweep)
    cluster: Cluster = field(default_factory=Cluster)
