"""The door to the model: everything that the library does with what it attacks, judges or measures goes through here.

What is given as `model` may be a module, compiled, scripted, exported or wrapped for distributed training, or any
callable that holds modules somewhere: in a partial, a bound method, a closure, an attribute, a dictionary. The door
finds them, borrows them (eval mode, frozen parameters), calls them with tensors that they may overwrite, counts the
passes, and gives everything back as it was: also after an exception or an interrupt, with borrowers inside borrowers
and in several threads.

An attack opens it once. All checks of its inputs happen there, with one wait for the device:

    terms = Terms(loss, targets, start, model_mode, lane, eot, validate, judged=verdict)
    with opened("pgd", model, x, labels, threat, terms) as victim:
        victim.x, victim.labels                    # without history, inside the bounds; labels int64, or the targets
        values, grad, logits = victim.gradient(points, labels, loss)
        values, logits = victim.value(points, labels, loss)
        logits = victim.guess(points)              # to search with: in a lane those of the twin
        logits = victim.logits(points)             # to judge by: always those of the model itself
        logits, pull_back = victim.linearized(points)  # then grad = pull_back(weights, last=False), as often as needed

Inside, gradients are on and inference mode is off. `misclassified`, `classified` and `undefined` read logits: NaN is no
prediction, so such a sample is none of the first two. Gradients come in the dtype to compute in (`victim.width`, at
least float32), with 0 where they are undefined; infinite ones are larger than finite ones get (10^15 in float32), and
small enough for their norms not to overflow.

Other rooms, which only ask for logits, write

    with lent("evaluate", model) as f, torch.no_grad():
        logits = asked("evaluate", f, x)  # a copy of `x`, because a model may write to its input
"""

from perceptual_at.victims import inspection
from perceptual_at.victims.door import Answer, Victim, check_arguments, first_gradients, opened, plain
from perceptual_at.victims.finding import bare, modules_of, unwrapped
from perceptual_at.victims.frozen import frozen, lent
from perceptual_at.victims.in_step import in_step
from perceptual_at.victims.judging import classified, misclassified, undefined
from perceptual_at.victims.lanes import Lane
from perceptual_at.victims.terms import (
    Model,
    ModelMode,
    Terms,
    asked,
    check_lane,
    check_logits,
    check_values,
    explain_pass,
    is_own,
)
from perceptual_at.victims.twins import FastModel

__all__ = [
    "Answer",
    "FastModel",
    "Lane",
    "Model",
    "ModelMode",
    "Terms",
    "Victim",
    "asked",
    "bare",
    "check_arguments",
    "check_lane",
    "check_logits",
    "check_values",
    "classified",
    "explain_pass",
    "first_gradients",
    "frozen",
    "in_step",
    "inspection",
    "is_own",
    "lent",
    "misclassified",
    "modules_of",
    "opened",
    "plain",
    "undefined",
    "unwrapped",
]
