"""PolarConfig: every setting of an engine, from defaults, a TOML file, POLARKV_* and flags, in that order."""

from __future__ import annotations

import argparse
import math
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import msgspec

from polarkv_sglang.blend.stages import Metric, Strategy, parse_stages
from polarkv_sglang.errors import ConfigError

Mode = Literal["hicache", "direct"]
SpillMode = Literal["share", "evict"]
BlendMode = Literal["off", "ask", "all"]
BlendGate = Literal["verdict", "none"]

ENV_PREFIX = "POLARKV_"
FLAG_PREFIX = "--polarkv-"
ENABLE_FLAG = "--enable-polarkv"
# Read by other parts of the package, so they are known names without being settings of an engine.
OTHER_VARIABLES = frozenset({"POLARKV_CONFIG", "POLARKV_RUNTIME_DIR", "POLARKV_CPU_PLATFORM"})

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Bytes of a size such as ``8GiB``, ``512MB`` or ``1048576``; ConfigError for anything else."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"size {text!r} is not understood; write a number and a unit, such as 8GiB or 512MB"
        )
    return int(float(match[1]) * (_UNITS | _BINARY_UNITS)[match[2].lower()])


def format_bytes(count: int) -> str:
    """A size for people, in binary units: ``8.0 GiB``."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def parse_address(text: str) -> tuple[str, int]:
    """``host:port`` (``[::1]:7411`` for IPv6) as a pair; ConfigError otherwise."""
    host, separator, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"pool node {text!r} is not host:port; write for example 10.0.0.4:7411")
    return host, int(port)


class PolarConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of PolarKV in one engine.

    Each field is also a key of the config file, the variable ``POLARKV_<FIELD>`` and the flag
    ``--polarkv-<field>``; a flag beats a variable, a variable beats the file.
    """

    nodes: tuple[str, ...] = ()  # memory nodes, host:port; none: an embedded node on this host
    nodes_file: str | None = None  # instead of nodes: one host:port a line, read again when it changes
    copies: int = 1  # memory nodes that hold a stripe which is read often
    # Bytes of the embedded node; 0: an eighth of the free memory, 64 GiB at most.
    capacity_bytes: int = msgspec.field(default=0, name="capacity")
    token: str | None = None  # shared secret of the control plane
    mode: Mode = "hicache"  # hicache: through HiCache's host tier; direct: between L1 and the pool
    spill: SpillMode = "share"  # share: written at insert; evict: written when it leaves L1
    # Seconds that one batch against the pool may take before it is a miss.
    deadline_s: float = msgspec.field(default=1.0, name="deadline")
    stripe_pages: int = 32  # consecutive pages of a prefix that are placed on one memory node
    spill_watermark: float = 0.25  # evict: share of L1 kept free or already copied ahead of need
    # CacheBlend: nobody; the requests that ask for it; all that do not refuse it.
    blend: BlendMode = "off"
    blend_ratio: float = 0.15  # share of reused tokens that is computed again from the check layer on
    blend_check_layer: int = 1  # where reused tokens are compared with computed ones, counted from 0
    blend_stages: str = ""  # later layers with lower ratios: LAYER:RATIO,...
    blend_metric: Metric = "v"  # what is compared: values, keys, or both
    # Computed again are those that deviate most, or the first tokens of each reused piece.
    blend_strategy: Strategy = "deviation"
    blend_chunk_tokens: int = 32  # tokens that have to agree to be found
    blend_min_tokens: int = 256  # of a prompt that have to be reusable for it to be blended
    blend_index_tokens: int = 1 << 22  # cached prompts that are searched, in tokens of about 14 bytes
    # Bytes that KV of other engines arrives in from the pool; 0: only this engine's own is blended.
    blend_arena_bytes: int = msgspec.field(default=1 << 28, name="blend_arena")
    # Whether a model has to have passed polarkv blend-check, and the folder where that left its verdict.
    blend_gate: BlendGate = "verdict"
    blend_verdicts: str | None = None  # none: polarkv/blend in the user's cache folder
    ucx_library: str | None = None  # path of libucp.so.0; none: the system's, else the wheel's
    ucx_tls: str | None = None  # UCX transports, as UCX_TLS; tcp must be among them
    tls_cert: str | None = None  # control plane by mutual TLS: our certificate, its key, and the authority
    tls_key: str | None = None
    tls_ca: str | None = None

    def __post_init__(self) -> None:
        for node in self.nodes:
            parse_address(node)
        if len(set(self.nodes)) != len(self.nodes):
            raise ConfigError(f"nodes {', '.join(self.nodes)} names a memory node twice")
        if self.nodes and self.nodes_file is not None:
            raise ConfigError(f"nodes and nodes_file {self.nodes_file} are both given; leave one out")
        if self.capacity_bytes != 0 and self.capacity_bytes < 2**24:
            raise ConfigError(
                f"capacity {self.capacity_bytes} B is below 16 MiB; give more, or 0 for the default"
            )
        _within("deadline", self.deadline_s, 0.01, 5.0, "seconds")  # SGLang joins storage threads for 10
        _within("stripe_pages", self.stripe_pages, 1, 4096, "pages")
        _within("spill_watermark", self.spill_watermark, 0.0, 0.9, "of L1")
        _within("copies", self.copies, 1, 3, "memory nodes")
        _within("blend_ratio", self.blend_ratio, 0.0, 1.0, "of the reused tokens")
        _within("blend_check_layer", self.blend_check_layer, 1, 1024, "(layer 0 knows no context)")
        _within("blend_chunk_tokens", self.blend_chunk_tokens, 8, 4096, "tokens")
        _within("blend_min_tokens", self.blend_min_tokens, 1, 1 << 30, "tokens")
        _within("blend_index_tokens", self.blend_index_tokens, 1 << 10, 1 << 30, "tokens")
        _within("blend_arena", self.blend_arena_bytes, 0, 1 << 40, "bytes")
        parse_stages(self.blend_check_layer, self.blend_ratio, self.blend_stages)
        if self.token == "":
            raise ConfigError("token is empty; leave it out to run without one")
        if self.mode == "direct" and self.blend != "off":
            raise ConfigError(
                f"blend {self.blend} needs mode hicache; leave out mode direct, or the blend setting"
            )
        if self.mode == "direct" and self.spill == "evict":
            raise ConfigError(
                "mode direct writes KV to the pool at insert; leave out spill evict, or use mode hicache"
            )


