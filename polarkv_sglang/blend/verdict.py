"""Whether a model was seen to blend rightly: a file that ``polarkv blend-check`` writes and engines want."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from polarkv_sglang.identity import digest_config

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

# Raised whenever a pass changes so that what was checked before says nothing.
VERDICT_FORMAT = 1


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What a check found; older files lack nothing that is asked of them."""

    model: str  # as it was named to the check
    passed: bool
    reasons: list[str]  # why not
    ratios: list[dict[str, float]]  # what was measured
    sglang: str
    format: int = VERDICT_FORMAT


def verdicts_folder(setting: str | None) -> Path:
    """Where verdicts are: ``setting`` (blend_verdicts), or polarkv/blend in the user's cache folder."""
    if setting is not None:
        return Path(setting)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "polarkv" / "blend"


def verdict_path(folder: Path, runner: ModelRunner) -> Path:
    """The file of the runner's model: named by its configuration and the dtype that it computes in."""
    config = digest_config(runner.model_config.hf_config.to_dict())
    name = hashlib.sha256(f"{config} {runner.dtype}".encode()).hexdigest()[:32]
    return folder / f"{name}.json"


def write_verdict(path: Path, verdict: Verdict) -> None:
    """Write it whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_bytes(msgspec.json.format(msgspec.json.encode(verdict)))
    scratch.replace(path)


def missing_verdict(path: Path) -> str | None:
    """Why the file at ``path`` does not let an engine blend; None if it does."""
    import sglang

    try:
        verdict = msgspec.json.decode(path.read_bytes(), type=Verdict)
    except FileNotFoundError:
        return f"the model was not checked ({path} is not there)"
    except (OSError, msgspec.MsgspecError) as error:
        return f"the verdict {path} cannot be read: {error}"
    if not verdict.passed:
        return f"the check failed: {'; '.join(verdict.reasons)}"
    if (verdict.sglang, verdict.format) != (sglang.__version__, VERDICT_FORMAT):
        return f"the model was checked with SGLang {verdict.sglang}, format {verdict.format}"
    return None
