"""How ranks run in a container: its runtime, what is mounted, and the words of the command. Pure.

A path that only the node knows keeps its variables here, and the shell of the job expands them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from conf import node_paths
from conf.choices import Runtime
from conf.schema import Config
from conf.schema_cluster import Container

GPU_FLAGS = ("--nv", "--nvccli", "--rocm")


@dataclass(frozen=True)
class Mount:
    """One path of the host and where it is in the container."""

    source: str
    target: str
    options: str = ""

    def text(self) -> str:
        """As apptainer and pyxis take it."""
        return ":".join([self.source, self.target, *([self.options] if self.options else [])])


def runtime(container: Container) -> Runtime:
    """Return the runtime. `auto` is left where the node chooses between apptainer and singularity."""
    image = container.image or ""
    is_enroot = image.endswith(".sqsh") or ("#" in image and "://" not in image)
    return Runtime.pyxis if container.runtime is Runtime.auto and is_enroot else container.runtime


def parsed(entry: str) -> Mount:
    """Read an entry of `cluster.container.mounts`: SOURCE, SOURCE:TARGET or SOURCE:TARGET:OPTIONS."""
    source, target, options = (*entry.split(":", 2), "", "")[:3]
    return Mount(source, target or source, options)


def needed(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (config key, path) of what every job reads and writes, apart from data and models."""
    cluster = config.cluster
    yield "run_dir", config.run_dir
    if config.sweep.stop_worst:
        yield "run_dir", str(Path(config.run_dir).parent)  # the losses of the other runs
    yield "data.cache", cache(config)
    yield "cluster.scratch", cluster.scratch
    if cluster.hf_home:
        yield "cluster.hf_home", cluster.hf_home
    if config.custom.command is not None and config.custom.folder:
        yield "custom.folder", config.custom.folder


def cache(config: Config) -> str:
    """Return the folder of tokenized sets."""
    return config.data.cache or str(Path(config.run_dir).parent / ".data")


def mounts(config: Config) -> list[Mount]:
    """Return everything to mount, outer folders first. What the user mounts is not mounted a second time."""
    own = [parsed(entry) for entry in config.cluster.container.mounts]
    for _, path in needed(config):
        if not any(_covers(mount, path) for mount in own):
            own.append(Mount(path, path))
    return sorted(dict.fromkeys(own), key=lambda mount: len(PurePosixPath(mount.target).parts))


def _covers(mount: Mount, path: str) -> bool:
    """Return whether a path is in the container already: mounted itself, or in a folder that keeps its place and can be written."""
    inside = PurePosixPath(path).is_relative_to(mount.target)
    return mount.target == path or (inside and mount.source == mount.target and "ro" not in mount.options.split(","))


def variables(config: Config) -> list[str]:
    """Return `NAME:KEY` of each variable that the shell of the job expands for the container. Empty without a container."""
    container = config.cluster.container
    if container.image is None:
        return []
    texts = [("cluster.container.image", container.image), *needed(config)]
    texts += [("cluster.container.mounts", entry) for entry in container.mounts]
    return list(dict.fromkeys(f"{name}:{key}" for key, text in texts for name in node_paths.names(text)))


def command(config: Config, names: Iterable[str], gpus: bool) -> list[str]:
    """Return the shell words that run a command in apptainer or singularity. The command follows them.

    `names` are the variables that must reach the container, whatever the image sets and with `--cleanenv`.
    """
    container = config.cluster.container
    chosen = container.program or runtime(container).name
    script = f"{config.run_dir}/code/slurm_templates/container.sh"
    adds_gpus = gpus and not any(flag in GPU_FLAGS for flag in container.flags)
    words = ["bash", script, chosen, ",".join(names), "gpus" if adds_gpus else "no-gpus"]
    words += [word for mount in mounts(config) for word in ("--bind", mount.text())]
    return [node_paths.in_shell(word) for word in [*words, *container.flags, str(container.image)]]


def srun_words(config: Config, names: Iterable[str]) -> list[str]:
    """Return the shell words for srun that start a container with pyxis. Empty without one."""
    container = config.cluster.container
    if container.image is None or runtime(container) is not Runtime.pyxis:
        return []
    words = [
        f"--container-image={container.image}",
        f"--container-mounts={','.join(mount.text() for mount in mounts(config))}",
        f"--container-workdir={config.run_dir}/code",
        f"--container-env={','.join(names)}",
        *container.flags,
    ]
    return [node_paths.in_shell(word) for word in words]
