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
import functools
import hashlib
import inspect
import io
import itertools
import json
import logging
import math
import os
import random
import re
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
        elif isinstance(values, str) or not hasattr(values, "__len__") or not len(values):
            raise InputError(f"space: {name} must be a list of values or a function")
        else:
            value = values[generator.integers(len(values))]
            if type(value) is int and any(isinstance(own, float) for own in values):
                value = float(value)  # of [1, 0.1]
        value = value.item() if isinstance(value, np.generic) else value
        # 0.3, not linspace's 0.30000000000000004
        sample[name] = float(f"{value:.15g}") if isinstance(value, float) else value
    return sample


def random_words(trial: Trial) -> np.ndarray:
    """Six random uint32, two each: for initial weights, the order of rows, dropout."""
    words = np.random.SeedSequence(trial.seed, spawn_key=(trial.number, trial.repeat))
    return words.generate_state(6)


def seed_all(trial: Trial, word: int) -> None:
    """Seed all that your own code may draw from: by word 0 for a model, by 1 to train it."""
    seed = int(random_words(trial)[word])
    random.seed(seed)
    np.random.seed(seed)
    # torch.manual_seed takes 95 us, to look for devices.
    has_device = torch.accelerator.is_available()
    (torch.manual_seed if has_device else torch.default_generator.manual_seed)(seed)


def random_numbers(words: np.ndarray) -> Tensor:
    """Four numbers in 0 to 2**32 of each random uint64, 2**16 apart."""
    return torch.from_numpy(words.view(np.uint16).astype(np.float32)).add_(0.5).mul_(2**16)


def take_from(noise: Tensor) -> Callable[[int], Tensor]:
    """A function that returns the next numbers of noise [..., draws], from whole words."""
    start = 0

    def draw(count: int) -> Tensor:
        nonlocal start
        numbers = noise[..., start : start + count]
        start += count + -count % 4
        return numbers

    return draw


def dropout_bounds(rate: float | Tensor) -> tuple[Tensor, Tensor]:
    """The random number from which a value is kept, and its factor then."""
    rate = torch.as_tensor(rate)
    return rate * 2**32, 1 / (1 - rate)


def dropout_mask(noise: Tensor, least: Tensor, factor: Tensor) -> Tensor:
    """0 or factor. As noise is 2**16 apart, what exceeds least does so by more than factor."""
    return torch.minimum((noise - least).relu(), factor)  # a comparison takes three times as long


@contextlib.contextmanager
def dropout_by(draw: Callable[[int], Tensor]) -> Iterator[None]:
    """Within it the masks of F.dropout, which nn.Dropout calls too, are of the numbers of draw."""

    def dropout(x, p=0.5, training=True, inplace=False):
        if not training:
            return x
        mask = dropout_mask(draw(x.numel()), *dropout_bounds(p)).view(x.shape).to(x.dtype)
        return x.mul_(mask) if inplace else x * mask

    before = F.dropout
    F.dropout = dropout
    try:
        yield
    finally:
        F.dropout = before


# ==== 3. Training a stack of trials side by side =================================================


@functools.cache
def parameters_of(function: Callable) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def arguments_of(function: Callable, first: int, hyperparams: dict) -> dict:
    """The hyperparameters among the arguments of function, which begin at first."""
    parameters = parameters_of(function)[first:]
    takes_all = any(own.kind is own.VAR_KEYWORD for own in parameters)
    names = [own.name for own in parameters]
    return {name: own for name, own in hyperparams.items() if takes_all or name in names}


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
    seed_all(trial, word=0)
    own = copy.deepcopy(arguments_of(task.build_model, 2, trial.hyperparams))  # it may change them
    with told([trial]):
        model = task.build_model(task.train_x.shape[1], task.outputs, **own)
        return model.to(task.train_x.device)


def update_arguments(trials: list[Trial], task: Task, parameter: Tensor) -> dict:
    """The hyperparameters of update; floats as tensors that broadcast with [trials, ...]."""
    arguments = arguments_of(task.update, 3, trials[0].hyperparams)
    for name, value in arguments.items():
        if isinstance(value, float):
            values = parameter.new_tensor([trial.hyperparams[name] for trial in trials])
            arguments[name] = values.view(-1, *[1] * (parameter.ndim - 1))
    return arguments


def batch_sizes(trial: Trial, task: Task) -> list[int]:
    """The rows of each step of an epoch."""
    rows = len(task.train_x)
    size = trial.hyperparams.get("batch_size", rows)
    if not isinstance(size, int) or size < 1:
        raise InputError(f"batch_size is {size!r}: it must be a whole number above 0")
    # A last batch of one row, too few for BatchNorm, joins the one before.
    cuts = [*range(0, max(1, rows - (size > 1)), size), rows]
    return [stop - start for start, stop in itertools.pairwise(cuts)]


