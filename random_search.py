"""Random search over hyperparameters in PyTorch: one file, trials trained side by side.

    python random_search.py --task regression --trials 1000 --log trials.jsonl --save best.pt
    torchrun --standalone --nproc-per-node=2 -- random_search.py --trials 10000

Trials of one shape are one stack: parameters have a leading trial dimension, and one batched
product serves them all. What is random about a trial is a function of (seed, trial number): on the
CPU its score is the same bit for bit alone, in any stack, on any number of processes.
"""

import argparse
import copy
import fcntl
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

# Without it MKL picks kernels by memory alignment, and last bits would depend on the stack.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

# ---- What you edit: the space, the tasks, the model --------------------------------------------

# A value is a sequence (each element equally likely) or a function of a numpy.random.Generator.
HYPERPARAMS = {
    "lr": np.linspace(0.001, 0.1, 100),
    "batch_size": [16, 32, 64, 128],
    "hidden_size": [32, 64, 128, 256],
    "num_layers": [1, 2, 3, 4],
    "dropout": np.linspace(0.1, 0.5, 5),
}


class Task(NamedTuple):
    x: Sequence  # [rows, features], or [rows] for one feature; standardised by the training rows
    y: Sequence  # [rows, outputs], or [rows] for one output, or [rows] labels below classes
    loss: Callable  # of torch.nn.functional; called with reduction="none"
    held_out: slice | Sequence[int] | None = slice(4, None, 5)  # rows to score; None: all do both
    classes: int | None = None  # makes y integer labels
    predict: Callable = lambda outputs: outputs  # what the report shows of the model's outputs


def binary_cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "none") -> Tensor:
    """F's ..._with_logits, but a value's last bits do not depend on its place in the array."""
    size = logits.abs()
    return size / 2 + (0.5 - targets) * logits + torch.log1p(torch.exp(-size))


XOR = [[0, 0], [0, 1], [1, 0], [1, 1]]
ARTICLE_X = "3.3 4.4 5.5 6.71 6.93 4.168 9.779 6.182 7.59 2.167 7.042 10.791 5.313 7.997 3.1"
ARTICLE_Y = "1.7 2.76 2.09 3.19 1.694 1.573 3.366 2.596 2.53 1.221 2.827 3.465 1.65 2.904 1.3"
TASKS = {
    "xor": Task(XOR, [0, 1, 1, 0], binary_cross_entropy, held_out=None, predict=torch.sigmoid),
    "regression": Task(ARTICLE_X.split(), ARTICLE_Y.split(), F.mse_loss, slice(2, None, 3)),
}


def build_model(inputs: int, outputs: int, hidden_size: int, num_layers: int, dropout: float):
    """An ordinary model of one trial; build_stack stacks its Linear and Dropout layers."""
    layers = []
    for _ in range(num_layers):
        layers += [nn.Linear(inputs, hidden_size), nn.ReLU(), nn.Dropout(dropout)]
        inputs = hidden_size
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


# ---- A trial: its hyperparameters and its random numbers ---------------------------------------


@dataclass
class Trial:
    number: int
    hyperparams: dict
    seed: int  # 64 bits for all that is random in its training, a function of (seed, number)
    score: float = math.nan  # higher is better; NaN: diverged
    logged: bool = False  # read from a log, not run now


class InputError(ValueError):
    """One line that says which input is wrong, and how."""


def check(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)


def sample_hyperparams(space: dict, seed: int, trial: int) -> dict:
    """One trial's hyperparameters as plain Python values, a function of (seed, trial)."""
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(trial, 0)))
    sample = {}
    for name, values in space.items():
        check(callable(values) or len(values) > 0, f"space: {name!r} has no values")
        value = values(generator) if callable(values) else values[generator.integers(len(values))]
        sample[name] = value.item() if isinstance(value, np.generic) else value
    return sample


def sample_trial(space: dict, seed: int, number: int) -> Trial:
    words = np.random.SeedSequence(seed, spawn_key=(number, 1)).generate_state(1, np.uint64)
    return Trial(number, sample_hyperparams(space, seed, number), words.item())


