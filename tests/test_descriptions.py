"""Texts of settings, code and models: other ones for others, the same ones after a run and in another process."""

import functools
import logging
import random
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from perceptual_at import Linf, evaluate, fgsm, pgd
from perceptual_at.evaluation.fingerprints import descriptions, model_fingerprint
from perceptual_at.evaluation.fingerprints.descriptions import Opaque, describe, describe_model


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def test_a_function_is_known_by_its_code_and_what_it_holds():
    def scaled(factor):
        return lambda x: factor * x

    def shifted(factor):
        return lambda x: factor + x

    assert model_fingerprint(scaled(2)) == model_fingerprint(scaled(2)) != model_fingerprint(scaled(3))
    assert model_fingerprint(scaled(2)) != model_fingerprint(shifted(2))
    assert model_fingerprint(scaled(network())) != model_fingerprint(scaled(network(1)))


def test_a_function_may_hold_itself_and_an_empty_cell():
    def repeated(x, times):
        return x if times == 0 else repeated(later(x), times - 1)

    assert model_fingerprint(repeated) == model_fingerprint(repeated)
    assert "repeated" in describe(repeated)

    def later(x):
        return x


@pytest.mark.slow
def test_texts_are_the_same_in_every_process(capsys):
    code = (
        "from perceptual_at.evaluation.fingerprints.descriptions import describe\n"
        "def attack(model, x, labels, kinds=frozenset('abcdef')):\n    return x if x in {'a', 'b', 'c'} else kinds\n"
        "print(describe(attack))"
    )
    exec(code, {"__name__": "__main__"})
    elsewhere = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert elsewhere.stdout == capsys.readouterr().out  # strings hash differently there


def test_an_attack_is_described_by_its_call():
    text = "pgd(threat=Linf(eps=0.1), steps=3, verdict=True)"
    assert describe(functools.partial(pgd, threat=Linf(0.1), steps=3, verdict=True)) == text
    first, second = (
        describe(functools.partial(pgd, threat=Linf(torch.tensor(eps)))) for eps in ([0.1, 0.2], [0.1, 0.3])
    )
    assert first != second
    assert describe(torch.Generator().manual_seed(3)) == "Generator(seed=3)"
    assert "0x" not in describe(functools.partial(pgd, loss=object()))
    assert describe([network().forward, {"a": torch.ones(2)}]) == describe([network().forward, {"a": torch.ones(2)}])


# What changes while it runs ------------------------------------------------------------------------------------------

LOG = logging.getLogger(__name__)
LOCK = threading.Lock()
POOL = ThreadPoolExecutor(1)
DRAWS = random.Random(0)
KNOWN = weakref.WeakKeyDictionary()
CACHE = {}
SEEN = set()
CALLS = 0
SCALE = 1.0


class Logging(nn.Module):
    """A model as they are written: it logs, locks, counts and caches."""

    made = 0

    def __init__(self):
        super().__init__()
        self.net, self.calls = network(), 0

    def forward(self, x):
        global CALLS
        CALLS += 1
        self.calls += 1
        type(self).made += 1
        SEEN.add(len(x))
        LOG.debug("%s samples", len(x))
        logging.getLogger(f"{__name__}.{len(SEEN)}.{CALLS}")  # the manager of loggers holds one more
        KNOWN[self] = CACHE.setdefault(tuple(x.shape), torch.ones(len(x), 1))
        with LOCK:
            return CACHE[tuple(x.shape)] * self.net(x) + POOL.submit(len, "").result() * DRAWS.random()


class Counting:
    """A model that counts and is no module."""

    def __init__(self, factor=1.0):
        self.net, self.factor, self.calls = network(), factor, 0

    def __call__(self, x):
        self.calls += 1
        return self.factor * self.net(x)


def counted(factor=1.0):
    calls, net = 0, network()

    def model(x):
        nonlocal calls
        calls += 1
        return factor * net(x)

    return model


@functools.lru_cache
def ones(n):
    return torch.ones(n, 1)


def remembered(x):
    return ones(len(x)) * network()(x)


@functools.singledispatch
def dispatched(x):
    raise TypeError


@dispatched.register
def _(x: torch.Tensor):
    return network()(x)


RUNNING = {
    "module": Logging,
    "object": Counting,
    "closure": counted,
    "remembered": lambda: remembered,
    "dispatched": lambda: dispatched,
    "in a partial": lambda: functools.partial(lambda net, x: net(x), Logging()),
}


