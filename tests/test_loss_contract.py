"""What every loss and divergence promises, whatever it measures. A new loss adds one row and inherits these tests."""

import dataclasses
import shutil
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import perceptual_at as pat
from perceptual_at import _check
from perceptual_at.divergences import cross_entropy
from tests.passes import host_reads
from tests.strategies import DTYPES, dtype_name, generator, integers, normal, uniform

# The table --------------------------------------------------------------------------------------------------------


def shares(seed, batch):
    return uniform(seed, batch, low=0.1, high=0.9)


def halves(seed, batch):
    return torch.arange(batch) % 2 == 0


@dataclasses.dataclass
class Case:
    """A loss, how many logits it takes, and what else it takes per sample."""

    name: str
    call: Callable[..., torch.Tensor]
    logits: int
    labels: bool = False
    reduces: bool = True
    per_sample: dict[str, Callable] = dataclasses.field(default_factory=dict)
    averages_selected: bool = False
    """The mean runs over the samples of a mask."""

    def arguments(self, seed=0, batch=6, classes=5, dtype=torch.float64, scale=2.0):
        """Logits (one leaf each), then labels; and the per-sample keywords."""
        given = [normal(seed + i, batch, classes, scale=scale, dtype=dtype) for i in range(self.logits)]
        return self.beside(given, seed)

    def beside(self, given, seed=0):
        """The other arguments, to go with these logits."""
        batch, classes = given[0].shape
        given = [z.requires_grad_() for z in given]
        if self.labels:
            given.append(integers(seed + 90, batch, below=classes))
        return given, {name: make(seed + 91, batch) for name, make in self.per_sample.items()}

    def per_sample_values(self, given, keywords):
        return self.call(*given, **keywords, **({"reduction": "none"} if self.reduces else {}))

    def total(self, given, keywords):
        return self.per_sample_values(given, keywords).sum()


def smooth_l1(a, b):
    return nn.functional.smooth_l1_loss(a, b, reduction="none").mean(dim=1)


def with_reference(case, make):
    """The row of kl_to with another reference; other rows as they are."""
    return dataclasses.replace(case, call=pat.kl_to(make())) if case.name == "kl_to" else case


def robust_perception_rows():
    for form in ("quotient", "interpolation"):
        for criterion in ("mse", "kl", "js", "cosine", smooth_l1):
            call = partial(pat.robust_perception_loss, alpha=0.3, form=form, criterion=criterion)
            yield Case(f"robust_perception {form} {getattr(criterion, '__name__', criterion)}", call, 3)
        call = partial(pat.robust_perception_loss, form=form)
        yield Case(f"robust_perception {form} alpha per sample", call, 3, per_sample={"alpha": shares})
    call = partial(pat.robust_perception_loss, criterion="js", temperature=0.5, form="interpolation")
    yield Case("robust_perception js sharpened", call, 3)


def dicar_rows():
    for space in ("probabilities", "logits"):
        call = partial(pat.dicar_loss, space=space, mix=0.3, temperature=0.5)
        yield Case(f"dicar {space}", call, 3)
        yield Case(f"dicar {space} mask", call, 3, per_sample={"mask": halves}, averages_selected=True)
        call = partial(pat.dicar_loss, space=space)
        yield Case(f"dicar {space} mix per sample", call, 3, per_sample={"mix": shares})
        for end in (0.0, 1.0):
            yield Case(f"dicar {space} mix={end:g}", partial(pat.dicar_loss, space=space, mix=end), 3)


def evenly_weighted_mse(clean_logits, adv_logits, **options):
    even = torch.full_like(clean_logits, 1 / clean_logits.shape[1]).detach()
    return pat.weighted_mse_loss(clean_logits, adv_logits, class_weights=even, **options)


