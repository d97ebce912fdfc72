"""Random search over hyperparameters in PyTorch, in one file to copy; many trials train at once.

    python random_search.py --task regression --trials 1000 --log trials.db --save best.pt

A trial trains one net, as train_alone does in ten lines of plain PyTorch; section 4 trains many at
once, where it knows all their layers and their optimizer. On a CPU a trial's score is a function of
its number and the search's seed, to the last bit: alone, among any others, on any number of
processes, resumed or not. Left out on purpose: samplers that learn from trials, pruning of trials
that start badly (take Optuna), clusters (Ray Tune), plots (the log is a table: take what you like).
See Bergstra and Bengio, "Random Search for Hyper-Parameter Optimization", JMLR 13, 2012.
"""

import argparse
import ast
import atexit
import contextlib
import copy
import functools
import hashlib
import inspect
import json
import math
import os
import pickle
import random
import sqlite3
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import NamedTuple

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # a product's last bits: the same in any stack

import numpy as np
import torch
from torch import Tensor, distributed, nn, optim
from torch.nn import functional as F

torch.set_num_threads(1)  # more would wait for each other at every layer: use processes

# ==== 1. Edit here: the space, the model, the data ===============================================

# A value is a list, each element equally likely, or a function of a numpy.random.Generator.
HYPERPARAMS = {
    "lr": np.linspace(0.001, 0.1, 100),  # or: lambda generator: 10 ** generator.uniform(-4, -1)
    "batch_size": [16, 32, 64, 128],
    "hidden_size": [32, 64, 128, 256],
    "num_layers": [1, 2, 3, 4],
    "dropout": [0.1, 0.2, 0.3, 0.4, 0.5],
}
# What train_alone reads, or your loop there. The rest goes by name to build_model and optimizer.
LOOP = {"batch_size", "epochs"}


def mlp(inputs, outputs, hidden_size, num_layers, dropout) -> nn.Module:
    layers = []
    for _ in range(num_layers):
        layers += [nn.Linear(inputs, hidden_size), nn.ReLU(), nn.Dropout(dropout)]
        inputs = hidden_size
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class Task(NamedTuple):
    train_x: Tensor  # [rows, ...]
    train_y: Tensor  # [rows, outputs] of floats, or [rows] of classes
    valid_x: Tensor  # the rows that score a trial
    valid_y: Tensor
    build_model: Callable[..., nn.Module]  # takes hyperparameters by name
    loss: Callable[[Tensor, Tensor], Tensor]  # of outputs and y, as F.mse_loss is
    score: Callable | None = None  # of the same, of the valid rows; higher is better; None: -loss
    optimizer: Callable = optim.SGD  # takes parameters, and hyperparameters by name
    stack: bool = True  # False: every trial trains in train_alone; needed once that is edited


def xor() -> Task:
    x = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    y = torch.tensor([0, 1, 1, 0])
    return Task(x, y, x, y, functools.partial(mlp, 2, 2), F.cross_entropy)


def regression() -> Task:
    """15 rows of a well-known tutorial, standardised by those that train; every third scores."""
    x = "3.3 4.4 5.5 6.71 6.93 4.168 9.779 6.182 7.59 2.167 7.042 10.791 5.313 7.997 3.1"
    y = "1.7 2.76 2.09 3.19 1.694 1.573 3.366 2.596 2.53 1.221 2.827 3.465 1.65 2.904 1.3"
    rows = torch.tensor([[float(a), float(b)] for a, b in zip(x.split(), y.split(), strict=True)])
    valid = torch.arange(len(rows)) % 3 == 2
    rows = (rows - rows[~valid].mean(0)) / rows[~valid].std(0)
    x, y = rows.split(1, dim=1)
    return Task(x[~valid], y[~valid], x[valid], y[valid], functools.partial(mlp, 1, 1), F.mse_loss)


TASKS = {"xor": xor, "regression": regression}

# ==== 2. A trial =================================================================================

# Each seed begins with one of these, so that no two draw the same. Weights follow from the search's
# seed, the trial's repeat and number; order and dropout from the first two: equal terms for all.
SPACE, WEIGHTS, ORDER, DROPOUT = range(1, 5)
ONE_AT_A_TIME = threading.RLock()  # threads share the state of random numbers
signature = functools.cache(inspect.signature)  # which takes 80 us


class InputError(ValueError):
    """What the reader can mend in what he gave; on the command line one line, no traceback."""


