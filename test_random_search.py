"""Tests of random_search.py by what it promises: `make test`."""

import contextlib
import functools
import itertools
import json
import math
import os
import random
import re
import sqlite3
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import random_search as rs  # isort: skip  # before torch: it sets how its matrix library rounds
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.utils.checkpoint import checkpoint

HERE = Path(__file__).parent
GENERATOR = torch.Generator().manual_seed(0)
FLAT = torch.randn(61, 6, generator=GENERATOR)
CLASSES = FLAT[:, :3].argmax(1)
IMAGES = torch.randn(61, 3, 8, 8, generator=GENERATOR)
SERIES = torch.randn(61, 5, 8, generator=GENERATOR)
WORDS = torch.randint(0, 10, (61, 7), generator=GENERATOR)
SPACE = {"lr": np.linspace(0.01, 0.1, 50), "batch_size": [16], "p": np.linspace(0.1, 0.5, 20)}


def make_task(x=FLAT, y=CLASSES, outputs=3, loss=F.cross_entropy, **options) -> rs.Task:
    """45 rows train, in two batches of 16 and one of 13; 16 score."""
    options = {"space": SPACE} | options
    return rs.Task(x[:45], y[:45], x[45:], y[45:], outputs, loss, **options)


def sample_trials(task: rs.Task, numbers) -> list[rs.Trial]:
    return [rs.Trial(n, 0, rs.sample_hyperparams(task.space, 0, n)) for n in numbers]


def scores(task: rs.Task, trials: list[rs.Trial], epochs=2) -> dict[int, str]:
    """To the last bit, by trial."""
    trained = rs.train_and_evaluate([rs.replace(trial) for trial in trials], task, epochs)
    return {trial.number: float(score).hex() for trial, score in trained}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    rs.tell.cache_clear()
    monkeypatch.setattr(rs, "TASKS", dict(rs.TASKS))


# ---- Kinds of model, each in ordinary PyTorch ---------------------------------------------------


def mlp(inputs, outputs, p, activation=nn.ReLU, width=32):
    layers = [nn.Linear(inputs, width), activation(), nn.Dropout(p), nn.Linear(width, outputs)]
    return nn.Sequential(*layers)


def mlp_of(activation):
    return lambda inputs, outputs, p: mlp(inputs, outputs, p, activation, width=30)


class Net(nn.Module):
    """Two layers; the kinds below change what is between them."""

    def __init__(self, inputs, outputs, p):
        super().__init__()
        self.first = nn.Linear(inputs, 16)
        self.last = nn.Linear(16, outputs)
        self.p = p

    def forward(self, x):
        return self.last(self.between(torch.relu(self.first(x))))


def net(between):
    return type("Kind", (Net,), {"between": between})


class Attention(nn.Module):
    def __init__(self, inputs, outputs, p, need_weights=True):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=p, batch_first=True)
        self.last = nn.Linear(8, outputs)
        self.need_weights = need_weights

    def forward(self, x):
        return self.last(self.attention(x, x, x, need_weights=self.need_weights)[0].mean(1))


class Encoder(nn.Module):
    def __init__(self, inputs, outputs, p):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=p, batch_first=True)
        self.last = nn.Linear(8, outputs)

    def forward(self, x):
        return self.last(self.layer(x).mean(1))


class Recurrent(nn.Module):
    def __init__(self, inputs, outputs, p, layer):
        super().__init__()
        self.layer = layer(8, 8, batch_first=True)
        self.last = nn.Linear(8, outputs)

    def forward(self, x):
        return self.last(self.layer(x)[0][:, -1])


class Cell(nn.Module):
    def __init__(self, inputs, outputs, p):
        super().__init__()
        self.cell = nn.GRUCell(8, 8)
        self.last = nn.Linear(8, outputs)

    def forward(self, x):
        state = x.new_zeros(len(x), 8)
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.last(state)


class Bilinear(nn.Module):
    def __init__(self, inputs, outputs, p):
        super().__init__()
        self.first = nn.Bilinear(inputs, inputs, 8)
        self.last = nn.Linear(8, outputs)

    def forward(self, x):
        return self.last(self.first(x, x))


class Counter(Net):
    def __init__(self, inputs, outputs, p):
        super().__init__(inputs, outputs, p)
        self.calls = 0

    def between(self, x):
        self.calls += 1
        return x / self.calls**0.1


class PlainTensor(nn.Module):
    def __init__(self, inputs, outputs, p):
        super().__init__()
        self.projection = torch.randn(inputs, 8)
        self.last = nn.Linear(8, outputs)

    def forward(self, x):
        return self.last(x @ self.projection)


class PlainList(nn.Module):
    def __init__(self, inputs, outputs, p):
        super().__init__()
        self.layers = [nn.Linear(inputs, 8)]
        self.last = nn.Linear(8, outputs)

    def forward(self, x):
        return self.last(self.layers[0](x))


class PlainTuple(PlainList):
    def __init__(self, inputs, outputs, p):
        super().__init__(inputs, outputs, p)
        self.layers = tuple(self.layers)


class Slots(nn.Linear):
    __slots__ = ("factor",)

    def __init__(self, inputs, outputs, p):
        super().__init__(inputs, outputs)
        self.factor = p

    def forward(self, x):
        return super().forward(x) * self.factor


class BufferAnew(nn.Module):
    def __init__(self, inputs, outputs, p):
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.last = nn.Linear(inputs, outputs)
        self.dropout = nn.Dropout(p)

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.last(self.dropout(x - self.mean))


def changed(change):
    """An mlp that change has changed."""

    def build_model(inputs, outputs, p):
        model = mlp(inputs, outputs, p)
        change(model)
        return model

    return build_model


def tied(inputs, outputs, p):
    layers = [nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 16)]
    layers[3].weight = layers[2].weight
    return nn.Sequential(*layers, nn.Linear(16, outputs))


def made_within(inputs, outputs, p):
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * p

    return Scaled(inputs, outputs)


