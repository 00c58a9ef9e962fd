"""The trainer: builds the parts of a run from its settings and orders the events, nothing else."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vimfast import dist
from vimfast.augment.crops import CentreCrop
from vimfast.augment.recipe import LARGEST_PADDED
from vimfast.checkpoint import (
    load_checkpoint,
    load_for_finetuning,
    load_optimizer,
    load_weights,
    save_checkpoint,
    weights_held,
)
from vimfast.config import Config, plan_batches
from vimfast.control import Control, Stopped
from vimfast.data.loader import Loader, LoaderSettings
from vimfast.data.mixup import Mixup
from vimfast.data.order import Order
from vimfast.data.source import Source, open_source
from vimfast.data.views import Batch, Evaluation, training_view
from vimfast.dist import World
from vimfast.errors import UserError
from vimfast.evaluate import Scores, evaluate
from vimfast.finetune import freeze
from vimfast.gradients import GradientSum, copy_from_first
from vimfast.losses import Objective, build_teacher
from vimfast.metrics import Pace, Reporter, StartUp, Sums, duration, memory_gib
from vimfast.models import create_model
from vimfast.optim import LearningRate, build_ema, build_optimizer, peak_lr
from vimfast.step import TrainStep
from vimfast_kernels.tune import tune_once
from vimfast_kernels.tuning import read_again

SETTLED_AFTER = 100  # steps after which a run's pace is known
TOLERATED = 0.03  # of the time, spent waiting for data

CHECKPOINT, BEST, RESOLVED_CONFIG = "checkpoint.pth", "best_checkpoint.pth", "config.yaml"


class Trainer:
    """One run of training, or of evaluation alone.

    The place in the run is (``epoch``, ``step``): the epoch in progress and the steps done in it. With the seed it
    fixes the pictures, their crops and their mixing, so a checkpoint needs no more than it, the weights, the
    optimizer and torch's random states to go on exactly where it stopped.

    Args:
        control: tells the trainer when to stop; without one it trains to the end.
        start_up: has timed what came before.
    """

    def __init__(
        self, cfg: Config, world: World, control: Control | None = None, start_up: StartUp | None = None
    ) -> None:
        self.cfg, self.world, self.start_up = cfg, world, start_up or StartUp()
        self.control = control or Control(world)
        self.folder = Path(cfg.run.output_dir) if cfg.run.output_dir else None
        resume = self._resume_path()
        self.report = Reporter(None if cfg.run.eval else self._make_folder(), world.is_main)
        self.control.say = self.report.say
        state = load_checkpoint(resume) if resume else None
        self.batches = plan_batches(cfg, world.size)

        self._loaders: list[Loader] = []
        self.val_source = open_source(cfg.data.data_path, "val")
        self.classes = self.val_source.classes
        num_classes = self._check_classes(len(self.classes), state, resume)
        self.val_loader = self._loader(self.val_source, training=False)
        self.start_up.done("data")
        torch.manual_seed(cfg.run.seed)
        self.model: nn.Module = _build_model(cfg, num_classes)
        if not cfg.run.eval:
            self._start_from(cfg.finetune.finetune if resume is None else "")
        self.model.to(world.device)
        self.ema = build_ema(cfg.ema, self.model)
        self.amp = self._autocast()
        self.epoch, self.step, self.best_acc1 = 0, 0, 0.0
        if state is not None:
            self._load_models(state, str(resume))
        if not cfg.run.eval:
            self._prepare_training(num_classes, state)

    # Building

    def _prepare_training(self, num_classes: int, state: dict[str, Any] | None) -> None:
        cfg, world = self.cfg, self.world
        source = open_source(cfg.data.data_path, "train")
        if list(source.classes) != list(self.classes):
            raise UserError(
                f"train has {len(source.classes)} classes and val {len(self.classes)}, or named otherwise; "
                f"check them with python -m vimfast.check_data {cfg.data.data_path}"
            )
        self.train_loader = self._loader(source, training=True)
        self.accum_steps = self.batches.accum_steps
        self.steps = self.train_loader.steps // self.accum_steps
        self.global_batch = self.batches.batch_size * self.accum_steps * world.size
        self.mixup = Mixup(cfg.mix, num_classes, cfg.run.seed, world.rank)
        teacher = build_teacher(cfg.distill, num_classes, cfg.model.input_size)
        teacher = None if teacher is None else teacher.to(world.device)
        self.objective = Objective(cfg.distill, cfg.mix.bce_loss, teacher, self.amp)
        self.optimizer = build_optimizer(cfg.optim, self.model, peak_lr(cfg.optim, self.global_batch))
        self.rate = LearningRate(cfg.schedule, self.optimizer, self.steps)
        self.sums = Sums(("loss", "steps"), world.device)
        torch.manual_seed(cfg.run.seed + world.rank)
        if state is not None:
            self._load_place(state)
        if cfg.run.start_epoch is not None:
            self.epoch, self.step = cfg.run.start_epoch, 0
        if cfg.model.torch_compile or os.environ.get("TORCH_COMPILE") == "1":
            self.model.compile()
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        for module in (self.model, self.ema.module) if self.ema else (self.model,):
            copy_from_first(module)
        self.start_up.done("model")
        self.train_step = TrainStep(
            self.model,
            self.optimizer,
            self._criterion,
            amp=self.amp,
            average=self.ema,
            gradients=GradientSum(trained) if world.size > 1 else None,
            clip_grad=cfg.optim.clip_grad,
            accum_steps=self.accum_steps,
        )
        self.skipped = 0
        self.pace, self.steps_here, self._settled = Pace(world.size), 0, False
        self._saved: tuple[int, int] | None = None  # the place that the checkpoint holds
        self.control.place = lambda: f"epoch {self.epoch}, step {self.step} of {self.steps}"
        kept = (
            f"saving the place in {self.folder / CHECKPOINT}" if self.folder else "ending; no --output_dir, no saving"
        )
        self.control.promise = f"finishing the step, then {kept}"

    def _loader(self, source: Source, training: bool) -> Loader:
        data, world = self.cfg.data, self.world
        order = Order(
            samples=len(source),
            batch_size=self.batches.batch_size if training else data.eval_batch_size or data.batch_size,
            world=world.size,
            rank=world.rank,
            seed=self.cfg.run.seed,
            repeats=3 if training and data.repeated_aug else 1,
            shuffle=training,
            drop_last=training,
            limit=None if training else self.cfg.run.eval_steps,
            neighbours=training and data.repeated_aug_on == "one-rank",
            node=world.neighbours if training and data.repeated_aug and data.repeated_aug_on == "all-ranks" else 1,
            bounds=source.bounds() if training and data.order == "window" else None,
            window=data.order_window,
        )
        if training:  # whole updates only
            accum, limit = self.batches.accum_steps, self.cfg.run.steps_per_epoch
            updates = order.steps // accum
            if updates == 0 < order.steps:
                held = f"{order.steps} batch{'es' * (order.steps > 1)}"
                raise UserError(f"--accum-steps {accum} is too many for an epoch of {held}; lower it")
            order = replace(order, limit=accum * (updates if limit is None else min(limit, updates)))
        size = self.cfg.model.input_size
        if training:
            view = training_view(
                order,
                world.device,
                self.cfg.augment,
                size=size,
                scale=data.scale,
                ratio=data.ratio,
                flip=data.hflip,
                interpolation=data.train_interpolation,
                group=world.host,
            )
        else:
            # The original evaluates small inputs as they are. For those of another size that means the short side.
            ratio = 1.0 if size <= LARGEST_PADDED else data.eval_crop_ratio
            view = Evaluation(order, world.device, size, CentreCrop(ratio))
        settings = LoaderSettings(
            data.decoder, data.num_workers, data.prefetch, data.readahead, on_bad_image=data.on_bad_image
        )
        loader = Loader(source, view, settings)
        self._loaders.append(loader)
        return loader

    def _autocast(self) -> torch.autocast:
        on_gpu = self.world.device.type == "cuda"
        enabled = self.cfg.run.amp and on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        if on_gpu:
            torch.backends.cudnn.benchmark = True
            torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32; torch leaves this one on
            if self.cfg.run.amp and not enabled:
                self.report.warn("this GPU has no bf16, so the run is in fp32; --no_amp says so without this line")
        self.precision = "bf16 autocast" if enabled else "fp32"
        # A cache of cast weights would outlive the step that it was made in, in a CUDA graph's memory.
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=False)

    def _make_folder(self) -> Path | None:
        if self.folder is not None and self.world.is_main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--output_dir {self.folder} cannot be made ({error.strerror})") from None
            self.cfg.save(self.folder / RESOLVED_CONFIG)
        return self.folder

    # Resuming

    def _resume_path(self) -> Path | None:
        run = self.cfg.run
        own = self.folder / CHECKPOINT if self.folder else None
        if run.resume == "auto":
            if own is None:
                raise UserError("--resume auto looks in --output_dir, which is not given; add it")
            return own if own.exists() else None
        path = Path(run.resume) if run.resume else None
        if run.eval:
            if path is None and self.cfg.finetune.finetune:
                path = Path(self.cfg.finetune.finetune)
            if path is None:
                raise UserError("--eval has nothing to evaluate; add --resume CHECKPOINT")
            return path
        if own is not None and own.exists() and (path is None or path.resolve() != own.resolve()):
            raise UserError(
                f"{own} holds an earlier run, which would be overwritten; continue it with --resume auto, "
                "or choose another --output_dir"
            )
        return path

    def _check_classes(self, data_classes: int, state: dict[str, Any] | None, resume: Path | None) -> int:
        wanted = self.cfg.model.num_classes
        if wanted is not None and wanted != data_classes:
            raise UserError(f"--num-classes is {wanted} and the data has {data_classes} classes; drop the flag")
        head = state["model"].get("head.weight") if state is not None else None
        if head is not None and len(head) != data_classes:
            raise UserError(
                f"{resume} was trained on {len(head)} classes and {self.cfg.data.data_path} has {data_classes}; "
                "point --data-path at the data it belongs to"
            )
        return data_classes

    def _start_from(self, finetune: str) -> None:
        """Weights of another run, if there are any, and what of them is not to be trained."""
        cfg = self.cfg.finetune
        if finetune:
            weights = load_checkpoint(Path(finetune))["model"]
            for line in load_for_finetuning(self.model, weights, finetune, resample=cfg.pos_embed_resample):
                self.report.say(line)
        if line := freeze(self.model, cfg):
            self.report.say(line)

    def _load_models(self, state: dict[str, Any], origin: str) -> None:
        self.report.say(f"{origin}: {weights_held(state)}")
        resample = self.cfg.finetune.pos_embed_resample if self.cfg.run.eval else None
        for line in load_weights(self.model, state["model"], origin, resample=resample):
            self.report.say(line)
        if self.ema is None:
            return
        if isinstance(state.get("model_ema"), dict):
            load_weights(self.ema.module, state["model_ema"], f"the average in {origin}", resample=resample)
        elif self.cfg.run.eval:
            self.ema = None
        else:
            self.ema.module.load_state_dict(self.model.state_dict())
            self.report.warn(f"{origin} holds no averaged weights; the average starts anew from its raw ones")

    def _load_place(self, state: dict[str, Any]) -> None:
        """Optimizer, place in the data, sums and random states; a file with weights alone starts a new run."""
        if "optimizer" not in state or "epoch" not in state:
            return
        try:
            load_optimizer(self.optimizer, self.model, state)
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{self.cfg.run.resume} was trained with another optimizer ({error}); give its --opt"
            ) from None
        self.best_acc1 = float(state.get("best_acc1", 0.0))
        self.epoch, self.step = int(state["epoch"]), int(state.get("step", self.steps))
        if state.get("evaluated", True) and self.step >= state.get("steps", self.steps):
            self.epoch, self.step = self.epoch + 1, 0
        if self.step and (state["steps"], state["global_batch"]) != (self.steps, self.global_batch):
            mend = "the data and --steps-per-epoch as they were"
            if state["global_batch"] != self.global_batch:
                mend = (
                    "processes x --batch-size x --accum-steps as it was, "
                    f"or give --global-batch-size {state['global_batch']}"
                )
            raise UserError(
                f"the checkpoint stands inside an epoch of {state['steps']} steps of {state['global_batch']} pictures, "
                f"this run has {self.steps} of {self.global_batch}; keep {mend}"
            )
        processes = state.get("processes", [])
        if len(processes) != self.world.size:  # sums are the run's, random states a process's own
            totals = [sum(values) for values in zip(*(p["sums"] for p in processes), strict=True)]
            if self.world.is_main and totals and self.step:
                self.sums.values.copy_(torch.tensor(totals, dtype=torch.float64))
            return
        own = processes[self.world.rank]
        if self.step:
            self.sums.values.copy_(torch.tensor(own["sums"], dtype=torch.float64))
        torch.set_rng_state(own["torch"])
        if own["cuda"] is not None and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda"], self.world.device)

    def save(self, *names: str, evaluated: bool = False) -> None:
        """Write the state of the run under each of `names` in the run folder; every process must call it.

        Raises:
            UserError: the gradients are no numbers any more, so the weights are of no use: what is on disk stays.
        """
        if self.folder is None:
            return
        self.control.doing("saving")
        self._check_health()
        cuda = torch.cuda.get_rng_state(self.world.device) if self.world.device.type == "cuda" else None
        own = {"torch": torch.get_rng_state(), "cuda": cuda, "sums": self.sums.values.tolist()}
        processes = dist.gather_objects(own)
        if self.world.is_main:
            state = {
                "model": self.model.state_dict(),
                "model_ema": self.ema.module.state_dict() if self.ema else None,
                "optimizer": self.optimizer.state_dict(),
                "epoch": self.epoch,
                "step": self.step,
                "steps": self.steps,
                "global_batch": self.global_batch,
                "evaluated": evaluated,
                "best_acc1": self.best_acc1,
                "processes": processes,
                "classes": list(self.classes),
                "config": self.cfg.to_dict(),
            }
            for name in names:
                save_checkpoint(self.folder / name, state)
        else:
            self.control.doing("waiting for rank 0 to save")
        dist.barrier()
        self._saved = self.epoch, self.step

    # Running

    def run(self) -> bool:
        """Train to the last epoch (or evaluate, if that is all that was asked for).

        Returns:
            whether it got there; False: it was told to stop, and has saved its place.
        """
        try:
            if self.cfg.run.eval:
                self._evaluate()
            else:
                self._train()
            self.control.promise = "all is done; ending"
        except Stopped:
            self._keep_place()
            return False
        finally:
            self.report.close()
        return True

    def _keep_place(self) -> None:
        if self.cfg.run.eval:
            self.report.say("stopped before the evaluation was complete; there is nothing to save, start it again")
            return
        if self._saved != (self.epoch, self.step):
            self.save(CHECKPOINT)
        kept = f"; {self.folder / CHECKPOINT} holds it, resume with --resume auto" if self.folder else ""
        self.report.say(f"stopped at {self.control.place()}{kept}")

    @contextmanager
    def _memory_for(self, loader: Loader, flag: str, more: str = "") -> Iterator[None]:
        """Too little memory in the block is told with the flag that sets `loader`'s batch."""
        try:
            yield
        except torch.OutOfMemoryError:
            batch = loader.order.batch_size
            raise UserError(
                f"{self.world.device} has too little memory for {batch} pictures a step; "
                f"try {flag} {max(batch // 2, 1)}{more}"
            ) from None

    def _train(self) -> None:
        parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self._tune()
        self.control.doing("preparing the training step")
        self.train_loader.begin(self.epoch, self.step * self.accum_steps)
        with self._training_memory():
            self._capture()
        if self.train_step.seconds is not None:
            self.train_loader.expect(min(dist.gather_objects(self.train_step.seconds)))
        self._introduce(parameters)
        self.start_up.done("capture")
        begin = time.perf_counter()
        while self.epoch < self.cfg.schedule.epochs:
            self._train_epoch()
            self.save(CHECKPOINT)
            self._finish_epoch(parameters)
            self.epoch, self.step = self.epoch + 1, 0
            self.sums.values.zero_()
        self.report.say(f"Training time {duration(time.perf_counter() - begin)}")

    def _kernels(self) -> str:
        """Which run; empty for a model that has no choice of them."""
        tell = getattr(self.model, "kernels", None)
        return "" if tell is None else tell(torch.float32 if self.precision == "fp32" else torch.bfloat16)

    def _tune(self) -> None:
        """Once for a kind of GPU: a process of each host times the kernels, the others wait and read what it found."""
        if self.world.device.type != "cuda":
            return
        if self._kernels() == "gluon" and self.world.local_rank == 0:
            self.control.doing("tuning kernels")
            tune_once(torch.cuda.current_device(), self.report.say)
        else:
            self.control.doing("waiting for rank 0 of its host to tune kernels")
        dist.barrier()
        read_again()
        self.start_up.done("kernels")

    def _introduce(self, parameters: int) -> None:
        cfg, world, decoding = self.cfg, self.world, self.train_loader.settings
        kernels = self._kernels()
        self.report.say(
            f"{cfg.model.model}: {parameters:,} parameters{kernels and f', kernels {kernels}'}, "
            f"{self.precision} on {world.size} x {world.device.type}"
            f"{', steps as a CUDA graph' if self.train_step.captured else ''}; "
            f"{self.train_loader.images:,} pictures of {len(self.classes)} classes "
            f"(decoder {decoding.decoder}, threads {decoding.threads}), "
            f"{len(self.val_source):,} to validate; {self.steps} steps an epoch of {self.global_batch} pictures, "
            f"learning rate {peak_lr(cfg.optim, self.global_batch):.3g}"
        )
        if self.epoch or self.step:
            self.report.say(f"resuming at epoch {self.epoch}, step {self.step} of {self.steps}")

    @property
    def _captures(self) -> bool:
        """Whether steps are to be a CUDA graph: a model has to say that nothing in it depends on the host."""
        wanted = self.world.device.type == "cuda" and self.cfg.model.cuda_graph
        return wanted and getattr(self.model, "capturable", False)

    def _capture(self) -> None:
        """Record the training step as a CUDA graph, before the loader's threads use the GPU too."""
        if not self._captures:
            return
        device, side = self.world.device, self.cfg.model.input_size
        images = torch.zeros(self.batches.batch_size, 3, side, side, device=device)
        labels = torch.zeros(self.batches.batch_size, dtype=torch.int64, device=device)
        self.model.train()
        try:
            images, targets = self.mixup(images, labels, 0)
            self.train_step.capture(self.objective.prepare(images), targets)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            why = " ".join(str(error).split())
            self.report.warn(f"the step cannot be a CUDA graph ({why[:200]}); --no-cuda-graph is the same, unasked")

    def _train_epoch(self) -> None:
        self.model.train()
        run, pace = self.cfg.run, self.pace
        batches = self.train_loader.epoch(self.epoch, self.step * self.accum_steps)
        pace.start()
        before = self.sums.read() if self.step else {"loss": 0.0, "steps": 0.0}
        with self._training_memory(), self.report.steps(f"epoch {self.epoch}", self.steps, self.step):
            while self.step < self.steps:
                if self.control.should_stop():
                    raise Stopped
                self.rate.set(self.epoch, self.step)
                for part in range(self.accum_steps):
                    batch = self._next(pace, batches)
                    self._train_batch(batch, part)
                    pace.count(len(batch.labels))
                self.step += 1
                self.steps_here += 1
                if self.steps_here == 1:
                    self.start_up.done("first batch")
                    self.report.say(str(self.start_up))
                self.report.advance()
                if self.step % run.log_every == 0 or self.step == self.steps:
                    before = self._tell(pace, before)
                if run.save_every and self.step % run.save_every == 0 and self.step < self.steps:
                    self.save(CHECKPOINT)

    def _training_memory(self) -> AbstractContextManager[None]:
        return self._memory_for(self.train_loader, "--batch-size", ", or --use-checkpoint")

    def _next(self, pace: Pace, batches: Iterator[Batch]) -> Batch:
        self.control.doing("waiting for data")
        try:
            batch = pace.wait_for(batches)
            pace.between(self.train_step.end, self.train_loader.ready)
            self.control.doing("training step")
            return batch
        except UserError:  # a picture that cannot be read; the weights are sound, so keep them
            if self.world.size == 1:  # of several, the others are inside the step by now, and wait for this one
                self.save(CHECKPOINT)
            raise

    def _train_batch(self, batch: Batch, part: int) -> None:
        """Batch `part` of the `accum_steps` of this step."""
        number = (self.epoch * self.steps + self.step) * self.accum_steps + part
        images, targets = self.mixup(batch.images, batch.labels, number)
        images, last = self.objective.prepare(images), part == self.accum_steps - 1
        loss, sound = self.train_step(images, targets, first=part == 0, last=last)
        self.sums.add(torch.where(sound > 0, loss, 0), sound)

    def _criterion(self, images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        return self.objective(images, logits, targets)

    def _tell(self, pace: Pace, before: dict[str, float]) -> dict[str, float]:
        """Report the steps since `before`; returns the sums for the next report."""
        now = self.sums.read()
        self._check_health()
        sound = now["steps"] - before["steps"]
        loss = (now["loss"] - before["loss"]) / sound if sound else math.nan
        speed = pace.report()
        left = (self.cfg.schedule.epochs - self.epoch) * self.steps - self.step
        memory = memory_gib(self.world.device)
        self.report.news(
            f"epoch {self.epoch} [{self.step}/{self.steps}]",
            f"loss {loss:.4f} lr {self.rate.value:.3g} "
            f"{speed['img_s']:,.0f} img/s, waiting for data {speed['data_share']:.0%}, {memory:.1f} GiB, "
            f"{duration(left * speed['step_s'])} left",
        )
        scalars = {"train/loss": loss, "train/lr": self.rate.value, "train/img_s": speed["img_s"]}
        scalars |= {"train/data_share": speed["data_share"], "train/memory_gib": memory}
        self.report.scalars(scalars, self.epoch * self.steps + self.step)
        self._reconsider(speed["data_share"])
        pace.start()
        return now

    def _reconsider(self, data_share: float) -> None:
        """Once, when the run has found its pace: let another decoder try if the slowest process waits for this one."""
        if self._settled or self.steps_here < SETTLED_AFTER:
            return
        self._settled = True
        waits = max(dist.gather_objects(data_share))
        if waits <= TOLERATED:
            return
        before = self.train_loader.settings.decoder
        if decoder := self.train_loader.reconsider():
            self.report.say(f"training waits {waits:.0%} of its time for --decoder {before}; {decoder} from here on")

    def _check_health(self) -> None:
        """Tell of skipped steps; end a run that does nothing but skip. Gradients are the same on all processes."""
        health = self.train_step.health()
        first = f", first in {', '.join(health.names[:3])}" if health.names else ""
        where = f"epoch {self.epoch}, step {self.step}, learning rate {self.rate.value:.3g}{first}"
        limit = min(self.cfg.optim.skip_limit, self.steps)
        if health.in_a_row >= limit:
            own = self.folder / CHECKPOINT if self.folder else None
            kept = f"; {own} is from before" if own is not None and own.exists() else ""
            raise UserError(
                f"the gradients of {health.in_a_row} steps in a row are no numbers, by {where}; "
                f"try a lower --lr, --clip-grad 1 or --no_amp{kept}"
            )
        if health.skipped > self.skipped:
            self.report.warn(f"{health.skipped - self.skipped} steps skipped, their gradients no numbers, by {where}")
            self.skipped = health.skipped

    def _finish_epoch(self, parameters: int) -> None:
        trained = self.sums.read()
        scores = self._evaluate()
        acc1 = scores[""].acc1
        best = acc1 > self.best_acc1
        self.best_acc1 = max(self.best_acc1, acc1)
        record: dict[str, Any] = {
            "train_lr": self.rate.value,
            "train_loss": trained["loss"] / trained["steps"],
        }
        for whose, found in scores.items():
            record |= {f"{whose}test_{name}": value for name, value in found._asdict().items() if name != "images"}
        self.report.say(f"Max accuracy: {self.best_acc1:.2f}%")
        self.report.record({**record, "epoch": self.epoch, "n_parameters": parameters})
        self.report.scalars({f"epoch/{k}": v for k, v in record.items()}, self.epoch)
        self.save(*([BEST, CHECKPOINT] if best else [CHECKPOINT]), evaluated=True)

    def _evaluate(self) -> dict[str, Scores]:
        """Of the weights (``""``) and of their average (``"ema_"``), as the record of an epoch names them."""
        models = {"": self.model, **({"ema_": self.ema.module} if self.ema is not None else {})}
        for model in models.values():
            copy_from_first(model, buffers_only=True)  # running statistics, of which each process has its own
        with self._memory_for(self.val_loader, "--eval-batch-size"):
            found = evaluate(list(models.values()), self.val_loader, self.amp, self.report, self.control)
        scores = dict(zip(models, found, strict=True))
        for whose, own in scores.items():
            self.report.say(f"{own} ({'averaged' if whose else 'raw'} weights)")
            name = "ema network" if whose else "network"
            self.report.say(f"Accuracy of the {name} on the {own.images} test images: {own.acc1:.1f}%")
        return scores

    # Ending

    def close(self, failing: bool = False) -> None:
        """Let go of the GPU: CUDA graphs, then loaders.

        Graphs have to go before the process group does: NCCL's end, in peace or not, waits for the last graph that has
        a collective in it. A process that fails gives up no more than them, as all else may wait for the device, and
        the device for a process that is gone.
        """
        self.control.doing("closing")
        if hasattr(self, "train_step"):
            self.train_step.forget()
        if failing:
            return
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        for loader in self._loaders:
            loader.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.close(failing=kind is not None)


def _build_model(cfg: Config, num_classes: int) -> nn.Module:
    m = cfg.model
    model = create_model(
        m.model,
        num_classes=num_classes,
        img_size=m.input_size,
        drop_rate=m.drop,
        drop_path_rate=m.drop_path,
        scan_backend=m.scan_backend,
        **m.options(),
    )
    if m.use_checkpoint:
        switch = getattr(model, "set_grad_checkpointing", None)
        if switch is None:
            raise UserError(f"{m.model} cannot recompute its activations; drop --use-checkpoint")
        switch()
    return model