def require(condition: bool, message: str) -> None:  # an assert would be gone under -O
    if not condition:
        raise InputError(message)


@dataclass
class Trial:
    number: int
    hyperparams: dict
    seed: int  # of the search
    repeat: int = 0  # 0: the trial itself; 1, 2, ...: again, with other random numbers
    score: float | None = None  # higher is better; NaN: diverged; None: has not run
    repeats: list[float] = field(default_factory=list)  # the scores of its repeats


def sample_hyperparams(space: dict | Callable, seed: int, number: int) -> dict:
    """The hyperparameters of the trial of this number, as plain Python values."""
    generator = np.random.default_rng([SPACE, seed, number])
    if callable(space):  # where one value depends on another
        space = {name: [value] for name, value in space(generator).items()}
    sample = {}
    for name, values in space.items():
        if callable(values):
            value = values(generator)
        else:
            is_list = isinstance(values, list | range | np.ndarray) and len(values) > 0
            require(is_list, f"space: {name} must be a list of values, or a function for a range")
            value = values[generator.integers(len(values))]
        value = value.item() if isinstance(value, np.generic) else value
        # 0.3, not linspace's 0.30000000000000004
        sample[name] = float(f"{value:.15g}") if isinstance(value, float) else value
    return sample


def seed_everything(*entropy: int) -> None:
    """Seed torch's, numpy's and Python's own random numbers."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    seeder = torch if torch.accelerator.is_available() else torch.default_generator
    seeder.manual_seed(seed)  # torch's own is for devices too, and looks for them, 0.5 ms
    torch.set_flush_denormal(True)  # of this thread; tiny gradients would be 3 to 15 times slower


@contextlib.contextmanager
def error_note(trial: Trial) -> Iterator[None]:
    """Add what trial it is to an error of the reader's own code."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in trial {trial.number}: {trial.hyperparams}")
        raise


def taken_by(function: Callable, hyperparams: dict) -> dict:
    """Those of hyperparams that function has arguments for, as copies: it may change them."""
    parameters = signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    names = [n for n in hyperparams if n in parameters or (takes_all and n not in LOOP)]
    return {name: copy.deepcopy(hyperparams[name]) for name in names}


def make_model(trial: Trial, task: Task) -> nn.Module:
    """The untrained model of a trial."""
    seed_everything(WEIGHTS, trial.seed, trial.repeat, trial.number)
    return task.build_model(**taken_by(task.build_model, trial.hyperparams)).to(task.train_x.device)


def each_epoch(trial: Trial, task: Task, epochs: int) -> Iterator[Iterator[tuple]]:
    """The batches of each epoch, x [batch_size, ...] and y, in another order each time."""
    x, y = task.train_x, task.train_y
    generator = np.random.default_rng([ORDER, trial.seed, trial.repeat])
    for _ in range(trial.hyperparams.get("epochs", epochs)):  # the space's go first
        order = torch.from_numpy(generator.permutation(len(x))).to(x.device, non_blocking=True)
        batches = order.split(trial.hyperparams.get("batch_size", len(x)))
        yield ((x.index_select(0, rows), y.index_select(0, rows)) for rows in batches)


def train_alone(trial: Trial, model: nn.Module, task: Task, epochs: int) -> None:
    """Train a model: a schedule, clipping, early stopping go here, with stack=False in the task."""
    optimizer = task.optimizer(model.parameters(), **taken_by(task.optimizer, trial.hyperparams))
    seed_everything(DROPOUT, trial.seed, trial.repeat)
    for batches in each_epoch(trial, task, epochs):
        for x, y in batches:
            optimizer.zero_grad()
            task.loss(model(x), y).backward()
            optimizer.step()


@torch.no_grad()
def evaluate(model: nn.Module, task: Task) -> float:
    """The score of a trained model on the valid rows; leaves it in eval mode."""
    model.eval()
    outputs = torch.cat([model(x.clone()) for x in task.valid_x.split(1024)])  # it may change x
    if outputs.isnan().any():
        return math.nan  # or argmax would take it for class 0
    y = task.valid_y.clone()
    return float(task.score(outputs, y) if task.score else -task.loss(outputs, y))


# ==== 3. The search ==============================================================================


