"""A random order of any number of rows without a table: a keyed permutation of range(n) with random access.

A Feistel network over Z_a x Z_b (a = ceil(sqrt n), b = ceil(n / a)): an index is a pair (left, right), and each round
adds a keyed hash of one half to the other half, modulo that half's size. Every round can be undone, so the network is a
bijection of range(a * b); at most a - 1 of these numbers are >= n, and an index that lands there is sent through again
until it does not (cycle walking), which keeps it a bijection of range(n). Near-square factors in place of powers of two
make that rare: at most one index in sqrt(n), where a network over whole bits would repeat up to half of them.

All integers are 64 bits wide and wrap around; the hashes are multiply-xorshift mixers with SplitMix64's finalizer
(Steele, Lea, Flood 2014). None of this is for secrecy.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 6
LARGEST = 1 << 62  # a size up to this keeps both halves within 32 bits

_WORD = (1 << 64) - 1
_START = 0x243F6A8885A308D3  # first digits of pi: no hidden choice
_SPREAD = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64
_HALF = np.uint64(32)
_ROUND_KEYS = tuple(np.uint64((r + 1) * _SPREAD & _WORD) for r in range(ROUNDS))


def hash_key(*values: int) -> int:
    """Integers, in this order -> one 64-bit key, the same on every machine and Python version.

    For (seed, stream, domain, epoch, ...). Values are taken modulo 2**64.
    """
    state = np.asarray([_START], np.uint64)
    for value in values:
        state = extend_key(state, np.asarray([value & _WORD], np.uint64))
    return int(state[0])


def extend_key(key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """[n] or [1] uint64 keys and values -> [n] uint64: hash_key(*before, value) where key is hash_key(*before)."""
    word = key * np.uint64(_SPREAD) + value + np.uint64(1)
    word ^= word >> np.uint64(30)
    word *= np.uint64(_MIX_1)
    word ^= word >> np.uint64(27)
    word *= np.uint64(_MIX_2)
    word ^= word >> np.uint64(31)
    return word


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a random permutation of range(size) sends each index.

    Args:
        index: [n] integers in 0..size-1, any order, repeats allowed.
        size: 1..2**62.
        key: another key gives another permutation; taken modulo 2**64.

    Returns:
        [n] int64 in 0..size-1. Over all indices it is a bijection.

    Raises:
        ValueError: size or an index is out of range.
    """
    if not 1 <= size <= LARGEST:
        raise ValueError(f"size must be in 1..2**62, found {size}")
    index = np.asarray(index)
    if index.size and (index.min() < 0 or index.max() >= size):
        raise ValueError(f"index must be in 0..{size - 1}, found {index.min()}..{index.max()}")
    keys = np.full(index.shape, key & _WORD, np.uint64)
    return permute_each(index, np.full(index.shape, size, np.int64), keys)


def permute_each(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """`permute` with a size and a key of its own for every index, unchecked.

    [n] int64 index and size, [n] uint64 key -> [n] int64 with 0 <= result < size.
    """
    width = size.astype(np.uint64)
    result = _network(index.astype(np.uint64), width, key)
    outside = np.flatnonzero(result >= width)
    while outside.size:
        result[outside] = _network(result[outside], width[outside], key[outside])
        outside = outside[result[outside] >= width[outside]]
    return result.astype(np.int64)


def shuffled_indices(count: int, key: int) -> np.ndarray:
    """[count] int64: a random order of range(count), by sorting hashes; faster than `permute` for small counts."""
    words = extend_key(np.asarray([key & _WORD], np.uint64), np.arange(count, dtype=np.uint64))
    return np.argsort(words, kind="stable")


def _network(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """All rounds of the Feistel network once: [n] uint64 in 0..a*b-1 -> the same range."""
    rows = np.ceil(np.sqrt(size)).astype(np.uint64)  # a
    columns = (size + rows - np.uint64(1)) // rows  # b
    left = index // columns
    right = index - left * columns
    for number, round_key in enumerate(_ROUND_KEYS):
        keyed = key + round_key
        if number % 2 == 0:
            left = _add_hash(left, right, keyed, rows)
        else:
            right = _add_hash(right, left, keyed, columns)
    return left * columns + right


def _add_hash(half: np.ndarray, other: np.ndarray, key: np.ndarray, modulus: np.ndarray) -> np.ndarray:
    """(half + hash(other, key)) mod modulus."""
    word = other + key
    word *= np.uint64(_MIX_1)
    word ^= word >> _HALF
    word *= np.uint64(_MIX_2)
    word >>= _HALF
    word *= modulus  # a number below modulus, from the upper half of a 64-bit product: no division
    word >>= _HALF
    word += half
    return np.minimum(word, word - modulus)  # word - modulus wraps to a huge number where word < modulus
