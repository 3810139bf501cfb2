"""Give the Mamba and Mamba-2 models of ``transformers`` the operators of this package.

``transformers`` computes each operator in a function of its ``modeling_mamba`` or ``modeling_mamba2``. A kernel takes
the place of that function if ``mamba_ssm`` or ``causal_conv1d`` can be imported, which need a GPU.
:func:`use_in_transformers` puts our operators into the same place, for models that exist already and for later ones:

    function of transformers                                operator
    causal_conv1d_fn, causal_conv1d_update                  causal_conv1d
    mamba_selective_scan, mamba_selective_state_update      selective_scan
    mamba2_chunk_scan, mamba2_selective_state_update        ssd

Models, weights and configs are not touched, so training, ``generate`` and saved files stay as they are. Where an
operator has no equal (another activation than SiLU, ``cu_seqlens``), the function of ``transformers`` computes.

Legend of shape suffixes: B batch, L length, E channels, N states, W width of the convolution, H heads, P channels of a
head, G groups.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_ssm.errors import UserError
from recsys_ssm.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from recsys_ssm.ops.selective_scan import selective_scan, selective_scan_step
from recsys_ssm.ops.ssd import ssd, ssd_step

__all__ = ["transformers_kernels", "undo_in_transformers", "use_in_transformers"]

_Function = Callable[..., Any]

_LOCK = threading.Lock()


class _Replaced(NamedTuple):
    """A function of ``transformers`` and ours in its place."""

    holder: Any
    """Module or class."""
    name: str
    theirs: _Function
    ours: _Function


_REPLACED: list[_Replaced] = []


def use_in_transformers() -> None:
    """Compute the Mamba and Mamba-2 models of ``transformers`` by the operators of this package, in this process.

    A second call changes nothing. :func:`undo_in_transformers` undoes it; :func:`transformers_kernels` does both for a
    ``with`` block.

    Raises:
        UserError: ``transformers`` is not installed, or its version computes these models in another way.

    Example:
        >>> from recsys_ssm import ops
        >>> ops.use_in_transformers()  # doctest: +SKIP
        >>> model = transformers.MambaForCausalLM.from_pretrained("mamba-130m")  # doctest: +SKIP
    """
    with _LOCK:
        if not _REPLACED:
            _REPLACED.extend(_found())
        for each in _REPLACED:
            setattr(each.holder, each.name, each.ours)


def undo_in_transformers() -> None:
    """Give ``transformers`` its own functions back; without :func:`use_in_transformers` before, change nothing."""
    with _LOCK:
        for each in _REPLACED:
            setattr(each.holder, each.name, each.theirs)
        _REPLACED.clear()


@contextmanager
def transformers_kernels() -> Iterator[None]:
    """Call :func:`use_in_transformers` for a ``with`` block; blocks may be nested.

    Raises:
        UserError: As :func:`use_in_transformers`.
    """
    was_used = bool(_REPLACED)
    use_in_transformers()
    try:
        yield
    finally:
        if not was_used:
            undo_in_transformers()


def _found() -> list[_Replaced]:
    """Find the functions to replace, and check that each is called with the arguments of ours."""
    try:
        version = importlib.import_module("transformers").__version__
    except ImportError:
        raise UserError(
            "transformers is not installed; run pip install 'recsys-ssm[text]'"
        ) from None
    found = []
    for kind, functions in _FUNCTIONS.items():
        name = f"transformers.models.{kind}.modeling_{kind}"
        try:
            module = importlib.import_module(name)
            source = inspect.getsource(module)
        except (ImportError, OSError):
            raise _unfit(version, f"{name} is missing") from None
        for function, make in functions.items():
            theirs = getattr(module, function, None)
            # One place defines the function, another calls it.
            if theirs is None or source.count(f"{function}(") < 2:
                raise _unfit(version, f"{name} has no function {function}")
            ours = functools.wraps(theirs)(make(theirs))
            takes = inspect.signature(theirs).parameters
            unknown = [
                parameter.name
                for parameter in inspect.signature(ours, follow_wrapped=False).parameters.values()
                if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.name not in takes
            ]
            if unknown:
                raise _unfit(version, f"{name}.{function} does not take {', '.join(unknown)}")
            found.append(_Replaced(module, function, theirs, ours))
        mixer = getattr(module, "MambaMixer", None)
        if mixer is not None and all(f"self.{part} = " in source for part in _PARTS):
            theirs = mixer.forward
            found.append(
                _Replaced(mixer, "forward", theirs, functools.wraps(theirs)(_mixer(theirs)))
            )
    return found


def _unfit(version: str, why: str) -> UserError:
    return UserError(
        f"transformers {version} does not fit our kernels: {why}; install transformers 5.24, or leave out "
        "use_in_transformers()"
    )


def _conv(theirs: _Function) -> _Function:
    def causal_conv1d_fn(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if activation not in _SILU or kwargs.get("cu_seqlens") is not None:
            return theirs(hidden_states, weight, bias, activation, **kwargs)
        y_BLE = causal_conv1d(
            hidden_states.transpose(1, 2),
            weight,
            bias,
            _SILU[activation],
            kwargs.get("seq_idx"),
        )
        return y_BLE.transpose(1, 2)

    return causal_conv1d_fn


def _conv_step(theirs: _Function) -> _Function:
    def causal_conv1d_update(
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        width = weight.shape[1]
        one = hidden_states.dim() == 3 and hidden_states.shape[2] == 1
        if activation not in _SILU or not one or conv_state.shape[2] != width:
            return theirs(hidden_states, conv_state, weight, bias, activation)
        # Their state is as wide as the filter, ours is one shorter.
        new = hidden_states[..., 0].to(conv_state.dtype)
        y_BE, _ = causal_conv1d_step(new, conv_state[..., 1:], weight, bias, _SILU[activation])
        conv_state.copy_(torch.cat([conv_state[..., 1:], new[..., None]], dim=2))
        return y_BE[..., None].to(hidden_states.dtype)

    return causal_conv1d_update


def _mamba_scan(theirs: _Function) -> _Function:
    def mamba_selective_scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **kwargs: Any,
    ) -> Any:
        found = selective_scan(
            hidden_states.transpose(1, 2),
            dt.transpose(1, 2),
            A,
            B.transpose(1, 2),
            C.transpose(1, 2),
            D,
            None if z is None else z.transpose(1, 2),
            delta_bias,
            delta_softplus,
            return_final_state=True,
        )
        y_BEL, state_BEN = found[0].transpose(1, 2), found[1]
        return (y_BEL, state_BEN.to(hidden_states.dtype)) if return_last_state else y_BEL

    return mamba_selective_scan


def _mamba_step(theirs: _Function) -> _Function:
    def mamba_selective_state_update(
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        y_BE, next_BEN = selective_scan_step(
            state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus
        )
        state.copy_(next_BEN)
        return y_BE

    return mamba_selective_state_update


def _mixer(theirs: _Function) -> _Function:
    """Make the forward pass of a Mamba block, which has no transposes between the operators."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        # A block whose weights are moved to a device when it runs has a hook.
        hooked = any(hasattr(getattr(self, part), "_hf_hook") for part in ("conv1d", "dt_proj"))
        if cache is not None or kwargs or hooked or self.activation not in ("silu", "swish"):
            given = {} if cache is None else {"cache": cache}
            return theirs(self, hidden_states, attention_mask=attention_mask, **given, **kwargs)
        mask_BL1 = None if attention_mask is None else attention_mask[:, :, None]
        x_BLD = hidden_states
        if mask_BL1 is not None:
            x_BLD = (x_BLD * mask_BL1).to(x_BLD.dtype)
        x_BLE, z_BLE = self.in_proj(x_BLD).chunk(2, dim=-1)
        x_BLE = causal_conv1d(x_BLE, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu")
        if mask_BL1 is not None:
            x_BLE = (x_BLE * mask_BL1).to(x_BLE.dtype)
        dt_BLR, B_BLN, C_BLN = self.x_proj(x_BLE).split(
            [self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1
        )
        y_BLE = selective_scan(
            x_BLE,
            F.linear(dt_BLR, self.dt_proj.weight),
            -torch.exp(self.A_log.float()),
            B_BLN,
            C_BLN,
            self.D.float(),
            z_BLE,
            self.dt_proj.bias.float(),
            dt_softplus=True,
        )
        return self.out_proj(y_BLE.to(hidden_states.dtype))

    return forward


_PARTS = ("in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "D", "out_proj", "activation", "time_step_rank",
          "ssm_state_size")  # fmt: skip
"""Parts of a block of ``transformers`` that our forward pass uses."""


def _mamba2_scan(theirs: _Function) -> _Function:
    def mamba2_chunk_scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **kwargs: Any,
    ) -> Any:
        if kwargs.get("cu_seqlens") is not None or kwargs.get("z") is not None:
            kwargs |= {"D": D, "dt_bias": dt_bias, "initial_states": initial_states}
            kwargs |= {"dt_softplus": dt_softplus, "dt_limit": dt_limit}
            kwargs |= {"return_final_states": return_final_states}
            return theirs(hidden_states, dt, A, B, C, chunk_size, **kwargs)
        low, high = dt_limit
        # Softplus is positive, so the usual limits change nothing.
        if not (dt_softplus and low <= 0 and high == float("inf")):
            dt = dt if dt_bias is None else dt + dt_bias
            dt = (F.softplus(dt) if dt_softplus else dt).clamp(low, high)
            dt_bias, dt_softplus = None, False
        seq_idx = kwargs.get("seq_idx")
        options: dict[str, Any] = {"initial_state": initial_states, "chunk_size": chunk_size}
        if not return_final_states:
            return ssd(hidden_states, dt, A, B, C, D, dt_bias, dt_softplus, seq_idx, **options)
        return ssd(
            hidden_states, dt, A, B, C, D, dt_bias, dt_softplus, seq_idx,
            return_final_state=True, **options,
        )  # fmt: skip

    return mamba2_chunk_scan


def _mamba2_step(theirs: _Function) -> _Function:
    def mamba2_selective_state_update(
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        # A head has one step size, decay rate and skip weight, which the caller repeats.
        repeated = (dt, A, D, dt_bias)
        if z is not None or any(t is not None and t.stride(-1) != 0 for t in repeated):
            return theirs(state, hidden_states, dt, A, B, C, D, dt_bias, dt_softplus, z, **kwargs)
        y_BHP, next_BHPN = ssd_step(
            state,
            hidden_states,
            dt[..., 0],
            A[:, 0, 0],
            B,
            C,
            None if D is None else D[:, 0],
            None if dt_bias is None else dt_bias[:, 0],
            dt_softplus,
        )
        state.copy_(next_BHPN)
        return y_BHP

    return mamba2_selective_state_update


_SILU: dict[str | None, Any] = {"silu": "silu", "swish": "silu", None: None}
"""Activations of the operator by their names in configs."""

_CONVOLUTION = {"causal_conv1d_fn": _conv, "causal_conv1d_update": _conv_step}
_FUNCTIONS: dict[str, dict[str, Callable[[_Function], _Function]]] = {
    "mamba": {
        **_CONVOLUTION,
        "mamba_selective_scan": _mamba_scan,
        "mamba_selective_state_update": _mamba_step,
    },
    "mamba2": {
        **_CONVOLUTION,
        "mamba2_chunk_scan": _mamba2_scan,
        "mamba2_selective_state_update": _mamba2_step,
    },
}
"""Makers of our functions from theirs, by module and name."""
