"""Comet: offline unless Comet's settings say `start.online` (COMET_START_ONLINE=1). Imported when it is opened."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from utils.loggers.base import Service


class Comet(Service):
    """A Comet experiment: parameters, figures, images, and the checkpoint as a model; archived in the run's folder."""

    name, package = "comet", "comet_ml"

    def open(self, entry: str | None) -> tuple[str, str]:
        """Starts or goes on with the experiment; see `Service`."""
        os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")  # it would patch torch and others
        os.environ.setdefault("COMET_INTERNAL_SENTRY_DSN", "")  # nor are its own errors reported
        import comet_ml

        online = bool(comet_ml.get_config("comet.start.online"))
        folder = self.save_dir / "comet"
        self.experiment = comet_ml.start(
            project_name=comet_ml.get_config("comet.project_name") or self.project,
            experiment_key=entry,
            mode="get" if entry else "create",
            online=online,
            experiment_config=comet_ml.ExperimentConfig(
                name=self.save_dir.name,
                offline_directory=str(folder),
                display_summary_level=0,
                log_code=False,
                log_git_patch=False,
                log_env_details=online,  # it asks the network whether it runs in a cloud
                log_env_network=online,
                auto_output_logging=False,
            ),
        )
        self.experiment.log_parameters(self.settings)
        entry = self.experiment.get_key()
        if online:
            return entry, f"view at {self.experiment.url}"
        return entry, f"offline, send it with comet upload {shlex.quote(str(folder))}/{entry}*.zip"

    def send_figures(self, epoch: int, figures: Mapping[str, float]) -> None:
        """Logs metrics."""
        self.experiment.log_metrics(dict(figures), step=epoch, epoch=epoch)

    def send_image(self, file: Path, epoch: int) -> None:
        """Logs an image."""
        self.experiment.log_image(str(file), name=file.name, step=epoch)

    def send_weights(self, file: Path) -> None:
        """Logs a checkpoint as a model."""
        self.experiment.log_model("best", str(file))

    def end(self) -> None:
        """Ends the experiment."""
        self.experiment.end()
