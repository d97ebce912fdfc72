"""Random search over hyperparameters in PyTorch, in one file: the trials train side by side.

    python random_search.py --task regression --trials 1000 --log trials.db --save best.pt
    torchrun --standalone --nproc-per-node=2 -- random_search.py --trials 10000 --log trials.db

You write a model, a loss and an update for one trial, in ordinary PyTorch; torch.func trains a
stack of trials at once: 100 small conv nets in a quarter of a loop's time on two cores. All that is
random about a trial is a function of (seed, number): on an x86-64 CPU its score is the same bit for
bit alone, in any stack, on several processes, resumed or not.

Left out on purpose: other samplers, pruning, schedules, data that does not fit in memory.
"""

import argparse
import contextlib
import hashlib
import inspect
import json
import math
import os
import sqlite3
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

# Without it MKL picks kernels by memory alignment, and last bits would depend on the stack.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

# Once a net has learnt its rows, gradients underflow: subnormal numbers are 3 to 15 times slower.
torch.set_flush_denormal(True)
# glibc gives freed memory back, and each step faults it in anew, unless a large block was freed.
torch.empty(2**25 - 2**16, dtype=torch.uint8)

# ==== 1. Edit here: the space, the model, the update, the tasks ==================================

# A value is a list (each element equally likely) or a function of a numpy.random.Generator.
# batch_size is the training loop's; the other keys are arguments of update or of build_model.
# Trials that share build_model's keys train side by side, so let these have few values; only a
# key with "dropout" in its name may have many: it must be nothing but the rate of an nn.Dropout.
HYPERPARAMS = {
    "lr": np.linspace(0.001, 0.1, 100),  # or: lambda generator: 10 ** generator.uniform(-4, -1)
    "batch_size": [16, 32, 64, 128],
    "hidden_size": [32, 64, 128, 256],
    "num_layers": [1, 2, 3, 4],
    "dropout": np.linspace(0.1, 0.5, 5),
}


def build_model(inputs, outputs, hidden_size, num_layers, dropout) -> nn.Module:
    layers = []
    for _ in range(num_layers):
        layers += [nn.Linear(inputs, hidden_size), nn.ReLU(), nn.Dropout(dropout)]
        inputs = hidden_size
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def update(parameter: Tensor, gradient: Tensor, state: dict, lr: Tensor) -> None:
    """Plain SGD, in place; state, empty at first, is yours to fill.

    The last dimension of each is the trials, so elementwise arithmetic reads as for one trial.
    """
    parameter.addcmul_(gradient, lr, value=-1)  # parameter -= lr * gradient, in one pass


class Task(NamedTuple):
    x: Sequence  # [rows, ...]; flat rows of floats are standardised by the training rows
    y: Sequence  # numbers, [rows] or [rows, outputs], standardised likewise; or class labels
    loss: Callable  # of one trial's (outputs, targets), as F.mse_loss is; never below 0
    held_out: float | slice | Sequence | None = 0.2  # rows to score, or a share; None: all do both


ARTICLE_X = "3.3 4.4 5.5 6.71 6.93 4.168 9.779 6.182 7.59 2.167 7.042 10.791 5.313 7.997 3.1"
ARTICLE_Y = "1.7 2.76 2.09 3.19 1.694 1.573 3.366 2.596 2.53 1.221 2.827 3.465 1.65 2.904 1.3"
ARTICLE = np.array([ARTICLE_X.split(), ARTICLE_Y.split()], float)
TASKS = {
    "xor": Task([[0.0, 0], [0, 1], [1, 0], [1, 1]], [0, 1, 1, 0], F.cross_entropy, held_out=None),
    "regression": Task(ARTICLE[0], ARTICLE[1], F.mse_loss, held_out=slice(2, None, 3)),
}

# ==== 2. The search and its log ==================================================================


class InputError(ValueError):
    """Bad rows, a bad space, a bad log: on the command line it is one line."""


def check(holds: object, message: str) -> None:
    if not holds:
        raise InputError(message)


