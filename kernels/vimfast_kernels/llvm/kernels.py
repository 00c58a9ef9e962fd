"""The kernels. In a convolution and a scan, a piece of work is as many channels of an image as a vector has."""

from __future__ import annotations

from dataclasses import dataclass

from vimfast_kernels.llvm.arithmetic import LOG2E, exp2, exp2_of_negative, silu, softplus
from vimfast_kernels.llvm.language import Code, Value, Variable

ROWS = 16  # of a norm in a piece of work


def _of_ways(names: tuple[str, ...], ways: int) -> tuple[str, ...]:
    return tuple(f"{name}_{k}" for k in range(ways) for name in names)


@dataclass(frozen=True)
class Norm:
    """total = residual + x; out = norm(total) weight + bias, for rows of x [rows, channels]."""

    rms: bool
    residual: bool
    bias: bool

    @property
    def names(self) -> tuple[str, ...]:
        return "rows", "channels", "x", "residual", "weight", "bias", "constants", "total", "out"

    def write(self, code: Code) -> None:
        a = {name: code.argument(name) for name in self.names}
        channels, lanes, rows = a["channels"], code.integer(code.lanes), code.integer(ROWS)
        eps, share = code.load_one(a["constants"], 0), code.load_one(a["constants"], 1)  # share: 1 / channels
        tiles = channels // lanes
        with code.work((a["rows"] + (ROWS - 1)) // rows) as piece:
            first = piece * rows
            last = code.where(first + ROWS < a["rows"], first + ROWS, a["rows"])
            with code.loop(first, last) as row:
                start = row * channels
                total, squares = Variable(code.splat(0.0)), Variable(code.splat(0.0))
                with code.loop(0, tiles) as tile:
                    at = start + tile * lanes
                    v = code.load(a["x"], at)
                    if self.residual:
                        v = v + code.load(a["residual"], at)
                    code.store(v, a["total"], at)
                    total.set(total.get() + v)
                    squares.set(squares.get() + v * v)
                mean = code.splat(0.0)
                if not self.rms:
                    mean = code.total(total.get()) * share
                    squares.set(code.splat(0.0))
                    with code.loop(0, tiles) as tile:
                        v = code.load(a["total"], start + tile * lanes) - mean
                        squares.set(squares.get() + v * v)
                factor = code.splat(1.0) / code.sqrt(code.total(squares.get()) * share + eps)
                with code.loop(0, tiles) as tile:
                    c = tile * lanes
                    v = (code.load(a["total"], start + c) - mean) * factor * code.load(a["weight"], c)
                    if self.bias:
                        v = v + code.load(a["bias"], c)
                    code.store(v, a["out"], start + c)


@dataclass(frozen=True)
class Conv:
    """out [k, b, L, d]: the causal convolution of x [b, L, d] in each direction, and SiLU."""

    reverse: tuple[bool, ...]
    taps: int
    bias: bool

    _SHARED = ("batch", "length", "channels", "x", "x_batch", "x_time", "out")
    _OWN = ("weight", "bias")

    @property
    def names(self) -> tuple[str, ...]:
        return self._SHARED + _of_ways(self._OWN, len(self.reverse))

    def write(self, code: Code) -> None:
        batch, length, channels, x, x_batch, x_time, out = map(code.argument, self._SHARED)
        lanes = code.integer(code.lanes)
        tiles = channels // lanes
        with code.work(batch * tiles) as piece:
            image, c = piece // tiles, piece % tiles * lanes
            source = image * x_batch + c
            for k, back in enumerate(self.reverse):
                weight, bias = (code.argument(f"{name}_{k}") for name in self._OWN)
                filters = [code.load_every(weight, c * self.taps + tap, self.taps) for tap in range(self.taps)]
                base = code.load(bias, c) if self.bias else code.splat(0.0)
                target = (batch * k + image) * length * channels + c
                seen = [Variable(code.splat(0.0)) for _ in filters[1:]]  # the last x, oldest first
                with code.loop(0, length) as i:
                    t = length - i - 1 if back else i
                    window = [*(v.get() for v in seen), code.load(x, source + t * x_time)]
                    total = base
                    for w, v in zip(filters, window, strict=True):
                        total = total + w * v
                    code.store(silu(code, total), out, target + t * channels)
                    for place, v in zip(seen, window[1:], strict=True):
                        place.set(v)


@dataclass(frozen=True)
class Scan:
    """out [b, L, d]: the selective scans of all directions, their sum, and the gate.

    Args:
        rank: of the time steps, products of delta [b, L, rank] and weight [d, rank]; 0: delta [b, L, d] is they.
        log: rates are given as A_log, A = -exp(A_log).
        skip, bias, gate: whether there are D, bias and z.
    """

    reverse: tuple[bool, ...]
    states: int
    rank: int
    log: bool
    skip: bool
    bias: bool
    gate: bool

    _SHARED = (
        *("batch", "length", "channels", "u_batch", "u_time", "delta_batch", "delta_time", "states_batch"),
        *("states_time", "z", "z_batch", "z_time", "scale", "out"),
    )
    _OWN = ("u", "delta", "weight", "A", "B", "C", "D", "bias")

    @property
    def names(self) -> tuple[str, ...]:
        return self._SHARED + _of_ways(self._OWN, len(self.reverse))

    def write(self, code: Code) -> None:
        a = {name: code.argument(name) for name in self._SHARED}
        lanes = code.integer(code.lanes)
        tiles = a["channels"] // lanes
        scratch = code.scratch(self.states), code.scratch(max(self.rank, 1))
        with code.work(a["batch"] * tiles) as piece:
            image, c = piece // tiles, piece % tiles * lanes
            for k, back in enumerate(self.reverse):
                own = a | {name: code.argument(f"{name}_{k}") for name in self._OWN}
                self._direction(code, own, k, back, image, c, scratch)

    def _direction(
        self, code: Code, a: dict[str, Value], k: int, back: bool, image: Value, c: Value, scratch: tuple[Value, Value]
    ) -> None:
        rates, weights = scratch
        decay_of = exp2_of_negative if self.log else exp2  # the rates that a model learns are negative
        self._unpack(code, a, c, rates, weights)
        length, channels = a["length"], a["channels"]
        skip = code.load(a["D"], c) if self.skip else code.splat(0.0)
        base = code.load(a["bias"], c) if self.bias else code.splat(0.0)
        state = [Variable(code.splat(0.0)) for _ in range(self.states)]
        with code.loop(0, length) as i:
            t = length - i - 1 if back else i
            row = image * a["states_batch"] + t * a["states_time"]
            u = code.load(a["u"], image * a["u_batch"] + t * a["u_time"] + c)
            dt = softplus(code, self._delta(code, a, image * a["delta_batch"] + t * a["delta_time"], c, weights) + base)
            dtu = dt * u
            y = [skip * u, *[code.splat(0.0)] * 3]  # four sums, so that none waits for the one before
            for n, h in enumerate(state):
                decay = decay_of(code, dt * code.load(rates, n * code.lanes))
                h.set(decay * h.get() + dtu * code.load_one(a["B"], row + n))
                y[n % 4] = y[n % 4] + h.get() * code.load_one(a["C"], row + n)
            total = (y[0] + y[1]) + (y[2] + y[3])
            here = (image * length + t) * channels + c
            if k > 0:
                total = total + code.load(a["out"], here)
            if k == len(self.reverse) - 1:
                total = total * code.load_one(a["scale"], 0)
                if self.gate:
                    total = total * silu(code, code.load(a["z"], image * a["z_batch"] + t * a["z_time"] + c))
            code.store(total, a["out"], here)

    def _unpack(self, code: Code, a: dict[str, Value], c: Value, rates: Value, weights: Value) -> None:
        """Rates in units of ln 2, and weights of the time steps, a vector for each state and for each rank."""
        with code.loop(0, self.states) as n:
            v = code.load_every(a["A"], c * self.states + n, self.states)
            v = 0.0 - exp2(code, v * LOG2E) if self.log else v
            code.store(v * LOG2E, rates, n * code.lanes)
        if self.rank:
            with code.loop(0, self.rank) as r:
                v = code.load_every(a["weight"], c * self.rank + r, self.rank)
                code.store(v, weights, r * code.lanes)

    def _delta(self, code: Code, a: dict[str, Value], at: Value, c: Value, weights: Value) -> Value:
        if not self.rank:
            return code.load(a["delta"], at + c)
        sums = [code.splat(0.0)] * 2
        for r in range(self.rank):
            sums[r % 2] = sums[r % 2] + code.load_one(a["delta"], at + r) * code.load(weights, r * code.lanes)
        return sums[0] + sums[1]