def layer_or_not(least):
    def build_model(inputs, outputs, p):
        layer = nn.Dropout(p) if p > least else nn.Identity()
        return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), layer, nn.Linear(16, outputs))

    return build_model


def many_dropouts(inputs, outputs, p):
    dropouts = [nn.Dropout(p / 20) for _ in range(63)]
    return nn.Sequential(nn.Linear(inputs, 16), *dropouts, nn.Linear(16, outputs))


def adam(parameter, gradient, state, lr):
    step = state["step"] = state.get("step", 0) + 1
    mean = state.setdefault("mean", torch.zeros_like(parameter))
    square = state.setdefault("square", torch.zeros_like(parameter))
    mean.mul_(0.9).add_(0.1 * gradient)
    square.mul_(0.999).add_(0.001 * gradient * gradient)
    parameter -= lr * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)


def clipped(parameter, gradient, state, lr):
    parameter -= lr * gradient / gradient.norm().clamp(min=1)


def tied_by_a_float(inputs, outputs, p):
    layers = [nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 16)]
    if p > 0.3:
        layers[3].weight = layers[2].weight
    return nn.Sequential(*layers, nn.Linear(16, outputs))


def one_dropout(inputs, outputs, p):
    dropout = nn.Dropout(p)
    return nn.Sequential(
        nn.Linear(inputs, 16), dropout, nn.Linear(16, 16), dropout, nn.Linear(16, outputs)
    )


def skipping(parameter, gradient, state, lr):
    if torch.isfinite(gradient).all():
        parameter -= lr * gradient


def by_batch_size(parameter, gradient, state, lr, batch_size):
    parameter -= lr * batch_size / 64 * gradient


def noisy(parameter, gradient, state, lr):
    parameter -= lr * (gradient + 0.01 * torch.randn_like(gradient))


BINARY = (CLASSES == 0).float()[:, None]
FLOATS = FLAT[:, :1] * FLAT[:, 1:2]
SOME = torch.where(FLAT[:, 0] > 1, -100, CLASSES)
ONE = {"outputs": 1, "loss": F.mse_loss, "y": FLOATS}
LSTM = functools.partial(nn.LSTM, num_layers=2, dropout=0.3)
KINDS = {}


def kind(name, way, build_model=mlp, x=FLAT, **options):
    """way: gradients_way; /2 where a trial without company trains as two; None: any."""
    KINDS[name] = way, make_task(x, build_model=build_model, **options)


def layers(*parts):
    """A Sequential of what parts make, each of (inputs, outputs, rate)."""
    return lambda inputs, outputs, p: nn.Sequential(*(part(inputs, outputs, p) for part in parts))


def alike(layer, *arguments, **options):
    return lambda i, o, p: layer(*arguments, **options)


