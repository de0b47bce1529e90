"""Evaluations that were interrupted: killed at any point they go on to the same verdicts, and nothing is mixed."""

import functools
import json
import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from perceptual_at import Evaluation, Linf, evaluate, pgd
from perceptual_at._files import written_whole
from perceptual_at.evaluation.fingerprints import data_fingerprint, model_fingerprint, sample_fingerprints
from perceptual_at.evaluation.fingerprints.descriptions import Opaque
from tests.tiny import Shelf

quiet = functools.partial(evaluate, progress=False)
THREAT = Linf(0.1)
ATTACKS = {
    "one": functools.partial(pgd, threat=THREAT, steps=1),
    "two": functools.partial(pgd, threat=THREAT, steps=3, verdict=True),
}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def samples(n=24, seed=1):
    x = torch.rand(n, 6, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        labels = network()(x).argmax(dim=1)
    labels[::7] = (labels[::7] + 1) % 3  # a few clean mistakes
    return x, labels


def batches(size=6, n=24):
    x, labels = samples(n)
    return list(zip(x.split(size), labels.split(size), strict=True))


def same(a, b):
    assert torch.equal(a.correct, b.correct)
    assert a.robust.keys() == b.robust.keys()
    assert all(torch.equal(a.robust[name], b.robust[name]) for name in a.robust)
    assert [(c.gradients, c.forwards) for c in a.costs.values()] == [
        (c.gradients, c.forwards) for c in b.costs.values()
    ]
    assert a.warnings == b.warnings
    assert {**a.provenance, "device": ""} == {**b.provenance, "device": ""}


def counting(attacks, calls):
    """The attacks, with a note of each call that describes them no differently."""

    def count(name):
        class Counted(functools.partial):
            def __call__(self, model, x, labels, **more):
                calls.append((name, len(x)))
                return super().__call__(model, x, labels, **more)

        return Counted(attacks[name].func, **attacks[name].keywords)

    return {name: count(name) for name in attacks}


# Going on -----------------------------------------------------------------------------------------------------------

KILLED = """
import functools, os, signal, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {root!r})
from perceptual_at.evaluation import records
from tests.test_records import ATTACKS, batches, network, quiet

write = os.write

def killing_after(count, torn):
    written = 0
    def write_and_die(file, text):
        nonlocal written
        written += 1
        if written <= count:
            return write(file, text)
        write(file, text[: int(torn * len(text))])
        os.kill(os.getpid(), signal.SIGKILL)
    return write_and_die

for path, count, torn in {points!r}:
    child = os.fork()
    if child == 0:
        os.write = killing_after(count, torn)
        quiet(network(), batches(), ATTACKS, record=path)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (path, status)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_point_it_goes_on_to_the_same_verdicts(tmp_path):
    """Each run is killed in one of its lines, before, within, or just after its last byte."""
    points = [
        (str(tmp_path / f"{count}-{torn}.jsonl"), count, torn)
        for count, torn in [(0, 0.0), (0, 0.4), (1, 0.4), (2, 1.0), (3, 0.4), (5, 0.0), (8, 0.4), (12, 0.4), (12, 1.0)]
    ]
    root = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", KILLED.format(root=root, points=points)], check=True, cwd=root)
    whole = quiet(network(), batches(), ATTACKS)
    for path, count, torn in points:
        content = Path(path).read_bytes()
        assert content.count(b"\n") == count + (torn == 1.0)
        kept = [json.loads(line) for line in content.split(b"\n")[1:-1]]
        asked = sum(len(line["index"]) for line in kept if line["name"] in ATTACKS)
        calls = []
        same(quiet(network(), batches(), counting(ATTACKS, calls), record=path), whole)
        assert sum(size for _, size in calls) == 2 * int(whole.correct.sum()) - asked
        content = Path(path).read_bytes()
        assert content.endswith(b"\n")
        assert all(json.loads(line) for line in content.splitlines())


def test_every_line_is_on_disk_before_the_next_attack(tmp_path, monkeypatch):
    synchronised, path = [], tmp_path / "record.jsonl"
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (fsync(file), synchronised.append(path.read_bytes().count(b"\n"))))
    quiet(network(), batches(), ATTACKS, record=path)
    lines = path.read_bytes().count(b"\n")
    assert synchronised == [1, *range(1, lines + 1)]  # the file's name in its folder, after the first line
    assert lines > 10


def test_a_finished_evaluation_asks_no_attack_again(tmp_path):
    path = tmp_path / "deep" / "record.jsonl"
    first = quiet(network(), batches(), ATTACKS, record=path)
    calls = []
    same(quiet(network(), batches(), counting(ATTACKS, calls), record=path), first)
    assert calls == []


def test_verdicts_are_kept_per_sample_so_batches_may_change(tmp_path):
    path = tmp_path / "record.jsonl"
    quiet(network(), batches(size=6)[:2], ATTACKS, record=path)
    calls = []
    resumed = quiet(network(), batches(size=8), counting(ATTACKS, calls), record=path)
    same(resumed, quiet(network(), batches(), ATTACKS))
    right = resumed.correct
    assert sum(size for name, size in calls if name == "one") == int(right[12:].sum())  # only the new ones


def test_samples_with_an_index_go_on_in_any_order(tmp_path):
    path = tmp_path / "record.jsonl"
    x, labels = samples()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    shuffled = [(x[rows], labels[rows], rows) for rows in order.split(5)]
    quiet(network(), shuffled[:3], ATTACKS, record=path)
    resumed = quiet(network(), batches(), ATTACKS, record=path)
    same(resumed, quiet(network(), batches(), ATTACKS))


def test_in_cascade_it_goes_on_with_those_still_standing(tmp_path):
    path = tmp_path / "record.jsonl"
    whole = quiet(network(), batches(), ATTACKS, cascade=True)
    quiet(network(), batches()[:2], ATTACKS, cascade=True, record=path)
    same(quiet(network(), batches(), ATTACKS, cascade=True, record=path), whole)


# Refusing -----------------------------------------------------------------------------------------------------------


def test_other_models_data_and_settings_are_refused_by_name(tmp_path):
    path = tmp_path / "record.jsonl"
    quiet(network(), batches(), ATTACKS, record=path)
    before = path.read_bytes()
    x, labels = samples()
    changed = x.clone()
    changed[3, 0] += 1e-6
    more = {**ATTACKS, "two": functools.partial(ATTACKS["two"], steps=4)}
    refused = {
        "model was sha256:": lambda: quiet(network(1), batches(), ATTACKS, record=path),
        "attack 'two' was pgd.*steps=3.*is pgd.*steps=4": lambda: quiet(network(), batches(), more, record=path),
        "attacks was one, two, is one": lambda: quiet(network(), batches(), {"one": ATTACKS["one"]}, record=path),
        "seed was 0, is 1": lambda: quiet(network(), batches(), ATTACKS, record=path, seed=1),
        "cascade was False, is True": lambda: quiet(network(), batches(), ATTACKS, record=path, cascade=True),
        "repeats was 1, is 2": lambda: quiet(network(), batches(), ATTACKS, record=path, repeats=2),
        "belongs to other data: sample 3 was": lambda: quiet(network(), [(changed, labels)], ATTACKS, record=path),
        "belongs to other data: sample 0 was": lambda: quiet(network(), [(x, 2 - labels)], ATTACKS, record=path),
    }
    for words, call in refused.items():
        with pytest.raises(ValueError, match=words):
            call()
        assert path.read_bytes() == before


def test_files_of_others_are_left_alone(tmp_path):
    for content in (b"notes", b"notes\n", b'{"a": 1}\n'):
        path = tmp_path / "notes.txt"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no record of an evaluation"):
            quiet(network(), batches(), ATTACKS, record=path)
        assert path.read_bytes() == content


def test_a_damaged_line_in_the_middle_is_not_passed_over(tmp_path):
    path = tmp_path / "record.jsonl"
    quiet(network(), batches(), ATTACKS, record=path)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:4], lines[4][:-9], *lines[5:]]))
    with pytest.raises(ValueError, match="damaged in line 5"):
        quiet(network(), batches(), ATTACKS, record=path)


def test_a_file_that_cannot_be_written_is_an_error_before_any_work(tmp_path):
    def refuse(x):
        raise AssertionError("called")

    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "record.jsonl"):
        with pytest.raises(OSError, match=tmp_path.name):
            quiet(refuse, batches(), ATTACKS, record=path)


def test_other_versions_of_the_software_are_said(tmp_path):
    path = tmp_path / "record.jsonl"
    quiet(network(), batches(), {}, record=path)
    path.write_text(path.read_text().replace(torch.__version__, "1.0"))
    (warning,) = quiet(network(), batches(), {}, record=path).warnings
    assert "begun with other versions" in warning
    assert "1.0" in warning


# Fingerprints -------------------------------------------------------------------------------------------------------


def test_a_model_is_known_by_weights_buffers_structure_and_kind():
    kinds = [network(), network(1), nn.Sequential(*network(), nn.Identity()), network().double()]
    norm, moved = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    moved.running_mean += 1
    found = [model_fingerprint(model) for model in (*kinds, norm, moved)]
    assert len(set(found)) == len(found)
    assert model_fingerprint(network()) == found[0] == model_fingerprint(network().eval())
    compiled = nn.Module()
    compiled._orig_mod = network()  # what torch.compile wraps
    assert model_fingerprint(compiled) == found[0]


class Holds(nn.Module):
    def __init__(self, tensor):
        super().__init__()
        self.register_buffer("held", tensor)


def test_tensors_of_any_layout_are_known_by_their_numbers():
    def quantized(tensor):
        return torch.quantize_per_tensor(tensor, 0.5, 0, torch.qint8)

    one, other = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    made = [lambda x: x.to_sparse(), lambda x: x.to_sparse_csr(), quantized, lambda x: (x * 1j).conj()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: such tensors are in beta
        for make in made:
            assert model_fingerprint(Holds(make(one))) == model_fingerprint(Holds(make(one)))
            assert model_fingerprint(Holds(make(one))) != model_fingerprint(Holds(make(other)))
    assert model_fingerprint(Holds(one.to("meta"))) == model_fingerprint(Holds(other.to("meta")))
    with pytest.raises(Opaque, match="waits for a first batch"):
        model_fingerprint(nn.LazyLinear(2))
    quiet(nn.LazyLinear(3), batches(), {})  # which the first pass makes a model


class Half(torch.Tensor):
    """A tensor that keeps its entries in another one, as quantised and sharded weights do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, kinds, arguments=(), options=None):
        made = function(*tree_map_only(Half, lambda one: one.inner, arguments), **(options or {}))
        return cls(made) if function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default) else made


