"""The loaders of a run, made from its settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from vimfast.augment.recipe import Recipe, evaluation_crop, training_crop
from vimfast.checkpoint import Loaded
from vimfast.config import Batches, Config, DataConfig
from vimfast.data.cache import CacheSettings
from vimfast.data.loader import Loader, LoaderSettings
from vimfast.data.mixed import in_stores
from vimfast.data.order import Order
from vimfast.data.relabelling import numbered, open_mapped
from vimfast.data.source import Source
from vimfast.data.views import Evaluation, Stage, Stages, crop_view
from vimfast.dist import World
from vimfast.errors import UserError, counted
from vimfast.image_size import ImageSize
from vimfast.train.continuity import check_classes, check_every_class
from vimfast.train.report import Reporter


def open_validation(cfg: Config, batch_size: int, world: World, start: Loaded | None, report: Reporter) -> Loader:
    """The loader of the validation images; they are of the classes of the checkpoint that the run starts from.

    Raises:
        UserError: they are not, or the data cannot be used.
    """
    data, size = cfg.data, cfg.model.size
    source = open_mapped(data.data_path, "val", data.class_map, cache_settings(data))
    state, origin = (None, "") if start is None else (start.state, str(start.path))
    check_classes(source.classes, cfg.model.num_classes, state, origin, data.data_path)
    order = Order(
        samples=len(source),
        batch_size=data.eval_batch_size or batch_size,
        world=world.size,
        rank=world.rank,
        seed=cfg.run.seed,
        shuffle=False,
        drop_last=False,
        limit=cfg.run.eval_steps,
    )
    # The original evaluates small inputs as they are; images of another size are resized by their short side.
    crop = evaluation_crop(size, data.eval_crop_ratio)
    return Loader(source, Evaluation(order, world.device, size, crop), _settings(data, report))


def open_training_source(cfg: Config, classes: Sequence[str] | None = None) -> Source:
    """The training images.

    Args:
        classes: of the validation images; None: their own.

    Raises:
        UserError: the training images are of others, or cannot be used.
    """
    data = cfg.data
    source = open_mapped(data.data_path, "train", data.class_map, cache_settings(data))
    classes = source.classes if classes is None else classes
    if list(source.classes) != list(classes):
        problem = f"train has {len(source.classes)} classes and val has {len(classes)}"
        if len(source.classes) == len(classes):
            pairs = zip(source.classes, classes, strict=True)
            number, (here, there) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
            problem = f"class {number} is {here!r} in train and {there!r} in val"
        raise UserError(problem, f"check them with vimfast check {data.data_path}")
    if not data.class_map:  # which may have the classes of other data
        check_every_class(classes, source.class_counts(), data.data_path)
    if not cfg.mix.soft_targets:
        return source
    if in_stores(data.data_path):
        raise UserError(
            f"--soft-targets needs the name of each of {len(source):,} images, and {data.data_path} would be asked for "
            "every one of them",
            "copy the shards to a disk, and give that as --data-path",
        )
    return numbered(source)


def fit_order(cfg: Config, source: Source, report: Reporter) -> Config:
    """The settings, with an order of images for which their cache is large enough."""
    data, widest = cfg.data, source.widest_window
    if widest is None or (data.order == "window" and data.order_window <= widest):
        return cfg
    order = f"--order window --order-window {widest}"
    report.say(
        f"--cache-size {data.cache_size} cannot hold all shards: {order}, so that half of it is for the next ones"
    )
    return replace(cfg, data=replace(data, order="window", order_window=widest))


def open_training(
    source: Source,
    cfg: Config,
    batches: Batches,
    world: World,
    report: Reporter,
    *,
    final_size: ImageSize | None = None,
    stage: Stages | None = None,
    stop: Callable[[UserError], None] | None = None,
    computed: bool | None = None,
) -> Loader:
    """The loader of the training images, with the settings of a run or of one of its stages.

    Args:
        final_size: the run's, which decides how all its stages crop; None: that of the settings.
        stage: of an epoch; None: the settings', in all epochs.
        stop: as :class:`LoaderSettings` has it.
        computed: as :class:`Order` has it.

    Raises:
        UserError: they are too few, or a setting is out of its range.
    """
    data, size = cfg.data, cfg.model.size
    last = cfg.schedule.epochs - 1  # beyond which batches are still read ahead
    own = Stage(size, Recipe(cfg.augment, data.train_interpolation))
    view = crop_view(
        _training_order(cfg, source, batches, world, computed),
        world.device,
        training_crop(cfg.augment, size, data.scale, data.ratio, final_size),
        (lambda epoch: own) if stage is None else (lambda epoch: stage(min(epoch, last))),
        flip=data.hflip,
        interpolation=data.train_interpolation,
        group=world.host,
    )
    return Loader(source, view, replace(_settings(data, report), stop=stop))


def _training_order(cfg: Config, source: Source, batches: Batches, world: World, computed: bool | None) -> Order:
    """Of whole updates only."""
    data, accum = cfg.data, batches.accum_steps
    order = Order(
        samples=len(source),
        batch_size=batches.batch_size,
        world=world.size,
        rank=world.rank,
        seed=cfg.run.seed,
        repeats=3 if data.repeated_aug else 1,
        neighbours=data.repeated_aug_on == "one-rank",
        node=world.node if data.repeated_aug and data.repeated_aug_on == "all-ranks" else 1,
        bounds=source.bounds() if data.order == "window" else None,
        window=data.order_window,
        computed=computed,
        mixture=source.mixture,
    )
    updates = order.steps // accum
    if updates == 0 < order.steps:
        if (wanted := cfg.optim.global_batch_size) is not None:  # where --accum-steps is not what was given
            images = order.steps * order.global_batch
            raise UserError(
                f"an update takes {wanted:,} images (--global-batch-size) and an epoch has {images:,}",
                f"give --global-batch-size {images} or less",
            )
        count = counted(order.steps, "batch")
        raise UserError(f"--accum-steps {accum} is more than the {count} of an epoch", "lower it")
    limit = cfg.run.steps_per_epoch
    return replace(order, limit=accum * (updates if limit is None else min(limit, updates)))


def cache_settings(data: DataConfig) -> CacheSettings:
    """Where the shards of a store are kept."""
    return CacheSettings(data.cache_dir, data.cache_bytes)


def _settings(data: DataConfig, report: Reporter) -> LoaderSettings:
    return LoaderSettings(
        data.decoder,
        data.num_workers,
        data.prefetch,
        data.readahead,
        on_bad_image=data.on_bad_image,
        report=report.warn if report.active else None,  # others than rank 0 have stderr alone
    )