LAST = lambda size: lambda i, o, p: nn.Linear(size, o)  # noqa: E731
FLAT_LAST = lambda size: (alike(nn.Flatten), lambda i, o, p: nn.Dropout(p), LAST(size))  # noqa: E731
CONV = alike(nn.Conv2d, 3, 8, 3), alike(nn.ReLU)
FIRST = lambda i, o, p: nn.Linear(i, 16)  # noqa: E731
kind("mlp", "by_layers")
kind("one output", "by_layers/2", **ONE)
kind("tanh", "by_vmap", mlp_of(nn.Tanh))
kind("gelu", "by_vmap", mlp_of(nn.GELU))
kind("leaky relu", "by_vmap", mlp_of(nn.LeakyReLU))
kind("prelu", "by_vmap", mlp_of(nn.PReLU))
kind("sigmoid", "alone", mlp_of(nn.Sigmoid))
kind("softplus", "alone", mlp_of(nn.Softplus))
kind("F.dropout", "by_vmap", net(lambda self, x: F.dropout(x, self.p, self.training)))
kind("in place", "by_vmap", net(lambda self, x: F.dropout(x + 1, self.p, self.training, True)))
kind("scaled by a float", "by_vmap", net(lambda self, x: x * self.p))
kind("convolution", None, layers(*CONV, *FLAT_LAST(288)), IMAGES)
kind("max pool", None, layers(*CONV, alike(nn.MaxPool2d, 2), *FLAT_LAST(72)), IMAGES)
kind("batch norm 2d", None, layers(*CONV, alike(nn.BatchNorm2d, 8), *FLAT_LAST(288)), IMAGES)
kind("group norm", None, layers(*CONV, alike(nn.GroupNorm, 2, 8), *FLAT_LAST(288)), IMAGES)
kind("instance norm", None, layers(*CONV, alike(nn.InstanceNorm2d, 8), *FLAT_LAST(288)), IMAGES)
kind("dropout 2d", "alone", layers(*CONV, alike(nn.Dropout2d, 0.2), *FLAT_LAST(288)), IMAGES)
CONV1D = alike(nn.Conv1d, 5, 8, 3), alike(nn.BatchNorm1d, 8)
kind("batch norm 1d", None, layers(*CONV1D, *FLAT_LAST(48)), SERIES)
kind("layer norm", None, layers(FIRST, alike(nn.LayerNorm, 16), alike(nn.GELU), LAST(16)))
kind("weight norm, old", "alone", changed(lambda model: weight_norm(model[0])))
kind("weight norm", "alone", changed(lambda model: parametrizations.weight_norm(model[0])))
kind("spectral norm", "alone", changed(lambda model: parametrizations.spectral_norm(model[0])))
kind("pruned", "alone", changed(lambda m: prune.l1_unstructured(m[0], "weight", amount=0.5)))
kind("bilinear", "by_vmap", Bilinear)
EMBEDDING = alike(nn.Embedding, 10, 4)
kind("embedding", "by_vmap", layers(EMBEDDING, *FLAT_LAST(28)), WORDS)
PADDED = alike(nn.Embedding, 10, 4, padding_idx=0)
kind("padding_idx", "alone", layers(PADDED, *FLAT_LAST(28)), WORDS)
kind("max_norm", None, layers(alike(nn.Embedding, 10, 4, max_norm=1.0), *FLAT_LAST(28)), WORDS)
kind("embedding bag", "by_vmap", layers(alike(nn.EmbeddingBag, 10, 4), LAST(4)), WORDS)
kind("attention", "alone", Attention, SERIES)
kind("attention, fused", None, functools.partial(Attention, need_weights=False), SERIES)
kind("transformer", None, Encoder, SERIES)
kind("gru", "alone", functools.partial(Recurrent, layer=nn.GRU), SERIES)
kind("lstm with dropout", "alone", functools.partial(Recurrent, layer=LSTM), SERIES)
kind("gru cell", "alone", Cell, SERIES)
kind("frozen", "by_vmap", changed(lambda model: model[0].requires_grad_(False)))
kind("gradient hook", "alone", changed(lambda m: m[0].weight.register_hook(lambda own: own / 2)))
kind("forward hook", "alone", changed(lambda m: m[0].register_forward_hook(lambda *own: -own[2])))
kind("counter", "alone", Counter)
kind("checkpoint", "alone", net(lambda _, x: checkpoint(torch.tanh, x, use_reentrant=False)))
kind("tied", "by_vmap", tied)
kind("plain tensor", "alone", PlainTensor)
kind("plain list", "alone", PlainList)
kind("plain tuple", "alone", PlainTuple)
kind("slots", "alone", Slots)
kind("tied by a float", None, tied_by_a_float)
kind("one dropout in two places", None, one_dropout)
kind("skipping", "alone", update=skipping)
kind("buffer anew", "by_vmap", BufferAnew)
kind("layer or not", "alone", layer_or_not(0), space=SPACE | {"p": [0.0, 0.5]})
kind("layer by threshold", "both", layer_or_not(0.2))
kind("class made within", "alone", made_within)
kind("rand_like", "alone", net(lambda self, x: x + 0.1 * torch.rand_like(x)))
kind("random.random", "alone", net(lambda self, x: x * (1 + random.random())))
kind("numpy.random", "alone", net(lambda self, x: x * (1 + np.random.random())))
kind("branch", "alone", net(lambda self, x: x if x.sum() > 9 else 2 * x))
kind("rate 1", "by_layers", space=SPACE | {"p": [0.2, 1.0]})
kind("many dropouts", "by_layers", many_dropouts)
kind("float64", "by_vmap", lambda inputs, outputs, p: mlp(6, 3, p, nn.Tanh).double(), FLAT.double())
kind("a loss of one's own", "by_layers/2", **ONE | {"loss": nn.HuberLoss(delta=0.3)})
BCE = F.binary_cross_entropy_with_logits
kind("binary", "by_layers/2", **ONE | {"loss": BCE, "y": BINARY})
kind("poisson", "by_layers/2", **ONE | {"loss": F.poisson_nll_loss, "y": BINARY * 3})
kind("classes to ignore", "by_layers", y=SOME)
kind("class weights", "by_layers", loss=nn.CrossEntropyLoss(torch.tensor([1.0, 2, 3])))
kind("adam", "by_layers", update=adam)
kind("clipped", "alone", update=clipped)
kind("noisy", "alone", update=noisy)


def plain_score(task: rs.Task, trial: rs.Trial, own_dropout: bool) -> float:
    """The oracle: the same rows and the same masks in a PyTorch training loop."""
    model = rs.make_model(trial, task)
    words = [rs.seed_of(trial, own) for own in range(4)]
    order = np.random.default_rng(words[2])
    masks = np.random.SFC64(words[3])
    optimizer = torch.optim.Adam if task.update is adam else torch.optim.SGD
    optimizer = optimizer(model.parameters(), lr=trial.hyperparams["lr"])
    rs.seed_all(trial, rs.OWN)

    def mask_numbers(count):
        raw = masks.random_raw(math.ceil(count / 4)).view(np.uint16)
        return (torch.from_numpy(raw.astype(np.float32))[:count] + 0.5) / 2**16

    draw = rs.dropout_by(mask_numbers)
    with contextlib.nullcontext() if own_dropout else draw:
        for _ in range(2):
            for rows in torch.from_numpy(order.permutation(45)).split(16):
                optimizer.zero_grad()
                task.loss(model(task.train_x[rows]), task.train_y[rows]).backward()
                if task.update is clipped:
                    for own in model.parameters():
                        own.grad /= own.grad.norm().clamp(min=1)
                if task.update is noisy:
                    for own in model.parameters():
                        own.grad += 0.01 * torch.randn_like(own.grad[None])[0]
                optimizer.step()
    model.eval()
    rs.seed_all(trial, rs.OWN)
    with torch.no_grad():
        return -task.loss(model(task.valid_x), task.valid_y).item()


@pytest.mark.parametrize("name", KINDS)
def test_a_trial_is_as_in_plain_pytorch_and_the_same_in_any_company(name, monkeypatch):
    expected, task = KINDS[name]
    trials = sample_trials(task, range(4))
    stacks = []
    make = rs.Stack.__init__

    def spy(self, trials, models, task, kind):
        stacks.append((trials, kind))
        make(self, trials, models, task, kind)

    monkeypatch.setattr(rs.Stack, "__init__", spy)
    together = scores(task, trials)
    ways = {}
    for members, kind in stacks[-4:]:
        way = kind.gradients.__name__.removeprefix("gradients_") + "/2" * (kind.least - 1)
        ways |= {trial.number: way for trial in members}
    if expected and expected != "both":
        assert set(ways.values()) == {expected}
    for trial in trials:
        own_dropout = ways[trial.number] == "alone"
        plain = plain_score(task, trial, own_dropout)
        assert float.fromhex(together[trial.number]) == pytest.approx(plain, abs=1e-4, rel=1e-4)
    apart = scores(task, trials[1:][::-1]) | scores(task, trials[:1])
    assert apart == together


