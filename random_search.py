"""Random search over hyperparameters in PyTorch, in one file: its trials train side by side.

    python random_search.py --task regression --trials 1000 --log trials.jsonl --save best.pt
    torchrun --standalone --nproc-per-node=2 -- random_search.py --trials 10000

Trials of one shape are one stacked net. All that is random about a trial is a function of (seed,
number): on the CPU its score is the same bit for bit alone, in any stack, on N processes.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

# Without it MKL picks kernels by memory alignment, and last bits would depend on the stack.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

# A value is a sequence (each element equally likely) or a function of a numpy.random.Generator.
HYPERPARAMS = {
    "lr": np.linspace(0.001, 0.1, 100),
    "batch_size": [16, 32, 64, 128],
    "hidden_size": [32, 64, 128, 256],
    "num_layers": [1, 2, 3, 4],
    "dropout": np.linspace(0.1, 0.5, 5),
}


def build_model(Linear, Dropout, inputs, outputs, hidden_size, num_layers) -> nn.Module:
    """An ordinary model, but of the Linear and Dropout it is given; a Dropout has its rate."""
    layers = []
    for _ in range(num_layers):
        layers += [Linear(inputs, hidden_size), nn.ReLU(), Dropout()]
        inputs = hidden_size
    return nn.Sequential(*layers, Linear(inputs, outputs))


class Task(NamedTuple):
    x: Sequence  # [rows, features], or [rows] for one feature; standardised by the training rows
    y: Sequence  # [rows, outputs], or [rows] for one output; with classes [rows], labels from 0
    loss: Callable  # of torch.nn.functional
    held_out: slice | Sequence[int] | None = slice(4, None, 5)  # rows to score; None: all do both
    classes: int = 0


def binary_cross_entropy(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """F's ..._with_logits, but a value's last bits do not depend on its place in the array."""
    size = logits.abs()
    return size / 2 + (0.5 - targets) * logits + torch.log1p(torch.exp(-size))


ARTICLE_X = "3.3 4.4 5.5 6.71 6.93 4.168 9.779 6.182 7.59 2.167 7.042 10.791 5.313 7.997 3.1"
ARTICLE_Y = "1.7 2.76 2.09 3.19 1.694 1.573 3.366 2.596 2.53 1.221 2.827 3.465 1.65 2.904 1.3"
TASKS = {
    "xor": Task([[0, 0], [0, 1], [1, 0], [1, 1]], [0, 1, 1, 0], binary_cross_entropy, None),
    "regression": Task(ARTICLE_X.split(), ARTICLE_Y.split(), F.mse_loss, slice(2, None, 3)),
}


# ---- The machinery: a trial, a stack of trials, the search, the report, the command line -------


@dataclass
class Trial:
    number: int
    seed: int  # of the search; with the number it decides all that is random about the trial
    hyperparams: dict
    score: float = math.nan  # higher is better; NaN: diverged
    logged: bool = False  # read from a log, not run now


def check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def sample_hyperparams(space: dict, seed: int, trial: int) -> dict:
    """The hyperparameters of the trial of this number, plain Python values."""
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(trial, 0)))
    sample = {}
    for name, values in space.items():
        many = callable(values) or (hasattr(values, "__len__") and len(values) > 0)
        check(many, f"HYPERPARAMS: {name} must be a function or have values, not {values!r}")
        value = values(generator) if callable(values) else values[generator.integers(len(values))]
        sample[name] = value.item() if isinstance(value, np.generic | Tensor) else value
    return sample


def random_bits(keys: Tensor, count: int, first: int = 0) -> Tensor:
    """Random int32 [trials, count] of int32 keys [trials, 2] and the counters from first on.

    A hash of the counter (lowbias32 by C. Wellons, with a key before and within) is the same on
    every device, and needs no generator a trial. The masks make an arithmetic shift a logical one.
    """
    counters = torch.arange(first, first + count, device=keys.device)
    bits = keys[:, :1] + (counters * 0x9E3779B9).int()
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    bits *= 0x7FEB352D
    bits ^= (bits >> 15).bitwise_and_(0x1FFFF)
    bits += keys[:, 1:]
    bits *= 0x846CA68B - 2**32
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    return bits


class LinearStep(torch.autograd.Function):
    """A linear layer for each trial that takes its SGD step on the way back.

    Each trial's loss comes scaled by its lr, so the gradient is the step. No weight gradient is
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
    """nn.Linear for x [trials, rows, inputs], with its initial distribution."""

    def __init__(self, keys: Tensor, inputs: int, outputs: int):
        super().__init__()
        values = (random_bits(keys, (1 + inputs) * outputs) >> 8) * (2**-23 / math.sqrt(inputs))
        self.bias = nn.Parameter(values[:, :outputs].contiguous())
        # A weight with gaps would take another kernel, one trial after another.
        self.weight = nn.Parameter(values[:, outputs:].reshape(-1, outputs, inputs).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return LinearStep.apply(x, self.weight, self.bias)


class StackedDropout(nn.Module):
    """nn.Dropout for x [trials, rows, features], with a rate for each trial, [trials, 1]."""

    def __init__(self, keys: Tensor, rates: Tensor):
        super().__init__()
        self.keys, self.used, self.masks = keys, 0, keys[:, :0]
        self.threshold, self.scale = rates * 2**32 - 2**31, 1 / (1 - rates)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        size = x[0].numel()
        if self.masks.shape[1] < size:  # for several steps at once, to share the cost of the calls
            bits = random_bits(self.keys, max(size, 2**17 // len(x)), self.used)
            # Whole numbers, so this is bits > threshold, but three times as fast.
            self.masks = bits.float().sub_(self.threshold).clamp_(0, 1).mul_(self.scale)
        mask, self.masks = self.masks[:, :size], self.masks[:, size:]
        self.used += size
        return x * mask.view_as(x)


# Layers without weights that are random themselves or would mix the trials.
MIXING = nn.modules.dropout._DropoutNd | nn.modules.batchnorm._NormBase | nn.RReLU


def architecture(hyperparams: dict) -> dict:
    """What build_model takes; the rest acts in training and may differ within a stack."""
    return {k: v for k, v in hyperparams.items() if k not in ("lr", "batch_size", "dropout")}


def build_stack(trials: list[Trial], sizes: dict, keys: Tensor) -> nn.Module:
    """One model for trials of one shape; keys, [trials, 2], decide all that is random in it."""
    rates = torch.tensor([[t.hyperparams.get("dropout", 0.0)] for t in trials], device=keys.device)
    layer_keys = (random_bits(keys, 2, 2 * layer) for layer in range(1, 10**9))
    linear = lambda inputs, outputs: StackedLinear(next(layer_keys), inputs, outputs)
    dropout = lambda: StackedDropout(next(layer_keys), rates)
    model = build_model(linear, dropout, **sizes, **architecture(trials[0].hyperparams))
    for layer in model.modules():
        other = [*layer.parameters(False), *layer.buffers(False)] or isinstance(layer, MIXING)
        check(isinstance(layer, StackedLinear) or not other, f"{layer} does not stack")
    return model


def make_stacks(trials: list[Trial], data: dict) -> list[list[Trial]]:
    """Group the trials that can train together, as many in a stack as memory allows."""
    x, groups, stacks = data["train"][0], {}, []
    most_rows = max(len(x), len(data["scored"][0]))  # larger batches are all one
    memory = {"cpu": 2**24, "mps": 2**30}.get(x.device.type)  # a CPU's caches should hold a stack
    memory = memory or torch.accelerator.get_memory_info(x.device)[0] // 4
    try:
        for trial in trials:
            lr, batch_size = trial.hyperparams["lr"], trial.hyperparams["batch_size"]
            good = 0 < lr < math.inf and range(batch_size)
            good = good and 0 <= trial.hyperparams.get("dropout", 0) < 1
            check(good, "lr and batch_size must be above 0, dropout from 0 to below 1")
            shape = {"batch_size": min(batch_size, most_rows)} | architecture(trial.hyperparams)
            groups.setdefault(tuple(shape.items()), []).append(trial)
        for shape, group in groups.items():
            trial, rows = group[0], 4 * dict(shape)["batch_size"]
            model = build_stack([trial], data["sizes"], torch.zeros(1, 2).int())
            floats = 4 * len(x) + sum(w.numel() + rows * w.shape[1] for w in model.parameters())
            count = math.ceil(len(group) / max(2, memory // (4 * floats)))
            stacks += [group[start::count] for start in range(count)]
    except (LookupError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        message = f"{error}".partition("\n")[0]
        raise ValueError(f"HYPERPARAMS {trial.hyperparams}: {message}") from None
    return stacks


def train_stack(trials: list[Trial], data: dict, epochs: int) -> tuple[nn.Module, list[float]]:
    """Train trials of one shape; their model and scores, 1 / loss or NaN if it diverged."""
    stack = trials if len(trials) > 1 else trials * 2  # one alone goes to another kernel
    seeds = [np.random.SeedSequence(t.seed, spawn_key=(t.number, 1)) for t in stack]
    keys = np.stack([seed.generate_state(2) for seed in seeds]).view(np.int32)
    keys = torch.from_numpy(keys).to(data["train"][0].device)
    lr = torch.tensor([trial.hyperparams["lr"] for trial in stack], device=keys.device)
    batch_size, shuffle = trials[0].hyperparams["batch_size"], random_bits(keys, 2)
    model = build_stack(stack, data["sizes"], keys)

    def batches(x, y, epochs):  # every trial has its own order of rows in every epoch
        if batch_size >= len(x):
            full = [rows.expand(len(stack), *rows.shape).contiguous() for rows in (x, y)]
            yield from (full for _ in range(epochs))
            return
        for epoch in range(epochs):
            order = random_bits(shuffle, len(x), epoch * len(x)).argsort()
            for rows in order.split(batch_size, dim=1):
                yield x[rows], y[rows]

    def loss_per_trial(x, y):
        losses = data["loss"](model(x).flatten(0, 1), y.flatten(0, 1), reduction="none")
        return losses.view(len(stack), -1).mean(1)

    for x, y in batches(*data["train"], epochs):
        loss_per_trial(x, y).dot(lr).backward()  # and the layers take their steps
    model.eval()
    with torch.no_grad():
        losses = sum(loss_per_trial(x, y) * x.shape[1] for x, y in batches(*data["scored"], 1))
    losses = (losses / len(data["scored"][0]))[: len(trials)].tolist()
    return model, [1 / max(loss, 1e-12) if math.isfinite(loss) else math.nan for loss in losses]


def train_and_evaluate(trials: list[Trial], data: dict, epochs: int) -> list[float]:
    return train_stack(trials, data, epochs)[1]


def prepare(name: str, device: torch.device | str = "cpu") -> dict:
    """A task's rows on a device, x standardised: "train" and "scored", each (x, y)."""
    task = TASKS[name]
    try:
        x, y = (torch.from_numpy(np.asarray(rows, np.float32)) for rows in (task.x, task.y))
        check(len(x) == len(y) > 0, f"x has {len(x)} rows, y has {len(y)}")
        check(x.isfinite().all() and y.isfinite().all(), "there is NaN or infinity in x or y")
        classes = task.classes or 2 * (task.loss is binary_cross_entropy)
        check(classes or task.loss is not F.cross_entropy, "cross_entropy needs classes")
        check(not classes or np.isin(y, range(classes)).all(), f"y must be 0 to {classes - 1}")
        check(not task.classes or y.ndim == 1, "with classes y must be [rows]")
        scored, rows = np.zeros(len(x), bool), task.held_out
        scored[list(rows) if isinstance(rows, tuple) else rows] = True  # None: all
        train = scored if task.held_out is None else ~scored
        check(train.any() and scored.any(), "held_out is empty, or all rows are in it")
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise ValueError(f"task {name!r}: x, y or held_out: {error}") from None
    x, y = x.reshape(len(x), -1), y.long() if task.classes else y.reshape(len(y), -1)
    standardise = nn.BatchNorm1d(x.shape[1], eps=0, affine=False).eval()
    variance, standardise.running_mean = torch.var_mean(x[train], 0, correction=0)
    standardise.running_var = variance.where(variance > 0, 1.0)
    sizes = {"inputs": x.shape[1], "outputs": task.classes or y.shape[1]}
    parts, x = {"train": train, "scored": scored}, standardise(x)
    rows = {part: (x[rows].to(device), y[rows].to(device)) for part, rows in parts.items()}
    return {"loss": task.loss, "standardise": standardise, "sizes": sizes, **rows}


RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def random_search(
    train_and_evaluate: Callable[[list[Trial]], Sequence[float]],
    space: dict,
    trials: int | Sequence[int],
    seed: int = 0,
    make_stacks: Callable[[list[Trial]], list[list[Trial]]] = lambda trials: [[t] for t in trials],
    log: str | None = None,
    settings: dict | None = None,
) -> list[Trial]:
    """Run and score trials 0 to trials - 1, or those of the numbers trials; return them in order.

    train_and_evaluate is handed lists of trials (of one, unless make_stacks groups them) and
    returns a score for each. What the file log holds does not run again; settings is what it must
    agree in beside seed and space. Ctrl-C ends the search: what has finished is returned.
    Under torchrun each process runs its share, and rank 0 returns all.
    """
    settings, logged, started, shown = (settings or {}) | {"seed": seed}, {}, time.monotonic(), 0.0
    numbers = (range(trials) if isinstance(trials, int) else trials)[RANK::WORLD_SIZE]
    with open(log or os.devnull, "a+b", buffering=0) as file:
        file.seek(0)
        if log:
            update_log(file, space, settings, logged, [])
        finished = [logged[n] for n in numbers if n in logged]
        todo = [n for n in numbers if n not in logged]
        todo = [Trial(n, seed, sample_hyperparams(space, seed, n)) for n in todo]
        try:
            for stack in make_stacks(todo):
                for trial, score in zip(stack, train_and_evaluate(stack), strict=True):
                    trial.score = float(score) if math.isfinite(score) else math.nan
                if log:
                    update_log(file, space, settings, logged, stack)
                finished += stack
                shown = show_progress(finished, len(todo), len(numbers), started, shown)
            if WORLD_SIZE > 1:  # gloo's own time limit is 30 minutes; ranks may differ by more
                distributed.init_process_group("gloo", timeout=timedelta(days=1000))
                parts = [[]] * WORLD_SIZE if RANK == 0 else None
                distributed.gather_object(finished, parts)
                distributed.destroy_process_group()
                finished = [trial for part in parts or [] for trial in part]
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
    return sorted(finished if RANK == 0 else [], key=lambda trial: trial.number)


def log_line(trial: Trial, settings: dict) -> bytes:
    score = None if math.isnan(trial.score) else trial.score
    row = settings | {"trial": trial.number} | trial.hyperparams | {"score": score}
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def update_log(file, space: dict, settings: dict, logged: dict, trials: list[Trial]) -> None:
    """Add what is new in the log to logged, by number; then append those of trials not in it."""
    import fcntl  # not on Windows

    fcntl.flock(file, fcntl.LOCK_EX)  # other processes write to it
    start = json.dumps(settings)[:-1].encode()
    for line in file.read().splitlines(keepends=True):
        where = f"{file.name}, line {len(logged) + 1}"
        if not line.endswith(b"\n") and line.startswith(start[: len(line)]):
            print(f"{where}: torn, its trial runs again", file=sys.stderr)
            file.seek(file.truncate(file.tell() - len(line)))
            break
        try:
            row, seed = json.loads(line), settings["seed"]
            score = math.nan if row["score"] is None else float(row["score"])
            sample = sample_hyperparams(space, seed, int(row["trial"]))
            trial = Trial(int(row["trial"]), seed, sample, score, logged=True)
        except (ValueError, TypeError, LookupError, ArithmeticError):
            raise ValueError(f"{where}: not a line of such a log") from None
        expected = log_line(trial, settings)
        for name, value in json.loads(expected).items():
            check(row.get(name) == value, f"{where}: {name} is {row.get(name)}, here it is {value}")
        good = line == expected and trial.number not in logged
        check(good, f"{where}: damaged, or a trial twice")
        logged[trial.number] = trial
    new = {trial.number: trial for trial in trials if trial.number not in logged}
    lines = b"".join(log_line(trial, settings) for trial in new.values())
    check(file.write(lines) == len(lines), f"{file.name}: not written whole; is the disk full?")
    os.fsync(file)
    logged |= new
    fcntl.flock(file, fcntl.LOCK_UN)


def show_progress(finished: list, todo: int, total: int, started: float, shown: float) -> float:
    """A live line on a terminal, at most twice a second; elsewhere a line every ten per cent."""
    live, seconds, left = sys.stderr.isatty(), time.monotonic() - started, total - len(finished)
    mark, rate = 2 * seconds if live else 10 * len(finished) // total, (todo - left) / seconds
    if RANK or mark - shown < 1 and left:
        return shown
    line = f"{len(finished)} of {total} trials, best score {ranked(finished)[0].score:.5g}, "
    line += f"{rate:.3g} trials/s, {left / rate:.0f} s left"
    line = "\r\033[K" + line * bool(left) if live else line + "\n"
    print(line, end="", file=sys.stderr, flush=True)
    return mark


def ranked(trials: list[Trial]) -> list[Trial]:
    """The best first: by score, of equals the lower number; those that diverged last."""
    return sorted(trials, key=lambda t: (math.isnan(t.score), -t.score, t.number))


def show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def importance(values: list) -> tuple[float, str]:
    """The share of the variation in rank that goes with values, those of the best trial first.

    After Kruskal and Wallis 1952, over at most eight groups of values. Chance alone spreads the
    groups' means like chi-squared: what is within five deviations of it counts as none.
    """
    values = values if all(type(v) in (int, float) for v in values) else [*map(str, values)]
    ranks, (distinct, codes) = np.arange(len(values)), np.unique(values, return_inverse=True)
    groups = codes * min(8, len(distinct)) // len(distinct)
    means, chance = np.bincount(groups, ranks) / np.bincount(groups), groups.max()
    spread = (len(values) - 1) * means[groups].var() / max(ranks.var(), 1)
    if spread <= chance + 5 * math.sqrt(2 * chance):
        return 0.0, ""
    best = distinct[np.unique(codes[groups == means.argmin()])]
    where = " to ".join(dict.fromkeys(map(show, (best[0], best[-1]))))
    return (spread - chance) / (len(values) - 1 - chance), where


def report(trials: list[Trial], losses: bool = False) -> None:
    """Print the five best trials, what mattered, and whether more trials would help."""
    if not trials:  # under torchrun, on other ranks than 0
        return
    best, n = ranked(trials), len(trials)
    rows = [["trial", "score", *["loss"] * losses, *best[0].hyperparams]]
    for t in best[:5]:
        loss = [1 / t.score] if losses else []
        rows.append([t.number, t.score, *loss, *t.hyperparams.values()])
    rows = [[show(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(" ".join(map(str.rjust, row, widths))[:80])
    scores = np.array([trial.score for trial in best])
    print(f"{np.isnan(scores).sum()} of {n} trials diverged")
    if n == 1 or np.isnan(scores).all():
        return
    print("\nWhat mattered: share of the variation in rank, and where the best trials lie")
    for name in best[0].hyperparams:
        share, where = importance([trial.hyperparams[name] for trial in best])
        print(f"{name:>15} {share:4.0%} {'█' * round(30 * share):30} {where}"[:80].rstrip())
    print("\nWould more trials help: the best score to expect of so many trials")
    scores = np.nan_to_num(scores, nan=np.nanmin(scores))
    for draws in sorted({n, *(d * 10**p for p in range(9) for d in (1, 2, 5) if d * 10**p < n)}):
        # Dodge et al. 2019, "Show Your Work", without replacement: P(none so far is drawn).
        none = np.cumprod(np.clip(1 - draws / np.arange(n, 0, -1), 0, 1))
        expected = -np.diff(none, prepend=1.0) @ scores
        share = (expected - scores[-1]) / max(scores[0] - scores[-1], 1e-300)
        print(f"{draws:>15} {expected:10.4g} {'█' * round(40 * share)}")


def replay(trial: Trial, data: dict, settings: dict, path: str | None) -> str:
    """Train a trial again by itself, save its model to path; what it makes of eight rows."""
    model, (score,) = train_stack([trial], data, settings["epochs"])
    if path:
        state = {f"0.{name}": value for name, value in data["standardise"].state_dict().items()}
        state |= {f"1.{name}": value[0].cpu() for name, value in model.state_dict().items()}
        saved = settings | {"trial": trial.number, "score": score, "sizes": data["sizes"]}
        saved |= {"hyperparameters": trial.hyperparams, "state_dict": state}
        torch.save(saved, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    note = "" if score == trial.score else f", in the log {1 / trial.score:.4g}"
    title = f"Trial {trial.number} trained again: loss {1 / score:.4g}{note}; targets, predictions"
    x, y = (values[:8] for values in data["scored"])
    with torch.no_grad():
        outputs = torch.cat([y.view(len(y), -1), model(x.expand(2, *x.shape))[0]], dim=1)
    return f"\n{title}\n{outputs}"


def load_model(path: str) -> nn.Sequential:
    """The model that --save wrote, in evaluation mode, for raw x [rows, features].

    Raises OSError if path cannot be read, ValueError if it is something else.
    """
    try:
        saved = torch.load(path, weights_only=True)
        arguments = saved["sizes"] | architecture(saved["hyperparameters"])
        with torch.device("meta"):
            model = nn.Sequential(nn.BatchNorm1d(arguments["inputs"], eps=0, affine=False))
            model.append(build_model(nn.Linear, nn.Dropout, **arguments))
        model.load_state_dict(saved["state_dict"], assign=True)
        return model.eval()
    except Exception as error:
        check(isinstance(error, OSError), f"{path}: not a model that this file saved")
        raise


def pick_device(name: str) -> torch.device:
    """The device of this process: under torchrun, the accelerator of its LOCAL_RANK."""
    accelerator = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        if accelerator.type != "cpu":
            torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
        device = accelerator if name == "auto" else torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError):
        raise ValueError(f"argument --device: {name} is not here; {accelerator} is") from None
    return device


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    add, started = parser.add_argument, time.monotonic()
    add("--task", choices=TASKS, default="xor", help="default: xor")
    add("--trials", metavar="N", type=int, default=200, help="default: 200")
    add("--epochs", metavar="N", type=int, default=500, help="of each trial; default: 500")
    add("--seed", metavar="S", type=int, default=0, help="of all random numbers; default: 0")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; default: auto")
    add("--log", metavar="FILE", help="append finished trials to FILE; do not repeat those in it")
    add("--trial", metavar="K", type=int, help="run only trial K")
    add("--save", metavar="FILE", help="save the best model for load_model(FILE)")
    args = parser.parse_args()
    settings = {"task": args.task, "seed": args.seed, "epochs": args.epochs}
    numbers = range(args.trials) if args.trial is None else [args.trial]
    try:
        for name, least in {"trials": 1, "epochs": 1, "seed": 0, "trial": 0}.items():
            value = getattr(args, name)
            check(value is None or value >= least, f"argument --{name}: must be {least} or more")
        for name in ("log", "save"):
            path = getattr(args, name) or "."  # an empty name is refused as a folder is
            good = os.path.isfile(path) or not os.path.exists(path)
            good = good and os.access(os.path.dirname(path) or ".", os.W_OK)
            check(good or getattr(args, name) is None, f"argument --{name}: cannot write {path}")
        check(args.save is None or args.save != args.log, "argument --save: not the file of --log")
        data = prepare(args.task, pick_device(args.device))
        train = lambda stack: train_and_evaluate(stack, data, args.epochs)
        stacks = lambda trials: make_stacks(trials, data)
        trials = random_search(train, HYPERPARAMS, numbers, args.seed, stacks, args.log, settings)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if RANK or not trials:
        return 0 if RANK else 130
    seconds, ran = time.monotonic() - started, sum(not trial.logged for trial in trials)
    best = ranked(trials)[0]
    diverged = math.isnan(best.score)
    predictions = "" if diverged else replay(best, data, settings, args.save)  # before any output
    print(f"task {args.task}, seed {args.seed}, {args.epochs} epochs, on {data['train'][0].device}")
    print(f"{len(trials)} trials, {ran} run now in {seconds:.1f} s, {ran / seconds:.1f} a second\n")
    report(trials, losses=True)
    if diverged:
        parser.exit(1, f"{parser.prog}: every trial diverged; try a smaller lr\n")
    print(predictions)
    print(best.hyperparams)
    return 0 if len(trials) == len(numbers) else 130


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may have no block characters
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # what reads it has gone, as head does
        status = os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(status)
