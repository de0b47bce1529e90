"""Calls of which each is wrong: every line that ends in a mark must be an error for a type checker."""

import torch
from torch import nn

import perceptual_at
from perceptual_at import Linf, cw, fgsm, pgd

model, x, labels, threat = nn.Linear(3, 2), torch.rand(4, 3), torch.zeros(4, dtype=torch.long), Linf(0.1)

pgd(model, x, labels, threat, step=3)  # wrong
pgd(model, x, labels, threat, steps="3")  # wrong
pgd(model, x, labels, threat, stepsize=0.1)  # wrong
pgd(model, x, labels, threat, step_size="large")  # wrong
pgd(model, x, labels, threat, loss="ce")  # wrong
pgd(model, x, labels, threat, targets=3)  # wrong
pgd(model, x, labels, threat, start="zero")  # wrong
pgd(model, x, labels, threat, restarts=None)  # wrong
pgd(model, x, labels, threat, momentum="0.9")  # wrong
pgd(model, x, labels, threat, keep="first")  # wrong
pgd(model, x, labels, threat, early_stop="yes")  # wrong
pgd(model, x, labels, threat, model_mode="keep")  # wrong
pgd(model, x, labels, threat, lane="bf16")  # wrong
pgd(model, x, labels, threat, validate="no")  # wrong
pgd(model, x, labels, threat, generator=0)  # wrong
pgd(model, x, labels, threat, verdict=True, step=3)  # wrong
pgd(model, x, labels, threat, verdict="yes")  # wrong
pgd(model, x, labels, 0.1)  # wrong
pgd(model, x, [0, 1, 2, 3], threat)  # wrong
pgd("resnet18", x, labels, threat)  # wrong
fgsm(model, x, labels, threat, steps=3)  # wrong
fgsm(model, x, labels, threat, start="zero")  # wrong
fgsm(model, x, labels, threat, verdict=True, momentum=0.5)  # wrong
cw(model, x, labels, threat, loss=None)  # wrong
cw(model, x, labels, threat, step=3)  # wrong
cw(model, x, labels, threat, verdict=True, keep="first")  # wrong
rooms = perceptual_at.modles  # wrong
normalised = perceptual_at.models.normalised  # wrong
