"""One flat tensor for an optimizer, in the place of hundreds of small ones.

An optimizer's step over many small tensors is mostly the cost of calling it for each. Here all trained tensors of an
adapter become views of one buffer, which the optimizer is given instead; the gradients are views of a second one, into
which `backward()` accumulates. The layers keep their very same parameters.
"""

from collections.abc import Iterator
from operator import attrgetter, is_, methodcaller
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.state import KEY, State, require, sites

_ALIGNMENT = 256
"""Bytes. A tensor that torch allocates begins at such an address too: kernels then compute the same bits."""

Held = tuple[dict[str, Any], str, nn.Parameter]
"""A parameter, with the mapping of its module that holds it, and its name there."""

_requires_grad, _grad, _data_ptr = attrgetter("requires_grad"), attrgetter("grad"), methodcaller("data_ptr")


def flat_parameter(model: nn.Module, name: str | None = None) -> "FlatParameter":
    """Lay all trainable tensors of an adapter side by side in one buffer, and return that as one parameter.

    The tensors stay what they are: the same `nn.Parameter` objects on the same layers, with the same names, shapes and
    values, saved and loaded as before; they are views of the buffer now. Give an optimizer the flat parameter alone:

        flat = flat_parameter(model)
        optimizer = torch.optim.AdamW([flat], lr=1e-3, fused=True)

    and train as always: `zero_grad()` of the optimizer or the model, gradient accumulation, `GradScaler`,
    `clip_grad_norm_([flat], 1.0)` and checkpoints of the model and the optimizer work as with any parameter.

    It is for optimizers that treat each number by itself (SGD, Adam, AdamW, RMSprop, Adagrad), with one learning rate
    for all. One that looks at the shape of a tensor or its norm (Adafactor, Muon, LAMB) would see a single vector.
    A tensor that gets no gradient in a `backward()` that reaches others counts as having a gradient of zero, where an
    optimizer of separate tensors would leave it out: momentum and weight decay go on for it.

    Args:
        model: the model that was given to `attach`, on its device and in its dtype.
        name: the adapter; by default all.

    Raises:
        LorakitError: nothing is trainable, or the tensors differ in dtype or device, or are shards. Later, from the
            flat parameter's gradient, that is at the next step: what it was made of has changed. Tensors were moved
            (`.to()`), replaced, frozen or removed: make a new flat parameter and a new optimizer.
    """
    root, state = require(model, None if name is None else [name])
    held = list(_held(root, name))
    trained = [parameter for _, _, parameter in held]
    if not trained:
        raise LorakitError("there is nothing to train: no tensor of the adapter requires a gradient; use set_trainable")
    odd = {type(p).__name__ for p in trained if type(p) is not nn.Parameter or p.is_meta}
    if odd:
        raise LorakitError(f"tensors on 'meta' or of type {', '.join(odd)} cannot be views of one buffer")
    makes = {f"{p.dtype} on {p.device}" for p in trained}
    if len(makes) > 1:
        raise LorakitError(
            f"the trained tensors are {', '.join(sorted(makes))}: one buffer has one dtype and device; make one for "
            "each adapter, with name=..., or convert them first"
        )
    names = list(state.variants) if name is None else [name]
    return FlatParameter._of(held, root, {each: state.weights[each] for each in names})


def _held(root: nn.Module, name: str | None) -> Iterator[Held]:
    """Every trainable tensor once."""
    seen = set()
    for site in sites(root, name):
        for each in site.adapted if name is None else [name]:
            for module in site.adapted[each].modules():
                for key, parameter in module._parameters.items():
                    if parameter is not None and parameter.requires_grad and id(parameter) not in seen:
                        seen.add(id(parameter))
                        yield module._parameters, key, parameter


