"""What is measured. A new line in ``SIZES`` is a new row of the table for every cell and mode."""

from __future__ import annotations

from dataclasses import dataclass

GATES = {"lstm": 4, "gru": 3}
MODES = ("infer", "train")


@dataclass(frozen=True)
class Case:
    """One layer of one direction, in float32.

    ``infer`` is the forward pass in inference mode; ``train`` is the forward pass and the gradients of the
    input, the weights and the biases.
    """

    cell: str
    mode: str
    steps: int
    batch: int
    inputs: int
    hidden: int

    @property
    def id(self) -> str:
        inputs = "" if self.inputs == self.hidden else f"-i{self.inputs}"
        return f"{self.cell}-b{self.batch}-t{self.steps}{inputs}-h{self.hidden}-fp32-{self.mode}"

    @property
    def flops(self) -> int:
        """Returns the operations of the matrix products; those of the activations are few beside them."""
        forward = 2 * self.steps * self.batch * GATES[self.cell] * self.hidden * (self.inputs + self.hidden)
        return forward if self.mode == "infer" else 3 * forward

    @property
    def recurrent_bytes(self) -> int:
        """Returns the size of the recurrent weight, which every step reads."""
        return GATES[self.cell] * self.hidden * self.hidden * 4

    @property
    def recurrent_reads(self) -> int:
        """Returns how often the recurrent weight is read: once per step, and once more on the way back."""
        return self.steps if self.mode == "infer" else 2 * self.steps


# (T, B, I, H): a single step, then from what bandwidth bounds to what arithmetic bounds.
SIZES = (
    (1, 1, 256, 256),
    (128, 1, 128, 128),
    (128, 1, 512, 512),
    (128, 1, 1024, 1024),
    (128, 8, 256, 256),
    (128, 32, 512, 512),
    (64, 128, 1024, 1024),
)
QUICK_SIZES = ((1, 1, 16, 16), (4, 2, 8, 16))


def cases(sizes: tuple[tuple[int, int, int, int], ...] = SIZES) -> list[Case]:
    """Returns every size for every cell and mode."""
    return [Case(cell, mode, *size) for cell in GATES for mode in MODES for size in sizes]