def train(trials: list[Trial], task: Task, epochs: int) -> Iterator[tuple[Trial, nn.Module]]:
    """Train trials, those of one structure together; yield each with its model, as it is done."""
    torch.empty(2**25 - 2**16, dtype=torch.uint8)  # for speed: glibc then keeps what is freed
    waiting = defaultdict(list)  # for others of the same structure
    for trial in trials:
        with error_note(trial):
            model = make_model(trial, task)
            kind = structure(trial, model, task)
            if kind is None:  # section 4 does not know it all, or stack=False
                train_alone(trial, model, task, epochs)
                yield trial, model
                continue
        waiting[kind].append((trial, model))
        if len(waiting[kind]) == kind[0]:  # the fastest size of a stack
            yield from train_stack(waiting.pop(kind), task, epochs)
    for stack in waiting.values():
        yield from train_stack(stack, task, epochs)


def train_and_evaluate(trials: list[Trial], task: Task | Callable, epochs: int) -> Iterator[tuple]:
    """Train trials, or call the function task of their hyperparams; yield each with its score."""
    if isinstance(task, Task):
        for trial, model in train(trials, task, epochs):
            seed_everything(DROPOUT, trial.seed, trial.repeat)  # a score may draw
            with error_note(trial):
                yield trial, evaluate(model, task)
    else:
        for trial in trials:
            seed_everything(WEIGHTS, trial.seed, trial.repeat)  # all on equal terms
            with error_note(trial):
                yield trial, float(task(copy.deepcopy(trial.hyperparams)))


def run(trials: list[Trial], task: Task | Callable, epochs: int, log: "Log") -> None:
    """Score those of trials that the log does not have, shared out among the processes."""
    missing = log.exchange(trials)  # the others have their scores now
    parts = my_parts(missing, task) if PROCESSES > 1 else [missing]
    results = (result for part in parts for result in train_and_evaluate(part, task, epochs))
    begun = shown = time.monotonic()
    for done, (trial, score) in enumerate(results, 1):
        log.add(trial, score)  # and set trial.score
        if time.monotonic() - shown > 0.5 and RANK == 0 and sys.stderr:
            shown = time.monotonic()
            line = f"{done} of {len(missing)} trials, best {ranked(trials)[0].score:.4g}"
            print(f"{line:60}", end="\r", file=sys.stderr, flush=True)
    if shown > begun:
        print(" " * 60, end="\r", file=sys.stderr, flush=True)
    log.exchange(trials)  # for the scores of the other processes


def ranked(trials: list[Trial]) -> list[Trial]:
    """Those that have run, the best first, the diverged last."""
    finished = [trial for trial in trials if trial.score is not None]
    return sorted(finished, key=lambda trial: (math.isnan(trial.score), -trial.score, trial.number))


@contextlib.contextmanager
def random_numbers_restored() -> Iterator[None]:
    """After it the caller's random numbers go on as if nothing had been; one thread at a time."""
    with ONE_AT_A_TIME, torch.random.fork_rng(), contextlib.ExitStack() as at_the_end:
        at_the_end.callback(random.setstate, random.getstate())
        at_the_end.callback(np.random.set_state, np.random.get_state())
        yield


@random_numbers_restored()
def random_search(
    task: Task | Callable[[dict], float],
    space: dict | Callable = HYPERPARAMS,
    trials: int | Iterable[int] = 200,
    epochs: int = 500,
    *,
    seed: int = 0,
    repeats: int = 0,
    log: str | None = None,
    name: str = "",
) -> list[Trial]:
    """Score trials 0 to trials - 1, or those numbers; return what has finished, the best first.

    task is a Task, or a function of hyperparams that returns a score, higher is better. Trials that
    the file log has of this search do not run again. The five best then run again repeats times,
    with other random numbers, and the mean of these ranks them. Ctrl-C returns what has finished.
    """
    numbers = [*dict.fromkeys(trials if isinstance(trials, Iterable) else range(trials))]
    whole = [seed, repeats, epochs, *numbers]
    are_whole = all(isinstance(n, int | np.integer) and 0 <= n < 2**63 for n in whole)
    require(are_whole and epochs and numbers, "trials, epochs: whole, from 1; seed, repeats from 0")
    trials = [Trial(int(n), sample_hyperparams(space, seed, n), int(seed)) for n in numbers]
    again = repr([sample_hyperparams(space, seed, n) for n in numbers])  # as text: NaN is not NaN
    is_same = again == repr([trial.hyperparams for trial in trials])
    require(is_same, "space: draw from the generator alone")
    if isinstance(task, Task):
        check(task, trials)
    database = sqlite3.connect(log or ":memory:", timeout=60, isolation_level=None)
    with contextlib.closing(database), contextlib.suppress(KeyboardInterrupt):
        records = Log(database, log, name, trials, space, int(seed), int(epochs), task)
        run(trials, task, epochs, records)
        finals = ranked(trials)[:5]
        reruns = [replace(t, repeat=n + 1, score=None) for t in finals for n in range(repeats)]
        run(reruns, task, epochs, records)
        for trial in finals:
            trial.repeats = [own.score for own in reruns if own.number == trial.number]
    means = {t.number: np.nan_to_num(np.mean(t.repeats), nan=-np.inf) for t in trials if t.repeats}
    return sorted(ranked(trials), key=lambda trial: -means.get(trial.number, -np.inf))


