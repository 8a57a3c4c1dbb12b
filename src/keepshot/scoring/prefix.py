"""Token trie of all requests -> plan of forward passes. Pure; no torch, no model.

Requests that begin alike share the path from the root of a trie, so that each shared segment
(demonstrations, a passage, a question shared by its answers) is computed once. A plan is a list of
forward passes. Each starts from the cached path of one node and computes rows of packed subtrees:

    cache:  demonstrations           row 0:  question 1 . answer a . answer b . question 2 ...
                                     row 1:  question 7 . answer a . ...

Within a row a token may attend to the cache and to its own ancestors only.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

Tokens = tuple[int, ...]
Group = tuple[int, ...]
"""Nodes that belong together in a row, each after its parent."""
_Unit = tuple[tuple[int, ...], int]
"""A node whose subtree is to be placed, after the uncached nodes that lead to it."""
ROOT = 0
MOST_REPEATED = 0.05
"""Share of a subtree's tokens that may be computed twice to have smaller pieces to pack."""

WIDTH_OF_TWO = 2000
"""Width of a row whose tokens cost twice as much as they would alone: they attend to each other."""


@dataclass
class Node:
    """A run of tokens without a branch; `start` is the depth of its first token."""

    tokens: Tokens
    start: int
    parent: int
    children: list[int] = field(default_factory=list[int])
    ends: list[int] = field(default_factory=list[int])
    """Numbers of the sequences that end with this node's last token."""
    subtree_size: int = 0
    """Tokens in this node and all below it."""

    @property
    def end(self) -> int:
        """Depth just after the last token."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Trie:
    """All sequences, each token of a shared beginning held once; `nodes[ROOT]` is empty."""

    nodes: tuple[Node, ...]
    end_nodes: tuple[int, ...]
    """For each sequence, the node it ends with."""

    @property
    def num_tokens(self) -> int:
        """Tokens that have to be computed at least."""
        return self.nodes[ROOT].subtree_size

    def path(self, node: int) -> list[int]:
        """Return the nodes from below the root down to `node`."""
        path: list[int] = []
        while node != ROOT:
            path.append(node)
            node = self.nodes[node].parent
        return path[::-1]


@dataclass(frozen=True)
class Row:
    """Nodes laid end to end; `parents[i]` is the place of node i's parent, -1 for the cache."""

    nodes: tuple[int, ...]
    parents: tuple[int, ...]
    length: int

    def groups(self) -> list[Group]:
        """Return the runs of nodes that hang on the cache, each from where it does."""
        starts = [place for place, parent in enumerate(self.parents) if parent < 0]
        stops = [*starts[1:], len(self.nodes)]
        return [self.nodes[start:stop] for start, stop in zip(starts, stops, strict=True)]


@dataclass(frozen=True)
class Forward:
    """One forward pass: `rows` on top of the cached path of node `past`.

    If `keep`, each group of each row is a path without branches, and its cache is wanted by later
    passes under the name of its last node.
    """

    past: int
    rows: tuple[Row, ...]
    keep: bool


@dataclass(frozen=True)
class Limits:
    """What shapes a plan; all in tokens.

    Args:
        batch: a forward pass holds at most so many, unless one sequence alone is longer.
        row: a subtree of at most so many is packed into one row as it is.
        fill: rows are filled up to this width, or to that of the widest subtree.
        overhead: what one more forward pass costs; shorter segments are rather computed twice.
        packed: whether rows may hold branches (else: one path a row, all rows of equal length).
    """

    batch: int
    row: int = 192
    fill: int = 64
    overhead: int = 24
    packed: bool = True


@dataclass(frozen=True)
class Plan:
    """The forward passes in order, and what they save."""

    forwards: tuple[Forward, ...]
    tokens_prefilled: int
    """Tokens that will be computed, padding left out."""
    tokens_padded: int
    """The same with padding."""
    tokens_naive: int
    """Tokens of all sequences, each computed on its own."""