@pytest.mark.parametrize("kind", RUNNING)
def test_a_record_goes_on_with_a_model_that_has_run(tmp_path, kind):
    model, x = RUNNING[kind](), torch.rand(6, 6)
    attacks = {"fgsm": functools.partial(fgsm, threat=Linf(0.1))}
    with torch.no_grad():
        labels = network()(x).argmax(dim=1)
    first, second = (
        evaluate(model, [(x, labels)], attacks, progress=False, record=tmp_path / "record.jsonl") for _ in range(2)
    )
    assert torch.equal(first.robust["fgsm"], second.robust["fgsm"])
    assert model_fingerprint(model) == first.provenance["model"]


def test_what_a_model_holds_and_constants_that_its_code_names_still_tell(monkeypatch):
    def scaled(x):
        return SCALE * x

    assert describe_model(Counting(1.0)) != describe_model(Counting(2.0))
    assert describe_model(counted(1.0)) != describe_model(counted(2.0))
    before = describe_model(scaled)
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    assert describe_model(scaled) != before


def shifts(model, x, labels):
    LOG.debug("shifting")
    with LOCK:
        return (x + CACHE.get("by", 0.1) * DRAWS.random()).clamp(0, 1)


def test_attacks_may_log_lock_and_draw_and_their_globals_tell(monkeypatch):
    before = describe(shifts)
    logging.getLogger(f"{__name__}.another").addHandler(logging.NullHandler())
    DRAWS.random()
    with LOCK:
        assert describe(shifts) == before
    monkeypatch.setitem(CACHE, "by", 0.2)  # no outputs of a model would say so
    assert describe(shifts) != before


def test_a_module_that_an_attack_holds_is_known_by_its_plain_attributes_too():
    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = scale

        def forward(self, x):
            return self.scale * x

    def transfer(model, x, labels, surrogate):
        return surrogate(x)

    one, same, other = (functools.partial(transfer, surrogate=Scaled(scale)) for scale in (1.0, 1.0, 2.0))
    assert describe(one) == describe(same) != describe(other)
    same.keywords["surrogate"].eval()
    assert describe(one) == describe(same)
    assert describe_model(Scaled(1.0)) == describe_model(Scaled(2.0))  # whose outputs differ


# How much there is ----------------------------------------------------------------------------------------------------


def chained(length):
    return functools.reduce(lambda held, number: (held, number), range(length), ())


class Node:
    def __init__(self, *held):
        self.held = held


def test_each_thing_is_looked_at_once(monkeypatch):
    looked = []
    held = descriptions._text
    monkeypatch.setattr(descriptions, "_text", lambda value, path: looked.append(value) or held(value, path))
    node, pairs = Node(), (0,)
    for _ in range(40):
        node, pairs = Node(node, node), (pairs, pairs)
    text = describe(functools.partial(shifts, labels=[node, pairs]))
    assert len(looked) < 400  # 2 to the power of 40 otherwise
    assert len(text) < 50_000
    assert describe(functools.partial(shifts, labels=[node, (pairs, pairs)])) != text


@pytest.mark.parametrize("holder", [lambda held: functools.partial(shifts, labels=held), Node])
def test_what_has_no_end_is_not_told_apart(holder, monkeypatch):
    with pytest.raises(Opaque, match="nested too deep"):
        describe(holder(chained(5000)))
    monkeypatch.setattr(descriptions, "_MOST", 50)
    with pytest.raises(Opaque, match="more than 50 things"):
        describe(holder([(number,) for number in range(60)]))


def test_a_score_that_cannot_be_told_apart_is_taken_and_not_recorded(tmp_path):
    score = functools.partial(
        lambda outputs, labels, held: (outputs.argmax(dim=1) == labels).float(), held=chained(5000)
    )
    data = [(torch.rand(4, 6), torch.zeros(4, dtype=torch.long))]
    assert evaluate(network(), data, {}, progress=False, score=score).provenance["score"] == "partial"
    with pytest.raises(ValueError, match=r"cannot tell this evaluation from another \(score: .*nested too deep"):
        evaluate(network(), data, {}, progress=False, score=score, record=tmp_path / "record.jsonl")


@pytest.mark.parametrize("folder", ["site-packages", "dist-packages", "src"])
def test_of_installed_packages_the_names_are_enough(folder):
    texts = []
    for factor in (1, 2):
        namespace = {"__name__": "installed"}
        code = f"def pushed(model, x, labels):\n    return x * {factor}\n"
        exec(compile(code, f"/usr/lib/{folder}/installed.py", "exec"), namespace)
        texts.append(describe(namespace["pushed"]))
    assert (texts == ["installed.pushed"] * 2) == (folder != "src")
    assert (texts[0] == texts[1]) == (folder != "src")
