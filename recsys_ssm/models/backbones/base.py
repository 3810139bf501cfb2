"""Define the contract of a backbone, and the stack of layers that most backbones are."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_ssm.instantiate import Configurable
from recsys_ssm.ops.dropout import Dropout

Init = Literal["own", "normal", "xavier"]
NormKind = Literal["layer", "rms"]
NORMS: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
_NO_STEPS = "{} sees the whole row, so it cannot advance by one token; use a causal backbone"


def at_least_float32(x: Tensor) -> Tensor:
    """Return a recurrence's parameters in float32 or float64, whatever the precision of the rest of the model."""
    return x if x.dtype == torch.float64 else x.float()


def reinitialise(module: nn.Module, init: Init, std: float) -> None:
    """Draw new weights for all linear layers, those of attention included; :class:`Stack` describes the choices.

    Raises:
        ValueError: ``init`` is not one of the choices.
    """
    if init not in ("own", "normal", "xavier"):
        raise ValueError(f"init={init!r}: expected 'own', 'normal' or 'xavier'")
    if init == "own":
        return
    # NOTE[DIFF] Mamba's paper draws the step sizes of dt_proj itself; normal and xavier draw dt_proj like any linear
    # layer, as RecBole and RecTools do.
    for part in module.modules():
        if isinstance(part, nn.Linear):
            weight, bias = part.weight, part.bias
        elif isinstance(part, nn.MultiheadAttention):
            weight, bias = part.in_proj_weight, part.in_proj_bias
        else:
            continue
        if init == "xavier":
            nn.init.xavier_normal_(weight)
        else:
            nn.init.normal_(weight, std=std)
            if bias is not None:
                nn.init.zeros_(bias)


class Clock(NamedTuple):
    """Times of the events of packed histories, for backbones that use them."""

    event: Tensor
    """(B, L) int64, seconds."""
    asked: Tensor
    """(B, L) int64, seconds: the next event's where the model sees it (``model.query_time``), else ``event``."""
    gap: Tensor
    """(B, L), log(1 + gap / typical gap) from the event before; 0 at a history's first."""


def time_buckets(seconds: Tensor, n: int) -> Tensor:
    """Return the bucket of each time span: ⌊ln(max(1, seconds)) / .301⌋, at most n, as in HSTU."""
    return (seconds.clamp(min=1).double().log() / 0.301).long().clamp(max=n)


def gaps_before(event: Tensor, seq_idx: Tensor | None) -> Tensor:
    """Return the seconds since the event before, 0 at the first of each history and at padding: (B, L) int64.

    Args:
        event: (B, L) int64, seconds.
        seq_idx: (B, L), as in :meth:`Backbone.forward`.
    """
    gap = F.pad(event.diff(dim=1), (1, 0)).clamp(min=0)
    if seq_idx is None:
        return gap
    inside = F.pad((seq_idx[:, 1:] == seq_idx[:, :-1]) & (seq_idx[:, 1:] >= 0), (1, 0), value=False)
    return gap * inside


class TimeScale(nn.Module):
    """Scale step sizes by the time since the event before: exp(log 2 · tanh(MLP(gap))), from 1/2 to 2.

    All factors are 1 in the beginning. (The time-aware Mamba of KuaiRand's best published row scales its steps so.)

    Args:
        n: Step sizes of a token.
        hidden: Width of the hidden layer.
    """

    def __init__(self, n: int, hidden: int = 16) -> None:
        super().__init__()
        self.linear = nn.Linear(1, hidden)
        # Not a linear layer: initial weights of a stack leave the factors at 1.
        self.weight = nn.Parameter(torch.zeros(n, hidden))
        self.bias = nn.Parameter(torch.zeros(n))

    def forward(self, gap_BL: Tensor) -> Tensor:
        """Return the factors (B, L, n) of :attr:`Clock.gap`."""
        inner = F.silu(self.linear(gap_BL.unsqueeze(-1).to(self.weight.dtype)))
        return torch.exp2(F.linear(inner, self.weight, self.bias).tanh())


class Timed(NamedTuple):
    """Context of mixers that scale their steps by time."""

    seq_idx: Tensor | None
    gap: Tensor | None
    """:attr:`Clock.gap`; None: all steps keep their size."""


