"""Looks at the Hub (token, network, cache) and at trackers: whether they can be used, never at the values of secrets."""

import netrc
from collections.abc import Iterator, Mapping
from pathlib import Path

from launcher.doctor.check import Check, error, warning
from launcher.hub_client import HubClient, Unreachable, endpoint, stored_token

TOKENS = "https://huggingface.co/settings/tokens"
OFFLINE = "or train with cluster.offline=true and send it with muster sync RUN"
CREDENTIALS = {
    "wandb": ("wandb", "WANDB_API_KEY", "api.wandb.ai", f"wandb login, {OFFLINE}"),
    "comet": ("comet-ml", "COMET_API_KEY", "", "set COMET_API_KEY and name it in cluster.secrets"),
}
"""Tracker: its package, the variable with its credential, its host in ~/.netrc, and the remedy without one."""
FILES = {"tensorboard": ("tensorboard",), "mlflow": ("mlflow-skinny", "mlflow")}
"""Trackers that need no credential, and their packages: they write files, MLflow where it has no server."""


def hub(environ: Mapping[str, str], home: Path, cache: Path, *, offline: bool) -> Iterator[Check]:
    """Look at the Hub's cache and token, and ask the Hub about the token unless `offline`."""
    models = sorted(cache.glob("models--*")) if cache.is_dir() else []
    yield Check("hub", "cache", f"{cache}: {len(models)} models, {len(list(cache.glob('datasets--*')))} datasets")
    token = stored_token(environ, home)
    if offline or environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        if models:
            yield Check("hub", "network", "not used (offline)")
        else:
            remedy = "fetch models where there is a network: pipeline=fetch (docs/hub.md)"
            yield warning("hub", "network", "not used (offline), and the cache is empty", remedy)
        return
    address = endpoint(environ)
    try:
        reply = HubClient(address, token).ask("/api/whoami-v2")
    except Unreachable as problem:
        remedy = "fetch models where there is a network (pipeline=fetch), then set cluster.offline=true"
        yield warning("hub", "network", f"{address} does not answer: {problem}", remedy)
        return
    yield Check("hub", "network", f"{address} answers")
    if token is None:
        yield warning("hub", "token", "none", f"gated models and pushes need one: {TOKENS}, then `hf auth login`")
    elif reply.status == 200:
        yield Check("hub", "token", "valid")
    else:
        yield error("hub", "token", f"refused ({reply.status})", f"make one at {TOKENS}, then `hf auth login`")


def trackers(environ: Mapping[str, str], packages: Mapping[str, str]) -> Iterator[Check]:
    """Look at the trackers whose packages the Python of the jobs has."""
    for name, distributions in FILES.items():
        if version := next((packages[item] for item in distributions if item in packages), None):
            yield Check("trackers", name, f"{version}; needs no credential")
    for name, (distribution, variable, host, remedy) in CREDENTIALS.items():
        if distribution not in packages:
            continue
        if environ.get(variable) or (host and _in_netrc(host)):
            yield Check("trackers", name, f"{packages[distribution]}, with a credential")
        else:
            yield warning("trackers", name, f"{packages[distribution]}, without a credential", remedy)


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
