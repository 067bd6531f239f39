"""What a compiled program does, read from its text: products, memory traffic, collectives.

Loops are counted as often as they run. All numbers are of one device.
"""

import collections
import dataclasses
import math
import re

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
         "f32": 4, "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Array:
    dtype: str
    shape: tuple[int, ...]
    layout: str = ""  # as '{2,1,0:T(8,128)(2,1)}'; '': not stated

    @property
    def elsewhere(self) -> bool:
        """Not in the HBM: in a TPU's vector or scalar memory, or in the host's, S(5)."""
        return "S(" in self.layout

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * BYTES[self.dtype]

    @property
    def held(self) -> int:
        """Bytes with the padding of the innermost dimensions to a TPU's tiles."""
        order, _, tiles = self.layout.strip("{}").partition(":")
        # The innermost dimension first; without a layout it is the last.
        inner = [int(d) for d in order.split(",") if d] or range(len(self.shape))[::-1]
        sizes = [self.shape[d] for d in inner] or [1]
        tile = re.findall(r"\d+", tiles.partition(")")[0]) if tiles.startswith("T(") else []
        for at, size in enumerate(map(int, reversed(tile))):
            if at < len(sizes):
                sizes[at] = -(-sizes[at] // size) * size
        return math.prod(sizes) * BYTES[self.dtype]


@dataclasses.dataclass
class Op:
    kind: str
    results: list[Array]
    operands: list[str]
    text: str
    root: bool

    @property
    def dtype(self) -> str:
        return self.results[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.results[0].shape

    @property
    def elements(self) -> int:
        return self.results[0].elements

    @property
    def source(self) -> str:
        """The path of the operation in the program that was traced."""
        return (re.findall(r'op_name="([^"]*)"', self.text) or [""])[0]

    def called(self, how: str = "calls") -> str:
        return (re.findall(rf"{how}=%([\w.\-]+)", self.text) or [""])[0]


Computations = dict[str, dict[str, Op]]


@dataclasses.dataclass
class Program:
    computations: Computations
    runs: dict[str, float]  # computation -> how often it runs
    entry: str  # the computation that is run
    unknown: int = 0  # loops whose length the text does not say, counted once

    def ops(self):
        """(computation, name, op, times) of everything that runs."""
        for computation, ops in self.computations.items():
            if self.runs.get(computation):
                for name, op in ops.items():
                    yield computation, name, op, self.runs[computation]


def parse(text: str) -> Program:
    """A compiled module's text, of the compiler for TPU or for CPU."""
    computations: Computations = {}
    entry = name = ""
    for line in text.splitlines():
        if found := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
            name = found[2]
            entry = name if found[1] else entry
            computations[name] = {}
        elif found := re.match(r"\s+(ROOT )?%([\w.\-]+) = (.*)", line):
            kind = re.search(r"[)}\]] ([a-z][\w\-]*)\(([^)]*)\)", found[3])
            types = found[3][: kind.start() + 1] if kind else ""
            results = [
                Array(dtype, tuple(int(n) for n in sizes.split(",") if n), layout)
                for dtype, sizes, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", types)
                if dtype in BYTES
            ]
            if results and kind:
                operands = re.findall(r"%([\w.\-]+)", kind[2])
                computations[name][found[2]] = Op(kind[1], results, operands, line, bool(found[1]))
    program = Program(computations, collections.defaultdict(float), entry)
    _visit(program, entry, 1.0)
    return program


def padding(program: Program) -> int:
    """Bytes that tiles add to the program's arguments."""
    arguments = [
        op for op in program.computations[program.entry].values() if op.kind == "parameter"
    ]
    return sum(x.held - x.bytes for op in arguments for x in op.results)


def _visit(program: Program, name: str, times: float) -> None:
    program.runs[name] += times
    for op in program.computations[name].values():
        inner = times
        if op.kind == "while":
            length = _length(program.computations, program.computations[name], op)
            program.unknown += length is None
            inner *= length or 1
        branches = re.findall(r"branch_computations=\{([^}]*)\}", op.text)
        branches += re.findall(r"((?:true|false)_computation=%[\w.\-]+)", op.text)
        named = [x for found in branches for x in re.findall(r"%([\w.\-]+)", found)]
        # Of two branches each half of the times. More are the head's, of ever more tokens: as if
        # all carried loss.
        chosen = named if len(named) == 2 else named[-1:]
        for branch in chosen:
            _visit(program, branch, times / len(chosen))
        for how in ("calls", "body", "to_apply") if op.kind in _CALLERS else ():
            if other := op.called(how):
                _visit(program, other, inner)


_CALLERS = ("fusion", "while", "call", "async-start")


def _length(computations: Computations, ops: dict[str, Op], loop: Op) -> int | None:
    """How often a loop among `ops` runs: stated, or the one number that its condition compares
    with, less where it starts: a compiler may take the first turns out of a loop."""
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
        return int(found[1])
    limits, todo = [], [loop.called("condition")]
    while todo:
        for op in computations[todo.pop()].values():
            limits += re.findall(r"s32\[\][^ ]* constant\((\d+)\)", op.text)
            todo += [op.called()] if op.called() else []
    return int(limits[0]) - _first(computations, ops, loop) if len(limits) == 1 else None


def _first(computations: Computations, ops: dict[str, Op], loop: Op) -> int:
    """The constant that a loop's counter, the integer its condition reads, starts at; else 0."""
    condition = computations[loop.called("condition")].values()
    reads = [re.search(r"= s32\[\].* get-tuple-element\(.*index=(\d+)", x.text) for x in condition]
    state, at = ops.get(loop.operands[0]), [int(x[1]) for x in reads if x]
    if state is None or state.kind != "tuple" or len(at) != 1:
        return 0
    counter = ops.get(state.operands[at[0]])
    while counter is not None and counter.kind == "copy":
        counter = ops.get(counter.operands[0])
    found = counter and re.search(r" constant\((\d+)\)", counter.text)
    return int(found[1]) if found else 0


def products(program: Program, sizes: dict[str, int]) -> dict[tuple[str, str], float]:
    """(path of the module, einsum) -> floating point operations of all runs of its products.

    sizes: of the letters that both operands and the result of an einsum share, on one device; of
    use to a convolution, which does not state what it sums over as a dot does.
    """
    found: dict[tuple[str, str], float] = collections.defaultdict(float)
    for computation, _, op, times in program.ops():
        if op.kind not in ("convolution", "dot"):
            continue
        x, y = (program.computations[computation][o] for o in op.operands[:2])
        parts = op.source.split("/")
        eqn = next((p for p in parts if "->" in p), "?")
        if over := re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.text):
            each = math.prod(x.shape[int(d)] for d in over[1].split(",") if d)
            flops = 2.0 * op.elements * each
        else:  # (b M K) (b K N) (b M N) = b^3 (M K N)^2
            letters = [set(p) for p in re.split(",|->", eqn)]
            shared = set.intersection(*letters) if len(letters) == 3 else set()
            batch = math.prod(sizes.get(c, 1) for c in shared)
            flops = 2 * math.sqrt(x.elements * y.elements * op.elements / batch)
        path = "/".join(p for p in parts if re.fullmatch(r"attn|mlp|\w+_proj(\.product)?", p))
        found[path, eqn] += flops * times
    return found


# The matrix products, of [T,H] by [H,S] each, in every kernel of JAX's splash attention: the
# logits and the values; the backwards take both again and have dP, and dQ, or dK and dV.
_SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


def attention_products(program: Program) -> float:
    """How often a layer's attention kernel multiplies T queries by S keys, over all layers."""
    return sum(
        n * times
        for _, name, op, times in program.ops()
        for kernel, n in _SPLASH.items()
        if op.kind == "custom-call" and name.startswith(kernel)
    )


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str
    results: tuple[Array, ...]
    ways: int  # devices of a group
    times: float
    source: str

    @property
    def bytes(self) -> float:
        """What a device sends in all runs, by the algorithm on a ring, the least there is."""
        size = sum(x.bytes for x in self.results)
        n = self.ways
        part = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
        return self.times * size * part.get(self.kind, (n - 1) / n)


def collectives(program: Program) -> list[Collective]:
    """Every collective once. One that overlaps with products stands in the text of several fusions,
    with one channel."""
    found = {}
    for _, name, op, times in program.ops():
        kind = next((k for k in COLLECTIVES if op.kind in (k, f"{k}-start")), None)
        if not kind:
            continue
        results = op.results
        if op.kind.endswith("-start") and kind != "all-reduce":
            results = results[1:2]  # after the operand
        channel = (re.findall(r"channel_id=(\d+)", op.text) or [name])[0]
        shapes = tuple((x.dtype, x.shape) for x in results)
        args = kind, tuple(results), _ways(op.text), times, op.source
        found.setdefault((kind, channel, shapes), Collective(*args))
    return list(found.values())


def _ways(text: str) -> int:
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[a]) for a in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(found[1].split(","))
    return 2  # a permutation has pairs


