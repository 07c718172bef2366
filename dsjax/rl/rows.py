"""Sequences to packed rows and back, by best fit; what is known of each token goes with it.

Knows nothing about rewards or models. A sequence is a prompt and its completion without the last
token, whose only use is as a target: so it has the positions that a layer has seen while sampling.

N sequences of at most Y tokens, B rows of T positions, G new tokens at most, L layers, K experts.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from dsjax.rl.grpo import ROUTING


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Prompts with their completions, as arrays of one shape each.

    Attributes:
        tokens_NY: int32, prompt and completion.
        prompt_N: int32 tokens of each prompt.
        count_N: int32 tokens of each completion; 0 for a sequence to leave out.
        routing: {stack: uint16 [N, Y, L, K]}, or empty.
    """

    tokens_NY: np.ndarray
    prompt_N: np.ndarray
    count_N: np.ndarray
    routing: Mapping[str, np.ndarray]

    @property
    def inputs_N(self) -> np.ndarray:
        """Positions of each in a row."""
        return np.where(self.count_N > 0, self.prompt_N + self.count_N - 1, 0)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a sequence lies: its row, first position, and number in the row from 1."""

    row: int
    start: int
    segment: int


def place(lengths: Sequence[int], row_length: int) -> dict[int, Place]:
    """Puts sequences into rows, the longest first, each where it leaves the least room.

    Args:
        lengths: of the sequences; those of 0 get no place.
        row_length: T.

    Raises:
        ValueError: for one that is longer than a row.
    """
    left: list[int] = []
    held: list[int] = []
    found: dict[int, Place] = {}
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        length = int(lengths[number])
        if length > row_length:
            raise ValueError(f"a sequence of {length} positions; a row has {row_length}")
        if length == 0:
            break
        fits = [row for row, room in enumerate(left) if room >= length]
        if not fits:
            fits = [len(left)]
            left.append(row_length)
            held.append(0)
        row = min(fits, key=lambda row: (left[row], row))
        held[row] += 1
        found[number] = Place(row, row_length - left[row], held[row])
        left[row] -= length
    return found


def pack(
    sequences: Sequences,
    places: Mapping[int, Place],
    *,
    row_length: int,
    rows: int,
    of_completions: Mapping[str, np.ndarray],
    of_sequences: Mapping[str, np.ndarray],
    pad_id: int,
) -> dict[str, np.ndarray]:
    """The rows of some sequences.

    Args:
        sequences: of which those with a place are taken.
        places: where they lie.
        row_length: T.
        rows: B, filled up with empty ones.
        of_completions: [N, G] numbers of new tokens; each lies where its token is the target.
        of_sequences: [N] numbers, which every new token of a sequence gets.
        pad_id: fills rows up.

    Returns:
        `tokens_BT targets_BT segments_BT positions_BT` int32, `mask_BT` bool, whether the target is
        a new token, what was given as `<name>_BT` float32, and `routing/<stack>` [B, T, L, K].
    """
    shape = rows, row_length
    batch = {
        "tokens_BT": np.full(shape, pad_id, np.int32),
        "targets_BT": np.full(shape, pad_id, np.int32),
        "segments_BT": np.zeros(shape, np.int32),
        "positions_BT": np.zeros(shape, np.int32),
        "mask_BT": np.zeros(shape, bool),
    }
    batch |= {
        f"{name}_BT": np.zeros(shape, np.float32) for name in (*of_completions, *of_sequences)
    }
    for stack, kept in sequences.routing.items():
        batch[ROUTING + stack] = np.zeros((*shape, *kept.shape[2:]), kept.dtype)
    inputs_N = sequences.inputs_N
    for n, at in places.items():
        length, prompt, count = (
            int(x[n]) for x in (inputs_N, sequences.prompt_N, sequences.count_N)
        )
        here = at.row, slice(at.start, at.start + length)
        new = at.row, slice(at.start + prompt - 1, at.start + length)
        tokens = sequences.tokens_NY[n]
        batch["tokens_BT"][here] = tokens[:length]
        batch["targets_BT"][here] = tokens[1 : length + 1]
        batch["segments_BT"][here] = at.segment
        batch["positions_BT"][here] = np.arange(length)
        batch["mask_BT"][new] = True
        for name, value in of_completions.items():
            batch[f"{name}_BT"][new] = value[n, :count]
        for name, value in of_sequences.items():
            batch[f"{name}_BT"][new] = value[n]
        for stack, kept in sequences.routing.items():
            batch[ROUTING + stack][here] = kept[n, :length]
    return batch


def unpack(
    value_BT: np.ndarray, sequences: Sequences, places: Mapping[int, Place], width: int
) -> np.ndarray:
    """Numbers of targets [B, T] to those of new tokens [N, G], G = width; 0 where there is none."""
    found_NG = np.zeros((len(sequences.count_N), width), value_BT.dtype)
    for n, at in places.items():
        prompt, count = int(sequences.prompt_N[n]), int(sequences.count_N[n])
        first = at.start + prompt - 1
        found_NG[n, :count] = value_BT[at.row, first : first + count]
    return found_NG
