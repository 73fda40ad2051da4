"""Rules for the keys that name trackers: `report_to` of a Trainer, and those of Axolotl for W&B, MLflow and Comet."""

from collections.abc import Mapping
from typing import Any

from launcher.convert.common_rules import flag
from launcher.convert.keys import Outcome, Row, Rule, changed, choice, described, kept, refused, unneeded


@described("`tracker`")
def report_to(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    names = [str(name) for name in (value if isinstance(value, list) else [value])]
    if set(names) <= {"none", "all"}:
        return Row(key, value, Outcome.unneeded, why="choose with tracker=wandb, tensorboard, mlflow or comet")
    ours = {"comet_ml": "comet"}
    chosen = [ours.get(name, name) for name in names]
    if unknown := sorted(set(chosen) - {"wandb", "tensorboard", "mlflow", "comet"}):
        return Row(
            key,
            value,
            Outcome.refused,
            why=f"Muster has no tracker {unknown[0]}. Use wandb, tensorboard, mlflow or comet",
        )
    return Row(key, value, Outcome.kept, {f"tracker.{name}": True for name in chosen})


RULES: dict[str, Rule] = {
    "wandb_project": changed("tracker.project", "with tracker.wandb=true", also={"tracker.wandb": True}),
    "wandb_entity": kept("tracker.entity"),
    "wandb_name": kept("tracker.run_name"),
    "wandb_run_id": unneeded("Muster keeps one id over all attempts of a run"),
    "wandb_mode": choice(
        {"offline": {"cluster.offline": True}, "online": {}}, "is online or offline. To track nothing: tracker=none"
    ),
    "wandb_watch": refused("gradient norms are in the metrics; W&B's watch would read every weight"),
    "wandb_log_model": refused("no tracker stores models here: hub.push=owner/name sends the merged model to the Hub"),
    "use_wandb": flag({"tracker.wandb": True}),
    "use_tensorboard": flag({"tracker.tensorboard": True}),
    "use_mlflow": flag({"tracker.mlflow": True}),
    "mlflow_tracking_uri": changed("tracker.uri", "with tracker.mlflow=true", also={"tracker.mlflow": True}),
    "mlflow_experiment_name": kept("tracker.project"),
    "mlflow_run_name": kept("tracker.run_name"),
    "use_comet": flag({"tracker.comet": True}),
    "comet_project_name": kept("tracker.project"),
    "comet_workspace": kept("tracker.entity"),
    "comet_api_key": refused("secrets are named, not written: cluster.secrets=[COMET_API_KEY]"),
}
