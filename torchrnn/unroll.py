"""TensorFlow 1's unrolling functions: a cell over a sequence.

Letters: T steps, B batch rows. ``parallel_iterations``, ``swap_memory`` and ``scope`` are accepted as in
TensorFlow and have no effect. No function reads past a row's length: what is there may be anything.

One file for all of them, as they are variations of one run and half of it is the list of their arguments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchrnn._explain import explain_layer, explain_ops
from torchrnn._layer import Layer
from torchrnn._tools import fx
from torchrnn.cells import Cell
from torchrnn.rnn_cell.base import (
    Nest,
    RNNCell,
    Run,
    alive_mask,
    assert_cell,
    build_cell,
    describe,
    float_dtype,
    is_size,
    loop,
    map_sizes,
    nested,
    select,
    shape_of,
    zero_state_of,
)
from torchrnn.rnn_cell.core import unroll_cell

_STEPWISE: ContextVar[bool] = ContextVar("torchrnn_stepwise", default=False)


@contextlib.contextmanager
def stepwise() -> Iterator[None]:
    """Makes the unrolling functions call cells step by step, as they do with cells that they do not know.

    For comparison: results are the same, but for rounding and for masks that are drawn, and come slower. What
    ``torch.compile`` compiles is not affected.
    """
    token = _STEPWISE.set(True)
    try:
        yield
    finally:
        _STEPWISE.reset(token)


def explain(module: Any, input: Any = None) -> str:
    """Returns how a layer or a cell runs, and why: which kernels, or why none.

    It goes by the mode that the module is in, and by what is active at the time: whether gradients are
    recorded, autocast, transforms.

    Args:
        module: A ``torchrnn.LSTM``, ``GRU`` or ``RNN``, or one of their cells: there is one line. Or a cell
            for the unrolling functions: there is a line for each of its parts, on how they run it over a
            sequence. Cells inside one that runs step by step have no lines. ``raw_rnn``, and all functions in
            ``stepwise``, call cells step by step.
        input: An example of what the module is called with; sizes, dtype and device count, but not values.
            Required for a layer. For a cell the inputs of a sequence, in any layout: then a last line says
            where the ops run that the other lines speak of.

    Raises:
        TypeError: If the module is neither, or the input has no tensor.
        ValueError: If a layer does not take the input.
    """
    if isinstance(module, Layer | Cell):
        return explain_layer(module, input)
    assert_cell(module, "module")
    lines = ["  " * (depth - 1) + text for depth, text in nested(module)]
    if input is not None:
        leaves = pytree.tree_leaves(input)
        if not all(isinstance(leaf, Tensor) for leaf in leaves) or not leaves:
            raise TypeError(f"explain: input must be a nest of tensors, got {type(input).__name__}")
        lines.append(explain_ops(module, leaves[0]))
    return "\n".join(lines)


# One direction --------------------------------------------------------------------------------------------


@fx.node
def dynamic_rnn(
    cell: Any,
    inputs: Nest,
    sequence_length: Tensor | Sequence[int] | None = None,
    initial_state: Nest = None,
    dtype: torch.dtype | None = None,
    parallel_iterations: int | None = None,
    swap_memory: bool = False,
    time_major: bool = False,
    scope: object = None,
) -> tuple[Nest, Nest]:
    """Runs a cell over a sequence.

    Args:
        cell: An ``RNNCell``, or any object with its protocol.
        inputs: [B, T, ...], or [T, B, ...] if ``time_major``; or a nest of such tensors.
        sequence_length: [B] integers: how many steps of each row count; less than 0 is 0 and more than T is
            T. Outputs past it are zero, and states stay as they are. None for all steps.
        initial_state: As ``cell.state_size``, with [B, ...]; plain tuples do for named ones. None for the
            cell's zero state, with ``dtype``.
        dtype: The dtype of the zero state; required without ``initial_state``.
        parallel_iterations: Ignored.
        swap_memory: Ignored.
        time_major: Whether time is the first axis of inputs and outputs.
        scope: Ignored.

    Returns:
        ``(outputs, state)``: a nest as ``cell.output_size``, with the first two axes of ``inputs``, and the
        state after the last step that counts.

    Raises:
        TypeError: If ``cell`` is no cell, or inputs and state differ in dtype.
        ValueError: If a shape or structure does not fit, or there is neither a state nor a dtype.
    """
    assert_cell(cell)
    x = _time_major(inputs, time_major)
    outputs, state = _run(cell, x, sequence_length, initial_state, dtype, False)
    return outputs if time_major else _swap(outputs), state


@fx.node
def static_rnn(
    cell: Any,
    inputs: Sequence[Nest],
    initial_state: Nest = None,
    dtype: torch.dtype | None = None,
    sequence_length: Tensor | Sequence[int] | None = None,
    scope: object = None,
) -> tuple[list[Nest], Nest]:
    """Runs a cell over a list of T inputs [B, ...]; returns ``(list of T outputs, state)``.

    Otherwise as ``dynamic_rnn``.

    Raises:
        TypeError: If ``cell`` is no cell, or ``inputs`` no sequence.
        ValueError: As ``dynamic_rnn``, and if ``inputs`` is empty.
    """
    assert_cell(cell)
    x = _stack(inputs)
    if initial_state is None and dtype is None:
        raise ValueError("If no initial_state is provided, dtype must be specified")
    outputs, state = _run(cell, x, sequence_length, initial_state, dtype, False)
    return _unstack(outputs, len(inputs)), state


rnn = static_rnn
"""The name in TensorFlow 0.x."""


def static_state_saving_rnn(
    cell: Any,
    inputs: Sequence[Nest],
    state_saver: Any,
    state_name: str | tuple[Any, ...],
    sequence_length: Tensor | Sequence[int] | None = None,
    scope: object = None,
) -> tuple[list[Nest], Nest]:
    """``static_rnn`` whose state comes from and goes to ``state_saver``.

    Args:
        cell: As for ``static_rnn``.
        inputs: As for ``static_rnn``.
        state_saver: Has the methods ``state(name)`` and ``save_state(name, value)``.
        state_name: A name; a tuple of names (or of tuples) if the state is a tuple.
        sequence_length: As for ``static_rnn``.
        scope: Ignored.

    Raises:
        ValueError: If ``state_name`` does not have the structure of the state.
    """
    assert_cell(cell)
    size = cell.state_size
    is_tuple, names_are_tuple = not is_size(size), isinstance(state_name, tuple)
    if is_tuple != names_are_tuple:
        raise ValueError(
            "state_name should be the same type as cell.state_size.  "
            f"state_name: {state_name}, cell.state_size: {size}"
        )
    spec = pytree.tree_structure(map_sizes(lambda _: 0, size))
    names = pytree.tree_leaves(state_name)
    if len(names) != spec.num_leaves:
        raise ValueError(f"#elems(state_name) != #elems(cell.state_size): {len(names)} vs. {spec.num_leaves}")
    initial = pytree.tree_unflatten([state_saver.state(name) for name in names], spec)
    outputs, state = static_rnn(cell, inputs, initial, sequence_length=sequence_length)
    for name, value in zip(names, pytree.tree_leaves(state), strict=True):
        state_saver.save_state(name, value)
    return outputs, state


state_saving_rnn = static_state_saving_rnn
"""The name in TensorFlow 0.x."""


# Two directions -------------------------------------------------------------------------------------------


@fx.node
def bidirectional_dynamic_rnn(
    cell_fw: Any,
    cell_bw: Any,
    inputs: Nest,
    sequence_length: Tensor | Sequence[int] | None = None,
    initial_state_fw: Nest = None,
    initial_state_bw: Nest = None,
    dtype: torch.dtype | None = None,
    parallel_iterations: int | None = None,
    swap_memory: bool = False,
    time_major: bool = False,
    scope: object = None,
) -> tuple[tuple[Nest, Nest], tuple[Nest, Nest]]:
    """Runs one cell forwards and another backwards, from the last step of each row that counts.

    Arguments and errors are those of ``dynamic_rnn``; lengths outside 0..T are errors here.

    Returns:
        ``((outputs_fw, outputs_bw), (state_fw, state_bw))``, each as of ``dynamic_rnn``: not concatenated,
        and ``outputs_bw[:, t]`` belongs to input t.
    """
    assert_cell(cell_fw, "cell_fw")
    assert_cell(cell_bw, "cell_bw")
    x = _time_major(inputs, time_major)
    check_range(sequence_length, pytree.tree_leaves(x)[0].size(0))
    out_fw, state_fw = _run(cell_fw, x, sequence_length, initial_state_fw, dtype, False)
    out_bw, state_bw = _run(cell_bw, x, sequence_length, initial_state_bw, dtype, True)
    if not time_major:
        out_fw, out_bw = _swap(out_fw), _swap(out_bw)
    return (out_fw, out_bw), (state_fw, state_bw)


@fx.node
def static_bidirectional_rnn(
    cell_fw: Any,
    cell_bw: Any,
    inputs: Sequence[Nest],
    initial_state_fw: Nest = None,
    initial_state_bw: Nest = None,
    dtype: torch.dtype | None = None,
    sequence_length: Tensor | Sequence[int] | None = None,
    scope: object = None,
) -> tuple[list[Nest], Nest, Nest]:
    """``bidirectional_dynamic_rnn`` over a list of T inputs [B, ...].

    Returns:
        ``(outputs, state_fw, state_bw)``: a list of T outputs, forward and backward concatenated.
    """
    assert_cell(cell_fw, "cell_fw")
    assert_cell(cell_bw, "cell_bw")
    x = _stack(inputs)
    check_range(sequence_length, len(inputs))
    out_fw, state_fw = _run(cell_fw, x, sequence_length, initial_state_fw, dtype, False)
    out_bw, state_bw = _run(cell_bw, x, sequence_length, initial_state_bw, dtype, True)
    return _unstack(_concat(out_fw, out_bw), len(inputs)), state_fw, state_bw


bidirectional_rnn = static_bidirectional_rnn
"""The name in TensorFlow 0.x."""


@fx.node
def stack_bidirectional_dynamic_rnn(
    cells_fw: list[Any],
    cells_bw: list[Any],
    inputs: Tensor,
    initial_states_fw: list[Nest] | None = None,
    initial_states_bw: list[Nest] | None = None,
    dtype: torch.dtype | None = None,
    sequence_length: Tensor | Sequence[int] | None = None,
    parallel_iterations: int | None = None,
    time_major: bool = False,
    scope: object = None,
    swap_memory: bool = False,
) -> tuple[Tensor, tuple[Nest, ...], tuple[Nest, ...]]:
    """A stack of bidirectional layers, each of which reads both directions of the one before.

    Args:
        cells_fw: The forward cells, a list with one per layer.
        cells_bw: The backward cells, as many.
        inputs: As for ``dynamic_rnn``.
        initial_states_fw: A list with one state per layer; None for zeros.
        initial_states_bw: Likewise.
        dtype: Of the zero states.
        sequence_length: As for ``bidirectional_dynamic_rnn``.
        parallel_iterations: Ignored.
        time_major: As for ``dynamic_rnn``.
        scope: Ignored.
        swap_memory: Ignored.

    Returns:
        ``(outputs, states_fw, states_bw)``: both directions of the last layer concatenated, and tuples of
        the final states by layer.

    Raises:
        ValueError: If the cells or states are not lists of the same length, and as ``dynamic_rnn``.
    """
    _check_stack(cells_fw, cells_bw, initial_states_fw, initial_states_bw)
    firsts_fw = initial_states_fw or [None] * len(cells_fw)
    firsts_bw = initial_states_bw or [None] * len(cells_fw)
    states_fw, states_bw = [], []
    for cell_fw, cell_bw, first_fw, first_bw in zip(cells_fw, cells_bw, firsts_fw, firsts_bw, strict=True):
        (out_fw, out_bw), (fw, bw) = bidirectional_dynamic_rnn(
            cell_fw, cell_bw, inputs, sequence_length, first_fw, first_bw, dtype, time_major=time_major
        )
        inputs = _concat(out_fw, out_bw)
        states_fw.append(fw)
        states_bw.append(bw)
    return inputs, tuple(states_fw), tuple(states_bw)


@fx.node
def stack_bidirectional_rnn(
    cells_fw: list[Any],
    cells_bw: list[Any],
    inputs: Sequence[Tensor],
    initial_states_fw: list[Nest] | None = None,
    initial_states_bw: list[Nest] | None = None,
    dtype: torch.dtype | None = None,
    sequence_length: Tensor | Sequence[int] | None = None,
    scope: object = None,
) -> tuple[list[Tensor], tuple[Nest, ...], tuple[Nest, ...]]:
    """``stack_bidirectional_dynamic_rnn`` over a list of T inputs [B, ...]; returns a list of outputs."""
    _check_stack(cells_fw, cells_bw, initial_states_fw, initial_states_bw)
    outputs, states_fw, states_bw = stack_bidirectional_dynamic_rnn(
        cells_fw, cells_bw, _stack(inputs), initial_states_fw, initial_states_bw, dtype, sequence_length,
        time_major=True,
    )  # fmt: skip
    return _unstack(outputs, len(inputs)), states_fw, states_bw


# The caller's own loop ------------------------------------------------------------------------------------


def raw_rnn(
    cell: Any,
    loop_fn: Callable[..., Any],
    parallel_iterations: int | None = None,
    swap_memory: bool = False,
    scope: object = None,
) -> tuple[Nest, Nest, Nest]:
    """Runs a cell on what a function hands it step by step.

    ``loop_fn(time, cell_output, cell_state, loop_state)`` returns ``(finished, next_input, next_cell_state,
    emit_output, next_loop_state)``. It is called with ``(0, None, None, None)`` first: then it returns the
    initial state, and as ``emit_output`` zeros of one row's shape, or None for what the cell puts out.
    ``finished`` is [B] bool and stays true: a finished row emits zeros and keeps its state.

    Args:
        cell: As for ``dynamic_rnn``.
        loop_fn: The function.
        parallel_iterations: Ignored.
        swap_memory: Ignored.
        scope: Ignored.

    Returns:
        ``(emitted, state, loop_state)``: emitted is [time, B, ...], with as many steps as it took until all
        rows were finished.

    Raises:
        TypeError: If ``cell`` is no cell, or ``loop_fn`` is not callable.
    """
    assert_cell(cell)
    if not callable(loop_fn):
        raise TypeError("loop_fn must be a callable")
    start_sequence(cell)
    finished, x, state, emit, loop_state = loop_fn(0, None, None, None)
    first = pytree.tree_leaves(x)[0]
    batch = first.size(0)
    finished = torch.as_tensor(finished, device=first.device).expand(batch)
    if emit is None:
        dtype = float_dtype(state, x)
        zero = map_sizes(lambda s: first.new_zeros(batch, *shape_of(s), dtype=dtype), cell.output_size)
    else:
        zero = pytree.tree_map(lambda e: e.new_zeros(batch, *e.shape), emit)
    spec = pytree.tree_structure(zero)
    emitted: list[list[Tensor]] = []
    time = 0
    while not bool(finished.all()):
        output, new = cell(x, state)
        time += 1
        done, x, new, emit, next_loop_state = loop_fn(time, output, new, loop_state)
        alive = ~finished
        emitted.append(pytree.tree_leaves(select(alive, output if emit is None else emit, 0)))
        state = select(alive, new, state)
        loop_state = loop_state if next_loop_state is None else next_loop_state
        finished = finished | torch.as_tensor(done, device=finished.device)
    if not emitted:
        return pytree.tree_map(lambda z: z.new_zeros(0, *z.shape), zero), state, loop_state
    stacked = [torch.stack(each) for each in zip(*emitted, strict=True)]
    return pytree.tree_unflatten(stacked, spec), state, loop_state


# What they share ------------------------------------------------------------------------------------------


def start_sequence(cell: Any) -> None:
    """Lets a cell draw new masks."""
    if isinstance(cell, RNNCell):
        cell.start_sequence()


def transpose_batch_time(x: Tensor) -> Tensor:
    """Swaps the first two axes; a tensor with fewer stays as it is."""
    return x if x.dim() < 2 else x.transpose(0, 1)


def _swap(nest: Nest) -> Nest:
    return pytree.tree_map(transpose_batch_time, nest)


def _run(
    cell: Any,
    x: Nest,
    sequence_length: Tensor | Sequence[int] | None,
    initial_state: Nest,
    dtype: torch.dtype | None,
    reverse: bool,
) -> tuple[Nest, Nest]:
    """Runs a cell over x, whose tensors are [T, B, ...]."""
    first = pytree.tree_leaves(x)[0]
    steps, batch = first.shape[:2]
    lengths = row_lengths(sequence_length, steps, batch, first.device)
    kind = _check_dtypes(x, initial_state, dtype)
    if steps:  # Before there is a state: of some cells the sizes go by the inputs.
        build_cell(cell, pytree.tree_map(lambda v: v[0], x), kind, first.device)
    state = _initial_state(cell, first, initial_state, dtype)
    start_sequence(cell)
    run = Run(lengths, reverse)
    alive = None
    if lengths is not None:
        alive = alive_mask(lengths, steps)
        # Padding may hold anything, and 0 * NaN in the gradient of a weight would spread it.
        x = _zero_padding(alive, x)
    if steps == 0 or (not torch.compiler.is_compiling() and _STEPWISE.get()):
        return loop(cell, x, state, run)
    outputs, state = unroll_cell(cell, x, state, run)
    return outputs if alive is None else _zero_padding(alive, outputs), state


def _zero_padding(alive: Tensor, nest: Nest) -> Nest:
    """Returns tensors [T, B, ...] with zeros where a row is not alive [T, B]."""

    def one(value: Tensor) -> Tensor:
        mask = alive.view(*alive.shape, *[1] * (value.dim() - 2))
        return torch.where(mask, value, value.new_zeros(()))

    return pytree.tree_map(one, nest)


def _time_major(inputs: Nest, time_major: bool) -> Nest:
    """Returns inputs with time first, after checks."""
    leaves = pytree.tree_leaves(inputs)
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"inputs must be a tensor or a nest of tensors, got {type(leaf).__name__}")
        if leaf.dim() < 3:
            raise ValueError(f"Shape {tuple(leaf.shape)} must have rank at least 3")
    if not leaves:
        raise ValueError("inputs must hold a tensor, got none")
    if any(leaf.shape[:2] != leaves[0].shape[:2] for leaf in leaves[1:]):  # Symbolic sizes have no hash.
        raise ValueError(
            f"Time steps or batch size are not the same for all the elements: {describe(inputs)}"
        )
    return inputs if time_major else _swap(inputs)


def _stack(inputs: Sequence[Nest]) -> Nest:
    """Returns a list of inputs as one nest [T, B, ...]."""
    if not isinstance(inputs, list | tuple):
        raise TypeError("inputs must be a sequence")
    if not inputs:
        raise ValueError("inputs must not be empty")
    specs = [pytree.tree_structure(each) for each in inputs]
    if any(spec != specs[0] for spec in specs):
        raise ValueError(f"inputs must have one structure, got {describe(list(inputs))}")
    leaves = zip(*map(pytree.tree_leaves, inputs), strict=True)
    return pytree.tree_unflatten([torch.stack(each) for each in leaves], specs[0])


def _unstack(outputs: Nest, steps: int) -> list[Nest]:
    return [pytree.tree_map(lambda v, t=t: v[t], outputs) for t in range(steps)]


def _concat(fw: Nest, bw: Nest) -> Nest:
    leaves, spec = pytree.tree_flatten(fw)
    both = zip(leaves, pytree.tree_leaves(bw), strict=True)
    return pytree.tree_unflatten([torch.cat(pair, -1) for pair in both], spec)


def row_lengths(
    value: Tensor | Sequence[int] | None, steps: int, batch: int, device: torch.device
) -> Tensor | None:
    """Returns lengths as [B] int64 in 0..T."""
    if value is None:
        return None
    lengths = torch.as_tensor(value)
    if lengths.dim() != 1:
        raise ValueError(
            f"sequence_length must be a vector of length batch_size, but saw shape: {tuple(lengths.shape)}"
        )
    if (lengths.is_floating_point() or lengths.dtype == torch.bool) and lengths.numel():
        raise ValueError(f"sequence_length must hold integers, got {lengths.dtype}")
    if lengths.numel() != batch:
        raise ValueError(
            f"sequence_length must be a vector of length batch_size={batch}, got {lengths.numel()} entries"
        )
    return lengths.to(device, torch.int64).clamp(0, steps)


def check_range(value: Tensor | Sequence[int] | None, steps: int) -> None:
    """Raises for lengths outside 0..T, which a reversal cannot have; those on a device are clamped."""
    if value is None or torch.compiler.is_compiling():
        return
    lengths = torch.as_tensor(value)
    if lengths.device.type == "cpu" and lengths.numel():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > steps:
            raise ValueError(f"sequence_length must be in 0..T with T={steps}, got {low}..{high}")


def _check_dtypes(inputs: Nest, state: Nest, dtype: torch.dtype | None) -> torch.dtype | None:
    """Returns the floating dtype of the state, given or to be made; None if it has none or several."""
    if state is None:
        if dtype is None:
            raise ValueError("If there is no initial_state, you must give a dtype.")
        kinds = {dtype} if dtype.is_floating_point else set()
    else:
        kinds = _float_dtypes(state)
        if dtype is None and len(kinds) > 1:
            raise ValueError(
                f"State has tensors of different inferred_dtypes. Unable to infer a single representative "
                f"dtype: {sorted(map(str, kinds))}"
            )
    there = _float_dtypes(inputs)
    if len(kinds) == 1 and there and not kinds <= there:
        names = " and ".join(sorted(map(str, there)))
        raise TypeError(f"inputs and state must have one dtype, got {names} and {kinds.pop()}")
    return kinds.pop() if len(kinds) == 1 else None


def _float_dtypes(nest: Nest) -> set[torch.dtype]:
    leaves = pytree.tree_leaves(nest)
    return {v.dtype for v in leaves if isinstance(v, Tensor) and v.is_floating_point()}


def _initial_state(cell: Any, first: Tensor, state: Nest, dtype: torch.dtype | None) -> Nest:
    """Returns the state to start from, in the cell's own structure."""
    batch = first.size(1)
    if state is None:
        state = zero_state_of(cell, batch, dtype, first.device)
    else:
        spec = pytree.tree_structure(map_sizes(lambda _: 0, cell.state_size))
        leaves = pytree.tree_leaves(state)
        if len(leaves) != spec.num_leaves:
            raise ValueError(
                f"initial_state must have the structure of cell.state_size {cell.state_size}, "
                f"got {describe(state)}"
            )
        state = pytree.tree_unflatten(leaves, spec)
    for v in pytree.tree_leaves(state):
        if isinstance(v, Tensor) and v.dim() and v.size(0) != batch:
            raise ValueError(f"initial_state must have B={batch} rows, got {describe(state)}")
    return state


def _check_stack(cells_fw: Any, cells_bw: Any, initial_states_fw: Any, initial_states_bw: Any) -> None:
    if not cells_fw:
        raise ValueError("Must specify at least one fw cell for BidirectionalRNN.")
    if not cells_bw:
        raise ValueError("Must specify at least one bw cell for BidirectionalRNN.")
    if not isinstance(cells_fw, list):
        raise ValueError("cells_fw must be a list of RNNCells (one per layer).")
    if not isinstance(cells_bw, list):
        raise ValueError("cells_bw must be a list of RNNCells (one per layer).")
    if len(cells_fw) != len(cells_bw):
        raise ValueError("Forward and Backward cells must have the same depth.")
    for name, states in (("initial_states_fw", initial_states_fw), ("initial_states_bw", initial_states_bw)):
        if states is not None and (not isinstance(states, list) or len(states) != len(cells_fw)):
            raise ValueError(f"{name} must be a list of state tensors (one per layer).")
