"""TensorFlow 1's variables by their names: into and out of the cells of ``torchrnn.rnn_cell``.

The cells keep TensorFlow's layout, so numbers go over as they are. What goes for one cell also goes for a
pair ``(cell_fw, cell_bw)``, whose variables stand below fw/ and bw/, and for a stack of bidirectional layers:
a list of such pairs, or a tuple of the two lists that ``stack_bidirectional_dynamic_rnn`` takes, below
cell_0/bidirectional_rnn/fw/ and so on.

Over 400 lines because the names of all versions are read side by side.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter, is_lazy
from torch.nn.utils.parametrize import is_parametrized

from torchrnn.interop.arrays import as_array, as_tensor
from torchrnn.rnn_cell.base import RNNCell
from torchrnn.rnn_cell.fused import FusedRNNCell

_RENAMED = {
    # 1.0 and 1.1
    "weights": "kernel",
    "biases": "bias",
    "recurrent_weights": "recurrent_kernel",
    "nas_rnn": "nas_cell",
    # To 1.7
    "lstm_block_wrapper": "lstm_fused_cell",
    "GRUBlockCell": "gru_cell",
    "GRUBlockCellV2": "gru_cell",
    # GRUBlockCell, whose variables are those of the others by other names
    "w_ru": "gates/kernel",
    "b_ru": "gates/bias",
    "w_c": "candidate/kernel",
    "b_c": "candidate/bias",
    # 0.x
    "Linear": "",
    "Matrix": "kernel",
    "Bias": "bias",
    "W_0": "kernel",
    "B": "bias",
    "W_I_diag": "w_i_diag",
    "W_F_diag": "w_f_diag",
    "W_O_diag": "w_o_diag",
    "W_P_0": "projection/kernel",
    "Gates": "gates",
    "Candidate": "candidate",
    "Attention": "attention",
    "AttnW": "attn_w",
    "AttnV": "attn_v",
    "AttnOutputProjection": "attn_output_projection",
    "LayerNormBasicLSTMCell/linear/weights": "layer_norm_basic_lstm_cell/kernel",
    "LayerNormBasicLSTMCell/linear/b": "layer_norm_basic_lstm_cell/bias",
    "LSTMBlockFusedCell": "lstm_fused_cell",
    "LSTMBlockCell/W": "lstm_cell/kernel",
    "LSTMBlockCell/b": "lstm_cell/bias",
    "LSTMBlockCell/wci": "lstm_cell/w_i_diag",
    "LSTMBlockCell/wcf": "lstm_cell/w_f_diag",
    "LSTMBlockCell/wco": "lstm_cell/w_o_diag",
    "RNN": "rnn",
    "BiRNN": "bidirectional_rnn",
    "StackRNN": "stack_bidirectional_rnn",
    "FW": "fw",
    "BW": "bw",
}
"""Parts of names in old checkpoints -> those of today."""

_OLD_PARTS = re.compile(rf"(?<![^/])({'|'.join(sorted(_RENAMED, key=len, reverse=True))})(?![^/])")


_Cell = RNNCell | FusedRNNCell


class _Variable(NamedTuple):
    """Where a variable is."""

    name: str
    cell: _Cell
    """The one of those given that it is in."""
    owner: RNNCell
    attribute: str

    @property
    def parameter(self) -> Any:
        return getattr(self.owner, self.attribute)

    @property
    def own_name(self) -> str:
        """The name below the owner's scope."""
        return self.owner._variables[self.attribute][0]

    @property
    def is_made(self) -> bool:
        """Whether it is made from other parameters: pruned, normalised or parametrized."""
        return self.attribute not in self.owner._parameters


