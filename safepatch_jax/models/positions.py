"""What config.json says of positions: rotary bases, their scaling, windows, and what differs by
layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from safepatch_jax.models.families import Family
from safepatch_jax.runtime.text import printable

FULL, SLIDING = "full_attention", "sliding_attention"
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")
_ROPE = {"rope_type", "type", "rope_theta"}
_KEYS = {
    "default": _ROPE,
    "llama3": {*_ROPE, *_LLAMA3, "original_max_position_embeddings"},
    "linear": {*_ROPE, "factor"},
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Stretching of the slow rotations, as LLaMA 3.1 does it (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_length: int


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """All rotations slower by a factor (``rope_type: linear``)."""

    factor: float


def is_positive(x: Any) -> bool:
    # Compared as it is: a huge whole number has no float.
    return type(x) in (int, float) and 0 < x < 1e18


def read_rope(
    raw: Mapping[str, Any], family: Family, offenders: list[str]
) -> tuple[float, RopeScaling | LinearScaling | None]:
    """Read base and scaling from either spelling: transformers 4 has `rope_theta` and
    `rope_scaling`, 5 `rope_parameters`."""
    thetas = [raw["rope_theta"]] if raw.get("rope_theta") is not None else []
    scalings: list[RopeScaling | LinearScaling | None] = []
    for key in ("rope_parameters", "rope_scaling"):
        parameters = raw.get(key)
        if parameters is None or parameters == {}:
            continue
        if not isinstance(parameters, Mapping):
            offenders.append(f"{key} = {parameters!r:.60} (an object is needed)")
            continue
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind not in tuple(_KEYS):  # it may be a list
            names = " or ".join(map(repr, _KEYS))
            offenders.append(f"{key}.rope_type = {kind!r:.60} (supported: {names})")
            continue
        known = _KEYS[kind]
        for name, value in parameters.items():
            is_default = name == "partial_rotary_factor" and value == 1.0
            if name not in known and not is_default and value is not None:
                offenders.append(
                    f"{key}.{printable(name, 60)} = {value!r:.60} (unknown for rope_type '{kind}')"
                )
        if parameters.get("rope_theta") is not None:
            thetas.append(parameters["rope_theta"])
        if kind == "default":
            scalings.append(None)
        elif kind == "linear":
            scalings += _read_linear(key, parameters, offenders)
        else:
            length = raw.get("max_position_embeddings")
            scalings += _read_llama3(key, parameters, length, offenders)
    if not all(is_positive(theta) for theta in thetas):
        offenders.append(f"rope_theta = {thetas!r:.60} (a number above 0 is needed)")
    elif len(set(thetas)) > 1 or len(set(scalings)) > 1:
        names = ("rope_parameters", "rope_theta", "rope_scaling")
        offenders.append(
            "rope_parameters disagrees with rope_theta or rope_scaling: "
            + ", ".join(f"{name} = {raw.get(name)!r:.100}" for name in names)
        )
    else:
        theta = float(thetas[0] if thetas else family.defaults.get("rope_theta", 10000.0))
        return theta, scalings[0] if scalings else None
    return math.nan, None


def _read_llama3(
    key: str, parameters: Mapping[str, Any], max_length: Any, offenders: list[str]
) -> list[RopeScaling]:
    """Return the scaling; none, with an offender noted, if it is wrong."""
    numbers = [parameters.get(name) for name in _LLAMA3]
    original = parameters.get("original_max_position_embeddings", max_length)
    if not all(is_positive(x) for x in (*numbers, original)):
        offenders.append(
            f"{key} = {dict(parameters)!r:.150} (llama3 needs {', '.join(_LLAMA3)} and "
            "original_max_position_embeddings, numbers above 0)"
        )
        return []
    factor, low, high = numbers
    if low >= high:
        offenders.append(
            f"{key}: low_freq_factor {low!s:.20} must be below high_freq_factor {high!s:.20}"
        )
        return []
    return [RopeScaling(float(factor), float(low), float(high), int(original))]


def _read_linear(
    key: str, parameters: Mapping[str, Any], offenders: list[str]
) -> list[LinearScaling]:
    factor = parameters.get("factor")
    if not is_positive(factor):
        offenders.append(f"{key}.factor = {factor!r:.60} (a number above 0 is needed)")
        return []
    return [LinearScaling(float(factor))]


def read_windows(
    values: Mapping[str, Any], family: Family, offenders: list[str]
) -> tuple[int, ...]:
    """Return each layer's window; empty if no layer has one."""
    layers, window = values["num_hidden_layers"], values.get("sliding_window") or 0
    if "layer_types" not in family.handled:
        return (window,) * layers if window else ()
    if "use_sliding_window" in family.defaults and not values.get("use_sliding_window"):
        window = 0
    kinds = _layer_types(values, offenders)
    if kinds is None:
        return ()
    names = (SLIDING, FULL)
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or any(kind not in names for kind in kinds)
    ):
        offenders.append(
            f"layer_types = {kinds!r:.100} (needs {layers} times 'full_attention' or "
            "'sliding_attention')"
        )
        return ()
    if SLIDING in kinds and not window and "use_sliding_window" not in family.defaults:
        offenders.append(f"sliding_window = {values.get('sliding_window')!r} (layers have one)")
        return ()
    windows = tuple(window if kind == SLIDING else 0 for kind in kinds)
    return windows if any(windows) else ()


