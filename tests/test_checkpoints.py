"""Weights on disk: what is saved comes back, and nothing else is taken for weights."""

import argparse
import gzip
import io
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from perceptual_at import snapshot
from perceptual_at._values import entries_of
from perceptual_at.checkpoints import load_weights, read_weights, save_weights, weights_checksum
from perceptual_at.models import logits_of, normalized
from tests.strategies import words

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def saved(tmp_path):
    model = small()
    model(torch.rand(5, 3))  # moves the running statistics
    save_weights(tmp_path / "model.safetensors", model)
    return model, tmp_path / "model.safetensors"


def test_what_is_saved_comes_back_to_the_bit(saved):
    model, path = saved
    other = small(1)
    before = [parameter.data_ptr() for parameter in other.parameters()]
    assert load_weights(other, path) == ([], [])
    assert same(snapshot(other), snapshot(model))
    assert [parameter.data_ptr() for parameter in other.parameters()] == before  # optimisers still hold them


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8])
def test_every_dtype_and_layout_comes_back(tmp_path, dtype):
    tensors = {
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.zeros(0, 3).to(dtype),
        "transposed": torch.arange(6).reshape(2, 3).t().to(dtype),
        "channels_last": torch.arange(24).reshape(1, 2, 3, 4).to(dtype).to(memory_format=torch.channels_last),
    }
    tensors["shared"] = tensors["transposed"]
    save_weights(tmp_path / "a", tensors)
    assert same(read_weights(tmp_path / "a"), tensors)


def test_the_file_is_ordinary_safetensors_and_carries_its_checksum(saved):
    model, path = saved
    assert same(safetensors.load_file(path), snapshot(model))
    size = int.from_bytes(path.read_bytes()[:8], "little")
    assert json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]["sha256"] == weights_checksum(model)


def test_a_file_of_another_program_without_checksum_is_read(tmp_path):
    model = small()
    safetensors.save_file(snapshot(model), tmp_path / "other.safetensors")
    other = small(1)
    load_weights(other, tmp_path / "other.safetensors")
    assert same(snapshot(other), snapshot(model))


def test_the_checksum_sees_names_dtypes_shapes_and_values_but_not_order_or_layout():
    reference = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    same_sum = [dict(reversed(reference.items())), {**reference, "a": torch.zeros(3, 2).t()}]
    other_sum = [
        {**reference, "c": torch.ones(1)}, {"x": reference["a"], "b": reference["b"]},
        {**reference, "a": torch.zeros(3, 2)}, {**reference, "a": torch.zeros(2, 3, dtype=torch.int32)},
        {**reference, "b": torch.tensor([1.0]).nextafter(torch.tensor(2.0))},
    ]  # fmt: skip
    assert all(weights_checksum(other) == weights_checksum(reference) for other in same_sum)
    assert all(weights_checksum(other) != weights_checksum(reference) for other in other_sum)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_do_not_matter(tmp_path, prefix):
    model = small()
    save_weights(tmp_path / "a", {prefix + name: value for name, value in snapshot(model).items()})
    other = small(1)
    assert load_weights(other, tmp_path / "a") == ([], [])
    assert same(snapshot(other), snapshot(model))


class Holder(nn.Module):
    """Holds a network as `module`, as wrappers do, and is none; with `beside`, has weights of the same names itself."""

    def __init__(self, network, beside=False):
        super().__init__()
        self.module = network
        if beside:
            self.add_module("0", nn.Linear(3, 4))


@pytest.mark.parametrize("wrap", [
    Holder, lambda network: Holder(network, beside=True), torch.optim.swa_utils.AveragedModel,
    lambda network: nn.Sequential(nn.DataParallel(network)), lambda network: logits_of(network, 0),
], ids=["module", "beside", "averaged", "a parallel part", "adapter"])  # fmt: skip
def test_what_was_saved_is_loaded_whatever_parts_are_called(wrap, tmp_path):
    model, other = wrap(small()), wrap(small(1))
    save_weights(tmp_path / "a", model)
    assert load_weights(other, tmp_path / "a") == ([], [])
    assert same(snapshot(other), snapshot(model))


