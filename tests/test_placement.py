"""How a weight is seen as a matrix without its layer: as the live layer sees it, for every kind and variant."""

import pytest
import torch
from helpers import attach
from kinds import over_cases, over_pairs

import lorakit as lk
from lorakit.layers import TransposedConvolution, outline
from lorakit.state import sites
from lorakit.values.placement import kind_of, matrix_of


def adapted(case, variant):
    """An adapter as a value, and of each of its weights the kind and the base."""
    model, inputs = case.build()
    attach(model, case, variant, inputs)
    kinds = {site.name: (site.layer, site.adapted["default"].kind) for site in sites(model)}
    return lk.adapter_value(model), {name: (kind, outline(layer, kind)) for name, (layer, kind) in kinds.items()}


@over_pairs
def test_a_weight_is_seen_as_its_layer_sees_it(case, variant):
    adapter, kinds = adapted(case, variant)
    for weight in adapter.weights:
        kind, W = kinds[weight.name]
        if isinstance(weight.variant, lk.Full | lk.Rows) and isinstance(kind, TransposedConvolution):
            continue  # its groups are not in the file, and nothing depends on them
        assert torch.equal(matrix_of(weight, W), kind.matrix_of(W))
        assert kind_of(weight, tuple(W.shape)).padding_idx == kind.padding_idx


@over_cases
def test_without_a_word_on_the_kind_the_shapes_tell(case):
    adapter, kinds = adapted(case, lk.LoRA(rank=2))
    for weight in adapter.weights:
        kind, W = kinds[weight.name]
        if weight.entry.slices or weight.lookup or W.shape[0] == W.shape[-1]:
            continue
        weight = weight._replace(entry=weight.entry._replace(kind=None))
        assert torch.equal(matrix_of(weight, W), kind.matrix_of(W))


def test_what_fits_no_view_is_an_error_with_all_shapes(base):
    lk.attach(base, lk.LoRA(rank=2))
    (weight, *_) = lk.adapter_value(base).weights
    for shape in ((3, 5), (), (0, 4), (7,), (2, 3, 4), (2**40, 3, 1)):
        with pytest.raises(lk.LorakitError, match="fit no weight of shape"):
            kind_of(weight, shape)
    strange = weight._replace(entry=weight.entry._replace(kind="Nonsense"))
    with pytest.raises(lk.LorakitError, match="Nonsense"):
        kind_of(strange, weight.entry.shape)
    for padding in (10**6, -(10**6), True):
        padded = weight._replace(entry=weight.entry._replace(kind="Embedding", padding_idx=padding))
        with pytest.raises(lk.LorakitError, match="padding_idx"):
            kind_of(padded, weight.entry.shape)