def check(task: Task, trials: list[Trial]) -> None:
    """Raise InputError for what would go wrong silently."""
    require(task.score is not task.loss, "score: higher is better; leave it out for -loss")
    sizes = [t.hyperparams.get(name, 1) for t in trials for name in ("batch_size", "epochs")]
    require(all(isinstance(n, int) and n > 0 for n in sizes), "batch_size, epochs: whole, from 1")
    names = {name: None for trial in trials for name in trial.hyperparams}
    taken = LOOP | taken_by(task.build_model, names).keys() | taken_by(task.optimizer, names).keys()
    require(names.keys() <= taken, f"{names.keys() - taken} not of build_model, optimizer, LOOP")
    with error_note(trials[0]), torch.no_grad():
        model = make_model(trials[0], task)
        trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
        are_new = trained.isdisjoint(make_model(trials[0], task).parameters())
        outputs = ["rows", *model.eval()(task.train_x[:2].clone()).shape[1:]]
    require(are_new, "build_model must make new parameters each time")
    for x, y in (task.train_x, task.train_y), (task.valid_x, task.valid_y):
        require(0 < len(x) == len(y), f"x has {len(x)} rows and y {len(y)}")
        targets = ["rows", *y.shape[1:]]
        is_alike = outputs == targets or 1 not in outputs + targets
        require(is_alike, f"outputs {outputs} and y {targets} would broadcast")


# ==== 4. Many trials at once =====================================================================

# Trials of one structure are a stack, the first dimension of its tensors. Here stand the layers and
# optimizers whose last bits were seen to be the same in stacks of any size; all else trains alone.

LAYERS = {nn.Linear, nn.ReLU, nn.Tanh, nn.Dropout}
SETTINGS = "lr", "momentum", "weight_decay"  # in which the trials of a stack may differ
HOOKS = "forward", "forward_pre", "backward", "backward_pre", "post_accumulate_grad"


def sgd(parameter, gradient, state, lr, momentum, weight_decay) -> None:
    """A step of torch.optim.SGD; settings are [trials, 1, 1]."""
    gradient = torch.addcmul(gradient, parameter, weight_decay)
    gradient = state["momentum_buffer"].mul_(momentum).add_(gradient)
    parameter.addcmul_(gradient, lr, value=-1)


def adam(parameter, gradient, state, lr, weight_decay, decoupled=False) -> None:
    """A step of torch.optim.Adam, or of AdamW, whose decay is decoupled from the gradient."""
    if decoupled:
        parameter.mul_(1 - lr * weight_decay)
    else:
        gradient = torch.addcmul(gradient, parameter, weight_decay)
    state["step"] += 1
    mean = state["exp_avg"].lerp_(gradient, 1 - 0.9)
    square = state["exp_avg_sq"].mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
    scale = (square.sqrt() / math.sqrt(1 - 0.999 ** state["step"])).add_(1e-8)
    parameter.addcmul_(mean / scale, lr / (1 - 0.9 ** state["step"]), value=-1)


STEPS = {optim.SGD: sgd, optim.Adam: adam, optim.AdamW: functools.partial(adam, decoupled=True)}