@pytest.mark.parametrize("width", [1, 3, 10, 32, 100])
@pytest.mark.parametrize("outputs", [1, 3])
def test_a_lone_trial_has_the_bits_it_has_among_others(width, outputs):
    y, loss = (FLOATS, F.mse_loss) if outputs == 1 else (CLASSES, F.cross_entropy)
    task = make_task(
        y=y, outputs=outputs, loss=loss, build_model=functools.partial(mlp, width=width)
    )
    trials = sample_trials(task, range(20))
    together = scores(task, trials)
    assert together == {n: own for trial in trials for n, own in scores(task, [trial]).items()}


def test_a_product_of_one_column_rounds_otherwise_where_it_is_the_only_one():
    """Seen in 100 kills: half of the trials had the same bits alone, so two steps did not show it."""
    task = rs.regression()
    trials = sample_trials(task, [16, 22, 33, 36, 68, 81])
    assert len({rs.kind_of(trial, task) for trial in trials}) == 1
    together = scores(task, trials, 20)
    assert together == {n: own for trial in trials for n, own in scores(task, [trial], 20).items()}


def test_convolutions_of_small_batches_have_the_same_bits():
    space = SPACE | {"batch_size": [8]}
    task = make_task(IMAGES, build_model=KINDS["convolution"][1].build_model, space=space)
    trials = sample_trials(task, range(12))
    assert scores(task, trials) == {n: s for own in trials for n, s in scores(task, [own]).items()}


def test_a_stack_is_bounded_and_its_parts_give_the_same_bits(monkeypatch):
    task = make_task(build_model=mlp)
    trials = sample_trials(task, range(7))
    examine = rs.examine
    sizes = []

    def small(trial, task):
        kind, problem = examine(trial, task)
        sizes.append(kind.most)
        return kind._replace(most=3), problem

    whole = scores(task, trials)
    monkeypatch.setattr(rs, "examine", small)
    assert scores(task, trials) == whole
    assert 100 < sizes[0] < 2**22 / (2 * 323)


def test_masks_have_each_trials_own_rate():
    noise = torch.rand(2, 2**17, generator=GENERATOR)
    masks = rs.dropout_mask(noise, torch.tensor([[0.1], [0.5]]))
    kept = (masks > 0).float().mean(1)
    assert kept.tolist() == pytest.approx([0.9, 0.5], abs=0.005)
    assert sorted(masks[0].unique().tolist()) == pytest.approx([0, 1 / 0.9])
    assert masks.mean(1).tolist() == pytest.approx([1, 1], abs=0.01)


def test_bundled_tasks_learn():
    """Regression's best beats the line that is fitted to the rows that train; XOR is solved."""
    task = rs.regression()
    x = torch.cat([task.train_x, torch.ones(10, 1)], 1)
    line = torch.linalg.lstsq(x, task.train_y).solution
    line_loss = F.mse_loss(torch.cat([task.valid_x, torch.ones(5, 1)], 1) @ line, task.valid_y)
    assert -rs.search(task, 40, 150)[0].score < line_loss
    assert -rs.search(rs.xor(), 30, 200)[0].score < 0.05


def test_two_threads_search_in_turn():
    task = make_task(build_model=Encoder, x=SERIES)
    alone = [trial.score for trial in rs.search(task, 4, 2)]
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda _: rs.search(task, 4, 2), range(2)))
    assert [[trial.score for trial in trials] for trials in results] == [alone, alone]


# ---- The sampler and the search -----------------------------------------------------------------


def test_a_sample_is_a_function_of_seed_and_number():
    space = rs.HYPERPARAMS | {"act": [torch.relu, "tanh"], "x": lambda g: g.uniform(), "n": [1, 2]}
    samples = [rs.sample_hyperparams(space, 3, n) for n in range(500)]
    assert samples[7] == rs.sample_hyperparams(space, 3, 7) != rs.sample_hyperparams(space, 4, 7)
    assert {type(own) for own in samples[0].values()} <= {
        float,
        int,
        str,
        types.BuiltinFunctionType,
    }
    counts = [sum(own["batch_size"] == size for own in samples) for size in (16, 32, 64, 128)]
    assert min(counts) > 90  # of 125: 3.6 standard deviations
    assert len({own["lr"] for own in samples}) > 90
    assert all(len(repr(own["dropout"])) == 3 for own in samples)


def score_of(hyperparams):
    return -((hyperparams["x"] - 0.3) ** 2)


UNIFORM = {"x": lambda generator: generator.uniform()}


def test_search_returns_the_best_first_and_the_first_ten_are_a_search_of_ten():
    task = make_task(build_model=mlp)
    many = rs.search(task, 30, 2, seed=1)
    few = rs.search(task, 10, 2, seed=1)
    assert [own for own in many if own.number < 10] == [
        rs.replace(own, stack=own.stack) for own in many if own.number < 10
    ]
    by_number = {trial.number: (trial.hyperparams, trial.score) for trial in many}
    assert {own.number: (own.hyperparams, own.score) for own in few} == {
        n: by_number[n] for n in range(10)
    }
    assert [own.score for own in many] == sorted((own.score for own in many), reverse=True)
    assert rs.search(task, 30, 2, seed=2)[0].score != many[0].score
    assert [own.number for own in rs.search(task, [7], 2, seed=1)] == [7]


def test_finals_decide_by_the_mean_of_repeats():
    plain = rs.random_search(score_of, UNIFORM, 20)
    worst = plain[-1].hyperparams["x"]
    calls = []

    def lucky(hyperparams):
        """The first run of the worst trial is luck, which no repeat has."""
        calls.append(hyperparams["x"])
        is_luck = hyperparams["x"] == worst and calls.count(worst) == 1
        return 10.0 if is_luck else score_of(hyperparams)

    trials = rs.random_search(lucky, UNIFORM, 20, repeats=3)
    numbers = [trial.number for trial in plain]
    assert [trial.number for trial in trials] == [*numbers[:4], numbers[-1], *numbers[4:-1]]
    assert [len(trial.repeats) for trial in trials[:6]] == [3] * 5 + [0]
    assert len(calls) == 20 + 15
    task = make_task(build_model=mlp)
    best = rs.search(task, 10, 2, repeats=3)
    means = [np.mean(trial.repeats) for trial in best[:5]]
    assert means == sorted(means, reverse=True)
    assert len({score for trial in best[:5] for score in trial.repeats}) == 15