# Kinds that name buffers, or whose traffic another op is counted for.
_PASSING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
            "conditional", "optimization-barrier", "after-all", "partition-id", "iota"}  # fmt: skip


def traffic(program: Program) -> float:
    """Bytes that operations read from and write to HBM, each operand of a fusion once.

    A fusion's slice of an operand counts as the slice; what it hands through does not count.
    """
    total = sum(x.times * sum(r.bytes for r in x.results) for x in collectives(program))
    fused = {op.called() for _, _, op, _ in program.ops() if op.kind == "fusion"}
    for computation, _, op, times in program.ops():
        skip = op.kind in _PASSING or op.kind.endswith("-done") or _collective(op)
        if computation not in fused and not skip:
            total += times * _of_op(program.computations, computation, op)
    return total


_COPIES = ("copy-start", "dynamic-slice-start", "dynamic-update-slice-start")


def _collective(op: Op) -> bool:
    return any(op.kind.startswith(k) for k in COLLECTIVES)


def _of_op(computations: Computations, computation: str, op: Op) -> float:
    ops = computations[computation]
    operands = [ops[o].results[0] if o in ops else None for o in op.operands]
    if op.kind == "fusion":
        return _of_fusion(computations, op.called(), operands, op.results)
    if op.kind == "slice-start":
        return op.results[1].bytes  # of what it reads it moves no more
    if op.kind in ("dynamic-slice", "slice", "gather"):
        return 2 * op.results[0].bytes
    if op.kind == "dynamic-update-slice":
        return 2 * operands[1].bytes if operands[1] else 0
    # What starts a copy names its operand among its results.
    arrays = op.results if op.kind in _COPIES else [*operands, *op.results]
    return sum(x.bytes for x in arrays if x is not None and not x.elsewhere)


