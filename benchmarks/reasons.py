"""Why a case falls short of its aim: scenario → pattern of the case (as in fnmatch) → the reason.

The page of results prints it under the table. A scenario of a GPU is "layer on cuda".
"""

REASONS: dict[str, dict[str, str]] = {
    "layer": {
        "n=10 *": (
            "Half a millisecond, of which autograd's nodes for the two products are 40 µs and a gradient of B, "
            "(d, r) of r > 1, 10 µs: stored as (r, d) it would be had for less, and FSDP2 refuses such "
            "parameters. Cases near the aim change sides from run to run."
        ),
        "*r=8": (
            "Six passes over (n, d) and (n, k) for products of r=8 that BLAS runs at a third of its speed; each "
            "is formed in its fastest order. Within 2% of the aim, as the noise is."
        ),
        "*r=1": ("As for r=8: the passes over memory are what is left."),
        "*r=64": ("As for r=8: the passes over memory are what is left."),
    },
    "digits": {
        "*": (
            "The parametrization takes 2.8 of the frozen floor where the machine is quiet and up to 4.7 where its "
            "cache is shared, so no form of LoRA can be four times as fast; this one is within a tenth of the "
            "floor."
        ),
    },
    "llama": {
        "84 *": (
            "Between 1.05 and 1.10 from run to run: half of what is above the floor is LoRA's own arithmetic, 2.3% "
            "of the adapted layers' work at d=512, and AdamW's step."
        ),
        "112 *": ("With d=256 LoRA's own arithmetic is 1.5·8·(2/256) = 9% of the adapted layers' work."),
    },
    "decode": {
        "layer, *": (
            "The bare call is 5.4 µs. The two products alone are two more calls into torch, 2 µs; what else there "
            "is (which adapter acts, whether a transform, autocast or a gradient asks for another path) takes 1 "
            "µs."
        ),
    },
    "switch": {
        "1 resident, *": (
            "PEFT is at its fastest here, 0.8 ms for one adapter on 28 layers; 1.9 µs is the whole verb, with its "
            "checks."
        ),
    },
    "load": {
        "*": (
            "Reading is 25 µs for each target. Three modules and two parameters for each, found in the model, "
            "checked against the base by a fingerprint and installed, are Python and cost several times that."
        ),
    },
    "merge": {
        "*float32": (
            "The sum alone, one `addmm` with no check, takes 1.3 to 1.9 of the copy. The rest is the norm that "
            "proves the result finite, and taking the adapters off and putting them back."
        ),
        "*bfloat16": (
            "Sums are formed in 32 bits and rounded once: each weight is widened, block by block, and narrowed again."
        ),
    },
    "merge_for_good": {
        "*": ("With the report of what rounding lost, and all adapters taken off for good; see merge."),
    },
    "combine": {
        "*d=512*": (
            "Two QR decompositions and an SVD in 64 bits for each weight, 0.6 ms; in 32 bits, sums that nearly "
            "cancel would lose their digits. PEFT's SVD grows with d³, this with d: from d=1024 the aim is "
            "reached."
        ),
    },
    "optimize": {
        "*": (
            "torch asks for the gradient nine times a step, and each time 448 parameters are looked at, 35 µs, "
            "whether somebody gave one another gradient. Looking less often could train on an old one in silence."
        ),
    },
    "per_row": {
        "* 1 token, *": (
            "Each call enters its own block here: all factors are brought together anew, two copies of them, "
            "where the base does one product. From the second call in a block they are kept (1.1 to 1.4). In "
            "training, autograd hands each adapter's gradients to two tensors of their own."
        ),
    },
    "attach": {
        "*": (
            "Making the two tensors is 8 µs or, on meta, 30 µs a target. Three modules that hold them, the walk "
            "over the model and the plan are Python."
        ),
    },
    "dora": {
        "layer d=256": (
            "The norms of W + s·B·A, 2·d·k·r operations at each step whatever the rows, are 6% of so small a "
            "step, and rescaling is one more pass each way."
        ),
    },
}