def test_a_function_draws_the_same_random_numbers_each_time():
    def draw(hyperparams):
        return random.random() + np.random.random() + torch.rand(1).item()

    first = rs.random_search(draw, UNIFORM, 5, repeats=2)
    assert first == [
        rs.replace(own, seconds=a.seconds)
        for own, a in zip(rs.random_search(draw, UNIFORM, 5, repeats=2), first, strict=True)
    ]
    assert rs.random_search(draw, UNIFORM, [3])[0].score == next(
        t.score for t in first if t.number == 3
    )


@pytest.mark.parametrize(
    "kind", [np.float32, np.float64, torch.tensor, np.array, lambda v: torch.tensor([v]), int]
)
def test_scores_of_any_type(kind, tmp_path):
    log = str(tmp_path / "log.db")
    trials = rs.random_search(lambda hyperparams: kind(0.5), UNIFORM, 3, log=log)
    assert [trial.score for trial in trials] == [float(kind(0.5))] * 3
    assert (
        sqlite3.connect(log).execute("SELECT typeof(score) FROM trials").fetchall()
        == [("real",)] * 3
    )


def test_what_diverged_comes_last_and_is_told(capsys):
    bad = itertools.cycle([math.nan, math.inf, -math.inf, 0.5])
    trials = rs.random_search(lambda hyperparams: next(bad), UNIFORM, 8, repeats=1)
    assert [math.isnan(trial.score) for trial in trials] == [False] * 2 + [True] * 6
    rs.report(trials)
    assert "6 of 8 trials diverged: standardise" in capsys.readouterr().out
    task = make_task(y=FLOATS * 1e30, outputs=1, loss=F.mse_loss, build_model=mlp)
    assert all(math.isnan(trial.score) for trial in rs.search(task, 3, 2, repeats=1))


def test_losses_of_any_size_and_sign():
    """No floor, no refusal, no scaling: the loss of plain PyTorch."""
    for scale, shift in ((1e-7, 0), (1, 1.7e9), (1, -5)):
        y = FLOATS * scale + shift
        task = make_task(y=y, outputs=1, loss=F.mse_loss, build_model=mlp)
        (trial,) = rs.search(task, 1, 2)
        assert -trial.score == pytest.approx(
            -plain_score(task, trial, False), rel=1e-4, nan_ok=True
        )


def test_a_score_of_ones_own():
    def accuracy(outputs, y):
        assert outputs.shape == (16, 3)
        return (outputs.argmax(1) == y).float().mean()

    trials = rs.search(make_task(build_model=mlp, score=accuracy), 20, 3)
    assert trials[0].score == max(trial.score for trial in trials)
    assert all(0 <= trial.score * 16 == round(trial.score * 16) for trial in trials)


# ---- Bad input, and errors of the reader's own --------------------------------------------------


def unchanging(parameter, gradient, state, lr):
    return parameter - lr * gradient