@dataclass
class Trial:
    number: int
    seed: int  # of the search; with number and repeat it decides all that is random in the trial
    hyperparams: dict
    repeat: int = 0  # 0: the trial itself; 1, 2, ...: a repeat of it in the finals
    score: float = math.nan  # higher is better; NaN: diverged
    seconds: float | None = None  # None: has not run
    repeats: list[float] = field(default_factory=list)  # the scores of its repeats


def sample_hyperparams(space: dict, seed: int, number: int) -> dict:
    """The hyperparameters of the trial of this number, as plain Python values."""
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number, 0)))
    sample = {}
    for name, values in space.items():
        listed = isinstance(values, list | tuple | range | np.ndarray | Tensor) and len(values)
        check(listed or callable(values), f"space: {name} must be a list of values or a function")
        value = values[generator.integers(len(values))] if listed else values(generator)
        value = value.item() if isinstance(value, np.generic | Tensor) else value
        # 0.3, not linspace's 0.30000000000000004
        sample[name] = float(f"{value:.15g}") if isinstance(value, float) else value
    return sample


def random_search(
    train_and_evaluate: Callable[[list[Trial]], Iterable[tuple[Trial, float]]],
    space: dict,
    trials: int | Iterable[int],
    seed: int = 0,
    log: str | None = None,
    repeats: int = 0,
    **settings,
) -> list[Trial]:
    """Score trials 0 to trials - 1, or those of the numbers trials; return them, the best first.

    train_and_evaluate is handed the trials to run and yields (trial, score) as they finish; higher
    is better. Those that the file log has of this search do not run again. The five best then run
    again repeats times, with other random numbers. settings are what else decides the scores.
    """
    numbers = range(trials) if isinstance(trials, int | np.integer) else map(int, trials)
    seed = int(seed)
    trials = [Trial(n, seed, sample_hyperparams(space, seed, n)) for n in numbers]
    check(trials, "there are no trials to run")
    check(log or launched()[1] == 1, "several processes need a log, to share the trials by")
    functions = filter(inspect.isfunction, space.values())
    enclosed = [inspect.getclosurevars(function).nonlocals for function in functions]
    settings |= {"train_and_evaluate": train_and_evaluate, "seed": seed}
    settings |= {"space": space, "enclosed": enclosed}
    database, key = open_log(log, settings)
    try:
        run_missing(train_and_evaluate, trials, database, key)
        trials = ranked(trials)
        finals = [replace(trial, repeat=1 + n) for trial in trials[:5] for n in range(repeats)]
        run_missing(train_and_evaluate, finals, database, key)
    except (InputError, sqlite3.Error):
        raise  # one line on the command line, and a broken log has nothing to report
    except BaseException:
        fill_in_scores(database, key, trials)
        if finished := ranked(trials):
            with contextlib.redirect_stdout(sys.stderr):
                report(finished)
        raise
    for trial in trials[:5]:
        trial.repeats = [final.score for final in finals if final.number == trial.number]
    database.close()
    return trials


def launched() -> tuple[int, int]:
    """The rank of this process, and how many processes torchrun has launched."""
    if not distributed.is_torchelastic_launched():
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def run_missing(
    train_and_evaluate: Callable, trials: list[Trial], database: sqlite3.Connection, key: str
) -> None:
    """Train what the log has not: of it this process's share, then whatever is left."""
    rank, processes = launched()
    while missing := fill_in_scores(database, key, trials):
        trial = None
        begun = time.monotonic()
        previous = begun
        shown = begun
        for trial, score in train_and_evaluate(missing[rank::processes] or missing):
            now = time.monotonic()
            row = [key, trial.number, trial.repeat, score if math.isfinite(score) else None]
            seconds = trial.seconds or now - previous  # a stack has shared out its own
            row += [json.dumps(trial.hyperparams, default=repr), seconds]
            database.execute("INSERT OR IGNORE INTO trials VALUES (?, ?, ?, ?, ?, ?)", row)
            previous = now
            if rank == 0 and sys.stderr.isatty() and now > shown + 0.5:
                shown = now
                ran = len(missing) - len(fill_in_scores(database, key, trials))
                show_progress(trials, ran / (now - begun))
        check(trial, "train_and_evaluate yielded no score")
        if shown > begun:
            print(" " * 79, end="\r", file=sys.stderr)