def _of_fusion(computations: Computations, name: str, operands: list, results: list) -> float:
    total = 0.0
    ops = computations[name]
    for at, x in enumerate(operands):
        if x is not None and not x.elsewhere:
            total += min(x.bytes, _reads(computations, name, _parameter(ops, at)))
    (root,) = (op for op in ops.values() if op.root)
    parts = root.operands if root.kind == "tuple" else [""]
    for part, result in zip(parts, results, strict=False):
        op = ops.get(part, root)
        while op.kind == "bitcast" and op.operands[0] in ops:
            op = ops[op.operands[0]]
        if result.elsewhere or op.kind in ("parameter", "custom-call") or _collective(op):
            continue
        inner = op.kind == "dynamic-update-slice"
        total += ops[op.operands[1]].results[0].bytes if inner else result.bytes
    return total


def _parameter(ops: dict[str, Op], at: int) -> str:
    return next(n for n, op in ops.items() if f" parameter({at})" in op.text)


def _reads(computations: Computations, computation: str, name: str) -> float:
    """Bytes that the uses of a value in a fused computation read; infinite: all of it."""
    total = 0.0
    for user, op in computations[computation].items():
        for at, operand in enumerate(op.operands):
            handed = op.kind in ("tuple", "custom-call") or _collective(op)
            if operand != name or handed or (op.kind == "dynamic-update-slice" and at == 0):
                continue
            if op.kind in ("dynamic-slice", "slice", "gather") and at == 0:
                total += op.results[0].bytes
            elif op.kind in ("bitcast", "reshape"):
                total += _reads(computations, computation, user)
            elif op.kind == "fusion":
                inner = op.called()
                total += _reads(computations, inner, _parameter(computations[inner], at))
            else:
                return math.inf
    return total
