"""What a traced program needs: temporary bytes at their peak, operations, memory traffic.

The program is a jaxpr, so nothing is allocated or compiled. It is read under a simple model of what
XLA does with it:

* Elementwise operations, broadcasts, slices, pads and the like are fused into whoever reads them:
  no array exists for them. Reshapes and transposes are names for the array they start from.
* An array exists for every result of a matrix product, a reduction, a gather, a loop; for whatever
  a matrix product or a loop reads; and for exponentials and their kind that are read more than
  once, which are not computed twice.
* Operations run depth first from the results, as XLA orders them on a CPU. An array lives from its
  operation to the last one that reads it, directly or through what was fused. An elementwise result
  or an update of a slice takes the place of an array of its size that is read for the last time.
* A loop holds what it carries and what it stacks, and its body's own peak once; a body reads the
  slices of what it runs over one at a time.
"""

import dataclasses
import math
from collections import Counter

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

ALIAS = {
    "reshape", "transpose", "squeeze", "expand_dims", "copy", "sharding_constraint",
    "optimization_barrier", "bitcast_convert_type",
}  # fmt: skip
PARTIAL = {"slice", "dynamic_slice", "gather", "split"}  # read no more than they return
TRANSCENDENTAL = {
    "exp", "exp2", "expm1", "log", "log1p", "tanh", "logistic", "erf", "erf_inv", "sin", "cos",
    "pow", "rsqrt", "sqrt", "cbrt", "threefry2x32", "random_bits",
}  # fmt: skip
LOOPS = {"scan", "while", "cond"}
WHOLE = {"dot_general", "conv_general_dilated", "sort", "top_k", "approx_top_k"} | LOOPS
INTO = {"dynamic_update_slice", "scatter", "scatter-add", "scatter_add"}  # write into operand 0
MADE = WHOLE | INTO | {"gather", "argmax", "argmin", "concatenate"}


def _is_made(name: str) -> bool:
    return name in MADE or name.startswith(("reduce", "cum", "random_", "scatter"))


@dataclasses.dataclass(eq=False)
class Buffer:
    """An array that exists; `counted` is what of it is new memory."""

    bytes: int
    counted: int
    shape: tuple[int, ...]
    dtype: str
    scope: str = ""
    argument: bool = False
    reusable: bool = True  # whether another array may take its place
    last: int = -1  # the operation that reads it last


@dataclasses.dataclass(frozen=True)
class Needs:
    """Of one call of a program on one device."""

    peak: int  # bytes of temporaries
    alive: tuple[tuple[str, int], ...]  # at the peak: (what, bytes), the largest first
    flops: dict[str, float]  # precision -> operations of matrix products
    traffic: float  # bytes read and written

    def holding(self, what: str, size: int) -> "Needs":
        """The same with `size` bytes more held all the while."""
        if not size:
            return self
        alive = sorted((*self.alive, (what, size)), key=lambda x: -x[1])
        return dataclasses.replace(self, peak=self.peak + size, alive=tuple(alive))

    def over(self, ways: int) -> "Needs":
        """The same with every matrix product's contraction split among `ways` devices."""
        return dataclasses.replace(self, flops={k: v / ways for k, v in self.flops.items()})


class _Op:
    def __init__(self, eqn, inputs, outputs):
        self.name, self.params = eqn.primitive.name, eqn.params
        self.inputs, self.outputs = inputs, outputs
        self.avals = [v.aval for v in eqn.invars]
        self.scope = str(eqn.source_info.name_stack)


def _nbytes(aval) -> int:
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 8)


def _inner(eqn) -> Jaxpr | None:
    """The body of a call that XLA inlines."""
    if eqn.primitive.name in LOOPS or _is_made(eqn.primitive.name):
        return None
    bodies = [v for v in eqn.params.values() if isinstance(v, ClosedJaxpr | Jaxpr)]
    return _open(bodies[0]) if bodies else None


def _open(jaxpr) -> Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def _flatten(jaxpr: Jaxpr, names: dict, ops: list):
    """Appends the operations of `jaxpr`; `names` maps its variables to those of the whole."""
    read = lambda v: None if isinstance(v, Literal) else names.setdefault(v, v)  # noqa: E731
    for eqn in jaxpr.eqns:
        body, inputs = _inner(eqn), [read(v) for v in eqn.invars]
        if body is None:
            ops.append(_Op(eqn, inputs, [_fresh(names, v) for v in eqn.outvars]))
            continue
        own = dict(zip(body.invars, inputs, strict=True))
        _flatten(body, own, ops)
        for outer, result in zip(eqn.outvars, body.outvars, strict=True):
            names[outer] = None if isinstance(result, Literal) else own[result]
    return ops


class _Value:
    """A variable of the flattened program (a body that is called twice has two of each)."""

    def __init__(self, var):
        self.aval = var.aval


def _fresh(names, var):
    names[var] = _Value(var)
    return names[var]