def fill_in_scores(database: sqlite3.Connection, key: str, trials: list[Trial]) -> list[Trial]:
    """Set the scores of those of trials that the log has; return the others."""
    query = "SELECT number, repeat, score, seconds FROM trials WHERE search = ?"
    done = {row[:2]: row[2:] for row in database.execute(query, [key])}
    for trial in trials:
        score, trial.seconds = done.get((trial.number, trial.repeat), (None, None))
        trial.score = math.nan if score is None else score
    return [trial for trial in trials if trial.seconds is None]


def ranked(trials: list[Trial]) -> list[Trial]:
    """Those that have run, the best first; of equal ones the lowest number; diverged ones last."""
    finished = [trial for trial in trials if trial.seconds is not None]
    return sorted(finished, key=lambda t: (math.isnan(t.score), -t.score, t.number))


def show_progress(trials: list[Trial], rate: float) -> None:
    """One line on the terminal, which the next one covers."""
    finished = ranked(trials)
    line = f"{len(finished)} of {len(trials)} trials, best score {finished[0].score:.4g}, "
    line += f"{rate:.1f} a second, {(len(trials) - len(finished)) / rate:.0f} s left"
    print(line.ljust(79), end="\r", file=sys.stderr, flush=True)


def open_log(path: str | None, settings: dict) -> tuple[sqlite3.Connection, str]:
    """The database at path, or in memory, and the key in it of the search of these settings."""
    check(path != "", "the log must have a name")
    database = sqlite3.connect(path or ":memory:", timeout=60, isolation_level=None)
    tables = {table for (table,) in database.execute("SELECT tbl_name FROM sqlite_master")}
    check(tables <= {"searches", "trials"}, "the log is a database of something else")
    # A trial then takes 15 us and survives a kill. If it is locked, another process does the same.
    with contextlib.suppress(sqlite3.OperationalError):
        database.execute("PRAGMA journal_mode = WAL")
    database.execute("CREATE TABLE IF NOT EXISTS searches (search PRIMARY KEY, settings)")
    columns = "search, number, repeat, score, hyperparams, seconds"
    unique = "UNIQUE (search, number, repeat)"
    database.execute(f"CREATE TABLE IF NOT EXISTS trials ({columns}, {unique})")
    text = json.dumps(settings, default=describe)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    added = database.execute("INSERT OR IGNORE INTO searches VALUES (?, ?)", [key, text]).rowcount
    here = json.loads(text)
    edits = []
    for (other,) in database.execute("SELECT settings FROM searches WHERE search != ?", [key]):
        other = json.loads(other)
        edited = [name for name in here | other if here.get(name) != other.get(name)]
        edits += [edited] if "task" not in edited else []
    if added and edits:
        edited = ", ".join(min(edits, key=len))
        print(f"{path}: a new search, since this was edited: {edited}", file=sys.stderr)
    return database, key


def describe(value: object) -> object:
    """For json: arrays as lists, functions and classes as their source."""
    if isinstance(value, np.ndarray | np.generic | Tensor):
        return value.tolist()
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):  # neither, or typed in
        return repr(value)


# ==== 3. Training side by side ===================================================================


class Scale(NamedTuple):
    """Mean and spread of each column, float64 on the CPU: 0 and 1 where there is none to take."""

    mean: Tensor
    spread: Tensor

    def standardise(self, values: Tensor) -> Tensor:
        if not values.is_floating_point():
            return values
        standard = (values - self.mean.to(values)) / self.spread.to(values)
        return standard.to(torch.get_default_dtype())

    def restore(self, values: Tensor) -> Tensor:
        return values * self.spread.to(values) + self.mean.to(values)


class Data(NamedTuple):
    loss: Callable
    train: tuple[Tensor, Tensor]  # x and y, standardised
    scored: tuple[Tensor, Tensor]  # x standardised, y not
    sizes: tuple[int, int]  # inputs and outputs of a model
    scales: tuple[Scale, Scale]  # of x and of y


