"""Matrix products of row groups with one weight a group: the experts' matmul.

Rows lie sorted by group and padded to whole blocks, so that no block crosses a group (the layout of
DeepGEMM's contiguous grouped GEMM). Knows nothing about routing.

X rows (a multiple of the block), D contracted, F columns, E groups.
"""

import jax

from pallas_kernels.grouped_matmul import reference, xla


def grouped_matmul(
    x_XD: jax.Array,
    w_EDF: jax.Array,
    tile_expert: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies each block of rows with the weight of its group.

    Args:
        x_XD: rows, X = number of tiles * block. Padding rows inside a tile must be zero for the
            weight gradient to be exact.
        w_EDF: one weight a group, of the same dtype.
        tile_expert: int32 [X / block]; group of each tile. Used tiles come first; E or more marks
            an unused one, whose rows come out zero.
        implementation: "xla" (a loop over the used tiles, for CPU), "reference", or None, which
            takes the best one known for the backend.

    Returns:
        [X, F] in the dtype of `x_XD`, accumulated in float32.

    Raises:
        ValueError: if the tiles do not divide the rows, the shapes do not go together, or the
            implementation is unknown.
    """
    (rows, width), (tiles,) = x_XD.shape, tile_expert.shape
    if tiles == 0 or rows % tiles:
        raise ValueError(f"{rows} rows do not divide into {tiles} tiles")
    if w_EDF.ndim != 3 or w_EDF.shape[1] != width:
        raise ValueError(f"rows of width {width} against weights of shape {w_EDF.shape}")
    match implementation:
        case "xla" | None:
            return xla.grouped_matmul(x_XD, w_EDF, tile_expert)
        case "reference":
            return reference.grouped_matmul(x_XD, w_EDF, tile_expert)
    raise ValueError(f"unknown implementation {implementation!r}; known: xla, reference")