def load_tf_variables(cell: Any, variables: Mapping[str, Any]) -> None:
    """Sets all variables of a cell, a pair of cells or a stack of pairs from those of a TensorFlow model.

    Names are those below the cell's scope (lstm_cell/kernel), with or without ``:0``, all below any one
    scope that they have in common, or none (rnn/, model/rnn/, bidirectional_rnn/fw/ for one cell). Former
    names do too: of 1.0, weights, biases and nas_rnn; to 1.7, lstm_block_wrapper and GRUBlockCell; of 0.x,
    RNN/BasicLSTMCell/Linear/Matrix and Bias, LSTMCell/W_0, B, W_F_diag and W_P_0, MultiRNNCell/Cell0,
    GRUCell/Gates/Linear/Matrix, BiRNN/FW. The rows of a matrix may be in several shards, W_0, W_1 and so on,
    or weights/part_0 and so on. In a stack bidirectional_rnn/ may be left out, as the function on lists does.
    A cell that is there twice has its variables once, where it first comes. Keep out what is no variable of
    the cell: the slots of optimizers.

    A cell that is not built yet is built, for the input size and with the dtype of the arrays; the values for
    a built one are cast to its dtype.

    Args:
        cell: An ``RNNCell`` or ``FusedRNNCell``; ``(cell_fw, cell_bw)``; or a stack, ``[(cell_fw, cell_bw),
            ...]`` or ``([cell_fw, ...], [cell_bw, ...])``.
        variables: Name -> array or tensor.

    Raises:
        ValueError: If a variable is missing or is not one of the cell, has another shape or is not floating,
            or if the names fit below more than one scope; or if one of the cell is pruned, normalised or
            parametrized. Nothing is changed then.
        TypeError: If ``cell`` or ``variables`` is something else.
    """
    if not isinstance(variables, Mapping):
        raise TypeError(f"variables must map names to arrays, got {type(variables).__name__}")
    places = list(_variables(cell))
    targets = _once(places)
    for target in targets:
        if target.is_made:
            raise ValueError(f"{target.name}: is made from other parameters, remove what makes it first")
    variables = _whole(variables, targets)
    keys = _match(targets, places, variables)
    loads = [(t, as_tensor(variables[key], key)) for t in targets if (key := keys.get(t.name)) is not None]
    sizes = _check_shapes(loads)
    lazy = [(target, value) for target, value in loads if is_lazy(target.parameter)]
    before = [(target.parameter, target.parameter.data) for target, _ in lazy]
    try:
        for target, value in lazy:
            target.parameter.materialize(value.shape, dtype=target.owner._dtype or value.dtype)
        for each, candidates in sizes.items():
            _check_fit(each, candidates)
    except ValueError:
        for parameter, data in before:
            parameter.data, parameter.__class__ = data, UninitializedParameter
        raise
    with torch.no_grad():
        for target, value in loads:
            target.parameter.copy_(value)


def tf_variables(cell: Any, scope: str = "") -> dict[str, Any]:
    """Returns copies of all variables by their names since TensorFlow 1.2, as NumPy arrays.

    Args:
        cell: As for ``load_tf_variables``.
        scope: What stands before the names: "rnn" as of ``dynamic_rnn``, "bidirectional_rnn" or
            "stack_bidirectional_rnn"; "" for nothing.

    Raises:
        ValueError: If the cell is not built; or if a variable is made at each run, as by pruning.
        TypeError: If ``cell`` is something else.
    """
    return {name: as_array(variable.parameter) for name, variable in _built(cell, scope)}


def tf_gradients(cell: Any, scope: str = "") -> dict[str, Any]:
    """Returns copies of the gradients of all variables that have one, as NumPy arrays.

    Names, arguments and errors are those of ``tf_variables``; a variable whose ``grad`` is None is left out.
    One that is parametrized has none, which is an error.
    """
    found = _built(cell, scope)
    for name, variable in found:
        if variable.is_made:
            raise ValueError(f"{name}: has no gradient, as it is parametrized")
    grads = {name: variable.parameter.grad for name, variable in found}
    return {name: as_array(grad) for name, grad in grads.items() if grad is not None}


# Finding variables ----------------------------------------------------------------------------------------


def _built(cell: Any, scope: str) -> list[tuple[str, _Variable]]:
    """Returns the variables by name, all with a value."""
    prefix = scope.rstrip("/") + "/" if scope else ""
    found = [(prefix + variable.name, variable) for variable in _once(_variables(cell))]
    for name, variable in found:
        if is_lazy(variable.parameter):
            raise ValueError(f"{name}: has no value yet, call build or run the cell first")
        if variable.is_made and not is_parametrized(variable.owner, variable.attribute):
            raise ValueError(f"{name}: is made at each run, by a forward pre-hook: remove that first")
    return found


def _variables(cells: Any) -> Iterator[_Variable]:
    """Yields the variables of a cell, a pair or a stack, in each place where their cell is."""
    for scope, cell in _cells(cells):
        for name, owner, attribute in cell.tf_names(repeats=True):
            assert isinstance(owner, RNNCell)
            yield _Variable(scope + name, cell, owner, attribute)


def _once(variables: Iterable[_Variable]) -> list[_Variable]:
    """Returns each variable where it first comes."""
    first: dict[tuple[RNNCell, str], _Variable] = {}
    for variable in variables:
        first.setdefault((variable.owner, variable.attribute), variable)
    return list(first.values())