class Stack(NamedTuple):
    trials: list[Trial]  # two at least
    keys: Tensor  # of their random numbers, [trials, 64, 2]
    model: nn.Module  # of the first trial, for its structure
    layers: dict[str, nn.Module]  # of the model, if it needs no vmap
    state: dict[str, Tensor]  # the parameters and buffers of all, [trials, ...]
    updated: list[tuple[Tensor, Tensor, dict]]  # parameter, a view of it [..., trials], state
    hyperparams: dict[str, Tensor]  # of update, [trials]


def search(
    task: str, trials: int = 200, epochs: int = 500, seed: int = 0, device: str = "cpu", **options
) -> list[Trial]:
    """random_search of a task of TASKS over HYPERPARAMS; options are log and repeats."""
    data = prepare(task, device)
    trial = Trial(0, seed, sample_hyperparams(HYPERPARAMS, seed, 0))
    check("batch_size" in HYPERPARAMS, "HYPERPARAMS: batch_size is missing")
    for_model, for_update = split_hyperparams(trial.hyperparams)
    try:
        inspect.signature(update).bind(0, 0, 0, **for_update)
        inspect.signature(build_model).bind(0, 0, **for_model)
    except TypeError as error:
        raise InputError(f"HYPERPARAMS: {error}") from None
    rows = b"".join(part.cpu().numpy().tobytes() for part in data.train + data.scored)
    settings = {"task": task, "rows": hashlib.sha256(rows).hexdigest(), "epochs": epochs}
    settings |= {"device": data.train[0].device.type, "torch": torch.__version__}
    settings |= {"build_model": build_model, "update": update, "loss": data.loss}
    settings |= {type(layer).__name__: type(layer) for layer in make_model(trial, data).modules()}

    def train(trials: list[Trial]) -> Iterator[tuple[Trial, float]]:
        return train_and_evaluate(trials, data, epochs)

    return random_search(train, HYPERPARAMS, trials, seed, **settings, **options)


def train_and_evaluate(
    trials: list[Trial], data: Data, epochs: int, models: list | None = None
) -> Iterator[tuple[Trial, float]]:
    """Train trials side by side; yield each with its score, 1 / loss, when its stack is done.

    models, if given, grows by the trained models, ordinary modules for raw rows.
    """
    for group in make_stacks(trials, data):
        started = time.perf_counter()
        stack = stack_models(group, data)
        for x, y in batches(stack, data, epochs):
            losses = stacked_loss(data.loss, forward(stack, x), y)
            losses.sum().backward()
            step(stack)
        losses = evaluate(stack, data)
        seconds = (time.perf_counter() - started) / len(group)
        for index, trial in enumerate(group):
            loss = losses[index]
            check(not loss < 0, f"trial {trial.number}: a loss below 0 gives no score")
            if models is not None:
                models.append(take_model(stack, index, data))
            trial.seconds = seconds
            yield trial, 1 / max(loss, 1e-12) if math.isfinite(loss) else math.nan


@torch.no_grad()
def step(stack: Stack) -> None:
    """update each parameter that the loss has reached."""
    for parameter, value, state in stack.updated:
        if parameter.grad is not None:
            update(value, parameter.grad.movedim(0, -1), state, **stack.hyperparams)
            parameter.grad = None


def read_rows(name: str) -> tuple[Tensor, Tensor]:
    """x and y of a task, checked: y holds floats, [rows, outputs], or classes as 0, 1, ..."""
    task = TASKS[name]
    try:
        x, y = (np.asarray(r.detach().cpu() if isinstance(r, Tensor) else r) for r in task[:2])
    except ValueError as error:
        raise InputError(f"task {name}: {error}") from None
    check(len(x) == len(y) > 0, f"task {name}: x has {len(x)} rows, y has {len(y)}")
    loss = getattr(task.loss, "func", task.loss)  # of a partial
    own = loss.__module__ != "torch.nn.functional"
    classes = loss in (F.cross_entropy, F.nll_loss) or (own and y.dtype.kind != "f")
    if classes:
        y = y.astype(str) if y.dtype.kind == "O" else y
        codes = np.unique(y, return_inverse=True)[1]
        y = codes.reshape(len(y), *y.shape[2 if y.shape[1:] == (1,) else 1 :])
    for values in (x, y):
        fit = values.dtype.kind in "biuf" and np.abs(values).max() < 3e38  # of float32; NaN is not
        check(fit, f"task {name}: x and y must be finite numbers")
    x = torch.tensor(x.astype(float) if x.dtype.kind == "f" else x)
    y = torch.tensor(y if classes else y.astype(float))
    x = x[:, None] if x.ndim == 1 else x
    y = y[:, None] if y.ndim == 1 and not classes else y
    return x, y