class Kind(NamedTuple):
    """How trials that differ in floats alone train, which examine finds out."""

    model: nn.Module  # of one of them, for its structure
    gradients: Callable  # gradients_alone, gradients_by_vmap or gradients_by_layers
    draws: list[int]  # how many random numbers dropout takes in each step of an epoch
    floats: list[tuple[str, str]] = []  # a module's name, its attribute that hyperparameters set
    outline: dict = {}  # what else the models of a stack have in common
    onednn: bool = True  # whether oneDNN may be used
    least: int = 1  # how many trials a stack must have
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
        words = [random_words(trial) for trial in trials]
        self.orders = [np.random.default_rng(own[2:4]) for own in words]
        self.noises = [np.random.SFC64(own[4:6]) for own in words]
        self.parameters = stack_tensors([dict(model.named_parameters()) for model in models])
        self.buffers = stack_tensors([dict(model.named_buffers()) for model in models])
        self.trained = [own for own in self.parameters.values() if own.requires_grad]
        self.states = [{} for _ in self.trained]  # of update
        self.arguments = [update_arguments(trials, task, own) for own in self.trained]
        self.floats = {}
        for name, attribute in kind.floats:
            values = [getattr(model.get_submodule(name), attribute) for model in models]
            self.floats[name, attribute] = torch.tensor(values, device=task.train_x.device)
        self.layers = [(name, type(layer)) for name, layer in kind.model._modules.items()]
        self.dropouts = {}  # for gradients_by_layers
        for name, layer in self.layers if kind.gradients is gradients_by_layers else ():
            if layer is nn.Dropout:
                rates = [model.get_submodule(name).p for model in models]
                rates = torch.tensor(rates, device=task.train_x.device)
                self.dropouts[name] = dropout_bounds(rates.view(-1, 1, 1))
        y = task.train_y  # of classes from 0, none that cross_entropy ignores?
        self.classes = y.dtype == torch.int64 and y.ndim == 1 and y.min() >= 0

    def batches(self, epochs: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """x and y [trials, batch, ...] and noise [trials, draws] of each step."""
        x, y = self.task.train_x, self.task.train_y
        sizes = batch_sizes(self.trials[0], self.task)
        draws = itertools.chain.from_iterable(itertools.repeat(self.kind.draws, epochs))
        noise = self.make_noise(draws)
        order = torch.arange(len(x), device=x.device).expand(len(self.orders), -1)
        for _ in range(epochs):
            if len(sizes) > 1:  # the order of a full batch does not matter
                orders = [own.permutation(len(x)) for own in self.orders]
                order = torch.from_numpy(np.stack(orders)).to(x.device)
            for rows in order.split(sizes, dim=1):
                yield x[rows], y[rows], next(noise)

    def make_noise(self, draws: Iterable[int]) -> Iterator[Tensor]:
        """random_numbers, [trials, draws of the step]; those of many steps in one call."""
        for count, run in itertools.groupby(draws):
            ahead = max(1, 2**17 // max(1, count * len(self.noises)))
            while steps := sum(1 for _ in itertools.islice(run, ahead)):
                words = np.stack([own.random_raw(steps * count // 4) for own in self.noises])
                noise = random_numbers(words).to(self.task.train_x.device)
                yield from noise.view(len(words), steps, count).unbind(1)

    @torch.no_grad()
    def step(self, gradients: Iterable[Tensor | None]) -> None:
        """update each parameter that the loss has reached."""
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                parameter = self.trained[index].data
                self.task.update(parameter, gradient, self.states[index], **self.arguments[index])


def stack_tensors(named: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by name stacked, [trials, ...]; they themselves become views of that."""
    stacked = {}
    for name, first in named[0].items():
        stacked[name] = torch.stack([tensors[name].data for tensors in named])
        for tensors, own in zip(named, stacked[name], strict=True):
            tensors[name].data = own
        stacked[name].requires_grad_(first.requires_grad)
    return stacked


def gradients_alone(stack: Stack, x: Tensor, y: Tensor, noise: Tensor) -> list[Tensor | None]:
    """The gradients [1, ...] of a stack of one trial, in plain PyTorch."""
    (model,) = stack.models
    model.zero_grad()
    stack.task.loss(model(x[0]), y[0]).backward()
    parameters = [own for own in model.parameters() if own.requires_grad]
    return [None if own.grad is None else own.grad[None] for own in parameters]


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


@torch.no_grad()
def gradients_by_layers(stack: Stack, x: Tensor, y: Tensor, noise: Tensor) -> list[Tensor]:
    """The same for an nn.Sequential of Linear, ReLU and Dropout, in less than half the time."""
    parameters = iter(stack.parameters.values())
    draw = take_from(noise)
    forward = []
    for name, layer in stack.layers:
        if layer is nn.Linear:
            weight = next(parameters)
            forward.append((weight, x))
            x = torch.baddbmm(next(parameters).unsqueeze(1), x, weight.mT)
        elif layer is nn.ReLU:
            x = x.relu()
            forward.append((None, x))
        else:
            mask = dropout_mask(draw(x[0].numel()).view(x.shape), *stack.dropouts[name])
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
    if loss is F.mse_loss and outputs.shape == y.shape:
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


PLAIN = bool | int | float | str | None


def outline(model: nn.Module) -> dict:
    """What the modules of a model hold, but weights: where that differs, models do not stack.

    Numbers and text are themselves, any other object is its id: no two models share a hook.
    """
    held = {}
    first = {}  # where a tensor stands first: it may be tied
    for name, module in model.named_modules(remove_duplicate=False):
        held[name, "class"] = type(module)
        for key, own in itertools.chain(module._parameters.items(), module._buffers.items()):
            if own is not None:
                hooks = own._backward_hooks, own._post_accumulate_grad_hooks
                place = first.setdefault(id(own), (name, key))
                held[name, key] = own.shape, own.dtype, own.requires_grad, hooks, place
        for attribute, value in vars(module).items():
            if isinstance(value, PLAIN):
                held[name, attribute] = value
            elif isinstance(value, tuple | set) and all(isinstance(own, PLAIN) for own in value):
                held[name, attribute] = repr(value)
            elif attribute not in ("_parameters", "_buffers", "_modules"):
                is_empty = isinstance(value, dict | list) and not value
                held[name, attribute] = None if is_empty else id(value)
    return held


def difference(one: dict, two: dict) -> str:
    """Where two outlines differ, in words; '' if nowhere."""
    for name, attribute in one | two:
        if one.get((name, attribute)) != two.get((name, attribute)):
            module = one.get((name, "class"), type(None)).__name__
            return f"{attribute} of {module} is not the same in all trials"
    return ""


def middle_trials(trial: Trial, task: Task) -> list[Trial]:
    """Two trials like this one, with other floats: the two in the middle of 32 that are drawn.

    They follow from the space, not from the trials that are there: who is stacked must not.
    """
    samples = [sample_hyperparams(task.space, trial.seed, number) for number in range(32)]
    pair = [dict(trial.hyperparams), dict(trial.hyperparams)]
    for name, value in trial.hyperparams.items():
        if isinstance(value, float):
            drawn = {sample.get(name) for sample in samples}
            drawn = sorted(own for own in drawn if isinstance(own, float)) or [value]
            pair[0][name] = drawn[len(drawn) // 2]
            pair[1][name] = drawn[len(drawn) // 2 - 1]
    return [replace(trial, number=n, repeat=0, hyperparams=own) for n, own in enumerate(pair)]


def rehearse(stack: Stack) -> list[Tensor]:
    """Take the first and the last step of an epoch, and some with gradients of other magnitudes.

    Return the gradients, the parameters and the buffers of the trial in the middle.
    """
    draws = stack.kind.draws
    place = len(stack.trials) // 2
    seen = []
    for step, noise in zip((0, -1), stack.make_noise([draws[0], draws[-1]]), strict=True):
        size = batch_sizes(stack.trials[0], stack.task)[step]
        x, y = (rows[:size] for rows in (stack.task.train_x, stack.task.train_y))
        x, y = (rows.expand(len(stack.orders), *rows.shape) for rows in (x, y))
        gradients = stack.kind.gradients(stack, x, y, noise)
        seen += [torch.zeros(0) if own is None else own[place].clone() for own in gradients]
        stack.step(gradients)
    for scale in (1e-4, 1e4):  # where an update may clip
        stack.step([own if own is None else own * scale for own in gradients])
    number = stack.trials[place].number  # copies of the trial itself are no others
    own = torch.tensor([trial.number == number for trial in stack.trials], device=x.device)
    for other in (math.nan, 1e30, math.nan):  # gradients of the others must not matter
        mixed = [
            g if g is None else g.where(own.view(-1, *[1] * (g.ndim - 1)), other) for g in gradients
        ]
        stack.step(mixed)
    model = stack.models[place]
    seen += [*model.parameters(), *model.buffers()]
    return [own.detach().double().nan_to_num() for own in seen]


def agree(seen: list[Tensor], others: list[Tensor], tolerance: float) -> bool:
    """Whether each differs by tolerance at most, of its largest number or of 1e-3 of all's."""
    sizes = [own.abs().max().item() if own.numel() else 0 for own in others]
    return all(
        own.shape == other.shape
        # A gradient may be 0 but for rounding, as that of a bias before BatchNorm.
        and torch.allclose(own, other, rtol=0, atol=tolerance * max(size, 1e-3 * max(sizes)))
        for own, other, size in zip(seen, others, sizes, strict=True)
    )


class Rounding(TorchDispatchMode):
    """Tries each operation on a stack of one trial with made-up numbers, alone and among others.

    The last bits may differ: those of a product of one column, where it is the only one, or of a
    sigmoid, for the last numbers of a tensor, which do not fill a vector register.
    """

    def __init__(self):
        super().__init__()
        self.least = {}  # by operation and shape: how many trials it needs, 3: never the same
        self.numbers = torch.randn(2**16, generator=torch.Generator().manual_seed(0))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip it torch would import it, which takes a second

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        is_float = isinstance(result, Tensor) and result.is_floating_point() and result.ndim
        key = operation, result.shape if is_float else None
        if is_float and key not in self.least:
            with contextlib.suppress(RuntimeError):  # such as a view of a fixed size
                self.least[key] = self.try_operation(operation, args, kwargs or {}, result)
        return result

    def try_operation(self, operation, args: tuple, kwargs: dict, result: Tensor) -> int:
        """1 or 2 trials that have the same result apart as among others; 3: neither."""
        first = 0 if torch.Tag.pointwise in operation.tags else 1  # any dimension may be trials'
        if first and len(result) > 1:  # not of a stack
            return 1
        count = max(4, min(32, 2**14 // max(1, result.numel())))
        made = list(args)
        for index, own in enumerate(args):
            if isinstance(own, Tensor) and own.is_floating_point() and own.ndim == result.ndim:
                shape = count, *own.shape[first:]
                numbers = self.numbers[97 * index :]
                numbers = numbers.repeat(math.prod(shape) // len(numbers) + 1)
                made[index] = numbers[: math.prod(shape)].view(shape).to(own.dtype)

        def run(size: int) -> Tensor:  # size trials at a time
            parts = []
            for start in range(0, count, size):
                rows = [
                    new if new is old else new[start : start + size].clone()
                    for new, old in zip(made, args, strict=True)
                ]
                parts.append(operation(*rows, **kwargs))
            return torch.cat(parts).nan_to_num()

        among = run(count)
        if len(among) != count:
            return 1
        return next((size for size in (1, 2) if torch.equal(run(size), among)), 3)


def refuse_broadcast(outputs: Tensor, y: Tensor) -> None:
    shape = (len(y), *outputs.shape[1:])
    sizes = zip(reversed(shape), reversed(y.shape), strict=False)
    broadcasts = all(one == two or 1 in (one, two) for one, two in sizes)
    if y.is_floating_point() and shape != y.shape and broadcasts:
        raise InputError(f"the model's outputs have shape {list(shape)}, y has {list(y.shape)}")


def rehearse_alone(stack: Stack) -> tuple[list[Tensor], list[int], int, str]:
    """Rehearse in plain PyTorch; also what dropout drew in each step, floats held, a problem."""
    (trial,), (model,) = stack.trials, stack.models
    before = outline(model)
    start = [own.clone() for own in stack.trained]
    held = [2 * own.numel() for own in stack.trained]
    drawn = [0]

    def draw(count: int) -> Tensor:
        drawn[-1] += count + -count % 4
        words = stack.noises[0].random_raw((count + 3) // 4)
        return random_numbers(words)[:count].to(stack.task.train_x.device)

    def look(module: nn.Module, inputs: tuple, outputs: object) -> None:
        held.append(outputs.numel() if isinstance(outputs, Tensor) else 0)
        if module is model:
            drawn.append(0)
            loss = getattr(stack.task.loss, "func", stack.task.loss)
            loss = loss if inspect.isroutine(loss) else type(loss)
            if isinstance(outputs, Tensor) and is_library(loss):  # yours may mean it
                refuse_broadcast(outputs, stack.task.train_y)

    def next_numbers() -> tuple:
        return random.random(), np.random.random(), torch.rand(1).item()

    seed_all(trial, word=1)
    numbers = next_numbers()
    seed_all(trial, word=1)
    with nn.modules.module.register_module_forward_hook(look), dropout_by(draw):
        seen = rehearse(stack)
    if all(map(torch.equal, start, stack.trained)):
        raise InputError("update changed no parameter: it must change them in place")
    problem = difference(before, outline(model))
    if next_numbers() != numbers:
        problem = "it draws random numbers that are not dropout's"
    return seen, drawn[:2], sum(held), problem


def rehearse_stacked(pair: list[Trial], task: Task, kind: Kind, expected: list) -> tuple[str, int]:
    """Why a stack does not train the first trial as expected; how many trials it must have."""

    def rehearsed(*trials: Trial, task: Task = task, rounding: Rounding | None = None) -> list:
        models = {trial.number: make_model(trial, task) for trial in pair}
        stack = Stack(list(trials), [models[trial.number] for trial in trials], task, kind)
        onednn = torch.backends.mkldnn.flags(kind.onednn, allow_tf32=None)
        with onednn, rounding or contextlib.nullcontext():
            return rehearse(stack)

    among = rehearsed(pair[1], pair[0], pair[1])
    if not agree(among, expected, tolerance=1e-3):
        return "in a stack it does not train as alone", 1
    if not task.train_x.is_cpu:  # elsewhere last bits are not promised
        return "", 1
    rounding = Rounding()
    without_loss = task._replace(loss=lambda outputs, y: outputs.sum())  # a loss sees one trial
    rehearsed(pair[0], task=without_loss, rounding=rounding)
    least = max(rounding.least.values(), default=1)
    while least < 3 and not agree(rehearsed(*pair[:1] * least), among, tolerance=0):
        least += 1
    names = {str(key[0]) for key, size in rounding.least.items() if size == 3}
    return " ".join(["its last bits depend on the stack", *names]) if least == 3 else "", least


def examine(trial: Trial, task: Task) -> tuple[Kind, str]:
    """How trials like this one train: in a stack if some steps of one are there as they are alone.

    Else a text says why not. Raises InputError for outputs or an update that cannot be right.
    """
    model = make_model(trial, task)
    steps = len(batch_sizes(trial, task))
    alone = Kind(model, gradients_alone, [0] * steps)
    pair = middle_trials(trial, task)
    try:
        models = [make_model(own, task) for own in pair]
        one, two = map(outline, models)
        floats = [key for key, own in one.items() if isinstance(own, float) and own != two.get(key)]
        common = {key: own for key, own in one.items() if key not in floats}
        stack = Stack(pair[:1], [make_model(pair[0], task)], task, alone)
        expected, draws, held, problem = rehearse_alone(stack)
        others = {key: own for key, own in two.items() if key not in floats}
        problem = difference(common, others) or problem
    except InputError:
        raise
    except Exception as error:  # of your code: the trial itself will show it
        problem = f"it could not be checked, {error!r}"
    if problem:
        return alone, problem
    most = max(1, (2**21 if task.train_x.is_cpu else 2**28) // held)  # a CPU's caches
    simple = {*map(type, model.children())} <= {nn.Linear, nn.ReLU, nn.Dropout}
    by_layers = [(gradients_by_layers, True)] if simple and type(model) is nn.Sequential else []
    draws = draws[:1] * (steps - 1) + draws[1:]  # of each step of an epoch
    # oneDNN's convolutions may have other last bits in a stack than alone.
    for gradients, onednn in [*by_layers, (gradients_by_vmap, True), (gradients_by_vmap, False)]:
        # The structure of the other: what outline cannot see is wrong then, and found.
        kind = Kind(models[1], gradients, draws, floats, common, onednn, most=most)
        try:
            problem, least = rehearse_stacked(pair, task, kind, expected)
        except Exception as error:  # of your code, which raised nothing alone
            frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
            modules = [f["self"] for f in frames if isinstance(f.get("self"), nn.Module)]
            problem = f"{type([model, *modules][-1]).__name__}: {error}".partition("\n")[0]
        if not problem:
            return kind._replace(least=least), ""
    return alone, problem


def make_stacks(trials: list[Trial], task: Task) -> Iterator[Stack]:
    """Stacks of the trials of each kind; a stack of one for each that trains alone."""
    groups = defaultdict(list)
    for trial in trials:
        groups[kind_of(trial, task)].append(trial)
    for group in groups.values():
        kind, problem = examine(group[0], task)
        no_draws = [0] * len(kind.draws)  # alone dropout is torch's own
        alone = kind._replace(gradients=gradients_alone, draws=no_draws, floats=[], least=1)
        count = math.ceil(len(group) / kind.most)
        for start in range(count):
            stacked = []
            for trial in group[start::count]:
                model = make_model(trial, task)
                reason = problem
                if not reason:
                    held = {k: own for k, own in outline(model).items() if k not in kind.floats}
                    reason = difference(kind.outline, held)
                if reason:
                    tell(f"{type(model).__name__} trains one trial at a time: {reason}")
                    yield Stack([trial], [model], task, alone)
                else:
                    stacked.append((trial, model))
            if stacked:
                members, models = map(list, zip(*stacked, strict=True))
                with told(members):
                    stack = Stack(members, models, task, kind)
                yield stack


def kind_of(trial: Trial, task: Task) -> str:
    """Equal for trials that differ in floats alone."""
    own = {name: value for name, value in trial.hyperparams.items() if not isinstance(value, float)}
    taken = arguments_of(task.build_model, 2, own) | arguments_of(task.update, 3, own)
    return repr(describe([own | {"batch_size": batch_sizes(trial, task)[0]}, taken], {}))


def train(trials: list[Trial], task: Task, epochs: int) -> Iterator[tuple[Trial, nn.Module]]:
    """Train trials stack by stack; yield each with its model, an ordinary one."""
    # glibc gives freed memory back, and each step faults it in anew, unless a large block was freed
    torch.empty(2**25 - 2**16, dtype=torch.uint8)
    for stack in make_stacks(trials, task):
        begun = time.monotonic()
        alone = stack.kind.gradients is gradients_alone
        seed_all(stack.trials[0], word=1)  # for what it may draw alone
        with told(stack.trials), torch.backends.mkldnn.flags(stack.kind.onednn, allow_tf32=None):
            for x, y, noise in stack.batches(epochs):  # for x, y in loader:
                gradients = stack.kind.gradients(stack, x, y, noise)  # loss(model(x), y).backward()
                stack.step(gradients)  # optimizer.step()
        for trial, model in zip(stack.trials, stack.models, strict=True):
            trial.seconds = (time.monotonic() - begun) / len(stack.trials)
            trial.stack = 0 if alone else len(stack.trials)
            yield trial, model


def train_and_evaluate(trials: list[Trial], task: Task, epochs: int) -> Iterator:
    """Train trials stack by stack; yield each with its score."""
    for trial, model in train(trials, task, epochs):
        model.eval()
        seed_all(trial, word=1)
        with told([trial]), torch.no_grad():
            outputs = model(task.valid_x)
            score = task.score or (lambda outputs, y: -task.loss(outputs, y))
            yield trial, score(outputs, task.valid_y)


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
    inner = [all_names(own) for own in code.co_consts if isinstance(own, types.CodeType)]
    names = [*code.co_names, *itertools.chain.from_iterable(inner)]
    return [name for name in names if not name.startswith("__")]  # __name__ differs in a script


def describe(value: object, seen: dict) -> object:
    """Plain data that is equal for what acts the same, in every process: of your own code the
    instructions and all that they refer to, of a library's the name, of nothing the address."""
    parts = functools.partial(describe, seen=seen)
    own_type = [] if is_library(type(value)) else [type(value)]
    if isinstance(value, Tensor):
        content = value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
        return [str(value.dtype), list(value.shape), hashlib.sha256(content).hexdigest()]
    if isinstance(value, np.ndarray):
        content = parts(value.tolist()) if value.dtype == object else value.tobytes()
        return [str(value.dtype), value.shape, hashlib.sha256(repr(content).encode()).hexdigest()]
    if isinstance(value, dict):
        return [[parts(name), parts(own)] for name, own in value.items()] + parts(own_type)
    if isinstance(value, list | tuple):
        return [parts(own) for own in (*value, *own_type)]
    if isinstance(value, set | frozenset):
        return sorted(repr(parts(own)) for own in value)
    if isinstance(value, types.CodeType):
        return [value.co_code.hex(), value.co_names, parts(value.co_consts)]
    if isinstance(value, functools.partial):
        return parts([value.func, value.args, value.keywords])
    if isinstance(value, types.MethodType | property | classmethod | staticmethod):
        names = "__func__", "__self__", "fget", "fset"
        return parts([getattr(value, name, None) for name in names])
    if isinstance(value, types.ModuleType | logging.Logger):
        return value.__name__ if isinstance(value, types.ModuleType) else value.name
    if id(value) in seen:  # such as a function that calls itself
        return list(seen).index(id(value))
    text = re.sub(" at 0x[0-9a-fA-F]+", "", repr(value))
    if inspect.isroutine(value) or inspect.isclass(value):
        if is_library(value):
            bound = getattr(value, "__self__", None)
            is_plain = bound is None or isinstance(bound, type | types.ModuleType)
            return text if is_plain else parts([value.__name__, bound])
    elif not own_type and not getattr(value, "__dict__", None):
        return text
    seen[id(value)] = value
    if inspect.isfunction(value):
        names = all_names(value.__code__)
        read = [value.__globals__[name] for name in names if name in value.__globals__]
        modules = []
        for own in read:  # which grows: of your own modules what the names may mean
            if inspect.ismodule(own) and not is_library(own) and own not in modules:
                modules.append(own)
                read += [getattr(own, name, None) for name in names]
        cells = [inspect.getclosurevars(value).nonlocals] if value.__closure__ else []
        return parts([value.__code__, value.__defaults__, value.__kwdefaults__, cells, read])
    slots = [name for own in type(value).__mro__ for name in getattr(own, "__slots__", ())]
    held = {name: getattr(value, name, None) for name in slots} | getattr(value, "__dict__", {})
    held = {n: v for n, v in held.items() if callable(v) or not n.startswith("__")}
    return parts([getattr(value, "__bases__", type(value)), held])


def launched() -> tuple[int, int]:
    """The rank of this process, and how many torchrun has launched, perhaps on several machines."""
    if not distributed.is_available() or not distributed.is_initialized():
        if not distributed.is_torchelastic_launched():
            return 0, 1
        distributed.init_process_group("gloo", timeout=timedelta(days=30))
        atexit.register(distributed.destroy_process_group)  # else its threads may abort the exit
    return distributed.get_rank(), distributed.get_world_size()


class Log:
    """The finished trials of a search, in an SQLite database that may hold others too."""

    def __init__(self, path: str | None, name: str, search: list):
        text = json.dumps(describe(search, seen={}))
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

    def tell_of(self, trials: list[Trial], path: str) -> None:
        """Say how much of this search is there, and whether the log holds others."""
        query = "SELECT count(DISTINCT search) FROM trials WHERE search != ?"
        (others,) = self.database.execute(query, [self.search]).fetchone()
        there = len(trials) - len(self.fill_in(trials))
        if there or others:
            line = f"{path}: {there} of {len(trials)} trials of this search are there"
            line += f"; it holds {others} others" if others else ""
            print(line, file=sys.stderr)

    def add(self, trial: Trial, score: float) -> None:
        row = [self.search, self.name, trial.seed, trial.number, trial.repeat]
        row += [score if math.isfinite(score) else None]
        row += [json.dumps(trial.hyperparams, default=repr), trial.seconds, trial.stack]
        self.insert([row])

    def insert(self, rows: Iterable) -> None:
        query = "INSERT OR IGNORE INTO trials VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
        self.database.executemany(query, rows)

    def share(self) -> None:
        """Bring the rows of all processes into the log of each: machines may have their own."""
        _, processes = launched()
        if processes > 1:
            everyones = [None] * processes
            distributed.all_gather_object(everyones, self.rows())
            self.insert(itertools.chain.from_iterable(everyones))

    def fill_in(self, trials: list[Trial]) -> list[Trial]:
        """Set what it knows of trials; return those that have not run."""
        known = {(row[3], row[4]): row for row in self.rows()}
        for trial in trials:
            if row := known.get((trial.number, trial.repeat)):
                trial.score = math.nan if row[5] is None else row[5]
                trial.seconds, trial.stack = row[7:]
        return [trial for trial in trials if trial.score is None]


ONE_AT_A_TIME = threading.RLock()  # random numbers and F.dropout are the whole process's
RUNS = itertools.count()


def my_parts(trials: list[Trial], kind: Callable | None) -> Iterator[list[Trial]]:
    """The trials; of several processes each takes the next part, of equal kind, when it is free."""
    _, processes = launched()
    if processes == 1:
        yield trials
        return
    groups = defaultdict(list)
    for index, trial in enumerate(trials):
        groups[kind(trial) if kind else index % (8 * processes)].append(trial)
    most = max(8, math.ceil(len(trials) / (8 * processes)))  # a stack of 8 gains nearly all
    parts = []
    for group in groups.values():
        count = math.ceil(len(group) / most)
        parts += [group[start::count] for start in range(count)]
    parts.sort(key=len, reverse=True)  # so that none is left with a large one at the end
    store = distributed.distributed_c10d._get_default_store()
    run_number = next(RUNS)
    while (turn := store.add(f"random_search {run_number}", 1)) <= len(parts):
        yield parts[turn - 1]


def run(train_and_evaluate: Callable, trials: list[Trial], log: Log, kind: Callable | None) -> None:
    """Train those of trials that are in the log of no process, and set the scores of all."""
    log.share()
    missing = log.fill_in(trials)
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
            if launched()[0] == 0 and sys.stderr and sys.stderr.isatty():
                left = (time.monotonic() - begun) / done * (len(missing) - done) / launched()[1]
                line = f"{done} of {len(missing)} trials, best score {best:.4g}, {left:.0f} s left"
                print(f"{line:70}", end="\r", file=sys.stderr, flush=True)
    log.share()
    log.fill_in(trials)


def one_at_a_time(trials: list[Trial], function: Callable) -> Iterator[tuple[Trial, float]]:
    """Score trials by a function of their hyperparams."""
    for trial in trials:
        begun = time.monotonic()
        seed_all(trial, word=1)
        with told([trial]):
            score = function(copy.deepcopy(trial.hyperparams))
        trial.seconds = time.monotonic() - begun
        yield trial, score


def ranked(trials: list[Trial]) -> list[Trial]:
    """Those that have run, the best first, the diverged last."""
    finished = [trial for trial in trials if trial.score is not None]
    return sorted(finished, key=lambda own: (math.isnan(own.score), -own.score, own.number))


def report(trials: list[Trial], heading: str = "", loss: bool = False) -> None:
    """Print the five best of ranked trials; scores that are -loss as losses."""
    sign, name = (-1, "loss") if loss else (1, "score")
    names = list(trials[0].hyperparams)
    rows = [["trial", name, *names, f"{name} of repeats"]]
    for trial in trials[:5]:
        cells = [trial.number, sign * trial.score, *trial.hyperparams.values()]
        rows.append([f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells])
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
        lines += [f"{diverged} of {len(trials)} trials diverged"]
        lines[-1] += ": standardise the rows, or lower lr" if diverged > len(trials) / 2 else ""
    lines.append(str(trials[0].hyperparams))
    print("\n".join(lines), flush=True)


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
    numbers = range(trials) if isinstance(trials, int | np.integer) else trials
    trials = [Trial(int(n), seed, sample_hyperparams(space, seed, int(n))) for n in numbers]
    if not trials:
        raise InputError("there are no trials to run")
    again = sample_hyperparams(space, seed, trials[0].number)
    for key, value in trials[0].hyperparams.items():
        if repr(value) != repr(again[key]) and callable(space[key]):
            raise InputError(f"space: {key} has another value each time: draw from the generator")
    versions = [torch.__version__, np.__version__, str(torch.get_default_dtype())]
    own_log = Log(log, name, [name, space, seed, versions, train_and_evaluate])
    if launched()[0] == 0:
        own_log.tell_of(trials, log)
    with ONE_AT_A_TIME:
        try:
            run(train_and_evaluate, trials, own_log, kind)
            best = [trial for trial in ranked(trials)[:5] if not math.isnan(trial.score)]
            finals = [
                replace(own, repeat=1 + n, score=None) for own in best for n in range(repeats)
            ]
            run(train_and_evaluate, finals, own_log, kind)
        except KeyboardInterrupt:
            own_log.fill_in(trials)
            if launched()[0] == 0 and ranked(trials):
                report(ranked(trials))
            raise
    for trial in best:
        trial.repeats = [final.score for final in finals if final.number == trial.number]
    if repeats:
        best.sort(key=lambda own: -np.nan_to_num(np.mean(own.repeats), nan=-math.inf))
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
        if x.ndim < 2 or len(x) != len(y) or x.shape[1:] != task.train_x.shape[1:]:
            raise InputError(f"x of shape {list(x.shape)} and y of {list(y.shape)} are not rows")
    functions = [getattr(own, "__name__", repr(own)) for own in (task.build_model, task.update)]
    parameters = parameters_of(task.build_model)[2:] + parameters_of(task.update)[3:]
    names = {own.name for own in parameters}
    if any(own.kind is own.VAR_KEYWORD for own in parameters):  # it takes all
        names |= set(task.space)
    needed = {own.name for own in parameters if own.default is own.empty}
    needed -= {own.name for own in parameters if own.kind in (own.VAR_KEYWORD, own.VAR_POSITIONAL)}
    for key in (set(task.space) - names - {"batch_size"}) | (needed - set(task.space)):
        problem = "is an argument of neither" if key in task.space else "is missing for one of"
        raise InputError(f"space: {key} {problem}: {functions[0]}, {functions[1]}")
    train = functools.partial(train_and_evaluate, task=task, epochs=epochs)
    kind = functools.partial(kind_of, task=task)
    show = functools.partial(report, loss=task.score is None)
    options = {"seed": seed, "repeats": repeats, "log": log, "name": name}
    return random_search(train, task.space, trials, kind=kind, report=show, **options)


# ==== 6. The command line ========================================================================


def kept_arguments(trial: Trial, task: Task) -> dict:
    own = arguments_of(task.build_model, 2, trial.hyperparams)
    return {"sizes": [task.train_x.shape[1], task.outputs], "hyperparams": own}


def check_save(path: str, trials: range, task: Task, seed: int) -> None:
    """Raise InputError if the file cannot be written, or its model not be loaded."""
    samples = [sample_hyperparams(task.space, seed, number) for number in trials]
    buffer = io.BytesIO()
    try:
        open(path, "ab").close()
        torch.save([kept_arguments(Trial(0, 0, own), task) for own in samples], buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception as error:
        raise InputError(f"--save {path}: {error}".partition("\n")[0]) from None


def save_model(path: str, trial: Trial, task: Task, epochs: int) -> None:
    """Train a trial once more, and keep its model."""
    ((_, model),) = train([trial], task, epochs)
    torch.save(kept_arguments(trial, task) | {"state_dict": model.state_dict()}, path)


def load_model(path: str, build_model: Callable = build_model) -> nn.Module:
    """The model that --save kept, in eval mode."""
    kept = torch.load(path, map_location="cpu", weights_only=True)
    model = build_model(*kept["sizes"], **kept["hyperparams"])
    model.load_state_dict(kept["state_dict"])
    return model.eval()


def numbers_of(text: str) -> range:
    """200 is 0:200, the numbers from 0 up to 199."""
    start, _, stop = text.rpartition(":")
    return range(int(start or 0), int(stop))


def main() -> int:
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
    args = parser.parse_args()
    if args.processes > 1 and not distributed.is_torchelastic_launched():
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}"]
        os.execv(sys.executable, [sys.executable, "-m", *launcher, "--", *sys.argv])
    begun = time.monotonic()
    rank, _ = launched()
    device = args.device
    if device == "cuda" and distributed.is_initialized():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    options = {"seed": args.seed, "repeats": args.repeats, "log": args.log, "name": args.task}
    try:
        task = TASKS[args.task]()
        task = Task(*(own.to(device) if isinstance(own, Tensor) else own for own in task))
        if args.save and rank == 0:
            check_save(args.save, args.trials, task, args.seed)
        trials = search(task, args.trials, args.epochs, **options)
        if rank == 0:
            stacks = round(sum(1 / trial.stack for trial in trials if trial.stack))
            alone = sum(not trial.stack for trial in trials)
            heading = (
                f"{args.task}: {len(task.train_x)} rows, {len(trials)} trials in {stacks} stacks"
            )
            heading += f" and {alone} alone, {time.monotonic() - begun:.1f} s"
            report(trials, heading, loss=task.score is None)
        if args.save and rank == 0:
            save_model(args.save, trials[0], task, args.epochs)
    except (InputError, sqlite3.Error) as error:
        place = f"--log {args.log}: " if isinstance(error, sqlite3.Error) else ""
        parser.exit(2, f"{parser.prog}: error: {place}{error}\n")
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