def random_bits(keys: Tensor, count: int, first: int = 0) -> Tensor:
    """Random int32 [..., count] under each of keys, int32 [..., 2], for counters from first on.

    A multiply-and-shift hash (constants: lowbias32 by C. Wellons) is the same on every device and
    needs no generator a trial. The masks make int32's arithmetic shift a logical one.
    """
    bits = torch.arange(first, first + count, dtype=torch.int32, device=keys.device) ^ keys[..., :1]
    bits *= 0x7FEB352D
    bits ^= (bits >> 15).bitwise_and_(0x1FFFF)
    bits += keys[..., 1:]
    bits *= 0x846CA68B - 2**32
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    return bits


def derive_keys(keys: Tensor, count: int, first: int = 0) -> Tensor:
    """Keys [count, trials, 2] for streams first, first + 1, ... of each of keys [trials, 2]."""
    return random_bits(keys, 2 * count, 2 * first).view(-1, count, 2).transpose(0, 1)


# ---- A stack: trials of one shape, trained side by side ----------------------------------------

TRAINING = ("lr", "batch_size")  # what train_stack reads; the rest are build_model's arguments
PER_TRIAL = ("lr", "dropout")  # what may differ in a stack
STACK_BYTES = 16 * 2**20  # on a CPU: what one step touches should stay in its caches
SCORED_ROWS = 256  # evaluated at a time, to bound memory
MASK_FLOATS = 2**17  # dropout masks made at a time, to share the cost of the calls


class LinearStep(torch.autograd.Function):
    """A linear layer for each trial that takes its SGD step on the way back.

    Each loss comes scaled by its trial's lr, so the gradient is the step. No weight gradient is
    ever stored: moving weights through memory is what costs most in nets of this size.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        grad_x = grad.bmm(weight) if ctx.needs_input_grad[0] else None  # before the step
        weight.baddbmm_(grad.mT, x, alpha=-1)
        bias.sub_(grad.sum(1))
        return grad_x, None, None


class StackedLinear(nn.Module):
    """nn.Linear for [trials, rows, inputs], with its initial distribution."""

    def __init__(self, inputs: int, outputs: int, keys: Tensor):
        super().__init__()
        bits = random_bits(keys, (inputs + 1) * outputs)
        weight, bias = ((bits >> 8) * (2**-23 / math.sqrt(inputs))).split(inputs * outputs, dim=1)
        # A weight with gaps would take another kernel, one trial after another.
        self.weight = nn.Parameter(weight.reshape(-1, outputs, inputs).contiguous())
        self.bias = nn.Parameter(bias.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return LinearStep.apply(x, self.weight, self.bias)


class StackedDropout(nn.Module):
    """nn.Dropout for [trials, rows, features]: each trial has its own rate and its own masks."""

    def __init__(self, rates: list[float], keys: Tensor):
        super().__init__()
        self.keys, self.step, self.shape, self.masks = keys, 0, None, []
        rate = torch.tensor(rates, dtype=torch.float64).unsqueeze(1)
        self.threshold = (rate * 2**32 - 2**31).clamp(max=2**31 - 1).int().to(keys.device)
        self.scale = (1 / (1 - rate)).float().to(keys.device)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if not self.masks:  # make those of several steps at once
            self.shape = self.shape or x.shape  # of the first batch: no later one is larger
            steps = max(1, MASK_FLOATS // self.shape.numel())
            keys = derive_keys(self.keys, steps, self.step)
            kept = random_bits(keys, self.shape[1:].numel()) >= self.threshold
            self.masks = list((kept * self.scale).view(steps, *self.shape))
            self.step += steps
        return x * self.masks.pop(0)[:, : x.shape[1]]


def prepare(name: str, device: torch.device | str = "cpu") -> dict:
    """A task's rows on a device: "train" and "scored", each x [rows, features] and y."""
    task = TASKS[name]
    try:
        x, y = np.asarray(task.x, np.float32), np.asarray(task.y, np.float32)
        check(len(x) == len(y) > 0, f"x has {len(x)} rows, y has {len(y)}")
        check(np.isfinite(x).all() and np.isfinite(y).all(), "there is NaN or infinity in x or y")
        check(task.loss is not F.cross_entropy or task.classes, "cross_entropy needs classes")
        labels = range(task.classes or 2)
        is_label = task.classes or task.loss is binary_cross_entropy
        check(not is_label or np.isin(y, labels).all(), f"y must be labels, 0 to {labels[-1]}")
        held_out = np.zeros(len(x), bool)
        held_out[slice(0) if task.held_out is None else task.held_out] = True
        train, scored = ~held_out, ~held_out if task.held_out is None else held_out
        check(train.any() and scored.any(), "held_out is empty, or all rows are in it")
    except (ValueError, TypeError, IndexError) as error:
        raise InputError(f"task {name!r}: x, y or held_out: {error}") from None
    x, y = (torch.from_numpy(values.reshape(len(x), -1)) for values in (x, y))
    y = y.flatten().long() if task.classes else y
    standardise = nn.BatchNorm1d(x.shape[1], eps=0, affine=False).eval()
    variance, standardise.running_mean = torch.var_mean(x[train], 0, correction=0)
    standardise.running_var = variance.where(variance > 0, 1.0)
    x, sizes = standardise(x), {"inputs": x.shape[1], "outputs": task.classes or y.shape[1]}
    parts = {"train": train, "scored": scored}.items()
    rows = {part: (x[rows].to(device), y[rows].to(device)) for part, rows in parts}
    return {"task": task, "standardise": standardise, "sizes": sizes, **rows}


