"""FastEagle X: the cascade on a tree that pays, its candidates able to follow their parents.

The tree is static, FastEagle's backbone or any `paths` of ranks
(`evaluation.best_paths.best_paths` finds the best ones on training text), or, with `total_nodes`,
grown from the best tokens every round (DDTree, arXiv 2604.12989, does so from the marginals).

FastEagle's depths do not look at each other, so every node of a depth has the same candidates,
whatever token it follows. With `rank`, depth i's readout is shifted by what token u stands above
it,

    q_i(v | u) = softmax(head (norm(h_i) + up_i silu(down_i norm(e_u))))

a transition bias of low rank in (u, v), like DSpark's Markov head (arXiv 2607.05147), but read from
the target's own embedding and head, so that a token never seen as a parent is still placed. The
cascade and the head run once, as before; when drafting only the `pool` best candidates of a depth
are shifted, which costs a gather of their head rows. Drawn trees (temperature above 0) need whole
laws and read the head once a level. No bias is the default: trained as briefly as the built-in
recipe does it costs acceptance (docs/drafters.md has the figures).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from specjax.drafters.fasteagle import FastEagle
from specjax.drafters.features import FeatureState, last_rows
from specjax.drafters.proposals import draw_children, log_law
from specjax.models.layers import RMSNorm
from specjax.models.linear import linear, readout
from specjax.models.transformer import embedded
from specjax.sampling import top_candidates
from specjax.trees import Topology, best_of_pool, paths, rank_paths


@dataclasses.dataclass(frozen=True)
class FastEagleX(FastEagle):
    """FastEagle with a transition bias and a choice of trees."""

    name: ClassVar[str] = "fasteagle_x"
    partition: ClassVar = (
        ("shift_down", ("fsdp", None)),
        ("shift_up", (None, "fsdp")),
        *FastEagle.partition,
    )

    rank: int = 0  # of the transition bias, e.g. 32; 0 = none
    pool: int = 8  # candidates of a depth told apart by their parent; read where trees need it
    paths: tuple[tuple[int, ...], ...] = ()  # ranks from the root to each node; () = the backbone
    total_nodes: int = 0  # T of a tree grown each round, `candidates` children a node; 0 = static

    def __post_init__(self):
        if self.paths:  # one value a tree, also from a config file's lists
            object.__setattr__(self, "paths", rank_paths(self.paths))
        super().__post_init__()
        if self.rank < 0:
            raise ValueError(f"rank: {self.rank} must be at least 0")
        if (self.rank or self.total_nodes) and self.pool < self.candidates:
            raise ValueError(f"pool: {self.pool} must be at least candidates={self.candidates}")
        if self.paths and self.total_nodes:
            raise ValueError("paths, total_nodes: one tree is static, the other grown; give one")
        if self.paths:
            deepest = len(self.paths[-1])
            if deepest > self.num_layers:
                raise ValueError(f"paths: depth {deepest} exceeds num_layers={self.num_layers}")
            widest = max(max(path) for path in self.paths) + 1
            pool = self.pool if self.rank else self.draft_vocab_size or self.target.vocab_size
            if widest > pool:
                raise ValueError(f"paths: rank {widest - 1} lies outside the pool of {pool}")
        if self.total_nodes:
            size = 1 + sum(self._grown)
            if not self.depth < self.total_nodes <= size:
                raise ValueError(
                    f"total_nodes: {self.total_nodes} must exceed depth={self.depth} and is at "
                    f"most {size}, all that {self.candidates} candidates a node grow"
                )

    @property
    def _grown(self) -> list[int]:
        """Nodes that each level of a grown tree adds to the pool."""
        return [self.candidates] + [self.candidates**2] * (self.depth - 1)

    @property
    def depth(self) -> int:
        if self.paths:
            return len(self.paths[-1])
        return super().depth

    @property
    def proposals(self) -> tuple[str, ...]:
        return ("top",) if self.total_nodes else super().proposals

    @property
    def topology(self) -> Topology | None:
        if self.total_nodes:
            return None
        if self.paths and self.proposal.kind != "chains":
            return paths(self.paths)
        return super().topology

    @property
    def ranks(self) -> np.ndarray:
        """Of rows 1..: which of its parent's candidates a row is; paths may skip some."""
        if self.paths and not self.proposal.sampled:
            return np.array([path[-1] for path in self.paths])
        return super().ranks

    @property
    def nodes(self) -> int:
        topology = self.topology
        return self.total_nodes if topology is None else topology.nodes

    # ---- parameters and readout --------------------------------------------------------------

    def init(self, key, target_params):
        params = super().init(key, target_params)
        if self.rank:
            D = self.target.hidden_size
            keys = jax.random.split(jax.random.fold_in(key, 1), self.num_layers)
            params["transition"] = [  # starts as no bias at all
                {
                    "shift_down": jax.random.normal(k, (D, self.rank)) * D**-0.5,
                    "shift_up": jnp.zeros((self.rank, D)),
                }
                for k in keys
            ]
        return params

    def shift(self, params, target_params, depth: int, parents_BxP):
        """What parents of these tokens add to depth `depth`'s readout state: BxPxD."""
        own = params["transition"][depth - 1]
        e = jax.lax.stop_gradient(embedded(target_params, parents_BxP))
        dtype = own["shift_down"].dtype
        e = RMSNorm(self.target.rms_norm_eps).apply(
            {"params": {"scale": jnp.ones(e.shape[-1], dtype)}}, e.astype(dtype)
        )
        return linear(jax.nn.silu(linear(e, own["shift_down"])), own["shift_up"])

    def normed(self, params, hidden):
        """The readout norm; what follows a state's D numbers is added to it."""
        D = self.target.hidden_size
        state, shift = hidden[..., :D], hidden[..., D:]
        state = super().normed(params, state)
        return state + shift if shift.shape[-1] else state

    def teach(self, params, target_params, taps_BxTxM, tokens_BxT, segments_BxT=None):
        hidden, features = super().teach(
            params, target_params, taps_BxTxM, tokens_BxT, segments_BxT
        )
        if not self.rank:
            return hidden, features
        shifted = []
        for i, h in enumerate(hidden, start=1):
            parents_BxT = jnp.pad(tokens_BxT[:, i:], ((0, 0), (0, i)))  # x_{t+i}
            shift = self.shift(params, target_params, i, parents_BxT)
            shifted.append(jnp.concatenate([h, shift.astype(h.dtype)], axis=-1))
        return shifted, features

    # ---- drafting ----------------------------------------------------------------------------

    def draft(self, params, target_params, state: FeatureState, context, key):
        if not self.rank and self.topology is not None:  # depths that do not look at each other
            return super().draft(params, target_params, state, context, key)
        hidden, cache = self.extend(params, target_params, state.cache, state.pending)
        rows_BxNxD = jnp.stack([last_rows(h, state.pending.counts_B) for h in hidden], axis=1)
        read_BxNxD = self.normed(params, rows_BxNxD)
        head_WxD = self.head(params, target_params)
        root_B = context.root_B()
        if self.proposal.sampled:
            tree = self._drawn(params, target_params, read_BxNxD, head_WxD, root_B, key)
        else:
            scores = self._scorer(params, target_params, read_BxNxD, head_WxD)
            grow = self._grow if self.topology is None else self._fill
            tree = grow(scores, root_B)

        def first():
            read_Bx1xD = read_BxNxD[:, :1]
            if self.rank:
                read_Bx1xD += self.shift(params, target_params, 1, root_B[:, None])
            return readout(read_Bx1xD, head_WxD)

        return self.expecting(params, tree, first), state.replace(cache=cache)

    def _scorer(self, params, target_params, read_BxNxD, head_WxD):
        """(depth, parent tokens BxP, count) -> (log-probabilities, tokens) of children, BxPxcount.

        Probabilities are those of the shifted pool; what lies outside it keeps its mass.
        """
        logits_BxNxW = readout(read_BxNxD, head_WxD)
        logits_BxNxM, ids_BxNxM = top_candidates(logits_BxNxW, self.pool)
        tokens_BxNxM = self.to_target_ids(params, ids_BxNxM)
        total_BxN = jax.nn.logsumexp(logits_BxNxW, axis=-1)
        inside_BxN = jax.nn.logsumexp(logits_BxNxM, axis=-1)
        # log(1 - the pool's share), safe where the pool is everything
        outside_BxN = total_BxN + jnp.log(
            jnp.maximum(-jnp.expm1(jnp.minimum(inside_BxN - total_BxN, 0.0)), 1e-30)
        )
        if self.rank:
            pool_BxNxMxD = head_WxD[ids_BxNxM].astype(read_BxNxD.dtype)

        def children(depth, parents_BxP, count):
            scores_BxPxM = logits_BxNxM[:, None, depth - 1]
            if self.rank:
                shift = self.shift(params, target_params, depth, parents_BxP)
                scores_BxPxM = scores_BxPxM + jnp.einsum(
                    "bpd,bmd->bpm", shift, pool_BxNxMxD[:, depth - 1],
                    preferred_element_type=jnp.float32,
                )  # fmt: skip
            else:
                scores_BxPxM = jnp.repeat(scores_BxPxM, parents_BxP.shape[1], axis=1)
            total_BxP = jnp.logaddexp(
                jax.nn.logsumexp(scores_BxPxM, axis=-1), outside_BxN[:, None, depth - 1]
            )
            best, place = top_candidates(scores_BxPxM, count)
            tokens = jnp.take_along_axis(tokens_BxNxM[:, None, depth - 1], place, axis=-1)
            return best - total_BxP[..., None], tokens

        return children

    def _levels(self):
        """The static tree level by level: (depth, rows, their parents' places above, their ranks).

        A place is an index into the level's nodes that have children.
        """
        topology, inner = self.topology, [0]
        for depth in range(1, topology.max_depth + 1):
            rows = np.flatnonzero(topology.depth_T == depth)
            places = np.array([inner.index(topology.parents[row]) for row in rows])
            ranks = self.ranks[rows - 1]
            yield depth, rows, places, ranks
            inner = [row for row in rows if topology.child_TxC[row][0] >= 0]

    def _fill(self, scores, root_B):
        """The static tree, every node the child of its rank."""
        topology, parents_BxP = self.topology, root_B[:, None]
        order, parts = [0], [root_B[:, None]]
        for depth, rows, places, ranks in self._levels():
            _, tokens_BxPxC = scores(depth, parents_BxP, int(ranks.max()) + 1)
            tokens_BxR = tokens_BxPxC[:, places, ranks]
            parts.append(tokens_BxR)
            order.extend(rows)
            parents_BxP = tokens_BxR[:, topology.child_TxC[rows, 0] >= 0]
        return topology.draft(jnp.concatenate(parts, axis=1)[:, np.argsort(order)])

    def _grow(self, scores, root_B):
        """EAGLE-2's tree: expand the best nodes of each level, keep the best of all."""
        B, K = root_B.shape[0], self.candidates
        logp, tokens = scores(1, root_B[:, None], K)
        score_BxK, token_BxK = logp[:, 0], tokens[:, 0]
        frontier_BxK = jnp.broadcast_to(jnp.arange(K), (B, K))  # places in the pool
        pool = [(score_BxK, token_BxK, jnp.full((B, K), -1))]
        size = K
        for depth in range(2, self.depth + 1):
            logp, tokens = scores(depth, token_BxK, K)
            total = (score_BxK[..., None] + logp).reshape(B, K * K)
            tokens = tokens.reshape(B, K * K)
            pool.append((total, tokens, jnp.repeat(frontier_BxK, K, axis=1)))
            score_BxK, place = top_candidates(total, K)
            token_BxK = jnp.take_along_axis(tokens, place, axis=1)
            frontier_BxK, size = size + place, size + K * K
        score, token, parent = (jnp.concatenate(part, axis=1) for part in zip(*pool, strict=True))
        return best_of_pool(root_B, score, token, parent, self.total_nodes, self.depth, K)

    def _drawn(self, params, target_params, read_BxNxD, head_WxD, root_B, keys_B):
        """The static tree drawn level by level from each node's own law."""
        B, topology, kind = root_B.shape[0], self.topology, self.proposal.kind
        parents_BxP, order, parts = root_B[:, None], [0], [root_B[:, None]]
        above = np.zeros(1, int)  # rows that have children, in the level above
        laws = [None] * topology.nodes
        for depth, rows, places, ranks in self._levels():
            shift = self.shift(params, target_params, depth, parents_BxP)
            states = read_BxNxD[:, depth - 1 : depth] + shift
            law = log_law(readout(states, head_WxD), self.proposal.sampling)
            law_BxPxV = self.to_target_laws(params, law)
            for place, row in enumerate(above):
                laws[row] = law_BxPxV[:, place]
            count = int(ranks.max()) + 1
            draw = lambda k, q, count=count: draw_children(k, q, count, kind)  # noqa: E731
            keys_BxP = jax.vmap(
                lambda k, at=depth, n=law_BxPxV.shape[1]: jax.random.split(
                    jax.random.fold_in(k, at), n
                )
            )(keys_B)
            tokens_BxPxC = jax.vmap(jax.vmap(draw))(keys_BxP, law_BxPxV)
            tokens_BxR = tokens_BxPxC[:, places, ranks]
            parts.append(tokens_BxR)
            order.extend(rows)
            inner = topology.child_TxC[rows, 0] >= 0
            parents_BxP, above = tokens_BxR[:, inner], rows[inner]
        nothing = jnp.full((B, self.target.vocab_size), -jnp.inf)  # leaves have no children
        law_BxTxV = jnp.stack([nothing if law is None else law for law in laws], axis=1)
        return topology.draft(jnp.concatenate(parts, axis=1)[:, np.argsort(order)], law_BxTxV)