def settings_of(task: Task, hyperparams: dict) -> list[float] | None:
    """SETTINGS of a trial's optimizer, of plain SGD only lr; None: it has others, is another."""
    optimizer = getattr(task.optimizer, "func", task.optimizer)  # of a functools.partial
    given = getattr(task.optimizer, "keywords", {}) | taken_by(task.optimizer, hyperparams)
    are_numbers = all(isinstance(value, int | float) and value >= 0 for value in given.values())
    is_known = type(task.optimizer) in (type, functools.partial) and optimizer in STEPS
    if not is_known or not given.keys() <= {*SETTINGS} or not are_numbers:
        return None
    known = {name: value.default for name, value in signature(optimizer).parameters.items()} | given
    is_plain = optimizer is optim.SGD and not known["momentum"] and not known["weight_decay"]
    return [known[name] for name in SETTINGS[: 1 if is_plain else 3] if name in known]


def structure(trial: Trial, model: nn.Module, task: Task) -> tuple | None:
    """How many trials are to train together, and what they share; None: this one trains alone."""
    settings = settings_of(task, trial.hyperparams)
    if not task.stack or settings is None or type(model) is not nn.Sequential:
        return None
    layers = [*model]
    parameters = [*model.parameters()]
    linears = [layer for layer in layers if type(layer) is nn.Linear]
    parts = [model, *layers, *parameters]
    is_known = (
        {*map(type, layers)} <= LAYERS
        and all(layer.training and "forward" not in vars(layer) for layer in [model, *layers])
        and [*map(id, parameters)] == [id(p) for own in linears for p in (own.weight, own.bias)]
        and len({p.untyped_storage().data_ptr() for p in parameters}) == len(parameters) > 0
        and all(type(p) is nn.Parameter and p.requires_grad for p in parameters)
        and {p.dtype for p in [*parameters, task.train_x]} == {torch.float32}
        and not any(getattr(part, f"_{name}_hooks", None) for part in parts for name in HOOKS)
        and not nn.modules.module._has_any_global_hook()
        and task.train_x.ndim == 2
    )
    if not is_known:
        return None
    batch_size = min(trial.hyperparams.get("batch_size", math.inf), len(task.train_x))
    size = sum(own.weight.numel() + batch_size * own.out_features // 16 for own in linears)
    most = math.ceil((2**20 if task.train_x.is_cpu else 2**27) / size)  # fits a CPU's caches
    steps = trial.seed, trial.repeat, batch_size, trial.hyperparams.get("epochs"), len(settings)
    return most, *steps, *map(type, layers), *(parameter.shape for parameter in parameters)


def loss_gradient(task: Task, outputs: Tensor, y: Tensor, trials: tuple[Trial, ...]) -> Tensor:
    """The gradient of each trial's loss by its outputs [trials, rows, outputs]."""
    is_alike = outputs.shape[1:] == y.shape and outputs.dtype == y.dtype
    if task.loss is F.mse_loss and is_alike:
        return (outputs - y) * (2 / y.numel())
    if task.loss is F.cross_entropy and is_alike:  # y holds probabilities, perhaps one-hot
        return (outputs.softmax(2) * y.sum(1, keepdim=True) - y) / len(y)
    gradients = []
    with torch.enable_grad():
        for trial, own in zip(trials, outputs.requires_grad_(), strict=True):
            with error_note(trial):
                loss = task.loss(own.clone(), y.clone())  # which it may change
                gradients.append(torch.autograd.grad(loss, own)[0])
    return torch.stack(gradients)


def with_masks(steps: Iterable[tuple], trial: Trial, models: tuple, width: int) -> Iterator[tuple]:
    """x [rows, width] and y of steps, and what dropout multiplies by, [trials, rows, its width]."""
    widths = []  # of the dropout layers
    for layer in models[0]:
        width = getattr(layer, "out_features", width)
        if type(layer) is nn.Dropout:
            widths.append(width)
    rates = [[layer.p for layer in model if type(layer) is nn.Dropout] for model in models]
    rates = np.repeat(rates, np.array(widths, dtype=int), axis=1)  # int where empty too
    rates = next(models[0].parameters()).new_tensor(rates)[:, None]  # [trials, 1, all widths]
    thresholds = (rates * 2**16 - 2**15).short()
    factors = (1 / (1 - rates)).nan_to_num(posinf=0)  # at a rate of 1 nothing is kept
    bits = np.random.SFC64([DROPOUT, trial.seed, trial.repeat])
    for x, y in steps:
        size = len(x) * sum(widths)  # of int16, four a number: drawn and compared in half the time
        noise = bits.random_raw(math.ceil(size / 4)).view(np.int16)[:size].reshape(len(x), -1)
        noise = torch.from_numpy(noise).to(x.device, non_blocking=True)
        masks = factors.new_empty(len(models), len(x), sum(widths))
        torch.ge(noise, thresholds, out=masks).mul_(factors)  # floats, no boolean in between
        yield x, y, iter(masks.split_with_sizes(widths, 2))


@torch.no_grad()
def train_stack(stack: list[tuple[Trial, nn.Module]], task: Task, epochs: int) -> list:
    """Train models of one structure, each as train_alone does, but for dropout's numbers."""
    has_column = any(1 in parameter.shape for parameter in stack[0][1].parameters())
    copies = 2 if has_column and len(stack) == 1 else 1  # a lone column would round otherwise
    trials, models = zip(*stack * copies, strict=True)
    settings = [settings_of(task, trial.hyperparams) for trial in trials]
    settings = task.train_x.new_tensor(settings).mT[:, :, None, None]  # each [trials, 1, 1]
    is_plain = len(settings) == 1
    step = STEPS[getattr(task.optimizer, "func", task.optimizer)]
    stacked, _ = torch.func.stack_module_state([*models])
    values = (own if own.ndim == 3 else own[:, None] for own in stacked.values())
    pairs = ((v, defaultdict(functools.partial(torch.zeros_like, v), step=0)) for v in values)
    # Of each layer its type, weight and bias, [trials, rows, columns], both with the step's state.
    layers = [(type(layer), *(next(pairs) for _ in layer.parameters())) for layer in models[0]]
    y = task.train_y
    if task.loss is F.cross_entropy and y.dtype == torch.int64 and y.ndim == 1 and y.min() >= 0:
        *_, last_bias = models[0].parameters()
        task = task._replace(train_y=F.one_hot(y, len(last_bias)).float())
    steps = (batch for batches in each_epoch(trials[0], task, epochs) for batch in batches)
    for x, y, masks in with_masks(steps, trials[0], models, task.train_x.shape[1]):
        x = x.expand(len(models), -1, -1)  # [trials, rows, inputs]
        kept = []  # of each layer, what its way back needs
        for kind, *parameters in layers:
            if kind is nn.Linear:
                kept.append(x)
                (weight, _), (bias, _) = parameters
                x = torch.baddbmm(bias, x, weight.mT)
            elif kind is nn.Dropout:
                kept.append(next(masks))
                x = x * kept[-1]
            else:
                x = x.relu() if kind is nn.ReLU else x.tanh()
                kept.append(x)
        gradient = loss_gradient(task, x, y, trials)
        if is_plain:
            gradient = gradient * -settings[0]  # then all gradients below are steps
        for kind, *parameters in reversed(layers):
            own = kept.pop()
            if kind is nn.Linear:
                (weight, weight_state), (bias, bias_state) = parameters
                below = torch.bmm(gradient, weight) if kept else None  # rows need no gradient
                for_bias = gradient.sum(1, keepdim=True)
                if is_plain:  # no pass over memory for the gradient of the weight
                    weight.baddbmm_(gradient.mT, own)
                    bias.add_(for_bias)
                else:
                    step(weight, torch.bmm(gradient.mT, own), weight_state, *settings)
                    step(bias, for_bias, bias_state, *settings)
                gradient = below
            elif kind is nn.ReLU:
                gradient = torch.ops.aten.threshold_backward.default(gradient, own, 0)
            elif kind is nn.Tanh:
                gradient = torch.ops.aten.tanh_backward.default(gradient, own)
            else:
                gradient = gradient * own
    for index, model in enumerate(models):
        model.load_state_dict({name: value[index] for name, value in stacked.items()})
    return stack


# ==== 5. The log and the processes ===============================================================

RANK = int(os.environ.get("RANK", 0))  # of this process, among torchrun's
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))  # perhaps on several machines
LIBRARIES = "site-packages", "dist-packages", os.path.dirname(os.__file__)
COLUMNS = "search, name, seed, number, repeat, score, hyperparams, UNIQUE (search, number, repeat)"
INSERT = "INSERT OR IGNORE INTO trials VALUES (?, ?, ?, ?, ?, ?, ?)"