def _cells(cells: Any) -> Iterator[tuple[str, _Cell]]:
    """Yields the cells of what the functions take, each after its scope."""
    if isinstance(cells, _Cell):
        yield "", cells
    elif _is_pair(cells):
        yield from zip(("fw/", "bw/"), cells, strict=True)
    else:
        by_direction = isinstance(cells, tuple) and [type(each) for each in cells] == [list, list]
        layers = list(zip(*cells, strict=True)) if by_direction else cells
        if not isinstance(layers, list | tuple) or not layers or not all(map(_is_pair, layers)):
            raise TypeError(
                f"cell must be an RNNCell, a pair (cell_fw, cell_bw) or a list of such pairs, got {cells!r}"
            )
        for i, layer in enumerate(layers):
            yield f"cell_{i}/bidirectional_rnn/fw/", layer[0]
            yield f"cell_{i}/bidirectional_rnn/bw/", layer[1]


def _is_pair(value: Any) -> bool:
    """Whether a value is two cells."""
    is_two = isinstance(value, list | tuple) and len(value) == 2
    return is_two and all(isinstance(cell, _Cell) for cell in value)


# Matching names -------------------------------------------------------------------------------------------


def _modern(name: str) -> str:
    """Returns what names of one variable in all versions have in common, near to that of today."""
    parts = _OLD_PARTS.sub(lambda old: _RENAMED[old[0]], _bare(name)).split("/")
    parts = [_snake(part) if part.endswith(("Cell", "Wrapper")) else part for part in parts if part]
    name = re.sub(r"(?<![^/])Cell(\d+)(?=/)", r"cell_\1", "/".join(parts))
    name = re.sub(r"(?<![^/])Layer(\d+)(?=/(bidirectional_rnn/)?[fb]w/)", r"cell_\1", name)
    # The list version of the stack has no such scope.
    name = re.sub(r"(?<![^/])(cell_\d+/)bidirectional_rnn/(?=[fb]w/)", r"\1", name)
    # Until 1.1 the cell inside stood beside these wrappers.
    wrapper = "(input_projection|output_projection|embedding)_wrapper"
    return re.sub(rf"(?<![^/]){wrapper}/(?!(kernel|bias|embedding)$)", "", name)


def _bare(name: str) -> str:
    """Returns a name without the number of the op's output."""
    return re.sub(r":\d+$", "", name)