BAD = {
    "an unknown key": (dict(space=SPACE | {"size": [3]}), "size.*mlp.*update"),
    "a missing key": (dict(space={"lr": [0.1]}),  "'p', for mlp and update"),
    "a broadcast": (dict(y=FLOATS[:, 0], outputs=1, loss=F.mse_loss), r"\[16, 1\].*\[16\]"),
    "an update that returns": (dict(update=unchanging), "update.*in place"),
    "a batch size of 0": (dict(space=SPACE | {"batch_size": [0]}), "batch_size is 0"),
    "a batch size of floats": (dict(space=SPACE | {"batch_size": [8.0]}), "batch_size is 8.0"),
    "an empty list": (dict(space=SPACE | {"p": []}), "p must be a list"),
    "no list": (dict(space=SPACE | {"p": 0.1}), "p must be a list"),
    "rows that do not match": (dict(y=CLASSES[:50]), "rows"),
    "another draw each time": (
        dict(space=SPACE | {"p": lambda generator: np.random.uniform()}), "space: p"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_before_training(name, monkeypatch):
    options, message = BAD[name]
    monkeypatch.setattr(rs.Stack, "batches", None)  # so that training would fail
    with pytest.raises(rs.InputError, match=message) as error:
        rs.search(make_task(**{"build_model": mlp} | options), 3, 2)
    assert "\n" not in str(error.value)


def test_misspelt_options_and_no_trials():
    with pytest.raises(TypeError, match="repeat"):
        rs.search(rs.xor(), 3, 2, repeat=5)
    with pytest.raises(rs.InputError, match="no trials"):
        rs.search(rs.xor(), 0, 2)


def fails(*_):
    raise OSError("of the reader's own")


def model_that_fails(inputs, outputs, p, size):
    return fails() if size == 7 else nn.Linear(inputs, outputs)


SIZES = SPACE | {"size": [3, 7]}


@pytest.mark.parametrize("options", [
    {"build_model": model_that_fails, "space": SIZES},
    {"loss": fails},
    {"score": fails},
    {"update": lambda parameter, gradient, state, lr: fails()},
    {"build_model": lambda inputs, outputs, p: nn.Sequential(type("Bad", (nn.Module,), {"forward": fails})())},
])  # fmt: skip
def test_an_error_of_the_readers_own_keeps_its_traceback_and_names_the_trial(options):
    with pytest.raises(OSError, match="of the reader's own") as error:
        rs.search(make_task(**{"build_model": mlp} | options), 8, 2)
    assert error.traceback[-1].name == "fails"
    number = int(error.value.__notes__[-1].split()[2].rstrip(":"))
    assert (
        str(rs.sample_hyperparams(options.get("space", SPACE), 0, number))
        in error.value.__notes__[-1]
    )
    if "space" in options:
        assert "'size': 7" in error.value.__notes__[-1]


def test_what_has_finished_before_an_error_is_in_the_log(tmp_path):
    log = str(tmp_path / "log.db")
    calls = []

    def sixth_fails(hyperparams):
        calls.append(hyperparams)
        return fails() if len(calls) == 6 else 1.0

    with pytest.raises(OSError) as error:
        rs.random_search(sixth_fails, UNIFORM, 10, log=log)
    assert "in trial 5: {'x': " in error.value.__notes__[0]
    assert sqlite3.connect(log).execute("SELECT count(*) FROM trials").fetchone() == (5,)


def test_values_reach_update_as_they_are():
    seen = set()

    def chosen(parameter, gradient, state, lr, optimizer, nesterov, steps):
        seen.add((optimizer, nesterov, steps))
        if optimizer == "sign" and not nesterov:
            gradient = gradient.sign()
        parameter -= lr * gradient

    space = SPACE | {"optimizer": ["sgd", "sign"], "nesterov": [True, False], "steps": [1, 2]}
    task = make_task(build_model=mlp, update=chosen, space=space)
    trials = sample_trials(task, range(30))
    together = scores(task, trials)
    assert seen == set(itertools.product(["sgd", "sign"], [True, False], [1, 2]))
    assert together == {n: own for trial in trials for n, own in scores(task, [trial]).items()}


class Operation:
    __slots__ = ("factor",)

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, gradient):
        return gradient * self.factor


def operated(parameter, gradient, state, lr, operation):
    parameter -= lr * operation(gradient)


@pytest.mark.parametrize("update, values", [
    (by_batch_size, {"batch_size": [64, 128, 256]}),
    (operated, {"operation": [Operation(1), Operation(5)]}),
])  # fmt: skip
def test_trials_of_one_stack_share_all_that_is_no_float(update, values):
    task = make_task(build_model=mlp, update=update, space=SPACE | values)
    trials = sample_trials(task, range(9))
    together = scores(task, trials)
    assert together == {n: own for trial in trials for n, own in scores(task, [trial]).items()}


def test_a_model_may_change_the_lists_it_is_given():
    def build_model(inputs, outputs, p, sizes):
        sizes.append(outputs)
        return nn.Sequential(nn.Linear(inputs, sizes[0]), nn.Linear(sizes[0], sizes[-1]))

    space = SPACE | {"sizes": [[8], [4]]}
    task = make_task(build_model=build_model, space=space)
    rs.search(task, 4, 1)
    assert space["sizes"] == [[8], [4]]


def test_whole_numbers_among_floats_are_floats():
    space = SPACE | {"lr": [1, 0.1]}
    task = make_task(build_model=mlp, space=space)
    assert {type(trial.hyperparams["lr"]) for trial in rs.search(task, 6, 1)} == {float}


# ---- The log ------------------------------------------------------------------------------------


def count(log) -> int:
    return sqlite3.connect(log).execute("SELECT count(DISTINCT search) FROM trials").fetchone()[0]


def test_a_search_resumes_and_says_so(tmp_path, capsys):
    log = str(tmp_path / "log.db")
    task = make_task(build_model=mlp)
    rs.search(task, 5, 2, log=log)
    assert capsys.readouterr().err == ""
    trials = rs.search(task, 8, 2, log=log)
    assert capsys.readouterr().err == f"{log}: 5 of 8 trials of this search are there\n"
    expected = rs.search(task, 8, 2)
    assert [own.score for own in trials] == [own.score for own in expected]
    rs.search(task, 5, 3, log=log)
    line = f"{log}: 0 of 5 trials of this search are there; it holds 1 others\n"
    assert capsys.readouterr().err == line


FACTOR = 1


def helper(x):
    return x * FACTOR


class Layer(nn.Linear):
    def forward(self, x):
        return helper(super().forward(x))


class Wider(Layer):
    pass


def run_code(code: str, **names) -> dict:
    """Names that code defines, as in a notebook: without source."""
    exec(code, names)
    return names


def slotted_loss(operation, outputs, y):
    return operation(F.cross_entropy(outputs, y))


LOSS = "def loss(outputs, y): return F.cross_entropy(outputs, y) * 1"
WAYS_TO_DIFFER = {
    "arguments of a module": (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(torch.ones(3) * 2)),
    "options of a module": (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)),
    "arguments of a partial": [
        functools.partial(F.cross_entropy, label_smoothing=own) for own in (0.1, 0.2)],
    "what a lambda closes over": [
        (lambda own: lambda outputs, y: own * F.cross_entropy(outputs, y))(own) for own in (1, 2)],
    "a notebook's function": [
        run_code(own, F=F)["loss"] for own in (LOSS, LOSS.replace("1", "2"))],
    "a notebook's global": [
        run_code(LOSS.replace("1", "own"), F=F, own=own)["loss"] for own in (1, 2)],
    "the second line": [
        run_code("def loss(outputs, y):\n    a = 1\n    return F.cross_entropy(outputs, y) * " + own, F=F)[
            "loss"] for own in ("a", "2")],
    "a helper's own helper": [
        run_code(f"def c(): return {own}\ndef b(): return c()\n" + LOSS.replace("1", "b()"), F=F)["loss"]
        for own in (1, 2)],
    "an object that is called": [
        run_code(f"class L:\n    def __call__(self, o, y): return F.cross_entropy(o, y) * {own}", F=F)["L"]()
        for own in (1, 2)],
    "an object with slots": [functools.partial(slotted_loss, Operation(own)) for own in (1, 5)],
    "a bound method": [types.MethodType(lambda self, o, y: F.cross_entropy(o, y) * self, own) for own in (1, 2)],
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS_TO_DIFFER)
def test_a_search_is_known_by_all_that_its_functions_refer_to(way, tmp_path):
    log = str(tmp_path / "log.db")
    for loss in WAYS_TO_DIFFER[way]:
        for _ in range(2):
            rs.search(make_task(build_model=mlp, loss=loss), 2, 1, log=log)
    assert count(log) == 2