@pytest.mark.parametrize(("wrap", "of_file", "left"), [
    (lambda network: network, "model.", ([], [])),
    (lambda network: network, "student.backbone.", ([], [])),
    (lambda network: network, "module.model.module.", ([], [])),
    (lambda network: logits_of(network, 0), "", ([], [])),
    (lambda network: nn.Sequential(nn.DataParallel(network)), "0.", ([], [])),
    (lambda network: normalized(network, (0.5,), (0.25,)), "", ([], ["normalize.mean", "normalize.std"])),
], ids=["Lightning", "a part", "both", "adapter", "a parallel part", "normalised"])  # fmt: skip
def test_what_one_side_has_before_all_names_does_not_matter(wrap, of_file, left, tmp_path):
    model, network = small(), small(1)
    torch.save({"state_dict": {of_file + name: value for name, value in snapshot(model).items()}}, tmp_path / "a")
    assert load_weights(wrap(network), tmp_path / "a", strict=not left[1]) == left
    assert same(snapshot(network), snapshot(model))


def test_a_few_names_that_end_alike_make_no_prefix(tmp_path):
    foreign = {f"encoder.{number}.w": torch.zeros(1) for number in range(9)}
    save_weights(tmp_path / "a", {**foreign, "decoder.2.bias": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"no name in .* fits this model"):
        load_weights(small(), tmp_path / "a", strict=False)


def test_a_compiled_model_saves_and_loads_under_its_own_names(saved, tmp_path):
    model, path = saved
    compiled = torch.compile(small(1), backend="eager")
    load_weights(compiled, path)
    save_weights(tmp_path / "again", compiled)
    assert same(read_weights(tmp_path / "again"), snapshot(model))


def test_a_name_twice_under_different_prefixes_is_refused(tmp_path):
    save_weights(tmp_path / "a", {"module.w": torch.zeros(1), "w": torch.ones(1)})
    with pytest.raises(ValueError, match="'w' twice"):
        read_weights(tmp_path / "a")


def test_other_names_are_refused_or_listed(saved, tmp_path):
    model, _ = saved
    weights = snapshot(model)
    del weights["2.bias"]
    save_weights(tmp_path / "a", {**weights, "mu": torch.zeros(3), "sub_block1.w": torch.zeros(1)})
    other = small(1)
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"missing in the file: 2\.bias, unknown to the model: mu, sub_block1\.w"):
        load_weights(other, tmp_path / "a")
    assert same(snapshot(other), before)
    loaded = load_weights(other, tmp_path / "a", strict=False)
    assert loaded.ignored == ["mu", "sub_block1.w"]
    assert loaded.missing == ["2.bias"]
    assert same(snapshot(other), {**weights, "2.bias": before["2.bias"]})


def test_another_shape_or_no_common_name_is_refused_and_changes_nothing(tmp_path):
    other = small(1)
    before = snapshot(other)
    save_weights(tmp_path / "wide", {**snapshot(small()), "2.weight": torch.zeros(5, 4)})
    with pytest.raises(ValueError, match=r"'2\.weight' has shape \(5, 4\) .* but \(2, 4\)"):
        load_weights(other, tmp_path / "wide")
    save_weights(tmp_path / "foreign", {"encoder.w": torch.zeros(1)})
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"encoder\.w"):
            load_weights(other, tmp_path / "foreign", strict=strict)
    assert same(snapshot(other), before)


def test_weights_of_another_head_are_taken_but_for_the_head(tmp_path):
    trained, other = small(), small(1)
    before = snapshot(other)
    wide = {"2.weight": torch.zeros(5, 4), "2.bias": torch.zeros(5)}
    save_weights(tmp_path / "wide", {**snapshot(trained), **wide})
    loaded = load_weights(other, tmp_path / "wide", strict=False)
    assert loaded.ignored == loaded.missing == ["2.bias", "2.weight"]
    assert same(snapshot(other), {**snapshot(trained), **{name: before[name] for name in wide}})


