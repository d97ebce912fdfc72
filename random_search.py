"""Random search over hyperparameters in PyTorch, in one file: the trials train side by side.

    python random_search.py --task regression --trials 1000 --log trials.db --save best.pt
    python random_search.py --trials 10000 --processes 8

You write a model, a loss and an update for one trial, in ordinary PyTorch. Where a trial was seen
to train in a stack of others as it does alone, torch.func trains a whole stack at once; all else
trains one at a time, by the same code. All that is random about a trial is a function of (seed,
number, repeat): on a CPU its score is the same bit for bit alone, in any stack, on any number of
processes, resumed or not.

Left out on purpose: other samplers, pruning, data that does not fit in memory.
"""

import argparse
import atexit
import contextlib
import copy
import copyreg
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import operator
import os
import random
import sqlite3
import sys
import threading
import time
import traceback
import types
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import NamedTuple

# MKL reads this when torch loads it: the last bits of its products do not depend on the stack then.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

if "OMP_NUM_THREADS" not in os.environ:  # two threads wait for each other at every layer,
    torch.set_num_threads(1)  # and crawl on a busy machine
torch.set_flush_denormal(True)  # gradients that underflow would be 3 to 15 times slower

# ==== 1. Edit here: the space, the model, the update, the data ===================================

# A value is a list, each element equally likely, or a function of a numpy.random.Generator.
# Trials that differ in floats train side by side; any other difference makes another stack.
HYPERPARAMS = {
    "lr": np.linspace(0.001, 0.1, 100),  # or: lambda generator: 10 ** generator.uniform(-4, -1)
    "batch_size": [16, 32, 64, 128],  # of the training loop; the others are arguments of
    "hidden_size": [32, 64, 128, 256],  # update or of build_model
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
    """Plain SGD, in place. The first dimension of each tensor is the trials; state is yours."""
    parameter.addcmul_(gradient, lr, value=-1)  # parameter -= lr * gradient, in one pass


class Task(NamedTuple):
    train_x: Tensor  # [rows, inputs, ...]
    train_y: Tensor  # [rows, outputs] of floats, or [rows] of classes
    valid_x: Tensor  # the rows that score a trial
    valid_y: Tensor
    outputs: int  # of a model
    loss: Callable  # of one trial's (outputs, targets), as F.mse_loss is
    score: Callable | None = None  # of the same, for the valid rows; higher is better; None: -loss
    space: dict = HYPERPARAMS
    build_model: Callable = build_model
    update: Callable = update


def xor() -> Task:
    x = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    y = torch.tensor([0, 1, 1, 0])
    return Task(x, y, x, y, outputs=2, loss=F.cross_entropy)


def regression() -> Task:
    """The article's 15 rows, standardised by those that train; every third one scores."""
    x = "3.3 4.4 5.5 6.71 6.93 4.168 9.779 6.182 7.59 2.167 7.042 10.791 5.313 7.997 3.1"
    y = "1.7 2.76 2.09 3.19 1.694 1.573 3.366 2.596 2.53 1.221 2.827 3.465 1.65 2.904 1.3"
    rows = torch.tensor([[float(a), float(b)] for a, b in zip(x.split(), y.split(), strict=True)])
    valid = torch.arange(len(rows)) % 3 == 2
    rows = (rows - rows[~valid].mean(0)) / rows[~valid].std(0)
    x, y = rows.split(1, dim=1)
    return Task(x[~valid], y[~valid], x[valid], y[valid], outputs=1, loss=F.mse_loss)


TASKS = {"xor": xor, "regression": regression}

# ==== 2. A trial and its random numbers ==========================================================


class InputError(ValueError):
    """What the reader can mend in what he wrote: one line on the command line."""


@dataclass
class Trial:
    number: int
    seed: int  # of the search
    hyperparams: dict
    repeat: int = 0  # 0: the trial itself; 1, 2, ...: again, with other random numbers
    score: float | None = None  # higher is better; NaN: diverged; None: has not run
    seconds: float | None = None  # its share of its stack's
    stack: int = 0  # how many trials its stack had; 0: it trained alone
    repeats: list[float] = field(default_factory=list)  # the scores of its repeats


def sample_hyperparams(space: dict, seed: int, number: int) -> dict:
    """The hyperparameters of the trial of this number, as plain Python values."""
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,)))
    sample = {}
    for name, values in space.items():
        if callable(values):
            value = values(generator)
        elif not isinstance(values, list | tuple | range | np.ndarray) or not len(values):
            raise InputError(f"space: {name} must be a list of values or a function")
        else:
            value = values[generator.integers(len(values))]
            if type(value) is int and any(isinstance(other, float) for other in values):
                value = float(value)  # of [1, 0.1]
        value = value.item() if isinstance(value, np.generic) else value
        # 0.3, not linspace's 0.30000000000000004
        sample[name] = float(f"{value:.15g}") if isinstance(value, float) else value
    return sample


WEIGHTS, OWN, ORDER, DROPOUT = range(4)  # what a trial's random numbers are for


