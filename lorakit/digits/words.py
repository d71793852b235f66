"""Numbers and proofs in words, for the terminal and the page."""

PROOFS = {
    "frozen_weights_unchanged": "every frozen tensor is bit-equal to its copy from before",
    "enabled_weight_is_w_plus_s_ba": "enabled in the weight, each weight reads as W + s·B·A; disabled, as W to the bit",
    "beside_and_in_weight_agree": "beside the call and in the weight give the same predictions",
    "disabled_is_the_base_bit_for_bit": "disabled, the outputs are bit-equal to the base's",
    "merged_agrees": "merged into the weights, the predictions are the same",
    "saved_and_loaded_bit_equal": "saved, then loaded onto the base read from disk, the outputs are bit-equal",
}
"""What each proof of the results says."""


def duration(seconds: float) -> str:
    """Seconds for a person: 1.2 µs."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
