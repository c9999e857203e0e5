"""A cell that attends to its own last outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchrnn.rnn_cell.base import Nest, build_cell, cat_size, describe, is_size, linear
from torchrnn.rnn_cell.wrappers import Wrapper


class AttentionCellWrapper(Wrapper):
    """Attention over the last L outputs (Cheng et al. 2016, arXiv:1601.06733, in TensorFlow's form).

    x' = [x, a] @ kernel + bias; y, s' = cell(x', s); q = s' @ attention/kernel + attention/bias, s' with all
    its tensors concatenated; weights = softmax over l of sum(attn_v * tanh(m_l @ attn_w + q));
    a' = sum over l of weights_l * m_l; out = [y, a'] @ attn_output_projection/kernel +
    attn_output_projection/bias. The memory m' is m without its oldest slot, and out behind.

    Args:
        cell: The cell inside, with R outputs and S numbers in its state.
        attn_length: L, how many outputs are remembered.
        attn_size: A, the size of the output; by default R.
        attn_vec_size: V, the size of the attention; by default A.
        input_size: J, the size of the input of the cell inside; by default that of the wrapper, I.
        state_is_tuple: Whether the state is ``(state of the cell, a [B, A], m [B, L*A])``, else one tensor.
        reuse: Ignored.

    Variables: kernel [I+A, J], bias [J], attention/attn_w [1, 1, A, V], attention/attn_v [V],
    attention/kernel [S, V], attention/bias [V], attn_output_projection/kernel [R+A, A],
    attn_output_projection/bias [A].

    Raises:
        ValueError: If ``attn_length`` is not positive, or the state of the cell inside is a tuple although
            ``state_is_tuple`` is False.
        TypeError: If ``cell`` is no cell.
    """

    scope = "attention_cell_wrapper"
    kernel: nn.Parameter
    bias: nn.Parameter
    attention_attn_w: nn.Parameter
    attention_attn_v: nn.Parameter
    attention_kernel: nn.Parameter
    attention_bias: nn.Parameter
    attn_output_projection_kernel: nn.Parameter
    attn_output_projection_bias: nn.Parameter

    def __init__(
        self,
        cell: Any,
        attn_length: int,
        attn_size: int | None = None,
        attn_vec_size: int | None = None,
        input_size: int | None = None,
        state_is_tuple: bool = True,
        reuse: bool | None = None,
    ) -> None:
        super().__init__(cell)
        if not is_size(cell.state_size) and not state_is_tuple:
            raise ValueError(
                "Cell returns tuple of states, but the flag state_is_tuple is not set. "
                f"State size is: {cell.state_size}"
            )
        if attn_length <= 0:
            raise ValueError(f"attn_length should be greater than zero, got {attn_length}")
        self.attn_length = attn_length
        self.attn_size = cat_size(cell.output_size) if attn_size is None else attn_size
        self.attn_vec_size = self.attn_size if attn_vec_size is None else attn_vec_size
        self.input_size = input_size
        self.state_is_tuple = state_is_tuple
        for name in ("kernel", "bias"):
            self.add_variable(name)
        for name in ("attn_w", "attn_v", "kernel", "bias"):
            self.add_variable(f"attention/{name}")
        for name in ("kernel", "bias"):
            self.add_variable(f"attn_output_projection/{name}")

    @property
    def _sizes(self) -> tuple[Nest, int, int]:
        return self.cell.state_size, self.attn_size, self.attn_size * self.attn_length

    @property
    def state_size(self) -> Nest:
        """The sizes of the state of the cell inside, of the attention and of the memory; or their sum."""
        return self._sizes if self.state_is_tuple else sum(self._sizes)

    @property
    def output_size(self) -> int:
        """The size of the output A."""
        return self.attn_size

    def zero_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Nest:
        """Returns that of the cell inside with an empty attention and memory."""
        inner = super().zero_state(batch_size, dtype, device)
        rest = [torch.zeros(batch_size, size, dtype=dtype, device=device) for size in self._sizes[1:]]
        return (inner, *rest) if self.state_is_tuple else torch.cat([inner, *rest], -1)

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes for I inputs."""
        size, units = self.attn_size, self.attn_vec_size
        inner = input_size if self.input_size is None else self.input_size
        return {
            "kernel": (input_size + size, inner),
            "bias": (inner,),
            "attention/attn_w": (1, 1, size, units),
            "attention/attn_v": (units,),
            "attention/kernel": (cat_size(self.cell.state_size), units),
            "attention/bias": (units,),
            "attn_output_projection/kernel": (cat_size(self.cell.output_size) + size, size),
            "attn_output_projection/bias": (size,),
        }

    def build_inner(self, inputs: Nest, dtype: torch.dtype | None, device: Any) -> None:
        """Builds the cell inside for the projected input."""
        build_cell(self.cell, inputs if self.input_size is None else self.input_size, dtype, device)

    def _split(self, state: Nest) -> tuple[Nest, Tensor, Tensor]:
        if not self.state_is_tuple:
            state = state.split(self._sizes, -1)
        elif not isinstance(state, tuple | list) or len(state) != 3:
            raise ValueError(f"Expected state to be a tuple of length 3, but received: {describe(state)}")
        return state[0], state[1], state[2]

    def call(self, inputs: Tensor, state: Nest) -> tuple[Tensor, Nest]:
        """Returns ``(out, (s', a', m'))``."""
        inner, attention, memory = self._split(state)
        x = linear([inputs, attention], self.kernel, self.bias)
        y, inner = self.cell(x, inner)
        slots = memory.unflatten(-1, (self.attn_length, self.attn_size))
        query = linear(pytree.tree_leaves(inner), self.attention_kernel, self.attention_bias)
        features = torch.tanh(slots @ self.attention_attn_w[0, 0] + query.unsqueeze(1))
        weights = torch.softmax((self.attention_attn_v * features).sum(-1), -1)
        attention = (weights.unsqueeze(-1) * slots).sum(1)
        out = linear([y, attention], self.attn_output_projection_kernel, self.attn_output_projection_bias)
        memory = torch.cat([memory[:, self.attn_size :], out], -1)
        new = (inner, attention, memory)
        return out, new if self.state_is_tuple else torch.cat(new, -1)

    def why_loop(self) -> str:
        """Returns why a sequence runs step by step."""
        return "the input of each step needs the attention of the one before"
