"""The protocol of TensorFlow 1's RNN cells: variables, states, and how a cell runs over a sequence.

Letters: T steps, B batch rows, I inputs, U units. A nest is a tensor or a tuple, named tuple, list or dict of
nests (``torch.utils._pytree``). The equations of all cells are those of TensorFlow 1.15.

One file, as what a cell is made of, the cell and the loop over it are used together by every cell.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter, is_lazy
from torch.utils import _pytree as pytree

from torchrnn._tools import script
from torchrnn.rnn_cell.hooks import before_sequence, is_plain, pre_hooks, why_called

Nest = Any
"""A tensor, a size, or a structure of them."""
Activation = Callable[[Tensor], Tensor]
Initializer = Callable[[Tensor], Any]
"""Fills a tensor in place, as the functions of ``torch.nn.init`` do."""


class LSTMStateTuple(NamedTuple):
    """The state of an LSTM: the memory c [B, U] first, then the output h [B, U] (or projected)."""

    c: Any
    h: Any

    @property
    def dtype(self) -> torch.dtype:
        """The common dtype of both; TypeError if they differ."""
        if self.c.dtype != self.h.dtype:
            raise TypeError(f"Inconsistent internal state: {self.c.dtype} vs {self.h.dtype}")
        dtype: torch.dtype = self.c.dtype
        return dtype


@dataclass(frozen=True)
class Run:
    """How a sequence is walked through.

    Args:
        lengths: [B] int64 in 0..T; None for all T. Steps past a row's length leave its state as it is.
        reverse: Whether to walk from the last step to the first.
        masks: Factors on the state that is carried on from each step, a nest like the state with a tensor
            [T or 1, B or 1, ...] or None for each of its tensors; None for no factors at all.
    """

    lengths: Tensor | None = None
    reverse: bool = False
    masks: Nest = None


# Activations and initializers -----------------------------------------------------------------------------


def hard_sigmoid(x: Tensor) -> Tensor:
    """Returns clip(0.2 x + 0.5, 0, 1), TensorFlow's and Keras 2's hard sigmoid."""
    return (0.2 * x + 0.5).clamp(0, 1)


def identity(x: Tensor) -> Tensor:
    """Returns x."""
    return x


def _softmax(x: Tensor) -> Tensor:
    return F.softmax(x, -1)


ACTIVATIONS: dict[str, Activation] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "linear": identity,
    "elu": F.elu,
    "selu": F.selu,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "softmax": _softmax,
    "exponential": torch.exp,
    "hard_sigmoid": hard_sigmoid,
}
"""The names that TensorFlow's cells take."""

# Callables by which users name the activations that have kernels.
_KERNEL_NAMES: dict[Any, str] = {
    torch.tanh: "tanh",
    F.tanh: "tanh",
    nn.Tanh: "tanh",
    torch.relu: "relu",
    F.relu: "relu",
    nn.ReLU: "relu",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    nn.Sigmoid: "sigmoid",
    identity: "identity",
    nn.Identity: "identity",
}


def activation_of(value: str | Activation | None, default: str = "tanh") -> Activation:
    """Returns the function of a name or a callable; None and other falsy values mean the default.

    Raises:
        ValueError: If the name is not known.
        TypeError: If it is neither a name nor callable.
    """
    if not value:
        value = default
    if isinstance(value, str):
        if value not in ACTIVATIONS:
            raise ValueError(f"Unknown activation function:{value}")
        return ACTIVATIONS[value]
    if not callable(value):
        raise TypeError(f"activation must be a name or callable, got {type(value).__name__}")
    return value


def kernel_activation(function: Activation) -> str | None:
    """Returns by which name the kernels know an activation; None if they do not."""
    if not isinstance(function, Hashable) or (isinstance(function, nn.Module) and not is_plain(function)):
        return None
    return _KERNEL_NAMES.get(function) or _KERNEL_NAMES.get(type(function))


