"""Plans compute every token once, in an order that can be run."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepshot.scoring.forward import lay_out
from keepshot.scoring.prefix import ROOT, Limits, Trie, build_trie, common_length, plan

sequences_of_tokens = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=14).map(tuple), min_size=1, max_size=25
)
limits_of_any_kind = st.builds(
    Limits,
    batch=st.integers(1, 40),
    row=st.integers(1, 20),
    fill=st.integers(1, 20),
    overhead=st.integers(0, 6),
    packed=st.booleans(),
)


def tokens_above(trie: Trie, node: int) -> tuple[int, ...]:
    return tuple(token for number in trie.path(node) for token in trie.nodes[number].tokens)


@given(sequences_of_tokens)
def test_trie_holds_each_beginning_once(sequences: list[tuple[int, ...]]) -> None:
    trie = build_trie(sequences)
    assert [tokens_above(trie, end) for end in trie.end_nodes] == sequences
    beginnings = {tokens[:length] for tokens in sequences for length in range(1, len(tokens) + 1)}
    assert trie.num_tokens == len(beginnings)
    assert sum(len(node.tokens) for node in trie.nodes) == len(beginnings)


@given(sequences_of_tokens, limits_of_any_kind)
@settings(max_examples=300)
def test_every_token_sees_its_own_path_and_nothing_else(
    sequences: list[tuple[int, ...]], limits: Limits
) -> None:
    trie = build_trie(sequences)
    found = plan(trie, limits)
    kept = {ROOT}
    computed: set[int] = set()
    for forward in found.forwards:
        assert forward.past in kept, "a cache is kept before it is used"
        before = tokens_above(trie, forward.past)
        layout = lay_out(trie, forward.rows)
        for r, row in enumerate(forward.rows):
            for number, column in zip(row.nodes, layout.places[r], strict=True):
                node = trie.nodes[number]
                last = column + len(node.tokens) - 1
                seen = [int(i) for i in layout.ids[r][layout.visible[r, last]]]
                assert (*before, *seen) == tokens_above(trie, number)
                assert layout.depths[r, last] == node.end - 1
                computed.add(number)
            if forward.keep:
                kept.update(group[-1] for group in row.groups())
    assert computed == set(range(1, len(trie.nodes)))
    assert found.tokens_naive == sum(map(len, sequences))
    assert trie.num_tokens <= found.tokens_prefilled <= found.tokens_padded
    if not limits.packed:
        assert found.tokens_prefilled == found.tokens_padded


def test_plan_of_shared_demonstrations_is_near_the_least_possible() -> None:
    generator = random.Random(0)
    demonstrations = tuple(generator.randrange(50) for _ in range(200))
    sequences = [
        (*demonstrations, *(generator.randrange(50) for _ in range(generator.randrange(4, 14))))
        for _ in range(300)
    ]
    trie = build_trie(sequences)
    found = plan(trie, Limits(batch=1024))
    assert found.tokens_naive > 20 * found.tokens_prefilled
    assert found.tokens_prefilled <= 1.02 * trie.num_tokens
    assert found.tokens_padded <= 1.10 * trie.num_tokens
    assert len(found.forwards) == 1 + -(-(trie.num_tokens - 200) // 1024)


def test_one_long_sequence_is_one_pass() -> None:
    found = plan(build_trie([tuple(range(5000))]), Limits(batch=64))
    assert [len(forward.rows) for forward in found.forwards] == [1]
    assert found.tokens_padded == 5000


def test_deeply_nested_sequences_do_not_recurse() -> None:
    found = plan(build_trie([tuple(range(n)) for n in range(1, 3000)]), Limits(batch=64))
    assert found.tokens_prefilled < 1.1 * 3000


@pytest.mark.parametrize(("left", "right", "length"), [((), (1,), 0), ((1, 2, 3), (1, 2, 4), 2)])
def test_common_length(left: tuple[int, ...], right: tuple[int, ...], length: int) -> None:
    assert common_length(left, right) == length
    assert common_length(left, left) == len(left)