@pytest.mark.parametrize("wrap", [
    lambda weights: weights,
    lambda weights: {"state_dict": weights, "epoch": 3},
    lambda weights: {"model_state_dict": weights},
    lambda weights: {"teacher": weights, "optimizer": {"state": {0: weights}, "param_groups": [0.1]}},
    lambda weights: {"model": {f"module.{name}": value for name, value in weights.items()}},
    lambda weights: {f"_orig_mod.{name}": value for name, value in weights.items()},
    lambda weights: {"net": {f"module._orig_mod.{name}": value for name, value in weights.items()}, "acc": 0.5},
    lambda weights: {**weights, "step": 7},
], ids=["plain", "state_dict", "model_state_dict", "any name", "module", "compiled", "both", "a number"])  # fmt: skip
@pytest.mark.parametrize("old", [False, True])
def test_files_of_torch_are_read_in_the_forms_that_people_save(tmp_path, wrap, old):
    model, other = small(), small(1)
    torch.save(wrap(model.state_dict()), tmp_path / "model.pt", _use_new_zipfile_serialization=not old)
    assert load_weights(other, tmp_path / "model.pt") == ([], [])
    assert same(snapshot(other), snapshot(model))


@pytest.mark.parametrize("held", [[1, 2], {"epoch": 3}, {}, {"state_dict": {}}, torch.zeros(3), {3: torch.zeros(1)}])
def test_files_of_torch_without_tensors_by_name_are_refused(tmp_path, held):
    torch.save(held, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="holds no tensors by name"):
        load_weights(small(), tmp_path / "model.pt")


def test_a_header_without_facts_or_too_deep_is_read_or_refused(tmp_path):
    model = small()
    safetensors.save_file(snapshot(model), tmp_path / "plain.safetensors")
    raw = (tmp_path / "plain.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.dumps({"__metadata__": None, **json.loads(raw[8 : 8 + size])}).encode()
    deep = b'{"__metadata__": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    (tmp_path / "null").write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    assert same(read_weights(tmp_path / "null"), snapshot(model))
    (tmp_path / "deep").write_bytes(len(deep).to_bytes(8, "little") + deep + raw[8 + size :])
    with pytest.raises(ValueError, match=r"load_weights: .*damaged"):
        load_weights(small(1), tmp_path / "deep")


def test_only_regular_files_are_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "folder", tmp_path / "pipe", "/dev/null"):
        with pytest.raises(OSError, match="must be a file, but"):
            save_weights(path, small())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "pipe"]


