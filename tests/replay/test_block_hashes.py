from itertools import takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.errors import InputError
from replay.block_hashes import at_block_size, chain

tokens = st.lists(st.integers(0, 2), max_size=40)
block_sizes = st.integers(1, 8)


def common_prefix(left, right):
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


@given(tokens, tokens, tokens, block_sizes)
def test_block_hashes_are_equal_exactly_where_prefixes_are(shared, left, right, size):
    left, right = shared + left, shared + right
    blocks = common_prefix(left, right) // size
    ours, theirs = chain(left, size), chain(right, size)
    assert common_prefix(ours, theirs) == blocks
    assert not set(ours[blocks:]) & set(theirs[blocks:])


@given(tokens, block_sizes)
def test_only_full_blocks_are_hashed_and_no_hash_is_negative(prompt, size):
    hashes = chain(prompt, size)
    assert len(hashes) == len(prompt) // size
    assert len(set(hashes)) == len(hashes)
    assert all(0 <= one < 2**63 for one in hashes)


def test_same_tokens_elsewhere_in_the_prompt_hash_differently():
    first, second = chain([1, 2, 1, 2], 2)
    assert first != second


@given(tokens, tokens, tokens, block_sizes, st.integers(1, 4))
def test_conversion_between_sizes_keeps_which_prefixes_are_shared(shared, left, right, size, factor):
    left, right = chain(shared + left, size), chain(shared + right, size)
    for have, want in ((size, size * factor), (size * factor, size)):
        ours, theirs = at_block_size(left, have, want), at_block_size(right, have, want)
        shared_tokens = common_prefix(left, right) * have
        assert common_prefix(ours, theirs) == shared_tokens // want
        assert len(ours) == len(left) * have // want
        assert len(set(ours)) == len(ours)
        assert all(0 <= one < 2**63 for one in ours)


@given(tokens, block_sizes)
def test_the_size_that_is_there_needs_no_conversion(prompt, size):
    assert at_block_size(chain(prompt, size), size, size) == chain(prompt, size)


def test_sizes_that_do_not_divide_each_other_are_refused():
    with pytest.raises(InputError, match=r"blocks of 16 tokens, which neither divide nor are divided by 24"):
        at_block_size([1, 2], 16, 24)