def why_no_kernel(activation: Activation) -> str | None:
    """Returns that no kernel has an activation, for ``RNNCell.why_loop``; None if the kernels have it."""
    if kernel_activation(activation) is not None:
        return None
    hooked = "hooks on " if type(activation) in _KERNEL_NAMES else ""
    return f"no kernel has {hooked}the activation {name_of(activation)}"


def why_each_step(activation: Activation) -> str | None:
    """Returns that an activation is called for each step, which one of the user's has to be; else None."""
    if kernel_activation(activation) is not None or activation in ACTIVATIONS.values():
        return None
    return f"the activation {name_of(activation)} is called for each step"


def activate(activation: Activation, x: Tensor) -> Tensor:
    """Returns what an activation makes of the steps of x [T, B, ...], all at once where it may be."""
    if why_each_step(activation) is None:
        return activation(x)
    return torch.stack([activation(step) for step in x])


def name_of(activation: Activation) -> str:
    """Returns the name of a function, or the class of another callable."""
    name: str = getattr(activation, "__name__", type(activation).__name__)
    return name


def glorot_uniform(tensor: Tensor) -> None:
    """Fills with U(-b, b), b = sqrt(6 / (fan_in + fan_out)), fans as TensorFlow counts them.

    The last axis counts outputs and the one before it inputs, both times the product of the axes before.
    """
    shape = tensor.shape
    if len(shape) < 2:
        fans = 2 * (shape[0] if shape else 1)
    else:
        fans = math.prod(shape[:-2]) * (shape[-2] + shape[-1])
    bound = math.sqrt(6 / max(fans, 1))
    nn.init.uniform_(tensor, -bound, bound)


def zeros(tensor: Tensor) -> None:
    """Fills with 0."""
    nn.init.zeros_(tensor)


def constant(value: float) -> Initializer:
    """Returns an initializer that fills with a value."""
    return partial(nn.init.constant_, val=value)


def ignore_input_size(input_size: object) -> None:
    """Warns if the argument is there that TensorFlow has ignored since 0.12."""
    if input_size is not None:
        warnings.warn("The input_size parameter is deprecated and ignored.", stacklevel=3)


# States ---------------------------------------------------------------------------------------------------


def is_size(value: object) -> bool:
    """Whether a value of a nest of sizes is one size: an int, or a ``torch.Size`` without the batch."""
    return isinstance(value, int | torch.Size)


def shape_of(size: int | torch.Size) -> tuple[int, ...]:
    """Returns the shape of one row."""
    return (size,) if isinstance(size, int) else tuple(size)


def map_sizes(function: Callable[[Any], Any], sizes: Nest) -> Nest:
    """Maps every size of a nest."""
    return pytree.tree_map(function, sizes, is_leaf=is_size)


def cat_size(sizes: Nest) -> int:
    """Returns the sum of a nest of ints."""
    return sum(pytree.tree_leaves(sizes, is_leaf=is_size))


def lstm_size(units: int, outputs: int, as_tuple: bool) -> Nest:
    """Returns the state size of an LSTM, in a tuple or concatenated."""
    return LSTMStateTuple(units, outputs) if as_tuple else units + outputs


def split_state(state: Nest, units: int, as_tuple: bool) -> tuple[Tensor, Tensor]:
    """Returns c and h of an LSTM's state."""
    if as_tuple:
        if not isinstance(state, tuple | list) or len(state) != 2:
            raise ValueError(f"Expected state to be a tuple of length 2, but received: {describe(state)}")
        return state[0], state[1]
    if not isinstance(state, Tensor):
        raise ValueError(f"Expected state to be a tensor [c | h], but received: {describe(state)}")
    return state[..., :units], state[..., units:]


def join_state(c: Tensor, h: Tensor, as_tuple: bool) -> Nest:
    """Returns an LSTM's state in the form that ``split_state`` takes."""
    return LSTMStateTuple(c, h) if as_tuple else torch.cat([c, h], -1)


def describe(value: Nest) -> str:
    """Returns a nest with shapes in place of tensors, for error messages."""
    return str(pytree.tree_map(lambda v: list(v.shape) if isinstance(v, Tensor) else v, value))


