"""The training loop: epochs of batches, validation, checkpoints, the finish.

`Trainer.train` reads like a table of contents. What a run is made of is built before it (`train.py`,
`utils.train.setup`). A run that was stopped at any moment and resumed ends with the same weights as one that was not:
rates and randomness are functions of the epoch and the batch, and everything else is in the checkpoint.
"""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.checkpoint import load_checkpoint, save_checkpoint, strip_checkpoint
from utils.checks import UserError, round_up
from utils.data.loader import Batch
from utils.devices import resolve_amp
from utils.eval.evaluate import EvalResult, evaluate
from utils.files import remove_temporaries
from utils.images import read_image
from utils.log import LOGGER, colorstr, progress
from utils.train.callbacks import Callbacks
from utils.train.ema import ModelEMA
from utils.train.hyp import Hyp
from utils.train.loggers import ResultsCsv, epoch_values, open_tensorboard
from utils.train.loss import TERMS, DetectionLoss
from utils.train.optim import (
    Schedule,
    apply_settings,
    build_optimizer,
    load_optimizer_state,
    optimizer_state_by_name,
    scaled_weight_decay,
)
from utils.train.setup import Loaders, checkpoint_header, deterministic_algorithms, freeze_layers
from utils.train.stopper import EarlyStopping
from utils.train.weights import class_weights, image_weights

CLIP_NORM = 10.0
BATCH_PICTURES = 3  # how many training batches are drawn
HEADER = ("Epoch", "gpu_mem", "box", "obj", "cls", "labels", "img_size")


class BatchSource(NamedTuple):
    """Where in a run a batch stands, for messages."""

    epoch: int
    index: int
    paths: list[str]


