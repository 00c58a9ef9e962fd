"""A GPU that waits for its data: another decoder is tried, and what is slow is said with the flag that helps."""

from __future__ import annotations

from typing import NamedTuple

from vimfast import dist
from vimfast.config import DataConfig
from vimfast.data.hardware import available_cores
from vimfast.data.loader import Loader
from vimfast.data.mixed import in_stores
from vimfast.data.source import ShardSource
from vimfast.train.loop import Place, TrainingRun
from vimfast.train.pace import Stretch

SETTLED_AFTER = 100  # steps after which a pace is known
TOLERATED = 0.03  # of the time, spent waiting for data; beyond it another decoder is tried
TOLD = 0.05  # of the time; beyond it, what is slow is said


class Waited(NamedTuple):
    """How a process waited for data between two reports."""

    share: float  # of the time; on a GPU, of the GPU's
    reading: float  # share of the host's waiting that was for bytes rather than for decoding
    advice: tuple[str, str]  # where reading is what it waits for, and where decoding is


class DataWaits:
    """Looks at the waiting once an epoch, when its pace is known."""

    def __init__(self, run: TrainingRun, data: DataConfig) -> None:
        self._run, self._data = run, data
        self._steps, self._epoch = 0, -1  # since the last look, and the epoch of it
        self._loader: Loader | None = None  # of the last look
        self._read_before = 0.0  # seconds
        self._suspected, self._tried, self._told = False, False, False
        self._before: tuple[str, float] | None = None  # the decoder before the one on trial, and the share that waited

    def after_step(self) -> None:
        """A step was queued."""
        self._steps += 1

    def look(self, share: float, stretch: Stretch, place: Place) -> None:
        """With each report, its share of the time spent waiting; every process must call it at the same step."""
        loader = self._run.loader
        if loader is not self._loader:  # at first, and in each stage
            self._loader, self._read_before, self._before = loader, 0.0, None
        read, self._read_before = loader.read_waits - self._read_before, loader.read_waits
        if self._steps < SETTLED_AFTER or place.epoch == self._epoch or self._told or place.step >= place.steps:
            return
        advice = reading_advice(self._data, loader), decoding_advice(self._data, loader)
        own = Waited(share, read / max(stretch.waited, 1e-9), advice)
        worst = max(dist.gather_objects(own))
        suspected, self._suspected = self._suspected, worst.share > TOLERATED
        if self._suspected and not suspected:
            return  # a checkpoint, or the beginning of an epoch, holds one report up; the next one is looked at too
        self._suspected = False
        self._steps, self._epoch = 0, place.epoch
        if self._before is not None:
            (decoder, waited), self._before = self._before, None
            if worst.share > waited:
                self._decode_by(decoder, worst.share, waited)
                return
        if worst.share > TOLERATED and not self._tried:
            self._tried = True
            if self._try_another_decoder(worst.share):
                self._epoch = -1  # it is looked at again in this epoch
                return
        on_gpu, by_reading = self._run.world.device.type == "cuda", worst.reading > 0.5
        if worst.share > TOLD and (on_gpu or by_reading):  # on a CPU, decoding takes the cores that training takes
            self._told = True
            stage, helps = ("reading", worst.advice[0]) if by_reading else ("decoding", worst.advice[1])
            what = f"{'the GPU' if on_gpu else 'training'} waits {worst.share:.0%} of its time for data"
            self._run.report.say(f"{what}: {stage} is slow; {helps}")

    def _try_another_decoder(self, share: float) -> bool:
        """Returns: whether any process does; one whose cores are enough may have another decoder than the others."""
        loader = self._run.loader
        before = loader.settings.decoder
        if decoder := loader.reconsider():
            self._run.report.say(
                f"training waits {share:.0%} of its time for --decoder {before}; {decoder} from now on"
            )
        changed = any(dist.gather_objects(decoder is not None))
        self._before = (before, share) if changed else None
        return changed

    def _decode_by(self, decoder: str, share: float, waited: float) -> None:
        """Return to a decoder for which training waited less."""
        tried = self._run.loader.settings.decoder
        if decoder == tried:  # other processes tried another one
            return
        self._run.loader.reconsider(decoder)
        self._run.report.say(
            f"it waits {share:.0%} for --decoder {tried}, and waited {waited:.0%} before; {decoder} again from now on"
        )


def reading_advice(data: DataConfig, loader: Loader) -> str:
    """What helps where the bytes of images come too late."""
    if in_stores(data.data_path):
        return "the store sends shards too slowly; a cache that holds all of them (--cache-size) reads each only once"
    if isinstance(loader.source, ShardSource):
        return f"--readahead {4 * data.readahead} asks the disk earlier; a faster disk, or more memory, helps too"
    return "vimfast prepare makes shards of the folder, of which a disk reads many images at once"


def decoding_advice(data: DataConfig, loader: Loader) -> str:
    """What helps where images are decoded too slowly."""
    smaller = "vimfast prepare --resize 256 makes images that decode three times as fast"
    threads, cores = loader.settings.threads, available_cores()
    if data.num_workers is not None and threads < cores:
        return f"--num-workers {cores} uses all cores of this process; {smaller}"
    if loader.settings.on_gpu and loader.settings.decoder == "cpu":
        return f"--decoder cuda has the GPU decode too; {smaller}"
    return f"more cores than {cores} for this process; {smaller}"