LOSSES = [
    *robust_perception_rows(),
    Case("robust_perception_kl", partial(pat.robust_perception_kl_loss, alpha=0.3), 3),
    *dicar_rows(),
    Case("trades", pat.trades_loss, 2, labels=True),
    Case("mart", pat.mart_loss, 2, labels=True),
    Case("boosted_cross_entropy", pat.boosted_cross_entropy, 1, labels=True),
    Case("weighted_kl", pat.weighted_kl_loss, 2, labels=True),
    Case("consistency", pat.consistency_loss, 2),
    Case("temporal_ensembling", pat.temporal_ensembling_loss, 2),
    Case("distillation", pat.distillation_loss, 2),
    Case("distillation kl", partial(pat.distillation_loss, form="kl", temperature=1.0), 2),
    Case("max_margin", partial(pat.max_margin_loss, largest=2.0), 2, labels=True, per_sample={"margins": shares}),
    Case("interpolation_consistency", partial(pat.interpolation_consistency_loss, mix=0.3), 3),
    Case(
        "interpolation_consistency kl",
        partial(pat.interpolation_consistency_loss, criterion="kl"),
        3,
        per_sample={"mix": shares},
    ),
    Case("one_vs_rest", pat.one_vs_rest_loss, 1, labels=True),
    Case("normalized_error", pat.normalized_error_loss, 2),
    Case("grad_align", pat.grad_align_loss, 2),
    Case("brier", pat.brier_loss, 1, labels=True),
    Case("brier slack", partial(pat.brier_loss, slack=0.3), 1, labels=True),
    Case("score", pat.score_loss, 2, labels=True),
    Case("score slack", partial(pat.score_loss, slack=0.1, slack_on="robust"), 2, labels=True),
    Case("weighted_mse", evenly_weighted_mse, 2),
    Case("logit_pairing", pat.logit_pairing_loss, 2),
    Case("logit_pairing probabilities", partial(pat.logit_pairing_loss, space="probabilities"), 2),
    Case("hypersphere", pat.hypersphere_loss, 1, labels=True),
]
DIVERGENCES = [
    Case("squared_error", pat.squared_error, 2, reduces=False),
    Case("prediction_squared_error", pat.prediction_squared_error, 2, reduces=False),
    Case("cosine_distance", pat.cosine_distance, 2, reduces=False),
    Case("kl_divergence", pat.kl_divergence, 2, reduces=False),
    Case("kl_divergence softened", partial(pat.kl_divergence, temperature=3.0), 2, reduces=False),
    Case("js_divergence", pat.js_divergence, 2, reduces=False),
    Case("js_divergence sharpened", partial(pat.js_divergence, temperature=0.5), 2, reduces=False),
]
ATTACK_LOSSES = [  # functions of one tensor of logits; kl_to's reference is held fixed
    Case("cross_entropy", cross_entropy, 1, labels=True, reduces=False),
    Case("margin", pat.margin, 1, labels=True, reduces=False),
    Case("dlr", pat.dlr, 1, labels=True, reduces=False),
    Case("kl_to", pat.kl_to(normal(7, 6, 5)), 1, labels=True, reduces=False),
    Case("soft_logit_margin", pat.soft_logit_margin, 1, labels=True, reduces=False),
]
FREE_STANDING = [case for case in (*LOSSES, *DIVERGENCES, *ATTACK_LOSSES) if case.name != "kl_to"]


def rows(cases):
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases])


every_case = rows([*LOSSES, *DIVERGENCES, *ATTACK_LOSSES])
every_free_case = rows(FREE_STANDING)  # for batches of other sizes than the fixed reference
every_loss = rows(LOSSES)


def test_the_table_has_a_row_for_every_public_loss():
    public = {
        name for name in pat.__all__ if name.endswith(("_loss", "_divergence", "_distance", "_error", "_entropy"))
    }
    covered = {getattr(case.call, "func", case.call).__name__ for case in (*LOSSES, *DIVERGENCES)}
    # The first stands for a loss that needs class weights; the second has one side only that takes gradients.
    elsewhere = {"weighted_mse_loss", "soft_cross_entropy_loss"}
    assert public == covered - {"evenly_weighted_mse"} | elsewhere


# Reduction --------------------------------------------------------------------------------------------------------


@every_loss
def test_reductions_agree(case):
    given, keywords = case.arguments()
    each = case.call(*given, **keywords, reduction="none")
    count = keywords["mask"].sum() if case.averages_selected else len(each)
    assert each.shape == (6,)
    assert_close(case.call(*given, **keywords, reduction="sum"), each.sum(), rtol=1e-14, atol=0)
    assert_close(case.call(*given, **keywords, reduction="mean"), each.sum() / count, rtol=1e-14, atol=0)
    assert_close(case.call(*given, **keywords), each.sum() / count, rtol=1e-14, atol=0)