def _without_dead(ops, results):
    live, kept = {id(r) for r in results if r is not None}, []
    for op in reversed(ops):
        if any(id(o) in live for o in op.outputs):
            kept.append(op)
            live |= {id(v) for v in op.inputs if v is not None}
    return kept[::-1]


def needs(
    jaxpr, donated: tuple[bool, ...] = (), out_bytes: tuple[int, ...] = (), sliced: int = 0
) -> Needs:
    """Reads a program.

    Args:
      jaxpr: of the program at the shapes of one device.
      donated: for each argument, whether results may take its place.
      out_bytes: for each result, the bytes it takes (a sharded gradient is smaller than what was
        computed); default: its own.
      sliced: this many arguments, the last ones, are slices of arrays that a loop runs over.
    """
    jaxpr = _open(jaxpr)
    names = {v: _Value(v) for v in (*jaxpr.invars, *jaxpr.constvars)}
    arguments = [names[v] for v in jaxpr.invars]
    ops = _flatten(jaxpr, names, [])
    results = [None if isinstance(v, Literal) else names[v] for v in jaxpr.outvars]
    return _Reader(ops, arguments, results, donated, out_bytes, sliced).read()


def trace(fn, *args, donate: tuple[int, ...] = (), out_bytes: tuple[int, ...] = ()) -> Needs:
    """`needs` of fn(*args), shapes for arrays; `donate` numbers the arguments given away."""
    jaxpr = jax.make_jaxpr(fn)(*args)
    donated = tuple(i in donate for i, arg in enumerate(args) for _ in jax.tree.leaves(arg))
    return needs(jaxpr, donated, out_bytes)