class Backbone(Configurable, nn.Module, abc.ABC):
    """Module that maps tokens to tokens of the same shape.

    A new architecture is one file here with a subclass, and one file in ``conf/backbone``.
    """

    causal: bool
    """True if an output depends only on its own and earlier tokens. Only such a backbone may be trained at every
    position. An attribute of the class, or of the instance where an option decides."""
    pooling: ClassVar[Literal["last", "mean"]] = "last"
    """Output that represents the whole row: the last token's, or the mean where tokens are not mixed."""

    labels: ClassVar[Mapping[str, str]] = {}
    """Display names in reports by task (``two_tower``, ``next_item``). A subclass does not inherit them."""
    style: ClassVar[Mapping[str, str]] = {}
    """``color``, ``linestyle`` and ``marker`` in figures. A subclass does not inherit them."""

    d_model: int
    uses_times: bool = False
    """True if :meth:`forward` takes a :class:`Clock`. An attribute of the class, or of the instance where an option
    decides."""

    @abc.abstractmethod
    def forward(
        self, tokens: Tensor, seq_idx: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """Mix the tokens of each row.

        Args:
            tokens: (B, L, D).
            seq_idx: (B, L) integers. -1 marks padding; any other number names the packed sequence that a position
                belongs to. Positions of different sequences do not see each other. None: each row is one sequence.
            at: (P,) places in the flattened (B·L) whose outputs are wanted. The feed-forward networks of the others are
                then not computed. None: all places.

        Returns:
            (B, L, D), or (P, D) with ``at``. Outputs at padding are finite, but not specified.
        """

    def init_state(self, batch_size: int) -> Any:
        """Return the state before the first token of ``batch_size`` sequences, on the device of the parameters.

        Raises:
            NotImplementedError: The backbone is not causal.
        """
        raise NotImplementedError(_NO_STEPS.format(type(self).__name__))

    def step(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Advance each sequence by one token.

        Args:
            token: (B, D).
            state: State of :meth:`init_state` or of the step before. It is not changed.

        Returns:
            The output (B, D), which equals that of :meth:`forward` at this position, and the next state.

        Raises:
            NotImplementedError: The backbone is not causal.
        """
        raise NotImplementedError(_NO_STEPS.format(type(self).__name__))


def pick(x_BLD: Tensor, at: Tensor | None) -> Tensor:
    """Return the outputs (P, D) at the places ``at`` of the flattened rows; all outputs where ``at`` is None."""
    return x_BLD if at is None else x_BLD.flatten(0, 1).index_select(0, at)


class Mixer(nn.Module, abc.ABC):
    """Part of a layer of a :class:`Stack` that mixes tokens: a Mamba block, for example."""

    @abc.abstractmethod
    def forward(self, x_BLD: Tensor, context: Any = None) -> Tensor:
        """Mix tokens as :meth:`Backbone.forward` does.

        Args:
            x_BLD: (B, L, D).
            context: ``seq_idx``, or the result of :meth:`Stack.context`.
        """

    def init_state(self, batch_size: int) -> Any:
        """Return the state before the first token, as :meth:`Backbone.init_state` does."""
        raise NotImplementedError(_NO_STEPS.format(type(self).__name__))

    def step(self, x_BD: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Advance by one token, as :meth:`Backbone.step` does."""
        raise NotImplementedError(_NO_STEPS.format(type(self).__name__))


class TimedMixer(Mixer):
    """Mixer that goes on from a state over many tokens at once, and may scale its step sizes by time."""

    label: ClassVar[str]
    """Name in messages."""
    time_scale: TimeScale | None

    @abc.abstractmethod
    def _run(
        self, x_BLD: Tensor, context: Tensor | Timed | None, before: Any, want_state: bool
    ) -> tuple[Tensor, Any]:
        """Return the outputs (B, L, D) of tokens that follow the state ``before``, and the state after them.

        Args:
            x_BLD: (B, L, D).
            context: As in :meth:`forward`.
            before: A state; None: that before the first token.
            want_state: Return the state after; otherwise None.
        """

    def forward(self, x_BLD: Tensor, context: Tensor | Timed | None = None) -> Tensor:
        return self._run(x_BLD, context, None, False)[0]

    def extend(
        self, x_BLD: Tensor, state: Any, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Run over L tokens that follow those of a state, and return the outputs and the state after them."""
        self.check_steps()
        return self._run(x_BLD, seq_idx, state, True)

    def follow(self, x_BLD: Tensor, state: Any) -> Tensor:
        """Return the outputs of :meth:`extend` alone."""
        self.check_steps()
        return self._run(x_BLD, None, state, False)[0]

    def check_steps(self) -> None:
        """Check that tokens can follow a state without the time of their events.

        Raises:
            NotImplementedError: They cannot.
        """
        if self.time_scale is not None:
            raise NotImplementedError(
                f"{self.label} with scale_by_time=true needs the time of each event, so it cannot advance by one "
                "token; call forward"
            )


class FeedForward(nn.Module):
    """Feed-forward network that treats each token by itself.

    ``gelu`` is ``W2 drop(gelu(W1 x))``. ``swiglu`` is ``W2 drop(silu(W1 x) * W3 x)``, without biases.
    """

    def __init__(
        self,
        d_model: int,
        d_inner: int,
        *,
        activation: Literal["gelu", "swiglu"] = "gelu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        gated = activation == "swiglu"
        self.linear1 = nn.Linear(d_model, d_inner, bias=not gated)
        self.linear2 = nn.Linear(d_inner, d_model, bias=not gated)
        self.linear3 = nn.Linear(d_model, d_inner, bias=False) if gated else None
        self.dropout = Dropout(dropout)

    def forward(self, x_D: Tensor) -> Tensor:
        inner = self.linear1(x_D)
        inner = F.gelu(inner) if self.linear3 is None else F.silu(inner) * self.linear3(x_D)
        return self.linear2(self.dropout(inner))


class Layer(nn.Module):
    """Mixer and optional feed-forward network, each a sublayer; :class:`Stack` describes the options."""

    def __init__(
        self,
        mixer: Mixer,
        d_model: int,
        *,
        norm: Literal["post", "pre", "none"],
        norm_eps: float,
        norm_kind: NormKind = "layer",
        residual: bool,
        gated: bool,
        ffn: int,
        ffn_activation: Literal["gelu", "swiglu"],
        dropout: float,
    ) -> None:
        super().__init__()

        def make_norm() -> nn.Module:
            return nn.Identity() if norm == "none" else NORMS[norm_kind](d_model, eps=norm_eps)

        self.mixer = mixer
        self.norm = make_norm()
        self.norm_first = norm == "pre"
        self.residual = residual
        self.dropout = Dropout(dropout)
        self.gate = nn.Linear(d_model, d_model) if gated else None
        self.ffn: FeedForward | None = None
        self.ffn_gate: nn.Linear | None = None
        if ffn:
            self.ffn = FeedForward(
                d_model, ffn * d_model, activation=ffn_activation, dropout=dropout
            )
            self.ffn_norm = make_norm()
            self.ffn_gate = nn.Linear(d_model, d_model) if gated else None

    def forward(self, x_BLD: Tensor, context: Any = None, at: Tensor | None = None) -> Tensor:
        y_BLD = self.mixer(self._before(x_BLD), context)
        return self._after(pick(x_BLD, at), pick(y_BLD, at))

    def init_state(self, batch_size: int) -> Any:
        return self.mixer.init_state(batch_size)

    def step(self, x_BD: Tensor, state: Any) -> tuple[Tensor, Any]:
        y_BD, state = self.mixer.step(self._before(x_BD), state)
        return self._after(x_BD, y_BD), state

    def _before(self, x: Tensor) -> Tensor:
        return self.norm(x) if self.norm_first else x

    def _after(self, x: Tensor, y: Tensor) -> Tensor:
        """Apply all that follows the mixer, which turned the layer's input x into y; each token by itself."""
        y = self._add(x if self.residual else None, y, self.gate)
        x = y if self.norm_first else self.norm(y)
        if self.ffn is None:
            return x
        y = self._add(x, self.ffn(self.ffn_norm(x) if self.norm_first else x), self.ffn_gate)
        return y if self.norm_first else self.ffn_norm(y)

    def _add(self, x: Tensor | None, y: Tensor, gate: nn.Linear | None) -> Tensor:
        y = self.dropout(y)
        if x is None:
            return y
        return x + y if gate is None else torch.addcmul(x, gate(x).sigmoid(), y)


class Stack(Backbone):
    """Layers in sequence, each a mixer and an optional feed-forward network.

    ``norm=post`` (FT-Mamba, Mamba4Rec, SASRec):  ``x = norm(x + drop(mixer(x)));  x = norm(x + drop(ffn(x)))``,
    ``norm=pre``:  ``x = x + drop(mixer(norm(x)));  x = x + drop(ffn(norm(x)))``, and a norm at the end.
    ``residual`` adds the sum around the mixer. The sum around the feed-forward network is always there.

    Mamba4Rec (Liu et al. 2024, arXiv 2403.03900) is ``norm=post``, ``ffn=4``, ``norm_eps=1e-12``, ``init=normal``, and
    ``residual`` if there are several layers: with one layer its public code has no residual sum around Mamba. Its
    parameter count includes one more LayerNorm, of the item embeddings, which belongs to the tokenizer here.

    Args:
        mixers: One mixer for each layer, at least one.
        d_model: D.
        norm: Place of the norm: ``post``, after each sum; ``pre``, before the mixer and the network; or ``none``.
        norm_kind: ``layer``, LayerNorm; or ``rms``, RMSNorm.
        norm_eps: Number that the norm adds to the variance.
        residual: Add a layer's input to its mixer's output.
        gated: Gate each sum: ``x + sigmoid(W x + b) * drop(...)`` (LiGR, arXiv 2502.03417); needs ``residual``.
        ffn: Width of the feed-forward network as a multiple of D; 0: no network.
        ffn_activation: ``gelu``, or ``swiglu`` (three matrices, no biases).
        final_norm: Add a norm at the end, with ``norm=pre``.
        dropout: Dropout rate of the output of each mixer and network, and within the network.
        init: Initialisation of linear layers. ``own``: as the authors of each block do. ``normal``: weights
            N(0, init_std²) and biases 0, also within the mixers, as RecBole does for the public Mamba4Rec. That
            includes Mamba's ``dt_proj``, so its steps start at softplus(0) = 0.69, not between 0.001 and 0.1.
            Parameters outside linear layers (convolution, A, D, Mamba-2's ``dt_bias``) keep their own
            initialisation. ``xavier``: Xavier-normal weights, as RecTools does.
        init_std: Standard deviation of ``init=normal``.

    Raises:
        ValueError: An option has a value other than those above.
    """

    def __init__(
        self,
        *mixers: Mixer,
        d_model: int,
        norm: Literal["post", "pre", "none"] = "post",
        norm_kind: NormKind = "layer",
        norm_eps: float = 1e-5,
        residual: bool = False,
        gated: bool = False,
        ffn: int = 0,
        ffn_activation: Literal["gelu", "swiglu"] = "gelu",
        final_norm: bool = True,
        dropout: float = 0.0,
        init: Init = "own",
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        if not mixers:
            raise ValueError("n_layers=0: a stack needs a layer; give at least 1")
        if norm not in ("post", "pre", "none"):
            raise ValueError(f"norm={norm!r}: expected 'post', 'pre' or 'none'")
        if norm_kind not in NORMS:
            raise ValueError(f"norm_kind={norm_kind!r}: expected 'layer' or 'rms'")
        if ffn_activation not in ("gelu", "swiglu"):
            raise ValueError(f"ffn_activation={ffn_activation!r}: expected 'gelu' or 'swiglu'")
        if ffn < 0:
            raise ValueError(f"ffn={ffn}: expected 0 (no network) or a multiple of d_model")
        if gated and not residual:
            raise ValueError(
                "gated=true needs residual=true: the gate belongs to the sum with a layer's input"
            )
        self.d_model = d_model
        self.layers = nn.ModuleList(
            Layer(
                mixer,
                d_model,
                norm=norm,
                norm_kind=norm_kind,
                norm_eps=norm_eps,
                residual=residual,
                gated=gated,
                ffn=ffn,
                ffn_activation=ffn_activation,
                dropout=dropout,
            )
            for mixer in mixers
        )
        self.final_norm = (
            NORMS[norm_kind](d_model, eps=norm_eps)
            if norm == "pre" and final_norm
            else nn.Identity()
        )
        reinitialise(self, init, init_std)

    def context(self, tokens: Tensor, seq_idx: Tensor | None) -> Any:
        """Return the second argument of the mixers, computed once for all layers.

        Where ``uses_times`` is True, a third argument is the :class:`Clock`, or None.
        """
        return seq_idx

    def forward(
        self,
        tokens: Tensor,
        seq_idx: Tensor | None = None,
        at: Tensor | None = None,
        clock: Clock | None = None,
    ) -> Tensor:
        """Mix the tokens of each row, as :meth:`Backbone.forward`; ``clock`` is for backbones that use times."""
        timed = () if clock is None else (clock,)
        context = self.context(tokens, seq_idx, *timed)
        *earlier, last = self.layers
        for layer in earlier:
            tokens = layer(tokens, context)
        return self.final_norm(last(tokens, context, at))

    def _layers(self) -> Iterator[Layer]:
        return iter(cast(Iterable[Layer], self.layers))

    def init_state(self, batch_size: int) -> list[Any]:
        """Return the state of each layer before the first token, as :meth:`Backbone.init_state` does."""
        return [layer.init_state(batch_size) for layer in self._layers()]

    def step(self, token: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        """Advance by one token, as :meth:`Backbone.step` does."""
        states = []
        for layer, layer_state in zip(self._layers(), state, strict=True):
            token, layer_state = layer.step(token, layer_state)
            states.append(layer_state)
        return self.final_norm(token), states


class TimedStack(Stack):
    """Stack of mixers that may scale their step sizes by time."""

    def context(self, tokens: Tensor, seq_idx: Tensor | None, clock: Clock | None = None) -> Any:
        """Return ``seq_idx``, with the time since the event before where steps are scaled by it."""
        return Timed(seq_idx, clock.gap) if self.uses_times and clock is not None else seq_idx