def test_the_mean_over_all_pairs_counts_those_left_out():
    given = [normal(i, 6, 5) for i in range(3)]
    mask = halves(0, 6)
    over_all = pat.dicar_loss(*given, mix=0.3, mask=mask, average_over="all")
    assert_close(over_all, pat.dicar_loss(*given, mix=0.3, mask=mask, reduction="none").mean())
    assert_close(over_all, pat.dicar_loss(*given, mix=0.3, mask=mask, average_over="selected") / 2)


@every_case
def test_values_are_per_sample_finite_and_not_constant(case):
    given, keywords = case.arguments()
    each = case.per_sample_values(given, keywords)
    assert each.shape == (6,)
    assert each.isfinite().all()
    assert each.std() > 1e-3


# One sample at a time ---------------------------------------------------------------------------------------------


@every_free_case
def test_samples_do_not_see_each_other(case):
    given, keywords = case.arguments()
    each = case.per_sample_values(given, keywords)
    alone = [
        case.per_sample_values([v[i : i + 1] for v in given], {k: v[i : i + 1] for k, v in keywords.items()})
        for i in range(6)
    ]
    assert_close(torch.cat(alone), each, rtol=1e-13, atol=1e-15)
    for i, tensor in enumerate(given[: case.logits]):  # nor do their gradients
        (jacobian,) = torch.autograd.grad(each[2], tensor, retain_graph=True)
        assert (jacobian[torch.arange(6) != 2] == 0).all(), i


@every_free_case
def test_permuting_the_batch_permutes_the_values(case):
    given, keywords = case.arguments()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = case.per_sample_values([v[order] for v in given], {k: v[order] for k, v in keywords.items()})
    assert_close(permuted, case.per_sample_values(given, keywords)[order], rtol=1e-14, atol=1e-15)


@every_case
def test_permuting_the_classes_changes_nothing(case):
    order = torch.tensor([4, 2, 0, 3, 1])
    given, keywords = case.arguments()
    permuted = [z[:, order] for z in given[: case.logits]]
    if case.labels:
        permuted.append(order.argsort()[given[-1]])
    expected = case.per_sample_values(given, keywords)
    case = with_reference(case, lambda: normal(7, 6, 5)[:, order])
    assert_close(case.per_sample_values(permuted, keywords), expected, rtol=1e-13, atol=1e-15)


# Gradients --------------------------------------------------------------------------------------------------------


@every_case
def test_gradients_are_those_of_finite_differences(case):
    given, keywords = case.arguments(batch=2, classes=4)
    case = with_reference(case, lambda: normal(7, 2, 4))
    labels = given[case.logits :]

    def call(*logits):
        return case.per_sample_values([*logits, *labels], keywords)

    assert torch.autograd.gradcheck(call, given[: case.logits])


@every_case
def test_second_derivatives_are_those_of_finite_differences(case):
    given, keywords = case.arguments(batch=2, classes=4)
    case = with_reference(case, lambda: normal(7, 2, 4))
    labels = given[case.logits :]

    def call(*logits):
        return case.per_sample_values([*logits, *labels], keywords)

    assert torch.autograd.gradgradcheck(call, given[: case.logits])


@every_case
def test_every_logit_gets_a_gradient(case):
    given, keywords = case.arguments()
    for i, grad in enumerate(torch.autograd.grad(case.total(given, keywords), given[: case.logits])):
        unused = (case.name.endswith("mix=0") and i == 1) or (case.name.endswith("mix=1") and i == 2)
        unused |= case.name == "max_margin" and i == 1  # nobody in this batch is right
        assert (grad.abs().sum() == 0) == unused, i


@every_case
def test_arguments_may_be_without_gradient_each_on_its_own(case):
    given, keywords = case.arguments()
    expected = torch.autograd.grad(case.total(given, keywords), given[: case.logits])
    for i in range(case.logits):
        alone = [v.detach() for v in given]
        alone[i].requires_grad_()
        (grad,) = torch.autograd.grad(case.total(alone, keywords), alone[i])
        assert_close(grad, expected[i], rtol=1e-14, atol=1e-16)


# Numbers that break naive formulas --------------------------------------------------------------------------------