def linear(parts: Sequence[Tensor], kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns [a, b, ...] @ kernel + bias, the parts concatenated along the last axis."""
    x = parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)
    return x @ kernel if bias is None else x @ kernel + bias


# The base class -------------------------------------------------------------------------------------------


class RNNCell(LazyModuleMixin, nn.Module):
    """The base of all cells, and of a user's own.

    A subclass defines ``state_size``, ``output_size`` and ``call(inputs, state)``, which returns
    ``(output, new_state)`` of one step. If it has variables of its own, it declares them in ``__init__`` by
    ``add_variable`` and gives their shapes in ``variable_shapes``; or it holds parameters and modules as any
    ``nn.Module``. A subclass that knows a faster way over a whole sequence than step by step overrides
    ``unroll``, ``why_loop`` and ``way``. One that overrides a part of a step and not ``unroll`` runs step by
    step, whatever way its base knows: ``__call__``, ``forward``, ``call``, ``check_inputs`` or what is
    private. (``class Sub(Base, keeps_unroll=True)`` keeps the way of its base.) So does a cell on which such
    a part has been set, and one with hooks; but forward pre-hooks that leave the inputs as they are run once,
    before the sequence, and see its first step.

    Args:
        name: The variable scope; by default the class's ``scope``.
        dtype: The dtype of the variables; by default that of the first input.
        reuse: Accepted as in TensorFlow and ignored: a cell object owns its variables.
    """

    scope = ""
    """TensorFlow's name of the variable scope of the class; empty for a cell that adds none."""

    cls_to_become = None

    __prepare_scriptable__ = script.refuse

    _zero_state_takes_device = True
    _guessed = False
    """Whether the variables are built for inputs of which only a call can say whether the cell reads them."""
    _step_parts: ClassVar[tuple[str, ...]] = ("__call__", "forward", "call", "check_inputs")
    """The parts of a step that ``unroll`` does without, besides private ones."""
    _unroll: ClassVar[_Unroll]
    """What a class that defines ``unroll`` notes of it."""
    _unrolls: ClassVar[tuple[_Unroll, ...]] = ()
    """That of the class and of its bases, from the nearest on."""

    def __init_subclass__(cls, *, keeps_unroll: bool = False, **kwargs: Any) -> None:
        """Notes which ``unroll`` the class has, and of which steps.

        Args:
            keeps_unroll: Whether the inherited ``unroll`` does what steps of this class do, whatever it
                overrides.
            **kwargs: For other bases.
        """
        super().__init_subclass__(**kwargs)
        # TensorFlow's signature has no device, and a user's cell may keep to it.
        cls._zero_state_takes_device = "device" in inspect.signature(cls.zero_state).parameters
        owner = next(base for base in cls.__mro__ if "unroll" in vars(base))
        if owner is cls or keeps_unroll or not issubclass(owner, RNNCell):
            function = cls._unrolls[0].function if keeps_unroll else cls.unroll
            parts = {name: getattr(cls, name) for name in cls._names_of_parts()}
            cls._unroll = _Unroll(cls, function, parts)
            cls.unroll = _entrance(cls._unroll)  # type: ignore[method-assign]
        cls._unrolls = tuple(vars(base)["_unroll"] for base in cls.__mro__ if "_unroll" in vars(base))

    @classmethod
    def _names_of_parts(cls) -> Iterator[str]:
        """Yields the names of the methods and properties that a step of the class may be made of."""
        yield from cls._step_parts
        for base in cls.__mro__[: cls.__mro__.index(RNNCell)]:
            for name, value in vars(base).items():
                is_private = name.startswith("_") and not name.startswith("__")
                if is_private and isinstance(value, FunctionType | property):
                    yield name

    @classmethod
    def _first_defined(cls, *names: str) -> str:
        """Returns which of the methods the class has from the nearest base; of one base, the first."""
        return next(name for base in cls.__mro__ for name in names if name in vars(base))

    def __init__(
        self, *, name: str | None = None, dtype: torch.dtype | None = None, reuse: bool | None = None
    ) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Lazy modules are a new feature", UserWarning)
            super().__init__()
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"RNN cell only supports floating point variables, but saw dtype: {dtype}")
        self.name = self.scope if name is None else name
        self._dtype = dtype
        self._variables: dict[str, tuple[str, Initializer]] = {}

    # To be defined by a cell ------------------------------------------------------------------------------

    @property
    def state_size(self) -> Nest:
        """The sizes of the state without the batch, by default ``num_units``: ints and ``torch.Size``."""
        return self._units("state_size")

    @property
    def output_size(self) -> Nest:
        """The sizes of the output without the batch, likewise."""
        return self._units("output_size")

    def _units(self, name: str) -> int:
        units: int | None = self.__dict__.get("num_units")
        if units is None:
            raise NotImplementedError(f"{type(self).__name__} must define {name}")
        return units

    def call(self, inputs: Nest, state: Nest) -> tuple[Nest, Nest]:
        """Returns ``(output, new_state)`` of one step: inputs [B, I], the state as ``state_size``."""
        raise NotImplementedError(f"{type(self).__name__} must define call(inputs, state)")

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes of the cell's own variables, by TensorFlow's names, for I inputs."""
        return {}

    def inner_cells(self) -> Sequence[tuple[str, nn.Module]]:
        """Returns the cells inside this one, each after the scope it stands in ("" or "cell_0/", say)."""
        return []

    # Variables --------------------------------------------------------------------------------------------

    def add_variable(self, name: str, initializer: Initializer | None = None) -> None:
        """Declares a variable by TensorFlow's name below the cell's scope ("gates/kernel", say).

        It becomes the parameter of that name with _ for / and gets its value when the cell is built. By
        default biases are zeros and everything else glorot_uniform.
        """
        if initializer is None:
            initializer = zeros if name.rpartition("/")[2] in ("bias", "biases") else glorot_uniform
        attribute = name.replace("/", "_")
        self._variables[attribute] = (name, initializer)
        # torch declares its class without arguments, and not as a Parameter.
        make: Any = UninitializedParameter
        with torch.inference_mode(
            False
        ):  # Made in inference mode, it could not be trained, nor be filled here.
            self.register_parameter(attribute, make(dtype=self._dtype))

    @property
    def built(self) -> bool:
        """Whether the cell's own variables have values."""
        # As is_lazy, which torch.compile cannot trace.
        return not any(isinstance(p, UninitializedParameter) for p in self._parameters.values())

    def build(
        self,
        input_size: int | Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Creates the variables, for inputs [B, I], of this cell and of the cells inside; once.

        Args:
            input_size: I, or a shape that ends with it.
            dtype: Of the variables; by default the cell's ``dtype``, else torch's default.
            device: Of the variables; by default torch's default, or where ``to`` has put them.
        """
        self.build_inner(input_size, dtype, device)
        size: int = pytree.tree_leaves(map_sizes(lambda each: shape_of(each)[-1], input_size))[-1]
        self.build_own(size, dtype, device)

    def build_for(self, inputs: Nest, dtype: torch.dtype | None = None) -> None:
        """Builds the cell for inputs [..., I], or checks that it was built for such.

        Args:
            inputs: The inputs of one step or more.
            dtype: Of the variables, unless the cell has one: that of the state; by default of the inputs.
        """
        size = self.input_size_of(inputs)
        dtype = dtype or float_dtype(inputs)
        device = pytree.tree_leaves(inputs)[0].device
        # These first: what they put out may depend on what they read.
        self.build_inner(inputs, dtype, device)
        self.build_own(size, dtype, device)

    def input_size_of(self, inputs: Nest) -> int:
        """Returns I, by which ``variable_shapes`` goes; ValueError if the cell cannot read the inputs."""
        first = pytree.tree_leaves(inputs)[0]
        if not first.is_floating_point():
            raise ValueError(f"RNN cell only supports floating point inputs, but saw dtype: {first.dtype}")
        size: int = first.size(-1)
        return size

    def build_own(self, size: int, dtype: torch.dtype | None, device: Any) -> None:
        """Creates the cell's own variables, or checks that those there have the shapes."""
        if size < 0:
            raise ValueError(f"{self.name}: input_size must be at least 0, got {size}")
        for name, shape in self.variable_shapes(size).items():
            attribute = name.replace("/", "_")
            # A parametrization keeps what it makes the variable of elsewhere; that is built.
            parameter: Any = self._parameters.get(attribute)
            if parameter is None:
                continue
            is_new = isinstance(parameter, UninitializedParameter)
            if is_new or (self._guessed and tuple(parameter.shape) != shape):
                chosen = self._dtype or dtype or torch.get_default_dtype()
                # A first call in inference mode must not make parameters that cannot be trained.
                with torch.inference_mode(False), torch.no_grad():
                    if is_new:
                        parameter.materialize(shape, device=device, dtype=chosen)
                    else:
                        parameter.data = parameter.new_empty(shape)
                    self._variables[attribute][1](parameter)
            elif tuple(parameter.shape) != shape:
                raise ValueError(
                    f"{self.name}: inputs of size {size} need {name} {list(shape)}, "
                    f"but it was built as {list(parameter.shape)}"
                )

    def build_inner(self, inputs: Nest, dtype: torch.dtype | None, device: Any) -> None:
        """Builds the cells inside, which by default read what the cell does: tensors, or their size."""
        for _, cell in self.inner_cells():
            build_cell(cell, inputs, dtype, device)

    def initialize_parameters(self, inputs: Nest, state: Nest = None, *_: Any, **__: Any) -> None:
        """Builds the cell for its first input; called by torch before the first ``forward``."""
        self.check_inputs(inputs)
        self.build_for(inputs, float_dtype(state))
        self._guessed = False

    @property
    def trainable_weights(self) -> list[nn.Parameter]:
        """The parameters that are trained, those of the cells inside too; none before the cell is built."""
        return [p for p in self.parameters() if p.requires_grad and not is_lazy(p)]

    def tf_names(self, repeats: bool = False) -> Iterator[tuple[str, nn.Module, str]]:
        """Yields TensorFlow's name, the owner and the attribute of every variable.

        The names start with the scope of this cell, as below the scope of an unrolling function.

        Args:
            repeats: Whether a cell that is in several places has its variables in each; else in the first.
        """
        yield from _tf_names(self, "", None if repeats else set())

    # States -----------------------------------------------------------------------------------------------

    def zero_state(
        self,
        batch_size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Nest:
        """Returns a state of zeros with B rows, and starts a new sequence."""
        self.start_sequence()
        return map_sizes(
            lambda size: torch.zeros(batch_size, *shape_of(size), dtype=dtype, device=device), self.state_size
        )

    def get_initial_state(
        self,
        inputs: Tensor | None = None,
        batch_size: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Nest:
        """Returns ``zero_state`` for inputs [B, ...], or for a batch size and a dtype."""
        device = None
        if inputs is not None:
            if batch_size is not None and batch_size != inputs.size(0):
                raise ValueError(
                    f"batch size from input tensor is different from the input param. "
                    f"Input tensor batch: {inputs.size(0)}, batch_size: {batch_size}"
                )
            batch_size, device = inputs.size(0), inputs.device
            dtype = inputs.dtype if dtype is None else dtype
        if batch_size is None or dtype is None:
            raise ValueError(
                f"batch_size and dtype cannot be None while constructing initial state: "
                f"batch_size={batch_size}, dtype={dtype}"
            )
        return self.zero_state(batch_size, dtype, device)

    def start_sequence(self) -> None:
        """Tells the cells inside that a new sequence begins, for which masks are drawn anew."""
        for _, cell in self.inner_cells():
            if isinstance(cell, RNNCell):
                cell.start_sequence()

    # Running ----------------------------------------------------------------------------------------------

    def forward(self, inputs: Nest, state: Nest, scope: object = None) -> tuple[Nest, Nest]:
        """Runs one step; returns ``(output, new_state)``. ``scope`` is accepted and ignored."""
        self.check_inputs(inputs)
        if self._variables:  # Built by now; but for inputs of this size? Cells inside look for themselves.
            self.build_own(self.input_size_of(inputs), float_dtype(state), None)
        return self.call(inputs, state)

    def check_inputs(self, inputs: Nest) -> None:
        """Raises ValueError unless the inputs are [B, I] of a floating dtype; for one step."""
        if not isinstance(inputs, Tensor):
            raise TypeError(f"{self.name}: inputs must be a tensor, got {type(inputs).__name__}")
        if not inputs.is_floating_point():
            raise ValueError(f"RNN cell only supports floating point inputs, but saw dtype: {inputs.dtype}")
        if inputs.dim() != 2:
            raise ValueError(
                f"Input 0 of layer {self.name} is incompatible with the layer: expected ndim=2, "
                f"found ndim={inputs.dim()}. Full shape received: {list(inputs.shape)}"
            )

    def unroll(self, inputs: Nest, state: Nest, run: Run) -> tuple[Nest, Nest]:
        """Runs a sequence, inputs [T, B, ...]; returns ``(outputs [T, B, ...], final state)``.

        The cell is built. Outputs past a row's length are not defined; what is there of the inputs is
        finite. By default the generic loop, and also where that of a subclass does something else than the
        cell at each step.
        """
        return loop(self, inputs, state, run)

    def why_loop(self) -> str | None:
        """Returns why the class's ``unroll`` cannot run a sequence; None if it can."""
        return None if self._unrolls else "the class has no faster way"

    def way(self) -> str:
        """Returns how the class's ``unroll`` runs a sequence where ``why_loop`` is None."""
        return "in its own way over the whole sequence"

    def paths(self) -> Iterator[tuple[int, str]]:
        """Yields depth and text of the lines of ``explain``: how ``unroll`` runs this cell, and why."""
        unroll, why = self._find_unroll()
        if unroll is None:
            yield 0, f"{self.describe()}: generic loop, step by step; {why or self.why_loop()}"
            return
        nearest = unroll is self._unrolls[0]
        texts = [self.way() if nearest else unroll.owner.way(self), why]
        if pre_hooks(self):
            texts.append("forward pre-hooks once before it, or step by step if they change the inputs")
        yield 0, f"{self.describe()}: {'; '.join(filter(None, texts))}"
        if nearest:
            for _, cell in self.inner_cells():
                yield from nested(cell)

    def _find_unroll(self) -> tuple[_Unroll | None, str | None]:
        """Returns the nearest ``unroll`` that does what the cell does at each step, and why not a nearer one.

        It is None if there is none but the generic loop.
        """
        why = why_called(self)
        if why is None:
            for unroll in self._unrolls:
                reason = unroll.why_not(self)
                if reason is None:
                    return unroll, why
                why = why or reason
        return None, why

    def _enter(self, inputs: Nest, state: Nest, run: Run) -> tuple[Nest, Nest]:
        """Runs a sequence as ``_find_unroll`` says."""
        unroll, _ = self._find_unroll()
        if unroll is None:
            return loop(self, inputs, state, run)
        if pre_hooks(self):
            first = pytree.tree_map(lambda v: v[-1 if run.reverse else 0], inputs)
            step = before_sequence(self, first, state)
            if step is not None:
                return loop(step, inputs, state, run)
        return unroll.function(self, inputs, state, run)

    def describe(self) -> str:
        """Returns the class with its size."""
        units = getattr(self, "num_units", None)
        return type(self).__name__ if units is None else f"{type(self).__name__}({units})"

    def extra_repr(self) -> str:
        """Returns the size."""
        units = getattr(self, "num_units", None)
        return "" if units is None else str(units)


@dataclass(frozen=True)
class _Unroll:
    """How a class runs a sequence, in place of steps that are made of certain parts."""

    owner: type[RNNCell]
    function: Callable[..., tuple[Nest, Nest]]
    parts: Mapping[str, Any]

    def why_not(self, cell: RNNCell) -> str | None:
        """Returns why it cannot run a sequence of a cell; None if it can."""
        nearest = cell._unrolls[0] is self
        stated = cell.why_loop() if nearest else self.owner.why_loop(cell)
        if nearest and stated and cell._first_defined("unroll", "why_loop") == "why_loop":
            return stated  # In the words of a subclass, which knows best.
        return self._change(cell) or stated

    def _change(self, cell: RNNCell) -> str | None:
        """Returns which part of a step is another one in a cell; None if none is."""
        cls, own = type(cell), vars(cell)
        for name, part in self.parts.items():
            if name in own:
                return f"the cell has its own {name}"
            if getattr(cls, name) is not part:
                owner = next(base for base in cls.__mro__ if name in vars(base))
                if owner is not nn.Module:  # Whose __call__ torch.export replaces while it traces.
                    return f"{owner.__name__} overrides {name}"
        return None


def _entrance(unroll: _Unroll) -> Callable[..., tuple[Nest, Nest]]:
    """Returns the method of a class by which a sequence gets to the ``unroll`` that is right for the cell."""

    @functools.wraps(unroll.function)
    def entrance(self: RNNCell, inputs: Nest, state: Nest, run: Run) -> tuple[Nest, Nest]:
        if self._unrolls[0] is unroll:
            return self._enter(inputs, state, run)
        return unroll.function(self, inputs, state, run)  # By super() of a nearer one.

    return entrance


def nested(cell: nn.Module) -> Iterator[tuple[int, str]]:
    """Yields a cell's ``paths`` one level deeper."""
    if isinstance(cell, RNNCell):
        for depth, text in cell.paths():
            yield depth + 1, text
    else:
        yield 1, f"{type(cell).__name__}: generic loop, step by step; it is no torchrnn.rnn_cell.RNNCell"


def _tf_names(cell: nn.Module, prefix: str, seen: set[int] | None) -> Iterator[tuple[str, nn.Module, str]]:
    if not isinstance(cell, RNNCell):
        return
    if seen is not None:
        if id(cell) in seen:
            return
        seen.add(id(cell))
    scope = f"{prefix}{cell.name}/" if cell.name else prefix
    for attribute, (name, _) in cell._variables.items():
        if getattr(cell, attribute, None) is not None:
            yield scope + name, cell, attribute
    for inner, child in cell.inner_cells():
        yield from _tf_names(child, scope + inner, seen)


def build_cell(cell: nn.Module, inputs: Nest, dtype: torch.dtype | None, device: Any) -> None:
    """Builds a cell for tensors, or for sizes of one row; a user's own may do without."""
    if not isinstance(cell, RNNCell):
        return
    refused: tuple[type[Exception], ...] = ()
    if type(cell).__call__ is not nn.Module.__call__:
        # What it hands on to the cell's own call may be anything, and then that call builds the cell.
        if cell.built:
            return
        cell._guessed, refused = True, (TypeError, ValueError)
    with contextlib.suppress(*refused):
        if isinstance(pytree.tree_leaves(inputs, is_leaf=is_size)[0], Tensor):
            cell.build_for(inputs, dtype)
        else:
            cell.build(inputs, dtype, device)


def float_dtype(*nests: Nest) -> torch.dtype | None:
    """Returns the dtype of the first floating tensor; None if there is none."""
    leaves = pytree.tree_leaves(nests)
    return next((v.dtype for v in leaves if isinstance(v, Tensor) and v.is_floating_point()), None)


def zero_state_of(
    cell: Any, batch_size: int, dtype: torch.dtype | None, device: torch.device | str | None
) -> Nest:
    """Returns the state that a cell starts from: by its ``get_initial_state``, or else ``zero_state``."""
    initial = getattr(cell, "get_initial_state", None)
    if initial is not None and getattr(initial, "__func__", None) is not RNNCell.get_initial_state:
        state = initial(inputs=None, batch_size=batch_size, dtype=dtype)
    elif isinstance(cell, RNNCell) and cell._zero_state_takes_device and "zero_state" not in vars(cell):
        return cell.zero_state(batch_size, dtype, device)
    else:
        state = cell.zero_state(batch_size, dtype)
    return to_device(state, device)


def to_device(nest: Nest, device: torch.device | str | None) -> Nest:
    """Returns a nest with its tensors on a device; as it is for None."""
    return pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) and device else v, nest)


def empty_outputs(cell: Any, inputs: Nest, state: Nest) -> Nest:
    """Returns the outputs [0, B, ...] of no steps, of the dtype of the state."""
    first = pytree.tree_leaves(inputs)[0]
    dtype = float_dtype(state, inputs)
    return map_sizes(lambda s: first.new_zeros(0, first.size(1), *shape_of(s), dtype=dtype), cell.output_size)


def is_cell(cell: object) -> bool:
    """Whether an object is a cell to the unrolling functions, which go by what it has."""
    return (
        callable(cell)
        and hasattr(cell, "output_size")
        and hasattr(cell, "state_size")
        and (hasattr(cell, "zero_state") or hasattr(cell, "get_initial_state"))
    )


def assert_cell(cell: object, argument: str = "cell") -> None:
    """Raises TypeError unless an object is a cell."""
    if not is_cell(cell):
        raise TypeError(
            f"The argument {argument!r} ({cell!r}) is not an RNNCell: it must be callable and have "
            f"output_size, state_size, and zero_state or get_initial_state"
        )


# The generic loop -----------------------------------------------------------------------------------------


def alive_mask(lengths: Tensor, steps: int) -> Tensor:
    """Returns [T, B] bool: which steps count."""
    return torch.arange(steps, device=lengths.device)[:, None] < lengths


def select(alive: Tensor, new: Nest, old: Nest) -> Nest:
    """Returns new where a row [B] is alive, else old; both nests of [B, ...], or old 0."""

    def one(n: Tensor, o: Any) -> Tensor:
        mask = alive.view(-1, *[1] * (n.dim() - 1))
        return torch.where(mask, n, o)

    if isinstance(old, int):
        return pytree.tree_map(lambda n: one(n, old), new)
    leaves, spec = pytree.tree_flatten(new)
    return pytree.tree_unflatten(map(one, leaves, pytree.tree_leaves(old)), spec)


def drop_state(state: Nest, masks: Nest, t: int) -> Nest:
    """Returns a state times its masks of step t; masks as in ``Run``."""
    if masks is None:
        return state
    leaves, spec = pytree.tree_flatten(state)
    factors = pytree.tree_leaves(masks, is_leaf=lambda v: v is None)
    return pytree.tree_unflatten(
        [s if m is None else s * m[t if m.size(0) > 1 else 0] for s, m in zip(leaves, factors, strict=True)],
        spec,
    )


def loop(cell: Any, inputs: Nest, state: Nest, run: Run) -> tuple[Nest, Nest]:
    """Calls a cell step by step; see ``RNNCell.unroll``. Outputs past a row's length are zeros."""
    steps = pytree.tree_leaves(inputs)[0].size(0)
    alive, last = None, steps
    if run.lengths is not None:
        alive = alive_mask(run.lengths, steps)
        # On an accelerator the host would wait for the lengths.
        known = run.lengths.device.type == "cpu" and not torch.compiler.is_compiling()
        if known and run.lengths.numel():
            last = min(steps, max(1, int(run.lengths.max())))
    outputs: list[list[Tensor]] = []
    spec = None
    for t in range(last - 1, -1, -1) if run.reverse else range(last):
        output, new = cell(pytree.tree_map(lambda v, t=t: v[t], inputs), state)
        new = drop_state(new, run.masks, t)
        if alive is not None:
            output, new = select(alive[t], output, 0), select(alive[t], new, state)
        state = new
        leaves, spec = pytree.tree_flatten(output)
        outputs.append(leaves)
    if spec is None:
        return empty_outputs(cell, inputs, state), state
    if run.reverse:
        outputs.reverse()
    stacked = []
    for each in zip(*outputs, strict=True):
        y = torch.stack(each)
        stacked.append(y if last == steps else torch.cat([y, y.new_zeros(steps - last, *y.shape[1:])]))
    return pytree.tree_unflatten(stacked, spec), state