def seed_of(trial: Trial, purpose: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(trial.seed, spawn_key=(trial.number, trial.repeat, purpose))


def seed_all(trial: Trial, purpose: int) -> None:
    """Seed all that your own code may draw from."""
    seed = int(seed_of(trial, purpose).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)  # the other looks for devices, which takes 95 us


def take_from(noise: Tensor) -> Callable[[int], Tensor]:
    """A function that returns the next numbers of noise [..., draws]."""
    start = 0

    def draw(count: int) -> Tensor:
        nonlocal start
        start += count
        return noise[..., start - count : start]

    return draw


def dropout_mask(noise: Tensor, rate: float | Tensor) -> Tensor:
    """0, with a probability of rate, or else 1 / (1 - rate), by noise in (0, 1)."""
    factor = 1 / (1 - torch.as_tensor(rate)).clamp(min=2**-16)  # finite where the rate is 1
    return (noise - rate).ceil() * factor  # noise > rate, a mask of bools, takes twice as long


@contextlib.contextmanager
def dropout_by(draw: Callable[[int], Tensor]) -> Iterator[None]:
    """Within it F.dropout, which nn.Dropout calls too, takes its random numbers from draw."""

    def dropout(x, p=0.5, training=True, inplace=False):
        if not training:
            return x
        mask = dropout_mask(draw(x.numel()).view(x.shape), p)
        return x.mul_(mask) if inplace else x * mask

    before = F.dropout
    F.dropout = dropout
    try:
        yield
    finally:
        F.dropout = before


# ==== 3. Training a stack of trials side by side =================================================


def arguments_of(function: Callable, first: int, hyperparams: dict) -> dict:
    """The hyperparameters among the arguments of function, which begin at first."""
    parameters = list(inspect.signature(function).parameters.values())[first:]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(hyperparams)
    names = [parameter.name for parameter in parameters]
    return {name: hyperparams[name] for name in names if name in hyperparams}


@contextlib.contextmanager
def told(trials: list[Trial]) -> Iterator[None]:
    """Add what trials they are to an error of your own code."""
    try:
        yield
    except Exception as error:
        for trial in trials:
            error.add_note(f"in trial {trial.number}: {trial.hyperparams}")
        raise


def make_model(trial: Trial, task: Task) -> nn.Module:
    """The untrained model of a trial, in ordinary PyTorch."""
    seed_all(trial, WEIGHTS)
    arguments = arguments_of(task.build_model, 2, trial.hyperparams)
    arguments = copy.deepcopy(arguments)  # a model may change its lists
    with told([trial]):
        model = task.build_model(task.train_x.shape[1], task.outputs, **arguments)
        return model.to(task.train_x.device)


def batch_sizes(trial: Trial, task: Task) -> list[int]:
    """The rows of each step of an epoch."""
    rows = len(task.train_x)
    size = trial.hyperparams.get("batch_size", rows)
    if not isinstance(size, int) or size < 1:
        raise InputError(f"batch_size is {size!r}: it must be a whole number above 0")
    # A last batch of one row, too few for BatchNorm, joins the one before.
    cuts = [*range(0, max(1, rows - (size > 1)), size), rows]
    return [stop - start for start, stop in itertools.pairwise(cuts)]


def equal_parts(trials: list[Trial], most: int) -> list[list[Trial]]:
    """As few parts of most trials or less as there can be, of equal size."""
    count = math.ceil(len(trials) / most)
    return [trials[start::count] for start in range(count)]


class Kind(NamedTuple):
    """How trials that differ in floats alone train, which examine finds out."""

    model: nn.Module  # of one of them, for its structure
    gradients: Callable  # gradients_alone, gradients_by_vmap or gradients_by_layers
    draws: int = 0  # random numbers that dropout takes for each row
    floats: tuple = ()  # of a module's name and its attribute that hyperparameters set
    outline: dict = {}  # what else the models of a stack have in common
    least: int = 1  # how many trials a stack must have: a lone one may train as two
    most: int = 1  # and how many serve best


class Stack:
    """Trials that train side by side, in tensors [trials, ...].

    The parameters and buffers of the trials' own models are views of these.
    """

    def __init__(self, trials: list[Trial], models: list[nn.Module], task: Task, kind: Kind):
        self.trials = trials
        self.models = models
        self.task = task
        self.kind = kind
        if len(trials) < kind.least:
            trials, models = trials * 2, models * 2
        self.orders = [np.random.default_rng(seed_of(trial, ORDER)) for trial in trials]
        self.noises = [np.random.SFC64(seed_of(trial, DROPOUT)) for trial in trials]
        self.parameters = stack_tensors([dict(model.named_parameters()) for model in models])
        self.buffers = stack_tensors([dict(model.named_buffers()) for model in models])
        self.trained = [tensor for tensor in self.parameters.values() if tensor.requires_grad]
        self.states = [{} for _ in self.trained]  # of update
        arguments = arguments_of(task.update, 3, trials[0].hyperparams)
        self.arguments = [self.broadcast(arguments, tensor) for tensor in self.trained]
        self.floats = {}
        for name, attribute in kind.floats:
            values = [getattr(model.get_submodule(name), attribute) for model in models]
            self.floats[name, attribute] = torch.tensor(values, device=task.train_x.device)
        y = task.train_y  # of classes, none that cross_entropy ignores?
        self.classes = y.dtype == torch.int64 and y.ndim == 1 and bool(y.min() >= 0)

    def broadcast(self, arguments: dict, parameter: Tensor) -> dict:
        """arguments of update; floats as tensors that broadcast with parameter [trials, ...]."""
        shape = -1, *[1] * (parameter.ndim - 1)
        tensors = {}
        for name, value in arguments.items():
            if isinstance(value, float):
                values = [trial.hyperparams[name] for trial in self.trials]
                tensors[name] = parameter.new_tensor(values).view(shape)
        return arguments | tensors

    def batches(self, epochs: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """x and y [trials, batch, ...] and noise [trials, draws] of each step."""
        x, y = self.task.train_x, self.task.train_y
        sizes = batch_sizes(self.trials[0], self.task)
        noise = self.make_noise(itertools.chain.from_iterable(itertools.repeat(sizes, epochs)))
        order = torch.arange(len(x), device=x.device).expand(len(self.orders), -1)
        for _ in range(epochs):
            if len(sizes) > 1:  # the order of a full batch does not matter
                orders = [generator.permutation(len(x)) for generator in self.orders]
                order = torch.from_numpy(np.stack(orders)).to(x.device)
            for rows in order.split(sizes, dim=1):
                yield x[rows], y[rows], next(noise)

    def make_noise(self, sizes: Iterable[int]) -> Iterator[Tensor]:
        """Numbers in (0, 1) [trials, draws] for each step; those of many steps in one call."""
        for size, run in itertools.groupby(sizes):
            words = math.ceil(size * self.kind.draws / 4)  # a word of 64 bits is four numbers
            ahead = max(1, 2**15 // max(1, words * len(self.noises)))
            while steps := len(list(itertools.islice(run, ahead))):
                raw = np.stack([bits.random_raw(steps * words) for bits in self.noises])
                noise = torch.from_numpy(raw.view(np.uint16).astype(np.float32))
                noise = noise.add_(0.5).mul_(2**-16)
                noise = noise.to(self.task.train_x.device).view(len(raw), steps, 4 * words)
                yield from noise.unbind(1)

    @torch.no_grad()
    def step(self, gradients: Iterable[Tensor | None]) -> None:
        """update each parameter that the loss has reached."""
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                parameter = self.trained[index].data
                state, arguments = self.states[index], self.arguments[index]
                changed = self.task.update(parameter, gradient, state, **arguments)
                if changed is not None and changed is not parameter:
                    raise InputError(
                        "update must change the parameter in place, and return nothing"
                    )


def stack_tensors(named: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by name stacked, [trials, ...]; they themselves become views of that."""
    if len(named) == 1:  # alone they stay where they are: others may share their memory
        return {n: t.data[None].requires_grad_(t.requires_grad) for n, t in named[0].items()}
    stacked = {}
    for name, first in named[0].items():
        stacked[name] = torch.stack([tensors[name].data for tensors in named])
        for tensors, view in zip(named, stacked[name], strict=True):
            tensors[name].data = view
        stacked[name].requires_grad_(first.requires_grad)
    return stacked


def gradients_alone(stack: Stack, x: Tensor, y: Tensor, noise: Tensor) -> list[Tensor | None]:
    """The gradients [1, ...] of a stack of one trial, in plain PyTorch."""
    (model,) = stack.models
    model.zero_grad()
    stack.task.loss(model(x[0]), y[0]).backward()
    parameters = [tensor for tensor in model.parameters() if tensor.requires_grad]
    return [None if tensor.grad is None else tensor.grad[None] for tensor in parameters]


def gradients_by_vmap(stack: Stack, x: Tensor, y: Tensor, noise: Tensor) -> list[Tensor | None]:
    """The gradients [trials, ...] of each trial's loss by its own parameters."""
    model = stack.kind.model

    def forward(tensors, floats, noise, x):  # of one trial
        for (name, attribute), value in floats.items():
            setattr(model.get_submodule(name), attribute, value)
        with dropout_by(take_from(noise)):
            outputs = functional_call(model, tensors, x)
        return outputs, {name: tensors[name] for name in stack.buffers}

    tensors = stack.parameters | stack.buffers
    outputs, buffers = vmap(forward)(tensors, stack.floats, noise, x)
    for name, buffer in buffers.items():
        if buffer.data_ptr() != stack.buffers[name].data_ptr():  # the model assigned it anew
            stack.buffers[name].copy_(buffer.detach())
    gradient = loss_gradient(stack, outputs.detach(), y)
    return torch.autograd.grad(outputs, stack.trained, gradient, allow_unused=True)


def gradients_without_onednn(stack: Stack, x: Tensor, y: Tensor, noise: Tensor):
    """The same; oneDNN's convolutions may have other last bits in a stack than alone."""
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        return gradients_by_vmap(stack, x, y, noise)


@torch.no_grad()
def gradients_by_layers(stack: Stack, x: Tensor, y: Tensor, noise: Tensor) -> list[Tensor]:
    """Those of an nn.Sequential of Linear, ReLU and Dropout, in less than half the time of vmap."""
    parameters = iter(stack.parameters.values())
    draw = take_from(noise)
    forward = []  # of each layer: the weights and what they multiplied, or a factor and None
    for name, layer in stack.kind.model._modules.items():
        if type(layer) is nn.Linear:
            weight = next(parameters)
            forward.append((weight, x))
            x = torch.baddbmm(next(parameters).unsqueeze(1), x, weight.mT)
        elif type(layer) is nn.ReLU:
            x = x.relu()
            forward.append((None, x))
        else:
            rate = stack.floats.get((name, "p"))
            rate = layer.p if rate is None else rate.view(-1, 1, 1)
            mask = dropout_mask(draw(x[0].numel()).view(x.shape), rate)
            forward.append((mask, None))
            x = x * mask
    gradient = loss_gradient(stack, x, y)  # by the outputs of a layer, the last one first
    gradients = []
    for factor, x in reversed(forward):
        if factor is None:
            gradient = torch.ops.aten.threshold_backward(gradient, x, 0)
        elif x is None:
            gradient = gradient * factor
        else:
            gradients += [gradient.sum(1), torch.bmm(gradient.mT, x)]
            if len(gradients) < len(stack.trained):
                gradient = torch.bmm(gradient, factor)
    return gradients[::-1]


def loss_gradient(stack: Stack, outputs: Tensor, y: Tensor) -> Tensor:
    """The gradient of each trial's loss by its outputs, [trials, rows, ...]."""
    loss = stack.task.loss
    if loss is F.mse_loss:
        return (outputs - y) * (2 / outputs[0].numel())
    if loss is F.cross_entropy and stack.classes and outputs.ndim == 3:
        return (outputs.softmax(2) - F.one_hot(y, outputs.shape[2])) / y.shape[1]
    with torch.enable_grad():  # any other loss, trial by trial
        outputs.requires_grad_()
        losses = sum(map(loss, outputs.unbind(), y.unbind()))
        return torch.autograd.grad(losses, outputs)[0]


# ==== 4. Which trials train side by side =========================================================


@functools.cache  # once is enough
def tell(message: str) -> None:
    print(message, file=sys.stderr)


def outline(model: nn.Module) -> dict:
    """What the modules of a model hold, but weights: where that differs, models do not stack."""
    held = {}
    first = {}  # where a tensor stands first: it may be tied
    for name, module in model.named_modules(remove_duplicate=False):
        held[name, "class"] = type(module)
        for key, tensor in itertools.chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None:
                hooks = tensor._backward_hooks or tensor._post_accumulate_grad_hooks
                hooks = object() if hooks else None  # unlike any other: a stack calls none
                place = first.setdefault(id(tensor), (name, key))
                held[name, key] = tensor.shape, tensor.dtype, tensor.requires_grad, hooks, place
        for attribute, value in vars(module).items():
            is_empty = isinstance(value, dict) and not value  # as hooks are, mostly
            if attribute not in ("_parameters", "_buffers", "_modules") and not is_empty:
                held[name, attribute] = value if isinstance(value, float) else describe(value, {})
    return held


def difference(one: dict, two: dict, floats: Iterable = ()) -> str:
    """Where two outlines differ but in floats, in words; '' if nowhere."""
    for name, attribute in one | two:
        key = name, attribute
        is_float = key in floats and isinstance(two.get(key), float)
        if one.get(key) != two.get(key) and not is_float:
            module = one.get((name, "class"), type(None)).__name__
            return f"{attribute} of {module} is not the same in all trials"
    return ""


def rehearsal_trials(trial: Trial, task: Task) -> list[Trial]:
    """Four trials like this one, in turn with two values of each float: quartiles of those drawn.

    They follow from the space, not from the trials that are there: who is stacked must not.
    """
    samples = [sample_hyperparams(task.space, trial.seed, number) for number in range(32)]
    pair = [dict(trial.hyperparams), dict(trial.hyperparams)]
    for name, value in trial.hyperparams.items():
        if isinstance(value, float):
            drawn = {sample[name] for sample in samples if isinstance(sample[name], float)}
            drawn = sorted(drawn)  # if it is empty, trials like this one train alone
            pair[0][name] = drawn[3 * len(drawn) // 4]
            pair[1][name] = drawn[len(drawn) // 4]
    return [replace(trial, number=n, repeat=0, hyperparams=pair[n % 2]) for n in range(4)]


def hidden_state(model: nn.Module) -> dict:
    """All that may change beside weights: what the model holds, and global random numbers."""
    _, words, position, *_ = np.random.get_state()
    numbers = random.getstate(), words.tolist(), position, torch.get_rng_state().tolist()
    return outline(model) | {("", "the state of random numbers"): numbers}


def rehearse(stack: Stack) -> list[list[Tensor]]:
    """Take the first and the last step of an epoch, then three with gradients of other sizes.

    Return the gradients, parameters and buffers that each trial has had.
    """
    trials = stack.trials
    task = stack.task
    sizes = batch_sizes(trials[0], task)
    sizes = sizes[0], sizes[-1]
    seen = [[] for _ in trials]
    for size, noise in zip(sizes, stack.make_noise(sizes), strict=True):
        rows = torch.arange(size, device=task.train_x.device).expand(len(stack.orders), -1)
        with dropout_by(take_from(noise[0])):  # alone too, where it would be torch's own
            gradients = stack.kind.gradients(stack, task.train_x[rows], task.train_y[rows], noise)
        stack.step(gradients)
        for place, tensors in enumerate(seen):
            tensors += [torch.zeros(0) if g is None else g[place].clone() for g in gradients]
    for scale in (1e-4, 1e4, math.nan):  # an update may clip; others may diverge beside a trial
        scales = [scale if trial.number % 2 else 1.0 for trial in trials]
        scales = torch.tensor(scales, device=task.train_x.device)
        shapes = [(-1, *[1] * (tensor.ndim - 1)) for tensor in stack.trained]
        pairs = zip(gradients, shapes, strict=True)
        stack.step([None if g is None else g * scales.view(shape) for g, shape in pairs])
    for model, tensors in zip(stack.models, seen, strict=True):
        tensors += [*model.parameters(), *model.buffers()]
    return [[tensor.detach().nan_to_num() for tensor in tensors] for tensors in seen]


def agree(seen: list[Tensor], others: list[Tensor]) -> bool:
    """Whether each differs by a thousandth at most, of its largest number or 1e-3 of all's."""
    sizes = [other.abs().max().item() if other.numel() else 0 for other in others]
    return all(
        one.shape == other.shape
        # A gradient may be 0 but for rounding, as that of a bias before BatchNorm.
        and torch.allclose(one, other, rtol=0, atol=1e-3 * max(size, 1e-3 * max(sizes)))
        for one, other, size in zip(seen, others, sizes, strict=True)
    )


def dropout_draws(model: nn.Module, x: Tensor) -> int:
    """How many random numbers dropout takes for each row of x."""
    drawn = []

    def draw(count: int) -> Tensor:
        drawn.append(count)
        return x.new_ones(count, dtype=torch.float32)

    with torch.no_grad(), dropout_by(draw):
        model(x.clone())  # which it may change
    return math.ceil(sum(drawn) / len(x))


def refuse_broadcast(loss: Callable, outputs: Tensor, y: Tensor) -> Tensor:
    """The loss; InputError for outputs [rows, 1] and y [rows], or the other way round."""
    is_float = isinstance(outputs, Tensor) and y.is_floating_point()
    if is_float and outputs.ndim != y.ndim and 1 in (*outputs.shape[1:], *y.shape[1:]):
        shapes = f"{list(outputs.shape)}, y has {list(y.shape)}"
        raise InputError(f"the model's outputs have shape {shapes}: perhaps y[:, None]")
    return loss(outputs, y)


def rehearse_alone(trial: Trial, task: Task, draws: int) -> tuple[list[Tensor], str]:
    """Rehearse in plain PyTorch; return also what has changed that a stack would not see."""
    model = make_model(trial, task)
    checked = task._replace(loss=functools.partial(refuse_broadcast, task.loss))
    stack = Stack([trial], [model], checked, Kind(model, gradients_alone, draws))
    weights = [tensor.clone() for tensor in stack.trained]
    functions = repr(describe([task.loss, task.update], seen={}))
    state = hidden_state(model)
    (seen,) = rehearse(stack)
    problem = difference(state, hidden_state(model))
    if all(map(torch.equal, weights, stack.trained)):
        tell("update has changed no parameter in the steps that were tried")
    if repr(describe([task.loss, task.update], seen={})) != functions:
        tell("loss or update keeps something that the next trial sees: the order matters")
    return seen, problem


def rehearse_stacked(trials: list[Trial], task: Task, kind: Kind) -> list[list[Tensor]]:
    return rehearse(Stack(trials, [make_model(trial, task) for trial in trials], task, kind))


class Rounding(TorchDispatchMode):
    """Tries each elementwise operation on made-up numbers, of some trials together and apart.

    torch's loops take 32 floats at once: the rest of a tensor may round otherwise, as that of a
    sigmoid does, but so rarely that a rehearsal does not show it.
    """

    def __init__(self):
        super().__init__()
        self.differs = {}  # by operation and shape
        self.generator = torch.Generator().manual_seed(0)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip it torch would import it, which takes a second

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        def on(made: Tensor) -> Tensor:
            like = result.dtype, result.shape
            is_like = [isinstance(a, Tensor) and (a.dtype, a.shape) == like for a in args]
            operands = [made.clone() if i else a for i, a in zip(is_like, args, strict=True)]
            return operation(*operands, **kwargs or {}).nan_to_num()

        result = operation(*args, **kwargs or {})
        shape = getattr(result, "shape", None)
        is_new = torch.Tag.pointwise in operation.tags and (operation, shape) not in self.differs
        is_float = isinstance(result, Tensor) and result.is_floating_point()
        if is_new and is_float and result.numel() % 32:
            count = max(2, min(32, 2**14 // max(1, result.numel())))
            made = torch.randn(count, *shape, generator=self.generator, dtype=result.dtype)
            apart = torch.stack([on(one) for one in made])
            together = on(made)
            is_tried = apart.shape == together.shape  # no outer sum of smaller tensors
            self.differs[operation, shape] = is_tried and not torch.equal(apart, together)
        return result


def try_stack(trials: list[Trial], task: Task, kind: Kind, alone: list) -> tuple[Kind, str]:
    """The kind, with the least stack that it needs, and why it trains otherwise than alone, or ''.

    alone is what the first of trials has in plain PyTorch.
    """
    together = rehearse_stacked(trials, task, kind)
    if not agree(together[0], alone):
        return kind, "in a stack it does not train as alone"
    if not task.train_x.is_cpu:  # elsewhere last bits are not promised
        return kind, ""
    without_loss = task._replace(loss=lambda outputs, y: outputs.sum())  # a loss sees one trial
    with Rounding() as rounding:
        rehearse_stacked(trials[:1], without_loss, kind)
    for least in (1, 2) if not any(rounding.differs.values()) else ():
        kind = kind._replace(least=least)
        apart = [rehearse_stacked([trial], task, kind)[0] for trial in trials]
        if all(map(torch.equal, *map(itertools.chain.from_iterable, (apart, together)))):
            return kind, ""
    return kind, "its last bits depend on the stack"


def examine(trial: Trial, task: Task) -> tuple[Kind, str]:
    """How trials like this one train: in a stack if steps of four are there as they are alone.

    Else a text says why not. Raises InputError for outputs or an update that cannot be right.
    """
    model = make_model(trial, task)
    rows = task.train_x[: batch_sizes(trial, task)[0]]
    try:
        trials = rehearsal_trials(trial, task)
        models = [make_model(trial, task) for trial in trials[:2]]
        trained = [{id(p) for p in model.parameters() if p.requires_grad} for model in models]
        if trained[0] & trained[1]:
            raise InputError("build_model gives two trials the same layer: use copy.deepcopy")
        one, two = map(outline, models)
        floats = [key for key, v in one.items() if isinstance(v, float) and v != two.get(key)]
        draws = dropout_draws(models[0], rows)
        alone, problem = rehearse_alone(trials[0], task, draws)
        problem = difference(one, two, floats) or problem
    except InputError:
        raise
    except Exception as error:  # of your code: the trial itself will show it
        problem = f"it could not be checked, {error!r}"
    if problem:
        return Kind(model, gradients_alone), problem
    structure = models[1]  # not the trial's own: who comes first must not matter
    held = rows.numel() + 2 * sum(tensor.numel() for tensor in structure.parameters())
    most = max(1, (2**21 if task.train_x.is_cpu else 2**28) // held)  # a CPU's caches
    simple = {*map(type, structure.children())} <= {nn.Linear, nn.ReLU, nn.Dropout}
    by_layers = [gradients_by_layers] if simple and type(structure) is nn.Sequential else []
    for gradients in [*by_layers, gradients_by_vmap, gradients_without_onednn]:
        # Of the second trial: what outline has not seen is wrong for the first, and found.
        kind = Kind(structure, gradients, draws, tuple(floats), one, most=most)
        try:
            kind, problem = try_stack(trials, task, kind, alone)
        except Exception as error:  # of your code, which raised nothing alone
            frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
            modules = [f["self"] for f in frames if isinstance(f.get("self"), nn.Module)]
            place = type(modules[-1]) if modules else task.update
            problem = f"{name_of(place)}: {error}".partition("\n")[0]
        if not problem:
            return kind, ""
    return Kind(model, gradients_alone), problem


def make_stacks(trials: list[Trial], task: Task) -> Iterator[Stack]:
    """Stacks of the trials of each kind; a stack of one for each that trains alone."""
    groups = defaultdict(list)
    for trial in trials:
        groups[kind_of(trial, task)].append(trial)
    for group in groups.values():
        kind, problem = examine(group[0], task)
        for part in equal_parts(group, kind.most):
            members = []
            for trial in part:
                model = make_model(trial, task)
                reason = problem or difference(kind.outline, outline(model), kind.floats)
                if reason:
                    tell(f"{type(model).__name__} trains one trial at a time: {reason}")
                    yield Stack([trial], [model], task, Kind(model, gradients_alone))
                else:
                    members.append((trial, model))
            if members:
                yield Stack(*map(list, zip(*members, strict=True)), task, kind)


def kind_of(trial: Trial, task: Task) -> str:
    """Equal for trials that differ in floats alone."""
    values = {n: v for n, v in trial.hyperparams.items() if not isinstance(v, float)}
    taken = arguments_of(task.build_model, 2, values) | arguments_of(task.update, 3, values)
    return repr(describe([values | {"batch_size": batch_sizes(trial, task)[0]}, taken], {}))


def train(trials: list[Trial], task: Task, epochs: int) -> Iterator[tuple[Trial, nn.Module]]:
    """Train trials stack by stack; yield each with its model, an ordinary one."""
    # glibc gives freed memory back, and each step faults it in anew, unless a large block was freed
    torch.empty(2**25 - 2**16, dtype=torch.uint8)
    for stack in make_stacks(trials, task):
        begun = time.monotonic()
        alone = stack.kind.gradients is gradients_alone
        seed_all(stack.trials[0], OWN)  # for what it may draw alone
        with told(stack.trials):
            for x, y, noise in stack.batches(epochs):  # for x, y in loader:
                gradients = stack.kind.gradients(stack, x, y, noise)  # loss(model(x), y).backward()
                stack.step(gradients)  # optimizer.step()
        for trial, model in zip(stack.trials, stack.models, strict=True):
            trial.seconds = (time.monotonic() - begun) / len(stack.trials)
            trial.stack = 0 if alone else len(stack.trials)
            yield trial, model


def evaluate(trial: Trial, model: nn.Module, task: Task) -> float | Tensor:
    """The score of a trained model, on the rows that did not train it."""
    model.eval()
    seed_all(trial, OWN)
    with told([trial]), torch.no_grad():
        outputs = model(task.valid_x.clone())  # which it may change
        if isinstance(outputs, Tensor) and outputs.isnan().any():
            return math.nan  # an accuracy would be of class 0, argmax's of NaN
        if task.score:
            return task.score(outputs, task.valid_y.clone())
        return -task.loss(outputs, task.valid_y.clone())


def train_and_evaluate(trials: list[Trial], task: Task, epochs: int) -> Iterator:
    """Train trials stack by stack; yield each with its score."""
    for trial, model in train(trials, task, epochs):
        yield trial, evaluate(trial, model, task)


# ==== 5. The search and its log ==================================================================


LIBRARIES = os.path.dirname(os.__file__), os.path.dirname(os.path.dirname(np.__file__))


def is_library(value: object) -> bool:
    """Whether a function, class or module is not your own."""
    try:
        return inspect.getfile(value).startswith(LIBRARIES)
    except (TypeError, OSError):  # it is built in, or typed into a notebook
        return not (inspect.isclass(value) and "__module__" in vars(value))


def all_names(code: types.CodeType) -> list[str]:
    """The globals and attributes that code reads, functions within it too."""
    inner = [all_names(value) for value in code.co_consts if isinstance(value, types.CodeType)]
    names = [*code.co_names, *itertools.chain.from_iterable(inner)]
    return [name for name in names if not name.startswith("__")]  # __name__ differs in a script


def values_read(function: types.FunctionType) -> list:
    """What the names in a function mean: what it closes over, globals, those of your modules."""
    names = all_names(function.__code__)
    scopes = [function.__globals__]
    values = [inspect.getclosurevars(function).nonlocals] if function.__closure__ else []
    for scope in scopes:  # which grows
        found = [scope[name] for name in names if name in scope]
        modules = [vars(v) for v in found if inspect.ismodule(v) and not is_library(v)]
        scopes += [scope for scope in modules if not any(scope is other for other in scopes)]
        values += found
    return values


PLAIN = bool | int | float | str | None


def describe(value: object, seen: dict) -> object:
    """Plain data that is equal for what acts the same, in every process: of your own code the
    instructions and all that they refer to, of a library's the name, of the rest what pickle keeps.
    """
    if isinstance(value, PLAIN):
        return repr(value)
    parts = functools.partial(describe, seen=seen)
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, Tensor):
        content = value.detach().cpu().to_dense().resolve_conj().contiguous()
        content = content.view(-1).view(torch.uint8).numpy().tobytes()
        return [str(value.dtype), list(value.shape), parts(content)]
    if type(value) in (list, tuple):
        return [parts(item) for item in value]
    if type(value) is dict:
        return [[parts(name), parts(item)] for name, item in value.items()]
    if isinstance(value, set | frozenset):
        return sorted(repr(describe(item, dict(seen))) for item in value)  # in no order
    if isinstance(value, types.ModuleType):
        return value.__name__
    if isinstance(value, types.CodeType):
        return [value.co_code.hex(), value.co_names, value.co_varnames, parts(value.co_consts)]
    if isinstance(value, types.MethodType):
        return [parts(value.__func__), parts(value.__self__)]
    if hasattr(value, "__wrapped__") and is_library(value):  # by torch.no_grad, functools.cache
        cells = getattr(value, "__closure__", None) or ()
        return parts([value.__wrapped__, [cell.cell_contents for cell in cells]])
    is_code = isinstance(value, type | types.FunctionType | types.BuiltinFunctionType)
    if is_code and is_library(value):
        bound = getattr(value, "__self__", None)
        bound = None if isinstance(bound, type | types.ModuleType) else bound
        return [value.__module__, value.__qualname__, parts(bound)]
    if id(value) in seen:  # such as a function that calls itself
        return seen[id(value)][0]
    seen[id(value)] = len(seen), value
    if isinstance(value, types.FunctionType):
        return parts([value.__code__, value.__defaults__, value.__kwdefaults__, values_read(value)])
    if isinstance(value, type):
        held = {n: v for n, v in vars(value).items() if callable(v) or not n.startswith("__")}
        return parts([value.__bases__, held])
    try:
        reduce = copyreg.dispatch_table.get(type(value))
        reduced = reduce(value) if reduce else value.__reduce_ex__(2)
    except Exception:  # a property, a staticmethod, a lock
        reduced = [getattr(value, name, None) for name in ("__func__", "fget", "fset")]
    return parts(reduced)


def launched() -> tuple[int, int]:
    """The rank of this process, and how many torchrun has launched, perhaps on several machines."""
    if not distributed.is_available() or not distributed.is_initialized():
        if not distributed.is_torchelastic_launched():
            return 0, 1
        distributed.init_process_group("gloo", timeout=timedelta(days=30))
        atexit.register(distributed.destroy_process_group)  # else its threads may abort the exit
    return distributed.get_rank(), distributed.get_world_size()


def name_of(value: object) -> str:
    return getattr(value, "__name__", None) or str(value)


class Log:
    """The finished trials of a search, in an SQLite database that may hold others too."""

    def __init__(self, path: str | None, name: str, search: list):
        text = repr(describe([name, *search], seen={}))
        self.search = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.name = name
        self.database = sqlite3.connect(path or ":memory:", timeout=60, isolation_level=None)
        with contextlib.suppress(sqlite3.OperationalError):  # another process does the same
            # A row then takes 15 us, not some ms; a kill loses none, a power cut the last ones.
            self.database.execute("PRAGMA journal_mode = WAL")
            self.database.execute("PRAGMA synchronous = NORMAL")
        columns = "search, name, seed, number, repeat, score REAL, hyperparams, seconds, stack"
        unique = "UNIQUE (search, number, repeat)"
        self.database.execute(f"CREATE TABLE IF NOT EXISTS trials ({columns}, {unique})")

    def rows(self) -> list[tuple]:
        query = "SELECT * FROM trials WHERE search = ?"
        return self.database.execute(query, [self.search]).fetchall()

    def insert(self, rows: Iterable) -> None:
        query = "INSERT OR IGNORE INTO trials VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
        self.database.executemany(query, rows)

    def add(self, trial: Trial, score: float) -> None:
        row = [self.search, self.name, trial.seed, trial.number, trial.repeat]
        row += [score if math.isfinite(score) else None]
        row += [json.dumps(trial.hyperparams, default=name_of, skipkeys=True)]
        self.insert([[*row, trial.seconds, trial.stack]])

    def fill_in(self, trials: list[Trial], share: bool = True) -> list[Trial]:
        """Set what the log knows of trials; return those that have not run.

        To share it waits for the other processes, and brings their rows into each log.
        """
        _, processes = launched()
        if processes > 1 and share:  # each may have a log of its own
            everyones = [None] * processes
            search = self.search, [(trial.number, trial.repeat) for trial in trials]
            distributed.all_gather_object(everyones, (search, self.rows()))
            searches, rows = zip(*everyones, strict=True)
            if any(other != search for other in searches):
                raise InputError("the processes differ in trials, settings, rows or code")
            self.insert(itertools.chain.from_iterable(rows))
        known = {(row[3], row[4]): row for row in self.rows()}
        for trial in trials:
            if row := known.get((trial.number, trial.repeat)):
                trial.score = math.nan if row[5] is None else row[5]
                trial.seconds, trial.stack = row[7:]
        return [trial for trial in trials if trial.score is None]

    def tell_of(self, trials: list[Trial], missing: list[Trial], path: str) -> None:
        """Say how much of this search is there, and whether the log holds others."""
        query = "SELECT count(DISTINCT search) FROM trials WHERE search != ?"
        (others,) = self.database.execute(query, [self.search]).fetchone()
        there = len(trials) - len(missing)
        if there or others:
            line = f"{path}: {there} of {len(trials)} trials of this search are there"
            line += f"; it holds {others} other searches" if others else ""
            print(line, file=sys.stderr)


ONE_AT_A_TIME = threading.RLock()  # random numbers and F.dropout are the whole process's


@contextlib.contextmanager
def random_numbers_of_trials() -> Iterator[None]:
    """Seed as trials need it within; after it your own random numbers go on as before."""
    with ONE_AT_A_TIME:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


RUNS = itertools.count()


def my_parts(trials: list[Trial], kind: Callable | None) -> Iterator[list[Trial]]:
    """The trials; of several processes each takes the next part, of equal kind, when it is free."""
    _, processes = launched()
    if processes == 1:
        yield trials
        return
    groups = defaultdict(list)
    for trial in trials:
        groups[kind(trial) if kind else None].append(trial)
    most = math.ceil(len(trials) / (8 * processes))
    most = max(8, most) if kind else most  # a stack of 8 gains nearly all
    parts = [part for group in groups.values() for part in equal_parts(group, most)]
    parts.sort(key=len, reverse=True)  # so that none is left with a large one at the end
    store = distributed.distributed_c10d._get_default_store()
    run_number = next(RUNS)
    while (turn := store.add(f"random_search {run_number}", 1)) <= len(parts):
        yield parts[turn - 1]


def run(train_and_evaluate: Callable, missing: list[Trial], log: Log, kind: Callable | None):
    """Train trials that are in the log of no process, and add them to this one's."""
    rank, processes = launched()
    begun = time.monotonic()
    done = 0
    best = -math.inf
    for part in my_parts(missing, kind) if missing else ():
        for trial, score in train_and_evaluate(part):
            with told([trial]):
                score = float(score)
            log.add(trial, score)
            done += 1
            best = max(best, score)
            if rank == 0 and sys.stderr and sys.stderr.isatty():
                left = (time.monotonic() - begun) / done * (len(missing) - done) / processes
                line = f"{done} of {len(missing)} trials, best score {best:.4g}, {left:.0f} s left"
                print(f"{line:70}", end="\r", file=sys.stderr, flush=True)


def one_at_a_time(trials: list[Trial], function: Callable) -> Iterator[tuple[Trial, float]]:
    """Score trials by a function of their hyperparams."""
    for trial in trials:
        begun = time.monotonic()
        seed_all(trial, OWN)
        with told([trial]):
            score = function(copy.deepcopy(trial.hyperparams))
        trial.seconds = time.monotonic() - begun
        yield trial, score


def ranked(trials: list[Trial]) -> list[Trial]:
    """Those that have run, the best first, the diverged last."""
    finished = [trial for trial in trials if trial.score is not None]
    return sorted(finished, key=lambda trial: (math.isnan(trial.score), -trial.score, trial.number))


def report(trials: list[Trial], heading: str = "", loss: bool = False) -> None:
    """Print the five best of ranked trials; scores that are -loss as losses."""
    sign, name = (-1, "loss") if loss else (1, "score")
    rows = [["trial", name, *trials[0].hyperparams, f"{name} of repeats"]]
    for trial in trials[:5]:
        cells = [trial.number, sign * trial.score, *trial.hyperparams.values()]
        rows.append([f"{cell:.4g}" if isinstance(cell, float) else name_of(cell) for cell in cells])
        repeats = sign * np.array(trial.repeats)
        spread = f" +- {repeats.std(ddof=1):.2g}" if len(repeats) > 1 else ""
        rows[-1].append(f"{repeats.mean():.4g}{spread}" if len(repeats) else "")
    if not trials[0].repeats:
        rows = [row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [heading] if heading else []
    lines += ["  ".join(map(str.rjust, row, widths)) for row in rows]
    diverged = sum(math.isnan(trial.score) for trial in trials)
    if diverged:
        line = f"{diverged} of {len(trials)} trials diverged"
        is_most = diverged > len(trials) / 2
        line += ": standardise the rows, look for NaN in them, lower lr" if is_most else ""
        lines.append(line)
    lines.append(str(trials[0].hyperparams))
    print("\n".join(lines), flush=True)


def sample_trials(space: dict, trials: int | Iterable[int], seed: int) -> list[Trial]:
    """Trials of the numbers 0 to trials - 1, or of the numbers trials."""
    numbers = range(trials) if isinstance(trials, int | np.integer) else trials
    numbers = list(dict.fromkeys(map(operator.index, numbers)))
    if not numbers:
        raise InputError("there are no trials to run")
    if min(seed, *numbers) < 0 or max(seed, *numbers) >= 2**63:
        raise InputError("the seed and the numbers of trials must be from 0 to 2**63 - 1")
    trials = [Trial(number, seed, sample_hyperparams(space, seed, number)) for number in numbers]
    drawn = [key for key, values in space.items() if callable(values)]
    for trial in trials if drawn else ():
        again = sample_hyperparams(space, seed, trial.number)
        for key in drawn:
            if describe(trial.hyperparams[key], {}) != describe(again[key], {}):
                problem = "has another value each time: draw from the generator"
                raise InputError(f"space: {key} {problem}")
    return trials


def random_search(
    train_and_evaluate: Callable,
    space: dict,
    trials: int | Iterable[int] = 100,
    *,
    seed: int = 0,
    repeats: int = 0,
    log: str | None = None,
    name: str = "",
    kind: Callable[[Trial], object] | None = None,
    report: Callable[[list[Trial]], None] = report,
) -> list[Trial]:
    """Score trials 0 to trials - 1, or those of the numbers trials; return them, the best first.

    train_and_evaluate is a function of hyperparams that returns a score, higher is better, or a
    generator function that is handed a list of Trial and yields (trial, score) as they finish.
    Those that the file log has of this search, which name is a part of, do not run again. The five
    best then run again repeats times, with other random numbers, and the mean of these decides.
    Processes of torchrun share the trials; those of equal kind stay together. On Ctrl-C what has
    finished goes to report.
    """
    if not inspect.isgeneratorfunction(getattr(train_and_evaluate, "func", train_and_evaluate)):
        train_and_evaluate = functools.partial(one_at_a_time, function=train_and_evaluate)
    seed = operator.index(seed)
    trials = sample_trials(space, trials, seed)
    versions = [torch.__version__, np.__version__, str(torch.get_default_dtype())]
    own_log = Log(log, name, [space, seed, versions, train_and_evaluate])
    finals = []
    with random_numbers_of_trials():
        try:
            missing = own_log.fill_in(trials)
            if launched()[0] == 0:
                own_log.tell_of(trials, missing, log)
            run(train_and_evaluate, missing, own_log, kind)
            own_log.fill_in(trials)
            best = [trial for trial in ranked(trials)[:5] if not math.isnan(trial.score)]
            for trial in best:
                finals += [replace(trial, repeat=1 + n, score=None) for n in range(repeats)]
            if finals:
                missing = own_log.fill_in(finals, share=False)  # all rows have just been shared
                run(train_and_evaluate, missing, own_log, kind)
                own_log.fill_in(finals)
        except KeyboardInterrupt:
            own_log.fill_in(trials, share=False)
            finished = ranked(trials)
            if launched()[0] == 0 and finished:
                print(f"interrupted: {len(finished)} of {len(trials)} trials", file=sys.stderr)
                report(finished)
            raise
    for trial in best:
        trial.repeats = [final.score for final in finals if final.number == trial.number]
    if repeats:
        best.sort(key=lambda trial: -np.nan_to_num(np.mean(trial.repeats), nan=-math.inf))
    return best + ranked(trials)[len(best) :]


def search(
    task: Task,
    trials: int | Iterable[int] = 200,
    epochs: int = 500,
    *,
    seed: int = 0,
    repeats: int = 0,
    log: str | None = None,
    name: str = "",
) -> list[Trial]:
    """random_search of a task, on the device of its tensors; a trial trains for epochs."""
    for x, y in (task[:2], task[2:4]):
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            raise InputError("x and y must be tensors")
        if x.ndim < 2 or not len(x) or len(x) != len(y) or x.shape[1:] != task.train_x.shape[1:]:
            raise InputError(f"x of shape {list(x.shape)} and y of {list(y.shape)} are not rows")
    functions = (task.build_model, 2), (task.update, 3)  # and where their hyperparameters begin
    names = " and ".join(name_of(function) for function, _ in functions)
    arguments = [arguments_of(*function, task.space) for function in functions]
    if unknown := set(task.space).difference({"batch_size"}, *arguments):
        raise InputError(f"space: {min(unknown)} is no argument of {names}")
    for (function, first), taken in zip(functions, arguments, strict=True):
        try:
            inspect.signature(function).bind(*range(first), **taken)
        except TypeError as error:
            raise InputError(f"space: {error}, for {names}") from None
    return random_search(
        functools.partial(train_and_evaluate, task=task, epochs=epochs),
        task.space,
        trials,
        seed=seed,
        repeats=repeats,
        log=log,
        name=name,
        kind=functools.partial(kind_of, task=task),
        report=functools.partial(report, loss=task.score is None),
    )


# ==== 6. The command line ========================================================================


def kept_arguments(trial: Trial, task: Task) -> dict:
    arguments = arguments_of(task.build_model, 2, trial.hyperparams)
    return {"sizes": [task.train_x.shape[1], task.outputs], "hyperparams": arguments}


def check_save(path: str, trials: list[Trial], task: Task) -> None:
    """Raise InputError if the file cannot be written, or a model not be loaded from it."""
    if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
        raise InputError(f"--save {path}: no file can be written there")
    buffer = io.BytesIO()
    try:
        torch.save([kept_arguments(trial, task) for trial in trials], buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception:
        problem = "a hyperparameter of the model is neither a number nor text"
        raise InputError(f"--save {path}: {problem}") from None


def save_model(path: str, trial: Trial, task: Task, epochs: int) -> None:
    """Train a trial once more, for the epochs of the search, and keep its model."""
    check_save(path, [trial], task)
    with random_numbers_of_trials():
        ((_, model),) = train([replace(trial)], task, epochs)
        score = float(evaluate(trial, model, task))
    score = score if math.isfinite(score) else math.nan
    if trial.score is not None and not np.isclose(score, trial.score, 1e-3, 0, equal_nan=True):
        raise InputError(
            f"a score of {score}, not {trial.score}: with other epochs or another task?"
        )
    kept = {"model": str(model), "state_dict": model.state_dict()}
    torch.save(kept_arguments(trial, task) | kept, path)


def load_model(path: str, build_model: Callable = build_model) -> nn.Module:
    """The model that save_model kept, in eval mode."""
    kept = torch.load(path, map_location="cpu", weights_only=True)
    model = build_model(*kept["sizes"], **kept["hyperparams"])
    if str(model) != kept["model"]:
        raise InputError(f"{path} is not of this build_model but of {kept['model']}")
    model.load_state_dict(kept["state_dict"])
    return model.eval()


def numbers_of(text: str) -> range:
    """200 is 0:200, the numbers from 0 up to 199."""
    start, _, stop = text.rpartition(":")
    return range(int(start or 0), int(stop))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Random search over hyperparameters in PyTorch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--task", choices=TASKS, default="xor", help="what to train on")
    parser.add_argument("--trials", type=numbers_of, default="200", help="how many, or first:end")
    parser.add_argument("--epochs", type=int, default=500, help="of each trial")
    parser.add_argument("--repeats", type=int, default=5, help="of the five best")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps")
    parser.add_argument("--processes", type=int, default=1, help="of this machine")
    parser.add_argument("--log", help="database of finished trials, which do not run again")
    parser.add_argument("--save", help="file for the best model, see load_model")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    if args.processes > 1 and not distributed.is_torchelastic_launched():
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}"]
        os.execv(sys.executable, [sys.executable, "-m", *launcher, "--", *sys.argv])
    begun = time.monotonic()
    rank, processes = launched()
    device = args.device
    if device == "cuda" and processes > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    repeats = args.repeats if len(args.trials) > 1 else 0  # which decide among trials
    options = {"seed": args.seed, "repeats": repeats, "log": args.log, "name": args.task}
    try:
        task = TASKS[args.task]()
        task = Task(*(value.to(device) if isinstance(value, Tensor) else value for value in task))
        if args.save and rank == 0:
            check_save(args.save, sample_trials(task.space, args.trials, args.seed), task)
        trials = search(task, args.trials, args.epochs, **options)
        if rank == 0:
            heading = f"{args.task}: {len(task.train_x)} rows, "
            if len(trials) > 1:
                stacks = round(sum(1 / trial.stack for trial in trials if trial.stack))
                alone = sum(not trial.stack for trial in trials)
                heading += f"{len(trials)} trials in {stacks} stacks and {alone} alone, "
            heading += f"{time.monotonic() - begun:.1f} s"
            report(trials, heading, loss=task.score is None)
        if args.save and rank == 0:
            save_model(args.save, trials[0], task, args.epochs)
    except KeyboardInterrupt:
        return 130
    except (InputError, sqlite3.Error) as error:
        place = f"--log {args.log}: " if isinstance(error, sqlite3.Error) else ""
        print(f"{os.path.basename(sys.argv[0])}: error: {place}{error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
