"""Calls that are right; no type checker has a word to say."""

import functools

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import perceptual_at
from perceptual_at import Lane, Linf, SampleGenerator, Verdict, cw, fgsm, kl_to, margin, pgd

model, x, labels, threat = nn.Linear(3, 2), torch.rand(4, 3), torch.zeros(4, dtype=torch.long), Linf(0.1)
flag = bool(x.sum() > 1)

assert_type(pgd(model, x, labels, threat), Tensor)
assert_type(pgd(model, x, labels, threat, verdict=True), Verdict)
assert_type(pgd(model, x, labels, threat, verdict=False, steps=3), Tensor)
assert_type(pgd(model, x, labels, threat, verdict=flag), Tensor | Verdict)
pgd(lambda z: z, x, labels, threat, steps=3, step_size=x[:, 0], loss=margin, start=x, momentum=0.9, eot=2)
pgd(model, x, labels, threat, loss=kl_to(model(x)), keep="best", early_stop=True, restarts=2, targets=labels)
pgd(model, x, labels, threat, lane=Lane(dtype=torch.bfloat16), generator=SampleGenerator(0, [1, 2, 3, 4]))
pgd(model, x, labels, threat, model_mode="as_is", validate=False, generator=torch.Generator())
assert_type(fgsm(model, x, labels, threat, start="random"), Tensor)
assert_type(fgsm(model, x, labels, threat, verdict=True), Verdict)
assert_type(cw(model, x, labels, threat, steps=3, keep="best"), Tensor)
assert_type(cw(model, x, labels, threat, verdict=True, restarts=3), Verdict)
functools.partial(pgd, threat=threat, steps=20)(model, x, labels)
perceptual_at.models.normalized(model, [0.5], [0.5])
rooms = (perceptual_at.data.loader, perceptual_at.victims.Lane, perceptual_at.sample_weights, perceptual_at.theory)