class Flat(Half):
    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, parts, context, size, stride):
        return cls(parts["inner"])


@pytest.mark.parametrize("hold", [Holds, lambda tensor: Holds(nn.Parameter(tensor, requires_grad=False))])
def test_tensors_that_keep_their_entries_elsewhere_are_known_by_them_or_said_to_be_unknown(hold):
    one, other = torch.rand(2, 50).half(), torch.rand(2, 50).half()
    seen = [model_fingerprint(hold(Flat(tensor))) for tensor in (one, one.clone(), other)]
    assert seen[0] == seen[1] != seen[2]
    with pytest.raises(Opaque):
        model_fingerprint(hold(Half(one)))


def test_samples_are_known_by_input_and_label_whatever_the_batch():
    x, labels = samples()
    whole = sample_fingerprints(x, labels)
    assert len(set(whole)) == 24
    assert whole == [one for batch in batches(5) for one in sample_fingerprints(*batch)]
    assert sample_fingerprints(x.double(), labels)[0] != whole[0]
    assert sample_fingerprints(x[:, :, None], labels)[0] != whole[0]
    assert data_fingerprint(whole) != data_fingerprint(whole[::-1])
    assert len(sample_fingerprints(x.bfloat16().T.contiguous().T, labels)) == 24


# Who is who -----------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A network with what a state dict does not hold."""

    def __init__(self, scale=1.0, shift=0.0):
        super().__init__()
        self.net, self.scale = network(), scale
        self.register_buffer("shift", torch.tensor([shift, 0.0, 0.0]), persistent=False)

    def forward(self, x):
        return self.scale * self.net(x) + self.shift