def _within(name: str, value: float, low: float, high: float, unit: str) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise ConfigError(f"{name} {value} is out of range; it must be {low} to {high} {unit}")


_NO_NODES = "no memory node is named; leave it out for one that is embedded on this host"
SETTINGS = tuple(PolarConfig.__struct_encode_fields__)
_HELP = {
    "nodes": "Memory nodes, host:port, comma-separated. None: one is embedded on this host.",
    "nodes_file": "File with one memory node a line, read again when it changes, instead of a list.",
    "copies": "Memory nodes that hold a stripe which is read often, 1 to 3. Default: 1.",
    "capacity": "Memory of the embedded node, such as 8GiB. Default: an eighth of the free memory.",
    "token": "Shared secret of the memory nodes (better given as POLARKV_TOKEN).",
    "mode": "hicache: KV passes through HiCache's host tier; direct: between GPU memory and the pool.",
    "spill": "share: written to the pool at insert; evict: written when it leaves GPU memory.",
    "deadline": "Seconds that one batch against the pool may take before it is a miss. Default: 1.0.",
    "stripe_pages": "Consecutive pages placed on one memory node; equal on all engines. Default: 32.",
    "spill_watermark": "With evict: share of L1 that is free or copied ahead of need. Default: 0.25.",
    "blend": "CacheBlend: off; ask: for requests that ask for it (also the flag alone); all: unless refused.",
    "blend_ratio": "Share of reused tokens that is computed again. Default: 0.15.",
    "blend_check_layer": "Layer at which reused tokens are compared with computed ones. Default: 1.",
    "blend_stages": "Later layers with lower ratios, LAYER:RATIO,... Default: none.",
    "blend_metric": "What is compared: v, k or kv. Default: v.",
    "blend_strategy": "deviation: compute again what deviates most; first: the first tokens of each piece.",
    "blend_chunk_tokens": "Tokens that have to agree for text to be found again. Default: 32.",
    "blend_min_tokens": "Tokens of a prompt that have to be reusable for it to be blended. Default: 256.",
    "blend_index_tokens": "Cached prompts that are searched, in tokens of about 14 bytes. Default: 4194304.",
    "blend_arena": "Memory that KV for blending arrives in from the pool; 0: it does not. Default: 256MiB.",
    "blend_gate": "verdict: blend only a model that passed polarkv blend-check; none: any. Default: verdict.",
    "blend_verdicts": "Folder of verdicts. Default: polarkv/blend in the user's cache folder.",
    "ucx_library": "Path of libucp.so.0. Default: the system's (>= 1.17), else the wheel's.",
    "ucx_tls": "UCX transports to use, as UCX_TLS. Default: UCX's choice.",
    "tls_cert": "Our certificate (PEM), for mutual TLS with the memory nodes' control servers.",
    "tls_key": "The key of --polarkv-tls-cert (PEM).",
    "tls_ca": "The authority (PEM) that signed our certificate and those of the memory nodes.",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--enable-polarkv`` and one flag per setting."""
    group = parser.add_argument_group("PolarKV")
    group.add_argument(
        ENABLE_FLAG,
        action="store_true",
        help="Keep evicted KV cache in a distributed memory pool and bring it back from there.",
    )
    group.add_argument(f"{FLAG_PREFIX}config", metavar="FILE", help="TOML file with PolarKV settings.")
    for name in SETTINGS:
        flag = f"{FLAG_PREFIX}{name.replace('_', '-')}"
        if name == "blend":
            group.add_argument(flag, metavar="VALUE", help=_HELP[name], nargs="?", const="ask")
        else:
            group.add_argument(flag, metavar="VALUE", help=_HELP[name])


def from_flags(args: argparse.Namespace, environ: Mapping[str, str] | None = None) -> PolarConfig:
    """The configuration that flags, environment and config file give; ConfigError names what is wrong."""
    flags = {name: getattr(args, f"polarkv_{name}", None) for name in SETTINGS}
    return load_config(
        file=getattr(args, "polarkv_config", None),
        environ=os.environ if environ is None else environ,
        flags={name: value for name, value in flags.items() if value is not None},
    )


def load_config(
    *,
    file: str | None = None,
    environ: Mapping[str, str] = MappingProxyType({}),
    flags: Mapping[str, str] = MappingProxyType({}),
) -> PolarConfig:
    """Merge file < environment < flags over the defaults.

    Raises ConfigError that names the setting and where it came from.
    """
    file = file or environ.get("POLARKV_CONFIG")
    values: dict[str, object] = _from_file(Path(file)) if file else {}
    for name, text in environ.items():
        if not name.startswith(ENV_PREFIX) or name in OTHER_VARIABLES:
            continue
        setting = name.removeprefix(ENV_PREFIX).lower()
        if setting not in SETTINGS:
            known = ", ".join(ENV_PREFIX + known.upper() for known in SETTINGS)
            raise ConfigError(f"environment variable {name} is unknown; known are {known}")
        values[setting] = _parse(setting, text, name)
    for setting, text in flags.items():
        values[setting] = _parse(setting, text, FLAG_PREFIX + setting.replace("_", "-"))
    return build_config(values)


def build_config(values: Mapping[str, object]) -> PolarConfig:
    """A PolarConfig from plain values; ConfigError instead of msgspec's own error.

    An empty list of nodes is an error too: it is what is left of a list whose value was lost on its way.
    """
    for name in values:
        if name not in SETTINGS:
            raise ConfigError(f"setting {name!r} is unknown; known are {', '.join(SETTINGS)}")
    if "nodes" in values and not values["nodes"]:
        raise ConfigError(f"nodes: {_NO_NODES}")
    try:
        return msgspec.convert(values, PolarConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"PolarKV settings: {error}") from error


def _from_file(path: Path) -> dict[str, object]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not TOML: {error}") from error
    for name in values:
        if name not in SETTINGS:
            raise ConfigError(f"config file {path}: {name!r} is unknown; known are {', '.join(SETTINGS)}")
    return {
        name: _parse(name, value, f"config file {path}: {name}") if isinstance(value, str) else value
        for name, value in values.items()
    }


def _parse(setting: str, text: str, source: str) -> object:
    """A setting's value from text, as flags and variables give it."""
    try:
        match setting:
            case "nodes":
                nodes = tuple(part.strip() for part in text.split(",") if part.strip())
                if not nodes:
                    raise ConfigError(f"{text!r}: {_NO_NODES}")
                return nodes
            case "capacity" | "blend_arena":
                return parse_bytes(text)
            case (
                "stripe_pages"
                | "copies"
                | "blend_check_layer"
                | "blend_chunk_tokens"
                | "blend_min_tokens"
                | "blend_index_tokens"
            ):
                return int(text)
            case "deadline" | "spill_watermark" | "blend_ratio":
                return float(text)
            case _:
                return text
    except ValueError as error:
        raise ConfigError(f"{source}: {text!r} is not a number") from error
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