class Trainer:
    """One training run: holds its moving parts and takes them through the epochs."""

    def __init__(
        self,
        model: nn.Module,
        hyp: Hyp,
        options: Namespace,
        loaders: Loaders,
        device: torch.device,
        callbacks: Callbacks,
        checkpoint: dict | None = None,
    ) -> None:
        """Sets a run up, at its beginning or where `checkpoint` left it.

        Args:
            model: the detector, on `device`, its anchors settled.
            hyp: hyperparameters as the file has them.
            options: train.py's, with `save_dir`.
            loaders: training and validation batches.
            device: where to compute.
            callbacks: hooks of the caller's.
            checkpoint: the last finished epoch of the run to go on with.
        """
        self.options, self.hyp, self.device, self.callbacks, self.loaders = options, hyp, device, callbacks, loaders
        self.save_dir = Path(options.save_dir)
        self.last, self.best = (self.save_dir / "weights" / f"{name}.pt" for name in ("last", "best"))
        self.last.parent.mkdir(parents=True, exist_ok=True)
        remove_temporaries(self.last.parent)
        self.model = model.to(memory_format=torch.channels_last)
        freeze_layers(self.model, options.freeze)
        detect = self.model.detect
        scaled = hyp.scaled(detect.nl, detect.nc, loaders.imgsz, options.label_smoothing)
        self.loss = DetectionLoss(scaled, detect.anchors, detect.stride, detect.nc)
        self.schedule = Schedule(hyp, options.epochs, len(loaders.train), options.batch_size, options.cos_lr)
        weight_decay = scaled_weight_decay(hyp.weight_decay, options.batch_size)
        self.optimizer = build_optimizer(model, options.optimizer, hyp.lr0, hyp.momentum, weight_decay)
        self.ema = ModelEMA(self.model)
        self.autocast_dtype = resolve_amp(options.amp, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.autocast_dtype == torch.float16)
        self.stopper = EarlyStopping(options.patience)
        self.validation = [0.0] * 7  # P, R, mAP50, mAP50-95 and the three losses of the last validation
        self.maps = np.zeros(detect.nc)  # mAP50-95 of each class at the last validation
        self.best_fitness = 0.0
        self.last_step = -1  # iteration of the last optimizer step
        # of torch's own generator, which no layer here reads, but one of somebody's may (dropout)
        self.rng_state = torch.Generator().manual_seed(options.seed).get_state()
        self.epoch = -1  # the last finished epoch
        self.complete = False  # whether that was the run's last
        if checkpoint:
            self._restore(checkpoint)
        self.csv = ResultsCsv(self.save_dir / "results.csv", self.epoch + 1)
        self.board = open_tensorboard(self.save_dir, self.epoch + 1)

    def train(self) -> EvalResult | None:
        """Trains to the last epoch or until the patience runs out; validates the best epoch's weights.

        Returns:
            The best weights' figures, or None where a callback stopped the run.

        Raises:
            UserError: a loss or gradient that is not finite; a checkpoint that cannot be written.
        """
        started, first = time.monotonic(), self.epoch + 1
        self._announce()
        with deterministic_algorithms(self.device), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.rng_state)
            self.callbacks.run("on_train_start")
            while not self.complete:
                items = self._train_epoch(self.epoch + 1)
                if items is None:
                    return None
                self._after_epoch(self.epoch + 1, items)
            hours = (time.monotonic() - started) / 3600
            LOGGER.info(f"\n{self.epoch + 1 - first} epochs completed in {hours:.3f} hours.")
            return self._finish()

    def how_to_resume(self) -> str:
        """Says what an interrupted run has saved and how to go on with it."""
        if self.epoch < 0 or not self.last.exists():
            return "No epoch was finished: nothing is saved yet, start again."
        return f"Epoch {self.epoch} is saved. Go on with: python train.py --resume {self.last}"

    def close(self) -> None:
        """Ends the loaders' processes and closes the event file."""
        self.loaders.train.close()
        self.loaders.val.close()
        if self.board:
            self.board.close()

    # ---------------------------------------------------------------------------------------------- an epoch

    def _train_epoch(self, epoch: int) -> Tensor | None:
        """Trains on every batch once; returns the mean loss terms (3,), or None where a callback stops the run."""
        self.model.train()
        loader, epochs = self.loaders.train, self.options.epochs
        loader.set_epoch(epoch)
        if self.options.image_weights:
            loader.set_image_weights(self._image_weights())
        self.callbacks.run("on_train_epoch_start")
        LOGGER.info(("\n" + "%10s" * len(HEADER)) % HEADER)
        self.optimizer.zero_grad(set_to_none=True)
        mean_items = torch.zeros(3)
        with progress(total=len(loader.dataset), unit="img") as bar:
            for index, batch in enumerate(loader):
                self.callbacks.run("on_train_batch_start")
                source = BatchSource(epoch, index, batch.paths)
                items, side = self._train_batch(batch, source)
                mean_items += (items - mean_items) / (index + 1)
                row = (f"{epoch}/{epochs - 1}", self._memory(), *mean_items.tolist(), len(batch.targets), side)
                bar.set_description_str(("%10s" * 2 + "%10.4g" * 5) % row, refresh=False)
                bar.update(len(batch.paths))
                if self.callbacks.stop_training:
                    return None
        return mean_items

    def _train_batch(self, batch: Batch, source: BatchSource) -> tuple[Tensor, int]:
        """Computes one batch's gradient, and steps where enough have been gathered; returns the terms and the width."""
        iteration = source.index + len(self.loaders.train) * source.epoch
        settings = self.schedule.at(source.epoch, source.index)
        apply_settings(self.optimizer, settings)
        images = batch.images.to(self.device, non_blocking=True)
        images = images.to(dtype=torch.float32, memory_format=torch.channels_last) / 255
        if self.options.multi_scale:
            images = self._rescaled(images, iteration)
        with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            outputs = self.model(images)
        loss = self.loss(outputs, batch.targets.to(self.device))
        items, term = loss.items.cpu(), loss.bad_term()
        if term:
            raise self._not_finite(source, term, items[TERMS.index(term)].item())
        self.scaler.scale(loss.total * 4 if self.options.quad else loss.total).backward()
        if iteration - self.last_step >= settings.accumulate:
            self._step(source)
            self.last_step = iteration
        self._after_batch(batch, images, iteration)
        return items, images.shape[-1]

    def _step(self, source: BatchSource) -> None:
        """Clips the gathered gradient, steps the optimizer and lets the EMA follow."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        if not self.scaler.is_enabled() and not torch.isfinite(norm):  # the scaler skips such steps by itself
            raise self._not_finite(source, "gradient norm", norm.item())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model)

    def _after_batch(self, batch: Batch, images: Tensor, iteration: int) -> None:
        """Draws the first batches and runs the callers' hooks."""
        plots = not self.options.noplots
        if plots and iteration < BATCH_PICTURES:
            from utils.draw import draw_batch

            file = self.save_dir / f"train_batch{iteration}.jpg"
            drawn = (images * 255).round().to(torch.uint8)
            draw_batch(drawn, batch.targets, batch.paths, self.model.names, file)
            if self.board and iteration == 0:
                self.board.log_graph(self.model, images)
        arguments = (iteration, self.model, images, batch.targets, batch.paths, plots, False)  # False: no SyncBN
        self.callbacks.run("on_train_batch_end", *arguments)

    def _rescaled(self, images: Tensor, iteration: int) -> Tensor:
        """Resizes a batch (B, 3, H, W) to a random size between half and one and a half times the image side."""
        imgsz, stride = self.loaders.imgsz, self.loaders.grid_stride
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.options.seed, 1, iteration])))
        side = int(generator.integers(imgsz // 2, imgsz + imgsz // 2 + stride)) // stride * stride
        factor = side / max(images.shape[2:])
        if factor == 1:
            return images
        shape = [round_up(length * factor, stride) for length in images.shape[2:]]
        return F.interpolate(images, size=shape, mode="bilinear", align_corners=False)

    def _image_weights(self) -> np.ndarray:
        """Returns each training image's weight (N,): high where its classes do badly."""
        table = self.loaders.train.dataset.table
        classes = table.rows[:, 0]
        return image_weights(classes, table.offsets, class_weights(classes, self.model.nc), self.maps)

    def _memory(self) -> str:
        """Returns the GPU memory reserved so far, as in `3.1G`; 0G elsewhere."""
        used = torch.cuda.memory_reserved(self.device) / 1e9 if self.device.type == "cuda" else 0
        return f"{used:.3g}G"

    def _not_finite(self, source: BatchSource, term: str, value: float) -> UserError:
        """Returns the error that stops a run whose numbers are lost, naming where and on which images."""
        images = ", ".join(source.paths[:8]) + (f" and {len(source.paths) - 8} more" if len(source.paths) > 8 else "")
        return UserError(
            f"training stopped: {term} is {value} in epoch {source.epoch}, batch {source.index} (images {images}). "
            "Check these images' labels, lower lr0 in --hyp, or use --amp off. " + self.how_to_resume()
        )

    # ------------------------------------------------------------------------------------------ after an epoch

    def _after_epoch(self, epoch: int, items: Tensor) -> None:
        """Validates the EMA, records the figures, keeps the best and the last state, and looks at the patience."""
        self.callbacks.run("on_train_epoch_end", epoch=epoch)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        final = epoch + 1 == self.options.epochs
        possibly_final = final or self.stopper.possible_stop
        fitness, is_best = 0.0, False
        if possibly_final or not self.options.noval:
            result = self._validate()
            self.validation, self.maps, fitness = list(result.as_tuple()), result.maps, result.fitness
            is_best = fitness >= self.best_fitness
            self.best_fitness = max(fitness, self.best_fitness)
            final |= self.stopper(epoch, fitness)
        values = epoch_values(items.tolist(), self.validation, rates)
        self.csv.append(epoch, values)
        if self.board:
            self.board.log_epoch(epoch, values)
        self.callbacks.run("on_fit_epoch_end", values, epoch, self.best_fitness, fitness)
        self.complete = final
        if possibly_final or final or not self.options.nosave:
            self._save(epoch, is_best)
            self.callbacks.run("on_model_save", self.last, epoch, final, self.best_fitness, fitness)
        self.epoch = epoch

    def _validate(self, final: bool = False) -> EvalResult:
        """Evaluates the EMA on the validation set; at the end with the table of classes and the pictures."""
        return evaluate(
            self.ema.ema,
            self.loaders.val,
            names=self.model.names,
            device=self.device,
            single_cls=self.options.single_cls,
            compute_loss=self.loss,
            save_dir=self.save_dir,
            plots=final and not self.options.noplots,
            verbose=final,
            training=not final,
            callbacks=self.callbacks,
            **(self.loaders.final if final else {}),
        )

    # --------------------------------------------------------------------------------------------- checkpoints

    def _state(self, epoch: int) -> dict[str, Any]:
        """Returns all that a resumed run needs, as plain data; see `utils.checkpoint`."""
        return {
            **checkpoint_header(self.model, self.hyp, self.options),
            "epoch": epoch,
            "best_fitness": self.best_fitness,
            "model": self.model.state_dict(),
            "ema": self.ema.ema.state_dict(),
            "updates": self.ema.updates,
            "optimizer": optimizer_state_by_name(self.optimizer, self.model),
            "scaler": self.scaler.state_dict(),
            "schedule": {
                "last_step": self.last_step,
                "complete": self.complete,
                "validation": self.validation,
                "maps": self.maps.tolist(),
                "loss": self.loss.state_dict(),
            },
            "stopper": self.stopper.state_dict(),
            "generators": {"torch": torch.get_rng_state()},
        }

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        """Takes over a checkpoint's state; the next epoch is the one after it."""
        self.model.load_state_dict(checkpoint["model"])
        self.ema.load(checkpoint["ema"], checkpoint["updates"])
        load_optimizer_state(self.optimizer, self.model, checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        schedule = checkpoint["schedule"]
        self.last_step, self.complete = schedule["last_step"], schedule["complete"]
        self.validation, self.maps = schedule["validation"], np.array(schedule["maps"])
        self.loss.load_state_dict(schedule["loss"])
        self.stopper.load_state_dict(checkpoint["stopper"])
        self.rng_state = checkpoint["generators"]["torch"]
        self.best_fitness, self.epoch = checkpoint["best_fitness"], checkpoint["epoch"]

    def _save(self, epoch: int, is_best: bool) -> None:
        """Writes best.pt before last.pt: a run that dies between them resumes before this epoch and writes both."""
        state = self._state(epoch)
        if is_best:
            save_checkpoint(self.best, state)
        period = self.options.save_period
        if period > 0 and epoch > 0 and epoch % period == 0:
            save_checkpoint(self.last.with_name(f"epoch{epoch}.pt"), state)
        save_checkpoint(self.last, state)

    # ----------------------------------------------------------------------------------------------- beginning, end

    def _announce(self) -> None:
        """Logs what is about to happen."""
        loaders = self.loaders
        precision = str(self.autocast_dtype or torch.float32).removeprefix("torch.")
        LOGGER.info(
            f"Image sizes {loaders.imgsz} train, {loaders.imgsz} val, {precision}\n"
            f"Using {loaders.train.workers} dataloader workers\n"
            f"Logging results to {colorstr(str(self.save_dir), 'bold')}\n"
            f"Starting training for {self.options.epochs} epochs..."
        )

    def _finish(self) -> EvalResult:
        """Strips the checkpoints, validates the best one and draws the results.

        last.pt is stripped at the very end: until then an interrupted finish can be resumed.
        """
        chosen = self.best if self.best.exists() else self.last
        if self.best.exists():
            self._strip(self.best)
        LOGGER.info(f"\nValidating {chosen}...")
        checkpoint = load_checkpoint(chosen)
        self.ema.ema.load_state_dict(checkpoint["model"] if checkpoint["ema"] is None else checkpoint["ema"])
        result = self._validate(final=True)
        if not self.options.noplots:
            from utils.train.plots import plot_results

            plot_results(self.save_dir / "results.csv", self.save_dir / "results.png")
            if self.board:
                pictures = sorted(self.save_dir.glob("*.jpg")) + sorted(self.save_dir.glob("*.png"))
                self.board.log_images({file.name: read_image(file)[..., ::-1] for file in pictures}, self.epoch)
        self._strip(self.last)
        plots = not self.options.noplots
        self.callbacks.run("on_train_end", self.last, self.best, plots, self.epoch, result.as_tuple())
        LOGGER.info(f"Results saved to {colorstr(str(self.save_dir), 'bold')}")
        return result

    def _strip(self, path: Path) -> None:
        """Strips a checkpoint to its float16 EMA and says so."""
        strip_checkpoint(path)
        LOGGER.info(f"Optimizer stripped from {path}, {path.stat().st_size / 1e6:.1f}MB")