@functools.lru_cache(maxsize=4096)
def build_plain(inputs: int, outputs: int, **arguments) -> nn.Sequential:
    """Standardisation and build_model's model on the meta device: no values, no random numbers."""
    with torch.device("meta"):
        model = nn.Sequential(nn.BatchNorm1d(inputs, eps=0, affine=False))
        model.append(build_model(inputs, outputs, **arguments))
    for layer in model[1].modules():
        known = type(layer) is nn.Dropout or (type(layer) is nn.Linear and layer.bias is not None)
        other = isinstance(layer, nn.modules.dropout._DropoutNd) or [*layer.parameters(False)]
        check(known or not other, f"{layer} does not stack; nn.Dropout and nn.Linear with bias do")
    return model.eval()


def plain_model(hyperparams: dict, sizes: dict) -> nn.Sequential:
    """The cached model of these hyperparameters; InputError if they cannot be."""
    arguments = {name: value for name, value in hyperparams.items() if name not in TRAINING}
    try:
        check(hyperparams["lr"] > 0 and range(hyperparams["batch_size"]), "one must be above 0")
        return build_plain(**sizes, **arguments)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"HYPERPARAMS {hyperparams}: {str(error).splitlines()[0]}") from None


def make_stacks(trials: list[Trial], data: dict) -> list[list[Trial]]:
    """Group the trials that can train together, as many in a stack as memory allows."""
    (x, _), groups, stacks, memory = data["train"], {}, [], STACK_BYTES
    if x.device.type != "cpu":
        memory = torch.accelerator.get_memory_info(x.device)[0] // 4
    for trial in trials:
        model = plain_model(trial.hyperparams, data["sizes"])
        batch_size = min(trial.hyperparams["batch_size"], len(x))
        rows = max(batch_size, min(SCORED_ROWS, len(data["scored"][0])))
        floats = sum(p.numel() + 4 * rows * len(p) for p in model.parameters()) + 4 * len(x)
        shape = {k: v for k, v in trial.hyperparams.items() if k not in PER_TRIAL}
        shape |= {"batch_size": batch_size, "width": max(2, memory // (4 * floats))}
        groups.setdefault(tuple(shape.items()), []).append(trial)
    for shape, group in groups.items():
        count = math.ceil(len(group) / dict(shape)["width"])
        stacks += [group[start::count] for start in range(count)]
    return stacks


def build_stack(trials: list[Trial], data: dict, keys: Tensor) -> nn.Module:
    """One model for all of the trials: build_model's, with stacked layers under the same names."""
    plain = [plain_model(trial.hyperparams, data["sizes"]) for trial in trials]
    model = copy.deepcopy(plain[0])
    for stream, (name, layer) in enumerate(plain[0].named_modules()):
        (layer_keys,) = derive_keys(keys, 1, stream)
        if type(layer) is nn.Linear:
            stacked = StackedLinear(layer.in_features, layer.out_features, layer_keys)
            model.set_submodule(name, stacked)
        elif type(layer) is nn.Dropout:
            rates = [one.get_submodule(name).p for one in plain]
            model.set_submodule(name, StackedDropout(rates, layer_keys))
    return model[1]


def batches(data: dict, keys: Tensor, batch_size: int, epochs: int) -> Iterator:
    """Yield x and y, [trials, rows, ...], of each step; every trial has its own order of rows."""
    x, y = data["train"]
    if batch_size >= len(x):
        full = [values.expand(len(keys), *values.shape).contiguous() for values in (x, y)]
        yield from (full for _ in range(epochs))
        return
    for epoch in range(epochs):
        order = random_bits(derive_keys(keys, 1, epoch)[0], len(x)).argsort(stable=True)
        for rows in order.split(batch_size, dim=1):
            yield x[rows], y[rows]


def loss_per_trial(loss: Callable, outputs: Tensor, y: Tensor) -> Tensor:
    """The mean loss of each trial, [trials], of outputs and y [trials, rows, ...]."""
    losses = loss(outputs.flatten(0, 1), y.flatten(0, 1), reduction="none")
    return losses.view(len(outputs), -1).mean(1)


def train_stack(trials: list[Trial], data: dict, epochs: int) -> tuple[nn.Module, Tensor]:
    """Train trials of one shape side by side; their model and final losses, [trials]."""
    trials = trials if len(trials) > 1 else trials * 2  # one alone goes to another kernel
    seeds = np.array([trial.seed for trial in trials], np.uint64).view(np.int32).reshape(-1, 2)
    keys, loss = torch.from_numpy(seeds).to(data["train"][0].device), data["task"].loss
    lr = torch.tensor([trial.hyperparams["lr"] for trial in trials], device=keys.device)
    model = build_stack(trials, data, keys).train()
    for x, y in batches(data, derive_keys(keys, 1)[0], trials[0].hyperparams["batch_size"], epochs):
        losses = loss_per_trial(loss, model(x), y)
        losses.dot(lr).backward()  # scales each trial's gradient by its lr: the layers step by it
    model.eval()
    losses = torch.zeros_like(lr)
    with torch.no_grad():
        for x, y in zip(*(values.split(SCORED_ROWS) for values in data["scored"]), strict=True):
            x, y = (values.expand(len(trials), *values.shape) for values in (x, y))
            losses += loss_per_trial(loss, model(x), y) * (x.shape[1] / len(data["scored"][0]))
    return model, losses


def train_and_evaluate(trials: list[Trial], data: dict, epochs: int) -> list[float]:
    """The score of each trial of a stack: 1 / loss, NaN where it diverged."""
    losses = train_stack(trials, data, epochs)[1][: len(trials)].tolist()
    return [1 / max(loss, 1e-12) if math.isfinite(loss) else math.nan for loss in losses]


# ---- The search --------------------------------------------------------------------------------

RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def log_line(trial: Trial, settings: dict) -> bytes:
    score = None if math.isnan(trial.score) else trial.score
    row = settings | {"trial": trial.number} | trial.hyperparams | {"score": score}
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def read_log(log, space: dict, settings: dict) -> Iterator[Trial]:
    """Yield the trials of a log; cut off a torn last line, refuse any other that is not its own."""
    log.seek(0)
    seen = set()
    for place, line in enumerate(log.read().splitlines(keepends=True), 1):
        where, start = f"--log {log.name}, line {place}", json.dumps(settings)[:-1].encode()
        if not line.endswith(b"\n") and line.startswith(start[: len(line)]):
            print(f"{where}: torn, its trial runs again", file=sys.stderr)
            log.truncate(log.tell() - len(line))
            return
        try:
            row = json.loads(line)
            trial = sample_trial(space, settings["seed"], row["trial"])
            trial.logged = True
            trial.score = math.nan if row["score"] is None else float(row["score"])
        except (ValueError, TypeError, LookupError):
            raise InputError(f"{where}: not a line of such a log") from None
        for name, value in json.loads(log_line(trial, settings)).items():
            check(row.get(name) == value, f"{where}: {name} is {row.get(name)}, here it is {value}")
        check(line == log_line(trial, settings), f"{where}: damaged")
        check(trial.number not in seen, f"{where}: trial {trial.number} twice")
        seen.add(trial.number)
        yield trial


def random_search(
    train_and_evaluate: Callable[[list[Trial]], Sequence[float]],
    space: dict,
    trials: int,
    seed: int = 0,
    make_stacks: Callable[[list[Trial]], list[list[Trial]]] = lambda trials: [[t] for t in trials],
    log: str | None = None,
    settings: dict | None = None,
) -> list[Trial]:
    """Run and score trials 0 to trials - 1; return them in order, under torchrun to rank 0 alone.

    train_and_evaluate is handed lists of trials (of one, unless make_stacks groups them) and
    returns a score for each. Trials that the file log holds do not run again; settings is what it
    must agree in beside seed and space. Ctrl-C: KeyboardInterrupt(the finished trials).
    """
    settings, written = (settings or {}) | {"seed": seed}, set()
    started, shown = time.monotonic(), 0.0
    with open(log or os.devnull, "a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        logged = {trial.number: trial for trial in read_log(file, space, settings)}
        fcntl.flock(file, fcntl.LOCK_UN)
        share = range(RANK, trials, WORLD_SIZE)
        finished = [logged[number] for number in share if number in logged]
        waiting = [sample_trial(space, seed, n) for n in share if n not in logged]
        try:
            for stack in make_stacks(waiting):
                for trial, score in zip(stack, train_and_evaluate(stack), strict=True):
                    trial.score = float(score) if math.isfinite(score) else math.nan
                finished += stack
                fcntl.flock(file, fcntl.LOCK_EX)
                written.update(file.read().splitlines(keepends=True))  # by other processes
                lines = [log_line(trial, settings) for trial in stack]
                file.write(b"".join(line for line in lines if line not in written))
                if log:
                    os.fsync(file.fileno())
                fcntl.flock(file, fcntl.LOCK_UN)
                shown = show_progress(finished, len(share), started, shown)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(finished) from None
        finally:
            print("\r\033[K" * sys.stderr.isatty(), end="", file=sys.stderr)
    if WORLD_SIZE > 1:  # gloo's own time limit is 30 minutes; ranks may differ by more
        from torch import distributed

        distributed.init_process_group("gloo", timeout=timedelta(days=1000))
        parts = [None] * WORLD_SIZE if RANK == 0 else None
        distributed.gather_object(finished, parts)
        distributed.destroy_process_group()
        finished = [trial for part in parts or [] for trial in part]
    return sorted(finished, key=lambda trial: trial.number)


def show_progress(finished: list[Trial], total: int, started: float, shown: float) -> float:
    """A live line on a terminal, at most twice a second; elsewhere a line every ten per cent."""
    live, now, count = sys.stderr.isatty(), time.monotonic(), len(finished)
    mark = now if live else 10 * count // total
    if RANK or mark - shown < (0.5 if live else 1):
        return shown
    best, rate = best_trial(finished), sum(not t.logged for t in finished) / (now - started)
    line = f"{count} of {total} trials, best score {best.score if best else math.nan:.5g}, "
    line += f"{rate:.3g} trials/s, {(total - count) / rate:.0f} s left"
    print(
        f"\r{line}\033[K" if live else line, end="" if live else "\n", file=sys.stderr, flush=True
    )
    return mark


def best_trial(trials: list[Trial]) -> Trial | None:
    """The trial of the highest score, of equals the lowest number; None if all diverged."""
    scored = [trial for trial in trials if not math.isnan(trial.score)]
    return max(scored, key=lambda trial: (trial.score, -trial.number), default=None)


def replay(trial: Trial, data: dict, epochs: int) -> tuple[nn.Sequential, float]:
    """Train one trial alone; its model as an ordinary one for raw inputs, and its loss."""
    stack, losses = train_stack([trial], data, epochs)
    model = copy.deepcopy(plain_model(trial.hyperparams, data["sizes"]))
    state = {f"0.{name}": value for name, value in data["standardise"].state_dict().items()}
    state |= {f"1.{name}": value[0].cpu() for name, value in stack.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model, losses[0].item()


def load_model(path: str) -> nn.Sequential:
    """The model that --save wrote to path, in evaluation mode, for raw inputs [rows, features].

    Raises OSError if path cannot be read, ValueError if --save of this file did not write it.
    """
    try:
        saved = torch.load(path, weights_only=True)
        model = copy.deepcopy(plain_model(saved["hyperparameters"], saved["sizes"]))
        model.load_state_dict(saved["state_dict"], assign=True)
        return model
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: not a model that this random_search.py saved") from error


# ---- The report --------------------------------------------------------------------------------


def importance(trials: list[Trial], name: str) -> tuple[float, str]:
    """The share of the variation of the scores' ranks that goes with name, and its best values.

    Analysis of variance over at most eight groups of values, corrected for chance; a share within
    four standard deviations of what chance gives counts as none.
    """
    values, n = [trial.hyperparams[name] for trial in trials], len(trials)
    scores = np.nan_to_num([trial.score for trial in trials], nan=-math.inf)
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - counts / 2)[inverse]
    best = [values[i] for i in np.argsort(-ranks, kind="stable")[: max(5, n // 10)]]
    if all(type(v) in (int, float) for v in values) and len(set(values)) > 8:
        groups = np.searchsorted(np.quantile(values, np.arange(1, 8) / 8), values)
        where = f"{min(best):.4g} to {max(best):.4g}"
    else:
        groups = np.unique([str(v) for v in values], return_inverse=True)[1]
        common = max(sorted(set(best), key=str), key=best.count)
        where = f"{common} ({best.count(common)} of {len(best)})"
    sizes = np.bincount(groups)
    k, means = np.count_nonzero(sizes), np.bincount(groups, ranks) / np.maximum(sizes, 1)
    explained = (means - ranks.mean())[groups].var() / max(ranks.var(), 1e-12)
    chance = (k - 1) / max(n - 1, 1)  # mean and deviation of the beta distribution of no effect
    deviation = math.sqrt(2 * (k - 1) * max(n - k, 0) / (n + 1)) / max(n - 1, 1)
    share = (explained - chance) / (1 - chance) if explained > chance + 4 * deviation else 0.0
    return share, where if share else ""


def expected_best(scores: list[float]) -> dict[int, float]:
    """The mean of the best of 1, 2, 5, 10, ... of these scores, drawn without replacement.

    After Dodge et al. 2019, "Show Your Work". A diverged trial counts as the lowest score.
    """
    n, ordered = len(scores), np.sort(np.nan_to_num(scores, nan=np.nanmin(scores)))[::-1]
    sizes = [size * 10**power for power in range(len(str(n))) for size in (1, 2, 5)]
    expected = {}
    for size in [*(size for size in sizes if size < n), n]:
        lower = np.cumprod(np.clip(1 - size / np.arange(n, 0, -1), 0, 1))  # P(all are below)
        expected[size] = float(-np.diff(lower, prepend=1.0) @ ordered)
    return expected


def print_table(rows: list[Sequence]) -> None:
    texts = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        print(" ".join(map(str.rjust, row, widths))[:80].rstrip())


def bar(share: float) -> str:
    return ("█" * round(30 * share)).ljust(30)


def report(trials: list[Trial], losses: bool = False) -> None:
    """Print the best five trials, what mattered, and whether more trials would help."""
    if not trials:  # a process of torchrun other than the first
        return
    ranked = sorted(trials, key=lambda t: (math.isnan(t.score), -t.score, t.number))
    names = list(trials[0].hyperparams)
    rows = [["trial", "score", *["loss"] * losses, *names]]
    for trial in ranked[:5]:
        loss = [1 / trial.score] * losses
        rows.append([trial.number, trial.score, *loss, *trial.hyperparams.values()])
    print_table(rows)
    print(f"{sum(math.isnan(trial.score) for trial in trials)} of {len(trials)} trials diverged\n")
    if best_trial(trials):
        print("What mattered: share of the variation in rank, and where the best tenth lies")
        shares = {name: importance(trials, name) for name in names}
        print_table(
            [[n, f"{share:.0%}", bar(share), where] for n, (share, where) in shares.items()]
        )
        print("\nWould more trials help: the best score to expect of so many trials")
        expected = expected_best([trial.score for trial in trials])
        print_table(
            [[n, score, bar(score / expected[len(trials)])] for n, score in expected.items()]
        )


# ---- The command line --------------------------------------------------------------------------


def whole(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if text.isdecimal() and int(text) >= minimum:
            return int(text)
        raise argparse.ArgumentTypeError(f"must be a whole number from {minimum}, not {text!r}")

    return parse


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    add = functools.partial(parser.add_argument, metavar="N")
    add("--task", choices=TASKS, metavar=None, default="xor", help="default: xor")
    add("--trials", type=whole(1), default=200, help="default: 200")
    add("--epochs", type=whole(1), default=500, help="of each trial; default: 500")
    add("--seed", type=whole(0), default=0, help="of all random numbers; default: 0")
    add("--device", metavar="DEVICE", default="auto", help="cpu, cuda, cuda:1, mps; default: auto")
    add("--log", metavar="FILE", help="append finished trials to FILE; do not repeat those in it")
    add("--trial", type=whole(0), help="run only trial N")
    add("--save", metavar="FILE", help="save the best model for load_model(FILE)")
    return parser.parse_args()


def pick_device(name: str) -> torch.device:
    """The device of this process: under torchrun, the accelerator of its LOCAL_RANK."""
    accelerator = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        device = torch.device(accelerator if name == "auto" else name)
        if device.type != "cpu" and device.index is None:
            local = int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count()
            device = torch.device(device.type, local)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ArithmeticError):
        raise InputError(f"--device {name}: not here; auto, cpu or {accelerator} is") from None
    return device


def main() -> int:
    args, status, started = parse_arguments(), 0, time.monotonic()
    settings = {"task": args.task, "seed": args.seed, "epochs": args.epochs}
    try:
        check(args.trial is None or not args.log, "--log: not with --trial, which runs one trial")
        for option, path in {"--log": args.log, "--save": args.save}.items():
            writable = path is None or os.access(os.path.dirname(path) or ".", os.W_OK)
            check(writable and not os.path.isdir(path or ""), f"{option} {path}: cannot be written")
        data = prepare(args.task, pick_device(args.device))
        evaluate = functools.partial(train_and_evaluate, data=data, epochs=args.epochs)
        stacks, space = functools.partial(make_stacks, data=data), HYPERPARAMS
        if args.trial is None:
            trials = random_search(
                evaluate, space, args.trials, args.seed, stacks, args.log, settings
            )
        else:
            trials = [sample_trial(space, args.seed, args.trial)]
            (trials[0].score,) = evaluate(*stacks(trials))
    except InputError as error:
        print(f"random_search.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        trials, status = stop.args[0] if stop.args else [], 130
    if RANK or not trials:
        return status
    seconds, ran = time.monotonic() - started, sum(not trial.logged for trial in trials)
    print(f"task {args.task}, seed {args.seed}, {args.epochs} epochs, on {data['train'][0].device}")
    print(f"{len(trials)} trials, {ran} run now in {seconds:.1f} s, {ran / seconds:.1f} a second\n")
    report(trials, losses=True)
    best = best_trial(trials)
    if best is None:
        print("random_search.py: every trial diverged; try a smaller lr", file=sys.stderr)
        return 1
    if not status:
        report_model(best, data, settings, args.save)
    print(best.hyperparams)
    return status


def report_model(trial: Trial, data: dict, settings: dict, path: str | None) -> None:
    """Train the trial again by itself, print what its model predicts, and save it to path."""
    model, loss = replay(trial, data, settings["epochs"])
    if 1 / max(loss, 1e-12) != trial.score:
        print(
            f"trial {trial.number} scored otherwise in the log: loss {1 / trial.score}",
            file=sys.stderr,
        )
    print(f"\nTrial {trial.number} trained again: loss {loss:.4g}; its predictions")
    x, y = (values[:8].cpu() for values in data["scored"])
    with torch.no_grad():
        outputs = model[1](x)
    columns = {"target": y, "output": outputs, "prediction": data["task"].predict(outputs)}
    texts = [
        [" ".join(f"{v:.4g}" for v in row.flatten()) for row in rows] for rows in columns.values()
    ]
    print_table([list(columns), *zip(*texts, strict=True)])
    if path:
        saved = settings | {"trial": trial.number, "score": trial.score, "sizes": data["sizes"]}
        saved |= {"hyperparameters": trial.hyperparams, "state_dict": model.state_dict()}
        torch.save(saved, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may have no block characters
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # what reads it has gone, as head does
        status = os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(status)
