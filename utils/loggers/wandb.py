"""Weights & Biases: offline unless WANDB_MODE or wandb's settings file says otherwise. Imported when it is opened."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from utils.loggers.base import Service


class WandB(Service):
    """A W&B run: figures, images, and the checkpoint as an artifact of type "model"; its files in the run's folder."""

    name = package = "wandb"

    def open(self, entry: str | None) -> tuple[str, str]:
        """Starts or goes on with the run; see `Service`."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        mode = None if "mode" in wandb.setup().settings.model_fields_set else "offline"
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", self.project),
            name=self.save_dir.name,
            dir=self.save_dir,
            id=entry,
            resume="allow" if entry else None,
            config=self.settings,
            mode=mode,
            settings=wandb.Settings(silent=True, console="off", save_code=False),
        )
        if not self.run.offline:
            return self.run.id, f"view at {self.run.url}"
        return self.run.id, f"offline, send it with wandb sync {shlex.quote(str(Path(self.run.dir).parent))}"

    def send_figures(self, epoch: int, figures: Mapping[str, float]) -> None:
        """Logs figures."""
        self.run.log(dict(figures), step=epoch)

    def send_image(self, file: Path, epoch: int) -> None:
        """Logs an image."""
        import wandb

        self.run.log({file.name: wandb.Image(str(file))}, step=epoch)

    def send_weights(self, file: Path) -> None:
        """Logs a checkpoint as an artifact."""
        self.run.log_artifact(str(file), name=f"run_{self.run.id}_model", type="model")

    def end(self) -> None:
        """Ends the run."""
        self.run.finish()