def my_parts(trials: list[Trial], task: Task | Callable) -> Iterator[list[Trial]]:
    """Parts of trials, of a function one by one; each process takes the next when it is free."""
    groups = defaultdict(list)  # of those that may train together
    for trial in trials:
        fixed = {n: v for n, v in trial.hyperparams.items() if isinstance(v, int | str)}
        groups[repr((trial.repeat, fixed))].append(trial)
    most = max(8, len(trials) // (8 * PROCESSES)) if isinstance(task, Task) else 1
    parts = [group[i : i + most] for group in groups.values() for i in range(0, len(group), most)]
    parts.sort(key=len, reverse=True)  # so that none is left with a large one at the end
    store = distributed.distributed_c10d._get_default_store()
    turn = f"turn in run {store.add(f'runs of {RANK}', 1)}"  # the same in every process
    while (part := store.add(turn, 1)) <= len(parts):
        yield parts[part - 1]


class KeyPickler(pickle.Pickler):
    """Writes bytes that are equal for what acts the same, in every process."""

    def persistent_id(self, value):  # what is pickled for it, in turn; None: what pickle takes
        if isinstance(value, Tensor):
            return value.device.type, value.detach().cpu().numpy()
        if isinstance(value, set | frozenset):  # in another order in each process
            return sorted(map(pickle.dumps, value))
        if isinstance(value, CodeType):
            return value.co_code, value.co_names, value.co_varnames, value.co_consts
        if isinstance(value, type) and value.__module__ == "__main__":  # perhaps of a notebook
            codes = [own.__code__ for own in vars(value).values() if inspect.isfunction(own)]
            return value.__qualname__, codes
        if not inspect.isfunction(value):
            return None
        codes = [] if os.path.isfile(value.__code__.co_filename) else [value.__code__]
        for code in codes:  # the list grows by the functions within
            codes += [own for own in code.co_consts if isinstance(own, CodeType)]
        names = sorted({name for code in codes for name in code.co_names})
        read = [own for own in map(value.__globals__.get, names) if not inspect.ismodule(own)]
        held = value.__defaults__, value.__kwdefaults__, inspect.getclosurevars(value).nonlocals
        return value.__module__, value.__code__, held, read


def search_key(*search) -> str:
    """Equal for searches of the same values, and of own files that do the same."""
    files = {getattr(module, "__file__", None) or "" for module in [*sys.modules.values()]}
    own = [f for f in files if f.endswith(".py") and not any(part in f for part in LIBRARIES)]
    bodies = [ast.parse(Path(file).read_bytes()).body for file in own if os.path.isfile(file)]
    guard = "if __name__ == '__main__':"  # what is under it may change: how many trials, say
    code = sorted([c for c in map(ast.unparse, body) if not c.startswith(guard)] for body in bodies)
    key = hashlib.sha256()
    pickler = KeyPickler(SimpleNamespace(write=key.update))
    pickler.fast = True  # no references to what came before: they may differ
    try:
        pickler.dump([torch.__version__, code, search])
    except (pickle.PicklingError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"log: {error}, and so could not know this search again") from None
    return key.hexdigest()[:16]


class Log:
    """The finished trials of a search, in an SQLite database that may hold those of others."""

    def __init__(self, database, path: str | None, name: str, trials: list[Trial], *search):
        self.database = database
        self.name = name
        self.search = search_key(name, *search) if path or PROCESSES > 1 else ""
        tables = [*self.database.execute("SELECT sql FROM sqlite_master WHERE type = 'table'")]
        is_log = not tables or (f"CREATE TABLE trials ({COLUMNS})",) in tables
        is_sound = self.database.execute("PRAGMA quick_check").fetchone() == ("ok",)
        require(is_log and is_sound, f"{path} is torn, or not a log of trials")
        create = f"CREATE TABLE IF NOT EXISTS trials ({COLUMNS})"
        self.database.executescript(f"BEGIN IMMEDIATE; {create}; COMMIT")  # or it is read-only
        with contextlib.suppress(sqlite3.OperationalError):  # another process does the same
            # A row then takes 15 us, not some ms; a kill loses none, a power cut the last ones.
            self.database.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL")
        there = len(trials) - len(self.exchange(trials))
        query = "SELECT count(*) FROM trials WHERE search != ? AND repeat = 0"
        ((others,),) = self.database.execute(query, [self.search])
        if path and RANK == 0 and sys.stderr:
            print(f"{path}: {there} of {len(trials)} trials, {others} of others", file=sys.stderr)

    def add(self, trial: Trial, score: float) -> None:
        trial.score = score if score > -math.inf else math.nan  # which SQLite keeps as NULL
        row = self.search, self.name, trial.seed, trial.number, trial.repeat, trial.score
        self.database.execute(INSERT, (*row, json.dumps(trial.hyperparams, default=str)))

    def exchange(self, trials: list[Trial]) -> list[Trial]:
        """Take the rows of all processes, set what they say of trials; return the other trials."""
        rows = [*self.database.execute("SELECT * FROM trials WHERE search = ?", [self.search])]
        if PROCESSES > 1:
            if not distributed.is_initialized():
                distributed.init_process_group("gloo", timeout=timedelta(days=30))
                atexit.register(distributed.destroy_process_group)  # else it may abort the exit
            mine = self.search, [(trial.number, trial.repeat) for trial in trials]
            everyones = [None] * PROCESSES
            distributed.all_gather_object(everyones, (mine, rows))
            are_same = all(theirs == mine for theirs, _ in everyones)
            require(are_same, "the processes differ in trials, space, settings, data or code")
            rows = [row for _, others in everyones for row in others]
            self.database.executemany(INSERT, rows)
        scores = {(n, r): math.nan if score is None else score for *_, n, r, score, _ in rows}
        for trial in trials:
            trial.score = scores.get((trial.number, trial.repeat))
        return [trial for trial in trials if trial.score is None]


# ==== 6. The command line ========================================================================


def report(trials: list[Trial], sign: int = 1) -> None:
    """Print the five best of ranked trials, scores times sign."""
    names = {name: "" for trial in trials[:5] for name in trial.hyperparams}
    rows = [["trial", "score" if sign > 0 else "loss", *names, "repeats"]]
    for trial in trials[:5]:
        repeats = sign * np.array(trial.repeats)
        spread = f" +- {repeats.std(ddof=1):.2g}" if len(repeats) > 1 else ""
        mean = f"{repeats.mean():.4g}{spread}" if len(repeats) else ""
        cells = [trial.number, sign * trial.score, *(names | trial.hyperparams).values(), mean]
        rows.append([f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.rjust, row, widths)))
    if diverged := sum(math.isnan(trial.score) for trial in trials):
        hint = "; standardise the rows or lower lr" if diverged > len(trials) / 2 else ""
        print(f"the score of {diverged} of {len(trials)} trials is NaN{hint}")
    print(trials[0].hyperparams)


