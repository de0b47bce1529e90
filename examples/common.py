"""What the examples share: digits in batches, the network, the report. Nothing about training."""

import argparse
import copy
import functools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
from tqdm import tqdm

from perceptual_at import Linf, evaluate, pgd
from perceptual_at.augment import random_crop_flip
from perceptual_at.data import digits
from perceptual_at.models import DigitsCNN

IMAGES = 1797
"""How many digits there are: rows of a memory, of which each image has one."""


class Batches:
    """Shuffled batches of images shifted by up to one pixel; with `views=2`, pairs of shifted copies.

    With `numbered` the images' numbers come third.
    """

    def __init__(self, x, labels, *, views=1, batch_size=128, generator=None, device="cpu", numbered=False):
        self.x, self.labels, self.views, self.numbered = x, labels, views, numbered
        self.batch_size, self.generator, self.device = batch_size, generator, device

    def __iter__(self):
        for rows in torch.randperm(len(self.x), generator=self.generator).split(self.batch_size):
            shifted = functools.partial(random_crop_flip, padding=1, flip=False, generator=self.generator)
            views = [shifted(self.x[rows]).to(self.device) for _ in range(self.views)]
            numbers = (rows.to(self.device),) if self.numbered else ()
            yield views[0] if self.views == 1 else tuple(views), self.labels[rows].to(self.device), *numbers


def ready(x_adv, model, x, labels, **options):
    """An attack that has its answer already."""
    return x_adv


def with_weights(model, weights):
    """A copy of the model that carries other weights, e.g. averaged ones."""
    copied = copy.deepcopy(model)
    copied.load_state_dict(weights)
    return copied


def report(model, *, seed=0, threat=None):
    """Clean and PGD-20 accuracy, their mean and NRR on the digits' test split, in percent."""
    device = next(model.parameters()).device
    noise = torch.Generator(device).manual_seed(seed)
    pgd20 = functools.partial(pgd, threat=threat or Linf(eps=0.15), steps=20, generator=noise)
    return evaluate(model, [digits("test", seed=seed)], {"pgd20": pgd20}, progress=False)


def spread(function, jobs, workers=None):
    """Results of `function(*job)` by job, computed in processes of one thread each: small networks gain by it."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers or os.cpu_count(), spawn, torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(function, *job): job for job in jobs}
        done = tqdm(as_completed(futures), desc="training", total=len(jobs), unit="model")
        return {futures[future]: future.result() for future in done}


def main(train, *, views=1, numbered=False):
    """Train on the digits with one seed and print what came of it."""
    parser = argparse.ArgumentParser(description="Train on handwritten digits; see the head of the file.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    model = DigitsCNN().to(options.device)
    order = torch.Generator().manual_seed(options.seed)
    noise = torch.Generator(options.device).manual_seed(options.seed)
    x, labels = digits("train", seed=options.seed)
    batches = Batches(x, labels, views=views, generator=order, device=options.device, numbered=numbered)
    trained = train(model, batches, noise, epochs=options.epochs)
    print(report(trained, seed=options.seed))