# What is no file of weights -----------------------------------------------------------------------------------------


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", b"...")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><title>404</title>", "an HTML page"),
        (b"\n  <html><body>quota exceeded</body></html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (pickle.dumps({"w": 1}), "a pickle"),
        (zipped(), "a pickle"),
        (gzip.compress(b"weights"), "a compressed archive"),
        (b"\x89HDF\r\n\x1a\n" + bytes(64), "an HDF5 file"),
        (b"just some words", "something else"),
        (b"short", "something else"),
    ],
    ids=words,
)  # fmt: skip
def test_a_foreign_file_is_refused_with_what_it_looks_like(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        load_weights(small(), path)
    assert "load_weights" in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_pickle_is_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "run"), "w"))

    (tmp_path / "model.pt").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match="can run code"):
        load_weights(small(), tmp_path / "model.pt")
    assert not (tmp_path / "run").exists()
    torch.save({"model": small().state_dict(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"it holds argparse[.]Namespace"):
        load_weights(small(), tmp_path / "model.pt")


@given(st.integers(min_value=0, max_value=10**6))
def test_a_file_cut_off_anywhere_is_refused(saved_bytes, place):
    raw, path = saved_bytes
    path.write_bytes(raw[: place % len(raw)])
    with pytest.raises(ValueError, match="load_weights"):
        load_weights(small(), path)


@given(st.integers(min_value=0, max_value=10**6), st.integers(min_value=1, max_value=255))
def test_a_changed_byte_is_noticed(saved_bytes, place, change):
    raw, path = saved_bytes
    place %= len(raw)
    path.write_bytes(raw[:place] + bytes([raw[place] ^ change]) + raw[place + 1 :])
    reference, model = snapshot(small()), small()
    try:
        load_weights(model, path)
    except ValueError:
        assert same(snapshot(model), reference)
    else:  # only in what means nothing, such as a blank of the header
        assert same(read_weights(path), reference)


@pytest.fixture(scope="module")
def saved_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_weights(path, small())
    return path.read_bytes(), path.with_name("damaged.safetensors")


@pytest.mark.parametrize(
    "header",
    [b"{}", b'{"w": 1}', b'{"w": {"data_offsets": []}}', b"{broken", b'{"w": {"data_offsets": [0, -8]}}'],
)
def test_a_damaged_header_is_refused(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="load_weights"):
        load_weights(small(), path)


def test_a_missing_file_and_wrong_arguments_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="read_weights: there is no file"):
        read_weights(tmp_path / "none")
    with pytest.raises(TypeError, match=r"load_weights: `model` must be a torch\.nn\.Module, got dict"):
        load_weights({}, tmp_path / "none")
    with pytest.raises(TypeError, match="save_weights: `weights` must be"):
        save_weights(tmp_path / "a", {"w": 1.0})
    with pytest.raises(TypeError, match="weights_checksum: `weights` must be"):
        weights_checksum([torch.zeros(1)])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()

    def full(tensors, beside, metadata):
        beside.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_weights(path, small(1))
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert same(read_weights(path), snapshot(model))


NO_ROOM = """
import functools, os, resource, sys
import torch
from torch import nn
from perceptual_at import evaluate
from perceptual_at.checkpoints import save_weights
path = sys.argv[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))  # no file may grow beyond, as on a full disk
x = torch.rand(100, 4)
batches = [(one, torch.zeros(10, dtype=torch.long)) for one in x.split(10)]
for write in (
    functools.partial(save_weights, path + ".safetensors", nn.Linear(100, 100)),
    functools.partial(evaluate, nn.Linear(4, 3), batches, {}, progress=False, record=path + ".jsonl"),
):
    try:
        write()
    except OSError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs limits of a process")
def test_without_room_the_file_is_named(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", NO_ROOM, tmp_path / "a"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    weights, record = done.stdout.splitlines()
    assert re.fullmatch(r"save_weights: `.*a\.safetensors` could not be written: .*", weights)
    assert re.fullmatch(r"\[Errno \d+\] evaluate: `record`: File too large: '.*a\.jsonl'", record)
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_as_many_numbers_in_another_shape_are_another_layer(tmp_path):
    path, model = tmp_path / "wide.safetensors", nn.Linear(2, 3, bias=False)
    save_weights(path, nn.Linear(3, 2, bias=False))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'weight' has shape \(2, 3\) .* but \(3, 2\)"):
        load_weights(model, path)
    assert torch.equal(model.weight, before["weight"])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: save_weights(None, nn.Linear(2, 1)), TypeError, "^save_weights: `path` must be a path"),
        (lambda: save_weights("/", nn.Linear(2, 1)), FileExistsError, "^save_weights: `path` must be a file"),
        (lambda: save_weights("a", {0: torch.ones(1)}), TypeError, "^save_weights: `weights` must be .* 0, which is"),
        (lambda: save_weights("a", {"w": torch.eye(2).to_sparse()}), TypeError, r"^save_weights: `weights\['w'\]`"),
        (lambda: save_weights("a", nn.LazyLinear(2)), ValueError, "^save_weights: .*'weight' is not initialised"),
        (lambda: weights_checksum({"w": None}), TypeError, "^weights_checksum: .* 'w', which is NoneType"),
        (lambda: load_weights(nn.Linear(2, 1), None), TypeError, "^load_weights: `path` must be a path"),
        (lambda: load_weights(nn.Linear(2, 1), "a", strict="no"), TypeError, "^load_weights: `strict` must be True"),
        (lambda: load_weights(nn.LazyLinear(2), "a"), ValueError, "^load_weights: .*'weight' is not initialised"),
        (lambda: read_weights(3.5), TypeError, "^read_weights: `path` must be a path"),
    ],
)  # fmt: skip
def test_what_is_no_file_or_no_weights_is_refused_before_anything_is_written(call, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", [save_weights, weights_checksum, load_weights], ids=lambda call: call.__name__)
def test_tensors_without_values_are_refused_with_the_way_out(call, tmp_path):
    path = tmp_path / "a"
    save_weights(path, small())
    given = {"save_weights": (path, small().to("meta")), "weights_checksum": (small().to("meta"),)}
    with pytest.raises(ValueError, match=rf"{call.__name__}: '0.weight' is on the meta device.*to_empty"):
        call(*given.get(call.__name__, (small().to("meta"), path)))
    with pytest.raises(ValueError, match="weights_checksum: 'w' is on the meta device"):
        weights_checksum({"w": torch.empty(2, device="meta")})


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize("kind", ["composed", "quantised"])
@pytest.mark.parametrize("call", [save_weights, weights_checksum], ids=lambda call: call.__name__)
def test_tensors_that_safetensors_does_not_know_are_refused(call, kind, tmp_path):
    held = torch.rand(2, 3)
    made = TwoTensor(held, held) if kind == "composed" else torch.quantize_per_tensor(held, 0.1, 0, torch.quint8)
    with pytest.raises(ValueError, match=f"^{call.__name__}: 'w' is a .*Tensor of .*; safetensors knows neither"):
        call(*([tmp_path / "a"] if call is save_weights else []), {"w": made})
    assert list(tmp_path.iterdir()) == []
    if kind == "composed":
        with pytest.raises(RuntimeError, match="a TwoTensor keeps its entries elsewhere"):
            entries_of(made)


@pytest.mark.filterwarnings("ignore:DTensor random operators")  # older torch's
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_tensors_shared_out_over_processes_are_refused_with_the_way_out(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    path, store = tmp_path / "a", f"file://{tmp_path / 'store'}"
    save_weights(path, small())
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model, mesh = small(), init_device_mesh("cpu", (1,))
        model[2].weight = nn.Parameter(distribute_tensor(model[2].weight.detach(), mesh))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for name, call in {
            "save_weights": lambda: save_weights(tmp_path / "b", model),
            "weights_checksum": lambda: weights_checksum(snapshot(model)),
            "load_weights": lambda: load_weights(model, path),
        }.items():
            with pytest.raises(ValueError, match=rf"{name}: '2.weight' is shared out .*DTensor.*model_state_dict"):
                call()
        assert same(before, model.state_dict())
        assert not (tmp_path / "b").exists()
    finally:
        torch.distributed.destroy_process_group()


# Without NumPy ------------------------------------------------------------------------------------------------------


def test_without_numpy_checksums_are_the_same_and_writing_says_what_it_needs(tmp_path, monkeypatch):
    held = {
        "none": torch.zeros(0, 3), "one": torch.tensor(2.0), "turned": torch.rand(3, 4, dtype=torch.bfloat16).t(),
        "truth": torch.tensor([True, False]), "complex": torch.rand(2, dtype=torch.complex64).conj(),
        "negated": torch.rand(2, dtype=torch.complex64).conj().imag, "count": torch.arange(5)[::2],
    }  # fmt: skip
    before = weights_checksum(held)
    plain = {name: value.resolve_conj().resolve_neg().contiguous() for name, value in held.items()}
    bytes_ = {name: value.flatten().view(torch.uint8).numpy().tobytes() for name, value in plain.items()}
    monkeypatch.setattr(torch.Tensor, "numpy", lambda *args, **options: pytest.fail("needs NumPy"))
    assert weights_checksum(held) == before
    assert all(entries_of(held[name]) == expected for name, expected in bytes_.items())
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(
        ImportError, match=r"^save_weights: numpy is needed by safetensors, to write .* `pip install numpy`"
    ):
        save_weights(tmp_path / "a.safetensors", nn.Linear(2, 2))
    assert list(tmp_path.iterdir()) == []
