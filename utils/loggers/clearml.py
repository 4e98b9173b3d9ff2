"""ClearML: offline unless CLEARML_OFFLINE_MODE says 0. Imported when it is opened."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from utils.loggers.base import Service

FRAMEWORKS = (  # that it would patch, to follow them by itself
    "catboost fastai gradio hydra joblib lightgbm matplotlib megengine pytorch scikit tensorboard tensorflow tfdefines "
    "xgboost"
).split()


class ClearML(Service):
    """A ClearML task: options, hyperparameters, figures, images, and the checkpoint as an artifact."""

    name = package = "clearml"

    def open(self, entry: str | None) -> tuple[str, str]:
        """Starts or goes on with the task; see `Service`."""
        os.environ.setdefault("CLEARML_OFFLINE_MODE", "1")
        os.environ.setdefault("CLEARML_CACHE_DIR", str(self.save_dir / "clearml"))
        import clearml

        offline = clearml.Task.is_offline()
        self.task = clearml.Task.init(
            project_name=os.environ.get("CLEARML_PROJECT", self.project),
            task_name=self.save_dir.name,
            reuse_last_task_id=False,
            continue_last_task=entry or False,
            auto_connect_arg_parser=False,
            # with the repository goes a question to the network for ClearML's newest version
            auto_connect_frameworks=dict.fromkeys((*FRAMEWORKS, "detect_repository"), False) if offline else False,
            auto_connect_streams=False,
        )
        self.offset = self.task.get_initial_iteration()  # is added to what is reported; a resumed run counts on itself
        self.task.connect(self.settings, name="settings")
        if not offline:
            return self.task.id, f"view at {self.task.get_output_log_web_page()}"
        archive = f"{self.task.get_offline_mode_folder()}.zip"
        return self.task.id, f"offline, send it with clearml.Task.import_offline_session({archive!r})"

    def send_figures(self, epoch: int, figures: Mapping[str, float]) -> None:
        """Reports scalars: metrics/recall is the series recall of the plot metrics."""
        for name, value in figures.items():
            plot, _, series = name.partition("/")
            self.task.get_logger().report_scalar(plot, series, value, epoch - self.offset)

    def send_image(self, file: Path, epoch: int) -> None:
        """Reports an image."""
        at = epoch - self.offset
        self.task.get_logger().report_image("images", file.name, at, local_path=str(file), delete_after_upload=False)

    def send_weights(self, file: Path) -> None:
        """Uploads a checkpoint."""
        self.task.upload_artifact("best", str(file))

    def end(self) -> None:
        """Ends the task."""
        self.task.close()