def extreme_logits(count, kind, dtype, batch=6, classes=5):
    """Logits of +-80, logits that agree across classes, arguments that agree with each other."""
    signs = [2.0 * integers(i, batch, classes, below=2).to(dtype) - 1 for i in range(count)]
    if kind == "+-80":
        return [80 * sign for sign in signs]
    if kind == "opposite and sure":
        one_hot = torch.eye(classes, dtype=dtype).repeat(2, 1)[:batch]
        return [80 * (2 * one_hot.roll(i, dims=1) - 1) for i in range(count)]
    if kind == "sure of the same":
        return [80 * (2 * torch.eye(classes, dtype=dtype).repeat(2, 1)[:batch] - 1) for _ in range(count)]
    if kind == "all classes equal":
        return [torch.full((batch, classes), float(3 - i), dtype=dtype) for i in range(count)]
    if kind == "all zero":
        return [torch.zeros(batch, classes, dtype=dtype) for _ in range(count)]
    same = normal(3, batch, classes, dtype=dtype)
    return [same.clone() for _ in range(count)]


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_name)
@pytest.mark.parametrize(
    "kind", ["+-80", "opposite and sure", "sure of the same", "all classes equal", "all zero", "arguments equal"]
)
def test_value_gradient_and_second_derivatives_stay_finite(case, kind, dtype):
    given, keywords = case.beside(extreme_logits(case.logits, kind, dtype))
    case = with_reference(case, lambda: extreme_logits(2, kind, dtype)[1])
    each = case.per_sample_values(given, keywords)
    assert each.isfinite().all()
    logits = given[: case.logits]
    grads = torch.autograd.grad(each.sum(), logits, create_graph=True)
    assert all(grad.isfinite().all() for grad in grads)
    penalty = sum(grad.square().sum() for grad in grads if grad.requires_grad)  # losses may be linear
    if isinstance(penalty, torch.Tensor) and case.name != "dlr":  # which divides by a difference of logits
        for second in torch.autograd.grad(penalty, logits, allow_unused=True, materialize_grads=True):
            assert second.isfinite().all()


@rows([case for case in FREE_STANDING if any(name in case.name for name in ("cosine", "normalized", "grad_align"))])
def test_vectors_of_zeros_have_second_derivatives(case):
    given, _ = case.beside([torch.zeros(2, 3), *(normal(i, 2, 3, dtype=torch.float32) for i in range(case.logits - 1))])
    grads = torch.autograd.grad(case.total(given, {}), given, create_graph=True)
    for second in torch.autograd.grad(sum(grad.square().sum() for grad in grads), given):
        assert second.isfinite().all()


@rows([case for case in FREE_STANDING if case.name not in ("margin", "dlr", "soft_logit_margin")])  # those are signed
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_name)
def test_losses_are_never_negative_beyond_rounding(case, dtype):
    for scale in (0.01, 1.0, 40.0):
        given, keywords = case.arguments(dtype=dtype, scale=scale, batch=50)
        assert case.per_sample_values(given, keywords).min() >= -4 * torch.finfo(dtype).eps


# Kinds of numbers -------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_the_dtype_is_kept_and_the_value_is_that_of_float64(case, dtype):
    given, keywords = case.arguments(dtype=dtype)
    wide = [v.detach().double() if v.is_floating_point() else v for v in given]
    expected = with_reference(case, lambda: normal(7, 6, 5, dtype=dtype).double()).per_sample_values(wide, keywords)
    case = with_reference(case, lambda: normal(7, 6, 5, dtype=dtype))
    each = case.per_sample_values(given, keywords)
    assert each.dtype == dtype
    rounding, wide = torch.finfo(dtype).eps, torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    roundings = 40 if dtype in (torch.float64, torch.float32) else 4  # sixteen bits are left inside, and met at the end
    assert_close(each.double(), expected, rtol=roundings * rounding, atol=20 * wide)
    for grad in torch.autograd.grad(each.sum(), given[: case.logits]):
        assert grad.dtype == dtype
        assert grad.isfinite().all()
    if case.reduces:
        assert case.call(*given, **keywords).dtype == dtype