def _snake(name: str) -> str:
    """Turns BasicLSTMCell into basic_lstm_cell."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _whole(given: Mapping[str, Any], targets: Sequence[_Variable]) -> dict[str, Any]:
    """Returns what is given with the shards of matrices put together."""
    own = {target.own_name for target in targets}
    shards: dict[str, dict[int, str]] = {}
    for name in given:
        bare = _bare(name)
        if part := re.fullmatch(r"(.*)/part_(\d+)", bare):  # Of 1.0 and later
            shards.setdefault(part[1], {})[int(part[2])] = name
        elif (
            part := re.fullmatch(r"((?:.*/)?(W(?:_P|_[ft]_\d+)?_))(\d+)", bare)
        ) and f"{part[2]}1" not in own:
            shards.setdefault(f"{part[1]}0", {})[int(part[3])] = name
    whole = dict(given)
    for matrix, names in shards.items():
        order = [names.get(k, "") for k in range(len(names))]
        if [_bare(name) for name in order] == [matrix] or "" in order:
            continue
        rows = [as_tensor(whole.pop(name), name) for name in order]
        if len({each.shape[1:] for each in rows}) > 1:
            shapes = ", ".join(str(list(each.shape)) for each in rows)
            raise ValueError(f"{matrix}: shards must have one number of columns, got {shapes}")
        whole[matrix] = torch.cat(rows)
    return whole


def _match(
    targets: Sequence[_Variable], places: Sequence[_Variable], given: Mapping[str, Any]
) -> dict[str, str]:
    """Returns which of the given names stands for each variable."""
    # A user's own cell may have both a bias and biases, say.
    rename = _modern if len({_modern(target.name) for target in targets}) == len(targets) else _bare
    wanted = {rename(target.name): target for target in targets}
    found: dict[str, str] = {}
    for name in given:
        other = found.setdefault(rename(name), name)
        if other != name:
            raise ValueError(f"{other} and {name} are names of the same variable")
    scopes = Counter(
        key[: len(key) - len(name)]
        for key in found
        for name in wanted
        if key == name or key.endswith(f"/{name}")
    )
    complete = [scope for scope, count in scopes.items() if count == len(wanted)]
    if len(complete) > 1:
        raise ValueError(f"the variables fit below more than one scope: {', '.join(complete)}")
    scope = max(scopes, key=scopes.__getitem__, default="")
    below = {scope + key for key in wanted}
    surplus = [name for key, name in found.items() if key not in below]
    largest = max((n for value in given.values() for n in getattr(value, "shape", ())), default=0)
    missing = [
        scope + target.name
        for key, target in wanted.items()
        if scope + key not in found and not _may_be_absent(target, largest)
    ]
    if missing or surplus:
        texts = (
            f"missing: {', '.join(missing)}" if missing else "",
            f"not of this cell: {', '.join(surplus)}" if surplus else "",
            _shared(places, [p for p in places if scope + rename(p.name) in found.keys() - below]),
        )
        raise ValueError(f"variables {'; '.join(filter(None, texts))}")
    return {target.name: found[scope + key] for key, target in wanted.items() if scope + key in found}


def _shared(places: Sequence[_Variable], again: Sequence[_Variable]) -> str:
    """Returns what to do about variables for places of a cell after its first one."""
    if not again:
        return ""
    owner, attribute = again[0].owner, again[0].attribute
    count = sum(place.owner is owner and place.attribute == attribute for place in places)
    name = type(owner).__name__
    return (
        f"the same {name} object is in {count} places, and has one set of variables: "
        f"build separate cells, [{name}(...) for _ in range({count})]"
    )


# Checking shapes ------------------------------------------------------------------------------------------


def _check_shapes(loads: list[tuple[_Variable, Tensor]]) -> dict[_Cell, list[int]]:
    """Raises for values whose shapes are not those of the variables.

    Returns:
        For each cell that has to be built, the input sizes of the cells in it, in their order.
    """
    owners: dict[RNNCell, list[tuple[_Variable, Tensor]]] = {}
    for target, value in loads:
        owners.setdefault(target.owner, []).append((target, value))
    sizes: dict[_Cell, list[int]] = {}
    for owner, own in owners.items():
        needed: Mapping[str, tuple[int, ...]] = {}
        if not owner.built:
            given = {target.attribute: tuple(value.shape) for target, value in own}
            size, needed = _input_size(owner, given)
            if needed != _shapes(owner, size + 1):
                sizes.setdefault(own[0][0].cell, []).append(size)
        for target, value in own:
            given_shape = tuple(value.shape)
            lazy = is_lazy(target.parameter)
            shape = needed.get(target.attribute, given_shape) if lazy else tuple(target.parameter.shape)
            if given_shape != shape:
                raise ValueError(f"{target.name}: must have shape {list(shape)}, got {list(given_shape)}")
    return sizes


def _input_size(
    owner: RNNCell, given: Mapping[str, tuple[int, ...]]
) -> tuple[int, Mapping[str, tuple[int, ...]]]:
    """Returns the input size that fits the given shapes best, and the shapes that it needs."""

    def fit(size: int) -> tuple[bool, int]:
        shapes = _shapes(owner, size)
        pairs = [zip(shape, shapes.get(name, ()), strict=False) for name, shape in given.items()]
        return shapes.keys() == given.keys(), sum(a == b for pair in pairs for a, b in pair)

    size = max(range(max((n for shape in given.values() for n in shape), default=0) + 1), key=fit)
    return size, _shapes(owner, size)


def _may_be_absent(target: _Variable, largest: int) -> bool:
    """Whether a cell that is not built does without a variable for some size of its inputs."""
    if not is_lazy(target.parameter):
        return False
    shapes = (_shapes(target.owner, size) for size in range(largest + 1))
    return any(each and target.attribute not in each for each in shapes)


def _shapes(owner: RNNCell, size: int) -> Mapping[str, tuple[int, ...]]:
    """Returns ``variable_shapes`` by attribute, nothing for a size that the cell cannot have."""
    try:
        return {name.replace("/", "_"): shape for name, shape in owner.variable_shapes(size).items()}
    except ValueError:
        return {}


def _check_fit(cell: _Cell, sizes: Sequence[int]) -> None:
    """Raises if a cell cannot be built as its variables are: if one does not fit the output of another.

    The size of the cell's own input is that of the first cell in it with an input; or, if a wrapper in which
    it stands changes it, of a later one.
    """
    errors = []
    for size in dict.fromkeys(sizes):
        try:
            cell.build(size)
        except ValueError as error:
            errors.append(error)
        else:
            return
    raise ValueError(f"the variables do not fit each other: {errors[0]}") from errors[0]
