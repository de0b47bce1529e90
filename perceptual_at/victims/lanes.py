"""How a model is run while it is attacked."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lane:
    """How to run a model while it is attacked: as a copy in eval mode, prepared for forward and input gradient.

    The copy (its *twin*) is made at the first call and kept for as long as the model lives; its weights are renewed
    whenever an attack begins, at the cost of one copy of the weights. Inputs, bounds and the attack's update keep
    their dtype; every success is confirmed by the model itself.

    Args:
        fold: put the batch norms that follow a convolution or a linear layer into its weights, as far as `torch.fx`
            can trace the model; ReLUs and sums then write over values that nobody else reads. Logits are equal up to
            rounding.
        channels_last: hold images and weights of convolutions with their channels innermost; on a CPU in float32 not
            from the first layer on that has many weights and few places, where that costs more.
        dtype: run weights and activations in this dtype, for example `torch.bfloat16`; images are cast after their
            normalisation, batch norms that stay keep their statistics as they are. None leaves the dtype alone.
        compile: hand the twin to `torch.compile`; starting takes seconds to minutes.
        cuda_graphs: on a CUDA device, replay forward and input gradient as CUDA graphs. They are captured for the
            shape of the first batch; batches of other shapes run as usual.

    Raises:
        TypeError: if an option is of the wrong kind.
        ValueError: if `dtype` is no floating dtype.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
        >>> x = torch.tensor([[0.25, 0.75]])
        >>> with frozen(model, lane=Lane()) as f:
        ...     torch.allclose(f(x), f.exact(x)), f.notes
        (True, ())
        >>> with frozen(model, lane=Lane(dtype=torch.bfloat16)) as f:
        ...     f(x).dtype
        torch.bfloat16
    """

    fold: bool = True
    channels_last: bool = True
    dtype: torch.dtype | None = None
    compile: bool = False
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        for name in ("fold", "channels_last", "compile", "cuda_graphs"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"Lane: `{name}` must be True or False, got {value!r}.")
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise TypeError(f"Lane: `dtype` must be a torch.dtype such as torch.bfloat16, got {self.dtype!r}.")
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise ValueError(f"Lane: `dtype` must be a floating dtype, got {self.dtype}.")