class _Reader:
    def __init__(self, ops, arguments, results, donated, out_bytes, sliced):
        self.ops = _without_dead(ops, results)
        self.arguments, self.results, self.sliced = arguments, results, sliced
        self.donated = donated or (False,) * len(arguments)
        self.out_bytes = out_bytes
        self.reads = Counter(id(v) for op in self.ops for v in op.inputs if v is not None)
        self.wanted = self._wanted()
        self.behind: dict[int, dict[Buffer, int]] = {}  # value -> arrays read for it, bytes of each
        self.flops: Counter = Counter()
        self.traffic = 0.0

    def _wanted(self) -> set[int]:
        """Values that somebody needs as arrays."""
        wanted = {id(r) for r in self.results if r is not None}
        for op in reversed(self.ops):
            if op.name in ALIAS and id(op.outputs[0]) in wanted:
                wanted |= {id(op.inputs[0])}
            elif op.name == "scan":
                consts, carry = op.params["num_consts"], op.params["num_carry"]
                read = op.inputs[:consts] + op.inputs[consts + carry :]
                wanted |= {id(v) for v in read}
            elif op.name in WHOLE - {"while", "cond"}:
                wanted |= {id(v) for v in op.inputs}
        return wanted

    def _exists(self, op, value) -> bool:
        if op.name in ALIAS:
            return False
        if _is_made(op.name):
            return True
        often = op.name in TRANSCENDENTAL and self.reads[id(value)] > 1
        return often or id(value) in self.wanted

    def _sources(self, op) -> dict[Buffer, int]:
        sources: dict[Buffer, int] = {}
        for value in op.inputs:
            for buffer, size in self.behind.get(id(value), {}).items():
                sources[buffer] = min(buffer.bytes, sources.get(buffer, 0) + size)
        if op.name in PARTIAL:
            size = sum(_nbytes(o.aval) for o in op.outputs)
            sources = {b: min(s, size) for b, s in sources.items()}
        return sources

    def _argument(self, value, donated, counted=0, scope="") -> Buffer:
        size, aval = _nbytes(value.aval), value.aval
        buffer = Buffer(size, counted, aval.shape, str(aval.dtype), scope, True, donated)
        self.behind[id(value)] = {buffer: size}
        return buffer

    def _plan(self):
        """[(op, arrays made, bytes read of which arrays)] of what runs, in order."""
        plan = []
        first = len(self.arguments) - self.sliced
        for i, (value, donated) in enumerate(zip(self.arguments, self.donated, strict=True)):
            if i < first:
                self._argument(value, donated)
            else:
                self._argument(value, True, _nbytes(value.aval), "slice")
        for op in self.ops:
            sources = self._sources(op)
            made = []
            for value in op.outputs:
                if not self._exists(op, value):
                    # (an alias or something fused: whoever reads it reads what is behind it)
                    self.behind[id(value)] = dict(sources)
                    continue
                size, aval = _nbytes(value.aval), value.aval
                buffer = Buffer(size, size, aval.shape, str(aval.dtype), op.scope or op.name)
                self.behind[id(value)] = {buffer: size}
                made.append(buffer)
            if made:
                plan.append((op, made, sources))
        plan = self._depth_first(plan)
        for place, (_, _, sources) in enumerate(plan):
            for buffer in sources:
                buffer.last = place
        for i, value in enumerate(self.results):
            for buffer in self.behind.get(id(value), {}):
                buffer.last = len(plan)
                if i < len(self.out_bytes) and not buffer.argument:
                    buffer.counted = self.out_bytes[i]
        return plan

    def _depth_first(self, plan):
        """The order in which XLA runs a program on a CPU: depth first from the results.

        What is read in many places goes first, among equals what took more memory to make.
        """
        maker = {b: i for i, (_, made, _) in enumerate(plan) for b in made}
        needed = [sorted({maker[b] for b in sources if b in maker}) for _, _, sources in plan]
        readers = Counter(i for sources in needed for i in sources)
        rank: list[tuple[int, int]] = []
        for i, (_, made, _) in enumerate(plan):
            shared = max(readers[i] - 1, 0) + sum(rank[j][0] for j in needed[i])
            size = sum(b.bytes for b in made) + sum(rank[j][1] for j in needed[i])
            rank.append((shared, size))
        roots = {maker[b] for r in self.results for b in self.behind.get(id(r), {}) if b in maker}
        order, seen = [], set()
        stack = [(i, False) for i in sorted(roots, key=lambda i: rank[i])]
        while stack:
            i, ready = stack.pop()
            if ready:
                order.append(plan[i])
            elif i not in seen:
                seen.add(i)
                stack.append((i, True))
                stack += [(j, False) for j in sorted(needed[i], key=lambda j: rank[j])]
        return order

    def read(self) -> Needs:
        plan = self._plan()
        alive: set[Buffer] = set()
        now, peak, at_peak = 0, 0, ()
        for place, (op, made, sources) in enumerate(plan):
            inside = self._inside(op)
            dying = [b for b in sources if b.last == place and b.reusable]
            for buffer in sources:
                if buffer.argument and buffer not in alive:  # a slice, taken when it is first read
                    alive.add(buffer)
                    now += buffer.counted
            carried = op.params["num_carry"] if op.name == "scan" else len(made)
            for buffer in made:
                heir = next((b for b in dying if b.bytes == buffer.bytes), None)
                carried -= 1
                if op.name not in WHOLE - LOOPS and carried >= 0 and heir is not None:
                    dying.remove(heir)
                    now -= heir.counted
                    alive.discard(heir)
                    buffer.counted = min(buffer.counted, heir.counted)
                alive.add(buffer)
                now += buffer.counted
            if now + inside.peak > peak:
                peak = now + inside.peak
                at_peak = (*((_label(b), b.counted) for b in alive), *inside.alive)
            for buffer in [b for b in alive if b.last <= place]:
                alive.discard(buffer)
                now -= buffer.counted
            self._count(op, made, sources, inside)
        largest = sorted((x for x in at_peak if x[1]), key=lambda x: -x[1])
        return Needs(peak, tuple(largest), self.flops, self.traffic)

    def _inside(self, op) -> Needs:
        nothing = Needs(0, (), Counter(), 0.0)
        if op.name == "scan":
            p = op.params
            consts, carry = p["num_consts"], p["num_carry"]
            over = len(op.inputs) - consts - carry
            donated = (False,) * consts + (True,) * (carry + over)
            return needs(p["jaxpr"], donated, sliced=over)
        if op.name == "while":
            body, consts = op.params["body_jaxpr"], op.params["body_nconsts"]
            carry = len(_open(body).invars) - consts
            return needs(body, (False,) * consts + (True,) * carry)
        if op.name == "cond":
            return max((needs(b) for b in op.params["branches"]), key=lambda n: n.peak)
        return nothing

    def _count(self, op, made, sources, inside: Needs):
        times = op.params["length"] if op.name == "scan" else 1
        for dtype, flops in inside.flops.items():
            self.flops[dtype] += times * flops
        if op.name in LOOPS:  # its body reads and writes for it
            self.traffic += times * inside.traffic
            return
        if op.name in INTO or op.name.startswith("scatter"):
            update = op.avals[1 if op.name == "dynamic_update_slice" else 2]
            self.traffic += 2 * _nbytes(update)
            return
        self.traffic += sum(sources.values()) + sum(b.bytes for b in made)
        if op.name == "dot_general":
            (contracted, _), _ = op.params["dimension_numbers"]
            left = op.avals[0]
            depth = math.prod(left.shape[i] for i in contracted)
            self.flops[_precision(op)] += 2.0 * depth * math.prod(op.outputs[0].aval.shape)


def _precision(op) -> str:
    """How a product is computed: "bfloat16", "float32", or "rounded": float32 at default precision,
    whose inputs an accelerator rounds."""
    if all(aval.dtype.itemsize < 4 for aval in op.avals):
        return "bfloat16"
    wanted = op.params["precision"]
    both = wanted if isinstance(wanted, tuple) else (wanted,)
    return "float32" if jax.lax.Precision.HIGHEST in both else "rounded"


def _label(buffer: Buffer) -> str:
    shape = "x".join(map(str, buffer.shape))
    return f"{buffer.scope} {buffer.dtype}[{shape}]"