class FlatParameter(nn.Parameter):
    """The buffer that `flat_parameter` makes. Its `grad` is the buffer of all gradients, or None if there is none."""

    _parts: list[nn.Parameter]
    _owners: list[dict[str, Any]]
    _keys: list[str]
    _pointers: list[int]
    _begin: int
    _gradient: Tensor
    _views: list[Tensor]
    _empty: int
    """The gradient's version since which nothing was accumulated."""
    _seen: tuple[int, int]
    """The versions of both buffers at which the parts were last looked at."""
    _root: nn.Module
    _weights: dict[str, Any]

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def _of(cls, held: list[Held], root: nn.Module, weights: dict[str, Any]) -> "FlatParameter":
        parts = [parameter for _, _, parameter in held]
        first = parts[0]
        step = max(1, _ALIGNMENT // first.element_size())
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + -(-part.numel() // step) * step)
        total = starts.pop()
        buffer, gradient = first.new_zeros(total), first.new_zeros(total)  # what fills up stays zero
        self = cls(buffer)
        self._parts, self._owners, self._keys = parts, [owner for owner, _, _ in held], [key for _, key, _ in held]
        self._gradient, self._root, self._weights = gradient, root, weights
        self._views, self._seen = [], (-1, -1)
        for part, start in zip(parts, starts, strict=True):
            stride = torch.empty_like(part, device="meta").stride()  # its own, unless parts of it overlap
            data, view = (each.as_strided(part.shape, stride, start) for each in (buffer, gradient))
            data.copy_(part)
            if part.grad is not None:
                view.copy_(part.grad)
            part.data = data
            part.grad = view
            self._views.append(view)
        self._pointers = list(map(_data_ptr, parts))
        self._begin = self.data_ptr()
        self._empty = -1 if gradient.any() else gradient._version
        return self

    @property
    def grad(self) -> Tensor | None:
        """All gradients, of which that of each layer's parameter is a view; None since they were last cleared."""
        # Versions count every change of a tensor, through any of its views: a step, a backward, a clearing.
        now = self._version, self._gradient._version
        if now != self._seen:
            self._check()
            self._seen = now
        if not self._all_views():
            self._gather()
        return None if self._gradient._version == self._empty else self._gradient

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if not self._all_views():
            for part, view in zip(self._parts, self._views, strict=True):
                part.grad = view
        if value is None:
            self._clear()
        elif value is not self._gradient:
            self._gradient.copy_(value)

    def _all_views(self) -> bool:
        """Whether the gradients of all parts are in the buffer. Runs several times a step: one pass, and no Python."""
        return all(map(is_, map(_grad, self._parts), self._views))

    def _clear(self) -> None:
        self._gradient.zero_()
        self._empty = self._gradient._version
        self._seen = -1, -1

    @torch.no_grad()
    def _gather(self) -> None:
        """Take up gradients that are not in the buffer: `model.zero_grad()` forgets those that are."""
        self._check()
        lost = all(part.grad is None for part in self._parts)
        for part, view in zip(self._parts, self._views, strict=True):
            if part.grad is None:
                view.zero_()
            elif part.grad is not view:
                view.copy_(part.grad)
            part.grad = view
        if lost:
            self._clear()

    def _check(self) -> None:
        """Whether the layers' tensors are still those that this is made of.

        Raises:
            LorakitError: they are not; what an optimizer would do here would not reach the model.
        """
        state = vars(self._root).get(KEY)
        found = state.weights if isinstance(state, State) else {}
        if any(found.get(name) is not weights for name, weights in self._weights.items()):
            why = "an adapter was removed, or is put aside inside merged(...)"
        elif not all(map(is_, map(dict.get, self._owners, self._keys), self._parts)):
            why = "a tensor of the adapter was replaced (by load_state_dict(assign=True) or fully_shard, say)"
        elif not all(map(_requires_grad, self._parts)):
            why = "a tensor of the adapter was frozen (set_trainable)"
        elif list(map(_data_ptr, self._parts)) != self._pointers or self.data_ptr() != self._begin:
            why = "a tensor of the adapter was moved (by .to(), or into another flat parameter)"
        else:
            return
        raise LorakitError(f"{why}: the model no longer trains in this buffer; make a new flat_parameter and optimizer")

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise LorakitError("a flat parameter belongs to one model: copy the model, and make one for the copy")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise LorakitError("a flat parameter is not saved: save the model and optimizer.state_dict()")
