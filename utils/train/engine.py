"""The training loop: epochs of batches, validation, checkpoints, the finish.

`Trainer.train` reads like a table of contents. What a run is made of is built before it (`train.py`,
`utils.train.prepare`). A run that was stopped at any moment and resumed ends with the same weights as one that was not:
rates and randomness are functions of the epoch and the batch, and everything else is in the checkpoint. Several
processes (`utils.train.distributed`) share every batch and take the same steps; the main one alone keeps the EMA,
validates, decides and writes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import re
import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.callbacks import Callbacks
from utils.checkpoint import load_checkpoint, save_checkpoint, strip_checkpoint
from utils.cli import ReportedError
from utils.dataloaders.loader import Batch
from utils.dataloaders.sampling import class_weights, image_weights
from utils.devices import gpus_in_use, resolve_amp, versions_here
from utils.energy import EnergyMeter
from utils.errors import UserError
from utils.eval.evaluate import NMS, EvalResult, evaluate
from utils.eval.figures import metrics_content, write_metrics
from utils.files import remove_temporaries
from utils.log import LOGGER, colorstr, progress
from utils.loggers import open_loggers
from utils.loggers.base import epoch_figures
from utils.loss import LOSSES
from utils.loss.base import BatchReduction, LossResult
from utils.loss.distill import TERM, Teacher, head_inputs, with_distillation
from utils.nms import NMSConfig
from utils.process import defer_signals
from utils.train.distributed import ALONE, World, no_sync_unless, replicate
from utils.train.ema import EarlyStopping, ModelEMA
from utils.train.hyp import Hyp
from utils.train.optim import (
    Schedule,
    apply_settings,
    build_optimizer,
    fitting_epochs,
    load_optimizer_state,
    optimizer_state_by_name,
    scaled_weight_decay,
)
from utils.train.prepare import Loaders, TrainConfig, checkpoint_header, deterministic_algorithms, rescaled
from utils.train.resume import checkpoint_errors
from utils.train.seeds import record_seed

CLIP_NORM = 10.0
SHOWN_IMAGES = 8  # of a batch, in messages
DRAWN_BATCHES = 3  # training batches that are drawn


class NotFinite(UserError):
    """A loss or a gradient that is not finite."""


class Trainer:
    """One training run: holds its moving parts and takes them through the epochs."""

    def __init__(
        self,
        model: nn.Module,
        hyp: Hyp,
        options: TrainConfig,
        loaders: Loaders,
        device: torch.device,
        callbacks: Callbacks,
        make_predictor: Callable[[nn.Module, NMSConfig, torch.dtype | None], Any],
        checkpoint: dict | None = None,
        world: World = ALONE,
        teacher: Teacher | None = None,
    ) -> None:
        """Sets a run up, at its beginning or where `checkpoint` left it.

        Args:
            model: the detector, on `device`, its anchors settled.
            hyp: hyperparameters as the file has them.
            options: train.py's, with `save_dir`.
            loaders: training and validation batches.
            device: where to compute.
            callbacks: hooks of the caller's.
            make_predictor: makes what `evaluate` takes of a module, how detections are chosen, and what to compute in.
            checkpoint: the last finished epoch of the run to go on with.
            world: the processes that train together; all make a trainer.
            teacher: whose maps the model learns to give as well, with the gain `hyp.distill`.
        """
        self.options, self.hyp, self.device, self.callbacks, self.loaders = options, hyp, device, callbacks, loaders
        self.world, self.make_predictor, self.teacher = world, make_predictor, teacher
        self.save_dir = Path(options.save_dir)
        self.last, self.best = (self.save_dir / "weights" / f"{name}.pt" for name in ("last", "best"))
        self.keeps = options.evolve is None  # whether the run has files of its own
        if world.is_main and self.keeps:
            self.last.parent.mkdir(parents=True, exist_ok=True)
            for folder in (self.save_dir, self.last.parent):
                remove_temporaries(folder)
        self.model = model.to(memory_format=torch.channels_last)
        self.schedule = Schedule(hyp, options.epochs, len(loaders.train), options.batch_size, options.cos_lr)
        self.ema = ModelEMA(self.model, tau=self.schedule.ema_tau) if world.is_main else None
        self.ddp_model = replicate(self.model, device, world, options.sync_bn)
        loss = LOSSES[model.head.loss]
        self.model.hyp = dict(vars(loss.scaled(hyp, model.head, loaders.imgsz)))  # those, too, that the file leaves out
        self.loss = loss(self.model)
        self.terms = (*self.loss.terms, TERM) if teacher else self.loss.terms  # of training
        weight_decay = scaled_weight_decay(hyp, options.batch_size)
        self.optimizer = build_optimizer(model, hyp.optimizer, hyp.lr0, hyp.momentum, weight_decay)
        self.autocast_dtype = resolve_amp(options.amp, device)
        self.precision = str(self.autocast_dtype or torch.float32).removeprefix("torch.")
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.autocast_dtype == torch.float16)
        self.stopper = EarlyStopping(options.patience)
        self.validation = [0.0] * (4 + len(self.loss.terms))  # P, R, mAP50, mAP50-95 and the last validation's loss
        self.maps = np.zeros(model.nc)  # mAP50-95 of each class at the last validation
        self.losses: dict[str, float] = {}  # the last batch's, by term
        self.figures: dict[str, float] = {}  # the last epoch's row of results.csv
        self.result: EvalResult | None = None  # the last validation's, until the end
        self.best_fitness = 0.0
        self.gathered = 0  # batches whose gradient waits for the next optimizer step
        # of torch's own generator, which no layer here reads, but one of somebody's may (dropout)
        self.rng_state = torch.Generator().manual_seed(options.seed).get_state()
        self.epoch = -1  # the last finished epoch
        self.saved: tuple[Path, int] | None = None  # what to go on from, and its epoch
        self.complete = False  # whether that was the run's last
        # of several processes' energy this one would tell its own GPU's alone
        self.meter = EnergyMeter(gpus_in_use() if world.size == 1 else ())
        if checkpoint:
            with checkpoint_errors(options.resume):
                self._restore(checkpoint)
            self.saved = Path(options.resume), self.epoch
        self.began = self.epoch_began = time.monotonic()
        self.first_epoch = self.epoch + 1  # not of the run, but since `began`
        self.plots = world.is_main and self.keeps and not options.noplots
        settings = {"opt": vars(options), "hyp": hyp.to_dict()}
        self.loggers = open_loggers(self.save_dir, self.epoch + 1, settings) if world.is_main and self.keeps else []
        callbacks.trainer = self

    def train(self) -> EvalResult | None:
        """Trains to the last epoch or until the patience runs out; validates the best epoch's weights.

        Returns:
            The best weights' figures, or None where a callback stopped the run, and on other processes than the first.

        Raises:
            UserError: a loss or gradient that is not finite; a checkpoint that cannot be written; another process is
                gone.
        """
        side = self.loaders.imgsz
        LOGGER.info(
            f"Image sizes {side} train, {side} val, {self.precision}\n"
            f"Using {self.loaders.train.workers} dataloader workers\n"
            f"Logging results to {colorstr('bold', self.save_dir)}\n"
            f"Starting training for {self.options.epochs} epochs..."
        )
        with (
            self.meter,
            deterministic_algorithms(self.device, self.options.deterministic),
            torch.random.fork_rng(devices=[]),
        ):
            torch.set_rng_state(self.rng_state)
            self.callbacks.run("on_train_start")
            while not self.complete:
                if self.world.broadcast(self.callbacks.stop_training):
                    return None
                items = self._train_epoch(self.epoch + 1)
                if items is None:
                    return None
                self._after_epoch(self.epoch + 1, items)
            hours = (time.monotonic() - self.began) / 3600
            LOGGER.info(f"\n{self.epoch + 1 - self.first_epoch} epochs completed in {hours:.3f} hours.")
            if not self.keeps:
                return self.result
            result = self._finish() if self.world.is_main else None
            self.world.barrier()
            return result

    def how_to_resume(self) -> str:
        """Says what an interrupted run has saved and how to go on with it."""
        if not self.keeps or self.options.seeds > 1:
            return ""  # the search or the series knows
        if self.saved is None:
            return f"No epoch was {'finished' if self.epoch < 0 else 'saved (--nosave)'}: start again."
        path, epoch = self.saved
        return f"Epoch {epoch} is saved. Go on with: {self.world.command} --resume {shlex.quote(str(path))}"

    def close(self) -> None:
        """Ends the loaders' processes and closes the loggers."""
        self.loaders.train.close()
        if self.world.is_main:
            self.loaders.val.close()
        for logger in self.loggers:
            logger.close()

    # ---------------------------------------------------------------------------------------------- an epoch

    def _train_epoch(self, epoch: int) -> Tensor | None:
        """Trains on every batch once; returns the mean loss terms (n,), or None where a callback stops the run."""
        self.epoch_began = time.monotonic()
        self.ddp_model.train()
        loader, epochs = self.loaders.train, self.options.epochs
        loader.set_epoch(epoch, self.schedule.has_mosaic(epoch))
        if self.options.image_weights:  # high for images whose classes do badly
            table = loader.dataset.table
            classes = table.rows[:, 0]
            by_class = class_weights(classes, self.model.nc)
            loader.set_image_weights(image_weights(classes, table.offsets, by_class, self.maps))
        self.callbacks.run("on_train_epoch_start")
        header = ("Epoch", "gpu_mem", *self.terms, "labels", "img_size", "eta")
        LOGGER.info(("\n" + "%10s" * len(header)) % header)
        mean_items = torch.zeros(len(self.terms))
        with progress(total=len(loader.dataset), unit="img") as bar:
            for index, batch in enumerate(loader):
                self.callbacks.run("on_train_batch_start")
                loss, side = self._train_batch(batch, epoch, index)
                mean_items += (loss.items - mean_items) / (index + 1)
                reserved = torch.cuda.memory_reserved(self.device) / 1e9 if self.device.type == "cuda" else 0
                row = (f"{epoch}/{epochs - 1}", f"{reserved:.3g}G", *mean_items.tolist(), loss.labels, side)
                left = self._seconds_left(epoch)
                eta = "-" if left is None else bar.format_interval(left)
                text = ("%10s" * 2 + "%10.4g" * (len(row) - 2) + "%10s") % (*row, eta)
                bar.set_description_str(text, refresh=False)
                bar.update(min(self.options.batch_size, len(loader.dataset) - index * self.options.batch_size))
                if self.world.broadcast(self.callbacks.stop_training):
                    return None
        return mean_items

    def _seconds_left(self, epoch: int) -> float | None:
        """Returns how long the run goes on at the pace of the epochs finished here; None in the first of them."""
        finished = epoch - self.first_epoch
        if not finished:
            return None
        an_epoch = (self.epoch_began - self.began) / finished
        return max(an_epoch * (self.options.epochs - epoch) - (time.monotonic() - self.epoch_began), 0.0)

    def _train_batch(self, batch: Batch, epoch: int, index: int) -> tuple[LossResult, int]:
        """Computes one batch's gradient, and steps where enough have been gathered.

        Returns:
            The loss, its items on the CPU, and the images' width.

        An epoch's last batch always steps: no image is computed for nothing, and no gradient outlives an epoch.
        """
        iteration = index + len(self.loaders.train) * epoch
        settings = self.schedule.at(epoch, index)
        apply_settings(self.optimizer, settings)
        images = batch.images.to(self.device, non_blocking=True)
        images = images.to(dtype=torch.float32, memory_format=torch.channels_last) / 255
        if self.options.multi_scale:
            images = rescaled(images, self.loaders.imgsz, self.loaders.grid_stride, self.options.seed, iteration)
        self.gathered += 1
        steps = self.gathered >= settings.accumulate or index + 1 == len(self.loaders.train)
        autocast = torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)
        with no_sync_unless(self.ddp_model, wanted=steps):
            with autocast, head_inputs(self.model) if self.teacher else contextlib.nullcontext() as maps:
                outputs = self.ddp_model(images)
                wanted = self.teacher.maps(images) if self.teacher else None
            reduction = None
            if self.world.size > 1:
                owned = float(self.loaders.train.owns(index))
                reduction = BatchReduction(self.world.all_reduce_sum, self.world.size, weight=owned)
            loss = self.loss.compute(outputs, batch.targets, reduction)
            if self.teacher:
                loss = with_distillation(loss, maps, wanted, self.hyp.distill, reduction)
            self.scaler.scale(loss.total * 4 if self.options.quad else loss.total).backward()
        loss = loss._replace(items=loss.items.cpu())  # waits for the device, which has the backward pass to do
        more = len(batch.paths) - SHOWN_IMAGES
        shown = ", ".join(batch.paths[:SHOWN_IMAGES]) + (f" and {more} more" if more > 0 else "")
        where = f"in epoch {epoch}, batch {index} (images {shown})"
        self.losses = dict(zip(self.terms, loss.items.tolist(), strict=True))
        for term, value in self.losses.items():
            if not math.isfinite(value):
                if self.world.size > 1 and torch.isfinite(loss.total):
                    raise ReportedError("the loss of another process is not finite.")
                raise self._not_finite(term, value, where)
        if steps:
            self._step(where)
        self._after_batch(batch, images, iteration)
        return loss, images.shape[-1]

    def _not_finite(self, what: str, value: float, where: str) -> NotFinite:
        return NotFinite(
            f"training stopped: {what} is {value} {where}. Check these images' labels, lower lr0 in --hyp, or use "
            f"--amp off. {self.how_to_resume()}"
        )

    def _step(self, where: str) -> None:
        """Clips the gathered gradient, steps the optimizer and lets the EMA follow; `where` is for messages."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        if not self.scaler.is_enabled() and not torch.isfinite(norm):  # the scaler skips such steps by itself
            raise self._not_finite("gradient norm", norm.item(), where)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.callbacks.run("optimizer_step")
        self.callbacks.run("on_before_zero_grad")
        self.optimizer.zero_grad(set_to_none=True)
        self.gathered = 0
        if self.ema:
            self.ema.update(self.model)

    def _after_batch(self, batch: Batch, images: Tensor, iteration: int) -> None:
        """Draws the first batches and runs the callers' hooks."""
        if self.plots and iteration < DRAWN_BATCHES:
            from utils.plots import plot_images

            drawn, file = (images * 255).round().to(torch.uint8), self.save_dir / f"train_batch{iteration}.jpg"
            plot_images(drawn, batch.targets, batch.paths, file, self.model.names)
            for logger in self.loggers if iteration == 0 else ():
                logger.log_graph(self.ema.ema, images)
        about = (batch.targets, batch.paths, self.plots, self.options.sync_bn)
        self.callbacks.run("on_train_batch_end", iteration, self.model, images, *about)

    # ------------------------------------------------------------------------------------------ after an epoch

    def _after_epoch(self, epoch: int, items: Tensor) -> None:
        """Takes stock of an epoch; the first process decides whether it was the last.

        Meanwhile the loaders' processes begin with the next one, unless the validation has a say in its images.
        """
        self.callbacks.run("on_train_epoch_end", epoch=epoch)
        if epoch + 1 < self.options.epochs and not self.options.image_weights:
            self.loaders.train.set_epoch(epoch + 1, self.schedule.has_mosaic(epoch + 1))
            self.loaders.train.start()
        if self.world.is_main:
            self._validate_and_save(epoch, items)
        self.complete = self.world.broadcast(self.complete)
        if self._sets_epochs(epoch):
            self._set_epochs(self.world.broadcast(self.options.epochs))
        self.epoch = epoch
        if self.world.broadcast(self.saved == (self.last, epoch)):
            self.saved = self.last, epoch

    def _validate_and_save(self, epoch: int, items: Tensor) -> None:
        """Validates the EMA, records the figures, keeps the best and the last state, and looks at the patience."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        final = epoch + 1 == self.options.epochs
        possibly_final = final or self.stopper.possible_stop
        fitness, is_best, trained = 0.0, False, time.monotonic()
        if possibly_final or self._sets_epochs(epoch) or not self.options.noval:
            self.result = result = self._validate()
            self.validation, self.maps, fitness = list(result.as_tuple()), result.maps, result.fitness
            is_best = fitness >= self.best_fitness
            self.best_fitness = max(fitness, self.best_fitness)
            final |= self.stopper(epoch, fitness)
        if self._sets_epochs(epoch):
            self._fit_into_hours(trained - self.epoch_began, time.monotonic() - trained)
            final |= self.options.epochs == 1
        self.figures = epoch_figures(self.terms, items.tolist(), self.validation, rates)
        for logger in self.loggers:
            logger.log_epoch(epoch, self.figures)
        self.callbacks.run("on_fit_epoch_end", list(self.figures.values()), epoch, self.best_fitness, fitness)
        self.complete = final
        if self.keeps and (possibly_final or final or not self.options.nosave):
            self._save(epoch, is_best)
            self.callbacks.run("on_model_save", self.last, epoch, final, self.best_fitness, fitness)

    def _sets_epochs(self, epoch: int) -> bool:
        """Tells whether `--hours` sets the number of epochs after this one."""
        return epoch == 0 and self.options.hours is not None

    def _fit_into_hours(self, training_s: float, validation_s: float) -> None:
        """Lowers the number of epochs to what fits into `--hours`, by how long the first one took.

        The run is validated once more at its end; with `--noval` twice, and the first epoch alone before.
        """
        hours, asked, noval = self.options.hours, self.options.epochs, self.options.noval
        epoch_s = training_s + (0 if noval else validation_s)
        self._set_epochs(fitting_epochs(hours, epoch_s, (3 if noval else 1) * validation_s, asked))
        epochs = self.options.epochs
        if epochs == asked:
            fitting = f"all {asked} epochs fit"
        else:
            fitting = f"{epochs} epoch{'s fit' if epochs > 1 else ' fits'} instead of {asked}"
        LOGGER.info(f"--hours {hours:g}: an epoch takes {epoch_s:.1f} s, {fitting}")

    def _set_epochs(self, epochs: int) -> None:
        """Makes a run so long, with all that follows from it; checkpoints hold the number as the run's option."""
        self.options.epochs = epochs
        self.schedule = dataclasses.replace(self.schedule, epochs=epochs)
        if self.ema:
            self.ema.tau = self.schedule.ema_tau

    def _validate(self, final: bool = False) -> EvalResult:
        """Evaluates the EMA on the validation set; at the end with the table of classes and the images.

        Until then it is a copy with batch norm folded, in the precision that is trained in: half the time.
        """
        module = self.ema.ema if final else copy.deepcopy(self.ema.ema).fuse()
        nms = replace(NMS, agnostic=self.options.single_cls)
        return evaluate(
            self.make_predictor(module, nms, None if final else self.autocast_dtype),
            self.loaders.val,
            names=self.model.names,
            single_cls=self.options.single_cls,
            compute_loss=self.loss,
            save_dir=self.save_dir,
            plots=final and not self.options.noplots,
            verbose=final,
            training=not final,
            callbacks=self.callbacks,
            keep_records=final,
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
            "precision": self.precision,
            "scaler": self.scaler.state_dict(),
            "schedule": {
                "complete": self.complete,
                "validation": self.validation,
                "maps": self.maps.tolist(),
                "loss": self.loss.state_dict(),
            },
            "stopper": self.stopper.state_dict(),
            "generators": {"torch": torch.get_rng_state()},
            "spent": self.meter.state_dict(),
            "dataset": self.loaders.dataset,
            **({"teacher": self.teacher.digest} if self.teacher else {}),
        }

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        """Takes over a checkpoint's state; the next epoch is the one after it."""
        self.model.load_state_dict(checkpoint["model"])
        if self.ema:
            self.ema.load(checkpoint["ema"], checkpoint["updates"])
        load_optimizer_state(self.optimizer, self.model, checkpoint["optimizer"])
        before = checkpoint.get("precision", self.precision)  # those of an earlier version do not tell
        if before != self.precision and self.world.is_main:
            LOGGER.warning(
                f"WARNING: the run was begun in {before} and goes on in {self.precision}, which --amp "
                f"{self.options.amp} is on {self.device.type}: it will not end like one that was not interrupted"
            )
        if checkpoint["scaler"]:  # only float16 has one, so only there is there a scale to go on with
            self.scaler.load_state_dict(checkpoint["scaler"])
        schedule = checkpoint["schedule"]
        self.complete = schedule["complete"]
        self.validation, self.maps = schedule["validation"], np.array(schedule["maps"])
        self.loss.load_state_dict(schedule["loss"])
        self.stopper.load_state_dict(checkpoint["stopper"])
        self.rng_state = checkpoint["generators"]["torch"]
        if "spent" in checkpoint:  # which an earlier version did not count
            self.meter.load_state_dict(checkpoint["spent"])
        self.best_fitness, self.epoch = checkpoint["best_fitness"], checkpoint["epoch"]

    def _save(self, epoch: int, is_best: bool) -> None:
        """Writes best.pt before last.pt: a run that dies between them resumes before this epoch and writes both.

        With a run's first checkpoint those go that another run left in its folder (`--exist-ok`).
        """
        period = self.options.save_period
        periodic = period > 0 and epoch > 0 and epoch % period == 0
        copies = [self.best] * is_best + [self.last.with_name(f"epoch{epoch}.pt")] * periodic
        first = self.saved is None
        with defer_signals():  # whoever is stopped once last.pt is there is told so
            save_checkpoint(self.last, self._state(epoch), copies)
            self.saved = self.last, epoch
        if first:
            for path in self.last.parent.glob("*.pt"):
                if path not in (*copies, self.last) and re.fullmatch(r"best|epoch\d+", path.stem):
                    path.unlink()

    # ----------------------------------------------------------------------------------------------- beginning, end

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
        if self.plots:
            from utils.plots.training import plot_results

            plot_results(self.save_dir / "results.csv")
            drawn = sorted(self.save_dir.glob("*.jpg")) + sorted(self.save_dir.glob("*.png"))
            for logger in self.loggers:
                logger.log_images(drawn, self.epoch)
        self._report(chosen, result)
        for logger in self.loggers:
            logger.log_weights(chosen)
        if self.options.seeds > 1:
            record_seed(self.save_dir.parent, self.options.seed, result)
        self._strip(self.last)
        self.callbacks.run("on_train_end", self.last, self.best, self.plots, self.epoch, result.as_tuple())
        LOGGER.info(f"Results saved to {colorstr('bold', self.save_dir)}")
        return result

    def _report(self, weights: Path, result: EvalResult) -> None:
        """Writes metrics.json and, unless plots are off, report.html."""
        options, tables = self.options, {"val": self.loaders.val.dataset.table}
        about = {
            "model": str(weights),
            "data": options.data,
            "split": "val",
            "imgsz": self.loaders.imgsz,
            "seconds": round(self.meter.seconds, 3),
            "energy_wh": self.meter.watt_hours(),
            "versions": versions_here(self.device),
            "options": vars(options),
            "hyperparameters": self.hyp.to_dict(),
        }
        content = metrics_content(result, about)
        write_metrics(self.save_dir / "metrics.json", content)
        if self.plots:
            from utils.eval.report_page import write_report

            tables = {"train": self.loaders.train.dataset.table, **tables}
            write_report(self.save_dir / "report.html", content, result, tables, self.save_dir / "results.csv")

    def _strip(self, path: Path) -> None:
        """Strips a checkpoint to its float16 EMA and says so."""
        strip_checkpoint(path)
        LOGGER.info(f"Optimizer stripped from {path}, {path.stat().st_size / 1e6:.1f}MB")