def prepare(name: str, device: str = "cpu") -> Data:
    """The rows of a task, split, standardised and on the device."""
    x, y = read_rows(name)
    rows = np.arange(len(x))
    scored = TASKS[name].held_out
    if isinstance(scored, float):  # drawn, since rows often come in some order
        scored = np.random.default_rng(0).permutation(rows)[: max(1, round(scored * len(rows)))]
    train = rows if scored is None else np.delete(rows, scored)
    scored = rows if scored is None else rows[scored]
    check(len(train) and len(scored), f"task {name}: held_out is empty, or all rows are in it")
    classes = not y.is_floating_point()
    if classes and not np.isin(y[scored], y[train]).all():
        print(f"task {name}: some classes are only in the rows to score", file=sys.stderr)
    try:
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, ImportError):
        raise InputError(f"device {device} is not to be had here") from None
    scales = (scale(x[train]), scale(y[train]))
    x = scales[0].standardise(x).to(device)
    targets = scales[1].standardise(y).to(device)
    y = y.to(targets)  # its dtype and device, but in its own units
    sizes = (x.shape[1], int(y.max()) + 1 if classes else y.shape[1])
    training = (x[train], targets[train])
    return Data(TASKS[name].loss, training, (x[scored], y[scored]), sizes, scales)


def scale(rows: Tensor) -> Scale:
    """Of flat rows of floats, but for columns that are constant, and where all are 0 or 1."""
    spread, mean = torch.std_mean(rows.double(), 0, correction=0)
    varies = spread > len(rows) * 2.2e-16 * rows.abs().amax(0)  # by more than rounding
    varies &= rows.is_floating_point() and rows.ndim == 2
    varies &= ((rows != 0) & (rows != 1)).any()
    return Scale(mean * varies, torch.where(varies, spread, 1))


def random_bits(keys: Tensor, count: int, first: int = 0) -> Tensor:
    """Random int32 [..., count] of int32 keys [..., 2] and the counters from first on.

    A hash (lowbias32 by C. Wellons, with a key before and within) is the same on every device.
    """
    counters = torch.arange(first, first + count, device=keys.device)
    bits = keys[..., :1] + (counters * 0x9E3779B9).int()
    bits = bits ^ (bits >> 16) & 0xFFFF  # as if the shift brought in zeros
    bits = bits * 0x7FEB352D
    bits = bits ^ (bits >> 15) & 0x1FFFF
    bits = (bits + keys[..., 1:]) * (0x846CA68B - 2**32)
    return bits ^ (bits >> 16) & 0xFFFF