@rows([case for case in (*LOSSES, *DIVERGENCES) if case.logits > 1])
def test_logits_of_different_dtypes_meet_in_the_wider_one(case):
    given, keywords = case.arguments(dtype=torch.bfloat16)
    given[0] = given[0].detach().float()  # as from a teacher outside of autocast
    each = case.per_sample_values(given, keywords)
    assert each.dtype == torch.float32
    wide = [v.detach().double() if v.is_floating_point() else v for v in given]
    assert_close(each.double(), case.per_sample_values(wide, keywords), rtol=1e-4, atol=1e-5)


@rows([case for case in (*LOSSES, *ATTACK_LOSSES) if case.labels])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=dtype_name)
def test_labels_may_be_of_any_integer_dtype(case, dtype):
    given, keywords = case.arguments()
    expected = case.per_sample_values(given, keywords)
    assert torch.equal(case.per_sample_values([*given[:-1], given[-1].to(dtype)], keywords), expected)


@every_free_case
@pytest.mark.parametrize("classes", [2, 3, 1000])
def test_any_number_of_classes_will_do(case, classes):
    given, keywords = case.arguments(classes=classes)
    each = case.per_sample_values(given, keywords)
    assert each.isfinite().all()
    for grad in torch.autograd.grad(each.sum(), given[: case.logits]):
        assert grad.isfinite().all()


@rows([*(c for c in LOSSES if c.name.startswith("robust_perception ")), *DIVERGENCES])
def test_perceptions_with_places_give_the_mean_over_them(case):
    given, keywords = case.arguments(classes=12)
    if "smooth_l1" in case.name:  # the caller's own, written for logits
        return
    shaped = [v.reshape(6, 3, 2, 2) for v in given]
    alone = [case.per_sample_values([v[..., i, j] for v in shaped], keywords) for i in range(2) for j in range(2)]
    assert_close(case.per_sample_values(shaped, keywords), torch.stack(alone).mean(dim=0), rtol=1e-13, atol=1e-15)


@rows(DIVERGENCES)
def test_a_perception_may_be_one_number_per_sample(case):
    given = [normal(i, 6) for i in range(2)]
    as_column = case.per_sample_values([v[:, None] for v in given], {})
    assert_close(case.per_sample_values(given, {}), as_column)


@every_free_case
def test_strided_tensors_are_as_good_as_contiguous_ones(case):
    given, keywords = case.arguments()
    strided = [v.detach().t().contiguous().t() if v.ndim == 2 else v for v in given]
    assert not strided[0].is_contiguous()
    assert_close(case.per_sample_values(strided, keywords), case.per_sample_values(given, keywords), rtol=1e-14, atol=0)


# Purity -----------------------------------------------------------------------------------------------------------


@every_case
def test_arguments_are_not_modified(case):
    given, keywords = case.arguments()
    tensors = [*given, *keywords.values()]
    before = [(v.detach().clone(), v._version) for v in tensors]
    case.total(given, keywords).backward()
    for tensor, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version


@every_case
def test_nothing_is_drawn(case):
    given, keywords = case.arguments()
    state = torch.get_rng_state()
    first = case.per_sample_values(given, keywords)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(case.per_sample_values(given, keywords), first)


# Nobody -----------------------------------------------------------------------------------------------------------


@every_free_case
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_an_empty_batch_gives_nothing_or_zero(case, dtype):
    given, keywords = case.arguments(batch=0, dtype=dtype)
    assert case.per_sample_values(given, keywords).shape == (0,)
    for reduction in ("mean", "sum") if case.reduces else ():
        value = case.call(*given, **keywords, reduction=reduction)
        assert value.dtype == dtype
        assert value == 0
        for grad in torch.autograd.grad(value, given[: case.logits]):
            assert grad.shape == (0, 5)


@rows([case for case in LOSSES if "mask" in case.per_sample])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"reduction": "none"}, {"average_over": "all"}], ids=str)
def test_a_mask_with_nobody_gives_exactly_zero_and_a_zero_gradient(case, options, scale, dtype):
    given, _ = case.arguments(dtype=dtype, scale=scale)
    value = case.call(*given, mask=torch.zeros(6, dtype=torch.bool), **options)
    assert value.dtype == dtype
    assert (value == 0).all()
    for grad in torch.autograd.grad(value.sum(), given):
        assert (grad == 0).all()


