"""The example of `lorakit svd`: a 10×10 matrix of rank 2 is two thin matrices, and a layer cannot tell."""

import torch
import typer
from torch import Tensor

from lorakit.algebra import Spectrum, decompose


def show_example(seed: int = 0) -> Spectrum:
    """Print the example, and hand back the spectrum of its W. The global random state is not touched."""
    random = torch.Generator().manual_seed(seed)
    W = torch.randn(10, 2, generator=random) @ torch.randn(2, 10, generator=random)
    b, x = torch.randn(10, generator=random), torch.randn(10, generator=random)
    spectrum = Spectrum.of(W)
    rank = spectrum.numerical_rank()
    B, A, _, values = decompose(W, rank)
    root = values[:rank].sqrt()

    heading("1. A weight")
    typer.echo(f"This W has 10 rows (outputs) and 10 columns (inputs), {W.numel()} numbers:\n\n{matrix(W)}\n")

    heading("2. Its rank")
    typer.echo(
        "W was made as a product, 10×2 times 2×10. So all its rows are mixtures of the same\n"
        "two, though it does not look it. The singular values show it. There is one for each\n"
        "direction of W, the largest first:\n\n"
        f"  {'  '.join(map(number, values.tolist()))}\n\n"
        f"All but {rank} are rounding: the numerical rank of W is {rank}.\n"
    )

    heading("3. Its decomposition")
    typer.echo(
        "The singular value decomposition is W = U·diag(σ)·Vᵀ. Where σ is zero, a column of U\n"
        f"and a row of Vᵀ add nothing, so {rank} of each are all that W needs:\n\n"
        f"U, 10×{rank}\n{matrix(B / root)}\n\nσ\n{matrix(values[None, :rank])}\n\n"
        f"Vᵀ, {rank}×10\n{matrix(A / root[:, None])}\n\n"
        "Give √σ to each side: W is the product of two thin matrices, B = U·√σ and A = √σ·Vᵀ.\n\n"
        f"B, 10×{rank}\n{matrix(B)}\n\nA, {rank}×10\n{matrix(A)}\n\n"
        f"‖W − B·A‖ is {float(torch.linalg.norm(W - B @ A)):.0e}, mere rounding.\n"
    )

    heading("4. The same layer")
    y, thin = W @ x + b, B @ (A @ x) + b
    typer.echo(
        "A linear layer is y = W·x + b. With B·A for W its output is the same, here for a\n"
        f"random x and b:\n\n  {'W·x + b':>9}  {'B·(A·x) + b':>11}"
    )
    for left, right in zip(y.tolist(), thin.tolist(), strict=True):
        typer.echo(f"  {left:9.4f}  {right:11.4f}")
    typer.echo(f"\nThe largest difference is {float((y - thin).abs().max()):.0e}.\n")

    heading("5. What it saves")
    typer.echo(
        f"W holds 10·10 = {W.numel()} numbers; B and A hold 10·{rank} + {rank}·10 = {B.numel() + A.numel()}.\n"
        "The saving grows with the size: 4096×4096 is 16,777,216 numbers; at rank 8, B and A\n"
        "hold 65,536, or 0.4 %.\n\n"
        "LoRA leaves the weights of a model as they are, and learns what to add to them as\n"
        "such a product: W' = W + s·B·A, where only B and A are trained.\n\n"
        "Next, the ranks of weights you have: lorakit svd model.safetensors"
    )
    return spectrum


def heading(text: str) -> None:
    """A bold line on a terminal, a plain one elsewhere."""
    typer.secho(f"{text}\n", bold=True)


def matrix(M: Tensor) -> str:
    """One line for each row; M: (d, k)."""
    return "\n".join("  " + " ".join(f"{entry:6.2f}" for entry in row) for row in M.tolist())


def number(value: float) -> str:
    """Two decimals, or, where they would be 0.00, the size: 4e-07."""
    return f"{value:.2f}" if value >= 0.005 else f"{value:.0e}"