def test_a_search_is_known_by_its_layers_space_rows_and_settings(tmp_path, monkeypatch):
    log = str(tmp_path / "log.db")

    def build_model(inputs, outputs, p):
        return Wider(inputs, outputs)

    task = make_task(build_model=build_model)

    def search(task=task, epochs=1, **options):
        rs.search(task, 2, epochs, log=log, **options)
        return count(log)

    assert [search(), search()] == [1, 1]
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 2)  # a layer's base's helper's global
    assert search() == 2
    monkeypatch.setattr(Layer, "forward", lambda self, x: F.linear(x, self.weight))
    assert search() == 3
    assert search(epochs=2) == 4
    assert search(seed=1) == 5
    assert search(name="other") == 6
    assert search(task._replace(train_x=task.train_x + 1)) == 7
    assert search(task._replace(space=SPACE | {"p": [0.1]})) == 8
    high = [(lambda high: lambda g: g.uniform(0, high))(own) for own in (0.1, 0.2)]
    assert [search(task._replace(space=SPACE | {"p": own})) for own in high] == [9, 10]
    assert search() == 10


def test_a_key_is_the_same_in_every_process_and_for_other_comments():
    code = """
import sys; sys.path.insert(0, {here!r})
import random_search as rs, torch, functools
NAMES = {{"relu", "tanh", "elu", "gelu"}}
def loss(outputs, y):{comment}
    return len(NAMES & {{"relu", "b", "c"}}) * outputs.sum()
print(rs.describe([loss, torch.relu, {{"act": [torch.relu, torch.tanh]}}, rs.train], {{}}))
"""
    outputs = set()
    for comment, seed in (("", "1"), ("  # why\n", "2")):
        text = code.format(here=str(HERE), comment=comment)
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", text]
        outputs.add(
            subprocess.run(command, env=environment, capture_output=True, check=True).stdout
        )
    assert len(outputs) == 1


def test_functions_in_a_space_resume(tmp_path):
    log = str(tmp_path / "log.db")

    def score(hyperparams):
        score.calls += 1
        return float(hyperparams["act"](torch.ones(1)))

    score.calls = 0
    for _ in range(2):
        rs.random_search(score, {"act": [torch.relu, torch.tanh]}, 6, log=log)
    assert score.calls == 6


def test_the_log_is_a_table_that_others_read(tmp_path):
    log = str(tmp_path / "log.db")
    rs.search(make_task(build_model=mlp), 3, 1, log=log, name="flat", repeats=2)
    rows = sqlite3.connect(log)
    rows.row_factory = sqlite3.Row
    rows = rows.execute("SELECT * FROM trials").fetchall()
    names = [
        "search",
        "name",
        "seed",
        "number",
        "repeat",
        "score",
        "hyperparams",
        "seconds",
        "stack",
    ]
    assert rows[0].keys() == names
    assert sorted((row["number"], row["repeat"]) for row in rows) == [
        *itertools.product(range(3), range(3))
    ]
    assert json.loads(rows[0]["hyperparams"]).keys() == SPACE.keys()
    assert all(row["seconds"] > 0 and row["stack"] >= 3 and row["name"] == "flat" for row in rows)


def test_ctrl_c_reports_what_has_finished(tmp_path, capsys):
    log = str(tmp_path / "log.db")

    def interrupted(hyperparams):
        interrupted.calls += 1
        if interrupted.calls == 4:
            raise KeyboardInterrupt
        return score_of(hyperparams)

    interrupted.calls = 0
    with pytest.raises(KeyboardInterrupt):
        rs.random_search(interrupted, UNIFORM, 10, log=log)
    table = capsys.readouterr().out.splitlines()
    best = max(range(3), key=lambda n: score_of(rs.sample_hyperparams(UNIFORM, 0, n)))
    assert table[1].split()[0] == str(best)
    assert len(table) == 5
    assert sqlite3.connect(log).execute("SELECT count(*) FROM trials").fetchone() == (3,)
    assert len(rs.random_search(interrupted, UNIFORM, 10, log=log)) == 10
    assert interrupted.calls == 4 + 7


# ---- The command line and several processes -----------------------------------------------------


def command(*arguments, **options):
    line = [sys.executable, str(HERE / "random_search.py"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, **options)


@pytest.fixture
def call(monkeypatch, capsys):
    """main() in this process: its status, standard output and standard error."""

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["random_search.py", *map(str, arguments)])
        try:
            status = rs.main()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return main


def without_times(log) -> list:
    query = "SELECT search, number, repeat, score, hyperparams FROM trials ORDER BY 1, 2, 3"
    return sqlite3.connect(log).execute(query).fetchall()


