"""MLflow: a database and files beside the runs, or the server of MLFLOW_TRACKING_URI. Imported when it is opened."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping
from pathlib import Path

from utils.loggers.base import Service


class MLflow(Service):
    """An MLflow run: options and hyperparameters as parameters, figures as metrics, files as artifacts.

    Without MLFLOW_TRACKING_URI all runs of a project are in `mlflow.db` and `mlflow/` in its folder.
    """

    name = package = "mlflow"

    def open(self, entry: str | None) -> tuple[str, str]:
        """Starts or goes on with the run; see `Service`."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        folder = self.save_dir.absolute().parent
        local = f"sqlite:///{(folder / 'mlflow.db').as_posix()}"
        address = os.environ.get("MLFLOW_TRACKING_URI") or local
        self.client = MlflowClient(tracking_uri=address)
        if entry:
            self.client.update_run(entry, status="RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", self.project)
            known = self.client.get_experiment_by_name(name)
            files = (folder / "mlflow").as_uri() if address == local else None  # a server has a place of its own
            number = known.experiment_id if known else self.client.create_experiment(name, files)
            entry = self.client.create_run(number, run_name=self.save_dir.name).info.run_id
            parameters = [Param(key, str(value)) for key, value in self.settings.items()]
            self.client.log_batch(entry, params=parameters)
        self.run_id = entry
        return entry, f"run {entry}, view with mlflow ui --backend-store-uri {shlex.quote(address)}"

    def send_figures(self, epoch: int, figures: Mapping[str, float]) -> None:
        """Logs metrics."""
        from mlflow.entities import Metric

        now_ms = int(1000 * time.time())
        metrics = [Metric(name, value, now_ms, epoch) for name, value in figures.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def send_image(self, file: Path, epoch: int) -> None:
        """Copies an image."""
        self.client.log_artifact(self.run_id, str(file), "images")

    def send_weights(self, file: Path) -> None:
        """Copies a checkpoint."""
        self.client.log_artifact(self.run_id, str(file), "weights")

    def end(self) -> None:
        """Marks the run as finished."""
        self.client.set_terminated(self.run_id)