class StackedDropout(nn.Module):
    """nn.Dropout of a stack of trials, with a key, [trials, 2], and a rate, [trials, 1], for each.

    Within vmap both are those of one trial, without the first dimension.
    """

    def __init__(self, keys: Tensor, rates: Tensor):
        super().__init__()
        self.register_buffer("keys", keys)
        self.register_buffer("rates", rates)
        self.used = 0
        self.ahead = rates[:, :0]  # masks of the next steps

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        within_vmap = self.keys.ndim == 1
        count = x.numel() // self.rates.numel()
        masks = self.ahead
        if masks.shape[1] < count:
            # Those of many steps in one call, but not within vmap, which takes them away again.
            steps = 1 if within_vmap else max(1, 2**17 // x.numel())
            bits = random_bits(self.keys, steps * count, self.used).float()
            # 1 or 0, since bits are whole numbers; a comparison takes three times as long
            masks = (bits - (self.rates * 2**32 - 2**31)).clamp(0, 1) / (1 - self.rates)
        self.used += count
        if not within_vmap:
            self.ahead = masks[:, count:]
        return x * masks[..., :count].view(x.shape)


def split_hyperparams(hyperparams: dict) -> tuple[dict, dict]:
    """Those that are arguments of build_model, and those of update; batch_size is neither's."""
    names = list(inspect.signature(update).parameters)[3:]
    others = {name: value for name, value in hyperparams.items() if name not in names}
    others.pop("batch_size", None)
    return others, {name: hyperparams[name] for name in names if name in hyperparams}


def trial_keys(trial: Trial) -> Tensor:
    """Random int32 [64, 2]: of the initial weights, the order of rows, and each dropout."""
    words = np.random.SeedSequence(trial.seed, spawn_key=(trial.number, 1, trial.repeat))
    return torch.from_numpy(words.generate_state(128).view(np.int32)).view(64, 2)


def make_model(trial: Trial, data: Data) -> nn.Module:
    """The model of a trial before training, in ordinary PyTorch."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed of the CPU alone: of all devices it takes 90 us
        torch.default_generator.manual_seed(int(trial_keys(trial)[0, 0]))
        for_model, _ = split_hyperparams(trial.hyperparams)
        model = build_model(*data.sizes, **for_model)
    return model.to(data.train[0].device)


def make_stacks(trials: list[Trial], data: Data) -> list[list[Trial]]:
    """Group the trials whose models differ in nothing but weights and rates of dropout."""
    groups = {}
    for trial in trials:
        for_model, _ = split_hyperparams(trial.hyperparams)
        shape = {name: value for name, value in for_model.items() if "dropout" not in name}
        batch_size = trial.hyperparams["batch_size"]
        check(isinstance(batch_size, int) and batch_size > 0, f"batch_size is {batch_size!r}")
        batch_size = min(batch_size, len(data.train[0]))
        groups.setdefault(repr((batch_size, shape)), []).append(trial)
    stacks = []
    for group in groups.values():
        floats = 2**22 if data.train[0].is_cpu else 2**28  # on a CPU what its caches serve best
        most = max(2, floats // try_model(group[0], data))
        count = math.ceil(len(group) / most)
        stacks += [group[start::count] for start in range(count)]
    return stacks


def try_model(trial: Trial, data: Data) -> int:
    """Run and check a trial's model in plain PyTorch, where its own errors show best; its size.

    The size counts floats: weights, and what the modules return; each is needed twice in training.
    """
    model = make_model(trial, data)
    x, y = (part[: trial.hyperparams["batch_size"]] for part in data.train)
    size = [2 * parameter.numel() for parameter in model.parameters()]

    def count(module: nn.Module, inputs: tuple, outputs: Tensor) -> None:
        size.append(2 * outputs.numel() if isinstance(outputs, Tensor) else 0)

    for module in model.modules():
        module.register_forward_hook(count)
    with torch.random.fork_rng(devices=[]):
        outputs = model(x)
    shape = (len(y), data.sizes[1], *y.shape[2 if y.is_floating_point() else 1 :])
    found = f"outputs have shape {tuple(outputs.shape)}, targets {tuple(y.shape)}"
    check(outputs.shape == shape, f"{found}; the outputs should have {shape}")
    (gradient,) = torch.autograd.grad(data.loss(outputs, y), outputs)
    check(gradient.any(), f"the loss does not depend on the outputs: {found}")
    return sum(size)


def stack_models(trials: list[Trial], data: Data) -> Stack:
    """Stack the parameters and buffers of the models of trials, and their dropouts."""
    if len(trials) == 1:
        trials = trials * 2  # one would go to other kernels, with other last bits
    device = data.train[0].device
    keys = torch.stack([trial_keys(trial) for trial in trials]).to(device)
    models = [make_model(trial, data) for trial in trials]
    parameters, state = stack_module_state(models)
    model = models[0]
    dropouts = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is nn.Dropout:
            if module not in dropouts:  # one may stand in several places
                rates = torch.tensor([[m.get_submodule(name).p] for m in models], device=device)
                dropouts[module] = StackedDropout(keys[:, 2 + len(dropouts)], rates)
            model.set_submodule(name, dropouts[module])
    updated = []
    for parameter in parameters.values():
        if parameter.ndim == 3:
            # In memory [trials, in, out], as its gradient will be: else autograd copies each
            parameter.data = parameter.data.mT.contiguous().mT
        updated.append((parameter, parameter.data.movedim(0, -1), {}))
    state = dict(model.named_buffers()) | state | parameters
    hyperparams = {}
    _, for_update = split_hyperparams(trials[0].hyperparams)
    for name in for_update:
        values = [float(trial.hyperparams[name]) for trial in trials]
        hyperparams[name] = torch.tensor(values, device=device)
    return Stack(trials, keys, model, fast_layers(model), state, updated, hyperparams)


def batches(stack: Stack, data: Data, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """x and y [trials, batch, ...] of each step; every trial has its own order in every epoch."""
    x, y = data.train
    rows = len(x)
    batch_size = stack.trials[0].hyperparams["batch_size"]
    # A last batch of one row, too few for BatchNorm, joins the one before.
    cuts = list(range(batch_size, rows - (batch_size > 1), batch_size))
    order = torch.arange(rows, device=x.device).expand(len(stack.trials), -1)
    for epoch in range(epochs):
        if cuts:  # the order of a full batch does not matter
            order = random_bits(stack.keys[:, 1], rows, epoch * rows).argsort(stable=True)
        for batch in order.tensor_split(cuts, dim=1):
            yield x[batch], y[batch]


def fast_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of an nn.Sequential that needs no vmap, or none."""
    layers = dict(model.named_children())
    elementwise = (StackedDropout, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh)
    # named_children leaves out repeats: a layer in two places is not simple
    simple = type(model) is nn.Sequential and len(layers) == len(model)
    for layer in layers.values():
        affine = type(layer) is nn.Linear and layer.bias is not None
        simple = simple and (affine or type(layer) in elementwise)
    return layers if simple else {}


def forward(stack: Stack, x: Tensor) -> Tensor:
    """The outputs [trials, rows, ...] of each trial's model for its x, [trials, rows, ...]."""
    if stack.layers and x.ndim == 3:  # the fast path
        for name, layer in stack.layers.items():
            if type(layer) is nn.Linear:
                weight = stack.state[f"{name}.weight"]
                bias = stack.state[f"{name}.bias"].unsqueeze(1)
                x = torch.baddbmm(bias, x, weight.mT)
            else:
                x = layer(x)
        return x
    try:
        return vmap(partial(functional_call, stack.model))(stack.state, x)
    except RuntimeError as error:  # vmap's, since try_model ran it in plain PyTorch
        frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
        modules = [f["self"] for f in frames if isinstance(f.get("self"), nn.Module)]
        name = type(modules[-1] if modules else stack.model).__name__
        raise InputError(f"{name} cannot be stacked, see the README: {error}") from error


def stacked_loss(loss: Callable, outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of each trial, [trials]."""
    if loss in (F.mse_loss, F.cross_entropy):  # vmap would be slower
        losses = loss(outputs.flatten(0, 1), targets.flatten(0, 1), reduction="none")
        return losses.view(len(outputs), -1).mean(1)
    return vmap(loss)(outputs, targets)


@torch.no_grad()
def evaluate(stack: Stack, data: Data) -> list[float]:
    """The loss of each trial on the rows to score, in the targets' own units."""
    stack.model.eval()
    x, y = (part.expand(len(stack.trials), *part.shape) for part in data.scored)
    outputs = torch.cat([forward(stack, part.contiguous()) for part in x.split(128, dim=1)], 1)
    return stacked_loss(data.loss, data.scales[1].restore(outputs), y).tolist()


def take_model(stack: Stack, index: int, data: Data) -> nn.Module:
    """The trained model of the trial at an index: ordinary, in eval mode, for raw rows."""
    model = make_model(stack.trials[index], data)
    state = {name: value[index] for name, value in stack.state.items()}
    model.load_state_dict(state, strict=False)  # it also has the keys of dropouts
    return RawInputs(model, data.scales).eval()


class RawInputs(nn.Module):
    """A trained model for raw rows: it standardises them, and turns outputs back into raw ones."""

    def __init__(self, model: nn.Module, scales: tuple[Scale, Scale]):
        super().__init__()
        self.model = model
        self.scales = scales

    def forward(self, x: Tensor) -> Tensor:
        x_scale, y_scale = self.scales
        return y_scale.restore(self.model(x_scale.standardise(x)))


def save_model(path: str, trial: Trial, data: Data, epochs: int) -> None:
    """Train a trial once more, and keep its model."""
    models = []
    list(train_and_evaluate([trial], data, epochs, models))
    kept = {"hyperparams": trial.hyperparams, "sizes": data.sizes}
    kept |= {"scales": [list(scale) for scale in data.scales]}
    torch.save(kept | {"state_dict": models[0].model.state_dict()}, path)


def load_model(path: str) -> RawInputs:
    """The model that --save kept, in eval mode, for raw rows."""
    kept = torch.load(path, map_location="cpu", weights_only=True)
    for_model, _ = split_hyperparams(kept["hyperparams"])
    model = build_model(*kept["sizes"], **for_model)
    model.load_state_dict(kept["state_dict"])
    return RawInputs(model, tuple(Scale(*scale) for scale in kept["scales"])).eval()


# ==== 4. The command line ========================================================================


def report(trials: list[Trial]) -> None:
    """Print the five best, the losses of their repeats, and who is better on average."""
    best = [trial for trial in trials[:5] if not math.isnan(trial.score)]
    losses = {trial.number: 1 / np.array(trial.repeats) for trial in best if trial.repeats}
    rows = [["trial", "score", "loss", *trials[0].hyperparams, "loss of repeats"]]
    for trial in best:
        loss = 1 / trial.score if trial.score else math.inf
        cells = [trial.number, trial.score, loss, *trial.hyperparams.values(), ""]
        if trial.repeats:
            own = losses[trial.number]
            cells[-1] = f"{own.mean():.4g} ± {own.std():.2g}"
        rows.append([f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.rjust, row, widths)))
    print(f"{sum(math.isnan(trial.score) for trial in trials)} of {len(trials)} trials diverged")
    for number, own in losses.items():
        first = losses[best[0].number]
        gain = first.mean() - own.mean()
        error = math.sqrt((first.var() + own.var()) / max(1, len(own) - 1))  # of the gain
        if len(own) > 1 and gain > 2 * error:
            print(f"trial {number} is better on average, by {gain:.4g}: the best had luck")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0], allow_abbrev=False)
    parser.add_argument("--task", choices=TASKS, default="xor", help="(default: xor)")
    parser.add_argument("--trials", type=int, default=200, help="how many (default: 200)")
    parser.add_argument("--epochs", type=int, default=500, help="of each trial (default: 500)")
    parser.add_argument("--repeats", type=int, default=5, help="of the five best (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default: 0)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")
    parser.add_argument("--log", help="database of finished trials, which do not run again")
    parser.add_argument("--save", help="file for the best model, see load_model")
    parser.add_argument("--trial", type=int, help="run the trial of this number alone")
    args = parser.parse_args()
    for name, least in {"trials": 1, "epochs": 1, "repeats": 0, "seed": 0, "trial": 0}.items():
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name} must be {least} or more")
    if args.save and not Path(args.save).parent.is_dir():
        parser.error(f"--save {args.save}: there is no such folder")
    numbers = args.trials if args.trial is None else [args.trial]
    options = {"device": args.device, "log": args.log, "repeats": args.repeats}
    try:
        trials = search(args.task, numbers, args.epochs, args.seed, **options)
        if launched()[0] > 0:
            return 0
        if args.save:
            save_model(args.save, trials[0], prepare(args.task, args.device), args.epochs)
        status = int(math.isnan(trials[0].score))
        try:
            report(trials)
            print(trials[0].hyperparams, flush=True)
        except BrokenPipeError:  # its reader has left; at exit Python would complain once more
            os._exit(status)
        return status
    except InputError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except sqlite3.Error as error:
        parser.exit(2, f"{parser.prog}: error: --log {args.log}: {error}\n")
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