def build_trie(sequences: Sequence[Tokens]) -> Trie:
    """Return the trie of `sequences`, which must not be empty; equal ones end in one node."""
    nodes = [Node((), 0, -1)]
    open_path = [ROOT]
    previous: Tokens = ()
    for number in sorted(range(len(sequences)), key=sequences.__getitem__):
        tokens = sequences[number]
        assert tokens, "a sequence needs at least one token"
        shared = common_length(previous, tokens)
        while nodes[open_path[-1]].start >= shared and open_path[-1] != ROOT:
            open_path.pop()
        top = open_path[-1]
        if shared < nodes[top].end:
            _split(nodes, top, shared - nodes[top].start)
        if shared < len(tokens):
            nodes.append(Node(tokens[shared:], shared, top))
            nodes[top].children.append(len(nodes) - 1)
            open_path.append(len(nodes) - 1)
        nodes[open_path[-1]].ends.append(number)
        previous = tokens
    return _finish(nodes, len(sequences))


def common_length(left: Tokens, right: Tokens) -> int:
    """Return how many leading tokens are equal (by bisection over slices, which compare fast)."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _split(nodes: list[Node], number: int, length: int) -> None:
    """Cut a node in place after `length` tokens; what it held below moves to the new node."""
    upper = nodes[number]
    lower = Node(upper.tokens[length:], upper.start + length, number, upper.children, upper.ends)
    nodes.append(lower)
    for child in lower.children:
        nodes[child].parent = len(nodes) - 1
    upper.tokens, upper.children, upper.ends = upper.tokens[:length], [len(nodes) - 1], []


def _finish(nodes: list[Node], num_sequences: int) -> Trie:
    end_nodes = [ROOT] * num_sequences
    for number in sorted(range(len(nodes)), key=lambda n: -nodes[n].start):
        node = nodes[number]
        node.subtree_size += len(node.tokens)
        if number != ROOT:
            nodes[node.parent].subtree_size += node.subtree_size
        for sequence in node.ends:
            end_nodes[sequence] = number
    return Trie(tuple(nodes), tuple(end_nodes))


def plan(trie: Trie, limits: Limits) -> Plan:
    """Return forward passes that compute every node of `trie` under `limits`."""
    forwards: list[Forward] = []
    waiting: list[Forward | int] = [ROOT]
    arrange = _pack if limits.packed else _match_lengths
    while waiting:
        past = waiting.pop()
        if isinstance(past, Forward):
            forwards.append(past)
            kept = [group[-1] for row in past.rows for group in row.groups()]
            waiting.extend(reversed(kept))
            continue
        ready, deeper = _sort_units(trie, past, limits)
        if limits.packed:
            groups = [(*lead, *_below(trie, node)) for lead, node in ready]
        else:
            groups = _chains(trie, past, [node for _, node in ready])
        forwards += [Forward(past, rows, keep=False) for rows in arrange(trie, groups, limits)]
        kept = arrange(trie, [(*lead, node) for lead, node in deeper], limits)
        waiting.extend(Forward(past, rows, keep=True) for rows in kept)
    return Plan(
        forwards=tuple(forwards),
        tokens_prefilled=sum(row.length for forward in forwards for row in forward.rows),
        tokens_padded=sum(_padded(forward.rows) for forward in forwards),
        tokens_naive=sum(trie.nodes[number].end for number in trie.end_nodes),
    )


def _sort_units(trie: Trie, past: int, limits: Limits) -> tuple[list[_Unit], list[_Unit]]:
    """Return the subtrees below `past` that can be packed, and the nodes to cache first.

    A node whose tokens are few is not worth a forward pass of its own, nor a wide row that others
    are padded to: it leads each of its children instead, and is computed several times.
    """
    ready: list[_Unit] = []
    deeper: list[_Unit] = []
    queue: list[_Unit] = [((), child) for child in trie.nodes[past].children]
    while queue:
        lead, number = queue.pop()
        node = trie.nodes[number]
        size = _num_tokens(trie, lead) + node.subtree_size
        repeated = (size - node.subtree_size + len(node.tokens)) * (len(node.children) - 1)
        narrow = limits.packed and size <= limits.row
        cheap = repeated <= (size * MOST_REPEATED if narrow else limits.overhead)
        if not node.children or (narrow and (size <= limits.fill or not cheap)):
            ready.append((lead, number))
        elif cheap:
            queue.extend(((*lead, number), child) for child in node.children)
        else:
            deeper.append((lead, number))
    return ready, deeper


def _pack(trie: Trie, groups: Sequence[Group], limits: Limits) -> list[tuple[Row, ...]]:
    """Fill the rows of as many passes as needed with whole groups."""
    sized = sorted(((_num_tokens(trie, group), group) for group in groups), reverse=True)
    wide = [pair for pair in sized if pair[0] > limits.fill]
    narrow = sized[len(wide) :]
    together = _pack_sorted(trie, sized, limits)
    apart = _pack_sorted(trie, wide, limits) + _pack_sorted(trie, narrow, limits)
    return min(together, apart, key=lambda ps: sum(limits.overhead + _padded(rows) for rows in ps))


def _pack_sorted(
    trie: Trie, sized: Sequence[tuple[int, Group]], limits: Limits
) -> list[tuple[Row, ...]]:
    """Share groups, longest first, evenly among passes; in each, evenly among rows."""
    total = sum(size for size, _ in sized)
    share = total / max(1, -(-total // limits.batch))
    passes: list[list[tuple[int, Group]]] = []
    sum_before = 0
    for size, group in sized:
        if sum_before >= share * len(passes) - 1e-6:
            passes.append([])
        passes[-1].append((size, group))
        sum_before += size
    return [_fill_rows(trie, members, limits) for members in passes]


def _fill_rows(trie: Trie, sized: Sequence[tuple[int, Group]], limits: Limits) -> tuple[Row, ...]:
    """Put groups into as many rows as give the least padding, at most about twice as wide."""
    width = max(limits.fill, sized[0][0])
    usual = -(-sum(size for size, _ in sized) // width)
    numbers = range(usual + usual // 2 + 1, max(1, usual // 2) - 1, -1)
    arranged = (_balance(sized, number) for number in numbers)
    best = min(arranged, key=_row_cost)
    return tuple(_row(trie, [group for _, group in row]) for row in best)


def _row_cost(rows: Sequence[Sequence[tuple[int, Group]]]) -> float:
    """Return what rows of groups cost in tokens, padding and attention within a row included."""
    width = max(sum(size for size, _ in row) for row in rows)
    return len(rows) * width * (1 + width / WIDTH_OF_TWO)


def _balance(sized: Sequence[tuple[int, Group]], num_rows: int) -> list[list[tuple[int, Group]]]:
    """Put each group, longest first, into the row that is shortest so far."""
    rows: list[list[tuple[int, Group]]] = [[] for _ in range(num_rows)]
    lengths = [(0, number) for number in range(num_rows)]
    for size, group in sized:
        length, number = heapq.heappop(lengths)
        rows[number].append((size, group))
        heapq.heappush(lengths, (length + size, number))
    return [row for row in rows if row]


def _match_lengths(trie: Trie, groups: Sequence[Group], limits: Limits) -> list[tuple[Row, ...]]:
    """Make each group a row, and rows of one length a pass."""
    rows = sorted((_row(trie, [group]) for group in groups), key=lambda row: -row.length)
    passes: list[list[Row]] = []
    for row in rows:
        last = passes[-1] if passes else []
        if last and last[0].length == row.length and row.length * (len(last) + 1) <= limits.batch:
            last.append(row)
        else:
            passes.append([row])
    return [tuple(members) for members in passes]


def _chains(trie: Trie, past: int, units: Sequence[int]) -> list[Group]:
    """Return the paths from below `past` to each leaf under `units`."""
    cached = len(trie.path(past))
    leaves = [n for unit in units for n in _below(trie, unit) if not trie.nodes[n].children]
    return [tuple(trie.path(leaf)[cached:]) for leaf in leaves]


def _below(trie: Trie, node: int) -> list[int]:
    """Return `node` and all nodes below it, each after its parent and before its next sibling."""
    order: list[int] = []
    stack = [node]
    while stack:
        number = stack.pop()
        order.append(number)
        stack.extend(reversed(trie.nodes[number].children))
    return order


def _row(trie: Trie, groups: Sequence[Group]) -> Row:
    nodes: list[int] = []
    parents: list[int] = []
    for group in groups:
        places: dict[int, int] = {}
        for number in group:
            parents.append(places.get(trie.nodes[number].parent, -1))
            places[number] = len(nodes)
            nodes.append(number)
    return Row(tuple(nodes), tuple(parents), _num_tokens(trie, nodes))


def _num_tokens(trie: Trie, nodes: Sequence[int]) -> int:
    return sum(len(trie.nodes[number].tokens) for number in nodes)


def _padded(rows: Sequence[Row]) -> int:
    return len(rows) * max(row.length for row in rows)