def test_processes_and_machines_share_the_trials_and_every_log_ends_whole(tmp_path, call):
    options = ["--task", "regression", "--trials", 24, "--epochs", 5, "--repeats", 2, "--log"]
    call(*options, tmp_path / "one.db")
    expected = without_times(tmp_path / "one.db")
    assert len(expected) == 24 + 10
    two = command(*options, tmp_path / "two.db", "--processes", 2)
    assert without_times(tmp_path / "two.db") == expected
    assert two.stdout.count("trial  ") == 1
    nodes = []
    for rank in range(2):
        line = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}"]
        line += ["--master-addr=127.0.0.1", "--master-port=29617", "--", HERE / "random_search.py"]
        line += [*map(str, options), tmp_path / f"node{rank}.db"]
        nodes.append(subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    assert [node.wait() for node in nodes] == [0, 0]
    for rank in range(2):
        assert without_times(tmp_path / f"node{rank}.db") == expected


def test_parts_are_of_one_kind_and_of_equal_size(monkeypatch):
    class Store:
        def __init__(self):
            self.count = 0

        def add(self, key, amount):
            self.count += amount
            return self.count

    monkeypatch.setattr(rs, "launched", lambda: (0, 2))
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", Store)
    trials = [rs.Trial(n, 0, {"size": n % 3, "lr": n / 7}) for n in range(100)]
    parts = list(rs.my_parts(trials, lambda trial: trial.hyperparams["size"]))
    assert sorted(trial.number for part in parts for trial in part) == list(range(100))
    assert all(len({trial.hyperparams["size"] for trial in part}) == 1 for part in parts)
    assert {len(part) for part in parts} <= {6, 7}
    assert len(list(rs.my_parts(trials, None))) == 15


def test_a_rank_that_fails_ends_the_run_and_shows_its_error(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import random_search as rs
def score(hyperparams):
    if hyperparams["n"] == 3:
        raise OSError("of the reader's own")
    return 1.0
rs.random_search(score, {{"n": [1, 2, 3]}}, 40, log={str(tmp_path / "log.db")!r})
""")
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    result = subprocess.run(line, capture_output=True, text=True)
    assert result.returncode != 0
    assert "OSError: of the reader's own" in result.stderr
    assert "in trial " in result.stderr


def test_a_range_of_trials_and_the_heading_of_a_report(tmp_path, call):
    options = ["--epochs", 3, "--repeats", 0, "--log"]
    status, out, _ = call("--trials", 6, *options, tmp_path / "a.db")
    assert status == 0
    assert out.startswith("xor: 4 rows, 6 trials in 5 stacks and 0 alone, ")
    assert "repeats" not in out
    call("--trials", "2:4", *options, tmp_path / "b.db")
    expected = [row for row in without_times(tmp_path / "a.db") if row[1] in (2, 3)]
    assert without_times(tmp_path / "b.db") == expected


def test_a_saved_model_is_the_one_that_was_scored(tmp_path):
    task = make_task(build_model=mlp)
    for build_model in (mlp, BufferAnew, functools.partial(Recurrent, layer=nn.GRU)):
        own = task._replace(build_model=build_model)
        if build_model not in (mlp, BufferAnew):
            own = own._replace(train_x=SERIES[:45], valid_x=SERIES[45:])
        (trial,) = rs.search(own, [3], 2)
        rs.save_model(str(tmp_path / "model.pt"), trial, own, 2)
        model = rs.load_model(str(tmp_path / "model.pt"), build_model)
        assert not model.training
        assert -task.loss(model(own.valid_x), own.valid_y).item() == trial.score


def test_a_file_that_cannot_be_is_one_line_before_training(tmp_path, call):
    for path in ("/", tmp_path / "none" / "model.pt"):
        status, _, error = call("--save", path)
        assert status == 2 and error.count("\n") == 1 and f"--save {path}" in error
    space = {"lr": [0.1], "act": [nn.ReLU, nn.Tanh]}
    task = make_task(build_model=lambda inputs, outputs, act: act, space=space)
    with pytest.raises(rs.InputError, match="model.pt"):
        rs.check_save(str(tmp_path / "model.pt"), range(5), task, 0)
    other = tmp_path / "other.db"
    other.write_text("no database at all, but some text of more than a few words")
    line = f"random_search.py: error: --log {other}: file is not a database\n"
    assert call("--log", other) == (2, "", line)


def test_plain_terminals_and_no_standard_error():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    options = {"env": environment, "preexec_fn": lambda: os.close(2)}
    assert "+-" in command("--trials", 3, "--epochs", 2, "--repeats", 2, **options).stdout


def test_import_sets_one_thread_unless_told_otherwise():
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import random_search"
    code += "; print(random_search.torch.get_num_threads())"
    environment = {name: own for name, own in os.environ.items() if name != "OMP_NUM_THREADS"}
    line = [sys.executable, "-c", code]
    assert subprocess.run(line, env=environment, capture_output=True).stdout == b"1\n"


# ---- The README ---------------------------------------------------------------------------------

README = (HERE / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_readmes_code_runs(number, tmp_path, monkeypatch, capsys):
    for module in re.findall(r"(pandas|matplotlib|sklearn)", BLOCKS[number]):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    exec(BLOCKS[number], {"__name__": "readme"})


def test_the_readmes_adamw_is_torchs():
    names = {}
    exec(next(block for block in BLOCKS if "def adamw" in block).partition("space =")[0], names)
    task = make_task(build_model=mlp, update=names["adamw"])
    parameter = torch.randn(2, 3, 4, generator=GENERATOR)
    own = nn.Parameter(parameter[1].clone())
    optimizer = torch.optim.AdamW([own], lr=0.01, weight_decay=0.5)
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / 30, 0.5 + 0.5 * math.cos(math.pi * (n + 1) / 300))
    )
    state = {}
    for _ in range(40):
        gradient = 2 * torch.randn(2, 3, 4, generator=GENERATOR)
        own.grad = gradient[1].clamp(-1, 1)
        optimizer.step()
        cosine.step()
        task.update(parameter, gradient, state, lr=torch.full((2, 1, 1), 0.01), weight_decay=0.5)
    assert torch.allclose(parameter[1], own, atol=1e-6)


def test_the_readmes_output_and_its_size(call):
    line, table = re.search(r"python (random_search.py.*?)\n\n```\n(.*?)```", README, re.S).groups()
    _, out, _ = call(*line.split()[1:])
    new, old = (
        [re.sub(r"[\d.]+ s$", "", row).split() for row in text.splitlines()]
        for text in (out, table)
    )
    for row, expected in zip(new, old, strict=True):
        for cell, one in zip(row, expected, strict=True):
            try:
                assert float(cell) == pytest.approx(float(one), rel=0.02)  # of another processor
            except ValueError:
                assert cell == one
    assert len(README.splitlines()) <= 150
    assert max(map(len, README.splitlines())) <= 100