class Called:
    """A callable object with slots, whose text says nothing."""

    __slots__ = ("net", "power")

    def __init__(self, power):
        self.net, self.power = network(), power

    def __call__(self, x):
        return self.net(x) ** self.power

    def logits(self, x):
        return self(x)


def hooked(factor):
    net = network()
    net.register_forward_hook(lambda module, args, output: factor * output)
    return net


def replaced(factor):
    net = network()
    own = net.forward
    net.forward = lambda x: factor * own(x)
    return net


def by_global(value):
    def model(x):
        return FACTORS["now"] * network()(x)

    FACTORS["now"] = value
    return model


class Steep(torch.autograd.Function):
    """Equal logits, another gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad


FACTORS = {"now": 1}
MODELS = {
    "float attribute": (lambda: Scaled(1.0), lambda: Scaled(1.5)),
    "buffer that is not saved": (lambda: Scaled(shift=0.0), lambda: Scaled(shift=0.01)),
    "slots": (lambda: Called(1), lambda: Called(3)),
    "bound method": (lambda: Called(1).logits, lambda: Called(3).logits),
    "hook": (lambda: hooked(1.0), lambda: hooked(2.0)),
    "replaced forward": (lambda: replaced(1.0), lambda: replaced(2.0)),
    "global": (lambda: by_global(1), lambda: by_global(2)),
    "gradient alone": (lambda: lambda x: network()(x), lambda: lambda x: network()(Steep.apply(x))),
    "lambda": (lambda: lambda x: network()(x), lambda: lambda x: network()(x) + 1),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_decides_otherwise_is_refused(tmp_path, kind):
    path = tmp_path / "record.jsonl"
    one, other = MODELS[kind]
    x, _ = samples()
    with torch.no_grad():
        labels = one()(x).argmax(dim=1)
    data = [(x[:12], labels[:12]), (x[12:], labels[12:])]
    first = quiet(one(), data, {"two": ATTACKS["two"]}, record=path)
    same(quiet(one(), data, {"two": ATTACKS["two"]}, record=path), first)
    with pytest.raises(ValueError, match=r"belongs to another (model|evaluation)"):
        quiet(other(), data, {"two": ATTACKS["two"]}, record=path)


class Pushes:
    """An attack that is an object."""

    def __init__(self, by):
        self.by = by

    def __call__(self, model, x, labels):
        return (x + self.by).clamp(0, 1)


def of_a_global(model, x, labels):
    return (x + FACTORS["push"]).clamp(0, 1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: Pushes(0.1), lambda: Pushes(0.2)),
        (lambda: Pushes(0.1).__call__, lambda: Pushes(0.2).__call__),
        (lambda: functools.partial(pgd, threat=Shelf(0.1)), lambda: functools.partial(pgd, threat=Shelf(0.2))),
        (lambda: FACTORS.update(push=0.1) or of_a_global, lambda: FACTORS.update(push=0.2) or of_a_global),
    ],
    ids=["object", "bound method", "threat", "global"],
)
def test_an_attack_that_does_otherwise_is_refused(tmp_path, one, other):
    path = tmp_path / "record.jsonl"
    first = quiet(network(), batches(), {"own": one()}, record=path)
    same(quiet(network(), batches(), {"own": one()}, record=path), first)
    with pytest.raises(ValueError, match="attack 'own' was"):
        quiet(network(), batches(), {"own": other()}, record=path)


def test_what_cannot_be_told_apart_is_not_recorded(tmp_path):
    class Secret:
        def __init__(self):
            pass

        def __reduce_ex__(self, protocol):
            raise TypeError("not to be read")

        def __call__(self, model, x, labels):
            return x

    with pytest.raises(ValueError, match=r"`record` cannot tell this evaluation from another .*attack 'secret'"):
        quiet(network(), batches(), {"secret": Secret()}, record=tmp_path / "record.jsonl")
    assert quiet(network(), batches(), {"secret": Secret()}).robust_accuracy["secret"] > 0


def test_records_of_earlier_versions_are_named(tmp_path):
    path = tmp_path / "record.jsonl"
    content = b'{"format":"perceptual_at evaluation record, version 1","model":"sha256:0"}\n'
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is of version 1 of the format, and this is version 2"):
        quiet(network(), batches(), ATTACKS, record=path)
    assert path.read_bytes() == content


@pytest.mark.skipif(os.name != "posix", reason="needs devices and pipes")
def test_what_is_no_file_is_neither_read_nor_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in ("/dev/zero", "/dev/null", tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError, match="must be a file"):
            quiet(network(), batches(), ATTACKS, record=place)
        with pytest.raises(OSError, match="must be a file"):
            Evaluation.from_json(place)
        with pytest.raises(OSError, match="must be a file"), written_whole(place):
            pass
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.skipif(os.name != "posix", reason="needs links")
def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with written_whole(tmp_path / "link") as path:
        path.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


def test_reports_of_the_first_version_are_read(tmp_path):
    result = quiet(network(), batches(), ATTACKS)
    result.to_json(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    content["format"] = "perceptual_at evaluation, version 1"
    del content["suspicious"]
    for check in content["checks"]:
        del check["applies"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    assert Evaluation.from_json(tmp_path / "old.json").to_dict() == result.to_dict()
    for damage in ({"verdicts": {}}, {"verdicts": 3}, {"labels": "abc"}):
        (tmp_path / "bad.json").write_text(json.dumps({**content, **damage}))
        with pytest.raises(ValueError, match="damaged"):
            Evaluation.from_json(tmp_path / "bad.json")