@rows([case for case in LOSSES if "mask" in case.per_sample])
def test_a_mask_is_the_same_as_leaving_the_others_out(case):
    given, keywords = case.arguments()
    mask = keywords["mask"]
    assert_close(case.call(*given, mask=mask), case.call(*(v[mask] for v in given)), rtol=1e-14, atol=0)
    everybody = torch.ones(6, dtype=torch.bool)
    assert_close(case.call(*given, mask=everybody), case.call(*given), rtol=1e-14, atol=0)


# Transformations --------------------------------------------------------------------------------------------------


@every_free_case
def test_vmap_equals_the_loop(case):
    batches = [case.arguments(seed=10 * i) for i in range(3)]
    stacked = [torch.stack([b[0][i].detach() for b in batches]) for i in range(len(batches[0][0]))]
    keywords = {name: torch.stack([b[1][name] for b in batches]) for name in batches[0][1]}
    together = torch.func.vmap(lambda given, keywords: case.per_sample_values(given, keywords))(stacked, keywords)
    each = torch.stack([case.per_sample_values(*b) for b in batches])
    assert_close(together, each.detach(), rtol=1e-13, atol=1e-15)


@every_case
def test_functional_gradients_equal_autograd(case):
    given, keywords = case.arguments()
    expected = torch.autograd.grad(case.total(given, keywords), given[: case.logits])
    detached = [v.detach() for v in given]
    places = tuple(range(case.logits))
    grads = torch.func.grad(lambda *given: case.total(given, keywords), argnums=places)(*detached)
    for grad, reference in zip(grads, expected, strict=True):
        assert_close(grad, reference, rtol=1e-14, atol=1e-16)


def compiled_agrees(case, backend):
    given, keywords = case.arguments()

    def step(given, keywords):
        value = case.call(*given, **keywords)
        return value if case.reduces else value.mean()

    value = torch.compile(step, fullgraph=True, backend=backend)(given, keywords)
    expected = step(given, keywords)
    assert_close(value, expected, rtol=1e-12, atol=1e-14)
    grads = [torch.autograd.grad(v, given[: case.logits]) for v in (value, expected)]
    for grad, reference in zip(*grads, strict=True):
        assert_close(grad, reference, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@every_case
def test_compiling_the_full_graph_agrees_with_eager(case):
    torch._dynamo.reset()
    compiled_agrees(case, "aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
@every_case
def test_compiling_with_inductor_agrees_with_eager(case):
    torch._dynamo.reset()
    compiled_agrees(case, "inductor")


# No waiting for a device ------------------------------------------------------------------------------------------


@pytest.mark.slow
@every_case
def test_nothing_is_read_on_the_host_but_labels_in_cpu_memory(case, monkeypatch):
    given, keywords = case.arguments()
    with host_reads() as reads:
        case.total(given, keywords).backward()
    if not case.labels or case in ATTACK_LOSSES:
        assert reads == []
        return
    assert set(reads) == {"_local_scalar_dense"}
    # that one check is skipped for labels on a device; without it nothing is left
    monkeypatch.setattr(_check, "_readable", lambda value: False)
    given, keywords = case.arguments()
    with host_reads() as reads:
        case.total(given, keywords).backward()
    assert reads == []


def test_labels_on_a_device_are_not_read():
    # meta tensors have no values: reading one raises
    z, labels = torch.zeros(6, 5, device="meta"), torch.zeros(6, dtype=torch.long, device="meta")
    for case in LOSSES:
        keywords = {name: make(0, 6).to("meta") for name, make in case.per_sample.items()}
        given = [z] * case.logits + [labels] * case.labels
        assert case.call(*given, **keywords).shape == ()


# Averages over a whole data set -----------------------------------------------------------------------------------


@rows([case for case in LOSSES if not case.averages_selected])
def test_the_mean_of_equal_parts_is_the_mean_of_the_whole(case):
    given, keywords = case.arguments(batch=12)
    halves_of = [
        case.call(*(v[part] for v in given), **{k: v[part] for k, v in keywords.items()})
        for part in torch.randperm(12, generator=generator(0)).chunk(2)
    ]
    assert_close(torch.stack(halves_of).mean(), case.call(*given, **keywords), rtol=1e-13, atol=0)