def _layer_types(values: Mapping[str, Any], offenders: list[str]) -> Any:
    """Return what config.json says of each layer's attention, or the family's default; None, with
    an offender noted, if that is wrong."""
    layers = values["num_hidden_layers"]
    period = values.get("_sliding_window_pattern") or values.get("sliding_window_pattern")
    name, number = "max_window_layers", values.get("max_window_layers")
    if period is not None:
        name, number = "sliding_window_pattern", period
    given = values.get("layer_types")
    if given and number is None:  # null beside the list is the same as absent
        return given
    if type(number) is not int or number < 0:
        offenders.append(f"{name} = {number!r:.60} (a whole number is needed)")
        return None
    if given:
        return given
    if period:  # each period's last layer sees all
        return [FULL if (i + 1) % period == 0 else SLIDING for i in range(layers)]
    return [FULL if i < number else SLIDING for i in range(layers)]


def read_ropes(
    values: Mapping[str, Any], family: Family, windows: tuple[int, ...], offenders: list[str]
) -> tuple[str, ...]:
    """Return which rotary positions each layer has: global, local (its own base) or none; empty if
    all have the same."""
    layers = values["num_hidden_layers"]
    if "rope_local_base_freq" in family.defaults:  # layers with a window have the local ones
        return tuple("local" if window else "global" for window in windows)
    if "no_rope_layer_interval" not in family.defaults:
        return ()
    interval, given = values.get("no_rope_layer_interval"), values.get("no_rope_layers")
    if type(interval) is not int or interval < 1:
        offenders.append(f"no_rope_layer_interval = {interval!r:.60} (1 or more is needed)")
        return ()
    turned = given or [int((i + 1) % interval != 0) for i in range(layers)]
    right = isinstance(turned, list) and len(turned) == layers
    if not right or any(x not in (0, 1) for x in turned):
        offenders.append(f"no_rope_layers = {given!r:.100} (needs {layers} times 0 or 1)")
        return ()
    return tuple("global" if x else "none" for x in turned)


def one_rope(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return config.json with rotary positions by kind of layer (transformers 5) as transformers 4
    spells them: those of all positions, and the base of the local ones."""
    rope = raw.get("rope_parameters")
    if not isinstance(rope, Mapping) or not isinstance(rope.get(FULL), Mapping):
        return raw
    local = rope.get(SLIDING)
    if isinstance(local, Mapping) and not _is_plain(local):
        return raw  # refused by `read_rope`, which names it
    out = {**raw, "rope_parameters": rope[FULL]}
    if isinstance(local, Mapping) and local.get("rope_theta") is not None:
        out["rope_local_base_freq"] = local["rope_theta"]
    return out


def _is_plain(parameters: Mapping[str, Any]) -> bool:
    """Say whether rotary positions have a base and nothing else."""
    told = {name: x for name, x in parameters.items() if x is not None}
    kind = told.get("rope_type", told.get("type", "default"))
    return kind == "default" and told.keys() <= _ROPE