def main() -> int:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)  # an error is one line
    parser.add_argument("--task", choices=TASKS, default="xor", help="what to train on")
    parser.add_argument("--trials", default="200", help="how many, or 200:400 for 200 up to 399")
    parser.add_argument("--epochs", type=int, default=500, help="of each trial")
    parser.add_argument("--repeats", type=int, default=5, help="of the five best")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps")
    parser.add_argument("--processes", type=int, default=1, help="of this machine")
    parser.add_argument("--log", help="database of finished trials, which do not run again")
    parser.add_argument("--save", help="file for the best model's hyperparams, state_dict")
    args = parser.parse_args()
    if args.processes > 1 and PROCESSES == 1:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}"]
        os.execv(sys.executable, [sys.executable, "-m", *launcher, "--", *sys.argv])
    begun = time.monotonic()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.device == "cuda" else args.device
    options = {"seed": args.seed, "repeats": args.repeats, "log": args.log, "name": args.task}
    task = TASKS[args.task]()
    try:
        numbers = range(*map(int, args.trials.split(":")))
        task = Task(*(v.to(device) if isinstance(v, Tensor) else v for v in task))
        if args.save and RANK == 0:
            open(args.save, "ab").close()  # it can be written, or the error comes now
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        parser.error(str(error).partition("\n")[0])
    try:
        trials = random_search(task, HYPERPARAMS, numbers, args.epochs, **options)
    except (InputError, sqlite3.Error) as error:
        parser.error(str(error))
    if RANK == 0 and trials:
        if args.save:
            ((_, model),) = train(trials[:1], task, args.epochs)
            kept = {"hyperparams": trials[0].hyperparams, "state_dict": model.state_dict()}
            torch.save(kept, args.save)
        print(f"{args.task}: {len(trials)} trials, {time.monotonic() - begun:.1f} s")
        report(trials, sign=1 if task.score else -1)
    is_whole = len(trials) == len(numbers) and len(trials[0].repeats) == args.repeats
    return 0 if is_whole else 130  # as after Ctrl-C


if __name__ == "__main__":
    sys.exit(main())
